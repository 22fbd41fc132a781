package multipool

import (
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// latencies is the last reads of a peer, one in eight, and what its monitor's looks took.
type latencies struct {
	mu   sync.Mutex
	ring [latencySample]time.Duration
	n    int
	told atomic.Int64 // the median, as it was last worked out
}

const (
	latencySample = 15
	latencyLeast  = 7
)

func (l *latencies) note(d time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ring[l.n%latencySample] = d
	l.n++
}

// replace forgets the reads and puts a look's time in their place: a peer that gets no reads has no other way to show
// that it is quick again.
func (l *latencies) replace(d time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i := range l.ring {
		l.ring[i] = d
	}
	l.n = latencySample
}

// forget drops what was measured.
func (l *latencies) forget() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.n = 0
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
