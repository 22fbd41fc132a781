package netfault

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// link is one relayed connection.
type link struct {
	relay  *Relay
	client *net.TCPConn

	mu     sync.Mutex
	server *net.TCPConn  // nil until dialled
	down   chan struct{} // closed when both sockets are

	cut atomic.Bool // the last bytes are on their way; what either side still sends is dropped
	tls atomic.Bool // bytes have no messages any more
	// asked says that the client waits for the single byte that answers a request for encryption.
	asked atomic.Bool

	lost   bool // swallowed something; under Relay.mu
	doomed bool // to be reset at the next Sync; under Relay.mu
}

func (l *link) run() {
	r := l.relay
	defer func() {
		l.end(false)
		r.mu.Lock()
		delete(r.links, l)
		for _, rl := range r.rules {
			delete(rl.seen, l)
		}
		r.mu.Unlock()
	}()
	if !l.admit() {
		return
	}
	server, err := l.dial()
	if err != nil {
		l.end(true)
		return
	}
	if !l.adopt(server) {
		server.Close()
		return
	}

	var wg sync.WaitGroup
	wg.Go(func() { l.pump(Client, l.client, server, &r.toServer) })
	wg.Go(func() { l.pump(Server, server, l.client, &r.toClient) })
	wg.Wait()
	r.mu.Lock()
	lost := l.lost
	r.mu.Unlock()
	if lost { // an end that was swallowed: the other side is not to hear of it
		<-l.down
	}
}

// admit waits until something may move.
func (l *link) admit() bool {
	r := l.relay
	for {
		r.mu.Lock()
		m, changed := r.mode, r.changed
		if m == black {
			l.lost = true
		}
		lost := l.lost
		r.mu.Unlock()
		switch {
		case lost: // what ends the blackhole ends this connection
			<-l.down
			return false
		case m == open:
			return true
		}
		select {
		case <-changed:
		case <-l.down:
			return false
		}
	}
}

func (l *link) dial() (*net.TCPConn, error) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go func() {
		select {
		case <-l.down:
			cancel()
		case <-ctx.Done():
		}
	}()
	var d net.Dialer
	c, err := d.DialContext(ctx, "tcp", l.relay.target)
	if err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), nil
}

// adopt reports false where the link has ended meanwhile.
func (l *link) adopt(server *net.TCPConn) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ended() {
		return false
	}
	l.server = server
	return true
}

func (l *link) ended() bool {
	select {
	case <-l.down:
		return true
	default:
		return false
	}
}

// end closes both sockets. The first caller decides how.
func (l *link) end(rst bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ended() {
		return
	}
	for _, c := range []*net.TCPConn{l.client, l.server} {
		if c == nil {
			continue
		}
		if rst {
			c.SetLinger(0)
		}
		c.Close()
	}
	close(l.down)
}

// finish tells both sides EOF. The sockets stay open after it: a kernel turns a close with unread input into an RST.
func (l *link) finish() {
	l.client.CloseWrite()
	l.server.CloseWrite()
}

// pump moves one direction until its source ends.
func (l *link) pump(from Side, src, dst *net.TCPConn, moved *atomic.Int64) {
	f := framer{link: l, from: from}
	chunk := make([]byte, 32<<10)
	for {
		n, err := src.Read(chunk)
		m, ok := l.pass(n > 0)
		if !ok {
			return
		}
		if l.cut.Load() || m == black {
			if err != nil {
				return
			}
			continue
		}
		if n > 0 {
			send, v := f.next(chunk[:n])
			if v.cut {
				// Before the last bytes are on their way: their answer may be back sooner than this goroutine.
				l.cut.Store(true)
				l.relay.fired.Add(1)
			}
			moved.Add(int64(len(send))) // before the receiver can have them
			k, writeErr := dst.Write(send)
			moved.Add(int64(k - len(send)))
			f.sent()
			switch {
			case v.cut && v.rst:
				l.end(true)
			case v.cut:
				l.finish()
			case writeErr != nil && !l.cut.Load():
				// The reader is gone, and the source is to hear of it as it would without a relay.
				l.end(true)
			}
			if v.cut {
				if v.rule != nil {
					close(v.rule.done)
				}
				continue
			}
		}
		switch {
		case err == nil:
		case errors.Is(err, io.EOF):
			dst.CloseWrite()
			return
		default:
			l.end(true)
			return
		}
	}
}

