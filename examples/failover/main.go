// Failover shows what a program notices when replicas die, hang, shut down and come back: no error; and when the
// primary dies and a replica is promoted: writes that wait.
//
// It starts a real cluster of a primary and three replicas, reads and writes through one MultiPool, does to the
// servers under that load what happens to servers, and prints every second what the callers saw. It fails if one of
// them saw an error, but for writes that were in flight when the primary died: their outcome is unknown, and they say so.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"github.com/pgmultipool/multipool"
	"github.com/pgmultipool/multipool/internal/pgtest"
)

// settings are what the flags say.
type settings struct {
	readers, writers, replicas int
	pace                       time.Duration // how long every state of the cluster is shown
	quiet                      bool
}

func main() {
	var s settings
	flag.IntVar(&s.readers, "readers", 50, "number of readers")
	flag.IntVar(&s.writers, "writers", 10, "number of writers")
	flag.IntVar(&s.replicas, "replicas", 3, "number of replicas, 1 to 9")
	flag.DurationVar(&s.pace, "pace", 3*time.Second, "how long each state of the cluster is shown")
	flag.BoolVar(&s.quiet, "quiet", false, "announce the steps and the outcome only")
	flag.Parse()
	if flag.NArg() > 0 || s.readers < 1 || s.writers < 0 || s.replicas < 1 || s.replicas > 9 || s.pace <= 0 {
		flag.Usage()
		os.Exit(2)
	}

	ctx, release := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	context.AfterFunc(ctx, release) // a second Ctrl-C ends the program at once
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

// step is a piece of the story: it is announced, then its actions are done one after another.
type step struct {
	announcement string
	actions      []action
}

type action func(context.Context) error

func say(announcement string, actions ...action) step { return step{announcement, actions} }

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

	steps := append(story(cluster, pool, s), promotion(cluster, pool, load, board, s)...)
	for _, step := range steps {
		board.announce(step.announcement)
		if err = step.do(ctx); err != nil {
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

// story is what happens to the replicas. Where there are enough of them every trouble strikes another one.
func story(cluster *pgtest.Cluster, pool *multipool.MultiPool, s settings) []step {
	replicas := cluster.Standbys()
	killed, frozen, stopped := replicas[0], replicas[1%len(replicas)], replicas[2%len(replicas)]
	show := lasting(s.pace)

	return []step{
		say(fmt.Sprintf("%d readers and %d writers share one pool; all is well.", s.readers, s.writers), show),

		say("kill -9 of every process of "+killed.Name()+", a replica.", each(kill, killed), show),
		say(killed.Name()+" is started again, and must serve reads again by itself.",
			each(start, killed), untilTheyRead(pool, killed)),
		say(killed.Name()+" serves reads again, gently at first: its share grows for 10 s.", show),

		say("SIGSTOP of every process of "+frozen.Name()+": its connections stay open, and nothing answers.",
			each(freeze, frozen)),
		say("Reads in flight on "+frozen.Name()+" take about 1.1 s: until it is known to hang, and they run again elsewhere.",
			untilDown(pool, frozen)),
		say("The pool has "+frozen.Name()+" down.", show),
		say(frozen.Name()+" is thawed, and must serve reads again by itself.",
			each(thaw, frozen), untilTheyRead(pool, frozen)),
		say(frozen.Name()+" serves reads again.", show),

		say("Fast shutdown of "+stopped.Name()+", as for maintenance.", each(stop, stopped), show),
		say(stopped.Name()+" is started again, and must serve reads again by itself.",
			each(start, stopped), untilTheyRead(pool, stopped)),
		say(stopped.Name()+" serves reads again.", show),

		say("kill -9 of all replicas at once: the primary takes the reads, and writes keep connections in reserve.",
			each(kill, replicas...), show),
		say("All replicas are started again, and must serve reads again by themselves.",
			each(start, replicas...), untilTheyRead(pool, replicas...)),
		say("All replicas serve reads again.", show),
	}
}

// leaderless is how long nobody promotes a replica; writes wait as long, which must be well below their deadline.
const leaderless = time.Second

// promotion is what happens to the primary in the end.
func promotion(cluster *pgtest.Cluster, pool *multipool.MultiPool, l *load, b *board, s settings) []step {
	old, replicas := cluster.Primary(), cluster.Standbys()
	next, others := replicas[0], replicas[1:]
	show := lasting(s.pace)

	return []step{
		say("kill -9 of every process of "+old.Name()+", the primary: reads go on, and writes wait.",
			l.excuse(true), each(kill, old), lasting(min(s.pace, leaderless)), l.excuse(false)),
		say(next.Name()+" is promoted.", promote(next, l, b), each(following(next), others...), show),
		say(old.Name()+" is made a replica of "+next.Name()+", and must serve reads by itself.",
			each(following(next), old), untilTheyRead(pool, old)),
		say(old.Name()+" serves reads.", show),
	}
}

func (s step) do(ctx context.Context) error {
	for _, action := range s.actions {
		if err := action(ctx); err != nil {
			return err
		}
	}
	return nil
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
func lasting(d time.Duration) action {
	return func(ctx context.Context) error {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(d):
			return nil
		}
	}
}

// What is done to a server.
var (
	start  = (*pgtest.Server).Start
	kill   = (*pgtest.Server).Kill
	freeze = (*pgtest.Server).Freeze
	thaw   = (*pgtest.Server).Thaw
	stop   = func(s *pgtest.Server) error { return s.Stop(pgtest.Fast) }
)

// following makes servers replicas of a primary.
func following(primary *pgtest.Server) func(*pgtest.Server) error {
	return func(s *pgtest.Server) error { return s.Follow(primary) }
}

// promote makes a replica the primary and says how long the first write took to come to it, from when one could.
func promote(server *pgtest.Server, l *load, b *board) action {
	return func(ctx context.Context) error {
		taken := make(chan time.Time, 1)
		go func() { taken <- firstWrite(ctx, server) }()
		if err := server.Promote(); err != nil {
			return err
		}
		began := <-taken
		if l.writers == 0 || began.IsZero() {
			return nil
		}
		err := eventually(ctx, "no write comes to "+server.Name(), func() bool { return !l.writes.firstSuccess().IsZero() })
		if err == nil {
			b.announce(fmt.Sprintf("%s took the first write through the pool %s after it could take one.",
				server.Name(), millis(max(0, l.writes.firstSuccess().Sub(began)))))
		}
		return err
	}
}

// firstWrite tries until a server takes a write, on a connection that no pool knows of, and returns when it did.
func firstWrite(ctx context.Context, server *pgtest.Server) time.Time {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	conn, err := server.Conn(ctx)
	if err != nil {
		return time.Time{}
	}
	defer conn.Close(context.WithoutCancel(ctx))
	for ctx.Err() == nil {
		if _, err := conn.Exec(ctx, "update account set balance = balance where id = 1"); err == nil {
			return time.Now()
		}
		time.Sleep(time.Millisecond)
	}
	return time.Time{}
}

// every does something to every server at once.
func each(do func(*pgtest.Server) error, servers ...*pgtest.Server) action {
	return func(context.Context) error {
		errs := make([]error, len(servers))
		var all sync.WaitGroup
		for i, server := range servers {
			all.Go(func() { errs[i] = do(server) })
		}
		all.Wait()
		return errors.Join(errs...)
	}
}

// untilDown waits until the pool has given a server up.
func untilDown(pool *multipool.MultiPool, server *pgtest.Server) action {
	return func(ctx context.Context) error {
		return eventually(ctx, "the pool does not notice that "+server.Name()+" hangs", func() bool {
			return statusOf(pool, server).Health == multipool.HealthDown
		})
	}
}

// untilTheyRead waits until reads have gone to every one of the servers again.
func untilTheyRead(pool *multipool.MultiPool, servers ...*pgtest.Server) action {
	return func(ctx context.Context) error {
		before := make([]int64, len(servers))
		for i, server := range servers {
			before[i] = statusOf(pool, server).Reads
		}
		for i, server := range servers {
			err := eventually(ctx, server.Name()+" serves no reads", func() bool {
				return statusOf(pool, server).Reads > before[i]
			})
			if err != nil {
				return err
			}
		}
		return nil
	}
}

// patience bounds every wait. It is far above what any takes.
const patience = 20 * time.Second

// eventually waits until something is so; if that takes too long, complaint is the error.
func eventually(ctx context.Context, complaint string, so func() bool) error {
	ctx, cancel := context.WithTimeoutCause(ctx, patience, fmt.Errorf("%s, after %v", complaint, patience))
	defer cancel()
	for !so() {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(20 * time.Millisecond):
		}
	}
	return nil
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
