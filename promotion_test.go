package multipool

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/pgmultipool/multipool/internal/netfault"
	"github.com/pgmultipool/multipool/internal/pgtest"
)

// Promotions, stale primaries and replicas that do not tell the truth, on real servers.

// ledger is writers of numbered entries that remember what they were told of each.
type ledger struct {
	next atomic.Int64

	mu      sync.Mutex
	written map[int64]time.Time // acknowledged
	unknown map[int64]error
	failed  map[string]int
}

func newLedger(t testing.TB, c *pgtest.Cluster) *ledger {
	t.Helper()
	must(t, c, "create table ledger (id bigint)") // no key: an entry that is written twice must show
	return &ledger{written: map[int64]time.Time{}, unknown: map[int64]error{}, failed: map[string]int{}}
}

// write makes one entry.
func (l *ledger) write(p *MultiPool) func(context.Context) error {
	return func(ctx context.Context) error {
		l.enter(ctx, p, "insert into ledger values ($1)")
		time.Sleep(rand.N(20 * time.Millisecond))
		return nil
	}
}

func (l *ledger) note(id int64, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case err == nil:
		l.written[id] = time.Now()
	case errors.Is(err, ErrOutcomeUnknown):
		l.unknown[id] = err
	default:
		l.failed[err.Error()]++
	}
}

// firstAfter returns when the first entry after a time was acknowledged.
func (l *ledger) firstAfter(after time.Time) (first time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, at := range l.written {
		if at.After(after) && (first.IsZero() || at.Before(first)) {
			first = at
		}
	}
	return first
}

// settle compares what the writers were told with what a server has: nothing twice, nothing that was said to have failed.
// It returns how many acknowledged entries the server lacks.
func (l *ledger) settle(t testing.TB, s *pgtest.Server) (lost int) {
	t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	conn, err := s.Conn(testContext(t))
	require.NoError(t, err)
	defer conn.Close(context.Background())
	rows, err := conn.Query(testContext(t), "select id, count(*) from ledger where id > 0 group by 1")
	require.NoError(t, err)
	has := map[int64]bool{}
	for rows.Next() {
		var id, n int64
		require.NoError(t, rows.Scan(&id, &n))
		assert.EqualValues(t, 1, n, "entry %d", id)
		_, unknown := l.unknown[id]
		_, written := l.written[id]
		assert.True(t, written || unknown, "entry %d was said to have failed", id)
		has[id] = true
	}
	require.NoError(t, rows.Err())
	for id := range l.written {
		if !has[id] {
			lost++
		}
	}
	return lost
}

// close sends writers and readers home after an outage and checks what they saw: no read failed, no write without an unknown
// outcome and no more of those than could be in flight, nothing acknowledged is lost, and, as
// "make bench-check" runs it, the pool wrote again within 50 ms of the promoted server's first write.
func (l *ledger) close(t *testing.T, outage string, writers, readers *crowd, s *pgtest.Server, began, first time.Time) {
	t.Helper()
	writes, _ := writers.dismiss()
	reads, failedReads := readers.dismiss()
	assert.Empty(t, failedReads)
	assert.Empty(t, l.failed, "writes fail with an unknown outcome or not at all")
	assert.LessOrEqual(t, len(l.unknown), 20, "no more than could be in flight")
	assert.Zero(t, l.settle(t, s), "acknowledged entries lost")
	resumed := l.firstAfter(first)
	t.Logf("%s: %d writes, %d of unknown outcome, 0 failed; %d reads, 0 failed; no write for %v, of which the pool's %v",
		outage, writes, len(l.unknown), reads, resumed.Sub(began).Round(time.Millisecond), resumed.Sub(first).Round(100*time.Microsecond))
	if _, judged := envNumber(t, "MULTIPOOL_BENCH_CHECK"); judged { // a machine that does something else is late by itself
		assert.Less(t, resumed.Sub(first), 50*time.Millisecond)
	}
}

// entriesFrom counts a server's entries with these numbers or higher.
func entriesFrom(t testing.TB, s *pgtest.Server, id int64) int64 {
	t.Helper()
	n, err := s.Int(testContext(t), "select count(*) from ledger where id >= $1", id)
	require.NoError(t, err)
	return n
}

