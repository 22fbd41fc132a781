package multipool

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgtype"
	"github.com/jackc/pgx/v5/pgxpool"
)

// program is every method of a pool, in its ways to succeed and to fail by itself.
var program = []numbered{
	{"QueryRow", func(ctx context.Context, p eitherPool) (string, error) {
		var body string
		err := p.QueryRow(ctx, "select body from items where id = $1", 42).Scan(&body)
		return body, err
	}},
	{"Exec", func(ctx context.Context, p eitherPool) (string, error) {
		tag, err := p.Exec(ctx, "insert into log values ($1)", "x")
		return tag.String(), err
	}},
	{"Begin, Commit", func(ctx context.Context, p eitherPool) (string, error) {
		return "", transact(ctx, p, pgx.TxOptions{}, pgx.Tx.Commit, "insert into log values ('in a transaction')")
	}},
	{"Query", func(ctx context.Context, p eitherPool) (string, error) {
		rows, err := p.Query(ctx, "select id from items where id <= $1 order by id", 5)
		if err != nil {
			return "", err
		}
		ids, err := pgx.CollectRows(rows, pgx.RowTo[int])
		return fmt.Sprint(ids, rows.CommandTag()), err
	}},
	{"SendBatch", func(ctx context.Context, p eitherPool) (string, error) {
		var b pgx.Batch
		b.Queue("insert into log values ('in a batch')")
		b.Queue("select body from items where id = $1", 7)
		b.Queue("select id from items where id < $1 order by id", 4)
		return readBatch(p.SendBatch(ctx, &b))
	}},
	{"Ping", func(ctx context.Context, p eitherPool) (string, error) { return "", p.Ping(ctx) }},
	{"CopyFrom", func(ctx context.Context, p eitherPool) (string, error) {
		n, err := p.CopyFrom(ctx, pgx.Identifier{"log"}, []string{"note"}, pgx.CopyFromRows([][]any{{"a"}, {"b"}}))
		return fmt.Sprint(n), err
	}},
	{"Acquire", func(ctx context.Context, p eitherPool) (string, error) {
		c, err := p.Acquire(ctx)
		if err != nil {
			return "", err
		}
		defer c.Release()
		tag, err := c.Exec(ctx, "insert into log values ('acquired')")
		return tag.String(), err
	}},
	{"Query of all columns", func(ctx context.Context, p eitherPool) (string, error) {
		rows, err := p.Query(ctx, "select * from items where id = $1", 3)
		if err != nil {
			return "", err
		}
		defer rows.Close()
		columns := len(rows.FieldDescriptions()) // before their end: after it the connection is somebody else's
		for rows.Next() {
			if _, err := rows.Values(); err != nil {
				return "", err
			}
		}
		return fmt.Sprint(columns), rows.Err()
	}},
	{"Begin, Rollback", func(ctx context.Context, p eitherPool) (string, error) {
		return "", transact(ctx, p, pgx.TxOptions{}, pgx.Tx.Rollback, "insert into log values ('never')")
	}},
	{"AcquireFunc", func(ctx context.Context, p eitherPool) (value string, err error) {
		err = p.AcquireFunc(ctx, func(c *pgxpool.Conn) error { return c.QueryRow(ctx, "select 'f'").Scan(&value) })
		return value, err
	}},
	{"BeginTx, read only", func(ctx context.Context, p eitherPool) (string, error) {
		return "", transact(ctx, p, pgx.TxOptions{AccessMode: pgx.ReadOnly}, pgx.Tx.Commit, "select count(*) from items")
	}},
	{"AcquireAllIdle", func(ctx context.Context, p eitherPool) (string, error) {
		release(p.AcquireAllIdle(ctx))
		return "", nil
	}},
	{"Exec, simple protocol", func(ctx context.Context, p eitherPool) (string, error) {
		tag, err := p.Exec(ctx, "insert into log values ($1); select 1", pgx.QueryExecModeSimpleProtocol, "simple")
		return tag.String(), err
	}},
	{"QueryRow without a row", func(ctx context.Context, p eitherPool) (string, error) {
		return "", p.QueryRow(ctx, "select id from items where id = -1").Scan(new(int))
	}},
	{"Exec that violates a constraint", func(ctx context.Context, p eitherPool) (string, error) {
		tag, err := p.Exec(ctx, "insert into keyed values (1)")
		return tag.String(), err
	}},
	{"BeginTx, serializable", func(ctx context.Context, p eitherPool) (string, error) {
		return "", transact(ctx, p, pgx.TxOptions{IsoLevel: pgx.Serializable}, pgx.Tx.Commit, "insert into log values ('serializable')")
	}},
	{"QueryRow that fails", func(ctx context.Context, p eitherPool) (string, error) {
		return "", p.QueryRow(ctx, "select 1 / ($1 - 1)", 1).Scan(new(int))
	}},
	{"Query that fails in its rows", func(ctx context.Context, p eitherPool) (string, error) {
		rows, err := p.Query(ctx, "select 1 / (3 - n) from generate_series(1, 5) n")
		if err != nil {
			return "", err
		}
		n := 0
		for rows.Next() {
			n++
		}
		return fmt.Sprint(n), rows.Err()
	}},
	{"SendBatch that fails", func(ctx context.Context, p eitherPool) (string, error) {
		var b pgx.Batch
		b.Queue("insert into log values ('undone')")
		b.Queue("select 1 / $1::int", 0)
		b.Queue("select 1")
		return readBatch(p.SendBatch(ctx, &b))
	}},
	{"CopyFrom that violates a constraint", func(ctx context.Context, p eitherPool) (string, error) {
		n, err := p.CopyFrom(ctx, pgx.Identifier{"keyed"}, []string{"id"}, pgx.CopyFromRows([][]any{{5}, {1}}))
		return fmt.Sprint(n), err
	}},
	{"QueryRow into what does not fit", func(ctx context.Context, p eitherPool) (string, error) {
		return "", p.QueryRow(ctx, "select body from items where id = 1").Scan(new(int))
	}},
	{"QueryRow into driver bytes", func(ctx context.Context, p eitherPool) (string, error) {
		return "", p.QueryRow(ctx, "select body from items where id = 1").Scan(new(pgtype.DriverBytes))
	}},
	{"Exec of nonsense", func(ctx context.Context, p eitherPool) (string, error) {
		tag, err := p.Exec(ctx, "instert into log values (1)")
		return tag.String(), err
	}},
	{"Exec with too few arguments", func(ctx context.Context, p eitherPool) (string, error) {
		tag, err := p.Exec(ctx, "insert into log values ($1 || $2)", "one")
		return tag.String(), err
	}},
	{"Exec, named arguments", func(ctx context.Context, p eitherPool) (string, error) {
		tag, err := p.Exec(ctx, "insert into log values (@note)", pgx.NamedArgs{"note": "named"})
		return tag.String(), err
	}},
	{"BeginTx of nonsense", func(ctx context.Context, p eitherPool) (string, error) {
		return "", transact(ctx, p, pgx.TxOptions{BeginQuery: "beginn"}, pgx.Tx.Commit, "select 1")
	}},
	{"Commit of what has failed", func(ctx context.Context, p eitherPool) (string, error) {
		tx, err := p.Begin(ctx)
		if err != nil {
			return "", err
		}
		if _, err := tx.Exec(ctx, "select 1 / 0"); err == nil {
			return "", errors.New("divided by zero")
		}
		return "", tx.Commit(ctx)
	}},
	{"Begin, nested", func(ctx context.Context, p eitherPool) (string, error) {
		tx, err := p.Begin(ctx)
		if err != nil {
			return "", err
		}
		defer tx.Rollback(ctx)
		inner, err := tx.Begin(ctx)
		if err != nil {
			return "", err
		}
		if _, err := inner.Exec(ctx, "insert into log values ('nested')"); err != nil {
			return "", err
		}
		return "", errors.Join(inner.Rollback(ctx), tx.Commit(ctx), tx.Commit(ctx))
	}},
	{"CopyFrom whose source fails", func(ctx context.Context, p eitherPool) (string, error) {
		source := pgx.CopyFromFunc(func() ([]any, error) { return nil, errors.New("no more") })
		n, err := p.CopyFrom(ctx, pgx.Identifier{"log"}, []string{"note"}, source)
		return fmt.Sprint(n), err
	}},
	{"AcquireFunc that fails", func(ctx context.Context, p eitherPool) (string, error) {
		return "", p.AcquireFunc(ctx, func(c *pgxpool.Conn) error {
			return cmp.Or(c.Ping(ctx), errors.New("the program's own"))
		})
	}},
	{"SendBatch, not read", func(ctx context.Context, p eitherPool) (string, error) {
		var b pgx.Batch
		b.Queue("insert into log values ('not read')")
		b.Queue("select 1")
		return "", p.SendBatch(ctx, &b).Close()
	}},
	{"Query, closed early", func(ctx context.Context, p eitherPool) (string, error) {
		rows, err := p.Query(ctx, "select repeat('x', 1000) from generate_series(1, 100)")
		if err != nil {
			return "", err
		}
		rows.Next()
		rows.Close()
		return "", rows.Err()
	}},
	{"Exec under a context that has ended", func(ctx context.Context, p eitherPool) (string, error) {
		ctx, cancel := context.WithCancel(ctx)
		cancel()
		tag, err := p.Exec(ctx, "insert into log values ('never')")
		return tag.String(), err
	}},
	{"Stat, Config", func(_ context.Context, p eitherPool) (string, error) {
		return fmt.Sprint(p.Stat().MaxConns(), p.Config().ConnConfig.User, p.Config().MaxConns), nil
	}},
	{"Reset", func(_ context.Context, p eitherPool) (string, error) {
		p.Reset()
		return "", nil
	}},
}

