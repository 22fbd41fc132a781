package bench

import (
	"context"
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/pgmultipool/multipool"
)

type depthKey int

// deep is a context as it reaches the database in a program: some layers have put values into it, and it can be
// cancelled.
func deep(tb testing.TB, depth int) context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	tb.Cleanup(cancel)
	for i := range depth - 1 {
		ctx = context.WithValue(ctx, depthKey(i), i)
	}
	return ctx
}

// manyPeers opens a pool of so many peers that a connection to watch each by would be a waste.
func manyPeers(tb testing.TB, peers int) *multipool.MultiPool {
	return newCluster(tb, peers).multi(tb, 4, func(c *multipool.Options) { c.NoMonitorConns = true })
}

// BenchmarkExplain is the routing decision with what Explain adds to it. It must not depend on the number of peers.
func BenchmarkExplain(b *testing.B) {
	for _, peers := range []int{2, 3, 16, 1024} {
		b.Run(fmt.Sprintf("peers=%d", peers), func(b *testing.B) {
			p := manyPeers(b, peers)
			ctx := deep(b, 4)
			for range 3 { // a text is remembered when it comes again
				decision, err := p.Explain(ctx, selectOne)
				require.NoError(b, err)
				require.NotEmpty(b, decision.Peer)
			}
			b.ReportAllocs()
			for b.Loop() {
				_, _ = p.Explain(ctx, selectOne)
			}
		})
	}
}
