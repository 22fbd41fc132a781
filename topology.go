package multipool

// Role is what a peer is in the replication.
type Role uint8

const (
	// RoleUnknown: no answer has told it yet. In Peer.Role: to be discovered.
	RoleUnknown Role = iota
	// RolePrimary accepts writes.
	RolePrimary
	// RoleReplica is a hot standby: it replays the primary's log and serves reads.
	RoleReplica
)

var roleNames = [...]string{"unknown", "primary", "replica"}

// String returns "unknown", "primary" or "replica".
func (r Role) String() string { return nameOf(roleNames[:], int(r), "role") }

// health is what is believed of a peer's ability to serve.
type health uint8

const (
	healthUnknown health = iota // no look has ended yet
	healthUp
	healthSuspect  // a fault was seen; the probe is under way
	healthDown     // the breaker is open
	healthMisfit   // the server answers and refuses us: password, database, TLS
	healthDraining // the server is shutting down: sessions go on, new ones are refused
)

var healthNames = [...]string{"not yet seen", "up", "suspect", "down", "misconfigured", "draining"}

func (h health) String() string { return nameOf(healthNames[:], int(h), "health") }

// member is one peer as the topology knows it.
type member struct {
	peer     *peer
	role     Role
	health   health
	timeline uint32 // of a primary that told it; 0: unknown
	slow     bool   // reads there take far longer than elsewhere
	hostile  error  // the user's own set-up of a connection cannot run on a standby: no reads there
	cause    error  // the last fault; kept when the peer is well again
}

// serves reports whether calls may be sent there.
func (m *member) serves() bool { return m.health == healthUp }

// topology is an immutable snapshot of all peers, with the list of candidates for each place worked out when it is
// made, so that a reader loads one pointer and indexes. Modes are data: they differ in what apply puts in the lists.
//
// It carries peers as identities and calls nothing on them.
type topology struct {
	members  []member // in the order of the configuration
	primary  *peer    // who takes the writes; stays while it is down, so that it is the incumbent; nil: nobody yet
	timeline uint32   // the highest ever elected; 0: none has told it
	split    bool     // two claim to be the primary and nothing tells which is right
	settled  bool     // every peer has answered or failed once, or the time for it is over
	unseen   bool     // some first look is still under way

	reads    []*peer // for a plain read: healthy replicas; the primary and then suspects where there is none
	fallback bool    // reads holds the primary because no replica can serve
	replicas []*peer // healthy replicas, suspects where there is none
	well     []*peer // the same with those that are slow: for calls that name their peers
	writes   []*peer // the primary
	anyone   []*peer // healthy peers of either role, suspects where there is none

	superseded chan struct{} // closed when a newer snapshot has been published
}

// observation is one piece of news about one peer. Zero fields say nothing.
type observation struct {
	peer     *peer
	role     Role
	health   health
	timeline uint32
	slow     ternary
	hostile  error
	cause    error
	settle   bool // the time for the first looks is over; peer is nil
}

// ternary is a bool that may say nothing.
type ternary uint8

const (
	unsaid ternary = iota
	yes
	no
)

// newTopology returns the first snapshot: nothing is known but the roles that the configuration vouches for.
func newTopology(peers []*peer, believed []Role) *topology {
	t := &topology{members: make([]member, len(peers))}
	for i, p := range peers {
		t.members[i] = member{peer: p, role: believed[i]}
	}
	t.list()
	return t
}

// soloTopology is that of a pool with one peer: it takes everything, whatever it is and however it feels, as a pgxpool
// would.
func soloTopology(p *peer) *topology {
	one := []*peer{p}
	return &topology{
		members: []member{{peer: p, health: healthUp}}, primary: p, settled: true,
		reads: one, replicas: one, writes: one, anyone: one, superseded: make(chan struct{}),
	}
}

