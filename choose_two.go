package multipool

import "math/rand/v2"

// tried is the peers that have failed one call: a small set that lives on the caller's stack.
type tried struct {
	peers [8]*peer
	n     int
}

func (t *tried) add(p *peer) {
	if t.n < len(t.peers) {
		t.peers[t.n] = p
		t.n++
	}
}

func (t *tried) has(p *peer) bool {
	for _, q := range t.peers[:t.n] {
		if q == p {
			return true
		}
	}
	return false
}

// full reports that no other peer can be noted: the call has had enough.
func (t *tried) full() bool { return t.n == len(t.peers) }

// twoDraws chooses from who comes first in a roster a peer that is in only (nil: any) and not tried: one drawn at random,
// by weight, or another drawn at random if that is less busy, so that an idle pool follows the weights and is uniformly
// random where they are equal (M. Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing", 2001). A peer
// without a free connection loses to one that has one. It takes no lock, allocates nothing, and costs the same for two
// peers and a thousand.
func twoDraws(list *roster, only []*peer, tried *tried) *peer {
	peers := list.peers
	n := uint64(len(peers))
	switch {
	case n == 0:
		return nil
	case tried.n > 0 || only != nil:
		return lessBusyOf(list, only, tried, nil)
	case n == 1:
		return peers[0]
	}
	r := rand.Uint64()
	i := list.at(r >> 32)
	if peers[i].load.share.Load() < fullShare {
		i = list.redraw(i)
	}
	j := r & (1<<32 - 1) * (n - 1) >> 32
	if j >= i {
		j++
	}
	a, b := peers[i], peers[j]
	if a.load.nearlyFull() || b.load.nearlyFull() {
		return notFull(peers, a, b)
	}
	return lessBusy(a, b)
}

// redraw draws again where the drawn peer is new and leaves the draw to another; not for ever, as all of them may be.
func (r *roster) redraw(i uint64) uint64 {
	for range maxRedraws {
		x := rand.Uint64()
		if r.peers[i].load.takesDraw(uint32(x)) {
			break
		}
		i = r.at(x >> 32)
	}
	return i
}

const maxRedraws = 8

// lessBusy returns a, or b if that is less busy.
func lessBusy(a, b *peer) *peer {
	if a.load.busy() > 0 && b.load.lessThan(&a.load) {
		return b
	}
	return a
}

// lessBusyOf is the choice where candidates are excluded: by a walk over all of them, so that the exclusions cannot
// push their share onto a neighbour. It is off the common path; of a long list those that are named are looked up.
func lessBusyOf(list *roster, only []*peer, tried *tried, fresh *freshness) *peer {
	var a, b *peer
	var first, second float64
	from, also := list.peers, only
	if only != nil && list.index != nil {
		from, also = only, nil
	}
	for _, p := range from {
		if tried.has(p) || (also != nil && !contains(also, p)) || !fresh.holds(p) || !list.holds(p, only) {
			continue
		}
		// A race: who arrives first is drawn by weight, who arrives second by weight among the others (P. S. Efraimidis,
		// P. G. Spirakis, "Weighted random sampling with a reservoir", 2006).
		switch arrives := rand.ExpFloat64() / p.load.pull(); {
		case a == nil || arrives < first:
			b, second = a, first
			a, first = p, arrives
		case b == nil || arrives < second:
			b, second = p, arrives
		}
	}
	switch {
	case b == nil:
		return a
	case a.load.full() && !b.load.full():
		return b
	case b.load.full() && !a.load.full():
		return a
	}
	return lessBusy(a, b)
}

// freshDraws is twoDraws among those that are within a bound on lag: most often those drawn first are, and only where
// they are not all are asked.
func freshDraws(list *roster, only []*peer, tried *tried, fresh *freshness) *peer {
	if p := twoDraws(list, only, tried); p == nil || fresh.holds(p) {
		return p
	}
	return lessBusyOf(list, only, tried, fresh)
}

// notFull spills: of the two drawn the one with a free connection, else the first other peer that has one, else the
// less busy of the two, to queue there.
func notFull(list []*peer, a, b *peer) *peer {
	aFull, bFull := a.load.full(), b.load.full()
	switch {
	case aFull && !bFull:
		return b
	case bFull && !aFull:
		return a
	case !aFull && !bFull:
	default:
		start := rand.IntN(len(list))
		for k := range min(len(list), maxSpill) {
			if p := list[(start+k)%len(list)]; !p.load.full() {
				return p
			}
		}
	}
	return lessBusy(a, b)
}

// maxSpill bounds how many peers a call looks at for a free connection before it queues: asking costs a lock each.
const maxSpill = 8
