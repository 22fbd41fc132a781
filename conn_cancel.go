package multipool

import (
	"reflect"
	"runtime"
	"strings"

	"github.com/jackc/pgx/v5/pgconn"
)

// A cancel request is dialled by the function that its connection was dialled by, and by which the program dials whatever
// it makes of a copy of the configuration. This file tells them apart: by the address that a socket gives to pgx.

// cancelAddr is where a cancel request for a connection of ours goes.
type cancelAddr struct{ network, addr string }

const cancelNetwork = "multipool-cancel"

func (cancelAddr) Network() string  { return cancelNetwork }
func (a cancelAddr) String() string { return a.network + " " + a.addr }

// cancelTarget returns what is to be dialled, and whether that is for a cancel request of a connection of ours.
func cancelTarget(network, addr string) (string, string, bool) {
	if network != cancelNetwork {
		return network, addr, false
	}
	network, addr, _ = strings.Cut(addr, " ")
	return network, addr, true
}

// cancelRequest is the name of pgx's method that sends a cancel request.
var cancelRequest = runtime.FuncForPC(reflect.ValueOf((*pgconn.PgConn).CancelRequest).Pointer()).Name()

// askedToCancel reports whether the caller of its caller is pgx, about to cancel a statement. There may be TLS and the
// program's own wrappers in between.
func askedToCancel() bool {
	var callers [8]uintptr
	frames := runtime.CallersFrames(callers[:runtime.Callers(3, callers[:])])
	for {
		f, more := frames.Next()
		if f.Function == cancelRequest || !more {
			return f.Function == cancelRequest
		}
	}
}

// Close closes the network connection and forgets it.
func (s *socket) Close() error {
	w := s.wire
	s.peer.sockets.forget(s)
	err := s.Conn.Close()
	s.closed.Store(true)
	if s.main && w.main.Load() == s {
		w.leave() // a connection that was hijacked is never released
		w.vacate()
	}
	return err
}
