package multipool

import (
	"cmp"
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
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
	"github.com/pgmultipool/multipool/internal/pgtest"
)

// One program of numbered calls and the same faults, on pgxpool and on this package. No fault is tied to a clock: the
// schedule stops, the fault is applied and awaited, and the schedule goes on, so that both runs meet it at the same calls.
// MULTIPOOL_DIFFERENTIAL says how many rounds of one fault each there are to be; MULTIPOOL_DIFFERENTIAL_ONLY names a fault.

// eitherPool is what the program calls.
type eitherPool interface {
	Acquire(context.Context) (*pgxpool.Conn, error)
	AcquireFunc(context.Context, func(*pgxpool.Conn) error) error
	AcquireAllIdle(context.Context) []*pgxpool.Conn
	Begin(context.Context) (pgx.Tx, error)
	BeginTx(context.Context, pgx.TxOptions) (pgx.Tx, error)
	Close()
	Config() *pgxpool.Config
	CopyFrom(context.Context, pgx.Identifier, []string, pgx.CopyFromSource) (int64, error)
	Exec(context.Context, string, ...any) (pgconn.CommandTag, error)
	Ping(context.Context) error
	Query(context.Context, string, ...any) (pgx.Rows, error)
	QueryRow(context.Context, string, ...any) pgx.Row
	Reset()
	SendBatch(context.Context, *pgx.Batch) pgx.BatchResults
	Stat() *pgxpool.Stat
}

// numbered is one call of the program. Its value is compared too.
type numbered struct {
	name string
	run  func(context.Context, eitherPool) (string, error)
}

// seenOutcome is what became of a call.
type seenOutcome struct {
	name     string
	phase    string // before, under, after; held: begun before the fault and gone on with under it; flight: under way at the fault
	value    string
	err      error
	inFlight bool
}

// mishap is something that happens between two calls. All functions may be nil.
type mishap struct {
	name    string
	network bool // the pool connects to the relays; else to the servers themselves, whose ends the kernel tells at once
	hangs   bool // calls under the fault are not answered: their contexts end once they have sent something
	keeps   bool // Reset is not called under the fault: what is asked is how those go on that have a session
	several bool // cannot be with one host
	long    bool // when asked for only
	config  func(d *differential, c *pgxpool.Config)
	apply   func(d *differential)
	undo    func(d *differential)
	mend    func(d *differential) // after the run
	calls   []numbered            // made under the fault, before the program
}

// differential is the stage of both runs.
type differential struct {
	t       *testing.T
	cluster *pgtest.Cluster
	pool    eitherPool // under test
	relays  map[*pgtest.Server]*netfault.Relay
	several bool
	filler  []*pgx.Conn // sessions that take all room

	control map[string]string // sketches of what comes of every call where there is no fault
	brief   int               // how many calls of the program are made before a fault, and after it

	// What the pool under test has been configured with.
	lookup, dial, before, after, prepare atomic.Pointer[error]
	discard                              atomic.Bool // AfterRelease says that no connection is to be kept
	sent                                 atomic.Int64
}

const differGate = 7

func newDifferential(t *testing.T, standbys int) *differential {
	t.Helper()
	c := pgtest.Start(t, pgtest.Options{
		Standbys: standbys,
		Settings: map[string]string{"max_connections": "60", "password_encryption": "md5"},
		HBA:      []string{"host all locked 127.0.0.1/32 password"},
	})
	d := &differential{t: t, cluster: c, relays: map[*pgtest.Server]*netfault.Relay{}, several: standbys > 0}
	for _, s := range c.Servers() {
		relay, err := netfault.Listen(s.Addr())
		require.NoError(t, err)
		t.Cleanup(func() { relay.Close() })
		d.relays[s] = relay
	}
	d.admin("create role app login", "create role locked login password 'old'", "create role crowd login", "grant create on schema public to app, locked")
	return d
}

// admin runs statements on the primary, past the pool, and waits until the standbys have them.
func (d *differential) admin(statements ...string) {
	d.t.Helper()
	must(d.t, d.cluster, statements...)
}

