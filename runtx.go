package multipool

import (
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

// RunTx runs f in a transaction and commits it; where f returns an error, or panics, it rolls back. The transaction goes
// where BeginTx would send it.
//
// f is run again from the beginning, up to ten times in all, where the transaction is certainly not committed and another
// run may be: after a serialization failure or a deadlock (SQLSTATE 40001, 40P01), a connection that was lost before
// COMMIT was sent, a refusal because the server is a standby (25006). So f must do nothing but through its pgx.Tx that
// may not be done twice, must not end the transaction itself, and returns the errors that it meets, wrapped or not.
//
// A COMMIT whose answer was lost is asked about: the transaction's number is fetched before it is sent, which costs a
// round trip unless AccessMode is pgx.ReadOnly, and the server is asked with pg_xact_status (PostgreSQL documentation,
// 9.26.9) what became of it. The answer counts only from the same server on the same timeline, and "committed" only if
// the server has not recovered from a crash meanwhile, because both give numbers out twice. A transaction that has no number,
// because all it does is done elsewhere or by its COMMIT (foreign tables, notifications), cannot be asked about; and what a
// foreign server has committed is not known here. Committed: RunTx returns nil.
// Not committed: f is run again. No certain answer within Config.Wait: the error matches [ErrOutcomeUnknown] and unwraps
// to the original. The same holds where a transaction has its own CommitQuery, or ctx has ended: nothing is asked then.
//
// It returns f's own error unchanged where that ended it, and what BeginTx and Commit return otherwise. ctx governs all
// of it; f may run again only while ctx lasts.
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
}

// next decides what follows. It is pure but for reading ctx.
func (e runEnd) next(ctx context.Context) runStep {
	v := classify(evidence{err: e.err, ctx: ctx, phase: phaseRun, standby: e.standby, batch: e.committing})
	var pgErr *pgconn.PgError
	var noReceipts *noReceiptError
	if errors.As(e.err, &pgErr) {
		switch {
		case v.class == classConflict:
			return runOnPrimary
		case v.class == classRefused && !e.readOnly, pgErr.Code == "40001", pgErr.Code == "40P01", errors.As(e.err, &noReceipts):
			return runAgain
		}
	}
	switch {
	case e.lost && v.blamesPeer():
		return runAgain
	case e.committing && (v.blamesPeer() || v.class == classCaller):
		if v.executed == executedNo {
			return runAgain
		}
		return runUnknown
	}
	return runStop
}

// runOnce runs the transaction once.
func (p *MultiPool) runOnce(ctx context.Context, o pgx.TxOptions, f func(pgx.Tx) error) (runStep, error) {
	begun, err := p.BeginTx(ctx, o)
	if err != nil {
		return afterBegin(ctx, err), err
	}
	tx := begun.(*Tx)
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
		return p.learnFrom(ctx, tx, end), end.err
	}
	if end.err = tx.commit(ctx); end.err == nil {
		return runStop, nil
	}
	end.committing = !end.lost
	if next := end.next(ctx); next != runUnknown {
		return next, end.err
	}
	return p.settleCommit(ctx, r, end.err)
}

