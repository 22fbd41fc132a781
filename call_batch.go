package multipool

import (
	"context"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/pgmultipool/multipool/internal/pgfault"
)

// batchResults are pgx's with the connection released at their end.
type batchResults struct {
	pgx.BatchResults
	conn *pgxpool.Conn
	tx   *Tx // owns the connection instead where the batch began a transaction
	wire *wire
	ctx  context.Context
	lost error // the marked error, once there is one

	account *account
}

// mark marks an error of the batch: what of it was executed is unknown once its connection is lost.
func (b *batchResults) mark(err error) error {
	if err == nil || b.tx != nil || b.wire.peer.solo {
		return err
	}
	if b.lost == nil {
		if marked := markUnknown(b.ctx, b.ending(), err); marked != err {
			b.lost = marked
		}
	}
	if b.lost != nil {
		return b.lost
	}
	return err
}

// ending is what the connection tells; after Close it is somebody else's, and the batch has its verdict.
func (b *batchResults) ending() pgfault.Ending {
	if b.conn == nil {
		return pgfault.Ending{}
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
	if a := b.account; a != nil {
		b.account = nil
		a.done(err)
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
