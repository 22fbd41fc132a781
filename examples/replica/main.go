// Replica shows reads on a replica and writes on the primary, one model excepted; see docs/guides/replica.md.
//
// It starts a primary and a replica, reads and writes through one MultiPool, kills the replica, starts it again, restarts
// the primary, and prints who served when. It fails if a promise of the guide is broken.
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

func main() { show.Main("replica", run) }

func run(ctx context.Context, out io.Writer, pace time.Duration) error {
	cluster, err := pgtest.New(ctx, pgtest.Options{Standbys: 1})
	if err != nil {
		return err
	}
	return errors.Join(tell(ctx, cluster, out, pace), cluster.Close())
}

func tell(ctx context.Context, cluster *pgtest.Cluster, out io.Writer, pace time.Duration) error {
	err := cluster.Primary().Exec(ctx, `create table product (id int primary key); insert into product values (7);
		create table account (id int primary key); insert into account values (7);
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
	s.Callers("products", 8, func(ctx context.Context) (int, error) { return product(ctx, pool) })
	s.Callers("accounts", 4, func(ctx context.Context) (int, error) { return account(ctx, pool) })
	s.Callers("sales", 2, func(ctx context.Context) (int, error) { return sell(ctx, pool) })

	page := s.Scene(ctx, "A primary and a replica.", nil, show.Serving(pool, primary, replica))
	s.Promise("products are read on the replica", page.Only("products", "replica"))
	s.Promise("accounts are read on the primary, where sales are written", page.Only("accounts", "primary") && page.Only("sales", "primary"))

	page = s.Scene(ctx, "kill -9 of the replica.", nil, show.To((*pgtest.Server).Kill, replica), show.Fallen(pool, replica))
	s.Promise("the primary takes the reads", page.Only("products", "primary"))

	page = s.Scene(ctx, "The replica is started again.", nil, show.To((*pgtest.Server).Start, replica), show.Serving(pool, replica))
	s.Promise("it reads again", page.Only("products", "replica"))

	page = s.Scene(ctx, "The primary is shut down.", unknownSales, show.To(show.Stop, primary), show.Fallen(pool, primary))
	s.Promise("reads go on, and what needs the primary waits", page.Only("products", "replica") && page.Only("accounts") && page.Only("sales"))

	page = s.Scene(ctx, "The primary is started again.", nil, show.To((*pgtest.Server).Start, primary), show.Serving(pool, primary))
	s.Promise("all is as before", page.Only("products", "replica") && page.Only("accounts", "primary") && page.Only("sales", "primary"))
	return s.End()
}

// unknownSales excuses writes that were in flight on a server that went down.
func unknownSales(kind string, err error) bool {
	return kind == "sales" && errors.Is(err, multipool.ErrOutcomeUnknown)
}
