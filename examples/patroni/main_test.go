package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/pgmultipool/multipool"
)

// requirePatroni skips a test that takes a minute where nobody has asked for it.
func requirePatroni(t *testing.T) {
	t.Helper()
	if os.Getenv("MULTIPOOL_PATRONI") != "1" {
		t.Skip("MULTIPOOL_PATRONI is not 1")
	}
	for _, program := range []string{"etcd", "patroni"} {
		if _, err := find(program); err != nil {
			t.Skip(err)
		}
	}
}

func TestPatroni(t *testing.T) {
	requirePatroni(t)
	var out strings.Builder
	s := settings{readers: 10, writers: 10, ttl: shortestTTL, pace: time.Second}
	require.NoError(t, run(t.Context(), s, &out), "%s", &out)
	t.Logf("\n%s", &out)
	rest := out.String()
	for _, announcement := range []string{
		"10 readers and 10 writers share one pool.", "Switchover", " leads.", "is back as a replica", "serves reads again.",
		"switchover: no write was acknowledged for ", "and 0 failed otherwise",
		"kill -9 of ", " leads.", "is started again.", "is back as a replica", "serves reads again.",
		"kill -9: no write was acknowledged for ", "and 0 failed otherwise",
		" writes were acknowledged: 0 are lost, 0 doubled.",
	} {
		_, after, found := strings.Cut(rest, announcement)
		require.True(t, found, "%q, and in its place, in:\n%s", announcement, &out)
		rest = after
	}
}

func TestAnInterruptEndsTheStory(t *testing.T) {
	requirePatroni(t)
	ctx, cancel := context.WithTimeout(t.Context(), 12*time.Second) // the cluster is up by then, or not
	defer cancel()
	var out strings.Builder
	err := run(ctx, settings{readers: 2, writers: 2, ttl: shortestTTL, pace: time.Hour}, &out)
	require.EqualError(t, err, "interrupted")
}

func TestTheOutageIsTheLongestPauseBeforeTheNewLeaderWrites(t *testing.T) {
	zero := time.Now()
	at := func(ms int) time.Time { return zero.Add(time.Duration(ms) * time.Millisecond) }
	l := &ledger{acks: []time.Time{
		at(0), at(500), // before the event
		at(510), at(520), at(820), at(825), // the outage, which ends at 820
		at(1500), at(1505), // another, later one
	}}
	for _, taken := range []int{800, 820, 822} { // the prober is first, or not
		last, first := l.outage(at(505), at(taken))
		require.Equal(t, at(520), last)
		require.Equal(t, at(820), first)
	}
	require.True(t, l.acknowledgedSince(at(1500)))
	require.False(t, l.acknowledgedSince(at(1505)))
}

func TestTheLedgerFindsWhatIsLostOrDoubled(t *testing.T) {
	l := &ledger{}
	gone := fmt.Errorf("read tcp 127.0.0.1:4711->127.0.0.1:5432: %w", multipool.ErrOutcomeUnknown)
	for number, err := range []error{nil, nil, nil, gone, gone, errors.New("late"), errors.New("late")} {
		require.Equal(t, number, l.begin())
		l.wrote(number, err)
	}
	l.read(nil)
	l.read(errors.New("gone"))
	require.Equal(t, tally{reads: 2, failedReads: 1, writes: 7, unknownWrites: 2, failedWrites: 2}, l.now())
	require.Equal(t, tally{writes: 7, unknownWrites: 2, failedWrites: 2}, l.now().minus(tally{reads: 2, failedReads: 1}))
	require.Equal(t, map[string]int{"read: gone": 1, "write: late": 2,
		"write: read tcp 127.0.0.1:5432: multipool: the outcome of the statement is unknown": 2}, l.errors)

	kept := map[int]int{0: 1, 1: 1, 2: 1, 3: 1}
	require.Equal(t, audit{acknowledged: 3, unknown: 2, unknownExecuted: 1, failed: 2}, l.compare(kept))
	require.NoError(t, l.compare(kept).verdict())
	require.Error(t, l.compare(map[int]int{0: 1, 1: 1}).verdict(), "one is lost")
	require.Error(t, l.compare(map[int]int{0: 1, 1: 1, 2: 2}).verdict(), "one is doubled")
	require.Error(t, l.compare(map[int]int{0: 1, 1: 1, 2: 1, 4: 2}).verdict(), "one is doubled")
	require.Error(t, l.compare(map[int]int{0: 1, 1: 1, 2: 1, 5: 1}).verdict(), "one that failed is there")
}
