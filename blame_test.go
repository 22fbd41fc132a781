package multipool

import (
	"context"
	"fmt"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/pgmultipool/multipool/internal/pgfake"
)

// A server is judged for what it did: not for what the program or its own settings ended, nor for what failed here.

// unblamed checks that nobody has fallen, and that the hooks were told of no suspicion.
func (x *fakes) unblamed() {
	x.t.Helper()
	settled()
	for _, ps := range x.pool.Status().Peers {
		assert.Zero(x.t, ps.Trips, ps.Name)
		assert.Equal(x.t, HealthUp, ps.Health, ps.Name)
	}
}

// suspicions counts what the hooks are told of.
func suspicions(c *Options) *int {
	var mu sync.Mutex
	n := new(int)
	own := c.Hooks.PeerChanged
	hooks := *c.Hooks
	hooks.PeerChanged = func(e PeerEvent) {
		mu.Lock()
		defer mu.Unlock()
		if e.To == HealthSuspect {
			*n++
		}
		if own != nil {
			own(e)
		}
	}
	c.Hooks = &hooks
	return n
}

func TestAStatementOnAClosedConnectionBlamesNobody(t *testing.T) {
	var suspected *int
	bubble(t, 1, func(c *Options) { suspected = suspicions(c) }, func(ctx context.Context, x *fakes) {
		var txs []pgx.Tx
		for range 10 {
			tx, err := x.pool.Begin(ctx)
			require.NoError(t, err)
			txs = append(txs, tx)
		}
		settled()
		x.primary.EndConns(pgfake.Error{Severity: "FATAL", Code: "25P03", Message: "terminating connection due to idle-in-transaction timeout"})
		for _, tx := range txs {
			_, err := tx.Exec(ctx, "insert into t values (1)")
			require.ErrorContains(t, err, "25P03")
			require.Error(t, tx.Rollback(ctx), "the connection is closed")
			settled()
		}
		x.unblamed()
		assert.Zero(t, *suspected, "after the server has ended the sessions")

		for range 10 {
			tx, err := x.pool.Begin(ctx)
			require.NoError(t, err)
			x.primary.Handle(answering(func(s pgfake.Statement) *pgfake.Response {
				if s.SQL == "select slow" {
					return &pgfake.Response{Hang: true}
				}
				return nil
			}))
			late, cancel := context.WithTimeout(ctx, 10*time.Millisecond)
			_, err = tx.Exec(late, "select slow")
			cancel()
			require.ErrorIs(t, err, context.DeadlineExceeded)
			require.Error(t, tx.Rollback(ctx), "the connection is closed")
			settled()
		}
		x.unblamed()
		assert.Zero(t, *suspected, "after a caller's deadline")
	})
}

func TestAnIdleSessionOfTheMonitorsThatIsEndedBlamesNobody(t *testing.T) {
	var suspected *int
	bubble(t, 1, func(c *Options) { suspected = suspicions(c) }, func(ctx context.Context, x *fakes) {
		x.read(ctx)
		settled()
		x.replicas[0].ResetCounters()
		for range 23 {
			time.Sleep(time.Second)
			x.replicas[0].EndConns(pgfake.Error{Severity: "FATAL", Code: "57P05", Message: "terminating connection due to idle-session timeout"})
			settled()
		}
		x.unblamed()
		assert.Zero(t, *suspected)
		assert.LessOrEqual(t, x.replicas[0].Dials(), 6, "a session for each regular look")
		x.replicas[0].Die()
		time.Sleep(15 * time.Second)
		settled()
		assert.Equal(t, HealthDown, x.peer("replica1").Health, "it goes on looking")
	})
}

