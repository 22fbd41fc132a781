package multipool

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/pgmultipool/multipool/internal/pgtest"
)

// Equal peers, ordered lists, reads on the primary too, and maintenance without an error, on real servers.

// portServing reads the port of the server that serves a read, as the server itself says it.
const portServing = "select inet_server_port()"

// register is who has served which reads.
type register struct {
	mu   sync.Mutex
	page map[uint16]int
}

func newRegister() *register { return &register{page: map[uint16]int{}} }

// read is one read, entered under the server that served it on the page that was open when it began.
func (r *register) read(ctx context.Context, p *MultiPool) error {
	time.Sleep(rand.N(20 * time.Millisecond))
	r.mu.Lock()
	page := r.page
	r.mu.Unlock()
	var port uint16
	err := p.QueryRow(ctx, portServing).Scan(&port)
	if err == nil {
		r.mu.Lock()
		page[port]++
		r.mu.Unlock()
	}
	return err
}

// turn opens a new page.
func (r *register) turn() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.page = map[uint16]int{}
}

// shares returns every server's part of the page.
func (r *register) shares() map[uint16]float64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	all := 0
	for _, n := range r.page {
		all += n
	}
	shares := map[uint16]float64{}
	for port, n := range r.page {
		shares[port] = float64(n) / float64(all)
	}
	return shares
}

// failures are the errors that the callers have met so far.
func (c *crowd) failures() map[string]int {
	c.mu.Lock()
	defer c.mu.Unlock()
	all := map[string]int{}
	for text, n := range c.errors {
		all[text] = n
	}
	return all
}

func sum(counts map[string]int) (n int) {
	for _, k := range counts {
		n += k
	}
	return n
}

// connect joins single servers of several clusters to one connection string.
func connect(servers []*pgtest.Server, params ...string) string {
	addrs := make([]string, len(servers))
	for i, s := range servers {
		addrs[i] = s.Addr()
	}
	return "postgres://postgres@" + strings.Join(addrs, ",") + "/postgres?" + strings.Join(append(params, "sslmode=disable"), "&")
}

// wantSQLState checks which error of the server a caller was shown.
func wantSQLState(t testing.TB, want string, err error) {
	t.Helper()
	var pgErr *pgconn.PgError
	require.ErrorAs(t, err, &pgErr)
	assert.Equal(t, want, pgErr.Code, err)
}

