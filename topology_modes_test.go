package multipool

import (
	"context"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func drains(of string) news  { return news{of, observation{drained: yes}} }
func resumes(of string) news { return news{of, observation{drained: no}} }
func stays(of string) news   { return news{of, observation{steady: true}} }

func TestEachModeFillsTheListsInItsWay(t *testing.T) {
	t.Parallel()
	type all = []news
	three := all{primaryUp("a", 1), primaryUp("b", 1), primaryUp("c", 9)}
	ordered := all{primaryUp("a", 1), replicaUp("b"), replicaUp("c")}
	with := func(base all, more ...news) all { return append(append(all{}, base...), more...) }
	for _, tc := range []struct {
		name string
		mode Mode
		news all
		want string
	}{
		{"equals: everything to everybody", ModeEquivalent, three,
			"reads:a,b,c writes:a,b,c replicas:a,b,c any:a,b,c primary: settled"},
		{"equals: the first to answer serves at once", ModeEquivalent, all{primaryUp("b", 1)},
			"reads:b writes:b replicas:b any:b primary: unseen"},
		{"equals: a death", ModeEquivalent, with(three, turned("b", HealthDown)),
			"reads:a,c writes:a,c replicas:a,c any:a,c primary: settled"},
		{"equals: a suspect is avoided", ModeEquivalent, with(three, turned("b", HealthSuspect)),
			"reads:a,c writes:a,c replicas:a,c any:a,c primary: settled"},
		{"equals: all are suspects", ModeEquivalent, with(three, turned("a", HealthSuspect), turned("b", HealthSuspect), turned("c", HealthSuspect)),
			"reads:a,b,c writes:a,b,c replicas:a,b,c any:a,b,c primary: settled"},
		{"equals: clusters of their own", ModeEquivalent, with(three, isOf("a", 1), isOf("b", 2), isOf("c", 3)),
			"reads:a,b,c writes:a,b,c replicas:a,b,c any:a,b,c primary: settled"},
		{"equals: one is a standby", ModeEquivalent, with(three, replicaUp("b")),
			"reads:a,b,c writes:a,c replicas:a,b,c any:a,b,c primary: settled"},
		{"equals: the only one that is no standby is slow", ModeEquivalent, with(three, replicaUp("b"), replicaUp("c"), news{"a", observation{slow: yes}}),
			"reads:b,c writes:a replicas:b,c any:b,c primary: settled"},
		{"equals: one is drained", ModeEquivalent, with(three, drains("a")),
			"reads:b,c writes:b,c replicas:b,c any:b,c primary: settled"},
		{"equals: nobody", ModeEquivalent, with(three, turned("a", HealthDown), turned("b", HealthDown), turned("c", HealthMisconfigured)),
			"reads: writes: replicas: any: primary: settled"},

		{"ordered: the first", ModeOrdered, ordered,
			"reads:a writes:a replicas:a any:a primary:a settled"},
		{"ordered: the first choice waits for those that come earlier", ModeOrdered, all{replicaUp("b")},
			"reads: writes: replicas: any: primary: unseen"},
		{"ordered: ... not for those that come later", ModeOrdered, all{primaryUp("a", 1)},
			"reads:a writes:a replicas:a any:a primary:a unseen"},
		{"ordered: ... and not for ever", ModeOrdered, all{replicaUp("b"), settleNow},
			"reads:b writes:b replicas:b any:b primary:b settled unseen"},
		{"ordered: a suspicion moves nothing", ModeOrdered, with(ordered, turned("a", HealthSuspect)),
			"reads:a writes:a replicas:a any:a primary:a settled"},
		{"ordered: a death moves on", ModeOrdered, with(ordered, turned("a", HealthDown)),
			"reads:b writes:b replicas:b any:b primary:b settled"},
		{"ordered: a return does not move back yet", ModeOrdered, with(ordered, turned("a", HealthDown), turned("a", HealthUp)),
			"reads:b writes:b replicas:b any:b primary:b settled"},
		{"ordered: ... but after a while", ModeOrdered, with(ordered, turned("a", HealthDown), turned("a", HealthUp), stays("a")),
			"reads:a writes:a replicas:a any:a primary:a settled"},
		{"ordered: ... and not if it falls meanwhile", ModeOrdered, with(ordered, turned("a", HealthDown), turned("a", HealthUp), turned("a", HealthDown), stays("b")),
			"reads:b writes:b replicas:b any:b primary:b settled"},
		{"ordered: a steady second waits for a first that is well", ModeOrdered, with(ordered, turned("a", HealthDown), turned("b", HealthDown), turned("b", HealthUp), turned("a", HealthUp), stays("b")),
			"reads:c writes:c replicas:c any:c primary:c settled"},
		{"ordered: an earlier one at once where the leader falls", ModeOrdered, with(ordered, turned("a", HealthDown), turned("a", HealthUp), turned("b", HealthDown)),
			"reads:a writes:a replicas:a any:a primary:a settled"},
		{"ordered: a later one never takes it", ModeOrdered, with(ordered, stays("b"), stays("c")),
			"reads:a writes:a replicas:a any:a primary:a settled"},
		{"ordered: a drain moves on", ModeOrdered, with(ordered, drains("a")),
			"reads:b writes:b replicas:b any:b primary:b settled"},
		{"ordered: nobody", ModeOrdered, with(ordered, turned("a", HealthDown), turned("b", HealthDown), turned("c", HealthDown)),
			"reads: writes: replicas: any: primary:c settled"},

		{"replicated: a replica is drained", ModeReplicated, with(ordered, drains("b")),
			"reads:c writes:a replicas:c any:c,a primary:a settled"},
		{"replicated: all of them are", ModeReplicated, with(ordered, drains("b"), drains("c")),
			"reads:a writes:a replicas: any:a primary:a fallback settled"},
		{"replicated: the primary is", ModeReplicated, with(ordered, drains("a")),
			"reads:b,c writes: replicas:b,c any:b,c primary:a settled"},
		{"replicated: the primary and another is promoted", ModeReplicated, with(ordered, drains("a"), primaryUp("b", 2)),
			"reads:c writes:b replicas:c any:c,b primary:b rivals:a settled"},
		{"replicated: all are", ModeReplicated, with(ordered, drains("a"), drains("b"), drains("c")),
			"reads: writes: replicas: any: primary:a settled"},
		{"replicated: and is resumed", ModeReplicated, with(ordered, drains("a"), drains("b"), resumes("b"), resumes("a")),
			"reads:b,c writes:a replicas:b,c any:b,c,a primary:a settled"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			names := []string{"a", "b", "c"}
			top := newTopology(tc.mode, idlePeers(names...), make([]Role, len(names)))
			require.Equal(t, tc.want, listsOf(tell(top, tc.news...)))
		})
	}
}

