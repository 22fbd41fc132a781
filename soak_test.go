package multipool

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/pgmultipool/multipool/internal/netfault"
	"github.com/pgmultipool/multipool/internal/pgtest"
)

// A soak: random faults of four servers and of the network in front of each, as a seed draws them, under every kind of
// call. A standby must confirm what is committed, so that nothing that was acknowledged may be missing in the end.
//
//	make soak                     # ten minutes
//	MULTIPOOL_SOAK=1h make soak
//	MULTIPOOL_SOAK_SEED=7 make soak
//
// What must hold:
//   - No read fails, except one of which the program had rows, and one that lost its connection on two servers which were
//     disturbed at once.
//   - No write fails, except what was under way while the primary was disturbed, which says that its outcome is unknown, and
//     what never had soakMargin of an undisturbed primary: by the test's own knowledge of the servers.
//   - What is done on a connection that the program holds, in a transaction, or through a pool of pgxpool's type fails only
//     while something is disturbed: its errors are pgx's own.
//   - Nothing is lost, doubled, denied or torn.
//   - When the pool is closed goroutines, descriptors and memory are what they were before it was opened.
//
// It waits for the machine, not the machine for it: the margin is what a server that answers may take to be found.

const (
	soakMargin  = 2 * time.Second
	soakServers = 4
)

// soak is one run.
type soak struct {
	t       *testing.T
	rng     *rand.Rand
	cluster *pgtest.Cluster
	relays  []*netfault.Relay
	pool    *MultiPool

	mu    sync.Mutex
	spans []soakSpan
}

// soakSpan is a disturbance of one server, or of its network.
type soakSpan struct {
	span
	at      int  // the server
	primary bool // it was the primary, or the one that was to be
}

// disturb notes a disturbance for as long as do takes.
func (k *soak) disturb(what string, s *pgtest.Server, do func() error) {
	x := soakSpan{span: span{what: what, from: time.Now()}, at: slices.Index(k.cluster.Servers(), s), primary: s == k.cluster.Primary()}
	err := do()
	x.to = time.Now()
	require.NoError(k.t, err, what)
	k.mu.Lock()
	defer k.mu.Unlock()
	k.spans = append(k.spans, x)
}

func (k *soak) pause(least, most time.Duration) {
	time.Sleep(least + time.Duration(k.rng.Int64N(int64(most-least))))
}

func (k *soak) server() *pgtest.Server { return k.cluster.Servers()[k.rng.IntN(soakServers)] }

// hard are the faults of a server that leave it what it was.
var hard = []struct {
	name string
	do   func(k *soak, s *pgtest.Server) error
}{
	{"kill -9, start", func(k *soak, s *pgtest.Server) error {
		err := s.Kill()
		k.pause(1, 3*time.Second)
		return cmp.Or(err, s.Start())
	}},
	{"freeze, thaw", func(k *soak, s *pgtest.Server) error {
		err := s.Freeze()
		k.pause(100*time.Millisecond, 3*time.Second)
		return cmp.Or(err, s.Thaw())
	}},
	{"restart, fast", func(k *soak, s *pgtest.Server) error { return s.Restart(pgtest.Fast) }},
	{"restart, immediate", func(k *soak, s *pgtest.Server) error { return s.Restart(pgtest.Immediate) }},
	{"a session killed", func(k *soak, s *pgtest.Server) error {
		return cmp.Or(s.KillBackend(), s.WaitReady(context.Background()))
	}},
}

// strike does one fault, and returns what it was.
func (k *soak) strike() string {
	switch n := k.rng.IntN(20); {
	case n < 8:
		s, b := k.server(), blips[k.rng.IntN(len(blips))]
		k.blip(s, b)
		return "network: " + b.name
	case n < 16:
		s, f := k.server(), hard[k.rng.IntN(len(hard))]
		who := "standby: "
		if s == k.cluster.Primary() {
			who = "primary: "
		}
		var beside sync.WaitGroup
		if k.rng.IntN(3) == 0 { // and the network of another, at once
			b, seed := blips[k.rng.IntN(len(blips))], k.rng.Uint64()
			other := k.cluster.Servers()[(slices.Index(k.cluster.Servers(), s)+1+k.rng.IntN(soakServers-1))%soakServers]
			beside.Go(func() { k.blipWith(other, b, rand.New(rand.NewPCG(seed, 0))) })
			who = "with a blip elsewhere, " + who
		}
		k.disturb(who+f.name, s, func() error { return f.do(k, s) })
		beside.Wait()
		return who + f.name
	case n < 18:
		k.replace("failover", func(old *pgtest.Server) error { return old.Kill() })
		return "kill -9 of the primary, promotion, rejoin"
	default:
		k.replace("switchover", func(old *pgtest.Server) error { return old.Stop(pgtest.Fast) })
		return "switchover, rejoin"
	}
}

func (k *soak) blip(s *pgtest.Server, b blip) { k.blipWith(s, b, k.rng) }

