package multipool

import (
	"context"
	"errors"
	"time"

	"github.com/pgmultipool/multipool/internal/pgfault"
)

// account is what Hooks.Done is told of one call at its end. It goes with the call's progress, to the rows, the batch or the
// transaction that the call returns, where that ends it; nil where nobody asks.
type account struct {
	pool  *MultiPool
	ctx   context.Context // the caller's
	begun time.Time
	sent  bool // a connection had taken the last attempt
	end   CallEnd
}

// account begins the account of a call.
func (p *MultiPool) account(ctx context.Context, op operation) *account {
	if p.hooks.Done == nil {
		return nil
	}
	return &account{pool: p, ctx: ctx, begun: time.Now(), end: CallEnd{Pool: p.config.Name, Operation: op.exported()}}
}

// commit begins the account of the COMMIT of the transaction that the call began.
func (a *account) commit(ctx context.Context) *account {
	if a == nil {
		return nil
	}
	next := &account{pool: a.pool, ctx: ctx, begun: time.Now(), sent: true, end: a.end}
	next.end.Operation, next.end.Attempt = OperationCommit, 1
	return next
}

// routed notes the next attempt.
func (a *account) routed(d Decision) { a.end.Decision, a.sent = d, false }

// done tells the end of the call.
func (a *account) done(err error) {
	if a == nil {
		return
	}
	a.end.Duration = time.Since(a.begun)
	a.end.Outcome, a.end.SQLState = outcomeOf(a.ctx, err, a.sent), pgfault.Code(err)
	a.pool.hooks.Done(a.ctx, a.end)
}

// ended tells the end of a call whose attempts are over, unless what it returns goes on.
func (t *trail) ended(op operation, err error) {
	if t.account != nil && (err != nil || !op.hasText() && op != opBatch) {
		t.account.done(err)
	}
}

// outcomeOf judges the error with which a call ended.
func outcomeOf(ctx context.Context, err error, sent bool) Outcome {
	switch {
	case err == nil:
		return OutcomeOK
	case errors.Is(err, ErrOutcomeUnknown):
		return OutcomeUnknown
	case errors.As(err, new(*NoPeerError)):
		return OutcomeUnavailable
	}
	v := pgfault.Acquire(ctx, err, false)
	if sent {
		v = pgfault.Statement(ctx, err, pgfault.Ending{})
	}
	switch v.Class {
	case pgfault.Caller:
		return OutcomeCanceled
	case pgfault.Application, pgfault.Refused, pgfault.Behind, pgfault.Closed:
		return OutcomeFailed
	}
	return OutcomeUnavailable
}
