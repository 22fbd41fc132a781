package multipool

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/pgmultipool/multipool/internal/netfault"
	"github.com/pgmultipool/multipool/internal/pgfake"
	"github.com/pgmultipool/multipool/internal/pgfault"
	"github.com/pgmultipool/multipool/internal/pgtest"
)

func TestARunIsRepeatedOnlyWhereItIsCertainlyNotCommitted(t *testing.T) {
	t.Parallel()
	fatal := func(code, routine string) error { return serverError("FATAL", code, routine, "") }
	serverError := func(code string) error {
		return fmt.Errorf("f: %w", serverError("ERROR", code, "", ""))
	}
	tagged := pgfault.Ending{Simple: true, Tagged: true}
	done, cancel := context.WithCancel(context.Background())
	cancel()
	for _, tc := range []struct {
		name string
		ctx  context.Context
		end  runEnd
		want runStep
	}{
		{"f's own error", nil, runEnd{err: errors.New("no")}, runStop},
		{"f's own error though the connection is lost", nil, runEnd{err: errors.New("no"), lost: true}, runStop},
		{"a constraint", nil, runEnd{err: serverError("23505")}, runStop},
		{"a deferred constraint", nil, runEnd{err: serverError("23505"), committing: true}, runStop},
		{"a serialization failure", nil, runEnd{err: serverError("40001")}, runAgain},
		{"... at COMMIT", nil, runEnd{err: serverError("40001"), committing: true}, runAgain},
		{"a deadlock", nil, runEnd{err: serverError("40P01")}, runAgain},
		{"a recovery conflict", nil, runEnd{err: serverError("40001"), standby: true}, runOnPrimary},
		{"a refusal by a standby", nil, runEnd{err: serverError("25006"), standby: true}, runAgain},
		{"... of a transaction that asked to be read-only", nil, runEnd{err: serverError("25006"), standby: true, readOnly: true}, runStop},
		{"a refusal by a server that is none", nil, runEnd{err: serverError("25006")}, runStop},
		{"a swallowed error", nil, runEnd{err: pgx.ErrTxCommitRollback, committing: true}, runStop},
		{"f ended the transaction", nil, runEnd{err: pgx.ErrTxClosed}, runStop},
		{"lost before COMMIT", nil, runEnd{err: io.ErrUnexpectedEOF, lost: true}, runAgain},
		{"lost before COMMIT, as COMMIT finds", nil, runEnd{err: pgconn.ErrConnClosed, lost: true}, runAgain},
		{"lost in COMMIT", nil, runEnd{err: io.ErrUnexpectedEOF, committing: true}, runUnknown},
		{"terminated in COMMIT, before it was done", nil, runEnd{err: fatal("57P01", "ProcessInterrupts"), committing: true, commit: pgfault.Ending{Simple: true, Lost: true}}, runAgain},
		{"... after it", nil, runEnd{err: fatal("57P01", "ProcessInterrupts"), committing: true, commit: tagged}, runUnknown},
		{"cancelled in COMMIT, before it was done", nil, runEnd{err: serverError("57014"), committing: true, commit: pgfault.Ending{Simple: true}}, runStop},
		{"... after it", nil, runEnd{err: serverError("57014"), committing: true, commit: tagged}, runUnknown},
		{"terminated in a CommitQuery that may be anything", nil, runEnd{err: fatal("57P01", "ProcessInterrupts"), committing: true, commit: pgfault.Ending{Simple: true, Lost: true, Batch: true}}, runUnknown},
		{"given up in COMMIT without the server's word", nil, runEnd{err: errors.New("unexpected message"), committing: true, commit: pgfault.Ending{Lost: true}}, runUnknown},
		{"ended in COMMIT for want of memory", nil, runEnd{err: fatal("53200", "MemoryContextAlloc"), committing: true, commit: pgfault.Ending{Lost: true}}, runUnknown},
		{"an error in COMMIT for want of space", nil, runEnd{err: serverError("53100"), committing: true}, runStop},
		{"the same, and then the connection is lost", nil, runEnd{err: serverError("53100"), committing: true, commit: pgfault.Ending{Lost: true}}, runUnknown},
		{"f's own deadline", nil, runEnd{err: context.DeadlineExceeded, lost: true}, runStop},
		{"the caller has gone", done, runEnd{err: context.Canceled, lost: true}, runStop},
		{"the caller has gone in COMMIT", done, runEnd{err: io.ErrUnexpectedEOF, committing: true}, runUnknown},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if tc.ctx == nil {
				tc.ctx = context.Background()
			}
			require.Equal(t, tc.want, tc.end.next(tc.ctx))
		})
	}
}