// Two servers that know nothing of each other take reads and writes of 100 callers, and one of them is killed. What is in
// flight on it is lost: writes say so, reads run again elsewhere if the program has promised that they do not write.
func TestOneOfTwoEqualsIsKilled(t *testing.T) {
	for _, retry := range []Retry{RetryReads, RetrySafe} {
		t.Run(retry.String(), func(t *testing.T) {
			const conns = 30
			var servers []*pgtest.Server
			for range 2 {
				c := pgtest.Start(t, pgtest.Options{})
				must(t, c, "create table ledger (id bigint)", "create table gate (n int)", "insert into gate values (1)")
				servers = append(servers, c.Primary())
			}
			l := &ledger{written: map[int64]time.Time{}, unknown: map[int64]error{}, failed: map[string]int{}}
			p := openPool(t, Options{Route: Route{Retry: retry}},
				connect(servers, "multipool_mode=equivalent", fmt.Sprintf("pool_max_conns=%d", conns)))
			waitUp(t, p)
			r := newRegister()
			readers := gather(50, func(ctx context.Context) error { return r.read(ctx, p) })
			writers := gather(50, func(ctx context.Context) error {
				time.Sleep(rand.N(40 * time.Millisecond))
				l.enter(ctx, p, "insert into ledger values ($1)")
				return nil
			})
			readers.reach(t, 500)
			// How much each serves depends on what else the machine does.
			waitFor(t, "both to serve", 10*time.Second, func() bool {
				shares := r.shares()
				return shares[servers[0].Port()] > 0.05 && shares[servers[1].Port()] > 0.05
			})
			for _, s := range servers {
				assert.Positive(t, memberOf(p, s).Writes)
			}

			// Of twenty calls that are held up on the servers some are on either when one is killed.
			gates := shutGates(t, servers)
			held := holdUp(t, p, l)
			victim, survivor, caught := held.wherever(t, servers)
			require.NoError(t, victim.Kill())
			waitFor(t, "its fall", 20*time.Second, func() bool { return memberOf(p, victim).Health == HealthDown })
			require.NoError(t, gates[survivor].Close(testContext(t)))
			heldErrors := held.wait()
			writers.reach(t, 300)
			readers.turnOver(t) // whoever was on it has heard of its end
			lostReads := readers.failures()
			r.turn()
			readers.reach(t, 300)
			assert.Equal(t, map[uint16]float64{survivor.Port(): 1}, r.shares())

			require.NoError(t, victim.Start())
			started, before := time.Now(), memberOf(p, victim)
			waitFor(t, "its return", p.config.CheckInterval, func() bool {
				now := memberOf(p, victim)
				return now.Reads > before.Reads && now.Writes > before.Writes
			})
			back := time.Since(started)

			_, failed := readers.dismiss()
			_, _ = writers.dismiss()
			assert.Equal(t, lostReads, failed, "no read fails but those in flight")
			if retry == RetryReads {
				assert.Empty(t, failed)
				assert.Empty(t, heldErrors)
			} else {
				assert.GreaterOrEqual(t, len(heldErrors), caught.reads, "those in flight are lost")
				assert.LessOrEqual(t, sum(failed)+len(heldErrors), conns, "one a connection")
			}
			for _, err := range heldErrors {
				var nobody *NoPeerError
				assert.False(t, errors.As(err, &nobody), "its own error: %v", err)
				assert.NotErrorIs(t, err, ErrOutcomeUnknown, "a read is not marked")
			}
			assert.Empty(t, l.failed, "a write fails with an unknown outcome or not at all")
			assert.GreaterOrEqual(t, len(l.unknown), caught.writes)
			assert.LessOrEqual(t, len(l.unknown), conns, "one a connection")
			assert.Zero(t, l.settleAmong(t, servers...), "acknowledged entries lost")
			assert.EqualValues(t, 1, memberOf(p, victim).Trips)
			assert.Zero(t, memberOf(p, survivor).Trips)
			t.Logf("%d writes, %d of unknown outcome, 0 failed; %d+%d reads failed; back after %v",
				len(l.written), len(l.unknown), sum(failed), len(heldErrors), back.Round(10*time.Millisecond))
		})
	}
}

// shutGates locks a table on every server; who reads it waits until the session that is returned is closed.
func shutGates(t testing.TB, servers []*pgtest.Server) map[*pgtest.Server]*pgx.Conn {
	t.Helper()
	gates := map[*pgtest.Server]*pgx.Conn{}
	for _, s := range servers {
		conn, err := s.Conn(testContext(t))
		require.NoError(t, err)
		t.Cleanup(func() { _ = conn.Close(context.Background()) })
		_, err = conn.Exec(testContext(t), "begin; lock table gate")
		require.NoError(t, err)
		gates[s] = conn
	}
	return gates
}

// holdup is calls that wait at the gates.
type holdup struct {
	calls sync.WaitGroup

	mu     sync.Mutex
	errors []error // of the reads
}

// heldCalls is how many of every kind are held up.
const heldCalls = 10

func holdUp(t testing.TB, p *MultiPool, l *ledger) *holdup {
	h := &holdup{}
	ctx := testContext(t)
	for range heldCalls {
		h.calls.Go(func() {
			if err := p.QueryRow(ctx, "select count(*) from gate -- held read").Scan(new(int)); err != nil {
				h.mu.Lock()
				defer h.mu.Unlock()
				h.errors = append(h.errors, err)
			}
		})
		h.calls.Go(func() { l.enter(ctx, p, "insert into ledger select $1 from gate -- held write") })
	}
	return h
}

type inFlight struct{ reads, writes int }

// wherever waits until all are where they are held up, and returns the server of two that has most of them, the other, and
// what is in flight on the first.
func (h *holdup) wherever(t testing.TB, servers []*pgtest.Server) (most, other *pgtest.Server, on inFlight) {
	t.Helper()
	at := make([]inFlight, 2)
	waitFor(t, "the calls to be held up", 20*time.Second, func() bool {
		for i, s := range servers {
			at[i] = inFlight{waitingAtGate(t, s, "held read"), waitingAtGate(t, s, "held write")}
		}
		return at[0].reads+at[1].reads == heldCalls && at[0].writes+at[1].writes == heldCalls
	})
	i := 0
	if at[1].reads+at[1].writes > at[0].reads+at[0].writes {
		i = 1
	}
	require.Positive(t, at[i].reads)
	require.Positive(t, at[i].writes)
	return servers[i], servers[1-i], at[i]
}

