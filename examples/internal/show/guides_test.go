package show

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

const root = "../../../"

var goBlock = regexp.MustCompile("(?ms)^```go\n(.*?)^```$")

// The code that a guide shows is the code that runs: all of it, and nothing else.
func TestTheCodeOfAGuideIsThatOfItsProgram(t *testing.T) {
	guides, err := filepath.Glob(root + "docs/guides/*.md")
	require.NoError(t, err)
	read := func(path string) string {
		text, err := os.ReadFile(path)
		require.NoError(t, err)
		return string(text)
	}
	index := read(root + "docs/guides/README.md")
	makefile := read(root + "Makefile")
	require.Contains(t, read(root+"README.md"), "(docs/guides/README.md)")
	checked := 0
	for _, path := range guides {
		name := strings.TrimSuffix(filepath.Base(path), ".md")
		if name == "README" {
			continue
		}
		checked++
		guide := read(path)
		blocks := goBlock.FindAllStringSubmatch(guide, -1)
		require.Len(t, blocks, 1, name)
		_, code, found := strings.Cut(read(root+"examples/"+name+"/guide.go"), "\n)\n\n") // behind the imports
		require.True(t, found)
		require.Equal(t, code, blocks[0][1], name)
		require.Contains(t, guide, "go run ./examples/"+name)
		require.Contains(t, index, "("+name+".md)")
		require.Contains(t, makefile, name)
	}
	require.Equal(t, 4, checked)
}
