package multipool

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
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

// Tests in a bubble: real pools over in-memory peers, minutes of virtual time in milliseconds of the real one. The
// bubble fails when a goroutine is left.

// fakes are the peers of a bubble: "primary" and "replica1" to "replicaN".
type fakes struct {
	t        *testing.T
	mu       sync.Mutex // orders changes of the network with the monitors' dials
	network  pgfake.Network
	primary  *pgfake.Peer
	replicas []*pgfake.Peer
	journal  journal
	pool     *MultiPool
}

// bubble runs f in a bubble with a primary and n replicas. open, where it is not nil, changes the configuration.
func bubble(t *testing.T, n int, open func(*Options), f func(context.Context, *fakes)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		x := &fakes{t: t, network: pgfake.Network{}}
		hosts := []string{"primary"}
		for i := range n + 1 {
			p := pgfake.New(pgfake.Options{Standby: i > 0})
			if i == 0 {
				x.primary = p
			} else {
				x.replicas = append(x.replicas, p)
				hosts = append(hosts, fmt.Sprintf("replica%d", i))
			}
			p.Handle(answering(nil))
			x.network[hosts[i]+":5432"] = p
			x.network["also-"+hosts[i]+":5432"] = p // the same server by another name
		}
		defer x.network.Close()
		pool, err := ParseConfig("postgres://app@" + strings.Join(hosts, ",") + "/app?sslmode=disable&pool_max_conns=10")
		require.NoError(t, err)
		pool.ConnConfig.DialFunc = x.dial
		pool.ConnConfig.LookupFunc = pgfake.Lookup
		config := Options{Config: pool, Hooks: x.journal.hooks()}
		if open != nil {
			open(&config)
		}
		x.pool, err = Open(t.Context(), config)
		require.NoError(t, err)
		defer x.pool.Close()
		f(context.Background(), x)
	})
}

func (x *fakes) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	x.mu.Lock()
	there := pgfake.Network{addr: x.network[addr]}
	x.mu.Unlock()
	return there.Dial(ctx, network, addr)
}

// plug puts a peer into the network while the pool is at work.
func (x *fakes) plug(addr string, p *pgfake.Peer) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.network[addr] = p
}

// answering is a handler that answers the monitors' looks, and f for the rest.
func answering(f pgfake.Handler) pgfake.Handler {
	return func(s pgfake.Statement) *pgfake.Response {
		if !asksLook(s) {
			if f == nil {
				return nil
			}
			return f(s)
		}
		seen := sight{role: RolePrimary, system: 1, timeline: s.Timeline, position: 8192}
		if s.Standby {
			seen = sight{role: RoleReplica, system: 1, position: 8192, shown: 1}
		}
		return lookAnswer(s, seen)
	}
}

// asksLook reports whether a statement is a monitor's look that asks more than the role.
func asksLook(s pgfake.Statement) bool { return s.SQL == lookFull || s.SQL == lookBrief }

// looksAt is how often a peer was looked at.
func looksAt(p *pgfake.Peer) int {
	return p.Syncs() + p.Count(lookFull) + p.Count(lookBrief) + p.Count(lookRole)
}

// lookAnswer is a server's answer to a look: it tells what is asked.
func lookAnswer(to pgfake.Statement, s sight) *pgfake.Response {
	if to.SQL == lookBrief {
		s.alone, s.started, s.awaits, s.system, s.shown = false, 0, false, 0, 0
	}
	text := func(name string) pgfake.Column { return pgfake.Column{Name: name, OID: pgfake.TextOID} }
	flag := func(name string) pgfake.Column { return pgfake.Column{Name: name, OID: pgfake.BoolOID} }
	number := func(n uint64, base int) any {
		if n == 0 {
			return nil
		}
		return strconv.FormatUint(n, base)
	}
	replica := s.role == RoleReplica
	return &pgfake.Response{
		Columns: []pgfake.Column{
			flag("standby"), text("timeline"), text("position"), flag("alone"), flag("paused"),
			text("started"), flag("awaits"), text("system"), text("shown"),
		},
		Rows: [][]any{{
			replica, number(uint64(s.timeline), 16), s.position.String(), s.alone, s.paused,
			number(uint64(s.started), 10), s.awaits, number(s.system, 10), number(uint64(s.shown), 10),
		}},
	}
}

// read makes one read and returns the name of the peer that served it.
func (x *fakes) read(ctx context.Context) string {
	x.t.Helper()
	x.journal.take()
	var n int
	require.NoError(x.t, x.pool.QueryRow(ctx, "select 1").Scan(&n))
	trips := x.journal.take()
	return trips[len(trips)-1].Peer
}

func (x *fakes) peer(name string) PeerStatus {
	for _, ps := range x.pool.Status().Peers {
		if ps.Name == name+":5432" {
			return ps
		}
	}
	x.t.Fatalf("no peer %s", name)
	return PeerStatus{}
}

// settled waits until nothing moves.
func settled() { synctest.Wait() }

func TestABreakerOpensOnADeathAndTheMonitorAloneClosesIt(t *testing.T) {
	bubble(t, 2, nil, func(ctx context.Context, x *fakes) {
		victim := x.replicas[0]
		for range 20 {
			x.read(ctx)
		}
		victim.Die()
		for range 20 {
			x.read(ctx) // fails if a read does
		}
		settled()
		assert.Equal(t, BreakerOpen, x.peer("replica1").Breaker)
		assert.Equal(t, HealthDown, x.peer("replica1").Health)
		assert.NotEmpty(t, x.peer("replica1").LastFault)
		victim.ResetCounters()
		for range 60 {
			time.Sleep(500 * time.Millisecond)
			assert.Equal(t, "replica2:5432", x.read(ctx))
		}
		assert.LessOrEqual(t, victim.Dials(), 40, "30 s of a dead peer at most one dial a second and the first, faster ones")
		assert.GreaterOrEqual(t, victim.Dials(), 25)
		assert.Zero(t, victim.Count("select 1"))

		victim.Revive()
		time.Sleep(1300 * time.Millisecond)
		settled()
		assert.Equal(t, BreakerClosed, x.peer("replica1").Breaker)
		assert.EqualValues(t, 1, x.peer("replica1").Trips)
		served := map[string]int{}
		for range 400 { // it is new, and gets one in eleven: a hundred may all pass it by
			served[x.read(ctx)]++
		}
		assert.Positive(t, served["replica1:5432"])
	})
}

func TestManyConnectionsLostAtOnceAreOneEvent(t *testing.T) {
	bubble(t, 1, nil, func(ctx context.Context, x *fakes) {
		var held []*pgxpool.Conn
		for range 10 {
			c, err := x.pool.Acquire(WithPeer(ctx, "replica1:5432"))
			require.NoError(t, err)
			held = append(held, c)
		}
		settled()
		x.replicas[0].CutConns() // the server goes on: a proxy has restarted, say
		for _, c := range held {
			_, err := c.Exec(ctx, "select 1")
			require.Error(t, err)
			c.Release()
			settled() // the probe has its answer before the next fault is met
		}
		assert.Zero(t, x.peer("replica1").Trips)
		assert.Equal(t, "replica1:5432", x.read(ctx))
	})
}

