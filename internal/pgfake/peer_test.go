package pgfake_test

import (
	"context"
	"errors"
	"io"
	"net"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgconn/ctxwatch"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"

	"github.com/pgmultipool/multipool/internal/pgfake"
)

const connString = "host=db1 port=5432 user=app dbname=app sslmode=disable connect_timeout=5"

// bubble runs f with a peer and a pool in a bubble, which ends only if neither leaves a goroutine.
func bubble(t *testing.T, o pgfake.Options, f func(t *testing.T, p *pgfake.Peer, pool *pgxpool.Pool)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		p := pgfake.New(o)
		defer p.Close()
		pool := open(t, p.Dial, nil)
		defer pool.Close()
		f(t, p, pool)
	})
}

func open(t testing.TB, dial pgconn.DialFunc, change func(*pgxpool.Config)) *pgxpool.Pool {
	t.Helper()
	cfg, err := pgxpool.ParseConfig(connString)
	require.NoError(t, err)
	cfg.ConnConfig.DialFunc = dial
	cfg.ConnConfig.LookupFunc = pgfake.Lookup
	if change != nil {
		change(cfg)
	}
	pool, err := pgxpool.NewWithConfig(context.Background(), cfg)
	require.NoError(t, err)
	return pool
}

func requireCode(t *testing.T, code string, err error) {
	t.Helper()
	var pgErr *pgconn.PgError
	require.ErrorAs(t, err, &pgErr)
	require.Equal(t, code, pgErr.Code)
}

func TestEveryQueryMode(t *testing.T) {
	for _, mode := range []pgx.QueryExecMode{
		pgx.QueryExecModeCacheStatement, pgx.QueryExecModeCacheDescribe, pgx.QueryExecModeDescribeExec,
		pgx.QueryExecModeExec, pgx.QueryExecModeSimpleProtocol,
	} {
		t.Run(mode.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := pgfake.New(pgfake.Options{})
				defer p.Close()
				pool := open(t, p.Dial, func(c *pgxpool.Config) { c.ConnConfig.DefaultQueryExecMode = mode })
				defer pool.Close()
				ctx := t.Context()

				for range 3 { // the second time from the statement cache
					var n int
					require.NoError(t, pool.QueryRow(ctx, "select 1").Scan(&n))
					require.Equal(t, 1, n)

					var s string
					require.NoError(t, pool.QueryRow(ctx, "select $1::text", "It's").Scan(&s))
					require.Equal(t, "It's", s)

					var i int64
					var b bool
					require.NoError(t, pool.QueryRow(ctx, "select $1::int8, $2::bool as b", int64(1<<40), true).Scan(&i, &b))
					require.Equal(t, int64(1<<40), i)
					require.True(t, b)

					require.NoError(t, pool.QueryRow(ctx, "select @a::text, @b::int", pgx.NamedArgs{"a": "x", "b": -7}).Scan(&s, &n))
					require.Equal(t, "x", s)
					require.Equal(t, -7, n)

					rows, err := pool.Query(ctx, "select * from generate_series(1, $1)", 1000)
					require.NoError(t, err)
					k := 0
					_, err = pgx.ForEachRow(rows, []any{&n, &s}, func() error {
						k++
						require.Equal(t, k, n)
						require.Equal(t, "payload "+strconv.Itoa(k), s)
						return nil
					})
					require.NoError(t, err)
					require.Equal(t, 1000, k)

					tag, err := pool.Exec(ctx, "insert into t values ($1, $2)", 1, "a")
					require.NoError(t, err)
					require.Equal(t, "INSERT 0 1", tag.String())
					require.NoError(t, pool.QueryRow(ctx, "update t set a = $1 returning id", 5).Scan(&n))

					_, err = pool.Exec(ctx, "create table t (a int)")
					require.NoError(t, err)
					require.NoError(t, pool.Ping(ctx))
				}
				require.EqualValues(t, 3*8+3, p.Executed())
				require.Equal(t, 3, p.Count("-- ping"))
				require.Equal(t, 1, p.Conns())
			})
		})
	}
}

