package multipool

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/pgmultipool/multipool/internal/pgfake"
	"github.com/pgmultipool/multipool/internal/pgfault"
)

// A machine draws faults at random from a seed and lets them loose on a real pool of in-memory peers, under callers of
// every kind; what must hold of any run is checked. A seed gives the same commands at the same virtual times; how the
// goroutines of one instant take turns is not the seed's, so that a failure may need several runs of its seed to come
// again. What a failure prints is the trace of the failed run.
//
//	MULTIPOOL_MACHINE_RUNS=5000 go test -run TestMachine .
//	MULTIPOOL_MACHINE_SEED=17 MULTIPOOL_MACHINE_RUNS=100 go test -v -run TestMachine .

func TestMachineOfRandomFaults(t *testing.T) {
	runs := map[bool]int{false: 200, true: 12}[raceEnabled]
	if testing.Short() {
		runs /= 5
	}
	first, replay := envNumber(t, "MULTIPOOL_MACHINE_SEED")
	if replay {
		runs = 1
	}
	if n, ok := envNumber(t, "MULTIPOOL_MACHINE_RUNS"); ok {
		runs = n
	}
	var sum machineTallies
	failed := 0
	for i := range runs {
		seed := first
		if !replay {
			seed += i
		}
		m := newMachine(uint64(seed))
		m.play(t)
		sum.add(m)
		if len(m.failures) > 0 {
			t.Errorf("seed %d (%+v):\n%s\n%s", seed, m.machineSetting, strings.Join(m.failures, "\n"), m.history())
			if failed++; failed == 3 {
				break
			}
		} else if replay && runs == 1 {
			t.Logf("seed %d (%+v):\n%s", seed, m.machineSetting, m.history())
		}
	}
	t.Logf("%+v", sum)
}

// machineTallies are what the machines have done, so that a log shows whether they did anything.
type machineTallies struct {
	Runs, Commands, Reads, FailedReads, Writes, FailedWrites, Unknown, Applied int

	Answers, Late     int // errors given to writes, and those of them that came after the tag
	NeedlesslyUnknown int // of unknown outcome, and the table of docs/outcomes.md says that they were not executed

	Trips             int64
	Attempts, Sent    int           // the most of any call
	LongestUnaffected time.Duration // the longest call of a kind that no fault may fail
}

func (s *machineTallies) add(m *machine) {
	s.Runs++
	s.Commands += m.sum.Commands
	s.Reads += m.sum.Reads
	s.FailedReads += m.sum.FailedReads
	s.Writes += m.sum.Writes
	s.FailedWrites += m.sum.FailedWrites
	s.Unknown += m.sum.Unknown
	s.Applied += len(m.applied)
	s.Answers += m.sum.Answers
	s.Late += m.sum.Late
	s.NeedlesslyUnknown += m.sum.NeedlesslyUnknown
	s.Trips += m.sum.Trips
	s.Attempts = max(s.Attempts, m.sum.Attempts)
	s.Sent = max(s.Sent, m.sum.Sent)
	s.LongestUnaffected = max(s.LongestUnaffected, m.sum.LongestUnaffected)
}

const (
	machineDeadline = 5 * time.Second // of every call
	machineReplicas = 3
	// A call may be handed to a connection once, and again as often as maxResent says.
	machineSent = 1 + maxResent
	// Attempts in which nothing was sent have no number of their own: every change of the topology lets a call that waits
	// try all peers again. Where a server refuses dials and answers the monitor's session, faultSample such faults open a
	// breaker, and every peer may have to be opened so.
	machineAttempts = 100
	// What a run takes at most in real time; it is some tens of milliseconds where nothing is wrong.
	machineRealTime = time.Minute
	// What any statement takes at least, so that a command may come in its midst.
	machineStatementTime = 300 * time.Microsecond
)

// machineSetting is what a seed draws once.
type machineSetting struct {
	safeReplica bool // the last replica has no faults: no read may fail
	safePrimary bool // the primary has no faults: no write may fail
	cold        bool // callers and faults begin with the pool
	shared      bool // monitors have no connections of their own
	awake       bool // the primary never hangs
	conns       int32
	length      time.Duration
}

type machine struct {
	machineSetting
	seed  uint64
	x     *fakes
	began time.Time
	fakes []*faultyPeer // the primary first

	ids      atomic.Int64
	stopping atomic.Bool

	mu       sync.Mutex
	trace    []string
	failures []string
	applied  map[int64]int              // how often an insert took effect
	excused  map[int64]bool             // reads whose connection was cut after their rows
	batched  map[int64]bool             // the inserts of a batch, and whether it is one of two
	claims   map[string]pgfault.Outcome // what the table says of a statement that was answered with this message
	xacts    xacts
	live     map[*machineCall]context.CancelFunc // calls that a command may cancel
	writes   []*machineCall                      // all that have ended
	sum      machineTallies
}

