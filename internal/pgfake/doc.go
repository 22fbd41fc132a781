// Package pgfake is an in-memory PostgreSQL peer that speaks the wire protocol to a real pgx client.
//
// It serves two purposes. [Peer.Dial] makes connections that are answered by a goroutine of their own, without sockets,
// so that a pool, its timeouts and its failures can live inside a testing/synctest bubble. [Peer.DialInline] makes
// connections that are answered in the goroutine of the caller, so that a benchmark measures the client alone.
// [Peer.Serve] puts the same server behind a listener.
//
// A connection behaves as a TCP connection with unbounded kernel buffers: a write to a server that hangs succeeds, and is
// executed if the server wakes, even when the client has gone by then.
//
// What it is not: an SQL engine. Statements are answered by their shape (see [Handler]); transactions change the status
// that the client is told, what a standby refuses, and what counts as applied.
package pgfake
