package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/pgmultipool/multipool"
)

const (
	accounts = 1000

	// What a call may take: far more than it does, far less than a user waits.
	deadline = 5 * time.Second

	// How long a caller rests between two calls, on average. Without a rest fifty readers would measure how two cores
	// are shared out, and not the pool.
	readerRest = 25 * time.Millisecond
	writerRest = 50 * time.Millisecond
)

// load is readers and writers that share one pool.
type load struct {
	writers       int
	reads, writes tally
	stopped       chan struct{}
	callers       sync.WaitGroup
}

func startLoad(pool *multipool.MultiPool, readers, writers int) *load {
	l := &load{writers: writers, stopped: make(chan struct{})}
	for range readers {
		l.callers.Go(func() {
			l.repeat(&l.reads, readerRest, func(ctx context.Context) error {
				var balance int64
				return pool.QueryRow(ctx, "select balance from account where id = $1", anAccount()).Scan(&balance)
			})
		})
	}
	for range writers {
		l.callers.Go(func() {
			l.repeat(&l.writes, writerRest, func(ctx context.Context) error {
				tag, err := pool.Exec(ctx, "update account set balance = balance + 1 where id = $1", anAccount())
				if err == nil && tag.RowsAffected() != 1 {
					err = fmt.Errorf("%d rows updated, not 1", tag.RowsAffected())
				}
				return err
			})
		})
	}
	return l
}

// excuse says whether writes may have an unknown outcome from now on, as those do that are in flight when the primary
// dies.
func (l *load) excuse(is bool) action {
	return func(context.Context) error { l.writes.excuse(is); return nil }
}

func anAccount() int { return 1 + rand.N(accounts) }

// repeat calls and rests until the load is stopped. A call in progress then is let finish: one that the demonstration
// itself cut off would count as an error.
func (l *load) repeat(t *tally, rest time.Duration, call func(context.Context) error) {
	for {
		select {
		case <-l.stopped:
			return
		case <-time.After(rand.N(2 * rest)):
		}
		ctx, cancel := context.WithTimeout(context.Background(), deadline)
		begin := time.Now()
		err := call(ctx)
		t.add(time.Since(begin), err)
		cancel()
	}
}

// stop returns when the last call has.
func (l *load) stop() {
	close(l.stopped)
	l.callers.Wait()
}

// report prints every text of an error once, then how many calls were made and how many failed; it is an error if any
// did. A write that was in flight when the primary died did not fail: nobody can know, and its caller was told so.
func (l *load) report(out io.Writer) error {
	l.reads.printErrors(out, "read")
	l.writes.printErrors(out, "write")
	if l.writes.unknown > 0 {
		fmt.Fprintf(out, "%d writes whose outcome is unknown: they were in flight when the primary died.\n", l.writes.unknown)
	}
	fmt.Fprintf(out, "%d calls were made, %d failed: %d of %d reads, %d of %d writes. The worst read took %s.\n",
		l.reads.calls+l.writes.calls, l.reads.failed+l.writes.failed,
		l.reads.failed, l.reads.calls, l.writes.failed, l.writes.calls, millis(l.reads.worst))
	if l.reads.failed+l.writes.failed > 0 {
		return errors.New("callers saw errors")
	}
	return nil
}

// tally counts calls of one kind, in all and since the last take.
type tally struct {
	mu            sync.Mutex
	calls, failed int
	excused       bool      // an unknown outcome is no failure now
	until         time.Time // when it last ceased to be none
	unknown       int       // outcomes that were excused
	worst         time.Duration
	errors        map[string]int // how often every text
	first         time.Time      // when a call first succeeded since the last excuse
	now           second
}

// second is what happened between two takes.
type second struct {
	took   []time.Duration // of every call: exact quantiles cost less than a histogram's code
	failed int
	worst  time.Duration // of all calls so far
}

func (t *tally) add(took time.Duration, err error) {
	began := time.Now().Add(-took) // what was in flight then may be reported late, by a caller that is slow
	t.mu.Lock()
	defer t.mu.Unlock()
	t.calls++
	t.worst = max(t.worst, took)
	t.now.took = append(t.now.took, took)
	switch {
	case err == nil:
		if t.first.IsZero() {
			t.first = time.Now()
		}
	case (t.excused || t.until.After(began)) && errors.Is(err, multipool.ErrOutcomeUnknown):
		t.unknown++
	default:
		t.failed++
		t.now.failed++
		if t.errors == nil {
			t.errors = make(map[string]int)
		}
		t.errors[err.Error()]++
	}
}

// excuse says whether an unknown outcome is no failure from now on, and forgets the first success.
func (t *tally) excuse(is bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.excused, t.first = is, time.Time{}
	if !is {
		t.until = time.Now()
	}
}

// firstSuccess returns when the first call since then succeeded; zero if none has.
func (t *tally) firstSuccess() time.Time {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.first
}

// take returns what has happened since the last take, calls sorted by how long they took.
func (t *tally) take() second {
	t.mu.Lock()
	s := t.now
	s.worst = t.worst
	t.now = second{took: make([]time.Duration, 0, len(s.took))}
	t.mu.Unlock()
	slices.Sort(s.took)
	return s
}

// quantile returns the time within which the share q of the calls came back.
func (s second) quantile(q float64) time.Duration {
	if len(s.took) == 0 {
		return 0
	}
	return s.took[min(int(q*float64(len(s.took))), len(s.took)-1)]
}

func (t *tally) printErrors(out io.Writer, kind string) {
	texts := slices.SortedFunc(maps.Keys(t.errors), func(a, b string) int {
		return cmp.Or(t.errors[b]-t.errors[a], cmp.Compare(a, b))
	})
	for _, text := range texts {
		fmt.Fprintf(out, "%d x %s: %s\n", t.errors[text], kind, text)
	}
}
