package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/pgmultipool/multipool"
	"github.com/pgmultipool/multipool/internal/pgtest"
)

// The demonstration is what newcomers run first; told as fast as the pool allows, it takes 5 s to know that it works.
func TestNobodyNotices(t *testing.T) {
	cluster := pgtest.Start(t, pgtest.Options{Standbys: 2})
	var out strings.Builder
	s := settings{readers: 10, writers: 2, replicas: 2, pace: 200 * time.Millisecond}
	require.NoError(t, tell(t.Context(), cluster, s, &out), "%s", &out)
	rest := out.String()
	for _, announcement := range []string{
		"all is well.", "kill -9 of every process of node2", "node2 serves reads again",
		"SIGSTOP of every process of node3", "The pool has node3 down.", "node3 serves reads again.",
		"Fast shutdown of node2", "node2 serves reads again.",
		"kill -9 of all replicas at once", "All replicas serve reads again.",
		"kill -9 of every process of node1, the primary", "node2 is promoted.",
		"node2 took the first write through the pool ", "node1 is made a replica of node2", "node1 serves reads.",
	} {
		_, after, found := strings.Cut(rest, announcement)
		require.True(t, found, "%q, and in its place, in:\n%s", announcement, &out)
		rest = after
	}
	require.NotContains(t, out.String(), "\x1b", "not a terminal")
	require.Regexp(t, `\n\d+ calls were made, 0 failed: .* The worst read took \d+\.\d ms\.\n$`, out.String())
}

func TestAnInterruptEndsTheStory(t *testing.T) {
	cluster := pgtest.Start(t, pgtest.Options{Standbys: 1})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	out := interrupter{cancel: cancel}
	s := settings{readers: 2, writers: 1, replicas: 1, pace: time.Hour, quiet: true}
	require.ErrorContains(t, tell(ctx, cluster, s, &out), "interrupted")
	require.Contains(t, out.text.String(), "calls were made, 0 failed")
}

// interrupter is a user who presses Ctrl-C at the first announcement.
type interrupter struct {
	text   strings.Builder
	cancel context.CancelFunc
}

func (i *interrupter) Write(b []byte) (int, error) {
	i.cancel()
	return i.text.Write(b)
}

func TestEachErrorIsPrintedOnce(t *testing.T) {
	var l load
	for range 3 {
		l.reads.add(time.Millisecond, errors.New("gone"))
	}
	l.reads.add(time.Second, errors.New("late"))
	l.writes.add(time.Millisecond, nil)
	var out strings.Builder
	require.Error(t, l.report(&out))
	require.Equal(t, "3 x read: gone\n1 x read: late\n"+
		"5 calls were made, 4 failed: 4 of 4 reads, 0 of 1 writes. The worst read took 1000.0 ms.\n", out.String())
}

func TestAWriteOfUnknownOutcomeHasNotFailedWhereThePrimaryDies(t *testing.T) {
	var l load
	unknown := fmt.Errorf("%w: gone", multipool.ErrOutcomeUnknown)
	l.writes.add(time.Millisecond, nil)
	require.NoError(t, l.excuse(true)(t.Context()))
	l.writes.add(time.Millisecond, unknown)
	require.Zero(t, l.writes.firstSuccess())
	l.writes.add(time.Millisecond, nil)
	require.NotZero(t, l.writes.firstSuccess())
	var out strings.Builder
	require.NoError(t, l.report(&out))
	require.Equal(t, "1 writes whose outcome is unknown: they were in flight when the primary died.\n"+
		"3 calls were made, 0 failed: 0 of 0 reads, 0 of 3 writes. The worst read took 0.0 ms.\n", out.String())

	require.NoError(t, l.excuse(false)(t.Context()))
	l.writes.add(time.Hour, unknown)
	require.NoError(t, l.report(&out), "it was in flight then, and its caller is slow")
	l.writes.add(0, unknown)
	require.Error(t, l.report(&out))
}

func TestQuantile(t *testing.T) {
	var l tally
	require.Zero(t, (second{}).quantile(0.5))
	for i := range 100 {
		l.add(time.Duration(100-i), nil)
	}
	s := l.take()
	require.EqualValues(t, 51, s.quantile(0.5))
	require.EqualValues(t, 100, s.quantile(0.99))
	require.Empty(t, l.take().took)
}
