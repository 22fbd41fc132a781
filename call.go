package multipool

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/pgmultipool/multipool/internal/pgfault"
	"github.com/pgmultipool/multipool/internal/sqltext"
)

// trail is what one call has been through: a value on the caller's stack.
type trail struct {
	progress
	tried  tried
	picked *topology // that the last attempt was picked on
	reason Reason    // why the next attempt goes where it goes, where that is not the intent's own reason
	guest  bool      // the next attempt is a read that falls back to the primary
	last   error     // of the last attempt; nil if there was none
	waits  bool      // the last error is one that waiting may cure
	until  time.Time
	held   time.Time // when a dial of the call was held back first
}

// progress is how far a call has come.
type progress struct {
	attempt uint16 // attempts begun
	resent  uint8  // statements sent again after one had reached a server
	account *account
	fell    *peer // a server on which a read has lost its connection, nothing having been known against it
}

// maxResent is how often one call is sent again after it reached a server: where three replicas die one after another, the
// primary is the fourth that a read reaches. What may be the cause of its losses itself is stopped earlier (poisonous).
const maxResent = 3

// attempt is the one loop by which every call goes out: choose a peer, take a connection, run, and where that failed
// judge whether and where to go on. What run returned beside its error comes back with the last error.
func attempt[T any](ctx context.Context, p *MultiPool, op operation, sql string, run func(*pgxpool.Conn, *wire) (T, error)) (T, error) {
	var in intent
	var t trail
	t.account = p.account(ctx, op)
	if err := p.intend(ctx, op, sql, &in); err != nil {
		t.ended(op, err)
		var none T
		return none, err
	}
	if t.account != nil {
		t.account.end.Kind = in.kind()
	}
	result, err := goThrough(ctx, p, &in, &t, run)
	t.ended(op, err)
	return result, err
}

// again is attempt for a call of which one attempt has failed when its result was out already, and nobody had it yet.
// false: there is no other.
func again[T any](ctx context.Context, p *MultiPool, op operation, sql string, been progress, f failure, run func(*pgxpool.Conn, *wire) (T, error)) (result T, more bool, err error) {
	var in intent
	t := trail{progress: been}
	if p.intend(ctx, op, sql, &in) != nil || !p.goOn(ctx, &in, &t, f) {
		return result, false, nil
	}
	result, err = goThrough(ctx, p, &in, &t, run)
	t.ended(op, err)
	return result, true, err
}

// goThrough makes the attempts of a call.
func goThrough[T any](ctx context.Context, p *MultiPool, in *intent, t *trail, run func(*pgxpool.Conn, *wire) (T, error)) (T, error) {
	var result T
	for {
		peer, err := p.choose(ctx, in, t)
		if err != nil {
			return result, err
		}
		conn, w, err := peer.acquire(ctx, in, t)
		if err == nil {
			if in.reads && in.mayResend(w) {
				w.use.read()
			}
			if err = p.lapsed(in, t, peer, w); err == nil && in.findsLost(t, w) {
				err = errGone // it was lost before: that says nothing about the statement
				farewell(conn.Conn())
			}
			if err != nil {
				conn.Release()
			}
		}
		if err != nil {
			if !p.goOn(ctx, in, t, failure{at: peer, err: err}) {
				return result, err
			}
			continue
		}
		if in.fresh.bounds() && in.reads && !p.stillFresh(in, peer) {
			conn.Release()
			continue
		}
		f := failure{at: peer, sent: true}
		w.writes, w.reads, w.sent.query = !p.solo && in.mayWrite(w.standby), in.reads, in.op.hasText()
		w.anew = in.reads && in.retry != RetryNever && !p.solo
		w.been = t.progress
		if t.account != nil {
			t.account.sent = true
		}
		result, f.end, f.err = try(conn, w, run)
		if f.err == nil {
			return result, nil
		}
		if !p.goOn(ctx, in, t, f) {
			return result, p.mark(ctx, in, f)
		}
	}
}

