package multipool_test

import (
	"context"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/pgmultipool/multipool/internal/pgtest"

	pgxpool "github.com/pgmultipool/multipool"
)

// store is a program's own code over pgxpool, with nothing changed but the import.
type store struct{ pool *pgxpool.Pool }

func (s *store) names(ctx context.Context) ([]string, error) {
	rows, err := s.pool.Query(ctx, "select name from people order by name")
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, pgx.RowTo[string])
}

func (s *store) add(ctx context.Context, name string) error {
	return pgx.BeginFunc(ctx, s.pool, func(tx pgx.Tx) error {
		if _, ok := tx.(*pgxpool.Tx); !ok {
			return pgx.ErrTxClosed
		}
		_, err := tx.Exec(ctx, "insert into people values ($1)", name)
		return err
	})
}

// acquires is a program's own tracer over pgxpool.
type acquires struct{ n, released int }

func (*acquires) TraceQueryStart(ctx context.Context, _ *pgx.Conn, _ pgx.TraceQueryStartData) context.Context {
	return ctx
}
func (*acquires) TraceQueryEnd(context.Context, *pgx.Conn, pgx.TraceQueryEndData) {}

func (a *acquires) TraceAcquireStart(ctx context.Context, _ *pgxpool.Pool, _ pgxpool.TraceAcquireStartData) context.Context {
	return ctx
}
func (a *acquires) TraceAcquireEnd(context.Context, *pgxpool.Pool, pgxpool.TraceAcquireEndData) {
	a.n++
}
func (a *acquires) TraceRelease(*pgxpool.Pool, pgxpool.TraceReleaseData) { a.released++ }

var (
	_ pgxpool.AcquireTracer = (*acquires)(nil)
	_ pgxpool.ReleaseTracer = (*acquires)(nil)
)

func TestSwappingTheImportIsTheWholeMigration(t *testing.T) {
	c := pgtest.Start(t, pgtest.Options{Standbys: 2, SyncApply: true})
	ctx := t.Context()
	require.NoError(t, c.Primary().Exec(ctx, "create table people (name text)"))
	config, err := pgxpool.ParseConfig(c.ConnString())
	require.NoError(t, err)
	traced := &acquires{}
	config.ConnConfig.Tracer = traced
	config.AfterConnect = func(context.Context, *pgx.Conn) error { return nil }
	pool, err := pgxpool.NewWithConfig(ctx, config)
	require.NoError(t, err)
	defer pool.Close()
	s := &store{pool}
	require.NoError(t, s.add(ctx, "ada"))
	names, err := s.names(ctx)
	require.NoError(t, err)
	require.Equal(t, []string{"ada"}, names)
	require.NoError(t, pool.AcquireFunc(ctx, func(conn *pgxpool.Conn) error { return conn.Ping(ctx) }))
	var stat *pgxpool.Stat = pool.Stat()
	require.Positive(t, stat.AcquireCount())
	require.Equal(t, 3, traced.n)
	require.Equal(t, 3, traced.released)
}
