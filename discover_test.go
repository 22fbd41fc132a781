package multipool

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// names is a resolver of the test's own.
type names struct {
	hosts map[string][]string
	srv   map[string][]*net.SRV
}

var errNoSuchHost = errors.New("no such host")

func (n *names) LookupNetIP(_ context.Context, _, host string) (addrs []netip.Addr, err error) {
	found, ok := n.hosts[host]
	if !ok {
		return nil, errNoSuchHost
	}
	for _, a := range found {
		addrs = append(addrs, netip.MustParseAddr(a))
	}
	return addrs, nil
}

func (n *names) LookupSRV(_ context.Context, service, proto, name string) (string, []*net.SRV, error) {
	if service != "" {
		name = "_" + service + "._" + proto + "." + name
	}
	found, ok := n.srv[name]
	if !ok {
		return "", nil, errNoSuchHost
	}
	return name, found, nil
}

func lookUpIn(t *testing.T, n *names) {
	t.Helper()
	before := resolver
	resolver = n
	t.Cleanup(func() { resolver = before })
}

func TestPeersAreDiscoveredByDNS(t *testing.T) {
	lookUpIn(t, &names{
		hosts: map[string][]string{"db": {"10.0.0.2", "::ffff:10.0.0.3", "fd00::4"}, "db6": {"fd00::4"}},
		srv: map[string][]*net.SRV{
			"_postgresql._tcp.example.com": {{Target: "db1.example.com.", Port: 5432}, {Target: "db2.example.com", Port: 5433}},
		},
	})
	peers, err := DiscoverDNS("db", 5433)(t.Context())
	require.NoError(t, err)
	require.Equal(t, []Peer{
		{Host: "10.0.0.2", Port: 5433, ServerName: "db"}, {Host: "10.0.0.3", Port: 5433, ServerName: "db"},
	}, peers, "a server with both kinds of address would be two peers")
	peers, err = DiscoverDNS("db6", 0)(t.Context())
	require.NoError(t, err)
	require.Equal(t, []Peer{{Host: "fd00::4", ServerName: "db6"}}, peers)
	_, err = DiscoverDNS("nowhere", 0)(t.Context())
	require.ErrorIs(t, err, errNoSuchHost)

	want := []Peer{{Host: "db1.example.com", Port: 5432}, {Host: "db2.example.com", Port: 5433}}
	peers, err = DiscoverSRV("postgresql", "tcp", "example.com")(t.Context())
	require.NoError(t, err)
	require.Equal(t, want, peers)
	peers, err = DiscoverSRV("", "", "_postgresql._tcp.example.com")(t.Context())
	require.NoError(t, err)
	require.Equal(t, want, peers)

	for value, url := range map[string]string{
		"dns": "postgres://app@db:5433/app?sslmode=disable", "srv": "postgres://app@_postgresql._tcp.example.com/app?sslmode=disable",
	} {
		pool, err := pgxpool.ParseConfig(url)
		require.NoError(t, err)
		peers, err := discoveries[value](pool, true)(t.Context())
		require.NoError(t, err)
		require.NotEmpty(t, peers)
		for _, q := range peers {
			require.True(t, q.Proxy)
		}
	}
}

func TestAStandbyIsWhereItSaysOrWhereItComesFrom(t *testing.T) {
	t.Parallel()
	addr := "10.0.0.9"
	for name, want := range map[string]Peer{
		"walreceiver": {Host: addr, Port: 5432}, "db7:6543": {Host: "db7", Port: 6543}, "[fd00::1]:6543": {Host: "fd00::1", Port: 6543},
		"db7:": {Host: addr, Port: 5432}, ":6543": {Host: addr, Port: 5432}, "db7:0": {Host: addr, Port: 5432}, "db7:99999": {Host: addr, Port: 5432},
		"backup of db7:6543": {Host: addr, Port: 5432}, "a/b:6543": {Host: addr, Port: 5432},
	} {
		got, err := standbyAt(name, &addr, 5432)
		require.NoError(t, err)
		require.Equal(t, want, got, name)
	}
	_, err := standbyAt("walreceiver", nil, 5432)
	require.ErrorContains(t, err, "pg_monitor")
	got, err := standbyAt("db7:6543", nil, 5432)
	require.NoError(t, err)
	require.Equal(t, Peer{Host: "db7", Port: 6543}, got)
	_, err = DiscoverReplication()(t.Context())
	require.Error(t, err)
}

func TestCloseWaitsForDiscover(t *testing.T) {
	bubble(t, 1, nil, func(ctx context.Context, x *fakes) {
		began, returned := make(chan struct{}), false
		o := Options{Config: x.pool.Config(), Discover: func(ctx context.Context) ([]Peer, error) {
			close(began)
			<-ctx.Done()
			time.Sleep(time.Second) // cleaning up
			returned = true
			return nil, ctx.Err()
		}}
		pool, err := Open(ctx, o)
		require.NoError(t, err)
		<-began
		pool.Close()
		assert.True(t, returned)
	})
}

func TestCloseInsideDiscover(t *testing.T) {
	bubble(t, 1, nil, func(ctx context.Context, x *fakes) {
		pool, closed := new(MultiPool), make(chan struct{})
		made := make(chan struct{})
		o := Options{Config: x.pool.Config(), Discover: func(ctx context.Context) ([]Peer, error) {
			<-made
			pool.Close()
			close(closed)
			return nil, ctx.Err()
		}}
		var err error
		pool, err = Open(ctx, o)
		require.NoError(t, err)
		close(made)
		select {
		case <-closed:
		case <-time.After(time.Minute):
			require.Fail(t, "Close waits for the call in which it is called")
		}
		pool.Close()
	})
}
