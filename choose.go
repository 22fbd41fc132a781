package multipool

import (
	"math/rand/v2"
	"slices"
)

// candidates returns the list from which a call's peer is drawn.
func (t *topology) candidates(pl place) *roster {
	switch pl {
	case placePrimary:
		return &t.drawn.writes
	case placeReplica:
		return &t.drawn.replicas
	case placeAny:
		return &t.drawn.anyone
	default:
		return &t.drawn.reads
	}
}

// otherwise returns the list to turn to when all candidates have been tried, and the last resort.
func (t *topology) otherwise(pl place) (then, last *roster) {
	switch pl {
	case placePrimary:
		return &nobody, &nobody
	case placeReplica:
		return &nobody, &t.drawn.last
	case placeAny:
		return &t.drawn.last, &t.drawn.writes
	default:
		return &t.drawn.writes, &t.drawn.last
	}
}

var nobody roster

// pick chooses the peer of one attempt, nil if no candidate is left. A call that may write does not get a primary to which
// nobody writes now, whatever its route says.
func (t *topology) pick(in *intent, tried *tried) (*peer, Reason) {
	p, reason := t.pickAny(in, tried)
	if !in.reads && t.withholds(p) {
		return nil, reason
	}
	return p, reason
}

func (t *topology) pickAny(in *intent, tried *tried) (*peer, Reason) {
	if in.place == placeNamed {
		return t.pickNamed(in, tried), in.reason
	}
	if t.refuge != nil && in.plain() && tried.n == 0 && t.refuge.hasToSpare() {
		return t.refuge, ReasonReplicasBehind
	}
	first := t.candidates(in.place)
	if in.peers != nil && in.place == placeReplica {
		first = &t.drawn.well
	}
	if p := t.draw(first, in, tried); p != nil {
		if t.fallback && in.place == placeReads && in.reason == ReasonRead {
			return p, ReasonNoReplica
		}
		return p, in.reason
	}
	then, last := t.otherwise(in.place)
	if p := t.draw(then, in, tried); p != nil {
		switch {
		case in.place == placeAny:
			return p, in.reason
		case in.fresh.bounds() && first.size() > tried.n:
			return p, ReasonReplicasBehind
		}
		return p, ReasonNoReplica
	}
	return t.draw(last, in, tried), in.reason
}

// plain reports a read that may go anywhere: by no route that says where, nor sent elsewhere by a refusal.
func (in *intent) plain() bool {
	return in.reads && in.reason == ReasonRead && (in.place == placeReads || in.place == placeAny)
}

// pickNamed chooses among the peers that a route names: for a read a replica among them, for a write the primary, and
// where the names offer no such peer the other kind.
func (t *topology) pickNamed(in *intent, tried *tried) *peer {
	lists := [...]*roster{&t.drawn.well, &t.drawn.writes, &t.drawn.spare}
	if !in.reads {
		lists = [...]*roster{&t.drawn.writes, &t.drawn.well, &t.drawn.spare}
	}
	if t.forPrimary(in) {
		lists = [...]*roster{&t.drawn.writes, &nobody, &nobody}
	}
	for _, list := range lists {
		if p := t.draw(list, in, tried); p != nil {
			return p
		}
	}
	return nil
}

// forPrimary reports whether a call is for the primary and nobody else: by its place, or because it may write and the
// route names more than replicas. One that is away, drained or not known yet is waited for: a replica would refuse it.
func (t *topology) forPrimary(in *intent) bool {
	switch {
	case in.place == placePrimary:
		return true
	case in.place != placeNamed || in.reads || t.mode != ModeReplicated:
		return false
	case t.primary != nil:
		return contains(in.peers, t.primary)
	}
	for i := range t.members {
		if m := &t.members[i]; m.role != RoleReplica && !m.foreign && contains(in.peers, m.peer) {
			return true
		}
	}
	return false
}

