package multipool

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/pgmultipool/multipool/internal/netfault"
	"github.com/pgmultipool/multipool/internal/pgfault"
	"github.com/pgmultipool/multipool/internal/pgtest"
)

// Blips of the network in front of each of three servers, one at a time, as a seed draws them: what is lost is what was in
// flight. No read fails, except one of which the program had rows already; no write, except one that was under way while
// the primary's network was disturbed, and that says that its outcome is unknown.
//
//	MULTIPOOL_BLIPS=5m go test -v -timeout 15m -run TestBlips .
//	MULTIPOOL_BLIPS_SEED=7 go test -v -run TestBlips .
//
// With MULTIPOOL_BLIPS two bare pgxpools over the same relays are asked the same beside it, for comparison.

const (
	blipsTime     = 8 * time.Second // without MULTIPOOL_BLIPS
	blipMost      = 2 * time.Second
	blipAfter     = 500 * time.Millisecond // until what was disturbed has been found to be, on a busy machine
	blipsDeadline = 20 * time.Second       // of every call: generous, so that what fails does so by the pool's own word
)

// blip is one disturbance of the network in front of a server, for a time.
type blip struct {
	name string
	do   func(r *netfault.Relay, d time.Duration, rng *rand.Rand)
}

func during(begin, end func(*netfault.Relay)) func(*netfault.Relay, time.Duration, *rand.Rand) {
	return func(r *netfault.Relay, d time.Duration, _ *rand.Rand) {
		begin(r)
		time.Sleep(d)
		end(r)
	}
}

var blips = []blip{
	{"resets", func(r *netfault.Relay, d time.Duration, rng *rand.Rand) {
		for end := time.Now().Add(d); time.Now().Before(end); time.Sleep(time.Duration(20+rng.IntN(400)) * time.Millisecond) {
			r.Reset()
		}
	}},
	{"refusals", during(func(r *netfault.Relay) { _ = r.Refuse(true) }, func(r *netfault.Relay) { _ = r.Refuse(false) })},
	{"resets and refusals", during(
		func(r *netfault.Relay) { _ = r.Refuse(true); r.Reset() }, func(r *netfault.Relay) { _ = r.Refuse(false) })},
	{"a freeze", during((*netfault.Relay).Freeze, (*netfault.Relay).Thaw)},
	{"a black hole", during((*netfault.Relay).Blackhole, (*netfault.Relay).Thaw)},
	{"delays", func(r *netfault.Relay, d time.Duration, rng *rand.Rand) {
		r.Delay(time.Duration(1+rng.IntN(700)) * time.Millisecond)
		time.Sleep(d)
		r.Delay(0)
	}},
	{"cuts", func(r *netfault.Relay, d time.Duration, rng *rand.Rand) {
		r.CutProbability(0.02+0.4*rng.Float64(), rng.Uint64())
		time.Sleep(d)
		r.Disarm()
	}},
}

// span is a time in which something was disturbed.
type span struct {
	what     string
	from, to time.Time
}

func (s span) meets(from, to time.Time) bool { return !to.Before(s.from) && !from.After(s.to) }

// hearers are callers of one pool, and what they were told.
type hearers struct {
	stop   chan struct{}
	wait   sync.WaitGroup
	ledger appendLedger
	reads  atomic.Int64
	writes atomic.Int64
	served atomic.Int64 // calls that have succeeded
	last   atomic.Int64 // ids of those that keep no ledger

	mu     sync.Mutex
	failed []failedCall
}

// failedCall is a call that failed.
type failedCall struct {
	what     string
	write    bool
	begun    bool // rows of it had come
	sentOnce bool // a batch or a copy, which is never sent again
	own      bool // its errors are pgx's own
	err      error
	from, to time.Time
}

func (h *failedCall) unknown() bool { return errors.Is(h.err, ErrOutcomeUnknown) }

func newHearers() *hearers { return &hearers{stop: make(chan struct{})} }

// call keeps n callers calling, each with pauses of up to the given one.
func (h *hearers) call(n int, pause time.Duration, one func(ctx context.Context, rng *rand.Rand) failedCall) {
	for range n {
		h.wait.Go(func() {
			rng := rand.New(rand.NewPCG(rand.Uint64(), rand.Uint64()))
			for {
				select {
				case <-h.stop:
					return
				case <-time.After(time.Duration(rng.Int64N(int64(pause)))):
				}
				ctx, cancel := context.WithTimeout(context.Background(), blipsDeadline)
				from := time.Now()
				c := one(ctx, rng)
				cancel()
				if c.write {
					h.writes.Add(1)
				} else {
					h.reads.Add(1)
				}
				if c.err == nil {
					h.served.Add(1)
					continue
				}
				c.from, c.to = from, time.Now()
				h.mu.Lock()
				h.failed = append(h.failed, c)
				h.mu.Unlock()
			}
		})
	}
}

