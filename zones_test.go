package multipool

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/pgmultipool/multipool/internal/pgtest"
)

// zoned makes peers a to d of a pool; those in away are of other zones, those in spare are of last resort.
func zoned(mode Mode, away, spare string) *topology {
	peers := idlePeers("a", "b", "c", "d")
	for _, p := range peers {
		p.away = strings.Contains(away, p.name)
		p.spare = strings.Contains(spare, p.name)
	}
	return newTopology(mode, peers, make([]Role, len(peers)))
}

// inTurn writes down whom a call would be sent to, attempt by attempt if all fail: who is drawn alike in one word, sorted.
func inTurn(top *topology, in intent) string {
	noted := tried{}
	var turns []string
	for !noted.full() {
		drawn := map[string]*peer{}
		for range 100 {
			if p, _ := top.pick(&in, &noted); p != nil {
				drawn[p.name] = p
			}
		}
		if len(drawn) == 0 {
			break
		}
		names := sortedKeys(drawn)
		turns = append(turns, strings.Join(names, ""))
		for _, name := range names {
			noted.add(drawn[name])
		}
	}
	return strings.Join(turns, " ")
}

func TestZonesAndNegativeWeightsOrderTheCandidates(t *testing.T) {
	t.Parallel()
	type all = []news
	cluster := all{primaryUp("a", 1), replicaUp("b"), replicaUp("c"), replicaUp("d")}
	equals := all{primaryUp("a", 1), primaryUp("b", 1), primaryUp("c", 1), primaryUp("d", 1)}
	with := func(base all, more ...news) all { return append(append(all{}, base...), more...) }
	read := intent{place: placeReads, reads: true, reason: ReasonRead}
	write := intent{place: placePrimary}
	replica := intent{place: placeReplica, reads: true}
	anyone := intent{place: placeAny, reads: true, reason: ReasonRead}
	for _, tc := range []struct {
		name        string
		mode        Mode
		away, spare string
		news        all
		in          intent
		want        string
	}{
		{"no zone", ModeReplicated, "", "", cluster, read, "bcd a"},
		{"the own zone, then others, then the primary", ModeReplicated, "cd", "", cluster, read, "b cd a"},
		{"the primary's zone is nothing to a read", ModeReplicated, "acd", "", cluster, read, "b cd a"},
		{"no replica is in the own zone", ModeReplicated, "bcd", "", cluster, read, "bcd a"},
		{"the own zone's is down", ModeReplicated, "cd", "", with(cluster, turned("b", HealthDown)), read, "cd a"},
		{"... suspected", ModeReplicated, "cd", "", with(cluster, turned("b", HealthSuspect)), read, "cd a"},
		{"... drained", ModeReplicated, "cd", "", with(cluster, drains("b")), read, "cd a"},
		{"... behind", ModeReplicated, "cd", "", with(cluster, finds("b", fitBehind)), read, "cd a"},
		{"... slow", ModeReplicated, "cd", "", with(cluster, news{"b", observation{slow: yes}}), read, "cd a"},
		{"all suspected", ModeReplicated, "cd", "", with(cluster, turned("a", HealthDown), turned("b", HealthSuspect), turned("c", HealthSuspect), turned("d", HealthSuspect)), read, "b cd"},
		{"a write has one way", ModeReplicated, "abc", "", cluster, write, "a"},
		{"a replica is insisted on", ModeReplicated, "cd", "", cluster, replica, "b cd"},
		{"anybody, with the primary", ModeReplicated, "cd", "", cluster, anyone, "ab cd"},
		{"anybody, without", ModeReplicated, "acd", "", cluster, anyone, "b acd"},

		{"a spare comes after the primary", ModeReplicated, "", "b", cluster, read, "cd a b"},
		{"... also where it is the last replica", ModeReplicated, "", "b", with(cluster, turned("c", HealthDown), turned("d", HealthDown)), read, "a b"},
		{"... and serves where nobody else can", ModeReplicated, "", "b", with(cluster, turned("a", HealthDown), turned("c", HealthDown), turned("d", HealthDown)), read, "b"},
		{"... before suspects", ModeReplicated, "", "b", with(cluster, turned("a", HealthDown), turned("c", HealthSuspect), turned("d", HealthSuspect)), read, "b"},
		{"a zone does not raise it", ModeReplicated, "cd", "b", cluster, read, "cd a b"},
		{"a replica is insisted on: at last the spare", ModeReplicated, "", "b", cluster, replica, "cd b"},
		{"... at once where there is no other", ModeReplicated, "", "bcd", cluster, replica, "bcd"},
		{"anybody: at last the spare", ModeReplicated, "", "b", cluster, anyone, "acd b"},
		{"a spare primary is not read while a replica can", ModeReplicated, "", "a", cluster, anyone, "bcd a"},
		{"... though for writes it is what it was", ModeReplicated, "", "a", cluster, write, "a"},
		{"... and is read where no replica can", ModeReplicated, "", "a", with(cluster, turned("b", HealthDown), turned("c", HealthDown), turned("d", HealthDown)), anyone, "a"},
		{"all are spares", ModeReplicated, "", "abcd", cluster, read, "bcd a"},
		{"a suspected spare, where there is nobody", ModeReplicated, "", "b", with(cluster, turned("a", HealthDown), turned("b", HealthSuspect), turned("c", HealthDown), turned("d", HealthDown)), read, "b"},

		{"equals: reads", ModeEquivalent, "cd", "", equals, read, "ab cd"},
		{"equals: writes", ModeEquivalent, "cd", "", equals, write, "ab cd"},
		{"equals: the own zone is down", ModeEquivalent, "cd", "", with(equals, turned("a", HealthDown), turned("b", HealthDown)), write, "cd"},
		{"equals: the own zone's are standbys", ModeEquivalent, "cd", "", with(equals, replicaUp("a"), replicaUp("b")), write, "cd"},
		{"equals: a spare", ModeEquivalent, "", "a", equals, read, "bcd a"},
		{"equals: a spare takes writes where nobody else can", ModeEquivalent, "", "a", with(equals, replicaUp("b"), replicaUp("c"), replicaUp("d")), write, "a"},
		{"equals: only spares", ModeEquivalent, "", "abcd", equals, read, "abcd"},

		{"ordered", ModeOrdered, "", "", cluster, read, "a"},
		{"ordered: the own zone first", ModeOrdered, "ab", "", cluster, read, "c"},
		{"ordered: writes with it", ModeOrdered, "ab", "", cluster, write, "c"},
		{"ordered: then others in their order", ModeOrdered, "ab", "", with(cluster, turned("c", HealthDown), turned("d", HealthDown)), read, "a"},
		{"ordered: a spare is the last", ModeOrdered, "b", "ad", cluster, read, "c"},
		{"ordered: ... of all", ModeOrdered, "b", "ad", with(cluster, turned("c", HealthDown), turned("b", HealthDown)), read, "a"},
		{"ordered: back to the own zone", ModeOrdered, "ab", "", with(cluster, turned("c", HealthDown), turned("d", HealthDown), turned("d", HealthUp), stays("d")), read, "d"},
		{"ordered: the first choice waits for the own zone", ModeOrdered, "ab", "", all{replicaUp("a"), replicaUp("b")}, read, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			require.Equal(t, tc.want, inTurn(tell(zoned(tc.mode, tc.away, tc.spare), tc.news...), tc.in))
		})
	}
}

