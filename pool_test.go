package multipool

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/pgmultipool/multipool/internal/netfault"
	"github.com/pgmultipool/multipool/internal/pgtest"
)

const whichPort = "select inet_server_port()"

func TestReadsSpreadEvenlyOverTheReplicasAndSpareThePrimary(t *testing.T) {
	t.Parallel()
	c := pgtest.Start(t, pgtest.Options{Standbys: 2})
	p := openPool(t, Options{}, c.ConnString())
	ctx := testContext(t)
	waitUp(t, p)
	var served map[int]int
	undisturbed(t, p, func() {
		served = map[int]int{}
		for range 2000 {
			var port int
			require.NoError(t, p.QueryRow(ctx, whichPort).Scan(&port))
			served[port]++
		}
	})
	assert.Zero(t, served[int(c.Primary().Port())])
	for _, s := range c.Standbys() {
		assert.InDelta(t, 1000, served[int(s.Port())], 200)
	}
}

func TestTheFirstReadsOfAColdPoolSpareThePrimary(t *testing.T) {
	t.Parallel()
	c := pgtest.Start(t, pgtest.Options{Standbys: 2})
	for range 10 {
		var port int
		var err error
		p := openEarly(t, func() *MultiPool { return openPool(t, Options{}, c.ConnString()) }, func(p *MultiPool) {
			err = p.QueryRow(testContext(t), whichPort).Scan(&port)
		})
		require.NoError(t, err)
		assert.NotEqual(t, int(c.Primary().Port()), port)
		var recovering bool
		tag, err := p.Exec(testContext(t), "select pg_is_in_recovery()")
		require.NoError(t, err)
		assert.EqualValues(t, 1, tag.RowsAffected())
		tx, err := p.Begin(testContext(t))
		require.NoError(t, err)
		require.NoError(t, tx.QueryRow(testContext(t), "select pg_is_in_recovery()").Scan(&recovering))
		require.NoError(t, tx.Commit(testContext(t)))
		assert.False(t, recovering)
		p.Close()
	}
}

// writing is a statement that writes though it is sent as a query.
type writing struct {
	name, sql string
	learned   bool // its text does not show it: the first time it is tried on a replica
	rows      int
	effect    string // a count on the primary that grows by one every time; "" where there is nothing to count
}

var writings = []writing{
	{name: "insert returning", sql: "insert into t (v) values (1) returning id", rows: 1, effect: "select count(*) from t"},
	{name: "insert without rows", sql: "insert into t (v) values (1)", effect: "select count(*) from t"},
	{name: "CTE write", sql: "with w as (insert into t (v) values (2) returning id) select id from w", rows: 1, effect: "select count(*) from t"},
	{name: "update returning", sql: "update counters set n = n + 1 returning n", rows: 1, effect: "select n from counters"},
	{name: "nextval", sql: "select nextval('s')", rows: 1, effect: "select last_value from s"},
	{name: "for update", sql: "select id from rows_here for update", rows: 1},
	{name: "writing function", sql: "select write_one()", learned: true, rows: 1, effect: "select count(*) from t"},
	{name: "plpgsql writing function", sql: "select * from write_rows()", learned: true, rows: 2, effect: "select count(*) from t"},
	{name: "unlogged table", sql: "select id from unlogged_here", learned: true, rows: 1},
	{name: "large object", sql: "select loid_here()", learned: true, rows: 1},
	{name: "prepared by the program", sql: "prepared_write", rows: 1, effect: "select count(*) from t"},
}

var writingSchema = []string{
	"create table t (id serial primary key, v int)",
	"create sequence s start 1", "select nextval('s')",
	"create table counters (n int)", "insert into counters values (0)",
	"create table rows_here (id int)", "insert into rows_here values (7)",
	"create unlogged table unlogged_here (id int)", "insert into unlogged_here values (9)",
	"create function write_one() returns int language sql as 'insert into t (v) values (3) returning id'",
	`create function write_rows() returns setof int language plpgsql as
	 'begin insert into t (v) values (4); return query select 1 union select 2; end'`,
	"create function loid_here() returns oid language sql volatile as 'select lo_create(0)'",
}

