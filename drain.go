package multipool

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// Drain takes a peer out of use for maintenance: it gets no new work, what runs there and what the program holds is waited
// for, and then its idle connections are closed, the monitor's too, so that even a smart shutdown of the server goes
// through. It stays drained, whatever becomes of the server, until [MultiPool.Resume]; its monitor goes on looking.
//
// Under ModeReplicated the peer must be a replica: for the primary it returns [ErrIsPrimary]; see
// [MultiPool.DrainPrimary]. A name that the pool does not have is an error that matches [ErrUnknownName]. Where ctx
// ends before the peer is free, Drain returns its error, and the peer stays drained. A pool of one peer cannot be
// drained, nor resumed: that is an error. Safe for concurrent use.
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

// DrainPrimary takes the primary out of use before a switchover: new writes are held, up to Options.Wait each, what runs
// there is waited for, and then its idle connections are closed. Writes go on when another peer is promoted, or after
// [MultiPool.Resume] of this one, whose name DrainPrimary returns: beside an error, too, that leaves the peer drained.
// Where there is no primary, as under ModeEquivalent, it returns "" and [ErrNoPrimary]; for the rest it is as
// [MultiPool.Drain]. Under ModeOrdered it drains the peer that takes everything, and the next takes over.
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

// Resume puts a drained peer back into use, gently as one that has been down; a Drain that still waits ends with an error.
// MinConns is filled again by pgxpool's next health check. It does nothing to a peer that is not drained.
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
	p.sockets.cut(useNone, true)
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
