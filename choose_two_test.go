package multipool

import (
	"math"
	"math/rand/v2"
	"testing"

	"github.com/stretchr/testify/require"
)

// draw counts how often each of the peers is chosen.
func draw(n int, list, only []*peer, noted *tried) map[*peer]int {
	counts := map[*peer]int{}
	for range n {
		counts[twoDraws(&roster{peers: list}, only, noted)]++
	}
	return counts
}

// requireShare tests that a peer was chosen with the probability, within six standard deviations: a right choice fails
// once in hundreds of millions of runs.
func requireShare(t *testing.T, count, draws int, probability float64, of string) {
	t.Helper()
	expected := float64(draws) * probability
	require.InDelta(t, expected, count, sixDeviations(draws, probability), of)
}

func sixDeviations(draws int, probability float64) float64 {
	return 6 * math.Sqrt(float64(draws)*probability*(1-probability))
}

// busyPeers makes peers that are carrying the given numbers of calls.
func busyPeers(calls ...int64) []*peer {
	names := make([]string, len(calls))
	for i := range names {
		names[i] = string(rune('a' + i))
	}
	peers := idlePeers(names...)
	for i, n := range calls {
		peers[i].load.limit = int32(n) + 4
		peers[i].load.out.Store(int32(n))
	}
	return peers
}

// fill makes a peer look full; really says whether its pool is.
func fill(p *peer, really bool) {
	p.load.out.Store(p.load.limit)
	p.load.exhausted = func() bool { return really }
}

func TestIdlePeersAreChosenUniformly(t *testing.T) {
	t.Parallel()
	for _, n := range []int{1, 2, 3, 16} {
		peers := busyPeers(make([]int64, n)...)
		const draws = 24000
		counts := draw(draws, peers, nil, &tried{})
		for _, p := range peers {
			requireShare(t, counts[p], draws, 1/float64(n), p.name)
		}
	}
}

func TestEquallyBusyPeersAreChosenUniformly(t *testing.T) {
	t.Parallel()
	const draws = 12000
	peers := busyPeers(3, 3, 3)
	counts := draw(draws, peers, nil, &tried{})
	for _, p := range peers {
		requireShare(t, counts[p], draws, 1./3, p.name)
	}
}

func TestTheLessBusyOfTwoIsPreferred(t *testing.T) {
	t.Parallel()
	const draws = 12000
	for _, tc := range []struct {
		name   string
		calls  []int64
		shares []float64
	}{
		{"of two peers always", []int64{1, 0}, []float64{0, 1}},
		{"... whichever comes first", []int64{0, 1}, []float64{1, 0}},
		{"one busy peer of three gets nothing", []int64{0, 7, 0}, []float64{.5, 0, .5}},
		{"each loses to all that are less busy", []int64{0, 1, 2, 3}, []float64{3. / 6, 2. / 6, 1. / 6, 0}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			peers := busyPeers(tc.calls...)
			counts := draw(draws, peers, nil, &tried{})
			for i, share := range tc.shares {
				requireShare(t, counts[peers[i]], draws, share, peers[i].name)
			}

			// The same where something is excluded, by the other way through the code.
			shut := busyPeers(0)[0]
			noted := tried{}
			noted.add(shut)
			counts = draw(draws, append([]*peer{shut}, peers...), nil, &noted)
			require.Zero(t, counts[shut])
			for i, share := range tc.shares {
				requireShare(t, counts[peers[i]], draws, share, peers[i].name)
			}
		})
	}
}

