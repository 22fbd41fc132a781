package multipool

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/pgmultipool/multipool/internal/pgfault"
)

// An address may lead to another server than it did: a service, a virtual address, a proxy's port. Sessions stay where they
// were. So a monitor dials anew now and then, and wherever something contradicts what it sees; and behind a proxy every new
// session says which server it has met before the program has it.

const (
	// A monitor dials anew every redialEach; behind a proxy, and while there is no primary, at every regular look; where its
	// session leads to a primary that was replaced, every redialFenced. Where something contradicts what it sees it does so at
	// once, but not more often than every redialLeast.
	redialEach   = 30 * time.Second
	redialFenced = time.Second
	redialLeast  = 500 * time.Millisecond
)

// mistrust has the monitor dial anew: its session may lead elsewhere than new ones do.
func (m *monitor) mistrust() {
	if m == nil {
		return // the pool's only peer has no monitor
	}
	m.mistrusted.Store(true)
	m.nudge()
}

// judgeAnew publishes what the monitor's session has seen, and where it is time to what a new one sees. looking ends with a
// suspicion. Where the program's sessions say something else only the new one's word counts.
func (m *monitor) judgeAnew(ctx, looking context.Context, seen sight) error {
	m.notice(seen)
	due, denied := m.mayLeadElsewhere(seen), m.denied(seen)
	if !due || !denied {
		if err := m.judge(ctx, seen, nil); err != nil || !due {
			return err
		}
	}
	seen, err := m.anew(looking, seen)
	if err != nil {
		return m.probe(ctx)
	}
	return m.judge(ctx, seen, nil)
}

// denied reports whether the monitor's session sees what it saw, and somebody else's has told of another role.
func (m *monitor) denied(seen sight) bool {
	told := Role(m.peer.role.Load())
	return m.saw == seen.role && told != seen.role && told != RoleUnknown && m.peer.vouch == RoleUnknown
}

// anew returns what a new session sees, and puts it in the place of the monitor's own. seen is what the last session has seen.
// An error is that of the dial.
func (m *monitor) anew(ctx context.Context, seen sight) (sight, error) {
	m.mistrusted.Store(false)
	m.dialled = time.Now()
	within, cancel := context.WithTimeout(ctx, max(lookTimeout, m.patience()))
	defer cancel()
	r := m.reach(within)
	top := m.peer.owner.topology.Load()
	switch {
	case r.err != nil:
		return seen, r.err
	case m.peer.proxy && top.outdates(r.sight) && !top.outdates(seen):
		hangUp(r.conn) // a proxy that still lets some in to a primary that was replaced
		return seen, nil
	}
	m.hangUp()
	return m.adopt(r)
}

// mayLeadElsewhere reports whether it is time to find out where new sessions lead.
func (m *monitor) mayLeadElsewhere(seen sight) bool {
	p := m.peer
	since := time.Since(m.dialled)
	switch {
	case m.mistrusted.Load(), m.denied(seen):
		return since >= redialLeast
	case m.borrowing():
		return false // the server may have no room for another session
	case seen.role == RolePrimary && p.owner.topology.Load().replaced(p):
		return since >= redialFenced
	case p.proxy, p.owner.orphanedFor() > 0:
		return since >= max(m.interval-m.interval/4, time.Second)
	}
	return since >= redialEach
}

// notice takes in what the monitor's own session has seen, which cannot lead to two servers, nor report what is not so for
// long, unless there is a pooler in between.
func (m *monitor) notice(seen sight) {
	p := m.peer
	if p.proxy || m.borrowing() {
		return
	}
	if p.lastServer().differs(seen.server()) {
		p.contradicted(errSeveral)
	}
	if !p.hearsay.Load() {
		m.repeats = 0
	} else if m.repeats++; m.repeats > 1 { // a promotion may come between an answer and its end
		p.contradicted(errRepeats)
	}
}

// moved takes in which server a look has met, before what it has seen is published. Where the address of a peer that is one
// server leads to another, connections that lead to the last one are closed: those in use when they are released, or at once
// where writes there are lost.
func (m *monitor) moved(seen sight) {
	p, now := m.peer, seen.server()
	was := p.lastServer()
	if !was.differs(now) {
		return
	}
	back := m.metBefore == now
	m.metBefore = was
	m.forgetReplay()
	if back && !p.address.several() {
		p.contradicted(errSeveral)
	}
	if p.proxy || p.undeclared.Load() {
		return // its sessions tell for themselves
	}
	p.generation.Add(1)
	if known := p.owner.topology.Load().member(p); known != nil && known.role == RolePrimary && seen.role == RolePrimary && seen.timeline > known.timeline {
		p.sockets.cut(connHeld, false)
	}
	p.pool.Reset()
	p.owner.followers.reset()
}

// recheck has the other peers' monitors dial anew where a piece of news contradicts what was known of who is what.
func (p *MultiPool) recheck(old, next *topology, o observation) {
	if next.timeline > old.timeline {
		for _, q := range next.peers {
			if q.proxy {
				q.sockets.cutIf(connHeld, func(w *wire) bool {
					at := w.at.Load()
					if at == nil || !next.outdates(*at) {
						return false
					}
					q.metStale(at.timeline, next.timeline)
					return true
				})
			}
		}
	}
	was, is := old.member(o.peer), next.member(o.peer)
	turned := was != nil && is != nil && was.role != RoleUnknown && was.role != is.role
	disputed := len(next.rivals) > 0 && !slices.Equal(old.rivals, next.rivals) || next.split && !old.split
	if !turned && !disputed && (old.primary == nil || old.primary == next.primary) {
		return
	}
	for _, q := range next.peers {
		if q != o.peer {
			q.monitor.mistrust()
		}
	}
}

