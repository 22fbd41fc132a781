package multipool

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

func serverError(severity, code, routine, message string) *pgconn.PgError {
	return &pgconn.PgError{
		Severity: severity, SeverityUnlocalized: severity, Code: code, File: "postgres.c", Routine: cmp.Or(routine, "errfinish"), Message: message,
	}
}

// fileError is an undefined_file.
func fileError(severity, file, routine string) *pgconn.PgError {
	e := serverError(severity, "58P01", routine, "")
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

func TestClassifyDials(t *testing.T) {
	t.Parallel()
	refuses := func(err error) pgconn.DialFunc {
		return func(context.Context, string, string) (net.Conn, error) { return nil, err }
	}
	for _, tc := range []struct {
		name       string
		parameters string
		dial       pgconn.DialFunc
		want       class
	}{
		{"refused", "sslmode=disable", refuses(opError("dial", syscall.ECONNREFUSED)), classPeer},
		{"unreachable", "sslmode=disable", refuses(opError("dial", syscall.EHOSTUNREACH)), classPeer},
		{"no descriptor left", "sslmode=disable", refuses(opError("dial", os.NewSyscallError("socket", syscall.EMFILE))), classHere},
		{"no port left", "sslmode=disable", refuses(opError("dial", os.NewSyscallError("connect", syscall.EADDRNOTAVAIL))), classHere},
		{"no such host", "sslmode=disable", refuses(&net.DNSError{Err: "no such host", Name: "h", IsNotFound: true}), classPeer},
		{"a dial that is cut off by its own timeout", "sslmode=disable", refuses(&net.OpError{Op: "dial", Err: os.ErrDeadlineExceeded}), classPeer},
		{"a dial context that has ended is not the caller's", "sslmode=disable", refuses(context.DeadlineExceeded), classPeer},
		{"a server that never answers", "sslmode=disable&connect_timeout=1", pipeTo(func(c net.Conn) { _, _ = io.Copy(io.Discard, c) }), classPeer},
		{"hung up before a byte", "sslmode=disable", pipeTo(func(net.Conn) {}), classPeer},
		{"hung up after the start-up packet", "sslmode=disable", pipeTo(func(c net.Conn) { _, _ = c.Read(make([]byte, 8)) }), classPeer},
		{"not PostgreSQL", "sslmode=disable", pipeTo(func(c net.Conn) {
			_, _ = c.Read(make([]byte, 512))
			_, _ = c.Write([]byte("HTTP/1.1 400 Bad Request\r\n\r\n"))
		}), classPeer},
		{"no TLS where it is required", "sslmode=require", pipeTo(func(c net.Conn) {
			_, _ = c.Read(make([]byte, 8))
			_, _ = c.Write([]byte{'N'})
		}), classConfig},
		{"no TLS where it is preferred, and hung up without it", "sslmode=prefer", pipeTo(func(c net.Conn) {
			begin := make([]byte, 8)
			if _, _ = io.ReadFull(c, begin); begin[4] == 0x04 { // SSLRequest, 80877103
				_, _ = c.Write([]byte{'N'})
				return
			}
			_, _ = c.Read(make([]byte, 512))
		}), classPeer},
		{"a certificate that is not trusted", "sslmode=require", refuses(&tls.CertificateVerificationError{Err: x509.UnknownAuthorityError{}}), classConfig},
		{"a wrong password", "sslmode=disable", pipeTo(answers(&pgproto3.ErrorResponse{Severity: "FATAL", Code: "28P01"})), classConfig},
		{"no line in pg_hba.conf", "sslmode=disable", pipeTo(answers(&pgproto3.ErrorResponse{Severity: "FATAL", Code: "28000"})), classConfig},
		{"no such database", "sslmode=disable", pipeTo(answers(&pgproto3.ErrorResponse{Severity: "FATAL", Code: "3D000"})), classConfig},
		{"a database that takes no connections", "sslmode=disable", pipeTo(answers(&pgproto3.ErrorResponse{Severity: "FATAL", Code: "55000"})), classConfig},
		{"no right to connect", "sslmode=disable", pipeTo(answers(&pgproto3.ErrorResponse{Severity: "FATAL", Code: "42501"})), classConfig},
		{"an unknown run-time parameter", "sslmode=disable", pipeTo(answers(&pgproto3.ErrorResponse{Severity: "FATAL", Code: "42704"})), classConfig},
		{"a pooler that has no server at the moment", "sslmode=disable", pipeTo(answers(&pgproto3.ErrorResponse{Severity: "FATAL", Code: "XX000", Message: "all backend nodes are down, pgpool requires at least one valid node"})), classPeer},
		{"... as others say it", "sslmode=disable", pipeTo(answers(&pgproto3.ErrorResponse{Severity: "FATAL", Code: "58000"})), classPeer},
		{"a file that a session needs is missing", "sslmode=disable", pipeTo(answers(&pgproto3.ErrorResponse{Severity: "FATAL", Code: "58P01"})), classPeer},
		{"a server that cannot read its catalog", "sslmode=disable", pipeTo(answers(&pgproto3.ErrorResponse{Severity: "FATAL", Code: "XX001"})), classPeer},
		{"too many clients", "sslmode=disable", pipeTo(answers(&pgproto3.ErrorResponse{Severity: "FATAL", Code: "53300"})), classOverload},
		{"too many clients of a pooler", "sslmode=disable", pipeTo(answers(&pgproto3.ErrorResponse{Severity: "FATAL", Code: "08P01", Message: "no more connections allowed (max_client_conn)"})), classOverload},
		{"too many clients of one database or user of a pooler", "sslmode=disable", pipeTo(answers(&pgproto3.ErrorResponse{Severity: "FATAL", Code: "08P01", Message: "client connections exceeded (max_user_client_connections)"})), classOverload},
		{"a pooler that knows no such password", "sslmode=disable", pipeTo(answers(&pgproto3.ErrorResponse{Severity: "FATAL", Code: "08P01", Message: "password authentication failed"})), classConfig},
		{"... user", "sslmode=disable", pipeTo(answers(&pgproto3.ErrorResponse{Severity: "FATAL", Code: "08P01", Message: "no such user: app"})), classConfig},
		{"... database", "sslmode=disable", pipeTo(answers(&pgproto3.ErrorResponse{Severity: "FATAL", Code: "08P01", Message: "no such database: app"})), classConfig},
		{"... setting", "sslmode=disable", pipeTo(answers(&pgproto3.ErrorResponse{Severity: "FATAL", Code: "08P01", Message: "unsupported startup parameter: statement_timeout"})), classConfig},
		{"a pooler that insists on TLS", "sslmode=disable", pipeTo(answers(&pgproto3.ErrorResponse{Severity: "FATAL", Code: "08P01", Message: "SSL required"})), classConfig},
		{"a pooler that its server does not let in", "sslmode=disable", pipeTo(answers(&pgproto3.ErrorResponse{Severity: "FATAL", Code: "08P01", Message: "server login has been failing, cached error: FATAL: password authentication failed for user \"app\" (server_login_retry)"})), classPeer},
		{"a pooler that lets nobody in for a while", "sslmode=disable", pipeTo(answers(&pgproto3.ErrorResponse{Severity: "FATAL", Code: "08P01", Message: "database \"app\" is disabled"})), classPeer},
		{"a pooler whose server died while it asked there for the password", "sslmode=disable", pipeTo(answers(&pgproto3.ErrorResponse{Severity: "FATAL", Code: "08P01", Message: "bouncer config error"})), classPeer},
		{"a pooler that shuts down", "sslmode=disable", pipeTo(answers(&pgproto3.ErrorResponse{Severity: "FATAL", Code: "08P01", Message: "pooler is shutting down"})), classPeer},
		{"a pooler whose server was never there", "sslmode=disable", pipeTo(answers(&pgproto3.ErrorResponse{Severity: "FATAL", Code: "08P01", Message: "client_login_timeout (server down)"})), classPeer},
		{"a pooler without its server", "sslmode=disable", pipeTo(answers(&pgproto3.ErrorResponse{Severity: "FATAL", Code: "08P01", Message: "server login has been failing, try again later (server_login_retry)"})), classPeer},
		{"starting up", "sslmode=disable", pipeTo(answers(&pgproto3.ErrorResponse{Severity: "FATAL", Code: "57P03"})), classStarting},
		{"shutting down under our feet", "sslmode=disable", pipeTo(answers(&pgproto3.ErrorResponse{Severity: "FATAL", Code: "57P01"})), classPeer},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			err := dialError(t, tc.parameters, tc.dial)
			for _, standby := range []bool{false, true} {
				got := classify(evidence{err: err, ctx: context.Background(), phase: phaseAcquire, standby: standby})
				require.Equal(t, verdict{tc.want, executedNo}, got, "%v", err)
			}
		})
	}
}

