// Failover shows what a program notices when a replica dies and comes back: nothing.
//
// It starts a real cluster of a primary and three replicas, reads and writes through one MultiPool, kills a replica
// under that load, starts it again, and prints every second what the callers saw. It fails if one of them saw an error.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/pgmultipool/multipool"
	"github.com/pgmultipool/multipool/internal/pgtest"
)

// settings are what the flags say.
type settings struct {
	readers, writers, replicas int
	pace                       time.Duration // how long each state of the cluster is shown
	quiet                      bool
}

func main() {
	var s settings
	flag.IntVar(&s.readers, "readers", 50, "number of readers")
	flag.IntVar(&s.writers, "writers", 10, "number of writers")
	flag.IntVar(&s.replicas, "replicas", 3, "number of replicas, 1 to 9")
	flag.DurationVar(&s.pace, "pace", 5*time.Second, "how long each state of the cluster is shown")
	flag.BoolVar(&s.quiet, "quiet", false, "announce the steps and the outcome only")
	flag.Parse()
	if flag.NArg() > 0 || s.readers < 1 || s.writers < 0 || s.replicas < 1 || s.replicas > 9 || s.pace <= 0 {
		flag.Usage()
		os.Exit(2)
	}

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	context.AfterFunc(ctx, stop) // a second Ctrl-C ends the program at once
	if err := run(ctx, s, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "failover:", err)
		os.Exit(1)
	}
}

// run starts the cluster, tells the story and removes every trace of the cluster.
func run(ctx context.Context, s settings, out io.Writer) error {
	fmt.Fprintf(out, "Starting a primary and its replicas: %d servers.\n", 1+s.replicas)
	cluster, err := pgtest.New(ctx, pgtest.Options{Standbys: s.replicas})
	if err != nil {
		return err
	}
	return errors.Join(tell(ctx, cluster, s, out), cluster.Close())
}

// step is a piece of the story: it is announced, then done.
type step struct {
	announcement string
	action       func(context.Context) error
}

// tell puts the cluster under load and goes through the steps.
func tell(ctx context.Context, cluster *pgtest.Cluster, s settings, out io.Writer) error {
	if err := createAccounts(ctx, cluster); err != nil {
		return err
	}

	// This is all a program has to say. The string names every server, and which of them is the primary is found out:
	// postgres://postgres@127.0.0.1:41001,127.0.0.1:41002,127.0.0.1:41003,127.0.0.1:41004/postgres
	pool, err := multipool.New(ctx, cluster.ConnString())
	if err != nil {
		return err
	}
	defer pool.Close()

	load := startLoad(pool, s.readers, s.writers)
	board := startBoard(out, cluster, pool, load, s.quiet)

	victim := cluster.Standbys()[0]
	steps := []step{
		{
			fmt.Sprintf("%d readers and %d writers share one pool; all is well.", s.readers, s.writers),
			lasting(s.pace),
		},
		{
			fmt.Sprintf("kill -9 of every process of %s, a replica.", victim.Name()),
			then(victim.Kill, lasting(s.pace)),
		},
		{
			fmt.Sprintf("%s is started again, and must serve reads again by itself.", victim.Name()),
			then(victim.Start, untilItReads(pool, victim)),
		},
		{
			fmt.Sprintf("%s serves reads again.", victim.Name()),
			lasting(s.pace),
		},
	}
	for _, step := range steps {
		board.announce(step.announcement)
		if err = step.action(ctx); err != nil {
			break
		}
	}

	load.stop()
	board.stop()
	if ctx.Err() != nil {
		err = errors.New("interrupted")
	}
	return errors.Join(err, load.report(out))
}

// createAccounts makes what is read and written, on every server.
func createAccounts(ctx context.Context, cluster *pgtest.Cluster) error {
	err := cluster.Primary().Exec(ctx, fmt.Sprintf(`
		create table account (id int primary key, balance bigint not null);
		insert into account select id, 0 from generate_series(1, %d) id`, accounts))
	if err != nil {
		return err
	}
	return cluster.WaitCaughtUp(ctx)
}

// lasting lets some time pass.
func lasting(d time.Duration) func(context.Context) error {
	return func(ctx context.Context) error {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(d):
			return nil
		}
	}
}

// then does something to a server and goes on.
func then(fault func() error, next func(context.Context) error) func(context.Context) error {
	return func(ctx context.Context) error {
		if err := fault(); err != nil {
			return err
		}
		return next(ctx)
	}
}

// untilItReads waits until reads have gone to a server again.
func untilItReads(pool *multipool.MultiPool, server *pgtest.Server) func(context.Context) error {
	const patience = 10 * time.Second
	return func(ctx context.Context) error {
		ctx, cancel := context.WithTimeoutCause(ctx, patience,
			fmt.Errorf("%s serves no reads %v after its start", server.Name(), patience))
		defer cancel()
		before := statusOf(pool, server).Reads
		for statusOf(pool, server).Reads == before {
			select {
			case <-ctx.Done():
				return context.Cause(ctx)
			case <-time.After(20 * time.Millisecond):
			}
		}
		return nil
	}
}

// statusOf returns what the pool says of one server; peers are named by their address.
func statusOf(pool *multipool.MultiPool, server *pgtest.Server) multipool.PeerStatus {
	for _, peer := range pool.Status().Peers {
		if peer.Name == server.Addr() {
			return peer
		}
	}
	return multipool.PeerStatus{}
}
