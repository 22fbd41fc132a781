package clients

import (
	"context"
	"database/sql"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"sync/atomic"
	"testing"
	"testing/fstest"
	"time"

	"github.com/jackc/pgx/v5/stdlib"
	"github.com/pressly/goose/v3"
	"github.com/riverqueue/river"
	"github.com/riverqueue/river/riverdriver/riverpgxv5"
	"github.com/riverqueue/river/rivermigrate"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/pgmultipool/multipool"
	"github.com/pgmultipool/multipool/internal/pgtest"
)

// open returns a pool that has found its cluster's primary.
func open(t *testing.T, c *pgtest.Cluster) *multipool.MultiPool {
	t.Helper()
	pool, err := multipool.New(context.Background(), c.ConnString("pool_max_conns=20"))
	require.NoError(t, err)
	t.Cleanup(pool.Close)
	require.NoError(t, pool.WaitForPrimary(within(t, 10*time.Second)))
	return pool
}

func within(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), d)
	t.Cleanup(cancel)
	return ctx
}

// failOver kills the primary and promotes a standby.
func failOver(t *testing.T, c *pgtest.Cluster) {
	t.Helper()
	next := c.Standbys()[0]
	require.NoError(t, c.Primary().Kill())
	require.NoError(t, next.Promote())
}

func waitFor(t *testing.T, what string, limit time.Duration, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(limit); !ok(); time.Sleep(5 * time.Millisecond) {
		require.True(t, time.Now().Before(deadline), "waited %v for %s", limit, what)
	}
}

// Transactions of three statements, through prepared statements of database/sql: what was acknowledged is there, in
// full, and what is there was asked for.
func TestDatabaseSQL(t *testing.T) {
	c := pgtest.Start(t, pgtest.Options{Standbys: 2, SyncApply: true})
	pool := open(t, c)
	db := stdlib.OpenDBFromPool(pool.PrimaryPool())
	defer db.Close()
	_, err := db.Exec("create table entries (transfer text, line int)")
	require.NoError(t, err)
	insert, err := db.Prepare("insert into entries values ($1, $2)")
	require.NoError(t, err)
	defer insert.Close()

	const writers = 4
	var acknowledged sync.Map
	var done, failed atomic.Int64
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			for n := 0; ; n++ {
				select {
				case <-stop:
					return
				default:
				}
				name := fmt.Sprintf("%d-%d", w, n)
				if err := transfer(within(t, 10*time.Second), db, insert, name); err != nil {
					t.Logf("%s: %v", name, err)
					failed.Add(1)
					continue
				}
				acknowledged.Store(name, true)
				done.Add(1)
			}
		})
	}
	reach := func(n int64) {
		goal := done.Load() + n
		waitFor(t, "transfers", 20*time.Second, func() bool { return done.Load() >= goal })
	}
	reach(200)
	failOver(t, c)
	reach(200)
	close(stop)
	wg.Wait()
	assert.LessOrEqual(t, failed.Load(), int64(writers), "what was in flight")

	rows, err := db.Query("select transfer, count(*) from entries group by transfer")
	require.NoError(t, err)
	defer rows.Close()
	found := int64(0)
	for rows.Next() {
		var name string
		var lines int
		require.NoError(t, rows.Scan(&name, &lines))
		assert.Equal(t, 3, lines, name)
		if _, is := acknowledged.Load(name); is {
			found++
		}
	}
	require.NoError(t, rows.Err())
	assert.Equal(t, done.Load(), found, "none that was acknowledged is lost")
	t.Logf("%d transfers, %d failed", done.Load(), failed.Load())
}

func transfer(ctx context.Context, db *sql.DB, insert *sql.Stmt, name string) error {
	tx, err := db.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer tx.Rollback() //nolint:errcheck // the error that counts is there
	for line := range 3 {
		if _, err := tx.StmtContext(ctx, insert).ExecContext(ctx, name, line); err != nil {
			return err
		}
	}
	return tx.Commit()
}

func TestDatabaseSQLReadsFromTheReplicas(t *testing.T) {
	c := pgtest.Start(t, pgtest.Options{Standbys: 2})
	pool, _ := openRouted(t, c)
	db := stdlib.OpenDBFromPool(pool.ReplicaPool())
	defer db.Close()
	var standby bool
	require.NoError(t, db.QueryRow("select pg_is_in_recovery()").Scan(&standby))
	require.True(t, standby)
	served := map[int]bool{}
	for round := range 2 {
		var conns []*sql.Conn
		for range 8 {
			conn, err := db.Conn(within(t, 10*time.Second))
			require.NoError(t, err)
			var port int
			require.NoError(t, conn.QueryRowContext(context.Background(), "select current_setting('port')::int").Scan(&port))
			served[port] = true
			conns = append(conns, conn)
		}
		for _, conn := range conns {
			require.NoError(t, conn.Close())
		}
		if round == 0 {
			assert.Len(t, served, 2)
			assert.False(t, served[int(c.Primary().Port())])
			require.NoError(t, c.Standbys()[0].Kill())
			clear(served)
		}
	}
	assert.Equal(t, map[int]bool{int(c.Standbys()[1].Port()): true}, served)
}

