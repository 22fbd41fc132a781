package multipool

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
)

// class is whose fault an error is, and so what follows from it.
type class uint8

const (
	// classApplication: the server answered the statement, or the program misused the connection. Nobody is to blame
	// but the caller. Unknown errors end here: a wrong guess must not take a peer out.
	classApplication class = iota
	// classCaller: the caller's context ended.
	classCaller
	// classClosed: the pool was closed.
	classClosed
	// classPeer: the connection, or the server behind it, failed.
	classPeer
	// classStarting: the server says that it is starting up or shutting down (57P03).
	classStarting
	// classConfig: the server refuses us: password, database, role, TLS.
	classConfig
	// classOverload: the server, or our own pool, has no more room.
	classOverload
	// classRefused: a standby refused a statement that it cannot run; a primary can.
	classRefused
	// classConflict: replay on a standby cancelled the statement (PostgreSQL documentation, 27.4.2).
	classConflict
	// classBehind: a standby lacks something that the primary may have, or knows it in an older shape: its definition is
	// not replayed yet.
	classBehind
	// classHere: what it takes to dial is missing here: the name service, a descriptor, a port. The server was not asked.
	classHere
)

// phase is how far a call had come.
type phase uint8

const (
	phaseAcquire phase = iota // no connection yet: nothing was sent
	phaseRun                  // handed to a connection
)

// verdict is what classify says of an error.
type verdict struct {
	class    class
	executed executed
}

// blamesPeer reports whether the error is evidence against the peer.
func (v verdict) blamesPeer() bool { return v.class == classPeer || v.class == classStarting }

// passes reports whether the error is one that a wait may cure: elsewhere, or here when a connection is released.
func (v verdict) passes() bool { return v.blamesPeer() || v.class == classHere }

// evidence is what classify looks at.
type evidence struct {
	err     error
	ctx     context.Context // the caller's
	phase   phase
	standby bool // the session's last report of in_hot_standby is "on"
	lost    bool // the connection is closed by now
	batch   bool // more may have been sent than one statement that is done as a whole or not at all
	tagged  bool // a command tag has come
	simple  bool // it was, or may have been, sent by the simple query protocol
	// recovers is the answer of the session that refused the statement, where nothing else tells that it is on a standby.
	recovers bool
}

// classify judges an error by its type and SQLSTATE (PostgreSQL documentation, appendix A), first match first. It is
// pure but for reading the caller's context, which knows whose deadline has passed: pgx reports a deadline of its own
// and the caller's alike. pgconn.SafeToRetry is not asked: it says false for a dial that was refused, and up to
// pgx 5.12 it said true for a statement in flight under the simple protocol.
func classify(e evidence) verdict {
	v := verdict{class: classOf(e)}
	v.executed = executedBy(e, v.class)
	return v
}

func classOf(e evidence) class {
	err := e.err
	switch {
	case err == nil, errors.Is(err, pgx.ErrNoRows), errors.Is(err, pgx.ErrTooManyRows):
		return classApplication
	case errors.Is(err, ErrClosedPool):
		return classClosed
	case errors.Is(err, pgx.ErrTxClosed), errors.Is(err, pgx.ErrTxCommitRollback), errors.As(err, new(pgx.ScanArgError)):
		return classApplication
	}
	var pgErr *pgconn.PgError
	if errors.As(err, &pgErr) {
		return classOfServer(e, pgErr)
	}
	if e.phase == phaseAcquire {
		return classOfAcquire(e)
	}
	return classOfConn(e)
}

