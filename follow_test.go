package multipool

import (
	"context"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/jackc/pgx/v5/stdlib"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/pgmultipool/multipool/internal/pgfake"
	"github.com/pgmultipool/multipool/internal/quota"
)

// serverOf tells by which peer a connection of a pool is served.
func serverOf(c *pgxpool.Conn) string { return wireOf(c.Conn()).peer.name }

// atRest tests that no call holds a permit, and that there is a slot for every connection and no other.
func (x *fakes) atRest() {
	x.t.Helper()
	settled()
	for _, q := range x.pool.peers() {
		conns, looks := 0, 0 // of monitors that have given their own connections up: each has a turn while it is under way
		q.sockets.wires(func(w *wire) {
			conns++
			if out := w.out.Load(); out&outPermit != 0 && out&outCall == 0 {
				looks++
			}
		})
		assert.EqualValues(x.t, conns, q.slots.Taken(), "%s: slots", q.name)
		assert.Zero(x.t, q.slots.Waiting(), "%s: connections that wait for a slot", q.name)
		assert.EqualValues(x.t, looks, q.permits.InUse(), "%s: permits", q.name)
		assert.Zero(x.t, q.permits.Waiting(), "%s: calls that wait for a permit", q.name)
		assert.Zero(x.t, q.load.busy(), "%s: load", q.name)
		assert.Empty(x.t, q.guests, "%s: guests", q.name)
		assert.Empty(x.t, q.dials, "%s: handshakes", q.name)
	}
}

func TestTheSamePoolAtEveryCallAndAClosedOneAfterClose(t *testing.T) {
	bubble(t, 1, nil, func(ctx context.Context, x *fakes) {
		pool := x.pool.PrimaryPool()
		assert.Same(t, pool, x.pool.PrimaryPool())
		assert.NotSame(t, pool, x.pool.ReplicaPool())
		_, err := pool.Exec(ctx, "insert into t values (1)")
		require.NoError(t, err)
		x.atRest()
		x.pool.Close()
		_, err = pool.Exec(ctx, "insert into t values (1)")
		assert.ErrorIs(t, err, ErrClosedPool)
		assert.Same(t, pool, x.pool.PrimaryPool())
	})
	bubble(t, 1, nil, func(ctx context.Context, x *fakes) {
		x.pool.Close()
		assert.ErrorIs(t, x.pool.PrimaryPool().Ping(ctx), ErrClosedPool)
		assert.ErrorIs(t, x.pool.ReplicaPool().Ping(ctx), ErrClosedPool)
		assert.ErrorIs(t, x.pool.WaitForPrimary(ctx), ErrClosedPool)
	})
	bubble(t, 1, func(c *Options) { c.Wait = Off }, func(ctx context.Context, x *fakes) {
		settled()
		pools := []*pgxpool.Pool{x.pool.PrimaryPool(), x.pool.ReplicaPool()}
		x.primary.Die()
		x.replicas[0].Die()
		time.Sleep(10 * time.Second)
		for _, pool := range pools {
			require.ErrorAs(t, pool.Ping(ctx), new(*NoPeerError))
		}
		x.pool.Close()
		for _, pool := range pools {
			assert.ErrorIs(t, pool.Ping(ctx), ErrClosedPool, "whoever is up")
		}
	})
	bubble(t, 0, nil, func(ctx context.Context, x *fakes) {
		assert.Same(t, x.pool.PeerPool("primary:5432"), x.pool.PrimaryPool())
		assert.Same(t, x.pool.PrimaryPool(), x.pool.ReplicaPool())
	})
}

func TestAFollowingPoolWaitsForAPrimaryAndFollowsIt(t *testing.T) {
	const insert = "insert into t values (1)"
	bubble(t, 2, func(c *Options) { c.Wait = 3 * time.Second }, func(ctx context.Context, x *fakes) {
		pool := x.pool.PrimaryPool()
		_, err := pool.Exec(ctx, insert)
		require.NoError(t, err)
		held, err := pool.Acquire(ctx)
		require.NoError(t, err)
		x.primary.Die()
		_, err = held.Exec(ctx, insert)
		require.Error(t, err)
		held.Release()
		time.Sleep(time.Second)

		begun := time.Now()
		_, err = pool.Exec(ctx, insert)
		assert.ErrorIs(t, err, ErrNoPrimary)
		var none *NoPeerError
		assert.ErrorAs(t, err, &none)
		assert.Equal(t, 3*time.Second, time.Since(begun))

		timed, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		begun = time.Now()
		_, err = pool.Exec(timed, insert)
		assert.ErrorIs(t, err, ErrNoPrimary)
		assert.ErrorIs(t, err, context.DeadlineExceeded)
		assert.Equal(t, time.Second, time.Since(begun))
		settled()
		assert.Zero(t, pool.Stat().ConstructingConns(), "nothing goes on behind a caller who has gone")
		x.atRest()

		go func() {
			time.Sleep(time.Second)
			x.replicas[1].Promote()
		}()
		begun = time.Now()
		_, err = pool.Exec(ctx, insert)
		require.NoError(t, err)
		assert.InDelta(t, 1.0, time.Since(begun).Seconds(), 0.1)
		assert.Equal(t, 1, x.replicas[1].Applied(insert))
		x.atRest()
	})
}