// reading reads in one of three ways.
func (h *hearers) reading(q interface {
	Query(context.Context, string, ...any) (pgx.Rows, error)
	QueryRow(context.Context, string, ...any) pgx.Row
}) func(context.Context, *rand.Rand) failedCall {
	return func(ctx context.Context, rng *rand.Rand) (c failedCall) {
		id := 1 + rng.IntN(900)
		switch rng.IntN(3) {
		case 0:
			c.what = "QueryRow"
			c.err = q.QueryRow(ctx, "select body from items where id = $1", id).Scan(new(string))
			return c
		case 1:
			c.what = "Query, few rows"
		default:
			c.what = "Query, many rows"
		}
		n := map[string]int{"Query, few rows": 3, "Query, many rows": 100}[c.what]
		rows, err := q.Query(ctx, "select body from items where id between $1 and $2", id, id+n-1)
		if c.err = err; err != nil {
			return c
		}
		defer rows.Close()
		got := 0
		for rows.Next() {
			got++
		}
		if c.err = rows.Err(); c.err == nil && got != n {
			c.err = fmt.Errorf("%d rows instead of %d", got, n)
		}
		c.begun = got > 0
		return c
	}
}

// writing writes in one of the ways that mark what they do not know.
func (h *hearers) writing(p *MultiPool) func(context.Context, *rand.Rand) failedCall {
	marked := waysWhere(func(w *way) bool { return !w.inside && !w.checked })
	return func(ctx context.Context, rng *rand.Rand) failedCall {
		return h.ledger.append(ctx, p, marked[rng.IntN(len(marked))], "blips")
	}
}

// writingBarely writes on a bare pgxpool.
func (h *hearers) writingBarely(p interface {
	Exec(context.Context, string, ...any) (pgconn.CommandTag, error)
}) func(context.Context, *rand.Rand) failedCall {
	return func(ctx context.Context, _ *rand.Rand) failedCall {
		_, err := p.Exec(ctx, "insert into barely values ($1)", h.last.Add(1))
		return failedCall{what: "Exec", write: true, err: err}
	}
}

func (h *hearers) leave() {
	close(h.stop)
	h.wait.Wait()
}

// kinds counts what failed by a description.
func (h *hearers) kinds(of func(*failedCall) string) map[string]int {
	all := map[string]int{}
	for i := range h.failed {
		if kind := of(&h.failed[i]); kind != "" {
			all[kind]++
		}
	}
	return all
}

func (h *failedCall) String() string { return fmt.Sprintf("%s: %.300v", h.what, h.err) }

// listenAll puts a relay in front of every server, and returns them in the servers' order with a connection string.
func listenAll(t testing.TB, c *pgtest.Cluster, params string) (relays []*netfault.Relay, connString string) {
	t.Helper()
	hosts := ""
	for _, s := range c.Servers() {
		r, err := netfault.Listen(s.Addr())
		require.NoError(t, err)
		t.Cleanup(func() { r.Close() })
		relays = append(relays, r)
		if hosts != "" {
			hosts += ","
		}
		hosts += net.JoinHostPort("127.0.0.1", strconv.Itoa(int(r.Port())))
	}
	return relays, "postgres://postgres@" + hosts + "/postgres?sslmode=disable&" + params
}

