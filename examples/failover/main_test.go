package main

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/pgmultipool/multipool/internal/pgtest"
)

// The demonstration is what newcomers run first; told at ten times the pace it costs a second to know that it works.
func TestNobodyNotices(t *testing.T) {
	cluster := pgtest.Start(t, pgtest.Options{Standbys: 2})
	var out strings.Builder
	s := settings{readers: 10, writers: 2, replicas: 2, pace: 500 * time.Millisecond}
	require.NoError(t, tell(t.Context(), cluster, s, &out), "%s", &out)
	require.Contains(t, out.String(), "node2 serves reads again.")
	require.Regexp(t, `\d+ calls were made, 0 failed`, out.String())
}

func TestAnInterruptEndsTheStory(t *testing.T) {
	cluster := pgtest.Start(t, pgtest.Options{Standbys: 1})
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	var out strings.Builder
	s := settings{readers: 2, writers: 1, replicas: 1, pace: time.Hour, quiet: true}
	require.ErrorContains(t, tell(ctx, cluster, s, &out), "interrupted")
	require.Contains(t, out.String(), "calls were made, 0 failed")
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
		"5 calls were made, 4 failed: 4 of 4 reads, 0 of 1 writes. The slowest read took 1000.0 ms.\n", out.String())
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
