package multipool

// Which server answers at a name, and of which cluster the servers are. All of it is pure.

// server tells one server, from its start to its end, from any other. The zero value is one that does not tell.
type server struct {
	system  uint64
	started int64 // in microseconds: two servers of one cluster do not start in the same one
	copy    int32 // not 0: it was asked, and is another than those that tell the same, as a copy of a running machine is
}

// is reports whether both are one server.
func (s server) is(other server) bool { return s.started != 0 && s == other }

// differs reports whether two answers came from two servers, or from one that was started again in between. What is not told
// does not differ.
func (s server) differs(other server) bool {
	if s.started == 0 || other.started == 0 {
		return false
	}
	return s.started != other.started || s.system != other.system && s.system != 0 && other.system != 0
}

// pair finds the names that lead to one server: one of them stands for it, and the others are its aliases. They are not
// drawn, vote or claim beside it. The one that stands is the primary's, while it answers, else the first that answers; but
// always one that is drained, as that is said of the server.
func (t *topology) pair() {
	first := make(map[server]*member)
	for i := range t.members {
		m := &t.members[i]
		m.alias = nil
		if n := first[m.server]; m.server.started != 0 && (n == nil || t.rank(m) > t.rank(n)) {
			first[m.server] = m
		}
	}
	if len(first) == len(t.members) {
		return
	}
	for i := range t.members {
		if m := &t.members[i]; first[m.server] != nil && first[m.server] != m {
			m.alias = first[m.server].peer
		}
	}
}

// rank orders the names of one server; of equals the first of the configuration stands.
func (t *topology) rank(m *member) (n int) {
	for _, better := range [...]bool{m.drained, m.stands(), m.role == RolePrimary, m.peer == t.primary, !m.peer.spare} {
		n *= 2
		if better {
			n++
		}
	}
	return n
}

// leads reports whether a name leads to the primary: it is its peer's, or another of its server's.
func (t *topology) leads(p *peer) bool {
	m := t.member(p)
	return m != nil && t.primary != nil && (p == t.primary || m.alias == t.primary)
}

// comesFirst reports whether a comes before b in the order of the configuration.
func (t *topology) comesFirst(a, b *member) bool {
	for i := range t.members {
		switch &t.members[i] {
		case a:
			return a != b
		case b:
			return false
		}
	}
	return false
}

// vouched reports whether a server may be taken for one of the cluster: once the cluster's identity is known, or where
// the server does not tell its own.
func (t *topology) vouched(m *member) bool { return t.system != 0 || m.system == 0 }

// identify settles which cluster this is: the one whose system identifier two servers have shown, or most of them when
// all have been heard, the first of the configuration where there are as many of each. It stays for as long as any
// server has it as its last word; one server's alone gives way to two others that agree. Where none has it any more, as
// after an upgrade that made a new cluster of all of them, what was known of the old one is forgotten. The last words of
// servers that have not answered for long do not count against one that answers where the primary was before.
func (t *topology) identify() {
	votes := make(map[uint64]int, 1)
	var most uint64
	words, returned := 0, false
	for i := range t.members {
		m := &t.members[i]
		if m.system == 0 || m.alias != nil {
			continue
		}
		if m.system == t.system {
			words++
		}
		if m.aged {
			continue
		}
		votes[m.system]++
		if votes[m.system] > votes[most] || (votes[m.system] == votes[most] && t.firstOf(m.system, most) == m.system) {
			most = m.system
		}
	}
	for i := range t.members {
		m := &t.members[i]
		returned = returned || m.system == most && m.held && m.answers()
	}
	settles := most != 0 && (t.settled || votes[most] > 1)
	gone := words == 0 || votes[t.system] == 0 && returned
	outvoted := !t.sure && votes[t.system] < 2 && votes[most] > 1
	if settles && most != t.system && (gone || outvoted) {
		if t.system != 0 {
			t.primary, t.office, t.elected = nil, server{}, false
		}
		if !t.elected {
			t.marks = nil
		}
		t.system, t.sure = most, false
	}
	t.sure = t.sure || votes[t.system] > 1
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
