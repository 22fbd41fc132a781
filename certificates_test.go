package multipool

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"

	"github.com/pgmultipool/multipool/internal/pgtest"
)

// What programs show of themselves by TLS: every connection, by whichever name its peer goes, has its own peer's certificate.

// authority issues certificates for programs.
type authority struct {
	folder string
	key    *ecdsa.PrivateKey
	cert   *x509.Certificate
	pem    []byte
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	a := &authority{folder: t.TempDir()}
	a.key, a.cert = issue(t, &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "programs"},
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}, nil, nil)
	a.pem = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.cert.Raw})
	return a
}

// issue makes a certificate, signed by a parent or, without one, by itself.
func issue(t *testing.T, template, parent *x509.Certificate, signer *ecdsa.PrivateKey) (*ecdsa.PrivateKey, *x509.Certificate) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	if parent == nil {
		parent, signer = template, key
	}
	template.NotBefore, template.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, signer)
	require.NoError(t, err)
	cert, err := x509.ParseCertificate(der)
	require.NoError(t, err)
	return key, cert
}

// program issues a program's certificate.
func (a *authority) program(t *testing.T, serial int64) (*ecdsa.PrivateKey, *x509.Certificate) {
	t.Helper()
	return issue(t, &x509.Certificate{
		SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: "app"},
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}, a.cert, a.key)
}

// write puts a certificate of a serial number, and its key, into files of a name, in place of what was there. It returns
// what a connection string says of them.
func (a *authority) write(t *testing.T, name string, serial int64) string {
	t.Helper()
	key, cert := a.program(t, serial)
	der, err := x509.MarshalPKCS8PrivateKey(key)
	require.NoError(t, err)
	certFile, keyFile := filepath.Join(a.folder, name+".crt"), filepath.Join(a.folder, name+".key")
	require.NoError(t, os.WriteFile(certFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw}), 0o600))
	require.NoError(t, os.WriteFile(keyFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600))
	return "sslcert=" + certFile + " sslkey=" + keyFile
}

// pair issues a certificate of a serial number that no file has.
func (a *authority) pair(t *testing.T, serial int64) tls.Certificate {
	t.Helper()
	key, cert := a.program(t, serial)
	return tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: key}
}

// demanding starts a cluster of two that lets app in by a certificate of the authority only.
func demanding(t *testing.T, a *authority) *pgtest.Cluster {
	t.Helper()
	c := pgtest.Start(t, pgtest.Options{Standbys: 1, TLS: true, HBA: []string{
		"hostssl all app 127.0.0.1/32 trust clientcert=verify-ca",
		"host all app 127.0.0.1/32 reject",
	}})
	for _, s := range c.Servers() {
		give(t, s, map[string][]byte{"programs.crt": a.pem})
		require.NoError(t, s.Set(map[string]string{"ssl_ca_file": "programs.crt"}))
	}
	must(t, c, "create role app login", "grant pg_monitor to app")
	return c
}

// byApp is a connection string of app's.
func byApp(host string, port uint16, also ...string) string {
	return fmt.Sprintf("host=%s port=%d user=app dbname=postgres %s", host, port, strings.Join(also, " "))
}

// shown asks a session at which port it is, and by which certificate it has come.
const shown = "select inet_server_port(), coalesce(client_serial::text, 'none') from pg_stat_ssl where pid = pg_backend_pid()"

type asker interface {
	QueryRow(context.Context, string, ...any) pgx.Row
}

// requireShown tests that a connection of a pool is at one of the ports, by the certificate that is wanted there.
func requireShown(t *testing.T, ask asker, want map[int]string, what string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	var port int
	var serial string
	require.NoError(t, ask.QueryRow(ctx, shown).Scan(&port, &serial), what)
	require.Equal(t, want[port], serial, "%s, port %d", what, port)
}

// requireEverywhere tests every way of a pool to its peers, on new connections.
func requireEverywhere(t *testing.T, p *MultiPool, want map[int]string) {
	t.Helper()
	requireShown(t, rowsOf{p, WithPrimary}, want, "the primary")
	requireShown(t, p, want, "a read")
	requireShown(t, p.PrimaryPool(), want, "Primary()")
	requireShown(t, p.ReplicaPool(), want, "Replicas()")
	for _, ps := range p.Status().Peers {
		requireShown(t, p.PeerPool(ps.Name), want, "PeerPool")
	}
}

// rowsOf asks under a route.
type rowsOf struct {
	*MultiPool
	under func(context.Context) context.Context
}

func (r rowsOf) QueryRow(ctx context.Context, sql string, args ...any) pgx.Row {
	return r.MultiPool.QueryRow(r.under(ctx), sql, args...)
}

