package multipool

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/pgmultipool/multipool/internal/dsn"
	"github.com/pgmultipool/multipool/internal/pgfake"
)

const mustBegin = "multipool: cannot parse the connection string: it must begin with postgres:// or postgresql://, or be key=value pairs"

// The strings that people write, and what they are told. A string that is right says which peers it makes.
func TestConnectionStringsAsPeopleWriteThem(t *testing.T) {
	withoutEnvironment(t)
	socket := peerName(plainPoolOf(t, "user=app").ConnConfig.Host, 5432) // pgx's default host
	for _, tc := range []struct{ connString, peers, says string }{
		// names, addresses, sockets
		{"postgres://app@db1,db2/app", "db1:5432 db2:5432", ""},
		{"postgres://app@db1:1,db2:2/app", "db1:1 db2:2", ""},
		{"postgresql://app@db1/app", "db1:5432", ""},
		{"postgres://app@db1,10.0.0.2/app", "db1:5432 10.0.0.2:5432", ""},
		{"postgres://app@[::1],[fe80::1%25eth0]:6000/app", "[::1]:5432 [fe80::1%eth0]:6000", ""},
		{"host=::1,db2 user=app", "[::1]:5432 db2:5432", ""},
		{"postgres://app@%2Fvar%2Frun%2Fa,db1/app", "/var/run/a:5432 db1:5432", ""},
		{"host=/var/run/a,/var/run/b user=app", "/var/run/a:5432 /var/run/b:5432", ""},
		{"host = db1,db2 user = app password = 'it''s'", "", "multipool: cannot parse the connection string: failed to parse as keyword/value (invalid keyword/value)"},
		{"host = db1,db2 user = app password = 'it\\'s'", "db1:5432 db2:5432", ""},
		{"host=db1,db2 port=6000 user=app", "db1:6000 db2:6000", ""},
		{"", socket, ""},
		{" ", socket, ""},
		{"user=app", socket, ""},
		{"postgres://", socket, ""},
		{"postgres://:6000/app", strings.Replace(socket, "5432", "6000", 1), ""},
		{"postgres:///app?host=db1,db2", "db1:5432 db2:5432", ""},
		{"postgres://ignored,/app?host=db1,db2&port=1", "db1:1 db2:1", ""},

		// lists
		{"postgres://app@h1,/app", "", "multipool: host #2 of 2 in the list is empty"},
		{"postgres://app@h1,", "", "multipool: host #2 of 2 in the list is empty"},
		{"postgres://app@,h2/app", "", "multipool: host #1 of 2 in the list is empty"},
		{"postgres://app@h1,,h3?sslmode=disable", "", "multipool: host #2 of 3 in the list is empty"},
		{"postgres://app@h1,:6000/app", "", "multipool: host #2 of 2 in the list is empty"},
		{"postgres://app@h1%2C/app", "", "multipool: host #2 of 2 in the list is empty"},
		{"postgres://app@h1/app?host=h1,%20", "", "multipool: host #2 of 2 in the list is empty"},
		{"host=h1, user=app", "", "multipool: host #2 of 2 in the list is empty"},
		{"host=, user=app", "", "multipool: host #1 of 2 in the list is empty"},
		{"host=h1, h2 user=app", "", `multipool: cannot parse the connection string: failed to parse as keyword/value (missing ... in connection info string)`},
		{"postgres://app@h1,h1/app", "", "multipool: peer h1:5432 is given twice"},
		{"postgres://app@h1:5432,h2,h1/app", "", "multipool: peer h1:5432 is given twice"},
		{"host=h1,h2 port=1,2,3 user=app", "", "multipool: cannot parse the connection string: could not match 3 port numbers to 2 hosts"},
		{"postgres://app@h1,h2:port/app", "", "multipool: cannot parse the connection string: invalid port"},
		{"postgres://app@h1:0/app", "", "multipool: cannot parse the connection string: invalid port"},
		{"host=h1 port=65536 user=app", "", "multipool: cannot parse the connection string: invalid port"},

		// schemes
		{"db1,db2/app", "", mustBegin},
		{"db1", "", mustBegin},
		{"app:word@db1/app?sslmode=disable", "", mustBegin},
		{"//app@db1/app", "", mustBegin},
		{"mysql://app@db1/app", "", mustBegin},
		{"mysql://app@db1/app?sslmode=disable", "", mustBegin},
		{"Postgres://app@db1/app?sslmode=disable", "", mustBegin},
		{" postgres://app@db1/app?sslmode=disable", "", mustBegin},
		{"postgres:app@db1/app?sslmode=disable", "", mustBegin},
		{"jdbc:postgresql://db1/app?user=app", "", mustBegin},
		{"db1:5432 user=app", "", mustBegin},

		// keys
		{"host=db1 user=app pool_max_con=3", "", "multipool: unknown key pool_max_con (did you mean pool_max_conns?)"},
		{"postgres://app@db1,db2?pool_max_con=3", "", "multipool: unknown key pool_max_con (did you mean pool_max_conns?)"},
		{"postgres://app@db1,db2?Pool_Max_Conns=3", "", "multipool: unknown key Pool_Max_Conns (did you mean pool_max_conns?)"},
		{"postgres://app@db1,db2?pol_max_cons=3", "", "multipool: unknown key pol_max_cons (did you mean pool_max_conns?)"},
		{"postgres://app@db1?pool_size=3", "", "multipool: unknown key pool_size (known: pool_health_check_period, pool_max_conn_idle_time, " +
			"pool_max_conn_lifetime, pool_max_conn_lifetime_jitter, pool_max_conns, pool_min_conns, pool_min_idle_conns, pool_ping_timeout)"},
		{"postgres://app@db1?multipoolwait=1s", "", "multipool: unknown key multipoolwait (did you mean multipool_wait?)"},
		{"postgres://app@db1?multipool_wiat=1s", "", "multipool: unknown key multipool_wiat (did you mean multipool_wait?)"},
		{"postgres://app@db1?multipool-wait=1s", "", "multipool: unknown key multipool-wait (did you mean multipool_wait?)"},
		{"postgres://app@db1?MULTIPOOL_WAIT=1s", "", "multipool: unknown key MULTIPOOL_WAIT (did you mean multipool_wait?)"},
		{"postgres://app@db1?mutlipool_mode=ordered", "", "multipool: unknown key mutlipool_mode (did you mean multipool_mode?)"},
		{"postgres://app@db1?load_balance_host=random", "", "multipool: unknown key load_balance_host (did you mean load_balance_hosts?)"},
		{"host=db1 password=multi multipool_wiat=1s", "", "multipool: unknown key (it is not shown, as it may be a part of the password: did you mean multipool_wait?)"},
		{"postgres://app@db1,db2?load_balance_hosts=random&search_path=app&work_mem=4MB&TimeZone=UTC", "db1:5432 db2:5432", ""},
		{"postgres://app@db1,db2?multipool.tenant=7&pool.x=1&pool_max.conns=1&myapp.tenant=7&mpool=1&pool=1", "db1:5432 db2:5432", ""},
		{"postgres://app@db1,db2?target_session_attrs=master", "", "multipool: cannot parse the connection string: unknown target_session_attrs value: master"},
		{"postgres://app@db1,db2?sslmode=on", "", "multipool: cannot parse the connection string: failed to configure TLS (sslmode is invalid)"},
		{"postgres://app@db1,db2?connect_timeout=5s", "", "multipool: cannot parse the connection string: invalid connect_timeout (strconv.ParseInt: parsing \"5s\": invalid syntax)"},
		{"postgres://app@db1,db2?multipool_wait=5", "", `multipool: multipool_wait="5": must be a duration such as 500ms or 5s`},
		{"postgres://app@db1,db2?pool_max_conns=0", "", `multipool: pool_max_conns="0": must be a whole number from 1 to 2147483647`},
		{"postgres://app:p@ss@db1/app", "", "multipool: host #1 " + errNoHost.Error()},
	} {
		t.Run(tc.connString, func(t *testing.T) {
			config, err := ParseConfig(tc.connString)
			if tc.says != "" {
				require.EqualError(t, err, tc.says)
				return
			}
			require.NoError(t, err)
			_, peers := completed(t, Options{Config: config})
			require.Equal(t, tc.peers, strings.Join(peerNames(peers), " "))
		})
	}
	t.Run("PGHOST", func(t *testing.T) {
		t.Setenv("PGHOST", "h1,")
		_, err := ParseConfig("user=app")
		require.EqualError(t, err, "multipool: host #2 of 2 in the list is empty")
		_, err = ParseConfig("postgres:///app")
		require.EqualError(t, err, "multipool: host #2 of 2 in the list is empty")
		_, err = ParseConfig("host=h1 user=app")
		require.NoError(t, err)
	})
}