func TestAWriteWaitsForThePrimaryAndIsDoneOnce(t *testing.T) {
	bubble(t, 2, nil, func(ctx context.Context, x *fakes) {
		_, err := x.pool.Exec(ctx, "insert into t values (1)")
		require.NoError(t, err)
		x.primary.Hang()
		inFlight := make(chan error)
		go func() { _, err := x.pool.Exec(ctx, "insert into t values ($1)", 2); inFlight <- err }()
		settled()
		x.primary.Die()
		go func() {
			time.Sleep(2 * time.Second)
			x.primary.Revive()
		}()
		begun := time.Now()
		assert.ErrorIs(t, <-inFlight, ErrOutcomeUnknown, "a connection that dies under a write tells nothing")
		_, err = x.pool.Exec(ctx, "insert into t values (3)")
		require.NoError(t, err)
		assert.InDelta(t, 2.0, time.Since(begun).Seconds(), 1.5)
		assert.Equal(t, 1, x.primary.Applied("insert into t values (3)"))
	})
}

func TestACallThatNobodyCanTakeFailsWhenItsWaitIsOver(t *testing.T) {
	bubble(t, 1, func(c *Options) { c.Wait = 3 * time.Second; c.MaxWaiting = 2 }, func(ctx context.Context, x *fakes) {
		x.read(ctx)
		x.primary.Die()
		x.replicas[0].Die()
		_ = x.pool.Ping(ctx) // lets the breakers open
		settled()
		time.Sleep(time.Second)

		begun := time.Now()
		_, err := x.pool.Exec(ctx, "insert into t values (1)")
		var none *NoPeerError
		require.ErrorAs(t, err, &none)
		assert.ErrorIs(t, err, ErrNoPrimary)
		assert.NotErrorIs(t, err, ErrNoReplica)
		assert.NotErrorIs(t, err, ErrOutcomeUnknown)
		assert.Len(t, none.Peers, 2)
		assert.ErrorContains(t, err, "primary:5432 down")
		assert.Equal(t, 3*time.Second, time.Since(begun))

		timed, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		begun = time.Now()
		err = x.pool.QueryRow(timed, "select 1").Scan(new(int))
		assert.ErrorIs(t, err, context.DeadlineExceeded)
		assert.ErrorAs(t, err, &none)
		assert.Equal(t, time.Second, time.Since(begun))

		var wg sync.WaitGroup
		errs := make([]error, 5)
		begun = time.Now()
		for i := range errs {
			wg.Go(func() { _, errs[i] = x.pool.Exec(ctx, "insert into t values (2)") })
		}
		wg.Wait()
		assert.Equal(t, 3*time.Second, time.Since(begun))
		for _, err := range errs {
			assert.ErrorIs(t, err, ErrNoPrimary)
		}
		assert.Zero(t, x.pool.Status().Waiting)
	})
}

func TestBeyondMaxWaitingCallsFailAtOnce(t *testing.T) {
	bubble(t, 1, func(c *Options) { c.MaxWaiting = 2 }, func(ctx context.Context, x *fakes) {
		x.read(ctx)
		x.primary.Die()
		_ = x.pool.Ping(withTimeout(t, time.Second))
		settled()
		results := make(chan error, 5)
		for range 5 {
			go func() { _, err := x.pool.Exec(ctx, "insert into t values (2)"); results <- err }()
		}
		settled()
		require.Len(t, results, 3)
		x.primary.Revive()
		time.Sleep(2 * time.Second)
		settled()
		require.Len(t, results, 5)
		failed := 0
		for range 5 {
			if err := <-results; err != nil {
				require.ErrorIs(t, err, ErrNoPrimary)
				failed++
			}
		}
		assert.Equal(t, 3, failed)
	})
}

func TestTheFirstCallsWaitForTheFirstUsableAnswer(t *testing.T) {
	var ready chan struct{}
	bubble(t, 2, func(c *Options) {
		ready = make(chan struct{})
		dial := c.Config.ConnConfig.DialFunc
		c.Config.ConnConfig.DialFunc = func(ctx context.Context, network, addr string) (net.Conn, error) {
			<-ready // the monitors begin when the pool is opened, and may be quicker than what follows here
			return dial(ctx, network, addr)
		}
	}, func(ctx context.Context, x *fakes) {
		for _, p := range append(x.replicas, x.primary) {
			p.Delay(100 * time.Millisecond)
		}
		x.replicas[1].Hang()
		close(ready)
		begun := time.Now()
		assert.Equal(t, "replica1:5432", x.read(ctx))
		assert.Less(t, time.Since(begun), 250*time.Millisecond, "a read goes to the first replica that answers")
		_, err := x.pool.Exec(ctx, "insert into t values (1)")
		require.NoError(t, err)
		assert.GreaterOrEqual(t, time.Since(begun), settleTime, "a claimant is elected when all have answered or had the time to")
		x.replicas[1].Thaw()
	})
}

func TestALostWriteIsMarkedAndNeverSentAgain(t *testing.T) {
	const insert = "insert into t values (7)"
	for name, call := range map[string]func(context.Context, *MultiPool) error{
		"Exec": func(ctx context.Context, p *MultiPool) error { _, err := p.Exec(ctx, insert); return err },
		"Exec simple": func(ctx context.Context, p *MultiPool) error {
			_, err := p.Exec(ctx, insert, pgx.QueryExecModeSimpleProtocol)
			return err
		},
		"Query": func(ctx context.Context, p *MultiPool) error {
			rows, err := p.Query(ctx, insert)
			if err != nil {
				return err
			}
			rows.Close()
			return rows.Err()
		},
		"QueryRow": func(ctx context.Context, p *MultiPool) error { return p.QueryRow(ctx, insert).Scan(new(int)) },
		"SendBatch": func(ctx context.Context, p *MultiPool) error {
			b := &pgx.Batch{}
			b.Queue(insert)
			return p.SendBatch(ctx, b).Close()
		},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, 2, nil, func(ctx context.Context, x *fakes) {
				require.NoError(t, x.pool.Ping(ctx))
				x.primary.Handle(answering(func(s pgfake.Statement) *pgfake.Response {
					if s.Preparing || s.SQL != insert {
						return nil
					}
					return &pgfake.Response{Cut: pgfake.CutBeforeAnswer}
				}))
				err := call(ctx, x.pool)
				require.ErrorIs(t, err, ErrOutcomeUnknown)
				assert.NotNil(t, errors.Unwrap(err), "it unwraps to the original")
				assert.False(t, pgconn.SafeToRetry(err))
				settled()
				assert.Equal(t, 1, x.primary.Applied(insert))
			})
		})
	}
}

func TestALostCommitIsMarked(t *testing.T) {
	bubble(t, 1, nil, func(ctx context.Context, x *fakes) {
		tx, err := x.pool.Begin(ctx)
		require.NoError(t, err)
		x.primary.Handle(answering(func(s pgfake.Statement) *pgfake.Response {
			if strings.EqualFold(s.SQL, "commit") {
				return &pgfake.Response{Cut: pgfake.CutBeforeAnswer}
			}
			return nil
		}))
		err = tx.Commit(ctx)
		require.ErrorIs(t, err, ErrOutcomeUnknown)
		require.ErrorIs(t, tx.Rollback(ctx), pgx.ErrTxClosed)
		settled()
		assert.Zero(t, x.pool.Status().Total.AcquiredConns)
	})
}

