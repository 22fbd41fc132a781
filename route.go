package multipool

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync/atomic"
)

// Target is where a call wants to go.
type Target uint8

const (
	// TargetInherit, the zero value, leaves what holds otherwise: TargetAuto where nobody says more.
	TargetInherit Target = iota
	// TargetAuto leaves the choice to the call: Query and QueryRow read from a replica, or from the primary where no
	// replica can serve; everything else goes to the primary.
	TargetAuto
	// TargetPrimary sends every call to the primary.
	TargetPrimary
	// TargetPreferReplica sends every call to a replica, and to the primary where no replica can serve.
	TargetPreferReplica
	// TargetReplica sends every call to a replica; ErrNoReplica where none can serve.
	TargetReplica
	// TargetAny lets reads go to any healthy peer, the primary among them; what writes goes to the primary.
	TargetAny
)

var targetNames = [...]string{"inherit", "auto", "primary", "prefer-replica", "replica", "any"}

// String returns the name that the connection string key multipool_target takes.
func (t Target) String() string { return nameOf(targetNames[:], t, "target") }

// MarshalText returns the text of String; of a value that is none of the constants, an error.
func (t Target) MarshalText() ([]byte, error) { return marshalName(targetNames[:], t, "target") }

// UnmarshalText is the reverse of MarshalText. An unknown text is an error that lists the known ones.
func (t *Target) UnmarshalText(text []byte) error {
	return unmarshalName(targetNames[:], t, "target", text)
}

// Retry says which calls may be sent again after a connection failed under them. Whatever it says, a call that no
// connection had taken goes elsewhere, and nothing is sent again once a row has been handed out, by Next or by Scan of a
// QueryRow. Except under RetryNever a single statement is sent again that certainly was not executed, and so are a BEGIN
// and a ping, which do nothing twice.
type Retry uint8

const (
	// RetryInherit, the zero value, leaves what holds otherwise: RetrySafe where nobody says more.
	RetryInherit Retry = iota
	// RetrySafe sends a read that may have been executed again only if it failed on a standby, where it cannot have
	// written.
	RetrySafe
	// RetryReads sends such a read again also if it failed on a server that accepts writes. With it the program promises
	// that what it sends by Query and QueryRow does not write: "select place_order($1)" is a read by its text.
	RetryReads
	// RetryNever sends nothing again that was handed to a connection.
	RetryNever
)

var retryNames = [...]string{"inherit", "safe", "reads", "never"}

// String returns the name that the connection string key multipool_retry takes.
func (r Retry) String() string { return nameOf(retryNames[:], r, "retry") }

// MarshalText returns the text of String; of a value that is none of the constants, an error.
func (r Retry) MarshalText() ([]byte, error) { return marshalName(retryNames[:], r, "retry") }

// UnmarshalText is the reverse of MarshalText. An unknown text is an error that lists the known ones.
func (r *Retry) UnmarshalText(text []byte) error {
	return unmarshalName(retryNames[:], r, "retry", text)
}

// Route is what one call wants. A zero field inherits: from the context over the model over Options.Route. An
// explicit route (a Target other than TargetInherit, TargetAuto and TargetAny, or Peers) wins over the statement's text and over
// what was learned of it, and such a call is not run again on the primary when a standby refuses it: a write forced
// on a replica shows the server's own error (SQLSTATE 25006).
type Route struct {
	Target Target
	// Peers restricts the call to the peers of these names; see WithPeer. Within them the usual rules hold: a write goes to
	// the primary if it is among them, and waits for it while it is away, else (only replicas are named) to one of them.
	// An empty list that is not nil names nobody.
	Peers []string
	Retry Retry
	// MaxLag restricts reads to replicas that are known to be no further behind; the primary serves where none is,
	// unless the route keeps the call from it. The bound is hard: no read under it is served by a replica of which this
	// is not known, by time at the moment of the call, by bytes as of the last look, at most 1.4 s old. Replicas are
	// from then on looked at more often, three times within MaxLag.Time, at least every 700 ms; a bound on time much
	// below that of a look and the replication's own delay sends every read to the primary. It is for ModeReplicated:
	// under the others no standby may be known to be within it.
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
	// again each time, which costs time and nothing else.
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

// WithRoute returns a context whose calls go as r says. Fields that r leaves zero keep what the context, the model and
// the pool's configuration say.
func WithRoute(ctx context.Context, r Route) context.Context {
	r.Peers = slices.Clone(r.Peers)
	return withWishes(ctx, func(w *wishes) { w.route = r.over(w.route) })
}

// WithPrimary returns a context whose calls go to the primary.
func WithPrimary(ctx context.Context) context.Context {
	return WithRoute(ctx, Route{Target: TargetPrimary})
}

// WithReplica returns a context whose calls go to a replica, and fail with [ErrNoReplica] where none can serve. A write
// under it returns the replica's refusal.
func WithReplica(ctx context.Context) context.Context {
	return WithRoute(ctx, Route{Target: TargetReplica})
}

// WithPreferReplica returns a context whose calls go to a replica, and to the primary where no replica can serve. A write
// under it returns the replica's refusal.
func WithPreferReplica(ctx context.Context) context.Context {
	return WithRoute(ctx, Route{Target: TargetPreferReplica})
}

// WithPeer returns a context whose calls go to the named peers only. A name that the pool never had is an error of the
// call; for one that was removed, or that Options.Discover may find yet, the call waits as for a server that is down.
// Without names it changes nothing.
func WithPeer(ctx context.Context, names ...string) context.Context {
	return WithRoute(ctx, Route{Peers: names})
}

// WithModel returns a context whose calls go as Options.Models says of name. A model that the pool does not have is an
// error of the call, unless the pool is one of a [Router]'s. What the context says itself wins over the model.
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
