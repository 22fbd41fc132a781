package multipool

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/stretchr/testify/require"
)

// outcomes is the table of docs/outcomes.md: what is claimed of one statement, by what answers for it, the protocol and
// whether its command tag had come.
var outcomes = []struct {
	answer string
	err    *pgconn.PgError
	lost   bool
	// One statement that is done as a whole, under the extended and the simple protocol, before its tag and after it; and
	// what may commit on its way, before any tag.
	extended, extendedTagged, simple, simpleTagged, batch executed
}{
	{"an error of the statement", serverError("ERROR", "23505", "_bt_check_unique", ""), false,
		executedNo, executedNo, executedNo, executedUnknown, executedInPart},
	{"a deferred constraint, a serialization failure", serverError("ERROR", "40001", "PreCommit_CheckForSerializationFailure", ""), false,
		executedNo, executedNo, executedNo, executedUnknown, executedInPart},
	{"an error, and then the connection is lost", serverError("ERROR", "53200", "AllocSetAlloc", ""), true,
		executedUnknown, executedUnknown, executedUnknown, executedUnknown, executedUnknown},
	{"57014, query_canceled", serverError("ERROR", "57014", "ProcessInterrupts", ""), false,
		executedNo, executedUnknown, executedNo, executedUnknown, executedUnknown},
	{"57P01, admin_shutdown", serverError("FATAL", "57P01", "ProcessInterrupts", ""), true,
		executedNo, executedUnknown, executedNo, executedUnknown, executedUnknown},
	{"25P04, transaction_timeout", serverError("FATAL", "25P04", "ProcessInterrupts", ""), true,
		executedNo, executedUnknown, executedNo, executedUnknown, executedUnknown},
	{"57P02, crash_shutdown", serverError("FATAL", "57P02", "quickdie", ""), true,
		executedUnknown, executedUnknown, executedUnknown, executedUnknown, executedUnknown},
	{"57P05, 25P03: the session was idle", serverError("FATAL", "57P05", "ProcessInterrupts", ""), true,
		executedNo, executedUnknown, executedNo, executedUnknown, executedNo},
	{"another FATAL", serverError("FATAL", "53200", "AllocSetAlloc", ""), true,
		executedUnknown, executedUnknown, executedUnknown, executedUnknown, executedUnknown},
	{"PANIC", serverError("PANIC", "53100", "XLogWrite", ""), true,
		executedUnknown, executedUnknown, executedUnknown, executedUnknown, executedUnknown},
	{"PgBouncer: server login has been failing, query_wait_timeout", poolerError("query_wait_timeout"), true,
		executedNo, executedNo, executedNo, executedNo, executedUnknown},
	{"PgBouncer: anything else", poolerError("server conn crashed?"), true,
		executedUnknown, executedUnknown, executedUnknown, executedUnknown, executedUnknown},
	{"a proxy's own word", &pgconn.PgError{Severity: "ERROR", Code: "XX000", File: "pool_stream.c", Message: "unable to read data from DB node 2"}, false,
		executedUnknown, executedUnknown, executedUnknown, executedUnknown, executedUnknown},
}

var executedNames = map[executed]string{executedNo: "no", executedUnknown: "unknown", executedInPart: "its own word"}

func TestOutcomesAreClaimedByProtocol(t *testing.T) {
	t.Parallel()
	live := context.Background()
	for _, o := range outcomes {
		t.Run(o.answer, func(t *testing.T) {
			for _, tc := range []struct {
				end  ending
				want executed
			}{
				{ending{}, o.extended},
				{ending{tagged: true}, o.extendedTagged},
				{ending{simple: true}, o.simple},
				{ending{simple: true, tagged: true}, o.simpleTagged},
				{ending{batch: true}, o.batch},
				{ending{batch: true, simple: true}, o.batch},
			} {
				tc.end.lost = o.lost
				for _, err := range []error{o.err, fmt.Errorf("scanning: %w", o.err)} {
					require.Equal(t, executedNames[tc.want], executedNames[classify(tc.end.evidence(live, err)).executed], "%+v", tc.end)
					marked := markUnknown(live, tc.end, err)
					require.Equal(t, tc.want == executedUnknown, errors.Is(marked, ErrOutcomeUnknown), "%+v", tc.end)
					require.ErrorIs(t, marked, err)
				}
			}
		})
	}
}

