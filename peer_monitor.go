package multipool

import (
	"cmp"
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/pgmultipool/multipool/internal/pgfault"
)

// monitor watches one peer from a goroutine of its own: a look now and then while the peer is well, a probe at once
// when somebody reports a fault, tries with growing pauses while the breaker is open. It alone touches an open peer,
// and it alone decides the peer's health; a call's errors only nudge it.
//
// Between looks its own connection blocks in a read: a sentinel that sees a shutdown or a crash within milliseconds,
// with no query sent.
type monitor struct {
	peer     *peer
	interval time.Duration
	borrows  bool         // always look through an idle connection of the pool
	yielded  atomic.Int64 // when it has given its own up last, by the pool's clock; 0 if never

	nudged     chan struct{}                      // capacity 1: a nudge is never lost and never waits
	waking     atomic.Pointer[context.CancelFunc] // ends a rest
	cutting    atomic.Pointer[context.CancelFunc] // ends a regular look, which may be waiting for a server that hangs
	summons    summons
	wanted     atomic.Int32 // calls that wait for the peer
	mistrusted atomic.Bool  // something contradicts what its session sees

	conn      *pgx.Conn // the monitor's own; nil if there is none at the moment
	took      connectTimes
	dialled   time.Time    // when conn was, or the last try to replace it
	metBefore server       // before the address led to another
	repeats   int          // looks in a row at which its own session reported another role than it saw
	modesty   atomic.Int32 // which of looks the server answers
	wordy     atomic.Bool  // whether it answers those, and not lookBrief
	told      memory       // by the last looks
	prepared  prepared     // in the monitor's own session
	saw       Role         // what the last look saw
	before    replay       // what the last look saw of a replica's replay
	stuck     int          // how often it lacked something, and had not moved
	strayed   uint64       // the reign in which the replica was ahead of its primary; 0 if it was not
	warmed    int64        // which loss of a primary a connection was made for
	twins     twins
	silence   silence
	failures  int       // looks in a row that have failed
	failing   time.Time // since when
	patient   bool      // the last failure is one that tries in quick succession make worse
	answers   int64     // the peer's, when the look began that is under way
	hold      time.Duration
	held      bool // the last look was not made, as the peer has flapped
	fellAt    time.Time
	roseAt    time.Time
}

const (
	lookTimeout  = time.Second            // of a look at a peer that is well
	probeTimeout = 500 * time.Millisecond // of a look at a suspect, at least: see patience
	firstRetry   = 200 * time.Millisecond // after the breaker has opened
	maxRetry     = time.Second
	eagerTime    = time.Minute            // how long a peer that is down is tried every maxRetry; then every interval
	retryStart   = 250 * time.Millisecond // constant for eagerTime, while the server says that it is starting or shutting down
	retryLacked  = 500 * time.Millisecond // while nobody else serves what the peer could: a call that comes has it tried at once
	retryAwaited = 150 * time.Millisecond // while calls wait for it; and the least time between a fall and a return

	// While there is no primary every peer is looked at this often, on the connection that there is: writers wait. Where none
	// does the looks are eased after a while, and where some do after a longer one: failover managers take half a minute.
	eagerLook    = 25 * time.Millisecond
	patientAfter = 10 * time.Second
	lastPatience = time.Minute
	patientLook  = 250 * time.Millisecond

	// Every peer that a promotion may have made the primary in the place of the one that the program writes to is looked at
	// this often, until writtenFor after the last write.
	writingLook = 800 * time.Millisecond
	writtenFor  = 2 * time.Second

	fullLook   = defaultCheckInterval // a look asks everything at least this often
	returnLook = time.Second          // ... at a peer that is left out, so that it comes back soon

	// A peer that falls again within flapTime of its last fall stays out twice as long as then, up to maxHold; each
	// calmTime in which it stands takes one doubling back. That is for a peer that others stand in for: one that is needed is
	// tried retryAwaited after its fall.
	flapTime = time.Minute
	calmTime = 30 * time.Second
	maxHold  = 30 * time.Second
)

func newMonitor(p *peer, c *Options) *monitor {
	return &monitor{
		peer: p, interval: c.CheckInterval, borrows: c.NoMonitorConns,
		nudged: make(chan struct{}, 1), hold: firstRetry,
	}
}

