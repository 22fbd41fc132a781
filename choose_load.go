package multipool

import "sync/atomic"

// load is what a peer is carrying, kept by whoever sends calls there, read by the choice without a lock.
type load struct {
	out   atomic.Int32 // calls that have or want a connection
	limit int32        // connections at most

	// A peer's part of the draws is its weight, while it is new a part of that: a risen peer is used gently at first.
	weight float64      // 0: 1
	share  atomic.Int32 // in 1/fullShare

	// exhausted asks the pool itself, under its lock, whether every connection is in use.
	exhausted func() bool
}

const (
	fullShare = 1000
	newShare  = fullShare / 10 // of a peer that has just risen
	// shareStep is what a tick adds. It divides evenly: what were rounded off at every tick would make easeTime longer.
	shareStep = (fullShare - newShare) / int32(easeTime/watchTick)
)

// busy is how many calls are waiting for the peer or running on it.
func (l *load) busy() int32 { return l.out.Load() }

// nearlyFull reports that no connection may be free. Only then is the pool itself asked.
func (l *load) nearlyFull() bool { return l.out.Load() >= l.limit }

func (l *load) full() bool { return l.nearlyFull() && l.exhausted() }

// easeIn sets the share of a peer that has just risen; the watch raises it again.
func (l *load) easeIn() { l.share.Store(newShare) }

// easeOut raises the share of a risen peer.
func (l *load) easeOut() {
	if share := l.share.Load(); share < fullShare {
		l.share.Store(min(share+shareStep, fullShare))
	}
}

// heft is the weight as it was configured.
func (l *load) heft() float64 {
	if l.weight == 0 {
		return 1
	}
	return l.weight
}

// pull is what the peer's load is judged by: its weight, less while it is new.
func (l *load) pull() float64 { return l.heft() * float64(l.share.Load()) }

// takesDraw reports whether the peer keeps a draw that it has got: always, unless it is new.
func (l *load) takesDraw(r uint32) bool {
	share := l.share.Load()
	return share >= fullShare || int32(r%fullShare) < share
}

// lessThan reports whether the peer would be no busier with one call more than another is, each by its pull: of equals
// it is the less busy, and a light one does not get a heavy one's calls for being idle.
func (l *load) lessThan(m *load) bool {
	return float64(l.busy()+1)*m.pull() <= float64(m.busy())*l.pull()
}
