package pgfault

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
	extended, extendedTagged, simple, simpleTagged, batch Outcome
}{
	{"an error of the statement", serverSays("ERROR", "23505", "_bt_check_unique", ""), false,
		NotExecuted, NotExecuted, NotExecuted, Unknown, InPart},
	{"a deferred constraint, a serialization failure", serverSays("ERROR", "40001", "PreCommit_CheckForSerializationFailure", ""), false,
		NotExecuted, NotExecuted, NotExecuted, Unknown, InPart},
	{"an error, and then the connection is lost", serverSays("ERROR", "53200", "AllocSetAlloc", ""), true,
		Unknown, Unknown, Unknown, Unknown, Unknown},
	{"57014, query_canceled", serverSays("ERROR", "57014", "ProcessInterrupts", ""), false,
		NotExecuted, Unknown, NotExecuted, Unknown, Unknown},
	{"57P01, admin_shutdown", serverSays("FATAL", "57P01", "ProcessInterrupts", ""), true,
		NotExecuted, Unknown, NotExecuted, Unknown, Unknown},
	{"25P04, transaction_timeout", serverSays("FATAL", "25P04", "ProcessInterrupts", ""), true,
		NotExecuted, Unknown, NotExecuted, Unknown, Unknown},
	{"57P02, crash_shutdown", serverSays("FATAL", "57P02", "quickdie", ""), true,
		Unknown, Unknown, Unknown, Unknown, Unknown},
	{"57P05, 25P03: the session was idle", serverSays("FATAL", "57P05", "ProcessInterrupts", ""), true,
		NotExecuted, Unknown, NotExecuted, Unknown, NotExecuted},
	{"another FATAL", serverSays("FATAL", "53200", "AllocSetAlloc", ""), true,
		Unknown, Unknown, Unknown, Unknown, Unknown},
	{"PANIC", serverSays("PANIC", "53100", "XLogWrite", ""), true,
		Unknown, Unknown, Unknown, Unknown, Unknown},
	{"PgBouncer: server login has been failing, query_wait_timeout", poolerError("query_wait_timeout"), true,
		NotExecuted, NotExecuted, NotExecuted, NotExecuted, Unknown},
	{"PgBouncer: anything else", poolerError("server conn crashed?"), true,
		Unknown, Unknown, Unknown, Unknown, Unknown},
	{"a proxy's own word", &pgconn.PgError{Severity: "ERROR", Code: "XX000", File: "pool_stream.c", Message: "unable to read data from DB node 2"}, false,
		Unknown, Unknown, Unknown, Unknown, Unknown},
}

var outcomeNames = map[Outcome]string{NotExecuted: "no", Unknown: "unknown", InPart: "its own word"}

func TestOutcomesAreClaimedByProtocol(t *testing.T) {
	t.Parallel()
	live := context.Background()
	for _, o := range outcomes {
		t.Run(o.answer, func(t *testing.T) {
			for _, tc := range []struct {
				end  Ending
				want Outcome
			}{
				{Ending{}, o.extended},
				{Ending{Tagged: true}, o.extendedTagged},
				{Ending{Simple: true}, o.simple},
				{Ending{Simple: true, Tagged: true}, o.simpleTagged},
				{Ending{Batch: true}, o.batch},
				{Ending{Batch: true, Simple: true}, o.batch},
			} {
				tc.end.Lost = o.lost
				for _, err := range []error{o.err, fmt.Errorf("scanning: %w", o.err)} {
					require.Equal(t, outcomeNames[tc.want], outcomeNames[Statement(live, err, tc.end).Outcome], "%+v", tc.end)
				}
			}
		})
	}
}

// The table of the documentation is this one.
func TestOutcomesAreDocumented(t *testing.T) {
	t.Parallel()
	page, err := os.ReadFile("../../docs/outcomes.md")
	require.NoError(t, err)
	for _, o := range outcomes {
		row := fmt.Sprintf("| %s | %s | %s | %s | %s | %s |", o.answer, outcomeNames[o.extended], outcomeNames[o.extendedTagged],
			outcomeNames[o.simple], outcomeNames[o.simpleTagged], outcomeNames[o.batch])
		require.True(t, strings.Contains(string(page), row), "docs/outcomes.md lacks the row\n%s", row)
	}
}

func TestWithoutAnAnswerOnlyWhatWasNeverSentIsKnown(t *testing.T) {
	t.Parallel()
	live := context.Background()
	for _, tc := range []struct {
		err  error
		end  Ending
		want Outcome
	}{
		{io.ErrUnexpectedEOF, Ending{Lost: true}, Unknown},
		{io.ErrUnexpectedEOF, Ending{Lost: true, Batch: true}, Unknown},
		{errors.New("cannot encode $1"), Ending{}, NotExecuted},
		{errors.New("cannot encode $1"), Ending{Batch: true}, InPart},
		{errors.New("received unexpected message"), Ending{Lost: true}, Unknown},
		{pgx.ErrTxCommitRollback, Ending{Lost: true, Tagged: true, Simple: true}, NotExecuted},
	} {
		require.Equal(t, tc.want, Statement(live, tc.err, tc.end).Outcome, "%v, %+v", tc.err, tc.end)
	}
}