func transact(ctx context.Context, p eitherPool, options pgx.TxOptions, end func(pgx.Tx, context.Context) error, statement string) error {
	tx, err := p.BeginTx(ctx, options)
	if err != nil {
		return err
	}
	if _, err := tx.Exec(ctx, statement); err != nil {
		return errors.Join(err, tx.Rollback(ctx))
	}
	return end(tx, ctx)
}

func readBatch(results pgx.BatchResults) (string, error) {
	tag, errExec := results.Exec()
	var body string
	errRow := results.QueryRow().Scan(&body)
	var ids []int
	rows, errRows := results.Query()
	if errRows == nil {
		ids, errRows = pgx.CollectRows(rows, pgx.RowTo[int])
	}
	return fmt.Sprint(tag, body, ids), errors.Join(errExec, errRow, errRows, results.Close())
}

// continued are begun before the fault, and gone on with under it.
var continued = []struct {
	name  string
	begin func(context.Context, eitherPool) (func(context.Context, eitherPool) (string, error), error)
}{
	{"a transaction", func(ctx context.Context, p eitherPool) (func(context.Context, eitherPool) (string, error), error) {
		tx, err := p.Begin(ctx)
		if err != nil {
			return nil, err
		}
		_, err = tx.Exec(ctx, "insert into log values ('early')")
		return func(ctx context.Context, _ eitherPool) (string, error) {
			defer tx.Rollback(ctx)
			if _, err := tx.Exec(ctx, "insert into log values ('late')"); err != nil {
				return "", err
			}
			return "", tx.Commit(ctx)
		}, err
	}},
	{"a transaction to commit", func(ctx context.Context, p eitherPool) (func(context.Context, eitherPool) (string, error), error) {
		tx, err := p.Begin(ctx)
		return func(ctx context.Context, _ eitherPool) (string, error) { return "", tx.Commit(ctx) }, err
	}},
	{"a transaction to roll back", func(ctx context.Context, p eitherPool) (func(context.Context, eitherPool) (string, error), error) {
		tx, err := p.Begin(ctx)
		return func(ctx context.Context, _ eitherPool) (string, error) { return "", tx.Rollback(ctx) }, err
	}},
	{"a connection", func(ctx context.Context, p eitherPool) (func(context.Context, eitherPool) (string, error), error) {
		c, err := p.Acquire(ctx)
		return func(ctx context.Context, _ eitherPool) (string, error) {
			defer c.Release()
			_, errFirst := c.Exec(ctx, "insert into log values ('held')")
			return fmt.Sprint(c.Conn().IsClosed()), errors.Join(errFirst, c.Ping(ctx))
		}, err
	}},
}

