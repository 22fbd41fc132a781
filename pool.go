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

// Config is pgxpool's configuration of one pool, which [NewWithConfig] takes and [MultiPool.Config] returns. What this
// package adds to it is [Options].
type Config = pgxpool.Config

// Conn is pgxpool's acquired connection.
type Conn = pgxpool.Conn

// Stat is pgxpool's snapshot of the statistics of one pool. [Status] has those of all peers.
type Stat = pgxpool.Stat

// ShouldPingParams is what pgxpool passes to Config.ShouldPing.
type ShouldPingParams = pgxpool.ShouldPingParams

// TraceAcquireStartData is what an [AcquireTracer] is given when Acquire begins.
type TraceAcquireStartData = pgxpool.TraceAcquireStartData

// TraceAcquireEndData is what an [AcquireTracer] is given when Acquire ends.
type TraceAcquireEndData = pgxpool.TraceAcquireEndData

// TraceReleaseData is what a [ReleaseTracer] is given when a connection is released.
type TraceReleaseData = pgxpool.TraceReleaseData

// MultiPool is a pool of connections to the peers of one replicated PostgreSQL: one pgxpool per peer, and the routing
// between them. It has every method of pgxpool.Pool with the same signature. It is safe for concurrent use.
//
// A call that finds no peer to take it waits for one, up to Options.Wait and within its context, and then fails with a
// [NoPeerError]. Of a closed pool the error is [ErrClosedPool].
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
	mu       sync.Mutex               // orders observations; nothing blocks under it

	followers followers // the pools that follow

	waiting   atomic.Int64
	attending atomic.Int64 // calls of WaitForPrimary under way
	orphaned  atomic.Int64 // when the last primary was lost, in Unix nanoseconds
	changed   atomic.Int64 // when the topology was, by the pool's clock
	settle    *time.Timer  // ends the time in which nobody is elected before all have answered
	patience  *time.Timer  // ends that in which somebody who claims to be the primary waits for looks; under mu

	closed    atomic.Bool
	closeOnce sync.Once
	lifetime  context.Context // has the values of the constructor's; ends with Close
	changing  sync.Mutex      // orders changes of who the peers are with one another and with Close
	version   atomic.Uint64   // counts them
	tallies   sync.Map        // *counters by the name of a peer
	tallied   int             // how many
	numbered  atomic.Int32    // peers that were made
	discovery discovery
	seeds     []peerConfig // the peers of the configuration
	stop      context.CancelFunc
	monitors  sync.WaitGroup
	telling   sync.WaitGroup // the herald
}

// settleTime is how long the first calls wait for peers that have not answered yet, where others have.
const settleTime = 250 * time.Millisecond

// New makes a pool of the hosts that connString lists, in libpq's multi-host form, each a peer:
// postgres://app@db1,db2:5433,db3/app. See [ParseConfig] for the keys and [NewWithConfig].
func New(ctx context.Context, connString string) (*MultiPool, error) {
	config, err := ParseConfig(connString)
	if err != nil {
		return nil, err
	}
	return NewWithConfig(ctx, config)
}

// NewWithConfig makes a pool of the hosts in config.ConnConfig and its Fallbacks. config must have been made by
// [ParseConfig] or pgxpool.ParseConfig, else it panics, as pgxpool does; it is copied. It blocks on nothing: connections
// are made in the background, and errors in making them are not returned here. ctx gives values to them; its end has
// no effect.
func NewWithConfig(ctx context.Context, config *pgxpool.Config) (*MultiPool, error) {
	return Open(ctx, Options{Config: config})
}

// Open makes a pool with everything there is to set. An error names the field, the key or the peer at fault. For the
// rest it is as [NewWithConfig].
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

// Close closes all connections of all peers and rejects further calls with [ErrClosedPool]. It blocks until every
// connection that the program holds has been returned, as pgxpool's does, and until every goroutine of the pool has
// ended and every event has been told to the [Hooks]. A server on which something still runs after a second is asked whether
// it is there, and where it does not answer its connections are cut; but not in a pool of one peer. Close may be called more
// than once, and inside a hook: there it waits for no hook, and events that wait are told after it has returned.
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
	if !insideHook() { // which would wait for itself
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

// Exec runs sql on the primary, or where the route says, and returns its command tag. It takes what pgxpool's Exec
// takes. Where the statement may have been executed and its answer was lost, the error matches [ErrOutcomeUnknown], but
// in a pool of one peer.
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

// Query runs sql on a healthy replica, on the primary where no replica can serve or where the text shows that it must
// run there, or where the route says. It takes what pgxpool's Query takes; the rows must be closed, or read to their
// end. A read may see the database as it was a moment ago: replication takes time. The error of a write whose answer
// was lost, here or in the rows, is as that of Exec.
func (p *MultiPool) Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error) {
	r, err := p.query(ctx, sql, args, false)
	if r == nil {
		return failedRows{err}, err
	}
	return r, nil // an error is at the end of the rows, where pgx has it
}

