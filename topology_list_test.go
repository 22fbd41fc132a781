package multipool

import (
	"math"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// weighing makes idle peers of the given weights.
func weighing(weights ...float64) []*peer {
	peers := busyPeers(make([]int64, len(weights))...)
	for i, w := range weights {
		peers[i].load.weight = w
	}
	return peers
}

// chances works out of a table of odds with which probability every peer is drawn.
func chances(peers []*peer, table []odds) []float64 {
	n := len(peers)
	out := make([]float64, n)
	for i := range n {
		if table == nil {
			out[i] = 1 / float64(n)
			continue
		}
		keep := float64(table[i].keep) / (1 << 32)
		out[i] += keep / float64(n)
		out[table[i].other] += (1 - keep) / float64(n)
	}
	return out
}

func requireChances(t *testing.T, peers []*peer) {
	t.Helper()
	sum := 0.0
	for _, p := range peers {
		sum += p.load.heft()
	}
	for i, chance := range chances(peers, oddsOf(peers)) {
		require.InDelta(t, peers[i].load.heft()/sum, chance, 1e-7, "peer %d of weight %v", i, peers[i].load.heft())
	}
}

func TestOddsAreExactlyTheWeights(t *testing.T) {
	t.Parallel()
	for _, weights := range [][]float64{
		{1}, {1, 1}, {3, 3, 3}, {1, 2}, {2, 1}, {0, 2}, {1, 2, 5}, {1000, 1}, {1, 1000, 1}, {0.001, 1, 1000}, {1e-300, 1},
		append(make([]float64, 1023), 1000),
	} {
		requireChances(t, weighing(weights...))
	}
	require.Nil(t, oddsOf(nil))
	require.Nil(t, oddsOf(weighing(2, 2, 2)), "equals need no table")
	require.Nil(t, oddsOf(weighing(0, 1)), "0 means 1")
}

func FuzzOdds(f *testing.F) {
	f.Add(uint64(1), uint16(2))
	f.Add(uint64(2), uint16(1024))
	f.Fuzz(func(t *testing.T, seed uint64, n uint16) {
		dice := rand.New(rand.NewPCG(seed, 1))
		weights := make([]float64, n%1100+1)
		for i := range weights {
			weights[i] = math.Exp(dice.Float64()*14 - 7)
			if dice.IntN(3) == 0 {
				weights[i] = float64(dice.IntN(5))
			}
		}
		peers := make([]*peer, len(weights))
		for i, w := range weights {
			peers[i] = &peer{}
			peers[i].load.weight = w
		}
		requireChances(t, peers)
		r := rosterOf(peers)
		for range 100 {
			if i := r.at(uint64(dice.Uint32())); i >= uint64(len(peers)) {
				t.Fatalf("%d of %d", i, len(peers))
			}
		}
		require.Less(t, r.at(1<<32-1), uint64(len(peers)))
	})
}

// tiersOf writes down who is drawn before whom.
func tiersOf(r *roster) string {
	var tiers []string
	for ; r != nil; r = r.rest {
		tiers = append(tiers, namesOf(r.peers))
	}
	return strings.Join(tiers, "|")
}

func TestARosterPutsTheOwnZoneFirst(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct{ away, want string }{
		{"", "a,b,c,d"},
		{"abcd", "a,b,c,d"},
		{"a", "b,c,d|a"},
		{"bd", "a,c|b,d"},
		{"abc", "d|a,b,c"},
	} {
		peers := idlePeers("a", "b", "c", "d")
		for _, p := range peers {
			p.away = strings.Contains(tc.away, p.name)
		}
		r := rosterOf(peers)
		require.Equal(t, tc.want, tiersOf(&r))
		require.Equal(t, 4, r.size())
	}
	r := rosterOf(nil)
	require.Equal(t, "", tiersOf(&r))
	require.Zero(t, r.size())
}
