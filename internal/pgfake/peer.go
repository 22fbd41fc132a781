package pgfake

import (
	"cmp"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// DefaultSystemID is the system identifier of peers that are not given one, so that they pass for one cluster.
const DefaultSystemID uint64 = 7_000_000_000_000_000_001

// Options describe a Peer. The zero value is a primary.
type Options struct {
	Standby  bool
	Timeline uint32 // 1 where zero
	SystemID uint64 // DefaultSystemID where zero
	LSN      uint64 // 0/3000000 where zero; every write of a primary raises it
	// Version is PostgreSQL's major version, which decides what is reported at startup; 18 where zero.
	Version int
	// Params are reported at startup beside the usual ones, which they override. An empty value is not reported at all, as
	// with servers and poolers that lack it; in_hot_standby given here never changes.
	Params map[string]string
	// Columns are the types of columns by name, for a select that names columns and for COPY; int4 where silent.
	Columns  map[string]uint32
	Password string // empty: none is asked for; otherwise in clear text
	Handler  Handler
}

// settings are replaced as a whole, so that a statement sees one state without taking a lock.
type settings struct {
	standby  bool
	timeline uint32
	systemID uint64
	handler  Handler
	delay    time.Duration
	startup  *Error
	refuse   error // what dials are answered; nil if they are accepted
	dead     bool  // after Die and Shutdown
	hung     bool
	isolated chan struct{} // closed when the peer can be reached again; nil if it can
}

// A Peer is one server. Its methods may be called from any goroutine.
type Peer struct {
	set atomic.Pointer[settings]
	lsn atomic.Uint64

	version  int
	params   map[string]string
	columns  map[string]uint32
	password string

	executed, dials, cancels, syncs atomic.Int64
	failing                         atomic.Bool // whether failures hold anything, to spare the lock

	mu        sync.Mutex
	closed    bool
	conns     map[*conn]struct{}
	listeners map[net.Listener]struct{}
	lastPID   uint32
	log       []string
	tallies   map[string]*tally
	failures  []*Error
	goroutine sync.WaitGroup
}

// tally counts one text.
type tally struct{ seen, applied atomic.Int64 }

// New starts nothing: goroutines begin with connections.
func New(o Options) *Peer {
	p := &Peer{
		version:   cmp.Or(o.Version, 18),
		params:    o.Params,
		columns:   o.Columns,
		password:  o.Password,
		conns:     map[*conn]struct{}{},
		listeners: map[net.Listener]struct{}{},
		tallies:   map[string]*tally{},
	}
	s := &settings{standby: o.Standby, timeline: o.Timeline, systemID: o.SystemID, handler: o.Handler}
	if s.timeline == 0 {
		s.timeline = 1
	}
	if s.systemID == 0 {
		s.systemID = DefaultSystemID
	}
	p.set.Store(s)
	if o.LSN == 0 {
		o.LSN = 0x3000000
	}
	p.lsn.Store(o.LSN)
	return p
}

// Dial is a pgconn.DialFunc whose connections are answered by a goroutine each, which ends with the connection or the
// Peer.
func (p *Peer) Dial(ctx context.Context, network, addr string) (net.Conn, error) {
	return p.dial(ctx, network, addr, false)
}

// DialInline is a pgconn.DialFunc whose connections are answered inside Write, in the goroutine of the caller. Their
// statements are counted, but not listed by Statements; delays do not apply to them.
func (p *Peer) DialInline(ctx context.Context, network, addr string) (net.Conn, error) {
	return p.dial(ctx, network, addr, true)
}

func (p *Peer) dial(ctx context.Context, network, addr string, inline bool) (net.Conn, error) {
	p.dials.Add(1)
	remote := fakeAddr{network, addr}
	fail := func(err error) error {
		return &net.OpError{Op: "dial", Net: network, Addr: remote, Err: err}
	}
	for {
		if err := ctx.Err(); err != nil {
			return nil, fail(err)
		}
		away := p.set.Load().isolated
		if away == nil {
			break
		}
		select {
		case <-ctx.Done():
		case <-away:
		}
	}

	p.mu.Lock()
	defer p.mu.Unlock()
	s := p.set.Load()
	switch {
	case p.closed, s.dead:
		return nil, fail(os.NewSyscallError("connect", syscall.ECONNREFUSED))
	case s.refuse != nil:
		return nil, s.refuse
	}
	p.lastPID++
	c := newConn(p, remote, p.lastPID, inline)
	p.conns[c] = struct{}{}
	if !inline {
		p.goroutine.Go(c.serve)
	}
	return c, nil
}

// Serve answers the connections of l until l or the Peer is closed, and then returns nil. A listener cannot refuse: where
// Dial would fail, the connection is closed at once.
func (p *Peer) Serve(l net.Listener) error {
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return l.Close()
	}
	p.listeners[l] = struct{}{}
	p.goroutine.Add(1)
	p.mu.Unlock()
	defer p.goroutine.Done()
	defer func() {
		p.mu.Lock()
		delete(p.listeners, l)
		p.mu.Unlock()
	}()
	for {
		outer, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			return err
		}
		p.goroutine.Go(func() { p.bridge(outer) })
	}
}