func TestAnAnswerCountsOnlyWhereItsNumberCannotHaveBeenGivenOutAgain(t *testing.T) {
	t.Parallel()
	r := receipt{redo: "0/100"}
	require.Equal(t, statusCommitted, r.judge("committed", "0/100"))
	require.Equal(t, statusUnknown, r.judge("committed", "0/200"))
	require.Equal(t, statusAborted, r.judge("aborted", "0/100"))
	require.Equal(t, statusAborted, r.judge("aborted", "0/200"))
	require.Equal(t, statusInProgress, r.judge("in progress", "0/200"))
	require.Equal(t, statusUnknown, r.judge("", "0/100"))
}

// behindRelay is a cluster whose primary stands behind a relay.
func behindRelay(t *testing.T, o pgtest.Options, params string) (*pgtest.Cluster, *MultiPool, *netfault.Relay) {
	t.Helper()
	return configBehindRelay(t, Options{}, o, params)
}

func configBehindRelay(t *testing.T, config Options, o pgtest.Options, params string) (*pgtest.Cluster, *MultiPool, *netfault.Relay) {
	t.Helper()
	c := pgtest.Start(t, o)
	must(t, c, "create table ledger (id bigint)", "create table counter (n int)", "insert into counter values (0)",
		"create role app login", "grant all on ledger, counter to app")
	relay, err := netfault.Listen(c.Primary().Addr())
	require.NoError(t, err)
	t.Cleanup(func() { _ = relay.Close() })
	hosts := relay.Addr()
	for _, s := range c.Standbys() {
		hosts += "," + s.Addr()
	}
	p := openPool(t, config, fmt.Sprintf("postgres://app@%s/postgres?sslmode=disable&pool_max_conns=20&%s", hosts, params))
	if !p.solo {
		waitUp(t, p)
	}
	return c, p, relay
}

func insertEntry(ctx context.Context, id int64, runs *atomic.Int64) func(pgx.Tx) error {
	return func(tx pgx.Tx) error {
		if runs != nil {
			runs.Add(1)
		}
		_, err := tx.Exec(ctx, "insert into ledger values ($1)", id)
		return err
	}
}

