package netfault_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/stretchr/testify/require"

	"github.com/pgmultipool/multipool/internal/netfault"
	"github.com/pgmultipool/multipool/internal/pgfake"
)

// echo greets a startup and sends back whatever else it reads. It gives the connections that it accepts to the test.
func echo(t *testing.T) (addr string, accepted <-chan *net.TCPConn) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	ch := make(chan *net.TCPConn, 100)
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			ch <- c.(*net.TCPConn)
			wg.Go(func() {
				defer c.Close()
				head := make([]byte, 4)
				if _, err := io.ReadFull(c, head); err != nil {
					return
				}
				if head[0] == 0 {
					io.CopyN(io.Discard, c, int64(head[3])-4)
					head = ready
				}
				c.Write(head)
				io.Copy(c, c)
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		wg.Wait()
	})
	return l.Addr().String(), ch
}

func relay(t *testing.T, target string) *netfault.Relay {
	r, err := netfault.Listen(target)
	require.NoError(t, err)
	t.Cleanup(func() {
		require.NoError(t, r.Close())
		require.Zero(t, r.Conns())
	})
	return r
}

func dial(t *testing.T, r *netfault.Relay) *net.TCPConn {
	c, err := net.Dial("tcp", r.Addr())
	require.NoError(t, err)
	t.Cleanup(func() { c.Close() })
	return c.(*net.TCPConn)
}

var (
	hello = []byte{0, 0, 0, 9, 0, 3, 0, 0, 0} // a startup message
	ready = []byte{'Z', 0, 0, 0, 5, 'I'}
)

// start makes the connection one of the protocol. Messages of the client come back, and have a server's form too.
func start(t *testing.T, r *netfault.Relay) *net.TCPConn {
	c := dial(t, r)
	_, err := c.Write(hello)
	require.NoError(t, err)
	receive(t, c, ready)
	return c
}

func receive(t *testing.T, c net.Conn, want []byte) {
	t.Helper()
	got := make([]byte, len(want))
	_, err := io.ReadFull(c, got)
	require.NoError(t, err)
	require.Equal(t, want, got)
}

func roundTrip(t *testing.T, c net.Conn, msg []byte) {
	t.Helper()
	_, err := c.Write(msg)
	require.NoError(t, err)
	receive(t, c, msg)
}

// raw makes the relay take the connection for TLS, so that any byte passes.
func raw(t *testing.T, r *netfault.Relay) *net.TCPConn {
	c := dial(t, r)
	roundTrip(t, c, []byte{0x16, 3, 1, 2, 0})
	return c
}

func TestRelaysBytesAndEnds(t *testing.T) {
	addr, accepted := echo(t)
	r := relay(t, addr)
	c := raw(t, r)
	server := <-accepted
	roundTrip(t, c, bytes.Repeat([]byte("x"), 1<<16))
	require.Equal(t, 1, r.Accepted())
	require.Equal(t, 1, r.Conns())
	toServer, _ := r.Bytes()
	require.EqualValues(t, 5+1<<16, toServer)

	require.NoError(t, c.CloseWrite())
	_, err := c.Read(make([]byte, 1))
	require.ErrorIs(t, err, io.EOF)
	_, err = server.Write([]byte("x"))
	require.Error(t, err)
}

func TestReset(t *testing.T) {
	addr, accepted := echo(t)
	r := relay(t, addr)
	c := raw(t, r)
	<-accepted
	r.Reset()
	require.Zero(t, r.Conns(), "though their goroutines may not have found out yet")
	_, err := c.Read(make([]byte, 1))
	require.ErrorIs(t, err, syscall.ECONNRESET)
	raw(t, r)
	require.Equal(t, 2, r.Accepted())
}

