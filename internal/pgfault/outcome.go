package pgfault

import (
	"errors"
	"net"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// An Outcome says whether a statement that has failed took effect.
//
// NotExecuted is claimed by the protocol alone, with the server's source as the proof; docs/outcomes.md has the table,
// with a file and a function for every row.
//
//   - Under the simple query protocol the last statement of a text is committed before its command tag is sent
//     (exec_simple_query), under the extended one at Sync, after it (exec_execute_message, PostgresMain). So an answer that
//     comes before any tag comes before the commit under both.
//   - Nothing can be interrupted between the commit and the tag: CommitTransaction holds interrupts off, and a backend
//     that is terminated while it waits for a synchronous standby ends without a word (SyncRepWaitForLSN).
//   - After the tag the server may still log, and then obey a termination or a cancel (errfinish, check_log_duration).
//     Then only the protocol tells whether the commit had come before.
type Outcome uint8

const (
	Unknown Outcome = iota
	NotExecuted
	// InPart is the outcome of what may commit midway, a CALL or a text of several statements, and has failed by its own
	// error: the server has said how far it came. It is not sent again, and its error is the statement's.
	InPart
)

// outcomeOf returns whether what was sent can have taken effect.
func outcomeOf(e evidence, c Class) Outcome {
	if e.phase == phaseAcquire || NeverSent(e.err) || errors.Is(e.err, pgx.ErrTxCommitRollback) {
		return NotExecuted
	}
	answer := serverError(e.err)
	switch {
	case answer != nil:
		return outcomeOfAnswer(e, c, answer)
	case c != Application || e.Lost:
		return Unknown
	case e.Batch:
		return InPart
	}
	return NotExecuted // pgx refused it before it was sent, or the program's own Scan failed
}

// outcomeOfAnswer is outcomeOf if a server, or a proxy in front of it, has answered.
func outcomeOfAnswer(e evidence, c Class, answer *pgconn.PgError) Outcome {
	switch interrupted := byInterrupt(answer); {
	case neverForwarded(answer):
		if e.Batch {
			return Unknown // an earlier part of it may have been forwarded
		}
		return NotExecuted
	case !ofServer(answer):
		return Unknown
	case !e.Tagged && (answer.Code == "57P05" || answer.Code == "25P03"):
		return NotExecuted // the session had ended before the statement came
	case isFatal(answer) && !interrupted, e.Lost && !isFatal(answer):
		return Unknown // the backend may not have lived to roll back: an error in its clean-up comes after the commit
	case interrupted && (e.Tagged || e.Batch):
		return Unknown
	case e.Batch && (c != Refused || !e.Standby):
		return InPart
	case e.Tagged && e.Simple:
		return Unknown
	}
	return NotExecuted
}

// byInterrupt reports whether a backend was told to stop, from outside or by a timer, at a place where it obeys
// (ProcessInterrupts): admin_shutdown, query_canceled, transaction_timeout, and whatever else that function raises. It
// never obeys between a commit and its end. crash_shutdown is not among them: quickdie does not ask where the backend is.
func byInterrupt(e *pgconn.PgError) bool {
	switch e.Code {
	case "57P01", "57014", "25P04":
		return true
	}
	return e.Routine == "ProcessInterrupts" && e.Code != "57P02"
}

// ofServer reports whether an error is in PostgreSQL's own words. A proxy's own words lack some of the fields that a
// server always sends (PostgreSQL documentation, 55.8: severity, file and routine; send_message_to_frontend): Pgpool-II
// sends no untranslated severity and no routine, PgBouncer and others no file either.
func ofServer(e *pgconn.PgError) bool {
	return e.SeverityUnlocalized != "" && e.File != "" && e.Routine != ""
}

// withoutServer reports whether PgBouncer refuses to forward a statement because it cannot log in to its server: no
// server has seen the statement. The text goes on, and may quote the server.
func withoutServer(e *pgconn.PgError) bool {
	return isFatal(e) && e.Code == "08P01" && strings.HasPrefix(e.Message, "server login has been failing")
}

// neverForwarded reports what PgBouncer says to clients that wait for a server, and to no others: no server has seen the
// statement (check_fast_fail, pool_client_maint).
func neverForwarded(e *pgconn.PgError) bool {
	return withoutServer(e) || isFatal(e) && e.Code == "08P01" && !ofServer(e) && e.Message == "query_wait_timeout"
}

// NeverSent reports the two errors by which pgx says truthfully that nothing left the client: a failed write, and a
// context that had ended before.
func NeverSent(err error) bool {
	if !pgconn.SafeToRetry(err) || errors.Is(err, pgconn.ErrConnClosed) {
		return false
	}
	var op *net.OpError
	if errors.As(err, &op) {
		return op.Op == "write"
	}
	return true
}