// rereads reports whether pgx reads the files of certificates again: from 5.13 on.
func rereads() bool {
	_, has := reflect.TypeFor[pgconn.Config]().FieldByName("clientCertificateLoaders")
	return has
}

func TestEveryConnectionHasItsPeersClientCertificate(t *testing.T) {
	lookUpIn(t, &names{hosts: map[string][]string{"localhost": {"127.0.0.1"}, "127.0.0.1": {"127.0.0.1"}}})
	a := newAuthority(t)
	c := demanding(t, a)
	ports := [2]uint16{c.Servers()[0].Port(), c.Servers()[1].Port()}
	// The template's certificate, and those of the peers that have one of their own.
	common := a.write(t, "common", 10)
	own := [2]string{a.write(t, "own0", 20), a.write(t, "own1", 21)}
	host := func(i int) Peer { return Peer{Host: "127.0.0.1", Port: ports[i]} }
	named := func(i int) Peer { return Peer{Host: "127.0.0.1", Port: ports[i], ServerName: "localhost"} }
	oneHost := fmt.Sprintf("host=127.0.0.1 port=%d", ports[0])
	for _, way := range []struct {
		name   string
		hosts  string
		peers  func(mode string) []Peer
		found  func(mode string) []Peer
		owning bool // peers have certificates of their own
	}{
		{name: "one host", hosts: oneHost},
		{name: "hosts", hosts: fmt.Sprintf("host=127.0.0.1,localhost port=%d,%d", ports[0], ports[1])},
		{name: "Host", hosts: oneHost, peers: func(string) []Peer { return []Peer{host(0), host(1)} }},
		{name: "another Host", hosts: oneHost, peers: func(string) []Peer {
			return []Peer{{Host: "localhost", Port: ports[0]}, {Host: "localhost", Port: ports[1]}}
		}},
		{name: "Host beside a socket", hosts: "host=/nowhere", peers: func(string) []Peer { return []Peer{host(0), host(1)} }},
		{name: "ServerName", hosts: oneHost, peers: func(string) []Peer { return []Peer{named(0), named(1)} }},
		{name: "ConnString", hosts: oneHost, owning: true, peers: func(mode string) []Peer {
			return []Peer{
				{ConnString: byApp("127.0.0.1", ports[0], mode, own[0])},
				{ConnString: byApp("localhost", ports[1], mode, own[1])},
			}
		}},
		{name: "ConnString, Host and ServerName", hosts: oneHost, owning: true, peers: func(mode string) (peers []Peer) {
			for i, o := range own {
				peers = append(peers, Peer{ConnString: byApp("/nowhere", 1, mode, o), Host: "127.0.0.1", Port: ports[i], ServerName: "localhost"})
			}
			return peers
		}},
		{name: "DNS", hosts: fmt.Sprintf("host=localhost,127.0.0.1 port=%d,%d multipool_discover=dns", ports[0], ports[1])},
		{name: "Discover, Host", hosts: oneHost, found: func(string) []Peer { return []Peer{host(0), named(1)} }},
		{name: "Discover, ConnString", hosts: oneHost, owning: true, found: func(mode string) []Peer {
			return []Peer{
				{ConnString: byApp("localhost", ports[0], mode, own[0])},
				{ConnString: byApp("localhost", ports[1], mode, own[1])},
			}
		}},
	} {
		for i, mode := range []string{"sslmode=prefer", "sslmode=require", "sslmode=verify-full sslrootcert=" + c.CA()} {
			t.Run(way.name+" "+mode[:14], func(t *testing.T) {
				t.Parallel()
				config := Options{NoMonitorConns: i == 1, Wait: operatorTime}
				if way.peers != nil {
					config.Peers = way.peers(mode)
				}
				if way.found != nil {
					config.Discover = func(context.Context) ([]Peer, error) { return way.found(mode), nil }
				}
				p := openPool(t, config, way.hosts+" user=app dbname=postgres pool_max_conns=4 "+mode+" "+common)
				want := map[int]string{int(ports[0]): "10", int(ports[1]): "10"}
				if way.owning {
					want = map[int]string{int(ports[0]): "20", int(ports[1]): "21"}
				}
				if p.config.Discover != nil {
					waitFor(t, "both peers", operatorTime, func() bool { return p.discovery.status().Peers == 2 && len(p.peers()) == 2 })
				}
				if !p.solo {
					waitUp(t, p)
				}
				requireEverywhere(t, p, want)
			})
		}
	}
}