// offers reports whether a peer that a call has not tried has a connection free for it.
func (p *MultiPool) offers(in *intent, been *tried) bool {
	in.fresh.now = p.clock()
	q := p.topology.Load().pickPlainly(in, been)
	return q != nil && !been.has(q) && q.hasFree()
}

// stillFresh reports whether a peer is within the call's bound on lag now that it has a connection: it may have waited.
func (p *MultiPool) stillFresh(in *intent, q *peer) bool {
	in.fresh.now = p.clock()
	return in.fresh.holds(q)
}

// lapsed returns why a connection that a call has got is of no use to it any more, nil if it is. The call may have waited
// for it, and the news of meanwhile, which cut what was in use, did not find it. The connection counts as in use by now:
// what is published from here on does.
func (p *MultiPool) lapsed(in *intent, t *trail, q *peer, w *wire) error {
	switch top := p.topology.Load(); {
	case p.solo:
		return nil
	case w.use.reading() && Health(q.health.Load()) == HealthDown:
		return errPeerDown
	case in.place == placePrimary && p.config.Mode != ModeOrdered && Role(q.role.Load()) == RoleReplica:
		return errLapsed // it came back as a replica, and its first new connection was the first to say so
	case top == t.picked:
		return nil
	case in.place == placePrimary && !contains(top.writes, q), !in.reads && top.withholds(q), top.replaced(q):
		return errLapsed
	}
	return nil
}

// findsLost reports whether a connection turns out to be lost before the call is sent on it. It is asked where the call has lost
// one already, and for what is sent only once.
func (in *intent) findsLost(t *trail, w *wire) bool {
	switch {
	case w.peer.solo:
		return false
	case t.resent > 0:
		return w.eye.look() >= glimpsePending
	}
	return in.onlyOnce() && w.eye.look() == glimpseDead
}

// errLapsed is of a peer that has lost the office for which it was chosen. Nothing has been sent to it.
var errLapsed = pgfault.Unavailable("multipool: the peer is not the primary any more")

// errGone is of a connection that was found to be lost before the call was sent.
var errGone = fmt.Errorf("multipool: the connection was lost: %w", io.EOF)

// try runs a call on a connection. Where the call succeeds, run has seen to the connection: released it, or given it to
// the result. Where it fails, or panics, the connection is released here, after what it tells of its session has been
// taken: a moment later it is somebody else's.
func try[T any](conn *pgxpool.Conn, w *wire, run func(*pgxpool.Conn, *wire) (T, error)) (result T, end pgfault.Ending, err error) {
	failed := true
	defer releaseIf(&failed, conn)
	result, err = run(conn, w)
	if err == nil {
		failed = false
		return result, pgfault.Ending{}, nil
	}
	end = w.ending()
	if end.Recovers = w.recovers(err); end.Recovers {
		w.leftBehind(conn.Conn())
	}
	return result, end, err
}

// releaseIf is no closure: one that captured the results would move them to the heap's ways on the common path.
func releaseIf(failed *bool, conn *pgxpool.Conn) {
	if *failed {
		conn.Release()
	}
}

// failure is a failed attempt.
type failure struct {
	at   *peer
	err  error
	sent bool           // a connection had taken the call
	end  pgfault.Ending // ... and what it tells
}

// astray reports whether a call that wants the primary has met a standby at the address of one: no server has executed it, so it
// goes on for as long as it may wait, as one that has found no connection does.
func (p *MultiPool) astray(in *intent, v pgfault.Verdict, f failure) bool {
	return f.end.Recovers && v.Class == pgfault.Refused && v.Outcome == pgfault.NotExecuted &&
		in.place == placePrimary && in.op != opCopy && in.retry != RetryNever && p.config.Mode != ModeOrdered
}

// crashed reports that the statement's connection was lost without a word: the statement may be the cause.
func (f *failure) crashed() bool {
	unsent := pgfault.NeverSent(f.err) || errors.Is(f.err, pgconn.ErrConnClosed)
	return f.end.Lost && !unsent && !pgfault.AnsweredByServer(f.err)
}

