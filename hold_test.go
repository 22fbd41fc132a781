package multipool

import (
	"context"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/pgmultipool/multipool/internal/pgfake"
)

// A hold-down, and any pause between tries, is for a peer that others can stand in for: it costs a share of the reads, never
// a call.

func TestAPeerIsNeededWhereNobodyElseServesWhatItCould(t *testing.T) {
	t.Parallel()
	down := func(of string) news { return turned(of, HealthDown) }
	cluster := func(more ...news) []news {
		return append([]news{primaryUp("a", 1), replicaUp("b"), replicaUp("c")}, more...)
	}
	for _, tc := range []struct {
		name string
		mode Mode
		news []news
		want string // who of those that are out is needed; with "!": nobody else serves
	}{
		{"a healthy cluster", ModeReplicated, cluster(), ""},
		{"a replica is down, and another serves", ModeReplicated, cluster(down("b")), ""},
		{"all replicas are down, and the primary serves the reads", ModeReplicated, cluster(down("b"), down("c")), "b c"},
		{"... until one is back", ModeReplicated, cluster(down("b"), down("c"), turned("c", HealthUp)), ""},
		{"the other replica is a suspect", ModeReplicated, cluster(down("b"), turned("c", HealthSuspect)), "b"},
		{"the primary is down: any replica may be promoted", ModeReplicated, cluster(down("a"), down("b")), "a! b!"},
		{"... and one was", ModeReplicated, cluster(down("a"), down("b"), primaryUp("c", 2)), "b"},
		{"... and another is left", ModeReplicated, []news{primaryUp("a", 1), replicaUp("b"), replicaUp("c"), down("a"), primaryUp("b", 2)}, ""},
		{"everything is down", ModeReplicated, cluster(down("a"), down("b"), down("c")), "a! b! c!"},
		{"the primary is drained", ModeReplicated, cluster(drains("a"), down("b")), "b!"},
		{"the replica that is well is paused", ModeReplicated, cluster(down("b"), finds("c", fitPaused)), "b"},
		{"replicas that never had a primary", ModeReplicated, []news{replicaUp("a"), replicaUp("b"), replicaUp("c"), down("b")}, ""},
		{"a server of another cluster", ModeReplicated, append([]news{isOf("a", 7), isOf("b", 7), isOf("c", 8)}, cluster(down("a"), down("c"))...), "a!"},
		{"a server of unknown role", ModeReplicated, []news{primaryUp("a", 1), replicaUp("b"), down("c")}, ""},
		{"... while there is no primary", ModeReplicated, []news{replicaUp("a"), replicaUp("b"), down("c")}, "c!"},
		{"equivalent peers", ModeEquivalent, cluster(down("b")), ""},
		{"one of them is left", ModeEquivalent, []news{primaryUp("a", 1), primaryUp("b", 1), primaryUp("c", 1), down("a"), down("b")}, ""},
		{"none of them is", ModeEquivalent, []news{primaryUp("a", 1), down("a"), down("b"), down("c")}, "a! b! c!"},
		{"ordered peers", ModeOrdered, cluster(down("a")), ""},
		{"none of them is left", ModeOrdered, cluster(down("a"), down("b"), down("c")), "a! b! c!"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			top := tell(newTopology(tc.mode, idlePeers("a", "b", "c"), make([]Role, 3)), tc.news...)
			got := ""
			for i, p := range top.peers {
				if top.members[i].stands() {
					continue // it is asked of those that are out
				}
				switch top.needs(p) {
				case needSpared:
					got += " " + p.name
				case needLacked:
					got += " " + p.name + "!"
				}
			}
			require.Equal(t, tc.want, got[min(len(got), 1):])
		})
	}
}

// flap has a peer fall and return until it is held for half a minute, and fall once more.
func (x *fakes) flap(name string, p *pgfake.Peer) {
	x.t.Helper()
	for range 9 {
		p.Die()
		settled()
		require.Equal(x.t, HealthDown, x.peer(name).Health)
		p.Revive()
		for x.peer(name).Health != HealthUp {
			time.Sleep(50 * time.Millisecond)
		}
	}
	p.Die()
	settled()
	p.Revive()
	time.Sleep(5 * time.Second)
	require.Equal(x.t, HealthDown, x.peer(name).Health, "others stand in for it, so it is held")
}

func TestAStandbyThatWasHeldTakesWritesOnceItIsPromoted(t *testing.T) {
	bubble(t, 2, nil, func(ctx context.Context, x *fakes) {
		x.read(ctx)
		x.flap("replica1", x.replicas[0])
		x.primary.Die()
		begun := time.Now()
		x.replicas[0].Promote()
		_, err := x.pool.Exec(ctx, "insert into t values (1)")
		require.NoError(t, err)
		assert.Less(t, time.Since(begun), 50*time.Millisecond)
		assert.Equal(t, "replica1:5432", x.pool.Status().Primary)
	})
}

func TestAHeldReplicaIsReadOnceTheOtherFalls(t *testing.T) {
	bubble(t, 2, nil, func(ctx context.Context, x *fakes) {
		x.read(ctx)
		x.flap("replica1", x.replicas[0])
		x.replicas[1].Die()
		settled()
		assert.Equal(t, HealthUp, x.peer("replica1").Health)
		assert.Equal(t, "replica1:5432", x.read(ctx))
	})
}

