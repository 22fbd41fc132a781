package multipool

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/pgmultipool/multipool/internal/pgfake"
)

// What was cut made room: who had waited for it comes to the stale primary anew.
func TestWhoWaitedForAConnectionOfAStalePrimaryDoesNotWriteToIt(t *testing.T) {
	bubble(t, 2, func(c *Options) { c.CheckInterval = time.Second }, func(ctx context.Context, x *fakes) {
		settled()
		const hangs, waits = "insert into t values (1)", "insert into t values (3)"
		x.primary.Handle(answering(func(s pgfake.Statement) *pgfake.Response {
			if s.SQL == hangs && !s.Preparing {
				return &pgfake.Response{Hang: true}
			}
			return nil
		}))
		var wg sync.WaitGroup
		for range 10 { // all connections
			wg.Go(func() { _, err := x.pool.Exec(ctx, hangs); assert.ErrorIs(t, err, ErrOutcomeUnknown) })
		}
		settled()
		for range 20 {
			wg.Go(func() { _, err := x.pool.Exec(ctx, waits); assert.NoError(t, err) })
		}
		settled()
		x.replicas[0].Promote()
		wg.Wait()
		assert.Equal(t, "replica1:5432", x.pool.Status().Primary)
		assert.Zero(t, x.primary.Applied(waits))
		assert.Equal(t, 20, x.replicas[0].Applied(waits))
		x.atRest()
	})
}

// The same where nothing in flight has held them up but a connection that is being made.
func TestWhoDialsAStalePrimaryDoesNotWriteToIt(t *testing.T) {
	for name, write := range map[string]func(context.Context, *MultiPool) error{
		"Exec": func(ctx context.Context, p *MultiPool) error {
			_, err := p.Exec(ctx, "insert into t values (3)")
			return err
		},
		"named": func(ctx context.Context, p *MultiPool) error {
			_, err := p.Exec(WithPeer(ctx, "primary:5432", "replica1:5432"), "insert into t values (3)")
			return err
		},
		"Begin": func(ctx context.Context, p *MultiPool) error {
			return pgx.BeginFunc(ctx, p, func(tx pgx.Tx) error {
				_, err := tx.Exec(ctx, "insert into t values (3)")
				return err
			})
		},
		"Primary": func(ctx context.Context, p *MultiPool) error {
			_, err := p.PrimaryPool().Exec(ctx, "insert into t values (3)")
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			var slow atomic.Bool
			bubble(t, 2, func(c *Options) {
				c.CheckInterval = time.Second
				c.Config.BeforeConnect = func(_ context.Context, cc *pgx.ConnConfig) error {
					if cc.Host == "primary" && slow.CompareAndSwap(true, false) {
						time.Sleep(3 * time.Second) // as a token from afar takes
					}
					return nil
				}
			}, func(ctx context.Context, x *fakes) {
				settled()
				slow.Store(true)
				done := make(chan error)
				go func() { done <- write(ctx, x.pool) }()
				settled()
				x.replicas[0].Promote()
				require.NoError(t, <-done)
				assert.Zero(t, x.primary.Applied("insert into t values (3)"))
				assert.Equal(t, 1, x.replicas[0].Applied("insert into t values (3)"))
			})
		})
	}
}

// Who waits for a connection while the primary is drained, or contested, goes on waiting.
func TestWhoWaitedForAConnectionOfADrainedPrimaryWaitsForTheNext(t *testing.T) {
	bubble(t, 2, func(c *Options) { c.Config.MaxConns = 2 }, func(ctx context.Context, x *fakes) {
		var held []*pgxpool.Conn
		for range 2 {
			c, err := x.pool.Acquire(ctx)
			require.NoError(t, err)
			held = append(held, c)
		}
		written := make(chan error)
		go func() { _, err := x.pool.Exec(ctx, "insert into t values (3)"); written <- err }()
		settled()
		drained := make(chan error)
		go func() { drained <- drainPrimary(x.pool, ctx) }()
		settled()
		for _, c := range held {
			c.Release()
		}
		require.NoError(t, <-drained)
		assert.Zero(t, x.primary.Applied("insert into t values (3)"))
		require.NoError(t, x.pool.Resume("primary:5432"))
		require.NoError(t, <-written)
		assert.Equal(t, 1, x.primary.Applied("insert into t values (3)"))
		x.atRest()
	})
}

