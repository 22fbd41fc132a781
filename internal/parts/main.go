// Command parts runs the tests of the module in the current folder, as "go test" does, but a package with many tests in
// several processes beside each other, and prints every test that took its time as it ends. scripts/test.sh is what runs it.
//
// Most tests wait for real servers, and one processor is idle where one test runs at a time. They are processes and not
// parallel tests because some count goroutines and files, stop their process, or fill its table of files.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

func main() {
	log.SetFlags(0)
	log.SetPrefix("parts: ")
	race := flag.Bool("race", false, "with the race detector")
	beside := flag.Int("beside", max(2, runtime.NumCPU()), "how many `processes` run beside each other")
	timeout := flag.Duration("timeout", 20*time.Minute, "of every process")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()

	dir, err := os.MkdirTemp("", "multipool-parts-")
	if err != nil {
		log.Fatal(err)
	}
	failed, err := run(ctx, dir, *race, *beside, *timeout)
	if err := errors.Join(err, os.RemoveAll(dir)); err != nil {
		log.Fatal(err)
	}
	if failed > 0 || ctx.Err() != nil {
		os.Exit(1)
	}
}

// run builds the tests into the folder and runs them. It returns how many parts have failed.
func run(ctx context.Context, dir string, race bool, beside int, timeout time.Duration) (failed int, err error) {
	build := []string{"test", "-c", "-o", dir + string(filepath.Separator)}
	if race {
		build = append(build, "-race")
	}
	if _, err := output(ctx, ".", "go", append(build, "./...")...); err != nil {
		return 0, err
	}
	list, err := output(ctx, ".", "go", "list", "-f", "{{if or .TestGoFiles .XTestGoFiles}}{{.ImportPath}} {{.Dir}}{{end}}", "./...")
	if err != nil {
		return 0, err
	}
	var all []part
	for _, line := range strings.Fields(strings.ReplaceAll(list, " ", "\x00")) {
		path, folder, _ := strings.Cut(line, "\x00")
		p := part{pkg: path, dir: folder, binary: filepath.Join(dir, filepath.Base(path)+".test")}
		tests, err := output(ctx, folder, p.binary, "-test.list", "^(Test|Fuzz|Example)")
		if err != nil {
			return 0, err
		}
		all = append(all, p.split(strings.Fields(tests))...)
	}
	// The packages that are one part first: theirs may take longer than any part of a package that is split.
	slices.SortStableFunc(all, func(a, b part) int { return a.of - b.of })

	printer := &printer{out: os.Stdout}
	begun := time.Now()
	queue := make(chan part)
	var workers sync.WaitGroup
	for range beside {
		workers.Go(func() {
			for p := range queue {
				p.run(ctx, printer, timeout)
			}
		})
	}
	for _, p := range all {
		if ctx.Err() == nil {
			queue <- p
		}
	}
	close(queue)
	workers.Wait()
	printer.end(time.Since(begun))
	return printer.failed, nil
}

// perPart is how many tests make a part.
const perPart = 30

// part is some tests of a package, in one process.
type part struct {
	pkg, dir, binary string
	n, of            int
	tests            []string
}

// split deals the tests out to as many parts as they need. Neighbors often take equally long, and go to different parts.
func (p part) split(tests []string) []part {
	p.of = (len(tests) + perPart - 1) / perPart
	parts := make([]part, p.of)
	for i := range parts {
		parts[i] = p
		parts[i].n = i + 1
	}
	for i, name := range tests {
		parts[i%p.of].tests = append(parts[i%p.of].tests, name)
	}
	return parts
}

// name is the package's, and which part of it where there are several.
func (p part) name() string {
	if p.of == 1 {
		return p.pkg
	}
	return fmt.Sprintf("%s (part %d of %d)", p.pkg, p.n, p.of)
}

// pattern is what -run takes for the part's tests.
func (p part) pattern() string {
	quoted := make([]string, len(p.tests))
	for i, name := range p.tests {
		quoted[i] = regexp.QuoteMeta(name)
	}
	return "^(" + strings.Join(quoted, "|") + ")$"
}

// run runs the part and has its events printed.
func (p part) run(ctx context.Context, out *printer, timeout time.Duration) {
	cmd := exec.CommandContext(ctx, "go", "tool", "test2json", "-t", "-p", p.pkg, p.binary, "-test.v=test2json",
		"-test.paniconexit0", "-test.shuffle=on", "-test.timeout="+timeout.String(), "-test.run="+p.pattern())
	cmd.Dir = p.dir
	// An interrupt ends the tests as it would end "go test": they stop their servers.
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 10 * time.Second
	events, to := io.Pipe()
	cmd.Stdout, cmd.Stderr = to, to
	begun := time.Now()
	told := make(chan report, 1)
	go func() { told <- read(events, out) }()
	err := cmd.Run()
	to.Close()
	out.part(p, <-told, err, time.Since(begun))
}

func output(ctx context.Context, dir, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir, cmd.Stderr = dir, os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("%s %s: %w", name, strings.Join(args, " "), err)
	}
	return string(out), nil
}
