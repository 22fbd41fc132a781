package multipool

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"time"
)

// Reason is why a call, or an attempt of it, goes where it goes. The set of values is fixed, so it suits as a label of
// metrics.
type Reason uint8

const (
	// ReasonNone, the zero value, means that there is no decision.
	ReasonNone Reason = iota
	// ReasonRead means that a read goes to a replica, or to any peer with TargetAny.
	ReasonRead
	// ReasonWrite means that the method goes to the primary: Exec, Begin, CopyFrom, SendBatch, Acquire or Ping.
	ReasonWrite
	// ReasonStatement means that the text of a Query or QueryRow cannot, or must not, run on a standby.
	ReasonStatement
	// ReasonRoute means that the route in the context or in Options.Route says so.
	ReasonRoute
	// ReasonModel means that the route of the model that the context names says so.
	ReasonModel
	// ReasonNoReplica means that a read goes to the primary because no replica can serve it.
	ReasonNoReplica
	// ReasonReplicasBehind means that a read goes to the primary because no replica is known to be within the MaxLag of
	// its route, or because all replicas are paused or cut off.
	ReasonReplicasBehind
	// ReasonRefused means that the statement is run again on the primary because a standby refused it.
	ReasonRefused
	// ReasonRetry means that the call is sent again, to another peer if there is one, because the attempt before
	// failed.
	ReasonRetry
	// ReasonOnePeer means that the pool has one peer.
	ReasonOnePeer
)

var reasonNames = [...]string{"none", "read", "write", "statement", "route", "model", "no-replica", "replicas-behind", "refused", "retry", "one-peer"}

// String returns the label of the value.
func (r Reason) String() string { return nameOf(reasonNames[:], r, "reason") }

// MarshalText returns the text that String returns, or an error if the value is not one of the constants.
func (r Reason) MarshalText() ([]byte, error) { return marshalName(reasonNames[:], r, "reason") }

// UnmarshalText is the inverse of MarshalText. Its error for an unknown text lists the known ones.
func (r *Reason) UnmarshalText(text []byte) error {
	return unmarshalName(reasonNames[:], r, "reason", text)
}

// Kind says whether a call is a read or a write, wherever it goes. The set of values is fixed, so it suits as a label
// of metrics.
type Kind uint8

const (
	// KindNone, the zero value, means that there is no call.
	KindNone Kind = iota
	// KindRead means a Query or QueryRow that is a read by its text, or the begin of a read-only transaction.
	KindRead
	// KindWrite means every other call, and a read after a standby has refused it as a write.
	KindWrite
)

var kindNames = [...]string{"none", "read", "write"}

// String returns the label of the value.
func (k Kind) String() string { return nameOf(kindNames[:], k, "kind") }

// MarshalText returns the text that String returns, or an error if the value is not one of the constants.
func (k Kind) MarshalText() ([]byte, error) { return marshalName(kindNames[:], k, "kind") }

// UnmarshalText is the inverse of MarshalText. Its error for an unknown text lists the known ones.
func (k *Kind) UnmarshalText(text []byte) error { return unmarshalName(kindNames[:], k, "kind", text) }

// Decision says where one attempt of a call goes, and why.
type Decision struct {
	Peer    string `json:"peer"` // the peer's name; "" if there is none
	Reason  Reason `json:"reason"`
	Attempt int    `json:"attempt"` // 1 for the first
	Kind    Kind   `json:"kind"`    // of the call, wherever it goes
}

// Operation is what a call does: a closed set, fit for a metric's label.
type Operation uint8

const (
	// OperationNone, the zero value: there is no call.
	OperationNone Operation = iota
	// OperationQuery: Query or QueryRow.
	OperationQuery
	// OperationExec: Exec.
	OperationExec
	// OperationBatch: SendBatch.
	OperationBatch
	// OperationCopy: CopyFrom.
	OperationCopy
	// OperationBegin: Begin or BeginTx, and that of every run of RunTx.
	OperationBegin
	// OperationCommit: Commit of a Tx, and that of every run of RunTx.
	OperationCommit
	// OperationAcquire: Acquire or AcquireFunc.
	OperationAcquire
	// OperationPing: Ping.
	OperationPing
)