func reading(p *MultiPool) func(context.Context) error {
	return func(ctx context.Context) error {
		time.Sleep(rand.N(4 * time.Millisecond))
		return p.QueryRow(ctx, "select count(*) from ledger where id = $1", rand.IntN(1000)).Scan(new(int))
	}
}

// primaryIs waits until a pool writes to a server.
func primaryIs(t testing.TB, p *MultiPool, addr string) {
	t.Helper()
	waitFor(t, addr+" as the primary", 10*time.Second, func() bool {
		s := p.Status()
		return s.Primary == addr && !s.Split
	})
}

// accepting polls a server until it takes a write, and returns when it first did.
func accepting(t testing.TB, s *pgtest.Server) time.Time {
	t.Helper()
	conn, err := s.Conn(testContext(t))
	require.NoError(t, err)
	defer conn.Close(context.Background())
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); {
		if _, err := conn.Exec(testContext(t), "insert into ledger values (0)"); err == nil {
			return time.Now()
		}
	}
	require.Fail(t, "the promoted server takes no write")
	return time.Time{}
}

func memberOf(p *MultiPool, s *pgtest.Server) PeerStatus {
	for _, ps := range p.Status().Peers {
		if ps.Name == s.Addr() {
			return ps
		}
	}
	return PeerStatus{}
}

// primaryEvents keeps the events about the primary.
type primaryEvents struct {
	mu  sync.Mutex
	all []PrimaryEvent
}

func (e *primaryEvents) hooks() *Hooks {
	return &Hooks{PrimaryChanged: func(event PrimaryEvent) {
		e.mu.Lock()
		defer e.mu.Unlock()
		e.all = append(e.all, event)
	}}
}

func (e *primaryEvents) list() []PrimaryEvent {
	e.mu.Lock()
	defer e.mu.Unlock()
	return append([]PrimaryEvent(nil), e.all...)
}

// The primary is killed under 50 writers and 50 readers, and a replica promoted. Every standby is synchronous, so that
// no acknowledged write may be lost.
func TestAPromotionAfterAKillCostsOnlyTheWritesInFlight(t *testing.T) {
	c := pgtest.Start(t, pgtest.Options{Standbys: 2, SyncApply: true})
	l := newLedger(t, c)
	p := openPool(t, Options{Wait: operatorTime}, c.ConnString("pool_max_conns=20"))
	waitUp(t, p)
	old, next, third := c.Primary(), c.Standbys()[0], c.Standbys()[1]
	writers, readers := gatherFor(operatorTime, 50, l.write(p)), gather(50, reading(p))
	writers.reach(t, 500)
	killed := time.Now()
	require.NoError(t, old.Kill())
	waitFor(t, "its fall", 10*time.Second, func() bool { return memberOf(p, old).Health == HealthDown })
	time.Sleep(200 * time.Millisecond) // the operator's share
	ready := make(chan time.Time, 1)
	go func() { ready <- accepting(t, next) }()
	require.NoError(t, next.Promote())
	first := <-ready
	primaryIs(t, p, next.Addr())
	require.NoError(t, third.Follow(next))
	writers.reach(t, 500)
	require.NoError(t, old.Follow(next))
	waitFor(t, "the old primary as a replica", 15*time.Second, func() bool { return memberOf(p, old).Serves })
	back := memberOf(p, old).Reads
	waitFor(t, "its reads", 15*time.Second, func() bool { return memberOf(p, old).Reads > back })
	l.close(t, "kill", writers, readers, next, killed, first)
}

// A switchover. What a server says as it shuts down comes before a commit; where it logs durations it may come after one, under
// the simple protocol.
func TestASwitchoverFailsNoWriteThatWasHeld(t *testing.T) {
	t.Run("extended", func(t *testing.T) {
		assert.Empty(t, switchover(t, "cache_statement", "-1").unknown)
	})
	t.Run("simple, logging", func(t *testing.T) { switchover(t, "simple_protocol", "0") })
}