// outdates reports whether a server shows itself a primary of this cluster that was replaced.
func (t *topology) outdates(seen sight) bool {
	return seen.role == RolePrimary && seen.timeline != 0 && seen.timeline < t.timeline &&
		(seen.system == t.system || seen.system == 0 || t.system == 0)
}

// introduce asks a new session, before anything else runs there, which server it has met. Behind a proxy that hands whole
// sessions on, that holds until its end; behind one that hands statements on, it holds for the moment. The session is
// refused where the server is a primary that was replaced, or a standby where a primary is believed to be.
func (p *peer) introduce(ctx context.Context, pg *pgconn.PgConn) (*sight, error) {
	if !p.asksRole() || p.solo || p.owner.config.Mode != ModeReplicated {
		return nil, nil
	}
	within, cancel := context.WithTimeout(ctx, p.monitor.connectTimeout())
	defer cancel()
	seen, err := p.monitor.ask(within, pg)
	switch {
	case err != nil && pgfault.Check(err).Class == pgfault.Overload:
		return nil, err
	case err != nil:
		return nil, fmt.Errorf("%w: %v", errUntold, err) // without its type: whatever it is, no call was sent
	}
	p.tellNewer(seen)
	top, believed := p.owner.topology.Load(), Role(p.role.Load())
	if believed != RoleUnknown && believed != seen.role {
		p.monitor.mistrust()
	}
	switch {
	case top.outdates(seen):
		p.metStale(seen.timeline, top.timeline)
		p.monitor.mistrust()
		return nil, errLed
	case believed == RolePrimary && seen.role == RoleReplica:
		return nil, errLed
	}
	return &seen, nil
}

// introduce has the session tell which server it has met, unless it has.
func (w *wire) introduce(ctx context.Context) error {
	if w.at.Load() != nil {
		return nil
	}
	at, err := w.peer.introduce(ctx, w.pg)
	w.at.Store(at)
	return err
}

// tellNewer publishes a timeline that a session has met and no look yet: the primary of an older one is fenced from then on,
// whoever the monitor's own session leads to.
func (p *peer) tellNewer(seen sight) {
	top := p.owner.topology.Load()
	if seen.role != RolePrimary || !top.elected || seen.timeline <= top.timeline || seen.system != top.system {
		return
	}
	if Role(p.role.Load()) == RolePrimary {
		p.owner.observe(observation{peer: p, role: RolePrimary, system: seen.system, timeline: seen.timeline})
	} else {
		p.owner.observe(observation{peer: p, shown: seen.timeline})
	}
	p.monitor.mistrust()
}

var (
	errUntold = pgfault.Unavailable("multipool: a new session does not tell which server it has met")
	errLed    = pgfault.Unavailable("multipool: a new session has met a server that is not the primary any more")

	errSeveral = errors.New("sessions there lead to several servers")
	errRepeats = errors.New("sessions there report another role than the server has")
)

// contradicted says, once, that a peer's address is that of a pooler or a load balancer.
func (p *peer) contradicted(how error) {
	if p.proxy || !p.undeclared.CompareAndSwap(false, true) {
		return
	}
	err := &undeclaredProxy{p.name, how}
	p.faults.note(err)
	p.owner.herald.advise(p.owner.topology.Load(), p, err)
}

// metStale says, once for every newer timeline, that a primary that was replaced is still to be met behind the address.
func (p *peer) metStale(timeline, newer uint32) {
	if was := p.stale.Swap(newer); was == newer {
		return
	}
	err := &staleBehindProxy{p.name, timeline, newer}
	p.faults.note(err)
	p.owner.herald.advise(p.owner.topology.Load(), p, err)
}

// staleBehindProxy is the cause of the event that says so.
type staleBehindProxy struct {
	peer            string
	timeline, newer uint32
}

func (e *staleBehindProxy) Error() string {
	return fmt.Sprintf("multipool: peer %s leads to a primary of timeline %d, which has been replaced on timeline %d: what was written there since is lost",
		e.peer, e.timeline, e.newer)
}

// undeclaredProxy is the cause of the event that says so.
type undeclaredProxy struct {
	peer string
	how  error
}

func (e *undeclaredProxy) Error() string {
	return fmt.Sprintf("multipool: peer %s: %v, as through a pooler or a load balancer: set its Peer.Proxy", e.peer, e.how)
}

// recovers asks a session that has refused a statement as a standby does whether it leads to one, where nothing but the peer's
// looks tells: the refusal may be the program's own, as by default_transaction_read_only. Recovery ends and does not begin
// again within a session, so a yes held for the statement too.
func (w *wire) recovers(err error) bool {
	p := w.peer
	switch {
	case p.solo, !p.asksRole(), !pgfault.RefusedByStandby(err):
		return false
	case w.standby && Role(p.role.Load()) == RoleReplica:
		return true
	case w.pg.IsClosed(), w.pg.TxStatus() != 'I':
		return false
	}
	ctx, cancel := context.WithTimeout(context.Background(), lookTimeout)
	defer cancel()
	r := w.pg.ExecParams(ctx, lookSolo, nil, nil, nil, []int16{pgx.TextFormatCode}).Read()
	return r.Err == nil && len(r.Rows) == 1 && len(r.Rows[0]) == 1 && string(r.Rows[0][0]) == "t"
}

// leftBehind closes a connection of a peer that is believed to be the primary, and that leads to a standby.
func (w *wire) leftBehind(c *pgx.Conn) {
	if Role(w.peer.role.Load()) == RolePrimary {
		w.peer.monitor.mistrust()
		farewell(c)
	}
}
