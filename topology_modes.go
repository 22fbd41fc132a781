package multipool

import "slices"

// Mode says how the peers of a pool are related to each other.
type Mode uint8

const (
	// ModeReplicated, the zero value, is for one primary and its replicas. The pool finds out the roles. Reads go to
	// replicas, writes to the primary.
	ModeReplicated Mode = iota
	// ModeEquivalent is for peers that all take reads and writes: the servers of a multi-primary cluster, or poolers or
	// SQL proxies in front of one, each with Peer.Proxy. Every call goes to a random healthy peer. The pool elects no
	// primary, fences no peer and measures no lag. A server that says it is a standby gets no writes.
	ModeEquivalent
	// ModeOrdered sends every call to the first healthy peer in the order of the configuration, whatever its role. A
	// write that a standby refuses fails with the server's error. An earlier peer gets the calls back after it has been
	// healthy for Options.ReturnAfter. Peers that are added or discovered come last, in the order in which they were
	// added.
	ModeOrdered
)

var modeNames = [...]string{"replicated", "equivalent", "ordered"}

// String returns the name that the connection string key multipool_mode takes.
func (m Mode) String() string { return nameOf(modeNames[:], m, "mode") }

// MarshalText returns the text that String returns, or an error if the value is not one of the constants.
func (m Mode) MarshalText() ([]byte, error) { return marshalName(modeNames[:], m, "mode") }

// UnmarshalText is the inverse of MarshalText. Its error for an unknown text lists the known ones.
func (m *Mode) UnmarshalText(text []byte) error { return unmarshalName(modeNames[:], m, "mode", text) }

// What every mode puts into the lists: modes are data, and whoever chooses does not know them.

// listReplicated: reads to the replicas, writes to the primary.
func (t *topology) listReplicated() {
	t.pair()
	t.identify()
	t.elect()

	well, suspect := t.standing()
	primary := t.member(t.primary)
	if t.accepts(primary) {
		t.writes = []*peer{t.primary}
	} else {
		t.writes = nil
	}
	well, spare := spared(well)
	healthy := quick(truthful(well))
	t.well, t.spare = peersOf(well), append(peersOf(spare), t.aliases(well)...)
	t.replicas, t.last = healthy, quick(truthful(spare))
	reader := primary != nil && primary.takes() && (!t.primary.spare || len(healthy)+len(spare) == 0)
	t.anyone = healthy
	if reader {
		t.anyone = append(healthy[:len(healthy):len(healthy)], t.primary)
	}
	t.refuge = nil
	if reader && !t.primary.spare && len(healthy) > 0 && !anyFollows(well) {
		t.refuge = t.primary
	}
	t.reads, t.fallback = healthy, false
	if len(healthy) == 0 {
		t.resort(reader, suspect)
	}
}

// aliases returns the other names of the replicas that are well, and of the primary: for calls that name them.
func (t *topology) aliases(well []*member) (aliases []*peer) {
	for i := range t.members {
		m := &t.members[i]
		stands := func(w *member) bool { return w.peer == m.alias }
		if m.alias != nil && m.takes() && (slices.ContainsFunc(well, stands) || contains(t.writes, m.alias)) {
			aliases = append(aliases, m.peer)
		}
	}
	return aliases
}

// resort fills in who is read where no replica is well: the primary, if it is well, then those that serve only where
// nobody else can, then suspects.
func (t *topology) resort(primary bool, suspect []*peer) {
	t.replicas = t.last
	if len(t.last) == 0 {
		t.replicas, t.well = suspect, suspect
	}
	if len(t.anyone) == 0 {
		t.anyone = t.last
	}
	if len(t.anyone) == 0 {
		t.anyone = append(suspect[:len(suspect):len(suspect)], t.writes...)
	}
	switch {
	case primary:
		t.reads, t.fallback = []*peer{t.primary}, true
	case len(t.last) > 0:
		t.reads = t.last
	case len(suspect) > 0:
		t.reads = suspect
	case len(t.writes) > 0:
		t.reads, t.fallback = t.writes, true
	}
}

// spared parts those that take their share from those that serve only where nobody else can.
func spared(members []*member) (well, spare []*member) {
	for _, m := range members {
		if m.peer.spare {
			spare = append(spare, m)
		} else {
			well = append(well, m)
		}
	}
	return well, spare
}

// listEquivalent: everything to everybody who is well, to spares where nobody is, or to suspects.
func (t *topology) listEquivalent() {
	var well, suspect []*member
	for i := range t.members {
		switch m := &t.members[i]; {
		case m.drained:
		case m.health == HealthUp:
			well = append(well, m)
		case m.health == HealthSuspect:
			suspect = append(suspect, m)
		}
	}
	well, spare := spared(well)
	t.well, t.spare = peersOf(well), peersOf(spare)
	t.reads, t.last = quick(well), quick(spare)
	if len(well) == 0 {
		t.reads = t.last
		if len(spare) == 0 {
			t.reads = peersOf(suspect)
			t.well = t.reads
		}
	}
	t.replicas, t.anyone = t.reads, t.reads
	t.writes = quick(writers(well))
	if len(t.writes) == 0 {
		t.writes = quick(writers(spare))
	}
	if len(well)+len(spare) == 0 {
		t.writes = peersOf(writers(suspect))
	}
}

