package multipool

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/pgmultipool/multipool/internal/pgfault"
	"github.com/pgmultipool/multipool/internal/pgtest"
)

// Real poolers: a primary and two standbys, a PgBouncer in transaction mode in front of each, and a pool that knows the
// poolers alone. PgBouncer before 1.21 cannot prepare statements there, so the pool prepares none.

// pooled is a cluster behind poolers, under load.
type pooled struct {
	t       *testing.T
	cluster *pgtest.Cluster
	poolers []*pgtest.Pooler // in the order of the servers, and of the pool's peers
	pool    *MultiPool

	mu      sync.Mutex
	events  []PeerEvent
	readers *company
	writers *company
	bears   time.Duration // how long a write may take; 0 means 5 s, as everywhere
	written atomic.Int64  // writes that said they were done
}

func newPooled(t *testing.T, settings map[string]string, params ...string) *pooled {
	t.Helper()
	return poolersOf(t, pgtest.Start(t, pgtest.Options{Standbys: 2}), settings, params...)
}

func poolersOf(t *testing.T, c *pgtest.Cluster, settings map[string]string, params ...string) *pooled {
	t.Helper()
	s := &pooled{t: t, cluster: c}
	must(t, s.cluster, "create table items (id int primary key, body text)",
		"insert into items select n, 'item ' || n from generate_series(1, 1000) n",
		"create table log (id bigint, port int default inet_server_port())")
	config := Options{Hooks: &Hooks{PeerChanged: func(e PeerEvent) {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.events = append(s.events, e)
	}}}
	for _, server := range s.cluster.Servers() {
		pooler := pgtest.StartPooler(t, server, settings)
		s.poolers = append(s.poolers, pooler)
		config.Peers = append(config.Peers, Peer{Name: server.Name(), Host: pooler.Host(), Port: pooler.Port(), Proxy: true})
	}
	s.pool = openPool(t, config, s.cluster.ConnString(append([]string{"pool_max_conns=20", "default_query_exec_mode=exec"}, params...)...))
	waitUp(t, s.pool)
	return s
}

// company is callers who pause between calls of 5 s at most, and what they saw.
type company struct {
	crowd *crowd

	mu    sync.Mutex
	worst time.Duration
	kinds map[string]int   // the errors, and how often
	met   map[string]error // one of each
}

func keep(n int, call func(ctx context.Context) error) *company {
	c := &company{kinds: map[string]int{}, met: map[string]error{}}
	c.crowd = gather(n, func(ctx context.Context) error {
		time.Sleep(20 * time.Millisecond)
		begun := time.Now()
		err := call(ctx)
		took := time.Since(begun)
		c.mu.Lock()
		defer c.mu.Unlock()
		c.worst = max(c.worst, took)
		if err != nil {
			c.kinds[err.Error()]++
			c.met[err.Error()] = err
		}
		return err
	})
	return c
}

// load starts 50 readers and 20 writers. Every write is a number of its own, so that one done twice shows.
func (s *pooled) load() {
	var id, write atomic.Int64
	s.readers = keep(50, func(ctx context.Context) error {
		var body string
		return s.pool.QueryRow(ctx, "select body from items where id = $1", id.Add(1)%1000+1).Scan(&body)
	})
	s.writers = keep(20, func(ctx context.Context) error {
		if s.bears > 0 {
			long, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.bears)
			defer cancel()
			ctx = long
		}
		_, err := s.pool.Exec(ctx, "insert into log (id) values ($1)", write.Add(1))
		if err == nil {
			s.written.Add(1)
		}
		return err
	})
	s.goOn()
}

// goOn waits until every kind of caller has made some calls more.
func (s *pooled) goOn() {
	s.t.Helper()
	s.readers.crowd.reach(s.t, 1000)
	s.writers.crowd.reach(s.t, 200)
}