func plainPoolOf(t *testing.T, connString string) *pgxpool.Config {
	t.Helper()
	pool, err := pgxpool.ParseConfig(connString)
	require.NoError(t, err)
	return pool
}

func TestAPeersOwnConnectionStringIsToldTheSame(t *testing.T) {
	withoutEnvironment(t)
	own := ": set it in Options.Config (its own are " + strings.Join(dsn.PeerKeys, ", ") + ")"
	for connString, says := range map[string]string{
		"db1/app":                             mustBegin,
		"mysql://app@db1/app?sslmode=require": mustBegin,
		"host=db1, user=app":                  "multipool: host #2 of 2 in the list is empty",
		"host=db1,db3 user=app":               "its connection string names 2 hosts: must be one",
		"host=db1 multipool_wiat=1s":          "ConnString: multipool_wiat is not a peer's own (did you mean multipool_wait?)" + own,
		"host=db1 multipool_wait=1s":          "ConnString: multipool_wait is not a peer's own" + own,
		"host=db1 pool_max_con=1":             "ConnString: pool_max_con is not a peer's own (did you mean pool_max_conns?)" + own,
		"host=db1 load_balance_hosts=random":  "ConnString: load_balance_hosts is not a peer's own" + own,
		"host=db1 myapp.tenant=1":             "ConnString: myapp.tenant is not a peer's own" + own,
	} {
		_, _, err := Options{Config: plainPool(t), Peers: []Peer{{Name: "x", ConnString: connString}, {Host: "y"}}}.complete()
		require.EqualError(t, err, "multipool: peer x: "+says, connString)
	}
}

