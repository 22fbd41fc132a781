package multipool

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	gotoken "go/token"
	"log/slog"
	"math"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"

	"github.com/pgmultipool/multipool/internal/dsn"
)

// withoutEnvironment hides what the machine says about PostgreSQL: variables and files. Tests that parse connection
// strings use it and so are not parallel.
func withoutEnvironment(t testing.TB) (home string) {
	t.Helper()
	for _, entry := range os.Environ() {
		name, _, _ := strings.Cut(entry, "=")
		ours := slices.ContainsFunc(settings, func(s setting) bool { return variableOf(s.key) == name })
		if ours || strings.HasPrefix(name, "PG") {
			t.Setenv(name, "") // so that it comes back
			require.NoError(t, os.Unsetenv(name))
		}
	}
	home = t.TempDir()
	t.Setenv("HOME", home)
	return home
}

// parsed is what a constructor makes of a connection string.
func parsed(t *testing.T, connString string) (Options, []peerConfig) {
	t.Helper()
	config, err := ParseConfig(connString)
	require.NoError(t, err)
	return completed(t, Options{Config: config})
}

func completed(t *testing.T, c Options) (Options, []peerConfig) {
	t.Helper()
	complete, peers, err := c.complete()
	require.NoError(t, err)
	return complete, peers
}

func peerNames(peers []peerConfig) []string {
	names := make([]string, len(peers))
	for i, p := range peers {
		names[i] = p.Name
	}
	return names
}

const threeHosts = "postgres://app:secret@db1,db2:5433,db3/app?sslmode=disable"

func TestEveryKeySetsItsField(t *testing.T) {
	withoutEnvironment(t)
	tested := map[string]bool{}
	for _, tc := range []struct {
		key, value string
		get        func(Options) any
		want       any
	}{
		{"multipool_mode", "replicated", func(c Options) any { return c.Mode }, ModeReplicated},
		{"multipool_mode", "equivalent", func(c Options) any { return c.Mode }, ModeEquivalent},
		{"multipool_mode", "ordered", func(c Options) any { return c.Mode }, ModeOrdered},
		{"multipool_proxy", "true", func(c Options) any { return c.Proxy }, true},
		{"multipool_proxy", "false", func(c Options) any { return c.Proxy }, false},
		{"load_balance_hosts", "random", func(c Options) any { return c.Mode }, ModeReplicated},
		{"load_balance_hosts", "disable", func(c Options) any { return c.Mode }, ModeOrdered},
		{"multipool_discover", "none", func(c Options) any { return c.Discover == nil }, true},
		{"multipool_discover", "dns", func(c Options) any { return c.Discover == nil }, false},
		{"multipool_discover", "srv", func(c Options) any { return c.Discover == nil }, false},
		{"multipool_discover", "replication", func(c Options) any { return c.Discover == nil }, false},
		{"multipool_return_after", "3s", func(c Options) any { return c.ReturnAfter }, 3 * time.Second},
		{"multipool_return_after", "0", func(c Options) any { return c.ReturnAfter }, time.Duration(0)},
		{"multipool_target", "auto", func(c Options) any { return c.Route.Target }, TargetAuto},
		{"multipool_target", "primary", func(c Options) any { return c.Route.Target }, TargetPrimary},
		{"multipool_target", "prefer-replica", func(c Options) any { return c.Route.Target }, TargetPreferReplica},
		{"multipool_target", "replica", func(c Options) any { return c.Route.Target }, TargetReplica},
		{"multipool_target", "any", func(c Options) any { return c.Route.Target }, TargetAny},
		{"multipool_retry", "inherit", func(c Options) any { return c.Route.Retry }, RetryInherit},
		{"multipool_retry", "safe", func(c Options) any { return c.Route.Retry }, RetrySafe},
		{"multipool_retry", "reads", func(c Options) any { return c.Route.Retry }, RetryReads},
		{"multipool_retry", "never", func(c Options) any { return c.Route.Retry }, RetryNever},
		{"multipool_balancer", "default", func(c Options) any { return c.Balancer }, nil},
		{"multipool_balancer", "round-robin", func(c Options) any { return reflect.TypeOf(c.Balancer) }, reflect.TypeOf(RoundRobin())},
		{"multipool_balancer", "nearest", func(c Options) any { return c.Balancer }, Nearest()},
		{"multipool_name", "orders", func(c Options) any { return c.Name }, "orders"},
		{"multipool_zone", "eu-1a", func(c Options) any { return c.Zone }, "eu-1a"},
		{"multipool_zone", "", func(c Options) any { return c.Zone }, ""},
		{"multipool_max_lag", "10s", func(c Options) any { return c.MaxLag }, Lag{Time: 10 * time.Second}},
		{"multipool_max_lag", "16MB", func(c Options) any { return c.MaxLag }, Lag{Bytes: 16 << 20}},
		{"multipool_max_lag", "1m30s,512kB", func(c Options) any { return c.MaxLag }, Lag{Bytes: 512 << 10, Time: 90 * time.Second}},
		{"multipool_max_lag", "7B,1ms", func(c Options) any { return c.MaxLag }, Lag{Bytes: 7, Time: time.Millisecond}},
		{"multipool_max_lag", "0", func(c Options) any { return c.MaxLag.bounds() }, false},
		{"multipool_check_interval", "10ms", func(c Options) any { return c.CheckInterval }, 10 * time.Millisecond},
		{"multipool_check_interval", "1m30s", func(c Options) any { return c.CheckInterval }, 90 * time.Second},
		{"multipool_wait", "250ms", func(c Options) any { return c.Wait }, 250 * time.Millisecond},
		{"multipool_wait", "0", func(c Options) any { return c.Wait }, time.Duration(0)},
		{"multipool_max_waiting", "7", func(c Options) any { return c.MaxWaiting }, 7},
		{"multipool_max_waiting", "0", func(c Options) any { return c.MaxWaiting }, 0},
		{"multipool_stall_after", "250ms", func(c Options) any { return c.StallAfter }, 250 * time.Millisecond},
		{"multipool_stall_after", "0", func(c Options) any { return c.StallAfter < 0 }, true},
		{"multipool_write_reserve", "0.5", func(c Options) any { return c.WriteReserve }, 0.5},
		{"multipool_write_reserve", "0", func(c Options) any { return c.WriteReserve }, 0.0},
		{"multipool_monitor_conns", "true", func(c Options) any { return c.NoMonitorConns }, false},
		{"multipool_monitor_conns", "false", func(c Options) any { return c.NoMonitorConns }, true},
		{"multipool_monitor_conns", "0", func(c Options) any { return c.NoMonitorConns }, true},
	} {
		tested[tc.key] = true
		t.Run(tc.key+"="+tc.value, func(t *testing.T) {
			complete, peers := parsed(t, threeHosts+"&"+tc.key+"="+tc.value)
			require.Equal(t, tc.want, tc.get(complete))
			for _, p := range peers {
				require.NotContains(t, p.pool.ConnConfig.RuntimeParams, tc.key, "no server knows the key")
			}
		})
	}
	for _, s := range settings {
		require.True(t, tested[s.key], "no test of %s", s.key)
	}
}

func TestABadValueIsAnErrorThatNamesKeyValueAndBound(t *testing.T) {
	withoutEnvironment(t)
	for _, tc := range []struct{ key, value, bound string }{
		{"multipool_mode", "primary-only", "replicated"},
		{"multipool_mode", "", "replicated"},
		{"multipool_mode", "Replicated", "replicated"},
		{"multipool_return_after", "10", "500ms"},
		{"multipool_discover", "consul", "replication"},
		{"multipool_target", "secondary", "prefer-replica"},
		{"multipool_retry", "always", "reads"},
		{"multipool_balancer", "random", "round-robin"},
		{"multipool_balancer", "", "nearest"},
		{"multipool_max_lag", "10", "16MB"},
		{"multipool_max_lag", "", "16MB"},
		{"multipool_max_lag", "0MB", "16MB"},
		{"multipool_max_lag", "-5s", "16MB"},
		{"multipool_max_lag", "5s,6s", "16MB"},
		{"multipool_max_lag", "5MB,6MB", "16MB"},
		{"multipool_max_lag", "1.5MB", "16MB"},
		{"multipool_max_lag", "99999999999TB", "16MB"},
		{"multipool_max_lag", "5s,", "16MB"},
		{"multipool_check_interval", "5", "500ms"},
		{"multipool_check_interval", "soon", "500ms"},
		{"multipool_check_interval", "9ms", "at least 10ms"},
		{"multipool_check_interval", "-1s", "at least 10ms"},
		{"multipool_check_interval", "0", "at least 10ms"},
		{"multipool_wait", "5", "500ms"},
		{"multipool_max_waiting", "1.5", "whole number"},
		{"multipool_max_waiting", "many", "whole number"},
		{"multipool_stall_after", "99ms", "at least 100ms"},
		{"multipool_stall_after", "500", "500ms"},
		{"multipool_write_reserve", "0.91", "from 0 to 0.9"},
		{"multipool_write_reserve", "-0.1", "from 0 to 0.9"},
		{"multipool_write_reserve", "NaN", "from 0 to 0.9"},
		{"multipool_monitor_conns", "maybe", "true or false"},
		{"multipool_proxy", "yes", "true or false"},
		{"load_balance_hosts", "none", "disable, random"},
		{"load_balance_hosts", "Random", "disable, random"},
	} {
		t.Run(tc.key+"="+tc.value, func(t *testing.T) {
			config, err := ParseConfig(threeHosts + "&" + tc.key + "=" + tc.value)
			require.Nil(t, config)
			require.ErrorContains(t, err, tc.key)
			require.ErrorContains(t, err, tc.bound)
			require.Regexp(t, `(=|is )"?`+regexp.QuoteMeta(tc.value)+`("|:|s:| )`, err.Error(), "the value as it was given")
			require.ErrorContains(t, err, "multipool: ")

			// A constructor says the same of a configuration that ParseConfig has not seen.
			plain, err := pgxpool.ParseConfig(threeHosts)
			require.NoError(t, err)
			plain.ConnConfig.RuntimeParams[tc.key] = tc.value
			_, err = NewWithConfig(context.Background(), plain)
			require.ErrorContains(t, err, tc.key)
		})
	}
}