// verdict judges a failure of the call, with what only the pool knows of it: the call's text, the role that the peer is
// known by, and whether it was the pool that was closed or one of its peers.
func (p *MultiPool) verdict(ctx context.Context, in *intent, f *failure, seenAs Role) pgfault.Verdict {
	if !f.sent {
		v := pgfault.Acquire(ctx, f.err, seenAs == RoleReplica)
		if v.Class == pgfault.Closed && !p.closed.Load() {
			v.Class = pgfault.Server // the peer was removed after it had been chosen
		}
		return v
	}
	v := pgfault.Statement(ctx, f.err, f.end)
	if v.Class == pgfault.Refused && v.Outcome == pgfault.InPart && f.end.Recovers && in.op != opRewritten && sqltext.RefusedWhole(in.sql) {
		v.Outcome = pgfault.NotExecuted
	}
	return v
}

// poisonous reports whether a read has lost its connection on two servers that both live, nothing having been known against
// them before: then it may be what ends its sessions there. Whether they live their monitors are about to tell: a crash
// ends the monitor's session too, so that a suspicion alone tells nothing.
func (p *MultiPool) poisonous(ctx context.Context, t *trail, q *peer) bool {
	if t.picked != nil && t.picked.member(q).health != HealthUp {
		return false
	}
	if t.fell == nil || t.fell == q {
		t.fell = q
		return false
	}
	return p.lives(ctx, t.fell) && p.lives(ctx, q)
}

// lives waits for what comes of a suspicion, and reports whether the peer's server answers, if only that it recovers.
func (p *MultiPool) lives(ctx context.Context, q *peer) bool {
	for {
		top := p.topology.Load()
		m := top.member(q)
		if m == nil || m.health != HealthSuspect {
			return m != nil && m.health != HealthDown
		}
		select {
		case <-top.superseded:
		case <-p.lifetime.Done():
			return false
		case <-ctx.Done():
			return false
		}
	}
}

// intend works out what a call wants.
func (p *MultiPool) intend(ctx context.Context, op operation, sql string, in *intent) error {
	if p.closed.Load() {
		return ErrClosedPool
	}
	r := p.routeOf(ctx)
	if r.err != nil {
		return r.err
	}
	n := sqltext.Unknown
	if op.hasText() && !p.solo {
		n = p.texts.Of(sql) // an explicit route says where, not that the text does not write
	}
	in.decide(op, sql, n, r)
	if p.solo && !in.forced {
		in.reason = ReasonOnePeer
	}
	in.forced = in.forced || p.config.Mode == ModeOrdered // there is nobody else to send it to
	return nil
}

// mayResend reports whether the call, lost on this connection before its first row, would be sent again.
func (in *intent) mayResend(w *wire) bool {
	return in.retry != RetryNever && (w.standby || in.retry == RetryReads) && !w.peer.solo
}

// choose returns the peer of the next attempt, waiting where no peer can take it.
func (p *MultiPool) choose(ctx context.Context, in *intent, t *trail) (*peer, error) {
	for {
		top := p.topology.Load()
		if in.fresh.bounds() {
			in.fresh.now = p.clock()
		}
		chosen, reason := top.pick(in, &t.tried)
		if chosen != nil {
			t.attempt++
			t.picked = top
			t.guest = in.reads && in.place == placeReads && chosen == top.primary
			if t.last != nil { // else the last attempt was given up before it was sent, and this is a first choice
				reason = t.reason
			}
			p.routed(ctx, in, t, chosen, reason)
			return chosen, nil
		}
		if t.last != nil && !top.unseen && (!t.waits || t.tried.full()) {
			return nil, t.last
		}
		// The snapshot may have changed since the last attempt was picked: the peers that were tried may have been judged.
		if t.picked == nil || t.picked == top {
			if err := p.await(ctx, top, in, t); err != nil {
				return nil, err
			}
		}
		t.tried.n, t.picked = 0, nil
		if in.peers != nil {
			in.peers = p.routeOf(ctx).peers // one that is named may have come meanwhile
		}
	}
}