// A constructor says the same of a configuration that pgxpool has parsed.
func TestAConstructorFindsWhatPgxpoolTakes(t *testing.T) {
	withoutEnvironment(t)
	for connString, says := range map[string]string{
		"postgres://app@db1/app?multipool_wiat=1s":     "multipool: unknown key multipool_wiat (did you mean multipool_wait?)",
		"postgres://app@db1,db2/app?multipool_wiat=1s": "multipool: unknown key multipool_wiat (did you mean multipool_wait?)",
		"host=db1,db2 pool_max_con=3":                  "multipool: unknown key pool_max_con (did you mean pool_max_conns?)",
		"postgres://app@db1,/app":                      "multipool: host #2 of 2 in the list is empty",
		"mysql://app@db1/app?sslmode=disable":          mustBegin,
	} {
		_, err := NewWithConfig(t.Context(), plainPoolOf(t, connString))
		require.EqualError(t, err, says)
		_, err = New(t.Context(), connString)
		require.EqualError(t, err, says)
		_, err = ParseOptions(connString)
		require.EqualError(t, err, says)
	}
	pool := plainPoolOf(t, "postgres://app@db1,/app")
	_, peers := completed(t, Options{Config: pool, Peers: []Peer{{Host: "a"}, {Host: "b"}}})
	require.Equal(t, []string{"a:5432", "b:5432"}, peerNames(peers), "the hosts of the string are none of the pool's")
	pool.ConnConfig.Host, pool.ConnConfig.Fallbacks = "db3", nil // as programs have it
	_, peers = completed(t, Options{Config: pool})
	require.Equal(t, []string{"db3:5432"}, peerNames(peers))
}

// What a server refuses is told once, and by what.
func TestWhatTheServersRefuseIsToldOnce(t *testing.T) {
	const needs = "multipool: no peer for a call that needs the primary: "
	const both = ": primary:5432, replica1:5432"
	for code, says := range map[string]string{
		"3D000": `misconfigured (server error: FATAL: database "app" does not exist (SQLSTATE 3D000))` + both,
		"28P01": `misconfigured (server error: FATAL: password authentication failed for user "app" (SQLSTATE 28P01))` + both,
		"28000": `misconfigured (server error: FATAL: injected failure "28000" (SQLSTATE 28000))` + both,
		"57P03": "starting (server error: FATAL: the database system is starting up (SQLSTATE 57P03))" + both,
	} {
		bubble(t, 1, nil, func(ctx context.Context, x *fakes) {
			settled() // else a handshake may be cut before the server has said anything
			for _, p := range append(x.replicas, x.primary) {
				p.StartupError(code)
				p.CutConns()
			}
			settled()
			_, err := x.pool.Exec(ctx, "insert into t values (1)")
			assert.EqualError(t, err, needs+says, code)
		})
	}
	bubble(t, 1, func(c *Options) {
		c.Peers = []Peer{{Host: "primary"}, {Host: "also-primary"}, {Host: "replica1"}}
	}, func(ctx context.Context, x *fakes) {
		x.primary.Handle(func(s pgfake.Statement) *pgfake.Response {
			if !asksLook(s) {
				return nil
			}
			seen := sight{role: RolePrimary, system: 1, started: 7, timeline: 1, position: 8192}
			if s.Standby {
				seen = sight{role: RoleReplica, system: 1, started: 7, position: 8192, shown: 1}
			}
			return lookAnswer(s, seen)
		})
		settled()
		_, err := x.pool.Exec(ctx, "insert into t values (1)")
		require.NoError(t, err)
		of := x.pool.Status()
		require.ElementsMatch(t, []Why{WhyNone, WhySameServer}, []Why{of.Peers[0].Why, of.Peers[1].Why}, "which of them depends on the looks")
		x.primary.SetStandby(true)
		time.Sleep(30 * time.Second)
		_, err = x.pool.Exec(ctx, "insert into t values (1)")
		one, other := "primary:5432", "also-primary:5432"
		if x.pool.Status().Peers[0].Why == WhySameServer {
			assert.EqualError(t, err, needs+one+" is another name of a server (multipool: the server is that of "+other+"); is a replica: "+other+", replica1:5432")
		} else {
			assert.EqualError(t, err, needs+"is a replica: "+one+", replica1:5432; "+other+" is another name of a server (multipool: the server is that of "+one+")")
		}
	})
}

