package multipool

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/pgmultipool/multipool/internal/pgtest"
)

// crowd is callers that go on until they are told to stop.
type crowd struct {
	stop  chan struct{}
	wait  sync.WaitGroup
	calls atomic.Int64
	each  []atomic.Int64 // of which every caller has made so many

	mu     sync.Mutex
	errors map[string]int
}

// gather starts n callers of call, every call with a deadline of 5 s.
func gather(n int, call func(ctx context.Context) error) *crowd {
	return gatherFor(5*time.Second, n, call)
}

// operatorTime is a deadline of calls that wait for what a test does to the servers by hand, which takes its time on a
// busy machine: it is not the pool's.
const operatorTime = 30 * time.Second

// gatherFor is gather with another deadline.
func gatherFor(deadline time.Duration, n int, call func(ctx context.Context) error) *crowd {
	c := &crowd{stop: make(chan struct{}), each: make([]atomic.Int64, n), errors: map[string]int{}}
	for i := range n {
		c.wait.Go(func() {
			for {
				select {
				case <-c.stop:
					return
				default:
				}
				ctx, cancel := context.WithTimeout(context.Background(), deadline)
				err := call(ctx)
				cancel()
				if err != nil {
					c.mu.Lock()
					c.errors[err.Error()]++
					c.mu.Unlock()
				}
				c.calls.Add(1) // when all that it tells can be seen
				c.each[i].Add(1)
			}
		})
	}
	return c
}

// reach waits until the callers have made n calls more.
func (c *crowd) reach(t *testing.T, n int64) {
	t.Helper()
	goal := c.calls.Load() + n
	waitFor(t, "the callers", time.Minute, func() bool { return c.calls.Load() >= goal })
}

// turnOver waits until the call that each of the callers is in has ended, and what it met can be seen.
func (c *crowd) turnOver(t *testing.T) {
	t.Helper()
	for i := range c.each {
		goal := c.each[i].Load() + 1
		waitFor(t, "every caller", time.Minute, func() bool { return c.each[i].Load() >= goal })
	}
}

// dismiss stops the callers and returns how many calls they made and which errors they met.
func (c *crowd) dismiss() (calls int64, errors map[string]int) {
	close(c.stop)
	c.wait.Wait()
	return c.calls.Load(), c.errors
}

func TestNoReadFailsWhenAReplicaIsKilled(t *testing.T) {
	c := pgtest.Start(t, pgtest.Options{Standbys: 3})
	must(t, c, "create table items (id int primary key, body text)",
		"insert into items select n, 'item ' || n from generate_series(1, 1000) n")
	p := openPool(t, Options{}, c.ConnString("pool_max_conns=10"))
	waitUp(t, p)
	var id atomic.Int64
	// The race detector makes the processor the bottleneck: as many reads there would only take longer.
	reads := map[bool]int64{false: 20_000, true: 4_000}[raceEnabled]
	readers := gather(200, func(ctx context.Context) error {
		var body string
		return p.QueryRow(ctx, "select body from items where id = $1", id.Add(1)%1000+1).Scan(&body)
	})
	victim := c.Standbys()[1]
	readers.reach(t, reads)
	require.NoError(t, victim.Kill())
	readers.reach(t, 2*reads)
	// Half open is what it is while it is tried.
	waitFor(t, "its breaker", 10*time.Second, func() bool { return p.Status().Peers[2].Breaker == BreakerOpen })
	require.NoError(t, victim.Start())
	waitFor(t, "the replica to be back", 20*time.Second, func() bool { return p.Status().Peers[2].Health == HealthUp })
	back := p.Status().Peers[2].Reads
	readers.reach(t, 2*reads)
	calls, errors := readers.dismiss()
	assert.GreaterOrEqual(t, calls, 5*reads)
	assert.Empty(t, errors)
	status := p.Status()
	assert.Greater(t, status.Peers[2].Reads, back, "it serves reads again")
	assert.Zero(t, status.Peers[0].Reads, "the primary was spared")
	for _, ps := range status.Peers {
		assert.Zero(t, ps.InFlight, ps.Name)
		want := int64(0)
		if ps.Name == victim.Addr() {
			want = 1
		}
		assert.Equal(t, want, ps.Trips, "%s: one death is one trip", ps.Name)
	}
	t.Logf("%d reads, 0 errors; retries %d", calls, status.Peers[1].Retries+status.Peers[2].Retries+status.Peers[3].Retries)
}