func TestWhatWritesThroughQueryIsDoneOnceOnThePrimary(t *testing.T) {
	t.Parallel()
	c := pgtest.Start(t, pgtest.Options{Standbys: 2, SyncApply: true})
	must(t, c, writingSchema...)
	ways := map[string]func(context.Context, *MultiPool, string) (rows int, err error){
		"Query": func(ctx context.Context, p *MultiPool, sql string) (n int, err error) {
			rows, err := p.Query(ctx, sql)
			if err != nil {
				return 0, err
			}
			for rows.Next() {
				n++
			}
			return n, rows.Err()
		},
		"QueryRow": func(ctx context.Context, p *MultiPool, sql string) (int, error) {
			var id any
			err := p.QueryRow(ctx, sql).Scan(&id)
			if errors.Is(err, pgx.ErrNoRows) {
				return 0, nil
			}
			return -1, err
		},
		"closed unread": func(ctx context.Context, p *MultiPool, sql string) (int, error) {
			rows, err := p.Query(ctx, sql)
			if err != nil {
				return 0, err
			}
			rows.Close()
			return -1, rows.Err()
		},
	}
	for way, run := range ways {
		// A pool each: what one way has learned, the next has to learn again.
		var j journal
		pool, err := ParseConfig(c.ConnString())
		require.NoError(t, err)
		pool.AfterConnect = func(ctx context.Context, conn *pgx.Conn) error {
			_, err := conn.Prepare(ctx, "prepared_write", "insert into t (v) values (5) returning id")
			return err
		}
		p := openConfig(t, Options{Hooks: j.hooks()}, pool)
		waitUp(t, p)
		require.NoError(t, p.Ping(testContext(t))) // prepares: the primary's connection has told the text behind the name
		for _, w := range writings {
			t.Run(way+"/"+w.name, func(t *testing.T) {
				for round := range 3 {
					before := count(t, c, w.effect)
					j.take()
					n, err := run(testContext(t), p, w.sql)
					require.NoError(t, err)
					if n >= 0 {
						assert.Equal(t, w.rows, n)
					}
					if w.effect != "" {
						assert.Equal(t, before+1, count(t, c, w.effect), "round %d", round)
					}
					trips := j.take()
					assert.Equal(t, c.Primary().Addr(), trips[len(trips)-1].Peer)
					if round == 0 && w.learned {
						assert.Len(t, trips, 2)
						assert.Equal(t, ReasonRefused, trips[1].Reason)
					} else {
						assert.Len(t, trips, 1, "a wasted trip in round %d: %v", round, trips)
						assert.Equal(t, ReasonStatement, trips[0].Reason)
					}
				}
			})
		}
	}
}

func count(t *testing.T, c *pgtest.Cluster, sql string) int64 {
	t.Helper()
	if sql == "" {
		return 0
	}
	n, err := c.Primary().Int(testContext(t), sql)
	require.NoError(t, err)
	return n
}

func TestWhatActsOnItsServerIsNeverSentToAReplica(t *testing.T) {
	t.Parallel()
	c := pgtest.Start(t, pgtest.Options{Standbys: 2})
	var j journal
	p := openPool(t, Options{Hooks: j.hooks()}, c.ConnString())
	waitUp(t, p)
	for _, sql := range []string{
		"select pg_advisory_xact_lock(1)",
		"SELECT Pg_Try_Advisory_Xact_Lock( 1 )",
		"select /* x */ pg_catalog.pg_advisory_xact_lock /* y */ (1, 2)",
		`select "pg_advisory_xact_lock"(1)`,
		"select pg_terminate_backend(0)",
		"select pg_cancel_backend(0)",
		"select pg_reload_conf()",
		"select pg_stat_reset()",
		"select pg_export_snapshot()",
	} {
		j.take()
		rows, err := p.Query(testContext(t), sql)
		require.NoError(t, err)
		rows.Close()
		require.NoError(t, rows.Err(), sql)
		for _, d := range j.take() {
			assert.Equal(t, c.Primary().Addr(), d.Peer, sql)
		}
	}
	// Two sessions exclude each other, whichever way they come.
	a, err := p.Acquire(testContext(t))
	require.NoError(t, err)
	defer a.Release()
	_, err = a.Exec(testContext(t), "select pg_advisory_lock(42)")
	require.NoError(t, err)
	var got bool
	require.NoError(t, p.QueryRow(testContext(t), "select pg_try_advisory_lock(42)").Scan(&got))
	assert.False(t, got)
}

