package multipool

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/pgmultipool/multipool/internal/netfault"
	"github.com/pgmultipool/multipool/internal/pgfake"
	"github.com/pgmultipool/multipool/internal/pgtest"
)

// losing makes a peer send the rows of a statement and not their end.
func losing(p *pgfake.Peer, sql string) {
	p.Handle(answering(func(s pgfake.Statement) *pgfake.Response {
		if s.Preparing || s.SQL != sql {
			return nil
		}
		return &pgfake.Response{Cut: pgfake.CutBeforeTag}
	}))
}

func TestARowWhoseEndIsLostIsReadAgain(t *testing.T) {
	for name, args := range map[string][]any{
		"extended": nil, "simple": {pgx.QueryExecModeSimpleProtocol}, "named": {pgx.NamedArgs{"unused": 1}},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, 2, nil, func(ctx context.Context, x *fakes) {
				settled()
				losing(x.replicas[0], "select 7")
				for range 10 {
					var n int
					require.NoError(t, x.pool.QueryRow(ctx, "select 7", args...).Scan(&n))
					require.Equal(t, 7, n)
				}
				assert.Positive(t, x.replicas[0].Applied("select 7"), "it was asked, and lost the end")
				assert.Positive(t, x.peer("replica2").Retries)
				assert.Zero(t, x.primary.Applied("select 7"))
				for _, q := range x.pool.peers() {
					assert.Zero(t, q.load.busy(), "every connection is back")
				}
			})
		})
	}
}

// A text that nobody knows is refused by a standby, and run on the primary: that is no retry, and spends nothing.
func TestARefusalByAStandbyIsNoRetry(t *testing.T) {
	refusing := func(x *fakes) {
		for _, r := range x.replicas {
			r.Handle(answering(func(s pgfake.Statement) *pgfake.Response {
				if !strings.HasPrefix(s.SQL, "select place_order") {
					return nil
				}
				return &pgfake.Response{Err: &pgfake.Error{Code: "25006", Message: "cannot execute INSERT in a read-only transaction"}}
			}))
		}
	}
	t.Run("it leaves a call its retries", func(t *testing.T) {
		bubble(t, 2, nil, func(ctx context.Context, x *fakes) {
			settled()
			refusing(x)
			terminated := 0
			x.primary.Handle(answering(func(s pgfake.Statement) *pgfake.Response {
				if !strings.HasPrefix(s.SQL, "select place_order") || s.Preparing || terminated == 2 {
					return nil
				}
				terminated++
				return &pgfake.Response{Err: &pgfake.Error{Severity: "FATAL", Code: "57P01",
					Message: "terminating connection due to administrator command", Routine: "ProcessInterrupts"}}
			}))
			rows, err := x.pool.Query(ctx, "select place_order($1) -- 1", 1)
			require.NoError(t, err)
			rows.Close()
			require.NoError(t, rows.Err())
			assert.Len(t, x.journal.take(), 4)
			assert.Equal(t, 1, x.primary.Applied("select place_order($1) -- 1"))
		})
	})
	t.Run("it spends no budget", func(t *testing.T) {
		bubble(t, 2, nil, func(ctx context.Context, x *fakes) {
			settled()
			refusing(x)
			for x.pool.budget.Take(time.Now(), x.pool.readsSoFar()) {
			}
			for i := range 10 {
				rows, err := x.pool.Query(ctx, fmt.Sprintf("select place_order($1) -- %d", i), 1)
				require.NoError(t, err)
				rows.Close()
				require.NoError(t, rows.Err())
			}
		})
	})
}

// One that every replica loses is sent again as often as any other, and shows the last error.
func TestARowWhoseEndIsAlwaysLost(t *testing.T) {
	bubble(t, 2, nil, func(ctx context.Context, x *fakes) {
		settled()
		for _, p := range append(x.replicas, x.primary) {
			losing(p, "select 7")
		}
		err := x.pool.QueryRow(ctx, "select 7").Scan(new(int))
		require.ErrorIs(t, err, io.ErrUnexpectedEOF)
		assert.NotErrorIs(t, err, ErrOutcomeUnknown)
		trips := x.journal.take()
		require.NotEmpty(t, trips)
		require.LessOrEqual(t, len(trips), 1+maxResent)
		for i, d := range trips {
			assert.Equal(t, i+1, d.Attempt)
		}
	})
}

