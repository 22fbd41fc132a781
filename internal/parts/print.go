package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"
)

// event is a line of "go test -json" (go doc test2json).
type event struct {
	Action, Test, Output string
	Elapsed              float64
}

// report is what a part's events have shown.
type report struct {
	passed, skipped int
	seed            string // of the order
	ended           bool   // well: whoever is killed says nothing
	rest            string // output of no test: a panic, what the race detector says of the end
}

// told is the time from which on a test is worth a line.
const told = time.Second

// read reads the events of a part to their end, and prints every test that has failed, was skipped or took its time.
func read(events io.Reader, out *printer) (r report) {
	said := map[string]*strings.Builder{} // by test, the subtests' under their test's name
	of := func(test string) *strings.Builder {
		top, _, _ := strings.Cut(test, "/")
		if said[top] == nil {
			said[top] = &strings.Builder{}
		}
		return said[top]
	}
	lines := bufio.NewReader(events)
	for {
		line, err := lines.ReadBytes('\n')
		if err != nil && len(line) == 0 {
			break
		}
		var e event
		if json.Unmarshal(line, &e) != nil {
			of("").Write(line)
			continue
		}
		switch top := e.Test != "" && !strings.Contains(e.Test, "/"); {
		case e.Action == "output" && strings.HasPrefix(e.Output, "-test.shuffle "):
			r.seed = strings.TrimSpace(strings.TrimPrefix(e.Output, "-test.shuffle "))
		case e.Action == "output":
			if !strings.HasPrefix(e.Output, "=== ") && e.Output != "PASS\n" {
				of(e.Test).WriteString(e.Output)
			}
		case e.Test == "" && (e.Action == "pass" || e.Action == "skip"):
			r.ended = true
		case top && e.Action == "pass":
			r.passed++
			if e.Elapsed >= told.Seconds() {
				out.print(fmt.Sprintf("--- PASS: %s (%.2fs)\n", e.Test, e.Elapsed))
			}
		case top && e.Action == "skip":
			r.skipped++
			out.print(said[e.Test].String())
		case top && e.Action == "fail":
			out.print(said[e.Test].String())
		}
		if e.Action == "pass" || e.Action == "skip" || e.Action == "fail" {
			if !strings.Contains(e.Test, "/") && e.Test != "" {
				delete(said, e.Test)
			}
		}
	}
	// What a test that has not ended said is what a panic has to say.
	for _, text := range said {
		r.rest += text.String()
	}
	return r
}

// printer prints one thing at a time.
type printer struct {
	out io.Writer

	mu              sync.Mutex
	passed, skipped int
	parts, failed   int
	again           []string
}

func (p *printer) print(text string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	fmt.Fprint(p.out, text)
}

// part prints the end of a part as "go test" prints a package's.
func (p *printer) part(of part, r report, err error, took time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.parts++
	p.passed += r.passed
	p.skipped += r.skipped
	if err == nil && !r.ended {
		err = errors.New("no end")
	}
	if err == nil {
		fmt.Fprintf(p.out, "ok  \t%s\t%.3fs\t%d tests\n", of.name(), took.Seconds(), r.passed)
		return
	}
	p.failed++
	fmt.Fprintf(p.out, "%sFAIL\t%s\t%.3fs\t%v, -shuffle=%s\n", r.rest, of.name(), took.Seconds(), err, r.seed)
	p.again = append(p.again, of.name())
}

// end prints the sum.
func (p *printer) end(took time.Duration) {
	word := "ok"
	if p.failed > 0 {
		word = "FAIL"
	}
	fmt.Fprintf(p.out, "%s\t%d tests passed, %d were skipped, in %.0f s; of %d parts %d failed\n",
		word, p.passed, p.skipped, took.Seconds(), p.parts, p.failed)
	for _, name := range p.again {
		fmt.Fprintln(p.out, "\tfailed:", name)
	}
}