func TestRestartsUnderIdleConnectionsCostNoRead(t *testing.T) {
	t.Parallel()
	c := pgtest.Start(t, pgtest.Options{Standbys: 2})
	p := openPool(t, Options{}, c.ConnString("pool_max_conns=20"))
	waitUp(t, p)
	victim := c.Standbys()[0]
	for _, mode := range []pgtest.Mode{pgtest.Fast, pgtest.Immediate} {
		fillPool(t, p, victim, 20)
		require.NoError(t, victim.Restart(mode))
		for range 100 {
			var n int
			require.NoError(t, p.QueryRow(testContext(t), "select 1").Scan(&n))
		}
	}
}

// fillPool makes n idle connections to a server.
func fillPool(t *testing.T, p *MultiPool, s *pgtest.Server, n int) {
	t.Helper()
	ctx := WithPeer(testContext(t), s.Addr())
	release(acquire(t, ctx, p, n))
}

// The first session after a promotion tells it: nobody has to look.
func TestARoleThatChangesIsSeenFromTraffic(t *testing.T) {
	t.Parallel()
	c := pgtest.Start(t, pgtest.Options{Standbys: 2})
	must(t, c, "create table t (v int)")
	p := openPool(t, Options{CheckInterval: time.Hour}, c.ConnString())
	waitUp(t, p)
	next := c.Standbys()[0]
	// A session of the replica that is promoted exists before it is.
	require.NoError(t, p.QueryRow(WithPeer(testContext(t), next.Addr()), "select 1").Scan(new(int)))
	require.NoError(t, c.Primary().Kill())
	require.NoError(t, next.Promote())
	writer := gather(1, func(ctx context.Context) error { _, err := p.Exec(ctx, "insert into t values (1)"); return err })
	reader := gather(4, func(ctx context.Context) error { return p.QueryRow(ctx, "select 1").Scan(new(int)) })
	waitFor(t, "the new primary", 10*time.Second, func() bool { return p.Status().Primary == next.Addr() })
	writer.reach(t, 3)
	_, failed := reader.dismiss()
	assert.Empty(t, failed)
	_, failed = writer.dismiss()
	assert.Empty(t, failed)
}

// Under TLS a connection hides its socket, and certificates are checked for every peer's own name.
func TestTheSameUnderTLS(t *testing.T) {
	t.Parallel()
	c := pgtest.Start(t, pgtest.Options{Standbys: 2, TLS: true})
	for _, mode := range []string{"sslmode=verify-full", "sslmode=prefer"} {
		p := openPool(t, Options{}, c.ConnString(mode, "sslrootcert="+c.CA(), "pool_max_conns=5"))
		waitUp(t, p)
		victim := c.Standbys()[0]
		var fault atomic.Bool // under prefer a connect that a dying server cuts in its TLS handshake goes on in the clear
		readers := gather(10, func(ctx context.Context) error {
			var encrypted bool
			if err := p.QueryRow(ctx, "select ssl from pg_stat_ssl where pid = pg_backend_pid()").Scan(&encrypted); err != nil {
				return err
			}
			if !encrypted && !(fault.Load() && mode == "sslmode=prefer") {
				return errors.New("in the clear")
			}
			return nil
		})
		readers.reach(t, 500)
		fault.Store(true)
		require.NoError(t, victim.Freeze())
		waitFor(t, "its fall", 10*time.Second, func() bool { return p.Status().Peers[1].Health == HealthDown })
		readers.reach(t, 500)
		require.NoError(t, victim.Thaw())
		waitFor(t, "its return", 20*time.Second, func() bool { return p.Status().Peers[1].Health == HealthUp })
		require.NoError(t, victim.Restart(pgtest.Fast))
		readers.reach(t, 500)
		_, failed := readers.dismiss()
		assert.Empty(t, failed, mode)
		_, err := p.Exec(testContext(t), "select 1")
		require.NoError(t, err)
		p.Close()
		for _, q := range p.peers() {
			assert.Zero(t, q.sockets.len(), q.name)
		}
	}
}