func switchover(t *testing.T, mode, logged string) *ledger {
	c := pgtest.Start(t, pgtest.Options{Standbys: 2, Settings: map[string]string{"log_min_duration_statement": logged}})
	l := newLedger(t, c)
	p := openPool(t, Options{Wait: operatorTime}, c.ConnString("pool_max_conns=20", "default_query_exec_mode="+mode))
	waitUp(t, p)
	old, next, third := c.Primary(), c.Standbys()[0], c.Standbys()[1]
	writers, readers := gatherFor(operatorTime, 50, l.write(p)), gather(50, reading(p))
	writers.reach(t, 500)
	stopped := time.Now()
	require.NoError(t, old.Stop(pgtest.Fast))
	ready := make(chan time.Time, 1)
	go func() { ready <- accepting(t, next) }()
	require.NoError(t, next.Promote())
	first := <-ready
	require.NoError(t, third.Follow(next))
	require.NoError(t, old.Follow(next))
	primaryIs(t, p, next.Addr())
	waitFor(t, "the old primary as a replica", 15*time.Second, func() bool {
		ps := memberOf(p, old)
		return ps.Serves && ps.Role == RoleReplica
	})
	mark, wrote := memberOf(p, old).Reads, memberOf(p, old).Writes
	waitFor(t, "its reads", 15*time.Second, func() bool { return memberOf(p, old).Reads > mark })
	writers.reach(t, 500)
	l.close(t, "switchover, "+mode, writers, readers, next, stopped, first)
	assert.Equal(t, wrote, memberOf(p, old).Writes, "no write went to the demoted one")
	return l
}

// A stale primary goes on taking writes, and gets none: neither from a pool that saw the promotion, nor from one that is
// opened afterwards, in whichever order it lists and discovers the two.
func TestAStalePrimaryGetsNoWrite(t *testing.T) {
	c := pgtest.Start(t, pgtest.Options{Standbys: 2})
	l := newLedger(t, c)
	before := openPool(t, Options{}, c.ConnString("pool_max_conns=20"))
	waitUp(t, before)
	old, next := c.Primary(), c.Standbys()[0]
	writers := gather(25, l.write(before))
	writers.reach(t, 200)
	require.NoError(t, next.Promote())
	primaryIs(t, before, next.Addr())
	from := l.next.Load() + 26 // 25 entries may be on their way
	writers.reach(t, 500)
	_, _ = writers.dismiss()
	assert.Empty(t, l.failed)
	assert.Zero(t, entriesFrom(t, old, from), "entries on the stale primary")
	assert.GreaterOrEqual(t, entriesFrom(t, next, from), int64(400))
	assert.Contains(t, before.Status().Rivals, old.Addr())
	assert.False(t, memberOf(before, old).Serves)

	for name, addrs := range map[string][]string{"the old first": {old.Addr(), next.Addr()}, "the new first": {next.Addr(), old.Addr()}} {
		hosts := fmt.Sprintf("postgres://postgres@%s,%s/postgres?sslmode=disable", addrs[0], addrs[1])
		for range 10 {
			var from int64
			var err error
			p := openEarly(t, func() *MultiPool { return openPool(t, Options{}, hosts) }, func(p *MultiPool) {
				from = l.next.Add(1)
				_, err = p.Exec(testContext(t), "insert into ledger values ($1)", from)
			})
			require.NoError(t, err, name)
			for range 10 {
				require.NoError(t, l.write(p)(testContext(t)))
			}
			p.Close()
			assert.Empty(t, l.failed, name)
			assert.Zero(t, entriesFrom(t, old, from), name)
		}
	}
}

