package multipool

import (
	"context"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/pgmultipool/multipool/internal/pgfake"
	"github.com/pgmultipool/multipool/internal/pgtest"
)

// A synchronous standby freezes: what writes waits for it, in twice as many calls as there are connections, and reads go on at
// the primary.
func TestWritesThatWaitForAStandbyLeaveReadsAConnection(t *testing.T) {
	c := pgtest.Start(t, pgtest.Options{Standbys: 1, SyncApply: true})
	must(t, c, "create table log (id serial primary key, note text)")
	p := openPool(t, Options{}, c.ConnString("pool_max_conns=3"))
	waitUp(t, p)
	ctx := testContext(t)
	standby := c.Standbys()[0]
	require.NoError(t, standby.Freeze())
	var writes sync.WaitGroup
	for range 2 {
		writes.Go(func() {
			_, err := p.Exec(ctx, "insert into log (note) values ('exec')")
			assert.NoError(t, err)
		})
		writes.Go(func() {
			assert.NoError(t, p.QueryRow(ctx, "insert into log (note) values ('row') returning id").Scan(new(int)))
		})
		writes.Go(func() {
			b := &pgx.Batch{}
			b.Queue("insert into log (note) values ('batch')")
			assert.NoError(t, p.SendBatch(ctx, b).Close())
		})
	}
	waitFor(t, "the standby to be down", time.Minute, func() bool {
		return p.Status().Peers[1].Health == HealthDown
	})
	primary, err := c.Primary().Conn(ctx)
	require.NoError(t, err)
	defer primary.Close(context.WithoutCancel(ctx))
	waitFor(t, "writes to wait for it", time.Minute, func() bool {
		var n int
		require.NoError(t, primary.QueryRow(ctx, "select count(*) from pg_stat_activity where wait_event = 'SyncRep'").Scan(&n))
		return n == 2
	})
	within := withTimeout(t, 20*time.Second)
	for range 100 {
		require.NoError(t, p.QueryRow(within, "select 1").Scan(new(int)))
		require.NoError(t, p.QueryRow(WithPrimary(within), "select 1").Scan(new(int)))
	}
	require.NoError(t, standby.Thaw())
	writes.Wait()
	var n int
	require.NoError(t, p.QueryRow(WithPrimary(ctx), "select count(*) from log").Scan(&n))
	assert.Equal(t, 6, n)
}

// The places are of the primary whose commits wait, of nobody else, and of calls that commit by themselves.
func TestWritesLeaveConnectionsAloneWhereTheyMayWait(t *testing.T) {
	for name, tc := range map[string]struct {
		awaits bool
		conns  int32
		atOnce int
	}{
		"nothing to wait for": {conns: 4, atOnce: 4},
		"four connections":    {awaits: true, conns: 4, atOnce: 3},
		"twenty":              {awaits: true, conns: 20, atOnce: 18},
		"one":                 {awaits: true, conns: 1, atOnce: 1},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, 1, func(c *Options) { c.Config.MaxConns = tc.conns }, func(ctx context.Context, x *fakes) {
				const write = "insert into t values (1)"
				stuck := true
				var mu sync.Mutex
				x.primary.Handle(func(s pgfake.Statement) *pgfake.Response {
					switch s.SQL {
					case lookFull, lookBrief:
						return lookAnswer(s, sight{role: RolePrimary, system: 1, timeline: 1, position: 8192, awaits: tc.awaits})
					case write:
						mu.Lock()
						defer mu.Unlock()
						if stuck && !s.Preparing {
							return &pgfake.Response{Hang: true, Tag: "INSERT 0 1"}
						}
					}
					return nil
				})
				time.Sleep(10 * time.Second) // a look
				within, giveUp := context.WithCancel(ctx)
				var writes sync.WaitGroup
				for range tc.conns + 5 {
					writes.Go(func() { _, _ = x.pool.Exec(within, write) })
				}
				settled()
				stat := x.pool.named("primary:5432").pool.Stat()
				assert.EqualValues(t, tc.atOnce, stat.AcquiredConns())
				if spare := int(tc.conns) - tc.atOnce; spare > 0 {
					tx, err := x.pool.Begin(withTimeout(x.t, time.Second))
					require.NoError(t, err, "a transaction is no such write")
					require.NoError(t, tx.Rollback(ctx))
				}
				giveUp()
				writes.Wait()
				mu.Lock()
				stuck = false
				mu.Unlock()
				_, err := x.pool.Exec(ctx, write)
				assert.NoError(t, err)
				assert.Empty(t, x.pool.named("primary:5432").writers, "every place is given back")
				x.atRest()
			})
		})
	}
}

// A look that has borrowed a connection counts as a call, and borrows none that is made where a call is to have it.
func TestABorrowedConnectionCounts(t *testing.T) {
	bubble(t, 1, nil, func(ctx context.Context, x *fakes) {
		x.read(ctx)
		settled()
		q := x.pool.named("replica1:5432")
		require.EqualValues(t, 1, q.made.Load())
		c, err := q.lend(ctx, true)
		require.NoError(t, err)
		require.EqualValues(t, 1, q.load.out.Load())
		require.False(t, q.hasFree(), "a call that comes now does not expect one")
		_, err = q.lend(ctx, true)
		require.Equal(t, errNoSession, err)
		require.EqualValues(t, 1, q.load.out.Load())
		c.Release()
		settled()
		require.Zero(t, q.load.out.Load())
	})
}
