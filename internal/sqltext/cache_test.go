package sqltext

import (
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"unsafe"

	"github.com/stretchr/testify/require"
)

func TestCacheKeepsATextFromItsSecondSighting(t *testing.T) {
	var c Cache
	require.Equal(t, AnyServer, c.Of("select 1"))
	texts, _ := c.size()
	require.Zero(t, texts, "a text seen once is not kept")
	require.Equal(t, AnyServer, c.Of("select 1"))
	texts, bytes := c.size()
	require.Equal(t, []int{1, 8}, []int{texts, bytes})
	require.Equal(t, AnyServer, c.Of("select 1"))

	require.Equal(t, PrimaryOnly, c.Of("delete from t"))
	require.Equal(t, PrimaryOnly, c.Of("delete from t"))
	require.Equal(t, PrimaryOnly, c.Of("delete from t"))
	texts, bytes = c.size()
	require.Equal(t, []int{2, 21}, []int{texts, bytes})
	require.Zero(t, c.Learned())
}

func TestCacheLearns(t *testing.T) {
	long := "select f($1) -- " + strings.Repeat("x", maxText)
	for name, sql := range map[string]string{"short": "select f($1)", "empty": "", "long": long, "as long as is kept": long[:maxText]} {
		for _, before := range []int{0, 1, 2, 3} {
			var c Cache
			for range before {
				require.Equal(t, AnyServer, c.Of(sql), name)
			}
			c.Learn(sql)
			require.Equal(t, PrimaryOnly, c.Of(sql), "%s, at once after %d", name, before)
			c.Learn(sql)
			require.Equal(t, PrimaryOnly, c.Of(sql), name)
			require.Equal(t, 1, c.Learned(), name)
			texts, bytes := c.size()
			require.Equal(t, 1, texts, name)
			if len(sql) > maxText {
				require.Zero(t, bytes, "only the hash of a long text is kept")
			} else {
				require.Equal(t, len(sql), bytes)
			}
			require.Equal(t, AnyServer, c.Of(sql+" "), "another text")
			if sql != "" {
				require.Equal(t, AnyServer, c.Of("S"+sql[1:]), "another text of the same length")
			}
			require.Equal(t, AnyServer, c.Of("select 1"), "another text")
		}
	}
	var c Cache
	c.Learn("delete from t")
	require.Zero(t, c.Learned(), "nothing to learn where the text says so")
}

// A text is kept as a copy: it may be a part of a large buffer.
func TestCacheKeepsACopy(t *testing.T) {
	var c Cache
	sql := strings.Clone("select f($1)")
	c.Learn(sql)
	_, e := c.table.Load().find(hashOf(sql), sql)
	require.Equal(t, sql, e.text)
	require.NotSame(t, unsafe.StringData(sql), unsafe.StringData(e.text))
}

func TestCacheLongTextsAreScannedEachTime(t *testing.T) {
	var c Cache
	long := "select '" + strings.Repeat("x", maxText) + "'"
	for range 3 {
		require.Equal(t, AnyServer, c.Of(long))
		require.Equal(t, PrimaryOnly, c.Of(long+" for update"))
	}
	texts, _ := c.size()
	require.Zero(t, texts)

	// Those that were learned are told apart by their hashes, also where they are of one length and meet in the table.
	for i := range 30 {
		c.Learn(fmt.Sprintf("select f(%4d) %s", i, long))
	}
	for i := range 1000 {
		want := AnyServer
		if i < 30 {
			want = PrimaryOnly
		}
		require.Equal(t, want, c.Of(fmt.Sprintf("select f(%4d) %s", i, long)))
	}
}

func TestCacheBounds(t *testing.T) {
	within := func(c *Cache) {
		t.Helper()
		texts, bytes := c.size()
		require.LessOrEqual(t, texts, maxTexts)
		require.LessOrEqual(t, bytes, maxBytes)
		require.LessOrEqual(t, c.Learned(), texts)
		inTable, inBytes, learned, steps := 0, 0, 0, 0
		slots := c.table.Load().slots
		for i := range slots {
			if e := slots[i].Load(); e != nil {
				inTable++
				steps += int((uint64(i) - e.hash) & uint64(len(slots)-1))
				inBytes += len(e.text)
				if e.learned {
					learned++
				}
			}
		}
		require.Equal(t, []int{inTable, inBytes, learned}, []int{texts, bytes, c.Learned()}, "what is counted is what there is")
		require.LessOrEqual(t, steps, 2*inTable+100, "a search is short: one step in a table of which half is empty")
		require.LessOrEqual(t, 2*inTable, len(slots), "half of the slots are empty")
		require.LessOrEqual(t, len(slots), 4*maxTexts)
	}
	for name, pad := range map[string]string{"many": "", "large": strings.Repeat("x", 1000)} {
		count := 8 * maxTexts
		if pad != "" {
			count = 8 * maxBytes / len(pad)
		}
		t.Run(name+" seen once", func(t *testing.T) {
			var c Cache
			for i := range count {
				require.Equal(t, AnyServer, c.Of(fmt.Sprint("select ", i, pad)))
			}
			require.Nil(t, c.table.Load(), "none is kept")
		})
		t.Run(name+" seen twice", func(t *testing.T) {
			var c Cache
			c.Learn("select f()")
			peak := 0
			for i := range count {
				sql := fmt.Sprint("select ", i, pad)
				c.Of(sql)
				require.Equal(t, AnyServer, c.Of(sql))
				if i%997 == 0 {
					within(&c)
				}
				texts, bytes := c.size()
				peak = max(peak, 1000*texts/maxTexts, 1000*bytes/maxBytes)
			}
			within(&c)
			require.Greater(t, peak, 990, "the bounds are used")
			require.Equal(t, 1, c.Learned())
			require.Equal(t, PrimaryOnly, c.Of("select f()"), "what was learned outlives what was scanned")
		})
		t.Run(name+" learned", func(t *testing.T) {
			var c Cache
			for i := range count {
				sql := fmt.Sprint("select f(", i, ")", pad)
				c.Learn(sql)
				require.Equal(t, PrimaryOnly, c.Of(sql))
				if i%997 == 0 {
					within(&c)
				}
			}
			within(&c)
			require.GreaterOrEqual(t, max(2*c.Learned()+2, 2*c.bytes/maxBytes*maxTexts), maxTexts, "half of it stays")
		})
	}
	t.Run("learned and too long", func(t *testing.T) {
		var c Cache
		pad := strings.Repeat("x", maxText)
		for i := range 10_000 {
			c.Learn(fmt.Sprint("select f(", i, ")", pad))
		}
		within(&c)
	})
}

