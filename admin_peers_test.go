package multipool

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/pgmultipool/multipool/internal/pgfake"
	"github.com/pgmultipool/multipool/internal/pgtest"
)

// start puts another fake into the bubble's network.
func (x *fakes) start(name string) *pgfake.Peer {
	p := pgfake.New(pgfake.Options{Standby: true})
	p.Handle(answering(nil))
	x.plug(name+":5432", p)
	return p
}

func (x *fakes) served(ctx context.Context, n int) map[string]int {
	by := map[string]int{}
	for range n {
		by[x.read(ctx)]++
	}
	return by
}

func TestAPeerThatIsAddedIsUsedGentlyAndOneThatIsRemovedNoMore(t *testing.T) {
	bubble(t, 2, nil, func(ctx context.Context, x *fakes) {
		settled()
		added := x.start("replica3")
		require.ErrorContains(t, x.pool.AddPeer(Peer{}), "neither Host nor ConnString")
		require.ErrorContains(t, x.pool.AddPeer(Peer{Host: "replica1"}), "replica1:5432 is given twice")
		require.ErrorIs(t, x.pool.RemovePeer(ctx, "replica3:5432"), ErrUnknownName)
		_, err := x.pool.Query(WithPeer(ctx, "replica3:5432"), "select 1")
		require.ErrorIs(t, err, ErrUnknownName)

		require.NoError(t, x.pool.AddPeer(Peer{Host: "replica3"}))
		settled()
		at := WithPeer(ctx, "replica3:5432")
		assert.Equal(t, "replica3:5432", x.read(at))
		assert.Less(t, x.served(ctx, 300)["replica3:5432"], 60, "a tenth of its share at first")
		time.Sleep(11 * time.Second)
		requireShare(t, x.served(ctx, 300)["replica3:5432"], 300, 1./3, "then a whole one")

		held, err := x.pool.Acquire(at)
		require.NoError(t, err)
		soon, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		require.ErrorIs(t, x.pool.RemovePeer(soon, "replica3:5432"), context.DeadlineExceeded)
		added.ResetCounters()
		x.served(ctx, 50)
		assert.Zero(t, added.Count("select 1"))
		_, err = held.Exec(ctx, "select 1")
		require.NoError(t, err, "what the program holds goes on")
		held.Release()
		time.Sleep(time.Second)
		settled()
		assert.Zero(t, added.Conns())
		soon, cancel = context.WithTimeout(ctx, time.Second)
		defer cancel()
		_, err = x.pool.Query(WithPeer(soon, "replica3:5432"), "select 1")
		require.Error(t, err)
		require.NotErrorIs(t, err, ErrUnknownName, "it was known")
		require.Nil(t, x.pool.PeerPool("replica3:5432"))

		reads := x.peer("replica1").Reads
		require.NoError(t, x.pool.RemovePeer(ctx, "replica1:5432"))
		require.NoError(t, x.pool.AddPeer(Peer{Host: "replica1"}))
		settled()
		assert.Equal(t, reads, x.peer("replica1").Reads, "a name keeps its counters")

		require.ErrorIs(t, x.pool.RemovePeer(ctx, "primary:5432"), ErrIsPrimary)
		require.NoError(t, x.pool.RemovePeer(ctx, "replica1:5432"))
		require.NoError(t, x.pool.RemovePeer(ctx, "replica2:5432"))
		require.ErrorContains(t, x.pool.RemovePeer(ctx, "primary:5432"), "primary")
		x.pool.Close()
		require.ErrorIs(t, x.pool.AddPeer(Peer{Host: "replica1"}), ErrClosedPool)
		require.ErrorIs(t, x.pool.RemovePeer(ctx, "primary:5432"), ErrClosedPool)
	})
}

// A removal between a call's choice and its acquire costs the call nothing.
func TestPeersComeAndGoUnderCalls(t *testing.T) {
	bubble(t, 2, nil, func(ctx context.Context, x *fakes) {
		settled()
		stop := make(chan struct{})
		var callers sync.WaitGroup
		for range 20 {
			callers.Go(func() {
				for {
					select {
					case <-stop:
						return
					case <-time.After(time.Millisecond):
					}
					var n int
					assert.NoError(t, x.pool.QueryRow(ctx, "select 1").Scan(&n))
				}
			})
		}
		for range 50 {
			require.NoError(t, x.pool.RemovePeer(ctx, "replica1:5432"))
			time.Sleep(20 * time.Millisecond)
			require.NoError(t, x.pool.AddPeer(Peer{Host: "replica1"}))
			time.Sleep(20 * time.Millisecond)
		}
		close(stop)
		callers.Wait()
	})
}