// A route says where, and a primary to which nobody writes is nowhere: not for who waits for its connection, nor for who comes.
func TestAContestedPrimaryGetsNoWriteByAnyRoute(t *testing.T) {
	const waits, comes = "insert into t values (1)", "insert into t values (2)"
	for name, route := range map[string]Route{
		"plain": {}, "named": {Peers: []string{"primary:5432"}}, "to the primary": {Target: TargetPrimary},
		"to a replica if there is one": {Target: TargetPreferReplica},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, 1, func(c *Options) { c.Config.MaxConns = 1; c.CheckInterval = time.Second; c.Wait = time.Minute }, func(ctx context.Context, x *fakes) {
				settled()
				if route.Target == TargetPreferReplica {
					x.replicas[0].Die()
					time.Sleep(5 * time.Second)
				}
				routed := WithRoute(ctx, route)
				held, err := x.pool.Acquire(WithPrimary(ctx))
				require.NoError(t, err)
				done := make(chan error, 2)
				go func() { _, err := x.pool.Exec(routed, waits); done <- err }()
				settled()
				stranger := pgfake.New(pgfake.Options{})
				stranger.Handle(answering(nil))
				stranger.SetTimeline(2)
				x.plug("stranger:5432", stranger)
				require.NoError(t, x.pool.AddPeer(Peer{Host: "stranger"}))
				time.Sleep(5 * time.Second)
				require.True(t, x.pool.Status().Split)
				held.Release()
				go func() { _, err := x.pool.Exec(routed, comes); done <- err }()
				time.Sleep(5 * time.Second)
				assert.Zero(t, x.primary.Applied(waits))
				assert.Zero(t, x.primary.Applied(comes))
				stranger.Die()
				assert.NoError(t, <-done)
				assert.NoError(t, <-done)
				assert.Equal(t, 1, x.primary.Applied(waits))
				assert.Equal(t, 1, x.primary.Applied(comes))
			})
		})
	}
}

// A replica that is named beside the primary refuses the write: it is no place to go while the primary is away.
func TestAWriteAmongNamedPeersWaitsForThePrimaryAmongThem(t *testing.T) {
	const insert = "insert into t values (1)"
	for name, tc := range map[string]struct {
		leaves  func(context.Context, *fakes)
		returns func(*fakes)
		on      string
	}{
		"drained": {
			func(ctx context.Context, x *fakes) { settled(); require.NoError(x.t, drainPrimary(x.pool, ctx)) },
			func(x *fakes) { require.NoError(x.t, x.pool.Resume("primary:5432")) }, "primary:5432",
		},
		"down": {
			func(_ context.Context, x *fakes) { settled(); x.primary.Die(); time.Sleep(time.Second) },
			func(x *fakes) { x.replicas[0].Promote() }, "replica1:5432",
		},
		"not seen yet": {
			func(_ context.Context, x *fakes) { x.primary.Hang(); settled() },
			func(x *fakes) { x.primary.Thaw() }, "primary:5432",
		},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, 2, nil, func(ctx context.Context, x *fakes) {
				tc.leaves(ctx, x)
				written := make(chan error, 1)
				go func() {
					_, err := x.pool.Exec(WithPeer(ctx, "primary:5432", "replica1:5432"), insert)
					written <- err
				}()
				time.Sleep(time.Second)
				tc.returns(x)
				require.NoError(t, <-written)
				assert.Equal(t, 1, x.network[tc.on].Applied(insert))
			})
		})
	}
	bubble(t, 2, nil, func(ctx context.Context, x *fakes) {
		settled()
		x.primary.Die()
		_, err := x.pool.Exec(WithPeer(ctx, "primary:5432", "replica1:5432"), insert)
		assert.ErrorIs(t, err, ErrNoPrimary)
		assert.ErrorContains(t, err, "replica1:5432 is a replica")
	})
}

