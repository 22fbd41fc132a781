package multipool

import (
	"context"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// picker is a balancer that a test makes.
type picker func(Candidates) int

func (f picker) Pick(c Candidates) int { return f(c) }

// balanced is a topology of a primary a and replicas b to d, all well, with a balancer.
func balanced(mode Mode, b Balancer) *topology {
	top := tell(zoned(mode, "", ""), primaryUp("a", 1), replicaUp("b"), replicaUp("c"), replicaUp("d"))
	if mode == ModeEquivalent {
		top = tell(top, primaryUp("b", 1), primaryUp("c", 1), primaryUp("d", 1))
	}
	top.balancer = b
	return top
}

func TestTheBalancerIsAskedWhereThereIsAChoice(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name  string
		mode  Mode
		place place
		named string
		news  []news
		want  string // whom it is asked about; "" if it is not
	}{
		{"reads", ModeReplicated, placeReads, "", nil, "bcd"},
		{"reads with one replica", ModeReplicated, placeReads, "", []news{turned("c", HealthDown), turned("d", HealthDown)}, ""},
		{"reads that fall back", ModeReplicated, placeReads, "", []news{turned("b", HealthDown), turned("c", HealthDown), turned("d", HealthDown)}, ""},
		{"reads of suspects", ModeReplicated, placeReads, "", []news{turned("a", HealthDown), turned("b", HealthSuspect), turned("c", HealthSuspect), turned("d", HealthDown)}, "bc"},
		{"writes", ModeReplicated, placePrimary, "", nil, ""},
		{"TargetReplica", ModeReplicated, placeReplica, "", nil, "bcd"},
		{"TargetAny", ModeReplicated, placeAny, "", nil, "bcda"},
		{"named peers", ModeReplicated, placeNamed, "c", nil, "bcd"},
		{"equals: reads", ModeEquivalent, placeReads, "", nil, "abcd"},
		{"equals: writes", ModeEquivalent, placePrimary, "", nil, "abcd"},
		{"ordered: reads", ModeOrdered, placeReads, "", nil, ""},
		{"ordered: named peers", ModeOrdered, placeNamed, "c", nil, "abcd"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			asked := ""
			top := tell(balanced(tc.mode, picker(func(c Candidates) int {
				asked = ""
				for i := range c.Len() {
					asked += c.Name(i)
				}
				return -1
			})), tc.news...)
			in := intent{place: tc.place, reads: tc.place != placePrimary, reason: ReasonRead}
			for i := range top.members {
				if p := top.members[i].peer; p.name == tc.named {
					in.peers = append(in.peers, p)
				}
			}
			chosen, _ := top.pick(&in, &tried{})
			require.NotNil(t, chosen, "the default chooses where it declines")
			require.Equal(t, tc.want, asked)
			asked = "nobody"
			require.True(t, top.takes(&in))
			require.Equal(t, "nobody", asked, "who waits does not ask")
		})
	}
}

func TestTheBalancersWordIsTakenWhereItIsUsable(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name  string
		pick  int
		tried string
		want  []string
	}{
		{"the first", 0, "", []string{"b"}},
		{"the last", 2, "", []string{"d"}},
		{"it declines", -1, "", []string{"b", "c", "d"}},
		{"far below", -7, "", []string{"b", "c", "d"}},
		{"beyond the end", 3, "", []string{"b", "c", "d"}},
		{"one that has failed the call", 1, "c", []string{"b", "d"}},
	} {
		top := balanced(ModeReplicated, picker(func(Candidates) int { return tc.pick }))
		noted := tried{}
		for i := range top.members {
			if p := top.members[i].peer; p.name == tc.tried {
				noted.add(p)
			}
		}
		got := map[string]bool{}
		for range 200 {
			p, why := top.pick(&intent{place: placeReads, reads: true, reason: ReasonRead}, &noted)
			got[p.name] = true
			require.Equal(t, ReasonRead, why)
		}
		require.Equal(t, tc.want, sortedKeys(got), tc.name)
	}
}