// summons is the next look, as far as calls wait for it.
type summons struct {
	mu    sync.Mutex
	over  chan struct{} // closed when it has ended; nil if nobody waits
	ended time.Time     // the last look
}

// lookAgain asks for a look at a peer that refuses us, and returns what is closed when one that has begun since has ended.
func (m *monitor) lookAgain() <-chan struct{} {
	s := &m.summons
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.over == nil {
		s.over = make(chan struct{})
		m.nudge()
	}
	return s.over
}

// awaited reports whether anybody waits for a look.
func (s *summons) awaited() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.over != nil
}

// begin begins a look, and returns how it ends.
func (s *summons) begin() (end func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	over := s.over
	s.over = nil
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.ended = time.Now()
		if over != nil {
			close(over)
		}
	}
}

// since is how long ago the last look ended.
func (s *summons) since() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	return time.Since(s.ended)
}

// nudge asks for a look now. It never blocks.
func (m *monitor) nudge() {
	if m == nil {
		return // the pool's only peer has no monitor
	}
	select {
	case m.nudged <- struct{}{}:
	default:
	}
	if wake := m.waking.Load(); wake != nil {
		(*wake)()
	}
	if cut := m.cutting.Load(); cut != nil && m.peer.suspected.Load() {
		(*cut)()
	}
}

const (
	yieldFor  = 10 * time.Minute
	yieldTime = time.Second // until the server has let the monitor's session go, with a wide margin
)

// yield has the monitor give its own connection up, and look through the program's for a while: the server has no more room
// for us. It reports whether one has just become free, or is about to.
func (m *monitor) yield() bool {
	if m == nil || m.borrows {
		return false
	}
	now := int64(max(m.peer.owner.clock(), 1))
	was := m.yielded.Load()
	if was == 0 || now-was > int64(yieldFor) {
		m.yielded.CompareAndSwap(was, now)
		m.nudge()
		return true
	}
	return now-was < int64(yieldTime)
}

// borrowing reports whether the monitor looks through the program's connections.
func (m *monitor) borrowing() bool {
	was := m.yielded.Load()
	return m.borrows || was != 0 && int64(m.peer.owner.clock())-was <= int64(yieldFor)
}

// run watches until ctx ends.
func (m *monitor) run(ctx context.Context) {
	defer m.hangUp()
	for {
		end := m.summons.begin()
		pause := m.examine(ctx)
		end()
		if ctx.Err() != nil || !m.rest(ctx, pause) {
			return
		}
	}
}

// rest waits for the pause to be over or a nudge, and reports whether to go on.
func (m *monitor) rest(ctx context.Context, pause time.Duration) bool {
	if m.out() {
		m.restOut(ctx, pause)
		return ctx.Err() == nil
	}
	waiting, wake := context.WithTimeout(ctx, pause)
	defer wake()
	m.waking.Store(&wake)
	defer m.waking.Store(nil)
	select {
	case <-m.nudged:
		return true
	default:
	}
	if m.peer.drained.Load() {
		m.hangUp() // it would hold a smart shutdown up
	}
	if m.conn != nil && !m.borrowing() {
		m.listen(waiting)
	} else {
		<-waiting.Done()
	}
	select {
	case <-m.nudged:
	default:
	}
	return ctx.Err() == nil
}

// restOut waits between tries at a peer that is out. A nudge does not shorten the pause: everybody who meets a dead peer
// nudges. Who waits for a look does, and so does it that the peer is needed: that is asked again at all news of the others.
func (m *monitor) restOut(ctx context.Context, pause time.Duration) {
	begun, was := time.Now(), m.needed()
	for {
		top, need := m.peer.owner.topology.Load(), m.needed()
		left := pause
		switch {
		case need > needNone && m.held:
			left = min(left, retryAwaited-m.peer.breaker.openFor()+time.Millisecond)
		case m.patient:
		case need == needAwaited, need > needNone && was == needNone:
			left = min(left, jittered(retryAwaited))
		case need == needLacked:
			left = min(left, jittered(retryLacked))
		}
		if m.summons.awaited() {
			left = min(left, knockEach)
		}
		timer := time.NewTimer(time.Until(begun.Add(left)))
		select {
		case <-timer.C:
			return
		case <-top.superseded:
		case <-m.nudged:
		case <-ctx.Done():
			timer.Stop()
			return
		}
		timer.Stop()
	}
}