func TestTransactions(t *testing.T) {
	bubble(t, pgfake.Options{}, func(t *testing.T, p *pgfake.Peer, pool *pgxpool.Pool) {
		ctx := t.Context()
		tx, err := pool.Begin(ctx)
		require.NoError(t, err)
		require.EqualValues(t, 'T', tx.Conn().PgConn().TxStatus())
		_, err = tx.Exec(ctx, "insert into t values (1)")
		require.NoError(t, err)
		inner, err := tx.Begin(ctx)
		require.NoError(t, err)
		p.FailNext(1, "23505")
		_, err = inner.Exec(ctx, "insert into t values (1)")
		requireCode(t, "23505", err)
		require.EqualValues(t, 'E', tx.Conn().PgConn().TxStatus())
		_, err = inner.Exec(ctx, "select 1")
		requireCode(t, "25P02", err)
		require.NoError(t, inner.Rollback(ctx))
		require.NoError(t, tx.Commit(ctx))

		tx, err = pool.BeginTx(ctx, pgx.TxOptions{AccessMode: pgx.ReadOnly})
		require.NoError(t, err)
		_, err = tx.Exec(ctx, "insert into t values (2)")
		requireCode(t, "25006", err)
		require.ErrorIs(t, tx.Commit(ctx), pgx.ErrTxCommitRollback)
		require.Equal(t, []string{
			"begin", "insert into t values (1)", "savepoint sp_1", "insert into t values (1)", "select 1",
			"rollback to savepoint sp_1", "commit",
			"begin read only", "insert into t values (2)", "commit",
		}, p.Statements())
		require.Equal(t, 2, p.Count("insert into t values (1)"))
		require.Equal(t, 1, p.Applied("insert into t values (1)"))
		p.ResetCounters()
		require.Empty(t, p.Statements())
		require.Zero(t, p.Count("begin"))
	})
}

func TestWhatATransactionUndoesIsNotApplied(t *testing.T) {
	bubble(t, pgfake.Options{}, func(t *testing.T, p *pgfake.Peer, pool *pgxpool.Pool) {
		const kept, undone = "insert into t values (1)", "insert into t values (2)"
		ctx := t.Context()
		ended := map[string]bool{}
		p.Handle(func(s pgfake.Statement) *pgfake.Response {
			return &pgfake.Response{Ended: func(committed bool) { ended[s.SQL] = committed }}
		})
		tx, err := pool.Begin(ctx)
		require.NoError(t, err)
		for _, sql := range []string{kept, "savepoint a", undone, "rollback to a"} {
			_, err = tx.Exec(ctx, sql)
			require.NoError(t, err)
		}
		require.Zero(t, p.Applied(kept))
		require.NoError(t, tx.Commit(ctx))
		require.Equal(t, 1, p.Applied(kept))
		require.Zero(t, p.Applied(undone))
		require.Equal(t, map[string]bool{kept: true, undone: false, "commit": true}, ended)

		tx, err = pool.Begin(ctx)
		require.NoError(t, err)
		_, err = tx.Exec(ctx, kept)
		require.NoError(t, err)
		p.CutConns()
		require.Error(t, tx.Commit(ctx))
		synctest.Wait()
		require.Equal(t, 1, p.Applied(kept))
		require.False(t, ended[kept])
	})
}

func TestAnErrorAfterTheTag(t *testing.T) {
	for name, c := range map[string]struct {
		late      pgfake.Error
		committed bool
		args      []any
		applied   int
	}{
		"simple":                            {pgfake.Error{Code: "57014"}, false, nil, 1},
		"simple, fatal":                     {pgfake.Error{Severity: "FATAL", Code: "57P01"}, false, nil, 1},
		"extended":                          {pgfake.Error{Code: "23514"}, false, []any{1}, 0},
		"extended, fatal":                   {pgfake.Error{Severity: "FATAL", Code: "57P01"}, false, []any{1}, 0},
		"extended, fatal, after its commit": {pgfake.Error{Severity: "FATAL", Code: "57P01"}, true, []any{1}, 1},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, pgfake.Options{}, func(t *testing.T, p *pgfake.Peer, pool *pgxpool.Pool) {
				sql := "insert into t values (1)"
				if c.args != nil {
					sql = "insert into t values ($1::int4)"
				}
				p.Handle(func(s pgfake.Statement) *pgfake.Response {
					if !s.Preparing && s.Simple != (c.args == nil) {
						t.Errorf("simple: %v", s.Simple)
					}
					return &pgfake.Response{Late: &c.late, LateCommitted: c.committed}
				})
				conn, err := pool.Acquire(t.Context())
				require.NoError(t, err)
				defer conn.Release()
				_, err = conn.Exec(t.Context(), sql, c.args...)
				requireCode(t, c.late.Code, err)
				require.Equal(t, c.late.Severity == "FATAL", conn.Conn().IsClosed())
				synctest.Wait()
				require.Equal(t, c.applied, p.Applied(sql))
			})
		})
	}
}