func TestABalancersPanicIsItsCallers(t *testing.T) {
	t.Parallel()
	top := balanced(ModeReplicated, picker(func(c Candidates) int { return len(c.Name(c.Len())) }))
	require.Panics(t, func() { top.pick(&intent{place: placeReads, reads: true, reason: ReasonRead}, &tried{}) }, "there is no such candidate")
}

func TestCandidatesOfATestAreSeenAsItSays(t *testing.T) {
	t.Parallel()
	c := NewCandidates(false,
		CandidatePeer{Name: "a", Role: RolePrimary, Zone: "z", Weight: 2, InFlight: 3, Latency: 4, RoundTrip: 5},
		CandidatePeer{Name: "b", InFlight: 2}, CandidatePeer{Name: "c", Tried: true}, CandidatePeer{Name: "d", Full: true})
	require.Equal(t, []any{4, "a", RolePrimary, "z", 2.0, 3, time.Duration(4), time.Duration(5), true, true, false, false},
		[]any{c.Len(), c.Name(0), c.Role(0), c.Zone(0), c.Weight(0), c.InFlight(0), c.Latency(0), c.RoundTrip(0), c.Usable(0), c.Ready(0), c.Reads(), c.Named()})
	require.Equal(t, 1.0, c.Weight(1))
	require.False(t, c.Usable(2))
	require.True(t, c.Usable(3))
	require.False(t, c.Ready(3))
	require.Equal(t, []int{0, 3, 3}, []int{c.LessBusy(0, 1), c.LessBusy(0, 3), c.LessBusy(3, 1)}, "by weight, and idle ones first")
	c = NewCandidates(true, CandidatePeer{Named: true}, CandidatePeer{})
	require.Equal(t, []bool{true, true, true, false}, []bool{c.Reads(), c.Named(), c.Usable(0), c.Usable(1)})
	near := func(far time.Duration) (at [2]int) {
		for range 100 {
			at[Nearest().Pick(NewCandidates(true, CandidatePeer{RoundTrip: time.Millisecond}, CandidatePeer{RoundTrip: far}))]++
		}
		return at
	}
	require.Equal(t, 100, near(3 * time.Millisecond)[0])
	require.NotZero(t, near(1500 * time.Microsecond)[1])
}

func TestCandidatesTellWhatIsKnown(t *testing.T) {
	t.Parallel()
	top := balanced(ModeReplicated, nil)
	c, d := top.members[2].peer, top.members[3].peer
	c.zone, c.load.weight = "north", 4
	c.load.share.Store(fullShare / 4)
	c.load.out.Store(3)
	c.role.Store(int32(RoleReplica))
	c.roundTrip.note(3 * time.Millisecond)
	for range latencySample {
		c.latency.note(5 * time.Millisecond)
	}
	d.behind.forget()
	d.role.Store(int32(RoleReplica))
	in := intent{place: placeReads, reads: true, reason: ReasonRead}
	view := func(noted *tried) Candidates { return candidatesOf(top.drawn.reads.peers, &in, noted) }
	v := view(&tried{})
	require.Equal(t, 3, v.Len())
	require.Equal(t, []any{"c", RoleReplica, "north", 1.0, 3, 3 * time.Millisecond},
		[]any{v.Name(1), v.Role(1), v.Zone(1), v.Weight(1), v.InFlight(1), v.RoundTrip(1)})
	require.Zero(t, v.Latency(1), "the watch has not looked yet")
	c.latency.median()
	require.Equal(t, 5*time.Millisecond, v.Latency(1), "it is a view")
	require.Equal(t, []any{"", 1.0, 0, time.Duration(0), time.Duration(0)},
		[]any{v.Zone(0), v.Weight(0), v.InFlight(0), v.RoundTrip(0), v.Latency(0)})
	usable := func(v Candidates) (s string) {
		for i := range v.Len() {
			if v.Usable(i) {
				s += v.Name(i)
			}
		}
		return s
	}
	require.Equal(t, "bcd", usable(v))
	noted := tried{}
	noted.add(c)
	require.Equal(t, "bd", usable(view(&noted)))
	in.peers = []*peer{c, d}
	require.Equal(t, "cd", usable(view(&tried{})))
	in.fresh.max = Lag{Bytes: 1}
	c.behind.set(distance{known: true})
	require.Equal(t, "c", usable(view(&tried{})), "nothing is known of the other")
	require.Empty(t, usable(view(&noted)))
	in.reads = false
	require.Equal(t, "cd", usable(view(&tried{})), "a bound is of reads")
}

