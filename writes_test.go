package multipool

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"

	"github.com/pgmultipool/multipool/internal/netfault"
	"github.com/pgmultipool/multipool/internal/pgtest"
)

// Every way to write, cut at every message of the protocol that it exchanges, by a relay, in both directions, before the
// message and after it, by FIN and by RST; and sessions that the server terminates, or statements that it cancels, under
// it, while it logs durations and statistics and delays its commits, as the seed draws. Every call appends ids of its own
// where nothing would refuse an id that comes twice; afterwards what callers were told is compared with what is there. The
// ways are listed here; their messages are found by watching them.
//
//	MULTIPOOL_APPENDS=100000 go test -v -timeout 30m -run TestWritesCut .
//	MULTIPOOL_APPENDS_SEED=7 go test -v -run TestWritesCut .
//
// Let the loop of attempt send lost writes again, and 45 of 5,000 ids are there twice; let mark mark nothing, and 47 are
// there that were reported as failed. TestTheLedgerOfWritesBites does both from outside, every time.

const (
	writersAtOnce  = 7
	writesDeadline = 20 * time.Second // of every call; nobody should come near it
)

var writesSchema = []string{
	"create table appended (id bigint)",
	"create table lists (key bigint, ids bigint[])",
	"insert into lists select k, '{}' from generate_series(0, 15) k",
	"create function append_one(v bigint) returns bigint language sql as 'insert into appended values (v) returning id'",
	"create procedure append_by_call(v bigint) language sql as 'insert into appended values (v)'",
	"create table checked (id bigint)",
	`create function check_even() returns trigger language plpgsql as $$
		begin if new.id % 2 = 1 then raise 'odd' using errcode = 'check_violation'; end if; return null; end $$`,
	`create constraint trigger even after insert on checked deferrable initially deferred
		for each row execute function check_even()`,
}

const allAppended = `select id, count(*) from
	(select id from appended union all select unnest(ids) from lists union all select id from checked) as every group by id`

// way is one way to write. do appends all of the ids or none, unless the way says otherwise.
type way struct {
	name     string
	ids      int  // that one call appends
	inside   bool // its errors are pgx's own: it has a transaction, or a connection of its own
	unmarked bool // ... and a write of unknown outcome does not say so: connections of Acquire
	checked  bool // at its commit, which every other id fails
	do       func(ctx context.Context, p *MultiPool, ids []int64) error
}

const (
	insertOne       = "insert into appended values ($1)"
	insertReturning = "insert into appended values ($1) returning id"
)

// scanOne runs a query for one id.
func scanOne(ctx context.Context, p *MultiPool, sql string, id int64) error {
	var got int64
	if err := p.QueryRow(ctx, sql, id).Scan(&got); err != nil || got == id {
		return err
	}
	return fmt.Errorf("asked for %d, got %d", id, got)
}

// readAll reads rows to their end.
func readAll(rows pgx.Rows, err error) error {
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		if err := rows.Scan(new(int64)); err != nil {
			return err
		}
	}
	return rows.Err()
}

// batched sends a batch of one insert per id and reads its results as read does, then closes it. The first error is what
// the caller goes by.
func batched(read func(pgx.BatchResults) error) func(context.Context, *MultiPool, []int64) error {
	return func(ctx context.Context, p *MultiPool, ids []int64) error {
		b := &pgx.Batch{}
		for _, id := range ids {
			b.Queue(insertReturning, id)
		}
		return closing(p.SendBatch(ctx, b), read)
	}
}

func closing(results pgx.BatchResults, read func(pgx.BatchResults) error) error {
	err := read(results)
	return cmp.Or(err, results.Close())
}

func nothing(pgx.BatchResults) error { return nil }

// inTx inserts the ids in a transaction.
func inTx(options pgx.TxOptions) func(context.Context, *MultiPool, []int64) error {
	return func(ctx context.Context, p *MultiPool, ids []int64) error {
		tx, err := p.BeginTx(ctx, options)
		if err != nil {
			return err
		}
		defer tx.Rollback(ctx)
		for _, id := range ids {
			if _, err := tx.Exec(ctx, insertOne, id); err != nil {
				return err
			}
		}
		return tx.Commit(ctx)
	}
}

