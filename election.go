package multipool

// Who is the primary, and who belongs to its cluster: decided from what the servers say of themselves. All of it is pure.

// elect decides who is the primary. A promotion raises the timeline (PostgreSQL documentation, 26.3.5 "Timelines"), so
// a claimant below the cluster's highest is one that was replaced, or has not told its timeline yet: it is fenced. Among
// the rest the highest wins, and between equals the incumbent stays. A first claimant waits until all peers have been
// heard, so that the order of the answers decides nothing. A primary that is down stays the incumbent until another is
// elected.
func (t *topology) elect() {
	t.ratchet()
	t.split = false
	best, rivals := t.bestClaimant()
	incumbent := t.member(t.primary)
	// Once the incumbent has left its office, nobody holds it: who claims it is to be trusted against the replicas.
	left := incumbent != nil && (incumbent.role == RoleReplica || incumbent.timeline < t.timeline)
	switch {
	case best == nil:
		t.split = t.contested()
	case best == incumbent:
	case rivals:
		t.split = t.settled
	case t.elected && !t.trusts(best) && (incumbent != nil && incumbent.claims() || t.streams(best)):
		// A higher timeline is what a promotion leaves, and a point-in-time recovery of a copy: while the incumbent
		// answers, one is not told from the other. Writing to neither can cost time, writing to either more.
		t.split = true
	case t.primary == nil && !t.settled:
	default:
		t.primary = best.peer
	}
	if left && t.primary == incumbent.peer {
		t.primary = nil
	}
	t.recognise()
	t.rivals = nil
	for i := range t.members {
		m := &t.members[i]
		told := m.timeline != 0 || t.timeline == 0
		if t.settled && m.claims() && m.peer != t.primary && told {
			t.rivals = append(t.rivals, m.peer)
		}
	}
}

// bestClaimant returns the claimant of the highest timeline: the incumbent where several have it, else one that is known
// for the cluster's. rivals says that several have it which are as credible, and none of them is the incumbent.
func (t *topology) bestClaimant() (best *member, rivals bool) {
	for i := range t.members {
		m := &t.members[i]
		if !m.claims() || m.timeline < t.timeline || m.rival {
			continue
		}
		switch {
		case best == nil || m.timeline > best.timeline, m.timeline == best.timeline && t.outranks(m, best):
			best, rivals = m, false
		case m.timeline == best.timeline && !t.outranks(best, m):
			rivals = true
		}
	}
	return best, rivals
}

// outranks reports whether, of two claimants of one timeline, a is more credible than b: the incumbent than any other, one
// that is known for the cluster's than one that is not, which may be the same server by another name.
func (t *topology) outranks(a, b *member) bool {
	if b.peer == t.primary {
		return false
	}
	return a.peer == t.primary || a.ours && !b.ours
}

// contested reports whether somebody claims the timeline of a primary that is out of sight, and has done so beside it.
func (t *topology) contested() bool {
	for i := range t.members {
		if m := &t.members[i]; m.claims() && m.rival && m.timeline == t.timeline {
			return true
		}
	}
	return false
}

// ratchet sets the cluster's timeline to the highest that was ever elected or that a server of it shows: whoever claims
// to be the primary of an older one was replaced by somebody who may not be in sight. What a server shows is its last
// word: one that was rebuilt shows less, and holds nothing up any more. A claimant may have gone before anybody was
// elected: whoever is left is no better for that.
func (t *topology) ratchet() {
	t.timeline = t.reign
	for i := range t.members {
		m := &t.members[i]
		if m.system != t.system || !(m.ours || !t.elected) {
			continue
		}
		t.timeline = max(t.timeline, m.shown, m.timeline)
	}
}

// trusts reports whether a claimant of a higher timeline than the incumbent's is known for one of this cluster: it was
// seen in it, or a replica that was now follows it.
func (t *topology) trusts(claimant *member) bool {
	if claimant.ours {
		return true
	}
	for i := range t.members {
		if m := &t.members[i]; m.role == RoleReplica && m.ours && m.stands() && max(m.timeline, m.shown) == claimant.timeline {
			return true
		}
	}
	return false
}

