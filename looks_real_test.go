package multipool

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/pgmultipool/multipool/internal/pgtest"
)

// A standby is promoted beside its primary, which lives on. The program writes and reads nothing, so that nothing but looks
// can tell: what it writes to the old one is lost. Looks that came at their ordinary pace would find out after a minute.
func TestWritesToAPrimaryThatWasReplacedEndSoon(t *testing.T) {
	t.Parallel()
	for name, pooled := range map[string]bool{"direct": false, "behind PgBouncer": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := pgtest.Start(t, pgtest.Options{Standbys: 2})
			must(t, c, "create table log (id bigint)")
			config := Options{CheckInterval: time.Minute, Wait: operatorTime}
			if pooled {
				for _, server := range c.Servers() {
					pooler := pgtest.StartPooler(t, server, nil)
					config.Peers = append(config.Peers, Peer{Name: server.Addr(), Host: pooler.Host(), Port: pooler.Port(), Proxy: true})
				}
			}
			p := openPool(t, config, c.ConnString("pool_max_conns=4", "default_query_exec_mode=exec"))
			waitUp(t, p)
			old, next := c.Primary(), c.Standbys()[1]
			var id, lost, last atomic.Int64
			var promoted atomic.Bool
			writers := gatherFor(operatorTime, 2, func(ctx context.Context) error {
				time.Sleep(time.Millisecond)
				var port uint16
				after := promoted.Load()
				err := p.QueryRow(ctx, "insert into log values ($1) returning inet_server_port()", id.Add(1)).Scan(&port)
				switch {
				case errors.Is(err, ErrOutcomeUnknown):
					return nil // it was in flight when the old one was fenced
				case err == nil && port == old.Port() && after:
					lost.Add(1)
					last.Store(time.Now().UnixNano())
				}
				return err
			})
			writers.reach(t, 500)
			promotion := time.Now()
			require.NoError(t, next.Promote())
			began := time.Now()
			promoted.Store(true)
			waitFor(t, "the new primary", 30*time.Second, func() bool { return p.Status().Primary == next.Addr() })
			writers.turnOver(t)
			writers.reach(t, 100)
			_, failed := writers.dismiss()
			assert.Empty(t, failed)
			figure := time.Duration(0)
			if n := last.Load(); n != 0 {
				figure = time.Unix(0, n).Sub(began)
			}
			t.Logf("%d writes acknowledged by the old primary in the %v after the new one took writes (promoted in %v)",
				lost.Load(), figure, began.Sub(promotion))
			assert.Less(t, figure, 15*time.Second)
		})
	}
}

// ranFor is how long a server's backend has run, in microseconds, by the scheduler's count.
func ranFor(t *testing.T, pid uint32) int64 {
	t.Helper()
	if runtime.GOOS != "linux" {
		t.Skip("needs /proc")
	}
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/schedstat", pid))
	if errors.Is(err, os.ErrNotExist) {
		t.Skip("the kernel does not count")
	}
	require.NoError(t, err)
	ns, err := strconv.ParseInt(strings.Fields(string(text))[0], 10, 64)
	require.NoError(t, err)
	return ns / 1000
}

// sessionsOn returns the processes of a server that serve a role's sessions.
func sessionsOn(t *testing.T, s *pgtest.Server, role string) (pids []uint32) {
	t.Helper()
	conn, err := s.Conn(testContext(t))
	require.NoError(t, err)
	defer func() { _ = conn.Close(context.Background()) }()
	rows, err := conn.Query(testContext(t), "select pid from pg_stat_activity where usename = $1", role)
	require.NoError(t, err)
	pids, err = pgx.CollectRows(rows, pgx.RowTo[uint32])
	require.NoError(t, err)
	return pids
}