// underWay wait for the gate when the fault comes.
var underWay = []numbered{
	{"QueryRow", func(ctx context.Context, p eitherPool) (string, error) {
		var one int
		err := p.QueryRow(ctx, "select 1 from (select pg_advisory_xact_lock_shared($1)) gate", differGate).Scan(&one)
		return fmt.Sprint(one), err
	}},
	{"Exec", func(ctx context.Context, p eitherPool) (string, error) {
		tag, err := p.Exec(ctx, "insert into gatelog select 'gate' from (select pg_advisory_xact_lock_shared($1)) gate", differGate)
		return tag.String(), err
	}},
	{"SendBatch", func(ctx context.Context, p eitherPool) (string, error) {
		var b pgx.Batch
		b.Queue("insert into gatelog values ('before the gate')")
		b.Queue("select pg_advisory_xact_lock_shared($1)", differGate)
		b.Queue("insert into gatelog values ('behind the gate')")
		return "", p.SendBatch(ctx, &b).Close()
	}},
	{"Query whose first rows have come", func(ctx context.Context, p eitherPool) (string, error) {
		// Two rows of more than the server's buffer are what it takes for the first to arrive.
		rows, err := p.Query(ctx, `select repeat('x', 20000), case when n = 3 then pg_advisory_xact_lock_shared($1)::text end
			from generate_series(1, 4) n`, differGate)
		if err != nil {
			return "", err
		}
		rows.Next()
		first := rows.RawValues()
		ok := len(first) == 2 && strings.HasPrefix(string(first[0]), "xxx")
		for rows.Next() {
		}
		return fmt.Sprint(ok), rows.Err()
	}},
}
