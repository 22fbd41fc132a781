// Patroni shows what a program notices when Patroni moves the leadership of a cluster, planned or not: a pause of its
// writes as long as the cluster itself takes, and no failed read.
//
// It starts an etcd and three nodes, each a Patroni with its PostgreSQL, reads and writes through one MultiPool, asks
// Patroni for a switchover, then kills the leader and leaves the rest to Patroni. Of each it prints how long nothing
// could be written, and how much of that was the pool's doing. It fails if a promise is broken: a read fails, a write
// fails otherwise than by an unknown outcome, an acknowledged write is lost, one is executed twice, or the pool takes
// long to find the new leader.
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
	readers, writers int
	ttl              time.Duration // Patroni's
	pace             time.Duration // how long the cluster is left alone between two events
}

func main() {
	var s settings
	flag.IntVar(&s.readers, "readers", 20, "number of readers")
	flag.IntVar(&s.writers, "writers", 20, "number of writers")
	flag.DurationVar(&s.ttl, "ttl", shortestTTL,
		"how long the lease of a dead leader lasts, in whole seconds (some versions of Patroni take no less than 20 s)")
	flag.DurationVar(&s.pace, "pace", 3*time.Second, "how long the cluster is left alone between two events")
	flag.Parse()
	// Patroni wants ttl to be at least loop_wait + 2 * retry_timeout, and writers give up after writeDeadline.
	if flag.NArg() > 0 || s.readers < 0 || s.writers < 1 || s.pace <= 0 ||
		s.ttl < loopWait+2*retryTimeout || s.ttl > writeDeadline-20*time.Second || s.ttl%time.Second != 0 {
		flag.Usage()
		os.Exit(2)
	}

	ctx, release := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	context.AfterFunc(ctx, release) // a second Ctrl-C ends the program at once
	if err := run(ctx, s, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "patroni:", err)
		os.Exit(1)
	}
}

// run starts the cluster, tells the story and removes every trace of the cluster.
func run(ctx context.Context, s settings, out io.Writer) error {
	box, err := pgtest.NewSandbox()
	if err != nil {
		return err
	}
	err = tell(ctx, box, s, out)
	if ctx.Err() != nil {
		err = errors.New("interrupted")
	}
	return errors.Join(err, box.Close())
}

// tell starts the cluster and a load on it, and goes through the events.
func tell(ctx context.Context, box *pgtest.Sandbox, s settings, out io.Writer) error {
	fmt.Fprintf(out, "Starting an etcd and three Patroni nodes: ttl %v, loop_wait %v, retry_timeout %v, synchronous_mode.\n",
		s.ttl, loopWait, retryTimeout)
	cluster, err := newCluster(ctx, box, 3, s.ttl)
	if err != nil {
		return err
	}
	leader, err := createTables(ctx, cluster)
	if err != nil {
		return err
	}
	prober, err := startProber(ctx, cluster, leader)
	if err != nil {
		return err
	}
	defer prober.stop()

	// This is all a program has to say: every node, and that writers would rather wait than fail.
	pool, err := multipool.New(ctx, cluster.connString("pool_max_conns=20", "multipool_wait="+writeDeadline.String()))
	if err != nil {
		return err
	}
	defer pool.Close()

	t := &story{out: out, begun: time.Now(), settings: s, cluster: cluster, prober: prober, pool: pool, ledger: &ledger{}}
	load := startLoad(pool, t.ledger, s.readers, s.writers)
	err = t.events(ctx)
	if err != nil {
		// Writers may be waiting for a leader that will never be.
		pool.Close()
	}
	load.stop()
	if err != nil {
		return err
	}
	return t.end(ctx)
}

// createTables makes what is read and written, on every node, and returns the leader.
func createTables(ctx context.Context, c *cluster) (*node, error) {
	leader, err := c.leader(ctx)
	if err != nil {
		return nil, err
	}
	conn, err := leader.connect(ctx)
	if err != nil {
		return nil, err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	_, err = conn.Exec(ctx, fmt.Sprintf(`
		create table written (number bigint not null);
		create table item (id int primary key, text text not null);
		insert into item select id, 'item ' || id from generate_series(1, %d) id`, items))
	return leader, err
}
