package multipool

import (
	"context"
	"errors"
	"slices"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgtype"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/pgmultipool/multipool/internal/sqltext"
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
	account  *account
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
func queryRows(ctx context.Context, c *pgxpool.Conn, w *wire, sql string, args []any, one bool) (*rows, error) {
	in, err := c.Conn().Query(ctx, sql, args...)
	if err != nil {
		return nil, err
	}
	r := w.newRows()
	r.Rows, r.conn = in, c
	r.writes = w.writes
	if in.Next() {
		var kept bool
		if one {
			w.row = rowCall{ctx, sql, args}
			kept = w.use.show()
		} else {
			kept = w.use.keep() // a row is out: it cannot be sent again
		}
		if kept {
			r.account = w.been.account
			return r, nil
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
	r.account = w.been.account
	return r, nil
}

// showing gives rows that have failed the error as the caller gets it; pgx has it at the end of the rows.
func (r *rows) showing(err error) *rows {
	if r != nil && err != nil {
		r.failed.err = err
	}
	return r
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

// end releases the connection, and marks the error of a write that was lost after its first row.
func (r *rows) end() {
	if r.conn != nil && r.writes && r.Rows.Err() != nil {
		w := wireOf(r.conn.Conn())
		if w.reads && !rewrites(w.sent.args) && !sqltext.MayWrite(w.sent.text) {
			r.release()
			r.told()
			return
		}
		r.failed = &failedStart{markUnknown(context.Background(), w.ending(), r.Rows.Err()), slices.Clone(r.Rows.FieldDescriptions())}
	}
	r.release()
	r.told()
}

// told tells the end of the call, once.
func (r *rows) told() {
	if a := r.account; a != nil {
		r.account = nil
		a.done(r.Err())
	}
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

// rowCall is the call of a QueryRow whose row is out and has not been scanned.
type rowCall struct {
	ctx  context.Context
	sql  string
	args []any
}

var errDriverBytes = errors.New("cannot scan into *pgtype.DriverBytes from QueryRow")

// Scan does what pgx's own does, in its order, and releases the connection whatever happens, a panicking destination
// included. Until it returns nothing is handed to the caller: a row whose end is lost is sent again like any other read.
func (r *row) Scan(dest ...any) error {
	for next := (*rows)(r); ; {
		again, err := next.scanFirst(dest)
		if again == nil {
			return err
		}
		next = again
	}
}

// scanFirst scans the first row and reads to the end; where that was lost it returns the rows of another attempt.
func (r *rows) scanFirst(dest []any) (again *rows, err error) {
	defer r.Close()
	for _, d := range dest {
		if _, ok := d.(*pgtype.DriverBytes); ok {
			return nil, errDriverBytes // its bytes would be gone when Scan returns
		}
	}
	if !r.Next() {
		if err := r.Err(); err != nil {
			return nil, err
		}
		return nil, pgx.ErrNoRows
	}
	if r.Rows.Scan(dest...) == nil { // else its error stays in Err
		if r.Rows.Close(); r.Rows.Err() != nil {
			if again, more, err := r.again(); more {
				return again, err
			}
		}
	}
	if r.conn != nil {
		wireOf(r.conn.Conn()).row = rowCall{}
	}
	r.Close()
	return nil, r.Err()
}

// again sends a QueryRow again whose row has come, and whose end has not; false: that may not be.
func (r *rows) again() (next *rows, more bool, err error) {
	w := wireOf(r.conn.Conn())
	call, been := w.row, w.been
	f := failure{at: w.peer, err: r.Rows.Err(), sent: true, end: w.ending()}
	f.end.Recovers = w.recovers(f.err)
	w.row = rowCall{}
	r.account = nil
	r.end() // what comes next may need the connection's place
	next, more, err = f.at.owner.queryAgain(call, been, f)
	if !more {
		r.account = been.account
	}
	return next, more, err
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
