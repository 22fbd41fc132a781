package multipool

import (
	"encoding"
	"encoding/json"
	"fmt"
	"regexp"
	"testing"

	"github.com/stretchr/testify/require"
)

// label is what every enumeration of the surface can do.
type label interface {
	~uint8
	fmt.Stringer
	encoding.TextMarshaler
}

// testLabels tests an enumeration against the texts that programs and metrics know it by: they are for ever.
func testLabels[E label, P interface {
	*E
	encoding.TextUnmarshaler
}](t *testing.T, kind string, zero E, want ...string) {
	t.Helper()
	require.Zero(t, zero)
	seen := map[string]bool{}
	for i, text := range want {
		e := E(i)
		require.Equal(t, text, e.String())
		require.Regexp(t, regexp.MustCompile(`^[a-z]+(-[a-z]+)*$`), text)
		require.False(t, seen[text])
		seen[text] = true
		written, err := json.Marshal(map[E]E{e: e})
		require.NoError(t, err)
		require.JSONEq(t, fmt.Sprintf(`{%q:%q}`, text, text), string(written))
		var read map[E]E
		require.NoError(t, json.Unmarshal(written, &read))
		require.Equal(t, map[E]E{e: e}, read)
	}
	none := E(len(want))
	require.Equal(t, "unknown "+kind, none.String())
	_, err := none.MarshalText()
	require.EqualError(t, err, fmt.Sprintf("multipool: no %s has the number %d", kind, len(want)))
	e := E(len(want) - 1)
	err = P(&e).UnmarshalText([]byte("no such"))
	require.ErrorContains(t, err, fmt.Sprintf(`multipool: unknown %s "no such" (known: %s`, kind, want[0]))
	require.ErrorContains(t, err, want[len(want)-1])
	require.Error(t, P(&e).UnmarshalText([]byte("unknown "+kind)))
	require.EqualValues(t, len(want)-1, e, "it is left alone")
}

func TestTheTextsOfEnumerations(t *testing.T) {
	t.Parallel()
	testLabels(t, "role", RoleUnknown, "unknown", "primary", "replica")
	testLabels(t, "mode", ModeReplicated, "replicated", "equivalent", "ordered")
	testLabels(t, "target", TargetInherit, "inherit", "auto", "primary", "prefer-replica", "replica", "any")
	testLabels(t, "retry", RetryInherit, "inherit", "safe", "reads", "never")
	testLabels(t, "reason", ReasonNone,
		"none", "read", "write", "statement", "route", "model", "no-replica", "replicas-behind", "refused", "retry", "one-peer")
	testLabels(t, "health", HealthUnknown, "unknown", "up", "suspect", "down", "misconfigured", "shutting-down", "starting", "gone")
	testLabels(t, "breaker state", BreakerClosed, "closed", "open", "half-open")
	testLabels(t, "kind", KindNone, "none", "read", "write")
	testLabels(t, "intent", IntentRead, "read", "primary", "replica")
	testLabels(t, "why", WhyNone,
		"none", "unknown", "suspect", "down", "misconfigured", "shutting-down", "starting", "drained", "other-cluster", "same-server",
		"older-timeline", "disputed", "unconfirmed", "role-unknown", "setup-fails", "behind", "paused", "cut-off",
		"diverged", "slow", "last-resort", "not-first", "not-named", "replica", "primary", "not-within-lag")
	require.Len(t, whyPhrases, len(whyNames))
	for _, phrase := range whyPhrases {
		require.NotEmpty(t, phrase)
	}
}
