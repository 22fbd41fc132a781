package proof

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/pgmultipool/multipool"
	"github.com/pgmultipool/multipool/internal/netfault"
	"github.com/pgmultipool/multipool/internal/pgtest"
)

// Runs of a seed each: callers append to a few lists and read them at the primary, through one pool, while servers are
// killed, promoted, frozen, restarted and cut off, and sessions terminated and cancelled. What the servers log of each
// statement is drawn too, because a server obeys a termination or a cancel when it has logged. Replication is synchronous,
// so that nothing that was acknowledged may be missing. A seed gives the same faults and the same calls in every caller's
// order; how they meet is not the seed's.
//
//	MULTIPOOL_PROOF_RUNS=20 go test -v -run TestRuns .
//	MULTIPOOL_PROOF_SEED=7 go test -v -run TestRuns .

const (
	keys     = 4
	callers  = 6
	deadline = 2 * time.Second // of every call: some end by it, where a standby that must confirm is frozen
)

// run is one run.
type run struct {
	t       *testing.T
	seed    uint64
	rng     *rand.Rand // the nemesis'
	setting setting
	cluster *pgtest.Cluster
	relays  []*netfault.Relay // of the servers, in their order
	pool    *multipool.MultiPool
	begun   time.Time

	told int64 // sessions and statements that were told to stop
	ids  atomic.Int64
	done atomic.Int64 // calls that succeeded
	stop chan struct{}

	mu    sync.Mutex
	calls []Call
	trace []string
}

// setting is what a seed draws once.
type setting struct {
	Quorum bool // any one standby confirms; otherwise all do, when they have applied
	Faults int
	Server map[string]string // what the servers log, and how long a commit takes
}

// serverSettings draws what servers log of a statement, each of which makes them obey a termination or a cancel between
// its tag and its end, and whether a commit takes long enough to be met by one.
func serverSettings(rng *rand.Rand) map[string]string {
	settings := map[string]string{}
	for _, group := range []map[string]string{
		{"log_min_duration_statement": "0"},
		{"log_duration": "on"},
		{"log_statement_stats": "on"},
		{"log_min_duration_sample": "0", "log_statement_sample_rate": "0.5"},
		{"commit_delay": strconv.Itoa(500 + rng.IntN(3000)), "commit_siblings": "0", "fsync": "on"}, // delayed only if synced
	} {
		if rng.IntN(2) == 0 {
			maps.Copy(settings, group)
		}
	}
	return settings
}

// caller is how a run's callers call; the plain one does what a program should.
type caller func(r *run, ctx context.Context, rng *rand.Rand, c *Call) error

func newRun(t *testing.T, seed uint64) *run {
	t.Helper()
	r := &run{t: t, seed: seed, rng: rand.New(rand.NewPCG(seed, 0)), begun: time.Now(), stop: make(chan struct{})}
	r.setting = setting{Quorum: r.rng.IntN(2) == 0, Faults: 6 + r.rng.IntN(5), Server: serverSettings(r.rng)}
	o := pgtest.Options{Standbys: 2, SyncApply: !r.setting.Quorum, Settings: maps.Clone(r.setting.Server)}
	if r.setting.Quorum {
		// Every server names all: which of them is the primary changes, and none is its own standby.
		o.Settings["synchronous_standby_names"] = "ANY 1 (node1, node2, node3)"
	}
	r.cluster = pgtest.Start(t, o)
	ctx := t.Context()
	for _, sql := range []string{
		"create table lists (key int primary key, ids bigint[] not null default '{}')",
		fmt.Sprintf("insert into lists select generate_series(0, %d)", keys-1),
	} {
		require.NoError(t, r.cluster.Primary().Exec(ctx, sql))
	}
	require.NoError(t, r.cluster.WaitCaughtUp(ctx))

	config := multipool.Options{}
	for _, s := range r.cluster.Servers() {
		relay, err := netfault.Listen(s.Addr())
		require.NoError(t, err)
		t.Cleanup(func() { relay.Close() })
		r.relays = append(r.relays, relay)
		config.Peers = append(config.Peers, multipool.Peer{Name: s.Name(), Host: "127.0.0.1", Port: relay.Port()})
	}
	var err error
	config.Config, err = multipool.ParseConfig(r.cluster.ConnString("pool_max_conns=8", "application_name=caller"))
	require.NoError(t, err)
	r.pool, err = multipool.Open(ctx, config)
	require.NoError(t, err)
	t.Cleanup(r.pool.Close)
	return r
}

