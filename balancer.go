package multipool

import (
	"math"
	"math/rand/v2"
	"slices"
	"sync/atomic"
	"time"
)

// Balancer chooses one of several peers that are equally suitable for a call.
//
// The pool asks it for every attempt of every call that has more than one candidate. These are reads that go to
// replicas, to any peer, or to peers that the route names; in [ModeEquivalent] they are all calls. The pool does not
// ask it for calls to the primary, for calls in [ModeOrdered] unless their route names peers, for [MultiPool.Drain], or
// for health checks. [MultiPool.Explain] asks it as a call would.
//
// A Balancer must be safe for concurrent use. It runs on the caller's goroutine before the call, so it must be fast. If
// it panics, the caller does.
type Balancer interface {
	// Pick returns the index of the candidate that it chooses. Any number that is not the index of a usable candidate,
	// for example -1, leaves the choice to the default. c is valid during the call only.
	Pick(c Candidates) int
}

// Candidates are the peers among which a [Balancer] chooses. They are the healthy peers, or the suspects if none is
// healthy, that the route and the mode allow. With [Options].Zone they are those of the program's zone; if none of
// these is usable or has a free connection, Pick is called again with those of the other zones. They are in the order
// of the configuration, except that the primary comes after the replicas. Indexes run from 0 to Len()-1. Any other
// index panics.
//
// The methods read the state of a peer when they are called, without a lock, except that Ready may take the lock of a
// pool that seems to be full. [NewCandidates] makes Candidates for the test of a Balancer. [RoundRobin] and [Nearest]
// use no other methods than these.
type Candidates struct {
	list  []*peer
	only  []*peer // nil: all
	tried []*peer
	fresh freshness
	reads bool
}

// candidatesOf copies what a balancer may ask about: a pointer to the caller's stack would move that to the heap, call by
// call.
func candidatesOf(list []*peer, in *intent, tried *tried) Candidates {
	c := Candidates{list: list, only: in.peers, reads: in.reads}
	if in.reads {
		c.fresh = in.fresh
	}
	if tried.n > 0 {
		c.tried = slices.Clone(tried.peers[:tried.n])
	}
	return c
}

// Len returns the number of candidates, which is at least two.
func (c Candidates) Len() int { return len(c.list) }

// Name returns the name of candidate i.
func (c Candidates) Name(i int) string { return c.list[i].name }

// Role returns the role of candidate i.
func (c Candidates) Role(i int) Role { return Role(c.list[i].role.Load()) }

// Zone returns the zone of candidate i, or "" if it has none.
func (c Candidates) Zone(i int) string { return c.list[i].zone }

// Weight returns the weight of candidate i, which is 1 if none was configured. For a peer that has just come up it is
// less: it grows from a tenth of the weight to all of it within ten seconds.
func (c Candidates) Weight(i int) float64 { return c.list[i].load.pull() / fullShare }

// InFlight returns how many calls use a connection of candidate i or wait for one.
func (c Candidates) InFlight(i int) int { return int(c.list[i].load.busy()) }

// Latency returns the median duration of the last reads on candidate i, or 0 if it is not known. One read in eight is
// measured, and the median is updated twice a second.
func (c Candidates) Latency(i int) time.Duration { return c.list[i].latency.typical() }

// RoundTrip returns the smoothed duration of the health checks of candidate i, or 0 if it is not known.
func (c Candidates) RoundTrip(i int) time.Duration { return c.list[i].roundTrip.known() }

// Usable reports whether candidate i may take the call. It may if it has not failed the call already, if the route
// names it or names no peers, and, for a read, if it is within the route's MaxLag.
func (c Candidates) Usable(i int) bool {
	p := c.list[i]
	return (c.tried == nil || !contains(c.tried, p)) &&
		(c.only == nil || contains(c.only, p)) &&
		(!c.fresh.bounds() || c.fresh.holds(p))
}

// Ready reports whether candidate i should take the call if it is chosen: it is usable and has a free connection. For a
// peer that has just come up, Ready also draws at random, in every call, whether this call is part of its reduced
// share. If no candidate is ready, a usable one is as good a choice: the call waits for its connection.
func (c Candidates) Ready(i int) bool {
	l := &c.list[i].load
	return c.Usable(i) && !l.full() && (l.share.Load() >= fullShare || l.takesDraw(rand.Uint32()))
}

// Reads reports whether the call is a read.
func (c Candidates) Reads() bool { return c.reads }

// Named reports whether the call's route names peers. If so, perhaps few of many candidates are usable.
func (c Candidates) Named() bool { return c.only != nil }

// LessBusy returns i, or j if that candidate is less busy. It is if, with this call, it would have no more calls in
// flight than i has without it, both relative to their weights. The default chooses so between the two candidates that
// it draws.
func (c Candidates) LessBusy(i, j int) int {
	if lessBusy(c.list[i], c.list[j]) == c.list[i] {
		return i
	}
	return j
}