// faultyPeer is a fake with the faults that a Handler makes.
type faultyPeer struct {
	*pgfake.Peer
	name     string
	replica  bool
	hung     bool         // the driver's
	delay    atomic.Int64 // of every statement
	severed  atomic.Int64 // counts the ends of all connections: what was running then is not done
	mu       sync.Mutex
	cuts     []pgfake.Cut // of the next statements
	refusals int          // of the next statements: conflicts on a replica, constraints on the primary
	answers  []answer     // of the next writes
}

// machineCall is one call, found through its context by the hook and the tracer.
type machineCall struct {
	kind      string
	id        int64
	read      bool
	begun     time.Time
	held      bool // it has a connection, so that its statements go where that is
	attempts  int
	sent      int
	way       []string
	cancelled atomic.Bool
	err       error
	excused   bool  // a row had been handed out
	settles   bool  // it asks what became of its transaction, and may begin another
	copied    bool  // by copy, not insert
	more      int64 // the second id of a batch
}

type machineCallKey struct{}

func newMachine(seed uint64) *machine {
	return &machine{
		seed: seed, applied: map[int64]int{}, excused: map[int64]bool{}, batched: map[int64]bool{}, claims: map[string]pgfault.Outcome{},
		live: map[*machineCall]context.CancelFunc{},
	}
}

// generator gives each of the goroutines of a run its own generator, so that their turns do not matter.
func (m *machine) generator(who int) *rand.Rand { return rand.New(rand.NewPCG(m.seed, uint64(who))) }

func (m *machine) note(format string, args ...any) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.trace = append(m.trace, fmt.Sprintf("%9.4f ", time.Since(m.began).Seconds())+fmt.Sprintf(format, args...))
}

func (m *machine) fail(format string, args ...any) {
	m.mu.Lock()
	defer m.mu.Unlock()
	text := fmt.Sprintf("%9.4f ", time.Since(m.began).Seconds()) + fmt.Sprintf(format, args...)
	m.trace = append(m.trace, text+"   <=== FAILURE")
	if len(m.failures) < 10 {
		m.failures = append(m.failures, text)
	}
}

func (m *machine) history() string { return strings.Join(m.trace, "\n") }

// play makes one run. A bubble whose goroutines are stuck panics: that is a failure of this seed like any other.
func (m *machine) play(t *testing.T) {
	t.Helper()
	defer func() {
		if stuck := recover(); stuck != nil {
			m.failures = append(m.failures, fmt.Sprint(stuck))
		}
	}()
	// Out of the bubble, where time passes however busy the run is: a loop without a pause never lets virtual time go on.
	watchdog := time.AfterFunc(machineRealTime, func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		panic(fmt.Sprintf("seed %d (%+v) has made no end in %v of real time: something spins, or waits at a mutex\n%s",
			m.seed, m.machineSetting, machineRealTime, m.history()))
	})
	defer watchdog.Stop()
	rng := m.generator(0)
	m.machineSetting = machineSetting{
		safeReplica: rng.IntN(2) == 0, safePrimary: rng.IntN(3) == 0, cold: rng.IntN(4) == 0, shared: rng.IntN(4) == 0, awake: rng.IntN(2) == 0,
		conns: []int32{4, 5, 10}[rng.IntN(3)], length: time.Duration(20+rng.IntN(41)) * time.Second,
	}
	bubble(t, machineReplicas, m.configure, func(_ context.Context, x *fakes) { m.run(x, rng) })
}

func (m *machine) configure(c *Options) {
	m.began = time.Now()
	c.NoMonitorConns = m.shared
	c.Balancer = []Balancer{nil, nil, RoundRobin(), Nearest()}[m.seed%4]
	c.Config.MaxConns = m.conns
	c.Config.ConnConfig.Tracer = m
	c.Hooks = &Hooks{Routed: m.routed, PeerChanged: func(e PeerEvent) {
		m.note("  %s: %s %s -> %s %s (slow %v; %v)", e.Peer, e.FromRole, e.From, e.Role, e.To, e.Slow, e.Cause)
	}}
}

func (m *machine) run(x *fakes, rng *rand.Rand) {
	m.x = x
	for i, p := range append([]*pgfake.Peer{x.primary}, x.replicas...) {
		f := &faultyPeer{Peer: p, name: "primary", replica: i > 0}
		if f.replica {
			f.name = fmt.Sprintf("replica%d", i)
		}
		p.Handle(m.handler(f))
		m.fakes = append(m.fakes, f)
	}
	if !m.cold {
		time.Sleep(2 * time.Second)
	}
	ended := make(chan struct{})
	callers := 0
	for range 10 {
		callers++
		go m.caller(callers, 3000, m.read, ended)
	}
	for range 5 {
		callers++
		go m.caller(callers, 2000, m.write, ended)
	}
	callers++
	go m.caller(callers, 1000, m.hold, ended)

	m.drive(rng)
	for _, f := range m.fakes {
		m.heal(f)
	}
	time.Sleep(time.Duration(rng.IntN(3000)) * time.Millisecond)
	m.stopping.Store(true)
	patience := time.After(2 * time.Minute)
	for range callers {
		select {
		case <-ended:
		case <-patience:
			m.fail("a caller does not end")
			return
		}
	}
	m.note("calls have ended")
	time.Sleep(time.Minute)
	m.restored()
	m.accounts()
}

