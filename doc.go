// Package multipool replaces pgxpool in programs that talk to a replicated PostgreSQL. A [MultiPool] holds one
// *pgxpool.Pool per peer, each guarded by a circuit breaker: Query and QueryRow go to a random healthy replica, Exec,
// Begin, CopyFrom and SendBatch to the primary. Real errors trip the breakers, health checks run in the background and never
// inside a request, broken peers recover there too, and a promotion is followed without a restart.
//
// A program swaps the import, and compiles: every name of pgxpool is here, every method with the same signature.
//
//	import pgxpool "github.com/pgmultipool/multipool"
//
//	pool, err := pgxpool.New(ctx, "postgres://app@db1,db2,db3/app")
//
// Then decide which reads may be stale: by default all may. With one host in the connection string nothing of this package is
// active, also not in a development set-up: nothing is watched, held, marked or sent again.
//
// # Where a call goes
//
// A call's route is decided in this order: an explicit route of its context ([WithRoute], [WithPrimary], [WithPreferReplica],
// [WithPeer]), its model's ([WithModel], Options.Models), Options.Route; then the kind of call; then, for Query and
// QueryRow, the statement's text. A text that cannot run on a standby, that locks rows, that holds a second statement,
// or that calls a function acting on its server (advisory locks, pg_terminate_backend, ...) goes to the primary. What a
// standby refuses all the same, before its first row, is run again on the primary, and the text is remembered; what it
// refuses because it lacks an object, or has it in an older shape, is run again there, too, and not remembered.
// [MultiPool.Explain] tells where a statement would go.
//
// Among the peers that may take a call alike two are drawn at random and the less busy one is taken: by Peer.Weight,
// those of Options.Zone first. [RoundRobin], [Nearest] or a [Balancer] of the program's own choose in its stead.
//
// # Modes
//
// Under [ModeEquivalent] every peer takes everything, a random healthy one each; under [ModeOrdered] the first healthy
// one in the list does. What follows about the primary and its replicas is of [ModeReplicated], the default. Several
// clusters are several pools behind a [Router]. Peers may be drained for maintenance ([MultiPool.Drain]), added,
// removed and discovered while the pool lives ([MultiPool.AddPeer], [Options].Discover).
//
// # The states of a peer
//
//	unknown ------first look--> up --fault--> suspect --probe answers--> up
//	                                              |
//	                                              +----probe fails-----> down --a look succeeds--> up
//	      --refused by password, database, TLS--> misconfigured --a look succeeds--> up
//	      --refused as the server shuts down----> draining -------a look succeeds--> up
//	      --refused as the server starts--------> starting -------a look succeeds--> up
//
// A fault is an error of the connection or the server behind it, never the program's. The first one makes the peer
// suspect: it is left out of the reads, and its monitor probes it at once, on a connection of its own and by a fresh
// dial. Down is an open breaker: only the monitor touches the peer, first after 200 ms, then up to once a second; one that
// falls again and again is held for up to 30 s. A peer that is needed, as nobody else serves what it could, or a call waits for
// it, is not held, and is tried at once.
//
// # Who is the primary
//
// The server that says so, of this cluster (by its system identifier) and of the highest timeline that any server of it
// has shown. Another is fenced: it gets no write and no read. A timeline is dropped by evidence, or by [MultiPool.Forget].
// Where nothing tells who is right, nobody is written to ([ErrSplitBrain]). While there is no primary writes wait, and
// every peer is looked at every 25 ms. docs/failures.md has the rules.
//
// # What is promised
//
//   - A Query that fails on a replica before its first row, or a QueryRow before Scan returns, is sent again elsewhere
//     before its caller sees the error.
//   - A statement handed to a server that accepts writes is sent again only if it certainly did not run, or if it is a
//     read and the program has promised that its reads do not write ([RetryReads]); and a BEGIN, which does nothing twice.
//   - A write whose outcome is unknown says so: its error matches [ErrOutcomeUnknown]. If the error is not
//     ErrOutcomeUnknown, the write was not executed. [MultiPool.RunTx] asks what became of its COMMIT, and runs again what was not done.
//   - Nothing is written to a primary once any server of its cluster has shown a newer timeline. A standby shows it where the
//     role is a member of pg_monitor.
//   - Errors pass through unchanged but for that mark and [NoPeerError].
//   - No error's text, no log and no status holds a password. A pgconn.ConnectError has it in its Config, as with pgx.
//
// # Systems
//
// Everything works on every system that Go and pgx do. On Linux alone idle connections are looked at without a round trip
// ([ShouldPing]; elsewhere they are pinged, as by pgxpool), and the kernel bounds how long a statement that was sent to a host
// that is gone may stay unacknowledged ([ParseConfig]; elsewhere its peer's verdict ends what may be sent again, and the
// caller's deadline the rest).
//
// # What is not
//
// A SELECT right after an INSERT may not find the row: a replica shows the database as it was a moment ago ([Options].MaxLag bounds it while a replica within the
// bound is there, [Route].MaxLag always), and two reads may be served by two replicas. So may two read-only transactions:
// both may hold the same advisory lock, each on its server, and neither imports the other's snapshot. A function of the
// program's that takes an advisory lock inside cannot be seen from outside, nor one that catches its own refusal by a
// standby and returns something else. A read that writes, and is lost in the first statement of its session after a promotion that
// nobody has seen yet, is taken for a read on a replica. What asynchronous replication has not shipped is lost when the
// primary is lost; PostgreSQL's synchronous_standby_names is the remedy.
package multipool
