package multipool

import (
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/pgmultipool/multipool/internal/pgtest"
)

// HAProxy in front of a primary and two standbys, with a port for writes and one for reads, which is all that the pool knows.
// What the checks of a real one would find, the tests tell it, one port after the other. Sessions stay where they are.

// behindHAProxy is a cluster behind a HAProxy, under load.
type behindHAProxy struct {
	t        *testing.T
	servers  []*pgtest.Server
	balancer *pgtest.Balancer
	pool     *MultiPool
	ledger   *ledger
	stale    staleProxies
	writers  *crowd
	readers  *crowd
}

func newBehindHAProxy(t *testing.T) *behindHAProxy {
	t.Helper()
	c := pgtest.Start(t, pgtest.Options{Standbys: 2})
	b := &behindHAProxy{t: t, servers: c.Servers(), balancer: pgtest.StartBalancer(t, c, "w", "r"), ledger: newLedger(t, c)}
	b.lead("w", 0)
	b.lead("r", 1, 2)
	b.pool = openPool(t, Options{
		Hooks: b.stale.hooks(), Wait: operatorTime, CheckInterval: time.Second,
		Peers: []Peer{
			{Name: "w", Host: "127.0.0.1", Port: b.balancer.Port("w"), Proxy: true},
			{Name: "r", Host: "127.0.0.1", Port: b.balancer.Port("r"), Proxy: true},
		},
	}, c.ConnString("pool_max_conns=10"))
	waitUp(t, b.pool)
	b.writers, b.readers = gatherFor(operatorTime, 8, b.ledger.write(b.pool)), gather(8, reading(b.pool))
	b.writers.reach(t, 200)
	b.readers.reach(t, 200)
	return b
}

// staleProxies are the peers of which it was said that a primary that was replaced is behind them.
type staleProxies struct {
	mu    sync.Mutex
	peers []string
}

func (s *staleProxies) hooks() *Hooks {
	return &Hooks{PeerChanged: func(e PeerEvent) {
		var cause *staleBehindProxy
		if errors.As(e.Cause, &cause) && e.From == e.To {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.peers = append(s.peers, e.Peer)
		}
	}}
}

// lead has new sessions of a port led to servers.
func (b *behindHAProxy) lead(port string, servers ...int) {
	b.t.Helper()
	var list []*pgtest.Server
	for _, i := range servers {
		list = append(list, b.servers[i])
	}
	require.NoError(b.t, b.balancer.Lead(port, list...))
}

// settle waits until the pool has the write port for its primary, and the read port serves reads.
func (b *behindHAProxy) settle() {
	b.t.Helper()
	primaryIs(b.t, b.pool, "w")
	waitFor(b.t, "the read port to lead to replicas", 20*time.Second, func() bool {
		return b.pool.Status().Peers[1].Role == RoleReplica
	})
	b.writers.reach(b.t, 200)
	b.readers.reach(b.t, 200)
}

// end dismisses the callers: no write has failed but those in flight, none with a refusal by a standby.
func (b *behindHAProxy) end(now *pgtest.Server) (lost int) {
	b.t.Helper()
	b.writers.dismiss()
	_, failedReads := b.readers.dismiss()
	for text := range failedReads {
		assert.Contains(b.t, text, "closed network connection", "only what ran on a primary that was replaced")
	}
	assert.Empty(b.t, b.ledger.failed)
	for _, err := range b.ledger.unknown {
		var answer *pgconn.PgError
		assert.False(b.t, errors.As(err, &answer) && answer.Code == "25006", "%v", err)
	}
	s := b.pool.Status()
	assert.Equal(b.t, "w", s.Primary)
	assert.False(b.t, s.Split)
	assert.Empty(b.t, s.Rivals)
	lost = b.ledger.settle(b.t, now)
	b.t.Logf("%d writes, %d of unknown outcome, %d acknowledged and lost; %d reads", b.writers.calls.Load(), len(b.ledger.unknown), lost, b.readers.calls.Load())
	return lost
}

// The ports notice a promotion at different times: for a while both lead to the promoted server, or the write port to a server
// that is a standby yet.
func TestHAProxyAPromotionAfterAKill(t *testing.T) {
	for name, then := range map[string]func(*behindHAProxy){
		"the write port is the last to notice": func(b *behindHAProxy) {
			require.NoError(t, b.servers[1].Promote())
			b.lead("r", 1, 2)
			require.NoError(t, b.servers[2].Follow(b.servers[1]))
			b.writers.reach(t, 10) // by the read port, which leads there
			b.lead("w", 1)
			b.writers.reach(t, 50)
			b.lead("r", 2)
		},
		"the write port is too early": func(b *behindHAProxy) {
			b.lead("w", 1)
			b.lead("r", 2)
			time.Sleep(time.Second) // the operator's share, in which writes wait
			require.NoError(t, b.servers[1].Promote())
			require.NoError(t, b.servers[2].Follow(b.servers[1]))
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newBehindHAProxy(t)
			b.t = t
			require.NoError(t, b.servers[0].Kill())
			b.lead("w")
			then(b)
			b.settle()
			require.NoError(t, b.servers[0].Follow(b.servers[1]))
			b.lead("r", 0, 2)
			b.settle()
			b.end(b.servers[1])
		})
	}
}

// The old primary lives, and HAProxy takes both for the primary before its checks find that one is not any more.
func TestHAProxyAPromotionBesideALivingPrimary(t *testing.T) {
	t.Parallel()
	b := newBehindHAProxy(t)
	require.NoError(t, b.servers[1].Promote())
	b.lead("w", 0, 1)
	b.lead("r", 2)
	// Every regular look of the write port's monitor is made on a new session, so that one of two meets the promoted server.
	waitFor(t, "the newer timeline", 20*time.Second, func() bool { return b.pool.topology.Load().timeline == 2 })
	b.writers.turnOver(t)
	stale := entriesFrom(t, b.servers[0], 0)
	require.NoError(t, b.servers[2].Follow(b.servers[1]))
	b.writers.reach(t, 300)
	assert.Equal(t, stale, entriesFrom(t, b.servers[0], 0), "no write to the primary that was replaced, from then on")
	b.lead("w", 1)
	b.settle()
	lost := b.end(b.servers[1])
	assert.LessOrEqual(t, int64(lost), stale)
	b.stale.mu.Lock()
	defer b.stale.mu.Unlock()
	assert.Equal(t, []string{"w"}, b.stale.peers, "it is said, once")
}
