//go:build !unix

package netfault

import "net"

// listen cannot keep the port of a closed listener here: Refuse(false) fails if somebody has taken it meanwhile.
func listen() (net.Listener, held, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	return l, held{}, err
}

type held struct{}

func (held) Close() error { return nil }
