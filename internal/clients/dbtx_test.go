package clients

import (
	"context"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/pgmultipool/multipool"
	"github.com/pgmultipool/multipool/internal/pgtest"
)

// DBTX is what sqlc generates for pgx/v5, with :copyfrom and :batch queries.
type DBTX interface {
	Exec(context.Context, string, ...interface{}) (pgconn.CommandTag, error)
	Query(context.Context, string, ...interface{}) (pgx.Rows, error)
	QueryRow(context.Context, string, ...interface{}) pgx.Row
	CopyFrom(ctx context.Context, tableName pgx.Identifier, columnNames []string, rowSrc pgx.CopyFromSource) (int64, error)
	SendBatch(context.Context, *pgx.Batch) pgx.BatchResults
}

// Querier is what scany's pgxscan reads through.
type Querier interface {
	Query(ctx context.Context, query string, args ...interface{}) (pgx.Rows, error)
}

var (
	_ DBTX    = (*multipool.MultiPool)(nil)
	_ DBTX    = (*multipool.Router)(nil)
	_ Querier = (*multipool.MultiPool)(nil)
	_ Querier = (*multipool.Router)(nil)
)

// Queries is written as sqlc writes: the name of the query goes to the server as a comment in front of it.
type Queries struct{ db DBTX }

func (q *Queries) WithTx(tx pgx.Tx) *Queries { return &Queries{db: tx} }

type Author struct {
	ID   int64
	Name string
}

func (q *Queries) one(ctx context.Context, sql string, args ...any) (a Author, err error) {
	err = q.db.QueryRow(ctx, sql, args...).Scan(&a.ID, &a.Name)
	return a, err
}

func (q *Queries) CreateAuthor(ctx context.Context, name string) (Author, error) {
	return q.one(ctx, "-- name: CreateAuthor :one\nINSERT INTO authors (name)\nVALUES ($1)\nRETURNING id, name\n", name)
}

func (q *Queries) GetAuthor(ctx context.Context, id int64) (Author, error) {
	return q.one(ctx, "-- name: GetAuthor :one\nSELECT id, name FROM authors\nWHERE id = $1 LIMIT 1\n", id)
}

func (q *Queries) LockAuthor(ctx context.Context, id int64) (Author, error) {
	return q.one(ctx, "-- name: LockAuthor :one\nSELECT id, name FROM authors\nWHERE id = $1 LIMIT 1\nFOR NO KEY UPDATE\n", id)
}

func (q *Queries) ReplaceAuthor(ctx context.Context, id int64, name string) (Author, error) {
	return q.one(ctx, "-- name: ReplaceAuthor :one\nWITH gone AS (\n  DELETE FROM authors WHERE id = $1 RETURNING id\n), "+
		"come AS (\n  INSERT INTO authors (name) SELECT $2 FROM gone RETURNING id, name\n)\nSELECT id, name FROM come\n", id, name)
}

func (q *Queries) RenameAuthor(ctx context.Context, id int64, name string) (int64, error) {
	tag, err := q.db.Exec(ctx, "-- name: RenameAuthor :execrows\nUPDATE authors SET name = $2\nWHERE id = $1\n", id, name)
	return tag.RowsAffected(), err
}

func (q *Queries) CopyAuthors(ctx context.Context, names ...string) (int64, error) {
	return q.db.CopyFrom(ctx, pgx.Identifier{"authors"}, []string{"name"},
		pgx.CopyFromSlice(len(names), func(i int) ([]any, error) { return []any{names[i]}, nil }))
}

func (q *Queries) BatchRename(ctx context.Context, name string, ids ...int64) error {
	b := &pgx.Batch{}
	for _, id := range ids {
		b.Queue("-- name: BatchRename :batchexec\nUPDATE authors SET name = $2 WHERE id = $1\n", id, name)
	}
	return q.db.SendBatch(ctx, b).Close()
}