// transaction_timeout of PostgreSQL 17 ends a session whose transaction takes too long, a single statement's included.
func TestATransactionThatTakesTooLongIsNobodysFaultAndNotRunAgain(t *testing.T) {
	const slow = "select slow"
	var suspected *int
	bubble(t, 2, func(c *Options) { suspected = suspicions(c) }, func(ctx context.Context, x *fakes) {
		tooLong := answering(func(s pgfake.Statement) *pgfake.Response {
			if s.Preparing || s.SQL != slow {
				return nil
			}
			return &pgfake.Response{Delay: 300 * time.Millisecond, Err: &pgfake.Error{
				Severity: "FATAL", Code: "25P04", Message: "terminating connection due to transaction timeout", Routine: "ProcessInterrupts",
			}}
		})
		for _, p := range append(x.replicas, x.primary) {
			p.Handle(tooLong)
		}
		var wg sync.WaitGroup
		for range 10 {
			wg.Go(func() { assert.ErrorContains(t, x.pool.QueryRow(ctx, slow).Scan(new(int)), "25P04") })
			wg.Go(func() {
				tx, err := x.pool.Begin(ctx)
				if !assert.NoError(t, err) {
					return
				}
				_, err = tx.Exec(ctx, slow)
				assert.ErrorContains(t, err, "25P04")
				assert.Error(t, tx.Rollback(ctx))
			})
		}
		wg.Wait()
		x.unblamed()
		assert.Zero(t, *suspected)
		assert.Equal(t, 10, x.replicas[0].Count(slow)+x.replicas[1].Count(slow), "each read is run once")
		assert.Equal(t, 10, x.primary.Count(slow))
	})
}

// crowd makes n callers read and write for a while, and returns how many calls were served and what the others met.
func (x *fakes) crowd(n int, d time.Duration) (served int, failed map[string]int) {
	var wg sync.WaitGroup
	var mu sync.Mutex
	failed = map[string]int{}
	end := time.Now().Add(d)
	for range n {
		wg.Go(func() {
			for time.Now().Before(end) {
				ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
				err := x.pool.QueryRow(ctx, "select 1").Scan(new(int))
				if err == nil {
					_, err = x.pool.Exec(ctx, "insert into t values (1)")
				}
				cancel()
				mu.Lock()
				if served++; err != nil {
					served--
					failed[err.Error()]++
				}
				mu.Unlock()
				time.Sleep(time.Millisecond)
			}
		})
	}
	wg.Wait()
	return served, failed
}

// What fails here is no fault of the servers': the connections that exist go on, more callers than connections wait for
// one that is released, and a server is dialled where it was last.
func TestAFaultOnThisSideBlamesNobody(t *testing.T) {
	var out atomic.Pointer[error]
	emfile := error(&net.OpError{Op: "dial", Net: "tcp", Err: os.NewSyscallError("socket", syscall.EMFILE)})
	misbehaving := error(&net.DNSError{Err: "server misbehaving", Name: "primary", IsTemporary: true})
	unknown := error(&net.DNSError{Err: "no such host", Name: "primary", IsNotFound: true})
	for _, tc := range []struct {
		name          string
		lookUp, dial  error
		monitorsOwn   bool // the monitors lose their sessions too
		last          bool // dials go on, to where the servers were last
		serves, fails int
	}{
		{name: "the name service is out", lookUp: misbehaving, last: true},
		{name: "the name service is out, and the monitors' sessions end", lookUp: misbehaving, monitorsOwn: true, last: true},
		{name: "the name service knows the names no more", lookUp: unknown},
		{name: "no descriptors", dial: emfile},
	} {
		t.Run(tc.name, func(t *testing.T) {
			out.Store(nil)
			bubble(t, 2, func(c *Options) {
				c.Config.ConnConfig.LookupFunc = func(_ context.Context, host string) ([]string, error) {
					if out.Load() != nil && tc.lookUp != nil {
						return nil, tc.lookUp
					}
					return []string{host}, nil
				}
				dial := c.Config.ConnConfig.DialFunc
				c.Config.ConnConfig.DialFunc = func(ctx context.Context, network, addr string) (net.Conn, error) {
					if out.Load() != nil && tc.dial != nil {
						return nil, tc.dial
					}
					return dial(ctx, network, addr)
				}
			}, func(ctx context.Context, x *fakes) {
				for _, p := range append(x.replicas, x.primary) {
					p.Handle(answering(func(s pgfake.Statement) *pgfake.Response {
						if s.Preparing {
							return nil
						}
						return &pgfake.Response{Delay: 20 * time.Millisecond}
					}))
				}
				_, failed := x.crowd(4, time.Second)
				require.Empty(t, failed)
				out.Store(&emfile)
				if tc.monitorsOwn {
					for _, p := range append(x.replicas, x.primary) {
						p.EndConns(pgfake.Error{Severity: "FATAL", Code: "57P05"})
					}
					_, _ = x.crowd(4, 100*time.Millisecond) // meets the program's own, which have ended too
				}
				dials := x.primary.Dials()
				served, failed := x.crowd(30, 2*time.Second)
				assert.Empty(t, failed)
				assert.Greater(t, served, 200)
				x.unblamed()
				assert.Equal(t, tc.last, x.primary.Dials() > dials)
				t.Logf("%d calls served", served)

				x.primary.Die() // and a server that has fallen is seen to have
				time.Sleep(8 * time.Second)
				settled()
				if tc.dial == nil {
					assert.Equal(t, HealthDown, x.peer("primary").Health)
				}
				out.Store(nil)
				x.primary.Revive()
				time.Sleep(3 * time.Second)
				settled()
				assert.Equal(t, HealthUp, x.peer("primary").Health)
				_, failed = x.crowd(4, time.Second)
				assert.Empty(t, failed)
			})
		})
	}
}

