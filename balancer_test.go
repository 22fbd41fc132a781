package multipool

import (
	"math"
	"testing"

	"github.com/stretchr/testify/require"
)

// draw counts how often each of the peers is chosen.
func draw(n int, list, only []*peer, noted *tried) map[*peer]int {
	counts := map[*peer]int{}
	for range n {
		counts[twoDraws(list, only, noted)]++
	}
	return counts
}

// requireShare tests that a peer was chosen with the probability, within six standard deviations: a right choice fails
// once in hundreds of millions of runs.
func requireShare(t *testing.T, count, draws int, probability float64, of string) {
	t.Helper()
	expected := float64(draws) * probability
	require.InDelta(t, expected, count, 6*math.Sqrt(expected*(1-probability)), of)
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
	require.Nil(t, twoDraws(nil, nil, &tried{}))
	require.Nil(t, twoDraws([]*peer{}, nil, &tried{}))
	require.Nil(t, twoDraws(nil, busyPeers(0), &tried{}))
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
	require.NotNil(t, twoDraws(peers, nil, &tried{}))
	require.LessOrEqual(t, asked, 2+maxSpill)
}

// A peer that has just risen takes a tenth of its draws, and leaves the rest to the others.
func TestARisenPeerIsUsedGently(t *testing.T) {
	t.Parallel()
	peers := busyPeers(0, 0)
	peers[0].load.easeIn()
	drawn := draw(20_000, peers, nil, &tried{})
	require.InDelta(t, 0.05, float64(drawn[peers[0]])/20_000, 0.02, "half of the draws are its own, a tenth of these it takes")
	for range 200 {
		peers[0].load.easeOut()
	}
	require.EqualValues(t, fullShare, peers[0].load.share.Load())
	require.NotNil(t, twoDraws(peers[:1], nil, &tried{}), "the last is used however new it is")
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
		"plain":    func() { sink = twoDraws(peers, nil, &tried{}) },
		"excluded": func() { var noted tried; noted.add(peers[3]); sink = twoDraws(peers, nil, &noted) },
		"named":    func() { sink = twoDraws(peers, peers[2:5], &tried{}) },
		"full":     func() { sink = twoDraws(full, nil, &tried{}) },
		"pick":     func() { sink, _ = top.pick(&intent{place: placeReads, reads: true}, &tried{}) },
	} {
		require.Zero(t, testing.AllocsPerRun(200, choose), name)
	}
	require.NotNil(t, sink)
}