// Every field of the options, with the last values that it takes and the first that it does not.
func TestEveryFieldHasItsBounds(t *testing.T) {
	withoutEnvironment(t)
	with := func(change func(*Options)) Options {
		o := Options{Config: plainPoolOf(t, threeHosts)}
		change(&o)
		return o
	}
	peer := func(q Peer) Options { return with(func(o *Options) { o.Peers = []Peer{{Host: "first"}, q} }) }
	route := func(r Route) Options { return with(func(o *Options) { o.Route = r }) }
	model := func(r Route) Options { return with(func(o *Options) { o.Models = map[string]Route{"m": r} }) }
	const sign = ": must be positive, 0 for the default, or Off"
	tested := map[string]bool{}
	for _, tc := range []struct {
		field string
		given Options
		says  string
	}{
		{"Options.Config", Options{}, "multipool: Options.Config is required: make it with ParseConfig"},
		{"Options.Config", with(func(o *Options) { o.Config.MaxConns = 1 }), ""},
		{"Options.Config", with(func(o *Options) { o.Config.MaxConns = 0 }), "multipool: Config.MaxConns (pool_max_conns) is 0: must be at least 1"},
		{"Options.Config", with(func(o *Options) { o.Config.HealthCheckPeriod = 1 }), ""},
		{"Options.Config", with(func(o *Options) { o.Config.HealthCheckPeriod = 0 }), "multipool: Config.HealthCheckPeriod (pool_health_check_period) is 0s: must be more than 0"},
		{"Options.Name", with(func(o *Options) { o.Name = "any thing" }), ""},
		{"Options.Peers", with(func(o *Options) { o.Peers = []Peer{} }), ""},
		{"Options.Peers", with(func(o *Options) { o.Peers = []Peer{{Host: "a"}, {Name: "a:5432", Host: "b"}} }), "multipool: peer a:5432 is given twice"},
		{"Options.Peers", with(func(o *Options) { o.Peers = []Peer{{Name: "x", Host: "a"}, {Name: "x", Host: "b"}} }), "multipool: peer x is given twice"},
		{"Options.Peers", peer(Peer{}), "multipool: peer #2: neither Host nor ConnString is set"},
		{"Options.Proxy", with(func(o *Options) { o.Proxy = true }), ""},
		{"Options.Discover", with(func(o *Options) { o.Discover = DiscoverReplication() }), ""},
		{"Options.Mode", with(func(o *Options) { o.Mode = ModeOrdered }), ""},
		{"Options.Mode", with(func(o *Options) { o.Mode = ModeOrdered + 1 }), "multipool: Mode is 3: unknown"},
		{"Options.ReturnAfter", with(func(o *Options) { o.ReturnAfter = 1 }), ""},
		{"Options.ReturnAfter", with(func(o *Options) { o.ReturnAfter = math.MaxInt64 }), ""},
		{"Options.ReturnAfter", with(func(o *Options) { o.ReturnAfter = Off }), ""},
		{"Options.ReturnAfter", with(func(o *Options) { o.ReturnAfter = Off - 1 }), "multipool: ReturnAfter (multipool_return_after) is -2ns" + sign},
		{"Options.Route", route(Route{Target: TargetAny}), ""},
		{"Options.Balancer", with(func(o *Options) { o.Balancer = Nearest() }), ""},
		{"Options.Zone", with(func(o *Options) { o.Zone = "any thing" }), ""},
		{"Options.Models", with(func(o *Options) { o.Models = map[string]Route{} }), ""},
		{"Options.Models", model(Route{Target: 99}), `multipool: Models["m"].Target is 99: unknown`},
		{"Options.Models", model(Route{Retry: 99}), `multipool: Models["m"].Retry is 99: unknown`},
		{"Options.Models", model(Route{MaxLag: Lag{Time: -2}}), `multipool: Models["m"].MaxLag: its Time is -2ns: must be positive, 0, or Off`},
		{"Options.Models", model(Route{Peers: []string{"x"}}), `multipool: unknown name: peer "x" (known: db1:5432, db2:5433, db3:5432), in model "m"`},
		{"Options.MaxLag", with(func(o *Options) { o.MaxLag = Lag{Bytes: 1, Time: 1} }), ""},
		{"Options.MaxLag", with(func(o *Options) { o.MaxLag.Time = -2 }), "multipool: MaxLag (multipool_max_lag): its Time is -2ns: must be positive, 0, or Off"},
		{"Options.CheckInterval", with(func(o *Options) { o.CheckInterval = minCheckInterval }), ""},
		{"Options.CheckInterval", with(func(o *Options) { o.CheckInterval = math.MaxInt64 }), ""},
		{"Options.CheckInterval", with(func(o *Options) { o.CheckInterval = minCheckInterval - 1 }), "multipool: CheckInterval (multipool_check_interval) is 9.999999ms: must be at least 10ms"},
		{"Options.CheckInterval", with(func(o *Options) { o.CheckInterval = Off }), "multipool: CheckInterval (multipool_check_interval) is -1ns: must be at least 10ms"},
		{"Options.Wait", with(func(o *Options) { o.Wait = 1 }), ""},
		{"Options.Wait", with(func(o *Options) { o.Wait = math.MaxInt64 }), ""},
		{"Options.Wait", with(func(o *Options) { o.Wait = Off }), ""},
		{"Options.Wait", with(func(o *Options) { o.Wait = Off - 1 }), "multipool: Wait (multipool_wait) is -2ns" + sign},
		{"Options.MaxWaiting", with(func(o *Options) { o.MaxWaiting = 1 }), ""},
		{"Options.MaxWaiting", with(func(o *Options) { o.MaxWaiting = math.MaxInt }), ""},
		{"Options.MaxWaiting", with(func(o *Options) { o.MaxWaiting = Off }), ""},
		{"Options.MaxWaiting", with(func(o *Options) { o.MaxWaiting = Off - 1 }), "multipool: MaxWaiting (multipool_max_waiting) is -2" + sign},
		{"Options.StallAfter", with(func(o *Options) { o.StallAfter = minStallAfter }), ""},
		{"Options.StallAfter", with(func(o *Options) { o.StallAfter = math.MaxInt64 }), ""},
		{"Options.StallAfter", with(func(o *Options) { o.StallAfter = Off }), ""},
		{"Options.StallAfter", with(func(o *Options) { o.StallAfter = minStallAfter - 1 }), "multipool: StallAfter (multipool_stall_after) is 99.999999ms: must be at least 100ms"},
		{"Options.StallAfter", with(func(o *Options) { o.StallAfter = Off - 1 }), "multipool: StallAfter (multipool_stall_after) is -2ns" + sign},
		{"Options.WriteReserve", with(func(o *Options) { o.WriteReserve = math.SmallestNonzeroFloat64 }), ""},
		{"Options.WriteReserve", with(func(o *Options) { o.WriteReserve = maxWriteReserve }), ""},
		{"Options.WriteReserve", with(func(o *Options) { o.WriteReserve = Off }), ""},
		{"Options.WriteReserve", with(func(o *Options) { o.WriteReserve = 0.91 }), "multipool: WriteReserve (multipool_write_reserve) is 0.91: must be at most 0.9"},
		{"Options.WriteReserve", with(func(o *Options) { o.WriteReserve = math.NaN() }), "multipool: WriteReserve (multipool_write_reserve) is NaN: must be at most 0.9"},
		{"Options.WriteReserve", with(func(o *Options) { o.WriteReserve = -0.5 }), "multipool: WriteReserve (multipool_write_reserve) is -0.5" + sign},
		{"Options.NoMonitorConns", with(func(o *Options) { o.NoMonitorConns = true }), ""},
		{"Options.Hooks", with(func(o *Options) { o.Hooks = &Hooks{} }), ""},

		{"Peer.Name", peer(Peer{Name: "any thing", Host: "a"}), ""},
		{"Peer.ConnString", peer(Peer{ConnString: "host=a"}), ""},
		{"Peer.ConnString", peer(Peer{ConnString: "a"}), "multipool: peer #2: " + mustBegin},
		{"Peer.Host", peer(Peer{Host: "a b"}), "multipool: peer #2: its Host " + errNoHost.Error()},
		{"Peer.Host", peer(Peer{Host: "a,"}), "multipool: peer #2: its Host " + errNoHost.Error()},
		{"Peer.Port", peer(Peer{Host: "a", Port: math.MaxUint16}), ""},
		{"Peer.ServerName", peer(Peer{Host: "a", ServerName: "b"}), ""},
		{"Peer.Role", peer(Peer{Host: "a", Role: RoleReplica}), ""},
		{"Peer.Role", peer(Peer{Host: "a", Role: RoleReplica + 1}), "multipool: peer #2: Role is 3: unknown"},
		{"Peer.Proxy", peer(Peer{Host: "a", Proxy: true}), ""},
		{"Peer.MaxConns", peer(Peer{Host: "a", MaxConns: 1}), ""},
		{"Peer.MaxConns", peer(Peer{Host: "a", MaxConns: math.MaxInt32}), ""},
		{"Peer.MaxConns", peer(Peer{Host: "a", MaxConns: -1}), "multipool: peer #2: MaxConns is -1: must not be negative"},
		{"Peer.Weight", peer(Peer{Host: "a", Weight: math.SmallestNonzeroFloat64}), ""},
		{"Peer.Weight", peer(Peer{Host: "a", Weight: maxWeight}), ""},
		{"Peer.Weight", peer(Peer{Host: "a", Weight: 1000.5}), "multipool: peer #2: Weight is 1000.5: must be a finite number of at most 1000"},
		{"Peer.Weight", peer(Peer{Host: "a", Weight: math.NaN()}), "multipool: peer #2: Weight is NaN: must be a finite number of at most 1000"},
		{"Peer.Weight", peer(Peer{Host: "a", Weight: -1}), "multipool: peer #2: Weight is -1: must not be negative (set LastResort for a peer that nobody reads while another can be)"},
		{"Peer.LastResort", peer(Peer{Host: "a", LastResort: true}), ""},
		{"Peer.Zone", peer(Peer{Host: "a", Zone: "any thing"}), ""},

		{"Route.Target", route(Route{Target: TargetAny}), ""},
		{"Route.Target", route(Route{Target: TargetAny + 1}), "multipool: Route.Target is 6: unknown"},
		{"Route.Retry", route(Route{Retry: RetryNever}), ""},
		{"Route.Retry", route(Route{Retry: RetryNever + 1}), "multipool: Route.Retry is 4: unknown"},
		{"Route.Peers", route(Route{Peers: []string{"db1:5432"}}), ""},
		{"Route.Peers", route(Route{Peers: []string{"db1"}}), `multipool: unknown name: peer "db1" (known: db1:5432, db2:5433, db3:5432)`},
		{"Route.MaxLag", route(Route{MaxLag: Lag{Time: Off}}), ""},
		{"Lag.Bytes", route(Route{MaxLag: Lag{Bytes: math.MaxInt64}}), ""},
		{"Lag.Time", route(Route{MaxLag: Lag{Time: math.MaxInt64}}), ""},
		{"Lag.Time", route(Route{MaxLag: Lag{Time: Off - 1}}), "multipool: Route.MaxLag: its Time is -2ns: must be positive, 0, or Off"},
	} {
		tested[tc.field] = true
		p, err := Open(t.Context(), tc.given)
		if tc.says != "" {
			require.EqualError(t, err, tc.says, tc.field)
			continue
		}
		require.NoError(t, err, tc.field)
		p.Close()
	}
	for _, of := range []reflect.Type{reflect.TypeFor[Options](), reflect.TypeFor[Peer](), reflect.TypeFor[Route](), reflect.TypeFor[Lag]()} {
		for i := range of.NumField() {
			require.True(t, tested[of.Name()+"."+of.Field(i).Name], "no bounds of %s.%s are tested", of.Name(), of.Field(i).Name)
		}
	}
}

