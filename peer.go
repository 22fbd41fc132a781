package multipool

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/pgmultipool/multipool/internal/pgfault"
	"github.com/pgmultipool/multipool/internal/quota"
)

// peer is one server: its pool, its breaker, its counters. It has an identity, not an index: snapshots point at it.
type peer struct {
	name  string
	host  string
	port  uint16
	owner *MultiPool
	solo  bool // the pool's only peer: nothing is judged
	asked bool // its role is asked by the monitor, or believed; sessions are not listened to
	proxy bool // more than one server may answer there
	vouch Role // the role that the configuration vouches for; RoleUnknown: discovered
	zone  string
	away  bool // in another zone than the pool
	spare bool // of last resort: reads only where nobody else can

	config     *pgxpool.Config // the template as configured, with the program's hooks and none of ours
	pool       *pgxpool.Pool
	shared     atomic.Bool // other pools use the server too: those that follow
	breaker    *breaker
	monitor    *monitor
	leave      func()        // ends the monitor; nil if it was not set going; under the owner's changing
	retired    chan struct{} // closed when a peer that was removed is closed
	unattended chan struct{} // closed when the monitor has ended
	sockets    sockets
	address    addressPin
	era        atomic.Pointer[era]
	dials      chan struct{} // places for handshakes
	knocks     knocks
	number     int32                 // tells it from the pool's other peers, also from those that were
	sighted    atomic.Pointer[sight] // by the last look that told which server it is
	guests     quota.Bulkhead        // for reads that fell back to the primary; nil if there is no limit
	writers    quota.Bulkhead        // for writes that may wait for a standby; nil if there is no limit
	awaits     atomic.Bool           // the last look found a primary whose commits wait for standbys

	// verdicts orders what opens and closes the breaker with what is published of it; observe is called under it.
	verdicts ranked[rankVerdicts]

	// generation counts the verdicts about the peer. What began in an older one says nothing about the present, so
	// that twenty connections lost at once are one event.
	generation atomic.Uint64
	noReceipts atomic.Int64  // until when, by the pool's clock, the server does not tell what became of a transaction
	drained    atomic.Bool   // by the operator
	suspected  atomic.Bool   // a fault was reported and the probe's verdict is out
	doubted    atomic.Bool   // a probe was asked for, for less than a fault
	role       atomic.Int32  // the topology's Role, for a comparison at every statement's end
	stale      atomic.Uint32 // the timeline by which a primary that is still behind the address was said to be replaced
	undeclared atomic.Bool   // it was said that there is more than one server at its address, and Proxy is not set
	hearsay    atomic.Bool   // the last look's session reported another role than its answer: it repeats, as poolers do

	answers atomic.Int64 // statements that have ended well, through a pooler
	sent    int64        // picks.writes at the watch's last tick; the watch's alone

	load    load
	permits quota.Permits
	slots   quota.Slots
	made    atomic.Int32 // connections of its own pool that there are
	picks   *counters
	faults  faultLog
	rate    faultRate

	latency   latencies
	roundTrip roundTrip // of the monitor's looks
	stall     stall     // the watch's
	behind    behind    // the monitor's
	health    atomic.Int32
	rose      atomic.Int64 // when it was last put back into use, in Unix nanoseconds
}

// called returns the peer's name; nobody's is "".
func (p *peer) called() string {
	if p == nil {
		return ""
	}
	return p.name
}

// weight is the peer's as it was configured; 1 where it was not.
func (p *peer) weight() float64 { return p.load.heft() }

func namesOfPeers(peers []*peer) []string {
	var names []string
	for _, p := range peers {
		names = append(names, p.name)
	}
	return names
}

// counters are what a peer was chosen for, and how often its breaker has opened. They are kept by the peer's name, so that
// one that goes and comes back counts on.
type counters struct {
	reads, writes, retries, trips atomic.Int64
}

// faultLog keeps the last fault.
type faultLog struct {
	mu   sync.Mutex
	err  error
	when time.Time
}

func (l *faultLog) note(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.err, l.when = err, time.Now()
}

func (l *faultLog) last() (when time.Time, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.when, l.err
}

