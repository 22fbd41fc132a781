package multipool

import (
	"context"
	"errors"
	"math/rand/v2"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/pgmultipool/multipool/internal/pgfault"
)

// RunTx runs f in a transaction and commits it. If f returns an error or panics, it rolls the transaction back. The
// transaction goes where BeginTx would send it.
//
// RunTx runs f again from the beginning, up to ten runs in all, if the transaction is certainly not committed and
// another run may succeed. That is the case after
//
//   - a serialization failure or a deadlock (SQLSTATE 40001, 40P01);
//   - the loss of the connection before COMMIT was sent;
//   - a refusal because the server is a standby (SQLSTATE 25006);
//   - a server's refusal to tell the transaction's number (see below; it is not asked again for a minute).
//
// Therefore f must do nothing that must not be done twice, except through its pgx.Tx. It must not end the transaction,
// and it must return the errors that it meets, wrapped or not.
//
// If the answer to a COMMIT is lost, RunTx asks the server what became of the transaction. For that it fetches the
// transaction's number before COMMIT, which costs a round trip unless AccessMode is pgx.ReadOnly, and later calls
// pg_xact_status (PostgreSQL documentation, 9.26.9). The answer counts only if it comes from the same server on the
// same timeline. The answer "committed" counts only if, in addition, the server has not recovered from a crash in
// between. Otherwise the number may have been given to another transaction.
//
//   - If the transaction was committed, RunTx returns nil.
//   - If it was not committed, RunTx runs f again.
//   - If there is no certain answer within Options.Wait, or within a second if that is more, the error matches
//     [ErrOutcomeUnknown] and unwraps to the original one.
//
// RunTx does not ask, and returns [ErrOutcomeUnknown], if ctx has ended, if the transaction has its own CommitQuery, or
// if it has no number because all its work is done elsewhere or by the COMMIT (foreign tables, notifications). It never
// knows what a foreign server has committed.
//
// If f ends the run with an error, RunTx returns that error unchanged. Otherwise it returns the errors of BeginTx and
// Commit. ctx governs the whole of RunTx, and f is not run again after ctx has ended.
func (p *MultiPool) RunTx(ctx context.Context, txOptions pgx.TxOptions, f func(pgx.Tx) error) error {
	for run := 1; ; run++ {
		next, err := p.runOnce(ctx, txOptions, f)
		if next == runStop || run == maxRuns || ctx.Err() != nil {
			return err
		}
		if next == runOnPrimary {
			ctx = WithPrimary(ctx)
		}
		select {
		case <-time.After(rand.N(min(firstRunPause<<run, maxRunPause))):
		case <-ctx.Done():
			return err
		}
	}
}

// maxRuns is how often a transaction is run; between runs it waits a random time of at most a growing bound, so that
// those that stood in each other's way do not again.
const (
	maxRuns       = 10
	firstRunPause = time.Millisecond
	maxRunPause   = 100 * time.Millisecond
)

// runStep is what follows a run of a transaction.
type runStep uint8

const (
	runStop      runStep = iota // the caller gets the outcome
	runAgain                    // it is certainly not committed, and may be next time
	runOnPrimary                // the same, but not on this replica
	runUnknown                  // nobody knows whether it is committed
)

// runEnd is how a run of a transaction ended.
type runEnd struct {
	err        error
	standby    bool // it began on a standby: what begins there stays read-only even when that is promoted
	readOnly   bool // by its options
	lost       bool // its connection was gone before COMMIT was sent
	committing bool // COMMIT was sent
	commit     pgfault.Ending
}

// next decides what follows. It is pure, except that it reads ctx.
func (e runEnd) next(ctx context.Context) runStep {
	told := e.commit
	told.Standby = e.standby
	v := pgfault.Statement(ctx, e.err, told)
	var noReceipts *noReceiptError
	switch {
	case e.committing && v.Outcome == pgfault.Unknown:
		return runUnknown
	case !pgfault.Answered(e.err):
	case v.Class == pgfault.Conflict:
		return runOnPrimary
	case v.Class == pgfault.Refused && !e.readOnly, pgfault.LostToAnother(e.err), errors.As(e.err, &noReceipts):
		return runAgain
	}
	if e.lost && v.BlamesServer() || e.committing && (v.BlamesServer() || v.Class == pgfault.Caller) {
		return runAgain // before COMMIT was sent, or before it was done
	}
	return runStop
}