// Every key, with the last values that it takes, the first that it does not, and nonsense.
func TestEveryKeyHasItsBounds(t *testing.T) {
	withoutEnvironment(t)
	const (
		duration = "must be a duration such as 500ms or 5s"
		negative = "must not be negative (0 means none)"
		longest  = "2562047h47m16.854775807s" // math.MaxInt64 nanoseconds
		longer   = "2562047h47m16.854775808s"
		int32s   = "must be a whole number from -2147483648 to 2147483647"
		oneUp    = "must be a whole number from 1 to 2147483647"
		boolean  = "must be true or false"
		modes    = "must be one of replicated, equivalent, ordered"
		targets  = "must be one of inherit, auto, primary, prefer-replica, replica, any"
		retries  = "must be one of inherit, safe, reads, never"
		finders  = "must be one of dns, none, replication, srv"
		chosen   = "must be one of default, round-robin, nearest"
		hosts    = "must be one of disable, random"
		share    = "must be a number from 0 to 0.9"
	)
	noLag := errLagSyntax.Error()
	tested := map[string]bool{}
	for _, tc := range []struct{ key, value, says string }{
		{"multipool_mode", "replicated", ""}, {"multipool_mode", "ordered", ""},
		{"multipool_mode", "", modes}, {"multipool_mode", "0", modes}, {"multipool_mode", "Ordered", modes},
		{"multipool_return_after", "0", ""}, {"multipool_return_after", longest, ""},
		{"multipool_return_after", "-1ns", negative}, {"multipool_return_after", longer, duration}, {"multipool_return_after", "soon", duration},
		{"multipool_proxy", "true", ""}, {"multipool_proxy", "0", ""},
		{"multipool_proxy", "", boolean}, {"multipool_proxy", "2", boolean}, {"multipool_proxy", "on", boolean},
		{"multipool_discover", "none", ""}, {"multipool_discover", "srv", ""},
		{"multipool_discover", "", finders}, {"multipool_discover", "DNS", finders},
		{"multipool_target", "inherit", ""}, {"multipool_target", "any", ""},
		{"multipool_target", "", targets}, {"multipool_target", "standby", targets},
		{"multipool_retry", "inherit", ""}, {"multipool_retry", "never", ""},
		{"multipool_retry", "", retries}, {"multipool_retry", "3", retries},
		{"multipool_balancer", "default", ""}, {"multipool_balancer", "nearest", ""},
		{"multipool_balancer", "", chosen}, {"multipool_balancer", "roundrobin", chosen},
		{"multipool_name", "", ""}, {"multipool_name", "any thing", ""},
		{"multipool_zone", "", ""}, {"multipool_zone", "any thing", ""},
		{"multipool_max_lag", "0", ""}, {"multipool_max_lag", "1B", ""}, {"multipool_max_lag", longest, ""},
		{"multipool_max_lag", "-1s", noLag}, {"multipool_max_lag", "0B", noLag}, {"multipool_max_lag", longer, noLag}, {"multipool_max_lag", "much", noLag},
		{"multipool_check_interval", "10ms", ""}, {"multipool_check_interval", longest, ""},
		{"multipool_check_interval", "9.999999ms", "must be at least 10ms"}, {"multipool_check_interval", "-1s", "must be at least 10ms"},
		{"multipool_check_interval", longer, duration}, {"multipool_check_interval", "5", duration},
		{"multipool_wait", "0", ""}, {"multipool_wait", longest, ""},
		{"multipool_wait", "-1ns", negative}, {"multipool_wait", longer, duration}, {"multipool_wait", "5", duration},
		{"multipool_max_waiting", "0", ""}, {"multipool_max_waiting", "9223372036854775807", ""},
		{"multipool_max_waiting", "-1", negative}, {"multipool_max_waiting", "9223372036854775808", "must be a whole number"},
		{"multipool_max_waiting", "1e3", "must be a whole number"},
		{"multipool_stall_after", "0", ""}, {"multipool_stall_after", "100ms", ""}, {"multipool_stall_after", longest, ""},
		{"multipool_stall_after", "99.999999ms", "must be at least 100ms, or 0 for none"}, {"multipool_stall_after", "-1ns", negative},
		{"multipool_stall_after", longer, duration}, {"multipool_stall_after", "", duration},
		{"multipool_write_reserve", "0", ""}, {"multipool_write_reserve", "0.9", ""},
		{"multipool_write_reserve", "-0.01", share}, {"multipool_write_reserve", "0.91", share}, {"multipool_write_reserve", "25%", share},
		{"multipool_monitor_conns", "true", ""}, {"multipool_monitor_conns", "f", ""},
		{"multipool_monitor_conns", "", boolean}, {"multipool_monitor_conns", "no", boolean},
		{"load_balance_hosts", "disable", ""}, {"load_balance_hosts", "random", ""},
		{"load_balance_hosts", "", hosts}, {"load_balance_hosts", "true", hosts},

		{"pool_max_conns", "1", ""}, {"pool_max_conns", "2147483647", ""},
		{"pool_max_conns", "0", oneUp}, {"pool_max_conns", "2147483648", oneUp}, {"pool_max_conns", "x", oneUp},
		{"pool_min_conns", "-2147483648", ""}, {"pool_min_conns", "2147483647", ""},
		{"pool_min_conns", "-2147483649", int32s}, {"pool_min_conns", "2147483648", int32s}, {"pool_min_conns", "", int32s},
		{"pool_min_idle_conns", "-2147483648", ""}, {"pool_min_idle_conns", "2147483647", ""},
		{"pool_min_idle_conns", "-2147483649", int32s}, {"pool_min_idle_conns", "2147483648", int32s}, {"pool_min_idle_conns", "1.5", int32s},
		{"pool_max_conn_lifetime", "-1s", ""}, {"pool_max_conn_lifetime", longest, ""},
		{"pool_max_conn_lifetime", longer, duration}, {"pool_max_conn_lifetime", "3", duration},
		{"pool_max_conn_lifetime_jitter", "-1s", ""}, {"pool_max_conn_lifetime_jitter", longest, ""},
		{"pool_max_conn_lifetime_jitter", longer, duration}, {"pool_max_conn_lifetime_jitter", "3", duration},
		{"pool_max_conn_idle_time", "-1s", ""}, {"pool_max_conn_idle_time", longest, ""},
		{"pool_max_conn_idle_time", longer, duration}, {"pool_max_conn_idle_time", "3", duration},
		{"pool_health_check_period", "1ns", ""}, {"pool_health_check_period", longest, ""},
		{"pool_health_check_period", longer, duration}, {"pool_health_check_period", "3", duration},
		{"pool_ping_timeout", "-1s", ""}, {"pool_ping_timeout", longest, ""},
		{"pool_ping_timeout", longer, duration}, {"pool_ping_timeout", "3", duration},
	} {
		tested[tc.key] = true
		_, err := ParseConfig("host=db1,db2 user=app " + tc.key + "='" + tc.value + "'")
		if tc.says == "" {
			require.NoError(t, err, "%s=%s", tc.key, tc.value)
			continue
		}
		require.EqualError(t, err, fmt.Sprintf("multipool: %s=%q: %s", tc.key, tc.value, tc.says))
	}
	for _, key := range dsn.KnownKeys(ourKeys()) {
		require.True(t, tested[key], "no bounds of %s are tested", key)
	}
	_, err := ParseConfig("host=db1,db2 user=app pool_health_check_period=0") // which pgxpool.ParseConfig takes
	require.EqualError(t, err, "multipool: Config.HealthCheckPeriod (pool_health_check_period) is 0s: must be more than 0")
}

