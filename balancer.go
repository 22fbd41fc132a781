package multipool

import (
	"math/rand/v2"
	"sync/atomic"
)

// load is what a peer is carrying, kept by whoever sends calls there, read by the choice without a lock.
type load struct {
	out   atomic.Int32 // calls that have or want a connection
	limit int32        // connections at most

	// share is the part of its draws that the peer takes, in 1/fullShare: a risen peer is used gently at first.
	share atomic.Int32

	// exhausted asks the pool itself, under its lock, whether every connection is in use.
	exhausted func() bool
}

const fullShare = 256

// busy is how many calls are waiting for the peer or running on it.
func (l *load) busy() int32 { return l.out.Load() }

// nearlyFull reports that no connection may be free. Only then is the pool itself asked.
func (l *load) nearlyFull() bool { return l.out.Load() >= l.limit }

func (l *load) full() bool { return l.nearlyFull() && l.exhausted() }

// easeIn sets the share of a peer that has just risen; the watch raises it again.
func (l *load) easeIn() { l.share.Store(fullShare / 10) }

// shy reports whether the peer leaves this draw to another.
func (l *load) shy(r uint32) bool {
	share := l.share.Load()
	return share < fullShare && int32(r%fullShare) >= share
}

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

// twoDraws chooses from list a peer that is in only (nil: any) and not tried: two drawn at random, the less busy of
// them, either if they are equally busy, so that an idle pool is uniformly random (M. Mitzenmacher, "The Power of Two
// Choices in Randomized Load Balancing", 2001). A peer without a free connection loses to one that has one. It takes
// no lock, allocates nothing, and costs the same for two peers and a thousand.
func twoDraws(list, only []*peer, tried *tried) *peer {
	n := uint64(len(list))
	switch {
	case n == 0:
		return nil
	case tried.n > 0 || only != nil:
		return lessBusyOf(list, only, tried, nil)
	case n == 1:
		return list[0]
	}
	r := rand.Uint64()
	i := r >> 32 * n >> 32
	j := r & (1<<32 - 1) * (n - 1) >> 32
	if j >= i {
		j++
	}
	a, b := list[i], list[j]
	if shyA, shyB := a.load.shy(uint32(r)), b.load.shy(uint32(r>>8)); shyA != shyB {
		if shyA {
			a = b
		}
		if !a.load.nearlyFull() {
			return a
		}
	}
	if a.load.nearlyFull() || b.load.nearlyFull() {
		return notFull(list, a, b)
	}
	if b.load.busy() < a.load.busy() {
		return b
	}
	return a
}

// lessBusyOf is the choice where candidates are excluded: by a walk from a random place, so that the exclusions cannot
// push their share onto a neighbour. It is off the common path, and the lists that routes name are short.
func lessBusyOf(list, only []*peer, tried *tried, fresh *freshness) *peer {
	var a, b *peer
	seen := uint64(0)
	for _, p := range list {
		if tried.has(p) || (only != nil && !contains(only, p)) || !fresh.holds(p) {
			continue
		}
		// Reservoir sampling of two: each pair of the allowed is equally likely.
		seen++
		switch r := rand.Uint64N(seen); {
		case seen == 1:
			a = p
		case seen == 2:
			b = p
			if r == 0 {
				a, b = b, a
			}
		case r == 0:
			a = p
		case r == 1:
			b = p
		}
	}
	switch {
	case b == nil:
		return a
	case a.load.full() && !b.load.full():
		return b
	case b.load.busy() < a.load.busy() && !b.load.full():
		return b
	}
	return a
}

// freshDraws is twoDraws among those that are within a bound on lag: most often those drawn first are, and only where
// they are not all are asked.
func freshDraws(list, only []*peer, tried *tried, fresh *freshness) *peer {
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
	if b.load.busy() < a.load.busy() {
		return b
	}
	return a
}

// maxSpill bounds how many peers a call looks at for a free connection before it queues: asking costs a lock each.
const maxSpill = 8