func TestAPoolOfOnePeerHasNoOtherEver(t *testing.T) {
	t.Parallel()
	p := openPool(t, Options{}, "postgres://app@127.0.0.1:1/app")
	require.Error(t, p.AddPeer(Peer{Host: "other"}))
	require.Error(t, p.RemovePeer(t.Context(), "127.0.0.1:1"))
	require.Error(t, p.Drain(t.Context(), "127.0.0.1:1"))
}

// The list decides: who is new in it comes, who is missing goes, but not the primary; an error or an empty list changes
// nothing, and is told.
func TestAPoolFollowsWhatIsDiscovered(t *testing.T) {
	var mu sync.Mutex
	found, failure := []Peer{{Host: "primary"}, {Host: "replica1"}}, error(nil)
	say := func(err error, hosts ...string) {
		mu.Lock()
		defer mu.Unlock()
		failure, found = err, nil
		for _, h := range hosts {
			found = append(found, Peer{Host: h})
		}
	}
	bubble(t, 2, func(c *Options) {
		c.Discover = func(context.Context) ([]Peer, error) {
			mu.Lock()
			defer mu.Unlock()
			return slices.Clone(found), failure
		}
	}, func(ctx context.Context, x *fakes) {
		names := func() (all []string) {
			for _, ps := range x.pool.Status().Peers {
				all = append(all, ps.Name)
			}
			slices.Sort(all)
			return all
		}
		settled()
		assert.Equal(t, []string{"primary:5432", "replica1:5432"}, names(), "before anybody was looked at")
		assert.Equal(t, 2, x.pool.Status().Discovery.Peers)
		assert.Zero(t, x.replicas[1].Dials())
		x.start("replica3")
		say(nil, "primary", "replica1", "replica2", "replica3", "replica3")
		time.Sleep(6 * time.Second)
		assert.Len(t, names(), 4)
		say(errors.New("no name server"))
		time.Sleep(12 * time.Second)
		assert.Len(t, names(), 4)
		assert.Contains(t, x.pool.Status().Discovery.Err, "no name server")
		say(nil)
		time.Sleep(12 * time.Second)
		assert.Len(t, names(), 4)
		assert.NotEmpty(t, x.pool.Status().Discovery.Err)
		say(nil, "replica2")
		time.Sleep(20 * time.Second)
		assert.Equal(t, []string{"primary:5432", "replica2:5432"}, names(), "the primary stays while it serves")
		assert.Equal(t, "replica2:5432", x.read(ctx))
		x.primary.Die()
		time.Sleep(12 * time.Second)
		assert.Equal(t, []string{"replica2:5432"}, names())
		var many []string
		for i := range maxDiscovered + 1 {
			many = append(many, fmt.Sprintf("host%d", i))
		}
		say(nil, many...)
		time.Sleep(12 * time.Second)
		assert.Contains(t, x.pool.Status().Discovery.Err, "64")
		assert.Equal(t, []string{"primary:5432", "replica1:5432", "replica2:5432"}, names(), "nobody takes writes, so the configured ones are tried again")
	})
}

func TestADiscoveryThatFindsAConnectionStringDoesNotTellIt(t *testing.T) {
	const secret = "Kq7wZx93Vt"
	list := &peerList{}
	list.say(nil, "primary", "postgres://app:"+secret+"@replica1/app")
	bubble(t, 1, func(c *Options) { c.Discover = list.discover }, func(ctx context.Context, x *fakes) {
		x.read(ctx)
		status, err := json.Marshal(x.pool.Status())
		require.NoError(t, err)
		assert.Contains(t, x.pool.Status().Discovery.Err, "peer #2: its Host must be")
		assert.NotContains(t, string(status), secret)
		list.mu.Lock()
		list.found = []Peer{{Host: "primary"}, {}}
		list.mu.Unlock()
		time.Sleep(2 * time.Second)
		assert.Contains(t, x.pool.Status().Discovery.Err, "peer #2: neither Host nor ConnString")
	})
}

