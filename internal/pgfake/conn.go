package pgfake

import (
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
)

// conn is the client's end, with the two kernel buffers. Lock order: Peer.mu is never taken while mu is held.
type conn struct {
	peer   *Peer
	remote net.Addr
	pid    uint32
	inline bool

	session   *session      // belongs to whoever pumps
	down      chan struct{} // closed when the server's side has ended
	cancelled chan struct{} // holds a cancel request

	mu       sync.Mutex
	cond     sync.Cond // state of this block changed; a reader and the server's goroutine wait on it
	in       []byte    // sent, not yet read by the server
	out      []byte    // answered, not yet read by the client
	outRead  int
	started  bool // past the startup
	pumping  bool // some goroutine is answering
	owes     bool // it has taken in what it has not answered yet
	backlog  bool // the session holds input or output back because the peer hangs
	closed   bool // by the client
	ended    bool // by the server
	reset    bool // ended by RST rather than FIN
	afterFIN int  // writes since the server ended
	readBy   time.Time
	writeBy  time.Time
	readWake *time.Timer
}

func newConn(p *Peer, remote net.Addr, pid uint32, inline bool) *conn {
	c := &conn{
		peer: p, remote: remote, pid: pid, inline: inline,
		down: make(chan struct{}), cancelled: make(chan struct{}, 1),
	}
	c.cond.L = &c.mu
	c.session = newSession(c)
	return c
}

func (c *conn) runnable() bool {
	return (len(c.in) > 0 || c.backlog) && !c.peer.set.Load().hung
}

// serve goes on after the client has left: a real backend executes what is in its receive buffer first.
func (c *conn) serve() {
	for {
		c.mu.Lock()
		for !c.ended && !c.runnable() && (!c.closed || len(c.in) > 0 || c.backlog) {
			c.cond.Wait()
		}
		over := c.ended || !c.runnable()
		c.mu.Unlock()
		if over {
			c.cut(orderly, nil)
			c.session.rollback()
			return
		}
		c.pump()
	}
}

// pump answers until nothing is left to answer. Only one goroutine pumps; a second one's input is seen by the first.
func (c *conn) pump() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.pumping {
		return
	}
	c.pumping = true
	for !c.ended && c.runnable() {
		c.session.take(c.in)
		c.in = c.in[:0]
		c.backlog = false
		c.owes = true
		c.mu.Unlock()
		held, done := c.session.run()
		if done {
			c.cut(orderly, nil)
		}
		c.mu.Lock()
		c.backlog, c.owes = held, false
		if held && c.session.stuck {
			break
		}
	}
	if c.ended {
		c.mu.Unlock()
		c.session.rollback()
		c.mu.Lock()
	}
	c.pumping = false
}

// wake lets the server's side look at the state of the peer again.
func (c *conn) wake() {
	c.mu.Lock()
	c.cond.Broadcast()
	stuck := c.inline && c.pumping
	c.mu.Unlock()
	if c.inline && !stuck {
		c.pump()
		c.retire()
	}
}

// retire ends an inline session whose client has left, once there is nothing to execute.
func (c *conn) retire() {
	c.mu.Lock()
	over := c.closed && len(c.in) == 0 && !c.backlog
	c.mu.Unlock()
	if over {
		c.cut(orderly, nil)
	}
}

// ending is how the server's side of a connection ends.
type ending int

const (
	orderly ending = iota // FIN
	crash                 // FIN, or RST where the server left something unread: what a kernel does for a process that died
	abort                 // RST
)

// cut ends the server's side, with a last word to a session. A client that reads the end may ask the peer at once: so the
// peer forgets the connection first, and nothing is executed on it from then on.
func (c *conn) cut(how ending, last *Error) {
	c.peer.forget(c)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ended {
		return
	}
	c.ended = true
	c.reset = how == abort || how == crash && len(c.in) > 0
	if last != nil && c.started {
		c.out = appendError(c.out, last)
	}
	close(c.down)
	c.cond.Broadcast()
}

func (c *conn) wasReset() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.reset
}

// see counts a statement that is to be executed, and reports false where the server's side has ended.
func (c *conn) see(st *statement) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ended {
		return false
	}
	c.peer.executed.Add(1)
	st.tally.seen.Add(1)
	return true
}

// moves moves the log where a statement does that; false as with see.
func (c *conn) moves(log bool) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ended {
		return false
	}
	if log {
		c.peer.lsn.Add(64)
	}
	return true
}