func (r *run) note(format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.trace = append(r.trace, fmt.Sprintf("%8.4f ", time.Since(r.begun).Seconds())+fmt.Sprintf(format, args...))
}

// play lets callers call while nemesis does its work, and returns what they were told and the lists in the end.
func (r *run) play(call caller, nemesis func()) (calls []Call, final map[int][]int64) {
	var all sync.WaitGroup
	for i := range callers {
		all.Go(func() { r.keepCalling(rand.New(rand.NewPCG(r.seed, uint64(i+1))), call) })
	}
	stop := sync.OnceFunc(func() { close(r.stop); all.Wait() })
	defer stop()
	r.progress()
	nemesis()
	stop()
	return r.calls, r.end()
}

func (r *run) keepCalling(rng *rand.Rand, call caller) {
	for {
		select {
		case <-r.stop:
			return
		case <-time.After(time.Duration(1+rng.IntN(8)) * time.Millisecond): // a history of some thousand calls
		}
		c := Call{Key: rng.IntN(keys)}
		ctx, cancel := context.WithTimeout(context.Background(), deadline)
		c.Begun = time.Since(r.begun)
		c.Err = call(r, ctx, rng, &c)
		c.Ended = time.Since(r.begun)
		cancel()
		if c.Err == nil {
			r.done.Add(1)
		}
		r.mu.Lock()
		r.calls = append(r.calls, c)
		r.mu.Unlock()
	}
}

const (
	readList   = "select ids from lists where key = $1"
	appendList = "update lists set ids = ids || $1::bigint where key = $2"
)

// ways are the ways to append. Each is one statement, or a transaction that the program begins.
var ways = []string{
	"Exec", "QueryRow", "transaction", "batch", // by the extended protocol, except for COMMIT
	"Exec without arguments", "Exec, simple", "QueryRow, simple",
}

// plainly reads or appends as a program should.
func plainly(r *run, ctx context.Context, rng *rand.Rand, c *Call) error {
	c.Kind = "read"
	if rng.IntN(2) == 0 {
		c.ID, c.Kind = r.ids.Add(1), ways[rng.IntN(len(ways))]
	}
	return r.call(ctx, c)
}

// call reads, or appends in the way of the call's kind.
func (r *run) call(ctx context.Context, c *Call) (err error) {
	const simply = pgx.QueryExecModeSimpleProtocol
	switch c.Kind {
	case "read":
		err = r.pool.QueryRow(multipool.WithPrimary(ctx), readList, c.Key).Scan(&c.List)
		c.Seen = err == nil
	case "Exec":
		_, err = r.pool.Exec(ctx, appendList, c.ID, c.Key)
	case "Exec without arguments":
		_, err = r.pool.Exec(ctx, fmt.Sprintf("update lists set ids = ids || %d::bigint where key = %d", c.ID, c.Key))
	case "Exec, simple":
		_, err = r.pool.Exec(ctx, appendList, simply, c.ID, c.Key)
	case "QueryRow":
		err = r.pool.QueryRow(ctx, appendList+" returning ids", c.ID, c.Key).Scan(&c.List)
		c.Seen = err == nil
	case "QueryRow, simple":
		err = r.pool.QueryRow(ctx, appendList+" returning ids", simply, c.ID, c.Key).Scan(&c.List)
		c.Seen = err == nil
	case "transaction":
		err = pgx.BeginFunc(ctx, r.pool, func(tx pgx.Tx) error {
			if err := tx.QueryRow(ctx, readList+" for update", c.Key).Scan(&c.List); err != nil {
				return err
			}
			_, err := tx.Exec(ctx, appendList, c.ID, c.Key)
			return err
		})
		c.List = append(c.List, c.ID)
		c.Seen = err == nil
	case "batch":
		b := &pgx.Batch{}
		b.Queue("select 1")
		b.Queue(appendList, c.ID, c.Key)
		err = r.pool.SendBatch(ctx, b).Close()
	}
	return err
}

