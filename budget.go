package multipool

import (
	"sync"
	"time"
)

// budget bounds how many statements are sent again after they had reached a server, so that a failing system is not
// asked for more than it is asked for when well: a fifth of the reads of the last seconds and a reserve, which lets
// everything in flight on one dying peer go elsewhere at once.
type budget struct {
	reserve int64
	reads   func() int64 // so far, of all peers; asked only when something fails

	mu    sync.Mutex
	since time.Time // the window's beginning
	base  int64     // reads at that time
	spent int64
}

const (
	budgetWindow = 10 * time.Second
	budgetShare  = 5 // one in five
	minReserve   = 100
)

// take spends one, or reports that there is none.
func (b *budget) take() bool {
	reads := b.reads()
	b.mu.Lock()
	defer b.mu.Unlock()
	if now := time.Now(); now.Sub(b.since) > budgetWindow {
		b.since, b.base, b.spent = now, reads, 0
	}
	if b.spent >= b.reserve+max(reads-b.base, 0)/budgetShare { // a peer that is removed takes its reads along
		return false
	}
	b.spent++
	return true
}