// newPeer makes a peer and its pool. The pool dials in the background if the template has minimum sizes.
func newPeer(owner *MultiPool, c peerConfig) (*peer, error) {
	p := &peer{
		name: c.Name, host: c.Host, port: c.Port, owner: owner, solo: owner.solo,
		asked:  c.Proxy || c.Role != RoleUnknown,
		proxy:  c.Proxy,
		vouch:  c.Role,
		config: c.pool,
		picks:  owner.tallyOf(c.Name), unattended: make(chan struct{}), retired: make(chan struct{}),
		zone:   c.Zone,
		number: owner.numbered.Add(1),
		away:   owner.config.Zone != "" && c.Zone != owner.config.Zone,
		spare:  c.LastResort,
	}
	if !p.solo {
		p.monitor = newMonitor(p, &owner.config)
	}
	p.era.Store(newEra())
	p.dials = make(chan struct{}, maxHandshakes)
	p.behind.forget()
	p.load.limit, p.permits.Limit, p.slots.Limit = c.pool.MaxConns, c.pool.MaxConns, c.pool.MaxConns
	p.load.weight = c.Weight
	p.load.share.Store(fullShare)
	p.load.exhausted = p.exhausted
	p.breaker = newBreaker(p.name, &p.rate, &p.picks.trips)
	p.address.offset = rand.Uint32()
	var err error
	p.pool, err = newPool(owner.lifetime, p.compose(), p.config)
	return p, err
}

// acquire takes a connection from the peer's pool for a call.
func (p *peer) acquire(ctx context.Context, in *intent, t *trail) (c *pgxpool.Conn, w *wire, err error) {
	n := p.load.out.Add(1)
	defer func() {
		if c == nil || p.solo { // by an error, or a panic of the program's tracer; pgxpool counts what a single peer hands out
			p.load.out.Add(-1)
		}
	}()
	if c, err = p.take(ctx, n, in, t); err != nil {
		return nil, nil, err
	}
	w = wireOf(c.Conn())
	if !p.solo {
		w.out.Add(outCall + outOnce)
	}
	return c, w, nil
}

// take is acquire after the counting: n calls have or want a connection, this one included. A read that has fallen back to
// the primary leaves a reserve of its connections alone, and so does a write that may wait for a standby.
func (p *peer) take(ctx context.Context, n int32, in *intent, t *trail) (*pgxpool.Conn, error) {
	switch {
	case t.guest && p.guests != nil:
		return p.takePlace(ctx, p.guests, outGuest, (*topology).hasReplica)
	case in.commits() && p.awaits.Load() && p.writers != nil:
		return p.takePlace(ctx, p.writers, outWriter, nil)
	case (n > p.made.Load() || p.knocks.failing.Load()) && !p.solo:
		// A connection that is being closed counts among those that are made: where no other would take its place for long,
		// everybody is patient.
		return p.takePatiently(ctx, *in, t.tried)
	}
	return p.draw(ctx)
}

// draw takes a connection from the pool. Where the server has no more room for one, the monitor gives its own up: a pool
// may be as large as its role's limit.
func (p *peer) draw(ctx context.Context) (*pgxpool.Conn, error) {
	c, err := p.drawInTurn(ctx)
	for pause := 2 * time.Millisecond; err != nil && pgfault.TooManyConnections(err) && p.monitor.yield(); pause *= 2 {
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		c, err = p.drawInTurn(ctx)
	}
	return c, err
}

// drawInTurn takes a connection from the pool, in turn where other pools use the server too.
func (p *peer) drawInTurn(ctx context.Context) (c *pgxpool.Conn, err error) {
	if !p.shared.Load() {
		return p.pool.Acquire(ctx)
	}
	if err := p.awaitPermit(ctx, quota.Own, nil); err != nil {
		return nil, err
	}
	defer func() {
		if c == nil { // as in acquire
			p.permits.Release(quota.Own)
		}
	}()
	if c, err = p.pool.Acquire(ctx); err != nil {
		return nil, err
	}
	wireOf(c.Conn()).out.Or(outPermit)
	return c, nil
}

// lend takes a connection out of the pool for a look; if made, only where no call is to have a new one made instead. The
// program's tracer is not told. The look counts as a call does: whoever comes now does not expect the connection to be free.
func (p *peer) lend(ctx context.Context, made bool) (c *pgxpool.Conn, err error) {
	n := p.load.out.Add(1)
	defer func() {
		if c == nil { // as in acquire
			p.load.out.Add(-1)
		}
	}()
	if made && n > p.made.Load() {
		return nil, errNoSession
	}
	shared := p.shared.Load()
	if shared && !p.permits.Try(quota.Own) {
		return nil, errNoSession
	}
	if c, err = p.pool.Acquire(warming{ctx}); err != nil {
		if shared {
			p.permits.Release(quota.Own)
		}
		return nil, err
	}
	w := wireOf(c.Conn())
	w.quiet = true
	w.out.Or(outCall)
	if shared {
		w.out.Or(outPermit)
	}
	return c, nil
}