// progress waits until callers succeed again.
func (r *run) progress() {
	r.t.Helper()
	goal := r.done.Load() + 30
	// A pool that has failed to reach a server again and again leaves it alone for half a minute.
	for limit := time.Now().Add(90 * time.Second); r.done.Load() < goal; time.Sleep(2 * time.Millisecond) {
		require.True(r.t, time.Now().Before(limit), "nobody succeeds: %+v\n%s", r.pool.Status().Peers, r.history())
	}
}

// settle waits until the standbys have everything that anybody can have seen. The primary shows what the standbys have
// not confirmed in two cases that are PostgreSQL's, not the pool's: after a crash of its own, and where a caller's
// deadline, a cancel or a termination ends the wait for a standby. What is lost then had been seen.
func (r *run) settle() {
	r.t.Helper()
	require.NoError(r.t, r.cluster.WaitCaughtUp(r.t.Context()))
}

// faults are what the nemesis can do. Each leaves a cluster that works.
var faults = []struct {
	name string
	do   func(r *run) error
}{
	{"the primary is killed, a standby promoted", (*run).failover},
	{"the primary is killed, a standby promoted", (*run).failover},
	{"a switchover", (*run).switchover},
	{"the primary freezes", func(r *run) error { return r.freeze(r.cluster.Primary()) }},
	{"a standby freezes", func(r *run) error { return r.freeze(r.standby()) }},
	{"both standbys freeze", func(r *run) error { return r.freeze(r.cluster.Standbys()...) }},
	{"the primary is restarted, fast", func(r *run) error { return r.cluster.Primary().Restart(pgtest.Fast) }},
	{"the primary is restarted, immediately", func(r *run) error { return r.cluster.Primary().Restart(pgtest.Immediate) }},
	{"a standby is restarted", func(r *run) error { return r.standby().Restart(pgtest.Fast) }},
	{"a session of the primary is killed", (*run).crash},
	{"all connections are reset", func(r *run) error {
		for _, relay := range r.relays {
			relay.Reset()
		}
		return nil
	}},
	{"statements are cut", (*run).cut},
	{"sessions are terminated", func(r *run) error { return r.interrupt("pg_terminate_backend") }},
	{"statements are cancelled", func(r *run) error { return r.interrupt("pg_cancel_backend") }},
}

func (r *run) standby() *pgtest.Server {
	all := r.cluster.Standbys()
	return all[r.rng.IntN(len(all))]
}

func (r *run) pause(least, most time.Duration) {
	time.Sleep(least + time.Duration(r.rng.Int64N(int64(most-least))))
}

func (r *run) freeze(servers ...*pgtest.Server) error {
	for _, s := range servers {
		if err := s.Freeze(); err != nil {
			return err
		}
	}
	r.pause(100*time.Millisecond, 2500*time.Millisecond)
	for _, s := range servers {
		if err := s.Thaw(); err != nil {
			return err
		}
	}
	return nil
}

// crash makes the primary end all sessions and recover by itself.
func (r *run) crash() error {
	if err := r.cluster.Primary().KillBackend(); err != nil {
		return err
	}
	return r.cluster.Primary().WaitReady(r.t.Context())
}

// cut resets one statement in ten for a while, half of them before it arrives and half after.
func (r *run) cut() error {
	for i, relay := range r.relays {
		relay.CutProbability(0.1, r.seed+uint64(i))
	}
	r.pause(300*time.Millisecond, time.Second)
	for _, relay := range r.relays {
		relay.Disarm()
	}
	return nil
}

// interrupt has the primary tell every other one of the callers' statements under way to stop, again and again for a while,
// so that it meets them at every point.
func (r *run) interrupt(function string) error {
	ctx := r.t.Context()
	conn, err := r.cluster.Primary().Conn(ctx)
	if err != nil {
		return err
	}
	defer conn.Close(ctx)
	told := int64(0)
	for end := time.Now().Add(300*time.Millisecond + time.Duration(r.rng.IntN(700))*time.Millisecond); time.Now().Before(end); {
		tag, err := conn.Exec(ctx, "select "+function+`(pid) from pg_stat_activity
			where application_name = 'caller' and state = 'active' and query ~* 'lists|commit' and random() < 0.5`)
		if err != nil {
			return err
		}
		told += tag.RowsAffected()
		r.pause(1, 5*time.Millisecond)
	}
	r.note("  %d are told", told)
	r.told += told
	return nil
}

