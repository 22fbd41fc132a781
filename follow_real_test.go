package multipool

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/jackc/pgx/v5/stdlib"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/pgmultipool/multipool/internal/pgtest"
	"github.com/pgmultipool/multipool/internal/quota"
)

// The pools that follow, on real servers.

// Six writers through database/sql, which knows nothing of us, and nothing sends their statements again.
func TestDatabaseSQLFollowsAPromotion(t *testing.T) {
	for _, stop := range []string{"immediate", "kill -9"} {
		t.Run(stop, func(t *testing.T) {
			c := pgtest.Start(t, pgtest.Options{Standbys: 2})
			must(t, c, "create table log (id bigserial primary key, writer int)")
			p := openPool(t, Options{Wait: operatorTime}, c.ConnString("pool_max_conns=10"))
			waitUp(t, p)
			db := stdlib.OpenDBFromPool(p.PrimaryPool())
			defer db.Close()
			var last, gap atomic.Int64
			last.Store(time.Now().UnixNano())
			writers := gatherFor(operatorTime, 6, func(ctx context.Context) error {
				// With an argument: without, pgx says of a statement that was in flight that it is safe to run it again,
				// and database/sql does.
				_, err := db.ExecContext(ctx, "insert into log (writer) values ($1)", 1)
				if now := time.Now().UnixNano(); err == nil {
					gap.Store(max(gap.Load(), now-last.Swap(now)))
				}
				return err
			})
			writers.reach(t, 500)
			old, next := c.Primary(), c.Standbys()[0]
			if stop == "immediate" {
				require.NoError(t, old.Stop(pgtest.Immediate))
			} else {
				require.NoError(t, old.Kill())
			}
			require.NoError(t, next.Promote())
			writers.reach(t, 500)
			calls, failed := writers.dismiss()
			errors := 0
			for text, n := range failed {
				errors += n
				t.Logf("%d x %s", n, text)
			}
			assert.LessOrEqual(t, errors, 10, "what was in flight, one a connection")
			assert.Equal(t, next.Addr(), p.Status().Primary)
			t.Logf("%d writes, %d errors, longest time between two that succeeded %v", calls, errors, time.Duration(gap.Load()))
			if !raceEnabled {
				assert.Less(t, time.Duration(gap.Load()), 3*time.Second)
			}
			p.Close()
			for _, q := range p.peers() {
				assert.Zero(t, q.sockets.len(), q.name)
			}
		})
	}
}

// give puts files into a server's folder.
func give(t *testing.T, s *pgtest.Server, files map[string][]byte) {
	t.Helper()
	for file, text := range files {
		path := filepath.Join(s.Dir(), file)
		require.NoError(t, os.WriteFile(path, text, 0o600))
		giveAway(t, path, s.Dir())
	}
}

// serveAs gives a server a certificate for a name and nothing else, and returns the certificate.
func serveAs(t *testing.T, s *pgtest.Server, name string) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, DNSNames: []string{name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	require.NoError(t, err)
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	require.NoError(t, err)
	cert := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	give(t, s, map[string][]byte{"named.crt": cert, "named.key": pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})})
	require.NoError(t, s.Set(map[string]string{"ssl_cert_file": "named.crt", "ssl_key_file": "named.key"}))
	return cert
}