// end dismisses the callers. No read may have failed, and of the writes only those whose outcome is not known.
func (s *pooled) end() (unknown int) {
	s.t.Helper()
	reads, _ := s.readers.crowd.dismiss()
	writes, _ := s.writers.crowd.dismiss()
	assert.Empty(s.t, s.readers.kinds)
	for text, err := range s.writers.met {
		assert.ErrorIs(s.t, err, ErrOutcomeUnknown, text)
		unknown += s.writers.kinds[text]
	}
	s.t.Logf("%d reads, worst %v; %d writes, worst %v, %d unknown: %v",
		reads, s.readers.worst, writes, s.writers.worst, unknown, slices.Collect(maps.Keys(s.writers.kinds)))
	done := count(s.t, s.cluster, "select count(*) from log")
	assert.GreaterOrEqual(s.t, done, s.written.Load(), "what was acknowledged is there")
	assert.LessOrEqual(s.t, done, s.written.Load()+int64(unknown))
	assert.Zero(s.t, count(s.t, s.cluster, "select count(*) - count(distinct id) from log"), "nothing was done twice")
	return unknown
}

func (s *pooled) peer(i int) PeerStatus { return s.pool.Status().Peers[i] }

func (s *pooled) waitHealth(i int, want Health) {
	s.t.Helper()
	waitFor(s.t, fmt.Sprintf("peer %d to be %s", i, want), 10*time.Second, func() bool { return s.peer(i).Health == want })
}

// waitReads waits until a replica's pooler is well and serves reads again: what was held there has made it look slow.
func (s *pooled) waitReads(i int) {
	s.t.Helper()
	s.waitHealth(i, HealthUp)
	before := s.peer(i).Reads
	waitFor(s.t, fmt.Sprintf("peer %d to serve reads", i), 30*time.Second, func() bool { return s.peer(i).Reads > before })
}

// reported is what a new session behind a pooler is told of in_hot_standby.
func (s *pooled) reported(i int) string {
	s.t.Helper()
	conn, err := pgx.Connect(testContext(s.t), s.poolers[i].ConnString())
	require.NoError(s.t, err)
	defer func() { _ = conn.Close(testContext(s.t)) }()
	return conn.PgConn().ParameterStatus("in_hot_standby")
}

// changes returns the healths that a peer has gone through since the last call.
func (s *pooled) changes(i int) (list []Health) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var rest []PeerEvent
	for _, e := range s.events {
		if e.Peer == s.peer(i).Name {
			if e.From != e.To {
				list = append(list, e.To)
			}
			continue
		}
		rest = append(rest, e)
	}
	s.events = rest
	return list
}

func TestPoolersAPromotionBehindThemIsFound(t *testing.T) {
	t.Parallel()
	// Synchronous, so that what was acknowledged cannot be lost with the primary.
	c := pgtest.Start(t, pgtest.Options{Standbys: 2, SyncApply: true})
	s := poolersOf(t, c, map[string]string{"query_wait_timeout": "2"}, "multipool_wait=20s")
	s.bears = 20 * time.Second // until somebody has promoted another
	s.load()
	next := s.cluster.Standbys()[0]
	require.NoError(t, s.cluster.Primary().Kill())
	require.NoError(t, next.Promote())
	promoted := time.Now()
	waitFor(t, "the new primary", 20*time.Second, func() bool { return s.pool.Status().Primary == next.Name() })
	t.Logf("found %v after the promotion", time.Since(promoted))
	s.goOn()
	assert.Equal(t, "on", s.reported(1), "why roles are asked: the pooler tells a new session what was true once")

	// The old primary comes back as a standby, behind a pooler that goes on calling it the primary. Reads there are sent
	// again all the same when they are lost.
	old := s.cluster.Servers()[0]
	require.NoError(t, old.Follow(next))
	s.waitReads(0)
	assert.Equal(t, "off", s.reported(0))
	require.NoError(t, s.poolers[0].Restart())
	s.waitReads(0)

	assert.LessOrEqual(t, s.end(), 40, "one that was in flight and one that waited at the pooler, of each writer")
	assert.Zero(t, s.peer(2).Trips)
}

func TestPoolersOneThatMovesIsAsked(t *testing.T) {
	t.Parallel()
	s := newPooled(t, nil, "multipool_wait=20s")
	s.bears = 20 * time.Second // a busy machine makes of a second some
	s.load()
	primary, standby := s.cluster.Primary(), s.cluster.Standbys()[0]
	for range 2 {
		require.NoError(t, s.poolers[0].Retarget(standby))
		waitFor(t, "its new role", 10*time.Second, func() bool { return s.peer(0).Role == RoleReplica })
		assert.Empty(t, s.pool.Status().Primary)
		s.readers.crowd.reach(t, 1000)
		require.NoError(t, s.poolers[0].Retarget(primary))
		waitFor(t, "its old role", 10*time.Second, func() bool { return s.peer(0).Role == RolePrimary })
		s.goOn()
	}
	assert.Zero(t, s.end())
	assert.Zero(t, count(t, s.cluster, fmt.Sprintf("select count(*) from log where port <> %d", primary.Port())))
}

