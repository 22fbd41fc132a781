//go:build linux || darwin || freebsd

package pgtest

import (
	"context"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"
)

func TestBalancerLeadsNewSessionsOnly(t *testing.T) {
	t.Parallel()
	c := Start(t, Options{Standbys: 1})
	b := StartBalancer(t, c, "w", "r")
	connect := func(name string) (*pgx.Conn, error) {
		conn, err := pgx.Connect(within(t, patience), connString([]*Server{{port: b.Port(name)}}, []string{"target_session_attrs=any"}))
		if err == nil {
			t.Cleanup(func() { _ = conn.Close(context.Background()) })
		}
		return conn, err
	}
	leads := func(conn *pgx.Conn, s *Server) {
		t.Helper()
		got, err := port(within(t, patience), conn)
		require.NoError(t, err)
		require.EqualValues(t, s.Port(), got)
	}
	_, err := connect("w")
	require.Error(t, err)
	primary, standby := c.Primary(), c.Standbys()[0]
	require.NoError(t, b.Lead("w", primary))
	old, err := connect("w")
	require.NoError(t, err)
	leads(old, primary)
	require.NoError(t, b.Lead("w", standby))
	now, err := connect("w")
	require.NoError(t, err)
	leads(now, standby)
	leads(old, primary)
	_, err = connect("r")
	require.Error(t, err)
	require.NoError(t, b.Cut("w", primary))
	waitClosed(t, old)
	leads(now, standby)

	require.NoError(t, b.Lead("r", primary, standby))
	met := map[int]bool{}
	for range 4 {
		conn, err := connect("r")
		require.NoError(t, err)
		n, err := port(within(t, patience), conn)
		require.NoError(t, err)
		met[n] = true
	}
	require.Len(t, met, 2)
}

// waitClosed waits for a session to be ended.
func waitClosed(t *testing.T, conn *pgx.Conn) {
	ctx := within(t, patience)
	for {
		if _, err := conn.Exec(ctx, "select 1"); err != nil {
			require.NoError(t, ctx.Err())
			return
		}
	}
}