// apply returns the topology after an observation: t itself if it says nothing new. It is pure; any order of the same
// last word about each peer ends in the same lists, but for the incumbent between two claimants of one timeline.
func (t *topology) apply(o observation) *topology {
	next := *t
	if o.settle {
		next.settled = true
	}
	next.members = append([]member(nil), t.members...)
	news := next.settled != t.settled
	for i := range next.members {
		if m := &next.members[i]; m.peer == o.peer {
			news = m.learn(o) || news
		}
	}
	if !news {
		return t
	}
	next.list()
	return &next
}

// learn takes an observation in and reports whether it said anything new.
func (m *member) learn(o observation) (news bool) {
	if o.role != RoleUnknown && o.role != m.role {
		m.role, m.timeline, m.hostile, news = o.role, 0, nil, true
	}
	if o.timeline != 0 && o.timeline != m.timeline {
		m.timeline, news = o.timeline, true
	}
	if o.health != healthUnknown && o.health != m.health && (o.health != healthSuspect || m.health <= healthUp) {
		m.health, news = o.health, true // a suspicion does not soften a verdict
	}
	if o.slow != unsaid && (o.slow == yes) != m.slow {
		m.slow, news = o.slow == yes, true
	}
	if o.hostile != nil && m.hostile == nil {
		m.hostile, news = o.hostile, true
	}
	if o.cause != nil && (m.cause == nil || o.cause.Error() != m.cause.Error()) {
		m.cause, news = o.cause, true // a server that keeps refusing us alike wakes nobody
	}
	return news
}

