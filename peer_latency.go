package multipool

import (
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// latencies is the last reads of a peer, one in eight; and the last looks at it while it is slow, as it gets no reads then
// that would show it to be quick again.
type latencies struct {
	mu    sync.Mutex
	ring  [latencySample]time.Duration
	n     int
	looks [looksLeast]time.Duration
	seen  int          // looks
	told  atomic.Int64 // the median, as it was last worked out
}

const (
	latencySample = 15
	latencyLeast  = 7
	looksLeast    = 3
)

func (l *latencies) note(d time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ring[l.n%latencySample] = d
	l.n++
}

// look takes in what a look at a slow peer took.
func (l *latencies) look(d time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.looks[l.seen%looksLeast] = d
	l.seen++
}

// ofLooks is the median of the last looks since the peer became slow; 0 while there are too few: one may have been held up, or
// let through.
func (l *latencies) ofLooks() time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.seen < looksLeast {
		return 0
	}
	sorted := l.looks
	slices.Sort(sorted[:])
	return sorted[looksLeast/2]
}

// forgetLooks drops the looks: the peer is not slow.
func (l *latencies) forgetLooks() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.seen = 0
}

// forget drops what was measured.
func (l *latencies) forget() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.n, l.seen = 0, 0
	l.told.Store(0)
}

// median returns 0 while there are too few.
func (l *latencies) median() time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.n < latencyLeast {
		return 0
	}
	sorted := l.ring
	s := sorted[:min(l.n, latencySample)]
	slices.Sort(s)
	l.told.Store(int64(s[len(s)/2]))
	return s[len(s)/2]
}

// typical is the median without a lock, as the watch has last seen it.
func (l *latencies) typical() time.Duration { return time.Duration(l.told.Load()) }

// roundTrip is what a peer's regular looks take on a connection that exists, smoothed. Its monitor alone notes.
type roundTrip struct{ smooth atomic.Int64 }

// tripShare is the part that one look has: a few agree before a new way counts, and one that was held up is soon
// forgotten.
const tripShare = 4

func (r *roundTrip) note(d time.Duration) {
	was := time.Duration(r.smooth.Load())
	if was != 0 {
		d = was + (d-was)/tripShare
	}
	r.smooth.Store(int64(max(d, 1)))
}

// known returns 0 where no look has ended yet.
func (r *roundTrip) known() time.Duration { return time.Duration(r.smooth.Load()) }
