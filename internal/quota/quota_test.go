package quota

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestSlotsAreCountedAndLimited(t *testing.T) {
	t.Parallel()
	s := Slots{Limit: 2}
	for range 3 {
		require.Nil(t, s.Take(Own, false), "counted, not limited")
	}
	require.EqualValues(t, 3, s.Taken())
	s.Release(Own)
	freed := s.Take(Replicas, true)
	require.NotNil(t, freed)
	require.Equal(t, freed, s.Take(Primary, true), "all wait for the same")
	require.Zero(t, s.Of(Replicas))
	s.Release(Own)
	require.NotPanics(t, func() { <-freed })
	require.Nil(t, s.Take(Replicas, true))
	require.EqualValues(t, 1, s.Of(Replicas))
	s.Wait(2)
	s.Wait(-1)
	require.Equal(t, 1, s.Waiting())
}

func TestAPermitThatIsGrantedToOneThatWithdrawsGoesOn(t *testing.T) {
	t.Parallel()
	p := Permits{Limit: 1}
	require.Nil(t, p.Acquire(Own))
	require.True(t, p.Full())
	require.False(t, p.Try(Own))
	first, second, third := p.Acquire(Own), p.Acquire(Own), p.Acquire(Own)
	require.Equal(t, 3, p.Waiting())
	p.Withdraw(Own, second)
	p.Release(Own)
	<-first
	p.Withdraw(Own, first) // it had been granted
	<-third
	require.Zero(t, p.Waiting())
	require.EqualValues(t, 1, p.InUse())
	p.Release(Own)
	require.True(t, p.Try(Replicas))
}

func TestABulkheadLeavesAConnectionToOthers(t *testing.T) {
	t.Parallel()
	require.Nil(t, NewBulkhead(0, 10))
	for limit, want := range map[int32]int{1: 1, 2: 1, 3: 2, 10: 9, 11: 9, 100: 90} {
		b := NewBulkhead(0.1, limit)
		require.Equal(t, want, cap(b), "of %d", limit)
		for range want {
			require.True(t, b.Try())
		}
		require.False(t, b.Try())
	}
}

func TestARetryBudgetIsAFifthOfTheReadsAndTheReserve(t *testing.T) {
	t.Parallel()
	b, now := RetryBudget{Reserve: 2}, time.Unix(1e9, 0)
	spend := func(reads int64) (n int) {
		for b.Take(now, reads) {
			n++
		}
		return n
	}
	require.Equal(t, 2, spend(1000), "the window begins with the first")
	require.Equal(t, 20, spend(1100))
	require.Zero(t, spend(500), "a server that is removed takes its reads along")
	now = now.Add(budgetWindow + 1)
	require.Equal(t, 2, spend(1100))
}
