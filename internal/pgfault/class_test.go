package pgfault

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"
	"github.com/jackc/puddle/v2"
	"github.com/stretchr/testify/require"
)

func serverSays(severity, code, routine, message string) *pgconn.PgError {
	return &pgconn.PgError{
		Severity: severity, SeverityUnlocalized: severity, Code: code, File: "postgres.c", Routine: cmp.Or(routine, "errfinish"), Message: message,
	}
}

// fileError is an undefined_file.
func fileError(severity, file, routine string) *pgconn.PgError {
	e := serverSays(severity, "58P01", routine, "")
	e.File = file
	return e
}

// poolerError is an error in a pooler's own words.
func poolerError(message string) *pgconn.PgError {
	return &pgconn.PgError{Severity: "FATAL", Code: "08P01", Message: message}
}

// dialError is what pgx makes of a connection that dial gives it, or fails to.
func dialError(t testing.TB, parameters string, dial pgconn.DialFunc) error {
	t.Helper()
	config, err := pgconn.ParseConfig("postgres://app:secret@127.0.0.1:1/app?" + parameters)
	require.NoError(t, err)
	config.DialFunc = dial
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	_, err = pgconn.ConnectConfig(ctx, config)
	var connectError *pgconn.ConnectError
	require.ErrorAs(t, err, &connectError)
	return err
}

// pipeTo is a dial to a server that runs serve in this process.
func pipeTo(serve func(net.Conn)) pgconn.DialFunc {
	return func(context.Context, string, string) (net.Conn, error) {
		ours, theirs := net.Pipe()
		go func() {
			defer func() { _ = theirs.Close() }()
			serve(theirs)
		}()
		return ours, nil
	}
}

// answers serves one message to whoever has sent a start-up packet.
func answers(message pgproto3.BackendMessage) func(net.Conn) {
	return func(c net.Conn) {
		backend := pgproto3.NewBackend(c, c)
		if _, err := backend.ReceiveStartupMessage(); err == nil {
			backend.Send(message)
			_ = backend.Flush()
		}
	}
}

// fault is a connection whose reads and writes fail when they are told to.
type fault struct {
	net.Conn
	read, write atomic.Pointer[error] // pgx closes a broken connection in a goroutine of its own
}

func (f *fault) Read(b []byte) (int, error) {
	if err := f.read.Load(); err != nil {
		return 0, *err
	}
	return f.Conn.Read(b)
}

func (f *fault) Write(b []byte) (int, error) {
	if err := f.write.Load(); err != nil {
		return 0, *err
	}
	return f.Conn.Write(b)
}

// session is a pgx connection to a server that has let it in and then runs serve.
func session(t testing.TB, serve func(*pgproto3.Backend)) (*pgconn.PgConn, *fault) {
	t.Helper()
	wire := new(fault)
	config, err := pgconn.ParseConfig("postgres://app:secret@127.0.0.1:1/app?sslmode=disable")
	require.NoError(t, err)
	dial := pipeTo(func(c net.Conn) {
		backend := pgproto3.NewBackend(c, c)
		if _, err := backend.ReceiveStartupMessage(); err != nil {
			return
		}
		backend.Send(&pgproto3.AuthenticationOk{})
		backend.Send(&pgproto3.ReadyForQuery{TxStatus: 'I'})
		if backend.Flush() == nil {
			serve(backend)
		}
	})
	var dials atomic.Int32
	config.DialFunc = func(ctx context.Context, network, addr string) (_ net.Conn, err error) {
		if dials.Add(1) > 1 {
			return nil, opError("dial", syscall.ECONNREFUSED) // a request to cancel
		}
		wire.Conn, err = dial(ctx, network, addr)
		return wire, err
	}
	pg, err := pgconn.ConnectConfig(context.Background(), config)
	require.NoError(t, err)
	t.Cleanup(func() {
		_ = wire.Close()
		_ = pg.Close(context.Background())
		<-pg.CleanupDone()
	})
	return pg, wire
}

func hangsUp(b *pgproto3.Backend) { _, _ = b.Receive() }

func hangs(b *pgproto3.Backend) {
	for {
		if _, err := b.Receive(); err != nil {
			return
		}
	}
}

// overdue is a context whose deadline passes when done is closed.
type overdue struct {
	context.Context
	done chan struct{}
}

func (o overdue) Done() <-chan struct{} { return o.done }

func (o overdue) Err() error {
	select {
	case <-o.done:
		return context.DeadlineExceeded
	default:
		return nil
	}
}

// timesOut is what a statement ends with whose deadline passes when the server has all of it.
func timesOut(t *testing.T) error {
	t.Helper()
	ctx := overdue{context.Background(), make(chan struct{})}
	pg, _ := session(t, func(b *pgproto3.Backend) {
		for {
			m, err := b.Receive()
			if err != nil {
				return
			}
			if _, all := m.(*pgproto3.Sync); all {
				close(ctx.done)
			}
		}
	})
	err := extended(ctx, pg)
	require.True(t, pgconn.Timeout(err), "pgx: %v", err)
	return err
}

// simple and extended are the errors of one statement under either protocol.
func simple(ctx context.Context, pg *pgconn.PgConn) error {
	_, err := pg.Exec(ctx, "select 1").ReadAll()
	return err
}

func extended(ctx context.Context, pg *pgconn.PgConn) error {
	return pg.ExecParams(ctx, "select 1", nil, nil, nil, nil).Read().Err
}