// A connection that is being made when its server dies moves to another, with the certificate that is shown there, however the
// program has come by it: the files are read again at every connect, and BeforeConnect may bring another.
func TestClientCertificatesChangeWhileAPoolLives(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	c := demanding(t, a)
	one, other := c.Servers()[0], c.Servers()[1]
	want := map[int]string{int(one.Port()): "20", int(other.Port()): "21"}
	config, err := ParseConfig(byApp("127.0.0.1", one.Port(), "sslmode=require"))
	require.NoError(t, err)
	brought := a.pair(t, 40)
	var brings atomic.Bool
	config.BeforeConnect = func(_ context.Context, cc *pgx.ConnConfig) error {
		if brings.Load() {
			cc.TLSConfig.Certificates = []tls.Certificate{brought}
		}
		return nil
	}
	p := openConfig(t, Options{Wait: operatorTime, Peers: []Peer{
		{ConnString: byApp("127.0.0.1", one.Port(), "sslmode=require", a.write(t, "one", 20))},
		{ConnString: byApp("127.0.0.1", other.Port(), "sslmode=prefer", a.write(t, "other", 21))},
	}}, config)
	waitUp(t, p)
	requireEverywhere(t, p, want)
	if rereads() {
		a.write(t, "one", 30)
		a.write(t, "other", 31)
		want = map[int]string{int(one.Port()): "30", int(other.Port()): "31"}
		p.Reset()
		requireEverywhere(t, p, want)
	}

	moves := func(from, to *pgtest.Server) {
		p.PrimaryPool().Reset()
		require.NoError(t, from.Freeze())
		before := p.PrimaryPool().Stat().NewConnsCount()
		moved := make(chan error, 1)
		var port int
		var serial string
		go func() {
			ctx, cancel := context.WithTimeout(context.Background(), operatorTime)
			defer cancel()
			moved <- p.PrimaryPool().QueryRow(ctx, shown).Scan(&port, &serial)
		}()
		waitFor(t, "a connect", operatorTime, func() bool { return p.PrimaryPool().Stat().NewConnsCount() > before })
		require.NoError(t, from.Kill())
		require.NoError(t, to.Promote())
		require.NoError(t, <-moved)
		require.EqualValues(t, to.Port(), port)
		require.Equal(t, want[port], serial)
		require.Equal(t, before+1, p.PrimaryPool().Stat().NewConnsCount(), "it was the one that moved")
		require.NoError(t, from.Follow(to))
		waitUp(t, p)
	}
	moves(one, other)
	brings.Store(true)
	want = map[int]string{int(one.Port()): "40", int(other.Port()): "40"}
	moves(other, one)
}

// told says of every field of pgx's configurations that it is known here, and what becomes of it where a peer's is made.
var told = map[string]string{
	"pgconn.Config": "Host Port Database User Password TLSConfig ConnectTimeout DialFunc LookupFunc BuildFrontend " +
		"MaxProtocolMessageBodyLen BuildContextWatcherHandler RuntimeParams KerberosSrvName KerberosSpn Fallbacks " +
		"SSLNegotiation SSLCertMode AfterNetConnect ValidateConnect AfterConnect OnNotice OnNotification OnPgError " +
		"OAuthTokenProvider MinProtocolVersion MaxProtocolVersion ChannelBinding RequireAuth " +
		"createdByParseConfig clientCertificateLoaders",
	"pgconn.FallbackConfig": "Host Port TLSConfig",
	"pgx.ConnConfig": "Config Tracer connString StatementCacheCapacity DescriptionCacheCapacity DefaultQueryExecMode " +
		"createdByParseConfig",
	"pgxpool.Config": "ConnConfig BeforeConnect AfterConnect BeforeAcquire PrepareConn AfterRelease BeforeClose ShouldPing " +
		"MaxConnLifetime MaxConnLifetimeJitter MaxConnIdleTime PingTimeout MaxConns MinConns MinIdleConns HealthCheckPeriod " +
		"createdByParseConfig",
}

// A field that pgx adds comes along with the rest, as configurations are copied whole. What it means for peers, who take some of
// it from a string of their own, and for a pool that follows, nobody has thought of: graft and impersonate, then the table.
func TestNoFieldOfPgxIsUnknown(t *testing.T) {
	for _, of := range []reflect.Type{
		reflect.TypeFor[pgconn.Config](), reflect.TypeFor[pgconn.FallbackConfig](),
		reflect.TypeFor[pgx.ConnConfig](), reflect.TypeFor[pgxpool.Config](),
	} {
		known := strings.Fields(told[of.String()])
		for i := range of.NumField() {
			require.Contains(t, known, of.Field(i).Name, of.String())
		}
	}
	for _, name := range peerFields {
		f, has := reflect.TypeFor[pgconn.Config]().FieldByName(name)
		require.True(t, has && f.IsExported(), name)
	}
}