// Behind a pooler a refusal of one command by a server that recovers is an address that has moved: it was not executed, and
// waits for a primary.
func TestACommandThatIsRefusedBehindAPoolerIsSentAgain(t *testing.T) {
	for sql, again := range map[string]bool{"insert into t values (1)": true, "create table u (id int)": true, "call p()": false, "do $$ begin end $$": false} {
		for _, standby := range []bool{true, false} {
			t.Run(fmt.Sprint(sql, standby), func(t *testing.T) {
				bubble(t, 1, func(c *Options) {
					c.Peers = []Peer{{Host: "primary", Proxy: true}, {Host: "replica1", Proxy: true}}
				}, func(ctx context.Context, x *fakes) {
					require.NoError(t, x.pool.Ping(ctx))
					settled()
					var refused atomic.Bool
					x.primary.Handle(answering(func(s pgfake.Statement) *pgfake.Response {
						if s.SQL != sql || s.Preparing || !refused.CompareAndSwap(false, true) {
							return nil
						}
						x.primary.SetStandby(standby)
						return &pgfake.Response{Err: &pgfake.Error{Code: "25006", Message: "cannot execute in a read-only transaction"}}
					}))
					time.AfterFunc(2*time.Second, func() { x.primary.SetStandby(false) })
					begun := time.Now()
					_, err := x.pool.Exec(WithPrimary(ctx), sql) // a route that says so is no reason to fail
					if standby && again {
						assert.NoError(t, err)
						assert.Equal(t, 1, x.primary.Applied(sql))
						return
					}
					var refusal *pgconn.PgError
					require.ErrorAs(t, err, &refusal)
					assert.Equal(t, "25006", refusal.Code)
					assert.Zero(t, time.Since(begun), "at once")
					assert.Equal(t, 1, x.primary.Count(sql))
				})
			})
		}
	}
}

// stallingTracer holds a caller between its connection and its statement, as a busy processor may.
type stallingTracer struct{ at func(host string) }

func (s *stallingTracer) TraceQueryStart(ctx context.Context, _ *pgx.Conn, _ pgx.TraceQueryStartData) context.Context {
	return ctx
}
func (s *stallingTracer) TraceQueryEnd(context.Context, *pgx.Conn, pgx.TraceQueryEndData) {}
func (s *stallingTracer) TraceAcquireStart(ctx context.Context, _ *MultiPool, _ TraceAcquireStartData) context.Context {
	return ctx
}
func (s *stallingTracer) TraceAcquireEnd(_ context.Context, _ *MultiPool, d TraceAcquireEndData) {
	if d.Err == nil && s.at != nil {
		s.at(d.Conn.Config().Host)
	}
}

func TestAReadThatHasItsConnectionWhenItsPeerFallsRunsElsewhere(t *testing.T) {
	stall := &stallingTracer{}
	bubble(t, 2, func(c *Options) { c.Config.ConnConfig.Tracer = stall }, func(ctx context.Context, x *fakes) {
		for range 20 {
			x.read(ctx)
		}
		var once sync.Once
		stall.at = func(host string) {
			once.Do(func() {
				x.replicas[host[len(host)-1]-'1'].Hang()
				time.Sleep(5 * time.Second)
				assert.NotEqual(t, BreakerClosed, x.peer(host).Breaker)
			})
		}
		ctx, cancel := context.WithTimeout(ctx, time.Minute)
		defer cancel()
		begun := time.Now()
		assert.NoError(t, x.pool.QueryRow(ctx, "select 1").Scan(new(int)))
		assert.Less(t, time.Since(begun), 6*time.Second)
		for _, r := range x.replicas {
			r.Thaw()
		}
	})
}