func opError(op string, err error) error {
	return &net.OpError{Op: op, Net: "tcp", Err: os.NewSyscallError(op, err)}
}

func TestJudgeDials(t *testing.T) {
	t.Parallel()
	refuses := func(err error) pgconn.DialFunc {
		return func(context.Context, string, string) (net.Conn, error) { return nil, err }
	}
	for _, tc := range []struct {
		name       string
		parameters string
		dial       pgconn.DialFunc
		want       Class
	}{
		{"refused", "sslmode=disable", refuses(opError("dial", syscall.ECONNREFUSED)), Server},
		{"unreachable", "sslmode=disable", refuses(opError("dial", syscall.EHOSTUNREACH)), Server},
		{"no descriptor left", "sslmode=disable", refuses(opError("dial", os.NewSyscallError("socket", syscall.EMFILE))), Local},
		{"no port left", "sslmode=disable", refuses(opError("dial", os.NewSyscallError("connect", syscall.EADDRNOTAVAIL))), Local},
		{"no such host", "sslmode=disable", refuses(&net.DNSError{Err: "no such host", Name: "h", IsNotFound: true}), Server},
		{"a dial that is cut off by its own timeout", "sslmode=disable", refuses(&net.OpError{Op: "dial", Err: os.ErrDeadlineExceeded}), Server},
		{"a dial context that has ended is not the caller's", "sslmode=disable", refuses(context.DeadlineExceeded), Server},
		{"a server that never answers", "sslmode=disable&connect_timeout=1", pipeTo(func(c net.Conn) { _, _ = io.Copy(io.Discard, c) }), Server},
		{"hung up before a byte", "sslmode=disable", pipeTo(func(net.Conn) {}), Server},
		{"hung up after the start-up packet", "sslmode=disable", pipeTo(func(c net.Conn) { _, _ = c.Read(make([]byte, 8)) }), Server},
		{"not PostgreSQL", "sslmode=disable", pipeTo(func(c net.Conn) {
			_, _ = c.Read(make([]byte, 512))
			_, _ = c.Write([]byte("HTTP/1.1 400 Bad Request\r\n\r\n"))
		}), Server},
		{"no TLS where it is required", "sslmode=require", pipeTo(func(c net.Conn) {
			_, _ = c.Read(make([]byte, 8))
			_, _ = c.Write([]byte{'N'})
		}), Config},
		{"no TLS where it is preferred, and hung up without it", "sslmode=prefer", pipeTo(func(c net.Conn) {
			begin := make([]byte, 8)
			if _, _ = io.ReadFull(c, begin); begin[4] == 0x04 { // SSLRequest, 80877103
				_, _ = c.Write([]byte{'N'})
				return
			}
			_, _ = c.Read(make([]byte, 512))
		}), Server},
		{"a certificate that is not trusted", "sslmode=require", refuses(&tls.CertificateVerificationError{Err: x509.UnknownAuthorityError{}}), Config},
		{"a wrong password", "sslmode=disable", pipeTo(answers(&pgproto3.ErrorResponse{Severity: "FATAL", Code: "28P01"})), Config},
		{"no line in pg_hba.conf", "sslmode=disable", pipeTo(answers(&pgproto3.ErrorResponse{Severity: "FATAL", Code: "28000"})), Config},
		{"no such database", "sslmode=disable", pipeTo(answers(&pgproto3.ErrorResponse{Severity: "FATAL", Code: "3D000"})), Config},
		{"a database that takes no connections", "sslmode=disable", pipeTo(answers(&pgproto3.ErrorResponse{Severity: "FATAL", Code: "55000"})), Config},
		{"no right to connect", "sslmode=disable", pipeTo(answers(&pgproto3.ErrorResponse{Severity: "FATAL", Code: "42501"})), Config},
		{"an unknown run-time parameter", "sslmode=disable", pipeTo(answers(&pgproto3.ErrorResponse{Severity: "FATAL", Code: "42704"})), Config},
		{"a pooler that has no server at the moment", "sslmode=disable", pipeTo(answers(&pgproto3.ErrorResponse{Severity: "FATAL", Code: "XX000", Message: "all backend nodes are down, pgpool requires at least one valid node"})), Server},
		{"... as others say it", "sslmode=disable", pipeTo(answers(&pgproto3.ErrorResponse{Severity: "FATAL", Code: "58000"})), Server},
		{"a file that a session needs is missing", "sslmode=disable", pipeTo(answers(&pgproto3.ErrorResponse{Severity: "FATAL", Code: "58P01"})), Server},
		{"a server that cannot read its catalog", "sslmode=disable", pipeTo(answers(&pgproto3.ErrorResponse{Severity: "FATAL", Code: "XX001"})), Server},
		{"too many clients", "sslmode=disable", pipeTo(answers(&pgproto3.ErrorResponse{Severity: "FATAL", Code: "53300"})), Overload},
		{"too many clients of a pooler", "sslmode=disable", pipeTo(answers(&pgproto3.ErrorResponse{Severity: "FATAL", Code: "08P01", Message: "no more connections allowed (max_client_conn)"})), Overload},
		{"too many clients of one database or user of a pooler", "sslmode=disable", pipeTo(answers(&pgproto3.ErrorResponse{Severity: "FATAL", Code: "08P01", Message: "client connections exceeded (max_user_client_connections)"})), Overload},
		{"a pooler that knows no such password", "sslmode=disable", pipeTo(answers(&pgproto3.ErrorResponse{Severity: "FATAL", Code: "08P01", Message: "password authentication failed"})), Config},
		{"... user", "sslmode=disable", pipeTo(answers(&pgproto3.ErrorResponse{Severity: "FATAL", Code: "08P01", Message: "no such user: app"})), Config},
		{"... database", "sslmode=disable", pipeTo(answers(&pgproto3.ErrorResponse{Severity: "FATAL", Code: "08P01", Message: "no such database: app"})), Config},
		{"... setting", "sslmode=disable", pipeTo(answers(&pgproto3.ErrorResponse{Severity: "FATAL", Code: "08P01", Message: "unsupported startup parameter: statement_timeout"})), Config},
		{"a pooler that insists on TLS", "sslmode=disable", pipeTo(answers(&pgproto3.ErrorResponse{Severity: "FATAL", Code: "08P01", Message: "SSL required"})), Config},
		{"a pooler that its server does not let in", "sslmode=disable", pipeTo(answers(&pgproto3.ErrorResponse{Severity: "FATAL", Code: "08P01", Message: "server login has been failing, cached error: FATAL: password authentication failed for user \"app\" (server_login_retry)"})), Server},
		{"a pooler that lets nobody in for a while", "sslmode=disable", pipeTo(answers(&pgproto3.ErrorResponse{Severity: "FATAL", Code: "08P01", Message: "database \"app\" is disabled"})), Server},
		{"a pooler whose server died while it asked there for the password", "sslmode=disable", pipeTo(answers(&pgproto3.ErrorResponse{Severity: "FATAL", Code: "08P01", Message: "bouncer config error"})), Server},
		{"a pooler that shuts down", "sslmode=disable", pipeTo(answers(&pgproto3.ErrorResponse{Severity: "FATAL", Code: "08P01", Message: "pooler is shutting down"})), Server},
		{"a pooler whose server was never there", "sslmode=disable", pipeTo(answers(&pgproto3.ErrorResponse{Severity: "FATAL", Code: "08P01", Message: "client_login_timeout (server down)"})), Server},
		{"a pooler without its server", "sslmode=disable", pipeTo(answers(&pgproto3.ErrorResponse{Severity: "FATAL", Code: "08P01", Message: "server login has been failing, try again later (server_login_retry)"})), Server},
		{"starting up", "sslmode=disable", pipeTo(answers(&pgproto3.ErrorResponse{Severity: "FATAL", Code: "57P03"})), Starting},
		{"shutting down under our feet", "sslmode=disable", pipeTo(answers(&pgproto3.ErrorResponse{Severity: "FATAL", Code: "57P01"})), Server},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			err := dialError(t, tc.parameters, tc.dial)
			for _, standby := range []bool{false, true} {
				got := Acquire(context.Background(), err, standby)
				require.Equal(t, Verdict{tc.want, NotExecuted}, got, "%v", err)
			}
		})
	}
}

