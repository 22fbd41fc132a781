package pgfault

import (
	"context"
	"errors"
	"fmt"
	"io"
	"syscall"
	"testing"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/stretchr/testify/require"
)

func TestTheQuestionsAboutOneError(t *testing.T) {
	t.Parallel()
	says := func(code, routine string) error { return serverSays("ERROR", code, routine, "") }
	for _, tc := range []struct {
		name    string
		ask     func(error) bool
		yes, no []error
	}{
		{"Answered", Answered, []error{says("23505", ""), poolerError("x")}, nil},
		{"AnsweredByServer", AnsweredByServer, []error{says("23505", "")}, []error{poolerError("x")}},
		{"PoolerHasNoServer", PoolerHasNoServer, []error{poolerError("server login has been failing, try again later")},
			[]error{poolerError("query_wait_timeout"), says("08P01", "")}},
		{"RefusedByStandby", RefusedByStandby, []error{says("25006", ""), says("0A000", "get_relation_info")}, []error{says("0A000", "x"), says("25P02", "")}},
		{"SessionRefused", SessionRefused, []error{says("0A000", "GetSerializableTransactionSnapshot")}, []error{says("0A000", "get_relation_info")}},
		{"Stale", Stale, []error{says("0A000", "RevalidateCachedQuery"), says("08P01", "exec_bind_message")},
			[]error{says("0A000", "x"), &pgconn.PgError{Code: "0A000", Routine: "RevalidateCachedQuery", Where: "PL/pgSQL function f()"}}},
		{"TooManyConnections", TooManyConnections, []error{says("53300", "")}, []error{says("53200", "")}},
		{"CountsAsWrongPassword", CountsAsWrongPassword, []error{says("28P01", "auth_failed"), says("28000", ""), poolerError("x")},
			[]error{says("28000", "ClientAuthentication"), says("28000", "InitializeSessionUserId"), says("3D000", "")}},
		{"Unsupported", Unsupported, []error{says("42883", ""), says("42501", ""), says("0A000", "")}, []error{says("42P01", "")}},
		{"WrongState", WrongState, []error{says("55000", "")}, []error{says("55006", "")}},
		{"NotPrepared", NotPrepared, []error{says("26000", "")}, []error{says("42P05", "")}},
		{"InvalidParameter", InvalidParameter, []error{says("22023", "")}, []error{says("22P02", "")}},
		{"InFailedTransaction", InFailedTransaction, []error{says("25P02", "")}, []error{says("25006", "")}},
		{"LostToAnother", LostToAnother, []error{says("40001", ""), says("40P01", "")}, []error{says("40003", "")}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			for _, err := range tc.yes {
				require.True(t, tc.ask(err), "%#v", err)
				require.True(t, tc.ask(fmt.Errorf("asking: %w", err)), "%#v", err)
			}
			for _, err := range append(tc.no, nil, io.EOF, errors.New("28P01")) {
				require.False(t, tc.ask(err), "%#v", err)
			}
		})
	}
}

// lookupFailure is a LocalError.
type lookupFailure struct{ error }

func (lookupFailure) FailedLocally() {}

func TestWhatThePoolSaysItself(t *testing.T) {
	t.Parallel()
	live := context.Background()
	down := Unavailable("the server is down")
	require.EqualError(t, down, "the server is down")
	require.NotErrorIs(t, Unavailable("the server is down"), down)
	local := lookupFailure{errors.New("no such host")}
	for _, wrap := range []string{"%w", "dialling: %w"} {
		require.Equal(t, Verdict{Server, NotExecuted}, Acquire(live, fmt.Errorf(wrap, down), false))
		require.Equal(t, Verdict{Server, Unknown}, Statement(live, fmt.Errorf(wrap, down), Ending{}))
		require.Equal(t, Verdict{Local, NotExecuted}, Acquire(live, fmt.Errorf(wrap, local), false))
		require.Equal(t, Verdict{Local, NotExecuted}, Dial(fmt.Errorf(wrap, local)))
	}
	require.Equal(t, Verdict{Local, NotExecuted}, Dial(opError("dial", syscall.EMFILE)))
	require.Equal(t, Verdict{Server, NotExecuted}, Dial(opError("dial", syscall.ECONNREFUSED)))
}