// writers leaves out those that say they are standbys.
func writers(members []*member) (writers []*member) {
	for _, m := range members {
		if m.role != RoleReplica {
			writers = append(writers, m)
		}
	}
	return writers
}

// listOrdered: everything to the leader.
func (t *topology) listOrdered() {
	t.lead()
	var leader []*peer
	if m := t.member(t.primary); m != nil && m.stands() && !m.drained {
		leader = []*peer{t.primary}
	}
	t.reads, t.writes, t.replicas, t.anyone = leader, leader, leader, leader
	var takers []*member
	for i := range t.members {
		if m := &t.members[i]; m.takes() {
			takers = append(takers, m)
		}
	}
	well, spare := spared(takers)
	t.well, t.spare = peersOf(well), peersOf(spare)
}

// lead chooses the leader: the first peer that is well. Who leads stays until it falls, or until the first that is well
// has been so for a while; not for one in between, so that there is one move back and not several. The first choice
// waits for the answers of those that come earlier.
func (t *topology) lead() {
	var first, unheard *member
	for i := range t.members {
		m := &t.members[i]
		switch {
		case m.takes() && (first == nil || t.before(m, first)):
			first = m
		case m.health == HealthUnknown && (unheard == nil || t.before(m, unheard)):
			unheard = m
		}
	}
	if unheard != nil && !t.settled && (first == nil || t.before(unheard, first)) {
		return
	}
	leader := t.member(t.primary)
	stands := leader != nil && leader.stands() && !leader.drained
	if first != nil && (!stands || first.steady && t.before(first, leader)) {
		t.primary = first.peer
	}
}

// before reports whether a comes earlier than b: spares last, those of the pool's own zone before others, and for the
// rest in the order of the configuration.
func (t *topology) before(a, b *member) bool {
	switch {
	case a.peer.spare != b.peer.spare:
		return b.peer.spare
	case a.peer.away != b.peer.away:
		return b.peer.away
	}
	return t.comesFirst(a, b)
}

// peerNeed is how much a peer is needed that is out.
type peerNeed uint8

const (
	needNone    peerNeed = iota // others serve what it could
	needSpared                  // the primary serves the reads that it could
	needLacked                  // nobody serves what it could
	needAwaited                 // calls wait for it
)

// needs reports how much a peer is needed that is out. A standby may be promoted any moment while there is no primary.
func (t *topology) needs(p *peer) peerNeed {
	m := t.member(p)
	if m == nil || m.foreign || m.drained {
		return needNone
	}
	reads, writes := !t.served(t.reads, p), m.role != RoleReplica && !t.served(t.writes, p)
	if t.mode == ModeReplicated && m.role == RoleReplica {
		writes = t.elected && len(t.writes) == 0
	}
	switch {
	case reads || writes:
		return needLacked
	case t.mode == ModeReplicated && m.role != RolePrimary && (t.fallback || t.refuge != nil):
		return needSpared
	}
	return needNone
}

// served reports whether another peer than p that is well takes the calls of a list.
func (t *topology) served(list []*peer, p *peer) bool {
	for _, q := range list {
		if m := t.member(q); q != p && m.health == HealthUp {
			return true
		}
	}
	return false
}

func peersOf(members []*member) []*peer {
	peers := make([]*peer, len(members))
	for i, m := range members {
		peers[i] = m.peer
	}
	return peers
}

// standing returns the replicas that may serve: those that are well, and those that are suspected.
func (t *topology) standing() (well []*member, suspect []*peer) {
	for i := range t.members {
		m := &t.members[i]
		m.stray = m.role == RoleReplica && t.strays(m)
		if m.role != RoleReplica || m.alias != nil || m.hostile != nil || m.foreign || m.stray || m.drained || !t.vouched(m) {
			continue
		}
		switch m.health {
		case HealthUp:
			well = append(well, m)
		case HealthSuspect:
			suspect = append(suspect, m.peer)
		}
	}
	return well, suspect
}

// truthful leaves out the replicas whose data is not what it should be, unless that leaves nobody: those that are late are
// better than those that follow no more, and old data is better than none.
func truthful(well []*member) []*member {
	for _, worst := range [...]fitness{fitFit, fitBehind} {
		fit := make([]*member, 0, len(well))
		for _, m := range well {
			if m.fitness <= worst {
				fit = append(fit, m)
			}
		}
		if len(fit) > 0 {
			return fit
		}
	}
	return well
}

// anyFollows reports whether any of the replicas gets and replays what its primary writes, be it late.
func anyFollows(replicas []*member) bool {
	for _, m := range replicas {
		if m.fitness <= fitBehind {
			return true
		}
	}
	return false
}

// quick leaves the slow out: of N healthy replicas never more than half, never the last.
func quick(healthy []*member) []*peer {
	out := len(healthy) / 2
	list := make([]*peer, 0, len(healthy))
	for _, m := range healthy {
		if m.slow && out > 0 {
			out--
			continue
		}
		list = append(list, m.peer)
	}
	return list
}
