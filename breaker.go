package multipool

import (
	"errors"
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
	trips     atomic.Int64
}

const (
	// consecutiveFaults trips without a probe's verdict.
	consecutiveFaults = 5
	// halfOpenAfter only makes half-open reachable; when it is tried is the monitor's decision.
	halfOpenAfter = 100 * time.Millisecond
)

func newBreaker(peer string) *breaker {
	b := new(breaker)
	b.circuit = gobreaker.NewCircuitBreaker[struct{}](gobreaker.Settings{
		Name:         peer,
		MaxRequests:  1,
		Interval:     10 * time.Second,
		BucketPeriod: time.Second,
		Timeout:      halfOpenAfter,
		ReadyToTrip: func(c gobreaker.Counts) bool {
			return b.condemned.Load() || c.ConsecutiveFailures >= consecutiveFaults
		},
		// Called under the circuit's mutex: it must not call back.
		OnStateChange: func(_ string, from, to gobreaker.State) {
			b.state.Store(int32(to))
			if from == gobreaker.StateClosed {
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

func (b *breaker) String() string { return gobreaker.State(b.state.Load()).String() }