func TestBatch(t *testing.T) {
	bubble(t, pgfake.Options{}, func(t *testing.T, p *pgfake.Peer, pool *pgxpool.Pool) {
		for range 2 {
			b := &pgx.Batch{}
			var got []int
			b.Queue("select 1").QueryRow(func(row pgx.Row) error { var n int; err := row.Scan(&n); got = append(got, n); return err })
			b.Queue("insert into t values ($1)", 7)
			b.Queue("select id from generate_series(1,3)").Query(func(rows pgx.Rows) error {
				ids, err := pgx.CollectRows(rows, pgx.RowTo[int])
				got = append(got, ids...)
				return err
			})
			require.NoError(t, pool.SendBatch(t.Context(), b).Close())
			require.Equal(t, []int{1, 1, 2, 3}, got)
		}

		b := &pgx.Batch{}
		b.Queue("select 1")
		b.Queue("select 2")
		b.Queue("select 3")
		p.FailNext(1, "22012")
		requireCode(t, "22012", pool.SendBatch(t.Context(), b).Close())
		require.Zero(t, p.Count("select 2"), "what follows an error is skipped")
	})
}

func TestCopy(t *testing.T) {
	bubble(t, pgfake.Options{Columns: map[string]uint32{"name": pgfake.TextOID}},
		func(t *testing.T, p *pgfake.Peer, pool *pgxpool.Pool) {
			var rows [][]any
			for i := range 5000 {
				rows = append(rows, []any{i, "name " + strconv.Itoa(i)})
			}
			before := p.LSN()
			n, err := pool.CopyFrom(t.Context(), pgx.Identifier{"t"}, []string{"id", "name"}, pgx.CopyFromRows(rows))
			require.NoError(t, err)
			require.EqualValues(t, 5000, n)
			require.Greater(t, p.LSN(), before)

			failing := pgx.CopyFromFunc(func() ([]any, error) { return nil, errors.New("no more") })
			_, err = pool.CopyFrom(t.Context(), pgx.Identifier{"t"}, []string{"id"}, failing)
			require.ErrorContains(t, err, "no more")

			p.SetStandby(true)
			_, err = pool.CopyFrom(t.Context(), pgx.Identifier{"t"}, []string{"id", "name"}, pgx.CopyFromRows(rows))
			requireCode(t, "25006", err)
			require.NoError(t, pool.Ping(t.Context()))
			require.Equal(t, 1, p.Dials())
		})
}

func TestStandbyRefusesWrites(t *testing.T) {
	cases := []struct{ sql, code, routine, message string }{
		{"insert into t values (1)", "25006", "PreventCommandIfReadOnly", "cannot execute INSERT in a read-only transaction"},
		{"/* a */ -- b\n UPDATE t SET a = 1", "25006", "PreventCommandIfReadOnly", "cannot execute UPDATE in a read-only transaction"},
		{"create table t (a int)", "25006", "PreventCommandIfReadOnly", "cannot execute CREATE TABLE in a read-only transaction"},
		{"with x as (insert into t values (1) returning a) select a from x", "25006", "PreventCommandIfReadOnly", "cannot execute INSERT in a read-only transaction"},
		{"select a from t for no key  update", "25006", "PreventCommandIfReadOnly", "cannot execute SELECT FOR NO KEY UPDATE in a read-only transaction"},
		{"select nextval('s')", "25006", "PreventCommandIfReadOnly", "cannot execute nextval() in a read-only transaction"},
		{"listen c", "25006", "PreventCommandDuringRecovery", "cannot execute LISTEN during recovery"},
		{"begin isolation level serializable", "0A000", "GetSerializableTransactionSnapshot", "cannot use serializable mode in a hot standby"},
		{"select pg_current_wal_lsn()", "55000", "pg_current_wal_lsn", "recovery is in progress"},
	}
	bubble(t, pgfake.Options{Standby: true}, func(t *testing.T, p *pgfake.Peer, pool *pgxpool.Pool) {
		for _, c := range cases {
			_, err := pool.Exec(t.Context(), c.sql)
			requireCode(t, c.code, err)
			var pgErr *pgconn.PgError
			require.ErrorAs(t, err, &pgErr)
			require.Equal(t, c.routine, pgErr.Routine, c.sql)
			require.Equal(t, c.message, pgErr.Message)
			require.Zero(t, p.Applied(c.sql))
		}
		rows, err := pool.Query(t.Context(), "insert into t values (1) returning id")
		require.NoError(t, err, "a query is refused at its first row")
		require.False(t, rows.Next())
		requireCode(t, "25006", rows.Err())

		_, err = pool.Exec(t.Context(), "select 'insert for update'")
		require.NoError(t, err)

		p.Promote()
		for _, c := range cases {
			_, err := pool.Exec(t.Context(), c.sql)
			require.NoError(t, err, c.sql)
			require.Equal(t, 1, p.Applied(c.sql), c.sql)
		}
	})
}

