package multipool

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/pgmultipool/multipool/internal/pgtest"
)

var errNotHere = errors.New("the program does not like this server")

// onAStandby is what a program asks of a connection.
func onAStandby(c *pgx.Conn) bool { return c.PgConn().ParameterStatus("in_hot_standby") == "on" }

// refusing are the hooks by which a program may refuse a server, and the error that it then shows; nil is pgxpool's.
func refusing(refuse func(*pgx.Conn) bool) map[string]struct {
	install func(*Config)
	err     error
} {
	fail := func(c *pgx.Conn) error {
		if refuse(c) {
			return errNotHere
		}
		return nil
	}
	return map[string]struct {
		install func(*Config)
		err     error
	}{
		"AfterConnect": {func(c *Config) {
			c.AfterConnect = func(_ context.Context, conn *pgx.Conn) error { return fail(conn) }
		}, errNotHere},
		"AfterConnect with a deadline of its own": {func(c *Config) {
			c.AfterConnect = func(_ context.Context, conn *pgx.Conn) error {
				if refuse(conn) {
					return context.DeadlineExceeded
				}
				return nil
			}
		}, context.DeadlineExceeded},
		"PrepareConn": {func(c *Config) {
			c.PrepareConn = func(_ context.Context, conn *pgx.Conn) (bool, error) { err := fail(conn); return err == nil, err }
		}, errNotHere},
		"BeforeAcquire": {func(c *Config) {
			//lint:ignore SA1019 a program may still use it
			c.BeforeAcquire = func(_ context.Context, conn *pgx.Conn) bool { return !refuse(conn) }
		}, nil},
	}
}

func TestAReadThatAHookRefusesAReplicaForIsReadOnThePrimary(t *testing.T) {
	for name, hook := range refusing(onAStandby) {
		t.Run(name, func(t *testing.T) {
			bubble(t, 2, func(c *Options) { hook.install(c.Config) }, func(ctx context.Context, x *fakes) {
				settled()
				for range 5 {
					assert.Equal(t, "primary:5432", x.read(ctx))
				}
				tx, err := x.pool.BeginTx(ctx, pgx.TxOptions{AccessMode: pgx.ReadOnly})
				require.NoError(t, err)
				require.NoError(t, tx.Rollback(ctx))
				x.journal.take()
				require.Error(t, x.pool.QueryRow(WithRoute(ctx, Route{Target: TargetReplica}), "select 1").Scan(new(int)))
				assert.Len(t, x.journal.take(), 2, "each replica once")
				_, err = x.pool.Exec(WithPreferReplica(ctx), "select 1")
				require.Error(t, err)
				assert.Len(t, x.journal.take(), 1, "no read")
				for _, q := range x.pool.peers() {
					assert.Empty(t, x.peer(strings.TrimSuffix(q.name, ":5432")).LastFault)
					assert.Zero(t, q.load.busy())
				}
			})
		})
	}
}

func TestAReadThatAHookRefusesEveryPeerForShowsItsError(t *testing.T) {
	for name, hook := range refusing(func(*pgx.Conn) bool { return true }) {
		t.Run(name, func(t *testing.T) {
			bubble(t, 2, func(c *Options) { hook.install(c.Config) }, func(ctx context.Context, x *fakes) {
				settled()
				begun := time.Now()
				err := x.pool.QueryRow(ctx, "select 1").Scan(new(int))
				require.Error(t, err)
				if hook.err != nil {
					assert.Equal(t, hook.err, err)
				}
				assert.Len(t, x.journal.take(), 3, "every peer once")
				assert.Zero(t, time.Since(begun))
			})
		})
	}
}

// The type that the program loads is on the primary, and not on its replica yet.
func TestAHookThatAReplicaCannotServeYet(t *testing.T) {
	c := pgtest.Start(t, pgtest.Options{Standbys: 1})
	must(t, c, "select 1")
	ctx := testContext(t)
	require.NoError(t, c.Standbys()[0].DelayReplay(time.Hour))
	require.NoError(t, c.Primary().Exec(ctx, "create type mood as enum ('sad')"))
	config, err := ParseConfig(c.ConnString("pool_max_conns=2"))
	require.NoError(t, err)
	config.AfterConnect = func(ctx context.Context, conn *pgx.Conn) error {
		loaded, err := conn.LoadType(ctx, "mood")
		if err == nil {
			conn.TypeMap().RegisterType(loaded)
		}
		return err
	}
	p := openConfig(t, Options{}, config)
	waitUp(t, p)
	for range 3 {
		require.NoError(t, p.QueryRow(ctx, "select 1").Scan(new(int)))
	}
}