var operationNames = [...]string{"none", "query", "exec", "batch", "copy", "begin", "commit", "acquire", "ping"}

// String returns the label.
func (o Operation) String() string { return nameOf(operationNames[:], o, "operation") }

// MarshalText returns the text of String; of a value that is none of the constants, an error.
func (o Operation) MarshalText() ([]byte, error) {
	return marshalName(operationNames[:], o, "operation")
}

// UnmarshalText is the reverse of MarshalText. An unknown text is an error that lists the known ones.
func (o *Operation) UnmarshalText(text []byte) error {
	return unmarshalName(operationNames[:], o, "operation", text)
}

// Outcome is how a call ended: a closed set, fit for a metric's label.
type Outcome uint8

const (
	// OutcomeNone, the zero value: there is no call.
	OutcomeNone Outcome = iota
	// OutcomeOK: the call had no error, or it was a QueryRow that found no row.
	OutcomeOK
	// OutcomeFailed: the statement or the program was at fault, as by a server's answer, a Scan, an unknown name or a
	// closed pool.
	OutcomeFailed
	// OutcomeUnavailable: no peer could take the call in time, or the peer that had it failed, refused the connection or
	// had no room.
	OutcomeUnavailable
	// OutcomeUnknown: the error matches ErrOutcomeUnknown. A pool of one peer returns the errors of pgxpool: there a write
	// that was lost is OutcomeUnavailable, and one that its caller's context ended is OutcomeCanceled.
	OutcomeUnknown
	// OutcomeCanceled: the caller's context ended the call. If it ended a wait for a peer, that is OutcomeUnavailable.
	OutcomeCanceled
)

var outcomeNames = [...]string{"none", "ok", "failed", "unavailable", "unknown", "canceled"}

// String returns the label.
func (o Outcome) String() string { return nameOf(outcomeNames[:], o, "outcome") }

// MarshalText returns the text of String; of a value that is none of the constants, an error.
func (o Outcome) MarshalText() ([]byte, error) { return marshalName(outcomeNames[:], o, "outcome") }

// UnmarshalText is the reverse of MarshalText. An unknown text is an error that lists the known ones.
func (o *Outcome) UnmarshalText(text []byte) error {
	return unmarshalName(outcomeNames[:], o, "outcome", text)
}

// CallEnd reports a call that has ended.
type CallEnd struct {
	Pool      string    `json:"pool"` // Options.Name
	Operation Operation `json:"operation"`

	// Decision is that of the last attempt, so that Attempt is the number of attempts. If there was none, Peer is "" and
	// Attempt is 0. A commit has the Decision of its begin, with one attempt.
	Decision

	Outcome  Outcome       `json:"outcome"`
	SQLState string        `json:"sqlstate"` // of the server's answer, if the error has one
	Duration time.Duration `json:"duration_ns"`
}

// PeerEvent reports a change of one peer.
type PeerEvent struct {
	Pool     string `json:"pool"` // Options.Name
	Peer     string `json:"peer"`
	Role     Role   `json:"role"`
	FromRole Role   `json:"from_role"`
	From     Health `json:"from"`    // HealthUnknown if the peer was added
	To       Health `json:"to"`      // HealthGone if the peer was removed
	Slow     bool   `json:"slow"`    // gets no reads because it is far slower than others
	Drained  bool   `json:"drained"` // by Drain or DrainPrimary
	Unfit    Why    `json:"unfit"`   // see PeerStatus.Unfit

	// What Slow, Drained and Unfit were before.
	WasSlow    bool `json:"was_slow"`
	WasDrained bool `json:"was_drained"`
	WasUnfit   Why  `json:"was_unfit"`

	Cause error     `json:"-"` // the fault that led to the change, or nil; in JSON its text, as "cause"
	At    time.Time `json:"at,omitzero"`
}