// failover kills all of the primary at once, so that nobody can be served by it any more.
func (r *run) failover() error {
	return r.replace(func(old *pgtest.Server) error { return old.Kill() })
}

// switchover stops the primary in order: its standbys have everything when it ends.
func (r *run) switchover() error {
	return r.replace(func(old *pgtest.Server) error { return old.Stop(pgtest.Fast) })
}

// replace ends the primary and promotes the standby that has received most, which is then known to have all that was
// confirmed; the others follow it.
func (r *run) replace(end func(*pgtest.Server) error) error {
	old := r.cluster.Primary()
	if err := end(old); err != nil {
		return err
	}
	r.pause(1, 400*time.Millisecond)
	next, err := r.foremost()
	if err != nil {
		return err
	}
	r.note("  %s follows %s", next.Name(), old.Name())
	if err := next.Promote(); err != nil {
		return err
	}
	for _, s := range r.cluster.Servers() {
		if s != next {
			if err := s.Follow(next); err != nil {
				return err
			}
		}
	}
	return nil
}

func (r *run) foremost() (best *pgtest.Server, err error) {
	const received = `select pg_wal_lsn_diff(greatest(coalesce(pg_last_wal_receive_lsn(), '0/0'),
		coalesce(pg_last_wal_replay_lsn(), '0/0')), '0/0')::bigint`
	most := int64(-1)
	for _, s := range r.cluster.Standbys() {
		n, err := s.Int(r.t.Context(), received)
		if err != nil {
			return nil, err
		}
		if n > most {
			best, most = s, n
		}
	}
	return best, nil
}

// nemesis does as many faults as the setting has, every to a cluster that works.
func (r *run) nemesis() {
	for range r.setting.Faults {
		r.settle()
		f := faults[r.rng.IntN(len(faults))]
		r.note("%s", f.name)
		require.NoError(r.t, f.do(r), "%s", r.history())
		r.note("  over")
		r.progress()
		r.pause(10*time.Millisecond, 200*time.Millisecond)
	}
	r.settle()
}

// end waits until no session of a caller is left and reads the lists.
func (r *run) end() map[int][]int64 {
	r.t.Helper()
	r.pool.Close()
	ctx := r.t.Context()
	conn, err := r.cluster.Primary().Conn(ctx)
	require.NoError(r.t, err)
	defer conn.Close(ctx)
	for limit := time.Now().Add(20 * time.Second); ; time.Sleep(2 * time.Millisecond) {
		var n int
		err := conn.QueryRow(ctx, "select count(*) from pg_stat_activity where application_name = 'caller'").Scan(&n)
		require.NoError(r.t, err)
		if n == 0 {
			break
		}
		require.True(r.t, time.Now().Before(limit), "%d sessions do not end", n)
	}
	final := map[int][]int64{}
	rows, err := conn.Query(ctx, "select key, ids from lists")
	require.NoError(r.t, err)
	var key int
	var ids []int64
	_, err = pgx.ForEachRow(rows, []any{&key, &ids}, func() error { final[key] = slices.Clone(ids); return nil })
	require.NoError(r.t, err)
	return final
}

func (r *run) history() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return strings.Join(r.trace, "\n")
}

// tally is what came of the calls of a run.
type tally struct{ Reads, ReadsFailed, Appends, Acknowledged, Unknown, UnknownDone, Failed int }

func tallyOf(calls []Call, final map[int][]int64) (n tally) {
	done := map[int64]bool{}
	for _, list := range final {
		for _, id := range list {
			done[id] = true
		}
	}
	for _, c := range calls {
		switch {
		case c.read():
			n.Reads++
			if c.Err != nil {
				n.ReadsFailed++
			}
			continue
		case c.Err == nil:
			n.Acknowledged++
		case c.unknown():
			n.Unknown++
			if done[c.ID] {
				n.UnknownDone++
			}
		default:
			n.Failed++
		}
		n.Appends++
	}
	return n
}

func (n *tally) add(m tally) {
	n.Reads += m.Reads
	n.ReadsFailed += m.ReadsFailed
	n.Appends += m.Appends
	n.Acknowledged += m.Acknowledged
	n.Unknown += m.Unknown
	n.UnknownDone += m.UnknownDone
	n.Failed += m.Failed
}

