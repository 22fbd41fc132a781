package multipool

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

// Router sends every call to one of several MultiPools, each of which is for one cluster. A call goes to the pool that
// owns the model which its context names ([WithModel]), or to the default pool if no pool owns it or no model is named.
// If a cluster is down, only the calls to it notice.
//
// The methods that make calls have the signatures of [MultiPool]'s, so an interface of these methods accepts a Router.
// Stat, PrimaryPool and ReplicaPool take a context too, for its model. Status, Reset and Close apply to all pools. A
// Router is safe for concurrent use.
type Router struct {
	def    *MultiPool
	models map[string]*MultiPool
}

// NewRouter returns a [Router] with a default pool and the pools that own models. It copies models. One pool may own
// several models. A pool sends the calls of a model as its own Options.Models says, if that has the model. A pool of a
// Router accepts every name of a model. NewRouter returns an error if def, a pool or the name of a model is missing.
func NewRouter(def *MultiPool, models map[string]*MultiPool) (*Router, error) {
	if def == nil {
		return nil, errors.New("multipool: a router needs a default pool")
	}
	for _, name := range sortedKeys(models) {
		switch {
		case name == "":
			return nil, errors.New("multipool: a router's model has no name")
		case models[name] == nil:
			return nil, fmt.Errorf("multipool: a router's model %q has no pool", name)
		}
	}
	r := &Router{def: def, models: maps.Clone(models)}
	for _, p := range r.pools() {
		p.ofRouter.Store(true)
	}
	return r, nil
}

// pools is each of them once: the default, and the others by the first of their models.
func (r *Router) pools() []*MultiPool {
	all := []*MultiPool{r.def}
	for _, name := range sortedKeys(r.models) {
		if p := r.models[name]; !slices.Contains(all, p) {
			all = append(all, p)
		}
	}
	return all
}

// Pool returns the pool that a call under ctx goes to.
func (r *Router) Pool(ctx context.Context) *MultiPool {
	if w := wishesOf(ctx); w != nil {
		if p := r.models[w.model]; p != nil {
			return p
		}
	}
	return r.def
}

// Exec is [MultiPool.Exec] on the model's pool.
func (r *Router) Exec(ctx context.Context, sql string, arguments ...any) (pgconn.CommandTag, error) {
	return r.Pool(ctx).Exec(ctx, sql, arguments...)
}

// Query is [MultiPool.Query] on the model's pool.
func (r *Router) Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error) {
	return r.Pool(ctx).Query(ctx, sql, args...)
}

// QueryRow is [MultiPool.QueryRow] on the model's pool.
func (r *Router) QueryRow(ctx context.Context, sql string, args ...any) pgx.Row {
	return r.Pool(ctx).QueryRow(ctx, sql, args...)
}

// SendBatch is [MultiPool.SendBatch] on the model's pool. A batch has one model, that of ctx.
func (r *Router) SendBatch(ctx context.Context, b *pgx.Batch) pgx.BatchResults {
	return r.Pool(ctx).SendBatch(ctx, b)
}

// Begin is [MultiPool.Begin] on the model's pool, where the whole transaction runs.
func (r *Router) Begin(ctx context.Context) (pgx.Tx, error) { return r.Pool(ctx).Begin(ctx) }

// BeginTx is [MultiPool.BeginTx] on the model's pool, where the whole transaction runs.
func (r *Router) BeginTx(ctx context.Context, txOptions pgx.TxOptions) (pgx.Tx, error) {
	return r.Pool(ctx).BeginTx(ctx, txOptions)
}

// RunTx is [MultiPool.RunTx] on the model's pool.
func (r *Router) RunTx(ctx context.Context, txOptions pgx.TxOptions, f func(pgx.Tx) error) error {
	return r.Pool(ctx).RunTx(ctx, txOptions, f)
}

// CopyFrom is [MultiPool.CopyFrom] on the model's pool.
func (r *Router) CopyFrom(ctx context.Context, tableName pgx.Identifier, columnNames []string, rowSrc pgx.CopyFromSource) (int64, error) {
	return r.Pool(ctx).CopyFrom(ctx, tableName, columnNames, rowSrc)
}

// Acquire is [MultiPool.Acquire] on the model's pool.
func (r *Router) Acquire(ctx context.Context) (*pgxpool.Conn, error) { return r.Pool(ctx).Acquire(ctx) }

// AcquireFunc is [MultiPool.AcquireFunc] on the model's pool.
func (r *Router) AcquireFunc(ctx context.Context, f func(*pgxpool.Conn) error) error {
	return r.Pool(ctx).AcquireFunc(ctx, f)
}

// Ping is [MultiPool.Ping] on the model's pool.
func (r *Router) Ping(ctx context.Context) error { return r.Pool(ctx).Ping(ctx) }

// Explain is [MultiPool.Explain] on the model's pool.
func (r *Router) Explain(ctx context.Context, sql string) (Decision, error) {
	return r.Pool(ctx).Explain(ctx, sql)
}

// WaitForPrimary is [MultiPool.WaitForPrimary] on the model's pool. It does not wait for the other pools.
func (r *Router) WaitForPrimary(ctx context.Context) error { return r.Pool(ctx).WaitForPrimary(ctx) }

// PrimaryPool is [MultiPool.PrimaryPool] of the model's pool.
func (r *Router) PrimaryPool(ctx context.Context) *pgxpool.Pool { return r.Pool(ctx).PrimaryPool() }

// ReplicaPool is [MultiPool.ReplicaPool] of the model's pool.
func (r *Router) ReplicaPool(ctx context.Context) *pgxpool.Pool { return r.Pool(ctx).ReplicaPool() }

// Stat is [MultiPool.Stat] of the model's pool.
func (r *Router) Stat(ctx context.Context) *pgxpool.Stat { return r.Pool(ctx).Stat() }

// RoutedPool is the status of one pool of a [Router].
type RoutedPool struct {
	Default bool     `json:"default"` // takes what no pool owns
	Models  []string `json:"models"`  // that it owns, sorted
	Status  Status   `json:"status"`
}

// Status returns a snapshot of every pool, one after the other: first the default, then the others, sorted by the first
// of their models. Every pool is listed once, even if it owns several models or is the default too.
func (r *Router) Status() []RoutedPool {
	var all []RoutedPool
	for _, p := range r.pools() {
		one := RoutedPool{Default: p == r.def, Models: []string{}, Status: p.Status()}
		for _, name := range sortedKeys(r.models) {
			if r.models[name] == p {
				one.Models = append(one.Models, name)
			}
		}
		all = append(all, one)
	}
	return all
}

// Reset resets all pools; see [MultiPool.Reset].
func (r *Router) Reset() {
	for _, p := range r.pools() {
		p.Reset()
	}
}

// Close closes all pools, one after the other; see [MultiPool.Close].
func (r *Router) Close() {
	for _, p := range r.pools() {
		p.Close()
	}
}