func TestExcludedPeersAreNeverChosenAndTheOthersUniformly(t *testing.T) {
	t.Parallel()
	const draws = 12000
	for _, tc := range []struct {
		name  string
		n     int
		only  []int // nil: all
		tried []int
		want  []int
	}{
		{"one tried", 3, nil, []int{1}, []int{0, 2}},
		{"the first tried", 5, nil, []int{0}, []int{1, 2, 3, 4}},
		{"neighbours tried", 5, nil, []int{1, 2}, []int{0, 3, 4}},
		{"all but one tried", 3, nil, []int{0, 2}, []int{1}},
		{"all tried", 3, nil, []int{0, 1, 2}, nil},
		{"some named", 5, []int{0, 1, 4}, nil, []int{0, 1, 4}},
		{"one named", 5, []int{3}, nil, []int{3}},
		{"none that is named is in the list", 5, []int{}, nil, nil},
		{"named and tried", 5, []int{0, 1, 4}, []int{1}, []int{0, 4}},
		{"a list of one, tried", 1, nil, []int{0}, nil},
		{"a list of one, not named", 1, []int{}, nil, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			peers := busyPeers(make([]int64, tc.n)...)
			var only []*peer
			if tc.only != nil {
				only = busyPeers(0) // a stranger
			}
			for _, i := range tc.only {
				only = append(only, peers[i])
			}
			noted := tried{}
			for _, i := range tc.tried {
				noted.add(peers[i])
			}
			counts := draw(draws, peers, only, &noted)
			if len(tc.want) == 0 {
				require.Equal(t, map[*peer]int{nil: draws}, counts)
				return
			}
			require.Len(t, counts, len(tc.want))
			for _, i := range tc.want {
				requireShare(t, counts[peers[i]], draws, 1/float64(len(tc.want)), peers[i].name)
			}
		})
	}
}

func TestNobodyIsChosenFromAnEmptyList(t *testing.T) {
	t.Parallel()
	require.Nil(t, twoDraws(&roster{}, nil, &tried{}))
	require.Nil(t, twoDraws(&roster{peers: []*peer{}}, nil, &tried{}))
	require.Nil(t, twoDraws(&roster{}, busyPeers(0), &tried{}))
}

func TestAFullPeerSpillsToOneThatHasAConnection(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name  string
		calls []int64
		full  []int
		want  []int
	}{
		{"one of two", []int64{0, 9}, []int{0}, []int{1}},
		{"one of three", []int64{0, 0, 0}, []int{1}, []int{0, 2}},
		{"all but one", []int64{0, 0, 0, 0, 5}, []int{0, 1, 2, 3}, []int{4}},
		{"all of two: the less busy one queues", []int64{4, 3}, []int{0, 1}, []int{1}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			peers := busyPeers(tc.calls...)
			for _, i := range tc.full {
				fill(peers[i], true)
			}
			counts := draw(3000, peers, nil, &tried{})
			require.Len(t, counts, len(tc.want))
			for _, i := range tc.want {
				require.Positive(t, counts[peers[i]])
			}
		})
	}
}

func TestAFullPeerSpillsWhereOthersAreExcludedToo(t *testing.T) {
	t.Parallel()
	peers := busyPeers(0, 9, 0)
	fill(peers[0], true)
	noted := tried{}
	noted.add(peers[2])
	require.Equal(t, map[*peer]int{peers[1]: 500}, draw(500, peers, nil, &noted))
}

func TestAPeerThatOnlyLooksFullIsAskedAndTaken(t *testing.T) {
	t.Parallel()
	peers := busyPeers(0, 5)
	fill(peers[0], false)
	require.Equal(t, map[*peer]int{peers[0]: 500}, draw(500, peers, nil, &tried{}))
}

// Asking a pool whether it is full takes its lock, so nobody asks while there is plenty of room.
func TestAPoolIsNotAskedWhileItHasRoom(t *testing.T) {
	t.Parallel()
	peers := busyPeers(2, 2, 2)
	for _, p := range peers {
		p.load.out.Store(p.load.limit - 1)
		p.load.exhausted = func() bool { panic("the pool was asked") }
	}
	draw(100, peers, nil, &tried{})
	peers[0].load.out.Add(1) // one who waits for a connection counts as one who has it
	require.True(t, peers[0].load.nearlyFull())
}

