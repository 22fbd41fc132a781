package multipool

import (
	"net"
	"sync"
	"sync/atomic"

	"github.com/pgmultipool/multipool/internal/quota"
)

// socket is the raw network connection of a wire, under TLS. It is the peer's hold on a connection that somebody else
// is using.
type socket struct {
	net.Conn
	wire   *wire
	peer   *peer // of this try: the wire's may be another by now
	main   bool  // the connection itself, not a cancel request on its behalf
	closed atomic.Bool

	network, addr string // as it was dialled
}

// RemoteAddr is net.Conn's. pgx dials the address that it finds here to cancel a statement, by a function that knows
// nothing of the connection: it finds one that says so.
func (s *socket) RemoteAddr() net.Addr {
	at := s.Conn.RemoteAddr()
	switch {
	case !s.main || at == nil || !askedToCancel():
		return at
	case at.Network() == "unix":
		return cancelAddr{s.network, s.addr} // a server names its socket relative to its own directory
	}
	return cancelAddr{at.Network(), at.String()}
}

// sockets is the register of a peer's network connections, those of cancel requests included.
type sockets struct {
	mu   sync.Mutex // guards all and shut; nothing blocks under it
	all  map[*socket]struct{}
	shut bool // no new ones: the peer is down
}

// add registers a connection, or reports that there are to be none.
func (r *sockets) add(s *socket) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.shut {
		return false
	}
	if r.all == nil {
		r.all = make(map[*socket]struct{})
	}
	r.all[s] = struct{}{}
	return true
}

func (r *sockets) forget(s *socket) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.all, s)
}

// cut closes the connections whose use is at most the given one, and refuses new ones until open is called: pgx would
// dial again to cancel what it was running, and keep the pool's slot for 15 s meanwhile.
func (r *sockets) cut(most connState, shut bool) {
	r.mu.Lock()
	r.shut = r.shut || shut
	r.mu.Unlock()
	r.cutIf(most, func(*wire) bool { return true })
}

// cutIf closes those of the connections that are meant.
func (r *sockets) cutIf(most connState, meant func(*wire) bool) {
	r.mu.Lock()
	var closing []*socket
	for s := range r.all {
		if meant(s.wire) && s.wire.use.cut(most) {
			closing = append(closing, s)
		}
	}
	r.mu.Unlock()
	for _, s := range closing {
		_ = s.Close()
	}
}

// cutOff closes one connection.
func (w *wire) cutOff() {
	if s := w.main.Load(); s != nil {
		_ = s.Close()
	}
}

// evict closes an idle connection, of another pool than k if there is one, and reports whether there was any.
func (r *sockets) evict(k quota.Pool) bool {
	s := r.idle(k)
	if s == nil {
		return false
	}
	_ = s.Close()
	return true
}

func (r *sockets) idle(k quota.Pool) *socket {
	r.mu.Lock()
	defer r.mu.Unlock()
	var own *socket
	for s := range r.all {
		switch w := s.wire; {
		case !s.main || !w.use.idle():
		case w.pool == k:
			own = s
		case w.use.evict():
			return s
		}
	}
	if own != nil && own.wire.use.evict() {
		return own
	}
	return nil
}

func (r *sockets) open() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.shut = false
}

func (r *sockets) refuses() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.shut
}

// used reports whether somebody has one of the connections.
func (r *sockets) used() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	for s := range r.all {
		if use := s.wire.use.state(); s.main && (use == connRead || use == connHeld) {
			return true
		}
	}
	return false
}

// wires calls f with every connection's wire.
func (r *sockets) wires(f func(*wire)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for s := range r.all {
		if s.main {
			f(s.wire)
		}
	}
}
