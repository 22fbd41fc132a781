package multipool

import (
	"context"
	"time"

	"github.com/pgmultipool/multipool/internal/quota"
)

// The waiting for a call's permit and for a connection's slot; quota has what is counted. peer.acquire, the pools that
// follow and the making of connections call it.

// awaitPermit waits for a permit of a call of the given pool, for as long as the peer is up and keeps, if it is set, says
// that the pool still wants this peer. Otherwise the error is errPeerDown. keeps is nil for the peer's own pool.
func (p *peer) awaitPermit(ctx context.Context, k quota.Pool, keeps func(*topology) bool) error {
	called := p.permits.Acquire(k)
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
	p.permits.Withdraw(k, called)
	return err
}

// awaitSlot takes a slot for a connection of the given pool, an idle connection's if necessary. A connection that is made
// without a permit may have to wait: for one that the program took without a permit (AcquireAllIdle, PeerPool), that is
// being cleaned up, or that is made for a call that has gone.
func (p *peer) awaitSlot(ctx context.Context, k quota.Pool) error {
	waits := false
	defer func() {
		if waits {
			p.slots.Wait(-1)
		}
	}()
	for {
		freed := p.slots.Take(k, p.shared.Load())
		if freed == nil {
			return nil
		}
		if p.sockets.evict(k) {
			continue
		}
		if !waits {
			waits = true
			p.slots.Wait(1)
		}
		again := time.NewTimer(evictAgain)
		select {
		case <-freed:
		case <-again.C: // a connection may have become idle without having been released
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
