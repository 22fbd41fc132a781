package multipool

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
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

func TestTheLinesOfSlogHooks(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		event any
		want  string
	}{
		{PeerEvent{Peer: "a", FromRole: RoleUnknown, Role: RoleReplica, From: HealthUnknown, To: HealthUp},
			`level=INFO msg="multipool: peer changed" peer=a role=replica from_role=unknown from=unknown to=up`},
		{PeerEvent{Peer: "a", FromRole: RoleReplica, Role: RolePrimary, From: HealthUp, To: HealthUp},
			`level=INFO msg="multipool: peer changed" peer=a role=primary from_role=replica`},
		{PeerEvent{Peer: "a", FromRole: RoleReplica, Role: RoleReplica, From: HealthUp, To: HealthSuspect, Cause: errNotHere},
			`level=DEBUG msg="multipool: peer changed" peer=a role=replica from=up to=suspect cause="the program does not like this server"`},
		{PeerEvent{Peer: "a", FromRole: RoleReplica, Role: RoleReplica, From: HealthSuspect, To: HealthUp},
			`level=DEBUG msg="multipool: peer changed" peer=a role=replica from=suspect to=up`},
		{PeerEvent{Peer: "a", FromRole: RoleReplica, Role: RoleReplica, From: HealthSuspect, To: HealthDown, Cause: errNotHere},
			`level=WARN msg="multipool: peer changed" peer=a role=replica from=suspect to=down cause="the program does not like this server"`},
		{PeerEvent{Peer: "a", FromRole: RoleReplica, Role: RoleReplica, From: HealthDown, To: HealthUp},
			`level=INFO msg="multipool: peer changed" peer=a role=replica from=down to=up`},
		{PeerEvent{Peer: "a", FromRole: RoleReplica, Role: RoleReplica, From: HealthUp, To: HealthUp, Unfit: WhyBehind},
			`level=WARN msg="multipool: peer changed" peer=a role=replica unfit=behind`},
		{PeerEvent{Peer: "a", FromRole: RoleReplica, Role: RoleReplica, From: HealthUp, To: HealthUp, WasUnfit: WhyBehind},
			`level=INFO msg="multipool: peer changed" peer=a role=replica unfit=none`},
		{PeerEvent{Peer: "a", FromRole: RolePrimary, Role: RolePrimary, From: HealthUp, To: HealthUp, Unfit: WhyOlderTimeline},
			`level=WARN msg="multipool: peer changed" peer=a role=primary unfit=older-timeline`},
		{PeerEvent{Peer: "a", FromRole: RoleReplica, Role: RoleReplica, From: HealthUp, To: HealthUp, Slow: true, Unfit: WhyBehind, WasUnfit: WhyBehind},
			`level=INFO msg="multipool: peer changed" peer=a role=replica slow=true`},
		{PeerEvent{Peer: "a", FromRole: RoleReplica, Role: RoleReplica, From: HealthUp, To: HealthUp, WasSlow: true},
			`level=INFO msg="multipool: peer changed" peer=a role=replica slow=false`},
		{PeerEvent{Peer: "a", FromRole: RoleReplica, Role: RoleReplica, From: HealthDown, To: HealthDown, Drained: true},
			`level=INFO msg="multipool: peer changed" peer=a role=replica drained=true`},
		{PeerEvent{Peer: "a"}, `level=INFO msg="multipool: peer added" peer=a role=unknown`},
		{PeerEvent{Peer: "a", Role: RoleReplica}, `level=INFO msg="multipool: peer added" peer=a role=replica from_role=unknown`},
		{PeerEvent{Peer: "a", FromRole: RoleReplica, Role: RoleReplica, From: HealthUp, To: HealthGone},
			`level=INFO msg="multipool: peer removed" peer=a role=replica`},
		{PeerEvent{Peer: "a", From: HealthUp, To: HealthUp, Cause: &undeclaredProxy{"a", errNotHere}},
			`level=WARN msg="multipool: peer leads to more than one server" peer=a role=unknown cause="multipool: peer a: the program does not like this server, as through a pooler or a load balancer: set its Peer.Proxy"`},
		{PeerEvent{Peer: "a", From: HealthUp, To: HealthUp, Cause: &staleBehindProxy{"a", 1, 2}},
			`level=WARN msg="multipool: peer leads to a primary that was replaced" peer=a role=unknown cause="multipool: peer a leads to a primary of timeline 1, which has been replaced on timeline 2: what was written there since is lost"`},

		{PrimaryEvent{Primary: "a", Timeline: 1}, `level=INFO msg="multipool: primary found" primary=a timeline=1`},
		{PrimaryEvent{Primary: "b", Previous: "a", Timeline: 2}, `level=INFO msg="multipool: primary changed" primary=b previous=a timeline=2`},
		{PrimaryEvent{Primary: "b", Previous: "a", Timeline: 2, Rivals: []string{"a"}},
			`level=INFO msg="multipool: primary changed" primary=b previous=a timeline=2
level=ERROR msg="multipool: another server claims to be the primary" primary=b timeline=2 rivals=[a]`},
		{PrimaryEvent{Primary: "b", Previous: "b", Timeline: 2, Rivals: []string{"a"}},
			`level=ERROR msg="multipool: another server claims to be the primary" primary=b timeline=2 rivals=[a]`},
		{PrimaryEvent{Primary: "b", Previous: "b", Timeline: 2},
			`level=INFO msg="multipool: no other server claims to be the primary any more" primary=b timeline=2`},
		{PrimaryEvent{Previous: "a", Timeline: 1}, `level=WARN msg="multipool: no primary" previous=a timeline=1`},
		{PrimaryEvent{Primary: "a", Previous: "a", Timeline: 1, Rivals: []string{"b"}, Split: true},
			`level=ERROR msg="multipool: split brain" primary=a timeline=1 rivals=[b]`},
		{PrimaryEvent{Primary: "a", Previous: "a", Timeline: 1, Forgotten: "b", NextPrimary: "c"},
			`level=INFO msg="multipool: what a peer had shown is forgotten" forgotten=b primary=a timeline=1 next_primary=c`},
	} {
		var log bytes.Buffer
		hooks := SlogHooks(slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{
			Level: slog.LevelDebug,
			ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
				if a.Key == slog.TimeKey {
					return slog.Attr{}
				}
				return a
			},
		})))
		switch e := tc.event.(type) {
		case PeerEvent:
			e.Pool = "orders"
			hooks.PeerChanged(e)
		case PrimaryEvent:
			e.Pool = "orders"
			hooks.PrimaryChanged(e)
		}
		lines := strings.TrimSpace(log.String())
		require.Equal(t, strings.Count(lines, "level="), strings.Count(lines, ` pool=orders p`)+strings.Count(lines, ` pool=orders forgot`))
		require.Equal(t, tc.want, strings.ReplaceAll(lines, " pool=orders", ""))
	}
}
