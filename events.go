package multipool

import (
	"context"
	"reflect"
	"runtime"
	"slices"
	"sync/atomic"
	"time"
)

// herald calls the hooks on a goroutine of its own: a hook may be slow, and may call the pool.
type herald struct {
	hooks     *Hooks
	events    chan func()
	discarded atomic.Int64
	told      *topology // whose primary was told last
}

const heraldQueue = 256

// newHerald returns nil where there is nothing to tell. Every event that it tells has the name of its pool.
func newHerald(pool string, h *Hooks) *herald {
	if h.PeerChanged == nil && h.PrimaryChanged == nil && h.DiscoveryChanged == nil {
		return nil
	}
	labelled := &Hooks{}
	if f := h.PeerChanged; f != nil {
		labelled.PeerChanged = func(e PeerEvent) { e.Pool = pool; f(e) }
	}
	if f := h.PrimaryChanged; f != nil {
		labelled.PrimaryChanged = func(e PrimaryEvent) { e.Pool = pool; f(e) }
	}
	if f := h.DiscoveryChanged; f != nil {
		labelled.DiscoveryChanged = func(e DiscoveryEvent) { e.Pool = pool; f(e) }
	}
	return &herald{hooks: labelled, events: make(chan func(), heraldQueue)}
}

// tell queues what an observation has changed. It is called in the order of publication, and never blocks.
func (h *herald) tell(old, next *topology, o observation) {
	if h == nil {
		return
	}
	if f := h.hooks.PeerChanged; f != nil {
		for i := range next.members {
			if e, changed := peerEvent(old, next, i, o); changed {
				h.queue(func() { f(e) })
			}
		}
		if m := old.member(o.peer); o.leaves && m != nil {
			e := eventOf(old, m)
			e.To = HealthGone
			h.queue(func() { f(e) })
		}
	}
	if h.told == nil {
		h.told = old
	}
	if next.heir != nil && o.forgets == "" {
		return // no change of the primary is told before every peer that answers has been looked at
	}
	if f := h.hooks.PrimaryChanged; f != nil {
		was := h.told
		h.told = next
		if e, changed := primaryEvent(was, next, o); changed {
			h.queue(func() { f(e) })
		}
	}
}

// advise tells what is wrong with how a peer is configured.
func (h *herald) advise(t *topology, p *peer, cause error) {
	m := t.member(p)
	if h == nil || m == nil || h.hooks.PeerChanged == nil {
		return
	}
	e := eventOf(t, m)
	e.Cause = cause
	h.queue(func() { h.hooks.PeerChanged(e) })
}

// lost is how many events were discarded.
func (h *herald) lost() int64 {
	if h == nil {
		return 0
	}
	return h.discarded.Load()
}

// discovery tells that discovery has begun to fail, or works again.
func (h *herald) discovery(e DiscoveryEvent) {
	if h == nil || h.hooks.DiscoveryChanged == nil {
		return
	}
	h.queue(func() { h.hooks.DiscoveryChanged(e) })
}

func (h *herald) queue(event func()) {
	select {
	case h.events <- event:
	default:
		h.discarded.Add(1)
	}
}

// eventOf is an event of a member by which nothing has changed.
func eventOf(t *topology, m *member) PeerEvent {
	unfit := t.unfit(m)
	return PeerEvent{
		Peer: m.peer.name, Role: m.role, FromRole: m.role, From: m.health, To: m.health,
		Slow: m.slow, Drained: m.drained, Unfit: unfit, WasSlow: m.slow, WasDrained: m.drained, WasUnfit: unfit,
		At: time.Now(),
	}
}

// peerEvent is what an observation has changed of one member, which need not be the one observed: whether a replica is
// one of this primary's depends on which one that is.
func peerEvent(old, next *topology, i int, o observation) (PeerEvent, bool) {
	is := &next.members[i]
	was := old.member(is.peer)
	joined := was == nil
	if joined {
		was = &member{}
	}
	if !joined && was.health == is.health && was.role == is.role && was.slow == is.slow && old.unfit(was) == next.unfit(is) && was.drained == is.drained {
		return PeerEvent{}, false
	}
	e := eventOf(next, is)
	e.FromRole, e.From, e.WasSlow, e.WasDrained, e.WasUnfit = was.role, was.health, was.slow, was.drained, old.unfit(was)
	if is.peer == o.peer {
		e.Cause = o.cause
	}
	return e, true
}

func primaryEvent(old, next *topology, o observation) (PrimaryEvent, bool) {
	forgot := ""
	if !o.leaves {
		forgot = o.forgets
	}
	if forgot == "" && old.primary == next.primary && old.split == next.split && slices.Equal(old.rivals, next.rivals) {
		return PrimaryEvent{}, false
	}
	return PrimaryEvent{
		Primary: next.primary.called(), Previous: old.primary.called(), Timeline: next.timeline,
		Rivals: namesOfPeers(next.rivals), Split: next.split, NextPrimary: next.heir.called(), Forgotten: forgot, At: time.Now(),
	}, true
}

// run delivers until ctx ends, and then what is left.
func (h *herald) run(ctx context.Context) {
	for {
		select {
		case deliver := <-h.events:
			callHooks(deliver)
			continue
		default:
		}
		select {
		case <-ctx.Done():
			return
		case deliver := <-h.events:
			callHooks(deliver)
		}
	}
}

// callHooks is the function under which every hook of a herald runs; see inside.
//
//go:noinline
func callHooks(deliver func()) { deliver() }

// inside reports whether its caller was called by a function of the program's under caller, for any pool: then caller is
// on the stack. A pool cannot tell in another way who calls: any goroutine may call Close while a hook runs.
func inside(caller any) bool {
	under := reflect.ValueOf(caller).Pointer()
	pcs := make([]uintptr, 64)
	n := runtime.Callers(1, pcs)
	for ; n == len(pcs); n = runtime.Callers(1, pcs) {
		pcs = make([]uintptr, 2*len(pcs))
	}
	frames := runtime.CallersFrames(pcs[:n])
	for {
		frame, more := frames.Next()
		if frame.Entry == under {
			return true
		}
		if !more {
			return false
		}
	}
}