// pass waits until bytes may move, and until they have been delayed. It marks what a blackhole takes. What has a hole is
// not passed on either once the blackhole is over, and its connection not yet reset.
func (l *link) pass(bytes bool) (mode, bool) {
	r := l.relay
	var delayed bool
	for {
		r.mu.Lock()
		m, changed, d := r.mode, r.changed, r.delay
		if m == black && !l.cut.Load() {
			l.lost = true
		}
		lost := l.lost
		r.mu.Unlock()
		switch {
		case lost && m != black:
			return m, false
		case m == frozen:
			select {
			case <-changed:
			case <-l.down:
				return m, false
			}
		case m == open && d > 0 && bytes && !delayed:
			delayed = true
			t := time.NewTimer(d)
			select {
			case <-t.C:
			case <-l.down:
				t.Stop()
				return m, false
			}
		default:
			return m, true
		}
	}
}

const (
	sslRequest    = 80877103
	gssEncRequest = 80877104

	// maxStartup is the server's own limit; what claims to be longer is not a startup, but TLS without a request.
	maxStartup = 10000
)

// framer finds the messages in one direction of a stream.
type framer struct {
	link    *link
	from    Side
	buf     []byte
	passed  int  // how much of buf is on its way
	started bool // past the startup, which has no type; only for the client
}

// next returns what to pass on after these bytes have arrived, and whether the connection ends after it. Incomplete
// messages wait for their rest. The bytes are valid until sent is called.
func (f *framer) next(chunk []byte) (send []byte, v verdict) {
	f.buf = append(f.buf, chunk...)
	at := 0
	for at < len(f.buf) && !v.cut {
		if f.link.tls.Load() {
			at = len(f.buf)
			break
		}
		rest := f.buf[at:]
		n, typ := f.measure(rest)
		if n == 0 || n > len(rest) {
			break
		}
		v = f.link.relay.judge(f.link, f.from, typ, rest[:n])
		if v.cut && v.when == Before {
			break
		}
		f.note(rest[:n], typ)
		at += n
	}
	f.passed = at
	return f.buf[:at], v
}

func (f *framer) sent() {
	f.buf = f.buf[:copy(f.buf, f.buf[f.passed:])]
	f.passed = 0
}

// measure returns the length of the message at the start of b, 0 where that cannot be known yet.
func (f *framer) measure(b []byte) (n int, typ byte) {
	switch {
	case f.from == Server && f.link.asked.Load():
		return 1, b[0]
	case f.from == Client && !f.started:
		if len(b) < 4 {
			return 0, 0
		}
		n = int(binary.BigEndian.Uint32(b))
		if n < 8 || n > maxStartup {
			f.link.tls.Store(true)
			return len(b), 0
		}
		return n, 0
	case len(b) < 5:
		return 0, 0
	}
	return 1 + int(binary.BigEndian.Uint32(b[1:])), b[0]
}

// note keeps track of what kind of bytes follow. It runs before the message is passed on, so before any answer to it.
func (f *framer) note(msg []byte, typ byte) {
	switch {
	case f.from == Server && f.link.asked.Load():
		if typ == 'S' || typ == 'G' {
			f.link.tls.Store(true)
		}
		f.link.asked.Store(false)
	case f.from == Client && !f.started && len(msg) >= 8:
		switch binary.BigEndian.Uint32(msg[4:]) {
		case sslRequest, gssEncRequest:
			f.link.asked.Store(true)
		default:
			f.started = true
		}
	}
}
