package multipool

import (
	"context"
	"math"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/pgmultipool/multipool/internal/pgfault"
	"github.com/pgmultipool/multipool/internal/quota"
	"github.com/pgmultipool/multipool/internal/sqltext"
)

// minRetries is the least reserve of the budget of statements that are sent again.
const minRetries = 100

// Pool is [MultiPool] under pgxpool's name, for programs that swap the import of pgxpool for this package.
type Pool = MultiPool

// Config is pgxpool's configuration of one pool, which [NewWithConfig] takes and [MultiPool.Config] returns. [Options]
// has what this package adds to it.
type Config = pgxpool.Config

// Conn is the connection that pgxpool's Acquire returns.
type Conn = pgxpool.Conn

// Stat is pgxpool's snapshot of the statistics of one pool. [Status] has those of all peers.
type Stat = pgxpool.Stat

// ShouldPingParams is what pgxpool passes to Config.ShouldPing.
type ShouldPingParams = pgxpool.ShouldPingParams

// TraceAcquireStartData is passed to an [AcquireTracer] when an acquire begins.
type TraceAcquireStartData = pgxpool.TraceAcquireStartData

// TraceAcquireEndData is passed to an [AcquireTracer] when an acquire ends.
type TraceAcquireEndData = pgxpool.TraceAcquireEndData

// TraceReleaseData is passed to a [ReleaseTracer] when a connection is released.
type TraceReleaseData = pgxpool.TraceReleaseData

// MultiPool is a pool of connections to the peers of one replicated PostgreSQL: one pgxpool for every peer, and the
// routing between them. It has every method of pgxpool.Pool, with the same signature. It is safe for concurrent use.
//
// A call that no peer can take waits for one, up to Options.Wait and within its context. Then it fails with a
// [NoPeerError]. On a closed pool every call fails with [ErrClosedPool].
type MultiPool struct {
	given    *pgxpool.Config // what came in
	config   Options         // complete
	solo     bool            // one peer: a pgxpool with routes and statistics
	ofRouter atomic.Bool     // a Router's: names of models that are not its own are none of its business
	route    atomic.Pointer[resolution]
	hooks    Hooks
	herald   *herald
	texts    sqltext.Cache // where the texts of calls may run
	budget   quota.RetryBudget

	begun     time.Time // of the pool's clock
	positions positions // of the primary
	lagEvery  atomic.Int64

	topology atomic.Pointer[topology] // readers load it; observe replaces it
	mu       ranked[rankState]        // orders observations; nothing blocks under it

	followers followers // the pools that follow

	waiting   atomic.Int64
	attending atomic.Int64 // calls of WaitForPrimary under way
	orphaned  atomic.Int64 // when the last primary was lost, in Unix nanoseconds
	changed   atomic.Int64 // when the topology was, by the pool's clock
	settle    *time.Timer  // ends the time in which nobody is elected before all have answered
	patience  *time.Timer  // ends that in which somebody who claims to be the primary waits for looks; under mu

	closed    atomic.Bool
	closeOnce sync.Once
	lifetime  context.Context      // has the values of the constructor's; ends with Close
	changing  ranked[rankChanging] // orders changes of who the peers are with one another and with Close
	version   atomic.Uint64        // counts them
	tallies   sync.Map             // *counters by the name of a peer
	tallied   int                  // how many
	numbered  atomic.Int32         // peers that were made
	discovery discovery
	seeds     []peerConfig // the peers of the configuration
	stop      context.CancelFunc
	monitors  sync.WaitGroup
	telling   sync.WaitGroup // the herald
	asking    sync.WaitGroup // a call of Options.Discover
}

// settleTime is how long the first calls wait for peers that have not answered yet, where others have.
const settleTime = 250 * time.Millisecond

// New returns a pool of the hosts in connString, which has libpq's form for several hosts:
// postgres://app@db1,db2:5433,db3/app. Every host is a peer. See [ParseConfig] for the keys of connString and
// [NewWithConfig] for ctx.
func New(ctx context.Context, connString string) (*MultiPool, error) {
	config, err := ParseConfig(connString)
	if err != nil {
		return nil, err
	}
	return NewWithConfig(ctx, config)
}