func TestJudgeARefusedDialToARealPort(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	closed := l.Addr().String()
	require.NoError(t, l.Close())
	err = dialError(t, "sslmode=prefer", func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "tcp", closed)
	})
	require.ErrorIs(t, err, syscall.ECONNREFUSED)
	require.Equal(t, Verdict{Server, NotExecuted}, Acquire(context.Background(), err, false))
}

func TestJudgeAcquires(t *testing.T) {
	t.Parallel()
	ended, cancel := context.WithCancel(context.Background())
	cancel()
	for _, tc := range []struct {
		name string
		err  error
		ctx  context.Context
		want Class
	}{
		{"the caller's deadline, as the pool reports it", context.DeadlineExceeded, ended, Caller},
		{"the caller's cancellation", context.Canceled, ended, Caller},
		{"a deadline of a hook of the program's", context.DeadlineExceeded, context.Background(), Application},
		{"a closed pool", puddle.ErrClosedPool, context.Background(), Closed},
		{"a closed pool to a caller that has gone", fmt.Errorf("acquire: %w", puddle.ErrClosedPool), ended, Closed},
		{"a hook of the program's", errors.New("no secret for you"), context.Background(), Application},
		{"a ping that met a dead connection", io.ErrUnexpectedEOF, context.Background(), Server},
		{"a set-up that lost its connection", opError("read", syscall.ECONNRESET), context.Background(), Server},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			require.Equal(t, Verdict{tc.want, NotExecuted}, Acquire(tc.ctx, tc.err, false))
		})
	}
}

// A program's BeforeConnect may ask a secret store, under a deadline of its own.
func TestAContextErrorOfAHookDoesNotBlameThePeer(t *testing.T) {
	t.Parallel()
	for _, cause := range []error{context.DeadlineExceeded, context.Canceled} {
		err := fmt.Errorf("asking the secret store: %w", cause)
		v := Acquire(context.Background(), err, false)
		require.False(t, v.BlamesServer(), "%v: class %d", err, v.Class)
	}
}

// A statement of AfterConnect that hangs ends by a deadline which pgx puts on the connection: the peer's fault.
func TestASetUpThatTimesOutOnThePeerBlamesThePeer(t *testing.T) {
	t.Parallel()
	err := timesOut(t)
	require.Equal(t, Verdict{Server, NotExecuted}, Acquire(context.Background(), err, false))
}

