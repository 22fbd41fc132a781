package multipool

import (
	"context"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/pgmultipool/multipool/internal/pgfake"
)

// A promotion beside a primary that lives on: what is written there is lost, and where nothing is read nothing tells.
func TestWhileTheProgramWritesWhoMayHaveReplacedItsPrimaryIsLookedAt(t *testing.T) {
	for name, use := range map[string]func(context.Context, *MultiPool) func(){
		"Exec": func(ctx context.Context, p *MultiPool) func() {
			return func() { _, _ = p.Exec(ctx, "insert into t values (1)") }
		},
		"a connection that is held": func(ctx context.Context, p *MultiPool) func() {
			c, err := p.Acquire(ctx)
			if err != nil {
				return nil
			}
			context.AfterFunc(ctx, c.Release)
			return func() { _, _ = c.Exec(ctx, "insert into t values (1)") }
		},
		"past pgx": func(ctx context.Context, p *MultiPool) func() {
			return func() {
				c, err := p.Acquire(ctx)
				if err == nil {
					c.Conn().PgConn().ExecParams(ctx, "insert into t values (1)", nil, nil, nil, nil).Read()
					c.Release()
				}
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, 2, nil, func(ctx context.Context, x *fakes) {
				ctx, end := context.WithCancel(ctx)
				defer settled()
				defer end()
				time.Sleep(time.Second)
				write := use(ctx, x.pool)
				require.NotNil(t, write)
				time.Sleep(10 * time.Second)
				all := append(x.replicas, x.primary)
				count := func(d time.Duration) (n []int) {
					for _, p := range all {
						p.ResetCounters()
					}
					time.Sleep(d)
					settled()
					for _, p := range all {
						n = append(n, looksAt(p))
					}
					return n
				}
				atRest := func() {
					for _, n := range count(20 * time.Second) {
						assert.GreaterOrEqual(t, n, 3)
						assert.LessOrEqual(t, n, 6, "one each five seconds or a little less, and one more by a monitor that dials anew")
					}
				}
				atRest()
				for _, p := range all {
					p.ResetCounters()
				}
				write()
				time.Sleep(writingLook + watchTick)
				settled()
				assert.Positive(t, looksAt(x.replicas[0]), "at once, if the last is long ago")
				assert.Positive(t, looksAt(x.replicas[1]))
				writing := make(chan struct{})
				go func() {
					defer close(writing)
					for range 90 {
						write()
						time.Sleep(250 * time.Millisecond)
					}
				}()
				busy := count(20 * time.Second)
				assert.InDelta(t, 25, busy[0], 4)
				assert.InDelta(t, 25, busy[1], 4)
				assert.LessOrEqual(t, x.replicas[0].Count(lookFull), 6, "short ones, but for one each five seconds")
				assert.LessOrEqual(t, busy[2], 6, "the primary itself")
				<-writing
				time.Sleep(10 * time.Second)
				atRest()
			})
		})
	}
}

// The program writes and reads nothing, directly and through poolers.
func TestWritesBesideAPromotionEndSoon(t *testing.T) {
	for name, open := range map[string]func(*Options){
		"direct": nil,
		"through poolers": func(c *Options) {
			c.Peers = []Peer{{Host: "primary", Proxy: true}, {Host: "replica1", Proxy: true}, {Host: "replica2", Proxy: true}}
		},
		"through the program's connections": func(c *Options) { c.NoMonitorConns = true },
	} {
		t.Run(name, func(t *testing.T) {
			for range 5 {
				bubble(t, 2, open, func(ctx context.Context, x *fakes) {
					var last atomic.Int64
					x.primary.Handle(answering(func(s pgfake.Statement) *pgfake.Response {
						if strings.HasPrefix(s.SQL, "insert") {
							last.Store(time.Now().UnixNano())
						}
						return nil
					}))
					write := func(d time.Duration) {
						for end := time.Now().Add(d); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
							if _, err := x.pool.Exec(ctx, "insert into t values (1)"); err != nil {
								require.ErrorIs(t, err, ErrOutcomeUnknown, "in flight when the primary was fenced")
							}
						}
					}
					write(3 * time.Second)
					x.replicas[0].Promote()
					promoted := time.Now()
					write(3 * time.Second)
					assert.Equal(t, "replica1:5432", x.pool.Status().Primary)
					assert.Less(t, time.Unix(0, last.Load()).Sub(promoted), 1200*time.Millisecond)
				})
			}
		})
	}
}

