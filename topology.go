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

// member is one peer as the topology knows it. What a peer has said stays until it says otherwise, so that a server
// that is down is still what it was.
type member struct {
	peer     *peer
	role     Role
	health   health
	system   uint64  // the server's system identifier; 0: not told
	timeline uint32  // of the log that a primary writes, or that a replica's receiver gets; 0: not told
	shown    uint32  // the highest timeline of which a replica has any trace
	fitness  fitness // of a replica: whether its data is what its primary's is
	slow     bool    // reads there take far longer than elsewhere
	hostile  error   // the user's own set-up of a connection cannot run on a standby: no reads there
	cause    error   // the last fault; kept when the peer is well again

	// Worked out by list and elect.
	ours    bool // has been this cluster's: its primary, or a standby beside its primary
	foreign bool // of another cluster: refused
	stray   bool // a replica of a primary that was replaced
}

// serves reports whether calls may be sent there.
func (m *member) serves() bool { return m.health == healthUp && !m.foreign }

// stands reports whether the peer answers, or has not been judged yet.
func (m *member) stands() bool {
	return (m.health == healthUp || m.health == healthSuspect) && !m.foreign
}

// unfit says why a peer that is well gets no reads because of its data; "" where it does.
func (m *member) unfit() string {
	switch {
	case m.foreign:
		return "is of another cluster"
	case m.stray:
		return "is a replica of an older timeline"
	}
	return m.fitness.String()
}

// claims reports whether the peer says that it is the primary.
func (m *member) claims() bool { return m.role == RolePrimary && m.stands() }

// topology is an immutable snapshot of all peers, with the list of candidates for each place worked out when it is
// made, so that a reader loads one pointer and indexes. Modes are data: they differ in what apply puts in the lists.
//
// It carries peers as identities and calls nothing on them.
type topology struct {
	members  []member // in the order of the configuration
	primary  *peer    // who takes the writes; stays while it is down, so that it is the incumbent; nil: nobody yet
	system   uint64   // the cluster's system identifier; 0: none has told it
	timeline uint32   // the highest of the cluster; 0: none has told it
	elected  bool     // there has been a primary
	split    bool     // another claims to be the primary, and nothing tells which is right: nobody takes writes
	rivals   []*peer  // who claim to be the primary and are not followed
	settled  bool     // every peer has answered or failed once, or the time for it is over
	unseen   bool     // some first look is still under way

	reads    []*peer // for a plain read: healthy replicas; the primary and then suspects where there is none
	fallback bool    // reads holds the primary because no replica can serve
	replicas []*peer // healthy replicas, suspects where there is none
	well     []*peer // the same with those that are slow or behind: for calls that name their peers
	writes   []*peer // the primary
	anyone   []*peer // healthy peers of either role, suspects where there is none

	superseded chan struct{} // closed when a newer snapshot has been published
}

// observation is one piece of news about one peer. Zero fields say nothing.
type observation struct {
	peer     *peer
	role     Role
	health   health
	system   uint64
	timeline uint32
	alone    bool // a replica whose receiver is not running: its timeline is nobody's
	shown    uint32
	fitness  fitness
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
		m.role, m.timeline, m.shown, m.fitness, m.hostile, news = o.role, 0, 0, fitUnsaid, nil, true
	}
	if o.system != 0 && o.system != m.system {
		m.ours = m.ours && m.system == 0
		m.system, news = o.system, true
	}
	if (o.timeline != 0 || o.alone) && o.timeline != m.timeline {
		m.timeline, news = o.timeline, true
	}
	if o.shown > m.shown {
		m.shown, news = o.shown, true
	}
	if o.fitness != fitUnsaid && o.fitness != m.fitness {
		m.fitness, news = o.fitness, true
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
	t.identify()
	t.elect()

	well, suspect := t.standing()
	t.writes = nil
	primary := t.member(t.primary)
	if primary != nil && primary.claims() && !t.split {
		t.writes = []*peer{t.primary}
	}
	healthy := quick(truthful(well))
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
			t.reads, t.fallback = []*peer{t.primary}, true
		case len(suspect) > 0:
			t.reads = suspect
		case len(t.writes) > 0:
			t.reads, t.fallback = t.writes, true
		}
	}
}