func TestClassifyARefusedDialToARealPort(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	closed := l.Addr().String()
	require.NoError(t, l.Close())
	err = dialError(t, "sslmode=prefer", func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "tcp", closed)
	})
	require.ErrorIs(t, err, syscall.ECONNREFUSED)
	require.Equal(t, verdict{classPeer, executedNo}, classify(evidence{err: err, ctx: context.Background()}))
}

func TestClassifyAcquires(t *testing.T) {
	t.Parallel()
	ended, cancel := context.WithCancel(context.Background())
	cancel()
	for _, tc := range []struct {
		name string
		err  error
		ctx  context.Context
		want class
	}{
		{"the caller's deadline, as the pool reports it", context.DeadlineExceeded, ended, classCaller},
		{"the caller's cancellation", context.Canceled, ended, classCaller},
		{"a deadline of a hook of the program's", context.DeadlineExceeded, context.Background(), classApplication},
		{"a closed pool", puddle.ErrClosedPool, context.Background(), classClosed},
		{"a closed pool to a caller that has gone", fmt.Errorf("acquire: %w", puddle.ErrClosedPool), ended, classClosed},
		{"a hook of the program's", errors.New("no secret for you"), context.Background(), classApplication},
		{"a ping that met a dead connection", io.ErrUnexpectedEOF, context.Background(), classPeer},
		{"a set-up that lost its connection", opError("read", syscall.ECONNRESET), context.Background(), classPeer},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			require.Equal(t, verdict{tc.want, executedNo}, classify(evidence{err: tc.err, ctx: tc.ctx, phase: phaseAcquire}))
		})
	}
}

