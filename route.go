package multipool

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync/atomic"
)

// Target says which peers a call may go to.
type Target uint8

const (
	// TargetInherit, the zero value, takes the Target of the model or of Options.Route. If none of them sets one, it
	// means TargetAuto.
	TargetInherit Target = iota
	// TargetAuto lets the call decide. Query and QueryRow read from a replica, or from the primary if no replica can
	// serve. Every other call goes to the primary, except the begin of a read-only transaction (see
	// [MultiPool.BeginTx]).
	TargetAuto
	// TargetPrimary sends every call to the primary.
	TargetPrimary
	// TargetPreferReplica sends every call to a replica, or to the primary if no replica can serve it.
	TargetPreferReplica
	// TargetReplica sends every call to a replica. The call fails with [ErrNoReplica] if no replica can serve it.
	TargetReplica
	// TargetAny sends reads to any healthy peer, including the primary. Writes go to the primary.
	TargetAny
)

var targetNames = [...]string{"inherit", "auto", "primary", "prefer-replica", "replica", "any"}

// String returns the name that the connection string key multipool_target takes.
func (t Target) String() string { return nameOf(targetNames[:], t, "target") }

// MarshalText returns the text that String returns, or an error if the value is not one of the constants.
func (t Target) MarshalText() ([]byte, error) { return marshalName(targetNames[:], t, "target") }

// UnmarshalText is the inverse of MarshalText. Its error for an unknown text lists the known ones.
func (t *Target) UnmarshalText(text []byte) error {
	return unmarshalName(targetNames[:], t, "target", text)
}

// Retry says which calls may be sent again after their connection failed.
//
// With every value, a call that no connection had taken goes to another peer, and nothing is sent again after a row has
// been handed out, by Next or by the Scan of a QueryRow. With every value except RetryNever, a single statement that
// certainly was not executed is sent again, and so are a BEGIN and a ping, which have no effect when repeated.
type Retry uint8

const (
	// RetryInherit, the zero value, takes the Retry of the model or of Options.Route. If none of them sets one, it
	// means RetrySafe.
	RetryInherit Retry = iota
	// RetrySafe sends a read that may have been executed again only if it failed on a standby, where it cannot have
	// written anything.
	RetrySafe
	// RetryReads sends such a read again also if it failed on a server that accepts writes. With it the program
	// declares that nothing it sends with Query and QueryRow writes. "select place_order($1)", for example, is a read
	// by its text.
	RetryReads
	// RetryNever never sends again what was handed to a connection.
	RetryNever
)

var retryNames = [...]string{"inherit", "safe", "reads", "never"}

// String returns the name that the connection string key multipool_retry takes.
func (r Retry) String() string { return nameOf(retryNames[:], r, "retry") }

// MarshalText returns the text that String returns, or an error if the value is not one of the constants.
func (r Retry) MarshalText() ([]byte, error) { return marshalName(retryNames[:], r, "retry") }

// UnmarshalText is the inverse of MarshalText. Its error for an unknown text lists the known ones.
func (r *Retry) UnmarshalText(text []byte) error {
	return unmarshalName(retryNames[:], r, "retry", text)
}

// Route says where a call may go, and whether it may be sent again. A zero field is inherited: the context's Route
// takes it from the model's, and that from Options.Route.
//
// A route is explicit if it has Peers, or a Target other than TargetInherit, TargetAuto and TargetAny. An explicit
// route wins over the statement's text, and over what the pool has learned about the text. A call with an explicit
// route is not run again on the primary if a standby refuses it: a write that a route sends to a replica fails with the
// server's own error (SQLSTATE 25006).
type Route struct {
	Target Target
	// Peers restricts the call to the peers with these names; see WithPeer. Among them the usual rules hold: a write
	// goes to the primary if Peers has it, and waits for it if it is away. If Peers has replicas only, a write goes to
	// one of them. An empty slice that is not nil allows no peer.
	Peers []string
	Retry Retry
	// MaxLag restricts reads to replicas that are known to be no further behind the primary. If there is none, the
	// primary serves the read, unless the route excludes it. In contrast to Options.MaxLag the limit is strict: no
	// other replica serves such a read. A limit in time holds at the moment of the call; a limit in bytes holds as of
	// the last health check, which is at most 1.4 s old.
	//
	// From the first use of a MaxLag on, the pool checks replicas more often: three times within MaxLag.Time, and at
	// least every 700 ms. A Time that is much shorter than a health check and the delay of the replication sends every
	// read to the primary. MaxLag is for [ModeReplicated]. In the other modes no standby may be known to be within it.
	MaxLag Lag
}

// over returns r with its zero fields taken from base.
func (r Route) over(base Route) Route {
	if r.Target == TargetInherit {
		r.Target = base.Target
	}
	if r.Peers == nil {
		r.Peers = base.Peers
	}
	if r.Retry == RetryInherit {
		r.Retry = base.Retry
	}
	if r.MaxLag == (Lag{}) {
		r.MaxLag = base.MaxLag
	}
	return r
}

// wishes is what the context functions have said, merged when the context was made: one look-up finds all of it.
type wishes struct {
	route Route
	model string

	// resolved is what the wishes mean to the pool that last asked; a context that serves two pools in turn resolves
	// again every time, which costs time and nothing else.
	resolved atomic.Pointer[resolution]
}

