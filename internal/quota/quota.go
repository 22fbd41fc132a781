// Package quota holds the limits of a server's connections and of repeated statements, as values: permits of calls
// (Permits, Bulkhead), slots of connections (Slots), and the budget of statements that are sent again (RetryBudget).
//
// A server's own pool and the pools that follow share the server: together they have no more connections than its limit.
// A call gets its permit before it asks its pool for a connection. So if all permits are taken, the call waits for a
// permit, and then finds the connection that is released next; inside the pool it would wait for a new connection,
// whatever is released meanwhile. As there are as many permits as slots, a call that has a permit and needs a new
// connection finds a free slot, or an idle connection of some pool that can be evicted. Permits are asked for only once
// there is a pool that follows; slots are always counted.
//
// The package waits for nothing and reads no clock: what waits, and for what else it waits at the same time, is decided
// by its callers, the acquiring and the making of connections in the root.
package quota

// A Pool says which of its server's pools a call or a connection belongs to.
type Pool uint8

const (
	Own      Pool = iota // the server's own
	Primary              // the pool that follows the primary
	Replicas             // the pool that follows the replicas
	pools
)

func sum(of [pools]int32) (n int32) {
	for _, u := range of {
		n += u
	}
	return n
}
