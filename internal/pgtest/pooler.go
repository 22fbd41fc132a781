package pgtest

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
)

// Pooler is a PgBouncer in front of a server of a cluster. Its operations
// return when they have taken effect; each gives up after 20 s with an error
// that shows the end of the pooler's log.
//
// It lets the role postgres in, without a password, to the database postgres
// and to its console.
type Pooler struct {
	cluster  *Cluster
	program  string
	name     string
	port     uint16
	settings map[string]string

	op     sync.Mutex // held during an operation, taken before mu
	admin  *pgconn.PgConn
	killed bool // KILL has left the database paused, which needs a RESUME of its own

	mu     sync.Mutex // held for no wait
	run    *postmaster
	target *Server
	closed bool
}

// StartPooler starts a PgBouncer in front of a server for a test and closes it
// when the test and its subtests are over; if the test has failed by then it
// logs the end of the pooler's log. Settings are those of the [pgbouncer] section
// of its configuration, over the defaults of this package. Where there is no
// PgBouncer it skips the test, or fails it if MULTIPOOL_REQUIRE_PGBOUNCER=1.
func StartPooler(t TB, s *Server, settings map[string]string) *Pooler {
	t.Helper()
	requireProxy(t, "pgbouncer")
	p, err := s.NewPooler(context.Background(), settings)
	if err != nil {
		t.Fatalf("%v", err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("end of the log of %s (%s), %s:\n%s", p.name, p.Addr(), t.Name(), p.Log())
		}
		if err := p.Close(); err != nil {
			t.Logf("%v", err)
		}
	})
	return p
}

// NewPooler starts a PgBouncer in front of the server and returns when it
// answers. It lives until its Close, or the cluster's.
func (s *Server) NewPooler(ctx context.Context, settings map[string]string) (*Pooler, error) {
	program, err := findProxy("pgbouncer")
	if err != nil {
		return nil, err
	}
	c := s.cluster
	for range 10 {
		p, err := c.newPooler(program, s, settings)
		if err != nil {
			return nil, err
		}
		if err = p.start(ctx); err == nil {
			return p, nil
		}
		taken := strings.Contains(p.Log(), "in use")
		if err = errors.Join(err, p.Close()); !taken || ctx.Err() != nil {
			return nil, err
		}
	}
	return nil, fmt.Errorf("pgtest: pooler: %w", errPortTaken)
}

func (c *Cluster) newPooler(program string, s *Server, settings map[string]string) (*Pooler, error) {
	port, err := ports.reserve(c.cache)
	if err != nil {
		return nil, err
	}
	p := &Pooler{
		cluster: c, program: program, name: fmt.Sprintf("pooler%d", port), port: port,
		settings: maps.Clone(poolerSettings), target: s,
	}
	maps.Copy(p.settings, settings)
	return p, nil
}

// poolerSettings make PgBouncer notice changes at once. Times are in seconds.
var poolerSettings = map[string]string{
	"pool_mode":              "transaction",
	"default_pool_size":      "20",
	"max_client_conn":        "500",
	"server_login_retry":     "1",
	"query_wait_timeout":     "120",
	"server_check_delay":     "0",
	"server_lifetime":        "3600",
	"tcp_keepalive":          "1",
	"listen_addr":            "127.0.0.1",
	"unix_socket_dir":        "",
	"auth_type":              "trust",
	"admin_users":            "postgres",
	"log_connections":        "0",
	"log_disconnections":     "0",
	"server_tls_sslmode":     "disable",
	"server_connect_timeout": "5",
}

// findProxy returns the path of a program that stands in front of servers; the error says what to install.
func findProxy(name string) (string, error) {
	for _, dir := range []string{"", "/usr/sbin/", "/usr/local/sbin/", "/usr/local/bin/", "/opt/homebrew/bin/"} {
		if path, err := exec.LookPath(dir + name); err == nil {
			return path, nil
		}
	}
	return "", fmt.Errorf("pgtest: no %s found: install it (Debian, Ubuntu, Fedora, Alpine, Homebrew: %[1]s)", name)
}

// requireProxy skips a test where the program is not there, or fails it where MULTIPOOL_REQUIRE_<PROGRAM>=1.
func requireProxy(t TB, name string) {
	t.Helper()
	_, err := findProxy(name)
	switch {
	case err == nil:
	case os.Getenv("MULTIPOOL_REQUIRE_"+strings.ToUpper(name)) == "1":
		t.Fatalf("%v", err)
	default:
		t.Skipf("%v", err)
	}
}

// Host returns 127.0.0.1.
func (p *Pooler) Host() string { return "127.0.0.1" }