// MarshalJSON writes the event with its cause as text.
func (e PeerEvent) MarshalJSON() ([]byte, error) {
	type fields PeerEvent
	return json.Marshal(struct {
		fields
		Cause errorText `json:"cause,omitzero"`
	}{fields(e), errorText{e.Cause}})
}

// UnmarshalJSON is the inverse of MarshalJSON, except that Cause becomes an error of which only the text is the same.
func (e *PeerEvent) UnmarshalJSON(data []byte) error {
	type fields PeerEvent
	in := struct {
		*fields
		Cause errorText `json:"cause"`
	}{fields: (*fields)(e)}
	err := json.Unmarshal(data, &in)
	e.Cause = in.Cause.error
	return err
}

// PrimaryEvent reports a change of the peer that takes the writes, or of the peers that claim to be the primary.
type PrimaryEvent struct {
	Pool        string    `json:"pool"`                   // Options.Name
	Primary     string    `json:"primary"`                // the primary's name; "" while there is none. One that is down is the primary until it is replaced
	Previous    string    `json:"previous"`               // the primary before the event; "" if there was none
	Timeline    uint32    `json:"timeline"`               // the cluster's; 0 if unknown
	Rivals      []string  `json:"rivals,omitempty"`       // peers that claim to be the primary and get no writes
	Split       bool      `json:"split"`                  // nothing tells which peer is the primary: writes wait, and fail with ErrSplitBrain
	NextPrimary string    `json:"next_primary,omitempty"` // the peer that will take the writes once every peer that answers has been checked after its claim; "" if there is none
	Forgotten   string    `json:"forgotten,omitempty"`    // the peer that Forget was called for, or ""
	At          time.Time `json:"at,omitzero"`
}

// DiscoveryEvent reports that Options.Discover has begun to fail, or that it works again.
type DiscoveryEvent struct {
	Pool  string    `json:"pool"`  // Options.Name
	Cause error     `json:"-"`     // why its list is not used, or nil if it is used again; in JSON its text, as "cause"
	Peers int       `json:"peers"` // how many peers it named
	At    time.Time `json:"at,omitzero"`
}

// MarshalJSON writes the event with its cause as text.
func (e DiscoveryEvent) MarshalJSON() ([]byte, error) {
	type fields DiscoveryEvent
	return json.Marshal(struct {
		fields
		Cause errorText `json:"cause,omitzero"`
	}{fields(e), errorText{e.Cause}})
}

// UnmarshalJSON is the inverse of MarshalJSON, except that Cause becomes an error of which only the text is the same.
func (e *DiscoveryEvent) UnmarshalJSON(data []byte) error {
	type fields DiscoveryEvent
	in := struct {
		*fields
		Cause errorText `json:"cause"`
	}{fields: (*fields)(e)}
	err := json.Unmarshal(data, &in)
	e.Cause = in.Cause.error
	return err
}

