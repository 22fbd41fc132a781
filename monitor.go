package multipool

import (
	"cmp"
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"strconv"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgconn/ctxwatch"
)

// monitor watches one peer from a goroutine of its own: a look now and then while the peer is well, a probe at once
// when somebody reports a fault, tries with growing pauses while the breaker is open. It alone touches an open peer,
// and it alone decides the peer's health; a call's errors only nudge it.
type monitor struct {
	peer     *peer
	interval time.Duration
	shared   bool // look through an idle connection of the pool

	nudged chan struct{} // capacity 1: a nudge is never lost and never waits
	conn   *pgx.Conn     // the monitor's own; nil: none at the moment
	roles  bool          // the server refuses the full look: ask the role only
}

const (
	lookTimeout  = time.Second            // of a look at a peer that is well
	probeTimeout = 500 * time.Millisecond // of a look at a suspect
	firstRetry   = 200 * time.Millisecond // after the breaker has opened
	maxRetry     = time.Second
	retryStart   = 250 * time.Millisecond // constant, while the server says that it is starting
)

func newMonitor(p *peer, c *Config) *monitor {
	return &monitor{
		peer: p, interval: c.CheckInterval, shared: c.NoMonitorConns,
		nudged: make(chan struct{}, 1),
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
}

// run watches until ctx ends.
func (m *monitor) run(ctx context.Context) {
	defer m.hangUp()
	for failures := 0; ; {
		err := m.examine(ctx)
		if ctx.Err() != nil {
			return
		}
		pause := jittered(m.interval)
		if err != nil {
			failures++
			pause = backoff(failures, err, m.interval)
		} else {
			failures = 0
		}
		if !m.sleep(ctx, pause) {
			return
		}
	}
}

// sleep waits for the pause to be over or a nudge, and reports whether to go on. A nudge during a backoff does not
// shorten it: everybody who meets a dead peer nudges.
func (m *monitor) sleep(ctx context.Context, pause time.Duration) bool {
	timer := time.NewTimer(pause)
	defer timer.Stop()
	nudged := m.nudged
	if !m.peer.breaker.closed() {
		nudged = nil
	}
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
	case <-nudged:
	}
	return true
}

// examine looks at the peer as its state asks for, and publishes what it found.
func (m *monitor) examine(ctx context.Context) error {
	if !m.peer.breaker.closed() {
		return m.recover(ctx)
	}
	timeout := lookTimeout
	switch {
	case m.peer.suspected.Load():
		timeout = probeTimeout
	case m.conn == nil:
		timeout = m.connectTimeout() // the first look, or the last was broken off: nobody suspects anything
	}
	seen, err := m.look(ctx, timeout, false)
	if err != nil && ctx.Err() == nil {
		// One connection has failed. Whether the server has is for a fresh dial to say.
		seen, err = m.look(ctx, timeout, true)
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	m.judge(seen, err)
	return err
}

// recover tries the open breaker with a look on a fresh connection.
func (m *monitor) recover(ctx context.Context) error {
	var seen sight
	var failure error
	err := m.peer.breaker.trial(func() error {
		seen, failure = m.look(ctx, m.connectTimeout(), true)
		return failure
	})
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		if failure != nil {
			m.peer.faults.note(failure)
			m.peer.owner.observe(observation{peer: m.peer, health: healthDown, cause: failure})
		}
		return err
	}
	m.judge(seen, nil)
	return nil
}

// judge publishes a look's outcome. Every verdict starts a new generation; what the pool holds of the last one is
// thrown away where the verdict is bad.
func (m *monitor) judge(seen sight, err error) {
	p := m.peer
	if err == nil {
		if p.suspected.Swap(false) {
			p.generation.Add(1)
		}
		p.owner.observe(observation{peer: p, health: healthUp, role: cmp.Or(p.vouch, seen.role), timeline: seen.timeline})
		return
	}
	p.faults.note(err)
	v := classify(evidence{err: err, ctx: context.Background(), phase: phaseAcquire})
	var answer *pgconn.PgError
	switch {
	case v.class == classConfig:
		p.suspected.Store(false)
		p.owner.observe(observation{peer: p, health: healthMisfit, cause: err})
	case !v.blamesPeer() && errors.As(err, &answer):
		// The server has answered, if only that it is full: it lives, and those who hold connections go on.
		p.suspected.Store(false)
		p.owner.observe(observation{peer: p, health: healthUp, cause: err})
	default:
		p.breaker.trip()
		p.down(err)
	}
}

// notServed are the errors of a server that does not offer what the full look asks: undefined_function,
// insufficient_privilege, feature_not_supported.
var notServed = []string{"42883", "42501", "0A000"}