// Port returns the pooler's TCP port, the same until it is closed.
func (p *Pooler) Port() uint16 { return p.port }

// Addr returns host and port.
func (p *Pooler) Addr() string { return net.JoinHostPort(p.Host(), strconv.Itoa(int(p.port))) }

// ConnString returns a URL as Server.ConnString does.
func (p *Pooler) ConnString(params ...string) string {
	return connString([]*Server{{port: p.port}}, params)
}

func (p *Pooler) file(suffix string) string { return p.cluster.folder.join(p.name + suffix) }

// Log returns the end of the pooler's log, up to 16 KiB.
func (p *Pooler) Log() string {
	text, _ := os.ReadFile(p.file(".log")) // what could be read is what there is to show
	return string(text[max(0, len(text)-16<<10):])
}

func (p *Pooler) errorf(format string, args ...any) error {
	lines := strings.Split(strings.TrimRight(p.Log(), "\n"), "\n")
	return &serverError{fmt.Errorf("pgtest: "+p.name+": "+format, args...), strings.Join(lines[max(0, len(lines)-12):], "\n")}
}

// Running reports whether the process lives.
func (p *Pooler) Running() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.run.running()
}

// Start starts a pooler that does not run.
func (p *Pooler) Start() error {
	p.op.Lock()
	defer p.op.Unlock()
	ctx, cancel := bounded()
	defer cancel()
	return p.start(ctx)
}

func (p *Pooler) start(ctx context.Context) error {
	if p.Running() {
		return nil
	}
	if err := p.writeConfig(); err != nil {
		return err
	}
	p.killed = false
	if err := p.spawn(); err != nil {
		return err
	}
	return eventually(ctx, func(ctx context.Context) error {
		if !p.Running() {
			return permanent{p.errorf("%w: it ended while it was starting", errNotRunning)}
		}
		_, err := p.console(ctx, "show version")
		return err
	})
}

func (p *Pooler) writeConfig() error {
	p.mu.Lock()
	target := p.target
	p.mu.Unlock()
	var b strings.Builder
	fmt.Fprintf(&b, "[databases]\npostgres = host=%s port=%d dbname=postgres\n[pgbouncer]\n", target.Host(), target.Port())
	fmt.Fprintf(&b, "listen_port = %d\nauth_file = %s\n", p.port, p.file(".users"))
	for _, name := range slices.Sorted(maps.Keys(p.settings)) {
		fmt.Fprintf(&b, "%s = %s\n", name, p.settings[name])
	}
	if err := p.cluster.writeFile(p.file(".users"), "\"postgres\" \"\"\n"); err != nil {
		return err
	}
	return p.cluster.writeFile(p.file(".ini"), b.String())
}

// spawn executes PgBouncer in the foreground. The folder in its arguments is
// what the watchdog knows it by.
func (p *Pooler) spawn() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return p.errorf("it is closed")
	}
	run, err := p.cluster.spawn(p.file(".log"), p.program, p.file(".ini"))
	if err != nil {
		return p.errorf("%w", err)
	}
	p.run = run
	return nil
}