// filled gives every exported field of a configuration a value that pgx does not, except those of the given names.
func filled(t *testing.T, config any, but ...string) {
	t.Helper()
	v := reflect.ValueOf(config).Elem()
	for i := range v.NumField() {
		f := v.Type().Field(i)
		if !f.IsExported() || f.Anonymous || slices.Contains(but, f.Name) {
			continue
		}
		switch into := v.Field(i); into.Kind() {
		case reflect.String:
			into.SetString("set " + f.Name)
		case reflect.Int, reflect.Int32, reflect.Int64:
			into.SetInt(77)
		case reflect.Func:
			into.Set(reflect.MakeFunc(f.Type, func([]reflect.Value) []reflect.Value { panic(f.Name) }))
		case reflect.Map:
			into.Set(reflect.ValueOf(map[string]string{"set": f.Name}))
		case reflect.Interface:
			into.Set(reflect.ValueOf(&silentTracer{}))
		default:
			t.Fatalf("%s is a %s: give it a value here", f.Name, f.Type)
		}
	}
}

// requireSame tests that two configurations have the same in every exported field, except those of the given names.
func requireSame(t *testing.T, want, got any, but ...string) {
	t.Helper()
	w, g := reflect.ValueOf(want).Elem(), reflect.ValueOf(got).Elem()
	for i := range w.NumField() {
		f := w.Type().Field(i)
		switch {
		case !f.IsExported(), f.Anonymous, slices.Contains(but, f.Name):
		case f.Type.Kind() == reflect.Func:
			require.Equal(t, w.Field(i).UnsafePointer(), g.Field(i).UnsafePointer(), f.Name)
		default:
			require.Equal(t, w.Field(i).Interface(), g.Field(i).Interface(), f.Name)
		}
	}
}

type silentTracer struct{}

func (*silentTracer) TraceQueryStart(ctx context.Context, _ *pgx.Conn, _ pgx.TraceQueryStartData) context.Context {
	return ctx
}
func (*silentTracer) TraceQueryEnd(context.Context, *pgx.Conn, pgx.TraceQueryEndData) {}

func TestAPeerHasEveryFieldOfItsTemplate(t *testing.T) {
	withoutEnvironment(t)
	for _, way := range []struct {
		name, template string
		peer           Peer
		own            []string // fields that are not the template's
	}{
		{"Host", "host=a user=u sslmode=require", Peer{Host: "b"}, nil},
		{"Host beside a socket", "host=/a user=u sslmode=require", Peer{Host: "b"}, nil},
		{"ServerName", "host=a user=u sslmode=require", Peer{Host: "b", ServerName: "c"}, nil},
		{"ConnString", "host=a user=u sslmode=require", Peer{ConnString: "host=b user=v dbname=w password=x"}, peerFields},
	} {
		config, err := ParseConfig(way.template)
		require.NoError(t, err)
		// What is said of the way to a server must agree, and goes with it.
		but := append([]string{"SSLNegotiation", "SSLCertMode"}, wayFields...)
		filled(t, &config.ConnConfig.Config, but...)
		filled(t, config.ConnConfig, "DefaultQueryExecMode")
		filled(t, config, "ConnConfig")
		own, err := (&Options{Config: config}).peerFrom(way.peer, way.name)
		require.NoError(t, err, way.name)
		requireSame(t, &config.ConnConfig.Config, &own.pool.ConnConfig.Config, append(but, way.own...)...)
		requireSame(t, config.ConnConfig, own.pool.ConnConfig)
		requireSame(t, config, own.pool, "ConnConfig")
		if way.own != nil {
			cc := own.pool.ConnConfig
			require.Equal(t, []string{"v", "x", "w"}, []string{cc.User, cc.Password, cc.Database})
		}
	}
}

func TestAnApproachHasEveryFieldOfItsPeer(t *testing.T) {
	withoutEnvironment(t)
	config, err := pgx.ParseConfig("host=a,b sslmode=prefer")
	require.NoError(t, err)
	ours := config.Copy()
	filled(t, &ours.Config, "TLSConfig", "Fallbacks", "Port")
	filled(t, ours, "DefaultQueryExecMode")
	ours.Port, ours.DefaultQueryExecMode = 77, pgx.QueryExecModeExec
	a := &approach{ours: sharingTLS(ours), wire: &wire{}}
	a.impersonate(config)
	requireSame(t, &ours.Config, &config.Config, "DialFunc", "LookupFunc", "ValidateConnect", "AfterConnect")
	requireSame(t, ours, config, "Tracer")
	require.Same(t, ours.TLSConfig, config.TLSConfig)
	require.Same(t, ours.Fallbacks[1].TLSConfig, config.Fallbacks[1].TLSConfig)
	require.NotSame(t, ours.Fallbacks[1], config.Fallbacks[1])
}
