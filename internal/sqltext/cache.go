package sqltext

import (
	"hash/maphash"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
)

// The bounds of a Cache.
const (
	maxText  = 4 << 10 // a longer text is scanned every time, and only its hash is kept if a standby refused it
	maxTexts = 4 << 10 // in all
	maxBytes = 1 << 20 // of texts kept
)

// A Cache remembers where texts may run, so that a text is scanned twice and refused once, not at every call. The zero
// value is ready for use by many goroutines. Its memory is bounded. A look-up of a known text takes no lock and
// allocates nothing.
//
// It is an open-addressing hash table of pointers to immutable entries. A reader usually loads one pointer; a writer
// stores one under a lock, or replaces the table when it is half full. A map copied for every new text would cost its
// whole size every time, and a map with a locked part would make every unknown text wait for the lock.
type Cache struct {
	table atomic.Pointer[table]

	// The hashes of texts that were seen once. A program that writes its arguments into its texts never sends the same
	// text again, and such a text must not evict another: a text is kept from its second sighting on.
	seen [1024]atomic.Uint64

	mu           sync.Mutex // guards the fields below and all stores to table and to its slots
	texts, bytes int
	refused      int // texts that were learned
}

// Of returns where the text may run: what was learned of it, or what the function Of says. It never returns Unknown.
func (c *Cache) Of(sql string) Need {
	h := hashOf(sql)
	if t := c.table.Load(); t != nil {
		if _, e := t.find(h, sql); e != nil {
			return e.need
		}
	}
	need := Of(sql)
	if len(sql) > maxText {
		return need
	}
	if s := &c.seen[h>>54]; s.Load() != h {
		s.Store(h)
	} else if c.mu.TryLock() { // if another goroutine is storing a text, this one is stored at its next sighting
		c.put(h, sql, entry{need: need})
		c.mu.Unlock()
	}
	return need
}

// Learn records that a standby refused the text because it writes: from now on Of returns PrimaryOnly for it.
func (c *Cache) Learn(sql string) {
	if Of(sql) == PrimaryOnly {
		return // the text itself says so: an explicit route had sent it to a standby
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.put(hashOf(sql), sql, entry{need: PrimaryOnly, learned: true})
}

// Learned returns how many of the texts in the cache were learned.
func (c *Cache) Learned() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.refused
}

// put adds or replaces the entry of the text. It keeps a copy of sql, which may be a small part of a large buffer. The
// caller holds c.mu.
func (c *Cache) put(h uint64, sql string, e entry) {
	e.hash, e.size = h, len(sql)
	t := c.table.Load()
	if t != nil {
		if slot, old := t.find(h, sql); old != nil {
			if e.learned && !old.learned {
				e.text = old.text
				c.refused++
				slot.Store(&e)
			}
			return
		}
	}
	if len(sql) <= maxText {
		e.text = strings.Clone(sql)
	}
	switch {
	case t == nil:
		t = newTable(0)
	case c.texts == maxTexts || c.bytes+len(e.text) > maxBytes:
		t = c.shrink(t)
	case 2*c.texts >= len(t.slots):
		t = c.refill(t, c.texts, func(*entry) bool { return true })
	}
	c.add(t, &e)
	c.table.Store(t)
}

// shrink returns a table without the texts that were only scanned, which a second scan brings back. Learned texts cost
// a round trip to a standby, so up to half of the bounds of them stay; chance decides which. The other half is free
// again, so the next shrink is as many texts away.
func (c *Cache) shrink(t *table) *table {
	texts, bytes := 0, 0
	return c.refill(t, min(c.refused, maxTexts/2), func(e *entry) bool {
		if !e.learned || texts == maxTexts/2 || bytes+len(e.text) > maxBytes/2 {
			return false
		}
		texts++
		bytes += len(e.text)
		return true
	})
}

// refill returns a table, made for the given number of texts, of the entries of t that keep accepts, and counts them.
func (c *Cache) refill(t *table, texts int, keep func(*entry) bool) *table {
	fresh := newTable(texts)
	c.texts, c.bytes, c.refused = 0, 0, 0
	// Not in the order of the slots: then the first half of them would stay, and crowd one half of the new table more
	// every time. Steps of an odd width visit every slot once; steps of this width do so evenly from the start.
	i := rand.Uint64()
	for range t.slots {
		i += 0x9e3779b97f4a7c15
		if e := t.slots[i&uint64(len(t.slots)-1)].Load(); e != nil && keep(e) {
			c.add(fresh, e)
		}
	}
	return fresh
}

// add stores an entry in a table that has room and does not contain it.
func (c *Cache) add(t *table, e *entry) {
	i := e.hash
	for t.slots[i&uint64(len(t.slots)-1)].Load() != nil {
		i++
	}
	t.slots[i&uint64(len(t.slots)-1)].Store(e)
	c.texts++
	c.bytes += len(e.text)
	if e.learned {
		c.refused++
	}
}

// An entry is what is known of one text. It never changes.
type entry struct {
	hash    uint64
	size    int    // of the text
	text    string // empty if it is longer than maxText
	need    Need
	learned bool
}

// A table has a power of two of slots. At least half of them are empty, so that every search ends, and soon.
type table struct {
	slots []atomic.Pointer[entry]
}

// newTable returns an empty table with room for twice the given number of texts, and for 32 at least.
func newTable(texts int) *table {
	slots := 64
	for slots < 4*texts {
		slots *= 2
	}
	return &table{slots: make([]atomic.Pointer[entry], slots)}
}

// find returns the text's entry and its slot. If there is none, the entry is nil and the slot is the free one where it
// belongs. A long text is identified by its hash and length alone: a collision would send a read to the primary, and
// nobody can bring one about without the seed.
func (t *table) find(h uint64, sql string) (*atomic.Pointer[entry], *entry) {
	for i := h; ; i++ {
		slot := &t.slots[i&uint64(len(t.slots)-1)]
		e := slot.Load()
		if e == nil || e.hash == h && e.size == len(sql) && (e.size > maxText || e.text == sql) {
			return slot, e
		}
	}
}

var seed = maphash.MakeSeed()

func hashOf(sql string) uint64 { return maphash.String(seed, sql) }