func waitingAtGate(t testing.TB, s *pgtest.Server, which string) int {
	t.Helper()
	n, err := s.Int(testContext(t), "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and query like '%' || $1", which)
	require.NoError(t, err)
	return int(n)
}

func (h *holdup) wait() []error {
	h.calls.Wait()
	return h.errors
}

// enter makes one entry by a statement that takes its number.
func (l *ledger) enter(ctx context.Context, p *MultiPool, insert string) {
	id := l.next.Add(1)
	_, err := p.Exec(ctx, insert, id)
	l.note(id, err)
}

// settleAmong is settle for servers that each have a part: no entry on two of them either.
func (l *ledger) settleAmong(t testing.TB, servers ...*pgtest.Server) (lost int) {
	t.Helper()
	found := 0
	seen := map[int64]bool{}
	for _, s := range servers {
		missing := l.settle(t, s)
		found += len(l.written) - missing
		conn, err := s.Conn(testContext(t))
		require.NoError(t, err)
		rows, err := conn.Query(testContext(t), "select id from ledger")
		require.NoError(t, err)
		for rows.Next() {
			var id int64
			require.NoError(t, rows.Scan(&id))
			assert.False(t, seen[id], "entry %d was made on two servers", id)
			seen[id] = true
		}
		require.NoError(t, rows.Err())
		require.NoError(t, conn.Close(testContext(t)))
	}
	return len(l.written) - found
}

// Of a primary and two standbys in a list the first that is well takes everything. The first is killed, then the second,
// and both return: there is one move back, to the first, and only when it has been well for a while.
func TestAnOrderedListFallsDownAndReturns(t *testing.T) {
	t.Parallel()
	const conns, returnAfter = 20, 3 * time.Second
	c := pgtest.Start(t, pgtest.Options{Standbys: 2})
	must(t, c, "create table log (note text)")
	var events *primaryEvents
	p := openEarly(t, func() *MultiPool {
		events = new(primaryEvents)
		return openPool(t, Options{Mode: ModeOrdered, ReturnAfter: returnAfter, Hooks: events.hooks()}, c.ConnString(fmt.Sprintf("pool_max_conns=%d", conns)))
	}, seen(t))
	waitUp(t, p)
	nodes := c.Servers()
	leads := func(s *pgtest.Server) {
		t.Helper()
		waitFor(t, s.Name()+" to lead", 20*time.Second, func() bool { return p.Status().Primary == s.Addr() })
	}
	write := func() error {
		_, err := p.Exec(testContext(t), "insert into log values ('x')")
		return err
	}

	r := newRegister()
	readers := gather(30, func(ctx context.Context) error { return r.read(ctx, p) })
	serves := func(s *pgtest.Server) {
		t.Helper()
		r.turn()
		readers.reach(t, 300)
		assert.Equal(t, map[uint16]float64{s.Port(): 1}, r.shares(), "%s alone", s.Name())
	}
	leads(nodes[0])
	serves(nodes[0])
	require.NoError(t, write())
	assert.Empty(t, readers.failures())

	require.NoError(t, nodes[0].Kill())
	leads(nodes[1])
	serves(nodes[1])
	readers.turnOver(t) // whoever was on the first has heard of its end
	onPrimary := readers.failures()
	assert.LessOrEqual(t, sum(onPrimary), conns, "a read in flight on a primary may have written: one a connection")
	wantSQLState(t, "25006", write())
	wantSQLState(t, "25006", p.QueryRow(testContext(t), "insert into log values ('x') returning note").Scan(new(string)))

	require.NoError(t, nodes[1].Kill())
	leads(nodes[2])
	serves(nodes[2])

	begun := time.Now()
	require.NoError(t, nodes[1].Start())
	require.NoError(t, nodes[0].Start())
	leads(nodes[0])
	serves(nodes[0])
	require.NoError(t, write())
	_, failed := readers.dismiss()
	assert.Equal(t, onPrimary, failed, "no read fails while standbys serve, nor by the move back")
	var moves []string
	for _, e := range events.list() {
		moves = append(moves, e.Primary)
	}
	assert.Equal(t, []string{nodes[0].Addr(), nodes[1].Addr(), nodes[2].Addr(), nodes[0].Addr()}, moves)
	last := events.list()[len(moves)-1].At
	assert.GreaterOrEqual(t, last.Sub(begun), returnAfter)
	t.Logf("%d reads failed with the primary; the first leads again %v after both returned", sum(onPrimary), last.Sub(begun).Round(10*time.Millisecond))
}