// ways are the ways to write, each of which a pool in any of pgx's modes has.
var ways = []way{
	{name: "Exec, no arguments", ids: 1, do: func(ctx context.Context, p *MultiPool, ids []int64) error {
		_, err := p.Exec(ctx, fmt.Sprintf("insert into appended values (%d)", ids[0]))
		return err
	}},
	{name: "Exec, two statements", ids: 2, do: func(ctx context.Context, p *MultiPool, ids []int64) error {
		_, err := p.Exec(ctx, fmt.Sprintf("insert into appended values (%d); insert into appended values (%d)", ids[0], ids[1]))
		return err
	}},
	{name: "Exec", ids: 1, do: func(ctx context.Context, p *MultiPool, ids []int64) error {
		_, err := p.Exec(ctx, insertOne, ids[0])
		return err
	}},
	{name: "Exec, a list", ids: 1, do: func(ctx context.Context, p *MultiPool, ids []int64) error {
		_, err := p.Exec(ctx, "update lists set ids = ids || $1::bigint where key = $2", ids[0], ids[0]%16)
		return err
	}},
	{name: "Exec, CALL", ids: 1, do: func(ctx context.Context, p *MultiPool, ids []int64) error {
		_, err := p.Exec(ctx, "call append_by_call($1)", ids[0])
		return err
	}},
	{name: "Exec, checked at its commit", ids: 1, checked: true, do: func(ctx context.Context, p *MultiPool, ids []int64) error {
		_, err := p.Exec(ctx, "insert into checked values ($1)", ids[0])
		return err
	}},
	{name: "Exec, by the simple protocol", ids: 1, do: func(ctx context.Context, p *MultiPool, ids []int64) error {
		_, err := p.Exec(ctx, insertOne, pgx.QueryExecModeSimpleProtocol, ids[0])
		return err
	}},
	{name: "Query, no arguments", ids: 1, do: func(ctx context.Context, p *MultiPool, ids []int64) error {
		return readAll(p.Query(ctx, fmt.Sprintf("insert into appended values (%d) returning id", ids[0])))
	}},
	{name: "Query", ids: 1, do: func(ctx context.Context, p *MultiPool, ids []int64) error {
		return readAll(p.Query(ctx, insertReturning, ids[0]))
	}},
	{name: "Query, no rows", ids: 1, do: func(ctx context.Context, p *MultiPool, ids []int64) error {
		return readAll(p.Query(ctx, insertOne, ids[0]))
	}},
	{name: "Query, WITH", ids: 2, do: func(ctx context.Context, p *MultiPool, ids []int64) error {
		return readAll(p.Query(ctx, "with new as (insert into appended values ($1), ($2) returning id) select id from new", ids[0], ids[1]))
	}},
	{name: "Query, checked at its commit", ids: 1, checked: true, do: func(ctx context.Context, p *MultiPool, ids []int64) error {
		return readAll(p.Query(ctx, "insert into checked values ($1) returning id", ids[0]))
	}},
	{name: "QueryRow", ids: 1, do: func(ctx context.Context, p *MultiPool, ids []int64) error {
		return scanOne(ctx, p, insertReturning, ids[0])
	}},
	{name: "QueryRow, WithPrimary", ids: 1, do: func(ctx context.Context, p *MultiPool, ids []int64) error {
		return scanOne(WithPrimary(ctx), p, insertReturning, ids[0])
	}},
	{name: "QueryRow, WithPrimary, RetryReads", ids: 1, do: func(ctx context.Context, p *MultiPool, ids []int64) error {
		return scanOne(WithRoute(ctx, Route{Target: TargetPrimary, Retry: RetryReads}), p, insertReturning, ids[0])
	}},
	{name: "a function", ids: 1, do: func(ctx context.Context, p *MultiPool, ids []int64) error {
		return scanOne(ctx, p, "select append_one($1)", ids[0])
	}},
	{name: "a function, by a text that nobody knows", ids: 1, do: func(ctx context.Context, p *MultiPool, ids []int64) error {
		return scanOne(ctx, p, fmt.Sprintf("select append_one($1) -- %d", ids[0]), ids[0])
	}},
	{name: "a function, WithPrimary", ids: 1, do: func(ctx context.Context, p *MultiPool, ids []int64) error {
		return scanOne(WithPrimary(ctx), p, fmt.Sprintf("select append_one($1) -- %d", ids[0]), ids[0])
	}},
	{name: "Begin", ids: 1, inside: true, do: inTx(pgx.TxOptions{})},
	{name: "BeginTx", ids: 2, inside: true, do: inTx(pgx.TxOptions{IsoLevel: pgx.RepeatableRead, AccessMode: pgx.ReadWrite})},
	{name: "BeginFunc", ids: 1, inside: true, do: func(ctx context.Context, p *MultiPool, ids []int64) error {
		return pgx.BeginFunc(ctx, p, func(tx pgx.Tx) error {
			return tx.QueryRow(ctx, insertReturning, ids[0]).Scan(new(int64))
		})
	}},
	{name: "RunTx", ids: 1, do: func(ctx context.Context, p *MultiPool, ids []int64) error {
		return p.RunTx(ctx, pgx.TxOptions{}, func(tx pgx.Tx) error {
			_, err := tx.Exec(ctx, insertOne, ids[0])
			return err
		})
	}},
	{name: "SendBatch, Close", ids: 2, do: batched(nothing)},
	{name: "SendBatch, Exec", ids: 2, do: batched(func(r pgx.BatchResults) error {
		_, err := r.Exec()
		return err
	})},
	{name: "SendBatch, Query", ids: 2, do: batched(func(r pgx.BatchResults) error {
		return cmp.Or(readAll(r.Query()), readAll(r.Query()))
	})},
	{name: "SendBatch, QueryRow", ids: 2, do: batched(func(r pgx.BatchResults) error {
		return cmp.Or(r.QueryRow().Scan(new(int64)), r.QueryRow().Scan(new(int64)))
	})},
	{name: "SendBatch, callbacks", ids: 2, do: func(ctx context.Context, p *MultiPool, ids []int64) error {
		b := &pgx.Batch{}
		b.Queue(insertReturning, ids[0]).Query(func(rows pgx.Rows) error { return readAll(rows, nil) })
		b.Queue(insertOne, ids[1]).Exec(func(pgconn.CommandTag) error { return nil })
		return closing(p.SendBatch(ctx, b), nothing)
	}},
	{name: "SendBatch, BeginTx", ids: 1, inside: true, do: func(ctx context.Context, p *MultiPool, ids []int64) error {
		b := &pgx.Batch{}
		b.BeginTx(pgx.TxOptions{})
		b.Queue(insertOne, ids[0])
		results := p.SendBatch(ctx, b)
		tx := results.Tx()
		if tx != nil {
			defer tx.Rollback(ctx)
		}
		if err := results.Close(); err != nil {
			return err
		}
		return tx.Commit(ctx)
	}},
	{name: "CopyFrom", ids: 3, do: func(ctx context.Context, p *MultiPool, ids []int64) error {
		_, err := p.CopyFrom(ctx, pgx.Identifier{"appended"}, []string{"id"}, pgx.CopyFromSlice(len(ids), func(i int) ([]any, error) {
			return []any{ids[i]}, nil
		}))
		return err
	}},
	{name: "Acquire, Exec", ids: 1, inside: true, unmarked: true, do: func(ctx context.Context, p *MultiPool, ids []int64) error {
		return p.AcquireFunc(ctx, func(c *pgxpool.Conn) error {
			_, err := c.Exec(ctx, insertOne, ids[0])
			return err
		})
	}},
}

