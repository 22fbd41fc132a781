package multipool

import (
	"net"
	"sync"
	"sync/atomic"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// wire is ours of one connection: made with it, found from it, gone with it. Whatever belongs to a connection hangs
// here. But for the socket, which is cut from outside, a wire is used by whoever uses the connection, one at a time.
type wire struct {
	// What every call touches, in one line of the processor's cache: many connections evict one another's.
	peer       *peer
	pg         *pgconn.PgConn
	user       *userTracers   // the program's own, called behind ours; nil: none
	slab       *[slabLen]rows // wrappers not yet used
	generation uint64         // the peer's, when this connection was last known to be good
	started    uint64         // the peer's, when the statement that is running began

	// Read from other goroutines: by who cuts, by the watch, by whoever closes the socket.
	seq atomic.Uint32 // statements begun and ended: odd while one is running
	use atomic.Int32  // what the connection is used for
	out atomic.Bool   // counted in the peer's load: a call has it

	left    uint8  // of slab
	standby bool   // a standby's, by the session's last report of in_hot_standby or, where the role is asked, see presume
	writes  bool   // what it runs for a call may write
	text    string // of that, if it is a read by its text
	guest   bool   // holds a place among the reads that fell back to the primary

	// The rest.
	committing atomic.Bool // a transaction's COMMIT is on its way: it is not to be cancelled

	reported bool   // the running statement's fault has been
	dialling bool   // holds a place among the peer's handshakes
	eye      eye    // on the raw socket
	seen     uint32 // seq at the watch's last tick; the watch's alone
	noted    uint32 // seq of the last read that the watch has noted as long; the watch's alone
}

// slabLen is how many wrappers of rows are made at a time.
const slabLen = 64

// What a connection is used for, as far as it matters to who would cut it.
const (
	useNone int32 = iota // idle in the pool, being made, or left behind by a caller who has gone
	useRead              // a read that has not handed out a row and may be sent again elsewhere
	useHeld              // anything else: a write, a transaction, a stream, a connection that the program holds
	useCut               // a read that is being cut
)

// wireKey is where a connection's CustomData holds its wire.
const wireKey = "multipool"

// wireOf finds the wire of a connection: through the socket where it is plain, which costs half a nanosecond, through
// the connection's own data where TLS or the program's wrapper hides it.
func wireOf(c *pgx.Conn) *wire {
	pg := c.PgConn()
	if s, ok := pg.Conn().(*socket); ok {
		return s.wire
	}
	w, _ := pg.CustomData()[wireKey].(*wire)
	return w
}

// newRows takes a wrapper from the connection's slab. Wrappers are not used twice: programs ask a closed Rows for Err.
func (w *wire) newRows() *rows {
	if w.left == 0 {
		w.slab, w.left = new([slabLen]rows), slabLen
	}
	w.left--
	return &w.slab[w.left]
}

// ending is what the connection tells behind a statement.
func (w *wire) ending() ending { return ending{standby: w.standby, lost: w.pg.IsClosed()} }

// readRole takes what the session last reported of its server's role. The server sends it when a session begins and
// with the end of the first statement after it changed (PostgreSQL documentation, 55.2.7: in_hot_standby is reported
// from version 14 on), never to an idle session.
func (w *wire) readRole() Role {
	role := reportedRole(w.pg)
	if role != RoleUnknown {
		w.standby = role == RoleReplica
	}
	return role
}

func reportedRole(pg *pgconn.PgConn) Role {
	switch pg.ParameterStatus("in_hot_standby") {
	case "on":
		return RoleReplica
	case "off":
		return RolePrimary
	}
	return RoleUnknown
}

// presume is readRole where the role is asked: the last look's answer holds for whoever takes the connection. A session
// that reports the primary's role is not on a standby, whatever the address leads to by now, unless the pooler has been
// seen to repeat what was true of other sessions.
func (w *wire) presume() {
	p := w.peer
	w.standby = Role(p.role.Load()) == RoleReplica && (p.hearsay.Load() || reportedRole(w.pg) != RolePrimary)
}

// socket is the raw network connection of a wire, under TLS. It is the peer's hold on a connection that somebody else
// is using.
type socket struct {
	net.Conn
	wire *wire
	main bool // the connection itself, not a cancel request on its behalf
}

// Close closes the network connection and forgets it.
func (s *socket) Close() error {
	w := s.wire
	w.peer.sockets.forget(s)
	if s.main {
		w.leave() // a connection that was hijacked is never released
	}
	return s.Conn.Close()
}

// leave ends the connection's part in the peer's load, once.
func (w *wire) leave() {
	if w.out.Swap(false) {
		w.peer.load.out.Add(-1)
	}
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
func (r *sockets) cut(most int32, shut bool) {
	r.mu.Lock()
	r.shut = r.shut || shut
	var closing []*socket
	for s := range r.all {
		use := s.wire.use.Load()
		if use == useRead && most >= useRead && !s.wire.use.CompareAndSwap(useRead, useCut) {
			use = useHeld // its first row has just come
		}
		if use <= most || use == useCut {
			closing = append(closing, s)
		}
	}
	r.mu.Unlock()
	for _, s := range closing {
		_ = s.Close()
	}
}

// cutOff closes one connection.
func (r *sockets) cutOff(w *wire) {
	r.mu.Lock()
	var own *socket
	for s := range r.all {
		if s.wire == w && s.main {
			own = s
		}
	}
	r.mu.Unlock()
	if own != nil {
		_ = own.Close()
	}
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

// wires calls f with each connection's wire.
func (r *sockets) wires(f func(*wire)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for s := range r.all {
		if s.main {
			f(s.wire)
		}
	}
}

func (r *sockets) len() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.all)
}
