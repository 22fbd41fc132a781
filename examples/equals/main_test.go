package main

import (
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/pgmultipool/multipool/internal/pgtest"
)

func TestEqualsServeAlikeAndModelsStayApart(t *testing.T) {
	var peers []*pgtest.Server
	for range 4 {
		peers = append(peers, pgtest.Start(t, pgtest.Options{}).Primary())
	}
	var out strings.Builder
	require.NoError(t, tell(t.Context(), peers, &out, 200*time.Millisecond), "%s", &out)
	require.Contains(t, out.String(), "all kept.")
	require.NotContains(t, out.String(), "BROKEN")
}
