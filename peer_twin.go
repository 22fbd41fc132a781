package multipool

import (
	"context"
	"strconv"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// Whether two names lead to one server, as far as a monitor can find out, and how long a server has been silent.

// twins is what a monitor has found out about the peers whose servers tell the same of themselves as its own.
type twins struct {
	conn *pgx.Conn      // over which it has asked: it asks again over another
	one  map[*peer]bool // whether it is the same server
}

// server is which server a look has met, as far as it tells.
func (s sight) server() server { return server{system: s.system, started: s.started} }

// lastServer is which server the last look that told has met.
func (p *peer) lastServer() server {
	if seen := p.sighted.Load(); seen != nil {
		return seen.server()
	}
	return server{}
}

// serverOf returns which server a look has met. Where another peer's tells the same system identifier and the same start, it
// is the same server if a session here is seen there; one that is not, as of a copy of a running machine, is told apart.
func (m *monitor) serverOf(ctx context.Context, seen sight) server {
	p := m.peer
	if seen.started == 0 {
		return server{}
	}
	p.sighted.Store(&seen) // before the others' are read, so that of two that look at once one sees the other
	s := seen.server()
	if m.conn == nil || m.conn != m.twins.conn {
		m.twins = twins{conn: m.conn, one: map[*peer]bool{}}
	}
	apart := false
	members := p.owner.topology.Load().members
	for i := range members {
		n := &members[i]
		q, other := n.peer, n.peer.sighted.Load()
		if q == p || other == nil || !n.answers() || other.server() != s {
			continue
		}
		if !m.isOne(ctx, seen, q, *other) {
			apart = true
			continue
		}
		if n.server.system == s.system && n.server.started == s.started { // a copy's, too
			return n.server
		}
	}
	if apart {
		s.copy = p.number
	}
	return s
}

// isOne reports whether another peer's server is the one that a look has met. Where it cannot be asked what they tell counts,
// unless two primaries show positions that do not follow each other as one's would.
func (m *monitor) isOne(ctx context.Context, seen sight, q *peer, other sight) bool {
	one, known := m.twins.one[q]
	switch {
	case known:
		return one
	case m.conn != nil && !m.borrowing() && !m.peer.proxy && !q.proxy:
		if one, err := m.seenFrom(ctx, q); err == nil {
			m.twins.one[q] = one
			return one
		}
	}
	primaries := seen.role == RolePrimary && other.role == RolePrimary
	return !(primaries && other.came <= seen.asked && other.position > seen.position)
}

const (
	sessionBegan = `select (extract(epoch from a.backend_start) operator(pg_catalog.*) 1000000)::pg_catalog.int8
 from pg_catalog.pg_stat_activity a where a.pid operator(pg_catalog.=) `
	ownSession   = sessionBegan + `pg_catalog.pg_backend_pid()`
	theirSession = sessionBegan + `$1::pg_catalog.int4`
)

// seenFrom reports whether the monitor's session is seen by a new one of another peer.
func (m *monitor) seenFrom(ctx context.Context, q *peer) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, m.patience())
	defer cancel()
	own, err := tells(ctx, m.conn.PgConn(), ownSession)
	if err != nil {
		return false, err
	}
	c, err := q.monitor.connect(ctx)
	if err != nil {
		return false, err
	}
	defer hangUp(c)
	pid := strconv.FormatUint(uint64(m.conn.PgConn().PID()), 10)
	theirs, err := tells(ctx, c.PgConn(), theirSession, []byte(pid))
	return err == nil && theirs != "" && theirs == own, err
}

// tells returns the one text that a statement gives, "" where it gives none.
func tells(ctx context.Context, pg *pgconn.PgConn, sql string, args ...[]byte) (string, error) {
	r := pg.ExecParams(ctx, sql, args, nil, nil, nil).Read()
	if r.Err != nil || len(r.Rows) == 0 {
		return "", r.Err
	}
	return string(r.Rows[0][0]), nil
}

// silence is the looks in a row that have failed.
type silence struct {
	looks int
	last  time.Time
	time  time.Duration // in which they were made: a process that was stopped makes none
}

const (
	silentLooks = 20
	silentTime  = time.Minute
)

// unanswered counts a look that has failed. After so many in so long the server's last word does not count any more where
// one that answers has another.
func (m *monitor) unanswered() {
	s, now := &m.silence, time.Now()
	if s.looks > 0 {
		s.time += min(now.Sub(s.last), 2*max(m.interval, maxRetry))
	}
	s.looks, s.last = s.looks+1, now
	if s.looks >= silentLooks && s.time >= silentTime {
		m.peer.owner.observe(observation{peer: m.peer, aged: true})
	}
}
