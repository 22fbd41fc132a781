package multipool

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"strconv"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgconn/ctxwatch"
)

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
	if !m.borrows {
		return m.ask(ctx, m.conn.PgConn())
	}
	if m.peer.lends() {
		c, err := m.peer.pool.Acquire(ctx)
		if err != nil {
			return sight{}, err
		}
		defer c.Release()
		return m.ask(ctx, c.Conn().PgConn())
	}
	return m.fresh(ctx, timeout)
}

// lends reports whether a look may go through a connection of the program's. Where the program holds every one, one is
// made for the look: a full pool is no fault of the peer.
func (p *peer) lends() bool {
	s := p.pool.Stat()
	return s.AcquiredConns() < s.MaxConns() && !p.drained.Load() && !(p.shared.Load() && p.exhausted())
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
	if err != nil || m.borrows {
		hangUp(c)
		return seen, err
	}
	m.conn = c
	return seen, nil
}

// ask runs the look's statement by the extended protocol: never the simple one, which poolers and injections love. It
// asks for less where the server does not serve all of it, and again where it was promoted between two functions of the
// statement.
func (m *monitor) ask(ctx context.Context, pg *pgconn.PgConn) (sight, error) {
	for promoted := false; ; {
		modesty := m.modesty.Load()
		s := sight{asked: m.peer.owner.clock()}
		r := pg.ExecParams(ctx, looks[modesty], nil, nil, nil, nil).Read()
		s.came = m.peer.owner.clock()
		var pgErr *pgconn.PgError
		switch {
		case r.Err == nil:
			err := s.read(r.Rows)
			said := reportedRole(pg)
			m.peer.hearsay.Store(err == nil && said != RoleUnknown && said != s.role)
			return s, err
		case refusesSession(r.Err):
			s.role = RoleReplica // it refuses every statement of the kind, and only a standby does
			return s, nil
		case !errors.As(r.Err, &pgErr):
			return sight{}, r.Err
		case pgErr.Code == notPrerequisite && !promoted:
			promoted = true
		case slices.Contains(notServed, pgErr.Code) && int(modesty) < len(looks)-1:
			m.modesty.CompareAndSwap(modesty, modesty+1)
		default:
			return sight{}, r.Err
		}
	}
}

// notPrerequisite is object_not_in_prerequisite_state: "recovery is in progress", or is not.
const notPrerequisite = "55000"

// read takes a look's row in, as text.
func (s *sight) read(rows [][][]byte) (err error) {
	if len(rows) != 1 || len(rows[0]) != 7 {
		return errOddAnswer
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