// BEGIN does nothing, so a connection that dies under it is no reason to fail the transaction.
func TestALostBeginIsSentAgain(t *testing.T) {
	bubble(t, 1, nil, func(ctx context.Context, x *fakes) {
		require.NoError(t, x.pool.Ping(ctx))
		settled()
		x.primary.CutConns()
		tx, err := x.pool.Begin(ctx)
		require.NoError(t, err)
		require.NoError(t, tx.Commit(ctx))
	})
}

func TestALostReadIsSentAgainOnlyFromAStandby(t *testing.T) {
	bubble(t, 2, nil, func(ctx context.Context, x *fakes) {
		settled()
		cut := answering(func(s pgfake.Statement) *pgfake.Response {
			if s.Preparing || s.SQL != "select 1" && s.SQL != "select place_order(1)" {
				return nil
			}
			return &pgfake.Response{Cut: pgfake.CutBeforeAnswer}
		})
		x.replicas[0].Handle(cut)
		for range 10 {
			assert.Equal(t, "replica2:5432", x.read(ctx), "one replica loses it, the other answers")
			settled()
		}
		x.replicas[1].Handle(cut)
		x.primary.Handle(cut)
		err := x.pool.QueryRow(WithPrimary(ctx), "select 1").Scan(new(int))
		require.Error(t, err)
		require.NotErrorIs(t, err, ErrOutcomeUnknown, "it calls nothing that writes")
		assert.Equal(t, 1, x.primary.Applied("select 1"))
		err = x.pool.QueryRow(WithPrimary(ctx), "select place_order(1)").Scan(new(int))
		require.ErrorIs(t, err, ErrOutcomeUnknown, "it may have called what writes")
		assert.Equal(t, 1, x.primary.Applied("select place_order(1)"))
		err = x.pool.QueryRow(WithRoute(ctx, Route{Retry: RetryNever}), "select 1").Scan(new(int))
		require.Error(t, err)
	})
}

func TestNothingIsSentAgainAfterItsFirstRow(t *testing.T) {
	bubble(t, 2, nil, func(ctx context.Context, x *fakes) {
		for _, p := range x.replicas {
			p.Handle(answering(func(s pgfake.Statement) *pgfake.Response {
				if s.Preparing || s.SQL != "select 1" {
					return nil
				}
				return &pgfake.Response{Cut: pgfake.CutBeforeTag}
			}))
		}
		rows, err := x.pool.Query(ctx, "select 1")
		require.NoError(t, err)
		require.True(t, rows.Next())
		require.False(t, rows.Next())
		require.Error(t, rows.Err())
		assert.Equal(t, 1, x.replicas[0].Applied("select 1")+x.replicas[1].Applied("select 1"))
		assert.Len(t, x.journal.take(), 1)
	})
}

func TestAPoolOfOnePeerReturnsWhatPgxpoolReturns(t *testing.T) {
	bubble(t, 0, nil, func(ctx context.Context, x *fakes) {
		require.NoError(t, x.pool.Ping(ctx))
		assert.Equal(t, "primary:5432", x.read(ctx))
		x.primary.Handle(func(s pgfake.Statement) *pgfake.Response {
			if s.Preparing || !strings.HasPrefix(s.SQL, "insert") {
				return nil
			}
			return &pgfake.Response{Cut: pgfake.CutBeforeAnswer}
		})
		_, err := x.pool.Exec(ctx, "insert into t values ($1)", 1)
		require.Error(t, err)
		assert.NotErrorIs(t, err, ErrOutcomeUnknown)
		x.primary.Die()
		begun := time.Now()
		err = x.pool.Ping(ctx)
		var dial *pgconn.ConnectError
		require.ErrorAs(t, err, &dial)
		assert.Zero(t, time.Since(begun), "nothing is held")
		assert.Zero(t, x.peer("primary").Trips)
		time.Sleep(time.Hour)
		assert.Zero(t, looksAt(x.primary), "nobody looks")
	})
}

func TestCallersWhoGiveUpTripNothing(t *testing.T) {
	bubble(t, 2, nil, func(ctx context.Context, x *fakes) {
		for _, p := range append(x.replicas, x.primary) {
			p.Delay(200 * time.Millisecond)
		}
		settled()
		cancelled, cancel := context.WithCancel(ctx)
		var wg sync.WaitGroup
		for i := range 1000 {
			wg.Go(func() {
				c, done := cancelled, context.CancelFunc(func() {})
				if i%2 == 0 {
					c, done = context.WithTimeout(ctx, 100*time.Millisecond)
				}
				defer done()
				_ = x.pool.QueryRow(c, "select 1").Scan(new(int))
			})
		}
		time.Sleep(100 * time.Millisecond)
		cancel()
		wg.Wait()
		time.Sleep(time.Minute)
		for _, ps := range x.pool.Status().Peers {
			assert.Zero(t, ps.Trips, ps.Name)
			assert.Zero(t, ps.InFlight, ps.Name)
		}
	})
}

func TestApplicationErrorsTripNothing(t *testing.T) {
	bubble(t, 2, nil, func(ctx context.Context, x *fakes) {
		settled()
		for _, code := range []string{"42601", "23505", "57014", "22012", "40001", "53400"} {
			x.primary.FailNext(20, code)
			for range 20 {
				_, err := x.pool.Exec(ctx, "update t set v = 1")
				var pgErr *pgconn.PgError
				require.ErrorAs(t, err, &pgErr)
				require.Equal(t, code, pgErr.Code)
				require.NotErrorIs(t, err, ErrOutcomeUnknown)
			}
		}
		assert.Zero(t, x.peer("primary").Trips)
	})
}

// A program whose set-up of a connection writes, or listens, used to work on its one server.
func TestASetUpThatAStandbyRefusesLeavesTheReadsOnThePrimary(t *testing.T) {
	bubble(t, 2, func(c *Options) {
		c.Config.AfterConnect = func(ctx context.Context, conn *pgx.Conn) error {
			_, err := conn.Exec(ctx, "create temp table scratch (v int)")
			return err
		}
	}, func(ctx context.Context, x *fakes) {
		for range 50 {
			assert.Equal(t, "primary:5432", x.read(ctx))
		}
		dials := x.replicas[0].Dials() + x.replicas[1].Dials()
		for range 50 {
			x.read(ctx)
		}
		assert.Equal(t, dials, x.replicas[0].Dials()+x.replicas[1].Dials(), "they are not tried again")
		assert.Zero(t, x.pool.texts.Learned())
		for _, ps := range x.pool.Status().Peers {
			assert.Zero(t, ps.Trips)
		}
	})
}

// One session, which its last user left at default_transaction_isolation=serializable, refuses one statement.
func TestAReplicaThatRefusedASessionIsReadAgain(t *testing.T) {
	refusal := pgfake.Error{
		Severity: "ERROR", Code: "0A000", Message: "cannot use serializable mode in a hot standby", Routine: "GetSerializableTransactionSnapshot",
	}
	for name, mend := range map[string]func(*fakes){
		"after a while": func(*fakes) { time.Sleep(forgiveAfter) },
		"after a restart": func(x *fakes) {
			x.replicas[0].Die()
			time.Sleep(time.Second)
			x.replicas[0].Revive()
			time.Sleep(5 * time.Second)
		},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, 1, nil, func(ctx context.Context, x *fakes) {
				settled()
				require.Equal(t, "replica1:5432", x.read(ctx))
				x.replicas[0].FailNextWith(1, refusal)
				require.Equal(t, "primary:5432", x.read(ctx))
				require.Equal(t, WhySetupFails, x.peer("replica1").Unfit)
				time.Sleep(10 * time.Second)
				require.Equal(t, "primary:5432", x.read(ctx))
				mend(x)
				require.Eventually(t, func() bool { return x.read(ctx) == "replica1:5432" }, 20*time.Second, 100*time.Millisecond)
			})
		})
	}
}

