package multipool

// Why is the reason why a peer takes no calls, or did not take one call. The set of values is fixed, so it suits as a
// label of metrics. The values up to WhyNotFirst describe the state of a peer, and also appear in its [PeerStatus]. The
// later ones are about one call, and appear in a [NoPeerError] only.
type Why uint8

const (
	// WhyNone, the zero value, means that nothing keeps calls from the peer.
	WhyNone Why = iota
	// WhyUnknown means that no health check of the peer has ended yet.
	WhyUnknown
	// WhySuspect means that a fault was seen, and that a probe is finding out whether the server is down.
	WhySuspect
	// WhyDown means that the peer does not answer.
	WhyDown
	// WhyMisconfigured means that the server answers, and refuses this program.
	WhyMisconfigured
	// WhyShuttingDown means that the server is shutting down.
	WhyShuttingDown
	// WhyStarting means that the server takes no sessions yet.
	WhyStarting
	// WhyDrained means that the program has called Drain.
	WhyDrained
	// WhyOtherCluster means that the server's system identifier is not that of the pool's cluster.
	WhyOtherCluster
	// WhySameServer means that the server is already in the pool as another peer; see PeerStatus.SameAs.
	WhySameServer
	// WhyOlderTimeline means that the peer is a primary that was replaced, or a replica of one.
	WhyOlderTimeline
	// WhyDisputed means that the peer claims to be the primary, and that another peer does too.
	WhyDisputed
	// WhyUnconfirmed means that the pool is still confirming what the peer says of itself. A new primary waits until
	// every peer that answers has been checked and has shown its timeline. A replica waits until the pool knows which
	// cluster it serves.
	WhyUnconfirmed
	// WhyRoleUnknown means that the peer answers, but has not shown yet whether it is a primary or a replica.
	WhyRoleUnknown
	// WhySetupFails means that what the program does to set up a connection cannot run on a standby.
	WhySetupFails
	// WhyBehind means that the replica is further behind than Options.MaxLag.
	WhyBehind
	// WhyPaused means that the replay of the replica is paused.
	WhyPaused
	// WhyCutOff means that the replica lacks log of the primary, and does not receive it.
	WhyCutOff
	// WhyDiverged means that the replica has log that the primary never had.
	WhyDiverged
	// WhySlow means that reads take far longer on the peer than on others.
	WhySlow
	// WhyLastResort means that the peer serves only if no other peer can.
	WhyLastResort
	// WhyNotFirst means that, in [ModeOrdered], another peer takes the calls.
	WhyNotFirst
	// WhyNotNamed means that the call's route names other peers.
	WhyNotNamed
	// WhyReplica means that the peer is a replica, and the call needs the primary.
	WhyReplica
	// WhyPrimary means that the peer is the primary, and the call needs a replica.
	WhyPrimary
	// WhyNotWithinLag means that the peer is not known to be within the MaxLag of the call's route.
	WhyNotWithinLag
)

var whyNames = [...]string{
	WhyNone:          "none",
	WhyUnknown:       "unknown",
	WhySuspect:       "suspect",
	WhyDown:          "down",
	WhyMisconfigured: "misconfigured",
	WhyShuttingDown:  "shutting-down",
	WhyStarting:      "starting",
	WhyDrained:       "drained",
	WhyOtherCluster:  "other-cluster",
	WhySameServer:    "same-server",
	WhyOlderTimeline: "older-timeline",
	WhyDisputed:      "disputed",
	WhyUnconfirmed:   "unconfirmed",
	WhyRoleUnknown:   "role-unknown",
	WhySetupFails:    "setup-fails",
	WhyBehind:        "behind",
	WhyPaused:        "paused",
	WhyCutOff:        "cut-off",
	WhyDiverged:      "diverged",
	WhySlow:          "slow",
	WhyLastResort:    "last-resort",
	WhyNotFirst:      "not-first",
	WhyNotNamed:      "not-named",
	WhyReplica:       "replica",
	WhyPrimary:       "primary",
	WhyNotWithinLag:  "not-within-lag",
}

