package main

import (
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestEveryTestIsInOnePart(t *testing.T) {
	var names []string
	for i := range 2*perPart + 1 {
		names = append(names, "Test"+strings.Repeat("x", i+1))
	}
	parts := part{pkg: "p"}.split(names)
	require.Len(t, parts, 3)
	for _, name := range names {
		in := 0
		for _, p := range parts {
			if regexp.MustCompile(p.pattern()).MatchString(name) {
				in++
			}
		}
		assert.Equal(t, 1, in, name)
	}
	assert.Equal(t, "p (part 2 of 3)", parts[1].name())
	assert.Equal(t, "p", part{pkg: "p"}.split(names[:perPart])[0].name())
}

func TestWhatIsPrintedOfAPart(t *testing.T) {
	var out strings.Builder
	p := &printer{out: &out}
	r := read(strings.NewReader(`
{"Action":"start","Package":"p"}
{"Action":"output","Output":"-test.shuffle 17\n"}
{"Action":"output","Test":"TestQuick","Output":"=== RUN   TestQuick\n"}
{"Action":"output","Test":"TestQuick","Output":"    a_test.go:1: nobody wants to know\n"}
{"Action":"pass","Test":"TestQuick","Elapsed":0.1}
{"Action":"pass","Test":"TestSlow","Elapsed":2.5}
{"Action":"output","Test":"TestNot","Output":"    a_test.go:2: not here\n"}
{"Action":"output","Test":"TestNot","Output":"--- SKIP: TestNot (0.00s)\n"}
{"Action":"skip","Test":"TestNot"}
{"Action":"output","Test":"TestBad/sub","Output":"    a_test.go:3: wrong\n"}
{"Action":"fail","Test":"TestBad/sub"}
{"Action":"output","Test":"TestBad","Output":"--- FAIL: TestBad (0.00s)\n"}
{"Action":"fail","Test":"TestBad"}
{"Action":"output","Test":"TestEndless","Output":"    a_test.go:4: still here\n"}
{"Action":"output","Output":"panic: test timed out\n"}
WARNING: of the linker
{"Action":"fail"}
`), p)
	p.part(part{pkg: "p", of: 1}, r, assert.AnError, 3_000_000_000)
	assert.Equal(t, 2, r.passed)
	assert.Equal(t, 1, r.skipped)
	printed := out.String()
	for _, want := range []string{"--- PASS: TestSlow (2.50s)\n", "a_test.go:2: not here", "--- SKIP: TestNot", "a_test.go:3: wrong",
		"--- FAIL: TestBad", "a_test.go:4: still here", "panic: test timed out", "WARNING: of the linker", "FAIL\tp\t3.000s", "-shuffle=17"} {
		assert.Contains(t, printed, want)
	}
	assert.NotContains(t, printed, "nobody wants to know")
	assert.Equal(t, 1, p.failed)

	p.part(part{pkg: "q", of: 1}, read(strings.NewReader(`{"Action":"pass"}`), p), nil, 0)
	assert.Equal(t, 1, p.failed)
	p.part(part{pkg: "r", of: 1}, read(strings.NewReader(`{"Action":"pass","Test":"TestOne"}`), p), nil, 0)
	assert.Equal(t, 2, p.failed, "it was killed")
}