// The one that answers in time is of another cluster. It is elected, outvoted, and what runs there must not go on.
func TestAStrangerThatWasElectedIsCut(t *testing.T) {
	bubble(t, 2, func(c *Options) { c.CheckInterval = time.Second }, func(ctx context.Context, x *fakes) {
		settled()
		stranger := pgfake.New(pgfake.Options{SystemID: 2})
		stranger.Handle(func(s pgfake.Statement) *pgfake.Response {
			if !asksLook(s) {
				return nil
			}
			return lookAnswer(s, sight{role: RolePrimary, system: 2, timeline: 1, position: 8192})
		})
		x.plug("primary:5432", stranger)
		for _, r := range x.replicas {
			r.Delay(600 * time.Millisecond)
		}
		p, err := Open(t.Context(), Options{Config: x.pool.Config(), CheckInterval: time.Second})
		require.NoError(t, err)
		defer p.Close()
		tx, err := p.Begin(ctx)
		require.NoError(t, err)
		time.Sleep(5 * time.Second)
		require.Equal(t, WhyOtherCluster, p.Status().Peers[0].Unfit)
		_, err = tx.Exec(ctx, "insert into t values (2)")
		assert.Error(t, err)
		assert.Error(t, tx.Commit(ctx))
		assert.Zero(t, stranger.Applied("insert into t values (2)"))
	})
}

// A new pool, whose primary answers after the others have been waited for: they are looked at again before it is used. More
// callers than may wait for a lost server wait for that, as they would on a pgxpool.
func TestCallersOfANewPoolWaitForItsFirstPrimaryHoweverManyTheyAre(t *testing.T) {
	bubble(t, 2, nil, func(ctx context.Context, x *fakes) {
		for _, r := range x.replicas {
			r.Delay(300 * time.Millisecond)
		}
		x.primary.Delay(900 * time.Millisecond)
		p, err := Open(t.Context(), Options{Config: x.pool.Config(), MaxWaiting: 5})
		require.NoError(t, err)
		defer p.Close()
		var all sync.WaitGroup
		for range 20 {
			all.Go(func() {
				_, err := p.Exec(ctx, "insert into t values (1)")
				assert.NoError(t, err)
			})
		}
		waited := false
		for p.Status().Primary == "" {
			waited = waited || p.topology.Load().heir != nil
			time.Sleep(10 * time.Millisecond)
		}
		assert.True(t, waited, "else nothing is tested here")
		all.Wait()
	})
}

func TestAnObjectThatAStandbyDoesNotKnowYetIsReadFromThePrimary(t *testing.T) {
	bubble(t, 2, nil, func(ctx context.Context, x *fakes) {
		for _, p := range x.replicas {
			p.Handle(answering(func(s pgfake.Statement) *pgfake.Response {
				if s.SQL != "select v from fresh" {
					return nil
				}
				return &pgfake.Response{Err: &pgfake.Error{Code: "42P01", Message: `relation "fresh" does not exist`}}
			}))
		}
		for range 3 {
			x.journal.take()
			require.NoError(t, x.pool.QueryRow(ctx, "select v from fresh").Scan(new(int)))
			assert.Len(t, x.journal.take(), 2, "once on the primary, and not remembered")
		}
		assert.Zero(t, x.pool.texts.Learned())
	})
}

func TestARecoveryConflictIsReadElsewhere(t *testing.T) {
	bubble(t, 2, nil, func(ctx context.Context, x *fakes) {
		settled()
		x.replicas[0].Handle(answering(func(s pgfake.Statement) *pgfake.Response {
			if s.Preparing || s.SQL != "select 1" {
				return nil
			}
			return &pgfake.Response{Err: &pgfake.Error{Code: "40001", Routine: "ProcessInterrupts", Message: "canceling statement due to conflict with recovery"}}
		}))
		for range 30 {
			assert.Equal(t, "replica2:5432", x.read(ctx))
		}
		assert.Zero(t, x.peer("replica1").Trips)
		assert.Equal(t, HealthUp, x.peer("replica1").Health)
	})
}

func TestMonitorsWithoutConnectionsOfTheirOwnLookThroughThePools(t *testing.T) {
	bubble(t, 2, func(c *Options) { c.NoMonitorConns = true }, func(ctx context.Context, x *fakes) {
		x.read(ctx)
		_, err := x.pool.Exec(ctx, "insert into t values (1)")
		require.NoError(t, err)
		time.Sleep(time.Minute)
		for _, p := range append(x.replicas, x.primary) {
			assert.LessOrEqual(t, p.Conns(), 2, "a look and a call may meet")
			assert.GreaterOrEqual(t, looksAt(p), 10)
		}
		var held []*pgxpool.Conn
		for range 10 {
			c, err := x.pool.Acquire(WithPeer(ctx, "replica2:5432"))
			require.NoError(t, err)
			held = append(held, c)
		}
		time.Sleep(time.Minute)
		assert.Equal(t, HealthUp, x.peer("replica2").Health, "a full pool is no fault of the peer")
		for _, c := range held {
			c.Release()
		}
		x.replicas[0].Die()
		for range 20 {
			x.read(ctx)
		}
		settled()
		assert.Equal(t, BreakerOpen, x.peer("replica1").Breaker)
		x.replicas[0].Revive()
		time.Sleep(2 * time.Second)
		assert.Equal(t, BreakerClosed, x.peer("replica1").Breaker)
	})
}

// A pooler reports the role of some earlier session.
func TestTheRoleOfAProxyIsAskedNeverBelieved(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		lying := pgfake.New(pgfake.Options{Standby: true, Params: map[string]string{"in_hot_standby": "off"}})
		honest := pgfake.New(pgfake.Options{})
		network := pgfake.Network{"pooler:6432": lying, "primary:5432": honest}
		defer network.Close()
		lying.Handle(answering(nil))
		honest.Handle(answering(nil))
		pool, err := ParseConfig("postgres://app@primary/app?sslmode=disable")
		require.NoError(t, err)
		pool.ConnConfig.DialFunc, pool.ConnConfig.LookupFunc = network.Dial, pgfake.Lookup
		p, err := Open(t.Context(), Options{Config: pool, Peers: []Peer{
			{Host: "primary"}, {Host: "pooler", Port: 6432, Proxy: true},
		}})
		require.NoError(t, err)
		defer p.Close()
		for range 20 {
			require.NoError(t, p.QueryRow(t.Context(), "select 1").Scan(new(int)))
		}
		assert.Equal(t, RoleReplica, p.Status().Peers[1].Role)
		assert.Equal(t, 20, lying.Count("select 1"))
	})
}

func TestCloseWakesThoseWhoWait(t *testing.T) {
	bubble(t, 1, func(c *Options) { c.Wait = time.Hour }, func(ctx context.Context, x *fakes) {
		x.read(ctx)
		x.primary.Die()
		_ = x.pool.Ping(withTimeout(t, time.Second))
		settled()
		done := make(chan error)
		go func() { _, err := x.pool.Exec(ctx, "insert into t values (1)"); done <- err }()
		settled()
		x.pool.Close()
		assert.ErrorContains(t, <-done, "closed pool")
	})
}

