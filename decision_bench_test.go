package multipool

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"
)

type ctxDepth int

// deep is a context of the given depth, as a server's middlewares make them.
func deep(n int) context.Context {
	ctx := context.Background()
	for i := range n {
		ctx = context.WithValue(ctx, ctxDepth(i), i)
	}
	return ctx
}

// idlePool is a pool of n idle peers without servers: the first is the primary. change, where it is not nil, is told of
// every replica.
func idlePool(n int, b Balancer, change func(i int, q *peer)) *MultiPool {
	p := &MultiPool{}
	var peers []*peer
	believed := make([]Role, n)
	for i := range n {
		q := &peer{name: fmt.Sprintf("p%d", i), owner: p}
		q.load.limit = 100
		q.load.share.Store(fullShare)
		q.roundTrip.note(time.Duration(i%3+1) * time.Millisecond)
		if change != nil {
			change(i, q)
		}
		peers = append(peers, q)
		believed[i] = RoleReplica
	}
	believed[0] = RolePrimary
	p.route.Store(&resolution{pool: p})
	top := newTopology(ModeReplicated, peers, believed)
	top.balancer = b
	p.allUp(top)
	return p
}

// allUp makes the topology the pool's, with every peer well. It is what an observation of each would make of it, which takes
// seconds with 1,024 peers.
func (p *MultiPool) allUp(top *topology) {
	for i := range top.members {
		m := &top.members[i]
		m.health, m.steady = HealthUp, true
		m.peer.health.Store(int32(m.health))
		m.peer.role.Store(int32(m.role))
	}
	top.members[0].health = HealthUnknown // until the one observation that lists them
	p.topology.Store(top)
	p.observe(observation{peer: top.members[0].peer, health: HealthUp})
}

// benchmarkedPools are the pools whose decisions are measured, by what chooses.
func benchmarkedPools(n int) map[string]*MultiPool {
	return map[string]*MultiPool{
		"default":     idlePool(n, nil, nil),
		"weights":     idlePool(n, nil, func(i int, q *peer) { q.load.weight = float64(i%4 + 1) }),
		"zones":       idlePool(n, nil, func(i int, q *peer) { q.away = i%2 == 0 }),
		"round-robin": idlePool(n, RoundRobin(), nil),
		"nearest":     idlePool(n, Nearest(), nil),
		"program":     idlePool(n, firstUsable{}, nil),
	}
}

// firstUsable is a balancer that asks all there is to ask.
type firstUsable struct{}

func (firstUsable) Pick(c Candidates) int {
	for i := range c.Len() {
		known := c.Latency(i)+c.RoundTrip(i) > 0 && c.Weight(i) > 0 && c.Name(i) != "" && c.Zone(i) == ""
		if known && c.InFlight(i) == 0 && c.Role(i) == RoleReplica && c.Usable(i) {
			return i
		}
	}
	return -1
}

const benchmarkedText = "select id, name, created_at from items where id = $1 and owner = $2"

// decideOnce makes one routing decision, and reports whether somebody was chosen.
func decideOnce(ctx context.Context, p *MultiPool) bool {
	var in intent
	_ = p.intend(ctx, opQuery, benchmarkedText, &in)
	q, _ := p.topology.Load().pick(&in, &tried{})
	return q != nil
}

// BenchmarkDecision is the routing decision alone: a known text, a context of depth 4.
func BenchmarkDecision(b *testing.B) {
	for _, n := range []int{2, 3, 16, 1024} {
		pools := benchmarkedPools(n)
		for _, by := range sortedKeys(pools) {
			p, ctx := pools[by], deep(4)
			p.texts.Of(benchmarkedText)
			p.texts.Of(benchmarkedText)
			b.Run(fmt.Sprintf("by=%s/peers=%d", by, n), func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					if !decideOnce(ctx, p) {
						b.Fatal("nobody")
					}
				}
			})
		}
	}
}

// routings are contexts and modes under which the same read is decided, as a program meets them: made once for many calls.
func routings(n int) map[string]func() bool {
	replicated := func(r Route, models map[string]Route) *MultiPool {
		p := idlePool(n, nil, nil)
		p.config.Models = models
		p.config.Route = r
		p.route.Store(p.resolveRoute(r))
		return p
	}
	mode := func(m Mode) *MultiPool {
		p := idlePool(n, nil, nil)
		p.config.Mode = m
		p.allUp(newTopology(m, p.peers(), slices.Repeat([]Role{RolePrimary}, n)))
		return p
	}
	plain := replicated(Route{}, map[string]Route{"users": {Target: TargetPreferReplica}})
	router, err := NewRouter(plain, map[string]*MultiPool{"users": plain})
	if err != nil {
		panic(err)
	}
	decides := func(p *MultiPool, ctx context.Context) func() bool {
		p.texts.Of(benchmarkedText)
		p.texts.Of(benchmarkedText)
		return func() bool { return decideOnce(ctx, p) }
	}
	users := WithModel(deep(4), "users")
	return map[string]func() bool{
		"plain":      decides(plain, deep(4)),
		"primary":    decides(plain, WithPrimary(deep(4))),
		"peer":       decides(plain, WithPeer(deep(4), plain.peers()[1].name)),
		"model":      decides(plain, users),
		"any":        decides(replicated(Route{Target: TargetAny}, nil), deep(4)),
		"router":     func() bool { return decideOnce(users, router.Pool(users)) },
		"equivalent": decides(mode(ModeEquivalent), deep(4)),
		"ordered":    decides(mode(ModeOrdered), deep(4)),
	}
}

// BenchmarkRouting is the same decision under a route, a model, another mode, a router.
func BenchmarkRouting(b *testing.B) {
	for _, n := range []int{3, 1024} {
		all := routings(n)
		for _, name := range sortedKeys(all) {
			b.Run(fmt.Sprintf("%s/peers=%d", name, n), func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					if !all[name]() {
						b.Fatal("nobody")
					}
				}
			})
		}
	}
}

func TestRoutingAllocatesNothing(t *testing.T) {
	for _, n := range []int{3, 1024} {
		for name, decide := range routings(n) {
			allocs := testing.AllocsPerRun(1000, func() {
				if !decide() {
					t.Error("nobody")
				}
			})
			if allocs != 0 {
				t.Errorf("%s, %d peers: %v allocations", name, n, allocs)
			}
		}
	}
}

func TestTheDecisionAllocatesNothing(t *testing.T) {
	for _, n := range []int{2, 3, 16, 1024} {
		for by, p := range benchmarkedPools(n) {
			ctx := deep(4)
			if allocs := testing.AllocsPerRun(1000, func() {
				if !decideOnce(ctx, p) {
					t.Error("nobody")
				}
			}); allocs != 0 {
				t.Errorf("%s, %d peers: %v allocations", by, n, allocs)
			}
		}
	}
}
