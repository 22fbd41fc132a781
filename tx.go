package multipool

import (
	"context"
	"errors"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
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
	lost := tx.wire.pg.IsClosed() // before: then COMMIT is not sent, and the transaction is certainly not committed
	err := tx.pgxTx.Commit(ctx)
	if err != nil && !lost && !tx.wire.peer.solo && !errors.Is(err, pgx.ErrTxClosed) {
		// A COMMIT that was terminated may have been done: the server says 57P01 while it waits for a standby.
		err = markUnknown(ctx, tx.wire.ending(), err, true)
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
	lost error // the marked error, once there is one
}

// mark marks an error of the batch: what of it was executed is unknown once its connection is lost.
func (b *batchResults) mark(err error) error {
	if err == nil || b.tx != nil || b.wire.peer.solo {
		return err
	}
	if b.lost == nil {
		if marked := markUnknown(b.ctx, b.ending(), err, true); marked != err {
			b.lost = marked
		}
	}
	if b.lost != nil {
		return b.lost
	}
	return err
}

// ending is what the connection tells; after Close it is somebody else's, and the batch has its verdict.
func (b *batchResults) ending() ending {
	if b.conn == nil {
		return ending{}
	}
	return b.wire.ending()
}

// Exec reads the results of the next statement; see pgx.BatchResults. Its error is marked as Close's is.
func (b *batchResults) Exec() (pgconn.CommandTag, error) {
	tag, err := b.BatchResults.Exec()
	return tag, b.mark(err)
}

// Query reads the results of the next statement; see pgx.BatchResults. Its error, and that of the rows, is marked as
// Close's is.
func (b *batchResults) Query() (pgx.Rows, error) {
	rows, err := b.BatchResults.Query()
	if b.tx != nil || b.wire.peer.solo {
		return rows, err
	}
	return batchRows{rows, b}, b.mark(err)
}

type batchRows struct {
	pgx.Rows
	batch *batchResults
}

func (r batchRows) Err() error { return r.batch.mark(r.Rows.Err()) }

// QueryRow reads the results of the next statement; see pgx.BatchResults. Its error is marked as Close's is.
func (b *batchResults) QueryRow() pgx.Row { return batchRow{b.BatchResults.QueryRow(), b} }

type batchRow struct {
	pgx.Row
	batch *batchResults
}

func (r batchRow) Scan(dest ...any) error { return r.batch.mark(r.Row.Scan(dest...)) }

// Close ends the batch and returns its connection to the pool. Where the batch may have been executed in part or
// whole and the answer was lost, the error matches ErrOutcomeUnknown.
func (b *batchResults) Close() error {
	err := b.mark(b.BatchResults.Close())
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