func TestRunTxRunsAgainAfterSerializationFailuresAndDeadlocks(t *testing.T) {
	t.Parallel()
	c, p, _ := behindRelay(t, pgtest.Options{Standbys: 1}, "")
	ctx := testContext(t)
	var runs atomic.Int64
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			for range 10 {
				err := p.RunTx(ctx, pgx.TxOptions{IsoLevel: pgx.RepeatableRead}, func(tx pgx.Tx) error {
					runs.Add(1)
					var n int
					if err := tx.QueryRow(ctx, "select n from counter").Scan(&n); err != nil {
						return err
					}
					_, err := tx.Exec(ctx, "update counter set n = $1", n+1)
					if err != nil {
						return fmt.Errorf("update: %w", err)
					}
					return nil
				})
				for err != nil { // ten runs were not enough among so many
					err = p.RunTx(ctx, pgx.TxOptions{}, func(tx pgx.Tx) error { _, err := tx.Exec(ctx, "update counter set n = n + 1"); return err })
				}
			}
		})
	}
	all.Wait()
	n, err := c.Primary().Int(ctx, "select n from counter")
	require.NoError(t, err)
	require.EqualValues(t, 80, n)
	require.Greater(t, runs.Load(), int64(80), "some stood in each other's way")

	must(t, c, "insert into ledger values (1), (2)", "create table deadlock as select id, 0 as n from ledger", "grant all on deadlock to app")
	runs.Store(0)
	meet := make(chan struct{}, 2)
	for _, order := range [][]int{{1, 2}, {2, 1}} {
		all.Go(func() {
			assert.NoError(t, p.RunTx(ctx, pgx.TxOptions{}, func(tx pgx.Tx) error {
				first := runs.Add(1) <= 2
				for i, id := range order {
					if _, err := tx.Exec(ctx, "update deadlock set n = n + 1 where id = $1", id); err != nil {
						return err
					}
					if i == 0 && first {
						meet <- struct{}{}
						for len(meet) < 2 {
							time.Sleep(time.Millisecond)
						}
					}
				}
				return nil
			}))
		})
	}
	all.Wait()
	require.GreaterOrEqual(t, runs.Load(), int64(3), "one of the two ran again, and may have met the other once more")
	n, err = c.Primary().Int(ctx, "select sum(n) from deadlock")
	require.NoError(t, err)
	require.EqualValues(t, 4, n)
}

func isCommit(msg []byte) bool { return bytes.Contains(bytes.ToUpper(msg), []byte("COMMIT")) }

// A COMMIT that was cut off is asked about: done, RunTx succeeds and f ran once; not done, f runs again.
func TestRunTxFindsOutWhatBecameOfACommit(t *testing.T) {
	t.Parallel()
	for _, standbys := range []int{1, 0} {
		c, p, relay := behindRelay(t, pgtest.Options{Standbys: standbys}, "")
		ctx := testContext(t)
		for name, tc := range map[string]struct {
			cut  netfault.Cut
			runs int64
		}{
			"the answer is lost":        {netfault.Cut{From: netfault.Server, Type: 'C', Match: isCommit}, 1},
			"the answer is lost by RST": {netfault.Cut{From: netfault.Server, Type: 'C', Match: isCommit, RST: true}, 1},
			"the request is lost":       {netfault.Cut{From: netfault.Client, Match: isCommit}, 2},
			"a statement is lost":       {netfault.Cut{From: netfault.Server, Type: 'C'}, 2},
		} {
			for id := range int64(5) {
				require.NoError(t, c.Primary().Exec(ctx, "truncate ledger"))
				fired := relay.Cut(tc.cut)
				var runs atomic.Int64
				require.NoError(t, p.RunTx(ctx, pgx.TxOptions{}, insertEntry(ctx, id, &runs)), name)
				<-fired
				n, err := c.Primary().Int(ctx, "select count(*) from ledger where id = $1", id)
				require.NoError(t, err)
				require.EqualValues(t, 1, n, name)
				require.LessOrEqual(t, runs.Load(), tc.runs+1, name)
				if tc.runs == 1 {
					require.EqualValues(t, 1, runs.Load(), name)
				}
			}
		}
	}
}