func TestABadValueOfAPgxpoolKeyIsAnErrorThatNamesKeyValueAndBound(t *testing.T) {
	withoutEnvironment(t)
	for _, tc := range []struct{ key, value, bound string }{
		{"pool_max_conns", "0", "from 1 to 2147483647"},
		{"pool_max_conns", "-5", "from 1 to 2147483647"},
		{"pool_max_conns", "many", "from 1 to 2147483647"},
		{"pool_max_conns", "2147483648", "from 1 to 2147483647"},
		{"pool_min_conns", "", "to 2147483647"},
		{"pool_min_idle_conns", "1.5", "to 2147483647"},
		{"pool_max_conn_lifetime", "3", "500ms"},
		{"pool_max_conn_lifetime_jitter", "soon", "500ms"},
		{"pool_max_conn_idle_time", "3", "500ms"},
		{"pool_health_check_period", "3", "500ms"},
		{"pool_ping_timeout", "3", "500ms"},
	} {
		t.Run(tc.key+"="+tc.value, func(t *testing.T) {
			for _, connString := range []string{
				threeHosts + "&pool_min_conns=-1&" + tc.key + "=" + tc.value,
				"postgres://app:pool@db1/app?" + tc.key + "=" + tc.value, // a password that is a part of the key
				"host=db1,db2 user=app password='pool max' " + tc.key + "='" + tc.value + "'",
			} {
				_, err := ParseConfig(connString)
				require.ErrorContains(t, err, fmt.Sprintf("multipool: %s=%q: must be ", tc.key, tc.value))
				require.ErrorContains(t, err, tc.bound)
				var parse *pgconn.ParseConfigError
				require.ErrorAs(t, err, &parse)
				require.Empty(t, parse.ConnString)
			}
		})
		require.NotNil(t, dsn.PoolKeys[tc.key])
	}
	_, err := ParseConfig("host=db1 user=app password=Kq7wZx93Vt pool_max_conns=Kq7wZx93Vt")
	require.ErrorContains(t, err, "multipool: pool_max_conns: must be a whole number")
}

// What pgxpool takes we take, and what it refuses we can explain.
func TestThePgxpoolKeysAreThoseOfPgxpool(t *testing.T) {
	withoutEnvironment(t)
	for key := range dsn.PoolKeys {
		for _, value := range []string{"0", "-1", "1", "7", "2147483647", "2147483648", "1s", "-1s", "0s", "", "x"} {
			connString := "postgres://app@db1/app?" + key + "=" + value
			pool, err := pgxpool.ParseConfig(connString)
			require.Equal(t, err == nil, dsn.CheckPoolKeys(connString) == nil, "%s=%q: %v", key, value, err)
			if err == nil {
				require.NotContains(t, pool.ConnConfig.RuntimeParams, key)
			}
		}
	}
}

func TestAnUnknownKeyOfOursIsAnErrorThatListsTheKnown(t *testing.T) {
	withoutEnvironment(t)
	_, err := ParseConfig(threeHosts + "&multipool_timeout=1s")
	require.ErrorContains(t, err, "multipool_timeout")
	for _, s := range settings {
		if s.key != loadBalanceHosts {
			require.ErrorContains(t, err, s.key)
		}
	}
}

func TestParseOptionsGivesTheKeysAsFields(t *testing.T) {
	o, err := ParseOptions("postgres://u@a,b/d?multipool_wait=0&multipool_zone=z&multipool_target=any&application_name=n")
	require.NoError(t, err)
	require.Negative(t, o.Wait)
	require.Equal(t, "z", o.Zone)
	require.Equal(t, TargetAny, o.Route.Target)
	require.Equal(t, map[string]string{"application_name": "n"}, o.Config.ConnConfig.RuntimeParams)
	require.NotNil(t, o.Config.ShouldPing, "as ParseConfig has it for several hosts")
	_, err = ParseOptions("postgres://u@a,b/d?multipool_wait=soon")
	require.EqualError(t, err, `multipool: multipool_wait="soon": `+dsn.ErrNoDuration.Error())
}

func TestFieldsOfOptionsHaveBoundsToo(t *testing.T) {
	withoutEnvironment(t)
	pool, err := ParseConfig(threeHosts)
	require.NoError(t, err)
	for _, tc := range []struct {
		name   string
		config Options
		says   string
	}{
		{"a short interval", Options{Config: pool, CheckInterval: time.Millisecond}, "CheckInterval"},
		{"a mode", Options{Config: pool, Mode: 99}, "Mode is 99"},
		{"a target", Options{Config: pool, Route: Route{Target: 99}}, "Target is 99"},
		{"a retry", Options{Config: pool, Route: Route{Retry: 99}}, "Retry is 99"},
		{"no pool", Options{}, "Options.Config is required"},
		{"a negative interval", Options{Config: pool, CheckInterval: -1}, "CheckInterval (multipool_check_interval) is -1ns: must be at least 10ms"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := Open(context.Background(), tc.config)
			require.ErrorContains(t, err, tc.says)
		})
	}
	require.Panics(t, func() { _, _ = NewWithConfig(context.Background(), &pgxpool.Config{}) }, "as pgxpool does")
}

// pgxpool says of the one that MaxSize must be >= 1, and panics at the other.
func TestFieldsOfTheTemplateHaveBoundsToo(t *testing.T) {
	withoutEnvironment(t)
	for _, tc := range []struct {
		change func(*pgxpool.Config)
		says   string
	}{
		{func(c *pgxpool.Config) { c.MaxConns = 0 }, "multipool: Config.MaxConns (pool_max_conns) is 0: must be at least 1"},
		{func(c *pgxpool.Config) { c.MaxConns = -7 }, "multipool: Config.MaxConns (pool_max_conns) is -7: must be at least 1"},
		{func(c *pgxpool.Config) { c.HealthCheckPeriod = 0 }, "multipool: Config.HealthCheckPeriod (pool_health_check_period) is 0s: must be more than 0"},
		{func(c *pgxpool.Config) { c.HealthCheckPeriod = -1 }, "multipool: Config.HealthCheckPeriod (pool_health_check_period) is -1ns: must be more than 0"},
	} {
		for _, connString := range []string{threeHosts, "postgres://app@127.0.0.1:1/app"} {
			pool, err := ParseConfig(connString)
			require.NoError(t, err)
			tc.change(pool)
			_, err = Open(context.Background(), Options{Config: pool})
			require.EqualError(t, err, tc.says)
			_, err = NewWithConfig(context.Background(), pool)
			require.EqualError(t, err, tc.says)
		}
	}
	_, err := ParseConfig(threeHosts + "&pool_health_check_period=0")
	require.EqualError(t, err, "multipool: Config.HealthCheckPeriod (pool_health_check_period) is 0s: must be more than 0")
}

func TestAFieldWinsOverItsKey(t *testing.T) {
	withoutEnvironment(t)
	pool, err := ParseConfig(threeHosts + "&multipool_wait=1s&multipool_check_interval=2s&multipool_max_waiting=3" +
		"&multipool_target=any&multipool_retry=never&multipool_monitor_conns=true&multipool_balancer=round-robin&multipool_zone=a")
	require.NoError(t, err)
	c, _ := completed(t, Options{
		Balancer: Nearest(), Zone: "b",
		Config: pool, Wait: time.Minute, CheckInterval: time.Hour, MaxWaiting: 4, NoMonitorConns: true,
		Route: Route{Target: TargetPrimary, Retry: RetryReads},
	})
	require.Equal(t, time.Minute, c.Wait)
	require.Equal(t, time.Hour, c.CheckInterval)
	require.Equal(t, 4, c.MaxWaiting)
	require.Equal(t, Nearest(), c.Balancer)
	require.Equal(t, "b", c.Zone)
	require.True(t, c.NoMonitorConns)
	require.Equal(t, Route{Target: TargetPrimary, Retry: RetryReads}, c.Route)
}

func TestZeroFieldsMeanDefaults(t *testing.T) {
	withoutEnvironment(t)
	pool, err := ParseConfig(threeHosts)
	require.NoError(t, err)
	c, _ := completed(t, Options{Config: pool})
	require.Equal(t, 5*time.Second, c.CheckInterval)
	require.Equal(t, 5*time.Second, c.Wait)
	require.Equal(t, 1000, c.MaxWaiting)
	require.NotNil(t, c.Hooks)
	require.Nil(t, c.Balancer)
	require.Empty(t, c.Zone)

	c, _ = completed(t, Options{Config: pool, Wait: Off, MaxWaiting: Off, WriteReserve: Off, ReturnAfter: Off, StallAfter: Off, MaxLag: Lag{Time: Off}})
	require.Zero(t, c.Wait)
	require.Zero(t, c.MaxWaiting)
	require.Zero(t, c.WriteReserve)
	require.Zero(t, c.ReturnAfter)
	require.Negative(t, c.StallAfter)
	require.False(t, c.MaxLag.bounds())
}