// classOfServer judges what a server answered. An answer beats the context: whatever the caller's clock says, the
// server has spoken.
func classOfServer(e evidence, pgErr *pgconn.PgError) class {
	fatal := isFatal(pgErr)
	code := pgErr.Code
	var dial *pgconn.ConnectError
	switch {
	case code == "57014": // query_canceled
		if e.ctx.Err() != nil {
			return classCaller
		}
		return classApplication
	case code == "40001" && pgErr.Routine == "ProcessInterrupts", e.standby && (code == "40001" || code == "40P01"):
		return classConflict
	case (e.standby || e.recovers) && refusedByStandby(pgErr):
		return classRefused
	case e.standby && !fatal && (lacksObject(pgErr) || isStale(pgErr)):
		return classBehind
	case code == "57P03": // cannot_connect_now
		return classStarting
	case code == "57P01", code == "57P02": // admin_shutdown, crash_shutdown
		return classPeer
	case endsBySetting(code):
		return classApplication
	case code == "53400": // configuration_limit_exceeded: the statement's own
		return classApplication
	case strings.HasPrefix(code, "53"):
		return classOverload
	case fatal && strings.HasPrefix(code, "08"):
		return classOfPooler(pgErr, errors.As(e.err, &dial))
	case !fatal && (code == "58P01" || code == "58P02") && !slices.Contains(storageFiles, pgErr.File): // undefined_file, duplicate_file
		return classApplication // that a statement names
	case strings.HasPrefix(code, "58"), code == "XX001", code == "XX002", // system_error, data_corrupted, index_corrupted
		fatal && strings.HasPrefix(code, "XX"): // internal_error, as Pgpool says at log-in while it has no server
		return classPeer
	case code == "57P04", errors.As(e.err, &dial): // database_dropped; any refusal at log-in
		return classConfig
	case fatal:
		return classPeer
	}
	return classApplication
}

// endsBySetting reports whether a session was ended by a time limit that the program or its administrator has set for it:
// idle_in_transaction_session_timeout, transaction_timeout (version 17), idle_session_timeout (14).
func endsBySetting(code string) bool { return code == "25P03" || code == "25P04" || code == "57P05" }

// isFull reports that the server takes no more sessions, at all or of this role or database.
func isFull(err error) bool {
	var e *pgconn.PgError
	return errors.As(err, &e) && e.Code == "53300" // too_many_connections
}

// triesPassword reports whether a refusal at log-in may count as a wrong password where those are counted: any by 28xxx, except
// those that come before a password is asked for (pg_hba.conf) or after it was right (no such role, as trust alone shows it);
// and what a pooler says in its own name.
func triesPassword(err error) bool {
	var e *pgconn.PgError
	if !errors.As(err, &e) {
		return false
	}
	tried := e.Routine != "ClientAuthentication" && e.Routine != "InitializeSessionUserId"
	return strings.HasPrefix(e.Code, "28") && tried || e.Code == "08P01"
}

// storageFiles are the server's source files that miss a file of the server's own: one that a COPY or pg_read_file
// names is missed by others.
var storageFiles = []string{"md.c", "slru.c", "relmapper.c"}

// classOfPooler judges what a pooler says in its own name. PgBouncer has one SQLSTATE for all of it, 08P01, so that
// only the text tells: whether it has no more room, or refuses us at log-in as a server would by 28P01 or 3D000. The
// rest is of servers that are gone and of operators who take a pooler out for a while, and "bouncer config error",
// which it says also to who was logging in when the server died that it asks for passwords.
func classOfPooler(e *pgconn.PgError, dial bool) class {
	holds := func(texts ...string) bool {
		return slices.ContainsFunc(texts, func(text string) bool { return strings.Contains(e.Message, text) })
	}
	switch {
	case withheld(e):
		return classPeer
	case holds("query_wait_timeout", "max_client_conn", "max_db_client_connections", "max_user_client_connections"):
		return classOverload
	case dial && holds("authentication failed", "no such user", "no such database", "login rejected", "SSL required",
		"unsupported startup parameter", "not allowed"):
		return classConfig
	}
	return classPeer
}

// isFatal asks the severity that is not translated; only servers before 9.6 lack it.
func isFatal(e *pgconn.PgError) bool { return severityOf(e) == "FATAL" || isPanic(e) }

func isPanic(e *pgconn.PgError) bool { return severityOf(e) == "PANIC" }

func severityOf(e *pgconn.PgError) string { return cmp.Or(e.SeverityUnlocalized, e.Severity) }

// refusedByStandby reports whether a standby's error means "not on a standby". 25006 does; its twins share their
// SQLSTATE with other faults and are told by the server routine, which is never translated, or by the message.
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

// refusedBecauseOfRole is refusedByStandby of any error.
func refusedBecauseOfRole(err error) bool {
	var e *pgconn.PgError
	return errors.As(err, &e) && refusedByStandby(e)
}

