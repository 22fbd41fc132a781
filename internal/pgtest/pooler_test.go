//go:build linux || darwin || freebsd

package pgtest

import (
	"context"
	"errors"
	"os"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/stretchr/testify/require"
)

// startPooled starts a primary, a standby and a PgBouncer in front of the primary.
func startPooled(t *testing.T, settings map[string]string) (*Cluster, *Pooler) {
	t.Helper()
	c := Start(t, Options{Standbys: 1})
	return c, StartPooler(t, c.Primary(), settings)
}

// pooled is a connection through a pooler that prepares nothing.
func pooled(t *testing.T, p *Pooler) *pgx.Conn {
	t.Helper()
	ctx := within(t, patience)
	conn, err := pgx.Connect(ctx, p.ConnString("default_query_exec_mode=exec"))
	require.NoError(t, err)
	t.Cleanup(func() { _ = conn.Close(context.Background()) })
	return conn
}

// port asks which server answers.
func port(ctx context.Context, conn *pgx.Conn) (n int, err error) {
	err = conn.QueryRow(ctx, "select inet_server_port()").Scan(&n)
	return n, err
}

func TestPoolerLeadsToAServerAndMoves(t *testing.T) {
	t.Parallel()
	c, p := startPooled(t, nil)
	conn := pooled(t, p)
	for _, s := range []*Server{c.Primary(), c.Standbys()[0], c.Primary()} {
		require.NoError(t, p.Retarget(s))
		got, err := port(within(t, patience), conn)
		require.NoError(t, err)
		require.EqualValues(t, s.Port(), got)
	}
}

func TestPoolerPausesAndSuspends(t *testing.T) {
	t.Parallel()
	_, p := startPooled(t, nil)
	for _, hold := range []func() error{p.Pause, p.Suspend} {
		conn := pooled(t, p)
		ctx := within(t, patience)
		require.NoError(t, hold())
		done := make(chan error, 1)
		go func() { _, err := port(ctx, conn); done <- err }()
		select {
		case err := <-done:
			t.Fatalf("a held statement ended: %v", err)
		case <-time.After(100 * time.Millisecond):
		}
		require.NoError(t, p.Resume())
		require.NoError(t, <-done)
	}
}

func TestPoolerRefuses(t *testing.T) {
	t.Parallel()
	_, p := startPooled(t, map[string]string{"max_client_conn": "2"}) // one is the console's
	ctx := within(t, patience)
	refusal := func() string {
		conn, err := pgx.Connect(ctx, p.ConnString())
		if err == nil {
			_ = conn.Close(ctx)
			return ""
		}
		var answer *pgconn.PgError
		require.ErrorAs(t, err, &answer)
		require.Equal(t, "08P01", answer.Code)
		return answer.Message
	}
	require.NoError(t, p.Disable())
	require.Equal(t, `database "postgres" is disabled`, refusal())
	require.NoError(t, p.Enable())
	conn := pooled(t, p)
	_, err := port(ctx, conn)
	require.NoError(t, err)
	require.Equal(t, "no more connections allowed (max_client_conn)", refusal())
	require.NoError(t, p.KillClients())
	_, err = port(ctx, conn)
	require.Error(t, err)
	require.NoError(t, p.Resume())
	require.NoError(t, eventually(ctx, func(context.Context) error {
		if text := refusal(); text != "" {
			return errors.New(text)
		}
		return nil
	}))
}

func TestPoolerIsKilledRestartedAndLeavesNothing(t *testing.T) {
	t.Parallel()
	c, p := startPooled(t, nil)
	ctx := within(t, patience)
	require.NoError(t, p.Kill())
	require.False(t, p.Running())
	_, err := pgx.Connect(ctx, p.ConnString())
	require.Error(t, err)
	require.NoError(t, p.Start())
	require.NoError(t, p.Restart())
	_, err = port(ctx, pooled(t, p))
	require.NoError(t, err)
	pid, folder := p.run.pid, c.folder.path
	other, err := c.Primary().NewPooler(ctx, nil)
	require.NoError(t, err)
	require.NoError(t, other.Close())
	require.NoError(t, other.Close(), "a second time")
	require.NoFileExists(t, other.file(".ini"))
	require.NoError(t, c.Close(), "with a pooler in front")
	require.NoError(t, eventually(ctx, func(context.Context) error {
		if p.Running() || kill(pid, 0) == nil {
			return errors.New("the pooler lives")
		}
		return nil
	}))
	_, err = os.Stat(folder)
	require.ErrorIs(t, err, os.ErrNotExist)
	require.Error(t, p.Start(), "its cluster is closed")
}

func TestPoolerWithABadSettingFailsWithItsLog(t *testing.T) {
	t.Parallel()
	c := Start(t, Options{})
	if _, err := findProxy("pgbouncer"); err != nil {
		t.Skip(err)
	}
	_, err := c.Primary().NewPooler(within(t, patience), map[string]string{"pool_mode": "nonsense"})
	require.ErrorContains(t, err, "nonsense")
}