// takePatiently waits for a connection that somebody else has, who may be stuck for as long as his caller's deadline, or that
// is to be made, which may hang: no longer than the peer stands, and where one is being made no longer than StallAfter,
// if another peer has one free then.
func (p *peer) takePatiently(ctx context.Context, in intent, been tried) (*pgxpool.Conn, error) {
	stallAfter := p.owner.config.StallAfter
	if stallAfter < 0 || p.made.Load() >= p.load.limit && !p.knocks.failing.Load() {
		return p.takeWhileUp(ctx)
	}
	within, leave := context.WithCancelCause(ctx)
	defer leave(nil)
	been.add(p)
	var consider func()
	consider = func() {
		switch {
		case within.Err() != nil:
		case p.pool.Stat().ConstructingConns() > 0 && p.owner.offers(&in, &been):
			if !p.knocks.failing.Load() {
				p.doubt() // the monitor finds out what a dial meets
			}
			leave(errUnmade)
		default:
			time.AfterFunc(watchTick, consider)
		}
	}
	timer := time.AfterFunc(stallAfter, consider)
	defer timer.Stop()
	c, err := p.takeWhileUp(within)
	if err != nil && ctx.Err() == nil && context.Cause(within) == errUnmade {
		return nil, errUnmade
	}
	return c, err
}

// takeWhileUp waits for a connection no longer than the peer stands.
func (p *peer) takeWhileUp(ctx context.Context) (*pgxpool.Conn, error) {
	within, done := p.era.Load().within(ctx)
	defer done()
	c, err := p.draw(within)
	if err != nil && within.Err() != nil && ctx.Err() == nil {
		return nil, errPeerDown
	}
	return c, err
}

// hasToSpare reports whether a read that falls back to the peer as the primary would get a connection at once.
func (p *peer) hasToSpare() bool {
	return !p.load.full() && (p.guests == nil || len(p.guests) < cap(p.guests))
}

// hasFree reports whether a call would find a connection that is made already.
func (p *peer) hasFree() bool { return p.load.out.Load() < p.made.Load() && p.hasToSpare() }

// exhausted asks the pool, or the permits if it shares the server, whether a call would have to wait for somebody else's connection.
func (p *peer) exhausted() bool {
	if p.shared.Load() && p.permits.Full() {
		return true
	}
	s := p.pool.Stat()
	return s.IdleConns() == 0 && s.AcquiredConns()+s.ConstructingConns() >= s.MaxConns()
}

// asksRole reports whether the peer's role is what its monitor is told, and sessions' reports count for nothing.
func (p *peer) asksRole() bool { return p.proxy && p.vouch == RoleUnknown }

// mayRise reports whether a promotion can make the peer the primary in the place of another.
func (p *peer) mayRise() bool {
	t := p.owner.topology.Load()
	return t.mode == ModeReplicated && t.primary != p && p.vouch == RoleUnknown
}

// isReplica takes in what a server has said of itself, by a refusal or in its greeting, unless its role is asked.
func (p *peer) isReplica() {
	if !p.asksRole() {
		p.owner.observe(observation{peer: p, role: RoleReplica})
	}
}

// report takes in how a statement or a dial ended. Only what blames the peer, and is of the present generation, counts:
// the first such fault makes the peer suspect and its monitor probe it at once; the breaker counts them all.
func (p *peer) report(generation uint64, v pgfault.Verdict, err error) {
	if p.owner.topology.Load() == nil {
		return // the pool is being made; its monitors begin with a look
	}
	switch {
	case v.Class == pgfault.Config:
		p.faults.note(err)
		p.monitor.nudge()
	case pgfault.TooManyConnections(err):
		p.monitor.yield()
	case v.Class == pgfault.Starting && generation == p.generation.Load():
		// The server lives, and says so: whether it comes or goes is for the probe to find out. Its sessions go on.
		p.faults.note(err)
		p.suspect(err)
		return
	}
	if !v.BlamesServer() || generation != p.generation.Load() || errors.Is(err, errPeerDown) {
		return
	}
	p.faults.note(err)
	p.rate.fault()
	if !p.countFault(err) {
		p.suspect(err)
	}
}