func TestACallThatNamesAHeldPeerIsServed(t *testing.T) {
	bubble(t, 2, nil, func(ctx context.Context, x *fakes) {
		x.read(ctx)
		x.flap("replica1", x.replicas[0])
		begun := time.Now()
		assert.Equal(t, "replica1:5432", x.read(WithPeer(ctx, "replica1:5432")))
		assert.Less(t, time.Since(begun), 200*time.Millisecond)
	})
}

// A server that answers looks and fails every statement is not put out and back as fast as it can fail.
func TestAPrimaryThatFailsEveryStatementFallsNowAndThen(t *testing.T) {
	bubble(t, 1, func(c *Options) { c.Wait = time.Minute }, func(ctx context.Context, x *fakes) {
		x.primary.Handle(answering(func(pgfake.Statement) *pgfake.Response {
			return &pgfake.Response{Err: &pgfake.Error{Severity: "FATAL", Code: "58030", Message: "could not read file"}}
		}))
		const seconds = 10
		for end := time.Now().Add(seconds * time.Second); time.Now().Before(end); {
			_, err := x.pool.Exec(ctx, "insert into t values (1)")
			require.Error(t, err)
			time.Sleep(time.Millisecond)
		}
		trips := x.peer("primary").Trips
		assert.LessOrEqual(t, trips, int64(seconds*time.Second/retryAwaited)+1)
		assert.GreaterOrEqual(t, trips, int64(seconds), "and it is not held")
	})
}

func TestAPrimaryThatFlapsIsNeverHeld(t *testing.T) {
	bubble(t, 2, nil, func(ctx context.Context, x *fakes) {
		_, err := x.pool.Exec(ctx, "insert into t values (0)")
		require.NoError(t, err)
		for i := range 12 {
			x.primary.Die()
			settled()
			time.Sleep(300 * time.Millisecond)
			x.primary.Revive()
			begun := time.Now()
			_, err := x.pool.Exec(ctx, "insert into t values (1)")
			require.NoError(t, err)
			assert.Less(t, time.Since(begun), 200*time.Millisecond, "fall %d", i)
		}
	})
}

// While everything is down each is tried now and then, and at once and often when a call waits; where one serves the others
// are tried seldom.
func TestPeersThatAreNeededAreTriedOften(t *testing.T) {
	bubble(t, 2, func(c *Options) { c.Wait = time.Hour }, func(ctx context.Context, x *fakes) {
		x.read(ctx)
		all := append([]*pgfake.Peer{x.primary}, x.replicas...)
		for _, p := range all {
			p.Die()
		}
		tries := func(after, over time.Duration) (n []int) {
			time.Sleep(after)
			for _, p := range all {
				p.ResetCounters()
			}
			time.Sleep(over)
			for _, p := range all {
				n = append(n, p.Dials())
			}
			return n
		}
		for _, after := range []time.Duration{5 * time.Second, 2 * time.Minute} {
			for _, n := range tries(after, 10*time.Second) {
				assert.InDelta(t, 20, n, 3)
			}
		}
		var wg sync.WaitGroup
		wg.Go(func() {
			_, err := x.pool.Exec(ctx, "insert into t values (1)")
			assert.NoError(t, err)
		})
		for _, n := range tries(0, 200*time.Millisecond) {
			assert.Positive(t, n, "at once, or when the last try is long enough ago")
		}
		for _, n := range tries(time.Second, 10*time.Second) {
			assert.InDelta(t, 66, n, 8)
		}
		x.replicas[0].Revive()
		x.primary.Revive()
		begun := time.Now()
		wg.Wait()
		assert.Less(t, time.Since(begun), 200*time.Millisecond)
		n := tries(time.Minute, time.Minute)
		assert.LessOrEqual(t, n[2], 20)
	})
}

// A server that tells of a wrong password is knocked at as seldom as ever, needed or not.
func TestAPrimaryThatRefusesThePasswordIsKnockedAtSeldom(t *testing.T) {
	bubble(t, 1, nil, func(ctx context.Context, x *fakes) {
		x.read(ctx)
		x.primary.StartupError("28P01")
		x.primary.CutConns()
		time.Sleep(5 * time.Second)
		x.primary.ResetCounters()
		time.Sleep(time.Minute)
		assert.LessOrEqual(t, x.primary.Dials(), 16)
	})
}

// What is found any more decides, except about the last that serves.
func TestTheLastPeerThatServesIsKeptWhetherItIsFoundOrNot(t *testing.T) {
	var l peerList
	l.say(nil, "primary", "replica1", "replica2")
	bubble(t, 2, func(c *Options) { c.Discover = l.discover }, func(ctx context.Context, x *fakes) {
		x.read(ctx)
		x.primary.Die()
		x.replicas[1].Die()
		x.plug("nowhere:5432", pgfake.New(pgfake.Options{Standby: true}))
		x.network["nowhere:5432"].Refuse(nil)
		l.say(nil, "nowhere")
		for range 12 {
			time.Sleep(5 * time.Second)
			assert.Equal(t, "replica1:5432", x.read(ctx))
		}
		l.say(nil, "primary", "nowhere")
		x.primary.Revive()
		time.Sleep(time.Minute)
		var names []string
		for _, ps := range x.pool.Status().Peers {
			names = append(names, ps.Name)
		}
		slices.Sort(names)
		assert.Equal(t, []string{"nowhere:5432", "primary:5432"}, names, "once the primary serves the reads it goes")
	})
}
