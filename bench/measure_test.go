package bench

import (
	"math"
	"math/rand/v2"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"slices"
	"sync"
	"testing"
	"time"
)

// The sides of a comparison.
const (
	bare    = iota // pgxpool
	control        // pgxpool again
	ours           // multipool
	sides
)

// caller makes one call and reports what went wrong. Each belongs to one goroutine at a time.
type caller func() error

// trial is one comparison: the same call on every side.
type trial struct {
	callers [sides][]caller // as many on every side as call at once
	calls   int             // of every caller in one turn
	clock   func() time.Duration

	// refresh, where set, replaces every connection now and then.
	refresh func()
	rounds  int
}

var began = time.Now()

// wallTime is what a turn takes. One caller's is measured by it: the median turn is undisturbed.
func wallTime() time.Duration { return time.Since(began) }

// newTrial warms the sides up, so that every connection exists and every statement is prepared, and settles how many
// calls make a turn of about the given time.
func newTrial(tb testing.TB, callers [sides][]caller, clock func() time.Duration, turn time.Duration) *trial {
	tb.Helper()
	t := &trial{callers: callers, calls: 1, clock: clock}
	for took := time.Duration(0); took < 20*turn; {
		for side := range sides {
			took += t.run(tb, side)
		}
		if tb.Failed() {
			tb.FailNow()
		}
		if took < turn {
			t.calls *= 2
		}
	}
	best := time.Duration(math.MaxInt64)
	for range 5 {
		best = min(best, t.run(tb, bare))
	}
	best = max(best, time.Microsecond) // some clocks are coarse
	t.calls = max(1, int(float64(t.calls)*float64(turn)/float64(best)))
	return t
}

// run is one turn of one side.
func (t *trial) run(tb testing.TB, side int) time.Duration {
	callers := t.callers[side]
	begun := t.clock()
	if len(callers) == 1 {
		t.repeat(tb, callers[0])
		return t.clock() - begun
	}
	var wg sync.WaitGroup
	for _, c := range callers {
		wg.Go(func() { t.repeat(tb, c) })
	}
	wg.Wait()
	return t.clock() - begun
}

func (t *trial) repeat(tb testing.TB, c caller) {
	for range t.calls {
		if err := c(); err != nil {
			tb.Error(err)
			return
		}
	}
}

// sample holds a figure per round for every side, in nanoseconds per call.
type sample [sides][]float64

// round lets every side take a turn, in random order, and without the garbage collector: its runs would hit whichever
// side they like. What they cost goes by what is allocated, and that is compared by itself.
func (t *trial) round(tb testing.TB, s *sample) {
	percent := debug.SetGCPercent(-1)
	defer debug.SetGCPercent(percent)
	collect()
	if t.rounds++; t.refresh != nil && t.rounds%refreshEvery == 0 {
		t.refresh()
		for side := range sides {
			t.run(tb, side)
		}
	}
	perCall := 1 / float64(t.calls*len(t.callers[bare]))
	for _, side := range rand.Perm(sides) {
		s[side] = append(s[side], float64(t.run(tb, side))*perCall)
	}
}

const refreshEvery = 32

// collect runs the collector once there is something to collect.
func collect() {
	const enough = 8 << 20
	heap := []metrics.Sample{{Name: "/memory/classes/heap/objects:bytes"}}
	if metrics.Read(heap); heap[0].Value.Uint64() > enough {
		runtime.GC()
	}
}

// measure takes rounds until the time is over, and at least three.
func (t *trial) measure(tb testing.TB, d time.Duration) *sample {
	s := new(sample)
	for begun := time.Now(); len(s[bare]) < 3 || time.Since(begun) < d; {
		t.round(tb, s)
		if tb.Failed() {
			tb.FailNow()
		}
	}
	return s
}

// figure is a median and the quartiles around it.
type figure struct{ low, mid, high float64 }

func figureOf(v []float64) figure {
	v = slices.Sorted(slices.Values(v))
	at := func(p float64) float64 { return v[int(p*float64(len(v)-1)+0.5)] }
	return figure{at(0.25), at(0.5), at(0.75)}
}

// side is what a call costs there.
func (s *sample) side(side int) figure { return figureOf(s[side]) }

// over is by how much a call costs more there than on bare pgxpool, turn by turn.
func (s *sample) over(side int) figure {
	d := make([]float64, len(s[side]))
	for i := range d {
		d[i] = s[side][i] - s[bare][i]
	}
	return figureOf(d)
}

// ratio is over as a quotient.
func (s *sample) ratio(side int) figure {
	d := make([]float64, len(s[side]))
	for i := range d {
		d[i] = s[side][i] / s[bare][i]
	}
	return figureOf(d)
}

// allocs counts the allocations of one call of one side, and their bytes. Slabs and pools make it a fraction, so that
// many calls are counted; the least of three counts is free of what the runtime allocates for itself.
func (t *trial) allocs(tb testing.TB, side, calls int) (objects, size float64) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	c := t.callers[side][0]
	for i := range 3 {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		for range calls {
			if err := c(); err != nil {
				tb.Fatal(err)
			}
		}
		runtime.ReadMemStats(&after)
		n := float64(after.Mallocs-before.Mallocs) / float64(calls)
		b := float64(after.TotalAlloc-before.TotalAlloc) / float64(calls)
		if i == 0 || n < objects {
			objects, size = n, b
		}
	}
	return objects, size
}

// benchmark reports a trial in the terms of package testing.
func (t *trial) benchmark(b *testing.B) {
	s := new(sample)
	for b.Loop() {
		t.round(b, s)
		if b.Failed() {
			b.FailNow()
		}
	}
	b.ReportMetric(s.side(ours).mid, "ns/op")
	b.ReportMetric(s.side(bare).mid, "pgxpool-ns/op")
	b.ReportMetric(s.over(ours).mid, "ns-over-pgxpool")
	b.ReportMetric(s.over(control).mid, "ns-over-control")
	for name, side := range map[string]int{"ratio": ours, "control": control} {
		f := s.ratio(side)
		b.ReportMetric(f.low, name+"-q1")
		b.ReportMetric(f.mid, name)
		b.ReportMetric(f.high, name+"-q3")
	}
}
