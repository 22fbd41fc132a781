package multipool

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/pgmultipool/multipool/internal/pgtest"
)

// database is what programs ask of a pool: a MultiPool and a Router both are one.
type database interface {
	Exec(context.Context, string, ...any) (pgconn.CommandTag, error)
	Query(context.Context, string, ...any) (pgx.Rows, error)
	QueryRow(context.Context, string, ...any) pgx.Row
	SendBatch(context.Context, *pgx.Batch) pgx.BatchResults
	Begin(context.Context) (pgx.Tx, error)
	BeginTx(context.Context, pgx.TxOptions) (pgx.Tx, error)
	CopyFrom(context.Context, pgx.Identifier, []string, pgx.CopyFromSource) (int64, error)
	RunTx(context.Context, pgx.TxOptions, func(pgx.Tx) error) error
	Ping(context.Context) error
	Explain(context.Context, string) (Decision, error)
	WaitForPrimary(context.Context) error
}

var (
	_ database = (*MultiPool)(nil)
	_ database = (*Router)(nil)
)

func TestARouterIsMadeOfPoolsWithNames(t *testing.T) {
	p := openPool(t, Options{}, "postgres://app@127.0.0.1:1/app")
	for want, make := range map[string]func() (*Router, error){
		"default pool": func() (*Router, error) { return NewRouter(nil, nil) },
		"no name":      func() (*Router, error) { return NewRouter(p, map[string]*MultiPool{"": p}) },
		`"users"`:      func() (*Router, error) { return NewRouter(p, map[string]*MultiPool{"users": nil}) },
	} {
		_, err := make()
		require.ErrorContains(t, err, want)
	}
	r, err := NewRouter(p, nil)
	require.NoError(t, err)
	require.Same(t, p, r.Pool(t.Context()))
	require.Same(t, p, r.Pool(WithModel(t.Context(), "anything")))
}

func TestARouterShowsItsPools(t *testing.T) {
	open := func(port string) *MultiPool {
		return openPool(t, Options{}, "postgres://app@127.0.0.1:"+port+"/app")
	}
	def, users, log := open("1"), open("2"), open("3")
	r, err := NewRouter(def, map[string]*MultiPool{"user": users, "login": users, "log": log, "rest": def})
	require.NoError(t, err)
	var seen []string
	for _, p := range r.Status() {
		seen = append(seen, fmt.Sprintln(p.Default, p.Models, p.Status.Peers[0].Name))
	}
	require.Equal(t, []string{"true [rest] 127.0.0.1:1\n", "false [log] 127.0.0.1:3\n", "false [login user] 127.0.0.1:2\n"}, seen)
	for model, p := range map[string]*MultiPool{"user": users, "log": log, "rest": def, "any": def} {
		ctx := WithModel(t.Context(), model)
		require.Same(t, p.PrimaryPool(), r.PrimaryPool(ctx))
		require.Same(t, p.ReplicaPool(), r.ReplicaPool(ctx))
		require.Equal(t, p.Stat().MaxConns(), r.Stat(ctx).MaxConns())
	}
	r.Reset()
	for _, p := range []*MultiPool{def, users, log} {
		require.Positive(t, p.peers()[0].generation.Load())
	}
	log.Close()
	require.ErrorIs(t, r.WaitForPrimary(WithModel(t.Context(), "log")), ErrClosedPool)
	short, cancel := context.WithCancel(WithModel(t.Context(), "user"))
	cancel()
	require.ErrorIs(t, r.WaitForPrimary(short), ErrNoPrimary)
}

// Two clusters: every model is where it lives, by every kind of call, and when one cluster dies the callers of the other
// notice nothing.
func TestARouterKeepsClustersApart(t *testing.T) {
	t.Parallel()
	ctx := testContext(t)
	def := pgtest.Start(t, pgtest.Options{Standbys: 1})
	users := pgtest.Start(t, pgtest.Options{Standbys: 1})
	for name, c := range map[string]*pgtest.Cluster{"default": def, "users": users} {
		must(t, c, "create table whose (name text)", "insert into whose values ('"+name+"')", "create table log (n int)")
	}
	open := func(c *pgtest.Cluster, config Options) *MultiPool {
		p := openPool(t, config, c.ConnString("pool_max_conns=10"))
		waitUp(t, p)
		return p
	}
	r, err := NewRouter(open(def, Options{}), map[string]*MultiPool{
		"user":  open(users, Options{Models: map[string]Route{"user": {Target: TargetPrimary}}, Wait: 500 * time.Millisecond}),
		"login": open(users, Options{}),
	})
	require.NoError(t, err)

	for model, want := range map[string]string{"": "default", "order": "default", "user": "users", "login": "users"} {
		ctx := ctx
		if model != "" {
			ctx = WithModel(ctx, model)
		}
		var name string
		require.NoError(t, r.QueryRow(ctx, "select name from whose").Scan(&name))
		assert.Equal(t, want, name, model)
		rows, err := r.Query(ctx, "select name from whose")
		require.NoError(t, err)
		names, err := pgx.CollectRows(rows, pgx.RowTo[string])
		require.NoError(t, err)
		assert.Equal(t, []string{want}, names)
		_, err = r.Exec(ctx, "insert into log values (1)")
		require.NoError(t, err)
		require.NoError(t, r.RunTx(ctx, pgx.TxOptions{}, func(tx pgx.Tx) error {
			return tx.QueryRow(ctx, "select name from whose").Scan(&name)
		}))
		assert.Equal(t, want, name, model)
		b := &pgx.Batch{}
		b.Queue("select name from whose")
		results := r.SendBatch(ctx, b)
		require.NoError(t, results.QueryRow().Scan(&name))
		require.NoError(t, results.Close())
		assert.Equal(t, want, name, model)
		_, err = r.CopyFrom(ctx, pgx.Identifier{"log"}, []string{"n"}, pgx.CopyFromRows([][]any{{1}}))
		require.NoError(t, err)
		conn, err := r.Acquire(ctx)
		require.NoError(t, err)
		require.NoError(t, conn.QueryRow(ctx, "select name from whose").Scan(&name))
		conn.Release()
		assert.Equal(t, want, name, model)
		require.NoError(t, r.Ping(ctx))
	}
	assert.Equal(t, users.Primary().Addr(), explained(t, r, WithModel(ctx, "user"), "select 1").Peer, "its own pool's word for the model")
	assert.Equal(t, users.Standbys()[0].Addr(), explained(t, r, WithModel(ctx, "login"), "select 1").Peer)
	for _, c := range []*pgtest.Cluster{def, users} {
		n, err := c.Primary().Int(ctx, "select count(*) from log")
		require.NoError(t, err)
		assert.EqualValues(t, 4, n)
	}

	user := gather(10, func(ctx context.Context) error {
		return r.QueryRow(WithModel(ctx, "login"), "select name from whose").Scan(new(string))
	})
	order := gather(10, func(ctx context.Context) error {
		var name string
		err := r.QueryRow(ctx, "select name from whose").Scan(&name)
		if err == nil && name != "default" {
			err = errors.New("read from " + name)
		}
		return err
	})
	order.reach(t, 500)
	for _, s := range users.Servers() {
		require.NoError(t, s.Kill())
	}
	order.reach(t, 5000)
	_, failures := order.dismiss()
	assert.Empty(t, failures)
	user.dismiss()
	r.Close()
	require.Error(t, r.Ping(ctx))
}