// QueryRow is Query for at most one row. Errors are deferred until Scan. Where the row has come and the server is lost
// before the end, the query may be sent again, and Scan fills its destinations twice.
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

// rewrites reports whether a call's arguments begin, behind pgx's other options, with a pgx.QueryRewriter: then its
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

// SendBatch sends b to the primary, or where the route says. The connection is released when the results are closed. A
// batch that a connection has taken is never sent again. Where it may have been executed and the answer was lost, the
// errors of its results match [ErrOutcomeUnknown] as that of Exec does; where it begins a transaction, that of its
// Commit.
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

// BeginTx begins a transaction on the primary; one with AccessMode pgx.ReadOnly, no BeginQuery and not serializable on
// a replica, the primary where no replica can serve; or where the route says. ctx affects the begin only. The
// transaction stays on its peer, and nothing in it is sent twice.
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

// CopyFrom copies rowSrc into a table on the primary, or where the route says. A copy that a connection has taken is
// never sent again: its source has been read. Its error is as that of Exec.
func (p *MultiPool) CopyFrom(ctx context.Context, tableName pgx.Identifier, columnNames []string, rowSrc pgx.CopyFromSource) (int64, error) {
	return attempt(ctx, p, opCopy, "", func(c *pgxpool.Conn, _ *wire) (int64, error) {
		n, err := c.Conn().CopyFrom(ctx, tableName, columnNames, rowSrc)
		if err == nil {
			c.Release()
		}
		return n, err
	})
}

// Ping makes one round trip to where Exec would go.
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

// Acquire takes a connection of the primary, or of where the route says. What the program does with it is not routed,
// not sent again and not marked.
func (p *MultiPool) Acquire(ctx context.Context) (*pgxpool.Conn, error) {
	return attempt(ctx, p, opAcquire, "", func(c *pgxpool.Conn, _ *wire) (*pgxpool.Conn, error) {
		return c, nil
	})
}

// AcquireFunc acquires a connection, calls f with it and releases it. ctx affects the acquire only.
func (p *MultiPool) AcquireFunc(ctx context.Context, f func(*pgxpool.Conn) error) error {
	conn, err := p.Acquire(ctx)
	if err != nil {
		return err
	}
	defer conn.Release()
	return f(conn)
}

// AcquireAllIdle acquires all idle connections of all peers, one peer after another.
func (p *MultiPool) AcquireAllIdle(ctx context.Context) []*pgxpool.Conn {
	conns := []*pgxpool.Conn{}
	for _, q := range p.peers() {
		conns = append(conns, q.pool.AcquireAllIdle(ctx)...)
	}
	return conns
}

// Reset closes all connections of all peers, those in use when they are released, and has every monitor look at once.
func (p *MultiPool) Reset() {
	for _, q := range p.peers() {
		q.generation.Add(1)
		q.pool.Reset()
		q.monitor.nudge()
	}
	p.followers.reset()
}

// Config returns a copy of the configuration that the pool was made from. A second constructor makes the same of it. Its
// ConnConfig is for connections of the program's own, of which the pool knows nothing: for pgx.ConnectConfig, stdlib.OpenDB,
// a listener or a migration. They go to the primary, where the program has set neither target_session_attrs nor
// ConnConfig.ValidateConnect; not so under the other modes, nor where the configuration has a Peer.Role. multipool_* keys
// are not among its RuntimeParams, since no server knows them: constructors find them all the same, also in a copy, unless
// ConnConfig.BuildFrontend has been replaced; one that is set there anew wins.
func (p *MultiPool) Config() *pgxpool.Config {
	believed := slices.ContainsFunc(p.config.Peers, func(q Peer) bool { return q.Role != RoleUnknown })
	return giveOut(p.given, !p.solo && p.config.Mode == ModeReplicated && !believed)
}

// Stat returns the statistics of the pool that writes use: the primary's, the first peer's while there is none. All
// peers and their sums are in [MultiPool.Status].
func (p *MultiPool) Stat() *pgxpool.Stat {
	if q := p.topology.Load().primary; q != nil {
		return q.pool.Stat()
	}
	return p.peers()[0].pool.Stat()
}

// PeerPool returns the pool of one peer, whatever becomes of that peer; nil if there is none of that name. What goes
// through it is not routed, but its outcomes are judged. Its Config, and that of its connections, is the program's own: what
// is made from it is not the pool's.
func (p *MultiPool) PeerPool(name string) *pgxpool.Pool {
	if q := p.named(name); q != nil {
		return q.pool
	}
	return nil
}

// Explain says where a Query of sql under ctx would go now, and why. It sends nothing, waits for nothing and counts
// nothing; a Balancer of the program's is asked as for a call. Where no peer could take the call now it returns a
// [NoPeerError], and otherwise the error that the call would return before it is sent: of a closed pool, of an unknown
// name. The Decision is the zero one beside an error.
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