func TestZonesOrderTheNamedPeersToo(t *testing.T) {
	t.Parallel()
	for _, mode := range []Mode{ModeReplicated, ModeEquivalent, ModeOrdered} {
		top := tell(zoned(mode, "cd", "b"), replicaUp("a"), replicaUp("b"), replicaUp("c"), replicaUp("d"))
		in := intent{place: placeNamed, reads: true}
		for i := range top.members {
			in.peers = append(in.peers, top.members[i].peer)
		}
		require.Equal(t, "a cd b", inTurn(top, in), mode)
		in.peers = in.peers[1:3]
		require.Equal(t, "c b", inTurn(top, in), mode)
		in.peers = in.peers[:1]
		require.Equal(t, "b", inTurn(top, in), mode)
	}
}

func TestAFullZoneSpillsToAnother(t *testing.T) {
	t.Parallel()
	read := intent{place: placeReads, reads: true, reason: ReasonRead}
	for _, by := range []Balancer{nil, RoundRobin(), Nearest()} {
		top := tell(zoned(ModeReplicated, "d", ""), primaryUp("a", 1), replicaUp("b"), replicaUp("c"), replicaUp("d"))
		top.balancer = by
		b, c, d := top.members[1].peer, top.members[2].peer, top.members[3].peer
		fill(b, true)
		require.Equal(t, "c", strings.Fields(inTurn(top, read))[0], "another of the zone has one")
		fill(c, true)
		require.Equal(t, "d", strings.Fields(inTurn(top, read))[0])
		fill(d, true)
		require.NotContains(t, strings.Fields(inTurn(top, read))[0], "d", "all are full: the queue is in the own zone")
		fill(c, false)
		require.Equal(t, "c", strings.Fields(inTurn(top, read))[0], "it only looks full")

		noted := tried{}
		noted.add(c)
		d.load.out.Store(0)
		chosen, _ := top.pick(&read, &noted)
		require.Same(t, d, chosen, "another attempt too goes where there is room")
	}
}