// draw chooses from a roster.
func (t *topology) draw(list *roster, in *intent, tried *tried) *peer {
	if list.rest == nil && t.balancer == nil && !in.fresh.bounds() {
		return twoDraws(list, in.peers, tried)
	}
	return t.drawInTurn(list, in, tried)
}

// drawInTurn chooses from who comes first in a roster, and where nobody of these may take the call, or nobody has a
// connection free, from the rest.
func (t *topology) drawInTurn(list *roster, in *intent, tried *tried) *peer {
	var full *peer
	for ; list != nil; list = list.rest {
		p := t.balance(list, in, tried)
		alone := full == nil && list.rest == nil
		if p != nil && (alone || !p.load.full() || list.hasRoom(in, tried)) {
			return p
		}
		if full == nil {
			full = p
		}
	}
	return full
}

// balance has the balancer choose where there is a choice; where it declines, the default does.
func (t *topology) balance(list *roster, in *intent, tried *tried) *peer {
	if t.balancer != nil && len(list.peers) > 1 {
		c := candidatesOf(list.peers, in, tried)
		if i := t.balancer.Pick(c); i >= 0 && i < len(list.peers) && c.Usable(i) {
			return list.peers[i]
		}
	}
	return in.draw(list, tried)
}

// takes reports whether somebody could take the intent.
func (t *topology) takes(in *intent) bool { return t.pickPlainly(in, &tried{}) != nil }

// pickPlainly is pick without the balancer, which may count its choices.
func (t *topology) pickPlainly(in *intent, tried *tried) *peer {
	plain := *t
	plain.balancer = nil
	p, _ := plain.pick(in, tried)
	return p
}

// draw chooses by default, from who comes first in a roster.
func (in *intent) draw(list *roster, tried *tried) *peer {
	if in.fresh.bounds() && in.reads {
		return freshDraws(list, in.peers, tried, &in.fresh)
	}
	return twoDraws(list, in.peers, tried)
}

// hopeless reports whether waiting for a peer is pointless: each one that could serve the intent refuses us by
// configuration.
func (t *topology) hopeless(in *intent) bool {
	could := 0
	for i := range t.members {
		m := &t.members[i]
		if !t.could(m, in) {
			continue
		}
		if m.health != HealthMisconfigured && !m.foreign {
			return false
		}
		could++
	}
	return could > 0
}

// could reports whether a peer could serve the intent if it were well.
func (t *topology) could(m *member, in *intent) bool {
	if in.peers != nil && !contains(in.peers, m.peer) {
		return false
	}
	wrong := t.forPrimary(in) && m.role == RoleReplica || in.place == placeReplica && m.role == RolePrimary
	return t.mode != ModeReplicated || !wrong
}

// refusing returns the peers that could serve the intent if they did not refuse us by configuration.
func (t *topology) refusing(in *intent) (all []*peer) {
	for i := range t.members {
		if m := &t.members[i]; m.health == HealthMisconfigured && t.could(m, in) {
			all = append(all, m.peer)
		}
	}
	return all
}

// causes says of every peer why it did not take the intent.
func (t *topology) causes(in *intent) []PeerCause {
	out := make([]PeerCause, len(t.members))
	for i := range t.members {
		m := &t.members[i]
		why, err := t.why(m, in)
		out[i] = PeerCause{Peer: m.peer.name, Why: why, Err: err}
	}
	return out
}

// headless reports whether every peer is a replica, and none has ever claimed to be the primary.
func (t *topology) headless() bool {
	return t.mode == ModeReplicated && !t.elected && len(t.members) > 0 &&
		!slices.ContainsFunc(t.members, func(m member) bool { return m.role != RoleReplica })
}

// hasRoom reports whether one of those who come first, and may take the call, has a free connection; of many, one of some
// drawn at random.
func (r *roster) hasRoom(in *intent, tried *tried) bool {
	c := candidatesOf(r.peers, in, tried)
	start := rand.IntN(len(r.peers))
	for k := range min(len(r.peers), maxSpill) {
		if i := (start + k) % len(r.peers); c.Usable(i) && !r.peers[i].load.full() {
			return true
		}
	}
	return false
}
