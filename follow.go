package multipool

import (
	"context"
	"math"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/pgmultipool/multipool/internal/quota"
)

// PrimaryPool returns a pgxpool for code that needs the concrete type and keeps it. Every connection that it hands out
// is one to the current primary, also after a promotion. Every call of PrimaryPool returns the same pool, which the
// first one makes. It never returns nil.
//
//   - While there is no primary, an acquire waits for one, within its context and Options.Wait. Then it fails with a
//     [NoPeerError] that matches [ErrNoPrimary]. Nothing was sent.
//   - When the primary changes, idle connections to the old one are closed. Connections in use are closed when they are
//     released, or earlier if the pool finds the old primary down or replaced. A call in flight fails as on a pgxpool:
//     nothing is routed, sent again or marked, but the outcomes count for the health of the peer.
//   - If a server dies while a connection to it is made, the connection is made to the next primary instead. If that peer
//     has joined the pool in the meantime, making the connection fails with a [NoPeerError], and the next connection is
//     made there.
//   - MaxConns limits the connections to every server: all pools of the MultiPool share that many connection slots. If
//     they need more than there are, every pool gets equally many, except that one that needs fewer leaves the rest. A
//     hijacked connection keeps its slot until it is closed. MaxConns in the Stat of this pool adds up several servers
//     and is no limit.
//   - MinConns and MinIdleConns have no effect. Connections are made when they are needed.
//   - The program's hooks and tracers in the configuration are called as for the pools of the peers. BeforeConnect is
//     called for every server that is tried, and every server gets its own client certificate. A change that
//     BeforeConnect makes inside the TLSConfig holds for every server. A different TLSConfig, or different Fallbacks,
//     hold for the first server that is tried only.
//   - Its Config has all hosts of the configuration except those of Options.Peers, and connects to the primary. The
//     MultiPool does not manage connections that the program makes from it.
//
// Close of the MultiPool closes this pool too, and waits for its connections. In a pool of one peer, PrimaryPool
// returns the pool of that peer.
func (p *MultiPool) PrimaryPool() *pgxpool.Pool { return p.followers.get(p, quota.Primary) }

// ReplicaPool is like [MultiPool.PrimaryPool], for reads. Its connections are spread over the healthy replicas. If no
// replica can serve, they go to the primary, as those of Query do, but leave Options.WriteReserve free.
//
// A new connection goes to the replica with the fewest connections of this pool. After replicas have come or gone, the
// pool evens out its connections under load: every 100 ms it closes one that it would have handed out, if its replica
// has one too many and another has one too few. A replica that has just come back is due a tenth of its share at first,
// and all of it after ten seconds.
//
// Its sessions cannot write, except those on the primary.
func (p *MultiPool) ReplicaPool() *pgxpool.Pool { return p.followers.get(p, quota.Replicas) }

// WaitForPrimary waits until there is a primary that takes writes, and returns nil; it does so at once if there is one.
// It waits until ctx ends, whatever Options.Wait and MaxWaiting are. Its error then matches [ErrNoPrimary] and the
// context's error. On a closed pool it returns [ErrClosedPool]. In a pool of one peer, which has no health checks, it
// asks the server repeatedly until it is not a standby.
func (p *MultiPool) WaitForPrimary(ctx context.Context) error {
	in := wantsOf(quota.Primary)
	var t trail
	p.waits(&p.attending)
	defer p.attending.Add(-1)
	for {
		top := p.topology.Load()
		var again <-chan time.Time
		switch {
		case p.closed.Load():
			return ErrClosedPool
		case p.solo:
			var standby bool
			if t.last = p.QueryRow(ctx, lookSolo).Scan(&standby); t.last == nil && !standby {
				return nil
			}
			again = time.After(patientLook)
		case len(top.writes) > 0:
			return nil
		}
		select {
		case <-top.superseded:
		case <-again:
		case <-p.lifetime.Done():
		case <-ctx.Done():
			return p.noPeer(top, &in, &t, ctx.Err())
		}
	}
}

const lookSolo = `select pg_catalog.pg_is_in_recovery()`

// followers are the pools that follow. The zero value has made none.
type followers struct {
	mu     sync.Mutex  // nothing blocks under it
	made   []*follower // one of a kind
	closed bool
	ended  sync.WaitGroup
}

// get returns a pool that follows, and makes it if it is not there yet.
func (f *followers) get(p *MultiPool, k quota.Pool) *pgxpool.Pool {
	if p.solo {
		return p.peers()[0].pool
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, one := range f.made {
		if one.kind == k {
			return one.pool
		}
	}
	made := newFollower(p, k)
	f.made = append(f.made, made)
	if f.closed {
		made.pool.Close()
	} else {
		f.ended.Go(made.run)
	}
	return made.pool
}

// close begins to close the pools and lets no other come up; wait waits for it to end. The owner's done is closed.
func (f *followers) close() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.closed = true
	for _, one := range f.made {
		f.ended.Go(one.pool.Close)
	}
}