// A program's BeforeConnect may ask a secret store, under a deadline of its own.
func TestAContextErrorOfAHookDoesNotBlameThePeer(t *testing.T) {
	t.Parallel()
	for _, cause := range []error{context.DeadlineExceeded, context.Canceled} {
		err := fmt.Errorf("asking the secret store: %w", cause)
		v := classify(evidence{err: err, ctx: context.Background(), phase: phaseAcquire})
		require.False(t, v.blamesPeer(), "%v: class %d", err, v.class)
	}
}

// A statement of AfterConnect that hangs ends by a deadline which pgx puts on the connection: the peer's fault.
func TestASetUpThatTimesOutOnThePeerBlamesThePeer(t *testing.T) {
	t.Parallel()
	err := timesOut(t)
	require.Equal(t, verdict{classPeer, executedNo}, classify(evidence{err: err, ctx: context.Background(), phase: phaseAcquire}))
}

func TestClassifyServerErrors(t *testing.T) {
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
		want  verdict
	}{
		{"a syntax error", serverError("ERROR", "42601", "scanner_yyerror", ""), both, verdict{classApplication, executedNo}},
		{"a unique violation", serverError("ERROR", "23505", "", ""), both, verdict{classApplication, executedNo}},
		{"a unique violation to a caller that has gone", serverError("ERROR", "23505", "", ""), []given{{ctx: ended}}, verdict{classApplication, executedNo}},
		{"a failed statement of a batch", serverError("ERROR", "23505", "", ""), []given{{ctx: live, batch: true}}, verdict{classApplication, executedInPart}},
		{"cancelled by the caller", serverError("ERROR", "57014", "ProcessInterrupts", ""), []given{{ctx: ended}, {ctx: ended, standby: true}}, verdict{classCaller, executedNo}},
		{"cancelled by somebody else", serverError("ERROR", "57014", "ProcessInterrupts", ""), both, verdict{classApplication, executedNo}},

		{"replay cancelled a read", serverError("ERROR", "40001", "ProcessInterrupts", conflict), both, verdict{classConflict, executedNo}},
		{"replay ended a session", serverError("FATAL", "40001", "ProcessInterrupts", conflict), both, verdict{classConflict, executedNo}},
		{"a serialization failure of the program's", serverError("ERROR", "40001", "CheckForSerializableConflictOut", ""), []given{primary}, verdict{classApplication, executedNo}},
		{"a deadlock with replay", serverError("ERROR", "40P01", "DeadLockReport", ""), []given{replica}, verdict{classConflict, executedNo}},
		{"a deadlock of the program's", serverError("ERROR", "40P01", "DeadLockReport", ""), []given{primary}, verdict{classApplication, executedNo}},

		{"a write on a standby", serverError("ERROR", "25006", "PreventCommandIfReadOnly", ""), []given{replica}, verdict{classRefused, executedNo}},
		{"... in a batch", serverError("ERROR", "25006", "PreventCommandIfReadOnly", ""), []given{{ctx: live, standby: true, batch: true}}, verdict{classRefused, executedNo}},
		{"a write in the program's own read-only transaction", serverError("ERROR", "25006", "PreventCommandIfReadOnly", ""), []given{primary}, verdict{classApplication, executedNo}},
		{"serializable on a standby", serverError("ERROR", "0A000", "GetSerializableTransactionSnapshot", "nicht englisch"), []given{replica}, verdict{classRefused, executedNo}},
		{"an unlogged table on a standby", serverError("ERROR", "0A000", "get_relation_info", "nicht englisch"), []given{replica}, verdict{classRefused, executedNo}},
		{"read write on a standby", serverError("ERROR", "0A000", "call_bool_check_hook", "cannot set transaction read-write mode during recovery"), []given{replica}, verdict{classRefused, executedNo}},
		{"a large object on a standby", serverError("ERROR", "XX000", "GetNewObjectId", "nicht englisch"), []given{replica}, verdict{classRefused, executedNo}},
		{"a log record on a standby", serverError("ERROR", "XX000", "XLogBeginInsert", "nicht englisch"), []given{replica}, verdict{classRefused, executedNo}},
		{"the log position on a standby", serverError("ERROR", "55000", "pg_current_wal_lsn", "recovery is in progress"), []given{replica}, verdict{classRefused, executedNo}},
		{"the twins of 25006 on a primary", serverError("ERROR", "0A000", "get_relation_info", ""), []given{primary}, verdict{classApplication, executedNo}},
		{"another feature that is missing", serverError("ERROR", "0A000", "transformSelectStmt", "not implemented"), both, verdict{classApplication, executedNo}},
		{"currval before nextval", serverError("ERROR", "55000", "currval_oid", "currval is not yet defined"), both, verdict{classApplication, executedNo}},
		{"an internal error", serverError("ERROR", "XX000", "elog", "tuple concurrently updated"), both, verdict{classApplication, executedNo}},

		{"WAIT FOR what only a primary has (19)", serverError("ERROR", "55000", "", "recovery is in progress"), []given{replica}, verdict{classRefused, executedNo}},
		{"WAIT FOR what only a standby has (19)", serverError("ERROR", "55000", "", "recovery is not in progress"), []given{primary}, verdict{classApplication, executedNo}},
		{"WAIT FOR for too long (19)", serverError("ERROR", "57014", "", "timed out while waiting for target LSN 0/3000060 to be replayed"), both, verdict{classApplication, executedNo}},
		{"a property graph that is not replayed yet (19)", serverError("ERROR", "42P01", "RangeVarGetRelidExtended", ""), []given{replica}, verdict{classBehind, executedNo}},
		{"a class of errors that is not known", serverError("ERROR", "10608", "", ""), both, verdict{classApplication, executedNo}},

		{"a table that is not replayed yet", serverError("ERROR", "42P01", "", ""), []given{replica}, verdict{classBehind, executedNo}},
		{"a column that is not replayed yet", serverError("ERROR", "42703", "", ""), []given{replica}, verdict{classBehind, executedNo}},
		{"a function that is not replayed yet", serverError("ERROR", "42883", "", ""), []given{replica}, verdict{classBehind, executedNo}},
		{"a type that is not replayed yet", serverError("ERROR", "42704", "typenameType", ""), []given{replica}, verdict{classBehind, executedNo}},
		{"a schema that is not replayed yet", serverError("ERROR", "3F000", "LookupExplicitNamespace", ""), []given{replica}, verdict{classBehind, executedNo}},
		{"a right that is not replayed yet", serverError("ERROR", "42501", "aclcheck_error", ""), []given{replica}, verdict{classBehind, executedNo}},
		{"a primary key that is not replayed yet", serverError("ERROR", "42803", "check_ungrouped_columns_walker", ""), []given{replica}, verdict{classBehind, executedNo}},
		{"columns that are not replayed yet", serverError("ERROR", "42601", "transformSetOperationTree", ""), []given{replica}, verdict{classBehind, executedNo}},
		{"a label that is not replayed yet", serverError("ERROR", "22P02", "enum_in", ""), []given{replica}, verdict{classBehind, executedNo}},
		{"... in binary", serverError("ERROR", "22P02", "enum_recv", ""), []given{replica}, verdict{classBehind, executedNo}},
		{"a number that is none", serverError("ERROR", "22P02", "pg_strtoint32", ""), both, verdict{classApplication, executedNo}},
		{"a domain that is not replayed yet", serverError("ERROR", "23514", "ExecEvalConstraintCheck", ""), []given{replica}, verdict{classBehind, executedNo}},
		{"a view that is not populated there yet", serverError("ERROR", "55000", "ExecOpenScanRelation", ""), []given{replica}, verdict{classBehind, executedNo}},
		{"an extension's library that is not there", serverError("ERROR", "58P01", "internal_load_library", ""), []given{replica}, verdict{classBehind, executedNo}},
		{"a file that a statement names", serverError("ERROR", "58P01", "", ""), []given{replica}, verdict{classApplication, executedNo}},
		{"a type that is not replayed yet, by its number", serverError("ERROR", "XX000", "", "cache lookup failed for type 16500"), []given{replica}, verdict{classBehind, executedNo}},
		{"a stale plan", serverError("ERROR", "0A000", "RevalidateCachedQuery", ""), []given{replica}, verdict{classBehind, executedNo}},
		{"a stale description", serverError("ERROR", "08P01", "exec_bind_message", ""), []given{replica}, verdict{classBehind, executedNo}},
		{"... of the columns", serverError("ERROR", "08P01", "PortalSetResultFormat", ""), []given{replica}, verdict{classBehind, executedNo}},
		{"a stale plan of the primary's", serverError("ERROR", "0A000", "RevalidateCachedQuery", ""), []given{primary}, verdict{classApplication, executedNo}},
		{"a table that is not there", serverError("ERROR", "42P01", "", ""), []given{primary}, verdict{classApplication, executedNo}},

		{"terminated", serverError("FATAL", "57P01", "ProcessInterrupts", ""), both, verdict{classPeer, executedNo}},
		{"terminated in a batch", serverError("FATAL", "57P01", "ProcessInterrupts", ""), []given{{ctx: live, batch: true}}, verdict{classPeer, executedUnknown}},
		{"terminated under a caller that has gone", serverError("FATAL", "57P01", "ProcessInterrupts", ""), []given{{ctx: ended}}, verdict{classPeer, executedNo}},
		{"crashed", serverError("FATAL", "57P02", "", ""), both, verdict{classPeer, executedUnknown}},
		{"starting", serverError("FATAL", "57P03", "", ""), both, verdict{classStarting, executedUnknown}},
		{"the database is dropped", serverError("FATAL", "57P04", "", ""), both, verdict{classConfig, executedUnknown}},
		{"idle for too long", serverError("FATAL", "57P05", "", ""), both, verdict{classApplication, executedNo}},
		{"in a transaction for too long", serverError("FATAL", "25P04", "ProcessInterrupts", ""), both, verdict{classApplication, executedNo}},
		{"idle in a transaction for too long", serverError("FATAL", "25P03", "", ""), both, verdict{classApplication, executedNo}},

		{"no more connections", serverError("FATAL", "53300", "", ""), both, verdict{classOverload, executedUnknown}},
		{"no more room on the disk", serverError("ERROR", "53100", "", ""), both, verdict{classOverload, executedNo}},
		{"no more memory", serverError("ERROR", "53200", "", ""), both, verdict{classOverload, executedNo}},
		{"the statement's own limit of temporary files", serverError("ERROR", "53400", "", ""), both, verdict{classApplication, executedNo}},
		{"a pooler's queue", poolerError("query_wait_timeout"), both, verdict{classOverload, executedNo}},
		{"a pooler whose server crashed", poolerError("server conn crashed?"), both, verdict{classPeer, executedUnknown}},
		{"a pooler that hands nothing on", poolerError("server login has been failing, try again later (server_login_retry)"), both, verdict{classPeer, executedNo}},
		{"... of version 1.25", poolerError("server login has been failing, cached error: connect failed (server_login_retry)"), both, verdict{classPeer, executedNo}},
		{"... of a batch", poolerError("server login has been failing, try again later (server_login_retry)"), []given{{ctx: live, batch: true}}, verdict{classPeer, executedUnknown}},
		{"a pooler whose operator ends all connections", poolerError("database removed"), both, verdict{classPeer, executedUnknown}},
		{"a pooler whose database is disabled", poolerError("database \"app\" is disabled"), both, verdict{classPeer, executedUnknown}},
		{"a pooler that cannot set what it is told to track", poolerError("invalid server parameter"), both, verdict{classPeer, executedUnknown}},
		{"a pooler's own trouble", poolerError("bouncer config error"), both, verdict{classPeer, executedUnknown}},
		{"a pooler that ends an idle client", poolerError("client_idle_timeout"), both, verdict{classPeer, executedUnknown}},
		{"a server that ends under a pooler", serverError("FATAL", "57P01", "ProcessInterrupts", "terminating connection due to administrator command"), both, verdict{classPeer, executedNo}},
		{"a protocol violation of the program's", serverError("ERROR", "08P01", "", "bind message supplies 1 parameters"), both, verdict{classApplication, executedNo}},
		{"a file that is missing", fileError("ERROR", "md.c", "mdopenfork"), both, verdict{classPeer, executedNo}},
		{"... that a statement names", fileError("ERROR", "copyfrom.c", "BeginCopyFrom"), both, verdict{classApplication, executedNo}},
		{"... that a session needs", fileError("FATAL", "dfmgr.c", "internal_load_library"), both, verdict{classPeer, executedUnknown}},
		{"a page that is corrupted", serverError("ERROR", "XX001", "", ""), both, verdict{classPeer, executedNo}},
		{"an index that is corrupted", serverError("ERROR", "XX002", "", ""), both, verdict{classPeer, executedNo}},
		{"any other fatal error", serverError("FATAL", "XX000", "", "out of luck"), both, verdict{classPeer, executedUnknown}},
		{"a panic", serverError("PANIC", "XX000", "", ""), both, verdict{classPeer, executedUnknown}},
		{"a severity that is translated", &pgconn.PgError{Severity: "FATALE", SeverityUnlocalized: "FATAL", Code: "XX000"}, both, verdict{classPeer, executedUnknown}},
		{"a severity of an old server", &pgconn.PgError{Severity: "FATAL", Code: "XX000"}, both, verdict{classPeer, executedUnknown}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			for _, g := range tc.given {
				e := evidence{err: tc.err, ctx: g.ctx, phase: phaseRun, standby: g.standby, batch: g.batch}
				require.Equal(t, tc.want, classify(e), "%+v", g)
				e.err = fmt.Errorf("scanning: %w", tc.err)
				require.Equal(t, tc.want, classify(e), "wrapped, %+v", g)
			}
		})
	}
}

