package bench

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"

	"github.com/pgmultipool/multipool"
	"github.com/pgmultipool/multipool/internal/pgfake"
)

// never is when background work begins: not while something is measured.
const never = time.Hour

// cluster is a primary and replicas in memory. They answer in the goroutine of whoever asks, so that the time of a
// call is what it costs the client's processor.
type cluster struct {
	dial    pgconn.DialFunc
	network pgfake.Network
	addrs   []string // the primary's first
}

func newCluster(tb testing.TB, peers int) *cluster {
	c := &cluster{network: pgfake.Network{}}
	for i := range peers {
		addr := fmt.Sprintf("db%d:5432", i+1)
		c.addrs = append(c.addrs, addr)
		c.network[addr] = pgfake.New(pgfake.Options{Standby: i > 0, Handler: answerLook})
	}
	c.dial = taped(c.network.DialInline)
	tb.Cleanup(c.network.Close)
	return c
}

// answerLook answers the statement by which multipool learns what a server is: the one that the fake does not work out by
// itself.
func answerLook(s pgfake.Statement) *pgfake.Response {
	if !strings.Contains(s.SQL, "pg_is_in_recovery") || !strings.Contains(s.SQL, "pg_walfile_name") {
		return nil
	}
	timeline := any(fmt.Sprintf("%08X", s.Timeline))
	if s.Standby {
		timeline = nil
	}
	r := &pgfake.Response{Rows: [][]any{{s.Standby, timeline, "0/2000", false, false, nil, false, "1", nil}}}
	for _, name := range []string{"standby", "timeline", "position", "alone", "paused", "started", "awaits", "system", "shown"} {
		oid := uint32(pgfake.TextOID)
		if _, flag := r.Rows[0][len(r.Columns)].(bool); flag {
			oid = pgfake.BoolOID
		}
		r.Columns = append(r.Columns, pgfake.Column{Name: name, OID: oid})
	}
	return r
}

// config is the same for both pools, but for the servers.
func (c *cluster) config(tb testing.TB, conns int, addrs ...string) *pgxpool.Config {
	tb.Helper()
	config, err := multipool.ParseConfig("postgres://app@" + strings.Join(addrs, ",") + "/app?sslmode=disable")
	require.NoError(tb, err)
	config.ConnConfig.DialFunc = c.dial
	config.ConnConfig.LookupFunc = pgfake.Lookup
	config.MaxConns = int32(conns)
	config.MinConns = 0
	config.HealthCheckPeriod = never
	config.MaxConnLifetime = never
	config.MaxConnIdleTime = never
	return config
}

func (c *cluster) bare(tb testing.TB, conns int, addr string) *pgxpool.Pool {
	tb.Helper()
	p, err := pgxpool.NewWithConfig(context.Background(), c.config(tb, conns, addr))
	require.NoError(tb, err)
	tb.Cleanup(p.Close)
	return p
}

// multi opens the pool under test and returns when all of its peers are known.
func (c *cluster) multi(tb testing.TB, conns int, change ...func(*multipool.Options)) *multipool.MultiPool {
	tb.Helper()
	config := multipool.Options{Config: c.config(tb, conns, c.addrs...), CheckInterval: never}
	for _, f := range change {
		f(&config)
	}
	p, err := multipool.Open(context.Background(), config)
	require.NoError(tb, err)
	tb.Cleanup(p.Close)
	waitUp(tb, p)
	for _, peer := range c.network {
		peer.Handle(nil) // all has been looked at: from here on it would only cost time
	}
	return p
}

// coin is what a program has that spreads its reads by itself: a pgxpool for every replica, and a coin to choose by. With
// many callers on few processors two pools cost more than one, whoever chooses: their connections are twice as many, and
// move from one processor's memory to the other's.
type coin []*pgxpool.Pool

func (c *cluster) coin(tb testing.TB, conns int) coin {
	pools := make(coin, 0, len(c.addrs)-1)
	for _, addr := range c.addrs[1:] {
		pools = append(pools, c.bare(tb, conns, addr))
	}
	return pools
}

func (c coin) toss() *pgxpool.Pool { return c[rand.IntN(len(c))] }

func (c coin) Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error) {
	return c.toss().Query(ctx, sql, args...)
}

