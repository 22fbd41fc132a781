package multipool

import (
	"context"
	"errors"
	"net"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/pgmultipool/multipool/internal/sqltext"
)

// What an error says of whether the statement took effect. "Not executed" is claimed by the protocol alone, with the
// server's source as the proof; docs/outcomes.md has the table, a file and a function for every row.
//
//   - Under the simple query protocol the last statement of a text is committed before its command tag is sent
//     (exec_simple_query), under the extended one at Sync, after it (exec_execute_message, PostgresMain). So an answer that
//     comes before any tag comes before the commit under both.
//   - Between the commit and the tag nothing can be interrupted: CommitTransaction holds interrupts off, and what is told to
//     end while it waits for a synchronous standby ends without a word (SyncRepWaitForLSN).
//   - After the tag the server may still log, and obey a termination or a cancel when it has (errfinish,
//     check_log_duration). Then only the protocol tells whether the commit had come before.

// executed is whether a statement took effect.
type executed uint8

const (
	executedUnknown executed = iota
	executedNo
	// executedInPart is of what may commit on its way, a CALL or a text of several statements, and has failed by its own
	// error: the server has said how far it came. It is not sent again, and its error is the statement's.
	executedInPart
)

// executedBy says whether what was sent can have taken effect.
func executedBy(e evidence, c class) executed {
	var answer *pgconn.PgError
	switch {
	case e.phase == phaseAcquire, neverSent(e.err), errors.Is(e.err, pgx.ErrTxCommitRollback):
		return executedNo
	case errors.As(e.err, &answer):
		return executedByAnswer(e, c, answer)
	case c != classApplication || e.lost:
		return executedUnknown
	case e.batch:
		return executedInPart
	}
	return executedNo // pgx refused it before it was sent, or the program's own Scan failed
}

// executedByAnswer is executedBy where a server, or what stands in front of it, has answered.
func executedByAnswer(e evidence, c class, answer *pgconn.PgError) executed {
	switch interrupted := byInterrupt(answer); {
	case neverForwarded(answer):
		if e.batch {
			return executedUnknown // an earlier part of it may have been forwarded
		}
		return executedNo
	case !ofServer(answer):
		return executedUnknown
	case !e.tagged && (answer.Code == "57P05" || answer.Code == "25P03"):
		return executedNo // the session had ended before the statement came
	case isFatal(answer) && !interrupted, e.lost && !isFatal(answer):
		return executedUnknown // the backend may not have lived to roll back: an error in its clean-up comes after the commit
	case interrupted && (e.tagged || e.batch):
		return executedUnknown
	case e.batch && (c != classRefused || !e.standby):
		return executedInPart
	case e.tagged && e.simple:
		return executedUnknown
	}
	return executedNo
}

// byInterrupt reports whether a backend was told to stop, from outside or by a timer, at a place where it obeys
// (ProcessInterrupts): admin_shutdown, query_canceled, transaction_timeout, and whatever else that function raises. It
// obeys nowhere between a commit and its end. crash_shutdown is none: quickdie does not ask where the backend is.
func byInterrupt(e *pgconn.PgError) bool {
	switch e.Code {
	case "57P01", "57014", "25P04":
		return true
	}
	return e.Routine == "ProcessInterrupts" && e.Code != "57P02"
}

// ofServer reports whether an error is in PostgreSQL's own words: a proxy's own lack some of the fields that a server
// always sends (PostgreSQL documentation, 55.8: severity, file and routine; send_message_to_frontend). Pgpool-II sends
// no untranslated severity and no routine, PgBouncer and others no file either.
func ofServer(e *pgconn.PgError) bool {
	return e.SeverityUnlocalized != "" && e.File != "" && e.Routine != ""
}

// withheld reports PgBouncer's refusal to hand a statement on because it cannot get into its server: no server has seen
// the statement. The text goes on, and may quote the server.
func withheld(e *pgconn.PgError) bool {
	return isFatal(e) && e.Code == "08P01" && strings.HasPrefix(e.Message, "server login has been failing")
}

// neverForwarded reports what PgBouncer says to clients that wait for a server, and to no others: no server has seen the
// statement (check_fast_fail, pool_client_maint).
func neverForwarded(e *pgconn.PgError) bool {
	return withheld(e) || isFatal(e) && e.Code == "08P01" && !ofServer(e) && e.Message == "query_wait_timeout"
}

// neverSent reports the two errors by which pgx says truthfully that nothing left the client: a failed write, and a
// context that had ended before.
func neverSent(err error) bool {
	if !pgconn.SafeToRetry(err) || errors.Is(err, pgconn.ErrConnClosed) {
		return false
	}
	var op *net.OpError
	if errors.As(err, &op) {
		return op.Op == "write"
	}
	return true
}

// markUnknown is the one place that gives a statement's error the mark of an unknown outcome.
func markUnknown(ctx context.Context, end ending, err error) error {
	if classify(end.evidence(ctx, err)).executed == executedUnknown {
		return &unknownOutcome{err}
	}
	return err
}

// ending is what a connection tells after a statement.
type ending struct {
	standby, recovers, lost, batch, tagged, simple bool // as in evidence
}

// evidence is what classify looks at after a statement on the connection.
func (end ending) evidence(ctx context.Context, err error) evidence {
	return evidence{
		err: err, ctx: ctx, phase: phaseRun,
		standby: end.standby, recovers: end.recovers, lost: end.lost, batch: end.batch, tagged: end.tagged, simple: end.simple,
	}
}

// sent is the statement that was last handed to a connection, as far as its outcome depends on it.
type sent struct {
	text   string // "" of a batch
	args   []any  // where they begin with one of pgx's options; nil elsewhere
	bare   bool   // no arguments were given
	query  bool   // by Query or QueryRow of a MultiPool
	tagged bool   // a command tag has come
}

// copyText stands for the text of a CopyFrom.
const copyText = "copy"

// takes notes a statement that pgx is about to send.
func (s *sent) takes(text string, args []any) {
	s.text, s.args, s.bare, s.tagged = text, nil, len(args) == 0, false
	if !s.bare {
		switch args[0].(type) {
		case pgx.QueryExecMode, pgx.QueryRewriter, pgx.QueryResultFormats, pgx.QueryResultFormatsByOID:
			s.args = args
		}
	}
}

// whole reports whether the statement is done as a whole or not at all, whatever ends it.
func (s *sent) whole() bool {
	return (!rewrites(s.args) && sqltext.Atomic(s.text)) || s.text == copyText || strings.EqualFold(s.text, "commit")
}

// simply reports whether pgx has sent the statement by the simple query protocol, or may have: Exec does so without
// arguments, and a copy always. mode is the connection's.
func (s *sent) simply(mode pgx.QueryExecMode) bool {
	bare := s.bare
	for _, arg := range s.args {
		switch arg := arg.(type) {
		case pgx.QueryExecMode:
			mode, bare = arg, true
			continue
		case pgx.QueryResultFormats, pgx.QueryResultFormatsByOID:
			bare = true
			continue
		case pgx.NamedArgs, pgx.StrictNamedArgs:
			_, values, err := arg.(pgx.QueryRewriter).RewriteQuery(context.Background(), nil, s.text, nil)
			bare = err != nil || len(values) == 0
		case pgx.QueryRewriter:
			bare = true // nobody knows what it makes
		default:
			bare = false
		}
		break
	}
	return mode == pgx.QueryExecModeSimpleProtocol || s.text == copyText || bare && !s.query
}