// NewWithConfig returns a pool of the hosts in config.ConnConfig and its Fallbacks. It copies config. Like pgxpool, it
// panics if config was not made by [ParseConfig] or pgxpool.ParseConfig.
//
// It does not wait for a server: connections are made in the background, and it does not return their errors. The pool
// uses the values of ctx, but the end of ctx does not end the pool.
func NewWithConfig(ctx context.Context, config *pgxpool.Config) (*MultiPool, error) {
	return Open(ctx, Options{Config: config})
}

// Open returns a pool with the given options. It differs from [NewWithConfig] only in what can be configured. Its error
// names the field, the key or the peer at fault.
func Open(ctx context.Context, config Options) (*MultiPool, error) {
	complete, peers, err := config.complete()
	if err != nil {
		return nil, err
	}
	p := &MultiPool{
		given: takeIn(config.Config), config: complete, hooks: *complete.Hooks,
		solo: len(peers) == 1 && complete.Discover == nil, begun: time.Now(),
	}
	p.lagEvery.Store(math.MaxInt64)
	p.lookFor(complete.MaxLag)
	p.lifetime, p.stop = context.WithCancel(context.WithoutCancel(ctx))
	p.budget.Reserve = max(minRetries, 2*int64(complete.Config.MaxConns))
	p.herald = newHerald(complete.Name, complete.Hooks)
	p.seeds = peers
	if err := p.addPeers(peers); err != nil {
		p.Close()
		return nil, err
	}
	if err := p.resolveConfigured(); err != nil {
		p.Close()
		return nil, err
	}
	p.start()
	return p, nil
}

// addPeers makes the peers and the first topology.
func (p *MultiPool) addPeers(configs []peerConfig) error {
	var peers []*peer
	var believed []Role
	var failed error
	for _, c := range configs {
		q, err := p.makePeer(c)
		if err != nil {
			failed = err
			break
		}
		peers, believed = append(peers, q), append(believed, c.Role)
	}
	if p.solo && failed == nil {
		p.topology.Store(soloTopology(peers[0]))
	} else {
		top := newTopology(p.config.Mode, peers, believed) // of those that were made, so that they are closed
		top.balancer = p.config.Balancer
		p.topology.Store(top)
	}
	return failed
}

func (p *MultiPool) makePeer(c peerConfig) (*peer, error) {
	q, err := newPeer(p, c)
	if err != nil {
		return nil, err
	}
	if !p.solo {
		q.reserve(&p.config)
	}
	q.role.Store(int32(c.Role))
	return q, nil
}

// peers is all peers as they are now.
func (p *MultiPool) peers() []*peer {
	if top := p.topology.Load(); top != nil {
		return top.peers
	}
	return nil // the pool is being made
}

// resolveConfigured checks the routes of the configuration against the peers.
func (p *MultiPool) resolveConfigured() error {
	r := p.resolveRoute(p.config.Route)
	if r.err != nil {
		return r.err
	}
	p.route.Store(r)
	for _, name := range sortedKeys(p.config.Models) {
		if r := p.resolveRoute(p.config.Models[name].over(p.config.Route)); r.err != nil {
			return &modelError{name, r.err}
		}
	}
	return nil
}

// start sets the monitors going.
func (p *MultiPool) start() {
	if p.solo {
		return
	}
	if p.config.Discover == nil {
		p.launch()
	} else {
		p.monitors.Go(func() { p.discovery.run(p.lifetime, p) }) // it launches them
	}
	w := &watch{pool: p}
	p.monitors.Go(func() { w.run(p.lifetime) })
	if p.herald != nil {
		p.telling.Go(func() { p.herald.run(p.lifetime) })
	}
}

// launch sets the monitors of the first peers going.
func (p *MultiPool) launch() {
	p.settle = time.AfterFunc(settleTime, func() { p.observe(observation{settle: true}) })
	for _, q := range p.peers() {
		if q.leave == nil { // one that has been discovered may have one
			p.attend(q)
		}
	}
}

// attend sets a peer's monitor going.
func (p *MultiPool) attend(q *peer) {
	var ctx context.Context
	ctx, q.leave = context.WithCancel(p.lifetime)
	p.monitors.Go(func() {
		defer close(q.unattended)
		q.monitor.run(ctx)
	})
}

// clock is the time since the pool was made.
func (p *MultiPool) clock() time.Duration { return time.Since(p.begun) }

