package multipool

import "context"

// Reason is why a call went where it went: a closed set, fit for a metric's label.
type Reason uint8

const (
	// ReasonRead: a read, on a replica (or on any peer under TargetAny).
	ReasonRead Reason = iota
	// ReasonWrite: the kind of call goes to the primary: Exec, Begin, CopyFrom, SendBatch, Acquire, Ping.
	ReasonWrite
	// ReasonStatement: the text of a Query or QueryRow cannot, or must not, run on a standby.
	ReasonStatement
	// ReasonRoute: the context or Config.Route says so.
	ReasonRoute
	// ReasonModel: the context names a model whose route says so.
	ReasonModel
	// ReasonNoReplica: a read on the primary because no replica could serve.
	ReasonNoReplica
	// ReasonRefused: run again on the primary because a standby refused the statement.
	ReasonRefused
	// ReasonRetry: sent to another peer because the one before failed.
	ReasonRetry
	// ReasonSolo: the pool has one peer.
	ReasonSolo
)

var reasonNames = [...]string{"read", "write", "statement", "route", "model", "no-replica", "refused", "retry", "solo"}

// String returns the label.
func (r Reason) String() string { return nameOf(reasonNames[:], int(r), "reason") }

// Decision is where one attempt of a call goes, and why.
type Decision struct {
	Peer    string // the peer's name; "" if there is none
	Reason  Reason
	Attempt int // 1 for the first
}

// Hooks are told what happens. A nil func is skipped.
type Hooks struct {
	// Routed is called on the caller's goroutine before each attempt of each call, so it must be quick.
	Routed func(context.Context, Decision)
}

// JoinHooks returns hooks that call each of h in turn; nil ones are skipped.
func JoinHooks(h ...*Hooks) *Hooks {
	out := &Hooks{}
	for _, one := range h {
		if one == nil || one.Routed == nil {
			continue
		}
		if prev := out.Routed; prev != nil {
			out.Routed = func(ctx context.Context, d Decision) { prev(ctx, d); one.Routed(ctx, d) }
		} else {
			out.Routed = one.Routed
		}
	}
	return out
}