func TestGoose(t *testing.T) {
	c := pgtest.Start(t, pgtest.Options{Standbys: 1, SyncApply: true})
	pool := open(t, c)
	db := stdlib.OpenDBFromPool(pool.PrimaryPool())
	defer db.Close()
	migrations := fstest.MapFS{}
	for i := range 4 {
		migrations[fmt.Sprintf("%05d_table.sql", i+1)] = &fstest.MapFile{Data: fmt.Appendf(nil,
			"-- +goose Up\ncreate table t%d (v int);\n-- +goose Down\ndrop table t%d;\n", i+1, i+1)}
	}
	provider, err := goose.NewProvider(goose.DialectPostgres, db, migrations)
	require.NoError(t, err)
	ctx := within(t, 30*time.Second)
	_, err = provider.UpTo(ctx, 2)
	require.NoError(t, err)
	failOver(t, c)
	applied, err := provider.Up(ctx)
	require.NoError(t, err)
	assert.Len(t, applied, 2)
	version, err := provider.GetDBVersion(ctx)
	require.NoError(t, err)
	assert.EqualValues(t, 4, version)
	n, err := c.Primary().Int(ctx, "select count(*) from goose_db_version where is_applied and version_id > 0")
	require.NoError(t, err)
	assert.EqualValues(t, 4, n, "each of them once")
	for i := range 4 {
		require.NoError(t, c.Primary().Exec(ctx, fmt.Sprintf("select from t%d", i+1)))
	}
}

type work struct {
	N int `json:"n"`
}

func (work) Kind() string { return "work" }

type tick struct{}

func (tick) Kind() string { return "tick" }

func TestRiver(t *testing.T) {
	c := pgtest.Start(t, pgtest.Options{Standbys: 2, SyncApply: true})
	pool := open(t, c)
	driver := riverpgxv5.New(pool.PrimaryPool())
	migrator, err := rivermigrate.New(driver, nil)
	require.NoError(t, err)
	ctx := context.Background()
	_, err = migrator.Migrate(ctx, rivermigrate.DirectionUp, nil)
	require.NoError(t, err)

	var worked sync.Map // by id
	var ticks atomic.Int64
	workers := river.NewWorkers()
	river.AddWorker(workers, river.WorkFunc(func(_ context.Context, job *river.Job[work]) error {
		worked.Store(job.ID, true)
		return nil
	}))
	river.AddWorker(workers, river.WorkFunc(func(context.Context, *river.Job[tick]) error {
		ticks.Add(1)
		return nil
	}))
	client, err := river.NewClient(driver, &river.Config{
		Queues:            map[string]river.QueueConfig{river.QueueDefault: {MaxWorkers: 100}},
		Workers:           workers,
		FetchPollInterval: time.Minute, // so that only a notification brings a job in time
		PeriodicJobs: []*river.PeriodicJob{river.NewPeriodicJob(river.PeriodicInterval(time.Second),
			func() (river.JobArgs, *river.InsertOpts) { return tick{}, nil }, nil)},
		Logger: slog.New(slog.NewTextHandler(io.Discard, nil)),
	})
	require.NoError(t, err)
	require.NoError(t, client.Start(ctx))
	defer func() {
		stop, cancel := context.WithTimeout(ctx, 10*time.Second)
		defer cancel()
		assert.NoError(t, client.StopAndCancel(stop))
	}()

	const inserters = 4
	var inserted sync.Map
	var done, failed atomic.Int64
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for range inserters {
		wg.Go(func() {
			for n := 0; ; n++ {
				select {
				case <-stop:
					return
				case <-time.After(20 * time.Millisecond): // a pace, no wait
				}
				result, err := client.Insert(within(t, 10*time.Second), work{N: n}, nil)
				if err != nil {
					t.Log("insert:", err)
					failed.Add(1)
					continue
				}
				inserted.Store(result.Job.ID, true)
				done.Add(1)
			}
		})
	}
	reach := func(n int64) {
		goal := done.Load() + n
		waitFor(t, "inserts", 20*time.Second, func() bool { return done.Load() >= goal })
	}
	reach(100)
	waitFor(t, "the first work", 10*time.Second, func() bool { return countOf(&worked) > 50 })
	waitFor(t, "a leader and its periodic job", 15*time.Second, func() bool { return ticks.Load() > 0 })
	failOver(t, c)
	begun := time.Now()
	reach(100)
	close(stop)
	wg.Wait()
	assert.LessOrEqual(t, failed.Load(), int64(inserters), "what was in flight")

	// Inserted now, worked soon: the producer fetches and the listener listens on the new primary.
	waitFor(t, "a job inserted after the promotion", 20*time.Second, func() bool {
		result, err := client.Insert(within(t, 10*time.Second), work{}, nil)
		require.NoError(t, err)
		deadline := time.Now().Add(500 * time.Millisecond)
		for time.Now().Before(deadline) {
			if _, is := worked.Load(result.Job.ID); is {
				return true
			}
			time.Sleep(5 * time.Millisecond)
		}
		return false
	})
	t.Logf("a notified job is worked %v after the promotion", time.Since(begun))
	before := ticks.Load()
	waitFor(t, "a leader on the new primary, and its periodic job", 25*time.Second, func() bool { return ticks.Load() > before })
	t.Logf("a periodic job is worked %v after the promotion", time.Since(begun))

	inserted.Range(func(id, _ any) bool {
		n, err := c.Primary().Int(ctx, "select count(*) from river_job where id = $1", id)
		assert.NoError(t, err)
		assert.EqualValues(t, 1, n, "job %v was acknowledged", id)
		return true
	})
	// What was fetched when the primary died may be left as running: River's rescuer takes it up, an hour later.
	waitFor(t, "the last of the work", 10*time.Second, func() bool {
		left, err := c.Primary().Int(ctx, "select count(*) from river_job where kind = 'work' and state not in ('completed', 'running')")
		require.NoError(t, err)
		return left == 0
	})
	t.Logf("%d jobs inserted, %d inserts failed", done.Load(), failed.Load())
}

func countOf(m *sync.Map) (n int) {
	m.Range(func(any, any) bool { n++; return true })
	return n
}