// bridge ends when either side does; closing the other is what ends its reader.
func (p *Peer) bridge(outer net.Conn) {
	defer outer.Close()
	inner, err := p.dial(context.Background(), outer.RemoteAddr().Network(), outer.RemoteAddr().String(), false)
	if err != nil {
		return
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		io.Copy(inner, outer)
		inner.Close()
	})
	io.Copy(outer, inner)
	if c := inner.(*conn); c.wasReset() {
		if tcp, ok := outer.(*net.TCPConn); ok {
			tcp.SetLinger(0)
		}
	}
	outer.Close()
	wg.Wait()
}

// Close cuts every connection and returns when every goroutine of the Peer has ended. Not to be called by a Handler.
func (p *Peer) Close() {
	p.mu.Lock()
	p.closed = true
	p.update(func(s *settings) { s.reach() })
	for l := range p.listeners {
		l.Close()
	}
	p.mu.Unlock()
	p.cutAll(crash, nil)
	p.goroutine.Wait()
}

// change makes the settings of the next statement; p.mu is not held.
func (p *Peer) change(f func(*settings)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.update(f)
}

func (p *Peer) update(f func(*settings)) {
	s := *p.set.Load()
	f(&s)
	p.set.Store(&s)
}

// reach lets dials that wait for an isolated peer go on.
func (s *settings) reach() {
	if s.isolated != nil {
		close(s.isolated)
		s.isolated = nil
	}
}

func (p *Peer) snapshot() []*conn {
	p.mu.Lock()
	defer p.mu.Unlock()
	cs := make([]*conn, 0, len(p.conns))
	for c := range p.conns {
		cs = append(cs, c)
	}
	return cs
}

func (p *Peer) forget(c *conn) {
	p.mu.Lock()
	delete(p.conns, c)
	p.mu.Unlock()
}

func (p *Peer) cutAll(how ending, last *Error) {
	for _, c := range p.snapshot() {
		c.cut(how, last)
	}
}

// SetStandby changes the role. Open sessions are told in_hot_standby before their next ReadyForQuery, as a real server
// does, never while idle.
func (p *Peer) SetStandby(standby bool) { p.change(func(s *settings) { s.standby = standby }) }

// Promote makes the peer a primary on the next timeline.
func (p *Peer) Promote() { p.change(func(s *settings) { s.standby = false; s.timeline++ }) }

// SetTimeline changes the timeline.
func (p *Peer) SetTimeline(t uint32) { p.change(func(s *settings) { s.timeline = t }) }

// SetSystemID changes the system identifier.
func (p *Peer) SetSystemID(id uint64) { p.change(func(s *settings) { s.systemID = id }) }

// SetLSN sets the position: of the log on a primary, of replay on a standby.
func (p *Peer) SetLSN(lsn uint64) { p.lsn.Store(lsn) }

// LSN returns the position.
func (p *Peer) LSN() uint64 { return p.lsn.Load() }

// Handle replaces the Handler; nil leaves everything to the built-in answers.
func (p *Peer) Handle(h Handler) { p.change(func(s *settings) { s.handler = h }) }

// Delay makes every statement wait before it is answered.
func (p *Peer) Delay(d time.Duration) { p.change(func(s *settings) { s.delay = d }) }

// Hang stops the server as SIGSTOP does: connections stay and dials succeed, but nothing is answered, a startup neither.
func (p *Peer) Hang() { p.change(func(s *settings) { s.hung = true }) }