// Which string fields of the options may be printed: a new one is named here, or holds a password.
var printed = map[string]bool{
	"Peer.Name": true, "Peer.Host": true, "Peer.ServerName": true, "Peer.Zone": true, "Options.Zone": true, "Options.Name": true, "Route.Peers": true,
}

// fillStrings puts a secret into every string that v reaches through exported fields of our types and is not printed.
func fillStrings(v reflect.Value, path, secret string) (filled int) {
	switch v.Kind() {
	case reflect.String:
		if !printed[path] {
			v.SetString(secret)
			return 1
		}
	case reflect.Struct:
		for i := range v.NumField() {
			if f := v.Type().Field(i); f.IsExported() {
				filled += fillStrings(v.Field(i), v.Type().Name()+"."+f.Name, secret)
			}
		}
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 2, 2))
		for i := range 2 {
			filled += fillStrings(v.Index(i), path, secret)
		}
	}
	return filled
}

func TestOptionsAndPeersArePrintedWithoutPasswords(t *testing.T) {
	withoutEnvironment(t)
	const secret = "Kq7wZx93Vt"
	var o Options
	require.Equal(t, 2, fillStrings(reflect.ValueOf(&o).Elem(), "", secret), "the ConnString of two peers")
	o.Config = plainPoolOf(t, "postgres://app:"+secret+"@db1,db2/app")
	o.Config.ConnConfig.SSLNegotiation = secret
	q := o.Peers[0]
	type outer struct {
		In   Options
		At   *Options
		Peer Peer
		List []*Peer
		Any  any
		Map  map[string]Peer
	}
	values := []any{o, &o, q, &q, o.Peers, &o.Peers, []any{q}, map[Peer]int{q: 1}, errors.Join(fmt.Errorf("%v", q)),
		outer{o, &o, q, []*Peer{&q}, q, map[string]Peer{"a": q}}, &outer{In: o, Any: &q}}
	p := openPool(t, Options{Peers: []Peer{{Name: "x", ConnString: "postgres://app:" + secret + "@127.0.0.1:1/app"}, {Host: "127.0.0.1", Port: 2}}},
		"postgres://app:"+secret+"@127.0.0.1/app")
	for _, v := range values {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d", "%10v", "%T", "%t"} {
			requireHidden(t, fmt.Sprintf(verb, v), secret, verb, v)
		}
		requireHidden(t, fmt.Sprint(v)+fmt.Sprintln(v), secret, "Sprint", v)
		text, _ := json.Marshal(v)
		requireHidden(t, string(text), secret, "JSON", v)
		var logged bytes.Buffer
		for _, h := range []slog.Handler{slog.NewTextHandler(&logged, nil), slog.NewJSONHandler(&logged, nil)} {
			slog.New(h).With("with", v).Info("opening", "options", v, slog.Group("in", "options", v))
		}
		requireHidden(t, logged.String(), secret, "slog", v)
	}
	p.Close() // its goroutines change what is printed
	for _, verb := range []string{"%v", "%+v", "%#v"} {
		requireHidden(t, fmt.Sprintf(verb, p), secret, verb, "a pool")
		requireHidden(t, fmt.Sprintf(verb, p.Config()), secret, verb, "its configuration")
		requireHidden(t, fmt.Sprintf(verb, p.Status()), secret, verb, "its status")
	}
	require.Contains(t, fmt.Sprintf("%+v", q), "ConnString:(not shown)")
	require.Contains(t, fmt.Sprintf("%#v", q), `multipool.Peer{Name:"", ConnString:"(not shown)"`)
	require.Contains(t, fmt.Sprintf("%+v", Peer{Host: "a", Weight: 2}), "ConnString: Host:a Port:0")
	text, err := json.Marshal(Peer{Host: "a"})
	require.NoError(t, err)
	require.Contains(t, string(text), `"ConnString":"","Host":"a"`)
	require.Equal(t, secret, q.ConnString, "it is what it was")
}