// met takes in how a connect to the pool's only peer ended. It is for Status: nothing is judged.
func (p *peer) met(err error) {
	if err == nil {
		p.health.Store(int32(HealthUp))
		return
	}
	p.faults.note(err)
	switch v := pgfault.Check(err); {
	case v.Class == pgfault.Config:
		p.health.Store(int32(HealthMisconfigured))
	case v.BlamesServer():
		p.health.Store(int32(HealthDown))
	}
}

// countFault tells the breaker, and reports whether the peer has fallen by it.
func (p *peer) countFault(err error) (fell bool) {
	p.verdicts.Lock()
	defer p.verdicts.Unlock()
	if p.breaker.failure() {
		p.fall(HealthDown, err)
		p.monitor.nudge()
		return true
	}
	return false
}

// suspect takes the peer out of the reads and has it probed, until the probe's verdict.
func (p *peer) suspect(cause error) {
	if !p.breaker.closed() {
		return // it has been judged
	}
	p.accuse(cause)
	p.monitor.nudge()
}

// accuse is suspect for the monitor itself, which probes next.
func (p *peer) accuse(cause error) {
	if p.suspected.CompareAndSwap(false, true) {
		p.owner.observe(observation{peer: p, health: HealthSuspect, cause: cause})
	}
}

// doubt has the peer probed and used meanwhile: a caller's deadline passed and nothing had come, which may be the
// statement's fault alone.
func (p *peer) doubt() {
	if p.doubted.CompareAndSwap(false, true) {
		p.monitor.nudge()
	}
}

// questioned reports whether a probe has been asked for.
func (p *peer) questioned() bool { return p.suspected.Load() || p.doubted.Load() }

// fall takes the peer out of use. The order matters: first nobody new is sent there, then what was of the last
// generation counts no more, then those who are there are freed as far as that loses nothing (the table in
// docs/failures.md). Writes, transactions, streams and connections that the program holds are left to their deadlines:
// a server that wakes has lost nothing.
//
// The caller holds verdicts.
func (p *peer) fall(to Health, cause error) {
	p.latency.forget() // how quick it was is no news of how quick it will be
	p.owner.observe(observation{peer: p, health: to, cause: cause, slow: no})
	p.generation.Add(1)
	p.suspected.Store(false)
	p.doubted.Store(false)
	p.rate.clear()
	if to == HealthDown {
		p.sockets.cut(connRow, true)
		p.era.Load().end()
	}
	p.pool.Reset()
}

// replaced cuts everything on a primary that another has replaced: what is written there is lost, so nobody may go on
// writing. Statements under way end with an unknown outcome.
func (p *peer) replaced() {
	p.generation.Add(1)
	p.sockets.cut(connHeld, false)
	p.pool.Reset()
}

// rise says that the peer stands, and puts it back into use: gently, where it had been out. It has no say, and reports
// so, where the breaker has opened since the peer was asked. cleared says that nothing speaks against it any more: where a
// session answers and dials fail, the faults go on being counted.
func (p *peer) rise(o observation, cleared bool) bool {
	p.verdicts.Lock()
	defer p.verdicts.Unlock()
	if !p.breaker.closed() {
		return false
	}
	if p.era.Load().Err() != nil {
		p.era.Store(newEra())
		p.load.easeIn()
	}
	if !p.drained.Load() {
		p.sockets.open()
	}
	suspected, doubted := p.suspected.Swap(false), p.doubted.Swap(false)
	if suspected && cleared {
		p.breaker.success() // what was counted before the verdict is not to be added to what comes after
	}
	if suspected || doubted {
		p.generation.Add(1)
	}
	if Health(p.health.Load()) > HealthSuspect {
		p.rose.Store(time.Now().UnixNano())
	}
	o.peer, o.health = p, HealthUp
	p.owner.observe(o)
	return true
}

// demoted closes the idle connections of a primary that has become a replica, and those in use at their release: where
// they have survived it, there is something in between that may lead them elsewhere.
func (p *peer) demoted() { p.pool.Reset() }

// leftOut reports whether the peer gets no reads though it is well: it is slow, or its data is not what it should be.
func (p *peer) leftOut() bool {
	m := p.owner.topology.Load().member(p)
	return m != nil && m.alias == nil && (m.slow || m.unfit() != WhyNone)
}