// A short look tells that something has happened, and the full one that follows at once tells what.
func TestAShortLookThatDiffersIsFollowedByAFullOne(t *testing.T) {
	bubble(t, 1, func(c *Options) { c.MaxLag = Lag{Bytes: 1 << 30} }, func(ctx context.Context, x *fakes) {
		var receives, shows atomic.Uint32
		receives.Store(1)
		shows.Store(1)
		x.replicas[0].Handle(func(s pgfake.Statement) *pgfake.Response {
			if !asksLook(s) {
				return nil
			}
			return lookAnswer(s, sight{
				role: RoleReplica, system: 1, position: 8192, timeline: receives.Load(), shown: shows.Load(),
			})
		})
		time.Sleep(11 * time.Second)
		x.replicas[0].ResetCounters()
		time.Sleep(20 * time.Second)
		require.Greater(t, x.replicas[0].Count(lookBrief), 3*x.replicas[0].Count(lookFull))
		_, err := x.pool.Exec(ctx, "insert into t values (1)")
		require.NoError(t, err)

		// Another has been promoted, out of sight, and the replica follows it.
		receives.Store(2)
		shows.Store(2)
		time.Sleep(time.Second)
		settled()
		assert.EqualValues(t, 2, x.pool.topology.Load().timeline)
		assert.Empty(t, x.pool.topology.Load().writes, "its primary has been replaced")
	})
}

// What is news to one peer may be to all: each is asked everything once.
func TestNewsHaveEveryPeerAskedEverything(t *testing.T) {
	bubble(t, 2, func(c *Options) { c.MaxLag = Lag{Bytes: 1 << 30} }, func(ctx context.Context, x *fakes) {
		for i := range 20 {
			time.Sleep(11 * time.Second)
			x.replicas[1].ResetCounters()
			changed := x.pool.changed.Load()
			x.pool.observe(observation{peer: x.pool.peers()[1], slow: []ternary{yes, no}[i%2]})
			require.Greater(t, x.pool.changed.Load(), changed)
			time.Sleep(900 * time.Millisecond)
			settled()
			require.Positive(t, x.replicas[1].Count(lookFull))
		}
	})
}

// A server that does not serve the short look serves the full one, and is not asked in vain again.
func TestAServerThatDoesNotServeTheShortLookIsAskedTheFullOne(t *testing.T) {
	bubble(t, 1, func(c *Options) { c.MaxLag = Lag{Bytes: 1 << 30} }, func(_ context.Context, x *fakes) {
		x.replicas[0].Handle(func(s pgfake.Statement) *pgfake.Response {
			if s.SQL == lookBrief {
				return &pgfake.Response{Err: &pgfake.Error{Code: "42501", Message: "permission denied for function pg_stat_get_wal_receiver"}}
			}
			return answering(nil)(s)
		})
		time.Sleep(redialEach - 5*time.Second)
		settled()
		assert.Equal(t, HealthUp, x.peer("replica1").Health)
		assert.Zero(t, x.peer("replica1").Trips)
		assert.LessOrEqual(t, x.replicas[0].Count(lookBrief), 1)
		assert.Greater(t, x.replicas[0].Count(lookFull), 25)
		assert.Equal(t, 1, x.replicas[0].Dials())
	})
}

