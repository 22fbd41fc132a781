package multipool

import (
	"math"
	"math/rand/v2"
	"slices"
	"sync/atomic"
	"time"
)

// Balancer chooses one of several peers that may take a call alike.
//
// It is asked for each attempt of each call that has more than one candidate: reads that go to the replicas, to any peer
// or to peers that the route names, and under [ModeEquivalent] everything else too. It is not asked for what goes to the
// one primary, nor under [ModeOrdered] but for calls that name their peers, nor by [MultiPool.Drain] or the monitors.
// [MultiPool.Explain] asks it as a call would.
//
// It must be safe for concurrent use, and quick: it runs on the caller's goroutine before the call. A panic of its is the
// caller's.
type Balancer interface {
	// Pick returns the index of the chosen candidate. Any number that is no index of a usable candidate, as -1, declines:
	// the default chooses then. c is valid during the call.
	Pick(c Candidates) int
}

// Candidates are the peers among which a [Balancer] chooses, healthy (where nobody is: suspects) and as the route, the
// mode and zones have it: with [Options].Zone they are those of the own zone, and where none of these is usable or has a
// free connection those of the others, in a second Pick. They have the order of the configuration, but that the primary
// stands behind the replicas. Indexes go from 0 to Len()-1; others panic.
//
// It is a view: what it tells of a peer is read at that moment, without a lock; but Ready may take the lock of a pool that
// seems to be full. [NewCandidates] makes one for the test of a Balancer. [RoundRobin] and [Nearest] use these methods only.
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

// Len is how many there are: two at least.
func (c Candidates) Len() int { return len(c.list) }

// Name is the peer's name.
func (c Candidates) Name(i int) string { return c.list[i].name }

// Role is what the peer is in the replication.
func (c Candidates) Role(i int) Role { return Role(c.list[i].role.Load()) }

// Zone is the peer's zone; "" where it has none.
func (c Candidates) Zone(i int) string { return c.list[i].zone }

// Weight is the peer's weight, 1 where none was given; less of a peer that has just risen, growing from
// a tenth of it to the whole in ten seconds.
func (c Candidates) Weight(i int) float64 { return c.list[i].load.pull() / fullShare }

// InFlight is how many calls have or want a connection of the peer.
func (c Candidates) InFlight(i int) int { return int(c.list[i].load.busy()) }

// Latency is the median of the peer's last reads, as measured twice a second from one read in eight; 0: not known.
func (c Candidates) Latency(i int) time.Duration { return c.list[i].latency.typical() }

// RoundTrip is what the looks of the peer's monitor take, smoothed; 0: not known.
func (c Candidates) RoundTrip(i int) time.Duration { return c.list[i].roundTrip.known() }

// Usable reports whether the peer may take the call: whether it has not failed it already, is named by the route if that
// names peers, and is within the route's MaxLag if the call is a read.
func (c Candidates) Usable(i int) bool {
	p := c.list[i]
	return (c.tried == nil || !contains(c.tried, p)) &&
		(c.only == nil || contains(c.only, p)) &&
		(!c.fresh.bounds() || c.fresh.holds(p))
}

// Ready reports whether the peer should take the call if it is chosen: it is usable, has a free connection, and does not
// leave this call to another for having just risen, which is drawn at random by each call of Ready. Where no candidate is
// ready one that is usable is as good a choice: the call waits for its connection.
func (c Candidates) Ready(i int) bool {
	l := &c.list[i].load
	return c.Usable(i) && !l.full() && (l.share.Load() >= fullShare || l.takesDraw(rand.Uint32()))
}

// Reads reports whether the call is a read.
func (c Candidates) Reads() bool { return c.reads }

// Named reports whether the call's route names peers: then the usable ones may be few among many candidates.
func (c Candidates) Named() bool { return c.only != nil }

// LessBusy returns i, or j if that peer is less busy: if it would have no more calls in flight with this one than the other
// has without it, each by its weight. It is the default's choice between the two that it draws.
func (c Candidates) LessBusy(i, j int) int {
	if lessBusy(c.list[i], c.list[j]) == c.list[i] {
		return i
	}
	return j
}

// CandidatePeer is a peer as a test wants a [Balancer] to see it.
type CandidatePeer struct {
	Name      string
	Role      Role
	Zone      string
	Weight    float64       // 0: 1
	InFlight  int           // calls
	Latency   time.Duration // 0: not known
	RoundTrip time.Duration // 0: not known
	Full      bool          // has no free connection
	Tried     bool          // has failed the call already
	Named     bool          // is named by the call's route; where none is the route names nobody
}

// NewCandidates returns candidates for the test of a [Balancer]: those of a read, or of another call, in the order of peers.
// A peer is usable unless it has been tried, or others are named and it is not.
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

// inOrder takes the first that is usable: what libpq's load_balance_hosts=disable asks for.
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

// RoundRobin returns a balancer that takes the candidates in turn, passing over those that are not usable, that have no
// free connection while others have, and most of the time those that have just risen. Weights do not matter to it. Reads
// and other calls have a turn each.
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

// Nearest returns a balancer that takes the candidate of the lowest round trip, as the looks of the monitors see it.
// Those within half as much again and 200 us of the lowest are equally near: of two of them drawn at random it takes
// the less busy one. One without a free connection loses to one that has one. Until round trips are known, about a
// second after a pool was made, the default chooses. Of more than eight candidates it compares eight drawn at random.
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
