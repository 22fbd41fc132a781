package multipool

// roster is a list of candidates as it is drawn from, by zone and weight. It is worked out with the snapshot, so that a
// call compares no names and adds up no weights.
type roster struct {
	peers []*peer // who is drawn first: those of the pool's own zone, where there are any
	odds  []odds  // by their weights; nil if all have the same
	rest  *roster // the others, of other zones; nil if there are none

	index map[*peer]bool // of the peers, where they are many
}

// manyPeers is from how many peers on those that a route names are looked up, not looked for.
const manyPeers = 16

func newRoster(list []*peer) roster {
	r := roster{peers: list, odds: oddsOf(list)}
	if len(list) >= manyPeers {
		r.index = make(map[*peer]bool, len(list))
		for _, p := range list {
			r.index[p] = true
		}
	}
	return r
}

// holds reports whether a peer that a route names is in the list; one that comes from the list is.
func (r *roster) holds(p *peer, named []*peer) bool {
	return named == nil || r.index == nil || r.index[p]
}

// rosterOf splits a list by zone: both parts keep its order.
func rosterOf(list []*peer) roster {
	var own, away []*peer
	for _, p := range list {
		if p.away {
			away = append(away, p)
		} else {
			own = append(own, p)
		}
	}
	if len(own) == 0 || len(away) == 0 {
		return newRoster(list)
	}
	r, rest := newRoster(own), newRoster(away)
	r.rest = &rest
	return r
}

// size is how many peers there are.
func (r *roster) size() (n int) {
	for ; r != nil; r = r.rest {
		n += len(r.peers)
	}
	return n
}

// odds is one column of the table for draws by weight (the alias method: A. J. Walker, 1977; M. D. Vose, 1991): a peer
// drawn at random keeps the draw with a probability of its own, and else leaves it to one other. It costs the same for
// two peers and a thousand, and is exact whatever the weights.
type odds struct {
	keep  uint32 // in 1/2^32
	other uint32 // an index
}

// oddsOf returns nil where all weights are the same.
func oddsOf(list []*peer) []odds {
	sum, even := 0.0, true
	for _, p := range list {
		sum += p.load.heft()
		even = even && p.load.heft() == list[0].load.heft()
	}
	if even {
		return nil
	}
	table := make([]odds, len(list))
	part := make([]float64, len(list)) // in even parts
	var less, more []uint32
	for i, p := range list {
		table[i] = odds{keep: 1<<32 - 1, other: uint32(i)}
		part[i] = p.load.heft() / sum * float64(len(list))
		if part[i] < 1 {
			less = append(less, uint32(i))
		} else {
			more = append(more, uint32(i))
		}
	}
	for len(less) > 0 && len(more) > 0 {
		l, m := less[len(less)-1], more[len(more)-1]
		less = less[:len(less)-1]
		table[l] = odds{keep: uint32(part[l] * (1 << 32)), other: m}
		part[m] -= 1 - part[l]
		if part[m] < 1 {
			more = more[:len(more)-1]
			less = append(less, m)
		}
	}
	return table
}

// at turns 32 random bits into the index of a peer, by weight.
func (r *roster) at(bits uint64) uint64 {
	column := bits * uint64(len(r.peers))
	i := column >> 32
	if r.odds != nil && uint32(column) >= r.odds[i].keep {
		i = uint64(r.odds[i].other)
	}
	return i
}
