package main

import (
	"bufio"
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"runtime"
	"slices"
	"strings"
	"time"
)

// result is what a run has shown.
type result struct {
	at                    time.Time
	postgres, pgx, golang string
	passed                int
	failed                []string
	skipped               map[string][]string // by reason, the tests
}

// event is a line of "go test -json" (go doc test2json).
type event struct {
	Action, Package, Test, Output string
}

// read reads the events of a run to their end. Progress goes to standard output as a dot for every test.
func (r *result) read(events io.Reader) error {
	r.skipped = map[string][]string{}
	said := map[string]string{} // the last line of every test
	for s := bufio.NewReader(events); ; {
		line, err := s.ReadBytes('\n')
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
		var e event
		if json.Unmarshal(line, &e) != nil {
			continue // of the build
		}
		name := e.Package + " " + e.Test
		switch e.Action {
		case "output":
			if text := strings.TrimSpace(e.Output); text != "" && !strings.HasPrefix(text, "---") && !strings.HasPrefix(text, "===") {
				said[name] = text
			}
		case "pass":
			if e.Test != "" {
				r.passed++
			}
		case "fail":
			if e.Test == "" && slices.ContainsFunc(r.failed, func(f string) bool { return strings.HasPrefix(f, name) }) {
				continue // of one of its tests
			}
			r.failed = append(r.failed, name)
			fmt.Println("--- FAIL", name, said[name])
		case "skip":
			if e.Test != "" {
				reason := said[name]
				if _, after, ok := strings.Cut(reason, ".go:"); ok { // file.go:12: reason
					_, reason, _ = strings.Cut(after, ": ")
				}
				r.skipped[reason] = append(r.skipped[reason], e.Test)
			}
		}
	}
	return nil
}

func (r *result) skips() (n int) {
	for _, tests := range r.skipped {
		n += len(tests)
	}
	return n
}

// line is the run as a row of the table.
func (r *result) line() string {
	return fmt.Sprintf("| %s | %s | %s | %s | %d | %d | %d |", r.at.Format(time.DateOnly), r.postgres, r.golang, r.pgx,
		r.passed, len(r.failed), r.skips())
}

// page is docs/versions.md.
func page(results []result) string {
	var b strings.Builder
	fmt.Fprintf(&b, `# Versions

What the tests were run on, as `+"`make test-versions`"+` has printed it (%s/%s): the root package, the servers' own tests and
pgxpool's suite. PostgreSQL 15 is Debian's; the others come without pg_rewind, pg_basebackup and psql, so that the test
cluster copies servers itself.

| date | PostgreSQL | Go | pgx | passed | failed | skipped |
|---|---|---|---|---|---|---|
`, runtime.GOOS, runtime.GOARCH)
	for i := range results {
		fmt.Fprintln(&b, results[i].line())
	}
	skips := map[string]map[string][]string{} // by reason and test, the versions
	for _, r := range results {
		for reason, tests := range r.skipped {
			if skips[reason] == nil {
				skips[reason] = map[string][]string{}
			}
			for _, t := range tests {
				if v := skips[reason][t]; !slices.Contains(v, r.postgres) {
					skips[reason][t] = append(v, r.postgres)
				}
			}
		}
	}
	b.WriteString("\n## Skipped\n\n| test | on | why |\n|---|---|---|\n")
	for _, reason := range slices.Sorted(maps.Keys(skips)) {
		for _, test := range slices.Sorted(maps.Keys(skips[reason])) {
			fmt.Fprintf(&b, "| %s | %s | %s |\n", test, strings.Join(skips[reason][test], ", "), cmp.Or(reason, "not said"))
		}
	}
	if failed := failures(results); failed != "" {
		b.WriteString("\n## Failed\n\n" + failed)
	}
	return b.String()
}

func failures(results []result) string {
	var b strings.Builder
	for _, r := range results {
		for _, name := range r.failed {
			fmt.Fprintf(&b, "- %s, on PostgreSQL %s, Go %s, pgx %s\n", name, r.postgres, r.golang, r.pgx)
		}
	}
	return b.String()
}
