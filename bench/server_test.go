package bench

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"

	"github.com/pgmultipool/multipool"
	"github.com/pgmultipool/multipool/internal/pgtest"
)

// servers starts a real primary with two standbys that has the tables of the calls, or skips.
func servers(tb testing.TB) *pgtest.Cluster {
	tb.Helper()
	c := pgtest.Start(tb, pgtest.Options{Standbys: 2})
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	for _, sql := range []string{
		"create table account (id int primary key, owner text)",
		"insert into account select i, 'owner ' || i from generate_series(1, 1000) i",
		"create table entry (account int, note text)",
	} {
		require.NoError(tb, c.Primary().Exec(ctx, sql))
	}
	require.NoError(tb, c.WaitCaughtUp(ctx))
	return c
}

// onServers sets up a comparison on one real server: reads on one standby, to which multipool is pinned, writes on the
// primary.
func onServers(tb testing.TB, cluster *pgtest.Cluster, c call, n int, turn time.Duration) *trial {
	tb.Helper()
	ctx := context.Background()
	server := cluster.Primary()
	contextOf := setting{}.context(tb)
	pinned := contextOf
	if c.reads {
		server = cluster.Standbys()[0]
		pinned = func() context.Context { return multipool.WithPeer(contextOf(), server.Addr()) }
	}
	conns := fmt.Sprintf("pool_max_conns=%d", min(n, 16))
	open := func() *pgxpool.Pool {
		p, err := pgxpool.New(ctx, server.ConnString(conns))
		require.NoError(tb, err)
		tb.Cleanup(p.Close)
		return p
	}
	one, same := open(), open()
	multi, err := multipool.New(ctx, cluster.ConnString(conns))
	require.NoError(tb, err)
	tb.Cleanup(multi.Close)
	waitUp(tb, multi)
	t := newTrial(tb, [sides][]caller{
		bare:    c.with(one, n, contextOf),
		control: c.with(same, n, contextOf),
		ours:    c.with(multi, n, pinned),
	}, wallTime, turn)
	// On which core a server's process lies is worth a fifth of a call, and it stays there for long: one set of
	// connections would compare the scheduler's choices.
	t.refresh = func() {
		one.Reset()
		same.Reset()
		multi.Reset()
	}
	return t
}

// BenchmarkServer is for orientation: the control shows that it cannot resolve what multipool costs.
func BenchmarkServer(b *testing.B) {
	cluster := servers(b)
	for _, c := range calls {
		b.Run(c.name, func(b *testing.B) {
			for _, n := range []int{1, 64} {
				b.Run(fmt.Sprintf("callers=%d", n), func(b *testing.B) {
					onServers(b, cluster, c, n, 3*time.Millisecond).benchmark(b)
				})
			}
		})
	}
}
