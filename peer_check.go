package multipool

import (
	"cmp"
	"context"
	"errors"
	"hash/fnv"
	"slices"
	"strconv"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgconn/ctxwatch"

	"github.com/pgmultipool/multipool/internal/pgfault"
)

// hookError is an error of the program's own BeforeConnect: it says nothing about the server.
type hookError struct{ err error }

func (e *hookError) Error() string { return e.err.Error() }
func (e *hookError) Unwrap() error { return e.err }

// sight is what a look sees. What the server does not tell is zero.
type sight struct {
	role      Role
	system    uint64        // the system identifier
	timeline  uint32        // of the log that a primary writes, or that a replica's receiver gets
	shown     uint32        // the highest timeline of which a replica's control file knows
	position  lsn           // to which a primary has written, or a replica has replayed
	alone     bool          // a replica without a running receiver
	paused    bool          // a replica whose replay was paused
	started   int64         // when the server was started, in microseconds: with system it tells one server from another
	awaits    bool          // a primary whose commits wait for standbys: synchronous_standby_names is set
	asked     time.Duration // by the pool's clock
	came      time.Duration
	full      bool   // whether all of this was asked that the server tells
	glance    bool   // whether nothing but the role was asked
	at        string // the address that the session leads to
	undialled bool   // a session has answered, and a new one could not be had
}

// depth is how much a look asks.
type depth uint8

const (
	depthFull  depth = iota // all
	depthBrief              // what changes from one moment to the next: enough to see that nothing has happened
	depthRole               // the role
)

// looks are the statements of a look, from the one that asks everything to the one that every server answers: managed
// services lack some functions. Functions are qualified, so that a program's search_path cannot put its own in front.
//
// A primary's timeline is that of the log being written, which tells a promotion at once (pg_control_checkpoint()
// tells it only after the next checkpoint); its position is that of insertion, as a commit that does not wait for the
// disk lags the written one. A replica's timeline is its receiver's, which only members of pg_monitor see; the
// control file's is an old one for a while.
var looks = [...]string{lookFull,
	lookSelect + `, null::pg_catalog.int8, null::pg_catalog.int4` + lookFrom,
	`select pg_catalog.pg_is_in_recovery(), null, null, null, null, null, null, null, null`,
}

const (
	lookSelect = `select r.standby,
 case when r.standby then (select pg_catalog.to_hex(w.received_tli) from pg_catalog.pg_stat_wal_receiver w)
 else pg_catalog.substr(pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_lsn()), 1, 8) end,
 case when r.standby then pg_catalog.pg_last_wal_replay_lsn() else pg_catalog.pg_current_wal_insert_lsn() end,
 r.standby and not exists (select from pg_catalog.pg_stat_wal_receiver),
 case when r.standby then pg_catalog.pg_is_wal_replay_paused() end,
 (extract(epoch from pg_catalog.pg_postmaster_start_time()) operator(pg_catalog.*) 1000000)::pg_catalog.int8,
 not r.standby and pg_catalog.current_setting('synchronous_standby_names') operator(pg_catalog.<>) ''`
	lookFrom = ` from (select pg_catalog.pg_is_in_recovery()) as r(standby)`

	// lookBrief is without a subquery, a view and the control file: prepared it costs a server a third of lookFull.
	lookBrief = `select pg_catalog.pg_is_in_recovery(),
 case when pg_catalog.pg_is_in_recovery() then pg_catalog.to_hex((pg_catalog.pg_stat_get_wal_receiver()).received_tli)
 else pg_catalog.substr(pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_lsn()), 1, 8) end,
 case when pg_catalog.pg_is_in_recovery() then pg_catalog.pg_last_wal_replay_lsn() else pg_catalog.pg_current_wal_insert_lsn() end,
 null, case when pg_catalog.pg_is_in_recovery() then pg_catalog.pg_is_wal_replay_paused() end, null, null, null, null`

	lookRole = `select pg_catalog.pg_is_in_recovery()`
	lookFull = lookSelect + `,
 (select c.system_identifier from pg_catalog.pg_control_system() c),
 case when r.standby then (select c.min_recovery_end_timeline from pg_catalog.pg_control_recovery() c) end` + lookFrom
)

