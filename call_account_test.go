package multipool

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/pgmultipool/multipool/internal/pgfake"
)

// ends are the calls that a pool has told the end of.
type ends struct {
	mu  sync.Mutex
	all []CallEnd
}

func (e *ends) hooks() *Hooks {
	return &Hooks{Done: func(_ context.Context, c CallEnd) {
		e.mu.Lock()
		defer e.mu.Unlock()
		e.all = append(e.all, c)
	}}
}

// take returns what has ended, without the durations, and forgets it.
func (e *ends) take() []CallEnd {
	e.mu.Lock()
	defer e.mu.Unlock()
	all := e.all
	e.all = nil
	for i := range all {
		all[i].Duration = 0
	}
	return all
}

// accounts is a bubble of a pool named "shop" that tells the ends of its calls.
func accounts(t *testing.T, replicas int, open func(*Options), f func(context.Context, *fakes, *ends)) {
	t.Helper()
	var told ends
	bubble(t, replicas, func(c *Options) {
		c.Name = "shop"
		c.Hooks = JoinHooks(c.Hooks, nil, told.hooks(), &Hooks{Done: func(context.Context, CallEnd) {}})
		if open != nil {
			open(c)
		}
	}, func(ctx context.Context, x *fakes) {
		settled()
		f(ctx, x, &told)
		assert.Empty(t, told.take(), "every call ends once")
	})
}

// ended is the one call of which the end was told.
func ended(t *testing.T, told *ends) CallEnd {
	t.Helper()
	all := told.take()
	require.Len(t, all, 1)
	return all[0]
}

func endOf(op Operation) CallEnd {
	return CallEnd{"shop", op, Decision{"primary:5432", ReasonWrite, 1, KindWrite}, OutcomeOK, "", 0}
}

func TestTheEndOfEveryKindOfCallIsTold(t *testing.T) {
	accounts(t, 1, nil, func(ctx context.Context, x *fakes, told *ends) {
		read := CallEnd{"shop", OperationQuery, Decision{"replica1:5432", ReasonRead, 1, KindRead}, OutcomeOK, "", 0}
		p := x.pool

		row := p.QueryRow(ctx, "select 1")
		assert.Empty(t, told.take(), "before Scan")
		require.NoError(t, row.Scan(new(int)))
		assert.Equal(t, read, ended(t, told))

		rows, err := p.Query(ctx, "select 1")
		require.NoError(t, err)
		require.True(t, rows.Next())
		assert.Empty(t, told.take(), "before the end")
		require.False(t, rows.Next())
		assert.Equal(t, read, ended(t, told))
		rows.Close()

		rows, err = p.Query(ctx, "select 1")
		require.NoError(t, err)
		rows.Close()
		assert.Equal(t, read, ended(t, told))
		rows.Close()

		_, err = p.Exec(ctx, "insert into t values (1)")
		require.NoError(t, err)
		assert.Equal(t, endOf(OperationExec), ended(t, told))

		require.NoError(t, p.Ping(ctx))
		assert.Equal(t, endOf(OperationPing), ended(t, told))

		require.NoError(t, p.AcquireFunc(ctx, func(c *pgxpool.Conn) error {
			assert.Equal(t, endOf(OperationAcquire), ended(t, told))
			_, err := c.Exec(ctx, "insert into t values (1)")
			return err
		}))

		b := &pgx.Batch{}
		b.Queue("insert into t values (1)")
		results := p.SendBatch(ctx, b)
		_, err = results.Exec()
		require.NoError(t, err)
		assert.Empty(t, told.take(), "before Close")
		require.NoError(t, results.Close())
		assert.Equal(t, endOf(OperationBatch), ended(t, told))
		_ = results.Close()

		tx, err := p.Begin(ctx)
		require.NoError(t, err)
		assert.Equal(t, endOf(OperationBegin), ended(t, told))
		_, err = tx.Exec(ctx, "insert into t values (1)")
		require.NoError(t, err)
		assert.Empty(t, told.take(), "a statement in a transaction is no call")
		require.NoError(t, tx.Commit(ctx))
		assert.Equal(t, endOf(OperationCommit), ended(t, told))
		require.ErrorIs(t, tx.Commit(ctx), pgx.ErrTxClosed)

		tx, err = p.BeginTx(ctx, pgx.TxOptions{AccessMode: pgx.ReadOnly})
		require.NoError(t, err)
		require.NoError(t, tx.Rollback(ctx))
		read.Operation = OperationBegin
		assert.Equal(t, read, ended(t, told))

		require.NoError(t, p.RunTx(ctx, pgx.TxOptions{AccessMode: pgx.ReadOnly}, func(pgx.Tx) error { return nil }))
		commit := read
		commit.Operation = OperationCommit
		assert.Equal(t, []CallEnd{read, commit}, told.take())

		_, _ = p.CopyFrom(ctx, pgx.Identifier{"t"}, []string{"n"}, pgx.CopyFromRows(nil))
		copied := ended(t, told)
		assert.Equal(t, [2]any{OperationCopy, 1}, [2]any{copied.Operation, copied.Attempt})
	})
}