// CandidatePeer describes a candidate for [NewCandidates].
type CandidatePeer struct {
	Name      string
	Role      Role
	Zone      string
	Weight    float64       // 0 means 1
	InFlight  int           // calls
	Latency   time.Duration // 0 if unknown
	RoundTrip time.Duration // 0 if unknown
	Full      bool          // has no free connection
	Tried     bool          // has failed the call already
	Named     bool          // is named by the call's route; if no peer is, the route names none
}

// NewCandidates returns candidates for the test of a [Balancer], in the order of peers. reads says whether the call is
// a read. A peer is usable unless it has Tried set, or other peers have Named set and it has not.
func NewCandidates(reads bool, peers ...CandidatePeer) Candidates {
	c := Candidates{reads: reads}
	for _, is := range peers {
		p := &peer{name: is.Name, zone: is.Zone}
		p.role.Store(int32(is.Role))
		p.load.weight, p.load.limit = is.Weight, math.MaxInt32
		p.load.share.Store(fullShare)
		p.load.out.Store(int32(is.InFlight))
		if is.Full {
			p.load.limit, p.load.exhausted = 0, func() bool { return true }
		}
		p.latency.told.Store(int64(is.Latency))
		p.roundTrip.smooth.Store(int64(is.RoundTrip))
		c.list = append(c.list, p)
		if is.Tried {
			c.tried = append(c.tried, p)
		}
		if is.Named {
			c.only = append(c.only, p)
		}
	}
	return c
}

var balancerNames = [...]string{"default", "round-robin", "nearest"}

// balancerNamed returns what the connection string key multipool_balancer means; nil is the default.
func balancerNamed(name string) Balancer {
	switch name {
	case "round-robin":
		return RoundRobin()
	case "nearest":
		return Nearest()
	}
	return nil
}

// inOrder takes the first candidate that is usable, as load_balance_hosts=disable of libpq asks for.
var inOrder Balancer = ordered{}

type ordered struct{}

func (ordered) Pick(c Candidates) int {
	for i := range c.Len() {
		if c.Usable(i) {
			return i
		}
	}
	return -1
}

// RoundRobin returns a [Balancer] that takes the candidates in turn. It passes over candidates that are not usable,
// those that have no free connection while others have one, and most of the time those that have just come up. It
// ignores weights. Reads and other calls are counted separately.
func RoundRobin() Balancer {
	b := new(roundRobin)
	for i := range b.next {
		b.next[i].Store(rand.Uint64N(1 << 32)) // so that the programs of a fleet do not begin alike
	}
	return b
}

type roundRobin struct {
	next [2]atomic.Uint64 // of reads, of other calls
}

func (b *roundRobin) Pick(c Candidates) int {
	next := &b.next[0]
	if !c.Reads() {
		next = &b.next[1]
	}
	n := uint64(c.Len())
	last := -1
	for range n {
		// A turn each, also for who is passed over: else its neighbour would have two.
		i := int((next.Add(1) - 1) % n)
		switch {
		case c.Ready(i):
			return i
		case last < 0 && c.Usable(i):
			last = i
		}
	}
	next.Add(1) // all have had one: the next call begins with the next
	return last
}

// Nearest returns a [Balancer] that takes the candidate whose health checks have the shortest round trip. Candidates
// within one and a half times the shortest plus 200 us count as equally near: Nearest draws two of them at random and
// takes the less busy one. It prefers candidates that have a free connection. Until round trips are known, about a
// second after the pool was made, the default chooses. Of more than eight candidates Nearest compares eight, drawn at
// random.
func Nearest() Balancer { return nearest{} }

type nearest struct{}

const (
	nearestSample = 8
	nearestMargin = 200 * time.Microsecond
)

func (nearest) Pick(c Candidates) int {
	var sample [nearestSample]int
	var trips [nearestSample]time.Duration
	n, best := 0, time.Duration(math.MaxInt64)
	for _, i := range sample[:sampled(c, &sample)] {
		d := c.RoundTrip(i)
		if d == 0 || !c.Ready(i) {
			continue
		}
		sample[n], trips[n] = i, d // n is behind the place that is read
		n, best = n+1, min(best, d)
	}
	near := 0
	for k := range n {
		if trips[k] <= best+best/2+nearestMargin {
			sample[near] = sample[k]
			near++
		}
	}
	switch near {
	case 0:
		return -1
	case 1:
		return sample[0]
	}
	a := rand.IntN(near)
	b := rand.IntN(near - 1)
	if b >= a {
		b++
	}
	return c.LessBusy(sample[a], sample[b])
}

// sampled fills in the candidates to compare and returns how many they are: all of a few, some of many. Of those that a
// route names all are met first, as they may be few among many.
func sampled(c Candidates, s *[nearestSample]int) int {
	k := c.Len()
	switch {
	case k <= nearestSample:
		for i := range k {
			s[i] = i
		}
		return k
	case !c.Named():
		for i := range s {
			s[i] = rand.IntN(k)
		}
		return nearestSample
	}
	n := 0
	for i := range k {
		if !c.Usable(i) {
			continue
		}
		if n++; n <= nearestSample {
			s[n-1] = i
		} else if at := rand.IntN(n); at < nearestSample {
			s[at] = i
		}
	}
	return min(n, nearestSample)
}
