package multipool

import (
	"net"
	"strings"
	"syscall"
	"time"
)

// The ways in which a connection to a host that is gone ends: probes find a silent one, the user timeout one with data
// under way, for which the kernel would otherwise wait a quarter of an hour. Both leave a pause of ten seconds in the
// network unharmed; a peer that is dead to us is found much sooner, by other means.
const (
	keepaliveIdle     = 5 * time.Second
	keepaliveInterval = 5 * time.Second
	keepaliveCount    = 2
	userTimeout       = 15 * time.Second
)

func newDialer() *net.Dialer {
	return &net.Dialer{
		KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: keepaliveIdle, Interval: keepaliveInterval, Count: keepaliveCount},
		Control: func(network, _ string, c syscall.RawConn) error {
			if !strings.HasPrefix(network, "tcp") {
				return nil
			}
			return setUserTimeout(c, userTimeout)
		},
	}
}