func (k *soak) blipWith(s *pgtest.Server, b blip, rng *rand.Rand) {
	at := slices.Index(k.cluster.Servers(), s)
	k.disturb("network: "+b.name, s, func() error {
		b.do(k.relays[at], time.Duration(10+rng.IntN(1990))*time.Millisecond, rng)
		return nil
	})
}

// replace ends the primary and promotes the standby that has received most, which has all that was confirmed; the others
// follow it.
func (k *soak) replace(what string, end func(*pgtest.Server) error) {
	old := k.cluster.Primary()
	var next *pgtest.Server
	k.disturb(what, old, func() error {
		if err := end(old); err != nil {
			return err
		}
		k.pause(1, time.Second)
		most := int64(-1)
		for _, s := range k.cluster.Standbys() {
			n, err := s.Int(context.Background(), `select pg_wal_lsn_diff(greatest(coalesce(pg_last_wal_receive_lsn(), '0/0'),
				coalesce(pg_last_wal_replay_lsn(), '0/0')), '0/0')::bigint`)
			if err != nil {
				return err
			}
			if n > most {
				next, most = s, n
			}
		}
		return next.Promote()
	})
	for _, s := range k.cluster.Servers() {
		if s != next {
			k.disturb(what+": to follow", s, func() error { return s.Follow(next) })
		}
	}
}

// met returns the servers whose disturbances a call met, and those in office.
func (k *soak) met(from, to time.Time, primary bool) (servers []int) {
	for _, s := range k.spans {
		s.to = s.to.Add(soakMargin / 2) // what was lost then may be found a moment later
		if s.meets(from, to) && (s.primary || !primary) && !slices.Contains(servers, s.at) {
			servers = append(servers, s.at)
		}
	}
	return servers
}

// calm returns the longest time within a call in which the primary was not disturbed.
func (k *soak) calm(from, to time.Time) (longest time.Duration) {
	at := from
	spans := slices.SortedFunc(slices.Values(k.spans), func(a, b soakSpan) int { return a.from.Compare(b.from) })
	for _, s := range spans {
		if !s.primary || !s.meets(from, to) {
			continue
		}
		longest = max(longest, s.from.Sub(at))
		if s.to.After(at) {
			at = s.to
		}
	}
	return max(longest, to.Sub(at))
}

// excuse says why a call may have failed; "" if it may not.
func (k *soak) excuse(c *failedCall) string {
	switch {
	case c.own && len(k.met(c.from, c.to, false)) > 0:
		return "pgx's own error, while something was disturbed"
	case c.own:
		return ""
	case !c.write && c.begun:
		return "half read"
	case !c.write && len(k.met(c.from, c.to, false)) > 1:
		return "a read that met two servers' disturbances"
	case !c.write:
		return ""
	case c.unknown() && len(k.met(c.from, c.to, true)) > 0:
		return "in flight: of unknown outcome"
	case errors.Is(c.err, ErrNoPrimary) && k.calm(c.from, c.to) < soakMargin:
		return "nobody to take it"
	case c.sentOnce && !c.unknown() && len(k.met(c.from, c.to, true)) > 0:
		return "in flight: not executed" // which the server's word proves, and the ledger
	}
	return ""
}

// write appends in any way that there is.
func (k *soak) write(h *hearers) func(context.Context, *rand.Rand) failedCall {
	through := way{name: "PrimaryPool().Exec", ids: 1, inside: true, unmarked: true, do: func(ctx context.Context, p *MultiPool, ids []int64) error {
		_, err := p.PrimaryPool().Exec(ctx, insertOne, ids[0])
		return err
	}}
	all := append(waysWhere(func(w *way) bool { return !w.checked }), &through) // every other one that is checked is refused
	return func(ctx context.Context, rng *rand.Rand) failedCall {
		w := all[rng.IntN(len(all))]
		c := h.ledger.append(ctx, k.pool, w, "soak")
		c.own = c.err != nil && w.inside && !c.unknown() && !errors.Is(c.err, ErrNoPrimary)
		return c
	}
}

// read reads through what gives pgx's own errors.
func (k *soak) read(ctx context.Context, rng *rand.Rand) (c failedCall) {
	const sql = "select body from items where id = $1"
	id, into := 1+rng.IntN(1000), new(string)
	names := k.pool.names()
	name := names[rng.IntN(len(names))]
	c.own = true
	switch rng.IntN(6) {
	case 0:
		c.what, c.own = "QueryRow, WithReplica", false
		c.err = k.pool.QueryRow(WithPreferReplica(ctx), sql, id).Scan(into)
	case 1:
		c.what = "QueryRow, WithPeer"
		c.err = k.pool.QueryRow(WithPeer(ctx, name), sql, id).Scan(into)
	case 2:
		c.what = "PeerPool"
		c.err = k.pool.PeerPool(name).QueryRow(ctx, sql, id).Scan(into)
	case 3:
		c.what = "Replicas()"
		c.err = k.pool.ReplicaPool().QueryRow(ctx, sql, id).Scan(into)
	case 4:
		c.what = "BeginTx, read only"
		c.err = pgx.BeginTxFunc(ctx, k.pool, pgx.TxOptions{AccessMode: pgx.ReadOnly}, func(tx pgx.Tx) error {
			return tx.QueryRow(ctx, sql, id).Scan(into)
		})
	default:
		c.what = "AcquireFunc, WithReplica"
		c.err = k.pool.AcquireFunc(WithPreferReplica(ctx), func(conn *pgxpool.Conn) error {
			return conn.QueryRow(ctx, sql, id).Scan(into)
		})
	}
	return c
}