// afterBegin decides what follows a BEGIN that failed. Where the pool has looked for a peer in vain it has waited already;
// a connection that was lost under it is worth another.
func afterBegin(ctx context.Context, err error) runStep {
	var nobody *NoPeerError
	var dial *pgconn.ConnectError
	if errors.As(err, &nobody) || errors.As(err, &dial) {
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
	var pgErr *pgconn.PgError
	refused := errors.As(end.err, &pgErr) && refusedByStandby(pgErr)
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

// receipt is what a transaction's outcome can be asked by.
type receipt struct {
	peer     *peer
	xid      string // "": it has none
	idle     bool   // it cannot have written
	system   string
	timeline string
	redo     string // where the server's last checkpoint begins: a recovery from a crash makes a new one
	known    bool   // all of this was asked
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

// noReceiptsFor is how long a server that does not offer a receipt's functions, or not to the role of the moment, is not
// asked for one.
const noReceiptsFor = time.Minute

// receipt fetches the transaction's receipt. A server that does not offer the functions aborts the transaction by it, and
// is not asked again for a while.
func (tx *Tx) receipt(ctx context.Context, o pgx.TxOptions, standby bool) (receipt, error) {
	s := receipt{peer: tx.wire.peer}
	switch {
	case o.CommitQuery != "":
		return s, nil
	case o.AccessMode == pgx.ReadOnly, standby:
		s.known, s.idle = true, true
		return s, nil
	case s.peer.owner.clock() < time.Duration(s.peer.noReceipts.Load()):
		return s, nil
	}
	row, err := tx.wire.ask(ctx, whoAmI)
	var pgErr *pgconn.PgError
	switch {
	case err == nil:
		s.xid, s.system, s.timeline, s.redo, s.known = row[0], row[1], row[2], row[3], true
	case !errors.As(err, &pgErr):
	case pgErr.Code == "25P02": // in_failed_sql_transaction
		return s, nil // f has swallowed an error: the COMMIT will say so
	case slices.Contains(notServed, pgErr.Code):
		s.peer.noReceipts.Store(int64(s.peer.owner.clock() + noReceiptsFor))
		return s, &noReceiptError{err}
	}
	return s, err
}

// noReceiptError is that of a server which does not tell what became of a transaction.
type noReceiptError struct{ err error }

func (e *noReceiptError) Error() string { return e.err.Error() }
func (e *noReceiptError) Unwrap() error { return e.err }

// settleCommit finds out what became of a COMMIT whose answer was lost.
func (p *MultiPool) settleCommit(ctx context.Context, s receipt, lost error) (runStep, error) {
	unknown := error(&unknownOutcome{lost})
	switch {
	case !s.known, ctx.Err() != nil:
		return runStop, unknown
	case s.idle:
		return runAgain, lost
	case s.xid == "":
		return runStop, unknown // a COMMIT may act without a number of its own: on a foreign server, by a notification
	}
	asking, cancel := context.WithTimeout(ctx, max(p.config.Wait, time.Second))
	defer cancel()
	for pause := time.Millisecond; ; pause = min(2*pause, maxRunPause) {
		status, err := p.askStatus(asking, s)
		switch {
		case err != nil && afterBegin(asking, err) != runAgain:
			return runStop, unknown
		case status == statusCommitted:
			return runStop, nil
		case status == statusAborted:
			return runAgain, lost
		case err == nil && status == statusUnknown:
			return runStop, unknown
		}
		select { // it is in progress, the server has not met the end of the connection yet; or the question was lost
		case <-time.After(pause):
		case <-asking.Done():
			return runStop, unknown
		}
	}
}

// txStatus is what became of a transaction.
type txStatus uint8

const (
	statusUnknown txStatus = iota
	statusInProgress
	statusCommitted
	statusAborted
)

// askStatus asks the primary for a transaction's status.
func (p *MultiPool) askStatus(ctx context.Context, s receipt) (txStatus, error) {
	return attempt(WithPrimary(ctx), p, opPing, "", func(c *pgxpool.Conn, w *wire) (txStatus, error) {
		status, err := w.statusOf(ctx, s)
		if err == nil {
			c.Release()
		}
		return status, err
	})
}

// statusOf asks one server. Both statements run on one connection, which no crash survives.
func (w *wire) statusOf(ctx context.Context, s receipt) (txStatus, error) {
	if w.peer != s.peer {
		return statusUnknown, nil
	}
	at, err := w.ask(ctx, "select null,"+whereAmI)
	if err != nil {
		return statusUnknown, err
	}
	if at[1] != s.system || at[2] != s.timeline {
		return statusUnknown, nil
	}
	row, err := w.ask(ctx, whatBecame, []byte(s.xid))
	var pgErr *pgconn.PgError
	if errors.As(err, &pgErr) && pgErr.Code == "22023" {
		return statusAborted, nil // "in the future": the server knows of no such transaction any more, so it is lost
	}
	if err != nil {
		return statusUnknown, err
	}
	return s.judge(row[0], at[3]), nil
}

// judge reads the server's answer; redo is where its last checkpoint begins now. After a crash a number whose own log was
// lost is given out again: then "committed" may be said of somebody else's transaction, while "aborted" is true of both.
func (s receipt) judge(answer, redo string) txStatus {
	switch {
	case answer == "in progress":
		return statusInProgress
	case answer == "aborted":
		return statusAborted
	case answer == "committed" && redo == s.redo:
		return statusCommitted
	}
	return statusUnknown // a checkpoint has begun since, or the number is too old to be known
}

// ask runs a statement of ours on a connection that a call holds, by the extended protocol, and returns its one row as
// text.
func (w *wire) ask(ctx context.Context, sql string, args ...[]byte) ([]string, error) {
	w.begin()
	r := w.pg.ExecParams(ctx, sql, args, nil, nil, nil).Read()
	w.end(ctx, r.Err, false)
	switch {
	case r.Err != nil:
		return nil, r.Err
	case len(r.Rows) != 1:
		return nil, errOddAnswer
	}
	row := make([]string, len(r.Rows[0]))
	for i, value := range r.Rows[0] {
		row[i] = string(value)
	}
	return row, nil
}
