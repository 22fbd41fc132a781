package main

import (
	"bytes"
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os/exec"
	"strings"
	"text/template"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/pgmultipool/multipool/internal/pgtest"
)

// What Patroni goes by, in whole seconds. These are the shortest times that its documentation allows: a leader that
// dies without a word is missed when its lease has run out, ttl after it was last renewed, which happens every loopWait.
const (
	shortestTTL  = 20 * time.Second
	loopWait     = time.Second
	retryTimeout = 3 * time.Second
)

//go:embed patroni.yml
var configText string

var configTemplate = template.Must(template.New("patroni.yml").Parse(configText))

// cluster is an etcd and the nodes of a Patroni cluster, all in one sandbox.
type cluster struct {
	box   *pgtest.Sandbox
	ttl   time.Duration
	etcd  string // the address of its clients
	store *pgtest.Process
	nodes []*node
}

// node is a Patroni and its PostgreSQL.
type node struct {
	name    string
	addr    string // of PostgreSQL
	rest    string // of Patroni
	dataDir string
	process *pgtest.Process
}

// newCluster starts an etcd and n nodes. What it has started is gone with the sandbox, also if it fails.
func newCluster(ctx context.Context, box *pgtest.Sandbox, n int, ttl time.Duration) (*cluster, error) {
	c := &cluster{box: box, ttl: ttl}
	if err := c.startStore(ctx); err != nil {
		return nil, err
	}
	for i := range n {
		name := fmt.Sprintf("node%d", i+1)
		m := &node{name: name, dataDir: box.Path(name)}
		if err := c.reserve(&m.addr, &m.rest); err != nil {
			return nil, err
		}
		c.nodes = append(c.nodes, m)
	}
	for _, m := range c.nodes {
		if err := c.start(m); err != nil {
			return nil, err
		}
	}
	_, err := c.untilWhole(ctx)
	return c, err
}

// reserve fills in addresses.
func (c *cluster) reserve(addrs ...*string) error {
	for _, addr := range addrs {
		port, err := c.box.Port()
		if err != nil {
			return err
		}
		*addr = fmt.Sprintf("127.0.0.1:%d", port)
	}
	return nil
}

// startStore starts an etcd of one member.
func (c *cluster) startStore(ctx context.Context) error {
	program, err := find("etcd")
	if err != nil {
		return err
	}
	var peers string
	if err := c.reserve(&c.etcd, &peers); err != nil {
		return err
	}
	c.store, err = c.box.Start("etcd", program, "--name=etcd", "--data-dir="+c.box.Path("etcd"),
		"--listen-client-urls=http://"+c.etcd, "--advertise-client-urls=http://"+c.etcd,
		"--listen-peer-urls=http://"+peers, "--initial-advertise-peer-urls=http://"+peers,
		"--initial-cluster=etcd=http://"+peers)
	if err != nil {
		return err
	}
	return eventually(ctx, patience, func(ctx context.Context) error {
		if !c.store.Running() {
			return permanent{fmt.Errorf("etcd has ended:\n%s", c.store.Log())}
		}
		_, err := ask(ctx, http.MethodGet, c.etcd, "/health", nil)
		return err
	})
}

// start starts a node's Patroni, which starts its PostgreSQL.
func (c *cluster) start(m *node) error {
	program, err := find("patroni")
	if err != nil {
		return err
	}
	var text bytes.Buffer
	err = configTemplate.Execute(&text, map[string]any{
		// PostgreSQL shows the scope in the title of every process, by which the sandbox knows its own.
		"Scope": c.box.Name(), "Name": m.name, "Rest": m.rest, "Etcd": c.etcd, "Addr": m.addr,
		"DataDir": m.dataDir, "BinDir": c.box.BinDir(), "Passfile": c.box.Path(m.name + ".pgpass"),
		"TTL": int(c.ttl.Seconds()), "LoopWait": int(loopWait.Seconds()), "RetryTimeout": int(retryTimeout.Seconds()),
	})
	if err != nil {
		return err
	}
	if err := c.box.WriteFile(m.name+".yml", text.String()); err != nil {
		return err
	}
	m.process, err = c.box.Start(m.name, program, c.box.Path(m.name+".yml"))
	return err
}

func find(program string) (string, error) {
	path, err := exec.LookPath(program)
	if err != nil {
		return "", fmt.Errorf("%w: \"make patroni\" installs it where there is apt", err)
	}
	return path, nil
}

// kill ends a node's Patroni and PostgreSQL at once with SIGKILL.
func (c *cluster) kill(m *node) error { return c.box.Kill(m.process, m.dataDir) }

// switchover hands the leadership to another node, as for maintenance. It returns the node that Patroni has chosen,
// when that has been promoted.
func (c *cluster) switchover(ctx context.Context, from *node) (*node, error) {
	if _, err := ask(ctx, http.MethodPost, from.rest, "/switchover", map[string]string{"leader": from.name}); err != nil {
		return nil, fmt.Errorf("switchover: %w", err)
	}
	return c.untilLedByOther(ctx, from)
}

