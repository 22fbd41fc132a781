package multipool

import (
	"context"
	"errors"
	"slices"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgtype"
	"github.com/jackc/pgx/v5/pgxpool"
)

// rowsState is how far the caller of rows has come; the rows themselves are one row ahead.
type rowsState uint8

const (
	rowsFresh rowsState = iota // the first row has been read and the caller has not asked for it
	rowsOpen                   // the caller and the rows are at the same row
	rowsEnded                  // the caller has seen the end, or closed
)

// rows are pgx's rows with the first row read ahead: only the first answer of the server tells whether a statement
// works on this peer, and pgx has waited for it already when Query returns. The connection is released when the caller
// has seen the end, not when the read-ahead has: the field descriptions live in the connection.
type rows struct {
	pgx.Rows // embedded, not wrapped method by method: the interface grows in pgx's minor releases
	conn     *pgxpool.Conn
	failed   *failedStart // nil for all but rows that ended with an error before the first
	state    rowsState
	writes   bool // a lost connection leaves the outcome unknown
}

// failedStart is what rows show in place of their own when the connection has gone on without them.
type failedStart struct {
	err    error // as the caller gets it: perhaps marked
	fields []pgconn.FieldDescription
}

// queryRows runs a query and reads ahead. Rows that come with an error show it to a caller as pgx's own would, and do
// not hold the connection.
func queryRows(ctx context.Context, c *pgxpool.Conn, w *wire, sql string, args []any) (*rows, error) {
	in, err := c.Conn().Query(ctx, sql, args...)
	if err != nil {
		return nil, err
	}
	r := w.newRows()
	r.Rows, r.conn = in, c
	r.writes = w.writes
	if in.Next() {
		if w.use.CompareAndSwap(useRead, useHeld) || w.use.Load() != useCut {
			return r, nil // a row is out: it cannot be sent again
		}
		in.Close() // it is being cut, and will be sent again
		return nil, errPeerDown
	}
	r.state = rowsOpen
	if err := in.Err(); err != nil {
		r.failed = &failedStart{err, slices.Clone(in.FieldDescriptions())}
		r.conn, r.state = nil, rowsEnded
		return r, err
	}
	return r, nil
}

func (r *rows) release() {
	r.state = rowsEnded
	if r.conn != nil {
		r.conn.Release()
		r.conn = nil
	}
}

func (r *rows) Next() bool {
	switch {
	case r.state == rowsFresh:
		r.state = rowsOpen
		return true
	case r.state == rowsOpen && r.Rows.Next():
		return true
	}
	r.end()
	return false
}

// end releases the connection, and marks the error of a write that was lost behind its first row.
func (r *rows) end() {
	if r.conn != nil && r.writes && r.Rows.Err() != nil {
		w := wireOf(r.conn.Conn())
		if w.reads && !rewrites(w.sent.args) && !callsOthers(w.sent.text) {
			r.release()
			return
		}
		r.failed = &failedStart{markUnknown(context.Background(), w.ending(), r.Rows.Err()), slices.Clone(r.Rows.FieldDescriptions())}
	}
	r.release()
}

func (r *rows) Close() {
	r.Rows.Close()
	r.end()
}

func (r *rows) Err() error {
	if r.failed != nil {
		return r.failed.err
	}
	return r.Rows.Err()
}

func (r *rows) FieldDescriptions() []pgconn.FieldDescription {
	if r.failed != nil {
		return r.failed.fields // the connection serves somebody else by now
	}
	return r.Rows.FieldDescriptions()
}

func (r *rows) Scan(dest ...any) error {
	err := r.Rows.Scan(dest...)
	if err != nil {
		r.Close()
	}
	return err
}

func (r *rows) Values() ([]any, error) {
	values, err := r.Rows.Values()
	if err != nil {
		r.Close()
	}
	return values, err
}

// row is rows of which the caller wants the first.
type row rows

var errDriverBytes = errors.New("cannot scan into *pgtype.DriverBytes from QueryRow")

// Scan does what pgx's own does, in its order, and releases the connection whatever happens, a panicking destination
// included.
func (r *row) Scan(dest ...any) error {
	all := (*rows)(r)
	defer all.Close()
	for _, d := range dest {
		if _, ok := d.(*pgtype.DriverBytes); ok {
			return errDriverBytes // its bytes would be gone when Scan returns
		}
	}
	if !all.Next() {
		if err := all.Err(); err != nil {
			return err
		}
		return pgx.ErrNoRows
	}
	_ = all.Rows.Scan(dest...) // its error stays in Err
	all.Close()
	return all.Err()
}

// failedRows are rows that carry nothing but an error.
type failedRows struct{ err error }

func (failedRows) Close()                                       {}
func (r failedRows) Err() error                                 { return r.err }
func (failedRows) CommandTag() pgconn.CommandTag                { return pgconn.CommandTag{} }
func (failedRows) FieldDescriptions() []pgconn.FieldDescription { return nil }
func (failedRows) Next() bool                                   { return false }
func (r failedRows) Scan(...any) error                          { return r.err }
func (r failedRows) Values() ([]any, error)                     { return nil, r.err }
func (failedRows) RawValues() [][]byte                          { return nil }
func (failedRows) Conn() *pgx.Conn                              { return nil }
func (failedRows) TypeMap() *pgtype.Map                         { return nil }

// failedRow is a row that carries nothing but an error.
type failedRow struct{ err error }

func (r failedRow) Scan(...any) error { return r.err }
