package multipool

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/pgmultipool/multipool/internal/pgfake"
)

// Names that have several addresses, and addresses that move from one server to another.

// homes is a pool whose host db has the addresses a and b, a server at each.
type homes struct {
	at   map[string]*pgfake.Peer
	pool *MultiPool
}

func inHomes(t *testing.T, connString string, f func(ctx context.Context, x *homes)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		x := &homes{at: map[string]*pgfake.Peer{}}
		network := pgfake.Network{}
		for _, name := range []string{"a", "b", "replica"} {
			x.at[name] = pgfake.New(pgfake.Options{Standby: name == "replica"})
			x.at[name].Handle(answering(nil))
			network[name+":5432"] = x.at[name]
		}
		defer network.Close()
		pool, err := ParseConfig(connString)
		require.NoError(t, err)
		pool.ConnConfig.DialFunc = network.Dial
		pool.ConnConfig.LookupFunc = func(_ context.Context, host string) ([]string, error) {
			if host == "db" {
				return []string{"a", "b"}, nil
			}
			return []string{host}, nil
		}
		x.pool, err = NewWithConfig(t.Context(), pool)
		require.NoError(t, err)
		defer x.pool.Close()
		f(context.Background(), x)
	})
}

// used returns the address of db on which the pool writes, and the other.
func (x *homes) used(ctx context.Context, t *testing.T) (now, other *pgfake.Peer) {
	t.Helper()
	const write = "insert into t values (0)"
	before := x.at["a"].Count(write)
	_, err := x.pool.Exec(ctx, write)
	require.NoError(t, err)
	if x.at["a"].Count(write) > before {
		return x.at["a"], x.at["b"]
	}
	return x.at["b"], x.at["a"]
}

func TestTheOnlyHostsOtherAddressIsUsed(t *testing.T) {
	for name, leave := range map[string]func(*pgfake.Peer){
		"dies":              (*pgfake.Peer).Die,
		"becomes a standby": func(p *pgfake.Peer) { p.SetStandby(true); p.CutConns() },
		"swallows packets":  (*pgfake.Peer).Isolate,
	} {
		t.Run(name, func(t *testing.T) {
			inHomes(t, "postgres://app@db/app?sslmode=disable&target_session_attrs=read-write&connect_timeout=1", func(ctx context.Context, x *homes) {
				for range 3 { // from one to the other and back
					now, other := x.used(ctx, t)
					leave(now)
					lost, cancel := context.WithTimeout(ctx, 5*time.Second)
					_ = x.pool.Ping(lost) // what pgxpool loses, too
					cancel()
					then, _ := x.used(ctx, t)
					assert.Same(t, other, then)
					now.SetStandby(false)
					now.Thaw()
					now.Revive()
				}
			})
		})
	}
}

func TestADeadAddressOfAPeerGivesWayToTheOther(t *testing.T) {
	for name, leave := range map[string]func(*pgfake.Peer){"dies": (*pgfake.Peer).Die, "swallows packets": (*pgfake.Peer).Isolate} {
		t.Run(name, func(t *testing.T) {
			inHomes(t, "postgres://app@db,replica/app?sslmode=disable", func(ctx context.Context, x *homes) {
				for range 3 {
					now, other := x.used(ctx, t)
					leave(now)
					begun := time.Now()
					lost, cancel := context.WithTimeout(ctx, time.Second)
					_ = x.pool.Ping(lost)
					cancel()
					then, _ := x.used(ctx, t)
					assert.Same(t, other, then)
					assert.Less(t, time.Since(begun), 6*time.Second)
					now.Thaw()
					now.Revive()
					time.Sleep(time.Minute)
				}
			})
		})
	}
}

// services are names that lead to one of three servers each: a, which is the primary at first, b and c. Sessions stay where
// they were made.
type services struct {
	t       *testing.T
	mu      sync.Mutex
	leads   map[string][]*pgfake.Peer // by name: sessions go to one after the other; none: nowhere
	servers map[string]*pgfake.Peer
	follows map[*pgfake.Peer]*atomic.Uint32 // the timeline that a standby gets
	journal journal
	pool    *MultiPool
}

