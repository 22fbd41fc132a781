package multipool

import "strings"

// Who is the primary: decided from what the servers say of themselves. All of it is pure.

// elect decides who is the primary. A claimant below the cluster's highest timeline is one that was replaced, or has not
// told its timeline yet: it is fenced. Among the rest the highest wins, and between equals the incumbent stays. A first
// claimant waits until all peers have been heard, and a later one until all that answer have been looked at again, so that
// the order of the answers decides nothing. A primary that is down stays the incumbent until another is elected.
func (t *topology) elect() {
	t.remember()
	t.ratchet()
	t.split, t.heir = false, nil
	t.relocate()
	incumbent := t.member(t.primary)
	best, rivals := t.bestClaimant()
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
	case t.unheard(best):
		t.heir = best.peer
	default:
		t.primary = best.peer
	}
	if left && t.primary == incumbent.peer {
		t.primary, t.office = nil, server{}
	}
	t.recognise()
	t.rivals = nil
	for i := range t.members {
		m := &t.members[i]
		told := m.timeline != 0 || t.timeline == 0
		if t.settled && m.claims() && m.alias == nil && m.peer != t.primary && m.peer != t.heir && told {
			t.rivals = append(t.rivals, m.peer)
		}
	}
}

// relocate moves the office to another name of the server that has it, where that stands for the server, or where its own
// name leads elsewhere now, or nowhere.
func (t *topology) relocate() {
	incumbent := t.member(t.primary)
	if incumbent == nil {
		return
	}
	to := incumbent.alias
	if to == nil && !(incumbent.claims() && incumbent.server == t.office) {
		for i := range t.members {
			if m := &t.members[i]; m.claims() && m.alias == nil && m.server.is(t.office) {
				to = m.peer
			}
		}
	}
	if to == nil {
		return
	}
	if contains(t.writes, t.primary) {
		t.writes = []*peer{to}
	}
	t.primary = to
}

// accepts reports whether the primary takes writes. One that has lost them, as it was down or disputed, is given them again
// when everybody who answers has been looked at since.
func (t *topology) accepts(primary *member) bool {
	switch {
	case primary == nil || !primary.claims() || primary.drained || t.split:
		return false
	case contains(t.writes, t.primary) || !t.unheard(primary): // the writes are still those of the topology before
		return true
	}
	t.heir = t.primary
	return false
}

// unheard reports whether somebody who answers has not been looked at since a member has claimed to be the primary.
func (t *topology) unheard(claimant *member) bool {
	if t.over >= claimant.claimed {
		return false
	}
	for i := range t.members {
		m := &t.members[i]
		if m.stands() && m != claimant && m.alias != claimant.peer && m.looked < claimant.claimed {
			return true
		}
	}
	return false
}

// waitsSince is since when somebody claims to be the primary and waits for looks; 0 if nobody does.
func (t *topology) waitsSince() instant {
	if m := t.member(t.heir); m != nil {
		return m.claimed
	}
	return 0
}

// bestClaimant returns the claimant of the highest timeline: the incumbent where several have it, else one that is known
// for the cluster's. rivals says that several have it which are as credible, and none of them is the incumbent.
func (t *topology) bestClaimant() (best *member, rivals bool) {
	for i := range t.members {
		m := &t.members[i]
		if !m.claims() || m.alias != nil || m.timeline < t.timeline || t.disputes(m) {
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
// that is known for the cluster's than one that is not.
func (t *topology) outranks(a, b *member) bool {
	if b.peer == t.primary {
		return false
	}
	return a.peer == t.primary || a.ours && !b.ours
}

// disputes reports whether a member claims the incumbent's own timeline and was seen to do so beside it: the incumbent was
// looked at since, and claimed on. No promotion leads there.
func (t *topology) disputes(m *member) bool {
	p := t.member(t.primary)
	return p != nil && p != m && m.claims() && p.role == RolePrimary && p.timeline == m.timeline && m.timeline != 0 && p.looked >= m.claimed
}

// contested reports whether somebody disputes the timeline of a primary that is out of sight.
func (t *topology) contested() bool {
	for i := range t.members {
		if m := &t.members[i]; m.alias == nil && t.disputes(m) && m.timeline == t.timeline {
			return true
		}
	}
	return false
}

// trusts reports whether a claimant of a higher timeline than the incumbent's is known for one of this cluster: it was
// seen in it, or a replica that was now follows it.
func (t *topology) trusts(claimant *member) bool {
	if claimant.ours {
		return true
	}
	for i := range t.members {
		if m := &t.members[i]; m.role == RoleReplica && m.ours && m.stands() && m.word() == claimant.timeline {
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
	if primary.claims() {
		t.office = primary.server
	}
	t.reigns(primary)
	for i := range t.members {
		m := &t.members[i]
		if m.alias != primary.peer && primary.claims() && t.disputes(m) {
			m.ours = false // whose log it goes on with is not known any more
		}
		replica := m.role == RoleReplica && m.word() <= primary.timeline
		if m == primary || (replica && !m.foreign) || (!t.elected && m.health == HealthUnknown) {
			m.ours = true
		}
	}
	t.elected, primary.held = true, true
	t.remember() // of those who belong to it now
}

// outlook says who takes the writes, or is to.
func (t *topology) outlook() string {
	var names []string
	for _, p := range t.rivals {
		names = append(names, p.name)
	}
	switch {
	case len(t.writes) > 0:
		return "writes go to " + t.writes[0].name
	case t.heir != nil:
		return "writes go to " + t.heir.name + " as soon as every peer that answers has been looked at"
	case len(names) > 0:
		return "writes are held, while " + strings.Join(names, ", ") + " claims to be the primary"
	}
	return "writes are held, and nobody claims to be the primary"
}

// replaced reports whether an earlier primary has been replaced by a newer timeline, or has turned out to be another
// cluster's, while it still takes itself for the primary: what is written there is lost.
func (t *topology) replaced(earlier *peer) bool {
	m := t.member(earlier)
	if t.mode != ModeReplicated || m == nil || m.role != RolePrimary || earlier == t.primary || m.alias != nil {
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
