package pgtest

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

const oldestMajor = 14

// binaries are the server programs of one PostgreSQL.
type binaries struct {
	dir     string
	version string // what postgres --version says, packager's suffix included
	major   int
}

func (b binaries) path(tool string) string { return filepath.Join(b.dir, tool) }

// found remembers the answer per environment, because asking a version costs
// a process and a test binary may start hundreds of clusters.
var found struct {
	sync.Mutex
	env string
	bin binaries
	err error
}

// findBinaries returns the PostgreSQL to use; the error says what to install.
func findBinaries() (binaries, error) {
	env := os.Getenv("MULTIPOOL_PG_BIN") + "\x00" + os.Getenv("PATH")
	found.Lock()
	defer found.Unlock()
	if found.env != env {
		found.env = env
		found.bin, found.err = lookForBinaries()
	}
	return found.bin, found.err
}

// Version returns the version of the servers that Start starts, such as "15.18".
func Version() (string, error) {
	b, err := findBinaries()
	if err != nil {
		return "", err
	}
	_, rest, _ := strings.Cut(b.version, "(PostgreSQL) ")
	version, _, _ := strings.Cut(rest, " ")
	return version, nil
}

func lookForBinaries() (binaries, error) {
	if dir := os.Getenv("MULTIPOOL_PG_BIN"); dir != "" {
		b, err := inspect(dir)
		if err != nil {
			return b, fmt.Errorf("pgtest: MULTIPOOL_PG_BIN: %w", err)
		}
		return b, nil
	}
	for _, dir := range []string{pathDir(), pgConfigDir()} {
		if b, err := inspect(dir); err == nil {
			return b, nil
		}
	}
	if b, ok := newestInstalled(); ok {
		return b, nil
	}
	return binaries{}, fmt.Errorf("pgtest: no PostgreSQL server of version %d or later found: "+
		"install one (Debian, Ubuntu: postgresql; Fedora: postgresql-server; Alpine: postgresql; "+
		"macOS: brew install postgresql) or set MULTIPOOL_PG_BIN to the folder that holds its initdb", oldestMajor)
}

// pathDir returns the folder of the initdb in $PATH, behind symbolic links, as
// the programs next to the link need not be of the same installation.
func pathDir() string {
	p, err := exec.LookPath("initdb")
	if err != nil {
		return ""
	}
	if p, err = filepath.EvalSymlinks(p); err != nil {
		return ""
	}
	return filepath.Dir(p)
}

func pgConfigDir() string {
	out, err := output("pg_config", "--bindir")
	if err != nil {
		return ""
	}
	return out
}

// newestInstalled looks where packages put server programs without putting
// them in $PATH.
func newestInstalled() (binaries, bool) {
	var all []binaries
	for _, pattern := range []string{
		"/usr/lib/postgresql/*/bin",             // Debian, Ubuntu
		"/usr/lib/postgresql*/bin",              // SUSE, Gentoo
		"/usr/lib64/postgresql*/bin",            //
		"/usr/pgsql-*/bin",                      // the PostgreSQL project's RPMs
		"/usr/libexec/postgresql*",              // Alpine
		"/usr/local/pgsql/bin",                  // make install
		"/opt/homebrew/opt/postgresql*/bin",     // Homebrew on Apple silicon
		"/usr/local/opt/postgresql*/bin",        // Homebrew on Intel
		"/opt/local/lib/postgresql*/bin",        // MacPorts
		"/Applications/Postgres.app/*/*/*/bin",  // Postgres.app
		"/home/linuxbrew/.linuxbrew/opt/p*/bin", // Homebrew on Linux
	} {
		dirs, _ := filepath.Glob(pattern) // the patterns are well-formed
		for _, dir := range dirs {
			if b, err := inspect(dir); err == nil {
				all = append(all, b)
			}
		}
	}
	if len(all) == 0 {
		return binaries{}, false
	}
	return slices.MaxFunc(all, func(a, b binaries) int { return cmp.Compare(a.major, b.major) }), true
}

func inspect(dir string) (binaries, error) {
	b := binaries{dir: dir}
	if dir == "" {
		return b, errors.New("no folder")
	}
	if _, err := os.Stat(b.path("initdb")); err != nil {
		return b, err
	}
	var err error
	if b.version, err = output(b.path("postgres"), "--version"); err != nil {
		return b, err
	}
	if b.major, err = majorVersion(b.version); err != nil {
		return b, err
	}
	if b.major < oldestMajor {
		return b, fmt.Errorf("%s: %s is older than %d", dir, b.version, oldestMajor)
	}
	return b, nil
}

// has reports whether the installation has a program: some have a server's
// own and nothing else.
func (b binaries) has(program string) bool {
	_, err := os.Stat(b.path(program))
	return err == nil
}

// majorVersion reads "postgres (PostgreSQL) 17beta1 (Debian ...)" as 17.
func majorVersion(version string) (int, error) {
	_, rest, ok := strings.Cut(version, "(PostgreSQL) ")
	digits := rest
	if i := strings.IndexFunc(rest, func(r rune) bool { return r < '0' || r > '9' }); i >= 0 {
		digits = rest[:i]
	}
	major, err := strconv.Atoi(digits)
	if !ok || err != nil {
		return 0, fmt.Errorf("version %q not understood", version)
	}
	return major, nil
}

func output(name string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, name, args...).Output()
	return strings.TrimSpace(string(out)), err
}
