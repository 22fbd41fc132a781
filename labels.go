package multipool

import (
	"fmt"
	"slices"
	"strings"
)

// The texts of enumerations: closed sets, each by value. Every exported one has String, MarshalText and UnmarshalText, so
// that JSON, flags and metrics have the text, and programs compare constants.

// nameOf returns the text of a value.
func nameOf[E ~uint8](names []string, e E, kind string) string {
	if int(e) < len(names) {
		return names[e]
	}
	return "unknown " + kind
}

// marshalName is nameOf for an encoder: a value that has no text is an error.
func marshalName[E ~uint8](names []string, e E, kind string) ([]byte, error) {
	if int(e) >= len(names) {
		return nil, fmt.Errorf("multipool: no %s has the number %d", kind, uint8(e))
	}
	return []byte(names[e]), nil
}

// unmarshalName is the reverse of marshalName.
func unmarshalName[E ~uint8](names []string, e *E, kind string, text []byte) error {
	i := slices.Index(names, string(text))
	if i < 0 {
		return fmt.Errorf("multipool: unknown %s %q (known: %s)", kind, text, strings.Join(names, ", "))
	}
	*e = E(i)
	return nil
}