func TestWaitForPrimary(t *testing.T) {
	bubble(t, 1, func(c *Options) { c.Wait = time.Second; c.MaxWaiting = Off }, func(ctx context.Context, x *fakes) {
		require.NoError(t, x.pool.WaitForPrimary(ctx))
		x.primary.Die()
		_ = x.pool.Ping(withTimeout(x.t, time.Second))
		settled()
		short, cancel := context.WithTimeout(ctx, 10*time.Second)
		defer cancel()
		begun := time.Now()
		err := x.pool.WaitForPrimary(short)
		assert.ErrorIs(t, err, ErrNoPrimary)
		assert.ErrorIs(t, err, context.DeadlineExceeded)
		assert.Equal(t, 10*time.Second, time.Since(begun))
		go func() {
			time.Sleep(time.Minute)
			x.primary.Revive()
		}()
		require.NoError(t, x.pool.WaitForPrimary(ctx))
		x.primary.Die()
		_ = x.pool.Ping(withTimeout(x.t, time.Second))
		settled()
		done := make(chan error)
		go func() { done <- x.pool.WaitForPrimary(ctx) }()
		settled()
		x.pool.Close()
		assert.ErrorIs(t, <-done, ErrClosedPool)
	})
	bubble(t, 0, nil, func(ctx context.Context, x *fakes) {
		x.primary.Die()
		short, cancel := context.WithTimeout(ctx, 10*time.Second)
		defer cancel()
		err := x.pool.WaitForPrimary(short)
		assert.ErrorIs(t, err, ErrNoPrimary)
		assert.ErrorIs(t, err, context.DeadlineExceeded)
		go func() {
			time.Sleep(time.Minute)
			x.primary.Revive()
		}()
		require.NoError(t, x.pool.WaitForPrimary(ctx))
	})
}

// A connection that is being made when its server dies is made to the next primary, with what that one is to be told.
func TestAConnectUnderWayMovesToTheNextPrimary(t *testing.T) {
	bubble(t, 2, func(c *Options) {
		c.Wait = time.Minute
		for _, host := range []string{"primary", "replica1", "replica2"} {
			c.Peers = append(c.Peers, Peer{ConnString: "postgres://" + host + "@" + host + "/" + host + "?sslmode=disable&krbsrvname=" + host})
		}
		c.Peers[1].ConnString += "&channel_binding=disable&sslcertmode=disable"
	}, func(ctx context.Context, x *fakes) {
		settled()
		x.primary.Hang()
		pool := x.pool.PrimaryPool()
		gone := make(chan error)
		go func() { _, err := pool.Acquire(withTimeout(x.t, 1500*time.Millisecond)); gone <- err }()
		results := make(chan string, 3)
		for range cap(results) {
			go func() {
				c, err := pool.Acquire(ctx)
				if !assert.NoError(t, err) {
					results <- err.Error()
					return
				}
				results <- serverOf(c)
				assert.Equal(t, "replica1", c.Conn().Config().User)
				assert.Equal(t, "replica1", c.Conn().Config().Database)
				assert.Equal(t, "replica1", c.Conn().Config().KerberosSrvName)
				assert.Equal(t, "disable", c.Conn().Config().ChannelBinding)
				assert.Equal(t, "disable", c.Conn().Config().SSLCertMode)
				c.Release()
			}()
		}
		time.Sleep(100 * time.Millisecond)
		assert.EqualValues(t, 4, pool.Stat().ConstructingConns())
		assert.ErrorIs(t, <-gone, context.DeadlineExceeded)
		time.Sleep(3 * time.Second)
		require.Equal(t, HealthDown, x.peer("primary").Health)
		assert.EqualValues(t, 3, pool.Stat().ConstructingConns(), "not for a caller who has gone")
		require.Empty(t, results)
		x.replicas[0].Promote()
		for range cap(results) {
			assert.Equal(t, "replica1:5432", <-results)
		}
		assert.EqualValues(t, 4, pool.Stat().NewConnsCount(), "the same that were begun")
		x.atRest()
		assert.EqualValues(t, 1, x.peer("primary").Trips)
	})
}

func TestAConnectThatIsRefusedSaysWhy(t *testing.T) {
	bubble(t, 2, nil, func(ctx context.Context, x *fakes) {
		settled()
		x.primary.StartupError("53300")
		pool := x.pool.PrimaryPool()
		_, err := pool.Exec(ctx, "insert into t values (1)")
		var answer *pgconn.PgError
		require.ErrorAs(t, err, &answer)
		assert.Equal(t, "53300", answer.Code)
		assert.ErrorContains(t, err, "multipool: connect to primary:5432: ")
		assert.NotContains(t, err.Error(), "#", "pgx's list of addresses")
		var dial *pgconn.ConnectError
		assert.ErrorAs(t, err, &dial)
		assert.Zero(t, x.peer("primary").Trips)
		x.atRest()
		x.primary.StartupError("28P01")
		_, err = pool.Exec(ctx, "insert into t values (1)")
		require.ErrorAs(t, err, &answer)
		assert.Equal(t, "28P01", answer.Code)
		x.atRest()
	})
}

// The pool asks nobody's leave to use what it has: whoever is handed a connection is handed one of the primary.
func TestConnectionsOfAnEarlierPrimaryAreDropped(t *testing.T) {
	bubble(t, 2, func(c *Options) { c.CheckInterval = time.Second }, func(ctx context.Context, x *fakes) {
		pool := x.pool.PrimaryPool()
		held := acquire(t, ctx, pool, 4)
		release(held[1:])
		settled()
		assert.EqualValues(t, 4, pool.Stat().TotalConns())
		// A switch-over by a proxy: the sessions live on, and the server answers as a standby.
		x.primary.SetStandby(true)
		time.Sleep(2 * time.Second)
		x.replicas[0].Promote()
		time.Sleep(2 * time.Second)
		require.Equal(t, "replica1:5432", x.pool.Status().Primary)
		assert.EqualValues(t, 1, pool.Stat().TotalConns(), "idle ones are closed at once")
		_, err := held[0].Exec(ctx, "select 1")
		assert.NoError(t, err, "what is held goes on")
		held[0].Release()
		settled()
		assert.Zero(t, pool.Stat().TotalConns(), "and is closed when it is released")
		c, err := pool.Acquire(ctx)
		require.NoError(t, err)
		assert.Equal(t, "replica1:5432", serverOf(c))
		c.Release()
		x.atRest()
	})
}

