package pgfault

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/puddle/v2"
)

// classOf returns the class of an error; the first rule that matches decides.
func classOf(e evidence) Class {
	err := e.err
	switch {
	case err == nil, errors.Is(err, pgx.ErrNoRows), errors.Is(err, pgx.ErrTooManyRows):
		return Application
	case errors.Is(err, puddle.ErrClosedPool):
		return Closed
	case errors.Is(err, pgx.ErrTxClosed), errors.Is(err, pgx.ErrTxCommitRollback), errors.As(err, new(pgx.ScanArgError)):
		return Application
	}
	if answer := serverError(err); answer != nil {
		return classOfAnswer(e, answer)
	}
	if e.phase == phaseAcquire {
		return classOfAcquire(e)
	}
	return classOfConn(e)
}

// classOfAnswer judges what a server answered. An answer beats the context: whatever the caller's clock says, the server
// has spoken.
func classOfAnswer(e evidence, answer *pgconn.PgError) Class {
	fatal := isFatal(answer)
	code := answer.Code
	var dial *pgconn.ConnectError
	switch {
	case code == "57014": // query_canceled
		if e.ctx.Err() != nil {
			return Caller
		}
		return Application
	case code == "40001" && answer.Routine == "ProcessInterrupts", e.Standby && (code == "40001" || code == "40P01"):
		return Conflict
	case (e.Standby || e.Recovers) && refusedByStandby(answer):
		return Refused
	case e.Standby && !fatal && (lacksObject(answer) || isStale(answer)):
		return Behind
	case code == "57P03": // cannot_connect_now
		return Starting
	case code == "57P01", code == "57P02": // admin_shutdown, crash_shutdown
		return Server
	case endsBySetting(code):
		return Application
	case code == "53400": // configuration_limit_exceeded: the statement's own
		return Application
	case strings.HasPrefix(code, "53"):
		return Overload
	case fatal && strings.HasPrefix(code, "08"):
		return classOfPooler(answer, errors.As(e.err, &dial))
	case !fatal && (code == "58P01" || code == "58P02") && !slices.Contains(storageFiles, answer.File): // undefined_file, duplicate_file
		return Application // a file that the statement names
	case strings.HasPrefix(code, "58"), code == "XX001", code == "XX002", // system_error, data_corrupted, index_corrupted
		fatal && strings.HasPrefix(code, "XX"): // internal_error: Pgpool says it at log-in while it has no server
		return Server
	case code == "57P04", errors.As(e.err, &dial): // database_dropped; any refusal at log-in
		return Config
	case fatal:
		return Server
	}
	return Application
}

// endsBySetting reports whether a time limit that the program or its administrator has set ended the session:
// idle_in_transaction_session_timeout, transaction_timeout (version 17), idle_session_timeout (version 14).
func endsBySetting(code string) bool { return code == "25P03" || code == "25P04" || code == "57P05" }

// storageFiles are the server's source files that report a missing file of the server's own. Others report a missing file
// that a COPY or pg_read_file names.
var storageFiles = []string{"md.c", "slru.c", "relmapper.c"}

// classOfPooler judges what a pooler says in its own name. PgBouncer has one SQLSTATE, 08P01, for all of it, so only the
// text tells whether it has no more room, or refuses a log-in as a server would by 28P01 or 3D000. Everything else is of
// servers that are gone and of operators who take a pooler out of use for a while. So is "bouncer config error", which
// PgBouncer also says to a client that was logging in when the server died that it asks for passwords.
func classOfPooler(answer *pgconn.PgError, dial bool) Class {
	holds := func(texts ...string) bool {
		return slices.ContainsFunc(texts, func(text string) bool { return strings.Contains(answer.Message, text) })
	}
	switch {
	case withoutServer(answer):
		return Server
	case holds("query_wait_timeout", "max_client_conn", "max_db_client_connections", "max_user_client_connections"):
		return Overload
	case dial && holds("authentication failed", "no such user", "no such database", "login rejected", "SSL required",
		"unsupported startup parameter", "not allowed"):
		return Config
	}
	return Server
}

// isFatal reports whether the error ends the session. It reads the severity that is not translated, which only servers
// before 9.6 lack.
func isFatal(e *pgconn.PgError) bool {
	severity := cmp.Or(e.SeverityUnlocalized, e.Severity)
	return severity == "FATAL" || severity == "PANIC"
}

// refusedByStandby reports whether an error, if a standby sends it, means "not on a standby". 25006 does. Others of that
// meaning share their SQLSTATE with other faults: the server routine, which is never translated, or the message tells.
func refusedByStandby(e *pgconn.PgError) bool {
	switch e.Code {
	case "25006": // read_only_sql_transaction
		return true
	case "0A000", "55000", "XX000": // feature_not_supported, object_not_in_prerequisite_state, internal_error
		switch e.Routine {
		case "GetSerializableTransactionSnapshot", "get_relation_info", "GetNewObjectId", "XLogBeginInsert",
			"call_bool_check_hook", "call_enum_check_hook", "pg_current_wal_lsn", "pg_current_wal_insert_lsn",
			"pg_current_wal_flush_lsn", "pg_switch_wal", "pg_create_restore_point", "pg_walfile_name":
			return true
		}
		return strings.Contains(e.Message, "recovery") || strings.Contains(e.Message, "hot standby")
	}
	return false
}

