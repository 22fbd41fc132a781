package quota

import (
	"sync"
	"time"
)

// A RetryBudget bounds how many statements are sent again after they had reached a server, so that a failing system is
// not asked for more than a healthy one: a fifth of the reads of the last seconds, and the Reserve, which lets everything
// in flight on one dying server go elsewhere at once.
type RetryBudget struct {
	Reserve int64 // set before first use, and never changed

	mu    sync.Mutex // guards the fields below
	since time.Time  // when the window began
	base  int64      // reads at that time
	spent int64
}

const (
	budgetWindow = 10 * time.Second
	budgetShare  = 5 // one in five
)

// Take spends one, or reports that there is none left. reads is how many reads there have been so far.
func (b *RetryBudget) Take(now time.Time, reads int64) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if now.Sub(b.since) > budgetWindow {
		b.since, b.base, b.spent = now, reads, 0
	}
	if b.spent >= b.Reserve+max(reads-b.base, 0)/budgetShare { // reads falls when a server is removed
		return false
	}
	b.spent++
	return true
}
