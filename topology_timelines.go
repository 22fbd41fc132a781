package multipool

import "slices"

// Which timelines servers of the cluster have shown. A promotion raises the timeline (PostgreSQL documentation, 26.3.5
// "Timelines"), so whoever claims to be the primary of an older one was replaced, by somebody who may not be in sight. What
// was shown is remembered until there is evidence that nobody has it any more. All of it is pure.

// instant is a time of the pool's clock, in nanoseconds.
type instant int64

// mark is the highest timeline that was shown at a name, and has not been dropped. A name that leads to another address
// now has a second one, of all where it led before.
type mark struct {
	name     string
	at       string // where the name led
	away     bool   // it leads elsewhere now
	system   uint64 // of whom it was shown; 0 if it did not tell
	by       server
	timeline uint32
	reigned  bool    // it was the primary's
	back     instant // when the server there was first seen to be back on a lower one; 0 if it was not
}

// word is the highest timeline of which a server's last word has a trace.
func (m *member) word() uint32 { return max(m.timeline, m.shown) }

// marks is the mark of what a member shows now.
func (m *member) marks(reigned bool) mark {
	return mark{name: m.peer.name, at: m.at, system: m.system, by: m.server, timeline: m.word(), reigned: reigned}
}

// tells reports whether a server is known to have no timeline higher than its word: it writes it, or receives it. One
// behind a proxy is not, since another may have answered.
func (m *member) tells() bool { return m.timeline != 0 && m.answers() && !m.peer.proxy && !m.foreign }

// remember takes what the cluster's servers show into the marks. A claimant may have gone before anybody was elected:
// whoever is left is no better for that. One that was never seen in the cluster does not raise its timeline, but may have it.
func (t *topology) remember() {
	t.marks = slices.Clone(t.marks)
	for i := range t.members {
		m := &t.members[i]
		t.leaves(m)
		counts := m.system == t.system && (m.ours || !t.elected || m.word() <= t.timeline)
		switch k := t.markOf(m.peer.name); {
		case k == nil && counts && m.word() != 0:
			t.marks = append(t.marks, m.marks(false))
		case k == nil:
		case counts && m.word() >= k.timeline:
			*k = m.marks(k.reigned && m.word() == k.timeline)
		case k.back == 0 && t.isBack(k, m):
			k.back = t.now
			t.event = max(t.event, t.now)
		}
	}
}

// ratchet drops the marks that have become void, and sets the cluster's timeline to the highest that is left.
func (t *topology) ratchet() {
	for {
		void := slices.IndexFunc(t.marks, t.isVoid)
		if void < 0 {
			break
		}
		k := t.marks[void]
		t.marks = slices.Delete(t.marks, void, void+1)
		if m := t.named(k.name); m != nil && !k.away && m.word() != 0 && m.system == t.system {
			t.marks = append(t.marks, m.marks(false))
		}
	}
	t.timeline = 0
	for _, k := range t.marks {
		if k.system == t.system || k.reigned {
			t.timeline = max(t.timeline, k.timeline)
		}
	}
}

// leaves sets a member's mark aside where its name leads to another address now.
func (t *topology) leaves(m *member) {
	k := t.markOf(m.peer.name)
	switch {
	case k == nil || m.at == "" || k.at == m.at:
		return
	case m.server.is(k.by):
		k.at = m.at // another way to the same server
		return
	}
	k.away = true
	of := func(k mark) bool { return k.away && k.name == m.peer.name }
	first := slices.IndexFunc(t.marks, of)
	for i := first + 1; i < len(t.marks); i++ {
		if b, k := &t.marks[first], t.marks[i]; of(k) {
			if b.by != k.by {
				b.by = server{} // there are two, so that seeing one of them is not enough
			}
			b.timeline, b.reigned = max(b.timeline, k.timeline), b.reigned || k.reigned
			t.marks = slices.Delete(t.marks, i, i+1)
			i--
		}
	}
}

// isBack reports whether the server that has shown a mark is back on a lower timeline: at the same address, of the same
// cluster, started since.
func (t *topology) isBack(k *mark, m *member) bool {
	return m.tells() && m.at == k.at && k.by.started != 0 && m.server.system == k.by.system && m.server.started > k.by.started
}

// isVoid reports whether nobody has a mark's timeline any more: its server is back on a lower one, and every other has
// been asked since, and tells a lower one, too. Where the server itself is seen by another name its mark stands there.
func (t *topology) isVoid(k mark) bool {
	own := t.named(k.name)
	if k.away || own == nil || !own.server.is(k.by) {
		for _, other := range t.marks {
			m := t.named(other.name)
			if !other.away && m != nil && m.server.is(k.by) && other.by.is(k.by) && other.timeline >= k.timeline && (k.away || other.name != k.name) {
				return true
			}
		}
	}
	if k.back == 0 || k.away || own == nil {
		return false
	}
	for i := range t.members {
		m := &t.members[i]
		since := m.looked >= k.back
		if m.peer.name == k.name {
			since = t.isBack(&k, m)
		}
		if !since || !m.tells() || m.word() >= k.timeline {
			return false
		}
	}
	return true
}

// markOf returns the mark of where a name leads, nil if it has none.
func (t *topology) markOf(name string) *mark {
	if i := slices.IndexFunc(t.marks, func(k mark) bool { return k.name == name && !k.away }); i >= 0 {
		return &t.marks[i]
	}
	return nil
}

// forget drops what was shown at a name: its mark, and its last word.
func (t *topology) forget(name string) {
	t.marks = slices.DeleteFunc(slices.Clone(t.marks), func(k mark) bool { return k.name == name })
	m := t.named(name)
	if m == nil || m.answers() {
		return
	}
	m.role, m.system, m.server, m.timeline, m.shown, m.fitness, m.ours = RoleUnknown, 0, server{}, 0, 0, fitUnsaid, false
	if t.primary == m.peer {
		t.primary, t.office = nil, server{}
	}
}

// bears reports whether a name shows, and answers, what would have to be forgotten of it.
func (t *topology) bears(name string) bool {
	m, k := t.named(name), t.markOf(name)
	return m != nil && m.answers() && m.system == t.system && (k == nil || m.word() >= k.timeline)
}

// knows reports whether there is a peer of the name, or something that was shown there.
func (t *topology) knows(name string) bool {
	return t.named(name) != nil || slices.ContainsFunc(t.marks, func(k mark) bool { return k.name == name })
}

// named returns the member of a name, nil if there is none.
func (t *topology) named(name string) *member {
	for i := range t.members {
		if t.members[i].peer.name == name {
			return &t.members[i]
		}
	}
	return nil
}

// reigns marks the primary's timeline, whatever it has told of itself.
func (t *topology) reigns(primary *member) {
	if k := t.markOf(primary.peer.name); primary.timeline != 0 && (k == nil || k.timeline <= primary.timeline) {
		t.marks = slices.DeleteFunc(t.marks, func(k mark) bool { return k.name == primary.peer.name && !k.away })
		t.marks = append(t.marks, primary.marks(true))
	}
	t.timeline = max(t.timeline, primary.timeline)
}
