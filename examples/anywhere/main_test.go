package main

import (
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/pgmultipool/multipool/internal/pgtest"
)

func TestReadsAreOnBoth(t *testing.T) {
	cluster := pgtest.Start(t, pgtest.Options{Standbys: 1})
	var out strings.Builder
	require.NoError(t, tell(t.Context(), cluster, &out, 200*time.Millisecond), "%s", &out)
	require.Contains(t, out.String(), "all kept.")
	require.NotContains(t, out.String(), "BROKEN")
}