// A read that a server has taken is a write for all we know.
func TestAReadThatFailedWhereWritesAreAcceptedIsNotSentAgain(t *testing.T) {
	t.Parallel()
	c := pgtest.Start(t, pgtest.Options{Standbys: 1})
	must(t, c, writingSchema...)
	for _, retry := range []Retry{RetrySafe, RetryReads, RetryNever} {
		relay, err := netfault.Listen(c.Primary().Addr())
		require.NoError(t, err)
		t.Cleanup(func() { relay.Close() })
		// No look comes in between: the cut is for the next answer of any connection.
		p := openPool(t, Options{CheckInterval: time.Hour, Peers: []Peer{
			{Name: "primary", Host: "127.0.0.1", Port: relay.Port()},
			{Name: "replica", Host: "127.0.0.1", Port: c.Standbys()[0].Port()},
		}}, c.Primary().ConnString())
		waitUp(t, p)
		ctx := WithRoute(testContext(t), Route{Target: TargetPrimary, Retry: retry})
		require.NoError(t, p.Ping(ctx))
		before := count(t, c, "select count(*) from t")
		relay.Cut(netfault.Cut{From: netfault.Server, Type: 'D', When: netfault.Before})
		var id int
		err = p.QueryRow(ctx, "select write_one()").Scan(&id)
		rows := count(t, c, "select count(*) from t") - before
		if retry == RetryReads {
			require.NoError(t, err)
			assert.EqualValues(t, 2, rows)
		} else {
			require.ErrorIs(t, err, ErrOutcomeUnknown)
			assert.EqualValues(t, 1, rows)
		}
	}
}

func TestModelsGoWhereTheyBelong(t *testing.T) {
	t.Parallel()
	c := pgtest.Start(t, pgtest.Options{Standbys: 2})
	must(t, c, "create table marks (model text, port int default inet_server_port())")
	replica := c.Standbys()[1]
	p := openPool(t, Options{Models: map[string]Route{
		"pinned":  {Peers: []string{replica.Addr()}},
		"primary": {Target: TargetPrimary},
		"any":     {Target: TargetAny},
	}}, c.ConnString("pool_max_conns=8"))
	waitUp(t, p)
	ctx := testContext(t)

	var mu sync.Mutex
	reads := map[string]map[int]int{"pinned": {}, "primary": {}, "any": {}}
	var refused, written int
	var callers sync.WaitGroup
	for w := range 10 {
		callers.Go(func() {
			for i := range 1000 {
				model := []string{"pinned", "primary", "any"}[(w+i)%3]
				mctx := WithModel(ctx, model)
				if i%10 != 0 {
					var port int
					if assert.NoError(t, p.QueryRow(mctx, whichPort).Scan(&port)) {
						mu.Lock()
						reads[model][port]++
						mu.Unlock()
					}
					continue
				}
				_, err := p.Exec(mctx, "insert into marks (model) values ($1)", model)
				mu.Lock()
				if model == "pinned" {
					var pgErr *pgconn.PgError
					assert.ErrorAs(t, err, &pgErr)
					assert.Equal(t, "25006", pgErr.Code, "a write forced on a replica shows the server's own error")
					refused++
				} else if assert.NoError(t, err) {
					written++
				}
				mu.Unlock()
			}
		})
	}
	callers.Wait()
	assert.Equal(t, 1, len(reads["pinned"]), "%v", reads)
	assert.Positive(t, reads["pinned"][int(replica.Port())])
	assert.Equal(t, 1, len(reads["primary"]), "%v", reads)
	assert.Positive(t, reads["primary"][int(c.Primary().Port())])
	assert.Equal(t, 3, len(reads["any"]), "%v", reads)
	total := refused + written
	for _, byPort := range reads {
		for _, n := range byPort {
			total += n
		}
	}
	assert.Equal(t, 10_000, total)
	assert.EqualValues(t, written, count(t, c, fmt.Sprintf("select count(*) from marks where port = %d", c.Primary().Port())))
	assert.EqualValues(t, written, count(t, c, "select count(*) from marks"))
}

