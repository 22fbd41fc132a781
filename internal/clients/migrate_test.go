package clients

import (
	"context"
	"fmt"
	"os"
	"regexp"
	"strings"
	"sync"
	"testing"
	"testing/fstest"
	"time"

	"github.com/jackc/pgx/v5/stdlib"
	"github.com/jackc/tern/v2/migrate"
	"github.com/pressly/goose/v3"
	"github.com/pressly/goose/v3/lock"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/pgmultipool/multipool"
	"github.com/pgmultipool/multipool/internal/pgtest"
)

// route is where the calls of a pool went, in their order.
type route struct {
	mu    sync.Mutex
	peers []string
}

func (r *route) routed(_ context.Context, d multipool.Decision) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.peers = append(r.peers, d.Peer)
}

// take returns what there was since the last time.
func (r *route) take() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	defer func() { r.peers = nil }()
	return r.peers
}

// openRouted returns a pool that has found its cluster's primary and both replicas, and where its calls go.
func openRouted(t *testing.T, c *pgtest.Cluster) (*multipool.MultiPool, *route) {
	t.Helper()
	config, err := multipool.ParseConfig(c.ConnString("pool_max_conns=10"))
	require.NoError(t, err)
	r := &route{}
	pool, err := multipool.Open(context.Background(), multipool.Options{Config: config, Hooks: &multipool.Hooks{Routed: r.routed}})
	require.NoError(t, err)
	t.Cleanup(pool.Close)
	waitFor(t, "the roles", 10*time.Second, func() bool {
		replicas := 0
		for _, s := range pool.Status().Peers {
			if s.Role == multipool.RoleReplica && s.Serves {
				replicas++
			}
		}
		return pool.Status().Primary == c.Primary().Addr() && replicas == len(c.Standbys())
	})
	return pool, r
}

// loud is a cluster whose servers log what they are told.
var loud = pgtest.Options{Standbys: 2, Settings: map[string]string{"log_statement": "all"}}

var logged = regexp.MustCompile(`LOG:  (?:statement|execute [^:]+): (.*)`)

// told returns the statements that a server has logged: their first lines, without those of the monitors.
func told(t *testing.T, s *pgtest.Server) (statements []string) {
	t.Helper()
	text, err := os.ReadFile(s.Dir() + ".log") // all of it, however much the monitors have asked
	require.NoError(t, err)
	for _, m := range logged.FindAllStringSubmatch(string(text), -1) {
		if !strings.HasPrefix(m[1], "select r.standby,") {
			statements = append(statements, m[1])
		}
	}
	return statements
}

// onlyThePrimary runs f, and whatever f does through the pool must be done on the primary: by what the servers were
// told, by what the pool counts, and by its hook.
func onlyThePrimary(t *testing.T, c *pgtest.Cluster, pool *multipool.MultiPool, r *route, f func()) {
	t.Helper()
	heard := map[string]int{}
	for _, s := range c.Standbys() {
		heard[s.Addr()] = len(told(t, s))
	}
	before := pool.Status()
	r.take()
	f()
	for i, now := range pool.Status().Peers {
		if was := before.Peers[i]; !was.Primary {
			assert.Equal(t, [...]int64{was.Reads, was.Writes, was.Retries, was.Stat.AcquireCount(), was.Stat.NewConnsCount()},
				[...]int64{now.Reads, now.Writes, now.Retries, now.Stat.AcquireCount(), now.Stat.NewConnsCount()}, now.Name)
		}
	}
	for _, peer := range r.take() {
		assert.Equal(t, c.Primary().Addr(), peer)
	}
	for _, s := range c.Standbys() {
		assert.Empty(t, told(t, s)[heard[s.Addr()]:], s.Name())
	}
}

// applied checks on a server that each of n migrations has been applied once, as their own notes have it.
func applied(t *testing.T, s *pgtest.Server, n int) {
	t.Helper()
	got, err := s.String(within(t, 10*time.Second), "select string_agg(n::text, ',' order by n) from applied")
	require.NoError(t, err)
	var want []string
	for i := range n {
		want = append(want, fmt.Sprint(i+1))
	}
	assert.Equal(t, strings.Join(want, ","), got, s.Name())
}