// A balancer may have its reasons to queue: where others of the zone have room, its word stands.
func TestABalancerMayChooseAFullPeer(t *testing.T) {
	t.Parallel()
	read := intent{place: placeReads, reads: true, reason: ReasonRead}
	for _, away := range []string{"", "d"} {
		top := tell(zoned(ModeReplicated, away, ""), primaryUp("a", 1), replicaUp("b"), replicaUp("c"), replicaUp("d"))
		top.balancer = picker(func(Candidates) int { return 0 })
		b, c := top.members[1].peer, top.members[2].peer
		fill(b, true)
		for range 50 {
			chosen, _ := top.pick(&read, &tried{})
			require.Same(t, b, chosen)
		}
		fill(c, true)
		chosen, _ := top.pick(&read, &tried{})
		require.Equal(t, away == "d", chosen != b, "nobody of the zone has")
	}
}

func TestWhoIsInWhichZone(t *testing.T) {
	withoutEnvironment(t)
	for _, tc := range []struct {
		own  string
		away []bool
	}{
		{"", []bool{false, false, false}},
		{"north", []bool{false, true, true}},
		{"south", []bool{true, false, true}},
		{"west", []bool{true, true, true}},
	} {
		p := openConfig(t, Options{Zone: tc.own, Peers: []Peer{
			{Host: "127.0.0.1", Port: 1, Zone: "north"}, {Host: "127.0.0.1", Port: 2, Zone: "south"}, {Host: "127.0.0.1", Port: 3},
		}}, plainPool(t))
		for i, q := range p.peers() {
			require.Equal(t, tc.away[i], q.away, "%s, %d", tc.own, i)
		}
	}
}

// One that is tried again goes to another zone before it goes to the primary, and a bound on lag is kept.
func TestABoundOnLagLooksInOtherZonesBeforeThePrimary(t *testing.T) {
	t.Parallel()
	top := tell(zoned(ModeReplicated, "cd", ""), primaryUp("a", 1), replicaUp("b"), replicaUp("c"), replicaUp("d"))
	for i := range top.members {
		p := top.members[i].peer
		p.role.Store(int32(top.members[i].role))
		p.behind.forget()
	}
	in := intent{place: placeReads, reads: true, reason: ReasonRead, fresh: freshness{max: Lag{Bytes: 100}}}
	p, why := top.pick(&in, &tried{})
	require.Equal(t, "a", p.name)
	require.Equal(t, ReasonReplicasBehind, why)
	top.members[3].peer.behind.set(distance{known: true})
	require.Equal(t, "d a", inTurn(top, in))
	top.members[1].peer.behind.set(distance{known: true})
	require.Equal(t, "b d a", inTurn(top, in))
}