// memory is what the looks have told last, by which the next one's depth is chosen.
type memory struct {
	sight                  // of the last full look
	measured time.Duration // when the last look was asked that told more than the role
}

// depth is how much the next look asks: all where anything has happened that is news to any peer since all was asked, where
// that is long ago, or where the peer is left out, so that it comes back soon. While there is no primary most looks ask
// nothing but the role.
func (m *monitor) depth() depth {
	o, t := m.peer.owner, &m.told
	now := o.clock()
	switch {
	case !t.full, t.asked <= time.Duration(o.changed.Load()), now-t.asked >= early(min(m.interval, fullLook)),
		now-t.asked >= early(returnLook) && m.peer.leftOut():
		return depthFull
	case o.orphanedFor() > 0 && now-t.measured < early(patientLook):
		return depthRole
	}
	return depthBrief
}

// early is the earliest that a look may come whose pause is d, as pauses are jittered.
func early(d time.Duration) time.Duration { return d - d/5 }

// look asks the peer what it is, on the monitor's connection or, where it has none of its own, one of the program's.
func (m *monitor) look(ctx context.Context) (sight, error) {
	switch {
	case m.borrowing() && !m.peer.lends():
		return m.fresh(ctx, max(lookTimeout, m.patience()))
	case m.borrowing():
		ctx, cancel := context.WithTimeout(ctx, lookTimeout)
		defer cancel()
		return m.askLent(ctx)
	}
	ctx, cancel := context.WithTimeout(ctx, lookTimeout)
	defer cancel()
	return m.inspect(ctx, m.conn.PgConn())
}

// inspect asks as much as is due, and everything where less has shown that something has changed.
func (m *monitor) inspect(ctx context.Context, pg *pgconn.PgConn) (sight, error) {
	d := m.depth()
	var s sight
	var err error
	if d == depthRole && m.listensTo(pg) {
		s, err = m.glance(ctx, pg)
	} else {
		s, err = m.askFor(ctx, pg, d, m.send)
	}
	switch {
	case err != nil || s.full:
		return s, err
	case s.role != m.told.role, d == depthBrief && s.timeline != m.told.timeline:
		return m.askFor(ctx, pg, depthFull, m.send)
	case d == depthBrief:
		s.alone, s.awaits = m.told.alone, m.told.awaits
	}
	s.glance = d == depthRole
	return s, nil
}

// listensTo reports whether the session tells of its server's promotion.
func (m *monitor) listensTo(pg *pgconn.PgConn) bool {
	return !m.peer.proxy && !m.peer.hearsay.Load() && reportedRole(pg) != RoleUnknown
}

// glance has the server say that it is ready, without a statement. A session that has seen its server promoted says so
// before that (PostgreSQL's source, ReportChangedGUCOptions, from version 14 on).
func (m *monitor) glance(ctx context.Context, pg *pgconn.PgConn) (sight, error) {
	s := sight{asked: m.peer.owner.clock()}
	p := pg.StartPipeline(ctx)
	err := cmp.Or(p.Sync(), p.Close())
	s.role, s.came = reportedRole(pg), m.peer.owner.clock()
	return s, err
}

// askLent asks on a connection of the program's pool.
func (m *monitor) askLent(ctx context.Context) (sight, error) {
	c, err := m.peer.lend(ctx, false)
	if err != nil {
		return sight{}, err
	}
	defer c.Release()
	return m.inspect(ctx, c.Conn().PgConn())
}

// askIdle asks on a connection of the program's that it does not use: where there is none it waits for one that is released,
// as long as it is searching.
func (m *monitor) askIdle(ctx, searching context.Context, patience time.Duration) (sight, error) {
	for {
		if m.peer.hasIdle() {
			within, end := context.WithTimeout(ctx, patience/4) // it may be taken, and another would be made
			c, err := m.peer.lend(within, true)
			end()
			if err == nil {
				defer c.Release()
				return m.ask(ctx, c.Conn().PgConn())
			}
		}
		select {
		case <-time.After(idleTick):
		case <-searching.Done():
			return sight{}, errNoSession
		}
	}
}