func TestOffIsTheOnlyNegativeNumber(t *testing.T) {
	withoutEnvironment(t)
	pool, err := ParseConfig(threeHosts)
	require.NoError(t, err)
	with := func(set func(*Options)) Options {
		o := Options{Config: pool}
		set(&o)
		return o
	}
	for says, o := range map[string]Options{
		"ReturnAfter (multipool_return_after) is -1s":                             with(func(o *Options) { o.ReturnAfter = -time.Second }),
		"Wait (multipool_wait) is -2ns":                                           with(func(o *Options) { o.Wait = -2 }),
		"MaxWaiting (multipool_max_waiting) is -2":                                with(func(o *Options) { o.MaxWaiting = -2 }),
		"StallAfter (multipool_stall_after) is -1m0s":                             with(func(o *Options) { o.StallAfter = -time.Minute }),
		"WriteReserve (multipool_write_reserve) is -0.5":                          with(func(o *Options) { o.WriteReserve = -0.5 }),
		"MaxLag (multipool_max_lag): its Time is -1s":                             with(func(o *Options) { o.MaxLag.Time = -time.Second }),
		"Route.MaxLag: its Time is -3s":                                           with(func(o *Options) { o.Route.MaxLag.Time = -3 * time.Second }),
		"CheckInterval (multipool_check_interval) is -1ns: must be at least 10ms": with(func(o *Options) { o.CheckInterval = Off }),
		"peer a: MaxConns is -1: must not be negative":                            with(func(o *Options) { o.Peers = []Peer{{Name: "a", Host: "a", MaxConns: -1}, {Host: "b"}} }),
		"peer a: Weight is -1: must not be negative (set LastResort":              with(func(o *Options) { o.Peers = []Peer{{Name: "a", Host: "a", Weight: -1}, {Host: "b"}} }),
		`Models["m"].MaxLag: its Time is -2ns`:                                    with(func(o *Options) { o.Models = map[string]Route{"m": {MaxLag: Lag{Time: -2}}} }),
	} {
		_, err := Open(context.Background(), o)
		require.ErrorContains(t, err, says)
	}
	for _, key := range []string{"multipool_wait=-1s", "multipool_return_after=-1ns", "multipool_stall_after=-1s", "multipool_max_waiting=-1", "multipool_write_reserve=-1", "multipool_max_lag=-1s", "multipool_check_interval=-1s"} {
		_, err := ParseConfig(threeHosts + "&" + key)
		require.ErrorContains(t, err, key[:strings.Index(key, "=")])
	}
	p, err := Open(context.Background(), Options{Config: pool})
	require.NoError(t, err)
	t.Cleanup(p.Close)
	_, err = p.Explain(WithRoute(context.Background(), Route{MaxLag: Lag{Time: -time.Second}}), "select 1")
	require.ErrorContains(t, err, "Route.MaxLag: its Time is -1s")
}

// The list of keys in the documentation of ParseConfig is the one in the code, in its order, and no default differs.
func TestTheDocumentationOfParseConfigListsTheKeys(t *testing.T) {
	t.Parallel()
	file, err := parser.ParseFile(gotoken.NewFileSet(), "options.go", nil, parser.ParseComments)
	require.NoError(t, err)
	var doc string
	for _, d := range file.Decls {
		if f, ok := d.(*ast.FuncDecl); ok && f.Name.Name == "ParseConfig" {
			doc = f.Doc.Text()
		}
	}
	lines := map[string]string{}
	var documented []string
	for _, m := range regexp.MustCompile(`(?m)^\s*- (multipool_\w+|load_balance_hosts): (.*)$`).FindAllStringSubmatch(doc, -1) {
		documented = append(documented, m[1])
		lines[m[1]] = m[2]
	}
	require.Equal(t, ourKeys(), documented)
	for key, names := range map[string][]string{
		"multipool_mode": modeNames[:], "multipool_target": targetNames[:], "multipool_retry": retryNames[:],
		"multipool_balancer": balancerNames[:],
	} {
		require.Contains(t, lines[key], strings.Join(names, ", "), key)
		require.Contains(t, lines[key], "default "+names[0], key)
	}
	require.Contains(t, lines["multipool_check_interval"], "default "+defaultCheckInterval.String())
	require.Contains(t, lines["multipool_check_interval"], "at least "+minCheckInterval.String())
	require.Contains(t, lines["multipool_wait"], "default "+defaultWait.String())
	require.Contains(t, lines["multipool_max_waiting"], fmt.Sprintf("default %d", defaultMaxWaiting))
	for _, s := range settings {
		c := Options{Config: plainPool(t)}
		none := s.set(&c, "0s") == nil || s.set(&c, "0") == nil
		switch s.key {
		case "multipool_name", "multipool_zone", "multipool_monitor_conns", "multipool_proxy", "multipool_max_lag": // where 0 is a name, false, and the default
			continue
		}
		require.Equal(t, none, strings.Contains(lines[s.key], "; 0 means "), s.key)
	}
}

func TestHostsBecomePeers(t *testing.T) {
	home := withoutEnvironment(t)
	for _, tc := range []struct {
		name, connString string
		want             []string
	}{
		{"one", "postgres://app@db1/app", []string{"db1:5432"}},
		{"three with ports of their own", "postgres://app:secret@db1,db2:5433,db3/app", []string{"db1:5432", "db2:5433", "db3:5432"}},
		{"one port for all", "host=db1,db2 port=6000 user=app", []string{"db1:6000", "db2:6000"}},
		{"a port each", "host=db1,db2 port=6000,6001 user=app", []string{"db1:6000", "db2:6001"}},
		{"an empty port", "host=db1,db2 port=6000, user=app", []string{"db1:6000", "db2:5432"}},
		{"one host, two ports", "postgres://app@db1:6000,db1:6001/app", []string{"db1:6000", "db1:6001"}},
		{"in a query", "postgres:///app?host=db1,db2&port=6000,6001&user=app", []string{"db1:6000", "db2:6001"}},
		{"the longer scheme", "postgresql://app@db1,db2/app", []string{"db1:5432", "db2:5432"}},
		{"addresses", "postgres://app@10.0.0.1,[::1]:5433/app", []string{"10.0.0.1:5432", "[::1]:5433"}},
		{"sockets", "host=/var/run/a,/var/run/b user=app", []string{"/var/run/a:5432", "/var/run/b:5432"}},
		{"a socket and a host", "postgres:///app?host=%2Fvar%2Frun%2Fa,db1&user=app", []string{"/var/run/a:5432", "db1:5432"}},
	} {
		for _, tls := range []struct {
			mode      string
			fallbacks int
		}{{"", 1}, {"prefer", 1}, {"allow", 1}, {"disable", 0}, {"require", 0}, {"verify-ca", 0}, {"verify-full", 0}} {
			t.Run(tc.name+" "+tls.mode, func(t *testing.T) {
				connString := tc.connString
				if tls.mode != "" {
					t.Setenv("PGSSLMODE", tls.mode)
				}
				_, peers := parsed(t, connString)
				require.Equal(t, tc.want, peerNames(peers))
				for _, p := range peers {
					cc := p.pool.ConnConfig
					require.Equal(t, p.Name, peerName(cc.Host, cc.Port))
					require.Equal(t, p.Host, cc.Host)
					require.Equal(t, p.Port, cc.Port)
					want := tls.fallbacks
					if strings.HasPrefix(p.Host, "/") {
						want = 0
					}
					require.Len(t, cc.Fallbacks, want)
					for _, f := range cc.Fallbacks {
						require.Equal(t, cc.Host, f.Host)
						require.Equal(t, cc.Port, f.Port)
						require.NotEqual(t, cc.TLSConfig == nil, f.TLSConfig == nil)
					}
					for _, c := range append(cc.Fallbacks, &pgconn.FallbackConfig{TLSConfig: cc.TLSConfig}) {
						if c.TLSConfig != nil && (tls.mode == "verify-full" || !strings.ContainsAny(p.Host, ":") && p.Host[0] > '9') {
							require.Equal(t, p.Host, c.TLSConfig.ServerName, "each peer has its own name")
						}
					}
				}
			})
		}
	}
	require.DirExists(t, home)
}

func TestAPeerThatIsGivenTwiceIsAnError(t *testing.T) {
	withoutEnvironment(t)
	for _, mode := range []string{"disable", "allow", "prefer", "require", "verify-full"} {
		t.Run(mode, func(t *testing.T) {
			config, err := ParseConfig("postgres://app@db1,db2,db1/app?sslmode=" + mode)
			require.ErrorContains(t, err, "peer db1:5432 is given twice")
			require.Nil(t, config, "an error comes without a configuration")
		})
	}
	pool, err := ParseConfig("postgres://app@db1/app")
	require.NoError(t, err)
	_, err = Open(context.Background(), Options{Config: pool, Peers: []Peer{{Name: "x", Host: "db1"}, {Name: "x", Host: "db2"}}})
	require.ErrorContains(t, err, "peer x is given twice")
}