// Where the role is asked, the session that refused is asked, too.
func TestClassifyARefusalBehindAPooler(t *testing.T) {
	t.Parallel()
	refusal := serverError("ERROR", "25006", "PreventCommandIfReadOnly", "")
	for _, tc := range []struct {
		e    evidence
		want verdict
	}{
		{evidence{}, verdict{classApplication, executedNo}},
		{evidence{recovers: true}, verdict{classRefused, executedNo}},
		{evidence{recovers: true, standby: true}, verdict{classRefused, executedNo}},
		{evidence{recovers: true, batch: true}, verdict{classRefused, executedInPart}},
		{evidence{recovers: true, standby: true, batch: true}, verdict{classRefused, executedNo}},
	} {
		e := tc.e
		e.err, e.ctx, e.phase = refusal, context.Background(), phaseRun
		require.Equal(t, tc.want, classify(e), "%+v", tc.e)
	}
	twin := serverError("ERROR", "55000", "", "recovery is not in progress")
	require.Equal(t, classApplication, classify(evidence{err: twin, ctx: context.Background(), phase: phaseRun}).class)
}

// lastMoment is a context that ends in a moment and has not ended yet.
type lastMoment struct{ context.Context }

func (lastMoment) Deadline() (time.Time, bool) { return time.Now().Add(soon / 2), true }