// waysWhere returns the ways that are wanted.
func waysWhere(want func(*way) bool) (all []*way) {
	for i := range ways {
		if want(&ways[i]) {
			all = append(all, &ways[i])
		}
	}
	return all
}

var execModes = []string{"cache_statement", "cache_describe", "describe_exec", "exec", "simple_protocol"}

// appendCall is one call, and what its caller was told.
type appendCall struct {
	way  *way
	mode string
	at   string // what was done to its connection, or to another of its round
	ids  []int64
	err  error
}

// appendLedger is what callers were told.
type appendLedger struct {
	mu    sync.Mutex
	last  int64
	calls []*appendCall
}

// issue returns n ids that nobody has.
func (l *appendLedger) issue(n int) []int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	ids := make([]int64, n)
	for i := range ids {
		l.last++
		ids[i] = l.last
	}
	return ids
}

// append makes one call and enters it.
func (l *appendLedger) append(ctx context.Context, p *MultiPool, w *way, at string) failedCall {
	ids := l.issue(w.ids)
	err := w.do(ctx, p, ids)
	l.enter(&appendCall{way: w, ids: ids, err: err, at: at})
	return failedCall{what: w.name, write: true, sentOnce: strings.HasPrefix(w.name, "SendBatch") || w.name == "CopyFrom", err: err}
}

