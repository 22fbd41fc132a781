package bench

import (
	"bytes"
	"context"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
)

// taped wraps a dial to a fake that answers inline: what a connection has been asked once is answered from memory from
// then on. A server's time is not the client's, and the fake's own would drown that of the calls; it allocates, too.
// Only state that the bytes of the answer do not show would break it, and the calls measured here leave none.
//
// Equal answers are kept once. Otherwise more connections would mean more memory to read answers from, and what is
// measured would be the processor's cache.
func taped(dial pgconn.DialFunc) pgconn.DialFunc {
	kept := new(sync.Map) // of strings to []byte
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		inner, err := dial(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		t := &tape{Conn: inner, kept: kept, answers: map[string][]byte{}}
		t.news.L = &t.mu
		return t, nil
	}
}

type tape struct {
	net.Conn
	kept *sync.Map

	mu      sync.Mutex // pgx reads in the background where a write takes long
	news    sync.Cond
	answers map[string][]byte
	unread  []byte
	closed  bool
	expiry  time.Time // of reads; zero: none
}

func (t *tape) Write(b []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	answer, known := t.answers[string(b)]
	if !known {
		if n, err := t.Conn.Write(b); err != nil {
			return n, err
		}
		var err error
		if answer, err = t.drain(); err != nil {
			return 0, err
		}
		one, _ := t.kept.LoadOrStore(string(answer), answer)
		answer = one.([]byte)
		t.answers[string(b)] = answer
	}
	if len(t.unread) == 0 {
		t.unread = answer
	} else {
		t.unread = bytes.Join([][]byte{t.unread, answer}, nil)
	}
	t.news.Signal()
	return len(b), nil
}

// drain reads what the fake has answered.
func (t *tape) drain() ([]byte, error) {
	var all []byte
	var some [4096]byte
	for {
		if readable, _ := t.Conn.(interface{ Poll() (bool, bool) }).Poll(); !readable {
			return all, nil
		}
		n, err := t.Conn.Read(some[:])
		all = append(all, some[:n]...)
		if err == io.EOF {
			return all, nil
		}
		if err != nil {
			return nil, err
		}
	}
}

func (t *tape) Read(b []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for len(t.unread) == 0 {
		switch {
		case t.closed:
			return 0, net.ErrClosed
		case !t.expiry.IsZero() && !time.Now().Before(t.expiry):
			return 0, os.ErrDeadlineExceeded
		}
		t.news.Wait()
	}
	n := copy(b, t.unread)
	t.unread = t.unread[n:]
	return n, nil
}

// SetDeadline is for the monitors, which wait in a read between their looks and are woken by its deadline.
func (t *tape) SetDeadline(at time.Time) error {
	if err := t.SetReadDeadline(at); err != nil {
		return err
	}
	return t.SetWriteDeadline(at)
}

func (t *tape) SetReadDeadline(at time.Time) error {
	t.mu.Lock()
	t.expiry = at
	t.news.Broadcast()
	t.mu.Unlock()
	if left := time.Until(at); left > 0 {
		time.AfterFunc(left, func() {
			t.mu.Lock() // or a Read that has just found its time not over would miss it
			defer t.mu.Unlock()
			t.news.Broadcast()
		})
	}
	return t.Conn.SetReadDeadline(at)
}

func (t *tape) Close() error {
	t.mu.Lock()
	t.closed = true
	t.news.Broadcast()
	t.mu.Unlock()
	return t.Conn.Close()
}