// handler makes the faults of statements, and counts what takes effect.
func (m *machine) handler(f *faultyPeer) pgfake.Handler {
	looks := answering(nil)
	return func(s pgfake.Statement) *pgfake.Response {
		severed := f.severed.Load()
		if !strings.HasPrefix(s.SQL, "copy") {
			time.Sleep(machineStatementTime + time.Duration(f.delay.Load()))
		}
		gone := f.severed.Load() != severed
		switch {
		case gone && s.Preparing:
			return &pgfake.Response{Err: &pgfake.Error{Severity: "FATAL", Code: "42601"}} // nothing of the flight is done
		case asksLook(s):
			return looks(s)
		case gone:
			return &pgfake.Response{Cut: pgfake.CutBeforeExecute} // a server rolls back what it had begun
		}
		if r := m.xacts.answer(s); r != nil || s.Preparing {
			return r
		}
		id, insert := statementID(s)
		r := f.fault(s, id)
		m.mu.Lock()
		defer m.mu.Unlock()
		two, batch := m.batched[id]
		if r == nil {
			r = m.answer(f, s, batch)
		}
		if r.Cut == pgfake.CutAfterAnswer && two {
			r.Cut = pgfake.CutBeforeAnswer // the fake would say ReadyForQuery in the midst of a batch
		}
		switch {
		case insert:
			r.Ended = func(committed bool) {
				m.mu.Lock()
				defer m.mu.Unlock()
				if committed {
					m.applied[id]++
				}
			}
		case r.Cut == pgfake.CutBeforeTag && (!s.Standby || strings.Contains(s.SQL, "generate_series")):
			m.excused[id] = true
		}
		return r
	}
}

// answer gives a write the next error that its protocol allows, and notes what may be claimed of it.
func (m *machine) answer(f *faultyPeer, s pgfake.Statement, batch bool) *pgfake.Response {
	commit, copies := s.SQL == "commit", strings.HasPrefix(s.SQL, "copy")
	if s.Standby || !commit && !copies && !strings.HasPrefix(s.SQL, "insert") {
		return &pgfake.Response{}
	}
	a, ok := f.nextAnswer(s.Simple || s.InTx)
	if !ok {
		return &pgfake.Response{}
	}
	m.sum.Answers++
	if a.tagged {
		m.sum.Late++
	}
	message := fmt.Sprintf("answer %d, %s", m.sum.Answers, a)
	switch {
	case s.InTx && !commit: // pgx's own, never marked
	case copies && a.err.Severity == "FATAL":
		m.claims[message] = pgfault.Unknown // pgx drops a copy's tag with the connection
	default:
		m.claims[message] = a.claim(s.Simple, batch)
	}
	return a.response(message)
}

// nextAnswer takes the next error. What a commit at Sync raises, and what comes after it, is for statements of the extended
// protocol outside of transactions.
func (f *faultyPeer) nextAnswer(simply bool) (answer, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for i, a := range f.answers {
		if !simply || !a.atSync() {
			f.answers = slices.Delete(f.answers, i, i+1)
			return a, true
		}
	}
	return answer{}, false
}

// machineAnswers are drawn from.
var machineAnswers = slices.Concat(beforeTag, afterTag, afterTag, beforeSync, afterCommit)

// fault is what is to become of the next statement of a program's.
func (f *faultyPeer) fault(s pgfake.Statement, id int64) *pgfake.Response {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case id == 0 && s.SQL != "commit": // BEGIN and its like
	case f.refusals > 0 && id != 0:
		f.refusals--
		if f.replica {
			return &pgfake.Response{Err: &pgfake.Error{
				Code: "40001", Routine: "ProcessInterrupts", Message: "canceling statement due to conflict with recovery",
			}}
		}
		return &pgfake.Response{Err: &pgfake.Error{Code: "23505", Message: "duplicate key value violates unique constraint"}}
	case len(f.cuts) > 0:
		cut := f.cuts[0]
		f.cuts = f.cuts[1:]
		return &pgfake.Response{Cut: cut}
	}
	return nil
}

// statementID finds the number that makes every statement unique: an argument, or the last number of the text.
func statementID(s pgfake.Statement) (id int64, insert bool) {
	insert = strings.HasPrefix(s.SQL, "insert")
	if len(s.Args) > 0 {
		id, _ = strconv.ParseInt(string(s.Args[0]), 10, 64)
		return id, insert
	}
	if !insert && !strings.HasPrefix(s.SQL, "select") {
		return 0, false
	}
	end := strings.LastIndexAny(s.SQL, "0123456789") + 1
	begin := end
	for begin > 0 && s.SQL[begin-1] >= '0' && s.SQL[begin-1] <= '9' {
		begin--
	}
	id, _ = strconv.ParseInt(s.SQL[begin:end], 10, 64)
	return id, insert
}