func TestHowACallEndsIsTold(t *testing.T) {
	const insert = "insert into t values (7)"
	// on has a peer answer one text.
	on := func(text string, r *pgfake.Response) pgfake.Handler {
		return answering(func(s pgfake.Statement) *pgfake.Response {
			if s.Preparing || !strings.EqualFold(s.SQL, text) {
				return nil
			}
			return r
		})
	}
	refused := &pgfake.Response{Err: &pgfake.Error{Code: "25006", Message: "cannot execute in a read-only transaction"}}
	for name, tc := range map[string]struct {
		call func(context.Context, *fakes) error
		want CallEnd
	}{
		"the statement's own error": {func(ctx context.Context, x *fakes) error {
			x.primary.Handle(on(insert, &pgfake.Response{Err: &pgfake.Error{Code: "23505", Message: "duplicate key"}}))
			_, err := x.pool.Exec(ctx, insert)
			return err
		}, CallEnd{"shop", OperationExec, Decision{"primary:5432", ReasonWrite, 1, KindWrite}, OutcomeFailed, "23505", 0}},
		"a Scan": {func(ctx context.Context, x *fakes) error {
			return x.pool.QueryRow(ctx, "select 1").Scan(new(time.Time))
		}, CallEnd{"shop", OperationQuery, Decision{"replica1:5432", ReasonRead, 1, KindRead}, OutcomeFailed, "", 0}},
		"lost on one peer, read on another": {func(ctx context.Context, x *fakes) error {
			x.replicas[0].Handle(on("select 1", &pgfake.Response{Cut: pgfake.CutBeforeAnswer}))
			return x.pool.QueryRow(ctx, "select 1").Scan(new(int))
		}, CallEnd{"shop", OperationQuery, Decision{"primary:5432", ReasonRetry, 2, KindRead}, OutcomeOK, "", 0}},
		"the end of a row lost, read on another": {func(ctx context.Context, x *fakes) error {
			x.replicas[0].Handle(on("select 1", &pgfake.Response{Cut: pgfake.CutBeforeTag}))
			return x.pool.QueryRow(ctx, "select 1").Scan(new(int))
		}, CallEnd{"shop", OperationQuery, Decision{"primary:5432", ReasonRetry, 2, KindRead}, OutcomeOK, "", 0}},
		"the end of rows lost": {func(ctx context.Context, x *fakes) error {
			x.replicas[0].Handle(on("select 1", &pgfake.Response{Cut: pgfake.CutBeforeTag}))
			rows, err := x.pool.Query(ctx, "select 1")
			if err != nil {
				return err
			}
			rows.Close()
			return rows.Err()
		}, CallEnd{"shop", OperationQuery, Decision{"replica1:5432", ReasonRead, 1, KindRead}, OutcomeUnavailable, "", 0}},
		"refused by a standby, run on the primary": {func(ctx context.Context, x *fakes) error {
			x.replicas[0].Handle(on("select place_order(1)", refused))
			return x.pool.QueryRow(ctx, "select place_order(1)").Scan(new(int))
		}, CallEnd{"shop", OperationQuery, Decision{"primary:5432", ReasonRefused, 2, KindWrite}, OutcomeOK, "", 0}},
		"a write that was lost": {func(ctx context.Context, x *fakes) error {
			x.primary.Handle(on(insert, &pgfake.Response{Cut: pgfake.CutBeforeAnswer}))
			_, err := x.pool.Exec(ctx, insert)
			return err
		}, CallEnd{"shop", OperationExec, Decision{"primary:5432", ReasonWrite, 1, KindWrite}, OutcomeUnknown, "", 0}},
		"a batch that was lost": {func(ctx context.Context, x *fakes) error {
			x.primary.Handle(on(insert, &pgfake.Response{Cut: pgfake.CutBeforeAnswer}))
			b := &pgx.Batch{}
			b.Queue(insert)
			return x.pool.SendBatch(ctx, b).Close()
		}, CallEnd{"shop", OperationBatch, Decision{"primary:5432", ReasonWrite, 1, KindWrite}, OutcomeUnknown, "", 0}},
		"no peer": {func(ctx context.Context, x *fakes) error {
			x.primary.Die()
			_ = x.pool.named("primary:5432").pool.Ping(ctx)
			settled()
			_, err := x.pool.Exec(ctx, insert)
			return err
		}, CallEnd{"shop", OperationExec, Decision{Kind: KindWrite}, OutcomeUnavailable, "", 0}},
		"the caller's context": {func(ctx context.Context, x *fakes) error {
			x.replicas[0].Handle(on("select 1", &pgfake.Response{Delay: time.Minute}))
			x.primary.Handle(on("select 1", &pgfake.Response{Delay: time.Minute}))
			ctx, cancel := context.WithTimeout(ctx, 10*time.Millisecond)
			defer cancel()
			return x.pool.QueryRow(ctx, "select 1").Scan(new(int))
		}, CallEnd{"shop", OperationQuery, Decision{"replica1:5432", ReasonRead, 1, KindRead}, OutcomeCanceled, "", 0}},
		"an unknown name": {func(ctx context.Context, x *fakes) error {
			return x.pool.Ping(WithPeer(ctx, "nobody"))
		}, CallEnd{"shop", OperationPing, Decision{}, OutcomeFailed, "", 0}},
	} {
		t.Run(name, func(t *testing.T) {
			accounts(t, 1, nil, func(ctx context.Context, x *fakes, told *ends) {
				err := tc.call(ctx, x)
				assert.Equal(t, tc.want.Outcome == OutcomeOK, err == nil, "%v", err)
				assert.Equal(t, tc.want, ended(t, told), "%v", err)
			})
		})
	}
}