// Close closes all connections of all peers. Later calls fail with [ErrClosedPool]. As in pgxpool, Close waits until
// every connection that the program holds has been returned. It also waits until every goroutine of the pool has ended
// and every event has been passed to the [Hooks]. If something still runs on a server after a second, the pool asks
// whether the server is there, and cuts its connections if it does not answer; a pool of one peer does not.
//
// Close cancels the context of a call of Options.Discover, and waits for the call to return.
//
// Close may be called more than once. It may be called inside a hook: then it waits for no hook, and waiting events are
// passed on after it has returned. It may be called inside Options.Discover, for which it does not wait then.
func (p *MultiPool) Close() {
	p.closeOnce.Do(func() {
		p.changing.Lock()
		p.closed.Store(true)
		p.changing.Unlock()
		p.stop()
		if p.settle != nil {
			p.settle.Stop()
		}
		p.monitors.Wait()
		p.calm()
		p.followers.close()
		var pools sync.WaitGroup
		for _, q := range p.peers() {
			pools.Go(func() { q.close(p.followers.wait) })
		}
		pools.Wait()
	})
	// Neither waits for itself.
	if !inside(callDiscover) {
		p.asking.Wait()
	}
	if !inside(callHooks) {
		p.telling.Wait()
	}
}

// calm ends what waits for a time.
func (p *MultiPool) calm() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.patience != nil {
		p.patience.Stop()
	}
}

// Exec runs sql on the primary, or where the route says, and returns its command tag. It takes the arguments that
// pgxpool's Exec takes. If the statement may have been executed and its answer was lost, the error matches
// [ErrOutcomeUnknown], except in a pool of one peer.
func (p *MultiPool) Exec(ctx context.Context, sql string, arguments ...any) (pgconn.CommandTag, error) {
	text := sql
	if rewrites(arguments) {
		text = "" // nobody knows what is sent
	}
	return attempt(ctx, p, opExec, text, func(c *pgxpool.Conn, _ *wire) (pgconn.CommandTag, error) {
		tag, err := c.Exec(ctx, sql, arguments...)
		if err == nil {
			c.Release()
		}
		return tag, err
	})
}

// Query runs sql on a healthy replica. It runs sql on the primary if no replica can serve it, or if the text shows that
// it must run there. A route may say otherwise. Query takes the arguments that pgxpool's Query takes. As with pgxpool,
// the caller must close the rows or read them to their end.
//
// A read may see the database as it was a moment ago, because replication takes time. If the text is a write whose
// answer was lost, the error of Query or of the rows matches [ErrOutcomeUnknown], as that of Exec does.
func (p *MultiPool) Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error) {
	r, err := p.query(ctx, sql, args, false)
	if r == nil {
		return failedRows{err}, err
	}
	return r, nil // an error is at the end of the rows, where pgx has it
}

// QueryRow is Query for at most one row. Its errors are deferred until Scan. If the row has arrived, and the server is
// lost before the query is complete, the pool may send the query again; Scan then fills its destinations twice.
func (p *MultiPool) QueryRow(ctx context.Context, sql string, args ...any) pgx.Row {
	r, err := p.query(ctx, sql, args, true)
	if r == nil {
		return failedRow{err}
	}
	return (*row)(r)
}

// query returns rows that show the error, or no rows.
func (p *MultiPool) query(ctx context.Context, sql string, args []any, one bool) (*rows, error) {
	r, err := attempt(ctx, p, opOf(args), sql, func(c *pgxpool.Conn, w *wire) (*rows, error) {
		return timedRows(ctx, c, w, sql, args, one)
	})
	return r.showing(err), err
}

// queryAgain is query for a QueryRow whose row has come, and not its end; false: it may not be sent again.
func (p *MultiPool) queryAgain(call rowCall, been progress, f failure) (*rows, bool, error) {
	r, more, err := again(call.ctx, p, opOf(call.args), call.sql, been, f, func(c *pgxpool.Conn, w *wire) (*rows, error) {
		return timedRows(call.ctx, c, w, call.sql, call.args, true)
	})
	return r.showing(err), more, err
}

// opOf is the operation of a query with these arguments.
func opOf(args []any) operation {
	if rewrites(args) {
		return opRewritten
	}
	return opQuery
}

// timedRows is queryRows, and times one read in eight. A read that has met a stale plan has done nothing: it is sent once more
// on the same connection, for which pgx has dropped the plan by then.
func timedRows(ctx context.Context, c *pgxpool.Conn, w *wire, sql string, args []any, one bool) (*rows, error) {
	var begun time.Time
	timed := w.seq.Load()%sampleEvery == sampleEvery/2
	if timed {
		begun = time.Now()
	}
	r, err := queryRows(ctx, c, w, sql, args, one)
	switch {
	case err != nil && w.anew && pgfault.Stale(err) && !w.pg.IsClosed():
		return queryRows(ctx, c, w, sql, args, one)
	case timed && err == nil:
		w.peer.latency.note(time.Since(begun))
	}
	return r, err
}

