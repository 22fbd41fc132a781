package multipool

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"reflect"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"
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
	own := ": set it in Options.Config (its own are " + strings.Join(peerKeys, ", ") + ")"
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

// Which string fields of the options may be printed: a new one is named here, or holds a password.
var printed = map[string]bool{
	"Peer.Name": true, "Peer.Host": true, "Peer.ServerName": true, "Peer.Zone": true, "Options.Zone": true, "Route.Peers": true,
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