// inServices opens a pool whose peers are the names rw and ro, which lead to a and b. open, where it is not nil, changes the
// configuration.
func inServices(t *testing.T, proxy bool, open func(*Options), f func(ctx context.Context, x *services)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		x := &services{t: t, servers: map[string]*pgfake.Peer{}, follows: map[*pgfake.Peer]*atomic.Uint32{}}
		for i, name := range []string{"a", "b", "c"} {
			p := pgfake.New(pgfake.Options{Standby: i > 0})
			follows := new(atomic.Uint32)
			follows.Store(1)
			x.servers[name], x.follows[p] = p, follows
			x.start(p, int64(i+1))
			defer p.Close()
		}
		x.leads = map[string][]*pgfake.Peer{"rw": {x.servers["a"]}, "ro": {x.servers["b"]}}
		pool, err := ParseConfig("postgres://app@rw/app?sslmode=disable&pool_max_conns=4")
		require.NoError(t, err)
		pool.ConnConfig.LookupFunc = pgfake.Lookup
		pool.ConnConfig.DialFunc = func(ctx context.Context, network, addr string) (net.Conn, error) {
			name, _, _ := net.SplitHostPort(addr)
			x.mu.Lock()
			there := pgfake.Network{}
			if all := x.leads[name]; len(all) > 0 {
				there[addr] = all[0]
				x.leads[name] = append(all[1:len(all):len(all)], all[0])
			}
			x.mu.Unlock()
			return there.Dial(ctx, network, addr)
		}
		config := Options{Config: pool, Hooks: x.journal.hooks(), Peers: []Peer{
			{Name: "rw", Host: "rw", Port: 5432, Proxy: proxy}, {Name: "ro", Host: "ro", Port: 5432, Proxy: proxy},
		}}
		if open != nil {
			open(&config)
		}
		x.pool, err = Open(t.Context(), config)
		require.NoError(t, err)
		defer x.pool.Close()
		settled()
		f(context.Background(), x)
	})
}

// start makes of a server one that was started at the given time.
func (x *services) start(p *pgfake.Peer, started int64) {
	p.Handle(func(s pgfake.Statement) *pgfake.Response {
		if !asksLook(s) {
			return nil
		}
		seen := sight{role: RolePrimary, system: 1, timeline: s.Timeline, position: 8192, started: started}
		if s.Standby {
			at := x.follows[p].Load()
			seen = sight{role: RoleReplica, system: 1, timeline: at, shown: at, position: 8192, started: started}
		}
		return lookAnswer(s, seen)
	})
}

// lead has new sessions of a name led to servers.
func (x *services) lead(name string, servers ...string) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.leads[name] = nil
	for _, server := range servers {
		x.leads[name] = append(x.leads[name], x.servers[server])
	}
}

// promote promotes b, and c follows it.
func (x *services) promote() {
	x.servers["b"].Promote()
	x.follows[x.servers["c"]].Store(2)
}

// write writes once, and requires that it was done at the server.
func (x *services) write(ctx context.Context, server string) {
	x.t.Helper()
	const insert = "insert into t values (1)"
	before := x.servers[server].Applied(insert)
	_, err := x.pool.Exec(ctx, insert)
	require.NoError(x.t, err)
	require.Equal(x.t, before+1, x.servers[server].Applied(insert), "done at %s", server)
}

// Established sessions stay where they were while the names move one after the other, and meet at the promoted server for a
// while.
func TestServicesThatMove(t *testing.T) {
	for _, proxy := range []bool{true, false} {
		t.Run(fmt.Sprint("proxy=", proxy), func(t *testing.T) {
			inServices(t, proxy, nil, func(ctx context.Context, x *services) {
				x.write(ctx, "a")
				x.servers["a"].Die()
				x.lead("rw")
				settled()
				x.promote()
				x.write(ctx, "b")
				x.lead("rw", "b")
				for range 20 {
					time.Sleep(500 * time.Millisecond)
					x.write(ctx, "b")
				}
				x.lead("ro", "c")
				for range 240 {
					time.Sleep(500 * time.Millisecond)
					x.write(ctx, "b")
				}
				assert.Equal(t, "rw", x.pool.Status().Primary)
				assert.False(t, x.pool.Status().Split)
				before := x.servers["c"].Count("select 1")
				for range 10 {
					require.NoError(t, x.pool.QueryRow(ctx, "select 1").Scan(new(int)))
				}
				assert.Equal(t, before+10, x.servers["c"].Count("select 1"), "reads are the replica's again")
			})
		})
	}
}

