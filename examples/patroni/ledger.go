package main

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/pgmultipool/multipool"
)

// ledger knows what became of every write and read, as far as its caller was told. Every write has a number, which it
// appends to the table written; that has no key, so that a write which is executed twice stands there twice.
type ledger struct {
	mu sync.Mutex
	tally
	fates  []fate      // of the writes, by number, the first of which is 0
	acks   []time.Time // of the acknowledged ones, in that order
	errors map[string]int
}

// tally counts calls that have ended.
type tally struct {
	reads, failedReads                  int
	writes, unknownWrites, failedWrites int
}

func (t tally) minus(u tally) tally {
	return tally{t.reads - u.reads, t.failedReads - u.failedReads,
		t.writes - u.writes, t.unknownWrites - u.unknownWrites, t.failedWrites - u.failedWrites}
}

// fate is what the caller of a write knows about it.
type fate uint8

const (
	inFlight     fate = iota
	acknowledged      // it is there
	unknown           // it is there or not: multipool.ErrOutcomeUnknown
	failed            // it is not there: any other error
)

// begin returns the number of a new write.
func (l *ledger) begin() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.fates = append(l.fates, inFlight)
	return len(l.fates) - 1
}

// wrote enters the end of a write.
func (l *ledger) wrote(number int, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.writes++
	switch {
	case err == nil:
		l.fates[number] = acknowledged
		l.acks = append(l.acks, time.Now())
		return
	case errors.Is(err, multipool.ErrOutcomeUnknown):
		l.fates[number] = unknown
		l.unknownWrites++
	default:
		l.fates[number] = failed
		l.failedWrites++
	}
	l.count("write: " + err.Error())
}

// read enters the end of a read.
func (l *ledger) read(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.reads++
	if err != nil {
		l.failedReads++
		l.count("read: " + err.Error())
	}
}

// ownPort is what makes the errors of connections that were lost at once differ.
var ownPort = regexp.MustCompile(`127\.0\.0\.1:\d+->`)

func (l *ledger) count(text string) {
	text = ownPort.ReplaceAllString(text, "")
	if l.errors == nil {
		l.errors = make(map[string]int)
	}
	l.errors[text]++
}

func (l *ledger) now() tally {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.tally
}

// acknowledgedSince reports whether a write has been acknowledged after t.
func (l *ledger) acknowledgedSince(t time.Time) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.acks) > 0 && l.acks[len(l.acks)-1].After(t)
}

// outage returns between which two acknowledgements nothing was written for longest, of the pauses that ended after
// begin and had begun before the new leader took writes. Later pauses are another matter, and may be the prober that
// came second.
func (l *ledger) outage(begin, taken time.Time) (last, first time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i := 1; i < len(l.acks); i++ {
		from, to := l.acks[i-1], l.acks[i]
		if to.After(begin) && from.Before(taken) && to.Sub(from) > first.Sub(last) {
			last, first = from, to
		}
	}
	return last, first
}

// audit is what stands in the table, against what the callers were told.
type audit struct {
	acknowledged, lost, doubled int
	unknown, unknownExecuted    int
	failed, failedExecuted      int
}

// check compares the ledger, when all calls have ended, with the table.
func (l *ledger) check(ctx context.Context, conn *pgx.Conn) (audit, error) {
	found := make(map[int]int)
	rows, err := conn.Query(ctx, "select number, count(*) from written group by number")
	if err != nil {
		return audit{}, err
	}
	var number, times int
	_, err = pgx.ForEachRow(rows, []any{&number, &times}, func() error {
		found[number] = times
		return nil
	})
	if err != nil {
		return audit{}, err
	}
	return l.compare(found), nil
}

// compare is given how often every number was found.
func (l *ledger) compare(found map[int]int) audit {
	l.mu.Lock()
	defer l.mu.Unlock()
	var a audit
	for number, fate := range l.fates {
		times := found[number]
		if times > 1 {
			a.doubled++
		}
		there := min(times, 1)
		switch fate {
		case acknowledged:
			a.acknowledged++
			a.lost += 1 - there
		case unknown:
			a.unknown++
			a.unknownExecuted += there
		case failed:
			a.failed++
			a.failedExecuted += there
		}
	}
	return a
}

func (a audit) String() string {
	return fmt.Sprintf("%d writes were acknowledged: %d are lost, %d doubled. "+
		"The outcome of %d was unknown: %d were executed. %d failed: %d were executed all the same.",
		a.acknowledged, a.lost, a.doubled, a.unknown, a.unknownExecuted, a.failed, a.failedExecuted)
}

// verdict is an error if a promise is broken.
func (a audit) verdict() error {
	switch {
	case a.lost > 0:
		return errors.New("acknowledged writes are lost")
	case a.doubled > 0:
		return errors.New("writes were executed twice")
	case a.failedExecuted > 0:
		return errors.New("writes were executed that were said not to be")
	}
	return nil
}