func TestResetOfOneSideReachesTheOther(t *testing.T) {
	addr, accepted := echo(t)
	r := relay(t, addr)
	c := raw(t, r)
	server := <-accepted
	require.NoError(t, server.SetLinger(0))
	require.NoError(t, server.Close())
	_, err := c.Read(make([]byte, 1))
	require.ErrorIs(t, err, syscall.ECONNRESET)
}

func TestRefuse(t *testing.T) {
	addr, _ := echo(t)
	r := relay(t, addr)
	c := raw(t, r)
	for range 3 {
		require.NoError(t, r.Refuse(true))
		require.NoError(t, r.Refuse(true))
		_, err := net.Dial("tcp", r.Addr())
		require.ErrorIs(t, err, syscall.ECONNREFUSED)
		roundTrip(t, c, []byte("still there"))
		require.NoError(t, r.Refuse(false))
		raw(t, r)
	}
	require.NoError(t, r.Refuse(true))
	require.NoError(t, r.Close())
	require.NoError(t, r.Close())
	require.ErrorIs(t, r.Refuse(false), net.ErrClosed)
}

func TestUnreachableTarget(t *testing.T) {
	// Never a port that was free a moment ago: the relay itself may be given it.
	r := relay(t, "127.0.0.1:1")
	c, err := net.Dial("tcp", r.Addr())
	if err == nil { // the reset may be faster than the dial
		defer c.Close()
		_, err = c.Read(make([]byte, 1))
	}
	require.ErrorIs(t, err, syscall.ECONNRESET)
}

// silent shows, as far as one can, that nothing comes.
func silent(t *testing.T, c net.Conn) {
	t.Helper()
	require.NoError(t, c.SetReadDeadline(time.Now().Add(20*time.Millisecond)))
	_, err := c.Read(make([]byte, 1))
	var netErr net.Error
	require.ErrorAs(t, err, &netErr)
	require.True(t, netErr.Timeout())
	require.NoError(t, c.SetReadDeadline(time.Time{}))
}

func TestFreeze(t *testing.T) {
	addr, accepted := echo(t)
	r := relay(t, addr)
	c := raw(t, r)
	<-accepted
	r.Freeze()
	_, err := c.Write([]byte("later"))
	require.NoError(t, err)
	fresh := dial(t, r)
	_, err = fresh.Write(hello)
	require.NoError(t, err)
	silent(t, c)
	silent(t, fresh)
	require.Empty(t, accepted)

	r.Thaw()
	receive(t, c, []byte("later"))
	receive(t, fresh, ready)
	<-accepted
}

func TestBlackhole(t *testing.T) {
	addr, accepted := echo(t)
	r := relay(t, addr)
	idle, busy := raw(t, r), raw(t, r)
	<-accepted
	<-accepted
	r.Blackhole()
	_, err := busy.Write(bytes.Repeat([]byte("x"), 8<<20)) // more than any buffer: somebody reads it
	require.NoError(t, err)
	fresh := dial(t, r)
	silent(t, busy)
	silent(t, fresh)
	require.Empty(t, accepted)

	require.Eventually(t, func() bool { return r.Accepted() == 3 }, 5*time.Second, time.Millisecond)
	require.Equal(t, 3, r.Conns())
	r.Thaw()
	for _, c := range []net.Conn{busy, fresh} {
		_, err = c.Read(make([]byte, 1))
		require.ErrorIs(t, err, syscall.ECONNRESET)
	}
	roundTrip(t, idle, []byte("nothing was lost"))
}

func TestBlackholeSwallowsEnds(t *testing.T) {
	addr, accepted := echo(t)
	r := relay(t, addr)
	c := raw(t, r)
	server := <-accepted
	r.Blackhole()
	require.NoError(t, server.Close())
	silent(t, c)
	require.Equal(t, 1, r.Conns())
}

