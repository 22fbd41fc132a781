package multipool

import "sync"

// The locks under which another of ours may be taken. Whoever holds one takes only locks of a greater rank, and none of its
// own rank: docs/architecture.md has the whole order, and what the locks guard.
type (
	rankChanging struct{} // MultiPool.changing: which peers there are
	rankVerdicts struct{} // peer.verdicts: a peer goes out of use, or back into it
	rankState    struct{} // MultiPool.mu: the next snapshot is made
)

func (rankChanging) rank() int { return 1 }
func (rankVerdicts) rank() int { return 2 }
func (rankState) rank() int    { return 3 }

// ranked is a mutex that has a place in the order.
type ranked[R interface{ rank() int }] struct{ mu sync.Mutex }

// lockWatch, if not nil, is told of every ranked lock before it is taken and after it is given back. Only the package's
// tests set it, before anything runs: every test then fails that takes locks against the order.
var lockWatch interface {
	take(rank int)
	give(rank int)
}

func (m *ranked[R]) Lock() {
	if lockWatch != nil {
		var r R
		lockWatch.take(r.rank())
	}
	m.mu.Lock()
}

func (m *ranked[R]) Unlock() {
	m.mu.Unlock()
	if lockWatch != nil {
		var r R
		lockWatch.give(r.rank())
	}
}
