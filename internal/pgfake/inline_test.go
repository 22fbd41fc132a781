package pgfake_test

import (
	"context"
	"io"
	"net"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"

	"github.com/pgmultipool/multipool/internal/pgfake"
)

func inline(t testing.TB, o pgfake.Options) (*pgfake.Peer, *pgxpool.Pool) {
	p := pgfake.New(o)
	pool := open(t, p.DialInline, func(c *pgxpool.Config) { c.MaxConns = 1 })
	t.Cleanup(p.Close)
	t.Cleanup(pool.Close)
	return p, pool
}

func TestInline(t *testing.T) {
	p, pool := inline(t, pgfake.Options{})
	var n int
	require.NoError(t, pool.QueryRow(t.Context(), "select $1::int", 7).Scan(&n))
	require.Equal(t, 7, n)
	require.Equal(t, 1, p.Count("select $1::int"))
	require.Empty(t, p.Statements())

	p.SetStandby(true)
	_, err := pool.Exec(t.Context(), "insert into t values (1)")
	requireCode(t, "25006", err)

	p.Die()
	require.Error(t, pool.Ping(t.Context()))
	require.ErrorIs(t, pool.Ping(t.Context()), syscall.ECONNREFUSED)
	p.Revive()
	require.NoError(t, pool.Ping(t.Context()))

	p.Hang()
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	require.ErrorIs(t, pool.Ping(ctx), context.DeadlineExceeded)
	p.Thaw()
	require.NoError(t, pool.Ping(t.Context()))
}

func TestInlineThaw(t *testing.T) {
	p := pgfake.New(pgfake.Options{})
	defer p.Close()
	conn, err := p.DialInline(t.Context(), "tcp", "db1:5432")
	require.NoError(t, err)
	p.Hang()
	_, err = conn.Write([]byte{0, 0, 0, 8, 4, 210, 22, 47}) // SSLRequest
	require.NoError(t, err)
	got := make(chan byte)
	go func() {
		var b [1]byte
		io.ReadFull(conn, b[:])
		got <- b[0]
	}()
	p.Thaw()
	require.EqualValues(t, 'N', <-got)
	p.Hang()
	require.NoError(t, conn.Close())
	_, err = conn.Read(make([]byte, 1))
	require.ErrorIs(t, err, net.ErrClosed)
	p.Thaw()
	require.Zero(t, p.Conns())
}

// The figure is pgx's own (its context watcher, the row and its results); the peer is to add none.
func TestInlineAllocatesNothing(t *testing.T) {
	p, pool := inline(t, pgfake.Options{})
	ctx := t.Context()
	var n int
	one := func() { require.NoError(t, pool.QueryRow(ctx, "select 1").Scan(&n)) }
	one()
	sent, read := flight(t, p)
	require.Zero(t, testing.AllocsPerRun(100, func() { sent(); read() }))
	t.Logf("QueryRow: %v allocations", testing.AllocsPerRun(100, one))
}

// flight is what pgx sends for a cached statement, without pgx.
func flight(t testing.TB, p *pgfake.Peer) (write, read func()) {
	conn, err := p.DialInline(context.Background(), "tcp", "db1:5432")
	require.NoError(t, err)
	t.Cleanup(func() { conn.Close() })
	send := func(b []byte) {
		_, err := conn.Write(b)
		require.NoError(t, err)
	}
	buf := make([]byte, 65536)
	receive := func() {
		_, err := conn.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
	}
	send(message(0, "\x00\x03\x00\x00user\x00app\x00\x00"))
	receive()
	send(message('P', "s\x00select 1\x00\x00\x00"))
	send(message('S', ""))
	receive()
	b := append(message('B', "\x00s\x00\x00\x00\x00\x00\x00\x01\x00\x01"), message('D', "P\x00")...)
	b = append(b, message('E', "\x00\x00\x00\x00\x00")...)
	b = append(b, message('S', "")...)
	return func() { conn.Write(b) }, receive
}

func message(typ byte, body string) []byte {
	var b []byte
	if typ != 0 {
		b = append(b, typ)
	}
	b = append(b, 0, 0, byte((len(body)+4)>>8), byte(len(body)+4))
	return append(b, body...)
}

// BenchmarkQueryRow is bare pgxpool: what a figure of another pool over the same peer is compared with.
func BenchmarkQueryRow(b *testing.B) {
	_, pool := inline(b, pgfake.Options{})
	ctx := context.Background()
	b.ReportAllocs()
	var n int
	for b.Loop() {
		if err := pool.QueryRow(ctx, "select 1").Scan(&n); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkPeer is the part of it that the peer takes.
func BenchmarkPeer(b *testing.B) {
	p := pgfake.New(pgfake.Options{})
	defer p.Close()
	write, read := flight(b, p)
	b.ReportAllocs()
	for b.Loop() {
		write()
		read()
	}
}