func TestASpillAsksAFewPoolsAtMost(t *testing.T) {
	t.Parallel()
	peers := busyPeers(make([]int64, 64)...)
	asked := 0
	for _, p := range peers {
		p.load.out.Store(p.load.limit)
		p.load.exhausted = func() bool { asked++; return true }
	}
	require.NotNil(t, twoDraws(&roster{peers: peers}, nil, &tried{}))
	require.LessOrEqual(t, asked, 2+maxSpill)
}

// A peer that has just risen takes a tenth of its draws, and leaves the rest to the others.
func TestARisenPeerIsUsedGently(t *testing.T) {
	t.Parallel()
	peers := busyPeers(0, 0)
	peers[0].load.easeIn()
	share := peers[0].load.pull() / (peers[0].load.pull() + fullShare)
	require.InDelta(t, 1./11, share, 0.003)
	drawn := draw(20_000, peers, nil, &tried{})
	requireShare(t, drawn[peers[0]], 20_000, share, "a tenth of a weight, beside a whole one")
	for range easeTime/watchTick - 1 {
		peers[0].load.easeOut()
	}
	require.Less(t, peers[0].load.share.Load(), int32(fullShare))
	peers[0].load.easeOut()
	require.EqualValues(t, fullShare, peers[0].load.share.Load(), "all of it after ten seconds")
	require.NotNil(t, twoDraws(&roster{peers: peers[:1]}, nil, &tried{}), "the last is used however new it is")
}

func TestAnIdlePoolFollowsTheWeights(t *testing.T) {
	t.Parallel()
	many := make([]float64, 100)
	many[40] = 50
	for _, tc := range []struct {
		name    string
		weights []float64
	}{
		{"two", []float64{1, 3}},
		{"... whichever comes first", []float64{3, 1}},
		{"three", []float64{1, 2, 5}},
		{"far apart", []float64{1000, 10, 1}},
		{"below one", []float64{0.5, 0.25, 0.25}},
		{"one heavy among many", many},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			const draws = 40_000
			peers := weighing(tc.weights...)
			sum := 0.0
			for _, p := range peers {
				sum += p.load.heft()
			}
			r := rosterOf(peers)
			plain, shut := map[*peer]int{}, busyPeers(0)[0]
			for range draws {
				plain[twoDraws(&r, nil, &tried{})]++
			}
			noted := tried{}
			noted.add(shut)
			excluded := draw(draws, append([]*peer{shut}, peers...), nil, &noted)
			for i, p := range peers {
				requireShare(t, plain[p], draws, p.load.heft()/sum, tc.name)
				requireShare(t, excluded[p], draws, p.load.heft()/sum, "where others are excluded")
				if i == 3 {
					break // of many the first tell enough
				}
			}
		})
	}
}

// A risen peer's ramp and its weight are one thing: what it pulls.
func TestARisenPeersWeightGrows(t *testing.T) {
	t.Parallel()
	const draws = 40_000
	peers := weighing(4, 1, 1)
	for _, share := range []int32{fullShare / 10, fullShare / 2, fullShare - 1, fullShare} {
		peers[0].load.share.Store(share)
		pull := 4 * float64(share) / fullShare
		r := rosterOf(peers)
		counts := map[*peer]int{}
		for range draws {
			counts[twoDraws(&r, nil, &tried{})]++
		}
		require.InDelta(t, pull/(pull+2), float64(counts[peers[0]])/draws, 0.02, "share %d", share)
		noted := tried{}
		noted.add(busyPeers(0)[0])
		excluded := draw(draws, peers, nil, &noted)
		require.InDelta(t, pull/(pull+2), float64(excluded[peers[0]])/draws, 0.02, "share %d", share)
	}
	for _, p := range peers {
		p.load.easeIn()
	}
	require.Len(t, draw(2000, peers, nil, &tried{}), 3, "all of them are new, and one is chosen")
}