// A name leads to the promoted server while the old primary lives, and sessions go on there.
func TestAServiceThatLeavesALivingPrimary(t *testing.T) {
	for _, proxy := range []bool{true, false} {
		t.Run(fmt.Sprint("proxy=", proxy), func(t *testing.T) {
			inServices(t, proxy, nil, func(ctx context.Context, x *services) {
				held, err := x.pool.Acquire(ctx)
				require.NoError(t, err)
				defer held.Release()
				x.write(ctx, "a")
				x.lead("rw", "b")
				x.lead("ro", "c")
				x.promote()
				time.Sleep(40 * time.Second) // a monitor has dialled anew, at the latest
				for range 20 {
					time.Sleep(500 * time.Millisecond)
					x.write(ctx, "b")
				}
				_, err = held.Exec(ctx, "insert into t values (2)")
				assert.Error(t, err, "what is written there is lost")
			})
		})
	}
}

// Behind the write port of a proxy that takes both for the primary there are the promoted server and the one that it has
// replaced, which lives.
func TestAStalePrimaryBehindAWritePort(t *testing.T) {
	const insert = "insert into t values ($1)"
	for name, test := range map[string]struct {
		every time.Duration // CheckInterval
		find  func(write func(int))
	}{
		"a monitor finds it":     {5 * time.Second, func(func(int)) { time.Sleep(20 * time.Second) }},
		"a new session finds it": {time.Hour, func(write func(int)) { write(4) }},
	} {
		t.Run(name, func(t *testing.T) {
			inServices(t, true, func(c *Options) { c.CheckInterval = test.every }, func(ctx context.Context, x *services) {
				write := func(n int) {
					var wg sync.WaitGroup
					for i := range n {
						wg.Go(func() { _, _ = x.pool.Exec(ctx, insert, i) })
					}
					wg.Wait()
				}
				x.lead("ro", "c")
				time.Sleep(time.Minute)
				for _, p := range x.servers {
					p.Delay(10 * time.Millisecond) // writes at a time take as many connections
				}
				x.write(ctx, "a")
				x.servers["b"].Promote() // c goes on following a
				x.lead("rw", "a", "b")
				test.find(write)
				time.Sleep(time.Second) // what was in flight is over
				x.servers["a"].ResetCounters()
				for range 200 {
					write(4)
					time.Sleep(250 * time.Millisecond)
				}
				assert.Zero(t, x.servers["a"].Applied(insert))
				assert.Greater(t, x.servers["b"].Applied(insert), 700)
				x.lead("rw", "b")
				time.Sleep(5 * time.Second)
				for range 20 {
					x.write(ctx, "b")
				}
			})
		})
	}
}

// The program's idle connections follow an address, also where nobody was promoted.
func TestAServiceThatLeavesALivingReplica(t *testing.T) {
	inServices(t, false, nil, func(ctx context.Context, x *services) {
		read := func() {
			require.NoError(t, x.pool.QueryRow(ctx, "select 1").Scan(new(int)))
		}
		read()
		require.Positive(t, x.servers["b"].Count("select 1"))
		x.lead("ro", "c")
		time.Sleep(redialEach + 10*time.Second)
		x.servers["b"].ResetCounters()
		for range 10 {
			read()
		}
		assert.Zero(t, x.servers["b"].Count("select 1"))
		assert.Equal(t, 10, x.servers["c"].Count("select 1"))
		assert.Zero(t, x.servers["b"].Conns())
	})
}

