package pgtest

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
)

// ports hands out TCP ports that stay ours while their server is down.
//
// A free port that the kernel picks comes from the range it also takes the
// ports of outgoing connections from: while a server is stopped, any
// connection of the machine could take its port. So the ports come from below
// that range where it is known, and are reserved among the processes of this
// user by locks on the bytes of one file, which end with their process.
var ports portBook

type portBook struct {
	sync.Mutex
	files map[string]*os.File // by cache, of which a test may have its own; never closed, which would give up every lock
	held  map[uint16]*os.File // where it is locked; locks of one process do not exclude each other
}

const lowestPort = 15000

func (b *portBook) reserve(cache string) (uint16, error) {
	b.Lock()
	defer b.Unlock()
	if b.files == nil {
		b.files, b.held = map[string]*os.File{}, map[uint16]*os.File{}
	}
	file := b.files[cache]
	if file == nil {
		var err error
		if file, err = os.OpenFile(filepath.Join(cache, "ports.lock"), os.O_RDWR|os.O_CREATE, 0o600); err != nil {
			return 0, fmt.Errorf("pgtest: %w", err)
		}
		b.files[cache] = file
	}
	for range 1000 {
		port, err := candidate()
		if err != nil {
			return 0, fmt.Errorf("pgtest: no free port: %w", err)
		}
		if b.held[port] != nil || lockByte(file, int64(port)) != nil {
			continue
		}
		if !free(port) {
			_ = unlockByte(file, int64(port))
			continue
		}
		b.held[port] = file
		return port, nil
	}
	return 0, errors.New("pgtest: no free port in 1000 tries")
}

func (b *portBook) release(port uint16) {
	b.Lock()
	defer b.Unlock()
	if file := b.held[port]; file != nil {
		delete(b.held, port)
		_ = unlockByte(file, int64(port))
	}
}

func candidate() (uint16, error) {
	if top := ephemeralStart(); top > lowestPort+5000 {
		return uint16(lowestPort + rand.IntN(top-lowestPort)), nil
	}
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	defer l.Close()
	return uint16(l.Addr().(*net.TCPAddr).Port), nil
}

// ephemeralStart returns where the range of outgoing connections' ports
// begins, or 0 if that is unknown.
var ephemeralStart = sync.OnceValue(func() int {
	text, err := os.ReadFile("/proc/sys/net/ipv4/ip_local_port_range")
	if err != nil {
		return 0
	}
	first, _, _ := strings.Cut(strings.TrimSpace(string(text)), "\t")
	n, _ := strconv.Atoi(first)
	return n
})

func free(port uint16) bool {
	l, err := net.Listen("tcp4", net.JoinHostPort("127.0.0.1", strconv.Itoa(int(port))))
	if err != nil {
		return false
	}
	return l.Close() == nil
}