// A pool is opened while the promoted server cannot be reached: it writes to the old primary, for it knows no better.
// When the newer timeline shows, nothing tells a promotion from a copy that was recovered to a point in time. So it writes
// to neither, and says so once; and follows when a replica that it knows does, or when the old one is gone.
func TestAnUnknownClaimantIsAnnouncedAndNotFollowedYet(t *testing.T) {
	t.Parallel()
	for _, ending := range []string{"a replica follows", "the old one goes", "the claimant goes"} {
		t.Run(ending, func(t *testing.T) {
			t.Parallel()
			c := pgtest.Start(t, pgtest.Options{Standbys: 2})
			l := newLedger(t, c)
			old, claimant, third := c.Primary(), c.Standbys()[0], c.Standbys()[1]
			require.NoError(t, claimant.Promote())
			relay, err := netfault.Listen(claimant.Addr())
			require.NoError(t, err)
			defer relay.Close()
			require.NoError(t, relay.Refuse(true))
			var events primaryEvents
			p := openPool(t, Options{Hooks: events.hooks(), Wait: 300 * time.Millisecond, CheckInterval: 100 * time.Millisecond},
				fmt.Sprintf("postgres://postgres@%s,%s,%s/postgres?sslmode=disable", old.Addr(), relay.Addr(), third.Addr()))
			primaryIs(t, p, old.Addr())
			waitFor(t, "the third", 20*time.Second, func() bool { return memberOf(p, third).Serves })
			require.NoError(t, l.write(p)(testContext(t)))
			require.Empty(t, l.failed)

			require.NoError(t, relay.Refuse(false))
			waitFor(t, "the claim", 20*time.Second, func() bool { return p.Status().Split })
			from := l.next.Load() + 1
			_, err = p.Exec(testContext(t), "insert into ledger values ($1)", l.next.Add(1))
			require.ErrorIs(t, err, ErrSplitBrain)
			require.ErrorIs(t, err, ErrNoPrimary)
			require.NotErrorIs(t, err, ErrOutcomeUnknown)
			reads := gather(5, reading(p))
			reads.reach(t, 100)
			_, failed := reads.dismiss()
			assert.Empty(t, failed)
			assert.Zero(t, entriesFrom(t, old, from))
			assert.Zero(t, entriesFrom(t, claimant, from))
			var said []PrimaryEvent
			waitFor(t, "the events", 10*time.Second, func() bool { said = events.list(); return len(said) >= 2 })
			require.Len(t, said, 2, "the first primary, and the claim: %+v", said)
			assert.Equal(t, []string{relay.Addr()}, said[1].Rivals)
			assert.True(t, said[1].Split)
			assert.Equal(t, old.Addr(), said[1].Primary)

			switch ending {
			case "a replica follows":
				require.NoError(t, third.Follow(claimant))
				primaryIs(t, p, relay.Addr())
			case "the old one goes":
				require.NoError(t, old.Kill())
				primaryIs(t, p, relay.Addr())
			case "the claimant goes":
				require.NoError(t, relay.Refuse(true))
				relay.Reset()
				primaryIs(t, p, old.Addr())
			}
			_, err = p.Exec(testContext(t), "insert into ledger values ($1)", l.next.Add(1))
			require.NoError(t, err)
		})
	}
}

func TestEqualTimelinesAreDecidedByTheIncumbentOrNotAtAll(t *testing.T) {
	t.Parallel()
	c := pgtest.Start(t, pgtest.Options{Standbys: 2})
	l := newLedger(t, c)
	var events primaryEvents
	before := openPool(t, Options{Hooks: events.hooks(), CheckInterval: 100 * time.Millisecond}, c.ConnString())
	waitUp(t, before)
	old, one, other := c.Primary(), c.Standbys()[0], c.Standbys()[1]
	require.NoError(t, old.Kill())
	// Until then it is a rival of whoever is promoted.
	waitFor(t, "its fall", 20*time.Second, func() bool { return memberOf(before, old).Health == HealthDown })
	require.NoError(t, one.Promote())
	primaryIs(t, before, one.Addr())
	require.NoError(t, other.Promote())
	waitFor(t, "the rival", 20*time.Second, func() bool { return len(before.Status().Rivals) == 1 })
	writers := gather(5, l.write(before))
	writers.reach(t, 200)
	_, _ = writers.dismiss()
	assert.Empty(t, l.failed)
	assert.Zero(t, entriesFrom(t, other, 1), "the incumbent stays")
	var heard []PrimaryEvent
	waitFor(t, "the events", 10*time.Second, func() bool {
		heard = slices.DeleteFunc(events.list(), func(e PrimaryEvent) bool {
			return e.Primary == "" // a look may find the promoted one between its timeline and its role
		})
		return len(heard) >= 3
	})
	require.Len(t, heard, 3, "the first primary, the second, and a rival once: %+v", heard)
	assert.Equal(t, []string{other.Addr()}, heard[2].Rivals)
	assert.False(t, heard[2].Split)

	// Who knows neither for the incumbent writes to neither.
	after := openEarly(t, func() *MultiPool {
		return openPool(t, Options{Wait: 400 * time.Millisecond, CheckInterval: 100 * time.Millisecond}, c.ConnString())
	}, seen(t))
	_, err := after.Exec(testContext(t), "insert into ledger values (-1)")
	require.ErrorIs(t, err, ErrSplitBrain)
	require.NoError(t, other.Kill())
	primaryIs(t, after, one.Addr())
	_, err = after.Exec(testContext(t), "insert into ledger values (-1)")
	require.NoError(t, err)
}