func TestAPoolAtRestLooksNowAndThenAndNoMore(t *testing.T) {
	bubble(t, 2, nil, func(ctx context.Context, x *fakes) {
		time.Sleep(100 * time.Second)
		for _, p := range append(x.replicas, x.primary) {
			assert.InDelta(t, 20+3, p.Count(lookFull), 4+1, "one each 5 s, and on a new connection each 30 s")
			assert.InDelta(t, 20+3, looksAt(p), 4+1)
			assert.Equal(t, 1, p.Conns(), "the monitor's own")
		}
		_ = ctx
	})
}

func TestAServerThatRefusesUsIsKnockedAtNowAndThen(t *testing.T) {
	bubble(t, 2, nil, func(ctx context.Context, x *fakes) {
		settled()
		x.replicas[0].StartupError("28P01")
		x.replicas[0].CutConns()
		settled()
		time.Sleep(time.Second)
		assert.Equal(t, HealthMisconfigured, x.peer("replica1").Health)
		x.replicas[0].ResetCounters()
		for range 60 {
			assert.Equal(t, "replica2:5432", x.read(ctx))
			time.Sleep(time.Second)
		}
		assert.LessOrEqual(t, x.replicas[0].Dials(), 16)
		x.replicas[0].StartupError("")
		time.Sleep(7 * time.Second)
		assert.Equal(t, HealthUp, x.peer("replica1").Health)
		assert.Zero(t, x.peer("replica1").Trips)
	})
}

func TestACallFailedByAStaleConnectionGoesOnSoon(t *testing.T) {
	bubble(t, 1, nil, func(ctx context.Context, x *fakes) {
		settled()
		var held []*pgxpool.Conn
		for range 3 {
			c, err := x.pool.Acquire(ctx)
			require.NoError(t, err)
			held = append(held, c)
		}
		for _, c := range held {
			c.Release()
		}
		x.primary.CutConns()
		time.Sleep(time.Second) // the sentinel has woken, the probe has its answer
		for range 3 {
			begun := time.Now()
			tx, err := x.pool.Begin(ctx)
			require.NoError(t, err)
			require.NoError(t, tx.Rollback(ctx))
			assert.Less(t, time.Since(begun), 200*time.Millisecond)
		}
	})
}

func TestAnOutageOfTheProgramsSecretStoreIsNoDeath(t *testing.T) {
	var out atomic.Bool
	bubble(t, 2, func(c *Options) {
		c.Config.BeforeConnect = func(context.Context, *pgx.ConnConfig) error {
			if out.Load() {
				return errors.New("the secret store is out")
			}
			return nil
		}
	}, func(ctx context.Context, x *fakes) {
		settled()
		_, err := x.pool.Exec(ctx, "insert into t values (1)")
		require.NoError(t, err)
		out.Store(true)
		_ = x.pool.peers()[0].monitor.conn.PgConn().Conn().Close() // the monitor's session ends
		time.Sleep(10 * time.Second)
		_, err = x.pool.Exec(ctx, "insert into t values (2)")
		require.NoError(t, err, "the connections that there are go on")
		assert.Zero(t, x.peer("primary").Trips)
	})
}

func TestAWriteLostBehindItsFirstRowIsMarked(t *testing.T) {
	const insert = "insert into t values (7) returning v"
	bubble(t, 1, nil, func(ctx context.Context, x *fakes) {
		settled()
		x.primary.Handle(answering(func(s pgfake.Statement) *pgfake.Response {
			if s.Preparing || s.SQL != insert {
				return nil
			}
			return &pgfake.Response{Cut: pgfake.CutBeforeTag}
		}))
		require.ErrorIs(t, x.pool.QueryRow(ctx, insert).Scan(new(int)), ErrOutcomeUnknown)
		rows, err := x.pool.Query(ctx, insert)
		require.NoError(t, err)
		for rows.Next() {
		}
		require.ErrorIs(t, rows.Err(), ErrOutcomeUnknown)
		batch := &pgx.Batch{}
		batch.Queue(insert)
		results := x.pool.SendBatch(ctx, batch)
		_, err = results.Exec()
		require.ErrorIs(t, err, ErrOutcomeUnknown)
		require.ErrorIs(t, results.Close(), ErrOutcomeUnknown)
		assert.Equal(t, 3, x.primary.Applied(insert))

		batch = &pgx.Batch{}
		batch.Queue(insert)
		results = x.pool.SendBatch(ctx, batch)
		rows, err = results.Query()
		require.NoError(t, err)
		_, err = pgx.CollectRows(rows, pgx.RowTo[int])
		require.ErrorIs(t, err, ErrOutcomeUnknown, "a program may stop here")
		require.ErrorIs(t, results.Close(), ErrOutcomeUnknown)
		require.ErrorIs(t, rows.Err(), ErrOutcomeUnknown, "behind Close too")
		assert.Equal(t, 4, x.primary.Applied(insert))
	})
}

// A route says where a statement goes. Whether it writes its text says.
func TestAWriteByQueryIsOneUnderAnExplicitRoute(t *testing.T) {
	const insert = "insert into t values (7) returning v"
	configure := func(c *Options) { c.Models = map[string]Route{"payments": {Target: TargetPrimary, Retry: RetryReads}} }
	bubble(t, 1, configure, func(ctx context.Context, x *fakes) {
		settled()
		x.primary.Handle(answering(func(s pgfake.Statement) *pgfake.Response {
			if s.Preparing || s.SQL != insert {
				return nil
			}
			return &pgfake.Response{Cut: pgfake.CutBeforeAnswer}
		}))
		for i, route := range []context.Context{
			WithPrimary(ctx), WithModel(ctx, "payments"), WithPeer(ctx, "primary:5432"), WithPeer(ctx, "replica1:5432", "primary:5432"),
			WithRoute(ctx, Route{Target: TargetPrimary, Retry: RetryReads}),
		} {
			require.ErrorIs(t, x.pool.QueryRow(route, insert).Scan(new(int)), ErrOutcomeUnknown, "route %d", i)
			assert.Equal(t, i+1, x.primary.Applied(insert), "route %d: sent once", i)
		}
		var refused *pgconn.PgError
		require.ErrorAs(t, x.pool.QueryRow(WithPeer(ctx, "replica1:5432"), insert).Scan(new(int)), &refused, "the route wins")
	})
}

func TestAReadOnlyTransactionIsLeftAloneWhenItsReplicaHangs(t *testing.T) {
	bubble(t, 2, nil, func(ctx context.Context, x *fakes) {
		settled()
		tx, err := x.pool.BeginTx(WithPeer(ctx, "replica1:5432"), pgx.TxOptions{AccessMode: pgx.ReadOnly})
		require.NoError(t, err)
		x.replicas[0].Hang()
		done := make(chan error)
		go func() { done <- tx.QueryRow(ctx, "select 1").Scan(new(int)) }()
		time.Sleep(1500 * time.Millisecond)
		assert.Equal(t, HealthDown, x.peer("replica1").Health)
		x.replicas[0].Thaw()
		require.NoError(t, <-done, "a server that wakes has lost nothing")
		require.NoError(t, tx.Commit(ctx))
	})
}