// turnsOf counts whom a balancer chooses in n reads.
func turnsOf(top *topology, n int, in intent, noted *tried) (order []string, counts map[string]int) {
	counts = map[string]int{}
	for range n {
		p, _ := top.pick(&in, noted)
		order = append(order, p.name)
		counts[p.name]++
	}
	return order, counts
}

func TestRoundRobinTakesTurns(t *testing.T) {
	t.Parallel()
	read := intent{place: placeReads, reads: true, reason: ReasonRead}
	top := balanced(ModeReplicated, RoundRobin())
	order, counts := turnsOf(top, 30, read, &tried{})
	require.Equal(t, map[string]int{"b": 10, "c": 10, "d": 10}, counts)
	require.Equal(t, order[:27], order[3:], "always the same turn")

	c := top.members[2].peer
	noted := tried{}
	noted.add(c)
	_, counts = turnsOf(top, 30, read, &noted)
	require.Equal(t, map[string]int{"b": 15, "d": 15}, counts, "who is passed over leaves its turns to all others alike")

	fill(c, true)
	_, counts = turnsOf(top, 30, read, &tried{})
	require.Equal(t, map[string]int{"b": 15, "d": 15}, counts, "no connection is free")
	for _, m := range top.members {
		fill(m.peer, true)
	}
	_, counts = turnsOf(top, 30, read, &tried{})
	require.Len(t, counts, 3, "nobody has one: they queue in turn")
}

func TestRoundRobinPassesOverWhoHasJustRisenMostOfTheTime(t *testing.T) {
	t.Parallel()
	top := balanced(ModeReplicated, RoundRobin())
	top.members[2].peer.load.easeIn()
	_, counts := turnsOf(top, 20_000, intent{place: placeReads, reads: true, reason: ReasonRead}, &tried{})
	require.InDelta(t, 1./21, float64(counts["c"])/20_000, 0.01)
	require.InDelta(t, counts["b"], counts["d"], 1500)
	for _, m := range top.members {
		m.peer.load.easeIn()
	}
	_, counts = turnsOf(top, 300, intent{place: placeReads, reads: true, reason: ReasonRead}, &tried{})
	require.Len(t, counts, 3)
}

// Reads and writes that alternate must not part the peers among them.
func TestRoundRobinHasATurnForReadsAndOneForWrites(t *testing.T) {
	t.Parallel()
	top := balanced(ModeEquivalent, RoundRobin())
	reads, writes := map[string]int{}, map[string]int{}
	for range 40 {
		p, _ := top.pick(&intent{place: placeReads, reads: true, reason: ReasonRead}, &tried{})
		reads[p.name]++
		p, _ = top.pick(&intent{place: placePrimary}, &tried{})
		writes[p.name]++
	}
	want := map[string]int{"a": 10, "b": 10, "c": 10, "d": 10}
	require.Equal(t, want, reads)
	require.Equal(t, want, writes)
}

func TestRoundRobinIsExactWithManyCallers(t *testing.T) {
	t.Parallel()
	top := balanced(ModeReplicated, RoundRobin())
	var mu sync.Mutex
	total := map[string]int{}
	var callers sync.WaitGroup
	for range 8 {
		callers.Go(func() {
			_, counts := turnsOf(top, 900, intent{place: placeReads, reads: true, reason: ReasonRead}, &tried{})
			mu.Lock()
			defer mu.Unlock()
			for name, n := range counts {
				total[name] += n
			}
		})
	}
	callers.Wait()
	require.Equal(t, map[string]int{"b": 2400, "c": 2400, "d": 2400}, total)
}

