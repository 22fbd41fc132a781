package multipool

import "slices"

// Role is the role of a peer in the replication.
type Role uint8

const (
	// RoleUnknown, the zero value, means that no answer has shown the role yet. In Peer.Role it means that the pool
	// finds out.
	RoleUnknown Role = iota
	// RolePrimary accepts writes.
	RolePrimary
	// RoleReplica is a hot standby: it replays the primary's log and serves reads.
	RoleReplica
)

var roleNames = [...]string{"unknown", "primary", "replica"}

// String returns "unknown", "primary" or "replica".
func (r Role) String() string { return nameOf(roleNames[:], r, "role") }

// MarshalText returns the text that String returns, or an error if the value is not one of the constants.
func (r Role) MarshalText() ([]byte, error) { return marshalName(roleNames[:], r, "role") }

// UnmarshalText is the inverse of MarshalText. Its error for an unknown text lists the known ones.
func (r *Role) UnmarshalText(text []byte) error { return unmarshalName(roleNames[:], r, "role", text) }

// Health is what the pool knows about a peer's ability to serve. The set of values is fixed, so it suits as a label of
// metrics.
type Health uint8

const (
	// HealthUnknown, the zero value, means that no health check of the peer has ended yet. For the peer of a pool of
	// one, it means that nothing has been asked of it yet.
	HealthUnknown Health = iota
	// HealthUp means that the peer answers.
	HealthUp
	// HealthSuspect means that a fault was seen, and that a probe is finding out whether the server is down.
	HealthSuspect
	// HealthDown means that the peer does not answer. Its breaker is open.
	HealthDown
	// HealthMisconfigured means that the server answers, and refuses this program: its password, database, certificate,
	// ...
	HealthMisconfigured
	// HealthShuttingDown means that the server is shutting down. Open sessions continue, new ones are refused.
	HealthShuttingDown
	// HealthStarting means that the server answers, but takes no sessions yet and has none.
	HealthStarting
	// HealthGone means that the peer was removed. It is used in PeerEvent.To only.
	HealthGone
)

var healthNames = [...]string{"unknown", "up", "suspect", "down", "misconfigured", "shutting-down", "starting", "gone"}

// String returns "unknown", "up", "suspect", "down", "misconfigured", "shutting-down", "starting" or "gone".
func (h Health) String() string { return nameOf(healthNames[:], h, "health") }

// MarshalText returns the text that String returns, or an error if the value is not one of the constants.
func (h Health) MarshalText() ([]byte, error) { return marshalName(healthNames[:], h, "health") }

// UnmarshalText is the inverse of MarshalText. Its error for an unknown text lists the known ones.
func (h *Health) UnmarshalText(text []byte) error {
	return unmarshalName(healthNames[:], h, "health", text)
}

// why is the reason for which a peer of this health takes no calls.
func (h Health) why() Why {
	switch h {
	case HealthUp:
		return WhyNone
	case HealthSuspect:
		return WhySuspect
	case HealthDown:
		return WhyDown
	case HealthMisconfigured:
		return WhyMisconfigured
	case HealthShuttingDown:
		return WhyShuttingDown
	case HealthStarting:
		return WhyStarting
	}
	return WhyUnknown
}

// member is one peer as the topology knows it. What a peer has said stays until it says otherwise, so that a server
// that is down is still what it was.
type member struct {
	peer     *peer
	role     Role
	health   Health
	system   uint64  // the server's system identifier; 0 if not told
	server   server  // which server it is
	at       string  // the address that the name led to; "" if not told
	aged     bool    // has not answered for so long that its system identifier has no vote
	timeline uint32  // of the log that a primary writes, or that a replica's receiver gets; 0 if not told
	shown    uint32  // the highest timeline of which it had any trace as a replica
	fitness  fitness // of a replica: whether its data is what its primary's is
	slow     bool    // reads there take far longer than elsewhere
	drained  bool    // by the operator: no new work
	steady   bool    // has stayed well for a while, or was never seen otherwise
	hostile  error   // the user's own set-up of a connection cannot run on a standby: no reads there
	cause    error   // the last fault; kept when the peer is well again

	late bool // joined after the first answers: nobody waits for its

	claimed instant // since when it is known to say that it is the primary of this timeline; 0 means since the first answers
	looked  instant // when a full look was begun, the first after the topology's last event

	// Worked out by list and elect.
	ours    bool  // has been this cluster's: its primary, or a standby beside its primary
	held    bool  // has been the primary by this name
	foreign bool  // of another cluster: refused
	stray   bool  // a replica of a primary that was replaced
	alias   *peer // the peer that is used in its stead, as both names lead to one server, or nil
}

