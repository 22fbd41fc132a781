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

// Router sends each call to one of several MultiPools, by the model that its context names ([WithModel]): to the pool
// that owns the model, and to the default where none does or no model is named. Each pool stands for a cluster of its
// own; one that is down is noticed by its own callers alone. The methods that are calls have the signatures of [MultiPool]'s,
// so what takes an interface of these takes a Router. Stat, PrimaryPool and ReplicaPool take a context too, to go by its
// model; Status, Reset and Close are of all pools. It is safe for concurrent use.
type Router struct {
	def    *MultiPool
	models map[string]*MultiPool
}

// NewRouter makes a router of a default pool and the pools that own models. The map is copied; one pool may own several
// models. Within its pool a model goes as the pool's own Options.Models says, if that has it: a pool of a router takes
// any name. An error names what is missing: a default, a pool, a name.
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

// SendBatch is [MultiPool.SendBatch] on the model's pool: a batch has one model, its context's.
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

// WaitForPrimary is [MultiPool.WaitForPrimary] on the model's pool. The other pools may have no primary.
func (r *Router) WaitForPrimary(ctx context.Context) error { return r.Pool(ctx).WaitForPrimary(ctx) }

// PrimaryPool is [MultiPool.PrimaryPool] of the model's pool.
func (r *Router) PrimaryPool(ctx context.Context) *pgxpool.Pool { return r.Pool(ctx).PrimaryPool() }

// ReplicaPool is [MultiPool.ReplicaPool] of the model's pool.
func (r *Router) ReplicaPool(ctx context.Context) *pgxpool.Pool { return r.Pool(ctx).ReplicaPool() }

// Stat is [MultiPool.Stat] of the model's pool.
func (r *Router) Stat(ctx context.Context) *pgxpool.Stat { return r.Pool(ctx).Stat() }

// RoutedPool is one pool of a [Router].
type RoutedPool struct {
	Default bool     `json:"default"` // takes what no pool owns
	Models  []string `json:"models"`  // that it owns, sorted
	Status  Status   `json:"status"`
}

// Status returns a snapshot of every pool, one after another: of the default first, and then of the others, sorted by the
// first of their models. A pool that owns several models, or is the default too, is there once.
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

// Reset resets all of the pools; see [MultiPool.Reset].
func (r *Router) Reset() {
	for _, p := range r.pools() {
		p.Reset()
	}
}

// Close closes all of the pools, one after another; see [MultiPool.Close].
func (r *Router) Close() {
	for _, p := range r.pools() {
		p.Close()
	}
}