const idleTick = 10 * time.Millisecond

var errNoSession = errors.New("multipool: no connection is free for a look")

// lends reports whether a look may go through a connection of the program's. Where the program holds every one, one is
// made for the look: a full pool is no fault of the peer.
func (p *peer) lends() bool {
	s := p.pool.Stat()
	return s.AcquiredConns() < s.MaxConns() && !p.drained.Load() && !(p.shared.Load() && p.exhausted())
}

// hasIdle reports whether the program has a connection that it does not use.
func (p *peer) hasIdle() bool { return !p.drained.Load() && p.pool.Stat().IdleConns() > 0 }

// reached is what a look on a new connection has shown.
type reached struct {
	sight
	conn *pgx.Conn
	took time.Duration // to connect
	err  error
}

// reach asks on a new connection.
func (m *monitor) reach(ctx context.Context) (r reached) {
	begun := time.Now()
	r.conn, r.err = m.connect(ctx)
	m.peer.knocks.ended(r.err)
	if r.err != nil {
		return r
	}
	r.took = max(time.Since(begun), 1)
	m.modesty.Store(0) // rights may have changed, or the server
	m.wordy.Store(false)
	if r.sight, r.err = m.ask(ctx, r.conn.PgConn()); r.err != nil {
		hangUp(r.conn)
		r.conn = nil
	}
	return r
}

// adopt makes a new connection the monitor's, if it has answered.
func (m *monitor) adopt(r reached) (sight, error) {
	if r.took > 0 {
		m.took.note(r.took)
	}
	if r.err != nil || m.borrowing() {
		hangUp(r.conn)
		return r.sight, r.err
	}
	m.conn, m.dialled = r.conn, time.Now()
	return r.sight, nil
}

// fresh asks on a new connection, which becomes the monitor's.
func (m *monitor) fresh(ctx context.Context, timeout time.Duration) (sight, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	m.hangUp()
	return m.adopt(m.reach(ctx))
}

// ask asks everything, by the text of the statement.
func (m *monitor) ask(ctx context.Context, pg *pgconn.PgConn) (sight, error) {
	return m.askFor(ctx, pg, depthFull, sendText)
}

// sender runs a statement of a look.
type sender func(ctx context.Context, pg *pgconn.PgConn, sql string) *pgconn.Result

// askFor runs a look's statement by the extended protocol: never the simple one, which poolers and injections love. It
// asks for less where the server does not serve all of it, and again where it was promoted between two functions of the
// statement.
func (m *monitor) askFor(ctx context.Context, pg *pgconn.PgConn, d depth, send sender) (sight, error) {
	for promoted := false; ; {
		modesty := m.modesty.Load()
		sql := looks[modesty]
		switch {
		case d == depthRole:
			sql = lookRole
		case d == depthBrief && int(modesty) < len(looks)-1 && !m.wordy.Load():
			sql = lookBrief
		}
		s := sight{asked: m.peer.owner.clock(), full: sql == looks[modesty]}
		r := send(ctx, pg, sql)
		s.came = m.peer.owner.clock()
		switch {
		case r.Err == nil:
			err := s.read(r.Rows)
			s.at = pg.Conn().RemoteAddr().String()
			said := reportedRole(pg)
			m.peer.hearsay.Store(err == nil && said != RoleUnknown && said != s.role)
			return s, err
		case pgfault.SessionRefused(r.Err):
			s.role = RoleReplica // it refuses every statement of the kind, and only a standby does
			return s, nil
		case pgfault.WrongState(r.Err) && !promoted:
			promoted = true
		case pgfault.Unsupported(r.Err) && !s.full:
			m.wordy.Store(true)
			d = depthFull
		case pgfault.Unsupported(r.Err) && int(modesty) < len(looks)-1:
			m.modesty.CompareAndSwap(modesty, modesty+1)
		default:
			return sight{}, r.Err
		}
	}
}