func TestJudgeServerErrors(t *testing.T) {
	t.Parallel()
	live := context.Background()
	ended, cancel := context.WithCancel(live)
	cancel()
	type given struct {
		ctx            context.Context
		standby, batch bool
	}
	primary, replica := given{ctx: live}, given{ctx: live, standby: true}
	both := []given{primary, replica}
	const conflict = "canceling statement due to conflict with recovery"
	for _, tc := range []struct {
		name  string
		err   *pgconn.PgError
		given []given
		want  Verdict
	}{
		{"a syntax error", serverSays("ERROR", "42601", "scanner_yyerror", ""), both, Verdict{Application, NotExecuted}},
		{"a unique violation", serverSays("ERROR", "23505", "", ""), both, Verdict{Application, NotExecuted}},
		{"a unique violation to a caller that has gone", serverSays("ERROR", "23505", "", ""), []given{{ctx: ended}}, Verdict{Application, NotExecuted}},
		{"a failed statement of a batch", serverSays("ERROR", "23505", "", ""), []given{{ctx: live, batch: true}}, Verdict{Application, InPart}},
		{"cancelled by the caller", serverSays("ERROR", "57014", "ProcessInterrupts", ""), []given{{ctx: ended}, {ctx: ended, standby: true}}, Verdict{Caller, NotExecuted}},
		{"cancelled by somebody else", serverSays("ERROR", "57014", "ProcessInterrupts", ""), both, Verdict{Application, NotExecuted}},

		{"replay cancelled a read", serverSays("ERROR", "40001", "ProcessInterrupts", conflict), both, Verdict{Conflict, NotExecuted}},
		{"replay ended a session", serverSays("FATAL", "40001", "ProcessInterrupts", conflict), both, Verdict{Conflict, NotExecuted}},
		{"a serialization failure of the program's", serverSays("ERROR", "40001", "CheckForSerializableConflictOut", ""), []given{primary}, Verdict{Application, NotExecuted}},
		{"a deadlock with replay", serverSays("ERROR", "40P01", "DeadLockReport", ""), []given{replica}, Verdict{Conflict, NotExecuted}},
		{"a deadlock of the program's", serverSays("ERROR", "40P01", "DeadLockReport", ""), []given{primary}, Verdict{Application, NotExecuted}},

		{"a write on a standby", serverSays("ERROR", "25006", "PreventCommandIfReadOnly", ""), []given{replica}, Verdict{Refused, NotExecuted}},
		{"... in a batch", serverSays("ERROR", "25006", "PreventCommandIfReadOnly", ""), []given{{ctx: live, standby: true, batch: true}}, Verdict{Refused, NotExecuted}},
		{"a write in the program's own read-only transaction", serverSays("ERROR", "25006", "PreventCommandIfReadOnly", ""), []given{primary}, Verdict{Application, NotExecuted}},
		{"serializable on a standby", serverSays("ERROR", "0A000", "GetSerializableTransactionSnapshot", "nicht englisch"), []given{replica}, Verdict{Refused, NotExecuted}},
		{"an unlogged table on a standby", serverSays("ERROR", "0A000", "get_relation_info", "nicht englisch"), []given{replica}, Verdict{Refused, NotExecuted}},
		{"read write on a standby", serverSays("ERROR", "0A000", "call_bool_check_hook", "cannot set transaction read-write mode during recovery"), []given{replica}, Verdict{Refused, NotExecuted}},
		{"a large object on a standby", serverSays("ERROR", "XX000", "GetNewObjectId", "nicht englisch"), []given{replica}, Verdict{Refused, NotExecuted}},
		{"a log record on a standby", serverSays("ERROR", "XX000", "XLogBeginInsert", "nicht englisch"), []given{replica}, Verdict{Refused, NotExecuted}},
		{"the log position on a standby", serverSays("ERROR", "55000", "pg_current_wal_lsn", "recovery is in progress"), []given{replica}, Verdict{Refused, NotExecuted}},
		{"the twins of 25006 on a primary", serverSays("ERROR", "0A000", "get_relation_info", ""), []given{primary}, Verdict{Application, NotExecuted}},
		{"another feature that is missing", serverSays("ERROR", "0A000", "transformSelectStmt", "not implemented"), both, Verdict{Application, NotExecuted}},
		{"currval before nextval", serverSays("ERROR", "55000", "currval_oid", "currval is not yet defined"), both, Verdict{Application, NotExecuted}},
		{"an internal error", serverSays("ERROR", "XX000", "elog", "tuple concurrently updated"), both, Verdict{Application, NotExecuted}},

		{"a table that is not replayed yet", serverSays("ERROR", "42P01", "", ""), []given{replica}, Verdict{Behind, NotExecuted}},
		{"a column that is not replayed yet", serverSays("ERROR", "42703", "", ""), []given{replica}, Verdict{Behind, NotExecuted}},
		{"a function that is not replayed yet", serverSays("ERROR", "42883", "", ""), []given{replica}, Verdict{Behind, NotExecuted}},
		{"a type that is not replayed yet", serverSays("ERROR", "42704", "typenameType", ""), []given{replica}, Verdict{Behind, NotExecuted}},
		{"a schema that is not replayed yet", serverSays("ERROR", "3F000", "LookupExplicitNamespace", ""), []given{replica}, Verdict{Behind, NotExecuted}},
		{"a right that is not replayed yet", serverSays("ERROR", "42501", "aclcheck_error", ""), []given{replica}, Verdict{Behind, NotExecuted}},
		{"a primary key that is not replayed yet", serverSays("ERROR", "42803", "check_ungrouped_columns_walker", ""), []given{replica}, Verdict{Behind, NotExecuted}},
		{"columns that are not replayed yet", serverSays("ERROR", "42601", "transformSetOperationTree", ""), []given{replica}, Verdict{Behind, NotExecuted}},
		{"a label that is not replayed yet", serverSays("ERROR", "22P02", "enum_in", ""), []given{replica}, Verdict{Behind, NotExecuted}},
		{"... in binary", serverSays("ERROR", "22P02", "enum_recv", ""), []given{replica}, Verdict{Behind, NotExecuted}},
		{"a number that is none", serverSays("ERROR", "22P02", "pg_strtoint32", ""), both, Verdict{Application, NotExecuted}},
		{"a domain that is not replayed yet", serverSays("ERROR", "23514", "ExecEvalConstraintCheck", ""), []given{replica}, Verdict{Behind, NotExecuted}},
		{"a view that is not populated there yet", serverSays("ERROR", "55000", "ExecOpenScanRelation", ""), []given{replica}, Verdict{Behind, NotExecuted}},
		{"an extension's library that is not there", serverSays("ERROR", "58P01", "internal_load_library", ""), []given{replica}, Verdict{Behind, NotExecuted}},
		{"a file that a statement names", serverSays("ERROR", "58P01", "", ""), []given{replica}, Verdict{Application, NotExecuted}},
		{"a type that is not replayed yet, by its number", serverSays("ERROR", "XX000", "", "cache lookup failed for type 16500"), []given{replica}, Verdict{Behind, NotExecuted}},
		{"a stale plan", serverSays("ERROR", "0A000", "RevalidateCachedQuery", ""), []given{replica}, Verdict{Behind, NotExecuted}},
		{"a stale description", serverSays("ERROR", "08P01", "exec_bind_message", ""), []given{replica}, Verdict{Behind, NotExecuted}},
		{"... of the columns", serverSays("ERROR", "08P01", "PortalSetResultFormat", ""), []given{replica}, Verdict{Behind, NotExecuted}},
		{"a stale plan of the primary's", serverSays("ERROR", "0A000", "RevalidateCachedQuery", ""), []given{primary}, Verdict{Application, NotExecuted}},
		{"a table that is not there", serverSays("ERROR", "42P01", "", ""), []given{primary}, Verdict{Application, NotExecuted}},

		{"WAIT FOR what only a primary has (19)", serverSays("ERROR", "55000", "", "recovery is in progress"), []given{replica}, Verdict{Refused, NotExecuted}},
		{"WAIT FOR what only a standby has (19)", serverSays("ERROR", "55000", "", "recovery is not in progress"), []given{primary}, Verdict{Application, NotExecuted}},
		{"WAIT FOR for too long (19)", serverSays("ERROR", "57014", "", "timed out while waiting for target LSN 0/3000060 to be replayed"), both, Verdict{Application, NotExecuted}},
		{"a property graph that is not replayed yet (19)", serverSays("ERROR", "42P01", "RangeVarGetRelidExtended", ""), []given{replica}, Verdict{Behind, NotExecuted}},
		{"a class of errors that is not known", serverSays("ERROR", "10608", "", ""), both, Verdict{Application, NotExecuted}},

		{"terminated", serverSays("FATAL", "57P01", "ProcessInterrupts", ""), both, Verdict{Server, NotExecuted}},
		{"terminated in a batch", serverSays("FATAL", "57P01", "ProcessInterrupts", ""), []given{{ctx: live, batch: true}}, Verdict{Server, Unknown}},
		{"terminated under a caller that has gone", serverSays("FATAL", "57P01", "ProcessInterrupts", ""), []given{{ctx: ended}}, Verdict{Server, NotExecuted}},
		{"crashed", serverSays("FATAL", "57P02", "", ""), both, Verdict{Server, Unknown}},
		{"starting", serverSays("FATAL", "57P03", "", ""), both, Verdict{Starting, Unknown}},
		{"the database is dropped", serverSays("FATAL", "57P04", "", ""), both, Verdict{Config, Unknown}},
		{"idle for too long", serverSays("FATAL", "57P05", "", ""), both, Verdict{Application, NotExecuted}},
		{"in a transaction for too long", serverSays("FATAL", "25P04", "ProcessInterrupts", ""), both, Verdict{Application, NotExecuted}},
		{"idle in a transaction for too long", serverSays("FATAL", "25P03", "", ""), both, Verdict{Application, NotExecuted}},

		{"no more connections", serverSays("FATAL", "53300", "", ""), both, Verdict{Overload, Unknown}},
		{"no more room on the disk", serverSays("ERROR", "53100", "", ""), both, Verdict{Overload, NotExecuted}},
		{"no more memory", serverSays("ERROR", "53200", "", ""), both, Verdict{Overload, NotExecuted}},
		{"the statement's own limit of temporary files", serverSays("ERROR", "53400", "", ""), both, Verdict{Application, NotExecuted}},
		{"a pooler's queue", poolerError("query_wait_timeout"), both, Verdict{Overload, NotExecuted}},
		{"a pooler whose server crashed", poolerError("server conn crashed?"), both, Verdict{Server, Unknown}},
		{"a pooler that hands nothing on", poolerError("server login has been failing, try again later (server_login_retry)"), both, Verdict{Server, NotExecuted}},
		{"... of version 1.25", poolerError("server login has been failing, cached error: connect failed (server_login_retry)"), both, Verdict{Server, NotExecuted}},
		{"... of a batch", poolerError("server login has been failing, try again later (server_login_retry)"), []given{{ctx: live, batch: true}}, Verdict{Server, Unknown}},
		{"a pooler whose operator ends all connections", poolerError("database removed"), both, Verdict{Server, Unknown}},
		{"a pooler whose database is disabled", poolerError("database \"app\" is disabled"), both, Verdict{Server, Unknown}},
		{"a pooler that cannot set what it is told to track", poolerError("invalid server parameter"), both, Verdict{Server, Unknown}},
		{"a pooler's own trouble", poolerError("bouncer config error"), both, Verdict{Server, Unknown}},
		{"a pooler that ends an idle client", poolerError("client_idle_timeout"), both, Verdict{Server, Unknown}},
		{"a server that ends under a pooler", serverSays("FATAL", "57P01", "ProcessInterrupts", "terminating connection due to administrator command"), both, Verdict{Server, NotExecuted}},
		{"a protocol violation of the program's", serverSays("ERROR", "08P01", "", "bind message supplies 1 parameters"), both, Verdict{Application, NotExecuted}},
		{"a file that is missing", fileError("ERROR", "md.c", "mdopenfork"), both, Verdict{Server, NotExecuted}},
		{"... that a statement names", fileError("ERROR", "copyfrom.c", "BeginCopyFrom"), both, Verdict{Application, NotExecuted}},
		{"... that a session needs", fileError("FATAL", "dfmgr.c", "internal_load_library"), both, Verdict{Server, Unknown}},
		{"a page that is corrupted", serverSays("ERROR", "XX001", "", ""), both, Verdict{Server, NotExecuted}},
		{"an index that is corrupted", serverSays("ERROR", "XX002", "", ""), both, Verdict{Server, NotExecuted}},
		{"any other fatal error", serverSays("FATAL", "XX000", "", "out of luck"), both, Verdict{Server, Unknown}},
		{"a panic", serverSays("PANIC", "XX000", "", ""), both, Verdict{Server, Unknown}},
		{"a severity that is translated", &pgconn.PgError{Severity: "FATALE", SeverityUnlocalized: "FATAL", Code: "XX000"}, both, Verdict{Server, Unknown}},
		{"a severity of an old server", &pgconn.PgError{Severity: "FATAL", Code: "XX000"}, both, Verdict{Server, Unknown}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			for _, g := range tc.given {
				end := Ending{Standby: g.standby, Batch: g.batch}
				require.Equal(t, tc.want, Statement(g.ctx, tc.err, end), "%+v", g)
				require.Equal(t, tc.want, Statement(g.ctx, fmt.Errorf("scanning: %w", tc.err), end), "wrapped, %+v", g)
			}
		})
	}
}