// The table of the documentation is this one.
func TestOutcomesAreDocumented(t *testing.T) {
	t.Parallel()
	page, err := os.ReadFile("docs/outcomes.md")
	require.NoError(t, err)
	for _, o := range outcomes {
		row := fmt.Sprintf("| %s | %s | %s | %s | %s | %s |", o.answer, executedNames[o.extended], executedNames[o.extendedTagged],
			executedNames[o.simple], executedNames[o.simpleTagged], executedNames[o.batch])
		require.True(t, strings.Contains(string(page), row), "docs/outcomes.md lacks the row\n%s", row)
	}
}

func TestWithoutAnAnswerOnlyWhatWasNeverSentIsKnown(t *testing.T) {
	t.Parallel()
	live := context.Background()
	for _, tc := range []struct {
		err  error
		end  ending
		want executed
	}{
		{io.ErrUnexpectedEOF, ending{lost: true}, executedUnknown},
		{io.ErrUnexpectedEOF, ending{lost: true, batch: true}, executedUnknown},
		{errors.New("cannot encode $1"), ending{}, executedNo},
		{errors.New("cannot encode $1"), ending{batch: true}, executedInPart},
		{errors.New("received unexpected message"), ending{lost: true}, executedUnknown},
		{pgx.ErrTxCommitRollback, ending{lost: true, tagged: true, simple: true}, executedNo},
	} {
		require.Equal(t, tc.want, classify(tc.end.evidence(live, tc.err)).executed, "%v, %+v", tc.err, tc.end)
	}
}

// namedBy is a rewriter of the program's.
type namedBy struct{ args []any }

func (n namedBy) RewriteQuery(context.Context, *pgx.Conn, string, []any) (string, []any, error) {
	return "call anything()", n.args, nil
}

func TestWhatIsSentByTheSimpleProtocol(t *testing.T) {
	t.Parallel()
	const extended, simple = pgx.QueryExecModeCacheStatement, pgx.QueryExecModeSimpleProtocol
	for _, tc := range []struct {
		name  string
		text  string
		args  []any
		query bool
		mode  pgx.QueryExecMode
		want  bool
		whole bool
	}{
		{"Exec without arguments", "insert into t values (1)", nil, false, extended, true, true},
		{"Query without arguments", "insert into t values (1) returning id", nil, true, extended, false, true},
		{"Exec", "insert into t values ($1)", []any{1}, false, extended, false, true},
		{"Exec of a simple pool", "insert into t values ($1)", []any{1}, false, simple, true, true},
		{"Query of a simple pool", "select $1", []any{1}, true, simple, true, true},
		{"Exec that says the mode", "insert into t values ($1)", []any{simple, 1}, false, extended, true, true},
		{"... and no argument", "insert into t values (1)", []any{extended}, false, extended, true, true},
		{"... of a simple pool", "insert into t values ($1)", []any{pgx.QueryExecModeExec, 1}, false, simple, false, true},
		{"Query that says the format", "select $1", []any{pgx.QueryResultFormats{1}, 1}, true, extended, false, true},
		{"Exec with names", "insert into t values (@id)", []any{pgx.NamedArgs{"id": 1}}, false, extended, false, true},
		{"... that the text does not have", "insert into t values (1)", []any{pgx.NamedArgs{"id": 1}}, false, extended, true, true},
		{"... strictly", "insert into t values (@id)", []any{pgx.StrictNamedArgs{"id": 1}}, false, extended, false, true},
		{"Exec with a rewriter", "one", []any{namedBy{[]any{1}}}, false, extended, true, false},
		{"Query with a rewriter", "select 1", []any{namedBy{[]any{1}}}, true, extended, false, false},
		{"COMMIT", "commit", nil, false, extended, true, true},
		{"a CommitQuery", "commit; select 1", nil, false, extended, true, false},
		{"two statements", "insert into t values (1); insert into t values (2)", nil, false, extended, true, false},
		{"CALL", "call p($1)", []any{1}, false, extended, false, false},
		{"DO", "do $$ begin commit; end $$", nil, false, extended, true, false},
		{"CopyFrom", copyText, nil, false, extended, true, true},
		{"a batch", "", nil, false, extended, true, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var s sent
			s.tagged, s.query = true, tc.query
			s.takes(tc.text, tc.args)
			require.False(t, s.tagged)
			require.Equal(t, tc.want, s.simply(tc.mode))
			require.Equal(t, tc.whole, s.whole())
		})
	}
}
