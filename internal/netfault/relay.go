// Package netfault is a TCP relay between a PostgreSQL client and a real server that injects faults: into the sockets
// (resets, refusals, silence, delay) and between messages of the protocol (a commit whose answer is lost).
//
// It sees messages of unencrypted connections only. Once a connection speaks TLS its bytes are relayed as they are, and
// rules never match it.
package netfault

import (
	"io"
	"math/rand/v2"
	"net"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
)

// Side is an end of a relayed connection.
type Side int

const (
	Client Side = iota
	Server
)

// When says whether the message that a Cut waits for still arrives.
type When int

const (
	Before When = iota // it does not
	After              // it does, and is the last
)

// Cut ends one connection at a message.
//
// An answer that is lost: From Server, Type 'C' (CommandComplete), Before. A statement that never arrived: From Client,
// Type 'Q' or 'E', Before. In the extended protocol a statement outside of a transaction takes effect with Sync: to cut
// after it was sent is From Client, Type 'S', After.
type Cut struct {
	From Side
	Type byte // of the message; 0 is any, startup and cancel requests included
	Nth  int  // among the matches on one connection since the rule was armed; 0 and 1 are the first
	When When
	// RST resets both sides; otherwise they read EOF. What was passed on just before stays readable only if it already is
	// in the receiver's kernel, which on a loopback it is while the receiver keeps up.
	RST bool
	// Match further restricts the messages. It is shown the whole message with its type and length, and must not keep it.
	Match func(msg []byte) bool
}

type mode int

const (
	open mode = iota
	frozen
	black
)

// Relay is one address in front of one server. Its methods may be called from any goroutine.
type Relay struct {
	target string
	port   int
	hold   io.Closer // keeps the port while nothing listens

	accepted           atomic.Int64
	toServer, toClient atomic.Int64
	watching           atomic.Bool // whether any message may be cut, to spare the lock
	fired              atomic.Int64

	mu       sync.Mutex
	closed   bool
	listener net.Listener // nil while refusing
	links    map[*link]struct{}
	mode     mode
	changed  chan struct{} // closed when mode changes
	delay    time.Duration
	rules    []*rule
	share    float64
	random   *rand.Rand
	wg       sync.WaitGroup
}

// rule is an armed Cut.
type rule struct {
	Cut
	seen map[*link]int
	done chan struct{}
}

// Listen starts a relay on a free port of 127.0.0.1. Every connection that it accepts is dialled to target.
func Listen(target string) (*Relay, error) {
	l, hold, err := listen()
	if err != nil {
		return nil, err
	}
	r := &Relay{
		target:  target,
		port:    l.Addr().(*net.TCPAddr).Port,
		hold:    hold,
		links:   map[*link]struct{}{},
		changed: make(chan struct{}),
	}
	r.serve(l)
	return r, nil
}

// Addr returns host:port, the same for the life of the Relay.
func (r *Relay) Addr() string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(r.port)) }

// Port returns the port of Addr.
func (r *Relay) Port() uint16 { return uint16(r.port) }

// serve is called with r.mu held, or before anyone knows r.
func (r *Relay) serve(l net.Listener) {
	r.listener = l
	r.wg.Go(func() {
		for {
			client, err := l.Accept()
			if err != nil {
				return
			}
			r.accept(client.(*net.TCPConn))
		}
	})
}

func (r *Relay) accept(client *net.TCPConn) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		client.Close()
		return
	}
	r.accepted.Add(1)
	// What a blackhole has taken in is lost from then on, not from when its goroutine gets to look: the end of the
	// blackhole may be first.
	l := &link{relay: r, client: client, down: make(chan struct{}), lost: r.mode == black}
	r.links[l] = struct{}{}
	r.wg.Go(l.run)
}

// Close ends every connection and goroutine, and waits for them. It is idempotent.
func (r *Relay) Close() error {
	r.mu.Lock()
	var err error
	if !r.closed {
		r.closed = true
		if r.listener != nil {
			err = r.listener.Close()
		}
		r.hold.Close()
	}
	r.mu.Unlock()
	for _, l := range r.snapshot() {
		l.end(false)
	}
	r.wg.Wait()
	return err
}

func (r *Relay) snapshot() []*link {
	r.mu.Lock()
	defer r.mu.Unlock()
	ls := make([]*link, 0, len(r.links))
	for l := range r.links {
		ls = append(ls, l)
	}
	return ls
}

// Reset sends an RST to both sides of every connection. New ones are accepted.
func (r *Relay) Reset() {
	for _, l := range r.snapshot() {
		l.end(true)
	}
}