func TestLoadIsJudgedByWeight(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name             string
		weightA, weightB float64
		busyA, busyB     int32
		b                bool
	}{
		{"both idle: who was drawn", 1, 10, 0, 0, false},
		{"equals: one more", 1, 1, 1, 0, true},
		{"equals: as many", 1, 1, 3, 3, false},
		{"a heavy one with one call is not busier than a light one without", 10, 1, 1, 0, false},
		{"... with nine neither", 10, 1, 9, 0, false},
		{"... with ten it is", 10, 1, 10, 0, true},
		{"a light one with one call is busier than a heavy one with some", 1, 10, 1, 9, true},
		{"... not with ten", 1, 10, 1, 10, false},
	} {
		peers := weighing(tc.weightA, tc.weightB)
		peers[0].load.out.Store(tc.busyA)
		peers[1].load.out.Store(tc.busyB)
		want := peers[0]
		if tc.b {
			want = peers[1]
		}
		require.Same(t, want, lessBusy(peers[0], peers[1]), tc.name)
	}
}

// Under load what runs where follows the weights, however many calls there are.
func TestALoadedPoolFollowsTheWeights(t *testing.T) {
	t.Parallel()
	for _, weights := range [][]float64{{1, 1, 1}, {1, 2, 5}, {1, 3}, {10, 1}} {
		for _, callers := range []int{1, 4, 16, 64} {
			peers := weighing(weights...)
			sum := 0.0
			for _, w := range weights {
				sum += w
			}
			for _, p := range peers {
				p.load.limit = 1000
			}
			r := rosterOf(peers)
			running := make([]*peer, callers)
			counts := map[*peer]int{}
			const calls = 100_000 // with few callers a share is off by up to 0.023, so that chance has 0.007: six deviations
			for range calls {
				at := rand.IntN(callers) // all take as long
				if p := running[at]; p != nil {
					p.load.out.Add(-1)
				}
				p := twoDraws(&r, nil, &tried{})
				p.load.out.Add(1)
				running[at] = p
				counts[p]++
			}
			for i, p := range peers {
				require.InDelta(t, weights[i]/sum, float64(counts[p])/calls, 0.03, "weights %v, %d callers, peer %d", weights, callers, i)
			}
		}
	}
}

func TestTriedHoldsWhatItWasGivenUntilItIsFull(t *testing.T) {
	t.Parallel()
	peers := busyPeers(make([]int64, 9)...)
	var noted tried
	for i, p := range peers[:8] {
		require.False(t, noted.full())
		require.False(t, noted.has(p))
		noted.add(p)
		require.True(t, noted.has(p))
		require.Equal(t, i+1, noted.n)
	}
	require.True(t, noted.full())
	noted.add(peers[8])
	require.False(t, noted.has(peers[8]), "what has no room is not noted, and overwrites nothing")
	require.True(t, noted.has(peers[0]))
}

func TestChoosingAllocatesNothing(t *testing.T) {
	full := busyPeers(0, 0, 0)
	for _, p := range full {
		fill(p, true)
	}
	peers := busyPeers(make([]int64, 16)...)
	top := tell(freshTopology("a", "b", "c"), primaryUp("a", 1), replicaUp("b"), replicaUp("c"))
	var sink *peer
	for name, choose := range map[string]func(){
		"plain":    func() { sink = twoDraws(&roster{peers: peers}, nil, &tried{}) },
		"excluded": func() { var noted tried; noted.add(peers[3]); sink = twoDraws(&roster{peers: peers}, nil, &noted) },
		"named":    func() { sink = twoDraws(&roster{peers: peers}, peers[2:5], &tried{}) },
		"full":     func() { sink = twoDraws(&roster{peers: full}, nil, &tried{}) },
		"pick":     func() { sink, _ = top.pick(&intent{place: placeReads, reads: true, reason: ReasonRead}, &tried{}) },
	} {
		require.Zero(t, testing.AllocsPerRun(200, choose), name)
	}
	require.NotNil(t, sink)
}