func TestRoutesOfTheContext(t *testing.T) {
	t.Parallel()
	c := pgtest.Start(t, pgtest.Options{Standbys: 2})
	p := openPool(t, Options{Models: map[string]Route{"m": {Target: TargetReplica}}}, c.ConnString())
	waitUp(t, p)
	ctx := testContext(t)
	port := func(ctx context.Context) int {
		var port int
		require.NoError(t, p.QueryRow(ctx, whichPort).Scan(&port))
		return port
	}
	primary, last := int(c.Primary().Port()), c.Standbys()[1]
	assert.Equal(t, primary, port(WithPrimary(ctx)))
	assert.NotEqual(t, primary, port(WithPreferReplica(ctx)))
	assert.Equal(t, int(last.Port()), port(WithPeer(ctx, last.Addr())))
	assert.Equal(t, primary, port(WithPrimary(WithModel(ctx, "m"))), "the context wins over the model")

	for name, bad := range map[string]context.Context{"nobody": WithPeer(ctx, "nobody"), "nomodel": WithModel(ctx, "nomodel")} {
		for _, err := range everyCall(bad, p) {
			require.ErrorIs(t, err, ErrUnknownName)
			assert.ErrorContains(t, err, name)
		}
	}

	tx, err := p.BeginTx(ctx, pgx.TxOptions{AccessMode: pgx.ReadOnly})
	require.NoError(t, err)
	var at int
	require.NoError(t, tx.QueryRow(ctx, whichPort).Scan(&at))
	require.NoError(t, tx.Commit(ctx))
	assert.NotEqual(t, primary, at)
	for _, o := range []pgx.TxOptions{{}, {AccessMode: pgx.ReadOnly, IsoLevel: pgx.Serializable}, {AccessMode: pgx.ReadOnly, BeginQuery: "begin"}} {
		tx, err := p.BeginTx(ctx, o)
		require.NoError(t, err)
		require.NoError(t, tx.QueryRow(ctx, whichPort).Scan(&at))
		require.NoError(t, tx.Rollback(ctx))
		assert.Equal(t, primary, at, "%+v", o)
	}

	d := explained(t, p, ctx, "select 1")
	assert.Equal(t, ReasonRead, d.Reason)
	assert.NotEqual(t, c.Primary().Addr(), d.Peer)
	assert.Equal(t, Decision{Peer: c.Primary().Addr(), Reason: ReasonStatement, Attempt: 1, Kind: KindWrite}, explained(t, p, ctx, "insert into x values (1)"))
	assert.Equal(t, Decision{Peer: c.Primary().Addr(), Reason: ReasonRoute, Attempt: 1, Kind: KindRead}, explained(t, p, WithPrimary(ctx), "select 1"))
	assert.Equal(t, KindWrite, explained(t, p, WithPrimary(ctx), "insert into x values (1)").Kind)
	assert.Equal(t, ReasonRead, explained(t, p, WithRoute(WithPrimary(ctx), Route{Target: TargetAuto}), "select 1").Reason)
	assert.Equal(t, ReasonModel, explained(t, p, WithModel(ctx, "m"), "select 1").Reason)
}

// explainer is a MultiPool or a Router.
type explainer interface {
	Explain(ctx context.Context, sql string) (Decision, error)
}

func explained(t *testing.T, p explainer, ctx context.Context, sql string) Decision {
	t.Helper()
	d, err := p.Explain(ctx, sql)
	require.NoError(t, err)
	return d
}

