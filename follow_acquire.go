package multipool

import (
	"context"
	"errors"
	"sync"

	"github.com/pgmultipool/multipool/internal/quota"
)

// call is one Acquire of a pool that follows: the context under which it runs, and what it holds until it has a
// connection.
type call struct {
	context.Context
	end      context.CancelFunc
	traced   context.Context // the caller's, as the program's tracer has returned it: it does not end with the call
	follower *follower

	mu     sync.Mutex // a connection's making may outlive its call
	at     *peer      // where it has a permit and counts for the load, or nil
	guest  bool       // ... and a place among the reads that fell back to the primary
	left   bool
	failed error
}

type callKey struct{}

// Value finds the call itself, too: that is how the making of a connection knows for whom it is.
func (c *call) Value(key any) any {
	if key == (callKey{}) {
		return c
	}
	return c.Context.Value(key)
}

// Err returns why the call has failed, if it has. The pool, which waits for the context to end, returns that.
func (c *call) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.failed != nil {
		return c.failed
	}
	return c.Context.Err()
}

// fail ends the call with an error of our own.
func (c *call) fail(err error) {
	c.mu.Lock()
	if !c.left && c.failed == nil {
		c.failed = err
	}
	c.mu.Unlock()
	c.end()
}

// enter waits for a peer and for a permit there.
func (c *call) enter() error {
	f := c.follower
	if f.owner.closed.Load() {
		return ErrClosedPool
	}
	var t trail
	for {
		q, top, err := f.seek(c, &t, f.forCall, c.letGo)
		if err != nil {
			return err
		}
		if err := c.take(q, top); err == nil || !errors.Is(err, errPeerDown) {
			return err
		}
		t.picked = nil
	}
}

// take waits for a permit of a peer while the pool has a use for it; errPeerDown: it has none any more.
func (c *call) take(q *peer, top *topology) error {
	f := c.follower
	q.load.out.Add(1)
	guest := c.guestAt(q, top)
	var err error
	if guest {
		err = q.awaitPlace(c, q.guests, (*topology).hasReplica)
	}
	if err == nil {
		err = q.awaitPermit(c, f.kind, func(top *topology) bool { return f.keeps(top, q) })
		if err != nil && guest {
			<-q.guests
		}
	}
	if err != nil {
		q.load.out.Add(-1)
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.left {
		depart(q, f.kind, guest)
		return context.Canceled
	}
	c.quit()
	c.at, c.guest = q, guest
	return nil
}

// guestAt reports whether the call is, at a peer, a read that has fallen back to the primary and leaves its reserve alone.
func (c *call) guestAt(q *peer, top *topology) bool {
	return q.guests != nil && top.fallback && c.follower.kind == quota.Replicas
}

// move takes the call to another peer if all that it has to have there is to be had at once.
func (c *call) move(q *peer, top *topology) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.at == q {
		return true
	}
	guest := c.guestAt(q, top)
	if c.left || guest && !q.guests.Try() {
		return false
	}
	if !q.permits.Try(c.follower.kind) {
		if guest {
			<-q.guests
		}
		return false
	}
	q.load.out.Add(1)
	c.quit()
	c.at, c.guest = q, guest
	return true
}

// where is the peer at which the call has its permit, nil if it has none.
func (c *call) where() *peer {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.at
}

// quit gives back what the call has at its peer. The caller holds mu.
func (c *call) quit() {
	if c.at != nil {
		depart(c.at, c.follower.kind, c.guest)
		c.at, c.guest = nil, false
	}
}

// letGo gives back what the call has, which goes on.
func (c *call) letGo() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.quit()
}

func depart(q *peer, k quota.Pool, guest bool) {
	q.permits.Release(k)
	q.load.out.Add(-1)
	if guest {
		<-q.guests
	}
}

// handOver leaves what the call has to the connection that it gets.
func (c *call) handOver(w *wire) {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := outCall + outPermit + outOnce
	if c.guest {
		out += outGuest
	}
	w.out.Add(out)
	c.at, c.guest = nil, false
}

// leave ends the call.
func (c *call) leave() {
	c.mu.Lock()
	c.left = true
	c.quit()
	c.mu.Unlock()
	c.end()
}