// standing returns the replicas that may serve: those that are well, and those that are suspected.
func (t *topology) standing() (well []*member, suspect []*peer) {
	for i := range t.members {
		m := &t.members[i]
		m.stray = m.role == RoleReplica && t.strays(m)
		if m.role != RoleReplica || m.hostile != nil || m.foreign || m.stray || !t.vouched(m) {
			continue
		}
		switch m.health {
		case healthUp:
			well = append(well, m)
		case healthSuspect:
			suspect = append(suspect, m.peer)
		}
	}
	return well, suspect
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
// server has it as its last word. Where none has, as after an upgrade that made a new cluster of all of them, what was
// known of the old one is forgotten.
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
	if shown[t.system] == 0 && most != 0 && (t.settled || shown[most] > 1) {
		if t.system != 0 {
			t.primary, t.timeline, t.elected = nil, 0, false
		}
		t.system = most
	}
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

// truthful leaves out the replicas whose data is not what it should be, unless that leaves nobody: old data is better
// than none.
func truthful(well []*member) []*member {
	fit := make([]*member, 0, len(well))
	for _, m := range well {
		if m.fitness <= fitFit {
			fit = append(fit, m)
		}
	}
	if len(fit) == 0 {
		return well
	}
	return fit
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
// a claimant below the cluster's highest is one that was replaced, or has not told its timeline yet: it is fenced. Among
// the rest the highest wins, and between equals the incumbent stays. A first claimant waits until all peers have been
// heard, so that the order of the answers decides nothing. A primary that is down stays the incumbent until another is
// elected.
func (t *topology) elect() {
	t.ratchet()
	t.split = false
	best, rivals := t.bestClaimant()
	incumbent := t.member(t.primary)
	switch {
	case best == nil:
		if incumbent != nil && (incumbent.role == RoleReplica || incumbent.timeline < t.timeline) {
			t.primary = nil
		}
	case best == incumbent:
	case rivals:
		t.primary, t.split = nil, t.settled
	case incumbent != nil && incumbent.claims() && !t.trusts(best):
		// A higher timeline is what a promotion leaves, and a point-in-time recovery of a copy: while the incumbent
		// answers, one is not told from the other. Writing to neither can cost time, writing to either more.
		t.split = true
	case t.primary == nil && !t.settled:
	default:
		t.primary = best.peer
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

// bestClaimant returns the claimant of the highest timeline, the incumbent where several have it; rivals says that
// several have it and none of them is the incumbent.
func (t *topology) bestClaimant() (best *member, rivals bool) {
	for i := range t.members {
		m := &t.members[i]
		if !m.claims() || m.timeline < t.timeline {
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
	return best, rivals
}

// ratchet raises the cluster's timeline to what its replicas have shown: whoever claims to be the primary of an older one
// was replaced by somebody who may not be in sight.
func (t *topology) ratchet() {
	for i := range t.members {
		m := &t.members[i]
		if m.role == RoleReplica && !m.foreign && (m.ours || !t.elected) {
			t.timeline = max(t.timeline, m.shown, m.timeline)
		}
	}
}

// trusts reports whether a claimant of a higher timeline than the incumbent's is known for one of this cluster: it was
// seen in it, or a replica that was now follows it.
func (t *topology) trusts(claimant *member) bool {
	if claimant.ours {
		return true
	}
	for i := range t.members {
		if m := &t.members[i]; m.role == RoleReplica && m.ours && m.stands() && m.timeline == claimant.timeline {
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
	t.timeline = max(t.timeline, primary.timeline)
	for i := range t.members {
		m := &t.members[i]
		replica := m.role == RoleReplica && max(m.timeline, m.shown) <= primary.timeline
		if m == primary || (replica && !m.foreign) || (!t.elected && m.health == healthUnknown) {
			m.ours = true
		}
	}
	t.elected = true
}

// replaced reports whether an earlier primary has been replaced by a newer timeline, while it still takes itself for the
// primary: what is written there is lost.
func (t *topology) replaced(earlier *peer) bool {
	m := t.member(earlier)
	if m == nil || m.role != RolePrimary || earlier == t.primary {
		return false
	}
	return t.primary != nil || m.timeline < t.timeline
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
	if p := in.draw(first, tried); p != nil {
		if t.fallback && in.place == placeReads && in.reason == ReasonRead {
			return p, ReasonNoReplica
		}
		return p, in.reason
	}
	if p := in.draw(then, tried); p != nil {
		if in.fresh.bounds() && len(first) > tried.n {
			return p, ReasonStale
		}
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
		if p := in.draw(list, tried); p != nil {
			return p
		}
	}
	return nil
}

// draw chooses from one list.
func (in *intent) draw(list []*peer, tried *tried) *peer {
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
		if in.peers != nil && !contains(in.peers, m.peer) {
			continue
		}
		if in.place == placePrimary && m.role == RoleReplica || in.place == placeReplica && m.role == RolePrimary {
			continue
		}
		if m.health != healthMisfit && !m.foreign {
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
		why, err := t.why(m, in)
		out[i] = PeerCause{Peer: m.peer.name, Why: why, Err: err}
	}
	return out
}

// why says why one peer did not take the intent, and by which error.
func (t *topology) why(m *member, in *intent) (string, error) {
	switch {
	case in.peers != nil && !contains(in.peers, m.peer):
		return "is not named by the route", nil
	case m.foreign:
		return "refused", &foreignError{m.system, t.system}
	case m.health != healthUp:
		return m.health.String(), m.cause
	case in.place == placePrimary && m.role == RoleReplica:
		return "is a replica", nil
	case in.place == placeReplica && m.role == RolePrimary:
		return "is the primary", nil
	case m.role == RolePrimary && m.timeline < t.timeline:
		return "is a primary of an older timeline", nil
	case m.role == RolePrimary && (m.peer != t.primary || t.split):
		return "claims to be the primary", nil
	case m.role == RoleUnknown:
		return "is of unknown role", nil
	case m.hostile != nil:
		return "refuses the program's own set-up of a connection", m.hostile
	case m.unfit() != "":
		return m.unfit(), nil
	case m.role == RoleReplica && in.fresh.bounds():
		return "is not known to be within " + in.fresh.max.String(), nil
	}
	return m.health.String(), nil
}

func contains(list []*peer, p *peer) bool {
	for _, q := range list {
		if q == p {
			return true
		}
	}
	return false
}