func (l *appendLedger) enter(c *appendCall) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.calls = append(l.calls, c)
}

func (l *appendLedger) issued() int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.last
}

// appendTally is how many appends ended how.
type appendTally struct {
	Appends, Acknowledged, Unknown, UnknownApplied, Failed, Unmarked int
}

// verdicts are what a ledger says beside what is there.
type verdicts struct {
	appendTally
	byMode map[string]*appendTally

	lost, doubled, denied, torn []string // what must not be
}

func (v *verdicts) wrong() []string { return slices.Concat(v.lost, v.doubled, v.denied, v.torn) }

// compare judges every call by how often its ids are there.
func (l *appendLedger) compare(there map[int64]int) (v verdicts) {
	v.byMode = map[string]*appendTally{}
	for _, c := range l.calls {
		if v.byMode[c.mode] == nil {
			v.byMode[c.mode] = &appendTally{}
		}
		for _, id := range c.ids {
			v.appendTally.add(c, there[id])
			v.byMode[c.mode].add(c, there[id])
		}
		unknown := errors.Is(c.err, ErrOutcomeUnknown)
		for _, id := range c.ids {
			n := there[id]
			told := fmt.Sprintf("%d is there %d times: %s; %s: %v (%T)", id, n, c.way.name, c.at, c.err, c.err)
			switch {
			case n > 1:
				v.doubled = append(v.doubled, "doubled: "+told)
			case n == 0 && c.err == nil:
				v.lost = append(v.lost, "lost: "+told)
			case n == 1 && c.err != nil && !unknown && !c.way.unmarked:
				v.denied = append(v.denied, "applied, and denied: "+told)
			case n != there[c.ids[0]]:
				v.torn = append(v.torn, "in part: "+told)
			}
		}
	}
	return v
}

func (t *appendTally) add(c *appendCall, there int) {
	t.Appends++
	switch {
	case c.err == nil:
		t.Acknowledged++
	case c.way.unmarked:
		t.Unmarked++
	case errors.Is(c.err, ErrOutcomeUnknown):
		t.Unknown++
		t.UnknownApplied += there
	default:
		t.Failed++
	}
}

// moment is a message that a way exchanges: the nth of its type on a connection.
type moment struct {
	relay int // 0: the primary's
	side  netfault.Side
	typ   byte
	nth   int
}

// blow is what is done to a connection under a round of one way's calls.
type blow struct {
	mode string
	way  *way
	moment
	when netfault.When
	rst  bool
}

func (b *blow) String() string {
	s := fmt.Sprintf("%s, %s %s's %q %d", b.mode, [...]string{"before", "after"}[b.when], [...]string{"client", "server"}[b.side], b.typ, b.nth)
	if b.relay > 0 {
		s += ", at the replica"
	}
	if b.rst {
		s += ", RST"
	}
	return s
}

// writesStage is a primary and a replica behind relays, and a pool in each of pgx's modes.
type writesStage struct {
	t       *testing.T
	cluster *pgtest.Cluster
	admin   *pgx.Conn // to the primary, past the relay
	relays  []*netfault.Relay
	pools   map[string]*MultiPool
	ledger  appendLedger
	fired   map[byte]int // by the type of the message
	ended   int          // sessions that the server terminated
	stopped int          // statements that it cancelled
}