// Connections are cut at random, under load: everything is done once, and nobody is left in doubt.
func TestRunTxDoesEverythingOnceWhateverIsCut(t *testing.T) {
	t.Parallel()
	c, p, relay := behindRelay(t, pgtest.Options{Standbys: 1}, "")
	const callers, each = 10, 40
	relay.CutProbability(0.01, 7)
	var all sync.WaitGroup
	var runs, gaveUp atomic.Int64
	for i := range int64(callers) {
		all.Go(func() {
			for k := range int64(each) {
				ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
				if err := p.RunTx(ctx, pgx.TxOptions{}, insertEntry(ctx, 1+i*each+k, &runs)); err != nil {
					gaveUp.Add(1) // nobody is told that it failed who is not told that nothing was done
					assert.NotErrorIs(t, err, ErrOutcomeUnknown)
					assert.NoError(t, c.Primary().Exec(ctx, "insert into ledger values ($1)", 1+i*each+k))
				}
				cancel()
			}
		})
	}
	all.Wait()
	require.Positive(t, relay.Fired())
	relay.Disarm()
	conn, err := c.Primary().Conn(testContext(t))
	require.NoError(t, err)
	defer conn.Close(context.Background())
	var total, distinct int64
	require.NoError(t, conn.QueryRow(testContext(t), "select count(*), count(distinct id) from ledger").Scan(&total, &distinct))
	require.EqualValues(t, callers*each, total)
	require.EqualValues(t, callers*each, distinct)
	t.Logf("%d transactions in %d runs, %d cuts, %d gave up after ten", total, runs.Load(), relay.Fired(), gaveUp.Load())
}

// While the server waits for a standby with its COMMIT, nobody knows the outcome; RunTx asks until somebody does.
func TestRunTxWaitsForACommitInProgress(t *testing.T) {
	t.Parallel()
	c, p, relay := behindRelay(t, pgtest.Options{Standbys: 1, SyncApply: true}, "")
	ctx := testContext(t)
	require.NoError(t, c.Standbys()[0].Freeze())
	sent := relay.Cut(netfault.Cut{From: netfault.Client, Match: isCommit, When: netfault.After})
	ended := make(chan error, 1)
	var runs atomic.Int64
	go func() { ended <- p.RunTx(ctx, pgx.TxOptions{}, insertEntry(ctx, 1, &runs)) }()
	<-sent
	select {
	case err := <-ended:
		require.Fail(t, "it did not wait", "%v", err)
	case <-time.After(300 * time.Millisecond):
	}
	require.NoError(t, c.Standbys()[0].Thaw())
	require.NoError(t, <-ended)
	require.EqualValues(t, 1, runs.Load())
}

// A crash, or a promotion, may have given the transaction's number out again.
func TestRunTxSaysWhereNothingIsCertain(t *testing.T) {
	t.Parallel()
	for _, promotes := range []bool{false, true} {
		// RunTx asks by a call of its own, which is held up until the server is dead.
		dead := make(chan struct{})
		var committed atomic.Bool
		hooks := &Hooks{Routed: func(context.Context, Decision) {
			if committed.Load() {
				<-dead
			}
		}}
		c, p, relay := configBehindRelay(t, Options{Hooks: hooks}, pgtest.Options{Standbys: 1}, "")
		ctx := testContext(t)
		lost := relay.Cut(netfault.Cut{From: netfault.Server, Type: 'C', Match: func(msg []byte) bool {
			if isCommit(msg) {
				committed.Store(true)
				return true
			}
			return false
		}})
		ended := make(chan error, 1)
		var runs atomic.Int64
		go func() { ended <- p.RunTx(ctx, pgx.TxOptions{}, insertEntry(ctx, 1, &runs)) }()
		<-lost
		require.NoError(t, relay.Refuse(true))
		relay.Reset()
		require.NoError(t, c.Primary().Kill())
		require.NoError(t, relay.Refuse(false))
		close(dead)
		if promotes {
			require.NoError(t, c.Standbys()[0].Promote())
		} else {
			require.NoError(t, c.Primary().Start())
		}
		err := <-ended
		require.ErrorIs(t, err, ErrOutcomeUnknown)
		require.EqualValues(t, 1, runs.Load())
	}
}

