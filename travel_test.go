package multipool

import (
	"bytes"
	"context"
	"database/sql"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgconn/ctxwatch"
	"github.com/jackc/pgx/v5/pgproto3"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/jackc/pgx/v5/stdlib"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/pgmultipool/multipool/internal/pgtest"
	"github.com/pgmultipool/multipool/internal/quota"
)

// What we put into a configuration or a connection is not to be found in what the program makes of a copy.

// everyEvent is a tracer of everything, which counts.
type everyEvent struct {
	mu sync.Mutex
	n  map[string]int
}

func (e *everyEvent) add(what string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.n == nil {
		e.n = map[string]int{}
	}
	e.n[what]++
}

// take returns what has been since the last take.
func (e *everyEvent) take() map[string]int {
	e.mu.Lock()
	defer e.mu.Unlock()
	n := e.n
	e.n = nil
	return n
}

func (e *everyEvent) TraceQueryStart(ctx context.Context, _ *pgx.Conn, _ pgx.TraceQueryStartData) context.Context {
	e.add("query")
	return ctx
}

func (e *everyEvent) TraceQueryEnd(context.Context, *pgx.Conn, pgx.TraceQueryEndData) {
	e.add("query end")
}

func (e *everyEvent) TraceBatchStart(ctx context.Context, _ *pgx.Conn, _ pgx.TraceBatchStartData) context.Context {
	e.add("batch")
	return ctx
}

func (e *everyEvent) TraceBatchQuery(context.Context, *pgx.Conn, pgx.TraceBatchQueryData) {
	e.add("batch query")
}

func (e *everyEvent) TraceBatchEnd(context.Context, *pgx.Conn, pgx.TraceBatchEndData) {
	e.add("batch end")
}

func (e *everyEvent) TraceCopyFromStart(ctx context.Context, _ *pgx.Conn, _ pgx.TraceCopyFromStartData) context.Context {
	e.add("copy")
	return ctx
}

func (e *everyEvent) TraceCopyFromEnd(context.Context, *pgx.Conn, pgx.TraceCopyFromEndData) {
	e.add("copy end")
}

func (e *everyEvent) TracePrepareStart(ctx context.Context, _ *pgx.Conn, _ pgx.TracePrepareStartData) context.Context {
	e.add("prepare")
	return ctx
}

func (e *everyEvent) TracePrepareEnd(context.Context, *pgx.Conn, pgx.TracePrepareEndData) {
	e.add("prepare end")
}

func (e *everyEvent) TraceConnectStart(ctx context.Context, d pgx.TraceConnectStartData) context.Context {
	e.add("connect")
	if _, ours := d.ConnConfig.Tracer.(*wire); ours || d.ConnConfig.Host == "#0" {
		e.add("connect with something of ours")
	}
	return ctx
}

func (e *everyEvent) TraceConnectEnd(context.Context, pgx.TraceConnectEndData) {
	e.add("connect end")
}

func (e *everyEvent) TraceAcquireStart(ctx context.Context, _ *pgxpool.Pool, _ pgxpool.TraceAcquireStartData) context.Context {
	e.add("acquire")
	return ctx
}

func (e *everyEvent) TraceAcquireEnd(context.Context, *pgxpool.Pool, pgxpool.TraceAcquireEndData) {
	e.add("acquire end")
}

func (e *everyEvent) TraceRelease(*pgxpool.Pool, pgxpool.TraceReleaseData) { e.add("release") }

// poolsOf are the pgxpools that a MultiPool gives out, by their names.
func poolsOf(p *MultiPool) map[string]*pgxpool.Pool {
	all := map[string]*pgxpool.Pool{"primary": p.PrimaryPool(), "replicas": p.ReplicaPool()}
	for _, name := range p.names() {
		all["peer "+name] = p.PeerPool(name)
	}
	return all
}