func TestPoolersPauseOfAReplicas(t *testing.T) {
	s := newPooled(t, nil)
	s.load()
	for _, hold := range []func() error{s.poolers[1].Pause, s.poolers[1].Suspend} {
		require.NoError(t, hold())
		s.waitHealth(1, HealthDown)
		s.goOn()
		require.NoError(t, s.poolers[1].Resume())
		s.waitReads(1)
	}
	assert.Zero(t, s.end())
	assert.EqualValues(t, 2, s.peer(1).Trips)
	if !raceEnabled {
		assert.Less(t, s.readers.worst, 1500*time.Millisecond)
	}
}

func TestPoolersPauseOfThePrimarysLosesNoWrite(t *testing.T) {
	t.Parallel()
	s := newPooled(t, nil, "multipool_wait=20s")
	s.bears = 20 * time.Second // a busy machine makes of a second some
	s.load()
	require.NoError(t, s.poolers[0].Pause())
	s.waitHealth(0, HealthDown)
	waitFor(t, "nobody to be sent there", 20*time.Second, func() bool { // who chose it before it fell may be counted after
		before := s.peer(0).Writes
		s.readers.crowd.reach(t, 2000)
		return s.peer(0).Writes == before
	})
	require.NoError(t, s.poolers[0].Resume())
	s.waitHealth(0, HealthUp)
	s.goOn()
	assert.Zero(t, s.end(), "what waited at the pooler is done, the rest waited here")
}

// The pooler welcomes whoever dials it, as long as it remembers how its server did.
func TestPoolersAWelcomeProvesNothing(t *testing.T) {
	t.Parallel()
	s := newPooled(t, map[string]string{"query_wait_timeout": "1"}) // so that looks are answered, and not by a server
	s.load()
	s.changes(1)
	victim := s.cluster.Standbys()[0]
	require.NoError(t, victim.Kill())
	s.waitHealth(1, HealthDown)
	conn, err := pgx.Connect(testContext(t), s.poolers[1].ConnString())
	require.NoError(t, err, "a dial succeeds")
	require.NoError(t, conn.Close(testContext(t)))
	looks := map[time.Time]bool{}
	waitFor(t, "failed looks", 30*time.Second, func() bool {
		when, _ := s.pool.peers()[1].faults.last()
		looks[when] = true
		return len(looks) > 3
	})
	assert.EqualValues(t, 1, s.peer(1).Trips)
	assert.Equal(t, []Health{HealthSuspect, HealthDown}, s.changes(1))
	require.NoError(t, victim.Start())
	s.waitReads(1)
	var since []Health
	waitFor(t, "the event", 10*time.Second, func() bool {
		since = append(since, s.changes(1)...)
		return len(since) > 0
	})
	assert.Equal(t, []Health{HealthUp}, since)
	assert.Zero(t, s.end())
}

func TestPoolersCloseDoesNotWaitForOneThatIsPaused(t *testing.T) {
	t.Parallel()
	s := newPooled(t, nil)
	require.NoError(t, s.pool.Ping(testContext(t)), "a new connection would wait for its server")
	require.NoError(t, s.poolers[0].Pause())
	done := make(chan error, 1)
	go func() {
		_, err := s.pool.Exec(testContext(t), "insert into log (id) values (1)")
		done <- err
	}()
	waitFor(t, "the write to be sent", 10*time.Second, func() bool { return s.peer(0).Stat.AcquiredConns() == 1 })
	closing := time.Now()
	s.pool.Close()
	assert.Less(t, time.Since(closing), 15*time.Second, "the write's own deadline is a minute")
	assert.ErrorIs(t, <-done, ErrOutcomeUnknown)
}

