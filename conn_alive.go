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

// ShouldPing reports whether pgxpool should ping an idle connection before it hands the connection out. [ParseConfig]
// sets it as the ShouldPing of a configuration of several hosts.
//
// pgxpool pings a connection that was idle for more than a second, which costs a round trip before the statement.
// ShouldPing instead checks the socket of a connection that was idle for 10 ms or more, which costs none. It returns
// true if the server has closed the connection or if something has arrived; the ping then ends a dead connection
// without an error for the caller. If it cannot check the socket, it returns true after a second, as pgxpool does. The
// check needs Linux, and a socket that the program has not wrapped.
func ShouldPing(_ context.Context, p pgxpool.ShouldPingParams) bool {
	if p.IdleDuration < peekAfter {
		return false
	}
	w := wireOf(p.Conn)
	if w == nil {
		return p.IdleDuration > pingAfter
	}
	if w.use.wasCut() {
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