// drive gives commands until the time is over.
func (m *machine) drive(rng *rand.Rand) {
	targets := m.fakes
	if m.safeReplica {
		targets = targets[:len(targets)-1]
	}
	if m.safePrimary {
		targets = targets[1:]
	}
	for time.Since(m.began) < m.length {
		m.command(rng, targets[rng.IntN(len(targets))])
		m.sum.Commands++
		pause := []time.Duration{0, time.Millisecond, 20 * time.Millisecond, 300 * time.Millisecond, time.Second, 4 * time.Second}
		if d := pause[rng.IntN(len(pause))]; d > 0 {
			time.Sleep(d + time.Duration(rng.Int64N(int64(d))))
		}
	}
}

func (m *machine) command(rng *rand.Rand, f *faultyPeer) {
	switch n := rng.IntN(36); n {
	case 0, 1:
		m.note("%s dies", f.name)
		f.severed.Add(1)
		f.Die()
		f.hung = false
	case 2, 3:
		if f.hung {
			break // it would say goodbye only when it has answered what it has done
		}
		// Nothing else runs now: the fake's farewell would overtake answers, a server's does not.
		synctest.Wait()
		m.note("%s is shut down", f.name)
		f.severed.Add(1)
		f.Shutdown()
		f.severed.Add(1)
	case 4, 5, 6:
		m.note("%s is revived", f.name)
		f.Revive()
	case 7, 8:
		if m.awake && !f.replica {
			break
		}
		m.note("%s hangs", f.name)
		f.Hang()
		f.hung = true
	case 9:
		if m.awake && !f.replica {
			break
		}
		m.note("%s is isolated", f.name)
		f.Isolate()
		f.hung = true
	case 10, 11, 12:
		m.note("%s thaws", f.name)
		f.Thaw()
		f.hung = false
	case 13:
		m.note("%s refuses dials", f.name)
		f.Refuse(nil)
	case 14:
		m.note("%s accepts dials", f.name)
		f.Accept()
	case 15:
		code := []string{"57P03", "57P03", "53300"}[rng.IntN(3)]
		m.note("%s answers startups with %s", f.name, code)
		f.StartupError(code)
	case 16:
		m.note("%s answers startups", f.name)
		f.StartupError("")
	case 17:
		m.note("%s cuts its connections", f.name)
		f.severed.Add(1)
		f.CutConns()
	case 18:
		m.note("%s resets its connections", f.name)
		f.severed.Add(1)
		f.ResetConns()
	case 19, 20, 21:
		cut := pgfake.Cut(1 + rng.IntN(4))
		m.note("%s cuts at the next statement: %d", f.name, cut)
		f.mu.Lock()
		f.cuts = append(f.cuts, cut)
		f.mu.Unlock()
	case 22, 23:
		d := []time.Duration{0, 2 * time.Millisecond, 50 * time.Millisecond, 400 * time.Millisecond, 700 * time.Millisecond, 2 * time.Second}[rng.IntN(6)]
		m.note("%s takes %v a statement", f.name, d)
		f.delay.Store(int64(d))
	case 24, 25:
		k := 1 + rng.IntN(3)
		m.note("%s refuses %d statements", f.name, k)
		f.mu.Lock()
		f.refusals += k
		f.mu.Unlock()
	case 26:
		m.cancel(rng.IntN(2) == 0)
	case 30, 31, 32, 33, 34, 35:
		if f.replica {
			break
		}
		f.mu.Lock()
		for range 1 + rng.IntN(8) {
			f.answers = append(f.answers, machineAnswers[rng.IntN(len(machineAnswers))])
		}
		m.note("%s answers writes: %v", f.name, f.answers)
		f.mu.Unlock()
	default:
		m.heal(f)
	}
}

func (m *machine) heal(f *faultyPeer) {
	m.note("%s is healed", f.name)
	f.mu.Lock()
	f.cuts, f.refusals, f.answers = nil, 0, nil
	f.mu.Unlock()
	f.delay.Store(0)
	f.StartupError("")
	f.Accept()
	f.Thaw()
	f.Revive()
	f.hung = false
}

// cancel ends the contexts of the calls in progress, or of those that an even number was drawn for.
func (m *machine) cancel(all bool) {
	m.mu.Lock()
	var cancels []context.CancelFunc
	for c, cancel := range m.live {
		if all || c.id%2 == 0 {
			c.cancelled.Store(true)
			cancels = append(cancels, cancel)
		}
	}
	m.mu.Unlock()
	m.note("%d calls are cancelled", len(cancels))
	for _, cancel := range cancels {
		cancel()
	}
}