// sendText sends the statement as a text, which leaves nothing in the session.
func sendText(ctx context.Context, pg *pgconn.PgConn, sql string) *pgconn.Result {
	return pg.ExecParams(ctx, sql, nil, nil, nil, nil).Read()
}

// send has the statement prepared on the monitor's own session, unless it is a pooler's, whose statements may each run in
// another; nor is anything left in the program's sessions.
func (m *monitor) send(ctx context.Context, pg *pgconn.PgConn, sql string) *pgconn.Result {
	if m.conn == nil || pg != m.conn.PgConn() || m.peer.proxy {
		return sendText(ctx, pg, sql)
	}
	if m.prepared.in != pg {
		m.prepared = prepared{in: pg}
	}
	if !m.prepared.useless {
		r := m.prepared.send(ctx, sql)
		if m.prepared.useless = saysNoPrepared(r.Err); !m.prepared.useless {
			return r
		}
	}
	return sendText(ctx, pg, sql)
}

// prepared is the statements that are prepared in a session.
type prepared struct {
	in      *pgconn.PgConn
	texts   []string
	useless bool // what is prepared there is lost, or refused: it is a pooler's, and nobody has said so
}

// unpreparedError wraps a server's refusal to prepare.
type unpreparedError struct{ error }

func (e unpreparedError) Unwrap() error { return e.error }

// send runs a statement that is prepared, first where it is not.
func (p *prepared) send(ctx context.Context, sql string) *pgconn.Result {
	digest := fnv.New64a() // two programs may share a pooler's session, and differ in what they ask
	_, _ = digest.Write([]byte(sql))
	name := "multipool_" + strconv.FormatUint(digest.Sum64(), 16)
	if !slices.Contains(p.texts, sql) {
		if _, err := p.in.Prepare(ctx, name, sql, nil); err != nil {
			return &pgconn.Result{Err: unpreparedError{err}}
		}
		p.texts = append(p.texts, sql)
	}
	return p.in.ExecPrepared(ctx, name, nil, nil, nil).Read()
}

// saysNoPrepared reports whether a server has refused to prepare a statement, or does not know what was prepared.
func saysNoPrepared(err error) bool {
	var refused unpreparedError
	return pgfault.Answered(err) && errors.As(err, &refused) || pgfault.NotPrepared(err)
}

// read takes a look's row in, as text.
func (s *sight) read(rows [][][]byte) (err error) {
	if len(rows) != 1 || len(rows[0]) != 9 && len(rows[0]) != 1 {
		return errOddAnswer
	}
	row := rows[0]
	s.role = RolePrimary
	if string(row[0]) == "t" {
		s.role = RoleReplica
	}
	if len(row) == 1 {
		return nil // nothing else was asked
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
	s.started, s.awaits = int64(number(row[5], 10, 63)), string(row[6]) == "t"
	s.system = number(row[7], 10, 64)
	s.shown = uint32(number(row[8], 10, 32))
	return err
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
		p.address.failed()
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

// patience is how long a probe waits for an answer: what it takes to connect there, with a wide margin.
func (m *monitor) patience() time.Duration {
	return max(probeTimeout, min(4*m.took.least(), m.connectTimeout()))
}

// connectTimes are what the last connects have taken. The least of them counts: one that was held up tells nothing of the
// distance.
type connectTimes struct {
	last [3]time.Duration // 0: none yet
	n    int
}

func (c *connectTimes) note(d time.Duration) {
	c.last[c.n%len(c.last)] = d
	c.n++
}

func (c *connectTimes) least() time.Duration {
	return slices.Min(c.last[:max(1, min(c.n, len(c.last)))])
}

// retryTimeout is how long a try at a peer that is down may take: less than a first connect, because a dial that began
// while packets were lost is tried again by the kernel after seconds, and a new one at once.
func (m *monitor) retryTimeout() time.Duration {
	took := m.took.least()
	if took == 0 {
		return m.connectTimeout()
	}
	return min(m.connectTimeout(), max(1500*time.Millisecond, 4*took))
}

var errOddAnswer = errors.New("multipool: the server answers a look with something else")