func TestDelay(t *testing.T) {
	addr, _ := echo(t)
	r := relay(t, addr)
	c := raw(t, r)
	r.Delay(30 * time.Millisecond)
	began := time.Now()
	roundTrip(t, c, []byte("x"))
	require.GreaterOrEqual(t, time.Since(began), 60*time.Millisecond)
	r.Delay(0)
	roundTrip(t, c, []byte("x"))

	r.Delay(time.Hour)
	_, err := c.Write([]byte("x"))
	require.NoError(t, err)
	require.NoError(t, r.Close(), "what is delayed does not hold up a close")
}

func TestCutsCountPerConnection(t *testing.T) {
	addr, _ := echo(t)
	r := relay(t, addr)
	a, b := start(t, r), start(t, r)
	fired := r.Cut(netfault.Cut{From: netfault.Client, Type: 'Q', Nth: 3, When: netfault.After})
	q := []byte{'Q', 0, 0, 0, 6, 'x', 0}
	for range 2 {
		roundTrip(t, a, q)
		roundTrip(t, b, q)
		roundTrip(t, b, []byte{'S', 0, 0, 0, 4})
	}
	require.Zero(t, r.Fired())
	_, err := b.Write(append(bytes.Clone(q), q...))
	require.NoError(t, err)
	<-fired
	require.Equal(t, 1, r.Fired())
	require.Equal(t, 1, r.Conns())
	roundTrip(t, a, append(q, q...))
}

func TestMessagesInPieces(t *testing.T) {
	addr, _ := echo(t)
	r := relay(t, addr)
	c := dial(t, r)
	fired := r.Cut(netfault.Cut{From: netfault.Client, Match: func(m []byte) bool { return bytes.HasSuffix(m, []byte("end")) }})
	msg := append(bytes.Clone(hello), 'Q', 0, 0, 0, 7, 'o', 'n', 'e', 'P', 0, 0, 0, 7, 'e', 'n', 'd')
	for _, b := range msg {
		_, err := c.Write([]byte{b})
		require.NoError(t, err)
	}
	<-fired
	got, err := io.ReadAll(c)
	require.NoError(t, err, "an end without RST, however much was unread")
	require.True(t, bytes.HasPrefix(append(bytes.Clone(ready), msg[len(hello):len(hello)+8]...), got))
	toServer, _ := r.Bytes()
	require.EqualValues(t, len(hello)+8, toServer)
}

// database is a relay in front of a fake peer, and a client behind it.
func database(t *testing.T) (*pgfake.Peer, *netfault.Relay, func() *pgx.Conn) {
	p := pgfake.New(pgfake.Options{})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	served := make(chan error, 1)
	go func() { served <- p.Serve(l) }()
	t.Cleanup(func() {
		p.Close()
		require.NoError(t, <-served)
	})
	r := relay(t, l.Addr().String())
	return p, r, func() *pgx.Conn {
		c, err := pgx.Connect(t.Context(), fmt.Sprintf("postgres://app@%s/app?sslmode=prefer", r.Addr()))
		require.NoError(t, err)
		t.Cleanup(func() { c.Close(context.Background()) })
		return c
	}
}