// caller makes calls with pauses between them.
func (m *machine) caller(who, pause int, call func(context.Context, *rand.Rand, *machineCall), ended chan<- struct{}) {
	defer func() { ended <- struct{}{} }()
	rng := m.generator(who)
	for !m.stopping.Load() {
		c := &machineCall{id: m.ids.Add(1), begun: time.Now()}
		ctx, cancel := context.WithTimeout(context.WithValue(context.Background(), machineCallKey{}, c), machineDeadline)
		m.mu.Lock()
		m.live[c] = cancel
		m.mu.Unlock()
		call(ctx, rng, c)
		cancel()
		m.judge(c)
		// Half of the pauses are short, so that connections are met hot.
		if d := rng.IntN(pause); rng.IntN(2) == 0 {
			time.Sleep(time.Duration(d) * time.Millisecond)
		} else {
			time.Sleep(time.Duration(d) * time.Microsecond * 20)
		}
	}
}

// read makes a read of some kind; every answer names its question.
func (m *machine) read(ctx context.Context, rng *rand.Rand, c *machineCall) {
	c.read = true
	p := m.x.pool
	var got int64
	switch rng.IntN(6) {
	case 0, 1:
		c.kind = "read"
		c.err = p.QueryRow(ctx, fmt.Sprintf("select %d", c.id)).Scan(&got)
	case 2:
		c.kind = "read simply"
		c.err = p.QueryRow(ctx, fmt.Sprintf("select %d", c.id), pgx.QueryExecModeSimpleProtocol).Scan(&got)
	case 3, 4:
		c.kind = "read with an argument"
		c.err = p.QueryRow(ctx, "select $1::int8", c.id).Scan(&got)
	default:
		c.kind = "read of rows"
		if k := m.series(ctx, c, 400, func() {}); c.err == nil && k != 400 {
			m.fail("%v: %d rows", c, k)
		}
		return
	}
	if c.err == nil && got != c.id {
		m.fail("%v: answered %d", c, got)
	}
}

// series reads the first n rows of 400.
func (m *machine) series(ctx context.Context, c *machineCall, n int, between func()) (k int) {
	rows, err := m.x.pool.Query(ctx, fmt.Sprintf("select * from generate_series(1, 400) /* %d */", c.id))
	if err != nil {
		c.err = err
		rows.Close()
		return 0
	}
	attempts := 0
	for k < n && rows.Next() {
		var id int
		if err := rows.Scan(&id, nil); err != nil {
			m.fail("%v: %v", c, err)
		}
		if k++; k == 1 {
			c.excused, c.held, attempts = true, true, c.attempts
		}
		if id != k {
			m.fail("%v: row %d is %d", c, k, id)
		}
	}
	between()
	rows.Close()
	c.err = rows.Err()
	if k > 0 && c.attempts != attempts {
		m.fail("%v: sent again behind its first row", c)
	}
	return k
}

// write makes a write of some kind.
func (m *machine) write(ctx context.Context, rng *rand.Rand, c *machineCall) {
	p := m.x.pool
	literal := fmt.Sprintf("insert into t values (%d)", c.id)
	const argument = "insert into t values ($1::int8)"
	kinds := 11
	if m.safePrimary || m.awake {
		// A copy that waits for its server holds a mutex in pgconn, at which the time of a bubble stops: copies are made
		// only where the server never keeps them waiting.
		kinds = 12
	}
	switch rng.IntN(kinds) {
	case 0:
		c.kind = "exec"
		_, c.err = p.Exec(ctx, literal)
	case 1:
		c.kind = "exec with an argument"
		_, c.err = p.Exec(ctx, argument, c.id)
	case 2:
		c.kind = "exec simply"
		_, c.err = p.Exec(ctx, literal, pgx.QueryExecModeSimpleProtocol)
	case 3:
		c.kind = "exec without preparing"
		_, c.err = p.Exec(ctx, argument, pgx.QueryExecModeExec, c.id)
	case 4:
		c.kind = "query that inserts"
		rows, err := p.Query(ctx, literal+" returning v")
		if c.err = err; err == nil {
			for rows.Next() {
				continue
			}
			c.err = rows.Err()
		}
	case 5:
		c.kind = "row that inserts"
		c.err = p.QueryRow(ctx, argument+" returning v", c.id).Scan(new(int))
	case 6, 7:
		c.kind = "transaction"
		m.transact(ctx, rng, c)
	case 8, 9:
		c.kind, c.settles = "RunTx", true
		c.err = p.RunTx(ctx, pgx.TxOptions{}, func(tx pgx.Tx) error {
			c.held = true
			_, err := tx.Exec(ctx, literal)
			return err
		})
	case 10:
		c.kind = "batch"
		b := &pgx.Batch{}
		b.Queue(literal)
		two := rng.IntN(2) == 0
		if two {
			c.more = m.ids.Add(1)
			b.Queue(argument, c.more)
		}
		m.mu.Lock()
		m.batched[c.id] = two
		if two {
			m.batched[c.more] = two
		}
		m.mu.Unlock()
		c.err = p.SendBatch(ctx, b).Close()
	default:
		c.kind, c.copied = "copy", true
		_, c.err = p.CopyFrom(ctx, pgx.Identifier{fmt.Sprintf("c%d", c.id)}, []string{"v"}, pgx.CopyFromRows([][]any{{int32(1)}, {int32(2)}}))
	}
}

