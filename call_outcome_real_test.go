package multipool

import (
	"context"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/stretchr/testify/require"
)

// Every way to write, ended by the server while its commit is under way: what it says comes after the commit then, as it
// logs the statement's duration first. The commit is slow, so that it is met; whether it was is read from the table.
func TestAWriteThatIsStoppedInItsCommit(t *testing.T) {
	slow := map[string]string{
		"fsync": "on", "commit_delay": "40000", "commit_siblings": "0", "log_min_duration_statement": "0", "log_statement_stats": "on",
	}
	for _, how := range []string{stopsSession, stopsStatement} {
		for _, mode := range []string{"cache_statement", "simple_protocol"} {
			t.Run(how+", "+mode, func(t *testing.T) {
				t.Parallel()
				b := newWritesStage(t, slow, mode)
				for i := range ways {
					if w := &ways[i]; w.ids == 1 { // the others are alike
						b.stopInCommit(w, mode, how)
					}
				}
				v := b.settle()
				require.Empty(t, v.wrong())
				t.Logf("%d calls: %d succeeded, %d of unknown outcome (%d done), %d failed and not done", v.Appends, v.Acknowledged,
					v.Unknown, v.UnknownApplied, v.Failed)
				if mode == "simple_protocol" {
					require.Positive(t, v.UnknownApplied, "none was stopped between its commit and its end")
				}
			})
		}
	}
}

// stopInCommit makes one call and has the server stop it once, when the server has begun to write its log.
func (b *writesStage) stopInCommit(w *way, mode, how string) {
	const inserted = "select pg_current_wal_insert_lsn()::text"
	var before, now string
	require.NoError(b.t, b.admin.QueryRow(context.Background(), inserted).Scan(&before))
	done := make(chan error, 1)
	go func() { done <- b.call(w, mode, how) }()
	for stopped := false; ; {
		select {
		case <-done:
			return
		default:
		}
		require.NoError(b.t, b.admin.QueryRow(context.Background(), inserted).Scan(&now))
		if now != before && !stopped {
			stopped = b.stop(how) > 0
		}
	}
}

// What fails before its commit has not been executed, and says nothing else, under every protocol.
func TestNoMoreCautionThanProofNeeds(t *testing.T) {
	for _, mode := range execModes {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			b := newWritesStage(t, map[string]string{"log_min_duration_statement": "0", "log_statement_stats": "on"}, mode)
			p, ctx := b.pools[mode], testContext(t)
			must(t, b.cluster, "create table ordered (id bigint)",
				`create function out_of_order() returns trigger language plpgsql as $$ begin raise 'order' using errcode = '40001'; end $$`,
				`create constraint trigger late after insert on ordered deferrable initially deferred for each row execute function out_of_order()`)
			fails := func(code string, err error) {
				t.Helper()
				var answer *pgconn.PgError
				require.ErrorAs(t, err, &answer)
				require.Equal(t, code, answer.Code)
				require.NotErrorIs(t, err, ErrOutcomeUnknown)
				require.False(t, pgconn.SafeToRetry(err))
			}
			exec := func(sql string, args ...any) error {
				_, err := p.Exec(ctx, sql, args...)
				return err
			}
			// What is checked at the commit fails after the tag under the extended protocol: a deferred constraint, and as a
			// serialization failure does.
			for table, code := range map[string]string{"checked": "23514", "ordered": "40001"} {
				insert := "insert into " + table
				fails(code, exec(insert+" values ($1)", 1))
				fails(code, exec(insert+" values (1)"))
				fails(code, readAll(p.Query(ctx, insert+" values (1) returning id")))
				fails(code, scanOne(ctx, p, insert+" values ($1) returning id", 1))
				fails(code, pgx.BeginFunc(ctx, p, func(tx pgx.Tx) error {
					_, err := tx.Exec(ctx, insert+" values (1)")
					return err
				}))
				_, err := p.CopyFrom(ctx, pgx.Identifier{table}, []string{"id"}, pgx.CopyFromRows([][]any{{1}}))
				fails(code, err)
			}
			// Rows that come before the failure.
			rows, err := p.Query(ctx, "insert into appended select g from generate_series(1, 1000) g returning id / (900 - id)")
			if err == nil {
				err = readAll(rows, nil)
			}
			fails("22012", err)
			// A timeout of the statement's.
			_, err = b.admin.Exec(ctx, "alter role postgres set statement_timeout = '50ms'")
			require.NoError(t, err)
			p.Reset()
			fails("57014", exec("insert into appended select 1 from pg_sleep(10)"))
			fails("57014", exec("insert into appended select $1 from pg_sleep(10)", 1))
			_, err = b.admin.Exec(ctx, "alter role postgres reset statement_timeout")
			require.NoError(t, err)
			n, err := b.cluster.Primary().Int(ctx, "select (select count(*) from appended) + (select count(*) from checked) + (select count(*) from ordered)")
			require.NoError(t, err)
			require.Zero(t, n)
		})
	}
}