// Who was never seen otherwise may lead at once; who has fallen waits.
func TestAnOrderedPoolMovesBackOnceAndLate(t *testing.T) {
	bubble(t, 2, func(c *Options) { c.Mode = ModeOrdered; c.ReturnAfter = 20 * time.Second }, func(ctx context.Context, x *fakes) {
		leader := func() string {
			settled()
			x.read(ctx)
			return x.pool.Status().Primary
		}
		assert.Equal(t, "primary:5432", leader())
		x.primary.Die()
		settled()
		assert.Equal(t, "replica1:5432", x.read(ctx))
		x.replicas[0].Die()
		assert.Equal(t, "replica2:5432", x.read(ctx))
		x.replicas[0].Revive()
		time.Sleep(3 * time.Second)
		x.primary.Revive()
		var moves []string
		last := leader()
		for range 120 {
			time.Sleep(500 * time.Millisecond)
			if now := leader(); now != last {
				moves = append(moves, now)
				last = now
			}
		}
		assert.Equal(t, []string{"primary:5432"}, moves)
		_, err := x.pool.Exec(ctx, "insert into t values (1)")
		require.NoError(t, err)
	})
}

// Who is down when the pool is opened has never been well: it waits like anybody who returns.
func TestAnOrderedPoolThatBeganWithItsSecondMovesBackLate(t *testing.T) {
	bubble(t, 2, func(c *Options) { c.Mode = ModeOrdered; c.ReturnAfter = 20 * time.Second }, func(ctx context.Context, x *fakes) {
		settled()
		x.primary.Die()
		p, err := Open(t.Context(), Options{Config: x.pool.Config(), Mode: ModeOrdered, ReturnAfter: 20 * time.Second})
		require.NoError(t, err)
		defer p.Close()
		time.Sleep(time.Minute)
		require.Equal(t, "replica1:5432", p.Status().Primary)
		x.primary.Revive()
		revived := time.Now()
		for p.Status().Primary != "primary:5432" && time.Since(revived) < time.Minute {
			time.Sleep(100 * time.Millisecond)
		}
		assert.GreaterOrEqual(t, time.Since(revived), 20*time.Second)
		assert.Less(t, time.Since(revived), 30*time.Second)
	})
}