// rewrites reports whether a call's arguments begin, after pgx's other options, with a pgx.QueryRewriter: then its
// text is not what is sent. pgx's own rewriters put numbers in the place of names and leave the rest.
func rewrites(args []any) bool {
	for _, arg := range args {
		switch arg.(type) {
		case pgx.NamedArgs, pgx.StrictNamedArgs, pgx.QueryExecMode, pgx.QueryResultFormats, pgx.QueryResultFormatsByOID:
		case pgx.QueryRewriter:
			return true
		default:
			return false
		}
	}
	return false
}

// sampleEvery makes one read in eight take its time: a connection's seq grows by two a statement. The first on a connection
// is none of them, since it is prepared there before it runs.
const sampleEvery = 16

// SendBatch sends b to the primary, or where the route says. Closing the results releases the connection. A batch that
// was handed to a connection is never sent again. If it may have been executed and the answer was lost, the errors of
// its results match [ErrOutcomeUnknown], as that of Exec does. If the batch begins a transaction, the error of the
// transaction's Commit does.
func (p *MultiPool) SendBatch(ctx context.Context, b *pgx.Batch) pgx.BatchResults {
	results, err := attempt(ctx, p, opBatch, "", func(c *pgxpool.Conn, w *wire) (pgx.BatchResults, error) {
		br := c.SendBatch(ctx, b)
		if tx := br.Tx(); tx != nil {
			return &batchResults{BatchResults: br, tx: newTx(tx, c, w), wire: w, account: w.been.account}, nil
		}
		return &batchResults{BatchResults: br, conn: c, wire: w, ctx: ctx, account: w.been.account}, nil
	})
	if err != nil {
		return pgx.FailedBatchResults(b, err)
	}
	return results
}

// Begin is BeginTx without options.
func (p *MultiPool) Begin(ctx context.Context) (pgx.Tx, error) {
	return p.BeginTx(ctx, pgx.TxOptions{})
}

// BeginTx begins a transaction on the primary, or where the route says. A transaction whose AccessMode is pgx.ReadOnly,
// that is not serializable and that has no BeginQuery, begins on a replica, or on the primary if no replica can serve
// it. The transaction stays on its peer, and none of its statements is sent again. ctx affects the begin only.
func (p *MultiPool) BeginTx(ctx context.Context, txOptions pgx.TxOptions) (pgx.Tx, error) {
	if p.solo {
		return p.beginAlone(ctx, txOptions)
	}
	tx, err := p.begin(ctx, txOptions)
	if err != nil {
		return nil, err
	}
	return tx, nil
}

// CopyFrom copies rowSrc into a table on the primary, or where the route says, and returns the number of rows. A copy
// that was handed to a connection is never sent again, because its source has been read. If the copy may have been
// executed and the answer was lost, the error matches [ErrOutcomeUnknown], as that of Exec does.
func (p *MultiPool) CopyFrom(ctx context.Context, tableName pgx.Identifier, columnNames []string, rowSrc pgx.CopyFromSource) (int64, error) {
	return attempt(ctx, p, opCopy, "", func(c *pgxpool.Conn, _ *wire) (int64, error) {
		n, err := c.Conn().CopyFrom(ctx, tableName, columnNames, rowSrc)
		if err == nil {
			c.Release()
		}
		return n, err
	})
}

// Ping makes one round trip to the peer that Exec would use.
func (p *MultiPool) Ping(ctx context.Context) error {
	_, err := attempt(ctx, p, opPing, "", func(c *pgxpool.Conn, _ *wire) (struct{}, error) {
		err := c.Ping(ctx)
		if err == nil {
			c.Release()
		}
		return struct{}{}, err
	})
	return err
}

// Acquire returns a connection to the primary, or to where the route says. The caller must release it. The pool does
// not route what the program does with the connection, does not send it again, and does not mark its errors.
func (p *MultiPool) Acquire(ctx context.Context) (*pgxpool.Conn, error) {
	return attempt(ctx, p, opAcquire, "", func(c *pgxpool.Conn, _ *wire) (*pgxpool.Conn, error) {
		return c, nil
	})
}