// Where the role is asked, the session that refused is asked, too.
func TestJudgeARefusalBehindAPooler(t *testing.T) {
	t.Parallel()
	refusal := serverSays("ERROR", "25006", "PreventCommandIfReadOnly", "")
	for _, tc := range []struct {
		end  Ending
		want Verdict
	}{
		{Ending{}, Verdict{Application, NotExecuted}},
		{Ending{Recovers: true}, Verdict{Refused, NotExecuted}},
		{Ending{Recovers: true, Standby: true}, Verdict{Refused, NotExecuted}},
		{Ending{Recovers: true, Batch: true}, Verdict{Refused, InPart}},
		{Ending{Recovers: true, Standby: true, Batch: true}, Verdict{Refused, NotExecuted}},
	} {
		require.Equal(t, tc.want, Statement(context.Background(), refusal, tc.end), "%+v", tc.end)
	}
	twin := serverSays("ERROR", "55000", "", "recovery is not in progress")
	require.Equal(t, Application, Statement(context.Background(), twin, Ending{}).Class)
}

// lastMoment is a context that ends in a moment and has not ended yet.
type lastMoment struct{ context.Context }

func (lastMoment) Deadline() (time.Time, bool) { return time.Now().Add(soon / 2), true }

func TestJudgeLostConnections(t *testing.T) {
	t.Parallel()
	live := context.Background()
	ended, cancel := context.WithCancel(live)
	cancel()
	nearly := lastMoment{live}
	reset := opError("read", syscall.ECONNRESET)
	for _, tc := range []struct {
		name string
		err  func(t *testing.T) error
		ctx  context.Context
		want Verdict
	}{
		{"lost in flight, extended protocol", func(t *testing.T) error {
			pg, _ := session(t, hangsUp)
			return extended(live, pg)
		}, live, Verdict{Server, Unknown}},
		{"lost in flight, simple protocol, where pgx says that nothing was sent", func(t *testing.T) error {
			pg, _ := session(t, hangsUp)
			return simple(live, pg)
		}, live, Verdict{Server, Unknown}},
		{"reset in flight", func(t *testing.T) error {
			pg, wire := session(t, hangs)
			wire.read.Store(&reset)
			return extended(live, pg)
		}, live, Verdict{Server, Unknown}},
		{"reset before a byte was written", func(t *testing.T) error {
			pg, wire := session(t, hangs)
			cut := opError("write", syscall.ECONNRESET)
			wire.write.Store(&cut)
			err := extended(live, pg)
			require.True(t, pgconn.SafeToRetry(err), "pgx: %v", err)
			return err
		}, live, Verdict{Server, NotExecuted}},
		{"closed before", func(t *testing.T) error {
			pg, wire := session(t, hangs)
			wire.write.Store(&io.ErrClosedPipe)
			_ = simple(live, pg)
			wire.write.Store(nil)
			err := simple(live, pg)
			require.ErrorIs(t, err, pgconn.ErrConnClosed)
			return err
		}, live, Verdict{Server, Unknown}},
		{"in use", func(t *testing.T) error {
			pg, _ := session(t, hangs)
			other, cancel := context.WithCancel(live)
			defer cancel()
			open := pg.Exec(other, "select 1")
			t.Cleanup(func() { cancel(); _ = open.Close() })
			err := simple(live, pg)
			require.ErrorContains(t, err, "conn busy")
			return err
		}, live, Verdict{Application, NotExecuted}},
		{"the caller's deadline in flight", timesOut, ended, Verdict{Caller, Unknown}},
		{"the same as seen by one whose own context lives", timesOut, live, Verdict{Server, Unknown}},
		{"a context that had ended before", func(t *testing.T) error {
			pg, _ := session(t, hangs)
			return extended(ended, pg)
		}, ended, Verdict{Caller, NotExecuted}},
		{"lost in the last moment of the caller's time", func(*testing.T) error { return io.ErrUnexpectedEOF }, nearly, Verdict{Caller, Unknown}},
		{"lost to a caller that has gone", func(*testing.T) error { return reset }, ended, Verdict{Caller, Unknown}},
		{"a keepalive that was not answered", func(*testing.T) error { return opError("read", syscall.ETIMEDOUT) }, live, Verdict{Server, Unknown}},
		{"a socket that was cut", func(*testing.T) error { return fmt.Errorf("read: %w", net.ErrClosed) }, live, Verdict{Server, Unknown}},
		{"an end of file", func(*testing.T) error { return io.EOF }, live, Verdict{Server, Unknown}},
		{"a bare errno", func(*testing.T) error { return syscall.EPIPE }, live, Verdict{Server, Unknown}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			err := tc.err(t)
			require.Error(t, err)
			require.Equal(t, tc.want, Statement(tc.ctx, err, Ending{}), "%#v", err)
			wrapped := fmt.Errorf("failed to deallocate cached statement(s): %w", err)
			require.Equal(t, tc.want, Statement(tc.ctx, wrapped, Ending{}), "wrapped: %#v", err)
		})
	}
}