func (m *machine) transact(ctx context.Context, rng *rand.Rand, c *machineCall) {
	tx, err := m.x.pool.Begin(ctx)
	if err != nil {
		c.err = err
		return
	}
	c.held = true
	if _, c.err = tx.Exec(ctx, fmt.Sprintf("insert into t values (%d)", c.id)); c.err != nil {
		_ = tx.Rollback(ctx)
		return
	}
	if rng.IntN(3) == 0 {
		time.Sleep(time.Duration(rng.IntN(200)) * time.Millisecond)
	}
	c.err = tx.Commit(ctx)
}

// hold takes a connection and keeps it. Nothing is promised to who does.
func (m *machine) hold(ctx context.Context, rng *rand.Rand, c *machineCall) {
	p := m.x.pool
	pause := func() { time.Sleep(time.Duration(rng.IntN(2000)) * time.Millisecond) }
	c.excused = true
	if rng.IntN(2) == 0 {
		ctx = WithPreferReplica(ctx)
	}
	switch rng.IntN(3) {
	case 0:
		c.kind, c.read = "held connection", true
		conn, err := p.Acquire(ctx)
		if err != nil {
			c.err = err
			return
		}
		defer conn.Release()
		c.held = true
		pause()
		c.err = conn.QueryRow(ctx, fmt.Sprintf("select %d", c.id)).Scan(new(int))
		pause()
	case 1:
		c.kind, c.read = "held rows", true
		m.series(ctx, c, rng.IntN(100), pause)
	default:
		c.kind, c.read = "read-only transaction", true
		tx, err := p.BeginTx(ctx, pgx.TxOptions{AccessMode: pgx.ReadOnly})
		if err != nil {
			c.err = err
			return
		}
		c.held = true
		pause()
		c.err = tx.QueryRow(ctx, fmt.Sprintf("select %d", c.id)).Scan(new(int))
		pause()
		_ = tx.Rollback(ctx)
	}
}

func (c *machineCall) String() string {
	return fmt.Sprintf("%s %d (begun %s ago, %s)", c.kind, c.id, time.Since(c.begun), strings.Join(c.way, ", "))
}

// judge looks at a call that has ended.
func (m *machine) judge(c *machineCall) {
	took := time.Since(c.begun)
	if took > machineDeadline+time.Second && !strings.HasPrefix(c.kind, "held") && !c.excused {
		m.fail("%v: outlived its deadline", c)
	}
	if c.sent > machineSent && !c.held {
		m.fail("%v: sent %d times", c, c.sent)
	}
	if c.attempts > machineAttempts && !c.settles {
		m.fail("%v: %d attempts", c, c.attempts)
	}
	m.mu.Lock()
	delete(m.live, c)
	poisonous := c.read && c.sent >= 2 && c.err != nil && lostConnection(c.err) // it may be what crashes its servers
	excused := c.excused || m.excused[c.id] || c.cancelled.Load() || poisonous
	unaffected := !excused && (c.read && m.safeReplica || !c.read && m.safePrimary)
	m.sum.Attempts = max(m.sum.Attempts, c.attempts)
	if !c.held {
		m.sum.Sent = max(m.sum.Sent, c.sent)
	}
	if unaffected {
		m.sum.LongestUnaffected = max(m.sum.LongestUnaffected, took)
	}
	failed := 0
	if c.err != nil {
		failed = 1
	}
	if c.read {
		m.sum.Reads++
		m.sum.FailedReads += failed
	} else {
		m.sum.Writes++
		m.sum.FailedWrites += failed
		if errors.Is(c.err, ErrOutcomeUnknown) {
			m.sum.Unknown++
		}
		m.writes = append(m.writes, c)
	}
	needlessly, silently := m.compare(c)
	m.mu.Unlock()
	if needlessly {
		m.fail("%v: of unknown outcome, while it is certain that it was not executed: %v", c, c.err)
	}
	if silently {
		m.fail("%v: may be executed, and the error does not say so: %v", c, c.err)
	}
	switch {
	case c.err == nil:
	case unaffected:
		m.fail("%v: no peer that it needs has had a fault, yet %v\n%s", c, c.err, m.state())
	default:
		m.note("    %v: %v", c, c.err)
	}
}

// lostConnection reports an error of a connection itself.
func lostConnection(err error) bool {
	var netErr net.Error // a syscall.Errno is one, too
	lost := []error{errPeerDown, pgconn.ErrConnClosed, io.EOF, io.ErrUnexpectedEOF, net.ErrClosed}
	return errors.As(err, &netErr) || slices.ContainsFunc(lost, func(e error) bool { return errors.Is(err, e) })
}