// Refuse closes the port, so that dials get ECONNREFUSED, or opens it again. Open connections stay.
func (r *Relay) Refuse(refuse bool) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case r.closed:
		return net.ErrClosed
	case refuse && r.listener != nil:
		l := r.listener
		r.listener = nil
		return l.Close()
	case !refuse && r.listener == nil:
		l, err := net.Listen("tcp", r.Addr())
		if err != nil {
			return err
		}
		r.serve(l)
	}
	return nil
}

// Freeze stops moving bytes, ends of streams included, as a proxy does that is stopped. Dials succeed, in the kernel;
// writes too until buffers are full. Thaw delivers everything.
func (r *Relay) Freeze() { r.enter(frozen) }

// Blackhole swallows every byte and every end of a stream. Dials succeed, in the kernel, and nobody answers. Connections
// that lost something are reset by what ends the Blackhole, since their streams cannot be mended.
func (r *Relay) Blackhole() { r.enter(black) }

// Thaw ends Freeze and Blackhole.
func (r *Relay) Thaw() { r.enter(open) }

func (r *Relay) enter(m mode) {
	var broken []*link
	r.mu.Lock()
	if r.mode == black && m != black {
		for l := range r.links {
			if l.lost {
				broken = append(broken, l)
			}
		}
	}
	r.mode = m
	close(r.changed)
	r.changed = make(chan struct{})
	r.mu.Unlock()
	for _, l := range broken {
		l.end(true)
	}
}

// Delay holds whatever arrives from either side for d before it is passed on.
func (r *Relay) Delay(d time.Duration) {
	r.mu.Lock()
	r.delay = d
	r.mu.Unlock()
}

// Cut arms a rule for one connection, whichever matches first. The channel is closed when it has fired.
func (r *Relay) Cut(c Cut) <-chan struct{} {
	r.mu.Lock()
	defer r.mu.Unlock()
	rl := &rule{Cut: c, seen: map[*link]int{}, done: make(chan struct{})}
	r.rules = append(r.rules, rl)
	r.watching.Store(true)
	return rl.done
}

// CutProbability resets connections at this share of the statements that clients send, drawn from the seed: half of them
// before the statement is passed on, half after it and the Sync that ends it, so that it takes effect unheard. 0 ends it.
func (r *Relay) CutProbability(p float64, seed uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.share = p
	r.random = rand.New(rand.NewPCG(seed, 0))
	r.watching.Store(p > 0 || len(r.rules) > 0)
}

// Disarm forgets the rules that have not fired, and CutProbability.
func (r *Relay) Disarm() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.rules, r.share = nil, 0
	r.watching.Store(false)
}

// Fired returns how many connections were cut at a message, or are about to be.
func (r *Relay) Fired() int { return int(r.fired.Load()) }

// Conns returns how many connections are open, those that wait for the server included.
func (r *Relay) Conns() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := 0
	for l := range r.links {
		if !l.cut.Load() && !l.ended() { // their goroutines may be about to find that out
			n++
		}
	}
	return n
}

// Accepted returns how many connections there have been.
func (r *Relay) Accepted() int { return int(r.accepted.Load()) }

// Bytes returns how much was passed on.
func (r *Relay) Bytes() (toServer, toClient int64) { return r.toServer.Load(), r.toClient.Load() }

// verdict is what happens at a message.
type verdict struct {
	cut  bool
	when When
	rst  bool
	rule *rule // nil where it was drawn by lot
}

func (r *Relay) judge(l *link, from Side, typ byte, msg []byte) verdict {
	if !r.watching.Load() {
		return verdict{}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for i, rl := range r.rules {
		if rl.From != from || rl.Type != 0 && rl.Type != typ || rl.Match != nil && !rl.Match(msg) {
			continue
		}
		rl.seen[l]++
		if rl.seen[l] < rl.Nth {
			continue
		}
		r.rules = slices.Delete(r.rules, i, i+1)
		r.watching.Store(r.share > 0 || len(r.rules) > 0)
		return verdict{true, rl.When, rl.RST, rl}
	}
	if r.share == 0 || from != Client {
		return verdict{}
	}
	switch {
	case typ == 'S' && l.doomed:
		return verdict{cut: true, when: After, rst: true}
	case (typ == 'Q' || typ == 'E') && !l.doomed && r.random.Float64() < r.share:
		if r.random.IntN(2) == 0 {
			return verdict{cut: true, when: Before, rst: true}
		}
		if typ == 'Q' {
			return verdict{cut: true, when: After, rst: true}
		}
		l.doomed = true
	}
	return verdict{}
}