// inUse reports whether there are any.
func (f *followers) inUse() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.made) > 0
}

func (f *followers) wait() { f.ended.Wait() }

func (f *followers) reset() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, one := range f.made {
		one.pool.Reset()
	}
}

// follower is a pool that follows: it has connections of the peers that the topology lists for its kind of calls. It
// reads the topology and publishes nothing.
type follower struct {
	owner   *MultiPool
	kind    quota.Pool
	intent  intent
	user    *pgxpool.Config // the program's hooks
	pool    *pgxpool.Pool
	surplus atomic.Pointer[peer] // has one connection too many; nil if none has
}

func newFollower(p *MultiPool, k quota.Pool) *follower {
	f := &follower{owner: p, kind: k, intent: wantsOf(k), user: p.peers()[0].config}
	for _, q := range p.peers() {
		q.shared.Store(true)
	}
	var err error
	f.pool, err = newPool(context.Background(), f.compose(), f.user)
	if err != nil {
		panic(err) // a pool without room for a connection: the peers' own have been made of the same
	}
	return f
}

// wantsOf is what the calls of a pool that follows want.
func wantsOf(k quota.Pool) intent {
	if k == quota.Replicas {
		return intent{op: opReadTx, place: placeReads, reads: true, reason: ReasonRead}
	}
	return intent{op: opAcquire, place: placePrimary, reason: ReasonWrite}
}

// compose returns the configuration of the pool: the program's, with our hooks chained after its own.
func (f *follower) compose() *pgxpool.Config {
	c := f.user.Copy()
	c.MinConns, c.MinIdleConns = 0, 0
	c.MaxConns = f.maxConns()
	if len(f.owner.config.Peers) == 0 {
		c.ConnConfig = f.owner.config.Config.ConnConfig.Copy() // of all hosts, for who copies it: the approach has its own
	}
	if c.ConnConfig.ValidateConnect == nil && f.owner.config.Mode == ModeReplicated {
		c.ConnConfig.ValidateConnect = checkOf(f.kind)
	}
	c.ConnConfig.Tracer = &followTracer{poolTracer: newPoolTracer(f.owner, f.user.ConnConfig.Tracer), follower: f}
	c.BeforeConnect = f.beforeConnect
	c.AfterConnect = afterConnect(f.user)
	c.AfterRelease = afterRelease(f.user)
	c.PrepareConn = f.prepareConn(sayOf(f.user))
	return c
}

// maxConns is room for the connections of all peers, and of more that there may be some day: the slots are the true bound.
func (f *follower) maxConns() int32 {
	most, all := int64(1), int64(0)
	for _, q := range f.owner.peers() {
		limit := int64(q.slots.Limit)
		most, all = max(most, limit), all+limit
	}
	return int32(min(max(all, maxDiscovered*most), math.MaxInt32))
}

// candidates are the peers that a call of the pool may use: those of the own zone where any of them can serve.
func (f *follower) candidates(top *topology) []*peer { return top.candidates(f.intent.place).peers }

// keeps reports whether connections of a peer are to stay: also of a replica under suspicion, which is often cleared.
func (f *follower) keeps(top *topology, q *peer) bool {
	if contains(f.candidates(top), q) {
		return true
	}
	m := top.member(q)
	return f.kind == quota.Replicas && m != nil && m.health == HealthSuspect && m.role == RoleReplica
}

// seek returns the peer that a call, or a connection, is to go to, and waits for one where there is none. Before it waits it has
// the seeker let go what it holds.
func (f *follower) seek(ctx context.Context, t *trail, choose func(*topology, *tried) *peer, letGo func()) (*peer, *topology, error) {
	for {
		top := f.owner.topology.Load()
		if q := choose(top, &t.tried); q != nil {
			t.picked = top
			return q, top, nil
		}
		// There may have been news since the last one was picked: then who has been tried may have been judged.
		if t.picked == nil || t.picked == top {
			letGo()
			if err := f.owner.await(ctx, top, &f.intent, t); err != nil {
				return nil, nil, err
			}
		}
		t.tried.n, t.picked = 0, nil
	}
}

// forCall chooses as for any call: of two drawn the less busy.
func (f *follower) forCall(top *topology, tried *tried) *peer {
	return twoDraws(top.candidates(f.intent.place), nil, tried)
}

// forConn chooses the peer of a new connection: the one that has the fewest for its share.
func (f *follower) forConn(top *topology, tried *tried) (chosen *peer) {
	least, alike := math.Inf(1), 0
	for _, q := range f.candidates(top) {
		if tried.has(q) {
			continue
		}
		has := float64(q.slots.Of(f.kind)+1) / float64(max(q.load.share.Load(), 1))
		switch {
		case has < least:
			chosen, least, alike = q, has, 1
		case has == least:
			if alike++; rand.IntN(alike) == 0 {
				chosen = q
			}
		}
	}
	return chosen
}

