// Package proof checks what callers of a MultiPool were told against what one copy of the data could have told them. It
// is a module of its own, because it needs porcupine, a checker of linearizability.
//
// The data are lists that callers append ids of their own to and read as a whole. No id comes twice, so that a list says
// of every append whether it was done, how often, and in what order.
package proof

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/anishathalye/porcupine"

	"github.com/pgmultipool/multipool"
)

// Call is one call of a caller: a read of a list, or an append to it.
type Call struct {
	Kind  string // the way it was made
	Key   int
	ID    int64   // what was appended; 0 if a read
	List  []int64 // what the call returned, if Seen
	Seen  bool
	Err   error
	Begun time.Duration // since the run began
	Ended time.Duration
}

func (c Call) read() bool { return c.ID == 0 }

// unknown reports that the call may have been done, or may yet be, or never. What failed otherwise was not done.
func (c Call) unknown() bool { return errors.Is(c.Err, multipool.ErrOutcomeUnknown) }

// String is the call in one line of a report.
func (c Call) String() string {
	s := fmt.Sprintf("%.4f-%.4f %s key %d", c.Begun.Seconds(), c.Ended.Seconds(), c.Kind, c.Key)
	if !c.read() {
		s += fmt.Sprintf(" append %d", c.ID)
	}
	if c.Seen {
		s += fmt.Sprintf(" -> %d ids, the last %v", len(c.List), c.List[max(0, len(c.List)-3):])
	}
	if c.Err != nil {
		s += fmt.Sprintf(" (%v)", c.Err)
	}
	return s
}

// Accounts compares every append with the lists as they are in the end, by key.
func Accounts(calls []Call, final map[int][]int64) (wrong []string) {
	left := map[int64]int{}
	for _, list := range final {
		for _, id := range list {
			left[id]++
		}
	}
	for _, c := range calls {
		if c.read() {
			continue
		}
		n := left[c.ID]
		delete(left, c.ID)
		switch {
		case n > 1:
			wrong = append(wrong, fmt.Sprintf("doubled: %v is there %d times", c, n))
		case n == 0 && c.Err == nil:
			wrong = append(wrong, fmt.Sprintf("lost: %v", c))
		case n == 1 && c.Err != nil && !c.unknown():
			wrong = append(wrong, fmt.Sprintf("done, and denied: %v", c))
		}
	}
	for id, n := range left {
		wrong = append(wrong, fmt.Sprintf("nobody's: %d is there %d times", id, n))
	}
	return wrong
}

// digest stands for a list: its length, and a sum of its ids in their order. Two lists of a run share one by a chance of
// one in 2^64.
type digest struct {
	len int
	sum uint64
}

func (d digest) append(id int64) digest {
	x := d.sum*0x9e3779b97f4a7c15 + uint64(id)
	x ^= x >> 32
	x *= 0xd6e8feb86659fd93
	x ^= x >> 32
	return digest{d.len + 1, x}
}

func digestOf(list []int64) (d digest) {
	for _, id := range list {
		d = d.append(id)
	}
	return d
}

// outcome is what porcupine is told of a call's end.
type outcome struct {
	list    digest
	seen    bool
	unknown bool
}

// free is the model of one list as anybody would write it down: an append of unknown outcome is done or not, and both are
// followed. Its search doubles with each of them.
var free = porcupine.NondeterministicModel{
	Init: func() []any { return []any{digest{}} },
	Step: func(state, input, output any) []any {
		before, id, out := state.(digest), input.(int64), output.(outcome)
		if id == 0 {
			if before != out.list {
				return nil
			}
			return []any{before}
		}
		after := before.append(id)
		switch {
		case out.unknown:
			return []any{before, after}
		case out.seen && out.list != after:
			return nil
		}
		return []any{after}
	},
}

// towards is free for a list of which the end is known: since ids are only ever added at the end, each of its states is
// a beginning of it. An append of unknown outcome that is not there in the end was never done, and is no call.
func towards(final []int64) porcupine.Model {
	states := make([]digest, len(final)+1)
	for i, id := range final {
		states[i+1] = states[i].append(id)
	}
	return porcupine.Model{
		Init: func() any { return 0 },
		Step: func(state, input, output any) (bool, any) {
			n, id, out := state.(int), input.(int64), output.(outcome)
			if id == 0 {
				return states[n] == out.list, n
			}
			if n == len(final) || final[n] != id || out.seen && out.list != states[n+1] {
				return false, n
			}
			return true, n + 1
		},
	}
}

// Linearizable checks, key by key, that there is an order of the calls in which each took effect at one moment between its
// begin and its end, on one copy of the lists that ends as final. A call of unknown outcome has no end; one that failed
// otherwise, and a read that failed, is none. The error shows the calls that find no place.
func Linearizable(calls []Call, final map[int][]int64, patience time.Duration) error {
	byKey := map[int][]Call{}
	for _, c := range calls {
		if c.Err == nil || c.unknown() && slices.Contains(final[c.Key], c.ID) {
			byKey[c.Key] = append(byKey[c.Key], c)
		}
	}
	var failed []error
	for key, calls := range byKey {
		model := towards(final[key])
		history := historyOf(calls, final[key])
		switch porcupine.CheckOperationsTimeout(model, history, patience) {
		case porcupine.Illegal:
			_, info := porcupine.CheckOperationsVerbose(model, history, patience)
			failed = append(failed, fmt.Errorf("key %d: not linearizable:\n%s", key, misfits(calls, info)))
		case porcupine.Unknown:
			failed = append(failed, fmt.Errorf("key %d: not decided in %v: %d calls", key, patience, len(calls)))
		}
	}
	return errors.Join(failed...)
}

// historyOf is the calls as porcupine has them, and a read of the end after them all.
func historyOf(calls []Call, final []int64) []porcupine.Operation {
	history := make([]porcupine.Operation, 0, len(calls)+1)
	for _, c := range calls {
		op := porcupine.Operation{
			Input: c.ID, Call: int64(c.Begun), Return: int64(c.Ended), Metadata: c,
			Output: outcome{list: digestOf(c.List), seen: c.Seen, unknown: c.unknown()},
		}
		if c.unknown() {
			op.Return = math.MaxInt64
		}
		history = append(history, op)
	}
	end := Call{Kind: "the end", List: final, Seen: true}
	return append(history, porcupine.Operation{
		Input: end.ID, Call: math.MaxInt64 - 1, Return: math.MaxInt64, Metadata: end, Output: outcome{list: digestOf(final)},
	})
}

// misfits lists what comes after the longest order that was found.
func misfits(calls []Call, info porcupine.LinearizationInfo) string {
	var best []porcupine.Operation
	for _, partition := range info.PartialLinearizationsOperations() {
		for _, order := range partition {
			if len(order) > len(best) {
				best = order
			}
		}
	}
	placed := map[string]bool{}
	for _, op := range best {
		placed[op.Metadata.(Call).String()] = true
	}
	rest := slices.DeleteFunc(slices.Clone(calls), func(c Call) bool { return placed[c.String()] })
	slices.SortFunc(rest, func(a, b Call) int { return int(a.Begun - b.Begun) })
	var b strings.Builder
	fmt.Fprintf(&b, "  %d of %d calls have a place, the last of them\n", len(best), len(calls))
	for _, op := range best[max(0, len(best)-4):] {
		fmt.Fprintf(&b, "    %v\n", op.Metadata)
	}
	b.WriteString("  and none have\n")
	for _, c := range rest[:min(len(rest), 8)] {
		fmt.Fprintf(&b, "    %v\n", c)
	}
	return b.String()
}