// list works out the lists from the members.
func (t *topology) list() {
	t.superseded = make(chan struct{})
	t.unseen = !t.allSeen()
	t.settled = t.settled || !t.unseen
	t.elect()

	var well []*member
	var suspect []*peer
	for i := range t.members {
		m := &t.members[i]
		if m.role != RoleReplica || m.hostile != nil {
			continue
		}
		switch m.health {
		case healthUp:
			well = append(well, m)
		case healthSuspect:
			suspect = append(suspect, m.peer)
		}
	}

	t.writes = nil
	primary := t.member(t.primary)
	if primary != nil && (primary.serves() || primary.health == healthSuspect) {
		t.writes = []*peer{t.primary}
	}

	healthy := quick(well)
	t.well = make([]*peer, len(well))
	for i, m := range well {
		t.well[i] = m.peer
	}
	t.replicas = healthy
	t.anyone = healthy
	if primary != nil && primary.serves() {
		t.anyone = append(healthy[:len(healthy):len(healthy)], t.primary)
	}
	if len(t.anyone) == 0 {
		t.anyone = append(suspect[:len(suspect):len(suspect)], t.writes...)
	}
	t.reads, t.fallback = healthy, false
	if len(healthy) == 0 {
		t.replicas, t.well = suspect, suspect
		switch {
		case primary != nil && primary.serves():
			t.reads, t.fallback = t.writes, true
		case len(suspect) > 0:
			t.reads = suspect
		case len(t.writes) > 0:
			t.reads, t.fallback = t.writes, true
		}
	}
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

// elect decides who is the primary. A promotion raises the timeline (PostgreSQL documentation, 26.3.5 "Timelines"), so
// a claimant below the highest ever elected is one that was replaced, or has not told its timeline yet; among the rest
// the highest wins, and between equals the incumbent stays. A first claimant waits until all peers have been heard, so
// that the order of the answers decides nothing. A primary that is down stays the incumbent until another is elected.
func (t *topology) elect() {
	t.split = false
	var best *member
	rivals := false
	for i := range t.members {
		m := &t.members[i]
		if m.role != RolePrimary || m.timeline < t.timeline || (m.health != healthUp && m.health != healthSuspect) {
			continue
		}
		switch {
		case best == nil || m.timeline > best.timeline:
			best, rivals = m, false
		case m.timeline == best.timeline:
			rivals = true
			if m.peer == t.primary {
				best = m
			}
		}
	}
	switch {
	case best == nil:
		if m := t.member(t.primary); m != nil && (m.role == RoleReplica || m.timeline < t.timeline) {
			t.primary = nil
		}
	case rivals && best.peer != t.primary:
		t.primary, t.split = nil, true
	case t.primary == nil && !t.settled:
	default:
		t.primary, t.timeline = best.peer, best.timeline
	}
}

func (t *topology) allSeen() bool {
	for i := range t.members {
		if t.members[i].health == healthUnknown {
			return false
		}
	}
	return true
}

func (t *topology) member(p *peer) *member {
	if p == nil {
		return nil
	}
	for i := range t.members {
		if t.members[i].peer == p {
			return &t.members[i]
		}
	}
	return nil
}

// candidates returns the list from which a call's peer is drawn, and the one to turn to when all of it has been tried.
func (t *topology) candidates(pl place) (first, then []*peer) {
	switch pl {
	case placePrimary:
		return t.writes, nil
	case placeReplica:
		return t.replicas, nil
	case placeAny:
		return t.anyone, nil
	default:
		return t.reads, t.writes
	}
}

// pick chooses the peer of one attempt, nil if no candidate is left.
func (t *topology) pick(in *intent, tried *tried) (*peer, Reason) {
	if in.place == placeNamed {
		return t.pickNamed(in, tried), in.reason
	}
	first, then := t.candidates(in.place)
	if in.peers != nil && in.place == placeReplica {
		first = t.well
	}
	if p := twoDraws(first, in.peers, tried); p != nil {
		if t.fallback && in.place == placeReads && in.reason == ReasonRead {
			return p, ReasonNoReplica
		}
		return p, in.reason
	}
	if p := twoDraws(then, in.peers, tried); p != nil {
		return p, ReasonNoReplica
	}
	return nil, in.reason
}

// pickNamed chooses among the peers that a route names: for a read a replica among them, for a write the primary, and
// where the names offer no such peer the other kind.
func (t *topology) pickNamed(in *intent, tried *tried) *peer {
	lists := [...][]*peer{t.well, t.writes}
	if !in.reads {
		lists = [...][]*peer{t.writes, t.well}
	}
	for _, list := range lists {
		if p := twoDraws(list, in.peers, tried); p != nil {
			return p
		}
	}
	return nil
}

// hopeless reports whether waiting for a peer is pointless: each one that could serve the intent refuses us by
// configuration.
func (t *topology) hopeless(in *intent) bool {
	could := 0
	for i := range t.members {
		m := &t.members[i]
		if in.peers != nil && !contains(in.peers, m.peer) {
			continue
		}
		if in.place == placePrimary && m.role == RoleReplica || in.place == placeReplica && m.role == RolePrimary {
			continue
		}
		if m.health != healthMisfit {
			return false
		}
		could++
	}
	return could > 0
}

// causes says of each peer why it did not take the intent.
func (t *topology) causes(in *intent) []PeerCause {
	out := make([]PeerCause, len(t.members))
	for i := range t.members {
		m := &t.members[i]
		why := m.health.String()
		switch {
		case in.peers != nil && !contains(in.peers, m.peer):
			why = "is not named by the route"
		case m.health != healthUp:
		case in.place == placePrimary && m.role == RoleReplica:
			why = "is a replica"
		case in.place == placeReplica && m.role == RolePrimary:
			why = "is the primary"
		case m.role == RolePrimary && m.peer != t.primary:
			why = "claims to be the primary"
			if m.timeline < t.timeline {
				why = "is a primary of an older timeline"
			}
		case m.role == RoleUnknown:
			why = "is of unknown role"
		case m.role == RoleReplica && m.hostile != nil:
			why = "refuses the program's own set-up of a connection"
		}
		err := m.cause
		if m.health == healthUp {
			err = m.hostile
		}
		out[i] = PeerCause{Peer: m.peer.name, Why: why, Err: err}
	}
	return out
}

func contains(list []*peer, p *peer) bool {
	for _, q := range list {
		if q == p {
			return true
		}
	}
	return false
}