// dialled keeps the connections to one host, and has dials take their time.
type dialled struct {
	host string
	dial pgconn.DialFunc

	mu    sync.Mutex
	takes time.Duration
	conns []net.Conn
}

func (d *dialled) of(c *Options, host string) {
	d.host, d.dial = host, c.Config.ConnConfig.DialFunc
	c.Config.ConnConfig.DialFunc = func(ctx context.Context, network, addr string) (net.Conn, error) {
		if addr != d.host+":5432" {
			return d.dial(ctx, network, addr)
		}
		d.mu.Lock()
		takes := d.takes
		d.mu.Unlock()
		select {
		case <-time.After(takes):
		case <-ctx.Done():
			return nil, &net.OpError{Op: "dial", Net: network, Err: ctx.Err()}
		}
		conn, err := d.dial(ctx, network, addr)
		d.mu.Lock()
		defer d.mu.Unlock()
		d.conns = append(d.conns, conn)
		return conn, err
	}
}

func (d *dialled) take(each time.Duration) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.takes = each
}

// cutFirst cuts the first that was made: before any call it is the monitor's.
func (d *dialled) cutFirst() {
	d.mu.Lock()
	defer d.mu.Unlock()
	_ = d.conns[0].Close()
	d.conns = d.conns[1:]
}

// A server is far away: to connect takes it longer than a probe of one that is near may take.
func TestALostSessionOfAServerFarAwayIsNoTrip(t *testing.T) {
	var far dialled
	bubble(t, 1, func(c *Options) {
		far.of(c, "primary")
		far.take(700 * time.Millisecond)
	}, func(ctx context.Context, x *fakes) {
		_, err := x.pool.Exec(ctx, "insert into t values (1)")
		require.NoError(t, err)
		settled()

		far.cutFirst() // the program has an idle connection
		begun := time.Now()
		settled()
		_, err = x.pool.Exec(ctx, "insert into t values (2)")
		require.NoError(t, err)
		assert.Less(t, time.Since(begun), 300*time.Millisecond, "a session has answered for it")
		time.Sleep(time.Second)
		x.unblamed()

		x.primary.CutConns() // it has none
		begun = time.Now()
		settled()
		_, err = x.pool.Exec(ctx, "insert into t values (3)")
		require.NoError(t, err)
		assert.Less(t, time.Since(begun), 1500*time.Millisecond)
		time.Sleep(time.Second)
		x.unblamed()

		x.primary.Hang() // one that is dead is found out nevertheless
		begun = time.Now()
		late, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		_, err = x.pool.Exec(late, "insert into t values (4)")
		require.ErrorIs(t, err, context.DeadlineExceeded)
		for x.peer("primary").Health != HealthDown {
			time.Sleep(10 * time.Millisecond)
		}
		assert.Less(t, time.Since(begun), 3500*time.Millisecond)
		x.primary.Thaw()
		time.Sleep(time.Second) // pgx's request to cancel is on its way still
	})
}