// lacksObject reports whether a server says that it lacks an object, a right or a file of an extension, or that the
// statement does not fit the objects as it has them. Routines tell what shares its SQLSTATE with other faults.
func lacksObject(e *pgconn.PgError) bool {
	by := func(routines ...string) bool { return slices.Contains(routines, e.Routine) }
	switch e.Code {
	case "3F000", "F0000": // invalid_schema_name, config_file_error: a dictionary's file
		return true
	case "23502", "23514": // not_null_violation, check_violation: of a domain, where nobody writes
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
	// Of class 42, which is about what is defined, only what the grammar refuses is the text's fault for sure: how many
	// columns a subquery may have, or what may be grouped, hangs on definitions.
	return strings.HasPrefix(e.Code, "42") && !by("scanner_yyerror")
}

// isStale reports whether a statement did nothing because what the session, or pgx, has kept of it is older than the
// objects: a plan of another result, a description of other parameters or columns. pgx drops it on any error. A function's
// own plan may be as stale, after the function has done something: that error tells where.
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

// metStale is isStale of any error.
func metStale(err error) bool {
	var e *pgconn.PgError
	return errors.As(err, &e) && isStale(e)
}

// refusesSession reports whether a standby refuses every statement of such a session, not this one: a default of
// serializable isolation.
func refusesSession(err error) bool {
	var e *pgconn.PgError
	return errors.As(err, &e) && e.Code == "0A000" && e.Routine == "GetSerializableTransactionSnapshot"
}

// classOfAcquire judges an error that came before there was a connection.
func classOfAcquire(e evidence) class {
	var dial *pgconn.ConnectError
	var cert *tls.CertificateVerificationError
	switch {
	case failedHere(e.err):
		return classHere
	case errors.Is(e.err, errPeerDown), errors.Is(e.err, errLapsed), errors.Is(e.err, errUnmade), errors.Is(e.err, errUntold), errors.Is(e.err, errLed):
		return classPeer // our own word, at a dial or a wait that the peer's fall has ended; elsewhere is where to go
	case errors.As(e.err, &cert):
		return classConfig
	case errors.As(e.err, &dial):
		// The pool dials under a context of its own, so this is never the caller's deadline. Under sslmode=prefer the refusal
		// of TLS is told beside what the second dial met: that counts.
		if strings.Contains(e.err.Error(), tlsRefused) && !isTransport(e.err) {
			return classConfig
		}
		return classPeer
	case e.ctx.Err() != nil && (e.err == context.Canceled || e.err == context.DeadlineExceeded): // bare: how the pool reports it
		return classCaller
	case isContext(e.err):
		return classApplication // of a hook of the program's, which may ask a secret store under a deadline of its own
	case isTransport(e.err):
		return classPeer
	}
	return classApplication // a hook's own
}

// failedHere reports whether a dial failed for want of something on this side.
func failedHere(err error) bool {
	var lookup *lookupError
	if errors.As(err, &lookup) {
		return true
	}
	return slices.ContainsFunc(scarce, func(e syscall.Errno) bool { return errors.Is(err, e) })
}

// scarce are what a system call says where this process or its machine has no more descriptors, memory or ports.
var scarce = []syscall.Errno{syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM, syscall.EADDRNOTAVAIL}

// soon is how close to its deadline a context counts as ended: timers and the network poller are not exact.
const soon = 5 * time.Millisecond

// classOfConn judges what a connection in use reported without an answer from the server.
func classOfConn(e evidence) class {
	if e.ctx.Err() != nil {
		return classCaller
	}
	if deadline, ok := e.ctx.Deadline(); ok && time.Until(deadline) < soon {
		return classCaller
	}
	if pgconn.Timeout(e.err) || (isTransport(e.err) && !isContext(e.err)) {
		return classPeer
	}
	return classApplication
}

// isContext reports the end of a context by other than pgx's word, which is of type timeout.
func isContext(err error) bool {
	return (errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)) && !pgconn.Timeout(err)
}

// isTransport reports an error of the connection itself.
func isTransport(err error) bool {
	var netErr net.Error
	var op *net.OpError
	var errno syscall.Errno
	return errors.Is(err, errPeerDown) || errors.Is(err, pgconn.ErrConnClosed) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) ||
		errors.Is(err, net.ErrClosed) || errors.As(err, &netErr) || errors.As(err, &op) || errors.As(err, &errno)
}

// verdictOf judges what was met outside any call, by a look or a dial of ours: nobody's context but its own has ended.
func verdictOf(err error) verdict {
	return classify(evidence{err: err, ctx: context.Background(), phase: phaseAcquire})
}
