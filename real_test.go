package multipool

import (
	"context"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/pgmultipool/multipool/internal/pgtest"
)

// What the tests on real servers share.

// journal keeps the decisions of a pool, by its Routed hook.
type journal struct {
	mu  sync.Mutex
	all []Decision
}

func (j *journal) hooks() *Hooks {
	return &Hooks{Routed: func(_ context.Context, d Decision) {
		j.mu.Lock()
		defer j.mu.Unlock()
		j.all = append(j.all, d)
	}}
}

// take returns the decisions since the last take.
func (j *journal) take() []Decision {
	j.mu.Lock()
	defer j.mu.Unlock()
	all := j.all
	j.all = nil
	return all
}

// openPool opens a pool and closes it at the test's end.
func openPool(t testing.TB, config Options, connString string) *MultiPool {
	t.Helper()
	pool, err := ParseConfig(connString)
	require.NoError(t, err)
	return openConfig(t, config, pool)
}

func openConfig(t testing.TB, config Options, pool *pgxpool.Config) *MultiPool {
	t.Helper()
	config.Config = pool
	p, err := Open(context.Background(), config)
	require.NoError(t, err)
	t.Cleanup(p.Close)
	return p
}

// waitFor polls a condition.
func waitFor(t testing.TB, what string, limit time.Duration, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(limit); !ok(); time.Sleep(2 * time.Millisecond) {
		require.True(t, time.Now().Before(deadline), "waited %v for %s", limit, what)
	}
}

// within repeats a measurement of time until one keeps to a limit: a machine that is busy with something else makes any
// of them late, and a pool that is too slow makes all of them.
func within(t testing.TB, limit time.Duration, what string, measure func() time.Duration) {
	t.Helper()
	var all []time.Duration
	for range 5 {
		took := measure()
		all = append(all, took)
		if took < limit {
			break
		}
	}
	t.Logf("%s: %v", what, all)
	assert.Less(t, all[len(all)-1], limit, what)
}

// undisturbed repeats f until the pool has had no news of its peers while it ran: on a busy machine a replica is slow for
// a moment, or suspect, and reads keep away from it, as they should.
func undisturbed(t testing.TB, p *MultiPool, f func()) {
	t.Helper()
	for range 20 {
		waitFor(t, "no peer to be slow", time.Minute, func() bool {
			return !slices.ContainsFunc(p.Status().Peers, func(ps PeerStatus) bool { return ps.Slow && ps.Health == HealthUp })
		})
		before := p.topology.Load()
		f()
		if p.topology.Load() == before {
			return
		}
	}
	require.Fail(t, "there is always news of the peers")
}

// openEarly opens pools until the first thing that is done with one is over before the time for the first looks is. From
// then on a pool goes by who has answered so far, as it has to, and on a busy machine that may be anybody. What first
// sees is to be judged afterwards.
func openEarly(t testing.TB, open func() *MultiPool, first func(*MultiPool)) *MultiPool {
	t.Helper()
	for range 100 {
		begun := time.Now()
		p := open()
		first(p)
		if time.Since(begun) < settleTime {
			return p
		}
		p.Close()
	}
	require.Fail(t, "this machine is too slow for first calls that wait for all first looks")
	return nil
}

// seen waits until every first look has ended.
func seen(t testing.TB) func(*MultiPool) {
	return func(p *MultiPool) {
		t.Helper()
		waitFor(t, "the first looks", 20*time.Second, func() bool { return !p.topology.Load().unseen })
	}
}

// waitUp waits until every peer has been seen well and its role is known.
func waitUp(t testing.TB, p *MultiPool) {
	t.Helper()
	waitFor(t, "all peers", 20*time.Second, func() bool {
		for _, ps := range p.Status().Peers {
			if ps.Health != HealthUp || ps.Role == RoleUnknown {
				return false
			}
		}
		return true
	})
}

// acquire takes n connections of a pool, all at once.
func acquire(t testing.TB, ctx context.Context, pool interface {
	Acquire(context.Context) (*pgxpool.Conn, error)
}, n int) (held []*pgxpool.Conn) {
	t.Helper()
	for range n {
		c, err := pool.Acquire(ctx)
		require.NoError(t, err)
		held = append(held, c)
	}
	return held
}

func release(held []*pgxpool.Conn) {
	for _, c := range held {
		c.Release()
	}
}

func testContext(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// must runs statements on the cluster's primary and waits until the standbys have them.
func must(t testing.TB, c *pgtest.Cluster, statements ...string) {
	t.Helper()
	ctx := testContext(t)
	for _, s := range statements {
		require.NoError(t, c.Primary().Exec(ctx, s))
	}
	require.NoError(t, c.WaitCaughtUp(ctx))
}

// stopMyself stops this process, and has another start it again.
func stopMyself(t *testing.T, d time.Duration) {
	t.Helper()
	pid := strconv.Itoa(os.Getpid())
	waker := exec.Command("sh", "-c", "kill -STOP "+pid+"; sleep "+strconv.FormatFloat(d.Seconds(), 'f', 3, 64)+"; kill -CONT "+pid)
	require.NoError(t, waker.Run())
}

// testLogger logs everything as text.
func testLogger(w io.Writer) *slog.Logger {
	return slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

func (r *sockets) len() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.all)
}