func TestASlowPeerCanBeNamed(t *testing.T) {
	bubble(t, 2, nil, func(ctx context.Context, x *fakes) {
		settled()
		x.pool.observe(observation{peer: x.pool.peers()[1], slow: yes})
		for range 20 {
			assert.Equal(t, "replica2:5432", x.read(ctx))
		}
		assert.Equal(t, "replica1:5432", x.read(WithPeer(ctx, "replica1:5432")))
		assert.Equal(t, "replica1:5432", x.read(WithRoute(ctx, Route{Target: TargetReplica, Peers: []string{"replica1:5432"}})))
	})
}

// On a new connection pgx prepares a statement before it runs it: a peer whose connections are all new is no slower for it.
func TestAPeerWithNewConnectionsIsNotSlowForThat(t *testing.T) {
	bubble(t, 2, nil, func(ctx context.Context, x *fakes) {
		settled()
		for i, trip := range []time.Duration{60 * time.Millisecond, 30 * time.Millisecond} {
			x.replicas[i].Delay(trip)
			x.replicas[i].Handle(answering(func(s pgfake.Statement) *pgfake.Response {
				if s.Preparing {
					time.Sleep(trip)
				}
				return nil
			}))
		}
		reads := func(name string, n int) {
			var callers sync.WaitGroup
			for range 10 {
				callers.Go(func() {
					for range n {
						assert.NoError(t, x.pool.QueryRow(WithPeer(ctx, name+":5432"), "select 1").Scan(new(int)))
					}
				})
			}
			callers.Wait()
		}
		reads("replica2", 20)
		require.NotZero(t, x.pool.peers()[2].latency.median())
		for range 4 {
			reads("replica1", 1) // each on a new connection, and then on one of these
			time.Sleep(time.Second)
			assert.False(t, x.peer("replica1").Slow)
		}
		reads("replica1", 20)
		assert.False(t, x.peer("replica1").Slow)
		assert.NotZero(t, x.pool.peers()[1].latency.median())
	})
}

// What was measured of a peer before its fall says nothing about it afterwards.
func TestAPeerThatWasSlowIsNotWhenItReturns(t *testing.T) {
	bubble(t, 2, nil, func(ctx context.Context, x *fakes) {
		settled()
		slow := x.pool.peers()[1]
		for range latencySample {
			slow.latency.note(time.Second)
			x.pool.peers()[2].latency.note(time.Millisecond)
		}
		time.Sleep(time.Second)
		require.True(t, x.peer("replica1").Slow)
		x.replicas[0].Die()
		time.Sleep(time.Second)
		require.Equal(t, HealthDown, x.peer("replica1").Health)
		assert.False(t, x.peer("replica1").Slow)
		assert.Zero(t, slow.latency.median())
		assert.Zero(t, slow.latency.typical(), "nor is a balancer told what it was")
		x.replicas[0].Revive()
		for x.peer("replica1").Health != HealthUp {
			time.Sleep(10 * time.Millisecond)
		}
		assert.False(t, x.peer("replica1").Slow)
		time.Sleep(time.Second)
		assert.False(t, x.peer("replica1").Slow)
	})
}

// A report among short reads makes nobody slow: the rest are as quick as ever.
func TestOneLongReadMakesNobodySlow(t *testing.T) {
	bubble(t, 2, nil, func(ctx context.Context, x *fakes) {
		settled()
		for _, r := range x.replicas {
			r.Handle(answering(func(s pgfake.Statement) *pgfake.Response {
				if s.SQL == "report" && !s.Preparing {
					return &pgfake.Response{Delay: 5 * time.Second}
				}
				return nil
			}))
			r.Delay(time.Millisecond)
		}
		done := make(chan error, 1)
		go func() {
			rows, err := x.pool.Query(ctx, "report")
			if err == nil {
				rows.Close()
			}
			done <- err
		}()
		for range 160 {
			x.read(ctx)
			time.Sleep(25 * time.Millisecond)
			if x.peer("replica1").Slow || x.peer("replica2").Slow {
				t.Error("slow")
			}
		}
		require.NoError(t, <-done)
	})
}

// Both accept writes; what is written to the old one is lost.
func TestAReplacedPrimaryIsCutAndGetsNoWrite(t *testing.T) {
	bubble(t, 2, func(c *Options) { c.CheckInterval = time.Second }, func(ctx context.Context, x *fakes) {
		settled()
		tx, err := x.pool.Begin(ctx)
		require.NoError(t, err)
		x.primary.Handle(answering(func(s pgfake.Statement) *pgfake.Response {
			if s.SQL == "insert into t values (1)" && !s.Preparing {
				return &pgfake.Response{Hang: true}
			}
			return nil
		}))
		stuck := make(chan error)
		go func() { _, err := x.pool.Exec(ctx, "insert into t values (1)"); stuck <- err }()
		time.Sleep(100 * time.Millisecond)
		x.replicas[0].Promote()
		require.ErrorIs(t, <-stuck, ErrOutcomeUnknown)
		settled() // one connection after the other is cut
		assert.Equal(t, "replica1:5432", x.pool.Status().Primary)
		_, err = tx.Exec(ctx, "insert into t values (2)")
		require.Error(t, err, "the transaction was on the old one")
		_ = tx.Rollback(ctx)
		for range 20 {
			_, err := x.pool.Exec(ctx, "insert into t values (3)")
			require.NoError(t, err)
			assert.NotEqual(t, "primary:5432", x.read(ctx), "nor a read")
		}
		assert.Zero(t, x.primary.Applied("insert into t values (3)"))
		assert.Zero(t, x.primary.Applied("insert into t values (2)"))
		x.primary.SetStandby(true) // it comes back as a standby of the new one
		x.primary.SetTimeline(2)
		time.Sleep(3 * time.Second)
		served := map[string]bool{}
		for range 50 {
			served[x.read(ctx)] = true
		}
		assert.True(t, served["primary:5432"], "and serves reads")
	})
}

// A failover manager takes half a minute. While somebody waits the looks stay eager, and the replica that is promoted has a
// connection at hand; where nobody waits they are eased.
func TestAPromotionAfterHalfAMinuteIsFollowedAtOnce(t *testing.T) {
	for _, waits := range []bool{true, false} {
		bubble(t, 2, func(c *Options) { c.Wait = time.Minute }, func(ctx context.Context, x *fakes) {
			_, err := x.pool.Exec(ctx, "insert into t values (1)")
			require.NoError(t, err)
			x.primary.Die()
			time.Sleep(time.Second)
			ended := make(chan time.Time, 1)
			write := func() {
				_, err := x.pool.Exec(ctx, "insert into t values (2)")
				assert.NoError(t, err)
				ended <- time.Now()
			}
			if waits {
				go write()
			}
			time.Sleep(30 * time.Second)
			next := x.replicas[0]
			assert.Equal(t, 2, next.Conns(), "the monitor's and one at hand")
			next.ResetCounters()
			time.Sleep(time.Second)
			if waits {
				assert.InDelta(t, 40, looksAt(next), 4)
				assert.InDelta(t, 36, next.Syncs(), 4, "all but a few ask no statement")
			} else {
				assert.InDelta(t, 4, looksAt(next), 2)
				go write()
				settled()
			}
			dials := next.Dials()
			next.Promote()
			promoted := time.Now()
			bound := 30 * time.Millisecond
			if !waits {
				bound = 300 * time.Millisecond
			}
			assert.LessOrEqual(t, (<-ended).Sub(promoted), bound)
			assert.LessOrEqual(t, next.Dials(), dials+1, "the monitor dials anew where a role has changed")
		})
	}
}