// undeclared is what was said of peers whose Proxy is not set.
type undeclared struct {
	mu   sync.Mutex
	said []PeerEvent
}

func (u *undeclared) hooks() *Hooks {
	return &Hooks{PeerChanged: func(e PeerEvent) {
		var cause *undeclaredProxy
		if errors.As(e.Cause, &cause) {
			u.mu.Lock()
			defer u.mu.Unlock()
			u.said = append(u.said, e)
		}
	}}
}

func (u *undeclared) take() (said []PeerEvent) {
	u.mu.Lock()
	defer u.mu.Unlock()
	said, u.said = u.said, nil
	return said
}

func TestAnUndeclaredProxyIsSaidOnce(t *testing.T) {
	for name, test := range map[string]struct {
		become func(x *services)
		says   string
	}{
		// PgBouncer repeats to new sessions what was true of old ones.
		"a session that repeats": {func(x *services) { x.servers["b"].Promote() }, "report another role"},
		// A pooler has reconnected to a server that was restarted, or to another.
		"a session that leads to two servers": {func(x *services) {
			x.start(x.servers["b"], 22)
		}, "lead to several servers"},
		"an address that goes back and forth": {func(x *services) { x.lead("ro", "b", "c") }, "lead to several servers"},
	} {
		for _, proxy := range []bool{false, true} {
			t.Run(fmt.Sprint(name, ", proxy=", proxy), func(t *testing.T) {
				var heard undeclared
				inServices(t, proxy, func(c *Options) { c.Hooks = JoinHooks(c.Hooks, heard.hooks()) }, func(ctx context.Context, x *services) {
					if test.says == "report another role" {
						x.servers["b"].Close()
						x.servers["b"] = pgfake.New(pgfake.Options{Standby: true, Params: map[string]string{"in_hot_standby": "on"}})
						defer x.servers["b"].Close()
						x.follows[x.servers["b"]] = x.follows[x.servers["c"]]
						x.start(x.servers["b"], 2)
						x.lead("ro", "b")
					}
					time.Sleep(2 * time.Minute) // nothing is said of a peer that is one server
					require.Empty(t, heard.take())
					test.become(x)
					time.Sleep(5 * time.Minute)
					said := heard.take()
					if proxy {
						require.Empty(t, said)
						return
					}
					require.Len(t, said, 1)
					assert.Equal(t, "ro", said[0].Peer)
					assert.Equal(t, said[0].From, said[0].To)
					assert.ErrorContains(t, said[0].Cause, test.says)
					assert.ErrorContains(t, said[0].Cause, "Peer.Proxy")
				})
			})
		}
	}
}

// A session that leads to a standby at the address of the primary: the transaction is run again on another. Where the refusal is
// the program's own it ends there.
func TestATransactionThatMeetsAStandbyAtThePrimarysAddress(t *testing.T) {
	const insert = "insert into t values (1)"
	for _, standby := range []bool{true, false} {
		t.Run(fmt.Sprint("standby=", standby), func(t *testing.T) {
			inServices(t, true, nil, func(ctx context.Context, x *services) {
				x.write(ctx, "a")
				before := x.servers["a"].Applied(insert)
				runs := 0
				err := x.pool.RunTx(ctx, pgx.TxOptions{CommitQuery: "commit"}, func(tx pgx.Tx) error {
					if runs++; runs == 1 {
						if !standby {
							x.servers["a"].FailNextWith(1, pgfake.Error{
								Severity: "ERROR", Code: "25006", Message: "cannot execute INSERT in a read-only transaction",
							})
						}
						x.servers["a"].SetStandby(standby)
						time.AfterFunc(20*time.Millisecond, func() { x.servers["a"].SetStandby(false) })
					}
					_, err := tx.Exec(ctx, insert)
					return err
				})
				if !standby {
					var refusal *pgconn.PgError
					require.ErrorAs(t, err, &refusal)
					require.Equal(t, 1, runs)
					return
				}
				require.NoError(t, err)
				require.Equal(t, before+1, x.servers["a"].Applied(insert))
			})
		})
	}
}