// noMessage is one of a type that the protocol does not have.
type noMessage struct{}

func (noMessage) Backend()                          {}
func (noMessage) Decode([]byte) error               { return nil }
func (noMessage) Encode(dst []byte) ([]byte, error) { return append(dst, '?', 0, 0, 0, 4), nil }

// A connection that pgx gives up with what had been sent: the error blames nobody, and nobody knows what was executed.
func TestAStatementWhoseConnectionIsGivenUpHasAnUnknownOutcome(t *testing.T) {
	t.Parallel()
	live := context.Background()
	answer := func(messages ...pgproto3.BackendMessage) func(*pgproto3.Backend) {
		return func(b *pgproto3.Backend) { // then it hangs up
			for {
				m, err := b.Receive()
				if err != nil {
					return
				}
				switch m.(type) {
				case *pgproto3.Query, *pgproto3.Sync:
					for _, m := range messages {
						b.Send(m)
					}
					_ = b.Flush()
					return
				}
			}
		}
	}
	for _, tc := range []struct {
		name    string
		answer  []pgproto3.BackendMessage
		unknown bool
	}{
		{"no message of the protocol", []pgproto3.BackendMessage{noMessage{}}, true},
		{"the same behind the tag", []pgproto3.BackendMessage{&pgproto3.CommandComplete{CommandTag: []byte("INSERT 0 1")}, noMessage{}}, true},
		{"a panic for want of space, which may come of the commit", []pgproto3.BackendMessage{&pgproto3.ErrorResponse{Severity: "PANIC", SeverityUnlocalized: "PANIC", File: "xlog.c", Routine: "XLogWrite", Code: "53100"}}, true},
		{"an error for want of space", []pgproto3.BackendMessage{&pgproto3.ErrorResponse{Severity: "ERROR", SeverityUnlocalized: "ERROR", File: "postgres.c", Routine: "errfinish", Code: "53100"}, &pgproto3.ReadyForQuery{TxStatus: 'I'}}, false},
		{"a proxy's own word", []pgproto3.BackendMessage{&pgproto3.ErrorResponse{Severity: "ERROR", Code: "XX000", File: "pool_stream.c", Line: 1, Message: "unable to read data from DB node 2"}, &pgproto3.ReadyForQuery{TxStatus: 'I'}}, true},
		{"a pooler without a server", []pgproto3.BackendMessage{&pgproto3.ErrorResponse{Severity: "FATAL", Code: "08P01", Message: "query_wait_timeout"}}, false},
		{"a session that was idle for too long", []pgproto3.BackendMessage{&pgproto3.ErrorResponse{Severity: "FATAL", SeverityUnlocalized: "FATAL", File: "postgres.c", Routine: "ProcessInterrupts", Code: "57P05"}}, false},
		{"a violation", []pgproto3.BackendMessage{&pgproto3.ErrorResponse{Severity: "ERROR", SeverityUnlocalized: "ERROR", File: "postgres.c", Routine: "errfinish", Code: "23505"}, &pgproto3.ReadyForQuery{TxStatus: 'I'}}, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			for _, run := range []func(context.Context, *pgconn.PgConn) error{simple, extended} {
				pg, _ := session(t, answer(tc.answer...))
				err := run(live, pg)
				require.Error(t, err)
				got := Statement(live, err, Ending{Lost: pg.IsClosed()}).Outcome
				require.Equal(t, tc.unknown, got == Unknown, "%v", err)
			}
		})
	}
}

