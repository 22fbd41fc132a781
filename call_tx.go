package multipool

import (
	"context"
	"errors"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/pgmultipool/multipool/internal/pgfault"
)

// pgxTx is embedded under a name that is not exported.
type pgxTx = pgx.Tx

// Tx is a transaction on a connection to one peer. Begin and BeginTx return it, and RunTx passes it to its function.
// Like pgxpool.Tx, it must not be used by several goroutines at the same time. In a pool of one peer Begin and BeginTx
// return pgxpool's own *Tx.
type Tx struct {
	pgxTx
	conn *pgxpool.Conn
	wire *wire

	account *account // of the call that began it
}

func newTx(t pgx.Tx, c *pgxpool.Conn, w *wire) *Tx {
	return &Tx{pgxTx: t, conn: c, wire: w, account: w.been.account}
}

// operationOf is what a BEGIN counts as when it is routed.
func operationOf(o pgx.TxOptions) operation {
	switch {
	case o.BeginQuery != "":
		return opExec // it may be anything
	case o.AccessMode == pgx.ReadOnly && o.IsoLevel != pgx.Serializable:
		return opReadTx
	}
	return opBegin
}

// begin begins a transaction of ours.
func (p *MultiPool) begin(ctx context.Context, o pgx.TxOptions) (*Tx, error) {
	return attempt(ctx, p, operationOf(o), o.BeginQuery, func(c *pgxpool.Conn, w *wire) (*Tx, error) {
		t, err := c.BeginTx(ctx, o)
		if err != nil {
			return nil, err
		}
		if !w.use.keep() {
			_ = t.Rollback(ctx) // it is being cut, and will be begun again
			return nil, errPeerDown
		}
		return newTx(t, c, w), nil
	})
}

// beginAlone begins a transaction in a pool of one peer. It is pgxpool's, which a program may ask for by its type.
func (p *MultiPool) beginAlone(ctx context.Context, o pgx.TxOptions) (pgx.Tx, error) {
	var in intent
	var t trail
	op := operationOf(o)
	t.account = p.account(ctx, op)
	var tx pgx.Tx
	err := p.intend(ctx, op, o.BeginQuery, &in)
	if err == nil {
		if t.account != nil {
			t.account.end.Kind = in.kind()
		}
		var q *peer
		if q, err = p.choose(ctx, &in, &t); err == nil {
			q.load.out.Add(1)
			defer q.load.out.Add(-1)
			tx, err = q.pool.BeginTx(ctx, o)
		}
	}
	t.ended(op, err)
	return tx, err
}

// Commit commits the transaction and returns its connection to the pool. If the connection failed, or ctx ended, before
// the server's answer came, the transaction may have been committed or not. The error then matches [ErrOutcomeUnknown]
// and unwraps to the original one. Otherwise Commit returns what pgxpool's Commit returns: pgx.ErrTxClosed if the Tx is
// already closed, pgx.ErrTxCommitRollback if the server rolled back.
func (tx *Tx) Commit(ctx context.Context) error {
	if tx.conn == nil {
		return pgx.ErrTxClosed // its connection is somebody else's by now
	}
	account := tx.account.commit(ctx)
	lost := tx.wire.pg.IsClosed() // before: then COMMIT is not sent, and the transaction is certainly not committed
	err := tx.send(ctx)
	if err != nil && !lost && !tx.wire.peer.solo && !errors.Is(err, pgx.ErrTxClosed) {
		err = markUnknown(ctx, tx.wire.ending(), err)
	}
	tx.release()
	account.done(err)
	return err
}

// Rollback rolls the transaction back and returns its connection to the pool. It returns what pgxpool's Rollback
// returns, which is pgx.ErrTxClosed if the Tx is already closed. It is therefore safe to defer.
func (tx *Tx) Rollback(ctx context.Context) error {
	err := tx.pgxTx.Rollback(ctx)
	tx.release()
	return err
}

// commit is Commit without the mark, and returns what the connection tells after it.
func (tx *Tx) commit(ctx context.Context) (end pgfault.Ending, err error) {
	err = tx.send(ctx)
	end = tx.wire.ending() // now: a moment later the connection is somebody else's
	tx.release()
	return end, err
}

// send commits, and lets nobody cancel it. A connection that is given up in its COMMIT is cut: pgx would read on for 15 s
// for the end of what it could not cancel, and keep the pool's slot as long.
func (tx *Tx) send(ctx context.Context) error {
	w := tx.wire
	if w.peer.solo {
		return tx.pgxTx.Commit(ctx)
	}
	w.committing.Store(true)
	err := tx.pgxTx.Commit(ctx)
	if w.pg.IsClosed() {
		w.cutOff()
	} else {
		w.committing.Store(false)
	}
	return err
}

// abandon rolls back what has not ended, whatever has become of the caller's context.
func (tx *Tx) abandon() {
	if tx.conn == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), abandonTimeout)
	defer cancel()
	_ = tx.Rollback(ctx)
}

const abandonTimeout = time.Second

func (tx *Tx) release() {
	if tx.conn != nil {
		tx.conn.Release()
		tx.conn = nil
	}
}
