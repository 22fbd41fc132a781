package multipool

import (
	"fmt"
	"runtime"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
)

func (s connState) String() string {
	return [...]string{"setup", "idle", "read", "row", "held", "cut"}[s]
}

// connChanges are all methods of a connUse that change it.
var connChanges = []struct {
	name string
	do   func(*connUse) bool
	// What it makes of every state, in the order of the constants; a state in parentheses: it refuses, and nothing changes.
	want string
}{
	{"restart", (*connUse).restart, "setup (idle) (read) (row) (held) setup"},
	{"ready", (*connUse).ready, "idle (idle) (read) (row) (held) (cut)"},
	{"claim", (*connUse).claim, "(setup) held (read) (row) (held) (cut)"},
	{"check", (*connUse).check, "(setup) setup (read) (row) (held) (cut)"},
	{"pass", (*connUse).pass, "held (idle) (read) (row) (held) (cut)"},
	{"read", (*connUse).read, "(setup) (idle) (read) (row) read (cut)"},
	{"show", (*connUse).show, "setup idle row row held (cut)"},
	{"keep", (*connUse).keep, "setup idle held row held (cut)"},
	{"settle idle", func(u *connUse) bool { return u.settle(true) }, "idle idle idle idle idle (cut)"},
	{"settle", func(u *connUse) bool { return u.settle(false) }, "setup setup setup setup setup (cut)"},
	{"evict", (*connUse).evict, "(setup) cut (read) (row) (held) (cut)"},
	{"cut setup", func(u *connUse) bool { return u.cut(connSetup) }, "cut (idle) (read) (row) (held) cut"},
	{"cut idle", func(u *connUse) bool { return u.cut(connIdle) }, "cut cut (read) (row) (held) cut"},
	{"cut read", func(u *connUse) bool { return u.cut(connRead) }, "cut cut cut (row) (held) cut"},
	{"cut row", func(u *connUse) bool { return u.cut(connRow) }, "cut cut cut cut (held) cut"},
	{"cut held", func(u *connUse) bool { return u.cut(connHeld) }, "cut cut cut cut held cut"},
}

func connIn(s connState) *connUse {
	u := new(connUse)
	u.word.Store(int32(s))
	return u
}

func TestEveryChangeOfAConnectionsState(t *testing.T) {
	t.Parallel()
	for _, c := range connChanges {
		var got []string
		for s := connSetup; s <= connCut; s++ {
			u := connIn(s)
			if c.do(u) {
				got = append(got, u.state().String())
			} else {
				require.Equal(t, s, u.state(), "%s refuses, and changes", c.name)
				got = append(got, "("+s.String()+")")
			}
		}
		require.Equal(t, c.want, strings.Join(got, " "), c.name)
	}
}

// Two changes at once end as one after the other would have: of every pair, from every state.
func TestTwoChangesOfAConnectionsStateAtOnce(t *testing.T) {
	t.Parallel()
	type end struct {
		a, b  bool
		state connState
	}
	rounds := 300
	if testing.Short() {
		rounds = 30
	}
	for i, a := range connChanges {
		for _, b := range connChanges[i:] {
			for s := connSetup; s <= connCut; s++ {
				var allowed [2]end
				u := connIn(s)
				allowed[0].a, allowed[0].b, allowed[0].state = a.do(u), b.do(u), u.state()
				u = connIn(s)
				allowed[1].b, allowed[1].a, allowed[1].state = b.do(u), a.do(u), u.state()
				us := make([]connUse, rounds)
				ends := make([]end, rounds)
				for n := range us {
					us[n].word.Store(int32(s))
				}
				var both sync.WaitGroup
				for _, part := range []func(int){
					func(n int) { ends[n].a = a.do(&us[n]) },
					func(n int) { ends[n].b = b.do(&us[n]) },
				} {
					both.Go(func() {
						for n := range us {
							if n%16 == 0 {
								runtime.Gosched()
							}
							part(n)
						}
					})
				}
				both.Wait()
				for n := range us {
					ends[n].state = us[n].state()
					if ends[n] != allowed[0] && ends[n] != allowed[1] {
						require.Fail(t, fmt.Sprintf("%s and %s at once, from %s", a.name, b.name, s), "%+v, not %+v", ends[n], allowed)
					}
				}
			}
		}
	}
}