// Isolate loses every packet: as Hang, and dials wait for their context.
func (p *Peer) Isolate() {
	p.change(func(s *settings) {
		s.hung = true
		if s.isolated == nil {
			s.isolated = make(chan struct{})
		}
	})
}

// Thaw ends Hang and Isolate. What was sent meanwhile is executed, even for clients that have gone.
func (p *Peer) Thaw() {
	p.change(func(s *settings) {
		s.hung = false
		s.reach()
	})
	for _, c := range p.snapshot() {
		c.wake()
	}
}

// Refuse makes dials fail with err; nil is a *net.OpError with ECONNREFUSED. Open connections stay.
func (p *Peer) Refuse(err error) {
	if err == nil {
		err = &net.OpError{Op: "dial", Net: "tcp", Err: os.NewSyscallError("connect", syscall.ECONNREFUSED)}
	}
	p.change(func(s *settings) { s.refuse = err })
}

// Accept ends Refuse.
func (p *Peer) Accept() { p.change(func(s *settings) { s.refuse = nil }) }

// StartupError makes the server answer every startup with a FATAL error of this code, and the message that a real server
// gives for it; empty restores.
func (p *Peer) StartupError(code string) {
	if code == "" {
		p.change(func(s *settings) { s.startup = nil })
		return
	}
	p.change(func(s *settings) { s.startup = &Error{Severity: "FATAL", Code: code, Message: message(code)} })
}

// Die ends the server as kill -9 does: connections are cut without a word, and dials refused until Revive.
func (p *Peer) Die() {
	p.die(crash, nil)
}

// Shutdown is a fast shutdown: every session is told FATAL 57P01 and cut; dials are refused until Revive.
func (p *Peer) Shutdown() {
	p.die(orderly, &Error{Severity: "FATAL", Code: "57P01", Message: message("57P01"), Routine: "ProcessInterrupts"})
}

func (p *Peer) die(how ending, last *Error) {
	p.change(func(s *settings) { s.dead = true; s.reach() })
	p.cutAll(how, last)
	// Only now: a server that hung must not answer with its last breath.
	p.change(func(s *settings) { s.hung = false })
}

// Revive ends Die and Shutdown.
func (p *Peer) Revive() { p.change(func(s *settings) { s.dead = false }) }

// CutConns ends every connection (the client reads EOF); dials go on.
func (p *Peer) CutConns() { p.cutAll(crash, nil) }

// ResetConns resets every connection (the client reads ECONNRESET, and nothing that was on its way); dials go on.
func (p *Peer) ResetConns() { p.cutAll(abort, nil) }

// EndConns ends every session with a word of the server's; dials go on.
func (p *Peer) EndConns(e Error) { p.cutAll(crash, &e) }

// FailNext makes the next n statements fail with ERROR and this code. They are seen, and not applied.
func (p *Peer) FailNext(n int, code string) {
	p.FailNextWith(n, Error{Severity: "ERROR", Code: code, Message: message(code)})
}

// FailNextWith is FailNext with an error of the caller's; one that is FATAL ends the connection.
func (p *Peer) FailNextWith(n int, e Error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for range n {
		p.failures = append(p.failures, &e)
	}
	p.failing.Store(len(p.failures) > 0)
}

func (p *Peer) nextFailure() *Error {
	if !p.failing.Load() {
		return nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.failures) == 0 {
		return nil
	}
	e := p.failures[0]
	p.failures = p.failures[1:]
	p.failing.Store(len(p.failures) > 0)
	return e
}

// Statements returns the texts that the server was asked to execute, in order, those that failed included. The empty
// statement of a ping is one of them, as "-- ping".
func (p *Peer) Statements() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.log)
}

// Count returns how often the server was asked to execute this text.
func (p *Peer) Count(text string) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	if t := p.tallies[text]; t != nil {
		return int(t.seen.Load())
	}
	return 0
}

// Applied returns how often this text took effect, answered or not: the transaction that it ran in has committed.
func (p *Peer) Applied(text string) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	if t := p.tallies[text]; t != nil {
		return int(t.applied.Load())
	}
	return 0
}

// Executed returns how many statements the server was asked to execute.
func (p *Peer) Executed() int64 { return p.executed.Load() }

