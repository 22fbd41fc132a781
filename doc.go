// Package multipool replaces pgxpool in programs that use a replicated PostgreSQL: one primary and any number of
// replicas. A [MultiPool] holds one *pgxpool.Pool for every server. Query and QueryRow go to a random healthy replica;
// Exec, Begin, CopyFrom and SendBatch go to the primary. A circuit breaker for every server counts the errors of real
// calls. Health checks run in the background, never inside a call, and bring a failed server back when it answers
// again. The pool follows a promotion without a restart.
//
// To switch from pgxpool, change the import. Every name of pgxpool is here, and every method has the same signature:
//
//	import pgxpool "github.com/pgmultipool/multipool"
//
//	pool, err := pgxpool.New(ctx, "postgres://app@db1,db2,db3/app")
//
// Then decide which reads may be stale. By default, all of them may be; see Limits below.
//
// A pool of one peer, which is a pool opened with one host and without Options.Discover, behaves like a pgxpool: it
// makes no health checks, holds no calls back, sends nothing again, and marks no error except that of the COMMIT of
// RunTx.
//
// # Terms
//
// A peer is one PostgreSQL server of the pool. The primary is the peer that accepts writes. A replica is a hot standby:
// it replays the primary's log and serves reads.
//
// A call is one use of a method that needs a connection, such as Query or Begin. An attempt is one try of a call on one
// peer. A call has more than one attempt if it is sent again after a failure.
//
// A read is a Query or QueryRow whose text may run on a standby, or the begin of a read-only transaction. Every other
// call counts as a write.
//
// A route says where a call may go ([Route]). A model is a route with a name ([Options].Models).
//
// A fault is an error of a connection, or of the server at its other end. An error of the statement, or the end of the
// caller's context, is not a fault.
//
// A health check asks a peer for its state. Every peer has a monitor, a goroutine that makes its health checks, by
// default on a connection of its own. A probe is the health check that decides whether a suspect is down.
//
// A timeline is PostgreSQL's number for one history of the log. Every promotion begins a higher one.
//
// # Where a call goes
//
// The pool decides where a call goes by the first of these that says something:
//
//   - an explicit route ([Route]) of the call's context ([WithRoute], [WithPrimary], [WithReplica],
//     [WithPreferReplica], [WithPeer]);
//   - one of the model that the context names ([WithModel]);
//   - one in Options.Route;
//   - the method that was called;
//   - for Query and QueryRow, the statement's text.
//
// A text goes to the primary if it cannot run on a standby, locks rows, holds a second statement, or calls a function
// that acts on its server (advisory locks, pg_terminate_backend, ...).
//
// A standby may still refuse a statement, before its first row. The pool then runs the statement again on the primary.
// It remembers the text, and sends it to the primary from then on. It does not remember a text that a standby refused
// because it lacks an object, or has the object in an older shape. [MultiPool.Explain] reports where a statement would
// go.
//
// If several peers are equally suitable for a call, the pool draws two of them at random and takes the less busy one.
// Peer.Weight sets how often a peer is drawn, and peers of Options.Zone are preferred. [RoundRobin], [Nearest], or a
// [Balancer] of the program replaces this choice.
//
// # Modes
//
// [ModeReplicated] is the default, and what this page says about the primary and its replicas holds in this mode only.
// In [ModeEquivalent] every peer takes every call, and the pool picks a random healthy one. In [ModeOrdered] the first
// healthy peer of the list takes every call.
//
// To use several clusters, make a pool for every cluster and put a [Router] in front. Peers can be drained for
// maintenance ([MultiPool.Drain]), and added, removed and discovered while the pool is open ([MultiPool.AddPeer],
// [MultiPool.RemovePeer], [Options].Discover).
//
// # The states of a peer
//
//	unknown --first health check succeeds--> up
//
//	up --fault--> suspect --probe succeeds--> up
//	                       --probe fails-----> down
//
//	any --connection refused for password, database, TLS--> misconfigured
//	    --connection refused, server shuts down-----------> shutting-down
//	    --connection refused, server starts---------------> starting
//
//	down, misconfigured, shutting-down, starting --health check succeeds--> up
//
// The first fault makes a peer suspect. A suspect gets no reads while a healthy peer can serve them, and its monitor
// probes it at once, on existing connections and by a new one.
//
// A peer that is down gets no calls: its circuit breaker is open, and only its monitor connects to it. The monitor
// makes a health check after 200 ms, and then at growing intervals of up to a second. A peer that goes down again
// within a minute stays out twice as long as the last time, up to 30 s. That does not hold for a peer that is needed,
// because no other peer can do its work or because a call waits for it. The monitor checks such a peer at once.
//
// # Who is the primary
//
// The primary is the server that claims to be the primary, that has the system identifier of this cluster, and that is
// on the highest timeline that any server of the cluster has shown. Any other server that claims to be the primary is
// fenced: it gets no writes and no reads. The pool forgets a timeline when it has evidence that no server is on it any
// more, or when the operator calls [MultiPool.Forget].
//
// If nothing tells which of two servers is the primary, neither gets writes ([ErrSplitBrain]). While there is no
// primary, writes wait, and the pool checks every peer every 25 ms. docs/failures.md has the rules in full.
//
// # Guarantees
//
//   - If a Query fails on a replica before its first row, or a QueryRow before Scan returns, the pool sends it again to
//     another peer before the caller sees the error.
//   - A statement that was handed to a server that accepts writes is sent again only if it certainly did not run, if it
//     is a BEGIN, which has no effect when repeated, or if it is a read and the program has declared that its reads do
//     not write ([RetryReads]).
//   - The error of a write whose outcome is unknown matches [ErrOutcomeUnknown]. A write that fails with any other
//     error was not executed. [MultiPool.RunTx] finds out what became of its COMMIT, and runs again what was not
//     committed.
//   - A primary gets no writes once any server of its cluster has shown a newer timeline. A standby shows its timeline
//     if the program's role is a member of pg_monitor.
//   - The pool returns pgx's errors unchanged, except for the mark ErrOutcomeUnknown and for [NoPeerError].
//   - No error text, no log message and no Status contains a password. The Config field of a pgconn.ConnectError does,
//     as it does with pgx alone.
//
// # Systems
//
// The package works on every system that Go and pgx support. Two things work on Linux only:
//
//   - The pool checks an idle connection without a round trip ([ShouldPing]). On other systems it pings, as pgxpool
//     does.
//   - The kernel limits how long a statement that was sent to a host that is gone may stay unacknowledged
//     ([ParseConfig]). On other systems a statement that may be sent again ends when its peer is found to be down, and
//     any other one at the caller's deadline.
//
// # Limits
//
// A SELECT right after an INSERT may not find the row, because a replica shows the database as it was a moment ago. Two
// reads may also be served by two replicas. [Options].MaxLag limits how old the data may be as long as some replica is
// within the limit; [Route].MaxLag limits it always.
//
// Two read-only transactions may run on two replicas. Both may then hold the same advisory lock, each on its own
// server, and neither can import the other's snapshot.
//
// The pool cannot look into a function of the program. It does not see that a function takes an advisory lock, or that
// a function catches the refusal by a standby and returns something else.
//
// A promotion that no server has shown yet leaves one gap: the first statement of a session after it. If that statement
// is a Query that writes through a function, and its connection is lost, the pool takes it for a read on a replica and
// may send it again.
//
// What asynchronous replication has not shipped is lost with the primary. PostgreSQL's synchronous_standby_names
// prevents that.
package multipool