func TestJudgeErrorsThatBlameNobody(t *testing.T) {
	t.Parallel()
	for _, err := range []error{
		nil, pgx.ErrNoRows, pgx.ErrTooManyRows, pgx.ErrTxClosed, pgx.ErrTxCommitRollback,
		fmt.Errorf("scan: %w", pgx.ErrNoRows), errors.New("can't scan into dest[0]"), context.Canceled,
	} {
		got := Statement(context.Background(), err, Ending{})
		require.Equal(t, Application, got.Class, "%v", err)
		require.False(t, got.BlamesServer())
	}
}

func TestOnlyAPeerThatFailedOrGoesIsBlamed(t *testing.T) {
	t.Parallel()
	for c := Application; c <= Behind; c++ {
		require.Equal(t, c == Server || c == Starting, Verdict{Class: c}.BlamesServer(), "class %d", c)
	}
}

func TestASessionThatAStandbyRefusesAltogetherIsTold(t *testing.T) {
	t.Parallel()
	session := serverSays("ERROR", "0A000", "GetSerializableTransactionSnapshot", "")
	require.True(t, SessionRefused(session))
	require.True(t, SessionRefused(fmt.Errorf("wrapped: %w", session)))
	require.False(t, SessionRefused(serverSays("ERROR", "0A000", "get_relation_info", "")))
	require.False(t, SessionRefused(serverSays("ERROR", "25006", "PreventCommandIfReadOnly", "")))
	require.False(t, SessionRefused(io.EOF))
	require.False(t, SessionRefused(nil))
}