// A primary that comes back after another was promoted is fenced, whatever it says, and the event is told once.
func TestAPrimaryOfAnOlderTimelineIsFencedOnce(t *testing.T) {
	var events primaryEvents
	bubble(t, 2, func(c *Options) { c.Hooks = JoinHooks(c.Hooks, events.hooks()) }, func(ctx context.Context, x *fakes) {
		settled()
		x.replicas[0].Promote()
		for range 60 {
			time.Sleep(time.Second)
			_, _ = x.pool.Exec(ctx, "insert into t values (1)")
		}
		assert.Equal(t, "replica1:5432", x.pool.Status().Primary)
		x.primary.ResetCounters()
		for range 20 {
			time.Sleep(time.Second)
			_, err := x.pool.Exec(ctx, "insert into t values (1)")
			require.NoError(t, err)
			assert.Equal(t, "replica2:5432", x.read(ctx))
		}
		assert.Zero(t, x.primary.Count("insert into t values (1)"))
		settled()
		heard := events.list()
		require.Len(t, heard, 2, "%+v", heard)
		assert.Equal(t, "primary:5432", heard[0].Primary)
		assert.Equal(t, "replica1:5432", heard[1].Primary)
		assert.Equal(t, "primary:5432", heard[1].Previous)
		assert.Equal(t, []string{"primary:5432"}, heard[1].Rivals)
		assert.EqualValues(t, 2, heard[1].Timeline)
	})
}

// A replica falls behind and catches up, by the positions that the looks see.
func TestAReplicaBehindItsBoundIsLeftOutUntilItHasCaughtUp(t *testing.T) {
	bubble(t, 2, func(c *Options) { c.MaxLag = Lag{Bytes: 1000} }, func(ctx context.Context, x *fakes) {
		var position, replayed atomic.Uint64
		position.Store(1 << 20)
		replayed.Store(1 << 20)
		answer := func(seen func() sight) pgfake.Handler {
			return func(s pgfake.Statement) *pgfake.Response {
				if !asksLook(s) {
					return nil
				}
				return lookAnswer(s, seen())
			}
		}
		x.primary.Handle(answer(func() sight {
			return sight{role: RolePrimary, system: 1, timeline: 1, position: lsn(position.Load())}
		}))
		x.replicas[0].Handle(answer(func() sight {
			return sight{role: RoleReplica, system: 1, timeline: 1, position: lsn(replayed.Load())}
		}))
		x.replicas[1].Handle(answer(func() sight {
			return sight{role: RoleReplica, system: 1, timeline: 1, position: lsn(position.Load())}
		}))
		time.Sleep(5 * time.Second)
		served := func() map[string]int {
			n := map[string]int{}
			for range 50 {
				n[x.read(ctx)]++
			}
			return n
		}
		assert.Len(t, served(), 2)
		position.Add(1001)
		time.Sleep(2 * time.Second)
		assert.Equal(t, map[string]int{"replica2:5432": 50}, served())
		assert.Equal(t, WhyBehind, x.peer("replica1").Unfit)
		assert.EqualValues(t, 1001, x.peer("replica1").Lag.Bytes)
		assert.InDelta(t, 1, x.peer("replica1").Lag.Time.Seconds(), 1)
		version := x.pool.topology.Load()
		time.Sleep(time.Minute)
		assert.Same(t, version, x.pool.topology.Load(), "looks that find everything as it was wake nobody")
		replayed.Store(position.Load())
		time.Sleep(2 * time.Second)
		assert.Len(t, served(), 2)
	})
}

// A primary that becomes a replica while its connections live on, as behind something that moves: they are not used again.
func TestADemotedPrimarysConnectionsAreClosed(t *testing.T) {
	bubble(t, 1, nil, func(ctx context.Context, x *fakes) {
		_, err := x.pool.Exec(ctx, "insert into t values (1)")
		require.NoError(t, err)
		assert.Equal(t, 2, x.primary.Conns())
		dials := x.primary.Dials()
		x.primary.SetStandby(true)
		time.Sleep(6 * time.Second)
		settled()
		assert.Equal(t, "replica", x.peer("primary").Role.String())
		assert.Equal(t, 2, x.primary.Conns(), "the monitor's, and a new one at hand")
		assert.LessOrEqual(t, x.primary.Dials(), dials+3, "the monitor dials anew where a role has changed, and each 5 s without a primary")
	})
}

// A program is started in the midst of a failover: only replicas answer, then one is promoted.
func TestAProgramThatStartsInAFailoverFollowsItAtOnce(t *testing.T) {
	worst := time.Duration(0)
	failed := 0
	for range 20 {
		bubble(t, 2, nil, func(ctx context.Context, x *fakes) {
			// a second pool over the same peers, opened while the primary is dead
			settled()
			x.primary.Die()
			config := x.pool.Config()
			second, err := Open(t.Context(), Options{Config: config})
			require.NoError(t, err)
			defer second.Close()
			time.Sleep(time.Second)
			done := make(chan error, 1)
			go func() { _, err := second.Exec(ctx, "insert into t values (1)"); done <- err }()
			time.Sleep(50 * time.Millisecond)
			x.replicas[0].Promote()
			promoted := time.Now()
			if err := <-done; err != nil {
				failed++
			}
			worst = max(worst, time.Since(promoted))
		})
	}
	assert.Zero(t, failed)
	assert.Less(t, worst, 100*time.Millisecond)
}

// It is what a program that starts in a failover waits in.
func TestWaitForPrimaryHasThePeersLookedAt(t *testing.T) {
	bubble(t, 2, nil, func(ctx context.Context, x *fakes) {
		settled()
		x.primary.Die()
		second, err := Open(t.Context(), Options{Config: x.pool.Config()})
		require.NoError(t, err)
		defer second.Close()
		time.Sleep(1500 * time.Millisecond)
		done := make(chan error)
		go func() { done <- second.WaitForPrimary(ctx) }()
		time.Sleep(50 * time.Millisecond)
		x.replicas[0].Promote()
		promoted := time.Now()
		require.NoError(t, <-done)
		assert.Less(t, time.Since(promoted), 50*time.Millisecond)
		assert.Zero(t, second.Status().Waiting)
	})
}

func TestWaitForPrimaryTakesNoPlaceOfACall(t *testing.T) {
	bubble(t, 1, func(c *Options) { c.MaxWaiting = 1 }, func(ctx context.Context, x *fakes) {
		settled()
		require.NoError(t, drainPrimary(x.pool, ctx))
		ctx, cancel := context.WithCancel(ctx)
		done := make(chan error)
		go func() { done <- x.pool.WaitForPrimary(ctx) }()
		settled()
		go func() { time.Sleep(time.Second); assert.NoError(t, x.pool.Resume("primary:5432")) }()
		_, err := x.pool.Exec(ctx, "insert into t values (3)")
		assert.NoError(t, err)
		cancel()
		<-done
	})
}