// logSettings are what makes a server do something between a command's tag and the end of its answer, or wait between a
// commit and its tag.
func logSettings(rng *rand.Rand) map[string]string {
	one := func(values ...string) string { return values[rng.IntN(len(values))] }
	s := map[string]string{
		"log_min_duration_statement":  one("-1", "0", "0", "5ms"),
		"log_duration":                one("on", "off"),
		"log_statement_stats":         one("on", "off"),
		"log_min_duration_sample":     one("-1", "0"),
		"log_statement_sample_rate":   "0.5",
		"log_transaction_sample_rate": one("0", "0", "0.5"),
		"log_min_messages":            one("warning", "warning", "warning", "debug5"),
		"commit_delay":                one("0", "1000", "10000"),
		"commit_siblings":             "0",
		"fsync":                       "on", // without it there is no delay
	}
	if s["log_statement_stats"] == "off" {
		s["log_executor_stats"] = one("on", "off")
	}
	return s
}

func newWritesStage(t *testing.T, settings map[string]string, modes ...string) *writesStage {
	t.Helper()
	b := &writesStage{
		t: t, cluster: pgtest.Start(t, pgtest.Options{Standbys: 1, Settings: settings}), pools: map[string]*MultiPool{}, fired: map[byte]int{},
	}
	must(t, b.cluster, writesSchema...)
	var err error
	b.admin, err = b.cluster.Primary().Conn(testContext(t))
	require.NoError(t, err)
	t.Cleanup(func() { b.admin.Close(context.Background()) })
	var peers []Peer
	for _, s := range b.cluster.Servers() {
		relay, err := netfault.Listen(s.Addr())
		require.NoError(t, err)
		t.Cleanup(func() { relay.Close() })
		b.relays = append(b.relays, relay)
		peers = append(peers, Peer{Name: s.Name(), Host: "127.0.0.1", Port: relay.Port()})
	}
	for _, mode := range modes {
		// No regular look comes in between: what is cut is a write, or the probe of a suspect.
		b.pools[mode] = openPool(t, Options{CheckInterval: time.Hour, Peers: peers}, b.cluster.ConnString("pool_max_conns=10",
			"application_name="+writerName, "default_query_exec_mode="+mode))
		waitUp(t, b.pools[mode])
	}
	return b
}

// call makes one call and enters it.
func (b *writesStage) call(w *way, mode, at string) error {
	ctx, cancel := context.WithTimeout(context.Background(), writesDeadline)
	defer cancel()
	c := &appendCall{way: w, mode: mode, at: at, ids: b.ledger.issue(w.ids)}
	c.err = w.do(ctx, b.pools[mode], c.ids)
	b.ledger.enter(c)
	return c.err
}

// moments finds the messages that a way exchanges, on a connection that knows no statements and on one that does.
func (b *writesStage) moments(w *way, mode string) []moment {
	found := map[moment]bool{}
	p := b.pools[mode]
	_ = b.call(w, mode, "nothing") // a text that a standby refuses is learned
	for _, peer := range p.peers() {
		peer.pool.Reset()
		require.NoError(b.t, p.Ping(WithPeer(testContext(b.t), peer.name)))
	}
	for range 2 {
		seen := map[moment]int{}
		var mu sync.Mutex
		for i, relay := range b.relays {
			for _, side := range []netfault.Side{netfault.Client, netfault.Server} {
				relay.Cut(netfault.Cut{From: side, Match: func(msg []byte) bool {
					mu.Lock()
					defer mu.Unlock()
					at := moment{relay: i, side: side, typ: msg[0]}
					seen[at]++
					at.nth = seen[at]
					found[at] = true
					return false
				}})
			}
		}
		_ = b.call(w, mode, "nothing") // what is checked at its commit fails
		for _, relay := range b.relays {
			relay.Disarm()
		}
	}
	return slices.SortedFunc(maps.Keys(found), func(x, y moment) int {
		return cmp.Or(cmp.Compare(x.relay, y.relay), cmp.Compare(x.side, y.side), cmp.Compare(x.typ, y.typ), cmp.Compare(x.nth, y.nth))
	})
}

// blows lists everything that can be done to every way in every mode.
func (b *writesStage) blows() (all []*blow) {
	for _, mode := range execModes {
		for i := range ways {
			for _, at := range b.moments(&ways[i], mode) {
				for _, when := range []netfault.When{netfault.Before, netfault.After} {
					for _, rst := range []bool{false, true} {
						all = append(all, &blow{mode, &ways[i], at, when, rst})
					}
				}
			}
		}
	}
	return all
}