func TestAServerOfAnotherClusterIsRefused(t *testing.T) {
	t.Parallel()
	ours := pgtest.Start(t, pgtest.Options{Standbys: 1})
	theirs := pgtest.Start(t, pgtest.Options{Variant: 1})
	must(t, ours, "create table whose (name text)", "insert into whose values ('ours')")
	must(t, theirs, "create table whose (name text)", "insert into whose values ('theirs')")
	stranger := theirs.Primary()
	for range 10 {
		var name string
		var err error
		p := openEarly(t, func() *MultiPool {
			return openPool(t, Options{}, fmt.Sprintf("postgres://postgres@%s,%s,%s/postgres?sslmode=disable",
				stranger.Addr(), ours.Primary().Addr(), ours.Standbys()[0].Addr()))
		}, func(p *MultiPool) { err = p.QueryRow(testContext(t), "select name from whose").Scan(&name) })
		require.NoError(t, err)
		require.Equal(t, "ours", name)
		for range 20 {
			require.NoError(t, p.QueryRow(testContext(t), "select name from whose").Scan(&name))
			require.Equal(t, "ours", name)
		}
		_, err = p.Exec(testContext(t), "insert into whose values ('ours')")
		require.NoError(t, err)
		primaryIs(t, p, ours.Primary().Addr())
		waitUp(t, p)
		ps := memberOf(p, stranger)
		assert.False(t, ps.Serves)
		assert.Equal(t, WhyOtherCluster, ps.Unfit)
		assert.Zero(t, ps.Reads+ps.Writes)
		_, err = p.Exec(WithPeer(testContext(t), stranger.Addr()), "select 1")
		require.ErrorContains(t, err, "another cluster")
		p.Close()
	}
	n, err := stranger.Int(testContext(t), "select count(*) from whose")
	require.NoError(t, err)
	assert.EqualValues(t, 1, n)
}

// A third standby goes on following the primary that was replaced: it looks healthy, and shows what is lost. A member of
// pg_monitor is told the timeline that it receives; for anybody else it is told by being ahead of the new primary.
func TestAReplicaOfAStalePrimaryIsNotRead(t *testing.T) {
	t.Parallel()
	for _, user := range []string{"postgres", "app"} {
		t.Run(user, func(t *testing.T) {
			t.Parallel()
			c := pgtest.Start(t, pgtest.Options{Standbys: 2})
			must(t, c, "create role app login", "create table ledger (id bigint)", "grant all on ledger to app")
			old, next, third := c.Primary(), c.Standbys()[0], c.Standbys()[1]
			p := openPool(t, Options{CheckInterval: 100 * time.Millisecond}, c.ConnString("user="+user))
			waitUp(t, p)
			require.NoError(t, next.Promote())
			primaryIs(t, p, next.Addr())
			for range 50 {
				require.NoError(t, old.Exec(testContext(t), "insert into ledger values (-1)")) // what is lost
			}
			waitFor(t, "the stray", 20*time.Second, func() bool { return !memberOf(p, third).Serves })
			for range 100 { // the primary overtakes it
				require.NoError(t, next.Exec(testContext(t), "insert into ledger values (-2)"))
			}
			looks := memberOf(p, third).Lag.Time
			waitFor(t, "a few looks", 20*time.Second, func() bool { return memberOf(p, third).Lag.Time > looks+300*time.Millisecond })
			require.False(t, memberOf(p, third).Serves)
			for range 100 {
				var n int
				require.NoError(t, p.QueryRow(testContext(t), "select count(*) from ledger where id = -1").Scan(&n))
				require.Zero(t, n)
			}
			require.NoError(t, third.Follow(next))
			waitFor(t, "its return", 20*time.Second, func() bool { return memberOf(p, third).Serves })
		})
	}
}