// needed reports whether the peer is needed: by what is known of the others, or by calls that wait.
func (m *monitor) needed() peerNeed {
	p := m.peer.owner
	top := p.topology.Load()
	if m.wanted.Load() > 0 || len(top.writes) == 0 && p.awaited() {
		return needAwaited
	}
	return top.needs(m.peer)
}

// listen blocks in a read of the monitor's own connection until ctx ends. A connection that ends meanwhile is a fault
// of the peer's like any other, unless the server says that it ended this session for its own sake (57P05: it was idle):
// the next look makes another, when its time has come.
func (m *monitor) listen(ctx context.Context) {
	for ctx.Err() == nil {
		err := m.conn.PgConn().WaitForNotification(ctx)
		switch {
		case m.conn.IsClosed():
			m.conn = nil
			if pgfault.Check(err).BlamesServer() {
				m.peer.suspect(err)
			} else {
				<-ctx.Done()
			}
			return
		case err != nil:
			return
		}
	}
}

// out reports whether the peer is out of use by a verdict, not by a suspicion.
func (m *monitor) out() bool {
	switch Health(m.peer.health.Load()) {
	case HealthShuttingDown, HealthStarting, HealthMisconfigured:
		return true
	}
	return !m.peer.breaker.closed()
}

// examine looks at the peer as its state asks for, publishes what it found and returns the pause until the next time.
func (m *monitor) examine(ctx context.Context) time.Duration {
	if m.borrowing() {
		m.hangUp()
	}
	var err error
	switch {
	case !m.peer.breaker.closed():
		err = m.recover(ctx)
	case m.peer.questioned(), Health(m.peer.health.Load()) >= HealthShuttingDown:
		err = m.probe(ctx)
	default:
		err = m.regular(ctx)
	}
	m.held, m.patient = err == errHeld, err != nil && pgfault.Check(err).Class == pgfault.Config
	switch {
	case err == nil:
		m.failures = 0
		m.warm(ctx)
		return jittered(m.pauseWhileWell())
	case ctx.Err() != nil:
		return 0
	}
	if m.failures++; m.failures == 1 {
		m.failing = time.Now()
	}
	return m.backoff(err)
}

// pauseWhileWell is the time between looks at a peer that is well: a second while it is left out, or a balancer may ask
// for its round trip and there is none yet, less where lag is bounded, and hardly any while there is no primary and it may
// be the next.
func (m *monitor) pauseWhileWell() time.Duration {
	o := m.peer.owner
	pause := min(m.interval, o.lagLooks())
	if m.mistrusted.Load() {
		pause = min(pause, redialLeast)
	}
	switch lost := o.orphanedFor(); {
	case lost > lastPatience, lost > patientAfter && !o.awaited():
		pause = min(pause, patientLook)
	case lost > 0:
		pause = min(pause, eagerLook)
	}
	if m.peer.leftOut() || o.config.Balancer != nil && m.peer.roundTrip.known() == 0 {
		return min(pause, returnLook) // a balancer may ask, and the first look has told a dial's time
	}
	return pause
}

// warm makes a connection of the program's to a replica that has none, once when there is no primary any more: this
// replica may be the next, and who waits to write would wait for a first connection too.
func (m *monitor) warm(ctx context.Context) {
	p := m.peer
	lost := p.owner.orphaned.Load()
	if m.warmed == lost || p.owner.orphanedFor() == 0 || p.drained.Load() {
		return
	}
	m.warmed = lost
	if Role(p.role.Load()) != RoleReplica || p.pool.Stat().TotalConns() > 0 {
		return
	}
	p.owner.monitors.Go(func() {
		ctx, cancel := context.WithTimeout(ctx, lookTimeout)
		defer cancel()
		if c, err := p.pool.Acquire(warming{ctx}); err == nil {
			wireOf(c.Conn()).quiet = true
			c.Release()
		}
	})
}

// warming is the context of an acquire of ours: the program's tracer is not told.
type warming struct{ context.Context }

