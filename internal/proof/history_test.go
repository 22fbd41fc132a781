package proof

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
	"github.com/stretchr/testify/require"

	"github.com/pgmultipool/multipool"
)

var errUnknown = fmt.Errorf("%w: %w", multipool.ErrOutcomeUnknown, io.ErrUnexpectedEOF)

// invented is a history of one correct copy: calls of several callers overlap and take effect in the midst; some
// appends are of unknown outcome, of which some are done late and some never; some fail and are not done.
func invented(seed uint64, n int) (calls []Call, final map[int][]int64) {
	rng := rand.New(rand.NewPCG(seed, 0))
	final = map[int][]int64{}
	late := map[int][]int64{} // done when somebody comes by
	var id int64
	for i := range n {
		at := time.Duration(i) * 100
		c := Call{Kind: "call", Key: i % 3, Begun: at - time.Duration(rng.IntN(400)), Ended: at + time.Duration(rng.IntN(400))}
		if rng.IntN(2) == 0 {
			id++
			c.ID = id
		}
		if ids := late[c.Key]; len(ids) > 0 && rng.IntN(4) == 0 {
			final[c.Key] = append(final[c.Key], ids[0])
			late[c.Key] = ids[1:]
		}
		switch {
		case c.read():
			c.List, c.Seen = slices.Clone(final[c.Key]), true
		case rng.IntN(20) == 0:
			c.Err = io.EOF
		case rng.IntN(10) == 0:
			c.Err = errUnknown
			switch rng.IntN(3) {
			case 0:
				late[c.Key] = append(late[c.Key], c.ID)
			case 1:
				final[c.Key] = append(final[c.Key], c.ID)
			}
		default:
			final[c.Key] = append(final[c.Key], c.ID)
			if rng.IntN(2) == 0 {
				c.List, c.Seen = slices.Clone(final[c.Key]), true
			}
		}
		calls = append(calls, c)
	}
	return calls, final
}

const patience = time.Minute

func TestACorrectHistoryIsFoundCorrect(t *testing.T) {
	for seed := range uint64(20) {
		calls, final := invented(seed, 800)
		require.Empty(t, Accounts(calls, final))
		require.NoError(t, Linearizable(calls, final, patience))
	}
}

// seen changes the list of the key in all that was seen of it from the given call on.
func seen(calls []Call, final map[int][]int64, key, from int, change func([]int64) []int64) {
	for i := range calls[from:] {
		if c := &calls[from+i]; c.Key == key && c.Seen {
			c.List = change(slices.Clone(c.List))
		}
	}
	final[key] = change(slices.Clone(final[key]))
}

// pick returns the first call after the middle for which ok.
func pick(t *testing.T, calls []Call, ok func(Call) bool) int {
	t.Helper()
	for i := len(calls) / 2; i < len(calls); i++ {
		if ok(calls[i]) {
			return i
		}
	}
	t.Fatal("no such call")
	return 0
}

func acknowledged(c Call) bool { return !c.read() && c.Err == nil }