// compare holds the error of a write that was answered against the table of docs/outcomes.md.
func (m *machine) compare(c *machineCall) (needlessly, silently bool) {
	var answered *pgconn.PgError
	if !errors.As(c.err, &answered) {
		return false, false
	}
	claim, ok := m.claims[answered.Message]
	if !ok {
		return false, false
	}
	unknown := errors.Is(c.err, ErrOutcomeUnknown)
	if needlessly = unknown && claim != pgfault.Unknown; needlessly {
		m.sum.NeedlesslyUnknown++
	}
	return needlessly, !unknown && claim == pgfault.Unknown
}

// state is what the peers carry, for a failure's text.
func (m *machine) state() string {
	var b strings.Builder
	for _, q := range m.x.pool.peers() {
		stat := q.pool.Stat()
		fmt.Fprintf(&b, "            %s: %v, in flight %d, connections %d (%d acquired, %d idle, %d being made), dials %d, guests %d;",
			q.name, Health(q.health.Load()), q.load.out.Load(), stat.TotalConns(), stat.AcquiredConns(), stat.IdleConns(),
			stat.ConstructingConns(), len(q.dials), len(q.guests))
		q.sockets.wires(func(w *wire) {
			fmt.Fprintf(&b, " [use %v seq %d out %v]", w.use.state(), w.seq.Load(), w.out.Load())
		})
		b.WriteString("\n")
	}
	return b.String()
}

// routed is the hook, on the caller's goroutine.
func (m *machine) routed(ctx context.Context, d Decision) {
	c, _ := ctx.Value(machineCallKey{}).(*machineCall)
	if c == nil {
		return
	}
	c.attempts++
	if len(c.way) < 20 {
		c.way = append(c.way, fmt.Sprintf("%.4f %s %s", time.Since(m.began).Seconds(), d.Peer, d.Reason))
	}
	for _, q := range m.x.pool.peers() {
		if q.name == d.Peer && isOpen(q) {
			m.fail("%v: routed to a peer whose breaker has been open for %v", c, q.breaker.openFor())
		}
	}
	if d.Reason == ReasonNoReplica && d.Attempt == 1 && m.safeReplica && !m.cold {
		m.fail("%v: to the primary, while a replica serves", c)
	}
}

// isOpen reports whether the breaker has been open for longer than this instant: between its opening and the topology
// without the peer no virtual time passes.
func isOpen(q *peer) bool {
	if q.breaker.closed() || q.breaker.openFor() == 0 {
		return false
	}
	q.breaker.circuit.Counts() // after whoever is opening it
	return !q.breaker.closed() && q.breaker.openFor() > 0
}

// sends is called when a statement begins.
func (m *machine) sends(ctx context.Context, conn *pgx.Conn) context.Context {
	c, _ := ctx.Value(machineCallKey{}).(*machineCall)
	if c == nil {
		return ctx
	}
	c.sent++
	if q := wireOf(conn).peer; !c.held && isOpen(q) {
		m.fail("%v: sent to %s, whose breaker has been open for %v", c, q.name, q.breaker.openFor())
	}
	return ctx
}

func (m *machine) TraceQueryStart(ctx context.Context, conn *pgx.Conn, _ pgx.TraceQueryStartData) context.Context {
	return m.sends(ctx, conn)
}
func (m *machine) TraceQueryEnd(context.Context, *pgx.Conn, pgx.TraceQueryEndData) {}

func (m *machine) TraceBatchStart(ctx context.Context, conn *pgx.Conn, _ pgx.TraceBatchStartData) context.Context {
	return m.sends(ctx, conn)
}
func (m *machine) TraceBatchQuery(context.Context, *pgx.Conn, pgx.TraceBatchQueryData) {}
func (m *machine) TraceBatchEnd(context.Context, *pgx.Conn, pgx.TraceBatchEndData)     {}

func (m *machine) TraceCopyFromStart(ctx context.Context, conn *pgx.Conn, _ pgx.TraceCopyFromStartData) context.Context {
	return m.sends(ctx, conn)
}
func (m *machine) TraceCopyFromEnd(context.Context, *pgx.Conn, pgx.TraceCopyFromEndData) {}