func TestExplainReturnsTheErrorThatTheCallWould(t *testing.T) {
	t.Parallel()
	p, err := New(context.Background(), "postgres://app@127.0.0.1:1,127.0.0.1:2/app?multipool_wait=1ms")
	require.NoError(t, err)
	t.Cleanup(p.Close)
	ctx := context.Background()
	var nobody *NoPeerError
	for _, x := range []struct {
		name string
		ctx  context.Context
		want func(error) bool
	}{
		{"a peer that nobody has", WithPeer(ctx, "db9"), func(err error) bool { return errors.Is(err, ErrUnknownName) }},
		{"a model that nobody has", WithModel(ctx, "m9"), func(err error) bool { return errors.Is(err, ErrUnknownName) }},
		{"nobody serves", ctx, func(err error) bool { return errors.As(err, &nobody) && len(nobody.Peers) == 2 }},
		{"no primary", WithPrimary(ctx), func(err error) bool { return errors.Is(err, ErrNoPrimary) }},
		{"no replica", WithReplica(ctx), func(err error) bool { return errors.Is(err, ErrNoReplica) }},
	} {
		d, err := p.Explain(x.ctx, "select 1")
		assert.Truef(t, x.want(err), "%s: %v", x.name, err)
		assert.Zero(t, d, x.name)
		assert.Equal(t, "none", d.Reason.String())
	}
	p.Close()
	_, err = p.Explain(ctx, "select 1")
	assert.ErrorIs(t, err, ErrClosedPool)
}

// callCopy is the place of CopyFrom's error in everyCall.
const callCopy = 5

// everyCall makes every kind of call and returns its error.
func everyCall(ctx context.Context, p *MultiPool) []error {
	_, exec := p.Exec(ctx, "select 1")
	rows, query := p.Query(ctx, "select 1")
	rows.Close()
	var n int
	row := p.QueryRow(ctx, "select 1").Scan(&n)
	tx, begin := p.Begin(ctx)
	if begin == nil {
		begin = tx.Rollback(ctx)
	} else if tx != nil {
		begin = errors.New("a failed Begin returned a transaction")
	}
	_, copied := p.CopyFrom(ctx, pgx.Identifier{"x"}, []string{"y"}, pgx.CopyFromRows(nil))
	conn, acquire := p.Acquire(ctx)
	if acquire == nil {
		conn.Release()
	}
	batch := &pgx.Batch{}
	batch.Queue("select 1")
	sent := p.SendBatch(ctx, batch).Close()
	return []error{
		exec, query, rows.Err(), row, begin, copied, acquire, sent, p.Ping(ctx),
		p.AcquireFunc(ctx, func(*pgxpool.Conn) error { return nil }),
	}
}

func TestTargetSessionAttrsKeepTheirMeaningForThePool(t *testing.T) {
	t.Parallel()
	c := pgtest.Start(t, pgtest.Options{Standbys: 1})
	primary, replica := int(c.Primary().Port()), int(c.Standbys()[0].Port())
	for attrs, want := range map[string]map[int]bool{
		"read-write": {primary: true}, "primary": {primary: true},
		"read-only": {replica: true}, "standby": {replica: true}, "prefer-standby": {replica: true},
		"any": {primary: true, replica: true},
	} {
		p := openPool(t, Options{}, c.ConnString("target_session_attrs="+attrs))
		waitUp(t, p)
		var got map[int]bool
		undisturbed(t, p, func() {
			got = map[int]bool{}
			for range 40 {
				var port int
				require.NoError(t, p.QueryRow(testContext(t), whichPort).Scan(&port), attrs)
				got[port] = true
			}
		})
		assert.Equal(t, want, got, attrs)
		p.Close()
	}
}

func TestAFullReplicaSpillsToAnother(t *testing.T) {
	t.Parallel()
	c := pgtest.Start(t, pgtest.Options{Standbys: 2})
	p := openPool(t, Options{}, c.ConnString("pool_max_conns=2"))
	waitUp(t, p)
	ctx := testContext(t)
	full, other := c.Standbys()[0], c.Standbys()[1]
	var held []*pgxpool.Conn
	for range 2 {
		conn, err := p.Acquire(WithPeer(ctx, full.Addr()))
		require.NoError(t, err)
		held = append(held, conn)
	}
	for range 50 {
		var port int
		require.NoError(t, p.QueryRow(ctx, whichPort).Scan(&port))
		require.Equal(t, int(other.Port()), port)
	}
	for _, conn := range held {
		conn.Release()
	}
	waitFor(t, "both to serve", 20*time.Second, func() bool {
		var port int
		require.NoError(t, p.QueryRow(ctx, whichPort).Scan(&port))
		return port == int(full.Port())
	})
}