// What makes a replica's data old, and what mends it.
func TestAReplicaThatIsOldLeavesTheReadsAndComesBack(t *testing.T) {
	t.Parallel()
	const bound = 8 << 20
	c := pgtest.Start(t, pgtest.Options{Standbys: 2, Settings: map[string]string{"wal_keep_size": "512MB", "max_wal_size": "1GB"}})
	must(t, c, "create table filler (t text)", "alter table filler alter t set storage plain", "create role app login")
	victim, other := c.Standbys()[0], c.Standbys()[1]
	fill := func(megabytes int) {
		t.Helper()
		require.NoError(t, c.Primary().Exec(testContext(t),
			fmt.Sprintf("insert into filler select repeat('x', 1000) from generate_series(1, %d)", megabytes*1000)))
	}
	for _, tc := range []struct {
		name   string
		lag    Lag
		old    func() error
		mended func() error
		unfit  Why
	}{
		{"replay paused", Lag{}, victim.PauseReplay, victim.ResumeReplay, WhyPaused},
		{"receiver cut", Lag{}, victim.CutReceiver, victim.RestoreReceiver, WhyCutOff},
		{"50 MB behind", Lag{Bytes: bound}, func() error { return victim.DelayReplay(time.Hour) }, func() error { return victim.DelayReplay(0) }, WhyBehind},
		{"2 s behind", Lag{Time: 2 * time.Second}, func() error { return victim.DelayReplay(time.Hour) }, func() error { return victim.DelayReplay(0) }, WhyBehind},
	} {
		p := openPool(t, Options{MaxLag: tc.lag, CheckInterval: 700 * time.Millisecond}, c.ConnString("user=app"))
		waitUp(t, p)
		waitFor(t, "both in use", 20*time.Second, func() bool { return memberOf(p, victim).Serves && memberOf(p, other).Serves })
		require.NoError(t, tc.old(), tc.name)
		fill(1)
		switch {
		case tc.lag.Bytes > 0:
			fill(49)
		case tc.lag.Time > 0:
			time.Sleep(tc.lag.Time)
		}
		crossed := time.Now()
		var ps PeerStatus
		waitFor(t, tc.name, 10*time.Second, func() bool { // a suspect does not serve either, for a moment
			ps = memberOf(p, victim)
			return !ps.Serves && ps.Unfit != WhyNone && ps.Health == HealthUp
		})
		took := time.Since(crossed)
		t.Logf("%s: out of the reads after %v, %d bytes and %v behind", tc.name, took.Round(time.Millisecond), ps.Lag.Bytes, ps.Lag.Time.Round(time.Millisecond))
		if !raceEnabled {
			assert.Less(t, took, 2*time.Second, tc.name)
		}
		assert.Equal(t, tc.unfit, ps.Unfit, tc.name)
		reads := ps.Reads
		for range 100 {
			require.NoError(t, p.QueryRow(testContext(t), "select 1").Scan(new(int)))
		}
		assert.Equal(t, reads, memberOf(p, victim).Reads, tc.name)

		// Old data is better than none.
		require.NoError(t, other.Stop(pgtest.Fast))
		waitFor(t, "the other to fall", 20*time.Second, func() bool { return memberOf(p, other).Health != HealthUp })
		waitFor(t, "the last replica to stay", 10*time.Second, func() bool { return memberOf(p, victim).Serves })
		require.NoError(t, other.Start())
		waitFor(t, "the other's return", 20*time.Second, func() bool { return memberOf(p, other).Serves })

		require.NoError(t, tc.mended(), tc.name)
		waitFor(t, tc.name+": its return", 15*time.Second, func() bool { ps := memberOf(p, victim); return ps.Serves && ps.Unfit == WhyNone })
		p.Close()
	}
}

