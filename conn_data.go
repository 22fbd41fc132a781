package multipool

import (
	"context"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/pgmultipool/multipool/internal/pgfault"
	"github.com/pgmultipool/multipool/internal/quota"
)

// wire is ours of one connection: made with it, found from it, gone with it. Whatever belongs to a connection hangs
// here. Except for the socket, which is cut from outside, a wire is used by whoever uses the connection, one at a time.
type wire struct {
	// What every call touches, in one line of the processor's cache: many connections evict one another's.
	peer       *peer
	pg         *pgconn.PgConn
	user       *userTracers   // the program's own, called after ours; nil if there is none
	slab       *[slabLen]rows // wrappers not yet used
	generation uint64         // the peer's, when this connection was last known to be good
	started    uint64         // the peer's, when the statement that is running began

	// Read from other goroutines: by who cuts, by the watch, by whoever closes the socket.
	seq atomic.Uint32 // statements begun and ended: odd while one is running
	use connUse       // what the connection is used for
	out atomic.Int32  // what the call that has it counts for with the peer, and above that how many have had it

	left    uint8 // of slab
	standby bool  // a standby's, by the session's last report of in_hot_standby or, where the role is asked, see presume
	writes  bool  // what it runs for a call may write
	reads   bool  // ... and is a read by its text
	anew    bool  // ... that may be sent again where it did nothing
	sent    sent
	been    progress // of the call that it runs
	row     rowCall

	// The rest.
	committing atomic.Bool // a transaction's COMMIT is on its way: it is not to be cancelled

	config *pgx.ConnConfig // of the connection while it is made, in pgx's hands
	own    *pgx.ConnConfig // what the program would have there
	over   atomic.Bool     // the making has ended

	reader   *pgconn.ResultReader // of every result; nil if pgx has none for all
	mode     pgx.QueryExecMode    // by which pgx sends what says nothing of it
	reported bool                 // the running statement's fault has been
	gone     bool                 // the connection was known to be closed when the running statement began
	dialling bool                 // holds a place among the peer's handshakes
	quiet    bool                 // taken and released by ourselves: the program's tracer is not told
	swept    bool                 // by a sweep, for which the program's PrepareConn was not asked: nor is its AfterRelease
	pool     quota.Pool           // whose connection it is
	approach *approach            // how a connection of a pool that follows is being made; nil if it is not
	eye      eye                  // on the raw socket
	noted    uint32               // seq of the last read that the watch has noted as long; the watch's alone
	seen     uint32               // seq at the watch's last tick; the watch's alone
	calls    int32                // out's upper part at the watch's last tick; the watch's alone

	at      atomic.Pointer[sight] // what the session has told of its server at its beginning; nil if it was not asked
	slot    atomic.Int32
	counted atomic.Bool            // among the peer's connections that are made
	born    time.Time              // before it was counted
	main    atomic.Pointer[socket] // the connection itself, of several tries the last
}

// slabLen is how many wrappers of rows are made at a time.
const slabLen = 64

// What a call that has the connection counts for: each is a bit.
const (
	outCall   int32 = 1 << iota // in the peer's load
	outPermit                   // for one of its permits
	outGuest                    // for a place among the reads that fell back to it as the primary
	outWriter                   // for a place among the writes that may wait for a standby

	outBits = iota
	outOnce = 1 << outBits // counts a call
	outAll  = outOnce - 1
)

// Whether the connection has a slot.
const (
	slotNone  int32 = iota
	slotTaken       // it is being made
	slotHeld        // until its socket is closed
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

// ending is what the connection tells after a statement.
func (w *wire) ending() pgfault.Ending {
	return pgfault.Ending{
		Standby: w.standby, Lost: w.pg.IsClosed(),
		Batch: !w.sent.whole(), Tagged: w.sent.tagged, Simple: w.sent.simply(w.mode),
	}
}

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

// leave gives back what the connection counts for with the peer, once.
func (w *wire) leave() {
	out := w.out.And(^int32(outAll))
	if out&outGuest != 0 {
		<-w.peer.guests
	}
	if out&outWriter != 0 {
		<-w.peer.writers
	}
	if out&outPermit != 0 {
		w.peer.permits.Release(w.pool)
	}
	if out&outCall != 0 {
		w.peer.load.out.Add(-1)
	}
}

// vacate gives the slot of a connection that has been made back.
func (w *wire) vacate() {
	w.uncount()
	if w.slot.CompareAndSwap(slotHeld, slotNone) {
		w.peer.slots.Release(w.pool)
	}
}

// count counts the connection among those of the peer's own pool that are made.
func (w *wire) count() {
	if w.pool == quota.Own {
		w.born = time.Now()
		w.counted.Store(true)
		w.peer.made.Add(1)
	}
}

func (w *wire) uncount() {
	if w.counted.CompareAndSwap(true, false) {
		w.peer.made.Add(-1)
	}
}

// age has a connection counted no more that the pool may close at its next release: until it is closed it would be taken for one
// that is free.
func (w *wire) age(now time.Time) {
	if life := w.peer.config.MaxConnLifetime; life > 0 && w.counted.Load() && now.Sub(w.born) >= life-2*watchTick {
		w.uncount()
	}
}

// sit takes a slot of the peer for a connection that is to be made.
func (w *wire) sit(ctx context.Context) error {
	if err := w.peer.awaitSlot(ctx, w.pool); err != nil {
		return err
	}
	w.slot.Store(slotTaken)
	return nil
}

// stand gives back the slot of a connection that has not been made.
func (w *wire) stand() {
	if w.slot.Swap(slotNone) != slotNone {
		w.peer.slots.Release(w.pool)
	}
}

// made makes the slot last as long as the socket, which may be closed already.
func (w *wire) made() {
	w.count()
	w.slot.CompareAndSwap(slotTaken, slotHeld)
	if s := w.main.Load(); s == nil || s.closed.Load() {
		w.vacate()
	}
}

// shake takes a place among the peer's handshakes, and shook gives it back.
func (w *wire) shake(ctx context.Context) error {
	select {
	case w.peer.dials <- struct{}{}:
		w.dialling = true // until TraceConnectEnd, which pgx calls however the connect ends
		return nil
	case <-w.peer.era.Load().Done():
		return errPeerDown
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (w *wire) shook() {
	if w.dialling {
		w.dialling = false
		<-w.peer.dials
	}
}

// claim marks an idle connection as held, after the program's own say; nil if it has none. It reports false where somebody
// has closed the connection for good reason.
func (w *wire) claim(ctx context.Context, c *pgx.Conn, say func(context.Context, *pgx.Conn) (bool, error)) (bool, error) {
	if say == nil {
		return w.use.claim() && w.taken(), nil
	}
	if !w.use.check() {
		return false, nil
	}
	if ok, err := say(ctx, c); !ok || err != nil {
		w.use.ready()
		return ok, err
	}
	return w.use.pass() && w.taken(), nil
}

// taken is the first that is done with a connection that has a user.
func (w *wire) taken() bool {
	if w.peer.asked {
		w.presume()
	}
	return true
}