// A name server that does not answer holds nobody up for long: the configured peers do.
func TestADiscoveryThatHangsHoldsNobodyUp(t *testing.T) {
	bubble(t, 1, func(c *Options) {
		c.Discover = func(ctx context.Context) ([]Peer, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		}
	}, func(ctx context.Context, x *fakes) {
		begun := time.Now()
		assert.Equal(t, "replica1:5432", x.read(ctx))
		assert.LessOrEqual(t, time.Since(begun), discoverPatience+time.Second)
	})
}

// A fourth replica is started and one stopped for good, and reads follow, on a real cluster by its own pg_stat_replication.
func TestReadsFollowTheReplicationOfThePrimary(t *testing.T) {
	t.Parallel()
	c := pgtest.Start(t, pgtest.Options{Standbys: 3})
	s := c.Servers()
	for _, standby := range s[1:] {
		require.NoError(t, standby.Exec(testContext(t), fmt.Sprintf(
			"alter system set primary_conninfo = 'host=127.0.0.1 port=%d user=postgres sslmode=disable application_name=%s'", s[0].Port(), standby.Addr())))
		require.NoError(t, standby.Exec(testContext(t), "select pg_reload_conf()"))
	}
	const interval = 500 * time.Millisecond
	fourth, gone := s[3], s[1]
	require.NoError(t, fourth.Stop(pgtest.Fast))
	p := openPool(t, Options{CheckInterval: interval}, s[0].ConnString("multipool_discover=replication"))
	reads := gather(10, func(ctx context.Context) error { return p.QueryRow(ctx, "select 1").Scan(new(int)) })
	serves := func(server *pgtest.Server) func() bool {
		return func() bool {
			before := memberOf(p, server).Reads
			reads.reach(t, 200)
			return memberOf(p, server).Reads > before
		}
	}
	waitFor(t, "the first two", 20*time.Second, func() bool { return serves(s[1])() && serves(s[2])() })
	// A receiver that has just read its new name may be missing in the primary's view, and the fourth's sender be there.
	waitFor(t, "three peers", 10*time.Second, func() bool { return len(p.Status().Peers) == 3 })

	require.NoError(t, fourth.Start())
	begun := time.Now()
	waitFor(t, "the fourth", 20*time.Second, serves(fourth))
	t.Logf("the fourth serves reads %v after its start", time.Since(begun).Round(time.Millisecond))
	if !raceEnabled {
		assert.Less(t, time.Since(begun), 2*interval+time.Second)
	}
	require.NoError(t, gone.Stop(pgtest.Fast))
	waitFor(t, "it to be forgotten", 20*time.Second, func() bool { return memberOf(p, gone).Name == "" })
	_, failed := reads.dismiss()
	assert.Empty(t, failed)
	_, err := p.Exec(testContext(t), "create table t (n int)")
	require.NoError(t, err)
}

// A program that only reads finds the standbys too: that they are asked for at the primary is none of its routes.
func TestReplicationIsDiscoveredWhateverTheProgramsRoute(t *testing.T) {
	for _, route := range []Route{
		{Target: TargetReplica}, {Target: TargetPreferReplica}, {Target: TargetAny}, {Target: TargetPrimary},
		{Peers: []string{"replica1:5432"}}, {Target: TargetReplica, Peers: []string{"replica1:5432"}},
		{Target: TargetReplica, MaxLag: Lag{Time: time.Second}},
	} {
		bubble(t, 1, func(c *Options) {
			c.Discover, c.Route, c.CheckInterval = DiscoverReplication(), route, time.Second
		}, func(ctx context.Context, x *fakes) {
			x.primary.Handle(answering(func(s pgfake.Statement) *pgfake.Response {
				if s.SQL != standbysOf {
					return nil
				}
				text := func(name string) pgfake.Column { return pgfake.Column{Name: name, OID: pgfake.TextOID} }
				return &pgfake.Response{
					Columns: []pgfake.Column{text("application_name"), text("host")},
					Rows:    [][]any{{"replica1:5432", nil}, {"replica2:5432", nil}},
				}
			}))
			time.Sleep(20 * time.Second)
			assert.Empty(t, x.pool.Status().Discovery.Err, "%+v", route)
			assert.NotNil(t, x.pool.PeerPool("replica2:5432"), "%+v", route)
		})
	}
}