// restored checks that the pool is what it was before the faults: nothing is lost, nothing is kept.
func (m *machine) restored() {
	var wrong []string
	for range 20 { // a look may be under way
		if wrong = m.leftovers(); len(wrong) == 0 {
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	for _, w := range wrong {
		m.fail("a minute after the last fault: %s", w)
	}
	ctx, cancel := context.WithTimeout(context.Background(), machineDeadline)
	defer cancel()
	for range 30 {
		c := &machineCall{kind: "last read", id: m.ids.Add(1), read: true, begun: time.Now()}
		ctx := context.WithValue(ctx, machineCallKey{}, c)
		if err := m.x.pool.QueryRow(ctx, "select $1::int8", c.id).Scan(new(int64)); err != nil {
			m.fail("%v: %v", c, err)
		}
		if c.attempts != 1 || !strings.Contains(c.way[0], "replica") {
			m.fail("%v: not by one attempt on a replica", c)
		}
	}
	for range 5 {
		c := &machineCall{kind: "last write", id: m.ids.Add(1), begun: time.Now()}
		_, c.err = m.x.pool.Exec(context.WithValue(ctx, machineCallKey{}, c), "insert into t values ($1::int8)", c.id)
		if c.err != nil || c.attempts != 1 {
			m.fail("%v: %v", c, c.err)
		}
		m.writes = append(m.writes, c)
	}
	for i, q := range m.x.pool.peers() {
		trips := q.breaker.trips.Load()
		m.sum.Trips += trips
		if safe := i == 0 && m.safePrimary || i == machineReplicas && m.safeReplica; safe && trips > 0 {
			m.fail("%s: has had no fault, and its breaker has opened %d times", q.name, trips)
		}
	}
}

func (m *machine) leftovers() (wrong []string) {
	synctest.Wait()
	add := func(format string, args ...any) { wrong = append(wrong, fmt.Sprintf(format, args...)) }
	pool := m.x.pool
	status := pool.Status()
	if status.Waiting != 0 {
		add("%d calls wait", status.Waiting)
	}
	for i, q := range pool.peers() {
		ps := status.Peers[i]
		if ps.Health != HealthUp || ps.Breaker != BreakerClosed || ps.Slow || !ps.Serves {
			add("%s: %s, breaker %s, slow %v, serves %v", q.name, ps.Health, ps.Breaker, ps.Slow, ps.Serves)
		}
		if want := map[bool]Role{true: RolePrimary, false: RoleReplica}[i == 0]; ps.Role != want {
			add("%s: is a %s", q.name, ps.Role)
		}
		if n := q.pool.Stat().AcquiredConns(); n != 0 {
			add("%s: %d connections are acquired", q.name, n)
		}
		if n := q.pool.Stat().ConstructingConns(); n != 0 {
			add("%s: %d connections are being made", q.name, n)
		}
		if n := q.load.out.Load(); n != 0 {
			add("%s: %d calls are in flight", q.name, n)
		}
		if total, sockets := int(q.pool.Stat().TotalConns()), q.sockets.len(); total != sockets {
			add("%s: %d connections, %d sockets", q.name, total, sockets)
		}
		if n := len(q.guests); n != 0 {
			add("%s: %d guests", q.name, n)
		}
		if n := len(q.dials); n != 0 {
			add("%s: %d dials", q.name, n)
		}
		if q.suspected.Load() || q.doubted.Load() || q.era.Load().Err() != nil || q.sockets.refuses() {
			add("%s: suspected %v, doubted %v, fallen %v, shut %v", q.name, q.suspected.Load(), q.doubted.Load(), q.era.Load().Err() != nil, q.sockets.refuses())
		}
		if share := q.load.share.Load(); share != fullShare {
			add("%s: its share is %d of %d", q.name, share, fullShare)
		}
		q.sockets.wires(func(w *wire) {
			if use, seq := w.use.state(), w.seq.Load(); use != connIdle || seq&1 == 1 || w.out.Load()&outAll != 0 || w.dialling {
				add("%s: a connection at rest: use %d, seq %d, out %v, dialling %v", q.name, use, seq, w.out.Load(), w.dialling)
			}
		})
	}
	for _, f := range m.fakes {
		if n, q := f.Conns(), m.x.pool.PeerPool(f.name+":5432"); n > int(q.Stat().TotalConns())+1 {
			add("%s: serves %d connections, the pool has %d", f.name, n, q.Stat().TotalConns())
		}
	}
	return wrong
}

// accounts checks every write's outcome against what took effect.
func (m *machine) accounts() {
	m.mu.Lock()
	writes := m.writes
	m.mu.Unlock()
	for _, c := range writes {
		n := m.effect(c, c.id)
		ids := []int{n}
		if c.more != 0 {
			ids = append(ids, m.effect(c, c.more))
		}
		for _, n := range ids {
			unknown := errors.Is(c.err, ErrOutcomeUnknown)
			switch {
			case n > 1:
				m.fail("%v: done %d times (%v)", c, n, c.err)
			case c.err == nil && n != 1:
				m.fail("%v: not done, and no error", c)
			case c.err != nil && !unknown && n != 0:
				m.fail("%v: done, and the error does not say that it may be: %v (%T)", c, c.err, c.err)
			}
		}
	}
}

func (m *machine) effect(c *machineCall, id int64) (n int) {
	if !c.copied {
		m.mu.Lock()
		defer m.mu.Unlock()
		return m.applied[id]
	}
	for _, f := range m.fakes {
		n += f.Applied(fmt.Sprintf(`copy "c%d" ( "v" ) from stdin binary`, id))
	}
	return n
}