// A replica is dead, and the pool learns of it while the migrations run: goose does not care, and no other hears of it.
func TestGooseWithADeadReplica(t *testing.T) {
	c := pgtest.Start(t, loud)
	pool, r := openRouted(t, c)
	db := stdlib.OpenDBFromPool(pool.PrimaryPool())
	defer db.Close()
	migrations := fstest.MapFS{
		"00001_first.sql": {Data: []byte("-- +goose Up\ncreate table applied (n int);\ninsert into applied values (1);\n")},
		"00002_reads.sql": {Data: []byte("-- +goose Up\nselect count(*) from applied;\n" +
			"insert into applied select max(n) + 1 from applied;\n")},
		"00003_body.sql": {Data: []byte("-- +goose Up\n-- +goose StatementBegin\n" +
			"do $$ begin perform count(*) from applied; insert into applied values (3); end $$;\n-- +goose StatementEnd\n")},
		"00004_index.sql": {Data: []byte("-- +goose NO TRANSACTION\n-- +goose Up\n" +
			"create index concurrently applied_n on applied (n);\ninsert into applied values (4);\n")},
	}
	locker, err := lock.NewPostgresSessionLocker()
	require.NoError(t, err)
	provider := func() *goose.Provider {
		p, err := goose.NewProvider(goose.DialectPostgres, db, migrations, goose.WithSessionLocker(locker))
		require.NoError(t, err)
		return p
	}
	ctx := within(t, 30*time.Second)
	require.NoError(t, c.Standbys()[0].Kill())
	onlyThePrimary(t, c, pool, r, func() {
		results, err := provider().Up(ctx)
		require.NoError(t, err)
		assert.Len(t, results, 4)
		pending, err := provider().HasPending(ctx)
		require.NoError(t, err)
		assert.False(t, pending)
		results, err = provider().Up(ctx)
		require.NoError(t, err)
		assert.Empty(t, results, "there is nothing left to do")
	})
	assert.Contains(t, strings.Join(told(t, c.Primary()), "\n"), "create index concurrently applied_n", "what is told is logged")
	require.NoError(t, c.WaitCaughtUp(ctx))
	for _, s := range []*pgtest.Server{c.Primary(), c.Standbys()[1]} {
		applied(t, s, 4)
		versions, err := s.String(ctx, "select string_agg(version_id::text, ',' order by id) from goose_db_version where is_applied")
		require.NoError(t, err)
		assert.Equal(t, "0,1,2,3,4", versions, s.Name())
	}
}

// Two programs migrate at once, each on a connection of its own, under tern's advisory lock.
func TestTernWithADeadReplica(t *testing.T) {
	c := pgtest.Start(t, loud)
	pool, r := openRouted(t, c)
	migrations := fstest.MapFS{
		"001_first.sql": {Data: []byte("create table applied (n int);\ninsert into applied values (1);\n" +
			"---- create above / drop below ----\ndrop table applied;\n")},
		"002_reads.sql":  {Data: []byte("select count(*) from applied;\ninsert into applied select max(n) + 1 from applied;\n")},
		"003_vacuum.sql": {Data: []byte("---- tern: disable-tx ----\nvacuum applied;\ninsert into applied values (3);\n")},
		"004_path.sql":   {Data: []byte("set search_path = pg_catalog;\ninsert into public.applied values (4);\n")},
	}
	ctx := within(t, 30*time.Second)
	run := func() (started int, err error) {
		conn, err := pool.Acquire(ctx)
		if err != nil {
			return 0, err
		}
		defer conn.Release()
		migrator, err := migrate.NewMigrator(ctx, conn.Conn(), "public.schema_version")
		if err != nil {
			return 0, err
		}
		if err := migrator.LoadMigrations(migrations); err != nil {
			return 0, err
		}
		migrator.OnStart = func(int32, string, string, string) { started++ }
		return started, migrator.Migrate(ctx)
	}
	require.NoError(t, c.Standbys()[0].Kill())
	onlyThePrimary(t, c, pool, r, func() {
		var wg sync.WaitGroup
		var started [2]int
		for i := range started {
			wg.Go(func() {
				var err error
				started[i], err = run()
				assert.NoError(t, err)
			})
		}
		wg.Wait()
		assert.Equal(t, 4, started[0]+started[1], "each of them once")
		again, err := run()
		require.NoError(t, err)
		assert.Zero(t, again, "there is nothing left to do")
	})
	for _, s := range pool.Status().Peers {
		if s.Primary {
			assert.EqualValues(t, 3, s.Writes, "one for each connection that was acquired")
		}
	}
	assert.Contains(t, strings.Join(told(t, c.Primary()), "\n"), "create table applied", "what is told is logged")
	require.NoError(t, c.WaitCaughtUp(ctx))
	for _, s := range []*pgtest.Server{c.Primary(), c.Standbys()[1]} {
		applied(t, s, 4)
		version, err := s.String(ctx, "select string_agg(version::text, ',') from public.schema_version")
		require.NoError(t, err)
		assert.Equal(t, "4", version, s.Name())
	}
	// The connections went back as they were taken: no lock is left on them, and no search_path of a migration's.
	locks, err := c.Primary().Int(ctx, "select count(*) from pg_locks where locktype = 'advisory'")
	require.NoError(t, err)
	assert.Zero(t, locks)
	for _, conn := range pool.AcquireAllIdle(ctx) {
		var path string
		assert.NoError(t, conn.QueryRow(ctx, "show search_path").Scan(&path))
		assert.Equal(t, `"$user", public`, path)
		conn.Release()
	}
}