// routed counts a decision and tells the hook.
func (p *MultiPool) routed(ctx context.Context, in *intent, t *trail, chosen *peer, reason Reason) {
	switch {
	case t.attempt > 1:
		chosen.picks.retries.Add(1)
	case in.reads:
		chosen.picks.reads.Add(1)
	default:
		chosen.picks.writes.Add(1)
	}
	hook := p.hooks.Routed
	if hook == nil && t.account == nil {
		return
	}
	d := Decision{Peer: chosen.name, Reason: reason, Attempt: int(t.attempt), Kind: in.kind()}
	if t.account != nil {
		t.account.routed(d)
	}
	if hook != nil {
		hook(ctx, d)
	}
}

// goOn judges a failed attempt and prepares the next; false: there is none.
func (p *MultiPool) goOn(ctx context.Context, in *intent, t *trail, f failure) bool {
	if p.solo {
		return false
	}
	seenAs := Role(f.at.role.Load())
	v := p.verdict(ctx, in, &f, seenAs)
	standby := f.end.Standby && seenAs != RolePrimary || f.sent && f.end.Recovers
	astray := p.astray(in, v, f)
	next := in.after(v, f.sent && !astray, standby)
	if next == stepStop {
		return false
	}
	rerouted := next == stepPrimary && in.place != placePrimary              // once per call, and what a replica refuses was not done
	if f.sent && !pgfault.PoolerHasNoServer(f.err) && !astray && !rerouted { // what a pooler has not forwarded was not sent
		if v.Class == pgfault.Server && f.crashed() {
			if p.poisonous(ctx, t, f.at) {
				return false
			}
			if in.place == placeAny {
				in.place = placeReads // the primary last
			}
		}
		if t.resent++; t.resent > maxResent || !p.budget.Take(time.Now(), p.readsSoFar()) {
			return false
		}
	}
	t.tried.add(f.at)
	t.last, t.reason = f.err, ReasonRetry
	t.waits = v.Transient() || t.outdated(f.err)
	if v.Class == pgfault.Refused {
		p.refused(in, t, f)
	}
	if next == stepPrimary {
		in.place, t.reason = placePrimary, ReasonRefused
		in.reads = in.reads && v.Class == pgfault.Behind // what a standby refuses writes
	}
	return true
}

// outdated reports whether an error is that of a dial before the call's first: what refused us may have been mended since, and
// the call waits until it has been tried.
func (t *trail) outdated(err error) bool {
	var held heldBack
	if !errors.As(err, &held) {
		return false
	}
	if t.held.IsZero() {
		t.held = time.Now()
	}
	return !held.since.After(t.held)
}

// refused learns from a standby's refusal: of a read, that its text needs the primary; of a write, that the peer is no
// primary.
func (p *MultiPool) refused(in *intent, t *trail, f failure) {
	t.waits = true
	switch {
	case !f.sent:
	case pgfault.SessionRefused(f.err):
		// Every statement of such sessions fails here; this one's text is not to blame.
		p.observe(observation{peer: f.at, hostile: f.err})
	case in.reads && in.sql != "":
		p.texts.Learn(in.sql)
	case !in.reads:
		f.at.isReplica() // where the role is asked its monitor has been nudged, and asks
	}
}

// mark returns the error as the caller gets it: a write that may have run says so.
func (p *MultiPool) mark(ctx context.Context, in *intent, f failure) error {
	switch {
	case p.solo, !in.mayWrite(f.end.Standby && Role(f.at.role.Load()) != RolePrimary):
		return f.err
	case in.reads && in.readText() != "" && !sqltext.MayWrite(in.sql):
		return f.err
	}
	return markUnknown(ctx, f.end, f.err)
}

// retryPause is how long a call waits for news before it tries a peer again that has just failed it.
const retryPause = 50 * time.Millisecond