// lacksObject reports whether a server says that it lacks an object, a right or a file of an extension, or that the
// statement does not fit the objects as it has them. If the SQLSTATE is shared with other faults, the routine tells.
func lacksObject(e *pgconn.PgError) bool {
	by := func(routines ...string) bool { return slices.Contains(routines, e.Routine) }
	switch e.Code {
	case "3F000", "F0000": // invalid_schema_name, config_file_error: a dictionary's file
		return true
	case "23502", "23514": // not_null_violation, check_violation: of a domain, as nothing is written here
		return true
	case "22P02": // invalid_text_representation: a label, a number of columns
		return by("enum_in", "enum_recv", "record_in")
	case "22023": // invalid_parameter_value: a locale that the machine lacks
		return by("report_newlocale_failure", "make_icu_collator")
	case "55000": // object_not_in_prerequisite_state: a materialized view that was not populated
		return by("ExecOpenScanRelation")
	case "58P01": // undefined_file: an extension's library
		return by("internal_load_library", "load_external_function")
	case "XX000": // internal_error: for a type or a function by its number; such messages are not translated
		return strings.HasPrefix(e.Message, "cache lookup failed")
	}
	// Class 42 is about what is defined. Only what the grammar refuses is certainly the fault of the text: how many columns
	// a subquery may have, or what may be grouped, depends on definitions.
	return strings.HasPrefix(e.Code, "42") && !by("scanner_yyerror")
}

// isStale reports whether a statement did nothing because what the session, or pgx, has kept of it is older than the
// objects: a plan of another result, a description of other parameters or columns. pgx drops it after any error. The plan
// of a statement inside a function may be as stale after the function has done something: the error's Where tells.
func isStale(e *pgconn.PgError) bool {
	switch {
	case e.Where != "":
		return false
	case e.Code == "0A000": // "cached plan must not change result type"
		return e.Routine == "RevalidateCachedQuery"
	case e.Code == "08P01":
		return e.Routine == "exec_bind_message" || e.Routine == "PortalSetResultFormat"
	}
	return false
}

// classOfAcquire judges an error that came before there was a connection, and that no server has sent.
func classOfAcquire(e evidence) Class {
	var dial *pgconn.ConnectError
	var cert *tls.CertificateVerificationError
	switch {
	case IsLocal(e.err):
		return Local
	case isUnavailable(e.err):
		return Server
	case errors.As(e.err, &cert):
		return Config
	case errors.As(e.err, &dial):
		// The pool dials under a context of its own, so this is never the caller's deadline. Under sslmode=prefer the error
		// holds the refusal of TLS beside what the second dial met, and the latter counts.
		if strings.Contains(e.err.Error(), TLSRefused) && !isTransport(e.err) {
			return Config
		}
		return Server
	case e.ctx.Err() != nil && (e.err == context.Canceled || e.err == context.DeadlineExceeded): // not wrapped: so the pool reports it
		return Caller
	case isContext(e.err):
		return Application // of a hook of the program's, which may ask a secret store under a deadline of its own
	case isTransport(e.err):
		return Server
	}
	return Application // a hook's own
}

// TLSRefused is pgconn's text for a server that takes no TLS; pgconn has no type or value for it. Under sslmode=prefer it
// stands beside what the connection without TLS met.
const TLSRefused = "server refused TLS connection"

// IsLocal reports whether a dial failed for want of something on this side.
func IsLocal(err error) bool {
	var local LocalError
	if errors.As(err, &local) {
		return true
	}
	return slices.ContainsFunc(scarce, func(e syscall.Errno) bool { return errors.Is(err, e) })
}

// scarce are the errors of a system call if this process or its machine has no more descriptors, memory or ports.
var scarce = []syscall.Errno{syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM, syscall.EADDRNOTAVAIL}

// soon is how close to its deadline a context counts as ended: timers and the network poller are not exact.
const soon = 5 * time.Millisecond

// classOfConn judges what a connection in use reported without an answer from the server.
func classOfConn(e evidence) Class {
	if e.ctx.Err() != nil {
		return Caller
	}
	if deadline, ok := e.ctx.Deadline(); ok && time.Until(deadline) < soon {
		return Caller
	}
	if pgconn.Timeout(e.err) || (isTransport(e.err) && !isContext(e.err)) {
		return Server
	}
	return Application
}

// isContext reports the end of a context, except if pgx tells of it: then the error is of type timeout.
func isContext(err error) bool {
	return (errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)) && !pgconn.Timeout(err)
}

// isTransport reports an error of the connection itself.
func isTransport(err error) bool {
	var netErr net.Error
	var op *net.OpError
	var errno syscall.Errno
	return isUnavailable(err) || errors.Is(err, pgconn.ErrConnClosed) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) ||
		errors.Is(err, net.ErrClosed) || errors.As(err, &netErr) || errors.As(err, &op) || errors.As(err, &errno)
}