// A pooler that nobody has declared gives every statement another session: what was prepared is not there.
func TestAPreparedLookThatIsLostIsSentAsAText(t *testing.T) {
	bubble(t, 1, nil, func(_ context.Context, x *fakes) {
		var looked atomic.Int32
		var refused atomic.Bool
		x.replicas[0].Handle(func(s pgfake.Statement) *pgfake.Response {
			// The first look is that of a new session, and the second the first that is prepared.
			if s.SQL == lookFull && !s.Preparing && looked.Add(1) == 2 {
				refused.Store(true)
				return &pgfake.Response{Err: &pgfake.Error{Code: "26000", Message: `prepared statement "multipool_1" does not exist`}}
			}
			return answering(nil)(s)
		})
		time.Sleep(redialEach - 5*time.Second)
		settled()
		require.True(t, refused.Load())
		assert.Equal(t, HealthUp, x.peer("replica1").Health)
		assert.Equal(t, 1, x.replicas[0].Dials(), "nobody was suspected")
	})
}

// A server that hangs while there is no primary is found out as any other time.
func TestAServerThatHangsUnderAGlanceIsDown(t *testing.T) {
	bubble(t, 2, nil, func(ctx context.Context, x *fakes) {
		_, err := x.pool.Exec(ctx, "insert into t values (1)")
		require.NoError(t, err)
		x.primary.Die()
		time.Sleep(time.Second)
		x.replicas[0].ResetCounters()
		time.Sleep(time.Second)
		require.Greater(t, x.replicas[0].Syncs(), 20)
		x.replicas[0].Hang()
		time.Sleep(2 * time.Second)
		settled()
		assert.Equal(t, HealthDown, x.peer("replica1").Health)
		x.replicas[0].Thaw()
		time.Sleep(2 * time.Second)
		settled()
		assert.Equal(t, HealthUp, x.peer("replica1").Health)
	})
}

// Sessions of a pooler, and of a server before version 14, do not tell of a promotion: while there is no primary they are
// asked for the role.
func TestWhereSessionsDoNotTellTheRoleIsAsked(t *testing.T) {
	for name, proxy := range map[string]bool{"a pooler": true, "an old server": false} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				options := pgfake.Options{Standby: true, Params: map[string]string{"in_hot_standby": ""}}
				if proxy {
					options.Params["in_hot_standby"] = "on"
				}
				primary, replica := pgfake.New(pgfake.Options{}), pgfake.New(options)
				primary.Handle(answering(nil))
				replica.Handle(answering(nil))
				network := pgfake.Network{"primary:5432": primary, "replica:5432": replica}
				defer network.Close()
				pool, err := ParseConfig("postgres://app@primary/app?sslmode=disable&multipool_wait=1m")
				require.NoError(t, err)
				pool.ConnConfig.DialFunc, pool.ConnConfig.LookupFunc = network.Dial, pgfake.Lookup
				p, err := Open(t.Context(), Options{Config: pool, Peers: []Peer{{Host: "primary", Proxy: proxy}, {Host: "replica", Proxy: proxy}}})
				require.NoError(t, err)
				defer p.Close()
				ctx := t.Context()
				_, err = p.Exec(ctx, "insert into t values (1)")
				require.NoError(t, err)
				primary.Die()
				time.Sleep(time.Second)
				done := make(chan time.Time)
				go func() {
					_, err := p.Exec(ctx, "insert into t values (2)")
					assert.NoError(t, err)
					done <- time.Now()
				}()
				time.Sleep(2 * time.Second)
				replica.ResetCounters()
				time.Sleep(2 * time.Second)
				assert.InDelta(t, 80, looksAt(replica), 8)
				assert.Zero(t, replica.Syncs())
				assert.Greater(t, replica.Count(lookRole), 60)
				replica.Promote()
				promoted := time.Now()
				assert.LessOrEqual(t, (<-done).Sub(promoted), 30*time.Millisecond)
			})
		})
	}
}
