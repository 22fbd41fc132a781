package multipool

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// Drain takes a peer out of use for maintenance. The peer gets no new calls. Drain waits until the calls on the peer
// have ended and the program has released its connections, and then closes the idle connections, including the
// monitor's, so that even a smart shutdown of the server succeeds. The peer stays drained until [MultiPool.Resume],
// whatever happens to the server. Its health checks continue.
//
// If ctx ends before Drain is done, Drain returns the context's error, and the peer stays drained. If
// [MultiPool.Resume] is called meanwhile, Drain returns an error. In [ModeReplicated] the error for the primary is
// [ErrIsPrimary]; use [MultiPool.DrainPrimary]. The error for a name that the pool does not have matches
// [ErrUnknownName]. Draining a pool of one peer is an error. Drain is safe for concurrent use.
func (p *MultiPool) Drain(ctx context.Context, name string) error {
	q, err := p.drainable(name)
	if err != nil {
		return err
	}
	if p.config.Mode == ModeReplicated && p.topology.Load().leads(q) {
		return fmt.Errorf("%w: %s", ErrIsPrimary, name)
	}
	return p.drain(ctx, q)
}

// DrainPrimary takes the primary out of use before a switchover, and returns its name. New writes wait, for up to
// Options.Wait each. DrainPrimary waits until the calls on the primary have ended, and closes its idle connections.
// Writes continue when another peer is promoted, or after [MultiPool.Resume] of this one. In [ModeOrdered] DrainPrimary
// drains the peer that takes all calls, and the next peer takes them over.
//
// If ctx ends first, DrainPrimary returns the name with the context's error, and the peer stays drained. If there is no
// primary, as in [ModeEquivalent], DrainPrimary returns "" and [ErrNoPrimary]. In all else it behaves as
// [MultiPool.Drain] does.
func (p *MultiPool) DrainPrimary(ctx context.Context) (name string, err error) {
	q := p.topology.Load().primary
	switch {
	case p.solo:
		return "", errSolo
	case q == nil:
		return "", ErrNoPrimary
	}
	return q.name, p.drain(ctx, q)
}

// Resume puts a drained peer back into use. The peer gets a small share of the calls at first, like one that was down.
// A Drain that still waits returns an error. The next health check of pgxpool restores MinConns. Resume does nothing to
// a peer that is not drained. The error for a name that the pool does not have matches [ErrUnknownName].
func (p *MultiPool) Resume(name string) error {
	q, err := p.drainable(name)
	if err != nil {
		return err
	}
	q.setDrained(false)
	q.monitor.nudge()
	return nil
}

func (p *MultiPool) drainable(name string) (*peer, error) {
	if p.solo {
		return nil, errSolo
	}
	if q := p.named(name); q != nil {
		return q, nil
	}
	return nil, unknownName("peer", name, p.names())
}

func (p *MultiPool) drain(ctx context.Context, q *peer) error {
	q.setDrained(true)
	q.monitor.nudge() // it hangs up
	if err := q.emptied(ctx, false); err != nil {
		return err
	}
	if !q.shutOut() {
		return errResumed
	}
	return q.emptied(ctx, false) // one that chose the peer before may have taken the last idle connection
}

var errResumed = errors.New("multipool: the peer was resumed while it was being drained")

// setDrained puts a peer out of use, or back into it. verdicts orders it with what opens and closes the peer otherwise.
func (p *peer) setDrained(drained bool) {
	p.verdicts.Lock()
	defer p.verdicts.Unlock()
	was := p.drained.Swap(drained)
	if was && !drained && p.breaker.closed() {
		p.sockets.open()
		p.load.easeIn()
	}
	say := no
	if drained {
		say = yes
	}
	p.owner.observe(observation{peer: p, drained: say})
}

// shutOut closes what is idle of a drained peer and lets nothing new be made, as pgxpool would to keep MinConns; it reports
// whether the peer is drained still.
func (p *peer) shutOut() bool {
	p.verdicts.Lock()
	defer p.verdicts.Unlock()
	if !p.drained.Load() {
		return false
	}
	p.sockets.cut(connIdle, true)
	return true
}

// drainTick is how often a draining peer is asked whether it is free: it has been counted already, and nobody hurries.
const drainTick = 5 * time.Millisecond

// emptied waits until no call has or wants a connection of the peer, and the program holds none. Where the peer is not
// leaving for good it may be resumed meanwhile, and then perhaps is never free: errResumed.
func (p *peer) emptied(ctx context.Context, leaving bool) error {
	tick := time.NewTicker(drainTick)
	defer tick.Stop()
	for p.load.busy() > 0 || p.pool.Stat().AcquiredConns() > 0 || p.sockets.used() {
		if !leaving && !p.drained.Load() {
			return errResumed
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}