func TestWithoutAReplicaThePrimaryServesReads(t *testing.T) {
	t.Parallel()
	c := pgtest.Start(t, pgtest.Options{Standbys: 1})
	var j journal
	p := openPool(t, Options{Hooks: j.hooks()}, c.ConnString())
	waitUp(t, p)
	require.NoError(t, c.Standbys()[0].Kill())
	ctx := testContext(t)
	var port int
	require.NoError(t, p.QueryRow(ctx, whichPort).Scan(&port))
	assert.Equal(t, int(c.Primary().Port()), port)
	waitFor(t, "its fall", 10*time.Second, func() bool { return p.Status().Peers[1].Health == HealthDown })
	j.take()
	require.NoError(t, p.QueryRow(ctx, whichPort).Scan(&port))
	assert.Equal(t, []Decision{{Peer: c.Primary().Addr(), Reason: ReasonNoReplica, Attempt: 1, Kind: KindRead}}, j.take())

	err := p.QueryRow(WithRoute(withTimeout(t, 100*time.Millisecond), Route{Target: TargetReplica}), whichPort).Scan(&port)
	require.ErrorIs(t, err, ErrNoReplica)
	require.ErrorIs(t, err, context.DeadlineExceeded)
	assert.ErrorContains(t, err, c.Standbys()[0].Addr()+" down")

	require.NoError(t, c.Standbys()[0].Start())
	waitFor(t, "the replica to serve again", 20*time.Second, func() bool {
		require.NoError(t, p.QueryRow(ctx, whichPort).Scan(&port))
		return port == int(c.Standbys()[0].Port())
	})
}

// withTimeout is a context of a test that ends soon.
func withTimeout(t testing.TB, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), d)
	t.Cleanup(cancel)
	return ctx
}

func TestCloseEndsEveryGoroutineAndRejectsCalls(t *testing.T) {
	c := pgtest.Start(t, pgtest.Options{Standbys: 2})
	before := runtime.NumGoroutine()
	for range 5 {
		p := openPool(t, Options{}, c.ConnString())
		for i, err := range everyCall(testContext(t), p) {
			if i != callCopy { // there is no table
				require.NoError(t, err)
			}
		}
		p.Close()
		p.Close()
		for _, err := range everyCall(testContext(t), p) {
			require.ErrorIs(t, err, ErrClosedPool)
		}
		for _, q := range p.peers() {
			assert.Zero(t, q.sockets.len())
		}
	}
	waitFor(t, "the goroutines to end", 5*time.Second, func() bool { return runtime.NumGoroutine() <= before })
}

// tracing counts what it is told, through both kinds of pool tracer.
type tracing struct {
	mu                      sync.Mutex
	queries, acquires, rels int
	pools                   map[*MultiPool]bool
}

func (tr *tracing) TraceQueryStart(ctx context.Context, _ *pgx.Conn, _ pgx.TraceQueryStartData) context.Context {
	return ctx
}

func (tr *tracing) TraceQueryEnd(context.Context, *pgx.Conn, pgx.TraceQueryEndData) {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	tr.queries++
}

func (tr *tracing) TraceAcquireStart(ctx context.Context, _ *MultiPool, _ TraceAcquireStartData) context.Context {
	return ctx
}

func (tr *tracing) TraceAcquireEnd(_ context.Context, p *MultiPool, _ TraceAcquireEndData) {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	tr.acquires++
	tr.pools[p] = true
}

func (tr *tracing) TraceRelease(p *MultiPool, _ TraceReleaseData) {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	tr.rels++
	tr.pools[p] = true
}

