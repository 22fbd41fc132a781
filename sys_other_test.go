//go:build !unix

package multipool

import (
	"testing"
	"time"
)

// What these do needs Unix; no test comes here, as servers are not started elsewhere (internal/pgtest).

func cpuOf(t *testing.T, _ func()) (used, elapsed time.Duration) {
	t.Skip("needs Unix")
	return 0, 0
}

func mayStopMyself(t *testing.T) { t.Skip("needs Unix") }

func giveAway(t *testing.T, _, _ string) { t.Skip("needs Unix") }