// restore gives both runs the same database.
func (d *differential) restore() {
	d.admin(`drop table if exists items, log, gatelog, keyed cascade;
		create table items (id int primary key, body text);
		insert into items select n, 'item ' || n from generate_series(1, 100) n;
		create table log (note text);
		create table gatelog (note text);
		create table keyed (id int primary key);
		insert into keyed values (1);
		grant all on items, log, gatelog, keyed to app, locked`)
}

// config is the same for both libraries, except who parses the string.
func (d *differential) config(f *mishap, own bool, mode string, pings bool) *pgxpool.Config {
	servers := d.cluster.Servers()
	if p := d.cluster.Primary(); p != servers[0] {
		slices.Reverse(servers) // the primary first
	}
	var hosts []string
	for i, s := range servers {
		port := s.Port()
		if f.network {
			port = d.relays[s].Port()
		}
		hosts = append(hosts, fmt.Sprintf("db%d:%d", i+1, port))
	}
	url := "postgres://app@" + strings.Join(hosts, ",") + "/postgres?sslmode=disable&pool_max_conns=20&default_query_exec_mode=" + mode
	if d.several && !own { // here it would mean that nothing reads on a replica
		url += "&target_session_attrs=read-write"
	}
	parse := pgxpool.ParseConfig
	if own {
		parse = ParseConfig
	}
	c, err := parse(url)
	require.NoError(d.t, err)
	c.ConnConfig.LookupFunc = func(context.Context, string) ([]string, error) {
		return []string{"127.0.0.1"}, fails(&d.lookup)
	}
	c.ConnConfig.DialFunc = func(ctx context.Context, network, addr string) (net.Conn, error) {
		if err := fails(&d.dial); err != nil {
			return nil, err
		}
		conn, err := new(net.Dialer).DialContext(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		return &countedConn{conn.(*net.TCPConn), d}, nil
	}
	if !d.several || !own {
		// pgxpool pings what has been idle for a second: never, or always, is the same in both runs.
		c.ShouldPing = func(context.Context, pgxpool.ShouldPingParams) bool { return pings }
	}
	if f.config != nil {
		f.config(d, c)
	}
	return c
}

func fails(p *atomic.Pointer[error]) error {
	if err := p.Load(); err != nil {
		return *err
	}
	return nil
}

// countedConn tells that something was sent, except what pgx sends to end a connection that it has given up: a Terminate, or
// a cancel request by a connection of its own.
type countedConn struct {
	*net.TCPConn
	d *differential
}

func (c *countedConn) Write(b []byte) (int, error) {
	n, err := c.TCPConn.Write(b)
	if cancel := len(b) >= 8 && binary.BigEndian.Uint32(b[4:]) == 80877102; !cancel && b[0] != 'X' {
		c.d.sent.Add(1)
	}
	return n, err
}

// endedContext ends when the test says so, with what it says.
type endedContext struct {
	context.Context
	done chan struct{}
	once sync.Once
	err  atomic.Pointer[error]
}

func newEndedContext(parent context.Context) *endedContext {
	return &endedContext{Context: parent, done: make(chan struct{})}
}

func (c *endedContext) Done() <-chan struct{}       { return c.done }
func (c *endedContext) Deadline() (time.Time, bool) { return time.Time{}, false }
func (c *endedContext) Err() error                  { return fails(&c.err) }
func (c *endedContext) end(err error)               { c.once.Do(func() { c.err.Store(&err); close(c.done) }) }

const (
	differPatience = 20 * time.Second      // of a call that is to be served
	differGiveUp   = 40 * time.Millisecond // ... that pgxpool has not served either
)

// play runs the schedule on one pool. before is what the other library has made of it, nil if this is the first.
func (d *differential) play(f *mishap, turn int, pool eitherPool, before []seenOutcome) []seenOutcome {
	d.pool = pool
	var outcomes []seenOutcome
	note := func(o seenOutcome) { outcomes = append(outcomes, o) }
	patience := func() (context.Context, func()) {
		limit := differPatience
		// An error is allowed where there was one: nothing is judged of such a call that a clock could change.
		if i := len(outcomes); d.several && i < len(before) && !d.served(before[i]) {
			limit = differGiveUp
		}
		return context.WithTimeout(context.WithValue(context.Background(), stageKey{}, d), limit)
	}
	call := func(phase string, c numbered) {
		ctx, cancel := patience()
		defer cancel()
		if f.hangs && (phase == "held" || phase == "under") {
			var stop func()
			ctx, stop = d.untilSent(ctx)
			defer stop()
		}
		value, err := c.run(ctx, pool)
		note(seenOutcome{name: c.name, phase: phase, value: value, err: err})
	}
	round := func(phase string, n int) {
		for i := range n {
			if c := program[(turn+i)%len(program)]; !f.keeps || c.name != "Reset" {
				call(phase, c)
			}
		}
	}
	round("before", d.brief) // statements are prepared, on some connections

	// Some calls are under way at the fault, others go on after it.
	gate, err := d.cluster.Primary().Conn(testContext(d.t))
	require.NoError(d.t, err)
	defer gate.Close(context.Background())
	_, err = gate.Exec(testContext(d.t), "select pg_advisory_lock($1)", differGate)
	require.NoError(d.t, err)
	var resumed []numbered
	for _, h := range continued {
		ctx, cancel := context.WithTimeout(context.Background(), differPatience)
		goOn, err := h.begin(ctx, pool)
		cancel()
		require.NoError(d.t, err, "%s: %s", f.name, h.name)
		resumed = append(resumed, numbered{h.name, goOn})
	}
	flights := make([]seenOutcome, len(underWay))
	var flying sync.WaitGroup
	for i, c := range underWay {
		flying.Go(func() {
			ctx, cancel := context.WithTimeout(context.Background(), differPatience)
			defer cancel()
			value, err := c.run(ctx, pool)
			flights[i] = seenOutcome{name: c.name, phase: "flight", value: value, err: err, inFlight: true}
		})
	}
	waitFor(d.t, "the calls at the gate", differPatience, func() bool {
		n, err := d.cluster.Primary().Int(testContext(d.t), "select count(*) from pg_locks where locktype = 'advisory' and not granted")
		return err == nil && int(n) == len(underWay)
	})
	d.fill(pool, 3)

	if f.apply != nil {
		f.apply(d)
	}
	for _, c := range resumed {
		call("held", c)
	}
	for _, c := range f.calls {
		call("under", c)
	}
	if f.hangs { // no call is to wait for a connection
		round("under", 5)
	} else {
		round("under", len(program))
	}
	if f.undo != nil {
		f.undo(d)
	}
	_ = gate.Close(context.Background())
	flying.Wait()
	for _, o := range flights {
		note(o)
	}
	round("after", d.brief)
	pool.Close()
	for _, c := range program[:3] {
		call("closed", c)
	}
	return outcomes
}

// untilSent returns a context that passes its deadline once something has been sent: the call has come as far as it
// gets.
func (d *differential) untilSent(parent context.Context) (context.Context, func()) {
	c := newEndedContext(parent)
	begun, over := d.sent.Load(), make(chan struct{})
	go func() {
		for d.sent.Load() == begun {
			select {
			case <-over:
				return
			case <-parent.Done():
				c.end(context.DeadlineExceeded)
				return
			case <-time.After(time.Millisecond):
			}
		}
		c.end(context.DeadlineExceeded)
	}()
	return c, func() { close(over); c.end(context.Canceled) }
}

// fill has n idle connections made, more than there are.
func (d *differential) fill(pool eitherPool, n int) {
	d.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), differPatience)
	defer cancel()
	var held []*pgxpool.Conn
	for range n {
		c, err := pool.Acquire(ctx)
		require.NoError(d.t, err)
		held = append(held, c)
	}
	release(held)
}