// unlike names the fields in which two configurations differ; functions are alike where they are the same.
func unlike(path string, a, b reflect.Value) (fields []string) {
	switch a.Kind() {
	case reflect.Pointer:
		if a.IsNil() || b.IsNil() {
			if a.IsNil() != b.IsNil() {
				return []string{path}
			}
			return nil
		}
		return unlike(path, a.Elem(), b.Elem())
	case reflect.Struct:
		for i := range a.NumField() {
			fields = append(fields, unlike(path+"."+a.Type().Field(i).Name, a.Field(i), b.Field(i))...)
		}
		return fields
	case reflect.Func:
		if a.Pointer() != b.Pointer() {
			return []string{path}
		}
		return nil
	case reflect.Interface:
		if a.IsNil() != b.IsNil() || !a.IsNil() && (a.Elem().Type() != b.Elem().Type() || a.Elem().Kind() == reflect.Pointer && a.Elem().Pointer() != b.Elem().Pointer()) {
			return []string{path}
		}
		return nil
	case reflect.Map:
		if a.Len() != b.Len() || a.IsNil() != b.IsNil() {
			return []string{path}
		}
		for _, k := range a.MapKeys() {
			if !b.MapIndex(k).IsValid() || fmt.Sprint(a.MapIndex(k)) != fmt.Sprint(b.MapIndex(k)) {
				fields = append(fields, path+"."+fmt.Sprint(k))
			}
		}
		return fields
	case reflect.Slice:
		if a.Len() != b.Len() {
			return []string{path}
		}
		for i := range a.Len() {
			fields = append(fields, unlike(fmt.Sprintf("%s.%d", path, i), a.Index(i), b.Index(i))...)
		}
		return fields
	}
	if fmt.Sprint(a) != fmt.Sprint(b) {
		return []string{path}
	}
	return nil
}

func diffOf[C any](a, b *C) []string { return unlike("", reflect.ValueOf(a), reflect.ValueOf(b)) }

// roomFilled is a template with every function that pgx and pgxpool call, and what makes the most of the two.
func roomFilled(c *pgxpool.Config) {
	cc := c.ConnConfig
	cc.Tracer = &everyEvent{}
	cc.AfterConnect = func(context.Context, *pgconn.PgConn) error { return nil }
	cc.ValidateConnect = func(context.Context, *pgconn.PgConn) error { return nil }
	cc.AfterNetConnect = func(_ context.Context, _ *pgconn.Config, c net.Conn) (net.Conn, error) { return c, nil }
	front := cc.BuildFrontend
	cc.BuildFrontend = func(r io.Reader, w io.Writer) *pgproto3.Frontend { return front(r, w) }
	cc.BuildContextWatcherHandler = func(pg *pgconn.PgConn) ctxwatch.Handler {
		return &pgconn.DeadlineContextWatcherHandler{Conn: pg.Conn()}
	}
	cc.OnNotification = func(*pgconn.PgConn, *pgconn.Notification) {}
	cc.OnNotice = func(*pgconn.PgConn, *pgconn.Notice) {}
	cc.OnPgError = func(*pgconn.PgConn, *pgconn.PgError) bool { return true }
	cc.RuntimeParams["application_name"] = "told"
	c.BeforeConnect = func(context.Context, *pgx.ConnConfig) error { return nil }
	c.AfterConnect = func(context.Context, *pgx.Conn) error { return nil }
	c.PrepareConn = func(context.Context, *pgx.Conn) (bool, error) { return true, nil }
	c.AfterRelease = func(*pgx.Conn) bool { return true }
	c.BeforeClose = func(*pgx.Conn) {}
	c.ShouldPing = func(context.Context, pgxpool.ShouldPingParams) bool { return true }
	c.MaxConns, c.MinConns, c.MinIdleConns = 5, 1, 2
	c.MaxConnLifetimeJitter = time.Minute
}

