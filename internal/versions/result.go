package main

import (
	"bufio"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"runtime"
	"slices"
	"strings"
	"time"
)

// result is what a run has shown.
type result struct {
	At       time.Time
	Postgres string
	Pgx      string
	Go       string
	Passed   int
	Failed   []string
	Skipped  map[string][]string // by reason, the tests
}

// kept is where the last results are, of every combination one, so that a run of some replaces those.
const kept = "internal/versions/results.json"

// keep puts results into those that are kept, in the order of the combinations, and returns all.
func keep(results []result) ([]result, error) {
	var all []result
	text, err := os.ReadFile(kept)
	if err == nil {
		err = json.Unmarshal(text, &all)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	for _, r := range results {
		same := func(o result) bool { return o.Postgres == r.Postgres && o.Pgx == r.Pgx && o.Go == r.Go }
		if i := slices.IndexFunc(all, same); i >= 0 {
			all[i] = r
		} else {
			all = append(all, r)
		}
	}
	slices.SortStableFunc(all, func(a, b result) int {
		return cmp.Or(cmp.Compare(a.Go, b.Go), -cmp.Compare(a.Pgx, b.Pgx), cmp.Compare(a.Postgres, b.Postgres))
	})
	if text, err = json.MarshalIndent(all, "", "\t"); err != nil {
		return nil, err
	}
	return all, os.WriteFile(kept, append(text, '\n'), 0o644)
}

// event is a line of "go test -json" (go doc test2json).
type event struct {
	Action, Package, Test, Output string
}

// read reads the events of a run to their end. Progress goes to standard output as a dot for every test.
func (r *result) read(events io.Reader) error {
	r.Skipped = map[string][]string{}
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
				r.Passed++
			}
		case "fail":
			if e.Test == "" && slices.ContainsFunc(r.Failed, func(f string) bool { return strings.HasPrefix(f, name) }) {
				continue // of one of its tests
			}
			r.Failed = append(r.Failed, name)
			fmt.Println("--- FAIL", name, said[name])
		case "skip":
			if e.Test != "" {
				reason := said[name]
				if _, after, ok := strings.Cut(reason, ".go:"); ok { // file.go:12: reason
					_, reason, _ = strings.Cut(after, ": ")
				}
				r.Skipped[reason] = append(r.Skipped[reason], e.Test)
			}
		}
	}
	return nil
}

func (r *result) skips() (n int) {
	for _, tests := range r.Skipped {
		n += len(tests)
	}
	return n
}

// line is the run as a row of the table.
func (r *result) line() string {
	return fmt.Sprintf("| %s | %s | %s | %s | %d | %d | %d |", r.At.Format(time.DateOnly), r.Postgres, r.Go, r.Pgx,
		r.Passed, len(r.Failed), r.skips())
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
		for reason, tests := range r.Skipped {
			if skips[reason] == nil {
				skips[reason] = map[string][]string{}
			}
			for _, t := range tests {
				if v := skips[reason][t]; !slices.Contains(v, r.Postgres) {
					skips[reason][t] = append(v, r.Postgres)
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
		for _, name := range r.Failed {
			fmt.Fprintf(&b, "- %s, on PostgreSQL %s, Go %s, pgx %s\n", name, r.Postgres, r.Go, r.Pgx)
		}
	}
	return b.String()
}
