// Package pgfault tells what an error of PostgreSQL, or of the way to it, says: of the server (Class) and of the
// statement (Outcome). It is the only place that reads SQLSTATEs.
//
// Statement, Acquire, Dial and Check judge an error by where it was met. The MultiPool's calls, the tracer of a
// connection and the monitor of a server act on their Verdict. The other functions answer one question each.
//
// The package knows neither pools nor servers. An error that its caller makes itself is judged by what it says of
// itself: see Unavailable and LocalError.
package pgfault

import (
	"context"
	"errors"

	"github.com/jackc/pgx/v5/pgconn"
)

// A Class says whose fault an error is, and so what follows from it.
type Class uint8

const (
	// Application: the server answered the statement, or the program misused the connection. Nobody but the caller is to
	// blame. Unknown errors are of this class: a wrong guess must not take a server out of use.
	Application Class = iota
	// Caller: the caller's context ended.
	Caller
	// Closed: the pool was closed.
	Closed
	// Server: the connection, or the server at its other end, failed.
	Server
	// Starting: the server says that it is starting up or shutting down (57P03).
	Starting
	// Config: the server refuses us: password, database, role, TLS.
	Config
	// Overload: the server, or our own pool, has no more room.
	Overload
	// Refused: a standby refused a statement that it cannot run; a primary can.
	Refused
	// Conflict: replay on a standby cancelled the statement (PostgreSQL documentation, 27.4.2).
	Conflict
	// Behind: a standby lacks something that the primary may have, or knows it in an older shape, because it has not
	// replayed the definition yet.
	Behind
	// Local: this process or its machine lacks what a dial takes: a name service, a descriptor, a port. The server was not
	// asked.
	Local
)

// A Verdict is what an error says. Only this package makes one.
type Verdict struct {
	Class   Class
	Outcome Outcome
}

// BlamesServer reports whether the error is evidence against the server.
func (v Verdict) BlamesServer() bool { return v.Class == Server || v.Class == Starting }

// Transient reports whether waiting may help: for another server, or for a connection to be released here.
func (v Verdict) Transient() bool { return v.BlamesServer() || v.Class == Local }

// Statement judges the error with which a statement ended on a connection. ctx is the caller's.
func Statement(ctx context.Context, err error, end Ending) Verdict {
	return judge(evidence{err: err, ctx: ctx, phase: phaseRun, Ending: end})
}

// Acquire judges an error that came before there was a connection: nothing was sent. ctx is the caller's. standby says
// that the server is known as a standby.
func Acquire(ctx context.Context, err error, standby bool) Verdict {
	return judge(evidence{err: err, ctx: ctx, phase: phaseAcquire, Ending: Ending{Standby: standby}})
}

// Check judges an error that a health check or a dial of ours met outside any call: no context but its own has ended.
func Check(err error) Verdict { return Acquire(context.Background(), err, false) }

// Dial judges the error of a dial that has not come as far as an answer: unless it failed here, the server is to blame.
func Dial(err error) Verdict {
	if IsLocal(err) {
		return Verdict{Local, NotExecuted}
	}
	return Verdict{Server, NotExecuted}
}

// An Ending is what a connection tells after a statement, as far as the verdict depends on it.
type Ending struct {
	Standby bool // the session's last report of in_hot_standby is "on"
	Lost    bool // the connection is closed by now
	Batch   bool // more may have been sent than one statement that takes effect as a whole or not at all
	Tagged  bool // a command tag has come
	Simple  bool // it was, or may have been, sent by the simple query protocol
	// Recovers is the answer of the session that refused the statement, if nothing else tells that it is on a standby.
	Recovers bool
}

// phase is how far a call had come.
type phase uint8

const (
	phaseAcquire phase = iota // no connection yet: nothing was sent
	phaseRun                  // handed to a connection
)

// evidence is what a verdict depends on.
type evidence struct {
	err   error
	ctx   context.Context // the caller's
	phase phase
	Ending
}

// judge judges an error by its type and SQLSTATE (PostgreSQL documentation, appendix A). It is pure except that it reads
// the caller's context, which knows whose deadline has passed: pgx reports its own deadline as it reports the caller's.
// pgconn.SafeToRetry is not asked: it says false for a dial that was refused, and up to pgx 5.12 it said true for a
// statement in flight under the simple protocol.
func judge(e evidence) Verdict {
	v := Verdict{Class: classOf(e)}
	v.Outcome = outcomeOf(e, v.Class)
	return v
}

// unavailable is the type of the errors that Unavailable makes.
type unavailable struct{ text string }

func (e *unavailable) Error() string { return e.text }

// Unavailable returns an error by which the pool itself says that a server has no connection to give: another server may
// have one. It is judged as the server's, without being evidence of anything new.
func Unavailable(text string) error { return &unavailable{text} }

func isUnavailable(err error) bool {
	var e *unavailable
	return errors.As(err, &e)
}

// A LocalError is an error of a dial that failed for want of something on this side.
type LocalError interface {
	error
	FailedLocally()
}

// serverError returns the error of a server that err wraps, or nil.
func serverError(err error) *pgconn.PgError {
	var e *pgconn.PgError
	if errors.As(err, &e) {
		return e
	}
	return nil
}