// streams reports whether a replica of this cluster still gets a log that is not the claimant's: its primary lives,
// though it does not answer us.
func (t *topology) streams(claimant *member) bool {
	for i := range t.members {
		if m := &t.members[i]; m.role == RoleReplica && m.ours && m.stands() && m.timeline != 0 && m.timeline != claimant.timeline {
			return true
		}
	}
	return false
}

// recognise notes who belongs to the elected primary's cluster. One whose first look is still under way at the first
// election belongs to those among whom it was made.
func (t *topology) recognise() {
	primary := t.member(t.primary)
	if primary == nil || t.split {
		return
	}
	t.reign = max(t.reign, primary.timeline)
	t.timeline = max(t.timeline, t.reign)
	for i := range t.members {
		m := &t.members[i]
		if m != primary && m.claims() && primary.claims() && m.timeline == primary.timeline && m.timeline != 0 {
			m.rival, m.ours = true, false // whose log it goes on with is not known any more
		}
		replica := m.role == RoleReplica && max(m.timeline, m.shown) <= primary.timeline
		if m == primary || (replica && !m.foreign) || (!t.elected && m.health == healthUnknown) {
			m.ours = true
		}
	}
	t.elected = true
}

// replaced reports whether an earlier primary has been replaced by a newer timeline, or has turned out to be another
// cluster's, while it still takes itself for the primary: what is written there is lost.
func (t *topology) replaced(earlier *peer) bool {
	m := t.member(earlier)
	if t.mode != ModeReplicated || m == nil || m.role != RolePrimary || earlier == t.primary {
		return false
	}
	return m.foreign || t.primary != nil || m.timeline < t.timeline
}

// strays reports whether a replica gets the log of a timeline that the primary has left: it looks healthy, and shows a
// history that is not the cluster's.
func (t *topology) strays(m *member) bool {
	if m.fitness == fitAstray {
		return true
	}
	primary := t.member(t.primary)
	return primary != nil && primary.timeline == t.timeline && m.timeline != 0 && m.timeline < t.timeline
}

// vouched reports whether a server may be taken for one of the cluster: once the cluster's identity is known, or where
// the server does not tell its own.
func (t *topology) vouched(m *member) bool { return t.system != 0 || m.system == 0 }

// identify settles which cluster this is: the one whose system identifier two servers have shown, or most of them when
// all have been heard, the first of the configuration where there are as many of each. It stays for as long as any
// server has it as its last word; one server's alone gives way to two others that agree. Where none has it any more, as
// after an upgrade that made a new cluster of all of them, what was known of the old one is forgotten.
func (t *topology) identify() {
	shown := make(map[uint64]int, 1)
	var most uint64
	for i := range t.members {
		if id := t.members[i].system; id != 0 {
			shown[id]++
			if shown[id] > shown[most] || (shown[id] == shown[most] && t.firstOf(id, most) == id) {
				most = id
			}
		}
	}
	settles := most != 0 && (t.settled || shown[most] > 1)
	gone := shown[t.system] == 0
	outvoted := !t.sure && shown[t.system] < 2 && shown[most] > 1
	if settles && most != t.system && (gone || outvoted) {
		if t.system != 0 {
			t.primary, t.reign, t.elected = nil, 0, false
		}
		t.system, t.sure = most, false
	}
	t.sure = t.sure || shown[t.system] > 1
	for i := range t.members {
		m := &t.members[i]
		m.foreign = t.system != 0 && m.system != 0 && m.system != t.system
	}
}

// firstOf returns which of two identifiers comes first in the order of the configuration.
func (t *topology) firstOf(a, b uint64) uint64 {
	for i := range t.members {
		if id := t.members[i].system; id == a || id == b {
			return id
		}
	}
	return a
}