func TestStateOfThePeer(t *testing.T) {
	bubble(t, pgfake.Options{Standby: true, Timeline: 3, LSN: 0x1_0500_0028}, func(t *testing.T, p *pgfake.Peer, pool *pgxpool.Pool) {
		const look = `select pg_catalog.pg_is_in_recovery(), pg_catalog.pg_last_wal_replay_lsn()::text,
			(select system_identifier from pg_control_system()), (select timeline_id from pg_control_checkpoint()) AS tli`
		var standby bool
		var lsn *string
		var id, tli int64
		require.NoError(t, pool.QueryRow(t.Context(), look).Scan(&standby, &lsn, &id, &tli))
		require.True(t, standby)
		require.Equal(t, "1/5000028", *lsn)
		require.EqualValues(t, pgfake.DefaultSystemID, id)
		require.EqualValues(t, 3, tli)

		p.Promote()
		p.SetSystemID(42)
		require.NoError(t, pool.QueryRow(t.Context(), look).Scan(&standby, &lsn, &id, &tli))
		require.False(t, standby)
		require.Nil(t, lsn)
		require.EqualValues(t, 42, id)
		require.EqualValues(t, 4, tli)

		var file string
		require.NoError(t, pool.QueryRow(t.Context(), "select pg_walfile_name(pg_current_wal_lsn())").Scan(&file))
		require.Equal(t, "000000040000000100000005", file)

		before := p.LSN()
		_, err := pool.Exec(t.Context(), "insert into t values (1)")
		require.NoError(t, err)
		var after any
		require.NoError(t, pool.QueryRow(t.Context(), "select pg_current_wal_insert_lsn()").Scan(&after))
		require.Greater(t, p.LSN(), before)
	})
}

func TestTargetSessionAttrs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := pgfake.Network{"db1:5432": pgfake.New(pgfake.Options{Standby: true}), "db2:5432": pgfake.New(pgfake.Options{})}
		defer n.Close()
		for _, attrs := range []string{"read-write", "primary"} {
			cfg, err := pgx.ParseConfig("postgres://app@db1:5432,db2:5432/app?sslmode=disable&target_session_attrs=" + attrs)
			require.NoError(t, err)
			cfg.DialFunc, cfg.LookupFunc = n.Dial, n.Lookup
			conn, err := pgx.ConnectConfig(t.Context(), cfg)
			require.NoError(t, err)
			require.Equal(t, "db2:5432", conn.PgConn().Conn().RemoteAddr().String())
			require.NoError(t, conn.Close(t.Context()))
		}
		_, err := n.Dial(t.Context(), "tcp", "db3:5432")
		require.ErrorIs(t, err, syscall.ECONNREFUSED)
	})
}

func TestRoleIsReportedWithTheNextStatement(t *testing.T) {
	bubble(t, pgfake.Options{Standby: true}, func(t *testing.T, p *pgfake.Peer, pool *pgxpool.Pool) {
		conn, err := pool.Acquire(t.Context())
		require.NoError(t, err)
		defer conn.Release()
		role := func() string { return conn.Conn().PgConn().ParameterStatus("in_hot_standby") }
		require.Equal(t, "on", role())
		p.SetStandby(false)
		synctest.Wait()
		require.Equal(t, "on", role())
		require.NoError(t, conn.Ping(t.Context()))
		require.Equal(t, "off", role())
	})
	bubble(t, pgfake.Options{Standby: true, Params: map[string]string{"in_hot_standby": ""}},
		func(t *testing.T, p *pgfake.Peer, pool *pgxpool.Pool) {
			conn, err := pool.Acquire(t.Context())
			require.NoError(t, err)
			defer conn.Release()
			p.SetStandby(false)
			require.NoError(t, conn.Ping(t.Context()))
			require.Empty(t, conn.Conn().PgConn().ParameterStatus("in_hot_standby"))
		})
}

func TestHang(t *testing.T) {
	bubble(t, pgfake.Options{}, func(t *testing.T, p *pgfake.Peer, pool *pgxpool.Pool) {
		require.NoError(t, pool.Ping(t.Context()))
		p.Hang()
		began := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		_, err := pool.Exec(ctx, "insert into t values (1)")
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.Equal(t, 5*time.Second, time.Since(began))
		require.Equal(t, 1, p.InFlight())
		require.EqualValues(t, 1, p.Executed())

		ctx, cancel = context.WithTimeout(t.Context(), 3*time.Second)
		defer cancel()
		require.ErrorIs(t, pool.Ping(ctx), context.DeadlineExceeded, "a new connection is not greeted either")

		time.Sleep(time.Minute) // pgx has given up on both
		p.Thaw()
		synctest.Wait()
		require.Zero(t, p.InFlight())
		require.Zero(t, p.Conns())
		require.Equal(t, 1, p.Applied("insert into t values (1)"), "the client has gone, its statement has not")
		require.NoError(t, pool.Ping(t.Context()))
	})
}