// Zones and weights say who is preferred, never who can: somebody is found exactly where somebody is found without them, and
// attempt by attempt it is the same set.
func TestZonesAndWeightsTakeNobodyAway(t *testing.T) {
	t.Parallel()
	names := []string{"a", "b", "c", "d"}
	chosen := 0
	for seed := range uint64(300) {
		dice := rand.New(rand.NewPCG(seed, 5))
		subset := func() (s string) {
			for _, name := range names {
				if dice.IntN(3) == 0 {
					s += name
				}
			}
			return s
		}
		mode := Mode(dice.IntN(len(modeNames)))
		plain, bent := zoned(mode, "", ""), zoned(mode, subset(), subset())
		for i := range bent.members {
			bent.members[i].peer.load.weight = float64(dice.IntN(4))
		}
		if dice.IntN(2) == 0 {
			bent.balancer = []Balancer{RoundRobin(), Nearest(), firstUsable{}}[dice.IntN(3)]
		}
		for range 30 {
			n := news{of: names[dice.IntN(len(names))]}
			n.role, n.health, n.timeline = Role(dice.IntN(3)), Health(dice.IntN(4)), 1
			n.slow, n.fitness, n.drained = ternary(dice.IntN(3)), fitness(dice.IntN(4)), ternary(dice.IntN(3))
			if dice.IntN(8) == 0 {
				n = settleNow
			}
			plain, bent = tell(plain, n), tell(bent, n)
			for _, in := range []intent{
				{place: placeReads, reads: true, reason: ReasonRead}, {place: placePrimary}, {place: placeReplica, reads: true},
				{place: placeAny, reads: true, reason: ReasonRead},
			} {
				if mode == ModeOrdered && (!bent.settled || plain.primary.called() != bent.primary.called()) {
					continue // another order has another first, for which it may wait, and which may be suspected
				}
				p, _ := plain.pick(&in, &tried{})
				q, _ := bent.pick(&in, &tried{})
				require.Equal(t, p == nil, q == nil, "seed %d, %v, place %d:\n%s\n%s", seed, mode, in.place, snapshot(plain), snapshot(bent))
				if q == nil {
					continue
				}
				chosen++
				m := bent.member(q)
				require.False(t, m.drained || m.health == HealthDown || in.place == placePrimary && mode == ModeReplicated && q != bent.primary)
				require.False(t, in.place == placeReplica && mode == ModeReplicated && m.role != RoleReplica)
			}
			for _, list := range []*roster{&bent.drawn.reads, &bent.drawn.writes, &bent.drawn.replicas, &bent.drawn.anyone, &bent.drawn.well} {
				for ; list != nil && list.rest != nil; list = list.rest {
					require.False(t, slices.ContainsFunc(list.peers, func(p *peer) bool { return p.away }))
				}
			}
		}
	}
	require.Greater(t, chosen, 5000)
}