func requireHidden(t *testing.T, text, secret, how string, of any) {
	t.Helper()
	require.NotContains(t, text, secret, "%s of %T", how, of)
	require.NotContains(t, strings.ToLower(text), fmt.Sprintf("%x", secret), "%s of %T", how, of)
}

func TestDiscoveryThatFailsIsToldOnceAndToItsCallers(t *testing.T) {
	broken := errors.New("the catalogue is out")
	var mu sync.Mutex
	var events []DiscoveryEvent
	var logged bytes.Buffer
	list := &peerList{}
	list.say(nil, "primary", "replica1")
	bubble(t, 1, func(c *Options) {
		c.Discover = list.discover
		logs := SlogHooks(slog.New(slog.NewTextHandler(&logged, nil)))
		logs.PeerChanged, logs.PrimaryChanged = nil, nil
		c.Hooks = JoinHooks(logs, &Hooks{DiscoveryChanged: func(e DiscoveryEvent) {
			mu.Lock()
			defer mu.Unlock()
			events = append(events, e)
		}})
	}, func(ctx context.Context, x *fakes) {
		told := func() []DiscoveryEvent {
			mu.Lock()
			defer mu.Unlock()
			e := events
			events = nil
			return e
		}
		time.Sleep(10 * time.Second)
		require.Empty(t, told(), "nothing has failed")
		list.say(broken)
		time.Sleep(20 * time.Second)
		first := told()
		require.Len(t, first, 1, "once")
		require.Equal(t, broken, first[0].Cause)
		require.NotZero(t, first[0].At)
		event, err := json.Marshal(first[0])
		require.NoError(t, err)
		require.Contains(t, string(event), `"cause":"the catalogue is out"`)
		var back DiscoveryEvent
		require.NoError(t, json.Unmarshal(event, &back))
		require.EqualError(t, back.Cause, broken.Error())
		require.True(t, back.At.Equal(first[0].At))

		x.primary.Die()
		_, err = x.pool.Exec(ctx, "insert into t values (1)")
		require.ErrorIs(t, err, broken)
		require.ErrorIs(t, err, ErrNoPrimary)
		require.ErrorContains(t, err, "; discovery: the catalogue is out")
		text, _ := json.Marshal(err)
		require.NotContains(t, string(text), "discovery")

		list.say(ErrNoPrimary) // as DiscoverReplication has it
		time.Sleep(10 * time.Second)
		require.Empty(t, told())
		list.say(nil, "primary", "replica1")
		time.Sleep(10 * time.Second)
		last := told()
		require.Len(t, last, 1)
		require.NoError(t, last[0].Cause)
		require.Equal(t, 2, last[0].Peers)
		_, err = x.pool.Exec(ctx, "insert into t values (1)")
		require.ErrorIs(t, err, ErrNoPrimary)
		require.NotContains(t, err.Error(), "discovery")
		list.say(ErrNoPrimary)
		time.Sleep(10 * time.Second)
		_, err = x.pool.Exec(ctx, "insert into t values (1)")
		require.NotContains(t, err.Error(), "discovery")
		require.Empty(t, told(), "that there is no primary is told as such")
	})
	lines := strings.Split(strings.TrimSpace(logged.String()), "\n")
	require.Len(t, lines, 2)
	require.Contains(t, lines[0], `level=WARN msg="multipool: discovery failed" pool=app cause="the catalogue is out"`)
	require.Contains(t, lines[1], `level=INFO msg="multipool: discovery works again" pool=app peers=2`)
}

