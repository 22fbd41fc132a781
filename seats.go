package multipool

import (
	"context"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// A peer's own pool and the pools that follow share its server: together they have no more connections than the peer's
// MaxConns. Two things are counted. A turn is a call's right to use a connection; a seat is a connection's right to be.
//
// A call takes its turn in front of its pool, so that where all are taken it waits there, and finds the connection that
// is released next. Behind the pool it would wait for a new connection, whatever is released meanwhile. As there are as
// many turns as seats, who has a turn and needs a new connection finds a free seat, or one of an idle connection, of
// whichever pool: that is evicted.
//
// Turns are taken from the first use of a pool that follows on: nobody else has to share. Seats are always counted.

// poolKind says which of its server's pools a connection belongs to.
type poolKind uint8

const (
	poolOwn      poolKind = iota // the peer's own
	poolPrimary                  // MultiPool.PrimaryPool
	poolReplicas                 // MultiPool.ReplicaPool
	poolKinds
)

// turns are the rights to use a connection of one peer.
type turns struct {
	mu    sync.Mutex // nothing blocks under it
	limit int32
	using [poolKinds]int32
	queue [poolKinds][]ticket // who waits, first come first served within a pool
	asked uint64              // tickets given out
}

// ticket is a place in the line.
type ticket struct {
	number uint64
	called chan struct{} // closed when its turn has come
}

// ask takes a turn, or gets in line and returns what is closed when its turn has come.
func (t *turns) ask(k poolKind) <-chan struct{} {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.sum() < t.limit {
		t.using[k]++
		return nil
	}
	t.asked++
	called := make(chan struct{})
	t.queue[k] = append(t.queue[k], ticket{t.asked, called})
	return called
}

// try takes a turn if one is free.
func (t *turns) try(k poolKind) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.sum() >= t.limit {
		return false
	}
	t.using[k]++
	return true
}

// withdraw leaves the line, or gives the turn back that has come meanwhile.
func (t *turns) withdraw(k poolKind, called <-chan struct{}) {
	t.mu.Lock()
	defer t.mu.Unlock()
	i := slices.IndexFunc(t.queue[k], func(c ticket) bool { return c.called == called })
	if i < 0 {
		t.giveLocked(k)
		return
	}
	t.queue[k] = slices.Delete(t.queue[k], i, i+1)
}

func (t *turns) give(k poolKind) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.giveLocked(k)
}

func (t *turns) giveLocked(k poolKind) {
	t.using[k]--
	next, any := t.next(k)
	if !any {
		return
	}
	t.using[next]++
	close(t.queue[next][0].called)
	t.queue[next] = slices.Delete(t.queue[next], 0, 1)
}

// next chooses the pool that gets a turn which pool k gives back. It stays with k, whose connection has just become
// free, unless another that waits has fewer or none: a turn that goes over costs a connection closed and one made, so
// it goes over until all that wait have alike, and then no more. Of two others that have alike the one that has waited longer
// gets it.
func (t *turns) next(k poolKind) (next poolKind, any bool) {
	next = k
	for o := range poolKinds {
		if o != k && len(t.queue[o]) > 0 && (next == k || t.before(o, next)) {
			next = o
		}
	}
	if next != k && (len(t.queue[k]) == 0 || t.using[next] == 0 || t.using[next] < t.using[k]) {
		return next, true
	}
	return k, len(t.queue[k]) > 0
}

// before reports whether, of two pools that wait, a comes before b.
func (t *turns) before(a, b poolKind) bool {
	if t.using[a] != t.using[b] {
		return t.using[a] < t.using[b]
	}
	return t.queue[a][0].number < t.queue[b][0].number
}

func (t *turns) sum() (n int32) {
	for _, u := range t.using {
		n += u
	}
	return n
}

func (t *turns) full() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.sum() >= t.limit
}

// seats are the connections of one peer.
type seats struct {
	mu    sync.Mutex // nothing blocks under it
	limit int32
	taken [poolKinds]int32
	made  atomic.Int32  // connections of the peer's own pool that there are: of those taken
	wants int           // connections that wait for a seat
	freed chan struct{} // closed when one has become free; nil: nobody waits
}

// take takes a seat, or returns what is closed when one has become free.
func (s *seats) take(k poolKind, shared bool) (freed <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if shared && s.sum() >= s.limit {
		if s.freed == nil {
			s.freed = make(chan struct{})
		}
		return s.freed
	}
	s.taken[k]++
	return nil
}

func (s *seats) give(k poolKind) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.taken[k]--
	if s.freed != nil {
		close(s.freed)
		s.freed = nil
	}
}

func (s *seats) want(n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.wants += n
}

// wanted reports whether a connection waits for a seat.
func (s *seats) wanted() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.wants > 0
}

func (s *seats) sum() (n int32) {
	for _, u := range s.taken {
		n += u
	}
	return n
}

// of is how many a pool has.
func (s *seats) of(k poolKind) int32 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.taken[k]
}

// awaitTurn waits for a turn of pool k for as long as the peer stands and the pool keeps to it; errPeerDown: it does not any
// more. keeps is nil where the pool is the peer's own, which keeps to it whatever the news.
func (p *peer) awaitTurn(ctx context.Context, k poolKind, keeps func(*topology) bool) error {
	called := p.turns.ask(k)
	if called == nil {
		return nil
	}
	var err error
	for err == nil {
		top := p.owner.topology.Load()
		if keeps != nil && !keeps(top) {
			err = errPeerDown
			break
		}
		select {
		case <-called:
			return nil
		case <-top.superseded:
		case <-p.era.Load().Done():
			err = errPeerDown
		case <-p.owner.lifetime.Done():
			err = ErrClosedPool
		case <-ctx.Done():
			err = ctx.Err()
		}
	}
	p.turns.withdraw(k, called)
	return err
}

// sit takes a seat for a connection of pool k, an idle connection's if need be. Who has no turn may have to wait: for one
// that the program took past the turns (AcquireAllIdle, PeerPool), that is cleaned up, or that is made for nobody.
func (p *peer) sit(ctx context.Context, k poolKind) error {
	waits := false
	defer func() {
		if waits {
			p.seats.want(-1)
		}
	}()
	for {
		freed := p.seats.take(k, p.shared.Load())
		if freed == nil {
			return nil
		}
		if p.sockets.evict(k) {
			continue
		}
		if !waits {
			waits = true
			p.seats.want(1)
		}
		again := time.NewTimer(evictAgain)
		select {
		case <-freed:
		case <-again.C: // one may have become idle that nobody released
		case <-p.era.Load().Done():
			again.Stop()
			return errPeerDown
		case <-ctx.Done():
			again.Stop()
			return ctx.Err()
		}
		again.Stop()
	}
}

const evictAgain = 10 * time.Millisecond