// New connections hang while those that exist go on: the peer stands, whether or not its monitor has a session.
func TestAPeerStandsByAnIdleConnectionOfTheProgram(t *testing.T) {
	var mute dialled
	bubble(t, 1, func(c *Options) { mute.of(c, "primary") }, func(ctx context.Context, x *fakes) {
		_, err := x.pool.Exec(ctx, "insert into t values (1)")
		require.NoError(t, err)
		settled()
		mute.take(time.Hour)
		mute.cutFirst()
		// The monitor looks through the program's only connection now, for no time. A call of the same instant would dial, and
		// wait for that.
		settled()
		for range 300 {
			begun := time.Now()
			_, err = x.pool.Exec(ctx, "insert into t values (2)")
			require.NoError(t, err)
			require.Less(t, time.Since(begun), 300*time.Millisecond)
			time.Sleep(100 * time.Millisecond)
		}
		assert.Zero(t, x.peer("primary").Trips)
	})
}

func TestTheStatusOfTheOnlyPeerIsWhatItsLastConnectHasShown(t *testing.T) {
	bubble(t, 0, nil, func(ctx context.Context, x *fakes) {
		shows := func(health Health, serves bool) {
			t.Helper()
			settled()
			ps := x.pool.Status().Peers[0]
			assert.Equal(t, health, ps.Health)
			assert.Equal(t, serves, ps.Serves)
		}
		shows(HealthUnknown, true)
		require.NoError(t, x.pool.Ping(ctx))
		shows(HealthUp, true)
		x.primary.Die()
		require.Error(t, x.pool.Ping(ctx))
		require.Error(t, x.pool.Ping(ctx))
		shows(HealthDown, false)
		assert.Contains(t, x.pool.Status().Peers[0].LastFault, "refused")
		x.primary.Revive()
		x.primary.StartupError("28P01")
		require.Error(t, x.pool.Ping(ctx))
		shows(HealthMisconfigured, false)
		x.primary.StartupError("")
		require.NoError(t, x.pool.Ping(ctx))
		shows(HealthUp, true)
	})
}

func TestAPeerOfUnknownRoleSaysWhy(t *testing.T) {
	full := serverError("FATAL", "53300", "InitializeSessionUserId", "too many connections")
	p := &peer{name: "a"}
	top := newTopology(ModeReplicated, []*peer{p}, []Role{RoleUnknown}).apply(observation{peer: p, health: HealthUp, cause: full})
	err := error(&NoPeerError{Peers: top.causes(&intent{place: placePrimary})})
	assert.ErrorContains(t, err, "is of unknown role")
	assert.ErrorContains(t, err, "53300")
	assert.ErrorIs(t, err, full)
}

// A role or a database that is created late is used soon, without knocking with a wrong password for long.
func TestWhatWasMisconfiguredIsUsedSoon(t *testing.T) {
	for _, tc := range []struct {
		code          string
		soon          time.Duration
		most, inAHour int
	}{
		{"3D000", 1300 * time.Millisecond, 9, 910},
		{"28P01", 2600 * time.Millisecond, 5, 910},
	} {
		t.Run(tc.code, func(t *testing.T) {
			bubble(t, 1, nil, func(ctx context.Context, x *fakes) {
				x.read(ctx)
				settled()
				x.replicas[0].ResetCounters()
				x.replicas[0].StartupError(tc.code)
				x.replicas[0].CutConns()
				time.Sleep(2 * time.Second)
				assert.Equal(t, HealthMisconfigured, x.peer("replica1").Health)
				x.replicas[0].StartupError("")
				begun := time.Now()
				for x.peer("replica1").Health != HealthUp {
					time.Sleep(10 * time.Millisecond)
				}
				assert.Less(t, time.Since(begun), tc.soon)
				assert.LessOrEqual(t, x.replicas[0].Dials(), tc.most)

				x.replicas[0].StartupError(tc.code)
				x.replicas[0].CutConns()
				x.replicas[0].ResetCounters()
				time.Sleep(time.Hour)
				assert.LessOrEqual(t, x.replicas[0].Dials(), tc.inAHour)
			})
		})
	}
}