func TestALookUpThatFailsNamesWhatWasLookedUp(t *testing.T) {
	lookUpIn(t, &names{})
	_, err := DiscoverSRV("", "", "_postgresql._tcp.db")(t.Context())
	require.EqualError(t, err, "multipool: discover: look-up of the SRV records of _postgresql._tcp.db failed: no such host")
	_, err = DiscoverSRV("postgresql", "tcp", "db")(t.Context())
	require.EqualError(t, err, "multipool: discover: look-up of the SRV records of _postgresql._tcp.db failed: no such host")
	_, err = DiscoverDNS("db", 0)(t.Context())
	require.EqualError(t, err, "multipool: discover: look-up of the addresses of db failed: no such host")
	require.ErrorIs(t, err, errNoSuchHost)

	withoutEnvironment(t)
	p := openPool(t, Options{Wait: 10 * time.Millisecond}, "postgres://app@nowhere.invalid/app?multipool_discover=srv")
	require.Eventually(t, func() bool { return p.discovery.failure() != nil }, time.Minute, time.Millisecond)
	_, err = p.Exec(t.Context(), "select 1")
	require.ErrorIs(t, err, errNoSuchHost)
	require.ErrorContains(t, err, "; discovery: look-up of the SRV records of nowhere.invalid failed: no such host")
}

func TestReplicasWithoutAPrimaryAskForIt(t *testing.T) {
	const hint = "; is the primary in the list?"
	bubble(t, 2, func(c *Options) {
		c.Peers = []Peer{{Host: "replica1"}, {Host: "replica2"}}
	}, func(ctx context.Context, x *fakes) {
		settled()
		_, err := x.pool.Exec(ctx, "insert into t values (1)")
		assert.EqualError(t, err, "multipool: no peer for a call that needs the primary: is a replica: replica1:5432, replica2:5432"+hint)
		_, err = x.pool.Exec(WithRoute(ctx, Route{MaxLag: Lag{Time: -2}}), "insert into t values (1)")
		require.EqualError(t, err, "multipool: Route.MaxLag: its Time is -2ns: must be positive, 0, or Off")
		_, err = x.pool.Exec(WithPeer(ctx, "replica1:5432"), "insert into t values (1)")
		require.Error(t, err)
		assert.NotContains(t, err.Error(), hint, "the route names no other")
	})
	bubble(t, 2, nil, func(ctx context.Context, x *fakes) {
		x.primary.Refuse(errors.New("refused"))
		settled()
		_, err := x.pool.Exec(ctx, "insert into t values (1)")
		require.ErrorIs(t, err, ErrNoPrimary)
		assert.NotContains(t, err.Error(), hint, "the one that is down may be it")
	})
	bubble(t, 2, nil, func(ctx context.Context, x *fakes) {
		settled()
		x.primary.SetStandby(true)
		time.Sleep(30 * time.Second)
		_, err := x.pool.Exec(ctx, "insert into t values (1)")
		require.ErrorIs(t, err, ErrNoPrimary)
		assert.NotContains(t, err.Error(), hint, "it was")
	})
}
