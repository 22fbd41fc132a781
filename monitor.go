package multipool

import (
	"cmp"
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgconn/ctxwatch"
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
	shared   bool // look through an idle connection of the pool

	nudged  chan struct{}                      // capacity 1: a nudge is never lost and never waits
	waking  atomic.Pointer[context.CancelFunc] // ends a rest
	cutting atomic.Pointer[context.CancelFunc] // ends a regular look, which may be waiting for a server that hangs

	conn     *pgx.Conn     // the monitor's own; nil: none at the moment
	took     time.Duration // what the last connect that succeeded took
	modesty  atomic.Int32  // which of looks the server answers
	before   replay        // what the last look saw of a replica's replay
	strayed  uint64        // the reign in which the replica was ahead of its primary; 0: it was not
	warmed   int64         // which loss of a primary a connection was made for
	failures int           // looks in a row that have failed
	answers  int64         // the peer's, when the look began that is under way
	hold     time.Duration
	fellAt   time.Time
	roseAt   time.Time
}

const (
	lookTimeout  = time.Second            // of a look at a peer that is well
	probeTimeout = 500 * time.Millisecond // of a look at a suspect
	firstRetry   = 200 * time.Millisecond // after the breaker has opened
	maxRetry     = time.Second
	eagerTime    = time.Minute            // how long a peer that is down is tried each maxRetry; then each interval
	retryStart   = 250 * time.Millisecond // constant, while the server says that it is starting or shutting down

	// While there is no primary each peer is looked at this often, on the connection that there is: writers wait. Where none
	// does the looks are eased after a while, and where some do after a longer one: failover managers take half a minute.
	eagerLook    = 20 * time.Millisecond
	patientAfter = 10 * time.Second
	lastPatience = time.Minute
	patientLook  = 250 * time.Millisecond

	// A peer that falls again within flapTime of its last fall stays out twice as long as then, up to maxHold; each
	// calmTime in which it stands takes one doubling back.
	flapTime = time.Minute
	calmTime = 30 * time.Second
	maxHold  = 30 * time.Second
)

