package multipool

import (
	"github.com/pgmultipool/multipool/internal/pgfault"
	"github.com/pgmultipool/multipool/internal/sqltext"
)

// operation is the kind of a call.
type operation uint8

const (
	opQuery     operation = iota // Query, QueryRow: reads by their text
	opRewritten                  // the same, of a text that a pgx.QueryRewriter of the program's will replace
	opReadTx                     // a read-only transaction's begin
	opBegin                      // any other transaction's begin
	opExec
	opBatch
	opCopy
	opAcquire
	opPing
)

// exported is the operation as hooks are told it.
func (o operation) exported() Operation {
	switch o {
	case opReadTx, opBegin:
		return OperationBegin
	case opExec:
		return OperationExec
	case opBatch:
		return OperationBatch
	case opCopy:
		return OperationCopy
	case opAcquire:
		return OperationAcquire
	case opPing:
		return OperationPing
	}
	return OperationQuery
}

// reads reports whether the operation belongs on a replica where nothing else is said.
func (o operation) reads() bool { return o.hasText() || o == opReadTx }

// hasText reports whether the text of the call decides whether it reads.
func (o operation) hasText() bool { return o == opQuery || o == opRewritten }

// harmless reports whether running the operation twice has no effect on the data: BEGIN and a ping.
func (o operation) harmless() bool {
	return o == opReadTx || o == opBegin || o == opPing || o == opAcquire
}

// place is the list of the topology from which a call's peer is drawn.
type place uint8

const (
	placeReads   place = iota // a replica, the primary where none can serve
	placePrimary              // the primary
	placeReplica              // a replica and nothing else
	placeAny                  // any healthy peer
	placeNamed                // one of the named peers, by role where they differ
)

// intent is what one call wants, its route resolved: a value, made once per call.
type intent struct {
	op     operation
	place  place
	reads  bool      // the call is a read by its operation and text
	forced bool      // by an explicit route: no re-run on the primary, nothing learned
	reason Reason    // why there
	retry  Retry     // RetryInherit means RetrySafe
	peers  []*peer   // placeNamed: the candidates
	fresh  freshness // how far behind a replica of a read may be
	sql    string    // the text, where there is one: what is learned when a standby refuses it
}

// needs is what the call needs of a peer.
func (in *intent) needs() Intent {
	switch {
	case in.place == placePrimary, in.place == placeNamed && !in.reads:
		return IntentPrimary
	case in.place == placeReplica:
		return IntentReplica
	}
	return IntentRead
}

// Intent is the kind of peer that a call needed when no peer could take it. The set of values is fixed, so it suits as
// a label of metrics.
type Intent uint8

const (
	// IntentRead, the zero value, means any peer that may be read.
	IntentRead Intent = iota
	// IntentPrimary means the primary, because the call may write or its route says so. In the modes other than
	// [ModeReplicated] it means a peer that takes writes. The error matches [ErrNoPrimary].
	IntentPrimary
	// IntentReplica means a replica only, because the route says so. The error matches [ErrNoReplica].
	IntentReplica
)

var intentNames = [...]string{"read", "primary", "replica"}

// String returns "read", "primary" or "replica".
func (i Intent) String() string { return nameOf(intentNames[:], i, "intent") }

// MarshalText returns the text that String returns, or an error if the value is not one of the constants.
func (i Intent) MarshalText() ([]byte, error) { return marshalName(intentNames[:], i, "intent") }

// UnmarshalText is the inverse of MarshalText. Its error for an unknown text lists the known ones.
func (i *Intent) UnmarshalText(text []byte) error {
	return unmarshalName(intentNames[:], i, "intent", text)
}

// purpose says in an error what the call was looking for.
func (i Intent) purpose() string {
	switch i {
	case IntentPrimary:
		return "a call that needs the primary"
	case IntentReplica:
		return "a call that insists on a replica"
	}
	return "a read"
}

// kind tells a read from what may write.
func (in *intent) kind() Kind {
	if in.reads {
		return KindRead
	}
	return KindWrite
}

// decide fills in where a call goes: the route first, then the operation, then the text. It is pure: the intent was
// zero. In place, because it is on every call's way and copies would be a third of its cost.
func (in *intent) decide(op operation, sql string, n sqltext.Need, r *resolution) {
	in.op, in.sql, in.retry, in.fresh.max = op, sql, r.route.Retry, r.route.MaxLag
	in.reads = op.reads() && n != sqltext.PrimaryOnly
	switch {
	case r.explicit():
		in.explicitly(r)
	case in.reads:
		in.reason = ReasonRead
		if r.route.Target == TargetAny {
			in.place = placeAny
		}
	case op.hasText():
		in.place, in.reason = placePrimary, ReasonStatement
	default:
		in.place, in.reason = placePrimary, ReasonWrite
	}
}

// explicitly sends the call where the route says, whatever it is.
func (in *intent) explicitly(r *resolution) {
	in.forced, in.peers, in.reason = true, r.peers, ReasonRoute
	if r.model {
		in.reason = ReasonModel
	}
	switch r.route.Target {
	case TargetPrimary:
		in.place = placePrimary
	case TargetReplica:
		in.place = placeReplica
	case TargetPreferReplica:
		in.place = placeReads
	default:
		in.place = placeNamed
	}
}

// step is what follows a failed attempt.
type step uint8

const (
	stepStop      step = iota // the caller gets the error
	stepElsewhere             // another candidate
	stepPrimary               // the primary
)

// after decides what follows a failed attempt. sent says that a connection had taken the call, standby that its
// session's last word was in_hot_standby=on and that the peer has not been seen promoted since. It is pure.
func (in *intent) after(v pgfault.Verdict, sent, standby bool) step {
	switch {
	case v.Class == pgfault.Caller, v.Class == pgfault.Closed:
		return stepStop
	case !sent && (v.Class == pgfault.Application || v.Class == pgfault.Behind):
		if in.reads {
			return stepElsewhere // a hook of the program's has refused the peer; another may suit it
		}
		return stepStop
	case v.Class == pgfault.Application:
		return stepStop
	}
	if !sent {
		// Nothing was sent: any call, writes, batches and copies alike, is free to go elsewhere.
		return stepElsewhere
	}
	if in.onlyOnce() || in.retry == RetryNever {
		return stepStop // pgx marks a sent batch, and a copy's source has been read
	}
	switch v.Class {
	case pgfault.Refused:
		if in.forced || !standby || v.Outcome != pgfault.NotExecuted {
			return stepStop
		}
		return stepPrimary
	case pgfault.Behind:
		if in.forced || !standby || !in.reads {
			return stepStop
		}
		return stepPrimary
	case pgfault.Conflict, pgfault.Overload, pgfault.Server, pgfault.Starting:
		again := v.Outcome == pgfault.NotExecuted || in.op.harmless() || (in.reads && (standby || in.retry == RetryReads))
		if again {
			return stepElsewhere
		}
	}
	return stepStop
}

// mayWrite reports whether the call may change something in a session of the given kind. A read is one by its text: what
// it calls may write where writes are accepted, unless the program says that its reads do not. What it calls is looked at
// when it fails (sqltext.MayWrite).
func (in *intent) mayWrite(standby bool) bool {
	return !in.op.harmless() && (!in.reads || !standby && in.retry != RetryReads)
}

// readText is the text of a read, as the server gets it; "" of anything else.
func (in *intent) readText() string {
	if in.reads && in.op != opRewritten {
		return in.sql
	}
	return ""
}

// onlyOnce reports whether the call is never sent again once a connection has taken it, whatever became of it there.
func (in *intent) onlyOnce() bool { return in.op == opBatch || in.op == opCopy }