// spawn executes a program in the foreground that stands in front of the servers, as their user.
func (c *Cluster) spawn(logFile, program string, args ...string) (*postmaster, error) {
	log, err := os.OpenFile(logFile, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd := exec.Command(program, args...)
	c.acct.apply(cmd)
	cmd.Dir, cmd.Env = c.folder.path, serverEnv()
	cmd.Stdout, cmd.Stderr = log, log

	// Under the lock that Close takes, so that it sees all of this or none.
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil, errors.New("the cluster is closed")
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	run := &postmaster{pid: cmd.Process.Pid, gone: make(chan struct{})}
	go func() {
		_ = cmd.Wait() // the exit code of one that was killed is no news
		close(run.gone)
	}()
	return run, nil
}

// Console executes a command of PgBouncer's console, such as "reconnect", and
// returns the rows of its answer.
func (p *Pooler) Console(command string) ([][]string, error) {
	p.op.Lock()
	defer p.op.Unlock()
	ctx, cancel := bounded()
	defer cancel()
	return p.console(ctx, command)
}

// console keeps one connection: a pooler that is suspended lets nobody in, and
// goes on when whoever suspended it leaves.
func (p *Pooler) console(ctx context.Context, command string) ([][]string, error) {
	if p.admin == nil || p.admin.IsClosed() {
		config, err := pgconn.ParseConfig(p.ConnString("dbname=pgbouncer", "connect_timeout=5", "target_session_attrs=any"))
		if err != nil {
			return nil, p.errorf("console: %w", err)
		}
		if p.admin, err = pgconn.ConnectConfig(ctx, config); err != nil {
			return nil, p.errorf("console: %w", err)
		}
	}
	results, err := p.admin.Exec(ctx, command).ReadAll()
	if err != nil {
		return nil, p.errorf("%s: %w", command, err)
	}
	var rows [][]string
	for _, r := range results {
		for _, row := range r.Rows {
			text := make([]string, len(row))
			for i, v := range row {
				text[i] = string(v)
			}
			rows = append(rows, text)
		}
	}
	return rows, nil
}

func (p *Pooler) command(command string) error {
	_, err := p.Console(command)
	return err
}

// Pause lets the transactions under way end, leaves the server, and keeps
// clients waiting until Resume; it still lets new ones in.
func (p *Pooler) Pause() error { return p.command("pause") }

// Suspend makes the pooler hear nobody, new clients included, until Resume.
func (p *Pooler) Suspend() error { return p.command("suspend") }

// Resume ends what Pause, Suspend or KillClients began.
func (p *Pooler) Resume() error {
	p.op.Lock()
	defer p.op.Unlock()
	ctx, cancel := bounded()
	defer cancel()
	command := "resume"
	if p.killed {
		command = "resume postgres"
	}
	_, err := p.console(ctx, command)
	p.killed = p.killed && err != nil
	return err
}

// Disable makes the pooler refuse new clients, until Enable.
func (p *Pooler) Disable() error { return p.command("disable postgres") }

// Enable ends what Disable began.
func (p *Pooler) Enable() error { return p.command("enable postgres") }

// KillClients drops all connections of clients and to the server, and leaves the
// pooler paused.
func (p *Pooler) KillClients() error {
	p.op.Lock()
	defer p.op.Unlock()
	ctx, cancel := bounded()
	defer cancel()
	_, err := p.console(ctx, "kill postgres")
	p.killed = err == nil
	return err
}

// Retarget makes the pooler lead to another server, as an address that moves
// would. Clients stay connected; it returns when none uses the old server any more.
func (p *Pooler) Retarget(s *Server) error {
	p.mu.Lock()
	p.target = s
	p.mu.Unlock()
	p.op.Lock()
	defer p.op.Unlock()
	if !p.Running() {
		return nil // the next start reads it
	}
	if err := p.writeConfig(); err != nil {
		return err
	}
	ctx, cancel := bounded()
	defer cancel()
	if _, err := p.console(ctx, "reload"); err != nil {
		return err
	}
	const portColumn = 5
	return eventually(ctx, func(ctx context.Context) error {
		servers, err := p.console(ctx, "show servers")
		if err != nil {
			return err
		}
		for _, row := range servers {
			if row[portColumn] != strconv.Itoa(int(s.Port())) {
				return p.errorf("still uses port %s", row[portColumn])
			}
		}
		return nil
	})
}

// Kill ends the pooler with SIGKILL.
func (p *Pooler) Kill() error {
	p.op.Lock()
	defer p.op.Unlock()
	return p.kill()
}

func (p *Pooler) kill() error {
	p.mu.Lock()
	run := p.run
	p.mu.Unlock()
	if err := run.kill(); err != nil {
		return p.errorf("%w", err)
	}
	return nil
}

// kill ends the process with SIGKILL, if it runs.
func (p *postmaster) kill() error {
	if !p.running() {
		return nil
	}
	if err := p.signal(sigKill); err != nil {
		return fmt.Errorf("kill: %w", err)
	}
	select {
	case <-p.gone:
		return nil
	case <-time.After(patience):
		return errors.New("survives kill -9")
	}
}

// Restart is Kill and Start.
func (p *Pooler) Restart() error {
	if err := p.Kill(); err != nil {
		return err
	}
	return p.Start()
}

// Close ends the pooler and removes what it left.
func (p *Pooler) Close() error {
	p.op.Lock()
	defer p.op.Unlock()
	p.mu.Lock()
	closed := p.closed
	p.closed = true
	p.mu.Unlock()
	if closed {
		return nil
	}
	err := p.kill()
	if p.admin != nil {
		ctx, cancel := bounded()
		defer cancel()
		_ = p.admin.Close(ctx) // nobody is there to say goodbye to
	}
	ports.release(p.port)
	for _, suffix := range []string{".ini", ".users", ".log"} {
		if e := os.Remove(p.file(suffix)); e != nil && !errors.Is(e, os.ErrNotExist) {
			err = errors.Join(err, fmt.Errorf("pgtest: %s: %w", filepath.Base(p.file(suffix)), e))
		}
	}
	return err
}
