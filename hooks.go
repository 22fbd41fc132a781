package multipool

import (
	"context"
	"log/slog"
	"sync/atomic"
	"time"
)

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

// PeerEvent is a change of one peer.
type PeerEvent struct {
	Peer      string
	Role      Role
	From, To  string // health: "not yet seen", "up", "suspect", "down", "misconfigured", "draining"
	FromRole  Role
	Slow      bool  // its reads take far longer than elsewhere
	Cause     error // the last fault; nil where there was none
	At        time.Time
	Discarded int64 // events that were lost before this one, because a hook was slow
}

// Hooks are told what happens. A nil func is skipped. All but Routed are called in order, by one goroutine of the
// pool's; where one is slow, up to 256 events wait, and more are discarded and counted. They may use the pool, but must
// not call its Close, which waits for them.
type Hooks struct {
	// PeerChanged is called when a peer's health or role has changed, or it has become slow or quick.
	PeerChanged func(PeerEvent)

	// Routed is called on the caller's goroutine before each attempt of each call, so it must be quick.
	Routed func(context.Context, Decision)
}

// JoinHooks returns hooks that call each of h in turn; nil ones are skipped.
func JoinHooks(h ...*Hooks) *Hooks {
	out := &Hooks{}
	for _, one := range h {
		if one == nil {
			continue
		}
		if f := one.Routed; f != nil {
			before := out.Routed
			out.Routed = func(ctx context.Context, d Decision) {
				if before != nil {
					before(ctx, d)
				}
				f(ctx, d)
			}
		}
		if f := one.PeerChanged; f != nil {
			before := out.PeerChanged
			out.PeerChanged = func(e PeerEvent) {
				if before != nil {
					before(e)
				}
				f(e)
			}
		}
	}
	return out
}

// SlogHooks returns hooks that log changes of peers: a fall as a warning, the rest as information; a suspicion, which
// most often ends in nothing, for debugging only.
func SlogHooks(l *slog.Logger) *Hooks {
	return &Hooks{PeerChanged: func(e PeerEvent) {
		level := slog.LevelInfo
		switch e.To {
		case healthDown.String(), healthMisfit.String():
			level = slog.LevelWarn
		case healthSuspect.String():
			level = slog.LevelDebug
		}
		attrs := []slog.Attr{
			slog.String("peer", e.Peer), slog.String("role", e.Role.String()),
			slog.String("from", e.From), slog.String("to", e.To),
		}
		if e.Cause != nil {
			attrs = append(attrs, slog.String("cause", e.Cause.Error()))
		}
		l.LogAttrs(context.Background(), level, "multipool: peer changed", attrs...)
	}}
}

// herald calls the hooks behind the back of whoever publishes: a hook may be slow, and may call the pool.
type herald struct {
	hooks     *Hooks
	events    chan PeerEvent
	discarded atomic.Int64
}

const heraldQueue = 256

// newHerald returns nil where there is nothing to tell.
func newHerald(h *Hooks) *herald {
	if h.PeerChanged == nil {
		return nil
	}
	return &herald{hooks: h, events: make(chan PeerEvent, heraldQueue)}
}

// tell queues what an observation has changed. It is called in the order of publication, and never blocks.
func (h *herald) tell(old, next *topology, o observation) {
	if h == nil || o.peer == nil {
		return
	}
	was, is := old.member(o.peer), next.member(o.peer)
	if was.health == is.health && was.role == is.role && was.slow == is.slow {
		return
	}
	e := PeerEvent{
		Peer: o.peer.name, Role: is.role, FromRole: was.role, From: was.health.String(), To: is.health.String(),
		Slow: is.slow, Cause: o.cause, At: time.Now(), Discarded: h.discarded.Load(),
	}
	select {
	case h.events <- e:
	default:
		h.discarded.Add(1)
	}
}

// run delivers until ctx ends.
func (h *herald) run(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case e := <-h.events:
			h.hooks.PeerChanged(e)
		}
	}
}
