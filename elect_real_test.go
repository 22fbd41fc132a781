package multipool

import (
	"context"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/pgmultipool/multipool/internal/pgfake"
	"github.com/pgmultipool/multipool/internal/pgtest"
)

// writesTo waits until a write ends on a server.
func writesTo(t testing.TB, p *MultiPool, s *pgtest.Server) {
	t.Helper()
	waitFor(t, "a write to "+s.Name(), 20*time.Second, func() bool {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		var port uint16
		err := p.QueryRow(WithPrimary(ctx), "insert into ledger values (1) returning inet_server_port()").Scan(&port)
		return err == nil && port == s.Port()
	})
}

// One server by two names is written to and read, and Status says that it is one.
func TestARealServerUnderTwoNames(t *testing.T) {
	t.Parallel()
	c := pgtest.Start(t, pgtest.Options{Standbys: 1})
	must(t, c, "create table ledger (id bigint)")
	primary, standby := c.Servers()[0], c.Servers()[1]
	named := func(name, host string, s *pgtest.Server) Peer { return Peer{Name: name, Host: host, Port: s.Port()} }
	p := openPool(t, Options{Peers: []Peer{
		named("p1", "127.0.0.1", primary), named("p2", "localhost", primary),
		named("s1", "127.0.0.1", standby), named("s2", "localhost", standby),
	}}, c.ConnString("multipool_wait=2s"))
	writesTo(t, p, primary)
	waitUp(t, p)
	waitFor(t, "both to be known for one", 10*time.Second, func() bool {
		s := p.Status()
		return s.Primary == "p1" && s.Peers[1].SameAs == "p1" && s.Peers[3].SameAs == "s1"
	})
	s := p.Status()
	assert.Empty(t, s.Rivals)
	assert.Equal(t, WhySameServer, s.Peers[3].Unfit)
	for range 20 {
		var port uint16
		require.NoError(t, p.QueryRow(testContext(t), "select inet_server_port()").Scan(&port))
		require.Equal(t, standby.Port(), port)
	}
	for i, ps := range p.Status().Peers {
		if i%2 == 1 {
			assert.Zero(t, ps.Reads+ps.Writes, "%s has no share of its own", ps.Name)
		}
	}
	var port uint16
	require.NoError(t, p.QueryRow(WithPeer(testContext(t), "s2"), "select inet_server_port()").Scan(&port), "a call that names it")
	require.Equal(t, standby.Port(), port)
	for name, want := range map[string]bool{"p2": true, "s1": false} { // a session by one name is seen by the other, or is not
		m := newMonitor(p.named("p1"), &p.config)
		r := m.reach(testContext(t))
		require.NoError(t, r.err)
		m.conn = r.conn
		one, err := m.seenFrom(testContext(t), p.named(name))
		m.hangUp()
		require.NoError(t, err)
		require.Equal(t, want, one, name)
	}
}

// A replica is promoted by mistake, thrown away, and rebuilt from the primary, which never went away.
func TestAMistakenPromotionIsTakenBack(t *testing.T) {
	t.Parallel()
	c := pgtest.Start(t, pgtest.Options{Standbys: 2})
	must(t, c, "create table ledger (id bigint)")
	s := c.Servers()
	p := openPool(t, Options{}, c.ConnString("multipool_wait=2s"))
	waitUp(t, p)
	writesTo(t, p, s[0])
	require.NoError(t, s[1].Promote())
	primaryIs(t, p, s[1].Addr())
	require.ErrorContains(t, p.Forget(s[1].Addr()), "writes go to "+s[1].Addr(), "it answers, and shows it")
	require.NoError(t, s[1].Stop(pgtest.Fast))
	_, err := p.Exec(testContext(t), "insert into ledger values (1)")
	require.ErrorIs(t, err, ErrNoPrimary, "somebody may have it")
	require.NoError(t, s[1].Follow(s[0]))
	writesTo(t, p, s[0])
}

// The same, and the promoted server is gone for good: the operator says so.
func TestTheOperatorHasATimelineForgotten(t *testing.T) {
	t.Parallel()
	c := pgtest.Start(t, pgtest.Options{Standbys: 2})
	must(t, c, "create table ledger (id bigint)")
	s := c.Servers()
	events := &primaryEvents{}
	p := openPool(t, Options{Hooks: events.hooks()}, c.ConnString("multipool_wait=1s"))
	waitUp(t, p)
	require.NoError(t, s[1].Promote())
	primaryIs(t, p, s[1].Addr())
	require.NoError(t, s[1].Kill())
	waitFor(t, "it to be down", 10*time.Second, func() bool { return p.Status().Peers[1].Health == HealthDown })
	_, err := p.Exec(testContext(t), "insert into ledger values (1)")
	require.ErrorIs(t, err, ErrNoPrimary)
	require.ErrorIs(t, p.Forget("nobody"), ErrUnknownName)
	require.NoError(t, p.Forget(s[1].Addr()))
	writesTo(t, p, s[0])
	waitFor(t, "the event", 10*time.Second, func() bool {
		for _, e := range events.list() {
			if e.Forgotten == s[1].Addr() {
				return e.Primary == s[0].Addr() || e.NextPrimary == s[0].Addr()
			}
		}
		return false
	})
}

// The server that was promoted first hangs, and another is promoted to the same timeline.
func TestASecondFailoverToTheSameTimeline(t *testing.T) {
	t.Parallel()
	c := pgtest.Start(t, pgtest.Options{Standbys: 2})
	must(t, c, "create table ledger (id bigint)")
	s := c.Servers()
	p := openPool(t, Options{}, c.ConnString("multipool_wait=5s"))
	waitUp(t, p)
	require.NoError(t, s[0].Kill())
	require.NoError(t, s[1].Promote())
	writesTo(t, p, s[1])
	require.NoError(t, s[1].Freeze())
	require.NoError(t, s[2].Promote())
	writesTo(t, p, s[2])
	require.NoError(t, s[1].Thaw())
	waitFor(t, "the first to be announced", 10*time.Second, func() bool { return len(p.Status().Rivals) == 1 })
	writesTo(t, p, s[2])
}

// An upgrade makes a new cluster of the primary, and its replica is away meanwhile.
func TestAnUpgradeWhileTheReplicaIsAway(t *testing.T) {
	bubble(t, 1, nil, func(ctx context.Context, x *fakes) {
		_, err := x.pool.Exec(ctx, "insert into t values (1)")
		require.NoError(t, err)
		x.replicas[0].Die()
		time.Sleep(10 * time.Second)
		x.primary.Die()
		time.Sleep(10 * time.Second)
		x.primary.Handle(func(s pgfake.Statement) *pgfake.Response {
			if asksLook(s) {
				return lookAnswer(s, sight{role: RolePrimary, system: 2, timeline: 1, position: 8192})
			}
			return nil
		})
		x.primary.Revive()
		begun := time.Now()
		for err = ErrNoPrimary; err != nil && time.Since(begun) < 5*time.Minute; time.Sleep(time.Second) {
			_, err = x.pool.Exec(ctx, "insert into t values (1)")
		}
		require.NoError(t, err)
		assert.Greater(t, time.Since(begun), 30*time.Second, "the replica's word has not aged before")
		assert.Less(t, time.Since(begun), 90*time.Second)
	})
}