// runOnce runs the transaction once.
func (p *MultiPool) runOnce(ctx context.Context, o pgx.TxOptions, f func(pgx.Tx) error) (runStep, error) {
	tx, err := p.begin(ctx, o)
	if err != nil {
		return afterBegin(ctx, err), err
	}
	defer tx.abandon()
	end := runEnd{standby: tx.wire.standby, readOnly: o.AccessMode == pgx.ReadOnly}
	var r receipt
	if end.err = f(tx); end.err == nil && tx.conn == nil {
		return runStop, pgx.ErrTxClosed // f has ended it, and its connection is somebody else's
	}
	if end.err == nil {
		r, end.err = tx.receipt(ctx, o, end.standby)
	}
	end.lost = tx.conn != nil && tx.wire.pg.IsClosed()
	if end.err != nil {
		end.standby = end.standby || tx.astray(ctx, end.err)
		return p.learnFrom(ctx, tx, end), end.err
	}
	account := tx.account.commit(ctx)
	if end.commit, end.err = tx.commit(ctx); end.err == nil {
		account.done(nil)
		return runStop, nil
	}
	end.committing = !end.lost
	next := end.next(ctx)
	if next == runUnknown {
		next, err = p.settleCommit(ctx, r, end.err)
	} else {
		err = end.err
	}
	account.done(err)
	return next, err
}

// astray rolls a transaction back that was refused as by a standby, and reports whether it has met one at the address of a
// primary.
func (tx *Tx) astray(ctx context.Context, err error) bool {
	if tx.conn == nil || !tx.wire.peer.asksRole() || !pgfault.RefusedByStandby(err) {
		return false
	}
	_ = tx.pgxTx.Rollback(ctx)
	if !tx.wire.recovers(err) {
		return false
	}
	tx.wire.leftBehind(tx.conn.Conn())
	return true
}

// afterBegin decides what follows a BEGIN that failed. Where the pool has looked for a peer in vain it has waited
// already; a connection that was lost under it is worth another, but where a BeginQuery, which may be anything, was
// lost with it.
func afterBegin(ctx context.Context, err error) runStep {
	var nobody *NoPeerError
	var dial *pgconn.ConnectError
	if errors.As(err, &nobody) || errors.As(err, &dial) || errors.Is(err, ErrOutcomeUnknown) {
		return runStop
	}
	return runEnd{err: err, lost: true}.next(ctx)
}

// learnFrom decides what follows a run that did not come to its COMMIT, and notes where a peer has turned out to be a
// standby. A route that says where the transaction goes is not overruled.
func (p *MultiPool) learnFrom(ctx context.Context, tx *Tx, end runEnd) runStep {
	next := end.next(ctx)
	if tx.conn == nil {
		return runStop // f has ended it
	}
	forced := p.routeOf(ctx).explicit()
	refused := pgfault.RefusedByStandby(end.err)
	switch {
	case forced && refused:
		return runStop // a write forced on a replica shows the server's own error
	case forced && next == runOnPrimary:
		return runAgain
	case next == runAgain && refused && tx.wire.standby && !p.solo:
		tx.wire.peer.isReplica()
		tx.wire.peer.monitor.nudge()
	}
	return next
}

const (
	whoAmI = `select pg_catalog.pg_current_xact_id_if_assigned()::pg_catalog.text,` + whereAmI
	// whereAmI tells the history that a transaction number belongs to.
	whereAmI = ` (select c.system_identifier from pg_catalog.pg_control_system() c)::pg_catalog.text,
 case when not pg_catalog.pg_is_in_recovery() then
 pg_catalog.substr(pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_lsn()), 1, 8) end,
 (select c.redo_lsn from pg_catalog.pg_control_checkpoint() c)::pg_catalog.text`
	whatBecame = `select pg_catalog.pg_xact_status($1::pg_catalog.text::pg_catalog.xid8)`
)

const (
	statusUnknown txStatus = iota
	statusInProgress
	statusCommitted
	statusAborted
)