func TestWritersFollowAPromotion(t *testing.T) {
	for range 3 {
		c := pgtest.Start(t, pgtest.Options{Standbys: 2})
		must(t, c, "create table log (note text)")
		p := openPool(t, Options{Wait: operatorTime}, c.ConnString("pool_max_conns=20"))
		waitUp(t, p)
		next := c.Standbys()[0]
		require.NoError(t, c.Primary().Kill())
		waitFor(t, "its fall", 10*time.Second, func() bool { return p.Status().Peers[0].Health == HealthDown })
		// No reads: only the monitors can find the new primary.
		var first atomic.Int64
		writers := gatherFor(operatorTime, 50, func(ctx context.Context) error {
			_, err := p.Exec(ctx, "insert into log values ('x')")
			first.CompareAndSwap(0, time.Now().UnixNano())
			return err
		})
		time.Sleep(300 * time.Millisecond)
		require.Zero(t, first.Load(), "they wait")
		require.NoError(t, next.Promote())
		promoted := time.Now()
		writers.reach(t, 200)
		calls, failed := writers.dismiss()
		assert.Empty(t, failed)
		outage := time.Unix(0, first.Load()).Sub(promoted)
		t.Logf("%d writes, 0 failed; the first %v after the promoted server first took one", calls, outage)
		if !raceEnabled {
			assert.Less(t, outage, 50*time.Millisecond)
		}
		p.Close()
	}
}

// A primary that comes back as a replica before anybody has looked says so on the first new connection: what wants the
// primary is not served there.
func TestAPrimaryThatComesBackAsAReplicaServesNothingThatWantsThePrimary(t *testing.T) {
	for name, call := range map[string]func(context.Context, *MultiPool) (inRecovery bool, err error){
		"read": func(ctx context.Context, p *MultiPool) (standby bool, err error) {
			err = p.QueryRow(WithPrimary(ctx), "select pg_is_in_recovery()").Scan(&standby)
			return standby, err
		},
		"transaction": func(ctx context.Context, p *MultiPool) (standby bool, err error) {
			err = pgx.BeginFunc(ctx, p, func(tx pgx.Tx) error {
				return tx.QueryRow(ctx, "select pg_is_in_recovery()").Scan(&standby)
			})
			return standby, err
		},
		"connection": func(ctx context.Context, p *MultiPool) (standby bool, err error) {
			err = p.AcquireFunc(ctx, func(c *pgxpool.Conn) error {
				return c.QueryRow(ctx, "select pg_is_in_recovery()").Scan(&standby)
			})
			return standby, err
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := pgtest.Start(t, pgtest.Options{Standbys: 1})
			// Nobody looks by himself, and no connection of a monitor sees the end of its server.
			p := openPool(t, Options{CheckInterval: time.Hour, NoMonitorConns: true}, c.ConnString())
			waitUp(t, p)
			old, next := c.Primary(), c.Standbys()[0]
			require.NoError(t, p.Ping(testContext(t)))
			require.NoError(t, old.Stop(pgtest.Fast))
			require.NoError(t, next.Promote())
			require.NoError(t, old.Follow(next))
			if p.Status().Primary != old.Addr() {
				t.Log("somebody has looked") // after an attempt to connect that failed, perhaps
			}
			standby, err := call(testContext(t), p)
			require.NoError(t, err)
			assert.False(t, standby, "it reads the past")
			assert.Equal(t, next.Addr(), p.Status().Primary)
		})
	}
}
