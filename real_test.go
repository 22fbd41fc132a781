package multipool

import (
	"context"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
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
func openPool(t testing.TB, config Config, connString string) *MultiPool {
	t.Helper()
	pool, err := ParseConfig(connString)
	require.NoError(t, err)
	return openConfig(t, config, pool)
}

func openConfig(t testing.TB, config Config, pool *pgxpool.Config) *MultiPool {
	t.Helper()
	config.Pool = pool
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

// waitUp waits until every peer has been seen well and its role is known.
func waitUp(t testing.TB, p *MultiPool) {
	t.Helper()
	waitFor(t, "all peers", 20*time.Second, func() bool {
		for _, ps := range p.Status().Peers {
			if ps.Health != healthUp.String() || ps.Role == RoleUnknown {
				return false
			}
		}
		return true
	})
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