type rewritten string

func (r rewritten) RewriteQuery(context.Context, *pgx.Conn, string, []any) (string, []any, error) {
	return string(r), nil, nil
}

// A text that reads, or hides what it does, may write where writes are accepted: it says so when its answer is lost.
func TestALostReadThatMayHaveWrittenSaysSo(t *testing.T) {
	const call = "select place_order(7)"
	for name, c := range map[string]struct {
		sql, sent string
		args      []any
	}{
		"a call":                      {call, call, nil},
		"a prepared statement's name": {"place_order", call, nil},
		"explain analyze":             {"explain analyze update t set n = n + 1", "explain analyze update t set n = n + 1", nil},
		"a comment in between":        {"select place_order /* the id */ (7)", "select place_order /* the id */ (7)", nil},
		"a name with a dollar":        {"select orders$replace(7)", "select orders$replace(7)", nil},
		"a text that is rewritten":    {"select 7", "insert into t values (7)", []any{pgx.QueryExecModeExec, rewritten("insert into t values (7)")}},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, 2, func(c *Options) {
				c.Config.AfterConnect = func(ctx context.Context, conn *pgx.Conn) error {
					_, err := conn.Prepare(ctx, "place_order", call)
					return err
				}
			}, func(ctx context.Context, x *fakes) {
				require.NoError(t, x.pool.Ping(ctx))
				x.primary.Handle(answering(func(s pgfake.Statement) *pgfake.Response {
					if s.Preparing || s.SQL != c.sent {
						return nil
					}
					return &pgfake.Response{Cut: pgfake.CutBeforeAnswer}
				}))
				err := x.pool.QueryRow(WithPrimary(ctx), c.sql, c.args...).Scan(new(int))
				assert.ErrorIs(t, err, ErrOutcomeUnknown)
				settled()
				assert.Equal(t, 1, x.primary.Count(c.sent))
			})
		})
	}
}

// Behind a pooler it is the error that tells a standby. This one comes from further away: the text has committed a part, and
// writes to a foreign table of a server that is read-only.
func TestACallThatHasCommittedAPartIsNotSentAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		one, two := pgfake.New(pgfake.Options{}), pgfake.New(pgfake.Options{Standby: true})
		network := pgfake.Network{"primary:5432": one, "replica:5432": two}
		defer network.Close()
		two.Handle(answering(nil))
		one.Handle(answering(func(s pgfake.Statement) *pgfake.Response {
			if s.SQL != "call p()" || s.Preparing {
				return nil
			}
			return &pgfake.Response{Err: &pgfake.Error{Code: "25006", Message: "cannot execute INSERT in a read-only transaction"}}
		}))
		pool, err := ParseConfig("postgres://app@primary/app?sslmode=disable")
		require.NoError(t, err)
		pool.ConnConfig.DialFunc, pool.ConnConfig.LookupFunc = network.Dial, pgfake.Lookup
		p, err := Open(t.Context(), Options{Config: pool, Peers: []Peer{{Host: "primary", Proxy: true}, {Host: "replica", Proxy: true}}})
		require.NoError(t, err)
		defer p.Close()
		_, err = p.Exec(t.Context(), "call p()")
		assert.Error(t, err)
		assert.Equal(t, 1, one.Count("call p()"))
		err = p.QueryRow(t.Context(), "insert into t values (7) returning 7", pgx.QueryExecModeExec, rewritten("call p()")).Scan(new(int))
		assert.Error(t, err)
		assert.Equal(t, 2, one.Count("call p()"))
	})
}

func TestAPoolOfOnePeerServesWhateverItsRole(t *testing.T) {
	bubble(t, 0, func(c *Options) { c.Peers = []Peer{{Host: "primary", Role: RoleReplica}} }, func(ctx context.Context, x *fakes) {
		_, err := x.pool.Exec(ctx, "set application_name = 'x'")
		assert.NoError(t, err)
		assert.NoError(t, x.pool.Ping(ctx))
	})
}