// Between the news and the sweep a connection may be asked for.
func TestNobodyIsHandedAConnectionOfAnEarlierPrimary(t *testing.T) {
	bubble(t, 1, nil, func(ctx context.Context, x *fakes) {
		pool := x.pool.PrimaryPool()
		c, err := pool.Acquire(ctx)
		require.NoError(t, err)
		settled()                         // a look that is under way has seen a primary
		wireOf(c.Conn()).use.settle(true) // as if it were idle
		x.primary.SetStandby(true)        // whoever looks meanwhile sees the same
		x.pool.observe(observation{peer: x.pool.peers()[0], role: RoleReplica})
		ok, err := x.pool.followers.made[0].prepareConn(nil)(ctx, c.Conn())
		require.NoError(t, err)
		assert.False(t, ok)
		c.Release()
	})
}

func TestAServerHasNoMoreConnectionsThanItMayWhicheverPoolsUseIt(t *testing.T) {
	bubble(t, 1, func(c *Options) { c.Config.MaxConns = 4; c.WriteReserve = Off }, func(ctx context.Context, x *fakes) {
		fill := func() {
			release(acquire(t, ctx, x.pool, 4))
		}
		fill()
		require.Equal(t, 5, x.primary.Conns(), "four and the monitor's")
		pool := x.pool.PrimaryPool()
		_, err := pool.Exec(ctx, "insert into t values (1)")
		require.NoError(t, err)
		settled()
		assert.Equal(t, 5, x.primary.Conns(), "an idle one had to go")
		fill()
		settled()
		assert.Equal(t, 5, x.primary.Conns())
		assert.Zero(t, x.peer("primary").Trips)
		assert.Equal(t, HealthUp, x.peer("primary").Health)
		assert.Empty(t, x.peer("primary").LastFault, "an eviction is nobody's fault")

		// A connection that was hijacked counts until it is closed.
		c, err := pool.Acquire(ctx)
		require.NoError(t, err)
		own := c.Hijack()
		held := acquire(t, ctx, x.pool, 3)
		_, err = pool.Acquire(withTimeout(x.t, time.Second))
		require.ErrorIs(t, err, context.DeadlineExceeded)
		_, err = x.pool.Acquire(withTimeout(x.t, time.Second))
		require.ErrorIs(t, err, context.DeadlineExceeded)
		assert.Equal(t, 4, x.pool.peers()[0].sockets.len())
		require.NoError(t, own.Close(ctx))
		c, err = pool.Acquire(withTimeout(x.t, time.Second))
		require.NoError(t, err)
		c.Release()
		release(held)
		x.atRest()
	})
}

// Where the pools want more than there is, each gets its share, and connections are not closed and made all the time.
func TestSaturatedPoolsShareAServerEvenly(t *testing.T) {
	bubble(t, 1, func(c *Options) { c.Config.MaxConns = 6 }, func(ctx context.Context, x *fakes) {
		settled()
		x.primary.Delay(10 * time.Millisecond)
		pool := x.pool.PrimaryPool()
		_, err := pool.Exec(ctx, "select 1")
		require.NoError(t, err)
		var own, following, most atomic.Int64
		stop := time.Now().Add(10 * time.Second)
		var wg sync.WaitGroup
		for range 20 {
			wg.Go(func() {
				for time.Now().Before(stop) {
					begun := time.Now()
					_, err := x.pool.Exec(ctx, "insert into t values (1)")
					assert.NoError(t, err)
					assert.Less(t, time.Since(begun), time.Second)
					own.Add(1)
				}
			})
			wg.Go(func() {
				for time.Now().Before(stop) {
					begun := time.Now()
					_, err := pool.Exec(ctx, "insert into t values (2)")
					assert.NoError(t, err)
					assert.Less(t, time.Since(begun), time.Second)
					following.Add(1)
					most.Store(max(most.Load(), int64(x.pool.peers()[0].sockets.len())))
				}
			})
		}
		wg.Wait()
		assert.EqualValues(t, 6, most.Load())
		assert.InDelta(t, 3000, own.Load(), 300)
		assert.InDelta(t, 3000, following.Load(), 300)
		// A turn is given back a moment before its connection is, so that one is made that need not be: now and then, or for
		// one statement in five where the goroutines take turns at their worst. It is nine in ten where the pools alternate.
		assert.Less(t, x.primary.Dials(), 2000)
		t.Logf("%d and %d statements over %d dials", own.Load(), following.Load(), x.primary.Dials())
		x.primary.Delay(0)
		x.atRest()
	})
}

// With one connection for two pools every statement takes the other's: slow, and nobody starves.
func TestNobodyStarvesWhereTwoPoolsShareOneConnection(t *testing.T) {
	bubble(t, 1, func(c *Options) { c.Config.MaxConns = 1 }, func(ctx context.Context, x *fakes) {
		settled()
		x.primary.Delay(10 * time.Millisecond)
		pools := []func(context.Context, string, ...any) (pgconn.CommandTag, error){x.pool.Exec, x.pool.PrimaryPool().Exec}
		var wg sync.WaitGroup
		for _, exec := range pools {
			for range 5 {
				wg.Go(func() {
					for range 20 {
						_, err := exec(withTimeout(x.t, time.Second), "insert into t values (1)")
						assert.NoError(t, err)
					}
				})
			}
		}
		wg.Wait()
		assert.Equal(t, 200, x.primary.Applied("insert into t values (1)"))
		x.atRest()
	})
}