// What pgx and pgxpool show of a connection and of a pool is what the program has put there, whatever fields they may have
// some day.
func TestNothingOfOursIsShown(t *testing.T) {
	for name, change := range map[string]func(*pgxpool.Config){"all": roomFilled, "none": func(c *pgxpool.Config) { c.MaxConnLifetimeJitter = time.Minute }} {
		t.Run(name, func(t *testing.T) {
			bubble(t, 1, func(c *Options) { change(c.Config) }, func(ctx context.Context, x *fakes) {
				settled()
				for name, pool := range poolsOf(x.pool) {
					at := x.pool.peers()[0]
					if name == "replicas" || name == "peer replica1:5432" {
						at = x.pool.peers()[1]
					}
					shown := pool.Config()
					own := at.config.Copy()
					shown.ConnConfig.Tracer = ownTracer(shown.ConnConfig.Tracer)
					if name == "primary" || name == "replicas" { // they list all
						own.ConnConfig = x.pool.config.Config.ConnConfig.Copy()
						if own.ConnConfig.ValidateConnect == nil {
							shown.ConnConfig.ValidateConnect = nil
						}
					}
					assert.Empty(t, diffOf(own, shown), "the configuration of the pool: %s", name)
					c, err := pool.Acquire(ctx)
					require.NoError(t, err)
					wire := c.Conn().Config()
					if own := at.config.ConnConfig; own.OnNotification == nil {
						wire.OnNotification = nil // pgx's own
					}
					wire.DialFunc = at.config.ConnConfig.DialFunc
					assert.Empty(t, diffOf(at.config.ConnConfig, wire), "the configuration of a connection: %s", name)
					c.Release()
				}
				settled()
				x.atRest()
			})
		})
	}
}

// A copy is told with an error, too.
func TestNothingOfOursIsInAnError(t *testing.T) {
	bubble(t, 1, func(c *Options) { roomFilled(c.Config); c.Wait = Off; c.Config.MinConns, c.Config.MinIdleConns = 0, 0 }, func(ctx context.Context, x *fakes) {
		settled()
		x.primary.StartupError("28P01")
		for name, pool := range map[string]*pgxpool.Pool{"peer": x.pool.PeerPool("primary:5432"), "primary": x.pool.PrimaryPool()} {
			_, err := pool.Acquire(ctx)
			var failed *pgconn.ConnectError
			require.ErrorAs(t, err, &failed)
			own := x.pool.peers()[0].config.ConnConfig.Config
			failed.Config.DialFunc = own.DialFunc
			assert.Empty(t, diffOf(&own, failed.Config), name)
		}
	})
}