// holdings is what a process has.
type holdings struct {
	goroutines, descriptors int
	memory                  uint64
}

func holdingsNow() (h holdings) {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	h.goroutines, h.memory = runtime.NumGoroutine(), m.HeapAlloc
	if all, err := os.ReadDir("/proc/self/fd"); err == nil {
		h.descriptors = len(all)
	}
	return h
}

func (h holdings) String() string {
	return fmt.Sprintf("%d goroutines, %d descriptors, %.1f MB", h.goroutines, h.descriptors, float64(h.memory)/1e6)
}

const memorySlack = 8 << 20

func TestSoak(t *testing.T) {
	total, given := envDuration(t, "MULTIPOOL_SOAK")
	if !given {
		t.Skip("MULTIPOOL_SOAK is not set: make soak")
	}
	k := &soak{t: t, rng: rand.New(rand.NewPCG(envSeed(t, "MULTIPOOL_SOAK_SEED"), 0))}
	k.cluster = pgtest.Start(t, pgtest.Options{Standbys: soakServers - 1, Settings: map[string]string{
		"synchronous_standby_names": "ANY 1 (node1, node2, node3, node4)", // whoever is the primary; none is its own standby
	}})
	must(t, k.cluster, append(slices.Clone(writesSchema), "create table items (id int primary key, body text)",
		"insert into items select n, 'item ' || n from generate_series(1, 1000) n")...)
	var connString string
	k.relays, connString = listenAll(t, k.cluster, "pool_max_conns=16&application_name="+writerName)

	before := holdingsNow()
	k.pool = openPool(t, Options{}, connString)
	waitUp(t, k.pool)
	h := newHearers()
	h.call(6, 20*time.Millisecond, h.reading(k.pool))
	h.call(4, 20*time.Millisecond, k.read)
	h.call(6, 30*time.Millisecond, k.write(h))
	made := map[string]int{}
	for end := time.Now().Add(total); time.Now().Before(end) && !t.Failed(); {
		made[k.strike()]++
		// The next fault meets a cluster that works, and callers that are served.
		require.NoError(t, k.cluster.WaitCaughtUp(context.Background()))
		goal := h.served.Load() + 100
		waitFor(t, "callers to be served", time.Minute, func() bool { return h.served.Load() >= goal })
		k.pause(1, 1500*time.Millisecond)
	}
	h.leave()
	k.pool.Close()
	v := h.ledger.compare(appendedAt(t, k.cluster.Primary()))

	excused := h.kinds(k.excuse)
	wrong := h.kinds(func(c *failedCall) string {
		if k.excuse(c) == "" {
			return c.String()
		}
		return ""
	})
	byCall := h.kinds(func(c *failedCall) string { return c.what + ": " + k.excuse(c) })
	t.Logf("%v of soaking, %d faults", total, sum(made))
	table(t, "faults", made)
	t.Logf("%d reads, %d writes; %d failed", h.reads.Load(), h.writes.Load(), len(h.failed))
	table(t, "failed, and why that is right", excused)
	table(t, "by kind of call", byCall)
	t.Logf("%d appends: %d acknowledged, %d of unknown outcome (%d applied), %d failed, %d on connections whose errors are pgx's own",
		v.Appends, v.Acknowledged, v.Unknown, v.UnknownApplied, v.Failed, v.Unmarked)
	assert.Empty(t, wrong)
	assert.Empty(t, v.wrong())

	h.ledger.calls, h.failed, v, k.spans = nil, nil, verdicts{}, nil
	var after holdings
	waitFor(t, "what the pool held", time.Minute, func() bool {
		after = holdingsNow()
		return after.goroutines <= before.goroutines && after.descriptors <= before.descriptors && after.memory <= before.memory+memorySlack
	})
	t.Logf("before: %v", before)
	t.Logf("after:  %v", after)
}

// table prints counts, the greatest first.
func table(t *testing.T, title string, counts map[string]int) {
	t.Helper()
	t.Logf("%s:", title)
	for _, name := range slices.SortedFunc(maps.Keys(counts), func(a, b string) int {
		return cmp.Or(cmp.Compare(counts[b], counts[a]), cmp.Compare(a, b))
	}) {
		t.Logf("  %7d  %s", counts[name], name)
	}
}