// compare returns what differs for the worse in a call.
func (d *differential) compare(there, here seenOutcome) string {
	if d.several {
		return d.compareSeveral(there, here)
	}
	switch {
	case (there.err == nil) != (here.err == nil), there.err != nil && sketch(there.err) != sketch(here.err):
		return "there: " + sketch(there.err) + "\n\there:  " + sketch(here.err)
	case there.value != here.value:
		return "there: " + there.value + "\n\there:  " + here.value
	}
	return ""
}

func (d *differential) compareSeveral(there, here seenOutcome) string {
	switch {
	case here.err == nil && there.err == nil && here.value != there.value:
		return "there: " + there.value + "\n\there:  " + here.value
	case here.err == nil, here.inFlight:
		return ""
	case there.err == nil, d.served(there) && !slices.Contains(chain(here.err), root(there.err)):
		return "there: " + sketch(there.err) + "\n\there:  " + sketch(here.err)
	case !hasForeign(here.err):
		return "there: " + sketch(there.err) + "\n\there, without an error of pgx's: " + sketch(here.err)
	}
	return ""
}

// served reports whether a call has succeeded, or failed as it does where there is no fault.
func (d *differential) served(o seenOutcome) bool {
	return o.err == nil || sketch(o.err) == d.control[o.name]
}