// others are the ways to make a second connection of the program's own from what a connection or its pool shows. What
// they return is used once, and closed by close.
var others = map[string]func(ctx context.Context, p *MultiPool, from *pgxpool.Pool, c *pgx.Conn) (use func(context.Context) error, close func(), err error){
	"pgx.ConnectConfig": func(ctx context.Context, _ *MultiPool, _ *pgxpool.Pool, c *pgx.Conn) (func(context.Context) error, func(), error) {
		second, err := pgx.ConnectConfig(ctx, c.Config())
		if err != nil {
			return nil, nil, err
		}
		return second.Ping, func() { _ = second.Close(ctx) }, nil
	},
	"pgconn.ConnectConfig": func(ctx context.Context, _ *MultiPool, _ *pgxpool.Pool, c *pgx.Conn) (func(context.Context) error, func(), error) {
		second, err := pgconn.ConnectConfig(ctx, &c.Config().Config)
		if err != nil {
			return nil, nil, err
		}
		return func(ctx context.Context) error { return second.Exec(ctx, "select 1").Close() }, func() { _ = second.Close(ctx) }, nil
	},
	"a copy of a copy": func(ctx context.Context, _ *MultiPool, _ *pgxpool.Pool, c *pgx.Conn) (func(context.Context) error, func(), error) {
		second, err := pgx.ConnectConfig(ctx, c.Config())
		if err != nil {
			return nil, nil, err
		}
		third, err := pgx.ConnectConfig(ctx, second.Config())
		if err != nil {
			return nil, nil, err
		}
		return third.Ping, func() { _ = third.Close(ctx); _ = second.Close(ctx) }, nil
	},
	"stdlib.OpenDB of the connection's": func(_ context.Context, _ *MultiPool, _ *pgxpool.Pool, c *pgx.Conn) (func(context.Context) error, func(), error) {
		db := stdlib.OpenDB(*c.Config())
		return db.PingContext, func() { _ = db.Close() }, nil
	},
	"stdlib.OpenDB of the pool's": func(_ context.Context, p *MultiPool, _ *pgxpool.Pool, _ *pgx.Conn) (func(context.Context) error, func(), error) {
		db := stdlib.OpenDB(*p.Config().ConnConfig)
		return db.PingContext, func() { _ = db.Close() }, nil
	},
	"pgxpool of the pgxpool's": func(ctx context.Context, _ *MultiPool, from *pgxpool.Pool, _ *pgx.Conn) (func(context.Context) error, func(), error) {
		pool, err := pgxpool.NewWithConfig(ctx, from.Config())
		if err != nil {
			return nil, nil, err
		}
		return pool.Ping, pool.Close, nil
	},
	"pgxpool of the pool's": func(ctx context.Context, p *MultiPool, _ *pgxpool.Pool, _ *pgx.Conn) (func(context.Context) error, func(), error) {
		pool, err := pgxpool.NewWithConfig(ctx, p.Config())
		if err != nil {
			return nil, nil, err
		}
		return pool.Ping, pool.Close, nil
	},
	"MultiPool of the pgxpool's": func(ctx context.Context, _ *MultiPool, from *pgxpool.Pool, _ *pgx.Conn) (func(context.Context) error, func(), error) {
		pool, err := NewWithConfig(ctx, from.Config())
		if err != nil {
			return nil, nil, err
		}
		return pool.Ping, pool.Close, nil
	},
	"MultiPool of the pool's": func(ctx context.Context, p *MultiPool, _ *pgxpool.Pool, _ *pgx.Conn) (func(context.Context) error, func(), error) {
		pool, err := NewWithConfig(ctx, p.Config())
		if err != nil {
			return nil, nil, err
		}
		return pool.Ping, pool.Close, nil
	},
}

// holdCommit is a network connection that passes a COMMIT on, and no answer to it.
type holdCommit struct {
	net.Conn
	armed *atomic.Bool
	dead  atomic.Bool
}

func (c *holdCommit) Write(b []byte) (int, error) {
	if bytes.Contains(b, []byte("commit")) && c.armed.CompareAndSwap(true, false) {
		c.dead.Store(true)
	}
	return c.Conn.Write(b)
}

func (c *holdCommit) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if c.dead.Load() { // it has come: the transaction is committed
		_ = c.Conn.Close()
		return 0, io.ErrUnexpectedEOF
	}
	return n, err
}

