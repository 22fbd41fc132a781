package multipool

import (
	"context"
	"errors"
	"time"

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
	if tx.conn == nil {
		return pgx.ErrTxClosed // its connection is somebody else's by now
	}
	lost := tx.wire.pg.IsClosed() // before: then COMMIT is not sent, and the transaction is certainly not committed
	err := tx.send(ctx)
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

// commit is Commit without the mark.
func (tx *Tx) commit(ctx context.Context) error {
	err := tx.send(ctx)
	tx.release()
	return err
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