func TestBlips(t *testing.T) {
	total, long := envDuration(t, "MULTIPOOL_BLIPS")
	if !long {
		total = blipsTime
	}
	rng := rand.New(rand.NewPCG(envSeed(t, "MULTIPOOL_BLIPS_SEED"), 0))
	cluster := pgtest.Start(t, pgtest.Options{Standbys: 2})
	must(t, cluster, append(slices.Clone(writesSchema), "create table barely (id bigint)", "create table items (id int primary key, body text)",
		"insert into items select n, 'item ' || n from generate_series(1, 1000) n")...)
	relays, connString := listenAll(t, cluster, "pool_max_conns=12")
	pool := openPool(t, Options{}, connString+"&application_name="+writerName)
	waitUp(t, pool)

	ours, bare := newHearers(), newHearers()
	ours.call(8, 20*time.Millisecond, ours.reading(pool))
	ours.call(4, 20*time.Millisecond, ours.writing(pool))
	if long {
		for attrs, call := range map[string]func(*pgxpool.Pool){
			"prefer-standby": func(p *pgxpool.Pool) { bare.call(8, 20*time.Millisecond, bare.reading(p)) },
			"read-write":     func(p *pgxpool.Pool) { bare.call(4, 20*time.Millisecond, bare.writingBarely(p)) },
		} {
			p, err := pgxpool.New(context.Background(), connString+"&target_session_attrs="+attrs)
			require.NoError(t, err)
			t.Cleanup(p.Close)
			call(p)
		}
	}

	var atPrimary []span
	made := map[string]int{}
	for end := time.Now().Add(total); time.Now().Before(end); {
		at := rng.IntN(len(relays))
		b := blips[rng.IntN(len(blips))]
		d := time.Duration(10+rng.IntN(int(blipMost/time.Millisecond)-10)) * time.Millisecond
		s := span{what: b.name, from: time.Now()}
		b.do(relays[at], d, rng)
		s.to = time.Now().Add(blipAfter)
		if at == 0 {
			atPrimary = append(atPrimary, s)
		}
		made[b.name]++
		time.Sleep(time.Duration(200+rng.IntN(1300)) * time.Millisecond) // a read that is sent again may end
	}
	ours.leave()
	if long {
		bare.leave()
	}

	half := ours.kinds(func(c *failedCall) string { return map[bool]string{true: "half read"}[!c.write && c.begun] })
	unknown := ours.kinds(func(c *failedCall) string { return map[bool]string{true: "of unknown outcome"}[c.write && c.unknown()] })
	wrong := ours.kinds(func(c *failedCall) string {
		inFlight := slices.ContainsFunc(atPrimary, func(s span) bool { return s.meets(c.from, c.to) })
		switch {
		case !c.write && !c.begun:
			return "a read: " + c.String()
		case c.write && !(inFlight && (c.unknown() || c.sentOnce && pgfault.NeverSent(c.err))):
			return "a write: " + c.String()
		}
		return ""
	})
	t.Logf("%d blips: %v", sum(made), made)
	t.Logf("%d reads, %d of them failed half read; %d writes, %d of unknown outcome", ours.reads.Load(), sum(half), ours.writes.Load(), sum(unknown))
	assert.Empty(t, wrong)
	if long {
		reads := bare.kinds(func(c *failedCall) string { return map[bool]string{true: "read"}[!c.write && !c.begun] })
		writes := bare.kinds(func(c *failedCall) string { return map[bool]string{true: "write"}[c.write] })
		t.Logf("beside them, on bare pgxpool: %d reads, %d failed; %d writes, %d failed", bare.reads.Load(), sum(reads), bare.writes.Load(), sum(writes))
	}
	pool.Close()
	v := ours.ledger.compare(appendedAt(t, cluster.Primary()))
	assert.Empty(t, v.wrong())
}

// A batch is never sent again, so it is not sent on a connection that is lost already, however short it was idle.
func TestABatchIsNotSentOnALostConnection(t *testing.T) {
	cluster := pgtest.Start(t, pgtest.Options{Standbys: 1})
	must(t, cluster, "create table appended (id bigint)")
	relays, connString := listenAll(t, cluster, "pool_max_conns=4")
	config, err := ParseConfig(connString)
	require.NoError(t, err)
	config.ShouldPing = func(context.Context, pgxpool.ShouldPingParams) bool { return false }
	pool := openConfig(t, Options{}, config)
	waitUp(t, pool)
	ctx := testContext(t)
	for range 5 {
		conn, err := pool.Acquire(ctx)
		require.NoError(t, err)
		w := wireOf(conn.Conn())
		conn.Release()
		relays[0].Reset()
		waitFor(t, "the connection to be lost", 10*time.Second, func() bool {
			s := w.main.Load()
			var e eye // another: the wire's is used by whoever uses the connection
			e.open(s.Conn)
			return e.look() >= glimpsePending
		})
		batch := &pgx.Batch{}
		batch.Queue("insert into appended values (1)")
		require.NoError(t, pool.SendBatch(ctx, batch).Close())
		_, err = pool.CopyFrom(ctx, pgx.Identifier{"appended"}, []string{"id"}, pgx.CopyFromRows([][]any{{2}}))
		require.NoError(t, err)
	}
}