func TestRunTxReturnsWhatEndedIt(t *testing.T) {
	t.Parallel()
	c, p, _ := behindRelay(t, pgtest.Options{Standbys: 1}, "")
	ctx := testContext(t)
	own := errors.New("not today")
	require.Same(t, own, p.RunTx(ctx, pgx.TxOptions{}, func(tx pgx.Tx) error {
		_, err := tx.Exec(ctx, "insert into ledger values (1)")
		require.NoError(t, err)
		return own
	}))
	require.PanicsWithValue(t, "oh", func() {
		_ = p.RunTx(ctx, pgx.TxOptions{}, func(tx pgx.Tx) error {
			_, err := tx.Exec(ctx, "insert into ledger values (1)")
			require.NoError(t, err)
			panic("oh")
		})
	})
	require.ErrorIs(t, p.RunTx(ctx, pgx.TxOptions{}, func(tx pgx.Tx) error {
		_, _ = tx.Exec(ctx, "select 1/0")
		return nil
	}), pgx.ErrTxCommitRollback)
	require.ErrorIs(t, p.RunTx(ctx, pgx.TxOptions{}, func(tx pgx.Tx) error { return tx.Commit(ctx) }), pgx.ErrTxClosed)
	n, err := c.Primary().Int(ctx, "select count(*) from ledger")
	require.NoError(t, err)
	require.Zero(t, n)

	var trips int
	refused := func(tx pgx.Tx) error { trips++; _, err := tx.Exec(ctx, "insert into ledger values (2)"); return err }
	var pgErr *pgconn.PgError
	require.ErrorAs(t, p.RunTx(WithPreferReplica(ctx), pgx.TxOptions{}, refused), &pgErr)
	require.Equal(t, "25006", pgErr.Code)
	require.ErrorAs(t, p.RunTx(ctx, pgx.TxOptions{AccessMode: pgx.ReadOnly}, refused), &pgErr)
	require.Equal(t, 2, trips, "each once")

	var standby bool
	require.NoError(t, p.RunTx(ctx, pgx.TxOptions{AccessMode: pgx.ReadOnly}, func(tx pgx.Tx) error {
		return tx.QueryRow(ctx, "select pg_is_in_recovery()").Scan(&standby)
	}))
	require.True(t, standby)
	require.NoError(t, p.RunTx(WithPreferReplica(ctx), pgx.TxOptions{}, func(tx pgx.Tx) error {
		return tx.QueryRow(ctx, "select pg_is_in_recovery()").Scan(&standby)
	}))
	require.True(t, standby)
	for _, q := range p.peers() {
		require.Zero(t, q.pool.Stat().AcquiredConns(), "%s: a connection was kept", q.name)
	}
}

// A role that may not ask is served without the answer.
func TestRunTxWithoutTheRightToAsk(t *testing.T) {
	t.Parallel()
	c, p, relay := behindRelay(t, pgtest.Options{}, "")
	ctx := testContext(t)
	require.NoError(t, c.Primary().Exec(ctx, "revoke execute on function pg_control_checkpoint() from public"))
	var runs atomic.Int64
	for id := range int64(3) {
		require.NoError(t, p.RunTx(ctx, pgx.TxOptions{}, insertEntry(ctx, id, &runs)))
	}
	require.EqualValues(t, 4, runs.Load(), "once for nothing")
	relay.Cut(netfault.Cut{From: netfault.Server, Type: 'C', Match: isCommit})
	require.ErrorIs(t, p.RunTx(ctx, pgx.TxOptions{}, insertEntry(ctx, 9, nil)), ErrOutcomeUnknown)
}

// The transaction has no number when asked, and its COMMIT has an effect all the same.
func TestRunTxDoesNotRepeatWhatHasNoNumber(t *testing.T) {
	c, p, relay := behindRelay(t, pgtest.Options{Standbys: 1}, "")
	ctx := testContext(t)
	l, err := c.Primary().Conn(ctx)
	require.NoError(t, err)
	defer l.Close(ctx)
	_, err = l.Exec(ctx, "listen news")
	require.NoError(t, err)
	relay.Cut(netfault.Cut{From: netfault.Server, Type: 'C', Match: isCommit})
	var runs atomic.Int64
	err = p.RunTx(ctx, pgx.TxOptions{}, func(tx pgx.Tx) error {
		runs.Add(1)
		_, err := tx.Exec(ctx, "select pg_notify('news', 'pay 10 to bob')")
		return err
	})
	n := 0
	for {
		w, cancel := context.WithTimeout(ctx, 500*time.Millisecond)
		_, e := l.WaitForNotification(w)
		cancel()
		if e != nil {
			break
		}
		n++
	}
	require.ErrorIs(t, err, ErrOutcomeUnknown)
	require.EqualValues(t, 1, runs.Load())
	require.LessOrEqual(t, n, 1)
}