func TestThawExecutesWhatWasSent(t *testing.T) {
	bubble(t, pgfake.Options{}, func(t *testing.T, p *pgfake.Peer, pool *pgxpool.Pool) {
		ctx := t.Context()
		_, err := pool.Exec(ctx, "insert into t values (1)")
		require.NoError(t, err)

		p.Hang()
		var wg sync.WaitGroup
		wg.Go(func() {
			_, err := pool.Exec(ctx, "insert into t values (1)")
			require.NoError(t, err)
		})
		synctest.Wait()
		require.Equal(t, 1, p.InFlight())
		time.Sleep(time.Hour)
		p.Thaw()
		wg.Wait()
		require.Equal(t, 2, p.Applied("insert into t values (1)"))

	})
}

func TestHandlerHangEndsByCancelRequest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := pgfake.New(pgfake.Options{Handler: func(s pgfake.Statement) *pgfake.Response {
			return &pgfake.Response{Hang: s.SQL == "select pg_sleep(100)"}
		}})
		defer p.Close()
		pool := open(t, p.Dial, func(c *pgxpool.Config) {
			c.ConnConfig.BuildContextWatcherHandler = func(conn *pgconn.PgConn) ctxwatch.Handler {
				return &pgconn.CancelRequestContextWatcherHandler{Conn: conn, DeadlineDelay: time.Second}
			}
		})
		defer pool.Close()
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		_, err := pool.Exec(ctx, "select pg_sleep(100)")
		requireCode(t, "57014", err)
		require.Equal(t, 1, p.Cancels())
		require.NoError(t, pool.Ping(t.Context()))
		require.Equal(t, 1, p.Conns())
	})
}

func TestDelay(t *testing.T) {
	bubble(t, pgfake.Options{}, func(t *testing.T, p *pgfake.Peer, pool *pgxpool.Pool) {
		require.NoError(t, pool.Ping(t.Context()))
		p.Delay(90 * time.Millisecond)
		began := time.Now()
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() { require.NoError(t, pool.Ping(t.Context())) })
		}
		synctest.Wait()
		require.GreaterOrEqual(t, p.InFlight(), 1)
		wg.Wait()
		require.LessOrEqual(t, time.Since(began), 400*time.Millisecond)
		require.GreaterOrEqual(t, time.Since(began), 90*time.Millisecond)
	})
}

func TestDieAndRevive(t *testing.T) {
	bubble(t, pgfake.Options{}, func(t *testing.T, p *pgfake.Peer, pool *pgxpool.Pool) {
		require.NoError(t, pool.Ping(t.Context()))
		p.Die()
		_, err := pool.Exec(t.Context(), "select $1::int", 1)
		require.ErrorIs(t, err, io.ErrUnexpectedEOF)
		_, err = pool.Exec(t.Context(), "select 1")
		require.ErrorIs(t, err, syscall.ECONNREFUSED)
		require.Zero(t, p.Conns())
		p.Revive()
		require.NoError(t, pool.Ping(t.Context()))
	})
}

// What was sent together with the statement that the server died of is not executed, and the statement neither where its
// Handler had not returned.
func TestNothingTakesEffectAfterTheEnd(t *testing.T) {
	bubble(t, pgfake.Options{}, func(t *testing.T, p *pgfake.Peer, pool *pgxpool.Pool) {
		p.Handle(func(s pgfake.Statement) *pgfake.Response {
			if s.SQL == "insert into t values (1)" && !s.Preparing {
				p.Die()
			}
			return nil
		})
		before := p.LSN()
		_, err := pool.Exec(t.Context(), "insert into t values (1); insert into t values (2)", pgx.QueryExecModeSimpleProtocol)
		require.Error(t, err)
		synctest.Wait()
		require.Equal(t, []string{"insert into t values (1)"}, p.Statements())
		require.Zero(t, p.Applied("insert into t values (1)"))
		require.Equal(t, before, p.LSN())
	})
}

// Whoever has read an answer, or the end, may ask at once.
func TestWhatAClientCanKnowOfIsSo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := pgfake.New(pgfake.Options{})
		defer p.Close()
		conn, err := p.Dial(t.Context(), "tcp", "db1:5432")
		require.NoError(t, err)
		_, err = conn.Write(message(0, "\x04\xd2\x16\x2e\x00\x00\x00\x01\x00\x00\x00\x00")) // CancelRequest
		require.NoError(t, err)
		_, err = conn.Read(make([]byte, 1))
		require.ErrorIs(t, err, io.EOF)
		require.Equal(t, 1, p.Cancels())
		require.Zero(t, p.Conns())

		conn, err = p.Dial(t.Context(), "tcp", "db1:5432")
		require.NoError(t, err)
		for _, sent := range []string{string(message(0, "\x00\x03\x00\x00user\x00app\x00\x00")), string(message('Q', "select 1\x00"))} {
			_, err = conn.Write([]byte(sent))
			require.NoError(t, err)
			_, err = conn.Read(make([]byte, 4096))
			require.NoError(t, err)
			require.Zero(t, p.InFlight())
		}
	})
}