// A hard bound in bytes, said by a context for the first time: the replica's last measure is seconds old.
func TestABoundInBytesIsNotKeptByAnOldMeasure(t *testing.T) {
	bubble(t, 1, nil, func(ctx context.Context, x *fakes) {
		var position, replayed atomic.Uint64
		position.Store(1 << 20)
		replayed.Store(1 << 20)
		x.primary.Handle(func(s pgfake.Statement) *pgfake.Response {
			if !asksLook(s) {
				return nil
			}
			return lookAnswer(s, sight{role: RolePrimary, system: 1, timeline: 1, position: lsn(position.Load())})
		})
		x.replicas[0].Handle(func(s pgfake.Statement) *pgfake.Response {
			if !asksLook(s) {
				return nil
			}
			return lookAnswer(s, sight{role: RoleReplica, system: 1, timeline: 1, position: lsn(replayed.Load())})
		})
		time.Sleep(11 * time.Second)
		// both were looked at; now replay stops and the primary writes 1 GB in the next three seconds
		position.Add(1 << 30)
		time.Sleep(3 * time.Second)
		stale := 0
		for range 20 {
			bound := WithRoute(ctx, Route{MaxLag: Lag{Bytes: 1 << 20}})
			if x.read(bound) != "primary:5432" {
				stale++
			}
		}
		t.Logf("%d of 20 reads under a bound of 1 MB from a replica that is 1 GB behind", stale)
		assert.Zero(t, stale)
	})
}

// A hard bound in time; the call waits for a connection of the replica that was chosen.
func TestABoundHoldsForACallThatHasWaited(t *testing.T) {
	bubble(t, 1, func(c *Options) { c.Config.MaxConns = 1; c.StallAfter = Off }, func(ctx context.Context, x *fakes) {
		var position, replayed atomic.Uint64
		position.Store(1 << 20)
		replayed.Store(1 << 20)
		var servedAt time.Time
		var behindSince time.Time
		x.primary.Handle(func(s pgfake.Statement) *pgfake.Response {
			if !asksLook(s) {
				return nil
			}
			return lookAnswer(s, sight{role: RolePrimary, system: 1, timeline: 1, position: lsn(position.Load())})
		})
		x.replicas[0].Handle(func(s pgfake.Statement) *pgfake.Response {
			switch {
			case s.SQL == "select slow" && !s.Preparing:
				return &pgfake.Response{Delay: 10 * time.Second}
			case s.SQL == "select fresh" && !s.Preparing:
				servedAt = time.Now()
			case asksLook(s):
				return lookAnswer(s, sight{role: RoleReplica, system: 1, timeline: 1, position: lsn(replayed.Load())})
			}
			return nil
		})
		bound := WithRoute(ctx, Route{MaxLag: Lag{Time: 2 * time.Second}})
		x.pool.routeOf(bound)
		time.Sleep(5 * time.Second)
		go func() {
			r, err := x.pool.Query(WithPreferReplica(ctx), "select slow")
			if err == nil {
				r.Close()
			}
		}()
		time.Sleep(100 * time.Millisecond)
		done := make(chan error, 1)
		go func() {
			r, err := x.pool.Query(bound, "select fresh")
			if err == nil {
				r.Close()
			}
			done <- err
		}()
		time.Sleep(100 * time.Millisecond)
		position.Add(1 << 30) // the replica stops replaying
		behindSince = time.Now()
		select {
		case err := <-done:
			t.Logf("err %v", err)
		case <-time.After(60 * time.Second):
		}
		t.Logf("served by the replica: %v, %v after it had stopped replaying (bound 2 s)", !servedAt.IsZero(), servedAt.Sub(behindSince))
		assert.True(t, servedAt.IsZero() || servedAt.Sub(behindSince) < 2*time.Second)
		trips := x.journal.take()
		assert.Equal(t, Decision{Peer: "primary:5432", Reason: ReasonReplicasBehind, Attempt: 2, Kind: KindRead}, trips[len(trips)-1])
	})
}

// A replica that cannot be asked everything, beside a primary that can, is promoted.
func TestAPromotedReplicaThatCouldNotTellEverything(t *testing.T) {
	t.Run("a look is the first to see it", func(t *testing.T) { testAPromotedModestReplica(t, false) })
	t.Run("a session is the first to tell", func(t *testing.T) { testAPromotedModestReplica(t, true) })
}

func testAPromotedModestReplica(t *testing.T, bySession bool) {
	bubble(t, 1, nil, func(ctx context.Context, x *fakes) {
		modest := answering(nil)
		var once atomic.Bool
		x.replicas[0].Handle(func(s pgfake.Statement) *pgfake.Response {
			if s.Standby && s.SQL != looks[2] && !s.Preparing && s.SQL != "insert into t values (1)" && (s.SQL == looks[0] || s.SQL == looks[1]) {
				once.Store(true)
				return &pgfake.Response{Err: &pgfake.Error{Code: "0A000", Message: "Function pg_last_wal_replay_lsn() is currently not supported"}}
			}
			if s.SQL == looks[2] {
				return &pgfake.Response{Columns: []pgfake.Column{{Name: "s", OID: pgfake.BoolOID}, {Name: "a", OID: pgfake.TextOID}, {Name: "b", OID: pgfake.TextOID}, {Name: "c", OID: pgfake.TextOID}, {Name: "d", OID: pgfake.TextOID}, {Name: "e", OID: pgfake.TextOID}, {Name: "f", OID: pgfake.TextOID}, {Name: "g", OID: pgfake.TextOID}, {Name: "h", OID: pgfake.TextOID}},
					Rows: [][]any{{s.Standby, nil, nil, nil, nil, nil, nil, nil, nil}}}
			}
			return modest(s)
		})
		x.pool.Reset()
		time.Sleep(6 * time.Second)
		require.True(t, once.Load())
		require.EqualValues(t, 2, x.pool.peers()[1].monitor.modesty.Load())
		if bySession {
			_, err := x.pool.Exec(WithPeer(ctx, "replica1:5432"), "select 1")
			require.NoError(t, err)
			x.replicas[0].Promote()
			_, err = x.pool.Exec(WithPeer(ctx, "replica1:5432"), "select 1")
			require.NoError(t, err)
			settled()
			require.Equal(t, RolePrimary, x.peer("replica1").Role)
			x.primary.Die()
		} else {
			x.primary.Die()
			x.replicas[0].Promote()
		}
		time.Sleep(time.Minute)
		_, err := x.pool.Exec(ctx, "insert into t values (1)")
		t.Logf("a minute after the promotion: %v; status %+v", err, x.peer("replica1").Timeline)
		assert.NoError(t, err)
	})
}

// Calls that hold connections and run nothing, one after another, are no hang, though nothing ends and at every tick some wait.
func TestWhoWaitsWhileOthersAreServedMakesNobodySuspect(t *testing.T) {
	bubble(t, 1, func(c *Options) { c.Config.MaxConns = 1 }, func(ctx context.Context, x *fakes) {
		settled()
		dials := x.primary.Dials()
		end := time.Now().Add(10 * time.Second)
		var wg sync.WaitGroup
		for range 3 {
			wg.Go(func() {
				for time.Now().Before(end) {
					c, err := x.pool.Acquire(ctx)
					if !assert.NoError(t, err) {
						return
					}
					time.Sleep(60 * time.Millisecond)
					c.Release()
				}
			})
		}
		wg.Wait()
		assert.Equal(t, dials+1, x.primary.Dials(), "no probe")
	})
}