// Servers of two zones: the program's own serve, then the other zone's, and the primary last of all.
func TestReadsKeepToTheirZone(t *testing.T) {
	t.Parallel()
	c := pgtest.Start(t, pgtest.Options{Standbys: 4})
	zones := []string{"north", "south", "south", "north", "north"}
	weights := []float64{0, 3, 1, 0, 0}
	config := Options{Zone: "south", CheckInterval: 200 * time.Millisecond}
	for i, s := range c.Servers() {
		config.Peers = append(config.Peers, Peer{
			Name: fmt.Sprintf("%s%d", zones[i], i), Host: s.Host(), Port: s.Port(), Zone: zones[i], Weight: weights[i],
		})
	}
	var j journal
	config.Hooks = j.hooks()
	p := openPool(t, config, c.ConnString("pool_max_conns=3"))
	waitUp(t, p)
	ctx := testContext(t)
	reads := func(n int) map[string]int {
		j.take()
		for range n {
			require.NoError(t, p.QueryRow(ctx, "select 1").Scan(new(int)))
		}
		served := map[string]int{}
		for _, d := range j.take() {
			served[d.Peer]++
		}
		return served
	}
	const many = 2000
	var served map[string]int
	undisturbed(t, p, func() { served = reads(many) })
	require.Len(t, served, 2)
	requireShare(t, served["south1"], many, 3./4, "by weight")

	for _, ps := range p.Status().Peers {
		assert.Equal(t, ps.Name[:5], ps.Zone)
	}
	assert.Equal(t, 3.0, p.Status().Peers[1].Weight)
	assert.Equal(t, 1.0, p.Status().Peers[3].Weight)
	waitFor(t, "round trips", 20*time.Second, func() bool {
		return !slices.ContainsFunc(p.Status().Peers, func(ps PeerStatus) bool { return ps.RoundTrip == 0 })
	})

	// No connection is free in the own zone: another serves, and nobody waits.
	var held []*pgxpool.Conn
	for _, name := range []string{"south1", "south2"} {
		for range 3 {
			conn, err := p.Acquire(WithPeer(ctx, name))
			require.NoError(t, err)
			held = append(held, conn)
		}
	}
	undisturbed(t, p, func() { served = reads(100) })
	require.Equal(t, 100, served["north3"]+served["north4"], "%v", served)
	for _, conn := range held {
		conn.Release()
	}

	// Nobody is well there: another zone, and no read fails.
	readers := gather(4, func(ctx context.Context) error { return p.QueryRow(ctx, "select 1").Scan(new(int)) })
	readers.reach(t, 100)
	south := c.Standbys()[:2]
	for _, s := range south {
		require.NoError(t, s.Kill())
	}
	readers.reach(t, 2000)
	_, failed := readers.dismiss()
	require.Empty(t, failed)
	undisturbed(t, p, func() { served = reads(100) })
	require.Equal(t, 100, served["north3"]+served["north4"], "%v", served)
	require.Zero(t, p.Status().Peers[0].Reads, "the primary was spared")

	for _, s := range south {
		require.NoError(t, s.Start())
	}
	// One that is up may have no receiver yet, and something to receive: then it is left out.
	waitFor(t, "the own zone", 10*time.Second, func() bool {
		served = reads(200)
		return served["south1"]+served["south2"] == 200
	})
}

// What a read meets that fails in its zone: another zone, then the primary.
func TestAReadThatFailsInItsZoneGoesToAnother(t *testing.T) {
	bubble(t, 3, func(c *Options) {
		c.Zone = "here"
		for i, name := range []string{"primary", "replica1", "replica2", "replica3"} {
			c.Peers = append(c.Peers, Peer{Host: name, Zone: []string{"here", "here", "there", "there"}[i]})
		}
	}, func(ctx context.Context, x *fakes) {
		settled()
		for range 20 {
			assert.Equal(t, "replica1:5432", x.read(ctx))
		}
		for range 20 {
			x.replicas[0].FailNext(1, "57P01")
			assert.Contains(t, []string{"replica2:5432", "replica3:5432"}, x.read(ctx))
			settled()
			// Its own again. Not a minute: the pool has a check at each, which takes what is idle, so that a second connection is
			// made; and the ping of one that has been idle would meet the failure instead of the read.
			time.Sleep(61 * time.Second)
			assert.Equal(t, "replica1:5432", x.read(ctx))
		}
		x.replicas[1].Die()
		x.replicas[2].Die()
		x.replicas[0].Die()
		assert.Equal(t, "primary:5432", x.read(ctx))
	})
}
