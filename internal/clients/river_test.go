package clients

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/pgmultipool/multipool/internal/pgtest"
)

// River's own tree, of the version that go.mod names, with the import path of pgxpool swapped and nothing else: everything
// compiles, tests included, and its tests of the driver, the migrator, the client and the test helpers pass.
func TestRiversOwnTreeWithTheImportSwapped(t *testing.T) {
	if os.Getenv("MULTIPOOL_RIVER") == "" {
		t.Skip("MULTIPOOL_RIVER is not set, as by make test-all: it takes some minutes")
	}
	dir := t.TempDir()
	root, err := filepath.Abs("../..")
	require.NoError(t, err)
	river := filepath.Join(dir, "river")
	const module = "github.com/riverqueue/river"
	nested := []string{"/riverdriver/riverpgxv5", "/rivershared"} // those that name pgxpool, where the tests look for them
	swapped := 0
	for _, path := range append([]string{""}, nested...) {
		out, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", module+path).Output()
		require.NoError(t, err)
		swapped += copySwapped(t, strings.TrimSpace(string(out)), river+path)
	}
	require.Greater(t, swapped, 30, "files that name pgxpool")
	mod, err := os.OpenFile(filepath.Join(river, "go.mod"), os.O_APPEND|os.O_WRONLY, 0)
	require.NoError(t, err)
	fmt.Fprintf(mod, "\nrequire github.com/pgmultipool/multipool v0.0.0\n\nreplace github.com/pgmultipool/multipool => %s\n", root)
	for _, path := range nested {
		fmt.Fprintf(mod, "\nreplace %s => .%s\n", module+path, path)
	}
	require.NoError(t, mod.Close())

	driver := module + nested[0]
	runIn(t, river, nil, "vet", "./...", driver+"/...")
	c := pgtest.Start(t, pgtest.Options{})
	runIn(t, river, []string{"TEST_DATABASE_URL=" + c.ConnString()}, "test", "-count=1", "-timeout=8m", "-p=1", driver, "./rivermigrate", "./rivertest", ".")
}

// copySwapped copies a module's files, with the import path swapped, and returns in how many.
func copySwapped(t *testing.T, from, to string) (swapped int) {
	t.Helper()
	require.NoError(t, os.CopyFS(to, os.DirFS(from)))
	require.NoError(t, filepath.WalkDir(to, func(path string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			return os.Chmod(path, 0o755) // a module in the cache is read-only
		}
		if err := os.Chmod(path, 0o644); err != nil || filepath.Ext(path) != ".go" {
			return err
		}
		source, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		now := bytes.ReplaceAll(source, []byte(`	"github.com/jackc/pgx/v5/pgxpool"`), []byte(`	pgxpool "github.com/pgmultipool/multipool"`))
		if bytes.Equal(now, source) {
			return nil
		}
		swapped++
		return os.WriteFile(path, now, 0o644)
	}))
	return swapped
}

func runIn(t *testing.T, dir string, env []string, args ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 9*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir = dir
	cmd.Env = append(append(os.Environ(), "GOFLAGS=-mod=mod", "GOWORK=off"), env...)
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "go %s:\n%s", strings.Join(args, " "), out)
}
