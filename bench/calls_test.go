package bench

import (
	"context"
	"fmt"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// pool is what the calls need of both pools.
type pool interface {
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
	QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
	Exec(ctx context.Context, sql string, args ...any) (pgconn.CommandTag, error)
	Begin(ctx context.Context) (pgx.Tx, error)
	SendBatch(ctx context.Context, b *pgx.Batch) pgx.BatchResults
}

// call is one kind of call, with the statements that programs send most.
type call struct {
	name  string
	reads bool // goes to a standby
	rows  int
	do    func(context.Context, pool) error
}

const (
	selectOne  = "select id from account where id = $1"
	selectMany = "select id from generate_series(1, $1::int) id"
	insertOne  = "insert into entry (account, note) values ($1, $2)"
)

var calls = []call{
	{"QueryRow", true, 1, func(ctx context.Context, p pool) error {
		var id int32
		return p.QueryRow(ctx, selectOne, 1).Scan(&id)
	}},
	query(1),
	query(100),
	query(10_000),
	{"Exec", false, 0, func(ctx context.Context, p pool) error {
		_, err := p.Exec(ctx, insertOne, 1, "me")
		return err
	}},
	{"Begin-Commit", false, 0, func(ctx context.Context, p pool) error {
		tx, err := p.Begin(ctx)
		if err != nil {
			return err
		}
		return tx.Commit(ctx)
	}},
	{"SendBatch", false, 0, func(ctx context.Context, p pool) error {
		var b pgx.Batch
		b.Queue(insertOne, 1, "me")
		b.Queue(insertOne, 2, "you")
		return p.SendBatch(ctx, &b).Close()
	}},
}

func query(n int) call {
	return call{fmt.Sprintf("Query-%d", n), true, n, func(ctx context.Context, p pool) error {
		rows, err := p.Query(ctx, selectMany, n)
		if err != nil {
			return err
		}
		defer rows.Close()
		var id int32
		got := 0
		for rows.Next() {
			if err := rows.Scan(&id); err != nil {
				return err
			}
			got++
		}
		if err := rows.Err(); err != nil {
			return err
		}
		if got != n {
			return fmt.Errorf("%d rows instead of %d", got, n)
		}
		return nil
	}}
}

// with makes the callers of one side. Each has a context of its own, as every request of a program has: all calls of
// one cancellable context share a lock.
func (c call) with(p pool, n int, contextOf func() context.Context) []caller {
	callers := make([]caller, n)
	for i := range callers {
		ctx := contextOf()
		callers[i] = func() error { return c.do(ctx, p) }
	}
	return callers
}
