package pgfake

import "time"

// Type OIDs that a Response can encode in both formats. Any other type is sent in its text form.
const (
	BoolOID        uint32 = 16
	ByteaOID       uint32 = 17
	NameOID        uint32 = 19
	Int8OID        uint32 = 20
	Int2OID        uint32 = 21
	Int4OID        uint32 = 23
	TextOID        uint32 = 25
	OIDOID         uint32 = 26
	Float8OID      uint32 = 701
	VarcharOID     uint32 = 1043
	TimestamptzOID uint32 = 1184
	LSNOID         uint32 = 3220
)

// A Handler answers statements in place of the built-in answers; nil leaves the statement to them.
//
// It is called in the goroutine of the connection, holding no lock: it may call any method of the Peer but Close. A
// statement of the extended protocol is shown twice, first with Preparing set, when only Columns and an Err that a real
// server finds while parsing (class 42 but 42501) are used.
type Handler func(Statement) *Response

// Statement is what a Handler is shown.
type Statement struct {
	SQL string
	// Args are in text form where the type of the parameter is known, as sent otherwise; nil is NULL.
	Args      [][]byte
	Preparing bool // the client asks for a description; nothing is executed
	Simple    bool // it came by the simple query protocol
	InTx      bool
	// The state of the peer at this moment.
	Standby  bool
	Timeline uint32
	SystemID uint64
	LSN      uint64
}

// Column describes a result column. A zero OID is int4.
type Column struct {
	Name string
	OID  uint32
}

// Response is the answer to one statement. One that sets none of Columns, Rows, Tag and Err gets the built-in answer, but
// later, or cut, as it says.
type Response struct {
	Columns []Column
	// Rows hold nil, integers, bool, string, []byte, float64, time.Time. They are sent before Err.
	Rows [][]any
	Tag  string // "SELECT n" where empty
	Err  *Error

	Delay time.Duration // added to the delay of the Peer; inline connections do not wait
	Hang  bool          // executed, never answered: until a cancel request or the end of the connection
	Cut   Cut

	// Late comes after the tag. A statement of the simple query protocol outside of a transaction, and a COMMIT, is
	// committed by then; one of the extended protocol is undone by it, unless LateCommitted says that it comes after Sync's
	// commit.
	Late          *Error
	LateCommitted bool
	// Ended is called once, when the transaction that the statement ran in has ended, in the goroutine of the connection.
	Ended func(committed bool)
}

func (r *Response) answers() bool {
	return r.Columns != nil || r.Rows != nil || r.Tag != "" || r.Err != nil
}

// Cut says where a connection ends while a statement runs.
type Cut int

const (
	CutNever         Cut = iota
	CutBeforeExecute     // the statement had no effect
	CutBeforeAnswer      // it took effect, and nothing of the answer is sent
	CutBeforeTag         // it took effect, and its rows are sent, but not that it is complete
	CutAfterAnswer       // it is answered, with ReadyForQuery
)

// Error is an ErrorResponse. Severity is ERROR where empty; FATAL ends the connection.
type Error struct {
	Severity, Code, Message, Detail, Hint, Routine string
}

func (e *Error) fatal() bool { return e.Severity == "FATAL" || e.Severity == "PANIC" }

// atParse reports whether a real server would find the error before it executes anything.
func (e *Error) atParse() bool {
	return len(e.Code) == 5 && e.Code[:2] == "42" && e.Code != "42501"
}
