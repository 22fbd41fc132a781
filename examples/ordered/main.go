// Ordered shows an ordered list of databases of which the first that is well takes everything; see docs/guides/ordered.md.
//
// It starts a primary and two standbys, reads and writes through one MultiPool, kills the first and then the second server,
// starts both again, and prints who served when. It fails if a promise of the guide is broken.
package main

import (
	"context"
	"errors"
	"io"
	"time"

	"github.com/pgmultipool/multipool"
	"github.com/pgmultipool/multipool/examples/internal/show"
	"github.com/pgmultipool/multipool/internal/pgtest"
)

func main() { show.Main("ordered", run) }

func run(ctx context.Context, out io.Writer, pace time.Duration) error {
	cluster, err := pgtest.New(ctx, pgtest.Options{Standbys: 2})
	if err != nil {
		return err
	}
	return errors.Join(tell(ctx, cluster, out, pace), cluster.Close())
}

func tell(ctx context.Context, cluster *pgtest.Cluster, out io.Writer, pace time.Duration) error {
	err := cluster.Primary().Exec(ctx, `create table product (id int primary key); insert into product values (7);
		create table sale (product int)`)
	if err == nil {
		err = cluster.WaitCaughtUp(ctx)
	}
	if err != nil {
		return err
	}
	nodes := cluster.Servers()
	pool, err := open(ctx, show.Hosts(nodes...))
	if err != nil {
		return err
	}
	defer pool.Close()

	s := show.New(out, pace, nodes)
	s.Callers("reads", 10, func(ctx context.Context) (int, error) { return read(ctx, pool) })
	s.Callers("writes", 2, func(ctx context.Context) (int, error) { return write(ctx, pool) })

	page := s.Scene(ctx, "A list of three: node1, the primary, then its standbys node2 and node3.", nil, show.Leads(pool, nodes[0]))
	s.Promise("node1 alone serves", page.Only("reads", "node1") && page.Only("writes", "node1"))

	page = s.Scene(ctx, "kill -9 of node1.", refusedWrites, show.To((*pgtest.Server).Kill, nodes[0]), show.Leads(pool, nodes[1]))
	s.Promise("node2 alone serves the reads", page.Only("reads", "node2"))

	page = s.Scene(ctx, "kill -9 of node2.", refusedWrites, show.To((*pgtest.Server).Kill, nodes[1]), show.Leads(pool, nodes[2]))
	s.Promise("node3 alone serves the reads", page.Only("reads", "node3"))

	page = s.Scene(ctx, "node1 and node2 are started again.", refusedWrites,
		show.To((*pgtest.Server).Start, nodes[0], nodes[1]), show.Well(pool, nodes[0], nodes[1]))
	s.Promise("nothing moves to node2: there is one move back, to node1", page.Without("node2"))

	page = s.Scene(ctx, "node1 has been well for three seconds.", refusedWrites, show.Leads(pool, nodes[0]))
	s.Promise("node1 alone serves again", page.Only("reads", "node1") && page.Only("writes", "node1"))
	return s.End()
}

// refusedWrites excuses writes that a standby refuses, and those that were in flight on a server that was killed.
func refusedWrites(kind string, err error) bool {
	return kind == "writes" && (show.ReadOnly(err) || errors.Is(err, multipool.ErrOutcomeUnknown))
}