func TestPeersAtTheAddressesOfANameAreFoundAndUsed(t *testing.T) {
	c := pgtest.Start(t, pgtest.Options{Standbys: 2})
	var records []*net.SRV
	for _, s := range c.Servers() {
		records = append(records, &net.SRV{Target: s.Host(), Port: s.Port()})
	}
	lookUpIn(t, &names{srv: map[string][]*net.SRV{"db.test": records}})
	p := openPool(t, Options{}, "postgres://postgres@db.test/postgres?sslmode=disable&multipool_discover=srv")
	primaryIs(t, p, c.Primary().Addr())
	waitUp(t, p)
	assert.Len(t, p.Status().Peers, 3)
	_, err := p.Exec(testContext(t), "create table t (n int)")
	require.NoError(t, err)
}

// peerList is what a Discover says.
type peerList struct {
	mu    sync.Mutex
	found []Peer
	err   error
}

func (l *peerList) say(err error, hosts ...string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.found, l.err = nil, err
	for _, h := range hosts {
		l.found = append(l.found, Peer{Host: h})
	}
}

func (l *peerList) discover(context.Context) ([]Peer, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.found), l.err
}

func TestAPeerIsRemovedFromThePoolsThatFollowToo(t *testing.T) {
	bubble(t, 2, nil, func(ctx context.Context, x *fakes) {
		settled()
		one, err := x.pool.ReplicaPool().Acquire(ctx)
		require.NoError(t, err)
		other, err := x.pool.ReplicaPool().Acquire(ctx)
		require.NoError(t, err)
		one.Release()
		other.Release()
		soon, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		require.NoError(t, x.pool.RemovePeer(soon, "replica1:5432"))
		settled()
		assert.Zero(t, x.replicas[0].Conns())
	})
}

// The name server fails at first, so the configured name is used; then it tells addresses, which are the same servers by
// other names. The pool goes over to them.
func TestConfiguredNamesGiveWayToDiscoveredAddresses(t *testing.T) {
	var l peerList
	l.say(errors.New("temporary failure in name resolution"))
	bubble(t, 1, func(c *Options) { c.Discover = l.discover }, func(ctx context.Context, x *fakes) {
		_, err := x.pool.Exec(ctx, "insert into t values (1)")
		require.NoError(t, err)
		l.say(nil, "also-primary", "also-replica1")
		time.Sleep(time.Minute)
		_, err = x.pool.Exec(ctx, "insert into t values (1)")
		require.NoError(t, err)
		assert.Equal(t, "also-primary:5432", x.pool.Status().Primary)
		assert.Empty(t, x.pool.Status().Rivals)
	})
}

// The primary's view is empty for a moment, as after its restart; then it dies, and a standby that the pool was opened with
// is promoted.
func TestAPoolIsNotStrandedByAViewThatWasEmptyForAMoment(t *testing.T) {
	for _, empty := range []time.Duration{7 * time.Second, time.Minute} {
		var mu sync.Mutex
		standbys := []string{"replica1:5432", "replica2:5432"}
		view := func(s pgfake.Statement) *pgfake.Response {
			if s.SQL != standbysOf {
				return nil
			}
			mu.Lock()
			defer mu.Unlock()
			r := &pgfake.Response{Columns: []pgfake.Column{{Name: "a", OID: pgfake.TextOID}, {Name: "h", OID: pgfake.TextOID}}}
			for _, name := range standbys {
				r.Rows = append(r.Rows, []any{name, nil})
			}
			return r
		}
		bubble(t, 2, func(c *Options) { c.Discover = DiscoverReplication() }, func(ctx context.Context, x *fakes) {
			x.primary.Handle(answering(view))
			time.Sleep(20 * time.Second)
			mu.Lock()
			standbys = nil
			mu.Unlock()
			time.Sleep(empty)
			x.primary.Die()
			x.replicas[0].Promote()
			time.Sleep(10 * time.Second)
			_, err := x.pool.Exec(ctx, "insert into t values (1)")
			require.NoError(t, err)
			assert.Equal(t, "replica1:5432", x.pool.Status().Primary)
		})
	}
}

// What is discovered at first is nobody, and then discovery fails.
func TestAPoolThatNeverHadAPrimaryTriesTheConfiguredPeersAgain(t *testing.T) {
	var l peerList
	l.say(nil, "ghost")
	bubble(t, 2, func(c *Options) { c.Discover = l.discover }, func(ctx context.Context, x *fakes) {
		time.Sleep(3 * time.Second)
		l.say(errors.New("the name server is down"))
		time.Sleep(time.Minute)
		_, err := x.pool.Exec(ctx, "insert into t values (1)")
		require.NoError(t, err)
	})
}