// Servers that refuse new sessions are not stormed, and lose nothing by it.
func TestAPeerThatRefusesNewSessionsGetsFewDials(t *testing.T) {
	for _, refusal := range []string{"53300", "dials"} {
		t.Run(refusal, func(t *testing.T) {
			bubble(t, 2, nil, func(ctx context.Context, x *fakes) {
				for range 20 {
					x.read(ctx)
				}
				slow := answering(func(s pgfake.Statement) *pgfake.Response {
					if s.Preparing {
						return nil
					}
					return &pgfake.Response{Delay: 20 * time.Millisecond}
				})
				x.primary.Handle(slow)
				for _, p := range x.replicas {
					p.Handle(slow)
					if refusal == "dials" {
						p.Refuse(nil)
					} else {
						p.StartupError(refusal)
					}
					p.ResetCounters()
				}
				const seconds = 5
				var wg sync.WaitGroup
				end := time.Now().Add(seconds * time.Second)
				for range 20 {
					wg.Go(func() {
						for time.Now().Before(end) {
							assert.NoError(t, x.pool.QueryRow(ctx, "select 1").Scan(new(int)))
						}
					})
				}
				wg.Wait()
				for i, p := range x.replicas {
					assert.LessOrEqual(t, p.Dials(), 4*seconds+maxHandshakes+seconds, "replica%d", i+1)
					p.Accept()
					p.StartupError("")
				}
				time.Sleep(3 * time.Second)
				settled()
				var held []*pgxpool.Conn
				begun := time.Now()
				for range 10 {
					c, err := x.pool.Acquire(WithPeer(ctx, "replica1:5432"))
					require.NoError(t, err)
					held = append(held, c)
				}
				assert.Less(t, time.Since(begun), 400*time.Millisecond, "at once again after one success")
				release(held)
			})
		})
	}
}

func TestAServerThatStartsIsNotShownAsDraining(t *testing.T) {
	bubble(t, 1, nil, func(ctx context.Context, x *fakes) {
		x.read(ctx)
		settled()
		x.replicas[0].StartupError("57P03") // hot standby is disabled
		x.replicas[0].CutConns()
		time.Sleep(time.Second)
		settled()
		assert.Equal(t, HealthStarting, x.peer("replica1").Health)
		x.replicas[0].ResetCounters()
		time.Sleep(time.Hour)
		assert.LessOrEqual(t, x.replicas[0].Dials(), 60*5+3600/4)
		x.replicas[0].StartupError("")
		time.Sleep(7 * time.Second)
		settled()
		assert.Equal(t, HealthUp, x.peer("replica1").Health)

		c, err := x.pool.Acquire(WithPeer(ctx, "replica1:5432"))
		require.NoError(t, err)
		x.replicas[0].StartupError("57P03") // a smart shutdown: sessions go on
		done := make(chan struct{})
		go func() { // a second connection is wanted
			defer close(done)
			if c, err := x.pool.Acquire(WithPeer(withTimeout(t, time.Second), "replica1:5432")); err == nil {
				c.Release()
			}
		}()
		<-done
		settled()
		assert.Equal(t, HealthShuttingDown, x.peer("replica1").Health)
		c.Release()
	})
}

