package multipool

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"testing"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/jackc/puddle/v2"
	"github.com/stretchr/testify/require"
)

func TestNoPeerErrorMatchesWhatTheCallNeeded(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		intent           Intent
		primary, replica bool
	}{
		{IntentPrimary, true, false},
		{IntentReplica, false, true},
		{IntentRead, false, false},
	} {
		t.Run(tc.intent.String(), func(t *testing.T) {
			t.Parallel()
			err := fmt.Errorf("wrapped: %w", &NoPeerError{Intent: tc.intent})
			require.Equal(t, tc.primary, errors.Is(err, ErrNoPrimary))
			require.Equal(t, tc.replica, errors.Is(err, ErrNoReplica))
			require.NotErrorIs(t, err, ErrSplitBrain)
			require.NotErrorIs(t, err, ErrOutcomeUnknown)
			var as *NoPeerError
			require.ErrorAs(t, err, &as)
		})
	}
}

func TestErrClosedPoolIsTheErrorOfAClosedPgxpool(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	theirs, err := pgxpool.New(ctx, "postgres://app@127.0.0.1:1/app")
	require.NoError(t, err)
	ours, err := New(ctx, "postgres://app@127.0.0.1:1,127.0.0.1:2/app")
	require.NoError(t, err)
	theirs.Close()
	ours.Close()
	want, got := theirs.Ping(ctx), ours.Ping(ctx)
	require.ErrorIs(t, want, ErrClosedPool)
	require.ErrorIs(t, got, ErrClosedPool)
	require.ErrorIs(t, ErrClosedPool, puddle.ErrClosedPool)
	require.ErrorIs(t, puddle.ErrClosedPool, ErrClosedPool)
	require.Equal(t, want.Error(), got.Error())
}

func TestNoPeerErrorUnwrapsToAllThatHappened(t *testing.T) {
	t.Parallel()
	refused := &pgconn.PgError{Severity: "FATAL", Code: "28P01", Message: "password authentication failed"}
	err := error(&NoPeerError{
		Intent: IntentPrimary,
		Peers: []PeerCause{
			{Peer: "a", Why: WhyDown, Err: io.ErrUnexpectedEOF},
			{Peer: "b", Why: WhyReplica},
			{Peer: "c", Why: WhyMisconfigured, Err: refused},
		},
		also: []error{context.DeadlineExceeded, ErrSplitBrain},
	})
	for _, cause := range []error{io.ErrUnexpectedEOF, refused, context.DeadlineExceeded, ErrSplitBrain, ErrNoPrimary} {
		require.ErrorIs(t, err, cause)
	}
	require.NotErrorIs(t, err, context.Canceled)
	var pgErr *pgconn.PgError
	require.ErrorAs(t, err, &pgErr)
	require.Same(t, refused, pgErr)
	for _, cause := range err.(*NoPeerError).Unwrap() {
		require.Error(t, cause, "errors.Is walks into a nil error")
	}
}

func TestNoPeerErrorNamesEachPeerWithItsCause(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name string
		err  *NoPeerError
		want string
	}{
		{"nobody", &NoPeerError{Intent: IntentRead}, "multipool: no peer for a read"},
		{"a write", &NoPeerError{Intent: IntentPrimary, Peers: []PeerCause{
			{Peer: "a", Why: WhyDown, Err: io.EOF}, {Peer: "b", Why: WhyReplica},
		}}, "multipool: no peer for a call that needs the primary: a down (EOF); b is a replica"},
		{"an insisting read", &NoPeerError{Intent: IntentReplica, Peers: []PeerCause{{Peer: "a", Why: WhyPrimary}}},
			"multipool: no peer for a call that insists on a replica: a is the primary"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			require.Equal(t, tc.want, tc.err.Error())
		})
	}
}

// What three servers refuse for the same reason is told once, and the refusal of TLS not beside the cause.
func TestNoPeerErrorTellsEqualCausesOnce(t *testing.T) {
	t.Parallel()
	ctx := testContext(t)
	refusal := func(addr, sslmode, code, text string) error {
		config, err := pgconn.ParseConfig("postgres://app@" + addr + ":5432/app?sslmode=" + sslmode)
		require.NoError(t, err)
		config.LookupFunc = func(_ context.Context, host string) ([]string, error) { return []string{host}, nil }
		config.DialFunc = func(context.Context, string, string) (net.Conn, error) { return turnsAway(t, code, text), nil }
		_, err = pgconn.ConnectConfig(ctx, config)
		require.Error(t, err)
		return err
	}
	const password = `password authentication failed for user "app"`
	err := &NoPeerError{Intent: IntentPrimary, Peers: []PeerCause{
		{Peer: "db1:5432", Why: WhyMisconfigured, Err: refusal("db1", "prefer", "28P01", password)},
		{Peer: "db2:5432", Why: WhyDown, Err: io.EOF},
		{Peer: "db3:5432", Why: WhyMisconfigured, Err: refusal("db3", "disable", "28P01", password)},
		{Peer: "db4:5432", Why: WhyMisconfigured, Err: refusal("db4", "require", "28P01", password)},
		{Peer: "db5:5432", Why: WhyDown, Err: io.EOF},
		{Peer: "db6:5432", Why: WhyReplica},
		{Peer: "db7:5432", Why: WhyReplica},
	}}
	require.Equal(t, `multipool: no peer for a call that needs the primary: `+
		`misconfigured (server error: FATAL: password authentication failed for user "app" (SQLSTATE 28P01)): db1:5432, db3:5432; `+
		`down (EOF): db2:5432, db5:5432; db4:5432 misconfigured (tls error: server refused TLS connection); `+
		`is a replica: db6:5432, db7:5432`, err.Error())
}