// PeerPool and AcquireAllIdle pass the turns by: who wants a seat then gets that of the next that is released.
func TestASeatIsGivenUpAtRelease(t *testing.T) {
	bubble(t, 1, func(c *Options) { c.Config.MaxConns = 2 }, func(ctx context.Context, x *fakes) {
		pool := x.pool.PrimaryPool()
		held := acquire(t, ctx, x.pool.PeerPool("primary:5432"), 2)
		done := make(chan error)
		go func() { _, err := pool.Exec(ctx, "insert into t values (1)"); done <- err }()
		settled()
		time.Sleep(time.Minute + 3*time.Millisecond)
		assert.Equal(t, 3, x.primary.Conns())
		begun := time.Now()
		held[0].Release()
		require.NoError(t, <-done)
		assert.Zero(t, time.Since(begun), "at once, however soon somebody else would have had it")
		held[1].Release()
		x.atRest()
	})
}

// A connection whose caller has given up while it was being made is idle without having been released.
func TestAConnectionMadeForNobodyGivesUpItsSeat(t *testing.T) {
	bubble(t, 1, func(c *Options) { c.Config.MaxConns = 1 }, func(ctx context.Context, x *fakes) {
		settled()
		pool := x.pool.PrimaryPool()
		x.primary.Hang()
		_, err := pool.Acquire(withTimeout(x.t, 100*time.Millisecond))
		require.ErrorIs(t, err, context.DeadlineExceeded)
		x.primary.Thaw()
		settled()
		assert.EqualValues(t, 1, pool.Stat().IdleConns())
		_, err = x.pool.Exec(withTimeout(x.t, time.Second), "insert into t values (1)")
		require.NoError(t, err)
		settled()
		assert.Equal(t, 2, x.primary.Conns())
		x.atRest()
	})
}

func TestCloseWakesThoseWhoWaitForAFollowingPool(t *testing.T) {
	bubble(t, 1, func(c *Options) { c.Wait = time.Hour; c.Config.MaxConns = 1; c.WriteReserve = Off }, func(ctx context.Context, x *fakes) {
		pool, replicas := x.pool.PrimaryPool(), x.pool.ReplicaPool()
		c, err := replicas.Acquire(ctx)
		require.NoError(t, err)
		x.primary.Die()
		_ = x.pool.Ping(withTimeout(x.t, time.Second))
		settled()
		done := make(chan error, 2)
		go func() { done <- pool.Ping(ctx) }()     // waits for a primary
		go func() { done <- replicas.Ping(ctx) }() // waits for a turn
		settled()
		closed := make(chan struct{})
		go func() { x.pool.Close(); close(closed) }()
		assert.ErrorIs(t, <-done, ErrClosedPool)
		assert.ErrorIs(t, <-done, ErrClosedPool)
		settled()
		select {
		case <-closed:
			t.Error("Close does not wait for what the program holds")
		default:
		}
		c.Release()
		<-closed
	})
}

// A server that hangs holds Close up no longer than it would without the pool that follows.
func TestCloseCutsAFollowingPoolsCallsOnAServerThatHangs(t *testing.T) {
	bubble(t, 1, nil, func(ctx context.Context, x *fakes) {
		pool := x.pool.PrimaryPool()
		require.NoError(t, pool.Ping(ctx))
		x.primary.Hang()
		done := make(chan error)
		go func() { _, err := pool.Exec(ctx, "insert into t values (1)"); done <- err }()
		settled()
		begun := time.Now()
		go x.pool.Close()
		require.Error(t, <-done)
		x.pool.Close()
		assert.Less(t, time.Since(begun), 3*time.Second)
	})
}

func TestReplicasAreSpreadAndEvenedOut(t *testing.T) {
	bubble(t, 3, nil, func(ctx context.Context, x *fakes) {
		settled()
		pool := x.pool.ReplicaPool()
		spread := func() map[string]int {
			out := map[string]int{}
			for _, q := range x.pool.peers() {
				if n := q.slots.Of(quota.Replicas); n > 0 {
					out[q.name] = int(n)
				}
			}
			return out
		}
		burst := func() {
			var held []*pgxpool.Conn
			for range 12 {
				c, err := pool.Acquire(ctx)
				require.NoError(t, err)
				require.NotEqual(t, "primary:5432", serverOf(c))
				held = append(held, c)
			}
			release(held)
		}
		burst()
		even := map[string]int{"replica1:5432": 4, "replica2:5432": 4, "replica3:5432": 4}
		assert.Equal(t, even, spread())

		x.replicas[1].Die()
		require.Eventually(t, func() bool { return x.peer("replica2").Health == HealthDown }, time.Minute, time.Second)
		settled()
		burst()
		assert.Equal(t, map[string]int{"replica1:5432": 6, "replica3:5432": 6}, spread())
		x.replicas[1].Revive()
		time.Sleep(3 * time.Second)
		require.Equal(t, HealthUp, x.peer("replica2").Health)
		before := x.replicas[0].Dials() + x.replicas[1].Dials() + x.replicas[2].Dials()
		for range 200 { // 20 s
			burst()
			time.Sleep(100 * time.Millisecond)
		}
		assert.Equal(t, even, spread())
		made := x.replicas[0].Dials() + x.replicas[1].Dials() + x.replicas[2].Dials() - before
		assert.LessOrEqual(t, made, 8, "no storm")
		x.pool.followers.made[0].surplus.Store(x.pool.named("replica1:5432"))
		burst()
		assert.Equal(t, even, spread(), "what was too many when it was counted need not be so any more")
		assert.Equal(t, made, x.replicas[0].Dials()+x.replicas[1].Dials()+x.replicas[2].Dials()-before)
		x.atRest()

		// Without a replica the primary serves, and keeps its reserve.
		for _, r := range x.replicas {
			r.Die()
		}
		time.Sleep(5 * time.Second)
		var held []*pgxpool.Conn
		for range 7 {
			c, err := pool.Acquire(ctx)
			require.NoError(t, err)
			require.Equal(t, "primary:5432", serverOf(c))
			held = append(held, c)
		}
		_, err := pool.Acquire(withTimeout(x.t, time.Second))
		require.ErrorIs(t, err, context.DeadlineExceeded, "of ten connections three are the writes'")
		for range 3 {
			c, err := x.pool.PrimaryPool().Acquire(ctx)
			require.NoError(t, err)
			held = append(held, c)
		}
		release(held)
		x.atRest()
		for _, r := range x.replicas {
			r.Revive()
		}
		time.Sleep(20 * time.Second)
		settled()
		assert.Empty(t, spread(), "idle ones of the primary are given up when replicas serve again")
		burst()
	})
}