func TestDieInMidStatement(t *testing.T) {
	bubble(t, pgfake.Options{}, func(t *testing.T, p *pgfake.Peer, pool *pgxpool.Pool) {
		require.NoError(t, pool.Ping(t.Context()))
		p.Delay(time.Second)
		time.AfterFunc(time.Second/2, p.Die)
		began := time.Now()
		_, err := pool.Exec(t.Context(), "insert into t values (1)", pgx.QueryExecModeSimpleProtocol)
		require.Error(t, err)
		require.Equal(t, time.Second/2, time.Since(began))
		require.Equal(t, 1, p.Applied("insert into t values (1)"))
	})
}

func TestShutdown(t *testing.T) {
	bubble(t, pgfake.Options{}, func(t *testing.T, p *pgfake.Peer, pool *pgxpool.Pool) {
		require.NoError(t, pool.Ping(t.Context()))
		p.Shutdown()
		_, err := pool.Exec(t.Context(), "select 1")
		requireCode(t, "57P01", err)
		require.ErrorIs(t, pool.Ping(t.Context()), syscall.ECONNREFUSED)
		p.Revive()
		p.StartupError("57P03")
		requireCode(t, "57P03", pool.Ping(t.Context()))
		p.StartupError("")
		require.NoError(t, pool.Ping(t.Context()))
	})
}

func TestRefuse(t *testing.T) {
	bubble(t, pgfake.Options{}, func(t *testing.T, p *pgfake.Peer, pool *pgxpool.Pool) {
		p.Refuse(nil)
		require.ErrorIs(t, pool.Ping(t.Context()), syscall.ECONNREFUSED)
		own := errors.New("no route")
		p.Refuse(own)
		require.ErrorIs(t, pool.Ping(t.Context()), own)
		p.Accept()
		require.NoError(t, pool.Ping(t.Context()))
		require.Equal(t, 3, p.Dials())
	})
}

func TestIsolate(t *testing.T) {
	bubble(t, pgfake.Options{}, func(t *testing.T, p *pgfake.Peer, pool *pgxpool.Pool) {
		p.Isolate()
		began := time.Now()
		require.ErrorIs(t, pool.Ping(t.Context()), context.DeadlineExceeded)
		require.Equal(t, 5*time.Second, time.Since(began), "the connect timeout")
		time.AfterFunc(time.Second, p.Thaw)
		require.NoError(t, pool.Ping(t.Context()))
		require.Equal(t, 6*time.Second, time.Since(began))
	})
}

func TestCutAndResetConns(t *testing.T) {
	bubble(t, pgfake.Options{}, func(t *testing.T, p *pgfake.Peer, pool *pgxpool.Pool) {
		require.NoError(t, pool.Ping(t.Context()))
		p.CutConns()
		require.ErrorIs(t, pool.Ping(t.Context()), io.ErrUnexpectedEOF)
		require.NoError(t, pool.Ping(t.Context()))
		p.ResetConns()
		require.ErrorIs(t, pool.Ping(t.Context()), syscall.EPIPE)
		require.NoError(t, pool.Ping(t.Context()))
	})
}

func TestPassword(t *testing.T) {
	bubble(t, pgfake.Options{Password: "secret"}, func(t *testing.T, p *pgfake.Peer, pool *pgxpool.Pool) {
		requireCode(t, "28P01", pool.Ping(t.Context()))
		good := open(t, p.Dial, func(c *pgxpool.Config) { c.ConnConfig.Password = "secret" })
		defer good.Close()
		require.NoError(t, good.Ping(t.Context()))
	})
}

func TestFatalFailure(t *testing.T) {
	bubble(t, pgfake.Options{}, func(t *testing.T, p *pgfake.Peer, pool *pgxpool.Pool) {
		p.FailNextWith(1, pgfake.Error{Severity: "FATAL", Code: "57P02", Message: "gone"})
		requireCode(t, "57P02", pool.Ping(t.Context()))
		require.NoError(t, pool.Ping(t.Context()))
		require.Equal(t, 2, p.Dials())
	})
}