// Every server shows a certificate for its own name; a connection that moves to another server checks it for that one's.
func TestAFollowingPoolChecksEachServersOwnName(t *testing.T) {
	c := pgtest.Start(t, pgtest.Options{Standbys: 2, TLS: true})
	var roots []byte
	var peers []Peer
	for i, s := range c.Servers() {
		name := fmt.Sprintf("db%d.test", i+1)
		roots = append(roots, serveAs(t, s, name)...)
		peers = append(peers, Peer{Host: name, Port: s.Port()})
	}
	ca := filepath.Join(t.TempDir(), "roots.crt")
	require.NoError(t, os.WriteFile(ca, roots, 0o600))
	for _, mode := range []string{"verify-full", "prefer"} {
		pool, err := ParseConfig(fmt.Sprintf("postgres://postgres@db1.test:%d,db2.test:1/postgres?sslmode=%s&sslrootcert=%s", peers[0].Port, mode, ca))
		require.NoError(t, err)
		pool.ConnConfig.LookupFunc = func(context.Context, string) ([]string, error) { return []string{"127.0.0.1"}, nil }
		p := openConfig(t, Options{Peers: peers}, pool)
		waitUp(t, p)
		old := c.Primary()
		var held []*pgxpool.Conn
		for _, following := range []*pgxpool.Pool{p.PrimaryPool(), p.ReplicaPool()} {
			for range 4 {
				conn, err := following.Acquire(testContext(t))
				require.NoError(t, err)
				var encrypted bool
				require.NoError(t, conn.QueryRow(testContext(t), "select ssl from pg_stat_ssl where pid = pg_backend_pid()").Scan(&encrypted))
				assert.True(t, encrypted)
				held = append(held, conn)
			}
		}
		for _, conn := range held {
			conn.Release()
		}
		if mode == "prefer" {
			continue
		}
		// A cancel request goes to the connection's own server, under its own name.
		requireCancelled(t, p.PrimaryPool(), old)
		// One that is being made when its server dies moves, and so does what it checks.
		p.PrimaryPool().Reset()
		require.NoError(t, old.Freeze())
		moved := make(chan error)
		go func() {
			_, err := p.PrimaryPool().Exec(testContext(t), "create table after_promotion ()")
			moved <- err
		}()
		waitFor(t, "a connect", 10*time.Second, func() bool { return p.PrimaryPool().Stat().ConstructingConns() == 1 })
		require.NoError(t, old.Kill())
		next := c.Standbys()[0]
		require.NoError(t, next.Promote())
		require.NoError(t, <-moved)
		requireCancelled(t, p.PrimaryPool(), next)
		require.NoError(t, old.Follow(next))
	}
}

// requireCancelled gives a statement up and tests that its server does.
func requireCancelled(t *testing.T, pool *pgxpool.Pool, s *pgtest.Server) {
	t.Helper()
	const running = "select count(*) from pg_stat_activity where state = 'active' and query like 'select pg_sleep(1__)'"
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	done := make(chan error)
	go func() { _, err := pool.Exec(ctx, "select pg_sleep(100)"); done <- err }()
	count := func() int64 {
		n, err := s.Int(testContext(t), running)
		require.NoError(t, err)
		return n
	}
	waitFor(t, "the statement", 10*time.Second, func() bool { return count() == 1 })
	cancel()
	require.ErrorIs(t, <-done, context.Canceled)
	waitFor(t, "its end on the server", 10*time.Second, func() bool { return count() == 0 })
}

func TestACancelRequestReachesTheConnectionsServer(t *testing.T) {
	t.Parallel()
	c := pgtest.Start(t, pgtest.Options{Standbys: 1})
	p := openPool(t, Options{}, c.ConnString())
	waitUp(t, p)
	requireCancelled(t, p.PrimaryPool(), c.Primary())
	requireCancelled(t, p.ReplicaPool(), c.Standbys()[0])
	require.NoError(t, c.Primary().Kill())
	next := c.Standbys()[0]
	require.NoError(t, next.Promote())
	requireCancelled(t, p.PrimaryPool(), next)
}

// Both pools want all that there is.
func TestMaxConnsHoldsForEachServer(t *testing.T) {
	t.Parallel()
	const most, monitors = 6, 1
	c := pgtest.Start(t, pgtest.Options{Standbys: 1})
	must(t, c, "create table log (note text)")
	p := openPool(t, Options{}, c.ConnString(fmt.Sprintf("pool_max_conns=%d", most), "application_name=crowd"))
	waitUp(t, p)
	watcher, err := c.Primary().Conn(testContext(t))
	require.NoError(t, err)
	defer watcher.Close(context.Background())
	own := gather(20, func(ctx context.Context) error { _, err := p.Exec(ctx, "insert into log values ('own')"); return err })
	following := gather(20, func(ctx context.Context) error {
		_, err := p.PrimaryPool().Exec(ctx, "insert into log values ('following')")
		return err
	})
	var over time.Time
	overs, at := 0, 0
	for start := time.Now(); time.Since(start) < 3*time.Second; {
		var n int
		require.NoError(t, watcher.QueryRow(testContext(t), "select count(*) from pg_stat_activity where application_name = 'crowd'").Scan(&n))
		// A backend is seen for a moment after its connection was closed, and the next one may be there by then. A moment
		// is counted in looks too: nothing ends while the machine stands still.
		if overs++; n <= most+monitors {
			overs = 0
		} else if overs == 1 {
			over = time.Now()
		}
		require.True(t, overs < 50 || time.Since(over) < 500*time.Millisecond, "%d sessions", n)
		require.LessOrEqual(t, p.peers()[0].slots.Taken(), int32(most))
		at = max(at, n)
	}
	ownCalls, failed := own.dismiss()
	assert.Empty(t, failed)
	followingCalls, failed := following.dismiss()
	assert.Empty(t, failed)
	made := p.PrimaryPool().Stat().NewConnsCount() + p.peers()[0].pool.Stat().NewConnsCount()
	t.Logf("%d and %d statements over at most %d sessions; %d were made", ownCalls, followingCalls, at, made)
	// A turn is given back a moment before its connection is: who is called in it makes another, and a busy machine makes
	// such moments long. Without turns nearly every statement makes one.
	assert.Less(t, made, (ownCalls+followingCalls)/4, "connections are not closed and made all the time")
	assert.InDelta(t, 1, float64(ownCalls)/float64(followingCalls), 0.5)
	assert.Zero(t, p.Status().Peers[0].Trips)
}

