package quota

import (
	"slices"
	"sync"
)

// Permits are the calls' permits to use a connection of one server. Calls of the same pool get them first come, first
// served.
type Permits struct {
	Limit int32 // set before first use, and never changed

	mu      sync.Mutex // guards the fields below; nothing blocks under it
	using   [pools]int32
	queue   [pools][]waiter
	waiters uint64 // so far
}

// A waiter is a call that waits for a permit.
type waiter struct {
	number  uint64
	granted chan struct{} // closed when the call has its permit
}

// Acquire takes a permit and returns nil, or gets in line and returns a channel that is closed when the call has its
// permit. A call that no longer wants to wait has to call Withdraw.
func (p *Permits) Acquire(of Pool) (granted <-chan struct{}) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.inUse() < p.Limit {
		p.using[of]++
		return nil
	}
	p.waiters++
	w := waiter{p.waiters, make(chan struct{})}
	p.queue[of] = append(p.queue[of], w)
	return w.granted
}

// Try takes a permit if one is free.
func (p *Permits) Try(of Pool) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.inUse() >= p.Limit {
		return false
	}
	p.using[of]++
	return true
}

// Withdraw leaves the line, or releases the permit if it has been granted meanwhile.
func (p *Permits) Withdraw(of Pool, granted <-chan struct{}) {
	p.mu.Lock()
	defer p.mu.Unlock()
	i := slices.IndexFunc(p.queue[of], func(w waiter) bool { return w.granted == granted })
	if i < 0 {
		p.release(of)
		return
	}
	p.queue[of] = slices.Delete(p.queue[of], i, i+1)
}

// Release gives a permit back, and grants it to the next call that waits.
func (p *Permits) Release(of Pool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.release(of)
}

// release is Release. The caller holds p.mu.
func (p *Permits) release(of Pool) {
	p.using[of]--
	next, any := p.next(of)
	if !any {
		return
	}
	p.using[next]++
	close(p.queue[next][0].granted)
	p.queue[next] = slices.Delete(p.queue[next], 0, 1)
}

// next returns the pool that gets a permit which a call of the given pool releases. The permit stays with that pool,
// whose connection has just become free, unless another pool that waits has fewer permits, or none: a permit that moves
// costs a connection closed and one made, so permits move until all pools that wait have equally many, and then no more.
// Of two other pools with equally many the one that has waited longer gets it. The caller holds p.mu.
func (p *Permits) next(of Pool) (next Pool, any bool) {
	next = of
	for o := range pools {
		if o != of && len(p.queue[o]) > 0 && (next == of || p.before(o, next)) {
			next = o
		}
	}
	if next != of && (len(p.queue[of]) == 0 || p.using[next] == 0 || p.using[next] < p.using[of]) {
		return next, true
	}
	return of, len(p.queue[of]) > 0
}

// before reports whether, of two pools that wait, a comes before b. The caller holds p.mu.
func (p *Permits) before(a, b Pool) bool {
	if p.using[a] != p.using[b] {
		return p.using[a] < p.using[b]
	}
	return p.queue[a][0].number < p.queue[b][0].number
}

// Full reports whether no permit is free.
func (p *Permits) Full() bool { return p.InUse() >= p.Limit }

// InUse returns how many permits are taken, by calls of all pools.
func (p *Permits) InUse() int32 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.inUse()
}

// inUse is InUse. The caller holds p.mu.
func (p *Permits) inUse() int32 { return sum(p.using) }

// Waiting returns how many calls wait, of all pools.
func (p *Permits) Waiting() (n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, q := range p.queue {
		n += len(q)
	}
	return n
}