func TestTargetSessionAttrsBecomeTheRouteOfSeveralPeers(t *testing.T) {
	withoutEnvironment(t)
	for _, tc := range []struct {
		attrs string
		want  Target
	}{
		{"", TargetAuto}, {"any", TargetAny}, {"read-write", TargetPrimary}, {"primary", TargetPrimary},
		{"read-only", TargetReplica}, {"standby", TargetReplica}, {"prefer-standby", TargetAuto},
	} {
		t.Run("attrs "+tc.attrs, func(t *testing.T) {
			url, words := threeHosts, "host=db1,db2,db3 user=app sslmode=disable"
			if tc.attrs != "" {
				url += "&target_session_attrs=" + tc.attrs
				words += " target_session_attrs=" + tc.attrs
			}
			for _, connString := range []string{url, words} {
				complete, peers := parsed(t, connString)
				require.Equal(t, tc.want, complete.Route.Target)
				require.Len(t, peers, 3)
				for _, p := range peers {
					require.Nil(t, p.pool.ConnConfig.ValidateConnect, "a peer must not refuse its own server")
				}
			}
			if tc.attrs != "" {
				t.Setenv("PGTARGETSESSIONATTRS", tc.attrs)
				complete, _ := parsed(t, threeHosts)
				require.Equal(t, tc.want, complete.Route.Target, "from the environment")
			}

			// One host is pgxpool: the check stays.
			one := "postgres://app@db1/app?sslmode=disable"
			if tc.attrs != "" {
				one += "&target_session_attrs=" + tc.attrs
			}
			complete, peers := parsed(t, one)
			require.Equal(t, TargetAuto, complete.Route.Target)
			require.Equal(t, tc.attrs == "" || tc.attrs == "any", peers[0].pool.ConnConfig.ValidateConnect == nil)
		})
	}
}

func TestTargetSessionAttrsYieldToARouteAndToTheProgramsOwnCheck(t *testing.T) {
	withoutEnvironment(t)
	pool, err := ParseConfig(threeHosts + "&target_session_attrs=read-write")
	require.NoError(t, err)
	complete, _ := completed(t, Options{Config: pool, Route: Route{Target: TargetAny}})
	require.Equal(t, TargetAny, complete.Route.Target)

	pool, err = ParseConfig(threeHosts)
	require.NoError(t, err)
	pool.ConnConfig.ValidateConnect = func(context.Context, *pgconn.PgConn) error { return nil }
	complete, peers := completed(t, Options{Config: pool})
	require.Equal(t, TargetAuto, complete.Route.Target)
	for _, p := range peers {
		require.NotNil(t, p.pool.ConnConfig.ValidateConnect)
	}
}

func TestKeysMayStandInTheEnvironment(t *testing.T) {
	withoutEnvironment(t)
	values := map[string]string{}
	for _, s := range settings {
		values[s.key] = map[string]string{
			"multipool_mode": "ordered", "multipool_proxy": "true", "multipool_discover": "dns", "multipool_target": "any",
			"multipool_retry": "reads", "multipool_balancer": "nearest", "multipool_max_lag": "3s", "multipool_max_waiting": "3",
			"multipool_write_reserve": "0.5", "multipool_monitor_conns": "false", loadBalanceHosts: "disable",
		}[s.key]
		if values[s.key] == "" {
			values[s.key] = "3s"
		}
	}
	// What the variable does is what the key does, for every way in.
	plain := func() Options {
		c, err := pgxpool.ParseConfig(threeHosts)
		require.NoError(t, err)
		return Options{Config: c}
	}
	for key, value := range values {
		t.Run(key, func(t *testing.T) {
			inString, _ := parsed(t, threeHosts+"&"+key+"="+value)
			options, err := ParseOptions(threeHosts + "&" + key + "=" + value)
			require.NoError(t, err)
			without, _ := parsed(t, threeHosts)
			variable := variableOf(key)
			t.Setenv(variable, value)
			config, err := ParseConfig(threeHosts)
			require.NoError(t, err)
			require.NotContains(t, config.ConnConfig.RuntimeParams, key, "pgx would send it")
			byVariable, err := ParseOptions(threeHosts)
			require.NoError(t, err)
			byPlain, _ := completed(t, plain())
			byNew, _ := completed(t, Options{Config: config})
			for _, o := range []*Options{&inString, &options, &without, &byVariable, &byPlain, &byNew} {
				o.Config, o.Hooks = nil, nil
				if o.Discover != nil {
					o.Discover = nil
					o.Zone = "discovered"
				}
			}
			require.Equal(t, inString, byNew)
			require.Equal(t, inString, byPlain)
			require.Equal(t, options, byVariable)
			require.NotEqual(t, without, byNew)

			_, err = ParseConfig(threeHosts + "&" + key + "=" + value)
			require.NoError(t, err)
			t.Setenv(variable, "")
			empty, _ := completed(t, plain())
			empty.Config, empty.Hooks = nil, nil
			require.Equal(t, without, empty)
			if key != "multipool_zone" && key != "multipool_name" { // of which any text is one
				t.Setenv(variable, "nonsense")
				_, err = ParseConfig(threeHosts)
				require.ErrorContains(t, err, "multipool: "+variable+`="nonsense": must be `)
				_, err = NewWithConfig(context.Background(), plain().Config)
				require.ErrorContains(t, err, "multipool: "+variable+`="nonsense": must be `)
			}
		})
	}
}

func TestTheStringAndTheFieldsWinOverTheEnvironment(t *testing.T) {
	withoutEnvironment(t)
	t.Setenv("MULTIPOOL_WAIT", "3s")
	t.Setenv("MULTIPOOL_MODE", "equivalent")
	t.Setenv("MULTIPOOL_TARGET", "any")
	t.Setenv("MULTIPOOL_WIAT", "near misses of variables are no errors: they may be anybody's")
	t.Setenv("MULTIPOOL_REQUIRE_POSTGRES", "1")
	o, err := ParseOptions(threeHosts + "&multipool_mode=replicated&multipool_wait=4s")
	require.NoError(t, err)
	require.Equal(t, 4*time.Second, o.Wait)
	complete, _ := completed(t, o)
	require.Equal(t, ModeReplicated, complete.Mode, "also where the string says the default")

	config, err := ParseConfig(threeHosts + "&load_balance_hosts=disable&target_session_attrs=read-write")
	require.NoError(t, err)
	complete, _ = completed(t, Options{Config: config, Wait: time.Minute})
	require.Equal(t, time.Minute, complete.Wait)
	require.Equal(t, TargetPrimary, complete.Route.Target)
	require.Equal(t, ModeReplicated, complete.Mode)

	t.Setenv("PGTARGETSESSIONATTRS", "standby")
	_, err = ParseConfig(threeHosts)
	require.EqualError(t, err, "multipool: PGTARGETSESSIONATTRS=standby and MULTIPOOL_TARGET=any contradict each other")
	t.Setenv("PGTARGETSESSIONATTRS", "")
	t.Setenv("PGLOADBALANCEHOSTS", "disable")
	_, err = ParseConfig(threeHosts)
	require.EqualError(t, err, "multipool: PGLOADBALANCEHOSTS=disable and MULTIPOOL_MODE=equivalent contradict each other")
}

func TestKeysThatContradictEachOtherAreAnError(t *testing.T) {
	withoutEnvironment(t)
	t.Setenv("PGTARGETSESSIONATTRS", "read-write") // which yields to the string
	for query, says := range map[string]string{
		"target_session_attrs=read-write&multipool_target=primary":            "",
		"target_session_attrs=any&multipool_target=replica":                   "",
		"target_session_attrs=prefer-standby&multipool_target=prefer-replica": "",
		"multipool_target=replica":                                            "",
		"target_session_attrs=read-write&multipool_target=replica":            "multipool: target_session_attrs=read-write and multipool_target=replica contradict each other",
		"target_session_attrs=primary&multipool_target=any":                   "multipool: target_session_attrs=primary and multipool_target=any contradict each other",
		"target_session_attrs=standby&multipool_target=auto":                  "multipool: target_session_attrs=standby and multipool_target=auto contradict each other",
		"target_session_attrs=prefer-standby&multipool_target=primary":        "multipool: target_session_attrs=prefer-standby and multipool_target=primary contradict each other",

		"load_balance_hosts=disable&multipool_mode=ordered":         "",
		"load_balance_hosts=random&multipool_mode=equivalent":       "",
		"load_balance_hosts=random&multipool_balancer=nearest":      "",
		"load_balance_hosts=disable&multipool_mode=replicated":      "multipool: load_balance_hosts=disable and multipool_mode=replicated contradict each other",
		"load_balance_hosts=random&multipool_mode=ordered":          "multipool: load_balance_hosts=random and multipool_mode=ordered contradict each other",
		"load_balance_hosts=disable&multipool_balancer=round-robin": "multipool: load_balance_hosts=disable and multipool_balancer=round-robin contradict each other",
	} {
		for _, hosts := range []string{threeHosts + "&", "postgres://app@db1/app?"} {
			_, err := ParseConfig(hosts + query)
			if says == "" {
				require.NoError(t, err, query)
				continue
			}
			require.EqualError(t, err, says)
			plain, err := pgxpool.ParseConfig(hosts + query)
			require.NoError(t, err)
			_, err = NewWithConfig(context.Background(), plain)
			require.EqualError(t, err, says)
		}
	}
}

