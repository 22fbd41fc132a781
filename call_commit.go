package multipool

import (
	"context"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/pgmultipool/multipool/internal/pgfault"
)

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
	switch {
	case err == nil:
		s.xid, s.system, s.timeline, s.redo, s.known = row[0], row[1], row[2], row[3], true
	case pgfault.InFailedTransaction(err):
		return s, nil // f has swallowed an error: the COMMIT will say so
	case pgfault.Unsupported(err):
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
	if pgfault.InvalidParameter(err) {
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
	w.end(ctx, r.Err)
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