// Hooks are functions that the pool calls when something happens. A nil function is skipped. One goroutine of the pool
// calls PeerChanged, PrimaryChanged and DiscoveryChanged, in order. While one of them is slow, up to 256 events wait;
// more are discarded and counted in Status.Discarded. Routed and Done run on the callers' goroutines.
//
// A hook may use the pool, and may close it: inside a hook, Close does not wait for the hooks. A hook that waits for a
// Close in another goroutine waits forever, since that Close waits for the hook.
type Hooks struct {
	// PeerChanged is called when the health or the role of a peer has changed, when a peer has become slow, unfit, or
	// no longer so, and when it is drained, resumed, added or removed.
	//
	// It is also called in two cases in which nothing has changed, and then Cause says what is wrong. The first is that
	// the sessions of a peer show that its Peer.Proxy should be set; it is reported once. The second is that a peer
	// with Peer.Proxy still leads to a primary that was replaced; it is reported once for every promotion.
	PeerChanged func(PeerEvent)

	// PrimaryChanged is called when another peer takes the writes, or no peer does any more; when a peer begins or
	// ceases to claim to be the primary; when it becomes unclear, or clear again, which peer is the primary; and after
	// a Forget. In [ModeOrdered] it reports the peer that takes all calls. In [ModeEquivalent] it is not called.
	PrimaryChanged func(PrimaryEvent)

	// DiscoveryChanged is called when Options.Discover fails, or names what cannot be followed, and did not before; and when it
	// is followed again. That it failed because the pool has no primary to ask, as DiscoverReplication may, is not told here.
	DiscoveryChanged func(DiscoveryEvent)

	// Routed is called before every attempt of every call, on the caller's goroutine, so it must be fast.
	Routed func(context.Context, Decision)

	// Done is called once for every call that Routed is called for, and for those that end before, when it has ended: Exec,
	// CopyFrom, Begin, Acquire and Ping when they return; Query when its rows are closed or read to their end, QueryRow when
	// Scan returns, SendBatch when its results are closed, or at once where they have failed by then. A call
	// that is sent again ends once, with its last attempt. Commit of a Tx is a call of its own, since there the outcome of a
	// transaction is known; what runs between is none, nor is a Rollback. RunTx tells the begin and the commit of every run, and
	// of a COMMIT whose answer was lost what the server has said became of it. In a pool of one peer the Tx of Begin is
	// pgxpool's, whose Commit is not told. What goes through PeerPool, PrimaryPool or ReplicaPool, or a connection that was
	// acquired, is not. It is called on the goroutine that ends the call, which holds no connection for it any more, with the
	// call's context, which may have ended; so it must be quick.
	Done func(context.Context, CallEnd)
}

// JoinHooks returns hooks that call those of every h in turn. It skips nil ones.
func JoinHooks(h ...*Hooks) *Hooks {
	out := &Hooks{}
	for _, one := range h {
		if one == nil {
			continue
		}
		out.Routed = bothOfCall(out.Routed, one.Routed)
		out.Done = bothOfCall(out.Done, one.Done)
		out.PeerChanged = both(out.PeerChanged, one.PeerChanged)
		out.PrimaryChanged = both(out.PrimaryChanged, one.PrimaryChanged)
		out.DiscoveryChanged = both(out.DiscoveryChanged, one.DiscoveryChanged)
	}
	return out
}

// both calls two functions of which either may be nil.
func both[E any](first, second func(E)) func(E) {
	switch {
	case first == nil:
		return second
	case second == nil:
		return first
	}
	return func(e E) { first(e); second(e) }
}

// bothOfCall is both for hooks that get the call's context.
func bothOfCall[E any](first, second func(context.Context, E)) func(context.Context, E) {
	switch {
	case first == nil:
		return second
	case second == nil:
		return first
	}
	return func(ctx context.Context, e E) { first(ctx, e); second(ctx, e) }
}

// SlogHooks returns hooks that log changes of peers: a fall, and a replica that is unfit to be read, as a warning, the
// rest as information; a suspicion, which most often ends in nothing, for debugging only. A new primary is information,
// none a warning, a dispute about it an error. Discovery that fails is a warning, once, and information when it works again.
// Every message says one thing, and its attributes say in which pool, and what has changed. The messages are:
//
//	multipool: peer changed
//	multipool: peer added
//	multipool: peer removed
//	multipool: peer leads to more than one server
//	multipool: peer leads to a primary that was replaced
//	multipool: primary found
//	multipool: primary changed
//	multipool: no primary
//	multipool: another server claims to be the primary
//	multipool: no other server claims to be the primary any more
//	multipool: split brain
//	multipool: what a peer had shown is forgotten
//	multipool: discovery failed
//	multipool: discovery works again
func SlogHooks(l *slog.Logger) *Hooks {
	return &Hooks{
		PeerChanged: func(e PeerEvent) {
			level, message, attrs := peerLine(e)
			l.LogAttrs(context.Background(), level, message, attrs...)
		},
		PrimaryChanged:   func(e PrimaryEvent) { logPrimary(l, e) },
		DiscoveryChanged: func(e DiscoveryEvent) { logDiscovery(l, e) },
	}
}

