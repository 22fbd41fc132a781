//go:build unix

package multipool

import (
	"errors"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// cpuOf is how much of the processor this process uses while f runs.
func cpuOf(t *testing.T, f func()) (used, elapsed time.Duration) {
	t.Helper()
	var before, after syscall.Rusage
	require.NoError(t, syscall.Getrusage(syscall.RUSAGE_SELF, &before))
	begun := time.Now()
	f()
	elapsed = time.Since(begun)
	require.NoError(t, syscall.Getrusage(syscall.RUSAGE_SELF, &after))
	of := func(r syscall.Rusage) time.Duration { return time.Duration(r.Utime.Nano() + r.Stime.Nano()) }
	return of(after) - of(before), elapsed
}

// mayStopMyself skips where this process may not signal itself.
func mayStopMyself(t *testing.T) {
	t.Helper()
	if errors.Is(syscall.Kill(syscall.Getpid(), 0), syscall.EPERM) {
		t.Skip("may not signal itself")
	}
}

// giveAway makes a file the owner's of a folder.
func giveAway(t *testing.T, path, folder string) {
	t.Helper()
	info, err := os.Stat(folder)
	require.NoError(t, err)
	owner := info.Sys().(*syscall.Stat_t)
	require.NoError(t, os.Chown(path, int(owner.Uid), int(owner.Gid)))
}