func newMonitor(p *peer, c *Config) *monitor {
	return &monitor{
		peer: p, interval: c.CheckInterval, shared: c.NoMonitorConns,
		nudged: make(chan struct{}, 1), hold: firstRetry,
	}
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

// run watches until ctx ends.
func (m *monitor) run(ctx context.Context) {
	defer m.hangUp()
	for {
		pause := m.examine(ctx)
		if ctx.Err() != nil || !m.rest(ctx, pause) {
			return
		}
	}
}

// rest waits for the pause to be over or a nudge, and reports whether to go on. A nudge does not shorten the pause
// between tries at a peer that is out: everybody who meets a dead peer nudges.
func (m *monitor) rest(ctx context.Context, pause time.Duration) bool {
	waiting, wake := context.WithTimeout(ctx, pause)
	defer wake()
	if m.out() {
		<-waiting.Done()
		return ctx.Err() == nil
	}
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
	if m.conn != nil && !m.shared {
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

// listen blocks in a read of the monitor's own connection until ctx ends. A connection that ends meanwhile is a fault
// of the peer's like any other.
func (m *monitor) listen(ctx context.Context) {
	for ctx.Err() == nil {
		err := m.conn.PgConn().WaitForNotification(ctx)
		if m.conn.IsClosed() {
			m.conn = nil
			m.peer.suspect(err)
			return
		}
		if err != nil {
			return
		}
	}
}

// out reports whether the peer is out of use by a verdict, not by a suspicion.
func (m *monitor) out() bool {
	switch health(m.peer.health.Load()) {
	case healthDraining, healthMisfit:
		return true
	}
	return !m.peer.breaker.closed()
}

// examine looks at the peer as its state asks for, publishes what it found and returns the pause until the next time.
func (m *monitor) examine(ctx context.Context) time.Duration {
	var err error
	switch {
	case !m.peer.breaker.closed():
		err = m.recover(ctx)
	case m.peer.questioned(), health(m.peer.health.Load()) == healthDraining:
		err = m.probe(ctx)
	default:
		err = m.regular(ctx)
	}
	switch {
	case err == nil:
		m.failures = 0
		m.warm(ctx)
		return jittered(m.pauseWhileWell())
	case ctx.Err() != nil:
		return 0
	}
	m.failures++
	return m.backoff(err)
}

// pauseWhileWell is the time between looks at a peer that is well: a second while it is left out, or a balancer may ask for
// its round trip and there is none yet, less where lag is bounded, and hardly any while there is no primary and it may be
// the next.
func (m *monitor) pauseWhileWell() time.Duration {
	switch lost := m.peer.owner.orphanedFor(); {
	case lost > lastPatience, lost > patientAfter && m.peer.owner.waiting.Load() == 0:
		return min(m.interval, patientLook)
	case lost > 0:
		return min(m.interval, eagerLook)
	case m.peer.leftOut():
		return min(m.interval, time.Second, m.peer.owner.lagLooks())
	case m.peer.owner.config.Balancer != nil && m.peer.trip.known() == 0:
		return min(m.interval, time.Second) // it may ask, and the first look has told a dial's time
	}
	return min(m.interval, m.peer.owner.lagLooks())
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
	if m.conn == nil && !m.shared {
		// The first look, or the last connection has ended: to connect takes its time, and nobody waits for it.
		m.answers = m.peer.answers.Load()
		seen, err := m.fresh(looking, m.connectTimeout())
		if err != nil && looking.Err() != nil && ctx.Err() == nil {
			return m.probe(ctx)
		}
		return m.judge(ctx, seen, err)
	}
	begun := time.Now()
	seen, err := m.look(looking, lookTimeout)
	if err == nil {
		m.peer.trip.note(seen.came - seen.asked)
		if m.peer.leftOut() {
			m.peer.latency.replace(time.Since(begun))
		}
		return m.judge(ctx, seen, nil)
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	m.hangUp()
	if looking.Err() == nil {
		m.peer.accuse(err)
	}
	return m.probe(ctx)
}

// probe asks a suspect in two ways at once, by a statement on the monitor's connection and by a fresh dial: one
// connection that fails tells nothing of the server. If either answers the peer stands. A probe whose own timer came
// late is void: this process was stopped, and its peers are not to blame.
func (m *monitor) probe(ctx context.Context) error {
	for void := 0; ; void++ {
		begun := time.Now()
		m.answers = m.peer.answers.Load()
		seen, err := m.askTwice(ctx)
		if err != nil && time.Since(begun) > probeTimeout+lateTick && void < maxVoid && ctx.Err() == nil {
			continue
		}
		return m.judge(ctx, seen, err)
	}
}

// maxVoid is how often in a row a probe is void. More than that is no pause of this process, but a dial that does not
// keep to its time.
const maxVoid = 3

// askTwice returns what either way saw. A dial's refusal is told where the session did not answer, and where it says that
// the server is shutting down: then sessions go on, and new ones are not to be sent there.
func (m *monitor) askTwice(ctx context.Context) (sight, error) {
	type answer struct {
		sight
		err error
	}
	session := make(chan answer, 1)
	old := m.conn
	if old != nil && !m.shared {
		go func() {
			ctx, cancel := context.WithTimeout(ctx, probeTimeout)
			defer cancel()
			seen, err := m.ask(ctx, old.PgConn())
			session <- answer{seen, err}
		}()
	} else {
		session <- answer{err: errNoSession}
	}
	m.conn = nil
	dialled, err := m.fresh(ctx, probeTimeout)
	asked := <-session
	switch {
	case err == nil:
		hangUp(old)
		return dialled, nil
	case asked.err == nil && verdictOf(err).class == classStarting:
		hangUp(old) // it would hold the shutdown up
		return sight{}, err
	case asked.err == nil:
		m.conn = old
		m.peer.faults.note(err)
		asked.undialled = true
		return asked.sight, nil
	}
	hangUp(old)
	return sight{}, err
}

var errNoSession = errors.New("multipool: the monitor has no connection")

// verdictOf judges what a look of the monitor's met: nobody's context but its own has ended.
func verdictOf(err error) verdict {
	return classify(evidence{err: err, ctx: context.Background(), phase: phaseAcquire})
}

// recover tries the open breaker with a look on a fresh connection.
func (m *monitor) recover(ctx context.Context) error {
	if m.peer.breaker.openFor() < m.holdFor() {
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
		was := healthDown
		if verdictOf(failure).class == classConfig {
			was = healthMisfit // it is back, and refuses us: callers are told at once, not after their wait
		}
		m.peer.owner.observe(observation{peer: m.peer, health: was, cause: failure})
		return failure
	case err != nil:
		return err
	}
	m.roseAt = time.Now()
	return m.judge(ctx, seen, nil)
}

// errHeld is no fault: the peer has flapped, and its time is not over.
var errHeld = errors.New("multipool: the breaker has not been open for long enough")

// holdFor is how long the breaker stays open this time. It is worked out once for each fall.
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
		if was := Role(p.role.Load()); seen.role != was && was != RoleUnknown && m.modesty.Swap(0) > 0 {
			m.nudge() // a primary may tell what a replica could not
		}
		if !p.rise(m.tell(seen), !seen.undialled) {
			return errHeld // faults have opened the breaker while we asked
		}
		if seen.role == RolePrimary && p.owner.topology.Load().primary == p {
			p.owner.positions.note(p, seen.timeline, seen.position, seen.asked, seen.came)
		}
		return nil
	}
	p.faults.note(err)
	if m.queues(err) {
		return err
	}
	v := verdictOf(err)
	var answer *pgconn.PgError
	var hook *hookError
	switch {
	case v.class == classConfig, errors.As(err, &hook) && health(p.health.Load()) == healthUnknown:
		m.fall(healthMisfit, err)
	case errors.As(err, &hook):
		p.rise(observation{cause: err}, false) // the server was not asked, so nothing is known against it
	case v.class == classStarting:
		m.fall(healthDraining, err)
	case !v.blamesPeer() && errors.As(err, &answer):
		// The server has answered, if only that it is full: it lives, and those who hold connections go on.
		p.rise(observation{cause: err}, false)
	default:
		m.fall(healthDown, err)
	}
	return err
}

// tell turns what a look saw into news, and measures a replica against its primary.
func (m *monitor) tell(seen sight) observation {
	p := m.peer
	o := observation{
		role: cmp.Or(p.vouch, seen.role), system: seen.system, timeline: seen.timeline,
		alone: seen.alone, shown: seen.shown,
	}
	if o.role != RoleReplica || p.proxy {
		p.behind.forget() // behind a pooler the next statement may meet another server
		m.before = replay{}
		return o
	}
	now := replay{seen.position, seen.asked, seen.came}
	d := p.owner.positions.measure(now, m.before)
	m.before = now
	// The primary may overtake it, and nothing that an ordinary role sees tells then; but it cannot follow without a restart.
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

func (m *monitor) fall(to health, cause error) {
	p := m.peer
	p.verdicts.Lock()
	defer p.verdicts.Unlock()
	m.before, m.strayed = replay{}, 0 // a standby that was down begins again, further back or as another's
	p.behind.forget()
	if to == healthDown {
		p.breaker.trip()
	}
	p.fall(to, cause)
}

// hookError is an error of the program's own BeforeConnect: it says nothing about the server.
type hookError struct{ err error }

func (e *hookError) Error() string { return e.err.Error() }
func (e *hookError) Unwrap() error { return e.err }

// notServed are the errors of a server that does not offer what the full look asks: undefined_function,
// insufficient_privilege, feature_not_supported.
var notServed = []string{"42883", "42501", "0A000"}

// sight is what a look sees. What the server does not tell is zero.
type sight struct {
	role      Role
	system    uint64        // the system identifier
	timeline  uint32        // of the log that a primary writes, or that a replica's receiver gets
	shown     uint32        // the highest timeline of which a replica's control file knows
	position  lsn           // to which a primary has written, or a replica has replayed
	alone     bool          // a replica without a running receiver
	paused    bool          // a replica whose replay was paused
	asked     time.Duration // by the pool's clock
	came      time.Duration
	undialled bool // a session has answered, and a new one could not be had
}

// looks are the statements of a look, from the one that asks everything to the one that every server answers: managed
// services lack some functions. Functions are qualified, so that a program's search_path cannot put its own in front.
//
// A primary's timeline is that of the log being written, which tells a promotion at once (pg_control_checkpoint()
// tells it only after the next checkpoint); its position is that of insertion, as a commit that does not wait for the
// disk lies behind the written one. A replica's timeline is its receiver's, which only members of pg_monitor see; the
// control file's is an old one for a while.
var looks = [...]string{lookFull,
	lookSelect + `, null::pg_catalog.int8, null::pg_catalog.int4` + lookFrom,
	`select pg_catalog.pg_is_in_recovery(), null, null, null, null, null, null`,
}

const (
	lookSelect = `select r.standby,
 case when r.standby then (select pg_catalog.to_hex(w.received_tli) from pg_catalog.pg_stat_wal_receiver w)
 else pg_catalog.substr(pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_lsn()), 1, 8) end,
 case when r.standby then pg_catalog.pg_last_wal_replay_lsn() else pg_catalog.pg_current_wal_insert_lsn() end,
 r.standby and not exists (select from pg_catalog.pg_stat_wal_receiver),
 case when r.standby then pg_catalog.pg_is_wal_replay_paused() end`
	lookFrom = ` from (select pg_catalog.pg_is_in_recovery()) as r(standby)`
	lookFull = lookSelect + `,
 (select c.system_identifier from pg_catalog.pg_control_system() c),
 case when r.standby then (select c.min_recovery_end_timeline from pg_catalog.pg_control_recovery() c) end` + lookFrom
)

// look asks the peer what it is, on the monitor's connection or, where it has none of its own, one of the program's.
func (m *monitor) look(ctx context.Context, timeout time.Duration) (sight, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	if !m.shared {
		return m.ask(ctx, m.conn.PgConn())
	}
	// Where the program holds every connection, one is made for the look: a full pool is no fault of the peer.
	if s := m.peer.pool.Stat(); s.AcquiredConns() < s.MaxConns() && !m.peer.drained.Load() && !(m.peer.shared.Load() && m.peer.exhausted()) {
		c, err := m.peer.pool.Acquire(ctx)
		if err != nil {
			return sight{}, err
		}
		defer c.Release()
		return m.ask(ctx, c.Conn().PgConn())
	}
	return m.fresh(ctx, timeout)
}

// fresh asks on a new connection, which becomes the monitor's.
func (m *monitor) fresh(ctx context.Context, timeout time.Duration) (sight, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	m.hangUp()
	begun := time.Now()
	c, err := m.connect(ctx)
	if err != nil {
		return sight{}, err
	}
	m.took = time.Since(begun)
	m.modesty.Store(0) // rights may have changed, or the server
	seen, err := m.ask(ctx, c.PgConn())
	if err != nil || m.shared {
		hangUp(c)
		return seen, err
	}
	m.conn = c
	return seen, nil
}

// ask runs the look's statement by the extended protocol: never the simple one, which poolers and injections love.
func (m *monitor) ask(ctx context.Context, pg *pgconn.PgConn) (sight, error) {
	return m.askOnce(ctx, pg, false)
}

func (m *monitor) askOnce(ctx context.Context, pg *pgconn.PgConn, again bool) (sight, error) {
	tried := m.modesty.Load()
	asked := m.peer.owner.clock()
	r := pg.ExecParams(ctx, looks[tried], nil, nil, nil, nil).Read()
	if r.Err == nil {
		s, err := readSight(r.Rows)
		said := reportedRole(pg)
		m.peer.hearsay.Store(err == nil && said != RoleUnknown && said != s.role)
		s.asked, s.came = asked, m.peer.owner.clock()
		return s, err
	}
	if refusesSession(r.Err) {
		// It refuses every statement of the kind, and only a standby does.
		return sight{role: RoleReplica, asked: asked, came: m.peer.owner.clock()}, nil
	}
	var pgErr *pgconn.PgError
	switch {
	case !errors.As(r.Err, &pgErr):
	case pgErr.Code == notPrerequisite && !again:
		return m.askOnce(ctx, pg, true) // promoted between two functions of the statement
	case slices.Contains(notServed, pgErr.Code) && int(tried) < len(looks)-1:
		m.modesty.CompareAndSwap(tried, tried+1)
		return m.askOnce(ctx, pg, again)
	}
	return sight{}, r.Err
}

// notPrerequisite is object_not_in_prerequisite_state: "recovery is in progress", or is not.
const notPrerequisite = "55000"

// readSight reads a look's row, as text.
func readSight(rows [][][]byte) (s sight, err error) {
	if len(rows) != 1 || len(rows[0]) != 7 {
		return s, errOddAnswer
	}
	row := rows[0]
	s.role = RolePrimary
	if string(row[0]) == "t" {
		s.role = RoleReplica
	}
	number := func(text []byte, base, bits int) (n uint64) {
		if text != nil && err == nil {
			if n, err = strconv.ParseUint(string(text), base, bits); err != nil {
				err = errOddAnswer
			}
		}
		return n
	}
	s.timeline = uint32(number(row[1], 16, 32))
	s.position = parseLSN(string(row[2]))
	s.alone, s.paused = string(row[3]) == "t", string(row[4]) == "t"
	s.system = number(row[5], 10, 64)
	s.shown = uint32(number(row[6], 10, 32))
	if s.role == RolePrimary {
		s.position = s.position.replayable()
	}
	return s, err
}

// connect makes the monitor's own connection: with the peer's address and credentials, without the program's tracer and
// hooks but BeforeConnect, which may hold the credentials.
func (m *monitor) connect(ctx context.Context) (*pgx.Conn, error) {
	p := m.peer
	cc := p.config.ConnConfig.Copy()
	cc.Tracer = nil
	cc.OnNotice, cc.OnNotification = nil, nil
	cc.AfterConnect = nil
	// The program's handler may open a connection to cancel a query at a deadline; a look just hangs up.
	cc.BuildContextWatcherHandler = func(pg *pgconn.PgConn) ctxwatch.Handler {
		return &pgconn.DeadlineContextWatcherHandler{Conn: pg.Conn()}
	}
	if p.config.BeforeConnect != nil {
		if err := p.config.BeforeConnect(ctx, cc); err != nil {
			return nil, &hookError{err}
		}
		cc.Tracer = nil
	}
	cc.LookupFunc = p.address.pinned(cc.LookupFunc, &p.generation)
	c, err := pgx.ConnectConfig(ctx, cc)
	if err != nil {
		return nil, err
	}
	p.address.keep(c.PgConn(), p.generation.Load())
	return c, nil
}

// hangUp drops the monitor's connection.
func (m *monitor) hangUp() {
	hangUp(m.conn)
	m.conn = nil
}

func hangUp(c *pgx.Conn) {
	if c == nil {
		return
	}
	// A dead server reads no farewell: the socket goes first.
	_ = c.PgConn().Conn().Close()
	ctx, cancel := context.WithTimeout(context.Background(), lookTimeout)
	defer cancel()
	_ = c.Close(ctx)
}

// connectTimeout is how long a look may take that has to connect first and that nobody waits for: a server far away
// needs a second for TLS and password alone.
func (m *monitor) connectTimeout() time.Duration {
	return max(cmp.Or(m.peer.config.ConnConfig.ConnectTimeout, defaultConnectTimeout), lookTimeout)
}

// retryTimeout is how long a try at a peer that is down may take: less than a first connect, because a dial that began
// while packets were lost is tried again by the kernel after seconds, and a new one at once.
func (m *monitor) retryTimeout() time.Duration {
	if m.took == 0 {
		return m.connectTimeout()
	}
	return min(m.connectTimeout(), max(1500*time.Millisecond, 4*m.took))
}

var errOddAnswer = errors.New("multipool: the server answers a look with something else")

// jittered spreads d by a fifth to either side.
func jittered(d time.Duration) time.Duration {
	return d - d/5 + rand.N(max(2*d/5, 1))
}

// backoff is the pause after a failed look.
func (m *monitor) backoff(err error) time.Duration {
	v := verdictOf(err)
	switch {
	case err == errHeld:
		return m.hold - min(m.peer.breaker.openFor(), m.hold) + time.Millisecond
	case v.class == classStarting:
		return jittered(retryStart)
	case v.class == classConfig:
		return jittered(m.interval) // knocking faster with a wrong password locks accounts
	case m.peer.breaker.openFor() > eagerTime && m.peer.owner.anybodyServes():
		return jittered(max(m.interval, maxRetry))
	}
	return jittered(min(firstRetry<<min(m.failures-1, 8), maxRetry))
}