// commit counts statements that take effect; false as with see.
func (c *conn) commit(done []effect) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ended {
		return false
	}
	for _, e := range done {
		e.tally.applied.Add(1)
	}
	return true
}

// deliver hands b to the client unless the peer hangs, and reports whether it did. all says that the client has asked
// for nothing else yet.
func (c *conn) deliver(b []byte, all bool) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.peer.set.Load().hung {
		return false
	}
	if !c.ended && !c.closed {
		c.out = append(c.out, b...)
		c.owes = c.owes && !all
		c.cond.Broadcast()
	}
	return true
}

func (c *conn) begun() {
	c.mu.Lock()
	c.started = true
	c.mu.Unlock()
}

func (c *conn) waiting() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.started && !c.ended && (c.owes || c.backlog || len(c.in) > 0)
}

func (c *conn) Read(b []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for {
		switch {
		case c.closed:
			return 0, c.fail("read", net.ErrClosed)
		case expired(c.readBy):
			return 0, c.fail("read", os.ErrDeadlineExceeded)
		case c.reset:
			return 0, c.fail("read", os.NewSyscallError("read", syscall.ECONNRESET))
		case len(b) == 0:
			return 0, nil
		case c.outRead < len(c.out):
			n := copy(b, c.out[c.outRead:])
			c.outRead += n
			if c.outRead == len(c.out) {
				c.out, c.outRead = c.out[:0], 0
			}
			return n, nil
		case c.ended:
			return 0, io.EOF
		}
		c.cond.Wait()
	}
}

func (c *conn) Write(b []byte) (int, error) {
	c.mu.Lock()
	switch {
	case c.closed:
		defer c.mu.Unlock()
		return 0, c.fail("write", net.ErrClosed)
	case expired(c.writeBy):
		defer c.mu.Unlock()
		return 0, c.fail("write", os.ErrDeadlineExceeded)
	case c.ended:
		defer c.mu.Unlock()
		// The first write after a FIN is what provokes the RST; only the next one hears of it.
		c.afterFIN++
		if c.reset || c.afterFIN > 1 {
			return 0, c.fail("write", os.NewSyscallError("write", syscall.EPIPE))
		}
		return len(b), nil
	}
	c.in = append(c.in, b...)
	if !c.inline {
		c.cond.Broadcast()
	}
	c.mu.Unlock()
	if c.inline {
		c.pump()
	}
	return len(b), nil
}

func (c *conn) Close() error {
	c.mu.Lock()
	if c.closed {
		defer c.mu.Unlock()
		return c.fail("close", net.ErrClosed)
	}
	c.closed = true
	if c.readWake != nil {
		c.readWake.Stop()
	}
	c.cond.Broadcast()
	c.mu.Unlock()
	if c.inline {
		c.retire()
	}
	return nil
}

// Poll is what poll(2) with POLLRDHUP says of the socket: whether a Read would return at once, and whether the server has
// hung up, which it may have done after bytes that are not read yet.
func (c *conn) Poll() (readable, hungUp bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.ended || c.outRead < len(c.out), c.ended
}

func (c *conn) LocalAddr() net.Addr  { return fakeAddr{c.remote.Network(), "client"} }
func (c *conn) RemoteAddr() net.Addr { return c.remote }

func (c *conn) SetDeadline(t time.Time) error {
	if err := c.SetReadDeadline(t); err != nil {
		return err
	}
	return c.SetWriteDeadline(t)
}

func (c *conn) SetReadDeadline(t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return c.fail("set", net.ErrClosed)
	}
	c.readBy = t
	if c.readWake != nil {
		c.readWake.Stop()
		c.readWake = nil
	}
	if d := time.Until(t); !t.IsZero() && d > 0 {
		c.readWake = time.AfterFunc(d, func() {
			c.mu.Lock()
			defer c.mu.Unlock()
			c.cond.Broadcast()
		})
	}
	c.cond.Broadcast()
	return nil
}

// SetWriteDeadline matters only when it is over: a Write never waits.
func (c *conn) SetWriteDeadline(t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return c.fail("set", net.ErrClosed)
	}
	c.writeBy = t
	return nil
}

func expired(t time.Time) bool { return !t.IsZero() && !time.Now().Before(t) }

func (c *conn) fail(op string, err error) error {
	return &net.OpError{Op: op, Net: c.remote.Network(), Addr: c.remote, Err: err}
}