// A second Commit, which pgx calls safe, touches a connection that is somebody else's by then.
func TestASecondCommitTouchesNobodysConnection(t *testing.T) {
	c := pgtest.Start(t, pgtest.Options{Standbys: 1})
	must(t, c, "create table ledger (id int)")
	p := openPool(t, Options{}, c.ConnString("pool_max_conns=1"))
	waitUp(t, p)
	ctx := testContext(t)
	var all sync.WaitGroup
	for range 2 {
		all.Go(func() {
			for range 200 {
				tx, err := p.Begin(ctx)
				if !assert.NoError(t, err) {
					return
				}
				_, _ = tx.Exec(ctx, "insert into ledger values (1)")
				assert.NoError(t, tx.Commit(ctx))
				assert.ErrorIs(t, tx.Commit(ctx), pgx.ErrTxClosed)
			}
		})
	}
	all.Wait()
}

// f ends the transaction itself (RunTx must say so, and touch nobody else's connection).
func TestRunTxOfAFunctionThatEndsItsTransaction(t *testing.T) {
	c := pgtest.Start(t, pgtest.Options{Standbys: 1})
	must(t, c, "create table ledger (id int)")
	p := openPool(t, Options{}, c.ConnString("pool_max_conns=1"))
	waitUp(t, p)
	ctx := testContext(t)
	stop := make(chan struct{})
	var all sync.WaitGroup
	var broken atomic.Int64
	var sample atomic.Value
	all.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			if _, err := p.Exec(ctx, "insert into ledger values (1)"); err != nil {
				broken.Add(1)
				sample.Store(err.Error())
			}
		}
	})
	kinds := map[string]int{}
	for range 300 {
		err := p.RunTx(ctx, pgx.TxOptions{}, func(tx pgx.Tx) error { return tx.Commit(ctx) })
		switch {
		case errors.Is(err, pgx.ErrTxClosed):
			kinds["closed"]++
		default:
			kinds[fmt.Sprint(err)]++
		}
	}
	close(stop)
	all.Wait()
	require.Equal(t, map[string]int{"closed": 300}, kinds)
	require.Zero(t, broken.Load(), "%v", sample.Load())
}

// One host is a pgxpool: a COMMIT whose context ends is cancelled there.
func TestACommitOfOnePeerIsCancelledAsPgxpoolDoes(t *testing.T) {
	c := pgtest.Start(t, pgtest.Options{})
	must(t, c, "create table slow (id int)",
		"create function nap() returns trigger language plpgsql as $$ begin perform pg_sleep(15); return null; end $$",
		"create constraint trigger nap after insert on slow deferrable initially deferred for each row execute function nap()")
	bare, err := pgxpool.New(context.Background(), c.ConnString())
	require.NoError(t, err)
	defer bare.Close()
	ours := openPool(t, Options{}, c.ConnString())
	require.True(t, ours.solo)
	type beginner interface {
		Begin(context.Context) (pgx.Tx, error)
	}
	for i, pool := range []beginner{bare, ours} {
		tx, err := pool.Begin(testContext(t))
		require.NoError(t, err)
		_, err = tx.Exec(testContext(t), fmt.Sprintf("insert into slow values (%d)", i))
		require.NoError(t, err)
		err = tx.Commit(withTimeout(t, 300*time.Millisecond))
		require.Error(t, err)
		waitFor(t, "the server to be done with it", 10*time.Second, func() bool {
			n, err := c.Primary().Int(testContext(t), "select count(*) from pg_stat_activity where state = 'active' and query = 'commit'")
			return err == nil && n == 0
		})
		n, e := c.Primary().Int(testContext(t), "select count(*) from slow where id = $1", i)
		require.NoError(t, e)
		assert.Zero(t, n, "%T: %v", pool, err)
	}
}