// Which of the servers libpq would choose, in the order of the list, take the calls here.
func TestLoadBalanceHostsOfLibpq(t *testing.T) {
	withoutEnvironment(t)
	for query, want := range map[string]struct {
		mode     Mode
		target   Target
		balancer Balancer
	}{
		"load_balance_hosts=random":                                      {ModeReplicated, TargetAuto, nil},
		"load_balance_hosts=random&target_session_attrs=standby":         {ModeReplicated, TargetReplica, nil},
		"load_balance_hosts=disable":                                     {ModeOrdered, TargetAuto, nil},
		"load_balance_hosts=disable&target_session_attrs=any":            {ModeOrdered, TargetAny, nil},
		"load_balance_hosts=disable&multipool_target=any":                {ModeOrdered, TargetAny, nil},
		"load_balance_hosts=disable&target_session_attrs=read-write":     {ModeReplicated, TargetPrimary, inOrder},
		"load_balance_hosts=disable&target_session_attrs=standby":        {ModeReplicated, TargetReplica, inOrder},
		"load_balance_hosts=disable&target_session_attrs=prefer-standby": {ModeReplicated, TargetAuto, inOrder},
		"load_balance_hosts=disable&multipool_target=replica":            {ModeReplicated, TargetReplica, inOrder},
	} {
		complete, _ := parsed(t, threeHosts+"&"+query)
		require.Equal(t, want.mode, complete.Mode, query)
		require.Equal(t, want.target, complete.Route.Target, query)
		require.Equal(t, want.balancer, complete.Balancer, query)
	}
	complete, _ := completed(t, Options{Mode: ModeEquivalent, Config: func() *pgxpool.Config {
		c, err := ParseConfig(threeHosts + "&load_balance_hosts=disable")
		require.NoError(t, err)
		return c
	}()})
	require.Equal(t, ModeEquivalent, complete.Mode, "a field wins over the key")
}

func TestReadsInTheOrderOfTheList(t *testing.T) {
	bubble(t, 3, func(c *Options) {
		c.Config.ConnConfig.RuntimeParams[loadBalanceHosts] = "disable"
		c.Route.Target = TargetPreferReplica
	}, func(ctx context.Context, x *fakes) {
		settled()
		for range 10 {
			require.Equal(t, "replica1:5432", x.read(ctx))
		}
		x.replicas[0].Die()
		for range 10 {
			require.Equal(t, "replica2:5432", x.read(ctx))
		}
	})
}

func TestTheKeyForProxiesMarksTheHosts(t *testing.T) {
	withoutEnvironment(t)
	_, peers := parsed(t, threeHosts+"&multipool_proxy=true")
	for _, p := range peers {
		require.True(t, p.Proxy)
	}
	config, err := ParseConfig(threeHosts + "&multipool_proxy=true")
	require.NoError(t, err)
	_, peers = completed(t, Options{Config: config, Peers: []Peer{{Host: "a", Proxy: true}, {Host: "b"}}})
	require.True(t, peers[0].Proxy)
	require.False(t, peers[1].Proxy, "a peer that is listed says so itself")
	p := openPool(t, Options{}, "postgres://app@127.0.0.1:1,127.0.0.1:2/app?multipool_proxy=true")
	for _, q := range p.peers() {
		require.True(t, q.proxy)
	}
}

func TestParseConfigSetsDefaultsForSeveralHostsOnly(t *testing.T) {
	withoutEnvironment(t)
	for _, tc := range []struct {
		name, connString string
		connect, ping    time.Duration
	}{
		{"one host", "postgres://app@db1/app", 0, 0},
		{"one host under sslmode=prefer", "postgres://app@db1/app?sslmode=prefer", 0, 0},
		{"several", threeHosts, 5 * time.Second, time.Second},
		{"several, in words", "host=db1,db2 user=app", 5 * time.Second, time.Second},
		{"own values", threeHosts + "&connect_timeout=7&pool_ping_timeout=3s", 7 * time.Second, 3 * time.Second},
		{"zeros", threeHosts + "&connect_timeout=0&pool_ping_timeout=0", 0, 0},
		{"zeros in words", "host=db1,db2 user=app connect_timeout=0 pool_ping_timeout='0'", 0, 0},
		{"a zero behind a semicolon", threeHosts + "&application_name=a;b&connect_timeout=0&pool_ping_timeout=0", 0, 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			config, err := ParseConfig(tc.connString)
			require.NoError(t, err)
			require.Equal(t, tc.connect, config.ConnConfig.ConnectTimeout)
			require.Equal(t, tc.ping, config.PingTimeout)
		})
	}
	for value, want := range map[string]time.Duration{"9": 9 * time.Second, "0": 0, "": 5 * time.Second} {
		t.Run("environment "+value, func(t *testing.T) {
			t.Setenv("PGCONNECT_TIMEOUT", value)
			config, err := ParseConfig(threeHosts)
			require.NoError(t, err)
			require.Equal(t, want, config.ConnConfig.ConnectTimeout)
		})
	}
	t.Run("a service file", func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "services")
		require.NoError(t, os.WriteFile(file, []byte("[mine]\nhost=db1,db2\nconnect_timeout=7\npool_ping_timeout=3s\n"), 0o600))
		config, err := ParseConfig("service=mine servicefile=" + file)
		require.NoError(t, err)
		require.Len(t, config.ConnConfig.Fallbacks, 3, "two hosts, two ways each")
		require.Equal(t, 7*time.Second, config.ConnConfig.ConnectTimeout)
		require.Equal(t, 3*time.Second, config.PingTimeout)
	})
}

func TestTheConstructorSpreadsLifetimesOfSeveralPeers(t *testing.T) {
	withoutEnvironment(t)
	jitter := func(c *pgxpool.Config) time.Duration {
		_, peers := completed(t, Options{Config: c})
		return peers[len(peers)-1].pool.MaxConnLifetimeJitter
	}
	several, err := ParseConfig(threeHosts)
	require.NoError(t, err)
	require.Zero(t, several.MaxConnLifetimeJitter)
	several.MaxConnLifetime = 20 * time.Minute
	require.Equal(t, 2*time.Minute, jitter(several))
	several.MaxConnLifetimeJitter = time.Second
	require.Equal(t, time.Second, jitter(several))
	several.MaxConnLifetimeJitter = -1
	require.Zero(t, jitter(several))
	one, err := ParseConfig("postgres://app@db1/app")
	require.NoError(t, err)
	require.Zero(t, jitter(one))
}

func TestEachPeerHasItsOwnPasswordFromThePassfile(t *testing.T) {
	home := withoutEnvironment(t)
	passfile := filepath.Join(home, "passwords")
	require.NoError(t, os.WriteFile(passfile, []byte("db1:*:*:app:one\ndb2:5433:*:app:two\ndb3:*:*:app:three\n"), 0o600))
	t.Setenv("PGPASSFILE", passfile)
	for _, tc := range []struct {
		name, connString string
		want             string
	}{
		{"a URI", "postgres://app@db1,db2:5433,db3/app?sslmode=disable", "one two three"},
		{"a URI without a query", "postgres://app@db1,db2:5433,db3/app", "one two three"},
		{"a URI that ends in a separator", "postgres://app@db1,db2:5433,db3/app?sslmode=disable&", "one two three"},
		{"words", "host=db1,db2,db3 port=5432,5433,5432 user=app", "one two three"},
		{"the file has not the first", "postgres://app@db0,db2:5433,db3/app", " two three"},
		{"a password in the string", "postgres://app:own@db1,db2:5433,db3/app", "own own own"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, peers := parsed(t, tc.connString)
			var got []string
			for _, p := range peers {
				got = append(got, p.pool.ConnConfig.Password)
			}
			require.Equal(t, tc.want, strings.Join(got, " "))
		})
	}
	t.Run("a password that the program set", func(t *testing.T) {
		config, err := ParseConfig("postgres://app@db1,db2:5433/app")
		require.NoError(t, err)
		config.ConnConfig.Password = "rotated"
		_, peers := completed(t, Options{Config: config})
		require.Equal(t, "rotated", peers[0].pool.ConnConfig.Password)
		require.Equal(t, "rotated", peers[1].pool.ConnConfig.Password)
	})
	t.Run("peers that are listed", func(t *testing.T) {
		config, err := ParseConfig("postgres://app@db1/app")
		require.NoError(t, err)
		_, peers := completed(t, Options{Config: config, Peers: []Peer{{Host: "db1"}, {Host: "db3"}, {ConnString: "postgres://app@db2:5433/app"}}})
		require.Equal(t, "one", peers[0].pool.ConnConfig.Password)
		require.Equal(t, "two", peers[2].pool.ConnConfig.Password)
		require.Equal(t, "three", peers[1].pool.ConnConfig.Password)
	})
}

func TestAHostThatTheProgramSetsIsThePeer(t *testing.T) {
	withoutEnvironment(t)
	config, err := ParseConfig("postgres://app@db1/app?sslmode=disable")
	require.NoError(t, err)
	config.ConnConfig.Host, config.ConnConfig.Port = "elsewhere", 6000
	_, peers := completed(t, Options{Config: config})
	require.Equal(t, []string{"elsewhere:6000"}, peerNames(peers))
}

