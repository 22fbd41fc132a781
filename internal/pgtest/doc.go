// Package pgtest runs real throwaway PostgreSQL clusters for tests and
// demonstrations: a primary and any number of streaming standbys, in a fraction
// of a second, and every fault a replicated PostgreSQL can have at the call of a
// method.
//
//	c := pgtest.Start(t, pgtest.Options{Standbys: 2})
//	pool, err := pgxpool.New(ctx, c.ConnString())
//	...
//	c.Primary().Kill()          // every process of it, at once
//	c.Standbys()[0].Promote()   // c.Primary() is the promoted one from here on
//	c.Servers()[0].Follow(c.Primary())
//
// A [Sandbox] is for programs that bring servers of their own, such as Patroni.
//
// # What it needs
//
// The programs of a PostgreSQL 14 or later (initdb and postgres; pg_rewind and
// pg_basebackup for [Server.Follow]) on Linux, macOS or FreeBSD. They are looked
// for in $MULTIPOOL_PG_BIN (which alone counts when it is set), in $PATH, in
// what pg_config says, and in the places where packages put them. Root may run
// it: PostgreSQL refuses to run as root, so that the servers run as the user
// postgres, or nobody.
//
// A [Pooler], a PgBouncer in front of a server, needs the program pgbouncer in
// $PATH or where packages put it, and a [Balancer] haproxy.
//
// # What makes it fast
//
// initdb runs once per version of PostgreSQL; its result is kept as a template
// in $MULTIPOOL_PG_CACHE, or else in the user's cache directory, and every
// server starts from a copy of it, standbys too. The copies lie in /dev/shm where
// there is room and otherwise in the directory for temporary files.
//
// # What it leaves behind
//
// The template, and nothing else: no process, port, shared memory or folder,
// even when the program panics or is killed. Every cluster has a watchdog, a
// small shell process that waits for the end of its owner and then clears up.
//
// # What it cannot stand for
//
// The servers trust the operating system with their data (fsync=off): it
// survives the death of all their processes but not that of the machine.
// Durability against a power cut cannot be tested with them.
package pgtest