// hookLog is a program's hooks and tracer.
type hookLog struct {
	mu sync.Mutex
	n  map[string]int
}

func (h *hookLog) add(what string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.n[what]++
}

func (h *hookLog) count(what string) int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.n[what]
}

func (h *hookLog) TraceQueryStart(ctx context.Context, _ *pgx.Conn, _ pgx.TraceQueryStartData) context.Context {
	h.add("query")
	return ctx
}
func (h *hookLog) TraceQueryEnd(context.Context, *pgx.Conn, pgx.TraceQueryEndData) {}
func (h *hookLog) TraceAcquireStart(ctx context.Context, _ *pgxpool.Pool, _ pgxpool.TraceAcquireStartData) context.Context {
	h.add("acquire")
	return context.WithValue(ctx, hookKey{}, true)
}
func (h *hookLog) TraceAcquireEnd(ctx context.Context, _ *pgxpool.Pool, _ pgxpool.TraceAcquireEndData) {
	if ctx.Value(hookKey{}) == true {
		h.add("acquired")
	}
}
func (h *hookLog) TraceRelease(*pgxpool.Pool, pgxpool.TraceReleaseData) { h.add("release") }

type hookKey struct{}

func TestTheProgramsHooksAreCalledByAFollowingPool(t *testing.T) {
	log := &hookLog{n: map[string]int{}}
	bubble(t, 2, func(c *Options) {
		c.Config.ConnConfig.Tracer = log
		c.Config.BeforeConnect = func(_ context.Context, cc *pgx.ConnConfig) error {
			log.add("before " + cc.Host)
			cc.RuntimeParams["application_name"] = "follow"
			return nil
		}
		c.Config.AfterConnect = func(context.Context, *pgx.Conn) error { log.add("after"); return nil }
		c.Config.PrepareConn = func(context.Context, *pgx.Conn) (bool, error) { log.add("prepare"); return true, nil }
		c.Config.ShouldPing = func(context.Context, pgxpool.ShouldPingParams) bool { log.add("ping"); return false }
	}, func(ctx context.Context, x *fakes) {
		settled()
		for key := range log.n {
			delete(log.n, key)
		}
		pool := x.pool.PrimaryPool()
		for range 2 {
			_, err := pool.Exec(ctx, "insert into t values (1)")
			require.NoError(t, err)
		}
		settled()
		assert.Equal(t, map[string]int{
			"before primary": 1, "after": 1, "prepare": 2, "ping": 2, "query": 2, "acquire": 2, "acquired": 2, "release": 2,
		}, log.n)
		config := pool.Config()
		assert.Equal(t, "app", config.ConnConfig.Database)
		c, err := pool.Acquire(ctx)
		require.NoError(t, err)
		assert.Equal(t, "primary", c.Conn().Config().Host)
		assert.Empty(t, c.Conn().Config().Fallbacks)
		assert.Equal(t, "follow", c.Conn().Config().RuntimeParams["application_name"])
		c.Release()
		x.primary.SetStandby(true)
		x.replicas[0].Promote()
		time.Sleep(10 * time.Second)
		assert.Equal(t, 3, log.count("release"), "not of what is closed for being the earlier primary's")
		monitors := log.count("before replica1")
		require.NoError(t, pool.Ping(ctx))
		assert.Equal(t, monitors+1, log.count("before replica1"))
	})
}

// endTracer notes whether the context that TraceAcquireEnd gets has ended.
type endTracer struct {
	hookLog
	ended []error
}

func (e *endTracer) TraceAcquireEnd(ctx context.Context, _ *pgxpool.Pool, _ pgxpool.TraceAcquireEndData) {
	e.ended = append(e.ended, ctx.Err())
}

// The tracer may go on with the context that it has returned, as under a pgxpool: a metric, a statement on the connection.
func TestAnAcquireEndsWithTheContextThatItBeganWith(t *testing.T) {
	tracer := &endTracer{hookLog: hookLog{n: map[string]int{}}}
	bubble(t, 1, func(c *Options) { c.Config.ConnConfig.Tracer = tracer; c.Wait = Off }, func(ctx context.Context, x *fakes) {
		settled()
		require.NoError(t, x.pool.Ping(ctx))
		require.NoError(t, x.pool.PrimaryPool().Ping(ctx))
		require.NoError(t, x.pool.ReplicaPool().Ping(ctx))
		x.primary.Die()
		time.Sleep(10 * time.Second)
		require.ErrorIs(t, x.pool.PrimaryPool().Ping(ctx), ErrNoPrimary)
		assert.Equal(t, []error{nil, nil, nil, nil}, tracer.ended)
	})
}