func logDiscovery(l *slog.Logger, e DiscoveryEvent) {
	pool := slog.String("pool", e.Pool)
	if e.Cause != nil {
		l.LogAttrs(context.Background(), slog.LevelWarn, "multipool: discovery failed", pool, slog.String("cause", e.Cause.Error()))
		return
	}
	l.LogAttrs(context.Background(), slog.LevelInfo, "multipool: discovery works again", pool, slog.Int("peers", e.Peers))
}

// peerLine is the line of an event: the peer and its role, and what has changed.
func peerLine(e PeerEvent) (level slog.Level, message string, attrs []slog.Attr) {
	attrs = []slog.Attr{slog.String("pool", e.Pool), slog.String("peer", e.Peer), slog.String("role", e.Role.String())}
	known := len(attrs)
	if e.Role != e.FromRole {
		attrs = append(attrs, slog.String("from_role", e.FromRole.String()))
	}
	if e.From != e.To && e.To != HealthGone {
		attrs = append(attrs, slog.String("from", e.From.String()), slog.String("to", e.To.String()))
	}
	if e.Slow != e.WasSlow {
		attrs = append(attrs, slog.Bool("slow", e.Slow))
	}
	if e.Drained != e.WasDrained {
		attrs = append(attrs, slog.Bool("drained", e.Drained))
	}
	if e.Unfit != e.WasUnfit {
		attrs = append(attrs, slog.String("unfit", e.Unfit.String()))
	}
	changed := len(attrs) > known
	if e.Cause != nil {
		attrs = append(attrs, slog.String("cause", e.Cause.Error()))
	}
	level, message = slog.LevelInfo, "multipool: peer changed"
	var undeclared *undeclaredProxy
	var stale *staleBehindProxy
	switch {
	case errors.As(e.Cause, &undeclared):
		return slog.LevelWarn, "multipool: peer leads to more than one server", attrs
	case errors.As(e.Cause, &stale):
		return slog.LevelWarn, "multipool: peer leads to a primary that was replaced", attrs
	case e.To == HealthGone:
		message = "multipool: peer removed"
	case !changed || e.FromRole == RoleUnknown && e.From == HealthUnknown && e.To == HealthUnknown:
		message = "multipool: peer added"
	case e.From != e.To && (e.To == HealthSuspect || e.From == HealthSuspect && e.To == HealthUp):
		level = slog.LevelDebug
	case e.From != e.To && (e.To == HealthDown || e.To == HealthMisconfigured), e.Unfit != e.WasUnfit && e.Unfit != WhyNone:
		level = slog.LevelWarn
	}
	return level, message, attrs
}

// logPrimary writes a line for everything that an event says.
func logPrimary(l *slog.Logger, e PrimaryEvent) {
	primary, timeline := slog.String("primary", e.Primary), slog.Uint64("timeline", uint64(e.Timeline))
	rivals := slog.Any("rivals", e.Rivals)
	log := func(level slog.Level, message string, attrs ...slog.Attr) {
		attrs = append([]slog.Attr{slog.String("pool", e.Pool)}, attrs...)
		if e.NextPrimary != "" {
			attrs = append(attrs, slog.String("next_primary", e.NextPrimary))
		}
		l.LogAttrs(context.Background(), level, "multipool: "+message, attrs...)
	}
	if e.Forgotten != "" {
		log(slog.LevelInfo, "what a peer had shown is forgotten", slog.String("forgotten", e.Forgotten), primary, timeline)
	}
	switch {
	case e.Primary == e.Previous:
	case e.Primary == "":
		log(slog.LevelWarn, "no primary", slog.String("previous", e.Previous), timeline)
	case e.Previous == "":
		log(slog.LevelInfo, "primary found", primary, timeline)
	default:
		log(slog.LevelInfo, "primary changed", primary, slog.String("previous", e.Previous), timeline)
	}
	switch {
	case e.Split:
		log(slog.LevelError, "split brain", primary, timeline, rivals)
	case len(e.Rivals) > 0:
		log(slog.LevelError, "another server claims to be the primary", primary, timeline, rivals)
	case e.Primary == e.Previous && e.Forgotten == "":
		log(slog.LevelInfo, "no other server claims to be the primary any more", primary, timeline)
	}
}
