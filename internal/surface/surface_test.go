package surface

import (
	"flag"
	"os"
	"testing"

	"github.com/stretchr/testify/require"
)

var write = flag.Bool("write", false, "write docs/api.txt instead of comparing it")

const (
	root = "../.."
	kept = root + "/docs/api.txt"
)

func TestTheSurfaceIsTheOneThatIsKept(t *testing.T) {
	text, err := Of(root)
	require.NoError(t, err)
	if *write {
		require.NoError(t, os.WriteFile(kept, []byte(text), 0o644))
	}
	was, err := os.ReadFile(kept)
	require.NoError(t, err)
	require.Equal(t, string(was), text, `the exported surface has changed: "make api" keeps it, and CHANGELOG.md says why`)
}