func (c coin) QueryRow(ctx context.Context, sql string, args ...any) pgx.Row {
	return c.toss().QueryRow(ctx, sql, args...)
}

func (c coin) Exec(ctx context.Context, sql string, args ...any) (pgconn.CommandTag, error) {
	return c.toss().Exec(ctx, sql, args...)
}

func (c coin) Begin(ctx context.Context) (pgx.Tx, error) { return c.toss().Begin(ctx) }

func (c coin) SendBatch(ctx context.Context, b *pgx.Batch) pgx.BatchResults {
	return c.toss().SendBatch(ctx, b)
}

func waitUp(tb testing.TB, p *multipool.MultiPool) {
	tb.Helper()
	if len(p.Config().ConnConfig.Fallbacks) == 0 {
		return // a single peer is not watched
	}
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(time.Millisecond) {
		primary, replicas := 0, 0
		status := p.Status()
		for _, s := range status.Peers {
			switch {
			case s.Health != multipool.HealthUp:
			case s.Primary:
				primary++
			case s.Serves && s.Role == multipool.RoleReplica:
				replicas++
			}
		}
		if primary == 1 && primary+replicas == len(status.Peers) {
			return
		}
		require.True(tb, time.Now().Before(deadline), "not all peers serve: %+v", status)
	}
}

// setting is how calls are made.
type setting struct {
	peers, callers int
	background     bool // the context cannot be cancelled
}

// spreads reports whether the call is compared with a coin between pgxpools, not with one: many callers read from
// several servers.
func (s setting) spreads(c call) bool { return s.callers > 1 && s.peers > 2 && c.reads }

func (s setting) String() string {
	name := fmt.Sprintf("peers=%d/callers=%d", s.peers, s.callers)
	if s.background {
		name += "/background"
	}
	return name
}

// context is what a program's request has: it can be cancelled, and has no deadline.
func (s setting) context(tb testing.TB) func() context.Context {
	return func() context.Context {
		if s.background {
			return context.Background()
		}
		ctx, cancel := context.WithCancel(context.Background())
		tb.Cleanup(cancel)
		return ctx
	}
}

// inline sets up a comparison in memory: pgxpool to the servers where multipool sends the call too.
func inline(tb testing.TB, c call, s setting, turn time.Duration) *trial {
	tb.Helper()
	servers := newCluster(tb, s.peers)
	addr := servers.addrs[0]
	if c.reads {
		addr = servers.addrs[len(servers.addrs)-1]
	}
	pools := [sides]pool{ours: servers.multi(tb, s.callers)}
	for _, side := range []int{bare, control} {
		if s.spreads(c) {
			pools[side] = servers.coin(tb, s.callers)
		} else {
			pools[side] = servers.bare(tb, s.callers, addr)
		}
	}
	var callers [sides][]caller
	for side, p := range pools {
		callers[side] = c.with(p, s.callers, s.context(tb))
	}
	clock := wallTime
	if s.callers > 1 {
		clock = cpuTime // the turn of several ends when the last one does, idle or not
	}
	return newTrial(tb, callers, clock, turn)
}

// turnOf is short against the time slices of an operating system, so that most turns are undisturbed. Many callers
// need longer ones, for their own beginning and end is a part of it.
func turnOf(callers int) time.Duration {
	if callers == 1 {
		return 400 * time.Microsecond
	}
	return 3 * time.Millisecond
}

func BenchmarkInline(b *testing.B) {
	for _, c := range calls {
		b.Run(c.name, func(b *testing.B) {
			for _, s := range []setting{{3, 1, false}, {2, 64, false}, {3, 64, false}, {3, 1, true}, {1, 1, false}} {
				b.Run(s.String(), func(b *testing.B) {
					t := inline(b, c, s, turnOf(s.callers))
					t.benchmark(b)
					if s.callers > 1 {
						return
					}
					b.ReportAllocs()
					n, size := t.allocs(b, ours, 100)
					b.ReportMetric(n, "allocs/op")
					b.ReportMetric(size, "B/op")
					n, size = t.allocs(b, bare, 100)
					b.ReportMetric(n, "pgxpool-allocs/op")
					b.ReportMetric(size, "pgxpool-B/op")
				})
			}
		})
	}
}