func TestPoolersKilledAndRestarted(t *testing.T) {
	t.Parallel()
	s := newPooled(t, nil, "default_query_exec_mode=cache_describe", "multipool_check_interval=200ms")
	s.load()
	require.NoError(t, s.poolers[0].Disable())
	s.goOn()
	assert.Zero(t, s.peer(0).Trips, "new clients are kept out, and the rest goes on")
	require.NoError(t, s.poolers[0].Enable())
	require.NoError(t, s.poolers[1].Kill())
	s.waitHealth(1, HealthDown)
	s.goOn()
	require.NoError(t, s.poolers[1].Start())
	s.waitReads(1)
	require.NoError(t, s.poolers[2].Restart())
	s.waitReads(2)
	assert.Zero(t, s.end())
}

func TestPoolersAWriteThatIsCutIsUnknown(t *testing.T) {
	t.Parallel()
	s := newPooled(t, nil, "multipool_wait=20s")
	for id, cut := range []struct {
		name     string
		do, mend func() error
	}{
		{"clients killed", s.poolers[0].KillClients, s.poolers[0].Resume},
		{"pooler killed", s.poolers[0].Kill, s.poolers[0].Start},
		{"server killed", s.cluster.Primary().Kill, s.cluster.Primary().Start},
	} {
		write := fmt.Sprintf("insert into log (id) select %d from pg_sleep(60)", id)
		done := make(chan error, 1)
		go func() {
			_, err := s.pool.Exec(testContext(t), write)
			done <- err
		}()
		waitFor(t, "the write to run", 10*time.Second, func() bool {
			return count(t, s.cluster, "select count(*) from pg_stat_activity where state = 'active' and query = '"+write+"'") == 1
		})
		require.NoError(t, cut.do(), cut.name)
		err := <-done
		assert.ErrorIs(t, err, ErrOutcomeUnknown, cut.name)
		t.Logf("%s: %v", cut.name, err)
		require.NoError(t, cut.mend(), cut.name)
		_, err = s.pool.Exec(testContext(t), "insert into log (id) values (-1)")
		require.NoError(t, err, "%s: the next one waits", cut.name)
	}
}

// The monitor's look waits in the same queue as everybody, which is no silence of the server's.
func TestPoolersThatAreFullAreNotAtFault(t *testing.T) {
	t.Parallel()
	for name, settings := range map[string]map[string]string{
		"servers": {"default_pool_size": "2", "query_wait_timeout": "1"},
		"clients": {"default_pool_size": "2", "max_client_conn": "15"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newPooled(t, settings, "pool_max_conns=40", "multipool_check_interval=100ms")
			var refused atomic.Int64
			readers := keep(60, func(ctx context.Context) error {
				err := s.pool.QueryRow(WithPreferReplica(ctx), "select pg_sleep(0.1)").Scan(new(any))
				switch pgfault.Statement(ctx, err, pgfault.Ending{}).Class {
				case pgfault.Overload, pgfault.Caller:
					refused.Add(1)
					return nil
				}
				return err
			})
			readers.crowd.reach(t, 120)
			readers.crowd.dismiss()
			t.Logf("%d reads, worst %v, %d refused", readers.crowd.calls.Load(), readers.worst, refused.Load())
			assert.Empty(t, readers.kinds)
			for i := range s.poolers {
				assert.Zero(t, s.peer(i).Trips)
				assert.NotContains(t, s.changes(i), HealthDown)
			}
		})
	}
}

