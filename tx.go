package multipool

import (
	"context"
	"errors"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// pgxTx is embedded under a name that is not exported.
type pgxTx = pgx.Tx

// Tx is a transaction on a connection of one peer: what Begin and BeginTx return. It is used as pgxpool.Tx is, by one
// goroutine at a time. Its Commit says where the outcome is unknown.
type Tx struct {
	pgxTx
	conn *pgxpool.Conn
	wire *wire
}

func newTx(t pgx.Tx, c *pgxpool.Conn, w *wire) *Tx { return &Tx{pgxTx: t, conn: c, wire: w} }

// Commit commits the transaction and returns its connection to the pool. Where the connection failed, or ctx ended,
// before the server's answer came, the transaction may be committed or not: the error then matches ErrOutcomeUnknown
// and unwraps to the original (in a pool of one peer it is the original, as pgxpool returns it). Otherwise it returns
// what pgxpool's Commit returns: pgx.ErrTxClosed if the Tx is closed already, pgx.ErrTxCommitRollback if the server
// rolled back.
func (tx *Tx) Commit(ctx context.Context) error {
	err := tx.pgxTx.Commit(ctx)
	if err != nil && !tx.wire.peer.solo && !errors.Is(err, pgx.ErrTxClosed) {
		// A COMMIT that was terminated may have been done: the server says 57P01 while it waits for a standby.
		err = markUnknown(ctx, tx.wire.standby, err, true)
	}
	tx.release()
	return err
}

// Rollback rolls back the transaction and returns its connection to the pool. It returns what pgxpool's Rollback
// returns: pgx.ErrTxClosed if the Tx is closed already, so that it may be deferred.
func (tx *Tx) Rollback(ctx context.Context) error {
	err := tx.pgxTx.Rollback(ctx)
	tx.release()
	return err
}

func (tx *Tx) release() {
	if tx.conn != nil {
		tx.conn.Release()
		tx.conn = nil
	}
}

// batchResults are pgx's with the connection released at their end.
type batchResults struct {
	pgx.BatchResults
	conn *pgxpool.Conn
	tx   *Tx // owns the connection instead where the batch began a transaction
	wire *wire
	ctx  context.Context
}

// Close ends the batch and returns its connection to the pool. Where the batch may have been executed in part or
// whole and the answer was lost, the error matches ErrOutcomeUnknown.
func (b *batchResults) Close() error {
	err := b.BatchResults.Close()
	if err != nil && b.conn != nil && !b.wire.peer.solo {
		err = markUnknown(b.ctx, b.wire.standby, err, true)
	}
	if b.conn != nil {
		b.conn.Release()
		b.conn = nil
	}
	return err
}

// Tx returns the transaction that the batch began by pgx.Batch.BeginTx, or nil.
func (b *batchResults) Tx() pgx.Tx {
	if b.tx == nil {
		return nil
	}
	return b.tx
}
