package pgtest

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"strings"
	"sync"

	"github.com/jackc/pgx/v5"
)

// Cluster is a running cluster. Its methods and those of its servers may be
// called concurrently; operations on one server run one after another.
type Cluster struct {
	options Options
	bin     binaries
	acct    account
	cache   string
	folder  *folder
	dog     *watchdog
	servers []*Server

	mu      sync.Mutex // held for no I/O
	primary *Server
	closed  bool

	closeOnce sync.Once
	closeErr  error
}

// New starts a cluster and returns when every standby streams from the
// primary. The cluster lives until Close or the end of the process; the end of
// ctx after New has returned does not matter. The first call on a machine
// takes a second or more, as it runs initdb.
func New(ctx context.Context, o Options) (*Cluster, error) {
	if err := o.validate(); err != nil {
		return nil, err
	}
	bin, err := findBinaries()
	if err != nil {
		return nil, err
	}
	acct, err := serverAccount()
	if err != nil {
		return nil, err
	}
	tmpl, err := newTemplate(bin, acct, o.settings(), o.Variant)
	if err != nil {
		return nil, err
	}
	forgotten := false
	for attempt := 1; ; attempt++ {
		c, err := start(ctx, o, tmpl)
		switch {
		case err == nil:
			return c, nil
		case ctx.Err() != nil || attempt == 10:
			return nil, err
		case errors.Is(err, errPortTaken):
			// Somebody was faster: try other ports.
		case errors.Is(err, errBadStart) && !forgotten:
			// The template may be damaged in a way its manifest does not show.
			forgotten = true
			if tmpl.forget() != nil {
				return nil, err
			}
		default:
			return nil, err
		}
	}
}

var (
	errPortTaken = errors.New("the port is taken")
	errBadStart  = errors.New("the server does not start")
)

func start(ctx context.Context, o Options, tmpl *template) (_ *Cluster, err error) {
	root, err := dataRoot(tmpl.acct)
	if err != nil {
		return nil, err
	}
	sweep(tmpl.acct, root)
	f, err := newFolder(tmpl.acct, root)
	if err != nil {
		return nil, err
	}
	dog, err := startWatchdog(tmpl.acct, f.path)
	if err != nil {
		return nil, errors.Join(err, f.remove())
	}
	c := &Cluster{options: o, bin: tmpl.bin, acct: tmpl.acct, cache: tmpl.cache, folder: f, dog: dog}
	defer func() {
		if err != nil {
			err = errors.Join(err, c.Close())
		}
	}()
	if err := c.addServers(); err != nil {
		return nil, err
	}
	dirs := make([]string, len(c.servers))
	for i, s := range c.servers {
		dirs[i] = s.dir
	}
	if err := tmpl.copyTo(ctx, f, dirs); err != nil {
		return nil, err
	}
	if o.TLS {
		if err := c.writeCertificates(); err != nil {
			return nil, err
		}
	}
	if err := c.each(func(s *Server) error { return s.startFresh(ctx) }); err != nil {
		return nil, err
	}
	return c, c.waitStreaming(ctx)
}

// addServers makes the servers, all but the first as its standbys, without
// starting them.
func (c *Cluster) addServers() error {
	for i := range 1 + c.options.Standbys {
		port, err := ports.reserve(c.cache)
		if err != nil {
			return err
		}
		name := fmt.Sprintf("node%d", i+1)
		s := &Server{cluster: c, name: name, dir: c.folder.join(name), port: port, conf: c.options.settings()}
		if c.options.TLS {
			s.conf["ssl"] = "on"
			s.conf["ssl_cert_file"] = c.folder.join(certFile)
			s.conf["ssl_key_file"] = c.folder.join(keyFile)
		}
		c.servers = append(c.servers, s)
		s.upstream = c.servers[0]
	}
	c.primary = c.servers[0]
	c.primary.upstream = nil
	return nil
}

