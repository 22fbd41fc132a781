package pgtest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
)

// Server is one server of a cluster. Operations return when they have taken
// effect; each gives up after 20 s with an error that shows the end of
// the server's log.
type Server struct {
	cluster *Cluster
	name    string
	dir     string
	port    uint16

	op sync.Mutex // held during an operation, taken before mu

	files sync.Mutex // held while configuration is written, taken before mu

	mu       sync.Mutex // held for no wait
	run      *postmaster
	frozen   bool
	conf     map[string]string // settings, this server's own included
	upstream *Server           // whom it follows; nil for a primary
	cut      bool              // no replication until RestoreReceiver
}

// Mode is a way to stop a server.
type Mode int

// The ways to stop a server, which PostgreSQL calls shutdown modes.
const (
	// Fast ends all sessions and shuts down in order. A primary waits until its
	// standbys have received everything: with a frozen one, use Immediate.
	Fast Mode = iota
	// Smart refuses new sessions and waits for the present ones to end.
	Smart
	// Immediate ends everything at once; the next start recovers as after a crash.
	Immediate
)

func (m Mode) String() string {
	switch m {
	case Fast:
		return "fast"
	case Smart:
		return "smart"
	case Immediate:
		return "immediate"
	}
	return "Mode(" + strconv.Itoa(int(m)) + ")"
}

// Name returns node1 for the original primary, node2 and so on for the
// others. A standby replicates under this application_name.
func (s *Server) Name() string { return s.name }

// Host returns 127.0.0.1.
func (s *Server) Host() string { return "127.0.0.1" }

// Port returns the server's TCP port, the same until the cluster is closed.
func (s *Server) Port() uint16 { return s.port }

// Addr returns host and port, as in "127.0.0.1:15433".
func (s *Server) Addr() string { return s.Host() + ":" + strconv.Itoa(int(s.port)) }

// Dir returns the data directory.
func (s *Server) Dir() string { return s.dir }

// ConnString is Cluster.ConnString for this server alone.
func (s *Server) ConnString(params ...string) string { return connString([]*Server{s}, params) }

// Running reports whether the postmaster lives, frozen or not.
func (s *Server) Running() bool { return s.postmaster().running() }

func (s *Server) postmaster() *postmaster {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.run
}

// follows returns the server that s is a standby of, nil for none.
func (s *Server) follows() *Server {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.upstream
}

// root returns the primary at the end of the chain that s follows.
func (s *Server) root() *Server {
	for range s.cluster.servers {
		up := s.follows()
		if up == nil {
			break
		}
		s = up
	}
	return s
}

func (s *Server) isFrozen() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.frozen
}

// clusterName is the setting cluster_name, which PostgreSQL shows in the title
// of every process: by it they are known to belong to this server.
func (s *Server) clusterName() string {
	folder := s.cluster.folder.path
	return folder[strings.LastIndexByte(folder, '/')+1:] + "/" + s.name
}

func (s *Server) logFile() string { return s.cluster.folder.join(s.name + ".log") }

// Log returns the end of the server's log, up to 16 KiB.
func (s *Server) Log() string {
	end := s.logSize()
	return s.logFrom(max(0, end-16<<10))
}

func (s *Server) logSize() int64 {
	info, err := os.Stat(s.logFile())
	if err != nil {
		return 0
	}
	return info.Size()
}

func (s *Server) logFrom(offset int64) string {
	f, err := os.Open(s.logFile())
	if err != nil {
		return ""
	}
	defer f.Close()
	text, _ := io.ReadAll(io.NewSectionReader(f, offset, 1<<20)) // what could be read is what there is to show
	return string(text)
}

// errorf returns an error that names the server and ends with the last lines of
// its log. It reads them now: when the error is shown, the cluster may be gone.
func (s *Server) errorf(format string, args ...any) error {
	return &serverError{fmt.Errorf("pgtest: "+s.name+": "+format, args...), s.logTail()}
}

func (s *Server) logTail() string {
	log := strings.TrimRight(s.logFrom(max(0, s.logSize()-2<<10)), "\n")
	lines := strings.Split(log, "\n")
	return strings.Join(lines[max(0, len(lines)-12):], "\n")
}

type serverError struct {
	err error
	log string
}

func (e *serverError) Error() string { return e.err.Error() + "\nend of its log:\n" + e.log }
func (e *serverError) Unwrap() error { return e.err }

// Conn returns a new connection as the role postgres to the database postgres.
// The caller closes it.
func (s *Server) Conn(ctx context.Context) (*pgx.Conn, error) {
	// What the environment says about connections is not meant for this one.
	conn, err := pgx.Connect(ctx, s.ConnString("connect_timeout=10", "target_session_attrs=any"))
	if err != nil {
		return nil, s.errorf("%w", err)
	}
	return conn, nil
}