func TestReplicasAreEvenAgainAfterARestart(t *testing.T) {
	t.Parallel()
	c := pgtest.Start(t, pgtest.Options{Standbys: 3})
	p := openPool(t, Options{}, c.ConnString("pool_max_conns=10"))
	waitUp(t, p)
	db := stdlib.OpenDBFromPool(p.ReplicaPool())
	defer db.Close()
	var served sync.Map
	readers := gather(12, func(ctx context.Context) error {
		var port int
		err := db.QueryRowContext(ctx, "select current_setting('port')::int from pg_sleep(0.005)").Scan(&port)
		n, _ := served.LoadOrStore(port, new(atomic.Int64))
		n.(*atomic.Int64).Add(1)
		return err
	})
	spread := func() (low, high int32) {
		low = 100
		for _, q := range p.peers()[1:] {
			n := q.slots.Of(quota.Replicas)
			low, high = min(low, n), max(high, n)
		}
		return low, high
	}
	readers.reach(t, 500)
	waitFor(t, "an even spread from the start", 10*time.Second, func() bool {
		low, high := spread()
		return low > 0 && high-low <= 1
	})
	victim := c.Standbys()[1]
	require.NoError(t, victim.Restart(pgtest.Immediate))
	begun := time.Now()
	waitFor(t, "its return", 20*time.Second, func() bool { return p.Status().Peers[2].Health == HealthUp })
	waitFor(t, "an even spread", time.Minute, func() bool {
		low, high := spread()
		return low > 0 && high-low <= 2
	})
	t.Logf("even %v after the restart", time.Since(begun))
	_, failed := readers.dismiss()
	errors := 0
	for text, n := range failed {
		errors += n
		t.Logf("%d x %s", n, text)
	}
	assert.LessOrEqual(t, errors, 8, "what was in flight there")
	assert.Zero(t, p.peers()[0].slots.Of(quota.Replicas), "the primary was spared")
}

func TestPasswordsOfAFollowingPoolAreEachServersOwn(t *testing.T) {
	t.Parallel()
	c := pgtest.Start(t, pgtest.Options{Standbys: 1, HBA: []string{"host all app 127.0.0.1/32 scram-sha-256"}})
	must(t, c, "create role app login password 'one'", "grant all on schema public to app")
	var file bytes.Buffer
	for _, s := range c.Servers() {
		fmt.Fprintf(&file, "127.0.0.1:%d:*:app:one\n", s.Port())
	}
	passfile := filepath.Join(t.TempDir(), "pgpass")
	require.NoError(t, os.WriteFile(passfile, file.Bytes(), 0o600))
	p := openPool(t, Options{}, fmt.Sprintf("postgres://app@%s,%s/postgres?sslmode=disable&passfile=%s", c.Servers()[0].Addr(), c.Servers()[1].Addr(), passfile))
	waitUp(t, p)
	_, err := p.PrimaryPool().Exec(testContext(t), "create table t (v int)")
	require.NoError(t, err)
	require.NoError(t, c.WaitCaughtUp(testContext(t)))
	require.NoError(t, c.Primary().Kill())
	require.NoError(t, c.Standbys()[0].Promote())
	_, err = p.PrimaryPool().Exec(testContext(t), "insert into t values (1)")
	require.NoError(t, err)
}