// regular is the look at a peer of which nothing bad is known. A suspicion that comes up meanwhile ends it: the probe
// asks with less patience.
func (m *monitor) regular(ctx context.Context) error {
	looking, cut := context.WithCancel(ctx)
	defer cut()
	m.cutting.Store(&cut)
	defer m.cutting.Store(nil)
	if m.peer.suspected.Load() {
		return m.probe(ctx) // since we last asked
	}
	if m.conn == nil && !m.borrowing() {
		// The first look, or the last connection has ended: to connect takes its time, and nobody waits for it.
		m.answers = m.peer.answers.Load()
		seen, err := m.fresh(looking, m.connectTimeout())
		switch v, known := pgfault.Check(err), Health(m.peer.health.Load()) != HealthUnknown; {
		case err == nil || ctx.Err() != nil:
		case looking.Err() != nil:
			return m.probe(ctx)
		case known && v.Transient(): // there may be other witnesses
			if v.BlamesServer() {
				m.peer.accuse(err)
			}
			return m.probe(ctx)
		}
		return m.judge(ctx, seen, err)
	}
	begun := time.Now()
	seen, err := m.look(looking)
	if err == nil {
		if !seen.glance {
			m.peer.roundTrip.note(seen.came - seen.asked)
		}
		if m.peer.slow() {
			m.peer.latency.look(time.Since(begun))
		}
		return m.judgeAnew(ctx, looking, seen)
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	m.hangUp()
	if looking.Err() == nil && pgfault.Check(err).BlamesServer() {
		m.peer.accuse(err)
	}
	return m.probe(ctx)
}

// probe asks a suspect in three ways at once, by a statement on the monitor's connection, by one on an idle connection of
// the program's, and by a fresh dial: one connection that fails tells nothing of the server. If any answers the peer
// stands. A probe whose own timer came late is void: this process was stopped, and its peers are not to blame.
func (m *monitor) probe(ctx context.Context) error {
	for void := 0; ; void++ {
		begun, patience := time.Now(), m.patience()
		m.answers = m.peer.answers.Load()
		seen, err := m.askAround(ctx, patience)
		if err != nil && time.Since(begun) > patience+lateTick && void < maxVoid && ctx.Err() == nil {
			continue
		}
		return m.judge(ctx, seen, err)
	}
}

// maxVoid is how often in a row a probe is void. More than that is no pause of this process, but a dial that does not
// keep to its time.
const maxVoid = 3

// askAround returns what any way saw. A dial's refusal is told where no session did answer, and where it says that the
// server is shutting down: then sessions go on, and new ones are not to be sent there. Where a session answers, and the
// dial takes its time, the peer is used again meanwhile.
func (m *monitor) askAround(ctx context.Context, patience time.Duration) (sight, error) {
	type answer struct {
		sight
		err error
	}
	within, end := context.WithTimeout(ctx, patience)
	defer end()
	old := m.conn
	m.conn = nil
	var own, lent chan answer // nil: not asked, or has answered
	if old != nil && !m.borrowing() {
		own = make(chan answer, 1)
		go func() {
			seen, err := m.ask(within, old.PgConn())
			own <- answer{seen, err}
		}()
	}
	searching, found := context.WithCancel(within)
	defer found()
	lent = make(chan answer, 1)
	m.peer.owner.monitors.Go(func() {
		within, end := context.WithTimeout(ctx, patience) // not cut short: the connection is the program's
		defer end()
		seen, err := m.askIdle(within, searching, patience)
		lent <- answer{seen, err}
	})
	dialled := make(chan reached, 1)
	go func() { dialled <- m.reach(within) }()

	var dial *reached
	var session *sight
	kept := false // the monitor's own session
	grace := time.NewTimer(dialGrace)
	defer grace.Stop()
	for dial == nil || dial.err != nil && (own != nil || session == nil && lent != nil) {
		late := false
		select {
		case r := <-dialled:
			dial = &r
			found() // either way: it is not waited for any longer
		case a := <-own:
			own = nil
			if a.err == nil {
				session, kept = &a.sight, true
			}
		case a := <-lent:
			lent = nil
			if a.err == nil && session == nil {
				session = &a.sight
			}
		case <-grace.C:
			grace.Reset(dialGrace)
			late = true
		}
		if late && session != nil && dial == nil && ctx.Err() == nil {
			m.peer.rise(observation{}, false)
		}
	}
	if own != nil { // the dial has answered, and there is one session too many
		end()
		<-own
	}
	draining := session != nil && pgfault.Check(dial.err).Class == pgfault.Starting
	if dial.err == nil || session == nil || draining || !kept {
		hangUp(old) // it would hold a shutdown up
		kept = false
	}
	switch {
	case dial.err == nil:
		return m.adopt(*dial)
	case session == nil, draining:
		return sight{undialled: draining}, dial.err
	}
	if kept {
		m.conn = old
	}
	m.peer.faults.note(dial.err)
	session.undialled = pgfault.Check(dial.err).Class != pgfault.Local
	return *session, nil
}

// dialGrace is how long a dial may take before a session's answer is taken for the peer's.
const dialGrace = 100 * time.Millisecond

// recover tries the open breaker with a look on a fresh connection, when its time is over or the peer is needed.
func (m *monitor) recover(ctx context.Context) error {
	hold := m.holdFor()
	if m.needed() > needNone {
		hold = min(hold, retryAwaited)
	}
	if m.peer.breaker.openFor() < hold {
		return errHeld
	}
	var seen sight
	var failure error
	err := m.peer.breaker.trial(func() error {
		seen, failure = m.fresh(ctx, m.retryTimeout())
		return failure
	})
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case failure != nil:
		m.peer.faults.note(failure)
		m.unanswered()
		was := HealthDown
		if pgfault.Check(failure).Class == pgfault.Config {
			was = HealthMisconfigured // it is back, and refuses us: callers are told at once, not after their wait
		}
		m.peer.owner.observe(observation{peer: m.peer, health: was, cause: failure})
		return failure
	case err != nil:
		return err
	}
	m.roseAt = time.Now()
	m.forgetReplay() // calls may have opened the breaker, not a look
	return m.judge(ctx, seen, nil)
}

