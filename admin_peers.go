package multipool

import (
	"context"
	"errors"
	"fmt"
)

// The peers of a pool may change while it lives: by the program, or by what is discovered.

const (
	maxPeers   = 1024
	maxTallies = 4 * maxPeers
)

// AddPeer adds a peer to the pool. The pool checks it at once, and gives it a small share of the calls at first. In
// [ModeOrdered] it is the last of the list. In a pool with Options.Discover the peer stays until a list leaves it out.
//
// The error names the peer if the pool already has its name, if its configuration is wrong, or if the pool would have
// more than 1,024 peers. AddPeer returns an error if the pool was opened with one host and without Options.Discover,
// and [ErrClosedPool] if it is closed. AddPeer is safe for concurrent use.
func (p *MultiPool) AddPeer(peer Peer) error {
	if p.solo {
		return errSolo
	}
	c, err := p.config.peerFrom(peer, peer.called("to be added"))
	if err != nil {
		return err
	}
	p.changing.Lock()
	defer p.changing.Unlock()
	return p.join(c)
}

// join is AddPeer with a template, under changing.
func (p *MultiPool) join(c peerConfig) error {
	all := p.peers()
	switch {
	case p.closed.Load():
		return ErrClosedPool
	case p.named(c.Name) != nil:
		return fmt.Errorf("multipool: peer %s is given twice", c.Name)
	case len(all) >= maxPeers:
		return fmt.Errorf("multipool: peer %s is one too many: a pool has at most %d", c.Name, maxPeers)
	}
	q, err := p.makePeer(c)
	if err != nil {
		return err
	}
	q.load.easeIn()
	p.observe(observation{peer: q, role: c.Role, joins: true})
	if p.followers.inUse() {
		q.shared.Store(true)
	}
	p.reroute()
	p.attend(q)
	return nil
}

// RemovePeer removes a peer from the pool. The peer gets no new calls. RemovePeer waits until the calls on the peer
// have ended and the program has released its connections, and then closes them. If ctx ends earlier, RemovePeer
// returns the context's error, and the rest is done in the background.
//
// The error for the primary, while it answers, matches [ErrIsPrimary]. The error for a name that the pool does not have
// matches [ErrUnknownName]. Removing the last peer is an error, and so is removing one from a pool that was opened with
// one host and without Options.Discover. On a closed pool the error is [ErrClosedPool]. RemovePeer is safe for
// concurrent use.
func (p *MultiPool) RemovePeer(ctx context.Context, name string) error {
	if p.solo {
		return errSolo
	}
	p.changing.Lock()
	q := p.named(name)
	var err error
	top := p.topology.Load()
	switch {
	case p.closed.Load():
		err = ErrClosedPool
	case q == nil:
		err = unknownName("peer", name, p.names())
	case len(top.peers) == 1:
		err = fmt.Errorf("multipool: peer %s is the last", name)
	case p.config.Mode == ModeReplicated && q == top.primary && top.member(q).claims():
		err = fmt.Errorf("%w: %s", ErrIsPrimary, name)
	default:
		p.part(q, name)
	}
	p.changing.Unlock()
	if err != nil {
		return err
	}
	select {
	case <-q.retired:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Forget makes the pool forget the timeline that a peer has shown. It is for the operator who knows that no server is
// on that timeline any more, when the pool holds writes because of it and cannot find that out: a mistaken promotion
// was taken back, or a server was lost for good or restored from a snapshot. docs/failures.md says when the pool finds
// out without help.
//
// Forget drops the newest timeline that the peer has shown. If no other peer has shown it, the fact that a primary was
// on it is dropped too. If the peer does not answer, its role, its system identifier and its place as the primary are
// dropped as well. What the peer shows later counts as never seen before.
//
// By calling Forget the operator declares that no server has the timeline any more, or that what was written on it is
// given up: a primary on an older timeline may then get writes. Forget returns an error while the peer answers and
// still shows the timeline; stop or rebuild the server first. That error names the peer that takes the writes now. The
// [PrimaryEvent] of a Forget that succeeded, which has Forgot set, names the next one.
//
// The peer may be one that discovery has removed. The error for a name that the pool has never seen matches
// [ErrUnknownName]. On a closed pool the error is [ErrClosedPool]. A pool of one peer returns an error, and so does one
// whose mode is not [ModeReplicated]. Forget is safe for concurrent use.
func (p *MultiPool) Forget(name string) error {
	p.changing.Lock()
	defer p.changing.Unlock()
	top := p.topology.Load()
	switch {
	case p.solo:
		return errSolo
	case p.closed.Load():
		return ErrClosedPool
	case p.config.Mode != ModeReplicated:
		return errors.New("multipool: there is nothing to forget except under ModeReplicated")
	case !top.knows(name):
		return unknownName("peer", name, p.names())
	case top.bears(name):
		return fmt.Errorf("multipool: peer %s answers, and shows timeline %d still: %s", name, top.named(name).word(), top.outlook())
	}
	p.observe(observation{forgets: name})
	return nil
}

// part takes a peer out of the topology and has it closed in the background, under changing. forgets is its name where what
// it has shown goes with it: the operator says so, but what is not found any more may live on.
func (p *MultiPool) part(q *peer, forgets string) {
	p.observe(observation{peer: q, leaves: true, forgets: forgets})
	p.reroute()
	leave := q.leave
	p.monitors.Go(func() {
		defer close(q.retired)
		_ = q.emptied(p.lifetime, true) // or the pool closes, and waits for what the program holds as it does elsewhere
		if leave != nil {
			leave()
			<-q.unattended
		}
		q.sockets.cut(connIdle, true) // also of the pools that follow
		q.close(func() {})
	})
}

// reroute makes the routes that are resolved already be resolved again.
func (p *MultiPool) reroute() {
	p.version.Add(1)
	p.route.Store(p.resolveRoute(p.config.Route))
}

// named returns the peer of a name, or nil.
func (p *MultiPool) named(name string) *peer {
	for _, q := range p.peers() {
		if q.name == name {
			return q
		}
	}
	return nil
}

// tallyOf returns the counters of a name: those of the peer that had it before, if any. It is called by who makes a peer,
// under changing or before the pool is shared.
func (p *MultiPool) tallyOf(name string) *counters {
	if c, ok := p.tallies.Load(name); ok {
		return c.(*counters)
	}
	c := new(counters)
	if p.tallied++; p.tallied > maxTallies {
		p.tallied = 1
		p.tallies.Range(func(name, _ any) bool {
			if p.named(name.(string)) == nil {
				p.tallies.Delete(name)
			} else {
				p.tallied++
			}
			return true
		})
	}
	p.tallies.Store(name, c)
	return c
}

// knew reports whether the pool has, or had, a peer of the name.
func (p *MultiPool) knew(name string) bool {
	_, ok := p.tallies.Load(name)
	return ok
}