// slow reports whether the peer gets no reads as they took too long there.
func (p *peer) slow() bool {
	m := p.owner.topology.Load().member(p)
	return m != nil && m.slow
}

// fitness is what was last judged of a replica's data.
func (p *peer) fitness() fitness {
	if m := p.owner.topology.Load().member(p); m != nil {
		return m.fitness
	}
	return fitUnsaid
}

// close ends the peer's pool, and waits for also: the pools that follow, whose connections are cut as its own. It waits for the connections that the program holds, as pgxpool does; but a server that
// does not answer is not waited for: calls in progress there are cut.
func (p *peer) close(also func()) {
	if !p.solo && Health(p.health.Load()) == HealthDown {
		p.sockets.cut(connHeld, true)
	}
	closed := make(chan struct{})
	go func() {
		p.pool.Close()
		also()
		close(closed)
	}()
	if p.solo {
		<-closed
		return
	}
	select {
	case <-closed:
		return
	case <-time.After(closeGrace):
	}
	ctx, cancel := context.WithTimeout(context.Background(), p.monitor.patience())
	defer cancel()
	c, err := p.monitor.connect(ctx)
	if err == nil {
		_, err = p.monitor.ask(ctx, c.PgConn()) // a pooler welcomes us whether or not there is a server
	}
	hangUp(c)
	if err == nil || pgfault.IsLocal(err) || pgfault.Answered(err) && pgfault.Check(err).Class != pgfault.Server {
		p.sockets.cut(connIdle, true) // what a caller left behind; the rest goes on
	} else {
		p.sockets.cut(connHeld, true)
	}
	<-closed
}

// closeGrace is how long a closing pool waits before it asks whether its server is there at all.
const closeGrace = time.Second

// era is the time from a peer's rise to its fall.
type era struct {
	context.Context
	end context.CancelFunc
}

func newEra() *era {
	ctx, end := context.WithCancel(context.Background())
	return &era{ctx, end}
}

// within returns a context that ends with the era. done must be called.
func (e *era) within(ctx context.Context) (_ context.Context, done func()) {
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(e, cancel)
	return ctx, func() { stop(); cancel() }
}

// knocks holds back dials to a peer that has failed the last one: one every knockEach goes, and all when one has succeeded.
type knocks struct {
	mu      sync.Mutex
	failure error       // of the last that ended; nil if it succeeded
	since   time.Time   // when it came
	last    time.Time   // when one was let go, or ended in failure
	failing atomic.Bool // whether there is a failure
}

// knockEach makes at most four dials a second: what fails may have the monitor dial too, and more often only where the peer is
// needed.
const knockEach = 500 * time.Millisecond

// heldBack is the error of a connect that was not tried: that of the last one, and when it came.
type heldBack struct {
	error
	since time.Time
}

func (e heldBack) Unwrap() error { return e.error }

// allow returns why no dial may go now, nil if one may.
func (k *knocks) allow() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	switch {
	case k.failure == nil:
		return nil
	case time.Since(k.last) < knockEach:
		return heldBack{k.failure, k.since}
	}
	k.last = time.Now()
	return nil
}

// ended takes in how a connect ended that was tried.
func (k *knocks) ended(err error) {
	var hook *hookError
	if errors.Is(err, errPeerDown) || errors.Is(err, context.Canceled) || errors.As(err, &hook) {
		return // it was called off, or never was a dial
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.failure = err; err != nil {
		k.last = time.Now()
		k.since = k.last
	}
	k.failing.Store(err != nil)
}

// wait waits until a dial may go.
func (k *knocks) wait(ctx, era context.Context) error {
	for k.allow() != nil {
		select {
		case <-time.After(knockEach / 10):
		case <-era.Done():
			return errPeerDown
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

// maxHandshakes is how many connections are made to one peer at a time. A burst of callers on a cold pool is served as
// fast by four as by two hundred, and the server keeps its wits.
const maxHandshakes = 4

var (
	errPeerDown = pgfault.Unavailable("multipool: the peer is down")
	errUnmade   = pgfault.Unavailable("multipool: a connection takes long to be made")
	// pgx cancels what was running on a connection that it gives up. A COMMIT cannot be taken back; what the cancel would
	// end is its wait for a synchronous standby (PostgreSQL documentation, 27.2.8.3), and so its safety.
	errCommitting = errors.New("multipool: a COMMIT is not cancelled")

	errStalled = errors.New("multipool: statements run and none ends")
)