// await blocks until a newer topology than top has been published, the caller's context or the time to wait ends, or
// the pool closes.
func (p *MultiPool) await(ctx context.Context, top *topology, in *intent, t *trail) error {
	if top.hopeless(in) {
		return p.askAgain(ctx, top, in, t)
	}
	now := time.Now()
	if t.until.IsZero() {
		t.until = now.Add(p.config.Wait)
	}
	left := t.until.Sub(now)
	waiting := p.waits(&p.waiting)
	defer p.waiting.Add(-1)
	if top.begins() {
		// First looks are under way: no peer is lost yet, so even a call that is not to wait waits for them, and however
		// many there are.
		left = max(left, 2*lookTimeout)
	} else if left <= 0 || waiting > int64(p.config.MaxWaiting) {
		return p.noPeer(top, in, t, nil)
	}
	until := left
	if top.takes(in) || in.fresh.bounds() {
		// A peer could take the call that has just failed it, and perhaps no news comes of that: a connection was stale.
		// That a replica has caught up is no news either.
		left = min(left, retryPause)
	}
	defer p.want(top, in)()
	timer := time.NewTimer(left)
	defer timer.Stop()
	select {
	case <-top.superseded:
		return nil
	case <-ctx.Done():
		return p.noPeer(top, in, t, ctx.Err())
	case <-p.lifetime.Done():
		return ErrClosedPool
	case <-timer.C:
		if left < until {
			return nil
		}
		if latest := p.topology.Load(); latest != top {
			return nil
		}
		return p.noPeer(top, in, t, nil)
	}
}

// askAgain has those looked at that refuse us, as a password may have been mended since: pgxpool would try it for this call.
// It returns nil once one of them does not, and an error when all do that have been asked since the call came.
func (p *MultiPool) askAgain(ctx context.Context, top *topology, in *intent, t *trail) error {
	waiting := p.waiting.Add(1)
	defer p.waiting.Add(-1)
	if waiting > int64(p.config.MaxWaiting) {
		return p.noPeer(top, in, t, ctx.Err())
	}
	var looks []<-chan struct{}
	for _, q := range top.refusing(in) {
		looks = append(looks, q.monitor.lookAgain())
	}
	for len(looks) > 0 && top.hopeless(in) {
		select {
		case <-looks[0]:
			looks = looks[1:]
		case <-top.superseded:
		case <-ctx.Done():
			return p.noPeer(top, in, t, ctx.Err())
		case <-p.lifetime.Done():
			return ErrClosedPool
		}
		top = p.topology.Load()
	}
	if top.hopeless(in) {
		return p.noPeer(top, in, t, ctx.Err())
	}
	return nil
}

// want has those tried soon that are out and could serve a call that waits, until it waits no more.
func (p *MultiPool) want(top *topology, in *intent) (enough func()) {
	var wanted []*monitor
	for i := range top.members {
		if m := &top.members[i]; !m.stands() && !m.foreign && !m.drained && top.could(m, in) {
			wanted = append(wanted, m.peer.monitor)
			if m.peer.monitor.wanted.Add(1) == 1 {
				m.peer.monitor.nudge()
			}
		}
	}
	return func() {
		for _, m := range wanted {
			m.wanted.Add(-1)
		}
	}
}

// waits counts one that waits, and returns how many of the kind there are. While there is no primary, peers are looked at
// eagerly from the first on.
func (p *MultiPool) waits(kind *atomic.Int64) int64 {
	waiting := kind.Add(1)
	if waiting == 1 && len(p.topology.Load().writes) == 0 {
		p.nudgeAll()
	}
	return waiting
}

// awaited reports whether anybody waits.
func (p *MultiPool) awaited() bool { return p.waiting.Load() > 0 || p.attending.Load() > 0 }

func (p *MultiPool) noPeer(top *topology, in *intent, t *trail, ended error) error {
	e := &NoPeerError{Intent: in.needs(), Peers: top.causes(in), discovery: p.discovery.failure()}
	e.lost = e.Intent == IntentPrimary && in.peers == nil && top.headless()
	if ended != nil {
		e.also = append(e.also, ended)
	}
	if t.last != nil {
		e.also = append(e.also, t.last)
	}
	if top.split && e.Intent == IntentPrimary {
		e.also = append(e.also, ErrSplitBrain)
	}
	return e
}