func TestARowWhoseEndIsLostIsReadOnceWhereItMayNotBeReadAgain(t *testing.T) {
	bubble(t, 2, nil, func(ctx context.Context, x *fakes) {
		settled()
		for _, p := range append(x.replicas, x.primary) {
			losing(p, "select 7")
		}
		never := WithRoute(ctx, Route{Retry: RetryNever})
		require.ErrorIs(t, x.pool.QueryRow(never, "select 7").Scan(new(int)), io.ErrUnexpectedEOF)
		assert.Len(t, x.journal.take(), 1)
		require.ErrorIs(t, x.pool.QueryRow(WithPrimary(ctx), "select 7").Scan(new(int)), io.ErrUnexpectedEOF)
		assert.Len(t, x.journal.take(), 1)
	})
}

// pickyScanner is a destination whose error is the program's, whatever it is.
type pickyScanner struct{}

func (pickyScanner) Scan(any) error { return io.ErrUnexpectedEOF }

func TestAFailedScanIsNoLostConnection(t *testing.T) {
	bubble(t, 2, nil, func(ctx context.Context, x *fakes) {
		settled()
		for range 10 {
			err := x.pool.QueryRow(ctx, "select 7").Scan(pickyScanner{})
			var scan pgx.ScanArgError
			require.True(t, errors.As(err, &scan), "%v", err)
			settled()
		}
		assert.Len(t, x.journal.take(), 10)
		for _, name := range []string{"replica1", "replica2"} {
			assert.Empty(t, x.peer(name).LastFault)
		}
	})
}

// The caller has not scanned the row when its server falls: the connection is cut, as a read's before its first row.
func TestARowThatWaitsForItsCallerIsReadAgainWhenItsPeerFalls(t *testing.T) {
	bubble(t, 2, nil, func(ctx context.Context, x *fakes) {
		settled()
		var n int
		row := x.pool.QueryRow(ctx, "select * from generate_series(1, 100000)") // the end is far
		first := x.journal.take()
		x.pool.named(first[0].Peer).monitor.fall(HealthDown, errStalled)
		require.NoError(t, row.Scan(&n, nil))
		assert.Equal(t, 1, n)
		again := x.journal.take()
		require.Len(t, again, 1)
		assert.NotEqual(t, first[0].Peer, again[0].Peer)
	})
}

func TestFaultARowWithoutItsEnd(t *testing.T) {
	s, relay := relayed(t, Options{})
	ctx := testContext(t)
	for i := range 10 {
		// The tag of this statement and of no other: a look is one row, too.
		cut := relay.Cut(netfault.Cut{From: netfault.Server, Type: 'C', Match: func(m []byte) bool {
			return strings.Contains(string(m), "SELECT 3")
		}})
		s.cutRead(ctx, i, cut)
	}
}

// cutRead reads until a cut has been made.
func (s *stage) cutRead(ctx context.Context, i int, cut <-chan struct{}) {
	for {
		var n int
		require.NoError(s.t, s.pool.QueryRow(ctx, "select $1::int + n from generate_series(0, 2) n", i).Scan(&n))
		require.Equal(s.t, i, n)
		select {
		case <-cut:
			return
		default:
		}
	}
}