// sight is what a look sees.
type sight struct {
	role     Role
	timeline uint32
}

// The statements of a look. Functions are qualified, so that a program's search_path cannot put its own in front; the
// timeline is that of the log being written, which tells a promotion at once (pg_control_checkpoint() tells it only
// after the next checkpoint).
const (
	lookFull = `select pg_catalog.pg_is_in_recovery(), case when not pg_catalog.pg_is_in_recovery() then ` +
		`pg_catalog.substr(pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_lsn()), 1, 8) end`
	lookRole = `select pg_catalog.pg_is_in_recovery(), null::pg_catalog.text`
)

// look asks the peer what it is, connecting first where there is no connection or a fresh one is wanted.
func (m *monitor) look(ctx context.Context, timeout time.Duration, fresh bool) (sight, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	if m.shared {
		// Where the program holds every connection, one is made for the look: a full pool is no fault of the peer.
		if s := m.peer.pool.Stat(); !fresh && s.AcquiredConns() < s.MaxConns() {
			c, err := m.peer.pool.Acquire(ctx)
			if err != nil {
				return sight{}, err
			}
			defer c.Release()
			return m.ask(ctx, c.Conn().PgConn())
		}
		defer m.hangUp()
	}
	if fresh {
		m.hangUp()
	}
	if m.conn == nil || m.conn.IsClosed() {
		if err := m.connect(ctx); err != nil {
			return sight{}, err
		}
	}
	return m.ask(ctx, m.conn.PgConn())
}

// ask runs the look's statement by the extended protocol: never the simple one, which poolers and injections love.
func (m *monitor) ask(ctx context.Context, pg *pgconn.PgConn) (sight, error) {
	statement := lookFull
	if m.roles {
		statement = lookRole
	}
	r := pg.ExecParams(ctx, statement, nil, nil, nil, nil).Read()
	if r.Err != nil {
		var pgErr *pgconn.PgError
		if errors.As(r.Err, &pgErr) && !m.roles && slices.Contains(notServed, pgErr.Code) {
			// A managed service without these functions, or not for this role: the role alone must do.
			m.roles = true
			return m.ask(ctx, pg)
		}
		return sight{}, r.Err
	}
	if len(r.Rows) != 1 || len(r.Rows[0]) != 2 {
		return sight{}, errOddAnswer
	}
	s := sight{role: RolePrimary}
	if string(r.Rows[0][0]) == "t" {
		s.role = RoleReplica
	}
	if t, err := strconv.ParseUint(string(r.Rows[0][1]), 16, 32); err == nil {
		s.timeline = uint32(t)
	}
	return s, nil
}

// connect makes the monitor's own connection: with the peer's address and credentials, without the program's tracer and
// hooks but BeforeConnect, which may hold the credentials.
func (m *monitor) connect(ctx context.Context) error {
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
			return err
		}
		cc.Tracer = nil
	}
	cc.LookupFunc = p.address.pinned(cc.LookupFunc, &p.generation)
	c, err := pgx.ConnectConfig(ctx, cc)
	if err != nil {
		return err
	}
	p.address.keep(c.PgConn(), p.generation.Load())
	m.conn = c
	return nil
}

// hangUp drops the monitor's connection.
func (m *monitor) hangUp() {
	if m.conn == nil {
		return
	}
	// A dead server reads no farewell: the socket goes first.
	_ = m.conn.PgConn().Conn().Close()
	ctx, cancel := context.WithTimeout(context.Background(), lookTimeout)
	defer cancel()
	_ = m.conn.Close(ctx)
	m.conn = nil
}

// connectTimeout is how long a look may take that has to connect first and that nobody waits for: a server far away
// needs a second for TLS and password alone.
func (m *monitor) connectTimeout() time.Duration {
	return max(cmp.Or(m.peer.config.ConnConfig.ConnectTimeout, defaultConnectTimeout), lookTimeout)
}

var errOddAnswer = errors.New("multipool: the server answers a look with something else")

// jittered spreads d by a fifth to either side.
func jittered(d time.Duration) time.Duration {
	return d - d/5 + rand.N(max(2*d/5, 1))
}

// backoff is the pause after the n-th failure in a row.
func backoff(n int, err error, interval time.Duration) time.Duration {
	switch v := classify(evidence{err: err, ctx: context.Background(), phase: phaseAcquire}); v.class {
	case classStarting:
		return jittered(retryStart)
	case classConfig:
		return jittered(interval) // knocking faster with a wrong password locks accounts
	}
	return jittered(min(firstRetry<<min(n-1, 8), maxRetry))
}
