// Package suite runs pgxpool's own tests, of the version of pgx that go.mod names, against multipool: with the
// import path swapped, and nothing else.
package suite

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/pgmultipool/multipool/internal/pgtest"
)

// cannotPass are the tests that a pool of a primary and two standbys cannot pass by design, with the reason. On one peer
// all pass.
var cannotPass = map[string]string{
	"TestPoolQuery":                        "counts the acquired connections of Stat, which is the primary's pool, while a replica's is in use",
	"TestPoolQueryRow":                     "the same",
	"TestConnectEagerlyReachesMinPoolSize": "counts the connects in all; MinConns holds for each peer",
	"TestConnectConfig":                    "wants Config to give back no ValidateConnect; ours has what it connects to be the primary",
	"TestConstructorIgnoresContext":        "its BeforeConnect calls a func that is nil until the first Exec; the monitors connect before",
}

func TestPgxpoolsOwnTestsPassOnOnePeer(t *testing.T) {
	t.Parallel()
	c := pgtest.Start(t, pgtest.Options{})
	for _, url := range []string{c.ConnString(), c.ConnString("sslmode=")} {
		t.Run(sslmode(url), func(t *testing.T) { run(t, url) })
	}
}

func TestPgxpoolsOwnTestsPassOnAPrimaryAndTwoStandbys(t *testing.T) {
	t.Parallel()
	c := pgtest.Start(t, pgtest.Options{Standbys: 2, SyncApply: true})
	skip := make([]string, 0, len(cannotPass))
	for name := range cannotPass {
		skip = append(skip, name+"$")
	}
	slices.Sort(skip)
	for _, url := range []string{c.ConnString(), c.ConnString("sslmode=")} {
		t.Run(sslmode(url), func(t *testing.T) { run(t, url, "-skip", strings.Join(skip, "|")) })
	}
}

func sslmode(url string) string {
	if strings.Contains(url, "sslmode=") {
		return "sslmode given"
	}
	return "sslmode left out"
}

// run copies the tests into a module of their own, whose path lets them import pgx's internal packages, and runs them.
func run(t *testing.T, url string, args ...string) {
	t.Helper()
	dir := t.TempDir()
	root, err := filepath.Abs("../..")
	require.NoError(t, err)
	copyTests(t, pgxDir(t), dir)
	writeModule(t, root, dir)
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	defer cancel()
	args = append([]string{"test", "-count=1", "-timeout=3m"}, args...)
	if raceEnabled {
		args = append(args, "-race")
	}
	cmd := exec.CommandContext(ctx, "go", append(args, ".")...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "PGX_TEST_DATABASE="+url, "GOFLAGS=-mod=mod", "GOWORK=off")
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
	require.Contains(t, string(out), "ok", "%s", out)
}

// pgxDir finds the source of pgx in the module cache.
func pgxDir(t *testing.T) string {
	t.Helper()
	out, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "github.com/jackc/pgx/v5").Output()
	require.NoError(t, err)
	dir := string(bytes.TrimSpace(out))
	require.NotEmpty(t, dir, "pgx is not in the module cache")
	return dir
}

// copyTests copies pgxpool's tests with the import path swapped.
func copyTests(t *testing.T, pgx, dir string) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(pgx, "pgxpool", "*_test.go"))
	require.NoError(t, err)
	require.NotEmpty(t, files)
	for _, file := range files {
		source, err := os.ReadFile(file)
		require.NoError(t, err)
		swapped := bytes.Replace(source, []byte(`"github.com/jackc/pgx/v5/pgxpool"`), []byte(`pgxpool "github.com/pgmultipool/multipool"`), 1)
		require.NoError(t, os.WriteFile(filepath.Join(dir, filepath.Base(file)), swapped, 0o644))
	}
}

// writeModule writes the module's go.mod and go.sum from this repository's.
func writeModule(t *testing.T, root, dir string) {
	t.Helper()
	mod, err := os.ReadFile(filepath.Join(root, "go.mod"))
	require.NoError(t, err)
	text := strings.Replace(string(mod), "module github.com/pgmultipool/multipool", "module github.com/jackc/pgx/v5/multipoolsuite", 1)
	text += fmt.Sprintf("\nrequire github.com/pgmultipool/multipool v0.0.0\n\nreplace github.com/pgmultipool/multipool => %s\n", root)
	require.NoError(t, os.WriteFile(filepath.Join(dir, "go.mod"), []byte(text), 0o644))
	sum, err := os.ReadFile(filepath.Join(root, "go.sum"))
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(filepath.Join(dir, "go.sum"), sum, 0o644))
}
