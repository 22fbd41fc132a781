package multipool

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/jackc/puddle/v2"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/pgmultipool/multipool/internal/pgfake"
	"github.com/pgmultipool/multipool/internal/pgtest"
)

// start puts another fake into the bubble's network.
func (x *fakes) start(name string) *pgfake.Peer {
	p := pgfake.New(pgfake.Options{Standby: true})
	p.Handle(answering(nil))
	x.network[name+":5432"] = p
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
		assert.InDelta(t, 100, x.served(ctx, 300)["replica3:5432"], 40)

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
		require.ErrorIs(t, x.pool.AddPeer(Peer{Host: "replica1"}), puddle.ErrClosedPool)
		require.ErrorIs(t, x.pool.RemovePeer(ctx, "primary:5432"), puddle.ErrClosedPool)
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
	p := openPool(t, Config{}, "postgres://app@127.0.0.1:1/app")
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
	bubble(t, 2, func(c *Config) {
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
		time.Sleep(12 * time.Second)
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
		assert.Equal(t, []string{"replica2:5432"}, names())
		assert.Contains(t, x.pool.Status().Discovery.Err, "64")
	})
}

// A name server that does not answer holds nobody up for long: the configured peers do.
func TestADiscoveryThatHangsHoldsNobodyUp(t *testing.T) {
	bubble(t, 1, func(c *Config) {
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
	p := openPool(t, Config{CheckInterval: interval}, s[0].ConnString("multipool_discover=replication"))
	reads := gather(10, func(ctx context.Context) error { return p.QueryRow(ctx, "select 1").Scan(new(int)) })
	serves := func(server *pgtest.Server) func() bool {
		return func() bool {
			before := memberOf(p, server).Reads
			reads.reach(t, 200)
			return memberOf(p, server).Reads > before
		}
	}
	waitFor(t, "the first two", 5*time.Second, func() bool { return serves(s[1])() && serves(s[2])() })
	assert.Len(t, p.Status().Peers, 3)

	require.NoError(t, fourth.Start())
	begun := time.Now()
	waitFor(t, "the fourth", 10*time.Second, serves(fourth))
	t.Logf("the fourth serves reads %v after its start", time.Since(begun).Round(time.Millisecond))
	if !raceEnabled {
		assert.Less(t, time.Since(begun), 2*interval+time.Second)
	}
	require.NoError(t, gone.Stop(pgtest.Fast))
	waitFor(t, "it to be forgotten", 10*time.Second, func() bool { return memberOf(p, gone).Name == "" })
	_, failed := reads.dismiss()
	assert.Empty(t, failed)
	_, err := p.Exec(testContext(t), "create table t (n int)")
	require.NoError(t, err)
}

func TestPeersAtTheAddressesOfANameAreFoundAndUsed(t *testing.T) {
	c := pgtest.Start(t, pgtest.Options{Standbys: 2})
	var records []*net.SRV
	for _, s := range c.Servers() {
		records = append(records, &net.SRV{Target: s.Host(), Port: s.Port()})
	}
	lookUpIn(t, &names{srv: map[string][]*net.SRV{"db.test": records}})
	p := openPool(t, Config{}, "postgres://postgres@db.test/postgres?sslmode=disable&multipool_discover=srv")
	primaryIs(t, p, c.Primary().Addr())
	waitUp(t, p)
	assert.Len(t, p.Status().Peers, 3)
	_, err := p.Exec(testContext(t), "create table t (n int)")
	require.NoError(t, err)
}
