package show

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// A call may have begun long before what it fails of was announced: its caller was slow, or its machine.
func TestACallInFlightIsExcusedByWhatIsAnnouncedNext(t *testing.T) {
	for announced, broken := range map[bool]bool{true: false, false: true} {
		var out strings.Builder
		s := New(&out, time.Millisecond, nil)
		begun, gone := make(chan struct{}, 1), make(chan struct{})
		s.Callers("reads", 4, func(context.Context) (int, error) { return 0, nil })
		s.Callers("writes", 1, func(context.Context) (int, error) {
			select {
			case begun <- struct{}{}:
			default:
			}
			<-gone
			return 0, errors.New("gone")
		})
		<-begun
		var excuse func(string, error) bool
		if announced {
			excuse = func(kind string, err error) bool { return kind == "writes" && err.Error() == "gone" }
		}
		s.Scene(t.Context(), "The server dies.", excuse, func(context.Context) error { close(gone); return nil })
		require.Equal(t, broken, s.End() != nil, "%s", &out)
	}
}
