package multipool

import "time"

// observe takes a piece of news into the topology and publishes it. It is the only place where the topology changes.
func (p *MultiPool) observe(o observation) {
	old, next := p.publish(o)
	if old == next {
		return
	}
	if was, is := old.member(o.peer), next.member(o.peer); was != nil && is != nil && was.role == RolePrimary && is.role == RoleReplica {
		o.peer.demoted()
	}
	if next.replaced(old.primary) {
		old.primary.replaced()
	}
	p.recheck(old, next, o)
}

// publish is observe under the lock. It returns the topologies before and after.
func (p *MultiPool) publish(o observation) (old, next *topology) {
	p.mu.Lock()
	defer p.mu.Unlock()
	old = p.topology.Load()
	if old == nil {
		return nil, nil // the pool is being made; its monitors begin with a look
	}
	o.came = max(o.came, p.instant())
	next = old.apply(o)
	if next == old {
		return old, old
	}
	if m := next.member(o.peer); m != nil {
		if Role(o.peer.role.Swap(int32(m.role))) != m.role {
			o.peer.generation.Add(1)
		}
		o.peer.health.Store(int32(m.health))
	}
	p.topology.Store(next)
	p.changed.Store(int64(p.clock()))
	close(old.superseded)
	p.herald.tell(old, next, o)
	if len(next.writes) == 0 && len(old.writes) > 0 {
		p.orphaned.Store(time.Now().UnixNano())
		p.nudgeAll() // one of them may be promoted any moment
	}
	if next.event != old.event {
		p.nudgeAll()
	}
	if since := next.waitsSince(); since != old.waitsSince() && since != 0 {
		p.patience = time.AfterFunc(heedTime, func() { p.observe(observation{over: since}) })
	}
	return old, next
}

// heedTime is how long who claims to be the primary waits for others to be looked at, where they answer and cannot be.
const heedTime = lookTimeout + probeTimeout

// instant is the pool's clock for the topology.
func (p *MultiPool) instant() instant { return instant(max(p.clock(), 1)) }

const (
	// Where a lag is bounded every peer is looked at this often. A replica's crossing of a bound shows when the primary
	// has been looked at after it, and the replica after that; every look may come a fifth late.
	maxLagLook = 700 * time.Millisecond
	minLagLook = 50 * time.Millisecond
	lagLooks   = 3 // within a bound on time
)

// lookFor has the peers looked at as often as a bound on lag needs.
func (p *MultiPool) lookFor(l Lag) {
	if !l.bounds() || p.solo {
		return
	}
	every := maxLagLook
	if l.Time > 0 {
		every = min(max(l.Time/lagLooks, minLagLook), maxLagLook)
	}
	for {
		now := p.lagEvery.Load()
		if now <= int64(every) {
			return
		}
		if p.lagEvery.CompareAndSwap(now, int64(every)) {
			break
		}
	}
	p.nudgeAll()
}

func (p *MultiPool) nudgeAll() {
	for _, q := range p.peers() {
		q.monitor.nudge()
	}
}

// lagLooks is how often every peer is looked at because of a bound on lag.
func (p *MultiPool) lagLooks() time.Duration { return time.Duration(p.lagEvery.Load()) }

// orphanedFor is how long there has been no primary that takes writes; 0 if there is one, or there was none yet and nobody
// waits for one.
func (p *MultiPool) orphanedFor() time.Duration {
	if len(p.topology.Load().writes) > 0 {
		return 0
	}
	since := p.orphaned.Load()
	if since == 0 { // there was none yet
		if p.awaited() {
			return 1
		}
		return 0
	}
	return max(time.Since(time.Unix(0, since)), 1)
}