// Exec executes sql on a connection of its own; without args it may hold
// several statements, which then are one transaction.
func (s *Server) Exec(ctx context.Context, sql string, args ...any) error {
	conn, err := s.Conn(ctx)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	if _, err := conn.Exec(ctx, sql, args...); err != nil {
		return s.errorf("%w", err)
	}
	return nil
}

// String returns the only value of the first row of a query, as text; NULL
// is the empty string.
func (s *Server) String(ctx context.Context, sql string, args ...any) (string, error) {
	var v *string
	if err := s.scan(ctx, &v, sql, args); err != nil || v == nil {
		return "", err
	}
	return *v, nil
}

// Int returns the only value of the first row of a query, an integer.
func (s *Server) Int(ctx context.Context, sql string, args ...any) (int64, error) {
	var v int64
	err := s.scan(ctx, &v, sql, args)
	return v, err
}

func (s *Server) scan(ctx context.Context, dst any, sql string, args []any) error {
	conn, err := s.Conn(ctx)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	if err := conn.QueryRow(ctx, sql, args...).Scan(dst); err != nil {
		return s.errorf("%w", err)
	}
	return nil
}

func (s *Server) lsn(ctx context.Context, expr string) (uint64, error) {
	text, err := s.String(ctx, "select "+expr+"::text")
	if err != nil {
		return 0, err
	}
	return parseLSN(text)
}

// Start starts the server, in the role it had, and returns when it accepts
// connections; a standby may not stream yet. A server that runs already is
// only waited for.
func (s *Server) Start() error {
	s.op.Lock()
	defer s.op.Unlock()
	if s.isFrozen() {
		return s.errorf("start: %w", errFrozen)
	}
	return s.start()
}

func (s *Server) start() error {
	ctx, cancel := bounded()
	defer cancel()
	if !s.Running() {
		if err := s.waitNoOrphans(ctx); err != nil {
			return err
		}
		if err := s.writeConfig(); err != nil {
			return err
		}
		if err := s.spawn(); err != nil {
			return err
		}
	}
	return s.waitReady(ctx)
}

// startFresh starts a new copy of the template.
func (s *Server) startFresh(ctx context.Context) error {
	if s.upstream != nil {
		if err := s.writeFile("standby.signal", ""); err != nil {
			return err
		}
	}
	if err := s.writeConfig(); err != nil {
		return err
	}
	if err := s.spawn(); err != nil {
		return err
	}
	err := s.waitReady(ctx)
	if err == nil {
		return nil
	}
	switch log := s.logFrom(0); {
	case strings.Contains(log, "Address already in use"):
		return fmt.Errorf("%w: %w", errPortTaken, err)
	case strings.Contains(log, "contains errors"): // the configuration file, by Options.Settings
		return err
	}
	return fmt.Errorf("%w: %w", errBadStart, err)
}

// waitNoOrphans waits for the children of a killed postmaster to notice and
// end: no new one starts as long as they hold the shared memory. They do so for
// a moment after they have lost the command line that they are known by.
func (s *Server) waitNoOrphans(ctx context.Context) error {
	var orphans []int
	looked := false
	return eventually(ctx, func(context.Context) error {
		list, err := s.processes()
		if err != nil {
			return permanent{err}
		}
		for _, p := range list {
			orphans = append(orphans, p.pid)
		}
		if !looked { // what dies later has been in the list
			orphans = append(orphans, dying("postgres")...)
			looked = true
		}
		if orphans = slices.DeleteFunc(orphans, ended); len(orphans) > 0 {
			return s.errorf("processes %v of its last run live, or others die", orphans)
		}
		return nil
	})
}

// spawn executes the postmaster.
func (s *Server) spawn() error {
	log, err := os.OpenFile(s.logFile(), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return s.errorf("%w", err)
	}
	defer log.Close()
	c := s.cluster
	// On the command line these win over any configuration.
	cmd := exec.Command(c.bin.path("postgres"), "-D", s.dir,
		"-c", "cluster_name="+s.clusterName(), "-c", "port="+strconv.Itoa(int(s.port)))
	c.acct.apply(cmd)
	cmd.Dir, cmd.Env = c.folder.path, serverEnv()
	cmd.Stdout, cmd.Stderr = log, log

	// Under the lock that Close takes, so that it sees all of this or none.
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return s.errorf("the cluster is closed")
	}
	if err := cmd.Start(); err != nil {
		return s.errorf("%w", err)
	}
	run := &postmaster{pid: cmd.Process.Pid, gone: make(chan struct{})}
	go func() {
		_ = cmd.Wait() // a killed server's exit code is no news
		close(run.gone)
	}()
	s.mu.Lock()
	s.run, s.frozen = run, false
	s.mu.Unlock()
	return nil
}

