package multipool

import (
	"context"
	"errors"
	"fmt"
	"io"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/pgmultipool/multipool/internal/pgfault"
)

func TestAnErrorOfUnknownOutcomeIsMarkedAndNoOther(t *testing.T) {
	t.Parallel()
	live := context.Background()
	for _, tc := range []struct {
		err    error
		end    pgfault.Ending
		marked bool
	}{
		{serverError("ERROR", "23505", "_bt_check_unique", ""), pgfault.Ending{}, false},
		{serverError("ERROR", "23505", "_bt_check_unique", ""), pgfault.Ending{Simple: true, Tagged: true}, true},
		{serverError("ERROR", "23505", "_bt_check_unique", ""), pgfault.Ending{Batch: true}, false},
		{serverError("FATAL", "57P01", "ProcessInterrupts", ""), pgfault.Ending{Lost: true}, false},
		{serverError("FATAL", "57P01", "ProcessInterrupts", ""), pgfault.Ending{Lost: true, Tagged: true}, true},
		{io.ErrUnexpectedEOF, pgfault.Ending{Lost: true}, true},
		{errors.New("cannot encode $1"), pgfault.Ending{}, false},
	} {
		for _, err := range []error{tc.err, fmt.Errorf("scanning: %w", tc.err)} {
			marked := markUnknown(live, tc.end, err)
			require.Equal(t, tc.marked, errors.Is(marked, ErrOutcomeUnknown), "%v, %+v", err, tc.end)
			require.ErrorIs(t, marked, err)
		}
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
