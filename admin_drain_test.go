package multipool

import (
	"context"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// Who drains a peer may think better of it while the drain waits: the drain ends, and the peer takes calls at once.
func TestAResumeOvertakesADrain(t *testing.T) {
	for _, name := range []string{"primary", "replica1"} {
		bubble(t, 2, func(c *Options) { c.CheckInterval = time.Minute }, func(ctx context.Context, x *fakes) {
			settled()
			at := WithPeer(ctx, name+":5432")
			held, err := x.pool.Acquire(at)
			require.NoError(t, err)
			ended := make(chan error, 1)
			go func() {
				if name == "primary" {
					ended <- drainPrimary(x.pool, ctx)
				} else {
					ended <- x.pool.Drain(ctx, name+":5432")
				}
			}()
			time.Sleep(time.Second)
			assert.True(t, x.peer(name).Drained)
			require.NoError(t, x.pool.Resume(name+":5432"))
			select {
			case err := <-ended:
				assert.ErrorIs(t, err, errResumed)
				held.Release()
			case <-time.After(time.Minute):
				t.Error("the drain waits on for a peer that is in use, and may be so for ever")
				held.Release()
				<-ended
			}
			begun := time.Now()
			_, err = x.pool.Exec(at, "select 1")
			require.NoError(t, err)
			assert.Less(t, time.Since(begun), 100*time.Millisecond)
			assert.False(t, x.peer(name).Drained)
		})
	}
}

func drainPrimary(p *MultiPool, ctx context.Context) error {
	_, err := p.DrainPrimary(ctx)
	return err
}

func TestDrainPrimaryNamesNobodyWhereThereIsNoPrimary(t *testing.T) {
	bubble(t, 1, func(c *Options) { c.Mode = ModeEquivalent }, func(ctx context.Context, x *fakes) {
		settled()
		name, err := x.pool.DrainPrimary(ctx)
		require.ErrorIs(t, err, ErrNoPrimary)
		assert.Empty(t, name)
	})
}

// Whatever way the program has a connection, the drain waits for it.
func TestADrainWaitsForConnectionsOfEveryPool(t *testing.T) {
	bubble(t, 1, nil, func(ctx context.Context, x *fakes) {
		settled()
		c, err := x.pool.PrimaryPool().Acquire(ctx)
		require.NoError(t, err)
		c.Release()
		all := x.pool.PrimaryPool().AcquireAllIdle(ctx)
		require.Len(t, all, 1)
		soon, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		name, err := x.pool.DrainPrimary(soon)
		require.ErrorIs(t, err, context.DeadlineExceeded)
		assert.Equal(t, "primary:5432", name, "it stays drained")
		all[0].Release()
		name, err = x.pool.DrainPrimary(ctx)
		require.NoError(t, err)
		settled()
		assert.Zero(t, x.primary.Conns())
		require.NoError(t, x.pool.Resume(name))
		_, err = x.pool.Exec(ctx, "select 1")
		require.NoError(t, err)
	})
}

// A drained peer is not filled up to MinConns, falls and rises without being used, and is used when it is resumed.
func TestADrainedPeerStaysDrainedWhateverBecomesOfIt(t *testing.T) {
	bubble(t, 1, func(c *Options) { c.Config.MinConns = 2 }, func(ctx context.Context, x *fakes) {
		time.Sleep(2 * time.Second)
		require.NoError(t, x.pool.Drain(ctx, "replica1:5432"))
		time.Sleep(time.Minute)
		assert.Zero(t, x.replicas[0].Conns())
		x.replicas[0].Die()
		time.Sleep(10 * time.Second)
		x.replicas[0].Revive()
		time.Sleep(10 * time.Second)
		assert.Zero(t, x.replicas[0].Conns())
		assert.True(t, x.peer("replica1").Drained)
		assert.Equal(t, "primary:5432", x.read(ctx))
		require.NoError(t, x.pool.Resume("replica1:5432"))
		settled()
		assert.Equal(t, "replica1:5432", x.read(ctx))
	})
}

// Who waits for the end of a drain is not what the drain waits for.
func TestADrainDoesNotWaitForThoseWhoWaitForItsEnd(t *testing.T) {
	bubble(t, 1, func(c *Options) {
		c.Wait = 30 * time.Second
		c.Config.AfterConnect = func(context.Context, *pgx.Conn) error { time.Sleep(50 * time.Millisecond); return nil } // as loading types does
	}, func(ctx context.Context, x *fakes) {
		time.Sleep(3 * time.Second)
		pool := x.pool.PrimaryPool()
		done := make(chan error, 1)
		go func() { _, err := pool.Exec(ctx, "insert into t values (1)"); done <- err }()
		time.Sleep(20 * time.Millisecond) // its connection is being made
		begun := time.Now()
		assert.NoError(t, drainPrimary(x.pool, withTimeout(x.t, 20*time.Second)))
		assert.Less(t, time.Since(begun), time.Second)
		assert.Empty(t, done, "the call waits")
		require.NoError(t, x.pool.Resume("primary:5432"))
		assert.NoError(t, <-done)
		x.atRest()
	})
}