// whyPhrases say it in errors, after the peer's name.
var whyPhrases = [...]string{
	WhyNone:          "up",
	WhyUnknown:       "not yet seen",
	WhySuspect:       "suspect",
	WhyDown:          "down",
	WhyMisconfigured: "misconfigured",
	WhyShuttingDown:  "shutting down",
	WhyStarting:      "starting",
	WhyDrained:       "is drained",
	WhyOtherCluster:  "is of another cluster",
	WhySameServer:    "is another name of a server",
	WhyOlderTimeline: "is of an older timeline",
	WhyDisputed:      "claims to be the primary",
	WhyUnconfirmed:   "is not confirmed yet",
	WhyRoleUnknown:   "is of unknown role",
	WhySetupFails:    "refuses the program's own set-up of a connection",
	WhyBehind:        "is behind",
	WhyPaused:        "replay is paused",
	WhyCutOff:        "is cut off from its primary",
	WhyDiverged:      "is not a replica of the primary",
	WhySlow:          "is slow",
	WhyLastResort:    "serves only where no other peer can",
	WhyNotFirst:      "is not the first that is well",
	WhyNotNamed:      "is not named by the route",
	WhyReplica:       "is a replica",
	WhyPrimary:       "is the primary",
	WhyNotWithinLag:  "is not known to be within the bound on lag",
}

// String returns the label: "none", "down", "behind", "older-timeline", ...
func (w Why) String() string { return nameOf(whyNames[:], w, "why") }

// MarshalText returns the text that String returns, or an error if the value is not one of the constants.
func (w Why) MarshalText() ([]byte, error) { return marshalName(whyNames[:], w, "why") }

// UnmarshalText is the inverse of MarshalText. Its error for an unknown text lists the known ones.
func (w *Why) UnmarshalText(text []byte) error { return unmarshalName(whyNames[:], w, "why", text) }

// phrase says it after a peer's name.
func (w Why) phrase() string { return nameOf(whyPhrases[:], w, "why") }

// idle says why a peer takes no calls; WhyNone where it is a candidate of reads or writes.
func (t *topology) idle(m *member) Why {
	if contains(t.reads, m.peer) || contains(t.writes, m.peer) {
		return WhyNone
	}
	if why, _ := t.away(m); why != WhyNone {
		return why
	}
	switch unfit := t.unfit(m); {
	case unfit != WhyNone:
		return unfit
	case m.slow:
		return WhySlow
	case m.role == RoleUnknown && t.mode == ModeReplicated:
		return WhyRoleUnknown
	case m.peer.spare:
		return WhyLastResort
	}
	return WhyUnconfirmed
}

// away says why a peer can take no call at all, and by which error.
func (t *topology) away(m *member) (Why, error) {
	switch {
	case m.foreign:
		return WhyOtherCluster, &foreignError{m.system, t.system}
	case m.health != HealthUp:
		return m.health.why(), m.cause
	case m.alias != nil:
		return WhySameServer, &sameServer{m.alias.name}
	case m.drained:
		return WhyDrained, nil
	case t.mode == ModeOrdered:
		return WhyNotFirst, nil
	}
	return WhyNone, nil
}

// unfit says what keeps a peer that is well from the calls that are for its role: its data, or that its claim to be the
// primary is not followed.
func (t *topology) unfit(m *member) Why {
	why := m.unfit()
	switch {
	case why != WhyNone || !m.claims():
		return why
	case m.timeline != 0 && m.timeline < t.timeline:
		return WhyOlderTimeline
	case contains(t.rivals, m.peer), t.split && m.peer == t.primary:
		return WhyDisputed
	}
	return WhyNone
}

// why says why one peer did not take the intent, and by which error.
func (t *topology) why(m *member, in *intent) (Why, error) {
	if in.peers != nil && !contains(in.peers, m.peer) {
		return WhyNotNamed, nil
	}
	if why, err := t.away(m); why != WhyNone {
		return why, err
	}
	equivalent := t.mode == ModeEquivalent
	switch unfit := t.unfit(m); {
	case (equivalent || t.forPrimary(in)) && m.role == RoleReplica:
		return WhyReplica, nil
	case equivalent:
		return WhyNone, nil
	case in.place == placeReplica && m.role == RolePrimary:
		return WhyPrimary, nil
	case unfit == WhySetupFails:
		return unfit, m.hostile
	case unfit != WhyNone:
		return unfit, nil
	case m.role == RolePrimary && m.peer != t.primary:
		return WhyUnconfirmed, nil
	case m.role == RoleUnknown:
		return WhyRoleUnknown, m.cause
	case m.role == RoleReplica && in.fresh.bounds():
		return WhyNotWithinLag, &boundedLag{in.fresh.max}
	}
	return WhyNone, nil
}