func TestListedPeersReplaceTheHosts(t *testing.T) {
	withoutEnvironment(t)
	template := func(query string) *pgxpool.Config {
		pool, err := ParseConfig("postgres://app:secret@db1:5432,db9/app?pool_max_conns=10&" + query)
		require.NoError(t, err)
		return pool
	}
	t.Run("hosts and ports", func(t *testing.T) {
		_, peers := completed(t, Options{Config: template("sslmode=disable"), Peers: []Peer{
			{Host: "a"}, {Host: "b", Port: 6000}, {Name: "third", Host: "c", MaxConns: 3, Role: RoleReplica, Proxy: true, Weight: 1000, Zone: "z"},
		}})
		require.Equal(t, []string{"a:5432", "b:6000", "third"}, peerNames(peers))
		require.EqualValues(t, 10, peers[0].pool.MaxConns)
		require.EqualValues(t, 3, peers[2].pool.MaxConns)
		require.Equal(t, RoleReplica, peers[2].Role)
		require.True(t, peers[2].Proxy)
		require.Equal(t, 1000.0, peers[2].Weight)
		require.Equal(t, "z", peers[2].Zone)
		for _, p := range peers {
			require.Equal(t, "app", p.pool.ConnConfig.User)
			require.Equal(t, "secret", p.pool.ConnConfig.Password)
		}
	})
	t.Run("a connection string", func(t *testing.T) {
		_, peers := completed(t, Options{Config: template("sslmode=disable"), Peers: []Peer{
			{ConnString: "postgres://other:word@a:6000/theirs?sslmode=verify-full"},
			{ConnString: "host=b user=app", Host: "c", Port: 6001},
		}})
		require.Equal(t, []string{"a:6000", "c:6001"}, peerNames(peers))
		cc := peers[0].pool.ConnConfig
		require.Equal(t, []string{"other", "word", "theirs", "a"}, []string{cc.User, cc.Password, cc.Database, cc.TLSConfig.ServerName})
		require.EqualValues(t, 10, peers[0].pool.MaxConns)
	})
	t.Run("a certificate is checked for the peer's name", func(t *testing.T) {
		_, peers := completed(t, Options{Config: template("sslmode=verify-full"), Peers: []Peer{{Host: "a"}, {Host: "b"}}})
		require.Equal(t, "a", peers[0].pool.ConnConfig.TLSConfig.ServerName)
		require.Equal(t, "b", peers[1].pool.ConnConfig.TLSConfig.ServerName)
	})
	t.Run("a way of TLS with a fallback stays one with a fallback", func(t *testing.T) {
		for _, mode := range []string{"prefer", "allow"} {
			for _, p := range []Peer{{Host: "a"}, {Host: "a", Port: 6000}} {
				_, peers := completed(t, Options{Config: template("sslmode=" + mode), Peers: []Peer{p, {Host: "b"}}})
				cc := peers[0].pool.ConnConfig
				require.Len(t, cc.Fallbacks, 1, "%s, port %d", mode, p.Port)
				require.Equal(t, cc.Port, cc.Fallbacks[0].Port)
				require.Equal(t, "a", cc.Fallbacks[0].Host)
			}
		}
	})
	t.Run("a port beside a connection string", func(t *testing.T) {
		_, peers := completed(t, Options{Config: template("sslmode=disable"), Peers: []Peer{{ConnString: "postgres://a/app", Port: 6000}}})
		require.Equal(t, []string{"a:6000"}, peerNames(peers))
	})
	for _, tc := range []struct {
		name string
		peer Peer
		says []string
	}{
		{"neither host nor string", Peer{Name: "x"}, []string{"peer x", "neither Host nor ConnString"}},
		{"... nor name", Peer{}, []string{"peer #2"}},
		{"a string of several hosts", Peer{Name: "x", ConnString: "postgres://a,b/app"}, []string{"peer x", "2 hosts"}},
		{"a bad string", Peer{Name: "x", ConnString: "postgres://a:port/app"}, []string{"peer x", "invalid port"}},
		{"a role", Peer{Name: "x", Host: "a", Role: 99}, []string{"peer x", "Role is 99"}},
		{"a weight that is too high", Peer{Name: "x", Host: "a", Weight: 1000.5}, []string{"peer x", "Weight is 1000.5", "at most 1000"}},
		{"an infinite weight", Peer{Name: "x", Host: "a", Weight: math.Inf(1)}, []string{"peer x", "Weight is +Inf", "finite"}},
		{"... below zero", Peer{Name: "x", Host: "a", Weight: math.Inf(-1)}, []string{"peer x", "Weight is -Inf", "negative"}},
		{"a weight that is no number", Peer{Host: "a", Weight: math.NaN()}, []string{"peer #2", "Weight is NaN", "finite"}},
		{"the same again", Peer{Host: "first"}, []string{"peer first:5432 is given twice"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, _, err := Options{Config: template("sslmode=disable"), Peers: []Peer{{Host: "first"}, tc.peer}}.complete()
			for _, part := range tc.says {
				require.ErrorContains(t, err, part)
			}
		})
	}
}

// tlsOf is what a configuration says of TLS, way by way.
func tlsOf(cc *pgconn.Config) (ways []string) {
	for _, w := range waysOf(cc) {
		way := fmt.Sprintf("%s without", peerName(w.Host, w.Port))
		if c := w.TLSConfig; c != nil {
			name := c.ServerName
			if c.InsecureSkipVerify && net.ParseIP(name) != nil {
				name = "" // it is neither checked nor sent
			}
			way = fmt.Sprintf("%s as %q, insecure %v, chain %v", peerName(w.Host, w.Port), name, c.InsecureSkipVerify, c.VerifyPeerCertificate != nil)
		}
		ways = append(ways, way)
	}
	return ways
}

// pgx has no TLS on a socket, whatever the string says: a peer that is none must not take that over.
func TestAPeerBesideATemplateBySocketHasTheTLSOfTheConnectionString(t *testing.T) {
	withoutEnvironment(t)
	parse := func(t *testing.T, connString string) *pgxpool.Config {
		t.Helper()
		pool, err := ParseConfig(connString)
		require.NoError(t, err)
		return pool
	}
	for _, mode := range []string{"disable", "allow", "prefer", "require", "verify-ca", "verify-full"} {
		as := func(t *testing.T, host string, port int) []string {
			t.Helper()
			return tlsOf(&parse(t, fmt.Sprintf("host=%s port=%d user=app sslmode=%s", host, port, mode)).ConnConfig.Config)
		}
		requirePeers := func(t *testing.T, peers []peerConfig) {
			t.Helper()
			require.Equal(t, as(t, "db1", 5432), tlsOf(&peers[0].pool.ConnConfig.Config))
			require.Equal(t, as(t, "::1", 6000), tlsOf(&peers[1].pool.ConnConfig.Config))
			require.Equal(t, []string{"/var/run/a:5432 without"}, tlsOf(&peers[2].pool.ConnConfig.Config))
		}
		listed := []Peer{{Host: "db1"}, {Host: "::1", Port: 6000}, {Host: "/var/run/a"}}
		for _, template := range []string{
			"host=/var/run/postgresql user=app sslmode=" + mode,
			"host=/var/run/postgresql,/var/run/a user=app sslmode=" + mode,
			"host=/var/run/postgresql,db9 port=5432,7000 user=app sslmode=" + mode,
			"host=db9,/var/run/postgresql user=app sslmode=" + mode,
			"host=db9 user=app sslmode=" + mode,
			"postgres://app@%2Fvar%2Frun%2Fpostgresql/app?sslmode=" + mode,
			"postgres:///app?user=app&host=/var/run/postgresql&sslmode=" + mode + "&",
		} {
			t.Run(template, func(t *testing.T) {
				_, peers := completed(t, Options{Config: parse(t, template), Peers: listed})
				requirePeers(t, peers)
			})
		}
		t.Run("neither host nor mode in the string "+mode, func(t *testing.T) {
			t.Setenv("PGHOST", "/var/run/postgresql")
			t.Setenv("PGSSLMODE", mode)
			_, peers := completed(t, Options{Config: parse(t, "user=app"), Peers: listed})
			requirePeers(t, peers)
		})
		t.Run("a string of its own "+mode, func(t *testing.T) {
			own := "host=/var/run/postgresql user=app sslmode=" + mode
			_, peers := completed(t, Options{Config: parse(t, "host=db9 user=app sslmode=disable"), Peers: []Peer{
				{ConnString: own, Host: "db1"}, {ConnString: own, Host: "::1", Port: 6000}, {ConnString: own, Host: "/var/run/a"},
			}})
			requirePeers(t, peers)
		})
		t.Run("added later "+mode, func(t *testing.T) {
			p := openPool(t, Options{}, "host=/nowhere/a,/nowhere/b user=app sslmode="+mode)
			require.NoError(t, p.AddPeer(Peer{Host: "127.0.0.1", Port: 1}))
			require.Equal(t, as(t, "127.0.0.1", 1), tlsOf(&p.peers()[2].config.ConnConfig.Config))
		})
	}
	t.Run("a certificate's own name", func(t *testing.T) {
		_, peers := completed(t, Options{Config: parse(t, "host=/var/run/a user=app sslmode=verify-full"), Peers: []Peer{{Host: "10.0.0.1", ServerName: "db1"}}})
		require.Equal(t, []string{`10.0.0.1:5432 as "db1", insecure false, chain false`}, tlsOf(&peers[0].pool.ConnConfig.Config))
	})
}