// Reads go to the primary and to its replica alike, and go on when the primary is gone: where it is shut down with the
// default, because what a shutdown ends was not executed; where it is killed with RetryReads.
func TestReadsAnywhereGoOnWithoutThePrimary(t *testing.T) {
	for name, tc := range map[string]struct {
		retry Retry
		end   func(*pgtest.Server) error
	}{
		"fast stop":           {RetrySafe, func(s *pgtest.Server) error { return s.Stop(pgtest.Fast) }},
		"kill and RetryReads": {RetryReads, (*pgtest.Server).Kill},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := pgtest.Start(t, pgtest.Options{Standbys: 1})
			l := newLedger(t, c)
			p := openPool(t, Options{Route: Route{Retry: tc.retry}, Wait: 20 * time.Second}, c.ConnString("multipool_target=any", "pool_max_conns=20"))
			waitUp(t, p)
			primary, replica := c.Primary(), c.Standbys()[0]
			r := newRegister()
			readers := gather(50, func(ctx context.Context) error { return r.read(ctx, p) })
			readers.reach(t, 500)
			waitFor(t, "both to serve", 10*time.Second, func() bool {
				shares := r.shares()
				return shares[primary.Port()] > 0.1 && shares[replica.Port()] > 0.1
			})
			_, err := p.Exec(WithPreferReplica(testContext(t)), "insert into ledger values (-1)")
			wantSQLState(t, "25006", err)

			require.NoError(t, tc.end(primary))
			waitFor(t, "its fall", 20*time.Second, func() bool { return !memberOf(p, primary).Serves })
			r.turn()
			readers.reach(t, 500)
			assert.Equal(t, map[uint16]float64{replica.Port(): 1}, r.shares())

			held := make(chan error, 1)
			go func() { held <- l.write(p)(testContext(t)) }()
			waitFor(t, "a write that waits", 20*time.Second, func() bool { return p.Status().Waiting > 0 })
			require.NoError(t, primary.Start())
			<-held
			assert.Empty(t, l.failed)
			assert.Len(t, l.written, 1)
			r.turn()
			waitFor(t, "reads on the primary again", 10*time.Second, func() bool { return r.shares()[primary.Port()] > 0 })
			calls, failed := readers.dismiss()
			assert.Empty(t, failed)
			assert.Zero(t, l.settle(t, primary))
			t.Logf("%d reads, 0 failed", calls)
		})
	}
}