// What the primary has and its replica has not replayed.
func TestWhatAReplicaDoesNotKnowYetIsReadOnThePrimary(t *testing.T) {
	c := pgtest.Start(t, pgtest.Options{Standbys: 1})
	must(t, c, "create type mood as enum ('sad')", "create table people (m mood, n int)", "create domain small as int check (value < 10)")
	var log journal
	p := openPool(t, Options{Hooks: log.hooks()}, c.ConnString("pool_max_conns=4"))
	waitUp(t, p)
	ctx := testContext(t)
	require.NoError(t, c.Standbys()[0].DelayReplay(time.Hour))
	for _, read := range []struct{ ddl, sql, why string }{
		{"create table newtab (a int)", "select count(*) from newtab", "42P01"},
		{"alter table people add extra int", "select count(extra) from people", "42703"},
		{"create function one() returns int language sql as 'select 1'", "select one()", "42883"},
		{"create type color as enum ('red')", "select count('red'::color)", "42704"},
		{"alter type mood add value 'happy'", "select count(*) from people where m = 'happy'", "22P02"},
		{"create schema s2; create function s2.f() returns int language sql as 'select 1'", "select s2.f()", "3F000"},
		{"create collation mycoll (locale = 'C')", "select count('a' collate mycoll)", "42704"},
		{"create text search configuration cfg (copy = simple)", "select length(to_tsvector('cfg', 'a'))", "42704"},
		{"alter table people add primary key (n)", "select count(*) from (select m from people group by n) x", "42803"},
		{"create cast (mood as int) with inout as implicit", "select count(m::int) from people", "42846"},
		{"alter domain small drop constraint small_check", "select 11::small", "23514"},
	} {
		t.Run(read.ddl, func(t *testing.T) {
			for _, ddl := range strings.Split(read.ddl, "; ") {
				require.NoError(t, c.Primary().Exec(ctx, ddl))
			}
			_, err := c.Standbys()[0].Int(ctx, read.sql)
			var pgErr *pgconn.PgError
			require.ErrorAs(t, err, &pgErr)
			require.Equal(t, read.why, pgErr.Code)
			for range 2 {
				log.take()
				require.NoError(t, p.QueryRow(ctx, read.sql).Scan(new(int)))
				require.Equal(t, []Reason{ReasonRead, ReasonRefused}, reasonsOf(log.take()), "it is not remembered")
			}
		})
	}
}

func reasonsOf(decisions []Decision) (reasons []Reason) {
	for _, d := range decisions {
		reasons = append(reasons, d.Reason)
	}
	return reasons
}

// A plan, or a description, that is older than the table fails a statement that has done nothing.
func TestAStalePlanFailsNoRead(t *testing.T) {
	c := pgtest.Start(t, pgtest.Options{Standbys: 1})
	ctx := testContext(t)
	for _, mode := range []string{"cache_statement", "cache_describe"} {
		t.Run(mode, func(t *testing.T) {
			var log journal
			table := "stale_" + mode
			must(t, c, "create table "+table+" (a int, b int)", "insert into "+table+" values (1, 2)")
			p := openPool(t, Options{Hooks: log.hooks()}, c.ConnString("pool_max_conns=1", "default_query_exec_mode="+mode))
			waitUp(t, p)
			never := WithRoute(ctx, Route{Retry: RetryNever})
			for i, ctx := range []context.Context{never, ctx, WithPrimary(ctx)} {
				read := func() error {
					rows, _ := p.Query(ctx, "select * from "+table) // its error is in the rows, too
					_, err := pgx.CollectRows(rows, pgx.RowToMap)
					return err
				}
				require.NoError(t, read())
				must(t, c, fmt.Sprintf("alter table %s add column c%d int", table, i))
				log.take()
				if err := read(); ctx != never {
					require.NoError(t, err)
					require.Len(t, log.take(), 1, "it is sent again where it was")
				} else {
					require.Error(t, err)
				}
			}
		})
	}
}