// A route's bound is hard: the primary serves where no replica is known to be within it.
func TestARoutesMaxLagIsHard(t *testing.T) {
	t.Parallel()
	c := pgtest.Start(t, pgtest.Options{Standbys: 2})
	must(t, c, "create table v (n int)", "insert into v values (0)")
	var trips journal
	p := openPool(t, Options{Hooks: trips.hooks(), Models: map[string]Route{"fresh": {MaxLag: Lag{Time: time.Second}}}}, c.ConnString())
	waitUp(t, p)
	reader := WithModel(testContext(t), "fresh")
	onReplica := func() bool {
		trips.take()
		require.NoError(t, p.QueryRow(reader, "select 1").Scan(new(int)))
		last := trips.take()
		return last[len(last)-1].Peer != c.Primary().Addr()
	}
	waitFor(t, "a replica that is known to be fresh", 10*time.Second, onReplica)
	for _, s := range c.Standbys() {
		require.NoError(t, s.PauseReplay())
	}
	// From here on a replica's answer is older than a second when the primary has been written to for more than that.
	for begun := time.Now(); time.Since(begun) < 4*time.Second; {
		require.NoError(t, c.Primary().Exec(testContext(t), "update v set n = n + 1"))
		wrote, err := c.Primary().Int(testContext(t), "select n from v")
		require.NoError(t, err)
		time.Sleep(1100 * time.Millisecond)
		var n int64
		require.NoError(t, p.QueryRow(reader, "select n from v").Scan(&n))
		require.GreaterOrEqual(t, n, wrote, "older than a second")
	}
	require.False(t, onReplica())
	_, err := p.Query(WithRoute(testContext(t), Route{Target: TargetReplica, MaxLag: Lag{Bytes: 1}}), "select 1")
	require.ErrorIs(t, err, ErrNoReplica)
	require.NoError(t, p.QueryRow(WithRoute(reader, Route{MaxLag: Lag{Time: Off}}), "select 1").Scan(new(int)))
	for _, s := range c.Standbys() {
		require.NoError(t, s.ResumeReplay())
	}
	waitFor(t, "the replicas again", 10*time.Second, onReplica)
}

// An idle primary whose last record ended 16 bytes into an ordinary page.
func TestAReplicaOfAPrimaryThatIdlesAnywhereIsRead(t *testing.T) {
	c := pgtest.Start(t, pgtest.Options{Standbys: 2, Settings: map[string]string{"autovacuum": "off"}})
	ctx := testContext(t)
	p := openPool(t, Options{MaxLag: Lag{Time: 10 * time.Second}}, c.ConnString("multipool_check_interval=50ms"))
	waitUp(t, p)
	conn, err := c.Primary().Conn(ctx)
	require.NoError(t, err)
	defer conn.Close(ctx)
	at := func() lsn {
		var s string
		require.NoError(t, conn.QueryRow(ctx, "select pg_current_wal_insert_lsn()::text").Scan(&s))
		return parseLSN(s)
	}
	emit := func(n int) { // one record and its commit
		_, err := conn.Exec(ctx, "select pg_logical_emit_message(true, '', repeat('x', $1))", n)
		require.NoError(t, err)
	}
	var overhead lsn
	for {
		a := at()
		emit(800)
		if b := at(); b/walPage == a/walPage {
			overhead = b - a - 800
			break
		}
	}
	for {
		a := at()
		want := (a/walPage+1)*walPage + 40
		n := int64(want-a) - 24 - int64(overhead)
		if n < 600 || want%(1<<20) < walPage {
			emit(500)
			continue
		}
		emit(int(n))
		b := at()
		if b%walPage == 40 && b%(1<<20) > walPage {
			break
		}
	}
	require.NoError(t, c.WaitCaughtUp(ctx))
	idle := p.clock()
	waitFor(t, "a second of looks", 10*time.Second, func() bool {
		done := true
		for i, ps := range p.Status().Peers {
			if ps.Role == RoleReplica {
				require.Empty(t, ps.Unfit)
				done = done && time.Duration(p.peers()[i].behind.at.Load()) > idle+time.Second
			}
		}
		return done
	})
}