// The checks find what they are there to find: each plants one fault in a correct history.
func TestPlantedFaultsAreFound(t *testing.T) {
	for name, plant := range map[string]struct {
		plant    func(t *testing.T, calls []Call, final map[int][]int64)
		accounts string // what the comparison with the end says of it; empty: nothing
	}{
		"an append that was done twice": {func(t *testing.T, calls []Call, final map[int][]int64) {
			i := pick(t, calls, acknowledged)
			seen(calls, final, calls[i].Key, 0, func(list []int64) []int64 {
				if at := slices.Index(list, calls[i].ID); at >= 0 {
					return slices.Insert(list, at, calls[i].ID)
				}
				return list
			})
		}, "doubled"},
		"an acknowledged append that is lost at once": {func(t *testing.T, calls []Call, final map[int][]int64) {
			i := pick(t, calls, func(c Call) bool { return acknowledged(c) && !c.Seen })
			seen(calls, final, calls[i].Key, 0, func(list []int64) []int64 {
				return slices.DeleteFunc(list, func(id int64) bool { return id == calls[i].ID })
			})
		}, "lost"},
		"an acknowledged append that is lost later, after it was seen": {func(t *testing.T, calls []Call, final map[int][]int64) {
			i := pick(t, calls, acknowledged)
			seen(calls, final, calls[i].Key, i+60, func(list []int64) []int64 {
				return slices.DeleteFunc(list, func(id int64) bool { return id == calls[i].ID })
			})
		}, "lost"},
		"an append that was done and denied": {func(t *testing.T, calls []Call, _ map[int][]int64) {
			calls[pick(t, calls, acknowledged)].Err = io.EOF
		}, "denied"},
		"an id that nobody has appended": {func(t *testing.T, calls []Call, final map[int][]int64) {
			seen(calls, final, 1, 0, func(list []int64) []int64 { return append([]int64{1 << 40}, list...) })
		}, "nobody's"},
		"a stale read": {func(t *testing.T, calls []Call, _ map[int][]int64) {
			c := &calls[pick(t, calls, func(c Call) bool { return c.read() && len(c.List) > 20 })]
			c.List = c.List[:len(c.List)-8]
		}, ""},
		"a stale read of an append's own": {func(t *testing.T, calls []Call, _ map[int][]int64) {
			c := &calls[pick(t, calls, func(c Call) bool { return acknowledged(c) && c.Seen && len(c.List) > 20 })]
			c.List = append(c.List[:len(c.List)-8], c.ID)
		}, ""},
		"two appends that came in the wrong order": {func(t *testing.T, calls []Call, final map[int][]int64) {
			list := final[0]
			list[20], list[40] = list[40], list[20]
		}, ""},
		"an unknown outcome that was seen and is gone": {func(t *testing.T, calls []Call, final map[int][]int64) {
			var id int64
			for _, c := range calls {
				if c.unknown() && slices.Contains(final[c.Key], c.ID) {
					id = c.ID
					seen(calls, final, c.Key, 600, func(list []int64) []int64 {
						return slices.DeleteFunc(list, func(x int64) bool { return x == id })
					})
					return
				}
			}
			t.Fatal("no such call")
		}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			for seed := range uint64(5) {
				calls, final := invented(seed, 800)
				plant.plant(t, calls, final)
				wrong := Accounts(calls, final)
				if plant.accounts == "" {
					require.Empty(t, wrong)
				} else {
					require.Len(t, wrong, 1)
					require.Contains(t, wrong[0], plant.accounts)
				}
				require.ErrorContains(t, Linearizable(calls, final, patience), "not linearizable", "seed %d", seed)
			}
		})
	}
}

func TestAnUnknownOutcomeIsWhatThePoolCallsSo(t *testing.T) {
	require.True(t, Call{ID: 1, Err: errUnknown}.unknown())
	require.False(t, Call{ID: 1, Err: errors.New("conn closed")}.unknown())
}

// The search towards the end finds what the free one finds, which takes too long for long histories.
func TestTheSearchTowardsTheEndIsNoOther(t *testing.T) {
	legal := 0
	for seed := range uint64(300) {
		calls, final := invented(seed, 24)
		rng := rand.New(rand.NewPCG(seed, 1))
		for range rng.IntN(3) { // spoil some
			c := &calls[rng.IntN(len(calls))]
			switch {
			case !c.Seen || len(c.List) == 0:
			case rng.IntN(2) == 0:
				c.List = c.List[:len(c.List)-1]
			default:
				seen(calls, final, c.Key, rng.IntN(len(calls)), func(list []int64) []int64 { return list[:max(0, len(list)-1)] })
			}
		}
		want := porcupine.Ok
		for key := range 3 {
			var of []Call
			for _, c := range calls {
				if c.Key == key && (c.Err == nil || c.unknown()) {
					of = append(of, c)
				}
			}
			model := free.ToModel()
			if !porcupine.CheckOperations(model, historyOf(of, final[key])) {
				want = porcupine.Illegal
			}
		}
		err := Linearizable(calls, final, patience)
		require.Equal(t, want == porcupine.Ok, err == nil, "seed %d: %v", seed, err)
		if err == nil {
			legal++
		}
	}
	t.Logf("%d of 300 are linearizable", legal)
	require.Greater(t, legal, 60)
	require.Less(t, legal, 240)
}
