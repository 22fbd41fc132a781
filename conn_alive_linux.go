package multipool

import (
	"net"
	"syscall"
	"unsafe"
)

// eye looks at a socket without reading from it, by ppoll(2) with POLLRDHUP: that sees the end of the stream even behind
// bytes that nobody has read, and under TLS, where a peeked byte is only ciphertext. It is used by whoever uses the
// connection.
type eye struct {
	raw  syscall.RawConn
	poll func(fd uintptr) // e.see, bound once, so that a look allocates nothing
	fd   pollFd
	zero syscall.Timespec
	seen glimpse
}

type pollFd struct {
	fd      int32
	events  int16
	revents int16
}

const (
	pollIn    = 0x1
	pollErr   = 0x8
	pollHup   = 0x10
	pollRdhup = 0x2000
)

// open points the eye at a connection's socket, if it has one to be seen.
func (e *eye) open(c net.Conn) {
	e.raw = nil
	if s, ok := c.(syscall.Conn); ok {
		if raw, err := s.SyscallConn(); err == nil {
			e.raw, e.poll = raw, e.see
		}
	}
}

func (e *eye) look() glimpse {
	if e.raw == nil {
		return glimpseUnknown
	}
	e.seen = glimpseDead // Control refuses where this end has closed
	// Not RawConn.Read: it waits for the read lock, which pgx's background reader may hold.
	_ = e.raw.Control(e.poll)
	return e.seen
}

func (e *eye) see(fd uintptr) {
	e.fd, e.zero = pollFd{fd: int32(fd), events: pollIn | pollRdhup}, syscall.Timespec{}
	var errno syscall.Errno
	for range 3 { // EINTR comes even where there is nothing to wait for: Go's own preemption signals
		_, _, errno = syscall.RawSyscall6(syscall.SYS_PPOLL, uintptr(unsafe.Pointer(&e.fd)), 1, uintptr(unsafe.Pointer(&e.zero)), 0, 0, 0)
		if errno != syscall.EINTR {
			break
		}
	}
	switch got := e.fd.revents; {
	case errno != 0:
		e.seen = glimpsePending
	case got&(pollErr|pollHup|pollRdhup) != 0:
		e.seen = glimpseDead
	case got&pollIn != 0:
		e.seen = glimpsePending
	default:
		e.seen = glimpseQuiet
	}
}
