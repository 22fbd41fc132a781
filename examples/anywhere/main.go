// Anywhere shows reads on the primary and its replica alike; see docs/guides/anywhere.md.
//
// It starts a primary and a replica, reads and writes through one MultiPool, stops the primary, starts it again, kills the
// replica, and prints who served when. It fails if a promise of the guide is broken.
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

func main() { show.Main("anywhere", run) }

func run(ctx context.Context, out io.Writer, pace time.Duration) error {
	cluster, err := pgtest.New(ctx, pgtest.Options{Standbys: 1})
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
	primary, replica := cluster.Primary(), cluster.Standbys()[0]
	pool, err := open(ctx, show.Hosts(cluster.Servers()...))
	if err != nil {
		return err
	}
	defer pool.Close()

	s := show.New(out, pace, []*pgtest.Server{primary, replica}, "primary", "replica")
	s.Callers("reads", 10, func(ctx context.Context) (int, error) { return read(ctx, pool) })
	s.Callers("writes", 2, func(ctx context.Context) (int, error) { return write(ctx, pool) })

	page := s.Scene(ctx, "A primary and a replica.", nil, show.Serving(pool, primary, replica))
	s.Promise("both are read, and the primary is written to", page.Only("reads", "primary", "replica") && page.Only("writes", "primary"))

	page = s.Scene(ctx, "The primary is shut down.", unknownWrites, show.To(show.Stop, primary), show.Fallen(pool, primary))
	s.Promise("reads go on, and writes wait", page.Only("reads", "replica") && page.Only("writes"))

	page = s.Scene(ctx, "The primary is started again.", nil, show.To((*pgtest.Server).Start, primary), show.Serving(pool, primary))
	s.Promise("both are read, and the primary is written to", page.Only("reads", "primary", "replica") && page.Only("writes", "primary"))

	page = s.Scene(ctx, "kill -9 of the replica.", nil, show.To((*pgtest.Server).Kill, replica), show.Fallen(pool, replica))
	s.Promise("the primary serves alone", page.Only("reads", "primary") && page.Only("writes", "primary"))
	return s.End()
}

// unknownWrites excuses writes that were in flight on a server that went down.
func unknownWrites(kind string, err error) bool {
	return kind == "writes" && errors.Is(err, multipool.ErrOutcomeUnknown)
}