// A statement that crashes whichever server it meets.
func TestAPoisonousReadIsSentToTwoServers(t *testing.T) {
	const poison = "select poison"
	for name, tc := range map[string]struct {
		replicas int
		route    Route
		sent     int // to replicas; the primary gets the rest of two
	}{
		"three replicas": {3, Route{}, 2},
		"two replicas":   {2, Route{}, 2},
		"one replica":    {1, Route{}, 1},
		"any":            {2, Route{Target: TargetAny, Retry: RetryReads}, 2},
		"any replica":    {3, Route{Target: TargetReplica}, 2},
	} {
		for _, crash := range []bool{false, true} { // of its session, or of all that the server has
			bubble(t, tc.replicas, nil, func(ctx context.Context, x *fakes) {
				settled()
				for _, p := range append(x.replicas, x.primary) {
					p.Handle(answering(func(s pgfake.Statement) *pgfake.Response {
						if s.Preparing || s.SQL != poison {
							return nil
						}
						if crash {
							p.CutConns()
						}
						return &pgfake.Response{Cut: pgfake.CutBeforeAnswer}
					}))
				}
				for range 10 {
					x.journal.take()
					err := x.pool.QueryRow(WithRoute(ctx, tc.route), poison).Scan(new(int))
					require.Error(t, err)
					assert.NotErrorIs(t, err, ErrNoPrimary)
					settled()
					trips := x.journal.take()
					require.Len(t, trips, 2, "%s, crash %v", name, crash)
					sent := 0
					for i, d := range trips {
						if d.Peer != "primary:5432" {
							sent++
						} else if tc.sent < 2 || tc.route.Target == TargetAny && i == 0 {
							continue
						} else {
							t.Errorf("the primary was sent it after a replica, beside another: %v", trips)
						}
					}
					if tc.route.Target != TargetAny {
						assert.Equal(t, tc.sent, sent)
					}
				}
			})
		}
	}
}

// One that meets dead servers only, as others have before it, goes on until it is served.
func TestAReadLostOnServersThatAreKnownToBeDownGoesOn(t *testing.T) {
	bubble(t, 2, nil, func(ctx context.Context, x *fakes) {
		settled()
		for _, p := range x.replicas {
			p.Handle(answering(func(s pgfake.Statement) *pgfake.Response {
				if s.Preparing || s.SQL != "select 7" {
					return nil
				}
				for _, p := range append(x.replicas, x.primary) {
					p.Delay(100 * time.Millisecond) // no probe clears a server before the read has been judged
				}
				for _, q := range x.pool.peers() {
					q.suspect(errStalled) // somebody else was first
				}
				return &pgfake.Response{Cut: pgfake.CutBeforeAnswer}
			}))
		}
		require.NoError(t, x.pool.QueryRow(ctx, "select 7").Scan(new(int)))
	})
}

// The only replica follows its primary no more: plain reads go to the primary while it has connections to spare.
func TestAReplicaThatFollowsNoMoreIsNotReadWhereThePrimaryHasRoom(t *testing.T) {
	bubble(t, 1, func(c *Options) { c.WriteReserve = 0.5 }, func(ctx context.Context, x *fakes) {
		settled()
		paused := answering(func(pgfake.Statement) *pgfake.Response { return nil })
		x.replicas[0].Handle(func(s pgfake.Statement) *pgfake.Response {
			if asksLook(s) {
				return lookAnswer(s, sight{role: RoleReplica, system: 1, position: 8192, shown: 1, paused: true})
			}
			return paused(s)
		})
		time.Sleep(20 * time.Second)
		settled()
		require.Equal(t, WhyPaused, x.peer("replica1").Unfit)
		assert.Equal(t, "primary:5432", x.read(ctx))
		assert.Equal(t, "primary:5432", x.read(WithRoute(ctx, Route{Target: TargetAny})))
		assert.Equal(t, "replica1:5432", x.read(WithPreferReplica(ctx)), "a route says where")
		var held []pgx.Tx
		for range 5 { // of ten connections half are the writes'
			tx, err := x.pool.BeginTx(ctx, pgx.TxOptions{AccessMode: pgx.ReadOnly})
			require.NoError(t, err)
			held = append(held, tx)
		}
		assert.Equal(t, "replica1:5432", x.read(ctx), "the primary has no more to spare")
		for _, tx := range held {
			require.NoError(t, tx.Rollback(ctx))
		}
		assert.Equal(t, "primary:5432", x.read(ctx))
	})
}