// Every server of a cluster is restarted under load, the replicas first, the primary last and after another has taken its
// place. Smart shutdowns show that nothing of ours is left on a server that was drained.
func TestARollingRestartCostsNothing(t *testing.T) {
	c := pgtest.Start(t, pgtest.Options{Standbys: 2})
	l := newLedger(t, c)
	// Held writes wait for the operator, who may be slow on a busy machine.
	p := openPool(t, Options{Wait: 30 * time.Second}, c.ConnString("pool_max_conns=20"))
	waitUp(t, p)
	ctx := testContext(t)
	readers := gather(readers, func(ctx context.Context) error {
		time.Sleep(rand.N(40 * time.Millisecond))
		return p.QueryRow(ctx, "select count(*) from ledger where id = $1", rand.IntN(1000)).Scan(new(int))
	})
	writers := gather(20, func(context.Context) error {
		time.Sleep(rand.N(40 * time.Millisecond))
		l.enter(ctx, p, "insert into ledger values ($1)")
		return nil
	})
	readers.reach(t, 500)
	writers.reach(t, 200)

	// halt stops a drained server, which must be at once: a smart shutdown waits for the last client.
	halt := func(s *pgtest.Server) (took time.Duration) {
		t.Helper()
		assert.True(t, memberOf(p, s).Drained)
		begun := time.Now()
		require.NoError(t, s.Stop(pgtest.Smart))
		took = time.Since(begun)
		assert.Less(t, took, 3*time.Second, s.Name()) // the next look, at which a monitor may leave, is four seconds away
		return took
	}
	require.ErrorIs(t, p.Drain(ctx, c.Primary().Addr()), ErrIsPrimary)
	require.ErrorIs(t, p.Drain(ctx, "nobody:5432"), ErrUnknownName)
	assert.False(t, memberOf(p, c.Primary()).Drained)
	for _, replica := range c.Standbys() {
		require.NoError(t, p.Drain(ctx, replica.Addr()))
		took := halt(replica)
		require.NoError(t, replica.Start())
		waitFor(t, replica.Name()+" to be well", 10*time.Second, func() bool { return memberOf(p, replica).Health == HealthUp })
		drained := memberOf(p, replica)
		readers.reach(t, 200)
		assert.Equal(t, drained.Reads, memberOf(p, replica).Reads, "it is well, and drained")
		require.NoError(t, p.Resume(replica.Addr()))
		waitFor(t, "its reads", 10*time.Second, func() bool { return memberOf(p, replica).Reads > drained.Reads })
		t.Logf("%s: its smart shutdown took %v", replica.Name(), took.Round(time.Millisecond))
	}

	old, next, third := c.Primary(), c.Standbys()[0], c.Standbys()[1]
	begun := time.Now()
	require.NoError(t, drainPrimary(p, ctx))
	waitFor(t, "writers that wait", 20*time.Second, func() bool { return p.Status().Waiting == 20 })
	drained := time.Now()
	require.NoError(t, c.WaitCaughtUp(ctx))
	took := halt(old)
	require.NoError(t, next.Promote())
	primaryIs(t, p, next.Addr())
	writers.reach(t, 100)
	held := l.firstAfter(drained).Sub(begun)
	require.NoError(t, third.Follow(next))
	require.NoError(t, old.Follow(next))
	waitFor(t, "the old primary as a replica", 15*time.Second, func() bool {
		ps := memberOf(p, old)
		return ps.Role == RoleReplica && ps.Health == HealthUp
	})
	before := memberOf(p, old)
	assert.True(t, before.Drained)
	assert.False(t, before.Serves)
	require.NoError(t, p.Resume(old.Addr()))
	waitFor(t, "its reads", 10*time.Second, func() bool { return memberOf(p, old).Reads > before.Reads })

	writes, _ := writers.dismiss()
	reads, failed := readers.dismiss()
	assert.Empty(t, failed)
	assert.Empty(t, l.failed)
	assert.Empty(t, l.unknown)
	assert.Zero(t, l.settle(t, next), "acknowledged entries lost")
	assert.Len(t, l.written, int(writes))
	for _, ps := range p.Status().Peers {
		assert.False(t, ps.Drained, ps.Name)
	}
	t.Logf("%d reads, %d writes, 0 failed; writes were held for %v; the primary's smart shutdown took %v",
		reads, writes, held.Round(time.Millisecond), took.Round(time.Millisecond))
}