// round makes calls of one way at once, one of which is to be hit, and reports whether one was.
func (b *writesStage) round(x *blow) bool {
	relay := b.relays[x.relay]
	before := relay.Fired()
	relay.Cut(netfault.Cut{From: x.side, Type: x.typ, Nth: x.nth, When: x.when, RST: x.rst})
	b.calls(x.way, x.mode, x.String()).Wait()
	if relay.Fired() > before { // counted before a caller can know of it
		b.fired[x.typ]++
		return true
	}
	relay.Disarm()
	return false
}

// The two ways in which a server is told to stop what a session does.
const (
	stopsSession   = "pg_terminate_backend"
	stopsStatement = "pg_cancel_backend"
)

// strike makes calls of one way at once and has the server end its sessions, or its statements, under them.
func (b *writesStage) strike(x *blow, how string) {
	done := make(chan struct{})
	callers := b.calls(x.way, x.mode, x.mode+", "+how)
	go func() { callers.Wait(); close(done) }()
	for {
		select {
		case <-done:
			return
		default:
			n := b.stop(how)
			if how == stopsSession {
				b.ended += n
			} else {
				b.stopped += n
			}
		}
	}
}

// stop has the server stop what writers do now, and returns how many it told.
func (b *writesStage) stop(how string) (n int) {
	sql := "select count(" + how + `(pid)) from pg_stat_activity where application_name = 'writer' and state = 'active'`
	require.NoError(b.t, b.admin.QueryRow(context.Background(), sql).Scan(&n))
	return n
}

// calls starts writersAtOnce calls of one way.
func (b *writesStage) calls(w *way, mode, at string) *sync.WaitGroup {
	var callers sync.WaitGroup
	for range writersAtOnce {
		callers.Go(func() { _ = b.call(w, mode, at) })
	}
	return &callers
}

// settle ends the pools and waits until the servers have ended what was cut off from them, then judges.
func (b *writesStage) settle() verdicts {
	for _, p := range b.pools {
		p.Close()
	}
	return b.ledger.compare(appendedAt(b.t, b.cluster.Primary()))
}

// writerName is the application_name of the pools whose writes are counted.
const writerName = "writer"

// appendedAt returns how often every id is there, once no session of a writer is left at the server.
func appendedAt(t testing.TB, s *pgtest.Server) map[int64]int {
	t.Helper()
	ctx := testContext(t)
	conn, err := s.Conn(ctx)
	require.NoError(t, err)
	defer conn.Close(context.Background())
	waitFor(t, "the sessions to end", 20*time.Second, func() bool {
		var n int
		require.NoError(t, conn.QueryRow(ctx, "select count(*) from pg_stat_activity where application_name = $1", writerName).Scan(&n))
		return n == 0
	})
	there := map[int64]int{}
	rows, err := conn.Query(ctx, allAppended)
	require.NoError(t, err)
	var id int64
	var n int
	_, err = pgx.ForEachRow(rows, []any{&id, &n}, func() error { there[id] = n; return nil })
	require.NoError(t, err)
	return there
}
func TestWritesCutAtEveryMessage(t *testing.T) {
	goal := map[bool]int{false: 5000, true: 2000}[raceEnabled]
	if testing.Short() {
		goal = 1000
	}
	if n, ok := envNumber(t, "MULTIPOOL_APPENDS"); ok {
		goal = n
	}
	seed, drawn := envNumber(t, "MULTIPOOL_APPENDS_SEED")
	rng := rand.New(rand.NewPCG(uint64(seed), 0))
	settings := logSettings(rng)
	if !drawn {
		settings["commit_delay"] = "1000" // one of those that are drawn, and quick
	}
	b := newWritesStage(t, settings, execModes...)
	begun := time.Now()
	blows := b.blows()
	rng.Shuffle(len(blows), func(i, j int) { blows[i], blows[j] = blows[j], blows[i] })
	rounds, missed := 0, 0
	for ; b.ledger.issued() < int64(goal); rounds++ {
		x := blows[rounds%len(blows)]
		hit := b.round(x)
		if !hit { // a message of a connection's first use, and none was new
			hit = b.round(x)
		}
		if !hit {
			missed++
		}
		switch rounds % 20 {
		case 9:
			b.strike(x, stopsStatement)
		case 19:
			b.strike(x, stopsSession)
		}
	}
	again := b.sentAgain()
	v := b.settle()
	t.Logf("%d appends: %d acknowledged, %d of unknown outcome (%d applied), %d failed, %d on connections of Acquire",
		v.Appends, v.Acknowledged, v.Unknown, v.UnknownApplied, v.Failed, v.Unmarked)
	t.Logf("%d blows, of which %d were tried; %d missed, %d cuts (%s), %d sessions terminated, %d statements cancelled; %v, seed %d, %v",
		len(blows), min(rounds, len(blows)), missed, b.relays[0].Fired()+b.relays[1].Fired(), histogram(b.fired), b.ended, b.stopped,
		time.Since(begun).Round(time.Second), seed, settings)
	for _, mode := range slices.Sorted(maps.Keys(v.byMode)) {
		m := v.byMode[mode]
		t.Logf("%-16s %6d appends: %5.2f %% of unknown outcome, %5.2f %% failed, %d calls sent again", mode, m.Appends,
			percent(m.Unknown, m.Appends), percent(m.Failed, m.Appends), again[mode])
	}
	if wrong := v.wrong(); len(wrong) > 0 {
		t.Errorf("%d lost, %d doubled, %d applied and denied, %d in part:\n%s", len(v.lost), len(v.doubled), len(v.denied), len(v.torn),
			strings.Join(wrong[:min(len(wrong), 40)], "\n"))
	}
	require.Less(t, missed, rounds/10+1, "what is not cut proves nothing")
	require.Positive(t, v.UnknownApplied)
	require.Greater(t, v.Unknown, v.UnknownApplied)
	require.Positive(t, b.ended)
	require.Positive(t, b.stopped)
}