// forgetReplay drops what was seen of a standby's replay: one that was down begins again, further back or as another's.
func (m *monitor) forgetReplay() {
	m.before, m.stuck, m.strayed = replay{}, 0, 0
	m.peer.behind.forget()
}

// errHeld is no fault: the peer has flapped, and its time is not over.
var errHeld = errors.New("multipool: the breaker has not been open for long enough")

// holdFor is how long the breaker stays open this time. It is worked out once for every fall.
func (m *monitor) holdFor() time.Duration {
	fell := m.peer.breaker.openSince()
	if fell == m.fellAt {
		return m.hold
	}
	if !m.fellAt.IsZero() && fell.Sub(m.fellAt) < flapTime+m.hold {
		m.hold = min(2*m.hold, maxHold)
	} else if !m.roseAt.IsZero() {
		for calm := fell.Sub(m.roseAt); calm >= calmTime && m.hold > firstRetry; calm -= calmTime {
			m.hold /= 2
		}
		m.hold = max(m.hold, firstRetry)
	}
	m.fellAt = fell
	return m.hold
}

// judge publishes a verdict, and returns the error that decides the pause until the next look. Every verdict on a
// suspect starts a new generation.
func (m *monitor) judge(ctx context.Context, seen sight, err error) error {
	p := m.peer
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case err == nil:
		// Not p.role: a session may have told of the new one before this look.
		if was := m.saw; seen.role != was && was != RoleUnknown && m.modesty.Swap(0) > 0 {
			m.nudge() // a primary may tell what a replica could not
		}
		m.saw = seen.role
		m.remember(seen)
		m.silence = silence{}
		m.moved(seen)
		if !p.rise(m.tell(ctx, seen), !seen.undialled) {
			return errHeld // faults have opened the breaker while we asked
		}
		if seen.role == RolePrimary && p.owner.topology.Load().primary == p {
			p.owner.positions.note(p, seen.timeline, seen.position, seen.asked, seen.came)
		}
		return nil
	}
	p.faults.note(err)
	m.unanswered()
	if m.queues(err) {
		return err
	}
	v := pgfault.Check(err)
	var hook *hookError
	var lookup *lookupError
	switch unseen := Health(p.health.Load()) == HealthUnknown; {
	case v.Class == pgfault.Local && !unseen && !(errors.As(err, &lookup) && lookup.unknown()):
		p.rise(observation{cause: err}, false) // as below; calls find out on the connections that there are
	case v.Class == pgfault.Config, errors.As(err, &hook) && unseen:
		m.fall(HealthMisconfigured, err)
	case errors.As(err, &hook):
		p.rise(observation{cause: err}, false) // the server was not asked, so nothing is known against it
	case v.Class == pgfault.Starting:
		to := HealthStarting
		if seen.undialled || Health(p.health.Load()) == HealthShuttingDown && p.sockets.used() {
			to = HealthShuttingDown // a server that starts has no sessions
		}
		m.fall(to, err)
	case !v.BlamesServer() && pgfault.Answered(err):
		// The server has answered, if only that it is full: it lives, and those who hold connections go on.
		p.rise(observation{cause: err}, false)
	default:
		m.fall(HealthDown, err)
	}
	return err
}