func TestCutsAtAStatement(t *testing.T) {
	const sql = "insert into t values ($1)"
	cases := []struct {
		name    string
		cut     netfault.Cut
		applied bool
		ok      bool
	}{
		{"never arrived", netfault.Cut{From: netfault.Client, Type: 'B'}, false, false},
		{"not even begun", netfault.Cut{From: netfault.Client, Type: 'E'}, false, false},
		{"arrived", netfault.Cut{From: netfault.Client, Type: 'S', When: netfault.After}, true, false},
		{"answer lost", netfault.Cut{From: netfault.Server, Type: 'C'}, true, false},
		{"answered", netfault.Cut{From: netfault.Server, Type: 'Z', When: netfault.After}, true, true},
		{"by text", netfault.Cut{
			From: netfault.Server, Match: func(m []byte) bool { return bytes.Contains(m, []byte("INSERT")) },
		}, true, false},
	}
	for _, c := range cases {
		for _, rst := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, RST %v", c.name, rst), func(t *testing.T) {
				p, r, connect := database(t)
				conn := connect()
				_, err := conn.Prepare(t.Context(), "s", sql)
				require.NoError(t, err)
				c.cut.RST = rst
				fired := r.Cut(c.cut)
				_, err = conn.Exec(t.Context(), "s", 1)
				if c.ok {
					require.NoError(t, err)
				} else {
					var pgErr *pgconn.PgError
					require.Error(t, err)
					require.False(t, errors.As(err, &pgErr))
					if rst && c.cut.From == netfault.Client {
						require.ErrorIs(t, err, syscall.ECONNRESET)
					}
				}
				<-fired
				// The server ends its connection when it has executed what it read.
				require.Eventually(t, func() bool { return p.Conns() == 0 }, 5*time.Second, time.Millisecond)
				require.Equal(t, c.applied, p.Applied(sql) == 1)
				require.Error(t, conn.Ping(t.Context()))
				require.Equal(t, 1, r.Fired())
				require.NoError(t, connect().Ping(t.Context()), "a rule fires once")
			})
		}
	}
}

func TestCutAtStartup(t *testing.T) {
	_, r, connect := database(t)
	fired := r.Cut(netfault.Cut{From: netfault.Server, Type: 'R'})
	_, err := pgx.Connect(t.Context(), fmt.Sprintf("postgres://app@%s/app?sslmode=disable", r.Addr()))
	require.Error(t, err)
	<-fired
	require.NoError(t, connect().Ping(t.Context()))
}

func TestCutProbability(t *testing.T) {
	p, r, connect := database(t)
	r.CutProbability(0.3, 1)
	failed, lost, succeeded := 0, 0, 0
	var conn *pgx.Conn
	for i := range 200 {
		mode := pgx.QueryExecModeSimpleProtocol
		if i%2 == 0 {
			mode = pgx.QueryExecModeExec
		}
		if conn == nil || conn.IsClosed() {
			conn = connect()
		}
		sql := fmt.Sprintf("insert into t values (%d)", i)
		_, err := conn.Exec(t.Context(), sql, mode)
		if err == nil {
			succeeded++
			require.Equal(t, 1, p.Applied(sql))
			continue
		}
		failed++
		require.NoError(t, conn.Close(t.Context()))
		require.Eventually(t, func() bool { return p.Conns() == 0 }, 5*time.Second, 100*time.Microsecond)
		lost += p.Applied(sql)
	}
	require.Equal(t, failed, r.Fired())
	require.InDelta(t, 60, failed, 25)
	require.Greater(t, lost, 5)
	require.Greater(t, failed-lost, 5)
	require.Equal(t, 200, failed+succeeded)
	r.Disarm()
	require.NoError(t, connect().Ping(t.Context()))
}

func TestEncryptedConnectionsAreNotRead(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer l.Close()
	sent := make(chan []byte, 1)
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		var request [8]byte
		io.ReadFull(c, request[:])
		c.Write([]byte{'S'})
		all, _ := io.ReadAll(c)
		sent <- all
	})
	r := relay(t, l.Addr().String())
	r.Cut(netfault.Cut{From: netfault.Client, Type: 0x16})
	c := dial(t, r)
	_, err = c.Write([]byte{0, 0, 0, 8, 4, 210, 22, 47})
	require.NoError(t, err)
	var answer [1]byte
	_, err = io.ReadFull(c, answer[:])
	require.NoError(t, err)
	require.EqualValues(t, 'S', answer[0])

	go tls.Client(c, &tls.Config{InsecureSkipVerify: true}).Handshake()
	require.Eventually(t, func() bool { n, _ := r.Bytes(); return n > 100 }, 5*time.Second, time.Millisecond)
	require.NoError(t, c.CloseWrite())
	require.EqualValues(t, 0x16, (<-sent)[0])
	require.Zero(t, r.Fired())
}
