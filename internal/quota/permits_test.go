package quota

import (
	"testing"

	"github.com/stretchr/testify/require"
)

func TestNobodyStarvesWhereThreePoolsShareOneConnection(t *testing.T) {
	all := Permits{Limit: 1}
	require.Nil(t, all.Acquire(Own))
	var called [pools]<-chan struct{}
	for k := range pools {
		called[k] = all.Acquire(k)
	}
	served, at := map[Pool]int{}, Own
	for range 300 {
		all.Release(at)
		for k, granted := range called {
			select {
			case <-granted:
				at = Pool(k)
				served[at]++
				called[k] = all.Acquire(at)
			default:
			}
		}
	}
	require.Equal(t, map[Pool]int{Own: 100, Primary: 100, Replicas: 100}, served)
}
