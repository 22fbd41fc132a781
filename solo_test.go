package multipool

import (
	"context"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/pgmultipool/multipool/internal/pgtest"
)

// A program may ask for the types of what it gets: with one host they are pgx's own, and the socket is the one that was dialled.
func TestWhatAPoolOfOnePeerHandsOutIsPgxpools(t *testing.T) {
	c := pgtest.Start(t, pgtest.Options{})
	config, err := ParseConfig(c.ConnString())
	require.NoError(t, err)
	var mu sync.Mutex
	dialled := map[net.Conn]bool{}
	dial := config.ConnConfig.DialFunc
	config.ConnConfig.DialFunc = func(ctx context.Context, network, addr string) (net.Conn, error) {
		conn, err := dial(ctx, network, addr)
		mu.Lock()
		defer mu.Unlock()
		dialled[conn] = true
		return conn, err
	}
	p, err := NewWithConfig(context.Background(), config)
	require.NoError(t, err)
	defer p.Close()
	ctx := testContext(t)

	conn, err := p.Acquire(ctx)
	require.NoError(t, err)
	mu.Lock()
	assert.True(t, dialled[conn.Conn().PgConn().Conn()])
	mu.Unlock()
	assert.EqualValues(t, 1, p.Status().Peers[0].InFlight)
	require.NoError(t, conn.Conn().PgConn().CancelRequest(ctx))
	hijacked := conn.Hijack()
	assert.Zero(t, p.Status().Peers[0].InFlight, "it is the program's own")
	require.NoError(t, hijacked.Close(ctx))

	for _, o := range []pgx.TxOptions{{}, {AccessMode: pgx.ReadOnly}, {BeginQuery: "begin read only"}} {
		tx, err := p.BeginTx(ctx, o)
		require.NoError(t, err)
		assert.IsType(t, (*pgxpool.Tx)(nil), tx)
		assert.EqualValues(t, 1, p.Status().Peers[0].InFlight)
		require.NoError(t, tx.Commit(ctx))
		waitFor(t, "the transaction to be no longer in flight", 10*time.Second, func() bool { return p.Status().Peers[0].InFlight == 0 })
	}
	_, err = p.BeginTx(ctx, pgx.TxOptions{BeginQuery: "begin garbage"})
	require.ErrorContains(t, err, "garbage")
	assert.Zero(t, p.Status().Peers[0].InFlight)
	s := p.Status().Peers[0]
	assert.Equal(t, [2]int64{1, 4}, [2]int64{s.Reads, s.Writes})
	_, err = p.Begin(WithModel(ctx, "nobody"))
	require.ErrorIs(t, err, ErrUnknownName)
}

// The only server does not answer: a probe that reads Status must not be told that all is well.
func TestTheStatusOfOneHostThatDoesNotAnswer(t *testing.T) {
	c := pgtest.Start(t, pgtest.Options{})
	p := openPool(t, Options{}, c.ConnString())
	require.NoError(t, p.Ping(testContext(t)))
	s := p.Status().Peers[0]
	require.Equal(t, HealthUp, s.Health)
	require.True(t, s.Serves)
	require.NoError(t, c.Primary().Kill())
	require.Error(t, p.Ping(testContext(t)))
	require.Error(t, p.Ping(testContext(t)))
	s = p.Status().Peers[0]
	require.Equal(t, HealthDown, s.Health)
	require.Equal(t, WhyDown, s.Why)
	require.False(t, s.Serves)
	require.NotEmpty(t, s.LastFault)
	require.NoError(t, c.Primary().Start())
	require.NoError(t, p.Ping(testContext(t)))
	require.True(t, p.Status().Peers[0].Serves)
}