// What gets no reads shows nothing of its pace except by its looks, and one look shows little. They acquit, and nothing else.
func TestLooksMakeNobodySlow(t *testing.T) {
	const ms = time.Millisecond
	for _, tc := range []struct {
		name   string
		paused bool          // replica1 is left out for its data
		reads  time.Duration // there; elsewhere they take 20 ms
		looks  [2]time.Duration
		turns  []bool // whether it was slow, as the hooks were told
	}{
		{"left out for its data", true, 20 * ms, [2]time.Duration{ms, 200 * ms}, nil},
		{"quick again", false, 500 * ms, [2]time.Duration{ms, ms}, []bool{true, false}},
		{"quick again, and left out for its data", true, 500 * ms, [2]time.Duration{ms, 200 * ms}, []bool{true, false}},
		{"slow", false, 500 * ms, [2]time.Duration{200 * ms, 300 * ms}, []bool{true}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var mu sync.Mutex
			var turns []bool
			was := map[string]bool{}
			bubble(t, 2, func(c *Options) {
				c.Hooks = &Hooks{PeerChanged: func(e PeerEvent) {
					mu.Lock()
					defer mu.Unlock()
					if e.Slow != was[e.Peer] {
						assert.Equal(t, "replica1:5432", e.Peer)
						turns, was[e.Peer] = append(turns, e.Slow), e.Slow
					}
				}}
			}, func(ctx context.Context, x *fakes) {
				settled()
				looks := 0
				x.replicas[0].Handle(func(s pgfake.Statement) *pgfake.Response {
					if !asksLook(s) {
						return nil
					}
					r := lookAnswer(s, sight{role: RoleReplica, system: 1, position: 8192, shown: 1, paused: tc.paused})
					if !s.Preparing {
						r.Delay = tc.looks[looks%2]
						looks++
					}
					return r
				})
				for range latencySample {
					x.pool.peers()[1].latency.note(tc.reads)
					x.pool.peers()[2].latency.note(20 * ms)
				}
				x.pool.peers()[1].monitor.nudge()
				time.Sleep(20 * time.Second)
				settled()
				assert.Equal(t, tc.paused, x.peer("replica1").Unfit != WhyNone)
				mu.Lock()
				defer mu.Unlock()
				assert.Equal(t, tc.turns, turns)
			})
		})
	}
}

// New connections to one replica hang, while those that exist go on and are used up by their age: no read waits there for a
// new one until its deadline, as another replica serves.
func TestAReadDoesNotWaitForAConnectionThatHangs(t *testing.T) {
	for _, far := range []bool{false, true} {
		t.Run(fmt.Sprint("a far one=", far), func(t *testing.T) {
			var hangs dialled
			bubble(t, 2, func(c *Options) {
				hangs.of(c, "replica1")
				c.Config.MaxConnLifetime = 2 * time.Second
			}, func(ctx context.Context, x *fakes) {
				for _, r := range x.replicas {
					r.Handle(answering(func(s pgfake.Statement) *pgfake.Response {
						if s.Preparing {
							return nil
						}
						return &pgfake.Response{Delay: 5 * time.Millisecond}
					}))
				}
				var mu sync.Mutex
				reads := func(callers int, d time.Duration) (n, slow int, worst time.Duration) {
					var wg sync.WaitGroup
					end := time.Now().Add(d)
					for range callers {
						wg.Go(func() {
							for time.Now().Before(end) {
								ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
								begun := time.Now()
								assert.NoError(t, x.pool.QueryRow(ctx, "select 1").Scan(new(int)))
								cancel()
								took := time.Since(begun)
								mu.Lock()
								n++
								worst = max(worst, took)
								if took > 400*time.Millisecond {
									slow++
								}
								mu.Unlock()
								time.Sleep(time.Millisecond)
							}
						})
					}
					wg.Wait()
					return n, slow, worst
				}
				reads(8, 3*time.Second)
				if far {
					hangs.take(900 * time.Millisecond)
				} else {
					hangs.take(time.Hour)
				}
				n, slow, worst := reads(8, 10*time.Second)
				t.Logf("%d reads, %d over 400 ms, the worst %v", n, slow, worst)
				assert.LessOrEqual(t, slow, 150)
				assert.Less(t, worst, 4*time.Second)
				assert.Zero(t, x.peer("replica1").Trips)
				hangs.take(0)
				time.Sleep(6 * time.Second)
				n, slow, worst = reads(8, 3*time.Second)
				t.Logf("then %d reads, %d over 400 ms, the worst %v", n, slow, worst)
				assert.Zero(t, slow)
			})
		})
	}
}

