package multipool

import (
	"context"
	"errors"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
)

// addressPin keeps a peer on one server where its name has several addresses: a peer is a server, and what is known
// of one does not hold for another behind the same name. The pin lasts for a generation, so that a dead address is
// left when the peer has been judged.
type addressPin struct {
	mu         sync.Mutex
	address    string
	generation uint64
	offset     uint32   // where a dial starts in the list: another place in every program, and another after every failure
	found      []string // the last answer of the name service: taken while it gives none
}

// lookupError says that the name service has given no address. The server was not asked.
type lookupError struct{ err error }

func (e *lookupError) Error() string { return e.err.Error() }
func (e *lookupError) Unwrap() error { return e.err }

// FailedLocally makes it a pgfault.LocalError.
func (*lookupError) FailedLocally() {}

// unknown reports whether the name service knows that there is no such name.
func (e *lookupError) unknown() bool {
	var dns *net.DNSError
	return errors.As(e.err, &dns) && dns.IsNotFound
}

// lookupTime is how long a name service is waited for that has given an answer before.
const lookupTime = time.Second

// pinned wraps a look-up: the pinned address alone while it is among the answers, else all of them in an order that is
// the same for every dial. A name service that is out, or slow, is represented by its last answer.
func (a *addressPin) pinned(find pgconn.LookupFunc, generation *atomic.Uint64) pgconn.LookupFunc {
	return func(ctx context.Context, host string) ([]string, error) {
		found, err := a.lookUp(ctx, find, host)
		if err != nil || len(found) < 2 {
			return found, err
		}
		a.mu.Lock()
		defer a.mu.Unlock()
		if a.address != "" && a.generation == generation.Load() && slices.Contains(found, a.address) {
			return []string{a.address}, nil
		}
		ordered := slices.Sorted(slices.Values(found))
		k := int(a.offset % uint32(len(ordered)))
		return append(ordered[k:len(ordered):len(ordered)], ordered[:k]...), nil
	}
}

func (a *addressPin) lookUp(ctx context.Context, find pgconn.LookupFunc, host string) ([]string, error) {
	a.mu.Lock()
	last := a.found
	a.mu.Unlock()
	within, cancel := ctx, func() {}
	if last != nil {
		limit := lookupTime
		if end, ok := ctx.Deadline(); ok {
			limit = min(limit, time.Until(end)/2) // the other half is for the dial
		}
		within, cancel = context.WithTimeout(ctx, limit)
	}
	defer cancel()
	found, err := find(within, host)
	if err == nil {
		a.mu.Lock()
		a.found = found
		a.mu.Unlock()
		return found, nil
	}
	failed := &lookupError{err}
	if last != nil && ctx.Err() == nil && !failed.unknown() {
		return last, nil
	}
	return nil, failed
}

// failed has the next dial start with another address, where none is pinned: one that swallows packets takes all the time
// that a dial has. The monitor calls it, as nobody else dials a peer that is down.
func (a *addressPin) failed() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.offset++
}

// several reports whether the name has had several addresses.
func (a *addressPin) several() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.found) > 1
}

// keep pins the address that a connection has reached.
func (a *addressPin) keep(pg *pgconn.PgConn, generation uint64) {
	at := pg.Conn().RemoteAddr()
	if at == nil {
		return
	}
	host, _, err := net.SplitHostPort(at.String())
	if err != nil {
		return // a Unix socket, or a connection of the program's own making
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.address == "" || a.generation != generation {
		a.address, a.generation = host, generation
	}
}