func TestClassifyLostConnections(t *testing.T) {
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
		want verdict
	}{
		{"lost in flight, extended protocol", func(t *testing.T) error {
			pg, _ := session(t, hangsUp)
			return extended(live, pg)
		}, live, verdict{classPeer, executedUnknown}},
		{"lost in flight, simple protocol, where pgx says that nothing was sent", func(t *testing.T) error {
			pg, _ := session(t, hangsUp)
			return simple(live, pg)
		}, live, verdict{classPeer, executedUnknown}},
		{"reset in flight", func(t *testing.T) error {
			pg, wire := session(t, hangs)
			wire.read.Store(&reset)
			return extended(live, pg)
		}, live, verdict{classPeer, executedUnknown}},
		{"reset before a byte was written", func(t *testing.T) error {
			pg, wire := session(t, hangs)
			cut := opError("write", syscall.ECONNRESET)
			wire.write.Store(&cut)
			err := extended(live, pg)
			require.True(t, pgconn.SafeToRetry(err), "pgx: %v", err)
			return err
		}, live, verdict{classPeer, executedNo}},
		{"closed before", func(t *testing.T) error {
			pg, wire := session(t, hangs)
			wire.write.Store(&io.ErrClosedPipe)
			_ = simple(live, pg)
			wire.write.Store(nil)
			err := simple(live, pg)
			require.ErrorIs(t, err, pgconn.ErrConnClosed)
			return err
		}, live, verdict{classPeer, executedUnknown}},
		{"in use", func(t *testing.T) error {
			pg, _ := session(t, hangs)
			other, cancel := context.WithCancel(live)
			defer cancel()
			open := pg.Exec(other, "select 1")
			t.Cleanup(func() { cancel(); _ = open.Close() })
			err := simple(live, pg)
			require.ErrorContains(t, err, "conn busy")
			return err
		}, live, verdict{classApplication, executedNo}},
		{"the caller's deadline in flight", timesOut, ended, verdict{classCaller, executedUnknown}},
		{"the same as seen by one whose own context lives", timesOut, live, verdict{classPeer, executedUnknown}},
		{"a context that had ended before", func(t *testing.T) error {
			pg, _ := session(t, hangs)
			return extended(ended, pg)
		}, ended, verdict{classCaller, executedNo}},
		{"lost in the last moment of the caller's time", func(*testing.T) error { return io.ErrUnexpectedEOF }, nearly, verdict{classCaller, executedUnknown}},
		{"lost to a caller that has gone", func(*testing.T) error { return reset }, ended, verdict{classCaller, executedUnknown}},
		{"a keepalive that was not answered", func(*testing.T) error { return opError("read", syscall.ETIMEDOUT) }, live, verdict{classPeer, executedUnknown}},
		{"a socket that was cut", func(*testing.T) error { return fmt.Errorf("read: %w", net.ErrClosed) }, live, verdict{classPeer, executedUnknown}},
		{"an end of file", func(*testing.T) error { return io.EOF }, live, verdict{classPeer, executedUnknown}},
		{"a bare errno", func(*testing.T) error { return syscall.EPIPE }, live, verdict{classPeer, executedUnknown}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			err := tc.err(t)
			require.Error(t, err)
			e := evidence{err: err, ctx: tc.ctx, phase: phaseRun}
			require.Equal(t, tc.want, classify(e), "%#v", err)
			e.err = fmt.Errorf("failed to deallocate cached statement(s): %w", err)
			require.Equal(t, tc.want, classify(e), "wrapped: %#v", err)
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
		name   string
		answer []pgproto3.BackendMessage
		marked bool
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
				marked := markUnknown(live, ending{lost: pg.IsClosed()}, err)
				require.Equal(t, tc.marked, errors.Is(marked, ErrOutcomeUnknown), "%v", err)
				e := evidence{err: err, ctx: live, phase: phaseRun, lost: pg.IsClosed()}
				require.Equal(t, tc.marked, classify(e).executed == executedUnknown)
			}
		})
	}
}