// learn makes the program's calls where there is no fault.
func (d *differential) learn(mode string) {
	d.restore()
	pool, err := pgxpool.NewWithConfig(context.Background(), d.config(&mishap{}, false, mode, false))
	require.NoError(d.t, err)
	defer pool.Close()
	d.control = map[string]string{}
	for _, c := range program {
		_, err := c.run(testContext(d.t), pool)
		d.control[c.name] = sketch(err)
	}
}

// sketch is an error's types, codes and text, without what chance has put there.
func sketch(err error) string {
	if err == nil {
		return "served"
	}
	text := localPort.ReplaceAllString(err.Error(), "$1*->")
	return strings.Join(chain(err), " > ") + ": " + noRoom.ReplaceAllString(text, "no room")
}

var (
	localPort = regexp.MustCompile(`(127\.0\.0\.1:)\d+->`)
	// A full server says either, by whether another session is about to end.
	noRoom = regexp.MustCompile(`sorry, too many clients already|remaining connection slots are reserved for [a-z_-]+( [a-z_-]+)*`)
)

// chain is the types of an error and of all that it unwraps to, with the codes of the server's.
func chain(err error) []string {
	if err == nil {
		return nil
	}
	name := fmt.Sprintf("%T", err)
	switch e := err.(type) {
	case *pgconn.PgError:
		name += " " + e.Code
	default:
		if reflect.TypeOf(err) == reflect.TypeOf(errHook) { // of this type all are
			name += fmt.Sprintf(" %q", err)
		}
	}
	types := []string{name}
	switch w := err.(type) {
	case interface{ Unwrap() error }:
		types = append(types, chain(w.Unwrap())...)
	case interface{ Unwrap() []error }:
		for _, e := range w.Unwrap() {
			types = append(types, chain(e)...)
		}
	}
	return types
}

// root is the innermost error's type, and its code.
func root(err error) string {
	all := chain(err)
	return all[len(all)-1]
}

// hasForeign reports whether there is an error in the chain that is not of this package.
func hasForeign(err error) bool {
	return slices.ContainsFunc(chain(err), func(name string) bool { return !strings.Contains(name, "multipool.") })
}

// tally is a line of the table.
type tally struct{ calls, there, here, differing, known int }

func TestDifferentialOfOneHost(t *testing.T) {
	t.Parallel()
	differ(t, newDifferential(t, 0))
}

func TestDifferentialOfSeveralHosts(t *testing.T) {
	t.Parallel()
	differ(t, newDifferential(t, 1))
}