// A pool of replicas has none, and does not miss it at the first look-up that fails.
func TestAPoolOfReplicasKeepsToWhatWasDiscovered(t *testing.T) {
	var l peerList
	l.say(nil, "replica1", "replica2")
	bubble(t, 2, func(c *Options) { c.Discover = l.discover }, func(ctx context.Context, x *fakes) {
		names := func() (all []string) {
			for _, ps := range x.pool.Status().Peers {
				all = append(all, ps.Name)
			}
			return all
		}
		time.Sleep(time.Minute)
		require.ElementsMatch(t, []string{"replica1:5432", "replica2:5432"}, names())
		l.say(errors.New("the name server is down"))
		time.Sleep(time.Minute)
		require.ElementsMatch(t, []string{"replica1:5432", "replica2:5432"}, names())
	})
}

func TestADrainedPeerIsKeptWhetherItIsFoundOrNot(t *testing.T) {
	var l peerList
	l.say(nil, "primary", "replica1", "replica2")
	bubble(t, 2, func(c *Options) { c.Discover = l.discover }, func(ctx context.Context, x *fakes) {
		time.Sleep(10 * time.Second)
		require.NoError(t, x.pool.Drain(ctx, "replica1:5432"))
		l.say(nil, "primary", "replica2")
		time.Sleep(time.Minute)
		assert.True(t, x.peer("replica1").Drained)
		require.NoError(t, x.pool.Resume("replica1:5432"))
		time.Sleep(time.Minute)
		assert.Equal(t, []string{"primary:5432", "replica2:5432"}, x.pool.names())
	})
}

func TestANameThatHasMovedIsFollowed(t *testing.T) {
	var mu sync.Mutex
	host := "replica1"
	bubble(t, 2, func(c *Options) {
		c.Discover = func(context.Context) ([]Peer, error) {
			mu.Lock()
			defer mu.Unlock()
			return []Peer{{Host: "primary"}, {Name: "pg-1", Host: host}}, nil
		}
	}, func(ctx context.Context, x *fakes) {
		time.Sleep(10 * time.Second)
		require.NoError(t, x.pool.QueryRow(WithPeer(ctx, "pg-1"), "select 1").Scan(new(int)))
		mu.Lock()
		host = "replica2"
		mu.Unlock()
		x.replicas[0].Die()
		time.Sleep(time.Minute)
		require.NoError(t, x.pool.QueryRow(WithPeer(ctx, "pg-1"), "select 1").Scan(new(int)))
		assert.Positive(t, x.replicas[1].Count("select 1"))
	})
}

func TestACallForAPeerThatIsStillToBeFoundWaitsForIt(t *testing.T) {
	var l peerList
	l.say(nil, "primary", "replica2")
	bubble(t, 2, func(c *Options) {
		c.Peers = []Peer{{Host: "primary"}}
		c.Discover = func(ctx context.Context) ([]Peer, error) { time.Sleep(20 * time.Millisecond); return l.discover(ctx) }
	}, func(ctx context.Context, x *fakes) {
		assert.Equal(t, "replica2:5432", x.read(WithPeer(ctx, "replica2:5432")))
	})
}

func TestADiscoveryThatHeedsNothingHoldsUpCloseAlone(t *testing.T) {
	bubble(t, 1, func(c *Options) {
		release := make(chan struct{})
		time.AfterFunc(time.Minute, func() { close(release) })
		c.Discover = func(context.Context) ([]Peer, error) { <-release; return nil, nil }
	}, func(ctx context.Context, x *fakes) {
		time.Sleep(4 * time.Second)
		x.read(ctx)
		begun := time.Now()
		x.pool.Close()
		assert.InDelta(t, 56, time.Since(begun).Seconds(), 1, "it has returned")
	})
}

func TestReplicasHasRoomForThoseThatCome(t *testing.T) {
	var l peerList
	l.say(nil, "primary", "replica1", "replica2")
	bubble(t, 2, func(c *Options) { c.Peers, c.Discover = []Peer{{Host: "primary"}}, l.discover }, func(ctx context.Context, x *fakes) {
		r := x.pool.ReplicaPool()
		time.Sleep(20 * time.Second)
		for range 20 { // ten on each
			c, err := r.Acquire(ctx)
			require.NoError(t, err)
			defer c.Release()
		}
		soon, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		_, err := r.Acquire(soon)
		require.ErrorIs(t, err, context.DeadlineExceeded, "and no more")
	})
}

