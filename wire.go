package multipool

import (
	"net"
	"sync"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// wire is ours of one connection: made with it, found from it, gone with it. Whatever belongs to a connection hangs
// here. But for the socket, which is cut from outside, a wire is used by whoever uses the connection, one at a time.
type wire struct {
	peer *peer
	user userTracers // the program's own, called behind ours
	pg   *pgconn.PgConn

	generation uint64 // the peer's, when this connection was last known to be good
	started    uint64 // the peer's, when the statement that is running began
	busy       bool   // a statement is running
	out        bool   // handed out by the pool and not yet released
	standby    bool   // the session's last report of in_hot_standby was "on"

	slab []rows
}

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
	if len(w.slab) == 0 {
		w.slab = make([]rows, 64)
	}
	r := &w.slab[len(w.slab)-1]
	w.slab = w.slab[:len(w.slab)-1]
	return r
}

// readRole takes what the session last reported of its server's role. The server sends it when a session begins and
// with the end of the first statement after it changed (PostgreSQL documentation, 55.2.7: in_hot_standby is reported
// from version 14 on), never to an idle session.
func (w *wire) readRole() (role Role) {
	switch w.pg.ParameterStatus("in_hot_standby") {
	case "on":
		w.standby, role = true, RoleReplica
	case "off":
		w.standby, role = false, RolePrimary
	}
	return role
}

// socket is the raw network connection of a wire, under TLS. It is the peer's hold on a connection that somebody else
// is using.
type socket struct {
	net.Conn
	wire *wire
}

// Close closes the network connection and forgets it.
func (s *socket) Close() error {
	s.wire.peer.sockets.forget(s)
	return s.Conn.Close()
}

// sockets is the register of a peer's network connections, those of cancel requests included.
type sockets struct {
	mu  sync.Mutex
	all map[*socket]struct{}
}

func (r *sockets) add(s *socket) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.all == nil {
		r.all = make(map[*socket]struct{})
	}
	r.all[s] = struct{}{}
}

func (r *sockets) forget(s *socket) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.all, s)
}

func (r *sockets) len() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.all)
}
