package quota

import "math"

// A Bulkhead holds the permits of one kind of call to use a connection of a server. There are fewer of them than
// connections, so calls of that kind leave some connections to all others. A send takes a permit and a receive gives it
// back. A nil Bulkhead is none: its owner does not ask it.
type Bulkhead chan struct{}

// NewBulkhead returns the Bulkhead of calls that leave the given share of limit connections to others, and at least one
// connection. It has at least one permit. It is nil if share is not positive.
func NewBulkhead(share float64, limit int32) Bulkhead {
	if share <= 0 {
		return nil
	}
	kept := max(1, int(math.Ceil(share*float64(limit))))
	return make(Bulkhead, max(1, int(limit)-kept))
}

// Try takes a permit if one is free.
func (b Bulkhead) Try() bool {
	select {
	case b <- struct{}{}:
		return true
	default:
		return false
	}
}