func TestTLSThatTheProgramHasSetOnATemplateBySocketIsNotLost(t *testing.T) {
	withoutEnvironment(t)
	with := func(connString string, change func(*pgconn.Config)) error {
		pool, err := ParseConfig(connString)
		require.NoError(t, err)
		change(&pool.ConnConfig.Config)
		_, peers, err := Options{Config: pool, Peers: []Peer{{Host: "db1"}, {Name: "x", Host: "db2"}}}.complete()
		if err != nil {
			return err
		}
		require.Equal(t, []string{`db2:5432 as "pinned", insecure false, chain false`}, tlsOf(&peers[1].pool.ConnConfig.Config))
		return nil
	}
	pinned := &tls.Config{ServerName: "pinned"}
	require.NoError(t, with("host=/var/run/a user=app", func(cc *pgconn.Config) { cc.TLSConfig = pinned }))
	require.NoError(t, with("host=/var/run/a,/var/run/b user=app", func(cc *pgconn.Config) { cc.Fallbacks[0].TLSConfig = pinned }))
	require.NoError(t, with("host=/var/run/a,db9 user=app sslmode=require", func(cc *pgconn.Config) { cc.Fallbacks[0].TLSConfig = pinned }))

	err := with("host=/var/run/a user=app", func(cc *pgconn.Config) { cc.SSLNegotiation = "direct" })
	require.ErrorContains(t, err, `multipool: peer #1: the template's SSLNegotiation is "direct"`)
	require.ErrorContains(t, err, "set sslnegotiation there")
	err = with("host=/var/run/a user=app sslcertmode=disable", func(cc *pgconn.Config) { cc.SSLCertMode = "require" })
	require.ErrorContains(t, err, `the template's SSLCertMode is "require"`)
	require.ErrorContains(t, err, `says "disable"`)
	same := func(*pgconn.Config) {}
	err = with("host=/var/run/a user=app password=Kq7wZx93Vt sslrootcert=/nowhere/ca sslmode=verify-full", same)
	require.ErrorContains(t, err, "peer #1")
	require.ErrorContains(t, err, "CA file")
	requireNoSecret(t, err, "Kq7wZx93Vt", "")
	err = with(`host=/var/run/a user=app password=Kq7wZx93Vt\`, same) // which escapes what is appended
	require.ErrorContains(t, err, "peer #1: what the connection string says of TLS cannot be told for another host")
	requireNoSecret(t, err, "Kq7wZx93Vt", "")
}

func TestAPeersOwnConnectionStringHoldsInAllThatItMaySay(t *testing.T) {
	withoutEnvironment(t)
	one := func(template, own string) *pgconn.Config {
		t.Helper()
		pool, err := ParseConfig(template)
		require.NoError(t, err)
		_, peers := completed(t, Options{Config: pool, Peers: []Peer{{Host: "db1"}, {ConnString: own}}})
		return &peers[1].pool.ConnConfig.Config
	}
	plain := "postgres://app@db1/app?sslmode=require"
	strict := plain + "&channel_binding=require&require_auth=scram-sha-256&krbsrvname=pg&krbspn=pg/db1&sslcertmode=disable&sslnegotiation=direct"

	cc := one(plain, strings.Replace(strict, "db1", "db2", 1))
	require.Equal(t, []string{"db2", "direct", "disable", "require", "scram-sha-256", "pg", "pg/db1"},
		[]string{cc.Host, cc.SSLNegotiation, cc.SSLCertMode, cc.ChannelBinding, cc.RequireAuth, cc.KerberosSrvName, cc.KerberosSpn})
	require.Equal(t, []string{"postgresql"}, cc.TLSConfig.NextProtos)

	cc = one(strict, "host=db2 user=app sslmode=require")
	require.Empty(t, cc.SSLNegotiation, "a part of TLS, which is the peer's own")
	require.Empty(t, cc.TLSConfig.NextProtos)
	require.Equal(t, "allow", cc.SSLCertMode)
	require.Equal(t, []string{"require", "scram-sha-256", "pg", "pg/db1"},
		[]string{cc.ChannelBinding, cc.RequireAuth, cc.KerberosSrvName, cc.KerberosSpn}, "it says nothing else")

	cc = one(strict, "host=db2 user=app channel_binding=prefer require_auth=''")
	require.Equal(t, []string{"prefer", ""}, []string{cc.ChannelBinding, cc.RequireAuth})

	pool, err := ParseConfig(plain)
	require.NoError(t, err)
	pool.ConnConfig.ValidateConnect = func(context.Context, *pgconn.PgConn) error { return nil }
	_, peers := completed(t, Options{Config: pool, Peers: []Peer{{ConnString: "host=db2 user=app"}, {Host: "db1"}}})
	require.NotNil(t, peers[0].pool.ConnConfig.ValidateConnect, "the program's own check is of every server")
}

// What is said in a place where it does not hold would be believed to.
func TestAPeersOwnConnectionStringHasNoKeyThatDoesNotHold(t *testing.T) {
	withoutEnvironment(t)
	const secret = "Kq7wZx93Vt"
	for key, value := range map[string]string{
		"multipool_wait": "1s", "multipool_mode": "nonsense", "multipool_nonsense": "1", "pool_max_conns": "3", "pool_nonsense": "1",
		"application_name": "a", "search_path": "a", "connect_timeout": "3", "target_session_attrs": "any", "options": "-c", "fallback": "",
		"statement_cache_capacity": "1", "max_protocol_version": "3.2",
	} {
		for _, connString := range []string{
			"postgres://app:" + secret + "@db2/app?" + key + "=" + value + "&sslmode=require",
			"host=db2 user=app " + key + "='" + value + "' password=" + secret,
			"host=db2 user=app password=" + secret + " " + key + "='" + value + "'",
		} {
			_, _, err := Options{Config: plainPool(t), Peers: []Peer{{Name: "x", ConnString: connString}, {Host: "y"}}}.complete()
			require.ErrorContains(t, err, "peer x: ConnString")
			require.ErrorContains(t, err, "channel_binding", "what may be there")
			requireNoSecret(t, err, secret, connString)
			if strings.HasSuffix(connString, secret) || strings.Contains(connString, "://") || dsn.IsCommonKey(key, ourKeys()) {
				require.ErrorContains(t, err, key+" is not a peer's own")
			}
		}
	}
	for _, connString := range []string{
		"host=db2 password=correct " + secret + "=x", "postgres://db2/app?password=correct&" + secret + "=x",
		"postgres://app:correct@db2?" + secret + "=@db2/app",
	} {
		_, _, err := Options{Config: plainPool(t), Peers: []Peer{{Name: "x", ConnString: connString}, {Host: "y"}}}.complete()
		require.ErrorContains(t, err, "behind the password")
		requireNoSecret(t, err, secret, connString)
	}
}

// A host becomes a part of the peer's name, and that of every log and metric.
func TestAHostThatMayHoldAPasswordIsRefusedAndNotShown(t *testing.T) {
	withoutEnvironment(t)
	const secret = "Kq7wZx93Vt"
	pool, err := ParseConfig(threeHosts)
	require.NoError(t, err)
	p := openPool(t, Options{}, "postgres://app@127.0.0.1:1,127.0.0.1:2/app")
	for _, host := range []string{
		"postgres://app:" + secret + "@db2/app", "app:" + secret + "@db2", "postgres://db2?password=" + secret,
		"host=db2 password=" + secret, "password=" + secret, "db2\t" + secret, "db2/" + secret, "db1,app:" + secret + "@db2",
	} {
		t.Run(strings.ReplaceAll(host, secret, "..."), func(t *testing.T) {
			refused := func(err error, says string) {
				t.Helper()
				require.ErrorContains(t, err, says)
				require.ErrorContains(t, err, "must be a name, an address, or the absolute path")
				requireNoSecret(t, err, secret, host)
			}
			_, err := Open(context.Background(), Options{Config: pool, Peers: []Peer{{Host: "db1"}, {Host: host}}})
			refused(err, "peer #2")
			_, err = Open(context.Background(), Options{Config: pool, Peers: []Peer{{Host: "db1"}, {Name: "second", Host: host}}})
			refused(err, "peer second")
			words := "user=app host='" + host + "'"
			if !strings.Contains(host, ",") {
				_, err = Open(context.Background(), Options{Config: pool, Peers: []Peer{{Host: "db1"}, {Name: "second", ConnString: words}}})
				refused(err, "peer second")
			}
			refused(p.AddPeer(Peer{Host: host}), "peer to be added")
			_, err = ParseConfig(words)
			refused(err, "host #")
			_, err = ParseConfig("user=app sslmode=disable host='db8,db9," + host + "," + host + "'")
			refused(err, "host #")
		})
	}
	for _, host := range []string{"db4", "db-5.example.com.", "under_score", "10.0.0.1", "::1", "fe80::1%eth0", "/var/run/a b@c=d", "bücher.example"} {
		_, peers := completed(t, Options{Config: pool, Peers: []Peer{{Host: "db1"}, {Host: host}}})
		require.Equal(t, peerName(host, 5432), peers[1].Name)
	}
	require.ErrorContains(t, p.AddPeer(Peer{Host: "db1", Role: 99}), "peer db1: Role")
}

func TestTheConfigurationIsCopied(t *testing.T) {
	withoutEnvironment(t)
	given, err := ParseConfig("postgres://app@db1,db2/app?multipool_wait=1s&application_name=mine")
	require.NoError(t, err)
	require.Equal(t, "1s", given.ConnConfig.RuntimeParams["multipool_wait"], "visible until a constructor takes it")
	models := map[string]Route{"m": {Target: TargetPrimary, Peers: []string{"db1:5432"}}}
	route, hooks := Route{Peers: []string{"db1:5432"}}, &Hooks{PeerChanged: func(PeerEvent) {}}
	complete, peers := completed(t, Options{Config: given, Models: models, Route: route, Hooks: hooks})
	require.Equal(t, "1s", given.ConnConfig.RuntimeParams["multipool_wait"], "what came in is not changed")
	given.ConnConfig.RuntimeParams["application_name"] = "changed"
	models["m"].Peers[0], route.Peers[0], hooks.PeerChanged = "changed", "changed", nil
	require.Equal(t, []string{"db1:5432"}, complete.Models["m"].Peers)
	require.Equal(t, []string{"db1:5432"}, complete.Route.Peers)
	require.NotNil(t, complete.Hooks.PeerChanged)
	models["m"] = Route{}
	require.Equal(t, "mine", complete.Config.ConnConfig.RuntimeParams["application_name"])
	require.Equal(t, TargetPrimary, complete.Models["m"].Target)
	peers[0].pool.ConnConfig.RuntimeParams["application_name"] = "first"
	require.Equal(t, "mine", peers[1].pool.ConnConfig.RuntimeParams["application_name"])

	p := &MultiPool{given: given}
	require.Equal(t, given.ConnString(), p.Config().ConnString())
	p.Config().ConnConfig.RuntimeParams["application_name"] = "through the copy"
	require.Equal(t, "changed", p.Config().ConnConfig.RuntimeParams["application_name"])
}

func FuzzLookup(f *testing.F) {
	for _, s := range []string{
		"", threeHosts, "application_name=a", "application_name='a b'", `application_name='it\'s' host=x`,
		`application_name=a\ b`, "application_name = a application_name = b", "application_name= host=x", "application_name=''",
		"user='application_name=x'", "host=x application_name", `options='-c application_name=x'`, "\tapplication_name=\n'a'\vhost=b",
		`application_name=a\`,
		"postgres://h/d?application_name=a", "postgres://h?application_name=a%20b%2Bc", "postgres://h/d?application_name=a&application_name=b",
		"postgres://u:p?application_name=x@h/d", "postgres://u:p@h/d?application%5Fname=a", "postgres://h/d?x=y",
		"postgres://h/d?application_name=a+b", "postgres://h/d?application_name=a;b", "postgres://h/d?application_name=a&x=b;c",
		"postgres://h/d? application_name=a ", "postgresql://[::1]/d?application_name=a", "postgres://h/d?application_name=&",
	} {
		f.Add(s)
	}
	withoutEnvironment(f)
	f.Fuzz(func(t *testing.T, connString string) {
		if strings.Contains(connString, "service") {
			t.Skip() // read from a file
		}
		config, err := pgconn.ParseConfig(connString)
		if err != nil {
			t.Skip()
		}
		want, wantFound := config.RuntimeParams["application_name"]
		got, found := dsn.Lookup(connString, "application_name", "")
		if got != want || found != wantFound {
			t.Fatalf("%q: application_name is %q (%v), Lookup says %q (%v)", connString, want, wantFound, got, found)
		}
	})
}

// secretForms are connection strings, well-formed and not, with a place for a password.
var secretForms = []string{
	"postgres://app:%s@db1,db2/app?multipool_mode=x",
	"postgres://app:%s@db1,db2/app?multipool_nonsense=x",
	"postgres://app:%s@db1,db1/app?sslmode=disable",
	"postgres://app:%s@db1:port/app",
	"postgres://app:%s@db1/app?sslmode=sometimes",
	"postgres://app:%s@db1/app?pool_max_conns=many",
	"postgres://app:%s@db1/app?target_session_attrs=x",
	"postgres://app:%s@db1/app?x",
	"postgres://app:%s@db1/app?x=%%zz",
	"postgres://app:%s@[db1/app",
	"postgres://app:%%zz%s@db1/app",
	"postgres://app:a/%s@db1/app",
	"postgres://app:a?%s@db1/app",
	"postgres://app:a#%s@db1/app",
	"postgres://app:a/b?%s@db1/app",
	"postgres://app:a@%s@db1:port/app",
	"postgres://app:a:%s@db1:port/app",
	"postgres://app:%s/app",
	"postgres://app:%%zz%s",
	"postgres://app:%s",
	"postgres://db1:port/app?user=app&password=%s",
	"postgres://db1:port/app?user=app&password=correct&%s",
	"postgres://db1/app?user=app&password=correct=%s",
	"postgres://db1/app?user=app&password=%%zz%s",
	"postgres://db1/app?sslmode=require&sslkey=nowhere&sslcert=nowhere&sslpassword=%s",
	"host=db1 port=x user=app password=%s",
	"host=db1 port=x user=app password='%s'",
	"host=db1 port=x user=app password = '%s'",
	"host=db1 user=app password='%s",
	"host=db1 user=app password='correct\\'%s' port=x",
	"host=db1 user=app password=correct %s port=x",
	"host=db1 user=app password=correct\\ %s port=x",
	"password=correct %s",
	"password=%s host",
	"host=db1 port=x passwd=y password=%s",
	"host=db1,db1 user=app sslmode=disable password=%s",
	"host=db1 user=app password=%s multipool_wait=x",
	"host=postgres://app:%s@db1 user=app",
	"host=db1 user=app password=correct %s=x",
	"postgres://db1/app?user=app&password=correct&%s=x",
	"postgres://app:correct@db1?%s=x@db1/app",
}

func requireNoSecret(t *testing.T, err error, secret, connString string) {
	t.Helper()
	if err == nil {
		return
	}
	var text, structured bytes.Buffer
	for _, l := range []*slog.Logger{slog.New(slog.NewTextHandler(&text, nil)), slog.New(slog.NewJSONHandler(&structured, nil))} {
		l.Error("opening", "err", err, slog.Group("in", "err", err))
	}
	marshalled, _ := json.Marshal(struct{ Err error }{err})
	outputs := map[string]string{
		"Error": err.Error(), "%v": fmt.Sprintf("%v", err), "%+v": fmt.Sprintf("%+v", err), "%s": fmt.Sprintf("%s", err),
		"%q": fmt.Sprintf("%q", err), "%#v": fmt.Sprintf("%#v", err), "slog text": text.String(), "slog JSON": structured.String(),
		"JSON": string(marshalled),
	}
	for e := err; e != nil; e = errors.Unwrap(e) {
		outputs["unwrapped "+fmt.Sprintf("%T", e)] = e.Error() + fmt.Sprintf("%#v", e)
	}
	var parse *pgconn.ParseConfigError
	if errors.As(err, &parse) {
		outputs["ParseConfigError"] = parse.ConnString + parse.Error()
	}
	for how, out := range outputs {
		if strings.Contains(out, secret) {
			t.Fatalf("%q: the password is in %s: %s", connString, how, out)
		}
	}
}

func tryBadStrings(t *testing.T, connString, secret string) {
	t.Helper()
	_, err := ParseConfig(connString)
	requireNoSecret(t, err, secret, connString)
	_, _, err = Options{Config: plainPool(t), Peers: []Peer{{Name: "x", ConnString: connString}, {Host: "y"}}}.complete()
	requireNoSecret(t, err, secret, connString)
}

func plainPool(t *testing.T) *pgxpool.Config {
	t.Helper()
	pool, err := pgxpool.ParseConfig("postgres://app@db1/app")
	require.NoError(t, err)
	return pool
}

func TestNoErrorHoldsThePassword(t *testing.T) {
	withoutEnvironment(t)
	failed := 0
	for _, form := range secretForms {
		connString := fmt.Sprintf(form, "Kq7wZx93Vt")
		t.Run(form, func(t *testing.T) {
			tryBadStrings(t, connString, "Kq7wZx93Vt")
		})
		if _, err := ParseConfig(connString); err != nil {
			failed++
		}
	}
	require.Greater(t, failed, len(secretForms)/2, "most of the forms are errors, or this tests nothing")
}

func FuzzConfigRedact(f *testing.F) {
	for i := range secretForms {
		f.Add(uint(i), "", "")
		f.Add(uint(i), "a ", "")
		f.Add(uint(i), "", "`: ")
		f.Add(uint(i), "'", "'")
	}
	withoutEnvironment(f)
	f.Fuzz(func(t *testing.T, form uint, before, after string) {
		const secret = "Kq7wZx93Vt"
		if len(before)+len(after) > 200 || strings.Contains(before+after, "service") {
			t.Skip()
		}
		tryBadStrings(t, fmt.Sprintf(secretForms[form%uint(len(secretForms))], before+secret+after), secret)
	})
}