// What is swept is not the program's: its hooks come in pairs.
func TestASweepIsNoReleaseOfTheProgram(t *testing.T) {
	var prepared, released atomic.Int64
	bubble(t, 2, func(c *Options) {
		c.Config.PrepareConn = func(context.Context, *pgx.Conn) (bool, error) { prepared.Add(1); return true, nil }
		c.Config.AfterRelease = func(*pgx.Conn) bool { released.Add(1); return true }
	}, func(ctx context.Context, x *fakes) {
		settled()
		pool := x.pool.ReplicaPool()
		use := func() {
			release(acquire(t, ctx, pool, 6))
			settled()
		}
		use()
		require.NoError(t, x.pool.Drain(ctx, "replica1:5432"))
		settled()
		assert.NotZero(t, pool.Stat().IdleConns(), "of the other")
		assert.EqualValues(t, 6, released.Load())
		use()
		assert.EqualValues(t, 12, released.Load(), "of what the sweep has left, too")
		assert.GreaterOrEqual(t, prepared.Load(), released.Load())
		x.atRest()
	})
}

// panicTracer panics where an acquire begins, once it is told to.
type panicTracer struct {
	hookLog
	panics bool
}

func (p *panicTracer) TraceAcquireStart(ctx context.Context, _ *pgxpool.Pool, _ pgxpool.TraceAcquireStartData) context.Context {
	if p.panics {
		panic("the program's tracer")
	}
	return ctx
}

// A server of HTTP recovers from a panic and goes on: a pgxpool has taken nothing by then.
func TestAPanicOfTheTracerHoldsNothing(t *testing.T) {
	tracer := &panicTracer{hookLog: hookLog{n: map[string]int{}}}
	bubble(t, 1, func(c *Options) { c.Config.ConnConfig.Tracer = tracer; c.Config.MaxConns = 2 }, func(ctx context.Context, x *fakes) {
		settled()
		calls := []func(context.Context) error{
			x.pool.Ping,
			func(ctx context.Context) error { return x.pool.QueryRow(ctx, "select 1").Scan(new(int)) },
		}
		check := func() {
			tracer.panics = true
			for range 3 {
				for _, call := range calls {
					assert.Panics(t, func() { _ = call(withTimeout(x.t, time.Second)) })
				}
			}
			tracer.panics = false
			for _, call := range calls {
				assert.NoError(t, call(withTimeout(x.t, time.Second)))
			}
			x.atRest()
		}
		check()
		calls = append(calls, x.pool.PrimaryPool().Ping, x.pool.ReplicaPool().Ping)
		check()
		x.replicas[0].Die()
		time.Sleep(10 * time.Second)
		check()
	})
}

// Statements through a pool that follows are judged as all others are.
func TestAFollowingPoolFeedsTheBreakerAndIsCutByItsVerdict(t *testing.T) {
	bubble(t, 2, nil, func(ctx context.Context, x *fakes) {
		settled()
		pool := x.pool.PrimaryPool()
		require.NoError(t, pool.Ping(ctx))
		x.primary.Handle(answering(func(s pgfake.Statement) *pgfake.Response {
			if s.SQL == "insert into t values (1)" && !s.Preparing {
				return &pgfake.Response{Hang: true}
			}
			return nil
		}))
		stuck := make(chan error)
		go func() { _, err := pool.Exec(ctx, "insert into t values (1)"); stuck <- err }()
		settled()
		assert.EqualValues(t, 1, x.peer("primary").InFlight)
		time.Sleep(100 * time.Millisecond)
		x.replicas[0].Promote()
		time.Sleep(10 * time.Second)
		require.Error(t, <-stuck, "its primary was replaced")
		_, err := pool.Exec(ctx, "insert into t values (2)")
		require.NoError(t, err)
		assert.Equal(t, 1, x.replicas[0].Applied("insert into t values (2)"))
		x.replicas[0].Die()
		_, err = pool.Exec(withTimeout(x.t, 2*time.Second), "insert into t values (3)")
		require.Error(t, err)
		time.Sleep(time.Second)
		assert.Equal(t, HealthDown, x.peer("replica1").Health)
	})
}

// Random faults under callers of all pools; whatever happens nothing is lost count of.
func TestNothingIsLostCountOfWhateverHappens(t *testing.T) {
	for seed := range map[bool]int{false: 3, true: 2}[raceEnabled] {
		bubble(t, 2, func(c *Options) {
			c.Config.MaxConns = 3
			c.Wait = 2 * time.Second
			c.CheckInterval = time.Second
		}, func(ctx context.Context, x *fakes) {
			settled()
			all := append([]*pgfake.Peer{x.primary}, x.replicas...)
			calls := []func(context.Context) error{
				func(ctx context.Context) error { _, err := x.pool.Exec(ctx, "insert into t values (1)"); return err },
				func(ctx context.Context) error { return x.pool.QueryRow(ctx, "select 1").Scan(new(int)) },
				func(ctx context.Context) error {
					_, err := x.pool.PrimaryPool().Exec(ctx, "insert into t values (2)")
					return err
				},
				func(ctx context.Context) error {
					return x.pool.ReplicaPool().QueryRow(ctx, "select 1").Scan(new(int))
				},
			}
			var wg sync.WaitGroup
			stop := make(chan struct{})
			for i := range 12 {
				wg.Go(func() {
					for n := 0; ; n++ {
						select {
						case <-stop:
							return
						default:
						}
						call, cancel := context.WithTimeout(ctx, time.Duration(1+(i*7+n*13)%900)*time.Millisecond)
						_ = calls[i%len(calls)](call)
						cancel()
						time.Sleep(time.Duration((i*31+n*17)%40) * time.Millisecond)
					}
				})
			}
			for n := range 12 {
				p := all[(seed*5+n*7)%3]
				for _, q := range all {
					q.Delay(time.Duration((seed+n)%30) * time.Millisecond)
				}
				switch (seed*3 + n) % 5 {
				case 0:
					p.Die()
					time.Sleep(1500 * time.Millisecond)
					p.Revive()
				case 1:
					p.Hang()
					time.Sleep(2500 * time.Millisecond)
					p.Thaw()
				case 2:
					p.CutConns()
				case 3:
					x.primary.SetStandby(true)
					x.replicas[0].Promote()
					time.Sleep(2 * time.Second)
					x.replicas[0].SetStandby(true)
					x.primary.Promote()
					x.primary.SetTimeline(uint32(n + 10))
				case 4:
					p.StartupError("53300")
					time.Sleep(time.Second)
					p.StartupError("")
				}
				for _, q := range x.pool.peers() {
					assert.LessOrEqual(t, q.slots.Taken(), int32(3))
				}
				time.Sleep(500 * time.Millisecond)
			}
			close(stop)
			wg.Wait()
			time.Sleep(40 * time.Second) // what callers have left behind has ended
			x.atRest()
			for _, call := range calls {
				assert.NoError(t, call(ctx), "seed %d", seed)
			}
			if t.Failed() {
				t.Fatalf("seed %d", seed)
			}
		})
	}
}