func TestClassifyErrorsThatBlameNobody(t *testing.T) {
	t.Parallel()
	for _, err := range []error{
		nil, pgx.ErrNoRows, pgx.ErrTooManyRows, pgx.ErrTxClosed, pgx.ErrTxCommitRollback,
		fmt.Errorf("scan: %w", pgx.ErrNoRows), errors.New("can't scan into dest[0]"), context.Canceled,
	} {
		got := classify(evidence{err: err, ctx: context.Background(), phase: phaseRun})
		require.Equal(t, classApplication, got.class, "%v", err)
		require.False(t, got.blamesPeer())
	}
}

func TestOnlyAPeerThatFailedOrGoesIsBlamed(t *testing.T) {
	t.Parallel()
	for c := classApplication; c <= classBehind; c++ {
		require.Equal(t, c == classPeer || c == classStarting, verdict{class: c}.blamesPeer(), "class %d", c)
	}
}

func TestASessionThatAStandbyRefusesAltogetherIsTold(t *testing.T) {
	t.Parallel()
	session := serverError("ERROR", "0A000", "GetSerializableTransactionSnapshot", "")
	require.True(t, refusesSession(session))
	require.True(t, refusesSession(fmt.Errorf("wrapped: %w", session)))
	require.False(t, refusesSession(serverError("ERROR", "0A000", "get_relation_info", "")))
	require.False(t, refusesSession(serverError("ERROR", "25006", "PreventCommandIfReadOnly", "")))
	require.False(t, refusesSession(io.EOF))
	require.False(t, refusesSession(nil))
}

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
			serverError(severity, code, routine, message), io.EOF, io.ErrUnexpectedEOF, pgconn.ErrConnClosed,
			opError("read", syscall.ECONNRESET), opError("write", syscall.EPIPE), done, dial, puddle.ErrClosedPool,
			pgx.ErrNoRows, pgx.ErrTxClosed, errors.New(message), &unknownOutcome{io.EOF},
			context.Canceled, context.DeadlineExceeded, nil,
		}
		base := bases[int(shape)%len(bases)]
		e := evidence{err: base, ctx: context.Background(), standby: flags&1 != 0, batch: flags&2 != 0}
		if flags&4 != 0 {
			e.phase = phaseRun
		}
		if flags&8 != 0 {
			e.ctx = ended
		}
		v := classify(e)
		switch {
		case e.phase == phaseAcquire && v.executed != executedNo:
			t.Fatalf("%v before there was a connection: executed", base)
		case base == nil && v.class != classApplication:
			t.Fatalf("no error is of class %d", v.class)
		case base == nil:
			return
		}
		for _, wrapped := range []error{
			fmt.Errorf("%s: %w", message, base), errors.Join(base, errors.New(message)), errors.Join(errors.New(message), base),
		} {
			e.err = wrapped
			got := classify(e)
			// What pgx itself reports of a context that ended is the caller's only if the caller's has.
			if base == context.Canceled || base == context.DeadlineExceeded || base == done && e.ctx == ended && e.phase == phaseRun {
				if v.blamesPeer() || got.blamesPeer() {
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
