package multipool

import (
	"context"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
)

// glimpse is what a peek at an idle connection's socket shows.
type glimpse uint8

const (
	glimpseUnknown glimpse = iota // cannot be told here: another system, a wrapped socket
	glimpseQuiet                  // open, and nothing has arrived
	glimpsePending                // open, and bytes have arrived: a notice, a notification, a farewell; only a ping tells
	glimpseDead                   // the other end has closed, or this one
)

const (
	// peekAfter is how long a connection may have been idle and be used unseen. A peek costs half a microsecond, which
	// does not show at all after a pause of this length.
	peekAfter = 10 * time.Millisecond
	// pingAfter is pgxpool's own rule, for connections that cannot be peeked at.
	pingAfter = time.Second
)

// ShouldPing is what [ParseConfig] puts into the pool configuration of several hosts: instead of a ping, a whole round
// trip before a statement on a connection that was idle for a second, it peeks at the socket of one that was idle for
// 10 ms, without a round trip. It asks for the ping, which ends a dead connection without the caller noticing, where the
// server has hung up or something has arrived; and where a peek is not possible, after a second as pgxpool does. Peeks need Linux, and a socket that nothing of the program's
// wraps.
func ShouldPing(_ context.Context, p pgxpool.ShouldPingParams) bool {
	if p.IdleDuration < peekAfter {
		return false
	}
	w := wireOf(p.Conn)
	if w == nil {
		return p.IdleDuration > pingAfter
	}
	if w.use.Load() == useCut {
		return false // by ourselves: it will not be handed out
	}
	switch w.eye.look() {
	case glimpseQuiet:
		return false
	case glimpseUnknown:
		return p.IdleDuration > pingAfter
	}
	return true
}