// Each has its turn at one server and has been refused there: what the other one waits for, it must not keep.
func TestConnectsThatMoveOnDoNotWaitForEachOther(t *testing.T) {
	bubble(t, 2, func(c *Options) { c.Config.MaxConns = 1; c.Wait = time.Second }, func(ctx context.Context, x *fakes) {
		time.Sleep(3 * time.Second)
		for _, r := range x.replicas {
			r.Delay(10 * time.Millisecond)
			r.StartupError("53300")
		}
		done := x.acquireAtOnce(ctx, 2)
		time.Sleep(time.Second)
		for _, r := range x.replicas {
			r.StartupError("")
			r.Delay(0)
		}
		time.Sleep(time.Minute)
		assert.Len(t, done, 2, "a minute after the servers are well again")
		var n int
		assert.NoError(t, x.pool.QueryRow(withTimeout(x.t, 10*time.Second), "select 1").Scan(&n), "the pool's own reads")
		x.atRest()
	})
}

func TestABurstOnFullServersEndsWhenTheyHaveRoom(t *testing.T) {
	bubble(t, 2, func(c *Options) { c.Wait = time.Second }, func(ctx context.Context, x *fakes) {
		time.Sleep(3 * time.Second)
		for _, r := range x.replicas {
			r.StartupError("53300")
		}
		done := x.acquireAtOnce(ctx, 40)
		time.Sleep(time.Second)
		for _, r := range x.replicas {
			r.StartupError("")
		}
		time.Sleep(time.Minute)
		assert.Len(t, done, cap(done), "a minute after the servers are well again")
		x.atRest()
	})
}

// acquireAtOnce has n callers take a connection of Replicas and give it back. What is left of them ends with the test.
func (x *fakes) acquireAtOnce(ctx context.Context, n int) (done chan error) {
	ctx, cancel := context.WithCancel(ctx)
	x.t.Cleanup(cancel)
	done = make(chan error, n)
	for range n {
		go func() {
			c, err := x.pool.ReplicaPool().Acquire(ctx)
			if err == nil {
				c.Release()
			}
			done <- err
		}()
	}
	return done
}

// A connection that the program has taken over counts until it is closed, and for nothing then.
func TestAHijackedConnectionOfAGuestGivesItsPlaceBack(t *testing.T) {
	bubble(t, 1, func(c *Options) { c.Config.MaxConns = 4 }, func(ctx context.Context, x *fakes) {
		settled()
		x.replicas[0].Die()
		_ = x.read(ctx)
		time.Sleep(3 * time.Second)
		guests := x.pool.named("primary:5432").guests
		require.Equal(t, 3, cap(guests))
		for range cap(guests) {
			c, err := x.pool.ReplicaPool().Acquire(ctx)
			require.NoError(t, err)
			require.Equal(t, "primary:5432", serverOf(c))
			own := c.Hijack()
			assert.NotEmpty(t, guests)
			require.NoError(t, own.Close(ctx))
		}
		x.atRest()
		var n int
		assert.NoError(t, x.pool.QueryRow(withTimeout(x.t, 4*time.Second), "select 1").Scan(&n))
	})
}

func TestReadsThatMoveToThePrimaryLeaveItsReserveAlone(t *testing.T) {
	bubble(t, 1, func(c *Options) { c.Config.MaxConns = 4 }, func(ctx context.Context, x *fakes) {
		time.Sleep(3 * time.Second)
		pool := x.pool.ReplicaPool()
		x.replicas[0].Hang()
		got := make(chan *pgxpool.Conn, 4)
		for range cap(got) {
			go func() {
				c, err := pool.Acquire(ctx)
				assert.NoError(t, err)
				got <- c
			}()
		}
		time.Sleep(10 * time.Second)
		assert.Len(t, got, 3, "a quarter is the writes'")
		assert.Len(t, x.pool.named("primary:5432").guests, 3)
		_, err := x.pool.Exec(withTimeout(x.t, time.Second), "insert into t values (1)")
		assert.NoError(t, err)
		for range cap(got) {
			(<-got).Release()
		}
		x.replicas[0].Thaw()
		x.atRest()
	})
}