// What looks cost a server, by the scheduler's count of its backends. Absolute times depend on the machine, so every kind is
// compared with the full look as it was sent before, at the same pace.
func TestWhatLooksCostAServer(t *testing.T) {
	c := pgtest.Start(t, pgtest.Options{Standbys: 1})
	must(t, c, "create table log (id bigint)")
	p := openPool(t, Options{CheckInterval: time.Hour, Wait: operatorTime}, c.ConnString())
	waitUp(t, p)
	for i, s := range c.Servers() {
		m := &monitor{peer: p.peers()[i]}
		for _, pause := range []time.Duration{0, eagerLook} {
			n := 200
			if pause > 0 {
				n = 20
			}
			cost := map[string]float64{}
			for _, kind := range []string{"full, as a text", "full", "brief", "brief, as a text", "glance", "role, as a text"} {
				conn, err := s.Conn(testContext(t))
				require.NoError(t, err)
				pg := conn.PgConn()
				look := func() {
					var err error
					switch kind {
					case "full, as a text":
						_, err = m.ask(testContext(t), pg)
					case "full":
						_, err = m.askFor(testContext(t), pg, depthFull, m.send)
					case "brief":
						_, err = m.askFor(testContext(t), pg, depthBrief, m.send)
					case "brief, as a text":
						_, err = m.askFor(testContext(t), pg, depthBrief, sendText)
					case "role, as a text":
						_, err = m.askFor(testContext(t), pg, depthRole, sendText)
					case "glance":
						_, err = m.glance(testContext(t), pg)
					}
					require.NoError(t, err)
				}
				m.conn = conn // its own
				for range 20 {
					look()
				}
				before := ranFor(t, pg.PID())
				for range n {
					look()
					time.Sleep(pause)
				}
				cost[kind] = float64(ranFor(t, pg.PID())-before) / float64(n)
				t.Logf("%s, pause %v: %s: %.0f us", s.Name(), pause, kind, cost[kind])
				require.NoError(t, conn.Close(testContext(t)))
			}
			assert.Less(t, cost["brief"], cost["full, as a text"]/2)
			assert.Less(t, cost["glance"], cost["full, as a text"]/4)
			assert.Less(t, cost["glance"], cost["brief"])
			assert.Less(t, cost["full"], cost["full, as a text"])
		}
	}
}

// What a program's monitors cost every server: at rest, while it writes, and while there is no primary and it waits.
func TestWhatAProgramsMonitorsCostAServer(t *testing.T) {
	c := pgtest.Start(t, pgtest.Options{Standbys: 2})
	must(t, c, "create table log (id bigint)", "create role app login superuser")
	p := openPool(t, Options{Wait: operatorTime}, c.ConnString("user=app", "pool_max_conns=4"))
	waitUp(t, p)
	measure := func(what string) (most float64) {
		began, before := time.Now(), map[uint32]int64{}
		pids := map[*pgtest.Server][]uint32{}
		for _, s := range c.Standbys() {
			pids[s] = sessionsOn(t, s, "app")
			require.NotEmpty(t, pids[s])
			for _, pid := range pids[s] {
				before[pid] = ranFor(t, pid)
			}
		}
		time.Sleep(3 * time.Second)
		for _, s := range c.Standbys() {
			ran := int64(0)
			for _, pid := range pids[s] {
				ran += ranFor(t, pid) - before[pid]
			}
			share := float64(ran) / float64(time.Since(began).Microseconds()) * 100
			t.Logf("%s: %.3f %% of a core of %s", what, share, s.Name())
			most = max(most, share)
		}
		return most
	}
	measure("at rest")
	writers := gatherFor(operatorTime, 1, func(ctx context.Context) error {
		time.Sleep(20 * time.Millisecond)
		_, err := p.Exec(ctx, "insert into log values (1)")
		if errors.Is(err, ErrOutcomeUnknown) || errors.Is(err, ErrNoPrimary) {
			return nil
		}
		return err
	})
	writers.reach(t, 100)
	measure("while it writes")
	require.NoError(t, c.Primary().Kill())
	waitFor(t, "its fall", 10*time.Second, func() bool { return p.Status().Peers[0].Health == HealthDown })
	most := measure("without a primary")
	// A full look as a text every 20 ms was 3 % and more.
	assert.Less(t, most, 1.5)
	require.NoError(t, c.Standbys()[0].Promote())
	writers.turnOver(t)
	_, failed := writers.dismiss()
	assert.Empty(t, failed)
}

// Nothing is left in the program's own sessions by a look that borrows one.
func TestALookThatBorrowsLeavesNothingPrepared(t *testing.T) {
	t.Parallel()
	c := pgtest.Start(t, pgtest.Options{Standbys: 1})
	p := openPool(t, Options{NoMonitorConns: true, CheckInterval: 50 * time.Millisecond, MaxLag: Lag{Bytes: 1 << 40}},
		c.ConnString("pool_max_conns=1", "default_query_exec_mode=exec"))
	waitUp(t, p)
	for _, s := range c.Servers() {
		waitFor(t, "looks", 10*time.Second, func() bool {
			return count(t, c, "select count(*) from pg_stat_activity where query like '%wal_receiver%' and pid <> pg_backend_pid()") > 0
		})
		var left int
		require.NoError(t, p.QueryRow(WithPeer(testContext(t), s.Addr()), "select count(*) from pg_prepared_statements").Scan(&left))
		assert.Zero(t, left)
	}
}