func TestNearestTakesTheNearestAndOfThoseAsNearTheLessBusy(t *testing.T) {
	t.Parallel()
	const us = time.Microsecond
	for _, tc := range []struct {
		name  string
		trips [3]time.Duration // of b, c, d
		busy  [3]int32
		full  string
		isNew string
		want  []string
	}{
		{"one is nearest", [3]time.Duration{5000 * us, 500 * us, 9000 * us}, [3]int32{}, "", "", []string{"c"}},
		{"... however busy", [3]time.Duration{5000 * us, 500 * us, 9000 * us}, [3]int32{0, 3, 0}, "", "", []string{"c"}},
		{"a few hundred microseconds are nothing", [3]time.Duration{100 * us, 340 * us, 360 * us}, [3]int32{}, "", "", []string{"b", "c"}},
		{"half as much again is as near", [3]time.Duration{10000 * us, 15200 * us, 15201 * us}, [3]int32{}, "", "", []string{"b", "c"}},
		{"of two as near the less busy", [3]time.Duration{100 * us, 110 * us, 9000 * us}, [3]int32{2, 0, 0}, "", "", []string{"c"}},
		{"the nearest has no free connection", [3]time.Duration{5000 * us, 500 * us, 9000 * us}, [3]int32{}, "c", "", []string{"b"}},
		{"nobody has one", [3]time.Duration{5000 * us, 500 * us, 9000 * us}, [3]int32{}, "bcd", "", []string{"b", "c", "d"}},
		{"one is not known", [3]time.Duration{0, 500 * us, 9000 * us}, [3]int32{}, "", "", []string{"c"}},
		{"none is known", [3]time.Duration{}, [3]int32{}, "", "", []string{"b", "c", "d"}},
		{"the nearest has just risen", [3]time.Duration{5000 * us, 500 * us, 9000 * us}, [3]int32{}, "", "c", []string{"b", "c"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			top := balanced(ModeReplicated, Nearest())
			for i := range tc.trips {
				p := top.members[i+1].peer
				p.load.out.Store(tc.busy[i])
				if tc.trips[i] > 0 {
					p.roundTrip.note(tc.trips[i])
				}
			}
			for _, m := range top.members {
				switch {
				case strings.Contains(tc.full, m.peer.name):
					fill(m.peer, true)
				case strings.Contains(tc.isNew, m.peer.name):
					m.peer.load.easeIn()
				}
			}
			_, counts := turnsOf(top, 400, intent{place: placeReads, reads: true, reason: ReasonRead}, &tried{})
			require.Equal(t, tc.want, sortedKeys(counts))
		})
	}
}

func TestNearestComparesFewOfMany(t *testing.T) {
	t.Parallel()
	p := idlePool(1024, Nearest(), func(i int, q *peer) {
		q.roundTrip.smooth.Store(int64(time.Second))
		if i > 1024/4 {
			q.roundTrip.smooth.Store(int64(time.Millisecond))
		}
	})
	asked := 0
	for _, q := range p.peers() {
		q.load.limit = 0
		q.load.exhausted = func() bool { asked++; return false }
	}
	top := p.topology.Load()
	far := 0
	for range 4000 {
		asked = 0
		q, _ := top.pick(&intent{place: placeReads, reads: true, reason: ReasonRead}, &tried{})
		require.LessOrEqual(t, asked, nearestSample)
		if q.roundTrip.known() == time.Second {
			far++
		}
	}
	require.Less(t, far, 10, "all eight are far once in 65,000")

	named := []*peer{p.peers()[7], p.peers()[900], p.peers()[8]}
	for range 100 {
		q, _ := top.pick(&intent{place: placeNamed, reads: true, peers: named}, &tried{})
		require.Same(t, p.peers()[900], q, "those that are named are found among the many")
	}
}

func TestARoundTripIsSmooth(t *testing.T) {
	t.Parallel()
	var r roundTrip
	require.Zero(t, r.known())
	r.note(0)
	require.Equal(t, time.Duration(1), r.known(), "known, if only just")
	r = roundTrip{}
	r.note(time.Millisecond)
	require.Equal(t, time.Millisecond, r.known())
	r.note(9 * time.Millisecond)
	require.Equal(t, 3*time.Millisecond, r.known(), "one look that was held up")
	for range 20 {
		r.note(time.Millisecond)
	}
	require.Less(t, r.known(), 1010*time.Microsecond)
}

