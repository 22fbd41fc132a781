package multipool

import (
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sony/gobreaker/v2"
)

// breaker is the circuit breaker of one peer. The routing never asks it: it reads the topology, which the breaker's
// changes reach by way of the monitor. Outcomes go in as known results; only the monitor's looks go through it half
// open, so that no user's call is the guinea pig.
type breaker struct {
	circuit *gobreaker.CircuitBreaker[struct{}]

	// state mirrors the circuit's. gobreaker's own State takes its mutex and moves open to half-open when read.
	state atomic.Int32

	// condemned makes the next failure trip: gobreaker cannot be forced open.
	condemned atomic.Bool
	trips     *atomic.Int64
	opened    atomic.Int64 // when it opened last, in nanoseconds since start
	start     time.Time
}

const (
	// Two rules trip without a probe's verdict: so many faults of one generation in a row, and a share of the outcomes
	// of the last ten seconds (Finagle's line; a healthy server's share is near zero).
	consecutiveFaults = 5
	faultShare        = 5 // one in five
	faultSample       = 20
	faultWindow       = 10 // seconds
	// halfOpenAfter only makes half-open reachable; when it is tried is the monitor's decision.
	halfOpenAfter = time.Millisecond
)

// newBreaker returns a closed breaker. rate is the peer's own count of outcomes: gobreaker is told of successes only
// while the peer is suspect, so it cannot know the share of faults.
func newBreaker(peer string, rate *faultRate, trips *atomic.Int64) *breaker {
	b := &breaker{start: time.Now(), trips: trips}
	b.circuit = gobreaker.NewCircuitBreaker[struct{}](gobreaker.Settings{
		Name:         peer,
		MaxRequests:  1,
		Interval:     10 * time.Second,
		BucketPeriod: time.Second,
		Timeout:      halfOpenAfter,
		ReadyToTrip: func(c gobreaker.Counts) bool {
			return b.condemned.Load() || c.ConsecutiveFailures >= consecutiveFaults || rate.high()
		},
		// Called under the circuit's mutex: it must not call back.
		OnStateChange: func(_ string, from, to gobreaker.State) {
			b.state.Store(int32(to))
			if from == gobreaker.StateClosed {
				b.opened.Store(int64(time.Since(b.start)))
				b.trips.Add(1)
			}
		},
	})
	return b
}

var errPeerFault = errors.New("multipool: peer fault")

// failure counts a peer fault and reports whether it opened the breaker.
func (b *breaker) failure() (opened bool) {
	if !b.closed() {
		return false
	}
	_, _ = b.circuit.Execute(func() (struct{}, error) { return struct{}{}, errPeerFault })
	return !b.closed()
}

// success counts a good outcome; it matters only between faults.
func (b *breaker) success() {
	if b.closed() {
		_, _ = b.circuit.Execute(func() (struct{}, error) { return struct{}{}, nil })
	}
}

// trip opens the breaker.
func (b *breaker) trip() {
	b.condemned.Store(true)
	_ = b.failure()
	b.condemned.Store(false)
}

// trial runs one look through the open breaker: a good one closes it. It returns gobreaker.ErrOpenState where the
// breaker has been open too short a time.
func (b *breaker) trial(look func() error) error {
	_, err := b.circuit.Execute(func() (struct{}, error) { return struct{}{}, look() })
	return err
}

func (b *breaker) closed() bool { return gobreaker.State(b.state.Load()) == gobreaker.StateClosed }

// openSince is when the breaker opened last, openFor how long ago that was.
func (b *breaker) openSince() time.Time { return b.start.Add(time.Duration(b.opened.Load())) }

func (b *breaker) openFor() time.Duration { return time.Since(b.openSince()) }

// shown returns the state as Status has it.
func (b *breaker) shown() BreakerState {
	return [...]BreakerState{
		gobreaker.StateClosed: BreakerClosed, gobreaker.StateHalfOpen: BreakerHalfOpen, gobreaker.StateOpen: BreakerOpen,
	}[b.state.Load()]
}

// BreakerState is the state of a peer's circuit breaker. The set of values is fixed, so it suits as a label of metrics.
type BreakerState uint8

const (
	// BreakerClosed, the zero value, means that the peer may take calls, and that its faults are counted.
	BreakerClosed BreakerState = iota
	// BreakerOpen means that the peer is down and takes no calls. The pool checks it until it answers.
	BreakerOpen
	// BreakerHalfOpen means that a health check is under way that closes the breaker if it succeeds.
	BreakerHalfOpen
)

var breakerNames = [...]string{"closed", "open", "half-open"}

// String returns "closed", "open" or "half-open".
func (b BreakerState) String() string { return nameOf(breakerNames[:], b, "breaker state") }

// MarshalText returns the text that String returns, or an error if the value is not one of the constants.
func (b BreakerState) MarshalText() ([]byte, error) {
	return marshalName(breakerNames[:], b, "breaker state")
}

// UnmarshalText is the inverse of MarshalText. Its error for an unknown text lists the known ones.
func (b *BreakerState) UnmarshalText(text []byte) error {
	return unmarshalName(breakerNames[:], b, "breaker state", text)
}

// faultRate is the outcomes of the last seconds at one peer: faults as they come, all statements as the watch counts
// them.
type faultRate struct {
	mu      sync.Mutex
	faults  [faultWindow]int64
	done    [faultWindow]int64
	current int // the present second's place
}

// fault counts one.
func (r *faultRate) fault() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.faults[r.current]++
}

// add counts statements that have ended, faults included.
func (r *faultRate) add(done int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.done[r.current] += done
}

// next begins another second.
func (r *faultRate) next() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.current = (r.current + 1) % faultWindow
	r.faults[r.current], r.done[r.current] = 0, 0
}

// clear forgets everything: the peer has been judged.
func (r *faultRate) clear() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.faults, r.done = [faultWindow]int64{}, [faultWindow]int64{}
}

// high reports whether the share of faults is one that no healthy server has.
func (r *faultRate) high() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	var faults, done int64
	for i := range faultWindow {
		faults += r.faults[i]
		done += r.done[i]
	}
	done = max(done, faults)
	return done >= faultSample && faults*faultShare >= done
}