// Syncs returns how many Syncs have come with nothing before them.
func (p *Peer) Syncs() int { return int(p.syncs.Load()) }

// Dials returns how many connections were tried, those of cancel requests included.
func (p *Peer) Dials() int { return int(p.dials.Load()) }

// Cancels returns how many cancel requests came in.
func (p *Peer) Cancels() int { return int(p.cancels.Load()) }

// Conns returns how many connections the server holds. A client that leaves a server that hangs still counts.
func (p *Peer) Conns() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.conns)
}

// InFlight returns how many sessions have sent something that is not answered yet.
func (p *Peer) InFlight() int {
	n := 0
	for _, c := range p.snapshot() {
		if c.waiting() {
			n++
		}
	}
	return n
}

// ResetCounters forgets what the server saw. Conns and InFlight are not counters.
func (p *Peer) ResetCounters() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.executed.Store(0)
	p.dials.Store(0)
	p.cancels.Store(0)
	p.syncs.Store(0)
	p.log = nil
	for _, t := range p.tallies { // sessions hold on to them
		t.seen.Store(0)
		t.applied.Store(0)
	}
}

func (p *Peer) tallyOf(text string) *tally {
	p.mu.Lock()
	defer p.mu.Unlock()
	t := p.tallies[text]
	if t == nil {
		t = new(tally)
		p.tallies[text] = t
	}
	return t
}

// record notes a statement that is to be executed, and reports false where its connection has ended.
func (p *Peer) record(c *conn, st *statement) bool {
	if !c.see(st) {
		return false
	}
	if !c.inline {
		p.mu.Lock()
		p.log = append(p.log, st.sql)
		p.mu.Unlock()
	}
	return true
}

func (p *Peer) cancel(pid uint32) {
	p.cancels.Add(1)
	for _, c := range p.snapshot() {
		if c.pid != pid {
			continue
		}
		select {
		case c.cancelled <- struct{}{}:
		default:
		}
	}
}

// Network finds peers by "host:port". Its Lookup keeps names as they are, so that nothing asks a resolver.
type Network map[string]*Peer

// Dial is a pgconn.DialFunc, see Peer.Dial. An address without a peer is refused.
func (n Network) Dial(ctx context.Context, network, addr string) (net.Conn, error) {
	if p := n[addr]; p != nil {
		return p.Dial(ctx, network, addr)
	}
	return nil, unknown(network, addr)
}

// DialInline is a pgconn.DialFunc, see Peer.DialInline.
func (n Network) DialInline(ctx context.Context, network, addr string) (net.Conn, error) {
	if p := n[addr]; p != nil {
		return p.DialInline(ctx, network, addr)
	}
	return nil, unknown(network, addr)
}

// Lookup is a pgconn.LookupFunc.
func (n Network) Lookup(ctx context.Context, host string) ([]string, error) { return Lookup(ctx, host) }

// Close closes every peer.
func (n Network) Close() {
	for _, p := range n {
		p.Close()
	}
}

// Lookup is a pgconn.LookupFunc that answers with the name itself.
func Lookup(_ context.Context, host string) ([]string, error) { return []string{host}, nil }

func unknown(network, addr string) error {
	return &net.OpError{
		Op: "dial", Net: network, Addr: fakeAddr{network, addr},
		Err: os.NewSyscallError("connect", syscall.ECONNREFUSED),
	}
}

// fakeAddr keeps the text that was dialled, because pgx dials it again to cancel.
type fakeAddr struct{ network, addr string }

func (a fakeAddr) Network() string { return a.network }
func (a fakeAddr) String() string  { return a.addr }

// message is what a real server says with the code, where that is always the same.
func message(code string) string {
	switch code {
	case "25006":
		return "cannot execute INSERT in a read-only transaction"
	case "28P01":
		return `password authentication failed for user "app"`
	case "3D000":
		return `database "app" does not exist`
	case "40001":
		return "canceling statement due to conflict with recovery"
	case "40P01":
		return "deadlock detected"
	case "53300":
		return "sorry, too many clients already"
	case "57014":
		return "canceling statement due to user request"
	case "57P01":
		return "terminating connection due to administrator command"
	case "57P02":
		return "terminating connection because of crash of another server process"
	case "57P03":
		return "the database system is starting up"
	}
	return "injected failure " + strconv.Quote(code)
}
