package multipool

import (
	"math/rand/v2"
	"os"
	"strconv"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// What whoever runs the tests has set in the environment.

// envValue returns the value of an environment variable, as parse reads it.
func envValue[T any](t testing.TB, name string, parse func(string) (T, error)) (v T, set bool) {
	t.Helper()
	text := os.Getenv(name)
	if text == "" {
		return v, false
	}
	v, err := parse(text)
	require.NoError(t, err, name)
	return v, true
}

func envNumber(t testing.TB, name string) (n int, set bool) {
	t.Helper()
	return envValue(t, name, strconv.Atoi)
}

func envDuration(t testing.TB, name string) (d time.Duration, set bool) {
	t.Helper()
	return envValue(t, name, time.ParseDuration)
}

// envSeed returns the seed that the environment has, or a new one, and logs it.
func envSeed(t testing.TB, name string) uint64 {
	t.Helper()
	seed, set := envNumber(t, name)
	if !set {
		seed = int(rand.Int32())
	}
	t.Logf("%s=%d", name, seed)
	return uint64(seed)
}