func differ(t *testing.T, d *differential) {
	asked, err := strconv.Atoi(os.Getenv("MULTIPOOL_DIFFERENTIAL"))
	long := err == nil
	var all []*mishap
	for _, f := range mishaps() {
		if (long || !f.long) && (d.several || !f.several) {
			all = append(all, f)
		}
	}
	rounds := len(all)
	d.brief = 12
	if long {
		rounds, d.brief = max(asked, 1), len(program)
	}
	only := os.Getenv("MULTIPOOL_DIFFERENTIAL_ONLY") // the name of a fault
	table := map[string]*tally{}
	reported := map[string]int{}
	for r := range rounds {
		f, lap := all[r%len(all)], r/len(all)
		if only != "" && f.name != only {
			continue
		}
		turn := (7*r + 11*lap) % len(program)
		mode := differModes[lap%len(differModes)]
		pings := (r+lap)%2 == 1
		begun := time.Now()
		if r%len(all) == 0 || d.control == nil {
			d.learn(mode)
		}
		d.restore()
		bare, err := pgxpool.NewWithConfig(context.Background(), d.config(f, false, mode, pings))
		require.NoError(t, err)
		there := d.play(f, turn, bare, nil)
		d.mend(f)
		d.restore()
		own, err := NewWithConfig(context.Background(), d.config(f, true, mode, pings))
		require.NoError(t, err)
		if d.several {
			seen(t)(own)
		}
		here := d.play(f, turn, own, there)
		d.mend(f)
		require.Len(t, here, len(there))
		line := table[f.name]
		if line == nil {
			line = &tally{}
			table[f.name] = line
		}
		for i := range there {
			require.Equal(t, there[i].name, here[i].name)
			line.calls++
			if d.served(there[i]) {
				line.there++
			}
			if d.served(here[i]) {
				line.here++
			}
			what := d.compare(there[i], here[i])
			if len(what) > 1500 {
				what = what[:1500] + " ..."
			}
			if what == "" {
				continue
			}
			where := fmt.Sprintf("%s / %s / %s", f.name, there[i].phase, there[i].name)
			if why := knownFailure(d.several, f.name, there[i]); why != "" {
				line.known++
				if reported[why]++; reported[why] == 1 {
					t.Logf("known (%s): %s\n\t%s", why, where, what)
				}
				continue
			}
			line.differing++
			if reported[f.name]++; reported[f.name] > 5 {
				t.Fail()
			} else {
				t.Errorf("%s (call %d, turn %d, %s, pings %v)\n\t%s", where, i, turn, mode, pings, what)
			}
		}
		if testing.Verbose() {
			t.Logf("%-50s %v", f.name, time.Since(begun).Round(time.Millisecond))
		}
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%-50s %7s %13s %13s %10s %6s\n", "fault", "calls", "served there", "served here", "differing", "known")
	for _, f := range all {
		if l := table[f.name]; l != nil {
			fmt.Fprintf(&b, "%-50s %7d %13d %13d %10d %6d\n", f.name, l.calls, l.there, l.here, l.differing, l.known)
		}
	}
	t.Logf("%d rounds\n%s", rounds, b.String())
	assert.NotEmpty(t, table)
}

// mend ends what a run has left.
func (d *differential) mend(f *mishap) {
	d.clear()
	if f.mend != nil {
		f.mend(d)
	}
}

// clear ends what a fault's configuration has set.
func (d *differential) clear() {
	for _, p := range []*atomic.Pointer[error]{&d.lookup, &d.dial, &d.before, &d.after, &d.prepare} {
		p.Store(nil)
	}
	d.discard.Store(false)
}

var differModes = []string{"cache_statement", "simple_protocol", "cache_describe", "exec", "describe_exec"}

// known is a difference that is to end.
type known struct{ fault, phase, name string } // empty: any

func knownFailure(several bool, fault string, o seenOutcome) string {
	list := knownOfOneHost
	if several {
		list = knownOfSeveralHosts
	}
	for _, k := range []known{{fault, o.phase, o.name}, {fault, "", o.name}, {fault, o.phase, ""}, {fault, "", ""}} {
		if why, ok := list[k]; ok {
			return cmp.Or(why, "known")
		}
	}
	return ""
}