// remember keeps what a look has told, for the choice of the next one's depth and for those who take connections.
func (m *monitor) remember(seen sight) {
	if seen.full {
		m.told.sight = seen
	}
	if !seen.glance {
		m.told.measured = seen.asked
		m.peer.awaits.Store(seen.awaits)
	}
}

// tell turns what a look saw into news, and measures a replica against its primary.
func (m *monitor) tell(ctx context.Context, seen sight) observation {
	p := m.peer
	if seen.glance {
		return observation{} // it is what it was
	}
	o := observation{
		role: cmp.Or(p.vouch, seen.role), system: seen.system, timeline: seen.timeline,
		alone: seen.alone, shown: seen.shown,
		server: m.serverOf(ctx, seen), at: seen.at, full: seen.full,
		asked: instant(max(seen.asked, 1)), came: instant(seen.came),
	}
	if o.role != RoleReplica || p.proxy {
		p.behind.forget() // behind a pooler the next statement may meet another server
		m.before = replay{}
		return o
	}
	now := replay{seen.position, seen.asked, seen.came}
	d := p.owner.positions.measure(now, m.before)
	m.before = now
	d.stands(m.stuck)
	m.stuck = d.stuck
	// The primary may overtake it, and nothing that an ordinary role sees tells then; but it cannot follow without a
	// restart.
	switch {
	case d.ahead:
		m.strayed = d.reign
	case m.strayed != 0 && (!d.known || m.strayed == d.reign):
		d.ahead = true
	default:
		m.strayed = 0
	}
	p.behind.set(d)
	o.fitness = d.judge(seen, p.owner.config.MaxLag, p.fitness())
	return o
}

// queues reports whether a look that had no answer waits in a pooler's queue behind the program's own statements: they
// end. Then there is no verdict: a suspect stays one, gets no reads where another replica can serve, and is asked again.
func (m *monitor) queues(err error) bool {
	return pgconn.Timeout(err) && m.peer.answers.Load() != m.answers
}

func (m *monitor) fall(to Health, cause error) {
	p := m.peer
	p.verdicts.Lock()
	defer p.verdicts.Unlock()
	m.forgetReplay()
	if to == HealthDown {
		p.breaker.trip()
	}
	p.fall(to, cause)
}

// jittered spreads d by a fifth to either side.
func jittered(d time.Duration) time.Duration {
	return d - d/5 + rand.N(max(2*d/5, 1))
}

// backoff is the pause after a failed look.
func (m *monitor) backoff(err error) time.Duration {
	v := pgfault.Check(err)
	switch {
	case err == errHeld:
		return m.hold - min(m.peer.breaker.openFor(), m.hold) + time.Millisecond
	case v.Class == pgfault.Starting && time.Since(m.failing) <= eagerTime:
		return jittered(retryStart)
	case v.Class == pgfault.Starting: // as where hot standby is disabled
		pause := maxRetry
		if m.peer.owner.anybodyServes() {
			pause = max(m.interval, maxRetry)
		}
		return jittered(pause)
	case v.Class == pgfault.Config:
		pause := min(firstRetry<<min(m.failures-1, 8), maxRetry)
		switch {
		case pgfault.CountsAsWrongPassword(err): // knocking fast with a wrong one locks accounts
			pause = maxRetry << min(m.failures-1, 8)
		case time.Since(m.failing) > eagerTime:
			pause = m.interval
		}
		return jittered(min(pause, m.interval))
	case m.peer.breaker.openFor() > eagerTime && m.peer.owner.anybodyServes():
		return jittered(max(m.interval, maxRetry))
	}
	return jittered(min(firstRetry<<min(m.failures-1, 8), maxRetry))
}
