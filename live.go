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

// AddPeer takes a server into the pool. It is looked at at once, and used gently at first. An error names the peer: one
// whose name the pool has, one that is misconfigured, one too many (more than 1,024). A pool that was opened with one
// host and without Options.Discover is a pgxpool, and takes none; a closed one answers [ErrClosedPool]. In a pool
// with Options.Discover it lasts until that leaves it out. Under ModeOrdered it is the last of the list. Safe for
// concurrent use.
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

// RemovePeer takes a server out of the pool: it gets no new work at once, what runs there and what the program holds is
// waited for, and then its connections are closed. Where ctx ends before that, RemovePeer returns its error, and the
// rest is done in the background. For the primary, while it answers, it returns [ErrIsPrimary]; for a name that the
// pool does not have an error that matches [ErrUnknownName]; the last peer cannot be removed, which is an error too.
// Safe for concurrent use.
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

// Forget drops what was seen at a peer's name, where that holds writes and nothing but the operator knows that it is void: a
// mistaken promotion that was taken back, a server that was lost for good, or restored from a snapshot, and that the looks
// cannot see to be so (docs/failures.md says when they do). It drops the newest timeline that was shown there, the reign of
// that timeline if nobody else has shown it, and, where the peer does not answer, its role, its system identifier and its
// office. What it shows afterwards counts as never seen before.
//
// It is the operator's word that no server has that timeline any more, or that what was written on it is given up: a primary
// of an older one may be written to then. It is refused while the peer answers and still shows what would be forgotten:
// then it is to be stopped first, or rebuilt. The error names who takes the writes now, and the event
// (Hooks.PrimaryChanged, PrimaryEvent.Forgot) who does next.
//
// The peer may be one that discovery has removed. A name that was never seen is an error that matches [ErrUnknownName]; a pool
// of one host, and one that is not under ModeReplicated, forgets nothing, which is an error too; a closed one answers
// [ErrClosedPool]. Safe for concurrent use.
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
		q.sockets.cut(useNone, true) // also of the pools that follow
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