// Distance is no fault: replicas of another zone are slow only beside each other.
func TestSlownessIsJudgedWithinAZone(t *testing.T) {
	t.Parallel()
	p := idlePool(5, nil, func(i int, q *peer) { q.away = i > 2 })
	take := func(i int, d time.Duration) {
		for range latencySample {
			p.peers()[i].latency.note(d)
		}
	}
	slow := func() (s []bool) {
		(&watch{pool: p}).compare()
		for _, m := range p.topology.Load().members {
			s = append(s, m.slow)
		}
		return s
	}
	take(1, time.Millisecond)
	take(2, time.Millisecond)
	take(3, 30*time.Millisecond)
	take(4, 30*time.Millisecond)
	require.Equal(t, []bool{false, false, false, false, false}, slow())
	take(4, 300*time.Millisecond)
	require.Equal(t, []bool{false, false, false, false, true}, slow())
	take(1, 300*time.Millisecond)
	take(2, 300*time.Millisecond)
	require.Equal(t, []bool{false, true, true, false, true}, slow(), "the own zone's are slow beside any")
	require.Equal(t, 300*time.Millisecond, p.peers()[2].latency.typical())
}

// The looks of a pool with a balancer tell round trips within a second or so, and the balancer follows them.
func TestNearestFollowsTheLooks(t *testing.T) {
	bubble(t, 3, func(c *Options) { c.Balancer = Nearest() }, func(ctx context.Context, x *fakes) {
		for i, r := range x.replicas {
			r.Delay(time.Duration(10*(3-i)) * time.Millisecond)
		}
		settled()
		time.Sleep(3 * time.Second)
		assert.Equal(t, 10*time.Millisecond, x.peer("replica3").RoundTrip)
		assert.Equal(t, 30*time.Millisecond, x.peer("replica1").RoundTrip)
		for range 20 {
			assert.Equal(t, "replica3:5432", x.read(ctx))
		}
		x.replicas[0].Delay(time.Millisecond)
		time.Sleep(time.Minute)
		for range 20 {
			assert.Equal(t, "replica1:5432", x.read(ctx))
		}
		x.replicas[0].Die()
		assert.NotEqual(t, "replica1:5432", x.read(ctx), "the call that meets it goes elsewhere")
		for range 20 {
			assert.Equal(t, "replica3:5432", x.read(ctx))
		}
	})
}

func TestTheBalancerIsAskedByCallsAndByExplain(t *testing.T) {
	bubble(t, 3, func(c *Options) {
		c.Balancer = picker(func(c Candidates) int {
			for i := range c.Len() {
				if c.Name(i) == "replica2:5432" {
					return i
				}
			}
			return -1
		})
	}, func(ctx context.Context, x *fakes) {
		settled()
		for range 10 {
			assert.Equal(t, "replica2:5432", x.read(ctx))
			assert.Equal(t, "replica2:5432", explained(t, x.pool, ctx, "select 1").Peer)
		}
		_, err := x.pool.Exec(ctx, "insert into t values (1)")
		require.NoError(t, err)
		assert.Equal(t, Decision{Peer: "primary:5432", Reason: ReasonWrite, Attempt: 1, Kind: KindWrite}, x.journal.take()[0])
		x.replicas[1].Die()
		assert.NotEqual(t, "replica2:5432", x.read(ctx))
	})
}

// A balancer is used by many callers while the topology changes.
func TestBalancersBesideChanges(t *testing.T) {
	t.Parallel()
	for _, by := range []Balancer{nil, RoundRobin(), Nearest(), firstUsable{}} {
		p := idlePool(12, by, func(i int, q *peer) { q.away, q.load.weight = i%3 == 0, float64(i%4) })
		var callers sync.WaitGroup
		for range 4 {
			callers.Go(func() {
				for range 3000 {
					var noted tried
					noted.add(p.peers()[rand.IntN(12)])
					_, _ = p.topology.Load().pick(&intent{place: placeReads, reads: true, reason: ReasonRead}, &noted)
				}
			})
		}
		for i := range 600 {
			q := p.peers()[i%12]
			p.observe(observation{peer: q, health: []Health{HealthUp, HealthDown, HealthSuspect}[rand.IntN(3)]})
			q.roundTrip.note(time.Duration(rand.IntN(1e6)))
			q.load.easeIn()
		}
		callers.Wait()
	}
}