// waitReady waits until the server accepts connections. It reads what the
// postmaster says about itself in its pid file, so as not to fill the log with
// failed dials.
func (s *Server) waitReady(ctx context.Context) error {
	run := s.postmaster()
	return eventually(ctx, func(ctx context.Context) error {
		if !run.running() {
			return permanent{s.errorf("%w: it ended while it was starting", errNotRunning)}
		}
		text, err := os.ReadFile(s.dir + "/postmaster.pid")
		if err != nil {
			return s.errorf("starting")
		}
		lines := strings.Split(string(text), "\n")
		if len(lines) < 8 || lines[0] != strconv.Itoa(run.pid) || strings.TrimSpace(lines[7]) != "ready" {
			return s.errorf("starting")
		}
		conn, err := s.Conn(ctx)
		if err != nil {
			return err
		}
		return conn.Close(ctx)
	})
}

// WaitReady waits until the server accepts connections, as after KillBackend.
func (s *Server) WaitReady(ctx context.Context) error { return s.waitReady(ctx) }

// Signal asks the server to stop and returns at once. It does nothing to a
// server that does not run; a frozen one obeys when it is thawed.
func (s *Server) Signal(mode Mode) error {
	run := s.postmaster()
	if !run.running() {
		return nil
	}
	sig := sigFast
	switch mode {
	case Smart:
		sig = sigSmart
	case Immediate:
		sig = sigImmediate
	}
	if err := run.signal(sig); err != nil {
		return s.errorf("stop: %w", err)
	}
	return nil
}

// Stop stops the server and waits until it is gone, which with Smart is when its
// last client has left. It does nothing to a server that does not run.
func (s *Server) Stop(mode Mode) error {
	s.op.Lock()
	defer s.op.Unlock()
	return s.stop(mode)
}

func (s *Server) stop(mode Mode) error {
	if s.isFrozen() {
		return s.errorf("stop: %w", errFrozen)
	}
	run := s.postmaster()
	if err := s.Signal(mode); err != nil {
		return err
	}
	if run == nil {
		return nil
	}
	select {
	case <-run.gone:
		return nil
	case <-time.After(patience):
		return s.errorf("does not stop within %v (%v)", patience, mode)
	}
}

// Restart stops the server, if it runs, and starts it.
func (s *Server) Restart(mode Mode) error {
	s.op.Lock()
	defer s.op.Unlock()
	if err := s.stop(mode); err != nil {
		return err
	}
	return s.start()
}

// quit ends the server for Close, within a second or not at all.
func (s *Server) quit() error {
	run := s.postmaster()
	if !run.running() || s.isFrozen() {
		return nil
	}
	_ = kill(run.pid, sigImmediate) // else the watchdog ends it
	select {
	case <-run.gone:
	case <-time.After(time.Second):
	}
	return nil
}

// reap waits for a server that was killed.
func (s *Server) reap() error {
	run := s.postmaster()
	if run == nil {
		return nil
	}
	select {
	case <-run.gone:
	case <-time.After(time.Second):
	}
	return nil
}

// Set changes settings, over what they are, for now and for later starts. On
// a running server it reloads them, which does not affect settings that only a
// start can change; the error says if PostgreSQL rejects one.
func (s *Server) Set(settings map[string]string) error {
	s.op.Lock()
	defer s.op.Unlock()
	if err := (Options{Settings: settings}).validate(); err != nil {
		return err
	}
	s.mu.Lock()
	maps.Copy(s.conf, settings)
	s.mu.Unlock()
	return s.applyConfig()
}

// applyConfig writes the configuration and, on a running server, waits until
// it is in force for new sessions and signalled to all processes.
func (s *Server) applyConfig() error {
	if err := s.writeConfig(); err != nil {
		return err
	}
	run := s.postmaster()
	if !run.running() || s.isFrozen() {
		return nil
	}
	ctx, cancel := bounded()
	defer cancel()
	const loaded = "select pg_conf_load_time()::text"
	before, err := s.String(ctx, loaded)
	if err != nil {
		return err
	}
	if err := kill(run.pid, sigReload); err != nil {
		return s.errorf("reload: %w", err)
	}
	err = eventually(ctx, func(ctx context.Context) error {
		now, err := s.String(ctx, loaded)
		if err == nil && now == before {
			err = s.errorf("does not reload its settings")
		}
		return err
	})
	if err != nil {
		return err
	}
	// What only a start can change counts as an error there as well.
	wrong, err := s.String(ctx, `select string_agg(coalesce(f.name, '') || ': ' || f.error, '; ')
		from pg_file_settings f left join pg_settings s on s.name = f.name
		where f.error is not null and s.context is distinct from 'postmaster'`)
	if err == nil && wrong != "" {
		err = s.errorf("settings: %s", wrong)
	}
	return err
}

var (
	errNotRunning = errors.New("not running")
	errFrozen     = errors.New("frozen: thaw it")
)