// A call that has chosen its server before a drain and comes to it afterwards goes elsewhere, or waits: nothing runs on a
// server that Drain has said to be free.
func TestACallThatComesLateToADrainedServerGoesElsewhere(t *testing.T) {
	t.Parallel()
	c := pgtest.Start(t, pgtest.Options{Standbys: 2})
	l := newLedger(t, c)
	var late atomic.Pointer[lateness]
	hooks := &Hooks{Routed: func(_ context.Context, d Decision) {
		if stop := late.Load(); stop != nil && d.Peer == stop.peer && d.Attempt == 1 {
			stop.chosen <- struct{}{}
			<-stop.drained
		}
	}}
	p := openPool(t, Options{Hooks: hooks, Wait: 20 * time.Second}, c.ConnString("pool_max_conns=5"))
	waitUp(t, p)
	ctx := testContext(t)
	replica, primary := c.Standbys()[0], c.Primary()
	fillPool(t, p, replica, 5)
	fillPool(t, p, primary, 5)
	sessions := func(s *pgtest.Server) int64 {
		n, err := s.Int(ctx, "select count(*) from pg_stat_activity where backend_type = 'client backend' and pid <> pg_backend_pid()")
		require.NoError(t, err)
		return n
	}

	stop := newLateness(replica)
	late.Store(stop)
	ports := make(chan uint16, 1)
	go func() {
		var port uint16
		for port == 0 || memberOf(p, replica).Reads == 0 { // until one has chosen it
			if !assert.NoError(t, p.QueryRow(ctx, portServing).Scan(&port)) {
				break
			}
		}
		ports <- port
	}()
	<-stop.chosen
	require.NoError(t, p.Drain(ctx, replica.Addr()))
	waitFor(t, "no session on the replica", 20*time.Second, func() bool { return sessions(replica) == 0 })
	close(stop.drained)
	assert.Equal(t, c.Standbys()[1].Port(), <-ports)
	require.NoError(t, p.Resume(replica.Addr()))

	stop = newLateness(primary)
	late.Store(stop)
	written := make(chan error, 1)
	go func() { written <- l.write(p)(ctx) }()
	<-stop.chosen
	require.NoError(t, drainPrimary(p, ctx))
	waitFor(t, "no session on the primary", 20*time.Second, func() bool { return sessions(primary) == 0 })
	close(stop.drained)
	waitFor(t, "the write to wait", 10*time.Second, func() bool { return p.Status().Waiting == 1 })
	assert.Zero(t, entriesFrom(t, primary, 1))
	late.Store(nil)
	require.NoError(t, p.Resume(primary.Addr()))
	<-written
	assert.Len(t, l.written, 1)
	assert.Empty(t, l.unknown)
	assert.Empty(t, l.failed)
}

// lateness is a call that stops between its choice of a peer and the peer.
type lateness struct {
	peer    string
	chosen  chan struct{}
	drained chan struct{}
}

func newLateness(s *pgtest.Server) *lateness {
	return &lateness{s.Addr(), make(chan struct{}), make(chan struct{})}
}

// Two poolers in front of one server are equals: one is paused, then killed, then started again, and reads and writes go on
// through the other.
func TestTwoPoolersOfOneServerAreEquals(t *testing.T) {
	t.Parallel()
	c := pgtest.Start(t, pgtest.Options{})
	must(t, c, "create table ledger (id bigint)", "insert into ledger values (0)")
	one, other := pgtest.StartPooler(t, c.Primary(), nil), pgtest.StartPooler(t, c.Primary(), nil)
	l := &ledger{written: map[int64]time.Time{}, unknown: map[int64]error{}, failed: map[string]int{}}
	p := openPool(t, Options{Mode: ModeEquivalent, Route: Route{Retry: RetryReads}, Peers: []Peer{
		{Name: "one", Host: one.Host(), Port: one.Port(), Proxy: true}, {Name: "other", Host: other.Host(), Port: other.Port(), Proxy: true},
	}}, c.ConnString("pool_max_conns=15", "default_query_exec_mode=exec"))
	waitUp(t, p)
	readers, writers := gather(20, reading(p)), gather(20, l.write(p))
	counted := func() PeerStatus { return p.Status().Peers[0] }
	inUse := func() bool {
		before := counted()
		writers.reach(t, 200)
		now := counted()
		return now.Health == HealthUp && now.Reads > before.Reads && now.Writes > before.Writes
	}
	waitFor(t, "both to serve", 20*time.Second, inUse)
	for name, fault := range map[string]struct{ strike, mend func() error }{
		"paused": {one.Pause, one.Resume},
		"killed": {one.Kill, one.Start},
	} {
		require.NoError(t, fault.strike(), name)
		waitFor(t, name, 10*time.Second, func() bool { return counted().Health == HealthDown })
		waitFor(t, name+": nobody to be sent there", 20*time.Second, func() bool { // who chose it before may be counted after
			before := counted().Reads
			readers.reach(t, 200)
			writers.reach(t, 100)
			return counted().Reads == before
		})
		require.NoError(t, fault.mend(), name)
		waitFor(t, name+": its return", 30*time.Second, inUse)
	}
	_, failed := readers.dismiss()
	assert.Empty(t, failed)
	writers.dismiss()
	assert.Empty(t, l.failed)
	assert.LessOrEqual(t, len(l.unknown), 2*15, "those in flight")
	assert.Zero(t, l.settle(t, c.Primary()))
	assert.Empty(t, p.Status().Rivals, "nobody is a rival among equals")
}