func percent(n, of int) float64 { return 100 * float64(n) / float64(max(of, 1)) }

// sentAgain is how many attempts were not their call's first, by mode.
func (b *writesStage) sentAgain() map[string]int64 {
	again := map[string]int64{}
	for mode, p := range b.pools {
		for _, peer := range p.peers() {
			again[mode] += peer.picks.retries.Load()
		}
	}
	return again
}

func histogram(n map[byte]int) string {
	var parts []string
	for _, typ := range slices.Sorted(maps.Keys(n)) {
		parts = append(parts, fmt.Sprintf("%c %d", typ, n[typ]))
	}
	return strings.Join(parts, ", ")
}

// A program that breaks the rules is found by the same comparison: one that sends a write again whose outcome is unknown,
// and one that does not say that it is.
func TestTheLedgerOfWritesBites(t *testing.T) {
	insert := func(ctx context.Context, p *MultiPool, ids []int64) error {
		_, err := p.Exec(ctx, insertOne, ids[0])
		return err
	}
	for name, broken := range map[string]way{
		"doubled": {name: "sent again", ids: 1, do: func(ctx context.Context, p *MultiPool, ids []int64) error {
			err := insert(ctx, p, ids)
			if errors.Is(err, ErrOutcomeUnknown) {
				err = insert(ctx, p, ids)
			}
			return err
		}},
		"denied": {name: "not marked", ids: 1, do: func(ctx context.Context, p *MultiPool, ids []int64) error {
			err := insert(ctx, p, ids)
			if errors.Is(err, ErrOutcomeUnknown) {
				return errors.Unwrap(err)
			}
			return err
		}},
		"lost": {name: "not told", ids: 1, do: func(ctx context.Context, p *MultiPool, ids []int64) error {
			_ = insert(ctx, p, ids)
			return nil
		}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newWritesStage(t, nil, "cache_statement")
			for _, x := range []blow{
				{moment: moment{side: netfault.Client, typ: 'B', nth: 1}, when: netfault.Before},
				{moment: moment{side: netfault.Server, typ: 'C', nth: 1}, when: netfault.Before},
				{moment: moment{side: netfault.Server, typ: 'C', nth: 1}, when: netfault.After},
			} {
				x.mode, x.way = "cache_statement", &broken
				for range 5 {
					b.round(&x)
				}
			}
			v := b.settle()
			found := map[string][]string{"doubled": v.doubled, "denied": v.denied, "lost": v.lost}
			require.NotEmpty(t, found[name])
			require.Equal(t, found[name], v.wrong(), "and nothing else")
		})
	}
}