func TestTheEndOfALostCommitIsTold(t *testing.T) {
	accounts(t, 1, nil, func(ctx context.Context, x *fakes, told *ends) {
		x.primary.Handle(answering(func(s pgfake.Statement) *pgfake.Response {
			if strings.EqualFold(s.SQL, "commit") {
				return &pgfake.Response{Cut: pgfake.CutBeforeAnswer}
			}
			return nil
		}))
		tx, err := x.pool.Begin(ctx)
		require.NoError(t, err)
		require.ErrorIs(t, tx.Commit(ctx), ErrOutcomeUnknown)
		lost := endOf(OperationCommit)
		lost.Outcome = OutcomeUnknown
		assert.Equal(t, []CallEnd{endOf(OperationBegin), lost}, told.take())
	})
}

func TestTheEndOfCallsOfAPoolOfOnePeerIsTold(t *testing.T) {
	accounts(t, 0, nil, func(ctx context.Context, x *fakes, told *ends) {
		solo := func(op Operation, k Kind, o Outcome) CallEnd {
			return CallEnd{"shop", op, Decision{"primary:5432", ReasonOnePeer, 1, k}, o, "", 0}
		}
		require.NoError(t, x.pool.QueryRow(ctx, "select 1").Scan(new(int)))
		assert.Equal(t, solo(OperationQuery, KindRead, OutcomeOK), ended(t, told))
		tx, err := x.pool.Begin(ctx)
		require.NoError(t, err)
		require.NoError(t, tx.Commit(ctx))
		assert.Equal(t, solo(OperationBegin, KindWrite, OutcomeOK), ended(t, told), "its Commit is pgxpool's")
		require.NoError(t, x.pool.RunTx(ctx, pgx.TxOptions{AccessMode: pgx.ReadOnly}, func(pgx.Tx) error { return nil }))
		assert.Equal(t, []CallEnd{solo(OperationBegin, KindRead, OutcomeOK), solo(OperationCommit, KindRead, OutcomeOK)}, told.take())
		errFirst := errors.New("the program's")
		require.ErrorIs(t, x.pool.RunTx(ctx, pgx.TxOptions{}, func(pgx.Tx) error { return errFirst }), errFirst)
		assert.Equal(t, solo(OperationBegin, KindWrite, OutcomeOK), ended(t, told), "nothing was committed")
		x.primary.Die()
		_, err = x.pool.Exec(ctx, "insert into t values (1)")
		require.Error(t, err)
		assert.Equal(t, solo(OperationExec, KindWrite, OutcomeUnavailable), ended(t, told))
	})
}