// AcquireFunc acquires a connection, calls f with it, and releases it. It returns the error of the acquire or of f. ctx
// affects the acquire only.
func (p *MultiPool) AcquireFunc(ctx context.Context, f func(*pgxpool.Conn) error) error {
	conn, err := p.Acquire(ctx)
	if err != nil {
		return err
	}
	defer conn.Release()
	return f(conn)
}

// AcquireAllIdle acquires all idle connections of all peers, one peer after the other. The caller must release them.
func (p *MultiPool) AcquireAllIdle(ctx context.Context) []*pgxpool.Conn {
	conns := []*pgxpool.Conn{}
	for _, q := range p.peers() {
		conns = append(conns, q.pool.AcquireAllIdle(ctx)...)
	}
	return conns
}

// Reset closes all connections of all peers, those in use when they are released. It also starts a health check of
// every peer. The pool stays open.
func (p *MultiPool) Reset() {
	for _, q := range p.peers() {
		q.generation.Add(1)
		q.pool.Reset()
		q.monitor.nudge()
	}
	p.followers.reset()
}

// Config returns a copy of the configuration that the pool was made from. A pool made from the copy is configured
// alike.
//
// The ConnConfig of the copy can be used for connections that the pool does not manage: with pgx.ConnectConfig or
// stdlib.OpenDB, for a listener or a migration. Such a connection goes to the primary, unless the program has set
// target_session_attrs or ConnConfig.ValidateConnect, the mode is not [ModeReplicated], or some Peer.Role is set.
//
// RuntimeParams of the copy does not have the multipool_* keys, since no server knows them. A constructor finds them
// nevertheless, also in a copy of the copy, unless ConnConfig.BuildFrontend has been replaced. A key that the program
// sets again in RuntimeParams wins.
func (p *MultiPool) Config() *pgxpool.Config {
	believed := slices.ContainsFunc(p.config.Peers, func(q Peer) bool { return q.Role != RoleUnknown })
	return giveOut(p.given, !p.solo && p.config.Mode == ModeReplicated && !believed)
}

// Stat returns the statistics of the primary's pool, or of the first peer's while there is no primary.
// [MultiPool.Status] has those of all peers, and their sums.
func (p *MultiPool) Stat() *pgxpool.Stat {
	if q := p.topology.Load().primary; q != nil {
		return q.pool.Stat()
	}
	return p.peers()[0].pool.Stat()
}

// PeerPool returns the pool of the named peer, in whatever state the peer is, or nil if the pool has no such peer. A
// call on the returned pool is not routed, but its outcome counts for the health of the peer. While the peer is down, no
// new connection is made. The MultiPool does not manage connections that the program makes from the Config of the
// returned pool or of its connections.
func (p *MultiPool) PeerPool(name string) *pgxpool.Pool {
	if q := p.named(name); q != nil {
		return q.pool
	}
	return nil
}

// Explain reports where a Query of sql with ctx would go now, and why. It sends nothing, does not wait and counts
// nothing. It asks the program's [Balancer], if there is one, as a call would.
//
// If no peer could take the call now, the error is a [NoPeerError]. If the call would fail before it is sent, for
// example because the pool is closed or the route names an unknown peer, Explain returns that error. With an error the
// Decision is the zero value.
func (p *MultiPool) Explain(ctx context.Context, sql string) (Decision, error) {
	var in intent
	if err := p.intend(ctx, opQuery, sql, &in); err != nil {
		return Decision{}, err
	}
	if in.fresh.bounds() {
		in.fresh.now = p.clock()
	}
	top := p.topology.Load()
	chosen, reason := top.pick(&in, &tried{})
	if chosen == nil {
		return Decision{}, p.noPeer(top, &in, &trail{}, nil)
	}
	return Decision{Peer: chosen.name, Reason: reason, Attempt: 1, Kind: in.kind()}, nil
}

// names returns the peers' names.
func (p *MultiPool) names() []string { return namesOfPeers(p.peers()) }

// anybodyServes reports whether some peer takes calls.
func (p *MultiPool) anybodyServes() bool {
	t := p.topology.Load()
	return len(t.reads)+len(t.writes) > 0
}

// readsSoFar counts the reads sent to all peers.
func (p *MultiPool) readsSoFar() (n int64) {
	for _, q := range p.peers() {
		n += q.picks.reads.Load()
	}
	return n
}