// marked is an error that says of itself that it is not to be sent again, as a MultiPool's of unknown outcome does.
type marked struct{ err error }

func (e *marked) Error() string   { return "marked: " + e.err.Error() }
func (e *marked) Unwrap() error   { return e.err }
func (*marked) SafeToRetry() bool { return false }

func FuzzClassify(f *testing.F) {
	for shape := range byte(16) {
		f.Add("57P01", "ProcessInterrupts", "terminating connection", shape, byte(0))
		f.Add("40001", "", "conflict with recovery", shape, byte(0x15))
		f.Add("08P01", "", "query_wait_timeout", shape, byte(0x2a))
		f.Add("", "", "", shape, byte(0xff))
	}
	ended, cancel := context.WithCancel(context.Background())
	cancel()
	pg, _ := session(f, hangs)
	done := extended(ended, pg)
	dial := dialError(f, "sslmode=disable", func(context.Context, string, string) (net.Conn, error) {
		return nil, opError("dial", syscall.ECONNREFUSED)
	})
	f.Fuzz(func(t *testing.T, code, routine, message string, shape, flags byte) {
		severity := []string{"ERROR", "FATAL", "PANIC", message}[flags>>6]
		bases := []error{
			serverSays(severity, code, routine, message), io.EOF, io.ErrUnexpectedEOF, pgconn.ErrConnClosed,
			opError("read", syscall.ECONNRESET), opError("write", syscall.EPIPE), done, dial, puddle.ErrClosedPool,
			pgx.ErrNoRows, pgx.ErrTxClosed, errors.New(message), &marked{io.EOF},
			context.Canceled, context.DeadlineExceeded, nil,
		}
		base := bases[int(shape)%len(bases)]
		e := evidence{err: base, ctx: context.Background(), Ending: Ending{Standby: flags&1 != 0, Batch: flags&2 != 0}}
		if flags&4 != 0 {
			e.phase = phaseRun
		}
		if flags&8 != 0 {
			e.ctx = ended
		}
		v := judge(e)
		switch {
		case e.phase == phaseAcquire && v.Outcome != NotExecuted:
			t.Fatalf("%v before there was a connection: executed", base)
		case base == nil && v.Class != Application:
			t.Fatalf("no error is of class %d", v.Class)
		case base == nil:
			return
		}
		for _, wrapped := range []error{
			fmt.Errorf("%s: %w", message, base), errors.Join(base, errors.New(message)), errors.Join(errors.New(message), base),
		} {
			e.err = wrapped
			got := judge(e)
			// What pgx itself reports of a context that ended is the caller's only if the caller's has.
			if base == context.Canceled || base == context.DeadlineExceeded || base == done && e.ctx == ended && e.phase == phaseRun {
				if v.BlamesServer() || got.BlamesServer() {
					t.Fatalf("%#v, phase %d: the end of a context blames the peer: %+v, wrapped %+v", base, e.phase, v, got)
				}
			}
			if e.phase == phaseAcquire && (base == context.Canceled || base == context.DeadlineExceeded) {
				continue // the pool reports the caller's context bare; wrapped, it is a hook's own
			}
			if got != v {
				t.Fatalf("%#v, phase %d: %+v, wrapped %+v", base, e.phase, v, got)
			}
		}
	})
}