// answers reports whether the peer gives answers to its looks, or has not been judged yet.
func (m *member) answers() bool { return m.health == HealthUp || m.health == HealthSuspect }

// serves reports whether calls may be sent there.
func (m *member) serves() bool { return m.health == HealthUp && !m.foreign }

// takes reports whether calls may be sent there now.
func (m *member) takes() bool { return m.serves() && !m.drained }

// stands reports whether the peer answers, or has not been judged yet.
func (m *member) stands() bool { return m.answers() && !m.foreign }

// unfit says what is wrong with the data of a peer that is well, or with what it is: it is read where nobody else can be, or not
// at all. What is wrong with its claim to be the primary says the topology's unfit.
func (m *member) unfit() Why {
	switch {
	case m.foreign:
		return WhyOtherCluster
	case m.alias != nil:
		return WhySameServer
	case m.stray && m.fitness != fitAstray:
		return WhyOlderTimeline
	case m.hostile != nil:
		return WhySetupFails
	}
	return m.fitness.why()
}

// claims reports whether the peer says that it is the primary.
func (m *member) claims() bool { return m.role == RolePrimary && m.stands() }

// topology is an immutable snapshot of all peers, with the list of candidates for every place worked out when it is
// made, so that a reader loads one pointer and indexes. Modes are data: they differ in what apply puts in the lists.
//
// It carries peers as identities and calls nothing on them.
type topology struct {
	mode    Mode
	peers   []*peer  // all of them
	members []member // in the order of the configuration
	// primary is who takes the writes: it stays while it is down, so that it is the incumbent; nil if there is none yet. Under
	// ModeOrdered it is who takes everything, under ModeEquivalent nil.
	primary *peer

	office   server  // which server that is
	system   uint64  // the cluster's system identifier; 0 if none has told it
	sure     bool    // two servers have shown it
	timeline uint32  // the highest of the marks; 0 if there is none
	marks    []mark  // what the cluster's servers have shown; never changed in place
	elected  bool    // there has been a primary
	split    bool    // another claims to be the primary, and nothing tells which is right: nobody takes writes
	rivals   []*peer // who claim to be the primary and are not followed
	settled  bool    // every peer has answered or failed once, or the time for it is over
	unseen   bool    // some first look is still under way
	heir     *peer   // who takes the writes when everybody who answers has been looked at again; nil if nobody waits for that

	now   instant // of the last observation that said its time
	event instant // the last that everybody is to be looked at after: a claim, or a server that came back on a lower timeline
	over  instant // claims up to this one are waited for no longer

	reads    []*peer // for a plain read: healthy replicas; the primary and then suspects where there is none
	fallback bool    // reads holds the primary because no replica can serve
	refuge   *peer   // the primary, where plain reads are better off there as no replica follows it; nil
	replicas []*peer // healthy replicas, suspects where there is none
	well     []*peer // the same with those that are slow or behind: for calls that name their peers
	writes   []*peer // the primary
	anyone   []*peer // healthy peers of either role, suspects where there is none
	spare    []*peer // healthy peers of last resort: for calls that name their peers
	last     []*peer // the same without those that are slow or behind: the last resort of reads

	drawn    drawn
	balancer Balancer // nil: the default

	superseded chan struct{} // closed when a newer snapshot has been published
}

// drawn is the lists as they are drawn from.
type drawn struct{ reads, replicas, well, writes, anyone, spare, last roster }