// pgxpool calls AfterRelease after the release: until it has ended the connection is the program's.
func TestNobodyEvictsAConnectionFromUnderAfterRelease(t *testing.T) {
	var failed atomic.Int64
	bubble(t, 1, func(c *Options) {
		c.Config.MaxConns = 6
		c.Config.AfterRelease = func(conn *pgx.Conn) bool {
			_, err := conn.Exec(context.Background(), "select 1")
			if err != nil {
				failed.Add(1)
			}
			return err == nil
		}
	}, func(ctx context.Context, x *fakes) {
		time.Sleep(3 * time.Second)
		x.primary.Delay(10 * time.Millisecond)
		pool := x.pool.PrimaryPool()
		var wg sync.WaitGroup
		stop := time.Now().Add(10 * time.Second)
		for range 12 {
			for _, exec := range []func(context.Context, string, ...any) (pgconn.CommandTag, error){x.pool.Exec, pool.Exec} {
				wg.Go(func() {
					for time.Now().Before(stop) {
						_, err := exec(withTimeout(x.t, 5*time.Second), "insert into t values (1)")
						assert.NoError(t, err)
					}
				})
			}
		}
		wg.Wait()
		assert.Zero(t, failed.Load())
		assert.Zero(t, x.peer("primary").Trips)
		assert.Empty(t, x.peer("primary").LastFault)
		x.primary.Delay(0)
		time.Sleep(time.Second)
		x.atRest()
	})
}

// A connection that the program's AfterRelease is not asked about, or refuses, gives up all that its caller had.
func TestAConnectionThatAfterReleaseDoesNotKeepHoldsNothing(t *testing.T) {
	var keep atomic.Bool
	keep.Store(true)
	bubble(t, 1, func(c *Options) {
		c.Config.MaxConns = 2
		c.Config.AfterRelease = func(*pgx.Conn) bool { return keep.Load() }
	}, func(ctx context.Context, x *fakes) {
		for _, acquire := range []func(context.Context) (*pgxpool.Conn, error){x.pool.PrimaryPool().Acquire, x.pool.Acquire} {
			use := func(as func(*pgxpool.Conn)) {
				for range 3 {
					c, err := acquire(withTimeout(x.t, time.Second))
					require.NoError(t, err)
					as(c)
					c.Release()
					settled()
				}
				x.atRest()
			}
			use(func(*pgxpool.Conn) {})
			use(func(c *pgxpool.Conn) { require.NoError(t, c.Conn().Close(ctx)) })
			use(func(c *pgxpool.Conn) { _, err := c.Exec(ctx, "begin"); require.NoError(t, err) })
			keep.Store(false)
			use(func(*pgxpool.Conn) {})
			keep.Store(true)
		}
	})
}

func TestAFollowingPoolHasRoomForAllThatTakeItsCalls(t *testing.T) {
	bubble(t, 2, func(c *Options) { c.Mode = ModeEquivalent; c.Config.MaxConns = 4 }, func(ctx context.Context, x *fakes) {
		for _, r := range x.replicas {
			r.Promote()
		}
		time.Sleep(6 * time.Second)
		pool := x.pool.PrimaryPool()
		var wg sync.WaitGroup
		for range 11 {
			wg.Go(func() {
				c, err := pool.Acquire(ctx)
				if assert.NoError(t, err) {
					time.Sleep(3 * time.Second)
					c.Release()
				}
			})
		}
		time.Sleep(time.Second)
		assert.EqualValues(t, 11, pool.Stat().AcquiredConns())
		begun := time.Now()
		_, err := x.pool.Exec(ctx, "insert into t values (1)")
		assert.NoError(t, err)
		assert.Less(t, time.Since(begun), time.Second, "eleven of twelve connections are in use")
		wg.Wait()
		x.atRest()
	})
	// A peer that comes later may be larger than all that were there.
	bubble(t, 1, func(c *Options) { c.Config.MaxConns = 2 }, func(ctx context.Context, x *fakes) {
		settled()
		for _, pool := range []*pgxpool.Pool{x.pool.PrimaryPool(), x.pool.ReplicaPool()} {
			assert.GreaterOrEqual(t, pool.Stat().MaxConns(), int32(20))
		}
	})
}

// Nobody is to blame for the time that a connect has spent in waiting for somebody to go to.
func TestAWaitIsNotTakenFromTheConnectTimeout(t *testing.T) {
	bubble(t, 2, func(c *Options) { c.Wait = time.Minute }, func(ctx context.Context, x *fakes) {
		time.Sleep(3 * time.Second)
		require.Equal(t, 5*time.Second, x.pool.Config().ConnConfig.ConnectTimeout)
		pool := x.pool.PrimaryPool()
		x.primary.Hang()
		done := make(chan error, 8)
		for range cap(done) {
			go func() { done <- pool.Ping(ctx) }()
		}
		time.Sleep(20 * time.Second)
		before := x.peer("primary")
		require.Equal(t, HealthDown, before.Health)
		x.primary.Thaw()
		for range cap(done) {
			assert.NoError(t, <-done)
		}
		assert.Equal(t, before.FaultAt, x.peer("primary").FaultAt, x.peer("primary").LastFault)
		assert.Equal(t, before.Trips, x.peer("primary").Trips)
		x.atRest()
	})
}

// With pgx before 5.13 database/sql executed it three times.
func TestDatabaseSQLDoesNotExecuteTwiceWhatItsConnectionDiedUnder(t *testing.T) {
	if !rereads() {
		t.Skip("pgx before 5.13")
	}
	bubble(t, 1, nil, func(ctx context.Context, x *fakes) {
		db := stdlib.OpenDBFromPool(x.pool.PrimaryPool())
		defer db.Close()
		require.NoError(t, db.PingContext(ctx))
		const write = "insert into log values (1)"
		x.primary.Handle(answering(func(s pgfake.Statement) *pgfake.Response {
			if s.Preparing || s.SQL != write {
				return nil
			}
			return &pgfake.Response{Cut: pgfake.CutBeforeAnswer}
		}))
		_, err := db.ExecContext(ctx, write)
		require.Error(t, err)
		settled()
		require.Equal(t, 1, x.primary.Applied(write))
	})
}