// Servers that refuse the program's password are asked again for a call, for all calls together twice a second at most: the
// first call after it was mended is served, as by a pgxpool.
func TestTheFirstCallAfterAPasswordIsMendedIsServed(t *testing.T) {
	for _, code := range []string{"28P01", "28000"} {
		t.Run(code, func(t *testing.T) {
			bubble(t, 1, nil, func(ctx context.Context, x *fakes) {
				x.read(ctx)
				_, err := x.pool.Exec(ctx, "insert into t values (1)")
				require.NoError(t, err)
				servers := append(x.replicas, x.primary)
				call := func(write bool) (err error) {
					begun := time.Now()
					if write {
						_, err = x.pool.Exec(ctx, "insert into t values (1)")
					} else {
						err = x.pool.QueryRow(ctx, "select 1").Scan(new(int))
					}
					assert.LessOrEqual(t, time.Since(begun), knockEach)
					return err
				}
				for _, write := range []bool{false, true} {
					for _, s := range servers {
						s.StartupError(code)
						s.CutConns()
					}
					_ = call(write) // meets it
					time.Sleep(20 * time.Second)
					settled()
					assert.Equal(t, HealthMisconfigured, x.peer("primary").Health)
					assert.Equal(t, HealthMisconfigured, x.peer("replica1").Health)

					for _, s := range servers {
						s.ResetCounters()
					}
					var wg sync.WaitGroup
					end := time.Now().Add(5 * time.Second)
					for range 20 {
						wg.Go(func() {
							for time.Now().Before(end) {
								err := call(write)
								var none *NoPeerError
								assert.ErrorAs(t, err, &none)
								assert.ErrorContains(t, err, code)
								time.Sleep(time.Millisecond)
							}
						})
					}
					wg.Wait()
					for _, s := range servers {
						assert.LessOrEqual(t, s.Dials(), 11, "two a second, and the first")
					}
					assert.GreaterOrEqual(t, x.primary.Dials(), 9)

					ended, cancel := context.WithCancel(ctx)
					cancel()
					_, err := x.pool.Exec(ended, "insert into t values (1)")
					assert.ErrorIs(t, err, context.Canceled)
					assert.ErrorContains(t, err, code)

					for _, s := range servers {
						s.StartupError("")
					}
					assert.NoError(t, call(write))
					time.Sleep(20 * time.Second) // the others are asked by their monitors
					settled()
					x.read(ctx)
				}
			})
		})
	}
}

// The same where sessions go on: a dial that is held back, as the last one was refused, is waited for.
func TestTheFirstNewSessionAfterAPasswordIsMendedIsServed(t *testing.T) {
	bubble(t, 1, nil, func(ctx context.Context, x *fakes) {
		held, err := x.pool.Acquire(ctx)
		require.NoError(t, err)
		defer held.Release()
		settled()
		x.primary.StartupError("28P01")
		x.primary.ResetCounters()
		var wg sync.WaitGroup
		end := time.Now().Add(5 * time.Second)
		for range 20 {
			wg.Go(func() {
				for time.Now().Before(end) {
					begun := time.Now()
					_, err := x.pool.Exec(ctx, "insert into t values (1)")
					assert.ErrorContains(t, err, "28P01")
					assert.LessOrEqual(t, time.Since(begun), 2*knockEach)
					time.Sleep(time.Millisecond)
				}
			})
		}
		wg.Wait()
		assert.LessOrEqual(t, x.primary.Dials(), 4*6)
		x.primary.StartupError("")
		_, err = x.pool.Exec(ctx, "insert into t values (1)")
		assert.NoError(t, err)
	})
}
