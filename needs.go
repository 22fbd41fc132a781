package multipool

import (
	"hash/maphash"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
)

// The bounds of needs.
const (
	maxNeedText  = 4 << 10 // a longer text is scanned each time, and only its hash is kept if a standby refused it
	maxNeedTexts = 4 << 10 // in all
	maxNeedBytes = 1 << 20 // of texts kept
)

// needs remembers what statements need, so that a text is refused once and scanned twice, not at every call. Its zero
// value is ready for use by many goroutines. Memory is bounded; who reads waits for no lock, and allocates nothing.
//
// It is an open hash table of pointers to entries that never change. A reader loads one pointer, usually; a writer
// stores one under a lock, or a new table when this one is half full. A map that is copied for each new text would cost
// its whole size each time, and one with a part under a lock would make every unknown text wait for it.
type needs struct {
	table atomic.Pointer[needTable]

	// The hashes of texts that were seen once. A program that writes its arguments into its texts never sends one again:
	// such a text must not push out another, so it enters at its second sighting.
	seen [1024]atomic.Uint64

	mu           sync.Mutex // guards what follows and all stores to table and to its slots
	texts, bytes int
	refused      int // texts that were learned
}

// of returns what the text needs: as learned, or as needOf has it. Never needUnknown.
func (n *needs) of(sql string) need {
	h := hashNeed(sql)
	if t := n.table.Load(); t != nil {
		if _, e := t.find(h, sql); e != nil {
			return e.need
		}
	}
	v := needOf(sql)
	if len(sql) > maxNeedText {
		return v
	}
	if s := &n.seen[h>>54]; s.Load() != h {
		s.Store(h)
	} else if n.mu.TryLock() { // whoever has the lock is remembering another; this one comes again
		n.put(h, sql, needEntry{need: v})
		n.mu.Unlock()
	}
	return v
}

// learn records that a standby refused the text because it writes. Whoever asks from now on is told needPrimary.
func (n *needs) learn(sql string) {
	if needOf(sql) == needPrimary {
		return // the text says so itself: it was sent to a standby by an explicit route
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.put(hashNeed(sql), sql, needEntry{need: needPrimary, learned: true})
}

// put adds or replaces the entry of the text. It may keep sql's bytes alive only as a copy: sql may be a small part of a
// large buffer. The caller holds the lock.
func (n *needs) put(h uint64, sql string, e needEntry) {
	e.hash, e.size = h, len(sql)
	t := n.table.Load()
	if t != nil {
		if slot, old := t.find(h, sql); old != nil {
			if e.learned && !old.learned {
				e.text = old.text
				n.refused++
				slot.Store(&e)
			}
			return
		}
	}
	if len(sql) <= maxNeedText {
		e.text = strings.Clone(sql)
	}
	switch {
	case t == nil:
		t = newNeedTable(0)
	case n.texts == maxNeedTexts || n.bytes+len(e.text) > maxNeedBytes:
		t = n.shrink(t)
	case 2*n.texts >= len(t.slots):
		t = n.refill(t, n.texts, func(*needEntry) bool { return true })
	}
	n.add(t, &e)
	n.table.Store(t)
}

// shrink returns a table without what was only scanned, which a second scan brings back. What was learned cost a trip
// to a standby and stays, up to half of the bounds, so that the next time is as many texts away. Which of the learned
// go is left to chance.
func (n *needs) shrink(t *needTable) *needTable {
	texts, bytes := 0, 0
	return n.refill(t, min(n.refused, maxNeedTexts/2), func(e *needEntry) bool {
		if !e.learned || texts == maxNeedTexts/2 || bytes+len(e.text) > maxNeedBytes/2 {
			return false
		}
		texts++
		bytes += len(e.text)
		return true
	})
}

// refill returns a table of what keep wants of t, for the given number of texts, and counts it.
func (n *needs) refill(t *needTable, texts int, keep func(*needEntry) bool) *needTable {
	fresh := newNeedTable(texts)
	n.texts, n.bytes, n.refused = 0, 0, 0
	// Not in the order of the slots: the first half of them would stay, and crowd half of the new table more each time.
	// Steps of an odd width visit every slot once; of this one, evenly from the start on.
	i := rand.Uint64()
	for range t.slots {
		i += 0x9e3779b97f4a7c15
		if e := t.slots[i&uint64(len(t.slots)-1)].Load(); e != nil && keep(e) {
			n.add(fresh, e)
		}
	}
	return fresh
}

// add stores the entry in a table that has room and does not have it.
func (n *needs) add(t *needTable, e *needEntry) {
	i := e.hash
	for t.slots[i&uint64(len(t.slots)-1)].Load() != nil {
		i++
	}
	t.slots[i&uint64(len(t.slots)-1)].Store(e)
	n.texts++
	n.bytes += len(e.text)
	if e.learned {
		n.refused++
	}
}

// A needEntry is what is known of one text. It does not change.
type needEntry struct {
	hash    uint64
	size    int    // of the text
	text    string // empty if it is longer than maxNeedText
	need    need
	learned bool
}

// A needTable has a power of two of slots, half of them empty at least; so a search ends, and soon.
type needTable struct {
	slots []atomic.Pointer[needEntry]
}

// newNeedTable returns an empty table that takes the given number of texts and as many again, 32 at least.
func newNeedTable(texts int) *needTable {
	slots := 64
	for slots < 4*texts {
		slots *= 2
	}
	return &needTable{slots: make([]atomic.Pointer[needEntry], slots)}
}

// find returns the text's slot and entry, or nil for the entry that is not there. A long text is known by its hash and
// length alone: a collision, which nobody can bring about without the seed, would send a read to the primary.
func (t *needTable) find(h uint64, sql string) (*atomic.Pointer[needEntry], *needEntry) {
	for i := h; ; i++ {
		slot := &t.slots[i&uint64(len(t.slots)-1)]
		e := slot.Load()
		if e == nil || e.hash == h && e.size == len(sql) && (e.size > maxNeedText || e.text == sql) {
			return slot, e
		}
	}
}

var needSeed = maphash.MakeSeed()

func hashNeed(sql string) uint64 { return maphash.String(needSeed, sql) }