// leader returns the node that holds the leader's lease; it may be dead.
func (c *cluster) leader(ctx context.Context) (*node, error) {
	roles, err := c.roles(ctx)
	if err != nil {
		return nil, err
	}
	for _, m := range c.nodes {
		if roles[m.name] == "leader" {
			return m, nil
		}
	}
	return nil, fmt.Errorf("nobody leads: %v", roles)
}

// roles returns the role of every node, as the first Patroni that answers tells it.
func (c *cluster) roles(ctx context.Context) (map[string]string, error) {
	var errs []error
	for _, m := range c.nodes {
		answer, err := ask(ctx, http.MethodGet, m.rest, "/cluster", nil)
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", m.name, err))
			continue
		}
		var told struct{ Members []struct{ Name, Role string } }
		if err := json.Unmarshal(answer, &told); err != nil {
			return nil, fmt.Errorf("%s: %w", m.name, err)
		}
		roles := make(map[string]string)
		for _, member := range told.Members {
			roles[member.Name] = member.Role
		}
		return roles, nil
	}
	return nil, errors.Join(errs...)
}

// untilLedByOther waits until another node than the one given leads, and returns it.
func (c *cluster) untilLedByOther(ctx context.Context, than *node) (*node, error) {
	var led *node
	err := eventually(ctx, c.ttl+patience, func(ctx context.Context) (err error) {
		if led, err = c.leader(ctx); err == nil && led == than {
			err = fmt.Errorf("%s still leads", led.name)
		}
		return err
	})
	return led, err
}

// untilWhole waits until all nodes but one stream from that one, the leader, which waits at every commit for one of
// them. It returns the leader. A leader that dies in this state takes no acknowledged write with it.
func (c *cluster) untilWhole(ctx context.Context) (*node, error) {
	var led *node
	err := eventually(ctx, c.ttl+patience, func(ctx context.Context) (err error) {
		for _, m := range c.nodes {
			if !m.process.Running() {
				return permanent{fmt.Errorf("the Patroni of %s has ended:\n%s", m.name, m.process.Log())}
			}
		}
		led, err = c.whole(ctx)
		return err
	})
	if err != nil {
		for _, m := range c.nodes {
			err = fmt.Errorf("%w\nend of the log of %s:\n%s", err, m.name, m.process.Log())
		}
	}
	return led, err
}

func (c *cluster) whole(ctx context.Context) (*node, error) {
	roles, err := c.roles(ctx)
	if err != nil {
		return nil, err
	}
	var led *node
	synchronous := false
	for _, m := range c.nodes {
		switch roles[m.name] {
		case "leader":
			led = m
		case "sync_standby":
			synchronous = true
		}
	}
	if led == nil || !synchronous {
		return nil, fmt.Errorf("the leader or its synchronous standby is missing: %v", roles)
	}
	conn, err := led.connect(ctx)
	if err != nil {
		return nil, err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	var streaming, waitedFor int
	err = conn.QueryRow(ctx, `select count(*), count(*) filter (where sync_state = 'sync')
		from pg_stat_replication where state = 'streaming' and not pg_is_in_recovery()`).Scan(&streaming, &waitedFor)
	if err == nil && (streaming < len(c.nodes)-1 || waitedFor == 0) {
		err = fmt.Errorf("%d nodes stream from %s, which waits for %d", streaming, led.name, waitedFor)
	}
	return led, err
}

// connString names every node's PostgreSQL; which of them is the primary is found out.
func (c *cluster) connString(params ...string) string {
	addrs := make([]string, len(c.nodes))
	for i, m := range c.nodes {
		addrs[i] = m.addr
	}
	return connString(strings.Join(addrs, ","), params...)
}

func connString(addrs string, params ...string) string {
	return "postgres://postgres@" + addrs + "/postgres?" + strings.Join(append(params, "sslmode=disable"), "&")
}

// connect returns a connection that no pool knows of.
func (m *node) connect(ctx context.Context) (*pgx.Conn, error) {
	conn, err := pgx.Connect(ctx, connString(m.addr, "connect_timeout=1", "target_session_attrs=any"))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", m.name, err)
	}
	return conn, nil
}

// ask makes a request of Patroni or etcd and returns the body of the answer.
func ask(ctx context.Context, method, addr, path string, content any) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	text, err := json.Marshal(content)
	if err != nil {
		return nil, err
	}
	request, err := http.NewRequestWithContext(ctx, method, "http://"+addr+path, bytes.NewReader(text))
	if err != nil {
		return nil, err
	}
	answer, err := client.Do(request)
	if err != nil {
		return nil, err
	}
	defer answer.Body.Close()
	body, err := io.ReadAll(answer.Body)
	if err == nil && answer.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s %s: %s: %s", method, path, answer.Status, body)
	}
	return body, err
}

// client asks the loopback interface only: no proxy of the environment, and no connection kept to what will be killed.
var client = &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