func TestHooksAndTracersOfTheProgramRunOnEveryPeer(t *testing.T) {
	t.Parallel()
	c := pgtest.Start(t, pgtest.Options{Standbys: 2})
	pool, err := ParseConfig(c.ConnString())
	require.NoError(t, err)
	tr := &tracing{pools: map[*MultiPool]bool{}}
	pool.ConnConfig.Tracer = tr
	var mu sync.Mutex
	calls := map[string]map[uint16]int{}
	note := func(hook string, port uint16) {
		mu.Lock()
		defer mu.Unlock()
		if calls[hook] == nil {
			calls[hook] = map[uint16]int{}
		}
		calls[hook][port]++
	}
	connPort := func(c *pgx.Conn) uint16 { return c.Config().Port }
	pool.BeforeConnect = func(_ context.Context, cc *pgx.ConnConfig) error { note("BeforeConnect", cc.Port); return nil }
	pool.AfterConnect = func(_ context.Context, c *pgx.Conn) error { note("AfterConnect", connPort(c)); return nil }
	pool.PrepareConn = func(_ context.Context, c *pgx.Conn) (bool, error) { note("PrepareConn", connPort(c)); return true, nil }
	pool.AfterRelease = func(c *pgx.Conn) bool { note("AfterRelease", connPort(c)); return true }
	pool.BeforeClose = func(c *pgx.Conn) { note("BeforeClose", connPort(c)) }
	pool.ShouldPing = func(_ context.Context, d pgxpool.ShouldPingParams) bool {
		note("ShouldPing", connPort(d.Conn))
		return false
	}
	p := openConfig(t, Options{}, pool)
	ctx := testContext(t)
	waitUp(t, p)
	for _, s := range c.Servers() {
		for range 3 {
			var n int
			require.NoError(t, p.QueryRow(WithPeer(ctx, s.Addr()), "select 1").Scan(&n))
		}
	}
	p.Close()
	mu.Lock()
	defer mu.Unlock()
	for _, hook := range []string{"BeforeConnect", "AfterConnect", "PrepareConn", "AfterRelease", "BeforeClose", "ShouldPing"} {
		assert.Len(t, calls[hook], 3, hook)
	}
	assert.Equal(t, 9, tr.queries, "the monitors' own statements are not traced")
	assert.Equal(t, 9, tr.acquires)
	assert.Equal(t, 9, tr.rels)
	assert.Equal(t, map[*MultiPool]bool{p: true}, tr.pools)
}

// logged is err as the standard library's structured logger and its JSON encoder write it.
func logged(err error) string {
	var b strings.Builder
	slog.New(slog.NewJSONHandler(&b, nil)).Error("x", "err", err)
	slog.New(slog.NewTextHandler(&b, nil)).Error("x", "err", err)
	text, _ := json.Marshal(err)
	return b.String() + string(text)
}

// TestMisconfigurationIsToldAtOnce: whatever is wrong is told after the next look, with the peer's name and without the
// password.
func TestMisconfigurationIsToldAtOnce(t *testing.T) {
	t.Parallel()
	const secret = "sekret4711"
	c := pgtest.Start(t, pgtest.Options{Standbys: 1, HBA: []string{"host all app 127.0.0.1/32 scram-sha-256"}})
	must(t, c, "create role app login password 'right'")
	for name, tc := range map[string]struct{ from, to, says string }{
		"wrong password":   {"postgres@", "app:" + secret + "@", "password authentication failed"},
		"missing database": {"/postgres?", "/nowhere?", `database "nowhere" does not exist`},
		"missing role":     {"postgres@", "nobody:" + secret + "@", `"nobody" does not exist`},
		"TLS mismatch":     {"sslmode=disable", "sslmode=require", "server refused TLS connection"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			bad := strings.Replace(c.ConnString(), tc.from, tc.to, 1)
			require.NotEqual(t, c.ConnString(), bad)
			p := openPool(t, Options{}, bad)
			begun := time.Now()
			calls := everyCall(testContext(t), p)
			for _, err := range calls {
				require.Error(t, err)
				assert.ErrorContains(t, err, tc.says)
				assert.ErrorContains(t, err, fmt.Sprint(c.Primary().Port()))
				for _, text := range []string{err.Error(), fmt.Sprintf("%+v", err), fmt.Sprintf("%q", err), logged(err)} {
					assert.NotContains(t, text, secret)
				}
			}
			assert.Less(t, time.Since(begun), time.Duration(len(calls))*p.config.Wait/2, "no call has waited for longer than a look")
		})
	}
}
