// Equals shows two pools of equal peers and the models routed between them; see docs/guides/equals.md.
//
// It starts two servers for every pool, which stand for the proxies: they know nothing of each other, and each takes reads and
// writes. It drains and restarts one, kills one and starts it again, kills all of one pool and starts them again, and prints
// who served when. It fails if a promise of the guide is broken.
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

func main() { show.Main("equals", run) }

func run(ctx context.Context, out io.Writer, pace time.Duration) (err error) {
	var peers []*pgtest.Server
	for range 4 {
		cluster, failed := pgtest.New(ctx, pgtest.Options{})
		if failed != nil {
			return failed
		}
		defer func() { err = errors.Join(err, cluster.Close()) }()
		peers = append(peers, cluster.Primary())
	}
	return tell(ctx, peers, out, pace)
}

func tell(ctx context.Context, peers []*pgtest.Server, out io.Writer, pace time.Duration) error {
	for _, peer := range peers {
		err := peer.Exec(ctx, `create table product (id int primary key); insert into product values (7);
			create table account (id int primary key); insert into account values (7);
			create table sale (product int)`)
		if err != nil {
			return err
		}
	}
	db, err := databases(ctx, show.Hosts(peers[:2]...), show.Hosts(peers[2:]...))
	if err != nil {
		return err
	}
	defer db.Close()
	rest, users := db.Pool(ctx), db.Pool(multipool.WithModel(ctx, "user"))

	s := show.New(out, pace, peers, "a1", "a2", "b1", "b2")
	s.Callers("products", 8, func(ctx context.Context) (int, error) { return product(ctx, db) })
	s.Callers("sales", 4, func(ctx context.Context) (int, error) { return sell(ctx, db) })
	s.Callers("users", 4, func(ctx context.Context) (int, error) { return user(ctx, db) })

	page := s.Scene(ctx, "a1 and a2 are equal, and b1 and b2, where the users are.", nil,
		show.Serving(rest, peers[:2]...), show.Serving(users, peers[2:]...))
	s.Promise("each model is with its peers, reads and writes alike",
		page.Only("products", "a1", "a2") && page.Only("sales", "a1", "a2") && page.Only("users", "b1", "b2"))

	page = s.Scene(ctx, "a1 is drained and restarted: a smart shutdown, which waits for the last client.", nil,
		func(ctx context.Context) error { return rest.Drain(ctx, peers[0].Addr()) },
		show.To(func(a1 *pgtest.Server) error { return a1.Restart(pgtest.Smart) }, peers[0]))
	s.Promise("a2 serves alone until a1 is resumed", page.Only("products", "a2") && page.Only("sales", "a2"))

	page = s.Scene(ctx, "a1 is resumed.", nil,
		func(context.Context) error { return rest.Resume(peers[0].Addr()) }, show.Serving(rest, peers[0]))
	s.Promise("both serve", page.Only("products", "a1", "a2"))

	page = s.Scene(ctx, "kill -9 of a1.", unknownSales, show.To((*pgtest.Server).Kill, peers[0]), show.Fallen(rest, peers[0]))
	s.Promise("a2 serves alone", page.Only("products", "a2") && page.Only("sales", "a2"))

	page = s.Scene(ctx, "a1 is started again.", nil, show.To((*pgtest.Server).Start, peers[0]), show.Serving(rest, peers[0]))
	s.Promise("both serve", page.Only("products", "a1", "a2"))

	page = s.Scene(ctx, "kill -9 of b1 and b2: there are no users.", nil,
		show.To((*pgtest.Server).Kill, peers[2:]...), show.Fallen(users, peers[2:]...))
	s.Promise("nobody else notices", page.Only("products", "a1", "a2") && page.Only("sales", "a1", "a2") && page.Only("users"))

	page = s.Scene(ctx, "b1 and b2 are started again.", nil, show.To((*pgtest.Server).Start, peers[2:]...), show.Serving(users, peers[2:]...))
	s.Promise("who waited for a user has it", page.Only("users", "b1", "b2"))
	return s.End()
}

// unknownSales excuses writes that were in flight on a server that was killed.
func unknownSales(kind string, err error) bool {
	return kind == "sales" && errors.Is(err, multipool.ErrOutcomeUnknown)
}