// When it is full, what was learned keeps half of it and no more; so every time makes room for as much again.
func TestCacheShrink(t *testing.T) {
	var c Cache
	for i := range maxTexts - 100 {
		c.Learn(fmt.Sprint("select f(", i, ")"))
	}
	for i := range 100 {
		sql := fmt.Sprint("select ", i)
		c.Of(sql)
		c.Of(sql)
	}
	texts, _ := c.size()
	require.Equal(t, maxTexts, texts)
	require.Equal(t, maxTexts-100, c.Learned())
	c.Of("select 'one more'")
	c.Of("select 'one more'")
	texts, _ = c.size()
	require.Equal(t, maxTexts/2+1, texts)
	require.Equal(t, maxTexts/2, c.Learned())
}

// A text that one goroutine has learned is known to every call that begins later; a verdict never turns back; and the
// race detector has nothing to say.
func TestCacheConcurrently(t *testing.T) {
	var (
		c       Cache
		wg      sync.WaitGroup
		learned atomic.Int64 // texts below are learned
		stop    atomic.Bool
	)
	text := func(i int64) string { return fmt.Sprint("select f(", i, ")") }
	for r := range 4 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for i := 0; !stop.Load(); i++ {
				c.Of(fmt.Sprint("select ", r, i/2)) // seen twice
				if k := learned.Load(); k > 0 {
					if c.Of(text(k-1)) != PrimaryOnly {
						t.Error("a learned text is not known to another goroutine")
						return
					}
				}
				c.Of(text(learned.Load())) // the next one
				c.size()
			}
		}()
	}
	for i := range int64(maxTexts / 4) { // few enough never to be dropped
		c.Learn(text(i))
		if c.Of(text(i)) != PrimaryOnly {
			t.Error("a learned text is not known at once")
		}
		learned.Store(i + 1)
	}
	stop.Store(true)
	wg.Wait()
	for i := range int64(maxTexts / 4) {
		require.Equal(t, PrimaryOnly, c.Of(text(i)))
	}
	require.Equal(t, maxTexts/4, c.Learned())
}

func TestCacheAllocatesNothing(t *testing.T) {
	var c Cache
	scanned, learned, unknown := "select a, b, c from t where d = $1", "select f($1)", "select 'never kept: the lock is taken'"
	c.Of(scanned)
	c.Of(scanned)
	c.Learn(learned)
	texts, _ := c.size()
	require.Equal(t, 2, texts)
	require.Zero(t, testing.AllocsPerRun(100, func() { c.Of(scanned) }))
	require.Zero(t, testing.AllocsPerRun(100, func() { c.Of(learned) }))

	// Nor does a reader wait: with the lock taken, it answers.
	c.mu.Lock()
	defer c.mu.Unlock()
	require.Zero(t, testing.AllocsPerRun(100, func() { c.Of(scanned); c.Of(learned); c.Of(unknown) }))
}

const text162 = `select o.id, o.created_at, o.total, c.name, count(*) from orders o join customers c on c.id = o.customer_id where o.state = $1 and c.region in ('a', 'b') limit $2`

func BenchmarkCache(b *testing.B) {
	for _, size := range []int{30, 80, 200, 2000} {
		b.Run(fmt.Sprint("known/", size), func(b *testing.B) {
			var c Cache
			for i := range 200 {
				c.Learn(fmt.Sprint("select f(", i, ")"))
			}
			sql := ("select " + strings.Repeat("column_a, ", 300))[:size]
			c.Of(sql)
			c.Of(sql)
			for b.Loop() {
				c.Of(sql)
			}
		})
	}
	b.Run("unknown/162", func(b *testing.B) {
		var c Cache
		c.mu.Lock() // so it stays unknown
		b.SetBytes(int64(len(text162)))
		for b.Loop() {
			c.Of(text162)
		}
	})
	b.Run("scan/162", func(b *testing.B) {
		b.SetBytes(int64(len(text162)))
		for b.Loop() {
			Of(text162)
		}
	})
	b.Run("scan/4096", func(b *testing.B) {
		sql := strings.Repeat(text162+" union all ", 25)[:4096]
		b.SetBytes(int64(len(sql)))
		for b.Loop() {
			Of(sql)
		}
	})
	b.Run("learn", func(b *testing.B) {
		var c Cache
		texts := make([]string, 20_000)
		for i := range texts {
			texts[i] = fmt.Sprint("select f(", i, ")")
		}
		for i := 0; b.Loop(); i++ {
			c.Learn(texts[i%len(texts)])
		}
	})
}

// size returns how many texts are remembered, and their length.
func (c *Cache) size() (texts, bytes int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.texts, c.bytes
}