func TestABadConnectionStringIsStillAParseConfigError(t *testing.T) {
	withoutEnvironment(t)
	_, err := ParseConfig("postgres://app:Kq7wZx93Vt@db1:port/app")
	require.EqualError(t, err, "multipool: cannot parse the connection string: invalid port")
	var parse *pgconn.ParseConfigError
	require.ErrorAs(t, err, &parse, "for programs that look for the type")
	require.Empty(t, parse.ConnString)
	require.ErrorContains(t, parse, "invalid port")
	var other *pgconn.PgError
	require.False(t, errors.As(err, &other))
}

// The table of the README lists every key, in the order of ParseConfig's, with the default that the code has.
func TestTheReadmesTableOfKeysIsTheCodes(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("README.md")
	require.NoError(t, err)
	rows := map[string]string{}
	var listed []string
	for _, m := range regexp.MustCompile("(?m)^\\| `(multipool_\\w+|load_balance_hosts)` \\|(.*)\\| (.*) \\|$").FindAllStringSubmatch(string(text), -1) {
		listed = append(listed, m[1])
		rows[m[1]] = strings.Trim(m[3], "`")
	}
	keys := ourKeys()
	slices.Sort(keys)
	slices.Sort(listed)
	require.Equal(t, keys, listed)
	complete := Options{Config: &pgxpool.Config{}}.withDefaults()
	for key, want := range map[string]string{
		"multipool_mode": complete.Mode.String(), "multipool_return_after": complete.ReturnAfter.String(),
		"multipool_target": complete.Route.Target.String(), "multipool_retry": "safe",
		"multipool_check_interval": complete.CheckInterval.String(), "multipool_wait": complete.Wait.String(),
		"multipool_max_waiting": fmt.Sprint(complete.MaxWaiting), "multipool_stall_after": complete.StallAfter.String(),
		"multipool_write_reserve": fmt.Sprint(complete.WriteReserve), "multipool_monitor_conns": fmt.Sprint(!complete.NoMonitorConns),
		"multipool_max_lag": "none", "multipool_discover": "none",
		"multipool_proxy": fmt.Sprint(complete.Proxy), loadBalanceHosts: "random",
	} {
		require.Equal(t, want, rows[key], key)
	}
}