// observation is one piece of news about one peer. Zero fields say nothing.
type observation struct {
	peer     *peer
	role     Role
	health   Health
	system   uint64
	server   server
	at       string
	asked    instant // when a look was begun; 0 if it is none
	full     bool    // the look asked for everything
	came     instant // when the news came; 0 means not said
	aged     bool    // its looks have failed for long
	timeline uint32
	alone    bool // a replica whose receiver is not running: its timeline is nobody's
	shown    uint32
	fitness  fitness
	slow     ternary
	drained  ternary
	steady   bool
	hostile  error
	forgiven bool // that it was hostile
	cause    error
	settle   bool    // the time for the first looks is over; peer is nil
	joins    bool    // the peer is new; its role is what the configuration vouches for
	leaves   bool    // the peer is no more
	over     instant // claims up to this one are waited for no longer; peer is nil
	forgets  string  // the name of which everything that was shown there is to be dropped; peer is nil, or leaves
}

// ternary is a bool that may say nothing.
type ternary uint8

const (
	unsaid ternary = iota
	yes
	no
)

// newTopology returns the first snapshot: nothing is known but the roles that the configuration vouches for.
func newTopology(mode Mode, peers []*peer, believed []Role) *topology {
	t := &topology{mode: mode, peers: peers, members: make([]member, len(peers))}
	for i, p := range peers {
		t.members[i] = member{peer: p, role: believed[i]}
	}
	t.list()
	return t
}

// withholds reports whether a peer is the primary, and gets no writes: it is contested, or drained.
func (t *topology) withholds(p *peer) bool {
	return t.mode == ModeReplicated && p == t.primary && p != nil && !contains(t.writes, p)
}

// soloTopology is that of a pool with one peer: it takes everything, whatever it is and however it feels, as a pgxpool
// would.
func soloTopology(p *peer) *topology {
	one := []*peer{p}
	t := &topology{
		peers: one, members: []member{{peer: p, health: HealthUp}}, primary: p, settled: true,
		reads: one, replicas: one, writes: one, anyone: one, superseded: make(chan struct{}),
	}
	t.arrange()
	return t
}

// apply returns the topology after an observation: t itself if it says nothing new. It is pure; any order of the same
// last word about every peer ends in the same lists, except for the incumbent between two claimants of one timeline.
func (t *topology) apply(o observation) *topology {
	next := *t
	next.settled = t.settled || o.settle
	next.over = max(t.over, o.over)
	next.now = max(t.now, o.came)
	next.members = append([]member(nil), t.members...)
	news := next.settled != t.settled || next.over != t.over && t.heir != nil
	switch i := slices.Index(t.peers, o.peer); {
	case o.joins && i < 0:
		next.peers = append(t.peers[:len(t.peers):len(t.peers)], o.peer)
		next.members = append(next.members, member{peer: o.peer, role: o.role, late: true})
		news = true
	case o.leaves && i >= 0:
		next.peers = slices.Delete(slices.Clone(t.peers), i, i+1)
		next.members = slices.Delete(next.members, i, i+1)
		if t.primary == o.peer {
			next.primary = nil
		}
		news = true
	}
	if o.forgets != "" {
		next.forget(o.forgets)
		news = true
	}
	if m := next.member(o.peer); m != nil {
		news = next.learn(m, o) || news
	}
	if !news {
		return t
	}
	next.list()
	return &next
}

// learn takes an observation of a member in and reports whether it said anything new.
func (t *topology) learn(m *member, o observation) (news bool) {
	was := *m
	if o.system != 0 && o.system != m.system {
		if m.system != 0 { // what is known of the other server that was there does not hold for this one
			m.timeline, m.shown, m.fitness, m.ours = 0, 0, fitUnsaid, false
		}
		m.system, news = o.system, true
	}
	if o.server.started != 0 && (o.server != m.server || o.at != m.at) {
		t.meets(m, o)
		news = true
	}
	if o.role != RoleUnknown && o.role != m.role {
		m.role, m.timeline, m.fitness, m.hostile, news = o.role, 0, fitUnsaid, nil, true
	}
	if (o.timeline != 0 || o.alone) && o.timeline != m.timeline {
		m.timeline, news = o.timeline, true
	}
	if o.shown != 0 && o.shown != m.shown {
		m.shown, news = o.shown, true
	}
	if o.fitness != fitUnsaid && o.fitness != m.fitness {
		m.fitness, news = o.fitness, true
	}
	if o.health != HealthUnknown && o.health != m.health && (o.health != HealthSuspect || m.health <= HealthUp) {
		m.steady = (m.health == HealthUnknown || m.steady) && o.health <= HealthSuspect
		if m.health > HealthSuspect && o.health == HealthUp {
			m.hostile = nil // it may have been set right
		}
		m.health, news = o.health, true // a suspicion does not soften a verdict
	}
	if aged := o.aged || m.aged && o.asked == 0; aged != m.aged {
		m.aged, news = aged, true
	}
	if o.steady && !m.steady && m.health == HealthUp {
		m.steady, news = true, true
	}
	if o.drained != unsaid && (o.drained == yes) != m.drained {
		m.drained, news = o.drained == yes, true
	}
	if o.slow != unsaid && (o.slow == yes) != m.slow {
		m.slow, news = o.slow == yes, true
	}
	if o.hostile != nil && m.hostile == nil {
		m.hostile, news = o.hostile, true
	}
	if o.forgiven && m.hostile != nil {
		m.hostile, news = nil, true
	}
	if o.cause != nil && (m.cause == nil || o.cause.Error() != m.cause.Error()) {
		m.cause, news = o.cause, true // a server that keeps refusing us alike wakes nobody
	}
	t.claim(&was, m)
	if o.full && (news || m.looked < t.event && t.event <= o.asked) {
		m.looked, news = o.asked, true
	}
	return news
}