// COMMITs that wait for a synchronous standby, whose callers give up: how long are the primary's slots held?
func TestACommitThatIsGivenUpHoldsNoSlot(t *testing.T) {
	c := pgtest.Start(t, pgtest.Options{Standbys: 1, SyncApply: true})
	must(t, c, "create table ledger (id int)")
	bare, err := pgxpool.New(context.Background(), c.Primary().ConnString("pool_max_conns=4"))
	require.NoError(t, err)
	defer bare.Close()
	ours := openPool(t, Options{}, c.ConnString("pool_max_conns=4"))
	waitUp(t, ours)
	require.NoError(t, c.Standbys()[0].Freeze())
	defer c.Standbys()[0].Thaw()
	type pool interface {
		Begin(context.Context) (pgx.Tx, error)
		Ping(context.Context) error
	}
	for _, p := range []pool{bare, ours} {
		var all sync.WaitGroup
		for range 4 {
			all.Go(func() {
				tx, err := p.Begin(testContext(t))
				if !assert.NoError(t, err) {
					return
				}
				_, err = tx.Exec(testContext(t), "insert into ledger values (1)")
				assert.NoError(t, err)
				assert.ErrorIs(t, tx.Commit(withTimeout(t, 300*time.Millisecond)), context.DeadlineExceeded)
			})
		}
		all.Wait()
		begun := time.Now()
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		err := p.Ping(ctx)
		cancel()
		assert.NoError(t, err)
		assert.Less(t, time.Since(begun), 10*time.Second, "%T: pgx would keep one that it cannot cancel for 15 s", p)
	}
}

// A BeginQuery may be anything.
func TestRunTxDoesNotRepeatABeginQueryThatWasLost(t *testing.T) {
	bubble(t, 1, nil, func(ctx context.Context, x *fakes) {
		const insert = "insert into log values (1)"
		require.NoError(t, x.pool.Ping(ctx))
		x.primary.Handle(answering(func(s pgfake.Statement) *pgfake.Response {
			if !strings.HasPrefix(s.SQL, insert) {
				return nil
			}
			return &pgfake.Response{Cut: pgfake.CutBeforeAnswer}
		}))
		err := x.pool.RunTx(ctx, pgx.TxOptions{BeginQuery: insert + "; begin"}, func(pgx.Tx) error { return nil })
		assert.ErrorIs(t, err, ErrOutcomeUnknown)
		assert.Equal(t, 1, x.primary.Count(insert))
	})
}

// A server that gives up in a COMMIT may have done it, whatever it says of the reason.
func TestRunTxSaysSoWhereTheServerGaveUpInItsCommit(t *testing.T) {
	bubble(t, 1, nil, func(ctx context.Context, x *fakes) {
		settled()
		x.primary.Handle(answering(func(s pgfake.Statement) *pgfake.Response {
			if s.SQL != "commit" {
				return nil
			}
			return &pgfake.Response{Err: &pgfake.Error{Severity: "FATAL", Code: "53200"}} // out of memory
		}))
		runs := 0
		err := x.pool.RunTx(ctx, pgx.TxOptions{CommitQuery: "commit"}, func(pgx.Tx) error { runs++; return nil }) // it is not asked about
		require.ErrorIs(t, err, ErrOutcomeUnknown)
		require.Equal(t, 1, runs)

		tx, err := x.pool.Begin(ctx)
		require.NoError(t, err)
		require.ErrorIs(t, tx.Commit(ctx), ErrOutcomeUnknown, "as Commit does")
	})
}