// run closes what is idle of peers that the pool has no use for any more, until the owner closes.
func (f *follower) run() {
	var tick <-chan time.Time
	if f.kind == quota.Replicas {
		ticker := time.NewTicker(watchTick)
		defer ticker.Stop()
		tick = ticker.C
	}
	var before []*peer
	for {
		top := f.owner.topology.Load()
		f.sweep(top, before)
		before = f.candidates(top)
		for same := true; same; {
			select {
			case <-top.superseded:
				same = false
			case <-tick:
				f.surplus.Store(f.overfull(top))
			case <-f.owner.lifetime.Done():
				return
			}
		}
	}
}

// sweep has the idle connections judged where there may be some that are not to stay, or that a verdict has cut. What is
// in use is judged when it is released.
func (f *follower) sweep(top *topology, before []*peer) {
	for _, q := range slices.Concat(f.owner.peers(), before) { // one may have been removed
		if (q.slots.Of(f.kind) > 0 || contains(before, q)) && !f.keeps(top, q) {
			for _, c := range f.pool.AcquireAllIdle(sweeping{context.Background()}) {
				c.Release()
			}
			return
		}
	}
}

// sweeping is the context of a sweep: the program is not asked for its say about connections that it will not get, nor told
// of their release.
type sweeping struct{ context.Context }

// overfull returns the peer that has one connection too many where another has one too few; nil if none has.
func (f *follower) overfull(top *topology) (most *peer) {
	list := f.candidates(top)
	conns, shares := 0.0, 0.0
	for _, q := range list {
		conns += float64(q.slots.Of(f.kind))
		shares += float64(q.load.share.Load())
	}
	over, under := 0.0, 0.0
	for _, q := range list {
		more := float64(q.slots.Of(f.kind)) - conns*float64(q.load.share.Load())/shares
		if more > over {
			most, over = q, more
		}
		under = max(under, -more)
	}
	if over < 1 || under < 1 {
		return nil
	}
	return most
}

// prepareConn has the last word on a connection that is to be handed out: its peer must be one of the pool's, and its
// call moves there with its permit.
func (f *follower) prepareConn(say func(context.Context, *pgx.Conn) (bool, error)) func(context.Context, *pgx.Conn) (bool, error) {
	return func(ctx context.Context, conn *pgx.Conn) (bool, error) {
		w := wireOf(conn)
		top := f.owner.topology.Load()
		if _, swept := ctx.(sweeping); swept {
			w.quiet = f.keeps(top, w.peer)
			w.swept = w.quiet
			return w.quiet && w.use.claim(), nil
		}
		if !contains(f.candidates(top), w.peer) || f.shed(top, w.peer) {
			return false, nil
		}
		c, _ := ctx.(*call)
		if c != nil && !c.move(w.peer, top) {
			return false, nil // no room for the call there: somebody is about to want its slot
		}
		ok, err := w.claim(ctx, conn, say)
		if ok && err == nil && c != nil {
			c.handOver(w)
		}
		return ok, err
	}
}

// shed reports whether a connection of the peer is to go, once for every time that it was found to have too many. It has
// to have them still: the count may have been taken while one was on its way elsewhere.
func (f *follower) shed(top *topology, q *peer) bool {
	return f.surplus.Load() == q && f.surplus.CompareAndSwap(q, nil) && f.overfull(top) == q
}

// followTracer is the tracer of a pool that follows: it lets calls in, one by one in front of the pool, and has the
// last look at what is released.
type followTracer struct {
	poolTracer
	follower *follower
}

// TraceAcquireStart waits for a peer and a permit there, under the caller's own context: behind the pool nothing knows
// that. Where there is none to be had the call goes on with a context that has ended, with the error.
func (t *followTracer) TraceAcquireStart(ctx context.Context, pool *pgxpool.Pool, d pgxpool.TraceAcquireStartData) context.Context {
	ctx = t.tellAcquire(ctx, pool, d)
	if pool != t.pool {
		return ctx
	}
	c := &call{follower: t.follower, traced: ctx}
	c.Context, c.end = context.WithCancel(ctx)
	if err := c.enter(); err != nil {
		c.fail(err)
	}
	return c
}

// TraceAcquireEnd ends what of the call has not gone over to a connection.
func (t *followTracer) TraceAcquireEnd(ctx context.Context, pool *pgxpool.Pool, d pgxpool.TraceAcquireEndData) {
	if c, ok := ctx.(*call); ok {
		c.leave()
		ctx = c.traced
	}
	t.tellAcquired(ctx, pool, d)
}

// TraceRelease closes a connection that nobody of the pool is to have after this caller.
func (t *followTracer) TraceRelease(pool *pgxpool.Pool, d pgxpool.TraceReleaseData) {
	f := t.follower
	if pool == t.pool && !f.keeps(f.owner.topology.Load(), wireOf(d.Conn).peer) {
		farewell(d.Conn)
	}
	t.poolTracer.TraceRelease(pool, d)
}