// Reads that wait at the primary for a place go to a replica when there is one again.
func TestReadsThatWaitAtThePrimaryGoToAReplicaThatReturns(t *testing.T) {
	bubble(t, 1, nil, func(ctx context.Context, x *fakes) {
		settled()
		x.replicas[0].Die()
		time.Sleep(5 * time.Second)
		for range 7 {
			tx, err := x.pool.BeginTx(ctx, pgx.TxOptions{AccessMode: pgx.ReadOnly})
			require.NoError(t, err)
			defer func() { _ = tx.Rollback(ctx) }()
		}
		go func() { time.Sleep(2 * time.Second); x.replicas[0].Revive() }()
		begun := time.Now()
		tx, err := x.pool.BeginTx(ctx, pgx.TxOptions{AccessMode: pgx.ReadOnly})
		require.NoError(t, err)
		assert.Less(t, time.Since(begun), 5*time.Second)
		require.NoError(t, tx.Rollback(ctx))
	})
}

func TestAnOrderedPoolsPrimaryFollowsItsLeader(t *testing.T) {
	bubble(t, 2, func(c *Options) { c.Mode = ModeOrdered }, func(ctx context.Context, x *fakes) {
		settled()
		x.primary.Die()
		time.Sleep(10 * time.Second)
		require.NoError(t, x.pool.WaitForPrimary(ctx))
		require.NoError(t, x.pool.PrimaryPool().Ping(ctx))
	})
}

func TestHooksHearOfPeersThatComeAndGo(t *testing.T) {
	var mu sync.Mutex
	var heard []PeerEvent
	bubble(t, 2, func(c *Options) {
		c.Hooks = JoinHooks(c.Hooks, &Hooks{PeerChanged: func(e PeerEvent) {
			mu.Lock()
			defer mu.Unlock()
			heard = append(heard, e)
		}})
	}, func(ctx context.Context, x *fakes) {
		settled()
		mu.Lock()
		heard = nil
		mu.Unlock()
		require.NoError(t, x.pool.RemovePeer(ctx, "replica1:5432"))
		require.NoError(t, x.pool.AddPeer(Peer{Host: "replica1"}))
		settled()
		mu.Lock()
		defer mu.Unlock()
		var said []string
		for _, e := range heard {
			said = append(said, e.Peer+" "+e.To.String())
		}
		assert.Equal(t, []string{"replica1:5432 gone", "replica1:5432 unknown", "replica1:5432 up"}, said)
	})
}

// What receives the log and does not replay it is no replica.
func TestABackupIsNoPeer(t *testing.T) {
	t.Parallel()
	c := pgtest.Start(t, pgtest.Options{Standbys: 1})
	ctx := testContext(t)
	s := c.Servers()
	program, err := exec.LookPath("pg_receivewal")
	if err != nil {
		found, _ := filepath.Glob("/usr/lib/postgresql/*/bin/pg_receivewal")
		if len(found) == 0 {
			t.Skip("no pg_receivewal")
		}
		program = found[len(found)-1]
	}
	server, err := pgtest.Version()
	require.NoError(t, err)
	major, _, _ := strings.Cut(server, ".")
	if of, err := exec.Command(program, "--version").Output(); err != nil || !strings.Contains(string(of), " "+major+".") {
		t.Skipf("no pg_receivewal of PostgreSQL %s", major)
	}
	backup := exec.CommandContext(ctx, program, "-h", s[0].Host(), "-p", fmt.Sprint(s[0].Port()), "-U", "postgres", "-D", t.TempDir())
	require.NoError(t, backup.Start())
	defer func() { _ = backup.Process.Kill(); _ = backup.Wait() }()
	waitFor(t, "the backup", 10*time.Second, func() bool {
		n, err := s[0].Int(ctx, "select count(*) from pg_stat_replication where state = 'streaming'")
		return err == nil && n == 2
	})
	require.NoError(t, s[1].Exec(ctx, fmt.Sprintf(
		"alter system set primary_conninfo = 'host=127.0.0.1 port=%d user=postgres sslmode=disable application_name=%s'", s[0].Port(), s[1].Addr())))
	require.NoError(t, s[1].Exec(ctx, "select pg_reload_conf()"))
	p := openPool(t, Options{CheckInterval: 200 * time.Millisecond}, s[0].ConnString("multipool_discover=replication"))
	waitFor(t, "the standby", 10*time.Second, func() bool { return memberOf(p, s[1]).Serves })
	assert.Len(t, p.Status().Peers, 2)
}