func TestHandler(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 6000, time.UTC)
	var calls atomic.Int64
	h := func(s pgfake.Statement) *pgfake.Response {
		switch s.SQL {
		case "select everything":
			if !s.Preparing {
				calls.Add(1)
			}
			return &pgfake.Response{
				Columns: []pgfake.Column{
					{"a", pgfake.Int2OID}, {"b", 0}, {"c", pgfake.Int8OID}, {"d", pgfake.BoolOID}, {"e", pgfake.TextOID},
					{"f", pgfake.Float8OID}, {"g", pgfake.TimestamptzOID}, {"h", pgfake.ByteaOID}, {"i", pgfake.TextOID},
				},
				Rows: [][]any{{1, int32(2), uint64(3), true, "x", 1.5, now, []byte{0, 255}, nil}},
			}
		case "select from missing":
			return &pgfake.Response{Err: &pgfake.Error{Code: "42P01", Message: "no such table"}}
		case "select rows then fail":
			return &pgfake.Response{
				Columns: []pgfake.Column{{Name: "n"}}, Rows: [][]any{{1}, {2}}, Err: &pgfake.Error{Code: "40001"},
			}
		case "select $1::int as args":
			if !s.Preparing {
				return &pgfake.Response{Columns: []pgfake.Column{{"n", pgfake.TextOID}}, Rows: [][]any{{string(s.Args[0]) + "!"}}}
			}
			return &pgfake.Response{Columns: []pgfake.Column{{"n", pgfake.TextOID}}}
		case "select cut rows":
			return &pgfake.Response{Columns: []pgfake.Column{{Name: "n"}}, Rows: [][]any{{1}, {2}}, Cut: pgfake.CutBeforeTag}
		case "insert before":
			return &pgfake.Response{Cut: pgfake.CutBeforeExecute}
		case "insert after":
			return &pgfake.Response{Cut: pgfake.CutBeforeAnswer, Delay: time.Second}
		case "insert answered":
			return &pgfake.Response{Cut: pgfake.CutAfterAnswer}
		}
		return nil
	}
	for _, mode := range []pgx.QueryExecMode{pgx.QueryExecModeCacheStatement, pgx.QueryExecModeExec, pgx.QueryExecModeSimpleProtocol} {
		bubble(t, pgfake.Options{Handler: h}, func(t *testing.T, p *pgfake.Peer, pool *pgxpool.Pool) {
			ctx := t.Context()
			calls.Store(0)
			var a, b, c int
			var d bool
			var e string
			var f float64
			var g time.Time
			var bytes []byte
			var null *string
			require.NoError(t, pool.QueryRow(ctx, "select everything", mode).Scan(&a, &b, &c, &d, &e, &f, &g, &bytes, &null))
			require.Equal(t, []any{1, 2, 3, true, "x", 1.5, []byte{0, 255}}, []any{a, b, c, d, e, f, bytes})
			require.True(t, now.Equal(g))
			require.Nil(t, null)
			require.EqualValues(t, 1, calls.Load())

			_, err := pool.Exec(ctx, "select from missing", mode)
			requireCode(t, "42P01", err)

			rows, err := pool.Query(ctx, "select rows then fail", mode)
			require.NoError(t, err)
			ns, err := pgx.CollectRows(rows, func(r pgx.CollectableRow) (n int, err error) { return n, r.Scan(&n) })
			requireCode(t, "40001", err)
			require.Empty(t, ns)

			if mode == pgx.QueryExecModeCacheStatement {
				require.NoError(t, pool.QueryRow(ctx, "select $1::int as args", 12).Scan(&e))
				require.Equal(t, "12!", e)
			}

			rows, err = pool.Query(ctx, "select cut rows", mode)
			require.NoError(t, err)
			k := 0
			for rows.Next() {
				k++
			}
			require.Equal(t, 2, k)
			require.Error(t, rows.Err())

			for sql, applied := range map[string]int{"insert before": 0, "insert after": 1} {
				_, err = pool.Exec(ctx, sql, mode)
				require.Error(t, err, sql)
				require.Equal(t, applied, p.Applied(sql))
				require.Equal(t, 1, p.Count(sql))
			}
			_, err = pool.Exec(ctx, "insert answered", mode)
			require.NoError(t, err)
			synctest.Wait()
			require.Zero(t, p.Conns())
		})
	}
}

func TestCloseEndsEverything(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := pgfake.New(pgfake.Options{})
		p.Delay(time.Hour)
		conn, err := p.Dial(t.Context(), "tcp", "db1:5432")
		require.NoError(t, err)
		pool := open(t, p.Dial, nil)
		var wg sync.WaitGroup
		wg.Go(func() { require.Error(t, pool.Ping(context.Background())) })
		synctest.Wait()
		p.Close()
		p.Close()
		wg.Wait()
		pool.Close()
		_, err = conn.Read(make([]byte, 1))
		require.ErrorIs(t, err, io.EOF)
		_, err = p.Dial(t.Context(), "tcp", "db1:5432")
		require.ErrorIs(t, err, syscall.ECONNREFUSED)
		require.Error(t, p.Serve(closedListener(t)))
	})
}

func TestCloseOfAPeerThatHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := pgfake.New(pgfake.Options{})
		pool := open(t, p.Dial, nil)
		defer pool.Close()
		p.Delay(time.Second)
		var wg sync.WaitGroup
		wg.Go(func() { require.Error(t, pool.Ping(context.Background())) })
		synctest.Wait()
		p.Isolate()
		wg.Go(func() { require.Error(t, pool.Ping(context.Background())) })
		time.Sleep(2 * time.Second) // the answer is ready, and held back
		p.Close()
		wg.Wait()
	})
}

func closedListener(t *testing.T) net.Listener {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	require.NoError(t, l.Close())
	return l
}

func TestConnIsLikeASocket(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := pgfake.New(pgfake.Options{})
		defer p.Close()
		conn, err := p.Dial(t.Context(), "tcp", "db1:5432")
		require.NoError(t, err)
		poll := conn.(interface {
			Poll() (readable, hungUp bool)
		}).Poll
		readable, hungUp := poll()
		require.False(t, readable || hungUp)

		b := make([]byte, 1)
		require.NoError(t, conn.SetReadDeadline(time.Now().Add(time.Second)))
		_, err = conn.Read(b)
		var netErr net.Error
		require.ErrorAs(t, err, &netErr)
		require.True(t, netErr.Timeout())
		require.NoError(t, conn.SetDeadline(time.Time{}))

		_, err = conn.Write([]byte{0, 0, 0, 8, 4, 210, 22, 47}) // SSLRequest
		require.NoError(t, err)
		_, err = conn.Read(b)
		require.NoError(t, err)
		require.Equal(t, "N", string(b))

		p.CutConns()
		readable, hungUp = poll()
		require.True(t, readable && hungUp)
		_, err = conn.Write(b)
		require.NoError(t, err)
		_, err = conn.Write(b)
		require.ErrorIs(t, err, syscall.EPIPE)
		_, err = conn.Read(b)
		require.ErrorIs(t, err, io.EOF)
		require.NoError(t, conn.Close())
		_, err = conn.Read(b)
		require.ErrorIs(t, err, net.ErrClosed)
		require.ErrorIs(t, conn.Close(), net.ErrClosed)

		conn, err = p.Dial(t.Context(), "tcp", "db1:5432")
		require.NoError(t, err)
		p.Hang()
		_, err = conn.Write(b)
		require.NoError(t, err)
		p.Die()
		_, err = conn.Read(b)
		require.ErrorIs(t, err, syscall.ECONNRESET, "a process that dies with unread input")
		require.NoError(t, conn.Close())
	})
}

func TestServe(t *testing.T) {
	p := pgfake.New(pgfake.Options{})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	served := make(chan error, 1)
	go func() { served <- p.Serve(l) }()
	conn, err := pgx.Connect(t.Context(), "postgres://app@"+l.Addr().String()+"/app?sslmode=prefer")
	require.NoError(t, err)
	rows, _ := conn.Query(t.Context(), "select id from generate_series(1,1000)")
	ids, err := pgx.CollectRows(rows, pgx.RowTo[int])
	require.NoError(t, err)
	require.Len(t, ids, 1000)
	p.Close()
	require.NoError(t, <-served)
	require.Error(t, conn.Ping(t.Context()))
	require.NoError(t, conn.Close(t.Context()))
}

// What a server reports at the start of a session depends on its version.
func TestReportedParameters(t *testing.T) {
	always := []string{
		"DateStyle", "IntervalStyle", "TimeZone", "application_name", "client_encoding", "default_transaction_read_only", "in_hot_standby",
		"integer_datetimes", "is_superuser", "server_encoding", "server_version", "session_authorization", "standard_conforming_strings",
	}
	for version := 14; version <= 19; version++ {
		want := slices.Clone(always)
		if version >= 16 {
			want = append(want, "scram_iterations")
		}
		if version >= 18 {
			want = append(want, "search_path")
		}
		slices.Sort(want)
		bubble(t, pgfake.Options{Version: version, Params: map[string]string{"application_name": "named"}}, func(t *testing.T, p *pgfake.Peer, pool *pgxpool.Pool) {
			conn, err := pool.Acquire(t.Context())
			require.NoError(t, err)
			defer conn.Release()
			var got []string
			for _, name := range append(slices.Clone(always), "scram_iterations", "search_path") {
				if conn.Conn().PgConn().ParameterStatus(name) != "" {
					got = append(got, name)
				}
			}
			slices.Sort(got)
			require.Equal(t, want, got, "version %d", version)
			require.Equal(t, strconv.Itoa(version)+".0", conn.Conn().PgConn().ParameterStatus("server_version"))
		})
	}
}