func envNumber(t *testing.T, name string, otherwise int) int {
	t.Helper()
	text := os.Getenv(name)
	if text == "" {
		return otherwise
	}
	n, err := strconv.Atoi(text)
	require.NoError(t, err, name)
	return n
}

func TestRunsAreLinearizable(t *testing.T) {
	first := envNumber(t, "MULTIPOOL_PROOF_SEED", 0)
	var sum tally
	happened := map[string]int{}
	var told int64
	for i := range envNumber(t, "MULTIPOOL_PROOF_RUNS", 2) {
		seed := uint64(first + i)
		t.Run(fmt.Sprintf("seed %d", seed), func(t *testing.T) {
			r := newRun(t, seed)
			calls, final := r.play(plainly, r.nemesis)
			n := tallyOf(calls, final)
			sum.add(n)
			told += r.told
			t.Logf("%+v: %+v, %.1f s\n%s", r.setting, n, time.Since(r.begun).Seconds(), r.history())
			for _, line := range r.trace {
				if _, name, _ := strings.Cut(strings.TrimSpace(line), " "); !strings.HasPrefix(name, " ") {
					happened[name]++
				}
			}
			for _, wrong := range Accounts(calls, final) {
				t.Error(wrong)
			}
			require.NoError(t, Linearizable(calls, final, patience))
		})
	}
	t.Logf("in all: %+v, %d told to stop", sum, told)
	for _, name := range slices.Sorted(maps.Keys(happened)) {
		t.Logf("%3d %s", happened[name], name)
	}
}

// A program that sends a write again whose outcome is unknown does some twice, and the checks find it in a run.
func TestAProgramThatSendsAgainIsCaught(t *testing.T) {
	r := newRun(t, 1)
	calls, final := r.play(func(r *run, ctx context.Context, rng *rand.Rand, c *Call) error {
		err := plainly(r, ctx, rng, c)
		if c.ID == 0 || !errors.Is(err, multipool.ErrOutcomeUnknown) {
			return err
		}
		c.Kind = "Exec"
		if r.call(ctx, c) == nil {
			return nil
		}
		return err
	}, func() {
		// About half of those that were sent again had been done. How many it takes is a matter of luck, and the more
		// statements are cut, the longer the pool leaves a server alone.
		const doubled = "select count(id) - count(distinct id) from lists, unnest(ids) id"
		for n := int64(0); n == 0; {
			require.NoError(t, r.cut())
			r.progress()
			var err error
			n, err = r.cluster.Primary().Int(t.Context(), doubled)
			require.NoError(t, err)
		}
	})
	t.Logf("%+v", tallyOf(calls, final))
	wrong := Accounts(calls, final)
	require.NotEmpty(t, wrong)
	for _, w := range wrong {
		require.Contains(t, w, "doubled")
	}
	require.ErrorContains(t, Linearizable(calls, final, patience), "not linearizable")
}

// A program that reads what it wrote on a replica reads the past, and the checks find it in a run.
func TestAProgramThatReadsOnReplicasIsCaught(t *testing.T) {
	r := newRun(t, 0)
	for _, s := range r.cluster.Servers() {
		require.NoError(t, s.Set(map[string]string{"synchronous_commit": "local"}))
	}
	late := r.cluster.Standbys()[0]
	require.NoError(t, late.DelayReplay(time.Hour))
	calls, final := r.play(func(r *run, ctx context.Context, rng *rand.Rand, c *Call) error {
		if rng.IntN(2) == 0 {
			return plainly(r, ctx, rng, c)
		}
		c.Kind = "read on a replica"
		err := r.pool.QueryRow(ctx, readList, c.Key).Scan(&c.List)
		c.Seen = err == nil
		return err
	}, func() {
		// The pool may not know of its replicas yet, and a read of what nobody has written is right.
		readThere := func() int64 {
			for _, p := range r.pool.Status().Peers {
				if p.Name == late.Name() {
					return p.Reads
				}
			}
			return 0
		}
		for limit := time.Now().Add(30 * time.Second); readThere() < 50; r.progress() {
			require.True(t, time.Now().Before(limit), "nobody reads on %s: %+v", late.Name(), r.pool.Status().Peers)
		}
	})
	require.Empty(t, Accounts(calls, final))
	require.ErrorContains(t, Linearizable(calls, final, patience), "not linearizable")
}