// meets takes in which server answers at a name. It may have been started again, or be another: what was known of the one
// that was there does not hold for this one, and what is known of this one by another name does.
func (t *topology) meets(m *member, o observation) {
	other := m.at != "" && o.at != m.at && o.server != m.server
	if o.server != m.server {
		m.timeline, m.shown, m.fitness = 0, 0, fitUnsaid
	}
	for i := range t.members {
		if n := &t.members[i]; n != m && n.server.is(o.server) {
			m.ours, other = n.ours, false
		}
	}
	if other {
		m.ours = false
	}
	m.server, m.at = o.server, o.at
}

// claim notes since when a member says that it is the primary of its timeline. Everybody is looked at again before it is
// believed. Before the first answers have come nobody is: they are waited for.
func (t *topology) claim(was, is *member) {
	says := func(m *member) bool { return m.role == RolePrimary && m.answers() }
	if !says(is) || says(was) && was.timeline == is.timeline && (was.server == is.server || was.server.started == 0) {
		return
	}
	is.claimed = 0
	if t.settled {
		is.claimed, t.event = t.now, t.now
	}
}

// list works out the lists from the members.
func (t *topology) list() {
	t.superseded = make(chan struct{})
	t.unseen = t.anyUnseen()
	t.settled = t.settled || !t.unseen
	switch t.mode {
	case ModeReplicated:
		t.listReplicated()
	case ModeEquivalent:
		t.listEquivalent()
	case ModeOrdered:
		t.listOrdered()
	}
	t.arrange()
}

// arrange works out how the lists are drawn from: by zone and weight, whatever the mode.
func (t *topology) arrange() {
	t.drawn = drawn{
		reads: rosterOf(t.reads), replicas: rosterOf(t.replicas), well: rosterOf(t.well),
		writes: rosterOf(t.writes), anyone: rosterOf(t.anyone), spare: rosterOf(t.spare), last: rosterOf(t.last),
	}
}

// begins reports whether the pool is still finding its first primary: first looks are under way, or the peers are looked at
// again since the first that claims to be the primary was heard late.
func (t *topology) begins() bool { return t.unseen || !t.elected && t.heir != nil }

func (t *topology) anyUnseen() bool {
	for i := range t.members {
		if m := &t.members[i]; m.health == HealthUnknown && !(m.late && t.settled) {
			return true
		}
	}
	return false
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

func contains(list []*peer, p *peer) bool {
	for _, q := range list {
		if q == p {
			return true
		}
	}
	return false
}

// fitness is whether a replica's data is what its primary's is.
type fitness uint8

const (
	fitUnsaid fitness = iota
	fitFit
	fitBehind // by more than MaxLag
	fitPaused // its replay was paused
	fitCutOff // it lacks what the primary has, and nothing fetches it
	fitAstray // it is ahead of the primary: its history is another
)

// why is the reason for which a replica of this fitness is not read.
func (f fitness) why() Why {
	return [...]Why{fitBehind: WhyBehind, fitPaused: WhyPaused, fitCutOff: WhyCutOff, fitAstray: WhyDiverged}[f]
}
