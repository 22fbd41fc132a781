package pgfault

import (
	"slices"
	"strings"
)

// The questions that the pool asks about one error. All of them answer false for nil and for an error that no server
// has sent.

// Answered reports whether a server, or a proxy in front of it, has answered.
func Answered(err error) bool { return serverError(err) != nil }

// Code returns the SQLSTATE of the answer that err wraps; "" where there is none.
func Code(err error) string {
	if e := serverError(err); e != nil {
		return e.Code
	}
	return ""
}

// AnsweredByServer reports whether a server itself has answered, as far as its words show it.
func AnsweredByServer(err error) bool {
	e := serverError(err)
	return e != nil && ofServer(e)
}

// PoolerHasNoServer reports whether PgBouncer refused to forward the statement because it cannot log in to its server: no
// server has seen it.
func PoolerHasNoServer(err error) bool {
	e := serverError(err)
	return e != nil && withoutServer(e)
}

// RefusedByStandby reports whether the error means "not on a standby", whoever sent it.
func RefusedByStandby(err error) bool {
	e := serverError(err)
	return e != nil && refusedByStandby(e)
}

// SessionRefused reports whether a standby refuses every statement of such a session, not this one: the session's default
// isolation level is serializable.
func SessionRefused(err error) bool {
	e := serverError(err)
	return e != nil && e.Code == "0A000" && e.Routine == "GetSerializableTransactionSnapshot"
}

// Stale reports whether a statement did nothing because what the session, or pgx, has kept of it is older than the
// objects: see isStale.
func Stale(err error) bool {
	e := serverError(err)
	return e != nil && isStale(e)
}

// TooManyConnections reports whether the server takes no more sessions, at all or of this role or database.
func TooManyConnections(err error) bool { return hasCode(err, "53300") } // too_many_connections

// CountsAsWrongPassword reports whether a refusal at log-in may count as a wrong password on a server that counts them.
// Those of class 28 do, except one that comes before a password is asked for (pg_hba.conf) or after it was right (no such
// role, as trust alone shows it). So does whatever a pooler says in its own name.
func CountsAsWrongPassword(err error) bool {
	e := serverError(err)
	if e == nil {
		return false
	}
	tried := e.Routine != "ClientAuthentication" && e.Routine != "InitializeSessionUserId"
	return strings.HasPrefix(e.Code, "28") && tried || e.Code == "08P01"
}

// Unsupported reports whether the server does not offer what was asked for: undefined_function, insufficient_privilege,
// feature_not_supported.
func Unsupported(err error) bool { return hasCode(err, "42883", "42501", "0A000") }

// WrongState reports object_not_in_prerequisite_state: "recovery is in progress", or is not.
func WrongState(err error) bool { return hasCode(err, "55000") }

// NotPrepared reports that the session knows no prepared statement of the name: invalid_sql_statement_name.
func NotPrepared(err error) bool { return hasCode(err, "26000") }

// InvalidParameter reports invalid_parameter_value.
func InvalidParameter(err error) bool { return hasCode(err, "22023") }

// InFailedTransaction reports that an earlier statement of the transaction has failed: in_failed_sql_transaction.
func InFailedTransaction(err error) bool { return hasCode(err, "25P02") }

// LostToAnother reports that the transaction was given up in favour of another one: serialization_failure,
// deadlock_detected. It may succeed if it is run again.
func LostToAnother(err error) bool { return hasCode(err, "40001", "40P01") }

func hasCode(err error, codes ...string) bool {
	e := serverError(err)
	return e != nil && slices.Contains(codes, e.Code)
}
