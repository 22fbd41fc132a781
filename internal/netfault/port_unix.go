//go:build unix

package netfault

import (
	"errors"
	"net"
	"os"
	"strconv"
	"syscall"
)

// listen returns a listener together with a socket that is bound to its port and never listens. While the listener is
// closed the second one makes the kernel refuse, and keeps it from giving the port to somebody else.
func listen() (net.Listener, *held, error) {
	syscall.ForkLock.RLock()
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM, 0)
	if err == nil {
		syscall.CloseOnExec(fd)
	}
	syscall.ForkLock.RUnlock()
	if err != nil {
		return nil, nil, os.NewSyscallError("socket", err)
	}
	h := &held{fd}
	l, err := h.bind()
	if err != nil {
		return nil, nil, errors.Join(err, h.Close())
	}
	return l, h, nil
}

type held struct{ fd int }

func (h *held) bind() (net.Listener, error) {
	if err := syscall.SetsockoptInt(h.fd, syscall.SOL_SOCKET, syscall.SO_REUSEADDR, 1); err != nil {
		return nil, os.NewSyscallError("setsockopt", err)
	}
	if err := syscall.Bind(h.fd, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		return nil, os.NewSyscallError("bind", err)
	}
	name, err := syscall.Getsockname(h.fd)
	if err != nil {
		return nil, os.NewSyscallError("getsockname", err)
	}
	port := name.(*syscall.SockaddrInet4).Port
	return net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
}

func (h *held) Close() error { return os.NewSyscallError("close", syscall.Close(h.fd)) }