// The server stops statements and sessions behind a pooler while they commit, which is slow, and logs each, so that it
// stops them after the commit: what is done then was said to be, or of unknown outcome.
func TestPoolersAServerThatStopsWritesInTheirCommit(t *testing.T) {
	t.Parallel()
	c := pgtest.Start(t, pgtest.Options{Standbys: 1, Settings: map[string]string{
		"fsync": "on", "commit_delay": "10000", "commit_siblings": "0", "log_min_duration_statement": "0",
	}})
	s := poolersOf(t, c, nil, "multipool_wait=20s")
	const (
		insert = "insert into log (id) values ($1)"
		simply = pgx.QueryExecModeSimpleProtocol
	)
	ways := []func(ctx context.Context, id int64) error{
		func(ctx context.Context, id int64) error { _, err := s.pool.Exec(ctx, insert, id); return err },
		func(ctx context.Context, id int64) error { _, err := s.pool.Exec(ctx, insert, simply, id); return err },
		func(ctx context.Context, id int64) error {
			_, err := s.pool.Exec(ctx, fmt.Sprintf("insert into log (id) values (%d)", id))
			return err
		},
		func(ctx context.Context, id int64) error { return scanOne(ctx, s.pool, insert+" returning id", id) },
		func(ctx context.Context, id int64) error {
			return s.pool.QueryRow(ctx, insert+" returning id", simply, id).Scan(new(int64))
		},
		func(ctx context.Context, id int64) error {
			return pgx.BeginFunc(ctx, s.pool, func(tx pgx.Tx) error { _, err := tx.Exec(ctx, insert, id); return err })
		},
		func(ctx context.Context, id int64) error {
			return s.pool.RunTx(ctx, pgx.TxOptions{}, func(tx pgx.Tx) error { _, err := tx.Exec(ctx, insert, id); return err })
		},
		func(ctx context.Context, id int64) error {
			_, err := s.pool.CopyFrom(ctx, pgx.Identifier{"log"}, []string{"id"}, pgx.CopyFromRows([][]any{{id}}))
			return err
		},
		func(ctx context.Context, id int64) error {
			b := &pgx.Batch{}
			b.Queue(insert, id)
			return s.pool.SendBatch(ctx, b).Close()
		},
	}
	var last, unknown atomic.Int64
	var ended sync.Map // error by id
	writers := gatherFor(20*time.Second, 18, func(ctx context.Context) error {
		id := last.Add(1)
		err := ways[id%int64(len(ways))](ctx, id)
		ended.Store(id, err)
		if errors.Is(err, ErrOutcomeUnknown) {
			unknown.Add(1)
		}
		return nil
	})
	server, err := c.Primary().Conn(testContext(t))
	require.NoError(t, err)
	t.Cleanup(func() { _ = server.Close(context.Background()) })
	stopped := map[string]int64{}
	waitFor(t, "writes to be stopped in their commit", time.Minute, func() bool {
		for _, stop := range []string{"pg_terminate_backend", "pg_cancel_backend"} {
			tag, err := server.Exec(testContext(t), "select "+stop+`(pid) from pg_stat_activity
				where state = 'active' and pid <> pg_backend_pid() and query ~* '(into|copy).*log|commit' and random() < 0.2`)
			require.NoError(t, err)
			stopped[stop] += tag.RowsAffected()
		}
		return stopped["pg_terminate_backend"] >= 50 && stopped["pg_cancel_backend"] >= 50 && unknown.Load() >= 30
	})
	writers.dismiss()
	s.pool.Close() // what a caller has given up goes on behind the pooler
	waitFor(t, "the last write to end", 20*time.Second, func() bool {
		return count(t, c, "select count(*) from pg_stat_activity where state <> 'idle' and pid <> pg_backend_pid() and backend_type = 'client backend'") == 0
	})
	rows, err := server.Query(testContext(t), "select id, count(*) from log group by id")
	require.NoError(t, err)
	there := map[int64]int{}
	var id int64
	var n int
	_, err = pgx.ForEachRow(rows, []any{&id, &n}, func() error { there[id] = n; return nil })
	require.NoError(t, err)
	var failed, unknownDone int
	ended.Range(func(key, value any) bool {
		id, n := key.(int64), there[key.(int64)]
		err, _ := value.(error)
		marked := errors.Is(err, ErrOutcomeUnknown)
		switch {
		case n > 1:
			t.Errorf("way %d: done %d times: %v", id%int64(len(ways)), n, err)
		case err == nil && n == 0:
			t.Errorf("way %d: not done, and no error", id%int64(len(ways)))
		case err != nil && !marked && n > 0:
			t.Errorf("way %d: done, and the error does not say that it may be: %v", id%int64(len(ways)), err)
		case marked && n > 0:
			unknownDone++
		case err != nil && !marked:
			failed++
		}
		return true
	})
	t.Logf("%d writes, told to stop: %v; %d of unknown outcome, of which %d are done; %d failed and not done", last.Load(), stopped,
		unknown.Load(), unknownDone, failed)
	require.Positive(t, unknownDone, "some were stopped after their commit")
}