// A second connection is none of the first one's: a COMMIT whose answer is lost is not sent again for it, and what became of
// it is found out as without.
func TestASecondConnectionLeavesTheFirstAlone(t *testing.T) {
	t.Parallel()
	c := pgtest.Start(t, pgtest.Options{Standbys: 1})
	must(t, c, "create table t (id int)")
	ctx := testContext(t)
	pool, err := ParseConfig(c.ConnString("pool_max_conns=4", "multipool_wait=4s"))
	require.NoError(t, err)
	var armed atomic.Bool
	dial := pool.ConnConfig.DialFunc
	pool.ConnConfig.DialFunc = func(ctx context.Context, network, addr string) (net.Conn, error) {
		raw, err := dial(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		return &holdCommit{Conn: raw, armed: &armed}, nil
	}
	p := openConfig(t, Options{}, pool)
	waitUp(t, p)
	rows := func() int64 {
		n, err := c.Primary().Int(ctx, "select count(*) from t")
		require.NoError(t, err)
		return n
	}
	var want error
	for _, name := range append([]string{""}, sortedKeys(others)...) {
		before, runs := rows(), 0
		var first *wire
		var closing func()
		err := p.RunTx(ctx, pgx.TxOptions{CommitQuery: "commit"}, func(tx pgx.Tx) error {
			runs++
			if other := others[name]; other != nil && runs == 1 {
				first = wireOf(tx.Conn())
				main, pg := first.main.Load(), first.pg
				use, close, err := other(ctx, p, p.PeerPool(c.Primary().Addr()), tx.Conn())
				require.NoError(t, err, name)
				require.NoError(t, use(ctx), name)
				cancelled, cancel := context.WithCancel(ctx)
				cancel()
				assert.Error(t, use(cancelled), name)
				closing = close
				assert.Same(t, pg, first.pg, name)
				assert.Same(t, main, first.main.Load(), name)
				assert.False(t, main.closed.Load(), name)
				assert.NotZero(t, first.out.Load()&outCall, "%s: it is still in use", name)
				assert.Equal(t, connHeld, first.use.state(), name)
			}
			_, err := tx.Exec(ctx, "insert into t values (1)")
			armed.Store(runs == 1)
			return err
		})
		if closing != nil {
			closing()
		}
		if name == "" {
			want = err
		}
		assert.Equal(t, fmt.Sprint(want), fmt.Sprint(err), name)
		assert.Equal(t, 1, runs, "%s: how often it ran", name)
		assert.EqualValues(t, 1, rows()-before, "%s: rows", name)
	}
	waitFor(t, "all to be given back", 10*time.Second, func() bool {
		for _, q := range p.peers() {
			if q.load.busy() != 0 {
				return false
			}
			conns := int32(0)
			q.sockets.wires(func(*wire) { conns++ })
			if q.slots.Of(quota.Own) != conns {
				return false
			}
		}
		return true
	})
}

// A connection that the program has taken for itself, down to pgconn, is one of ours until its socket is closed.
func TestAHijackedConnectionGoesOn(t *testing.T) {
	bubble(t, 1, nil, func(ctx context.Context, x *fakes) {
		settled()
		for _, pool := range poolsOf(x.pool) {
			before := x.pool.peers()[0].sockets.len() + x.pool.peers()[1].sockets.len()
			c, err := pool.Acquire(ctx)
			require.NoError(t, err)
			w := wireOf(c.Conn())
			own := c.Hijack()
			raw, err := own.PgConn().Hijack()
			require.NoError(t, err)
			again, err := pgconn.Construct(raw)
			require.NoError(t, err)
			require.NoError(t, again.Exec(ctx, "select 1").Close())
			assert.NoError(t, again.CancelRequest(ctx))
			second, err := pgconn.ConnectConfig(ctx, raw.Config)
			require.NoError(t, err)
			require.NoError(t, second.Exec(ctx, "select 1").Close())
			require.NoError(t, second.Close(ctx))
			assert.Nil(t, second.CustomData()[wireKey])
			assert.Equal(t, slotHeld, w.slot.Load())
			require.NoError(t, again.Close(ctx))
			assert.Equal(t, slotNone, w.slot.Load())
			settled()
			assert.GreaterOrEqual(t, before, x.pool.peers()[0].sockets.len()+x.pool.peers()[1].sockets.len()-1)
		}
		settled()
		x.atRest()
	})
}

// A database/sql of a pool that follows uses its connections, and none of its own.
func TestADatabaseOfAPoolThatFollowsUsesIt(t *testing.T) {
	bubble(t, 1, nil, func(ctx context.Context, x *fakes) {
		settled()
		db := stdlib.OpenDBFromPool(x.pool.PrimaryPool())
		require.NoError(t, db.PingContext(ctx))
		assert.EqualValues(t, 1, x.pool.PrimaryPool().Stat().TotalConns())
		require.NoError(t, db.Close())
		x.atRest()
	})
}

// pgx says nothing to a dial of what it is for. Should it change how it sends a cancel request, ours would not be known for
// one: it would not be refused during a COMMIT, nor cut with its server.
func TestACancelRequestIsKnownForOne(t *testing.T) {
	t.Parallel()
	sockets := t.TempDir()
	require.NoError(t, os.Chmod(sockets, 0o777))
	require.NoError(t, os.Chmod(filepath.Dir(sockets), 0o755))
	c := pgtest.Start(t, pgtest.Options{TLS: true, HBA: []string{"local all all trust"}, Settings: map[string]string{"unix_socket_directories": sockets}})
	ctx := testContext(t)
	for name, connString := range map[string]string{
		"plain": c.ConnString(),
		"TLS":   c.ConnString("sslmode=require"),
		"Unix":  fmt.Sprintf("host=%s port=%d user=postgres dbname=postgres", sockets, c.Primary().Port()),
	} {
		pool, err := ParseConfig(connString)
		require.NoError(t, err)
		// A peer of no use beside it: then it is watched.
		config := Options{Peers: []Peer{{Host: pool.ConnConfig.Host, Port: pool.ConnConfig.Port}, {Name: "nobody", Host: "127.0.0.1", Port: 1}}}
		p := openConfig(t, config, pool)
		own, err := p.Acquire(ctx)
		require.NoError(t, err, name)
		w := wireOf(own.Conn())
		addr := own.Conn().PgConn().Conn().RemoteAddr()
		assert.NotEqual(t, cancelNetwork, addr.Network(), name)
		second, err := pgx.ConnectConfig(ctx, own.Conn().Config())
		require.NoError(t, err, name)
		require.NoError(t, own.Conn().PgConn().CancelRequest(ctx), name)
		w.committing.Store(true)
		assert.ErrorIs(t, own.Conn().PgConn().CancelRequest(ctx), errCommitting, name)
		assert.NoError(t, second.PgConn().CancelRequest(ctx), "%s: another's", name)
		w.committing.Store(false)
		w.peer.sockets.cut(connRead, true)
		assert.ErrorIs(t, own.Conn().PgConn().CancelRequest(ctx), errPeerDown, name)
		assert.NoError(t, second.PgConn().CancelRequest(ctx), "%s: another's", name)
		third, err := pgx.ConnectConfig(ctx, own.Conn().Config())
		require.NoError(t, err, name)
		w.peer.sockets.cut(connHeld, true)
		assert.NoError(t, second.Ping(ctx), name)
		assert.Error(t, own.Ping(ctx), name)
		w.peer.sockets.open()
		own.Release()
		assert.NoError(t, second.Close(ctx))
		assert.NoError(t, third.Close(ctx))
	}
}

// The program's tracer is called once for every event, in whatever it makes of what it has been shown.
func TestTheProgramsTracerGoesAlong(t *testing.T) {
	t.Parallel()
	c := pgtest.Start(t, pgtest.Options{Standbys: 1})
	must(t, c, "create table t (id int)")
	ctx := testContext(t)
	pool, err := ParseConfig(c.ConnString())
	require.NoError(t, err)
	events := &everyEvent{}
	pool.ConnConfig.Tracer = events
	p := openConfig(t, Options{}, pool)
	waitUp(t, p)
	use := func(c *pgx.Conn) {
		t.Helper()
		_, err := c.Exec(ctx, "select 1", pgx.QueryExecModeSimpleProtocol)
		require.NoError(t, err)
		_, err = c.Prepare(ctx, "mine", "select 2")
		require.NoError(t, err)
		b := &pgx.Batch{}
		b.Queue("select 3")
		require.NoError(t, c.SendBatch(ctx, b).Close())
		_, err = c.CopyFrom(ctx, pgx.Identifier{"t"}, []string{"id"}, pgx.CopyFromRows([][]any{{1}}))
		require.NoError(t, err)
		require.NoError(t, c.Deallocate(ctx, "mine"))
	}
	inConn := map[string]int{
		"connect": 1, "connect end": 1, "query": 1, "query end": 1, "prepare": 2, "prepare end": 2,
		"batch": 1, "batch query": 1, "batch end": 1, "copy": 1, "copy end": 1,
	}
	inPool := map[string]int{"acquire": 1, "acquire end": 1, "release": 1}
	for what, n := range inConn {
		inPool[what] = n
	}
	plain, err := pgx.ParseConfig(c.Primary().ConnString())
	require.NoError(t, err)
	plain.Tracer = events
	conn, err := pgx.ConnectConfig(ctx, plain)
	require.NoError(t, err)
	use(conn)
	require.NoError(t, conn.Close(ctx))
	require.Equal(t, inConn, events.take(), "what pgx itself does")

	for name, from := range map[string]*pgxpool.Pool{"peer": p.PeerPool(c.Primary().Addr()), "primary": p.PrimaryPool()} {
		events.take()
		own, err := from.Acquire(ctx)
		require.NoError(t, err)
		use(own.Conn())
		connConfig := own.Conn().Config()
		own.Release()
		assert.Equal(t, inPool, events.take(), name)
		second, err := pgx.ConnectConfig(ctx, connConfig)
		require.NoError(t, err)
		use(second)
		require.NoError(t, second.Close(ctx))
		assert.Equal(t, inConn, events.take(), "%s: a connection by its connection's configuration", name)
		second, err = pgx.ConnectConfig(ctx, from.Config().ConnConfig)
		require.NoError(t, err)
		use(second)
		require.NoError(t, second.Close(ctx))
		assert.Equal(t, inConn, events.take(), "%s: a connection by its own configuration", name)
		foreign, err := pgxpool.NewWithConfig(ctx, from.Config())
		require.NoError(t, err)
		borrowed, err := foreign.Acquire(ctx)
		require.NoError(t, err)
		use(borrowed.Conn())
		borrowed.Release()
		foreign.Close()
		assert.Equal(t, inPool, events.take(), "%s: a pool by its own configuration", name)
		ours, err := NewWithConfig(ctx, from.Config())
		require.NoError(t, err)
		if len(ours.peers()) > 1 {
			waitUp(t, ours)
		}
		events.take()
		borrowed, err = ours.Acquire(ctx)
		require.NoError(t, err)
		if got := borrowed.Conn().Config().Tracer; assert.Same(t, events, got, name) {
			use(borrowed.Conn())
		}
		borrowed.Release()
		ours.Close()
		assert.Equal(t, inPool, events.take(), "%s: a MultiPool by its own configuration", name)
	}
}

// Config gives out what connects, and to the primary, and what a second constructor makes the same of.
func TestWhatConfigGivesOutConnects(t *testing.T) {
	t.Parallel()
	c := pgtest.Start(t, pgtest.Options{Standbys: 1})
	ctx := testContext(t)
	require.NoError(t, c.WaitCaughtUp(ctx))
	standby := c.Standbys()[0]
	both := fmt.Sprintf("host=%s,%s port=%d,%d user=postgres dbname=postgres sslmode=disable", standby.Host(), c.Primary().Host(), standby.Port(), c.Primary().Port())
	for name, tc := range map[string]struct {
		connString string
		on         *pgtest.Server
	}{
		"one host":             {c.Primary().ConnString(), c.Primary()},
		"one host, a key":      {c.Primary().ConnString("multipool_wait=2s"), c.Primary()},
		"a standby alone":      {standby.ConnString("multipool_wait=2s"), standby},
		"several":              {both, c.Primary()},
		"several, keys":        {both + " multipool_wait=2s multipool_zone=here", c.Primary()},
		"said: any":            {both + " target_session_attrs=any multipool_wait=2s", standby},
		"said: standby":        {both + " target_session_attrs=standby", standby},
		"said: read-write":     {both + " target_session_attrs=read-write", c.Primary()},
		"said: prefer-standby": {both + " target_session_attrs=prefer-standby", standby},
		"in order":             {both + " multipool_mode=ordered", standby},
	} {
		t.Run(name, func(t *testing.T) {
			p := openPool(t, Options{}, tc.connString)
			var port int
			conn, err := pgx.ConnectConfig(ctx, p.Config().ConnConfig)
			require.NoError(t, err)
			require.NoError(t, conn.QueryRow(ctx, "select inet_server_port()").Scan(&port))
			assert.EqualValues(t, tc.on.Port(), port)
			require.NoError(t, conn.Close(ctx))
			db := stdlib.OpenDB(*p.Config().ConnConfig)
			defer func(db *sql.DB) { assert.NoError(t, db.Close()) }(db)
			require.NoError(t, db.QueryRowContext(ctx, "select inet_server_port()").Scan(&port))
			assert.EqualValues(t, tc.on.Port(), port)
			pool, err := pgxpool.NewWithConfig(ctx, p.Config())
			require.NoError(t, err)
			defer pool.Close()
			require.NoError(t, pool.QueryRow(ctx, "select inet_server_port()").Scan(&port))
			assert.EqualValues(t, tc.on.Port(), port)

			for _, again := range []*pgxpool.Config{p.Config(), p.Config().Copy(), openConfig(t, Options{}, p.Config()).Config()} {
				second := openConfig(t, Options{}, again)
				a, b := p.config, second.config
				assert.Empty(t, diffOf(p.given, second.given))
				a.Config, b.Config, a.Hooks, b.Hooks = nil, nil, nil, nil
				assert.Equal(t, a, b)
			}
		})
	}
}

func TestKeysGoWithWhatConfigGivesOut(t *testing.T) {
	given := func(connString string, change func(map[string]string)) *pgxpool.Config {
		c, err := pgxpool.ParseConfig("host=a,b user=u dbname=d sslmode=disable " + connString)
		require.NoError(t, err)
		change(c.ConnConfig.RuntimeParams)
		return c
	}
	for name, tc := range map[string]struct {
		first  *pgxpool.Config
		second func(map[string]string)
		want   map[string]string
	}{
		"as it was": {
			given("multipool_wait=2s application_name=x", func(map[string]string) {}), nil,
			map[string]string{"multipool_wait": "2s", "application_name": "x"},
		},
		"what was taken out stays out": {
			given("multipool_wait=2s multipool_zone=z", func(p map[string]string) { delete(p, "multipool_wait") }), nil,
			map[string]string{"multipool_zone": "z"},
		},
		"what was changed stays changed": {
			given("multipool_wait=2s", func(p map[string]string) { p["multipool_wait"] = "3s" }), nil,
			map[string]string{"multipool_wait": "3s"},
		},
		"what is said anew wins": {
			given("multipool_wait=2s multipool_zone=z", func(map[string]string) {}),
			func(p map[string]string) { p["multipool_wait"] = "4s" },
			map[string]string{"multipool_wait": "4s", "multipool_zone": "z"},
		},
		"no keys": {given("application_name=x", func(map[string]string) {}), nil, map[string]string{"application_name": "x"}},
	} {
		t.Run(name, func(t *testing.T) {
			out := giveOut(tc.first, true)
			for key := range out.ConnConfig.RuntimeParams {
				assert.False(t, isOurKey(key), key)
			}
			assert.NotNil(t, out.ConnConfig.ValidateConnect)
			if tc.second != nil {
				tc.second(out.ConnConfig.RuntimeParams)
			}
			for range 2 { // a copy's copy
				in := takeIn(out)
				assert.Equal(t, tc.want, in.ConnConfig.RuntimeParams)
				in.ConnConfig.RuntimeParams = tc.first.ConnConfig.RuntimeParams
				assert.Empty(t, diffOf(tc.first, in))
				out = out.Copy()
			}
		})
	}
}
