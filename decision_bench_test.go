package multipool

import (
	"context"
	"fmt"
	"testing"
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

// idlePool is a pool of n idle peers without servers: the first is the primary.
func idlePool(n int) *MultiPool {
	p := &MultiPool{}
	var peers []*peer
	believed := make([]Role, n)
	for i := range n {
		q := &peer{name: fmt.Sprintf("p%d", i), owner: p}
		q.load.limit = 100
		q.load.share.Store(fullShare)
		peers = append(peers, q)
		believed[i] = RoleReplica
	}
	believed[0] = RolePrimary
	p.route.Store(&resolution{pool: p})
	p.topology.Store(newTopology(ModeReplicated, peers, believed))
	for _, q := range p.peers() {
		p.observe(observation{peer: q, health: healthUp})
	}
	return p
}

// BenchmarkDecision is the routing decision alone: a known text, a context of depth 4.
func BenchmarkDecision(b *testing.B) {
	const sql = "select id, name, created_at from items where id = $1 and owner = $2"
	for _, n := range []int{2, 16, 1024} {
		p := idlePool(n)
		ctx := deep(4)
		p.needs.of(sql)
		p.needs.of(sql)
		b.Run(fmt.Sprintf("peers=%d", n), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				var in intent
				_ = p.intend(ctx, opQuery, sql, &in)
				if q, _ := p.topology.Load().pick(&in, &tried{}); q == nil {
					b.Fatal("nobody")
				}
			}
		})
	}
}

func TestTheDecisionAllocatesNothing(t *testing.T) {
	p := idlePool(16)
	ctx := deep(4)
	var none int
	allocs := testing.AllocsPerRun(1000, func() {
		var in intent
		_ = p.intend(ctx, opQuery, "select 1", &in)
		if q, _ := p.topology.Load().pick(&in, &tried{}); q == nil {
			none++
		}
	})
	if allocs != 0 || none != 0 {
		t.Fatalf("%v allocations, %d without a peer", allocs, none)
	}
}