// turnsAway is a connection to a server that has no TLS, and refuses every session.
func turnsAway(t *testing.T, code, text string) net.Conn {
	ours, theirs := net.Pipe()
	go func() {
		defer theirs.Close()
		b := pgproto3.NewBackend(theirs, theirs)
		for {
			m, err := b.ReceiveStartupMessage()
			if err != nil {
				return
			}
			if _, is := m.(*pgproto3.SSLRequest); !is {
				break
			}
			if _, err := theirs.Write([]byte{'N'}); err != nil {
				return
			}
		}
		b.Send(&pgproto3.ErrorResponse{Severity: "FATAL", SeverityUnlocalized: "FATAL", Code: code, Message: text})
		_ = b.Flush()
	}()
	t.Cleanup(func() { ours.Close() })
	return ours
}

func TestNoPeerErrorGoesIntoJSONAsText(t *testing.T) {
	t.Parallel()
	dial := &pgconn.ConnectError{Config: &pgconn.Config{Host: "h", User: "u", Password: "hunter2-hunter2"}}
	text, err := json.Marshal(&NoPeerError{Intent: IntentPrimary, Peers: []PeerCause{
		{Peer: "a", Why: WhyDown, Err: io.EOF}, {Peer: "b", Why: WhyReplica},
		{Peer: "c", Why: WhyDown, Err: fmt.Errorf("far down: %w", hideText{dial})},
	}})
	require.NoError(t, err)
	require.JSONEq(t, `{"intent":"primary","peers":[
		{"peer":"a","why":"down","err":"EOF"},
		{"peer":"b","why":"replica"},
		{"peer":"c","why":"down","err":"far down: hidden"}]}`, string(text))
	require.NotContains(t, string(text), "hunter2")
}

// hideText wraps an error whose own text cannot be made.
type hideText struct{ error }

func (hideText) Error() string { return "hidden" }

func TestAnUnknownOutcomeIsMarkedAndKeepsItsCause(t *testing.T) {
	t.Parallel()
	lost := fmt.Errorf("the connection: %w", io.ErrUnexpectedEOF)
	err := error(&unknownOutcome{lost})
	require.ErrorIs(t, err, ErrOutcomeUnknown)
	require.ErrorIs(t, err, io.ErrUnexpectedEOF)
	require.ErrorIs(t, fmt.Errorf("wrapped: %w", err), ErrOutcomeUnknown)
	require.NotErrorIs(t, lost, ErrOutcomeUnknown)
	require.NotErrorIs(t, err, ErrNoPrimary)
	require.Same(t, lost, errors.Unwrap(err))
	require.Equal(t, "multipool: the outcome of the statement is unknown: the connection: unexpected EOF", err.Error())
}

// safe is an error of which pgx says, as it does of a statement in flight that lost its connection, that nothing was sent.
type safe struct{ error }

func (safe) SafeToRetry() bool { return true }

func TestAnUnknownOutcomeIsNotSafeToRetryWhateverPgxSays(t *testing.T) {
	t.Parallel()
	lie := safe{pgconn.ErrConnClosed}
	require.True(t, pgconn.SafeToRetry(lie))
	require.False(t, pgconn.SafeToRetry(&unknownOutcome{lie}))
	require.False(t, pgconn.SafeToRetry(fmt.Errorf("wrapped: %w", &unknownOutcome{lie})))
}

func TestTheSentinelsAreDistinct(t *testing.T) {
	t.Parallel()
	all := []error{ErrNoPrimary, ErrNoReplica, ErrOutcomeUnknown, ErrSplitBrain, ErrUnknownName}
	for i, a := range all {
		require.ErrorContains(t, a, "multipool: ")
		for j, b := range all {
			require.Equal(t, i == j, errors.Is(a, b))
		}
	}
}

func TestAModelErrorNamesTheModelAndKeepsItsCause(t *testing.T) {
	t.Parallel()
	err := error(&modelError{"audit", unknownName("peer", "q", []string{"a", "b"})})
	require.ErrorIs(t, err, ErrUnknownName)
	require.Equal(t, `multipool: unknown name: peer "q" (known: a, b), in model "audit"`, err.Error())
}

// serverError is an error as a server sends it.
func serverError(severity, code, routine, message string) *pgconn.PgError {
	return &pgconn.PgError{
		Severity: severity, SeverityUnlocalized: severity, Code: code, File: "postgres.c", Routine: cmp.Or(routine, "errfinish"), Message: message,
	}
}