// every runs f for all servers at once.
func (c *Cluster) each(f func(*Server) error) error {
	errs := make([]error, len(c.servers))
	var wg sync.WaitGroup
	for i, s := range c.servers {
		wg.Go(func() { errs[i] = f(s) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

// waitStreaming waits until the primary of a new cluster feeds all standbys.
func (c *Cluster) waitStreaming(ctx context.Context) error {
	if c.options.Standbys == 0 {
		return nil
	}
	conn, err := c.primary.Conn(ctx)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	return eventually(ctx, func(ctx context.Context) error {
		var n int
		err := conn.QueryRow(ctx, "select count(*) from pg_stat_replication where state = 'streaming'").Scan(&n)
		if err != nil {
			return permanent{c.primary.errorf("%w", err)}
		}
		if n < c.options.Standbys {
			return c.servers[c.options.Standbys].errorf("%d of %d standbys stream", n, c.options.Standbys)
		}
		return nil
	})
}

// Close stops all servers, without letting them finish anything, and removes
// every trace of the cluster. Calls after the first return what the first did.
func (c *Cluster) Close() error {
	c.closeOnce.Do(func() { c.closeErr = c.close() })
	return c.closeErr
}

func (c *Cluster) close() error {
	c.mu.Lock()
	c.closed = true
	c.mu.Unlock()
	// The watchdog alone would do; but what ends by itself does so without
	// being looked for, and gives its shared memory back.
	_ = c.each(func(s *Server) error { return s.quit() })
	err := c.dog.release()
	_ = c.each(func(s *Server) error { return s.reap() })
	for _, s := range c.servers {
		ports.release(s.port)
	}
	return errors.Join(err, c.folder.remove())
}

// Primary returns the server that is the primary as the operations of this
// package have made it: the first one until another is promoted. It says
// nothing about whether that server runs.
func (c *Cluster) Primary() *Server {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.primary
}

// Standbys returns the servers that are standbys as the operations of this
// package have made them, in the order of Servers, whether they run or not. A
// former primary is none until it follows another server.
func (c *Cluster) Standbys() []*Server {
	var list []*Server
	for _, s := range c.servers {
		if s.follows() != nil {
			list = append(list, s)
		}
	}
	return list
}

// Servers returns all servers in an order that never changes: the original
// primary first.
func (c *Cluster) Servers() []*Server { return append([]*Server(nil), c.servers...) }

// ConnString returns a URL that names all servers, in the order of Servers,
// the role postgres and the database postgres. Every param "key=value" is added
// to its query, where pgx takes user, password and dbname too. sslmode=disable
// is the default; a param replaces it, and "sslmode=" leaves it out.
func (c *Cluster) ConnString(params ...string) string { return connString(c.servers, params) }

func connString(servers []*Server, params []string) string {
	addrs := make([]string, len(servers))
	for i, s := range servers {
		addrs[i] = s.Addr()
	}
	keys := []string{"sslmode"}
	values := map[string]string{"sslmode": "disable"}
	for _, p := range params {
		key, value, _ := strings.Cut(p, "=")
		if _, ok := values[key]; !ok {
			keys = append(keys, key)
		}
		values[key] = value
	}
	var query []string
	for _, key := range keys {
		if key == "sslmode" && values[key] == "" {
			continue
		}
		query = append(query, url.QueryEscape(key)+"="+url.QueryEscape(values[key]))
	}
	u := "postgres://postgres@" + strings.Join(addrs, ",") + "/postgres"
	if len(query) > 0 {
		u += "?" + strings.Join(query, "&")
	}
	return u
}

// WaitCaughtUp waits until every running standby that follows the primary,
// directly or not, has replayed all that the primary has written until now. It
// gives up when ctx ends, and after 20 s; its error then names a standby that lags.
func (c *Cluster) WaitCaughtUp(ctx context.Context) error {
	primary := c.Primary()
	target, err := primary.lsn(ctx, "pg_current_wal_insert_lsn()")
	if err != nil {
		return err
	}
	target = reachable8k(target)
	for _, s := range c.Standbys() {
		if !s.Running() || s.root() != primary {
			continue
		}
		if err := s.waitReplayed(ctx, target); err != nil {
			return err
		}
	}
	return nil
}

func (s *Server) waitReplayed(ctx context.Context, target uint64) error {
	var conn *pgx.Conn
	defer func() {
		if conn != nil {
			conn.Close(context.WithoutCancel(ctx))
		}
	}()
	return eventually(ctx, func(ctx context.Context) (err error) {
		if !s.Running() {
			return permanent{s.errorf("stopped while it was waited for")}
		}
		if conn == nil || conn.IsClosed() {
			if conn, err = s.Conn(ctx); err != nil {
				return err
			}
		}
		var at string
		const query = "select coalesce(pg_last_wal_replay_lsn(), '0/0')::text"
		if err := conn.QueryRow(ctx, query).Scan(&at); err != nil {
			return s.errorf("%w", err)
		}
		if lsn, err := parseLSN(at); err != nil || lsn < target {
			return s.errorf("replayed up to %s only, not %X/%X", at, target>>32, uint32(target))
		}
		return nil
	})
}

// reachable8k corrects an insert position that no standby may ever report: when
// a record ends exactly at the end of a WAL page (8 kB), the insert position
// already lies past the header of the next page (24 bytes, or 40 in the first
// page of a segment), while an idle standby has replayed up to the header only.
func reachable8k(lsn uint64) uint64 {
	if offset := lsn % 8192; offset == 24 || offset == 40 {
		return lsn - offset
	}
	return lsn
}

func parseLSN(text string) (uint64, error) {
	var hi, lo uint64
	if _, err := fmt.Sscanf(text, "%X/%X", &hi, &lo); err != nil {
		return 0, fmt.Errorf("pgtest: LSN %q: %w", text, err)
	}
	return hi<<32 | lo, nil
}
