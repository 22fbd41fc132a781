package multipool

import (
	"context"
	"net"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/jackc/pgx/v5/pgconn"
)

// addressPin keeps a peer on one server where its name has several addresses: a peer is a server, and what is known
// of one does not hold for another behind the same name. The pin lasts for a generation, so that a dead address is
// left when the peer has been judged.
type addressPin struct {
	mu         sync.Mutex
	address    string
	generation uint64
	offset     uint32 // where this program starts in the list, so that not all programs choose the same server
}

// pinned wraps a look-up: the pinned address alone while it is among the answers, else all of them in an order that is
// the same for every dial.
func (a *addressPin) pinned(find pgconn.LookupFunc, generation *atomic.Uint64) pgconn.LookupFunc {
	return func(ctx context.Context, host string) ([]string, error) {
		found, err := find(ctx, host)
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