// selectAll reads as scany does: it finds the fields by the columns' names.
func selectAll[T any](ctx context.Context, q Querier, query string, args ...any) ([]T, error) {
	rows, err := q.Query(ctx, query, args...)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, pgx.RowToStructByName[T])
}

// Generated code reads from the replicas and writes on the primary, and does not notice that one of them dies.
func TestGeneratedCode(t *testing.T) {
	c := pgtest.Start(t, pgtest.Options{Standbys: 2})
	pool, r := openRouted(t, c)
	ctx := within(t, 30*time.Second)
	_, err := pool.Exec(ctx, "create table authors (id bigserial primary key, name text not null)")
	require.NoError(t, err)
	q := &Queries{db: pool}
	dead, alive := c.Standbys()[0].Addr(), c.Standbys()[1].Addr()

	primary := []string{c.Primary().Addr()}
	written := func(what string) {
		t.Helper()
		assert.Equal(t, primary, r.take(), what)
		require.NoError(t, c.WaitCaughtUp(ctx))
	}
	// read is of a call that was one: it may have failed on the replica that is dead, and then was sent to the other.
	read := func(what string) {
		t.Helper()
		peers := r.take()
		require.NotEmpty(t, peers, what)
		if c.Standbys()[0].Running() {
			assert.Subset(t, []string{dead, alive}, peers, what)
			return
		}
		assert.Equal(t, alive, peers[len(peers)-1], what)
		assert.Subset(t, []string{dead}, peers[:len(peers)-1], what)
	}
	for range 2 { // with both replicas, and with one of them dead
		r.take()
		a, err := q.CreateAuthor(ctx, "Anna")
		require.NoError(t, err)
		written("insert returning")
		got, err := q.GetAuthor(ctx, a.ID)
		require.NoError(t, err)
		assert.Equal(t, a, got)
		read("select")
		n, err := q.RenameAuthor(ctx, a.ID, "Berta")
		require.NoError(t, err)
		assert.EqualValues(t, 1, n)
		written("update")
		_, err = q.LockAuthor(ctx, a.ID)
		require.NoError(t, err)
		written("select for no key update")
		b, err := q.ReplaceAuthor(ctx, a.ID, "Clara")
		require.NoError(t, err)
		written("with")
		_, err = q.GetAuthor(ctx, a.ID)
		assert.ErrorIs(t, err, pgx.ErrNoRows)
		read("select of none")
		n, err = q.CopyAuthors(ctx, "Dora", "Emma")
		require.NoError(t, err)
		assert.EqualValues(t, 2, n)
		written("copy")
		require.NoError(t, q.BatchRename(ctx, "Frieda", b.ID, b.ID+1))
		written("batch")

		const list = "-- name: ListAuthors :many\nSELECT name, id FROM authors\nWHERE id >= $1 ORDER BY id\n"
		want := []Author{{b.ID, "Frieda"}, {b.ID + 1, "Frieda"}, {b.ID + 2, "Emma"}}
		authors, err := selectAll[Author](ctx, pool, list, b.ID)
		require.NoError(t, err)
		assert.Equal(t, want, authors)
		read("scany")

		require.NoError(t, pool.RunTx(ctx, pgx.TxOptions{}, func(tx pgx.Tx) error {
			g, err := q.WithTx(tx).CreateAuthor(ctx, "Gerda")
			if err != nil {
				return err
			}
			seen, err := q.WithTx(tx).GetAuthor(ctx, g.ID)
			assert.Equal(t, g, seen, "a transaction reads what it has written")
			return err
		}))
		written("transaction")
		tx, err := pool.BeginTx(ctx, pgx.TxOptions{AccessMode: pgx.ReadOnly})
		require.NoError(t, err)
		authors, err = selectAll[Author](ctx, tx, list, b.ID+3)
		require.NoError(t, err)
		assert.Len(t, authors, 1)
		require.NoError(t, tx.Commit(ctx))
		read("transaction that only reads")

		if c.Standbys()[0].Running() {
			require.NoError(t, c.Standbys()[0].Kill())
		}
	}
}
