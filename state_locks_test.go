package multipool

import (
	"bytes"
	"fmt"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
)

// lockOrder knows which ranked locks every goroutine holds. It panics at one that is taken against the order, whether or not
// somebody else takes the same two the other way round at that moment.
type lockOrder struct {
	mu   sync.Mutex
	held map[uint64][]int
}

func init() { lockWatch = &lockOrder{held: map[uint64][]int{}} }

// goroutine is the number in the first line of the caller's stack: "goroutine 7 [running]:".
func goroutine() uint64 {
	var b [64]byte
	number, _, _ := bytes.Cut(bytes.TrimPrefix(b[:runtime.Stack(b[:], false)], []byte("goroutine ")), []byte(" "))
	id, err := strconv.ParseUint(string(number), 10, 64)
	if err != nil {
		panic(err)
	}
	return id
}

func (o *lockOrder) take(rank int) {
	id := goroutine()
	o.mu.Lock()
	defer o.mu.Unlock()
	held := o.held[id]
	if len(held) > 0 && slices.Max(held) >= rank {
		panic(fmt.Sprintf("a lock of rank %d is taken under locks of ranks %v: see state_locks.go", rank, held))
	}
	o.held[id] = append(held, rank)
}

func (o *lockOrder) give(rank int) {
	id := goroutine()
	o.mu.Lock()
	defer o.mu.Unlock()
	held := o.held[id]
	if i := slices.Index(held, rank); i >= 0 {
		held = slices.Delete(held, i, i+1)
	}
	if o.held[id] = held; len(held) == 0 {
		delete(o.held, id)
	}
}

func TestALockAgainstTheOrderIsNoticed(t *testing.T) {
	t.Parallel()
	var changing ranked[rankChanging]
	var verdicts, another ranked[rankVerdicts]
	var state ranked[rankState]
	changing.Lock()
	verdicts.Lock()
	require.NotPanics(t, state.Lock)
	state.Unlock()
	require.PanicsWithValue(t, "a lock of rank 2 is taken under locks of ranks [1 2]: see state_locks.go", another.Lock)
	changing.Unlock() // in any order
	require.PanicsWithValue(t, "a lock of rank 1 is taken under locks of ranks [2]: see state_locks.go", changing.Lock)
	verdicts.Unlock()
	require.NotPanics(t, changing.Lock, "nothing was held")
	changing.Unlock()
}