type wishesKey struct{}

func wishesOf(ctx context.Context) *wishes {
	w, _ := ctx.Value(wishesKey{}).(*wishes)
	return w
}

func withWishes(ctx context.Context, change func(*wishes)) context.Context {
	next := new(wishes)
	if prev := wishesOf(ctx); prev != nil {
		next.route, next.model = prev.route, prev.model
	}
	change(next)
	return context.WithValue(ctx, wishesKey{}, next)
}

// WithRoute returns a context whose calls follow r. A zero field of r keeps what ctx already says, or else what the
// model and Options.Route say.
func WithRoute(ctx context.Context, r Route) context.Context {
	r.Peers = slices.Clone(r.Peers)
	return withWishes(ctx, func(w *wishes) { w.route = r.over(w.route) })
}

// WithPrimary returns a context whose calls go to the primary. It is WithRoute with [TargetPrimary].
func WithPrimary(ctx context.Context) context.Context {
	return WithRoute(ctx, Route{Target: TargetPrimary})
}

// WithReplica returns a context whose calls go to a replica. A call fails with [ErrNoReplica] if no replica can serve
// it, and a write fails with the replica's refusal. It is WithRoute with [TargetReplica].
func WithReplica(ctx context.Context) context.Context {
	return WithRoute(ctx, Route{Target: TargetReplica})
}

// WithPreferReplica returns a context whose calls go to a replica, or to the primary if no replica can serve them. A
// write that goes to a replica fails with its refusal. It is WithRoute with [TargetPreferReplica].
func WithPreferReplica(ctx context.Context) context.Context {
	return WithRoute(ctx, Route{Target: TargetPreferReplica})
}

// WithPeer returns a context whose calls go to the named peers only. A call fails with [ErrUnknownName] if the pool
// never had one of them. If a peer was removed, or may still be found by Options.Discover, the call waits as it does
// for a server that is down. Without names WithPeer changes nothing.
func WithPeer(ctx context.Context, names ...string) context.Context {
	return WithRoute(ctx, Route{Peers: names})
}

// WithModel returns a context whose calls follow the route that Options.Models has for name. A call fails with
// [ErrUnknownName] if the pool does not have the model, unless the pool belongs to a [Router]. A route in the context
// wins over that of the model.
func WithModel(ctx context.Context, name string) context.Context {
	return withWishes(ctx, func(w *wishes) { w.model = name })
}

// resolution is what a route means to one pool: names turned into peers.
type resolution struct {
	pool    *MultiPool
	version uint64  // of the pool's list of peers
	route   Route   // merged; Target and Retry are what holds
	peers   []*peer // those of route.Peers
	model   bool    // a model says where
	err     error   // an unknown model or peer: every call under this context fails with it
}

// explicit reports whether the route overrides what the text says.
func (r *resolution) explicit() bool {
	switch r.route.Target {
	case TargetInherit, TargetAuto, TargetAny:
		return r.peers != nil
	}
	return true
}

// routeOf finds what holds for a call: one look-up in the context, and nothing else from the second call on.
func (p *MultiPool) routeOf(ctx context.Context) *resolution {
	w := wishesOf(ctx)
	if w == nil {
		return p.route.Load()
	}
	if r := w.resolved.Load(); r != nil && r.pool == p && r.version == p.version.Load() {
		return r
	}
	r := p.resolve(w)
	w.resolved.Store(r)
	return r
}

func (p *MultiPool) resolve(w *wishes) *resolution {
	m, ok := p.config.Models[w.model]
	if !ok && w.model != "" && !p.ofRouter.Load() {
		return &resolution{pool: p, version: p.version.Load(), err: unknownName("model", w.model, sortedKeys(p.config.Models))}
	}
	r := p.resolveRoute(w.route.over(m).over(p.config.Route))
	r.model = w.route.Target == TargetInherit && w.route.Peers == nil && (m.Target != TargetInherit || m.Peers != nil)
	return r
}

// resolveRoute turns the names of a merged route into peers.
func (p *MultiPool) resolveRoute(route Route) *resolution {
	r := &resolution{pool: p, version: p.version.Load(), route: route}
	if int(route.Target) >= len(targetNames) || int(route.Retry) >= len(retryNames) {
		r.err = unknownName("route", route.Target.String()+"/"+route.Retry.String(), nil)
		return r
	}
	if err := route.MaxLag.check(); err != nil {
		r.err = fmt.Errorf("multipool: Route.MaxLag: %w", err)
		return r
	}
	p.lookFor(route.MaxLag)
	for _, name := range route.Peers {
		q := p.named(name)
		switch {
		case q != nil:
			r.peers = append(r.peers, q)
		case p.config.Discover == nil && !p.knew(name):
			r.err = unknownName("peer", name, p.names())
			return r
		}
	}
	if route.Peers != nil && r.peers == nil {
		r.peers = []*peer{} // all of them have gone, or are still to be discovered
	}
	return r
}

func sortedKeys[V any](m map[string]V) []string {
	return slices.Sorted(maps.Keys(m))
}
