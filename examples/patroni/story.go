package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"time"

	"github.com/pgmultipool/multipool"
)

// mostAdded is what the pool may add to the time in which the cluster takes no writes.
const mostAdded = 50 * time.Millisecond

// story is a cluster under load, and what happens to it.
type story struct {
	out   io.Writer
	begun time.Time
	settings

	cluster *cluster
	prober  *prober
	pool    *multipool.MultiPool
	ledger  *ledger
	broken  []error // promises
}

func (t *story) say(format string, args ...any) {
	fmt.Fprintf(t.out, "%5.1f s  "+format+"\n", append([]any{time.Since(t.begun).Seconds()}, args...)...)
}

// events is what happens to the leader.
func (t *story) events(ctx context.Context) error {
	leader, err := t.cluster.untilWhole(ctx)
	if err != nil {
		return err
	}
	t.say("%s leads; %d readers and %d writers share one pool.", leader.name, t.readers, t.writers)
	if err := lasting(ctx, t.pace); err != nil {
		return err
	}
	if leader, err = t.switchover(ctx, leader); err != nil {
		return err
	}
	if err := lasting(ctx, t.pace); err != nil {
		return err
	}
	if err = t.kill(ctx, leader); err != nil {
		return err
	}
	return lasting(ctx, t.pace)
}

// switchover is planned: the leader shuts down in order and comes back as a replica. It returns the new leader.
func (t *story) switchover(ctx context.Context, old *node) (*node, error) {
	before, begin := t.ledger.now(), time.Now()
	t.say("Switchover, asked of the Patroni of %s.", old.name)
	leader, err := t.cluster.switchover(ctx, old)
	if err != nil {
		return nil, err
	}
	if err := t.untilWritten(ctx, leader); err != nil {
		return nil, err
	}
	t.say("%s leads.", leader.name)
	if err := t.untilBack(ctx, old); err != nil {
		return nil, err
	}
	t.report("switchover", begin, leader, before)
	return leader, nil
}

// kill ends a leader without a word, and nobody does anything about it: Patroni has to.
func (t *story) kill(ctx context.Context, old *node) error {
	before, begin := t.ledger.now(), time.Now()
	t.say("kill -9 of %s: its Patroni and every process of its PostgreSQL.", old.name)
	if err := t.cluster.kill(old); err != nil {
		return err
	}
	leader, err := t.cluster.untilLedByOther(ctx, old)
	if err != nil {
		return err
	}
	if err := t.untilWritten(ctx, leader); err != nil {
		return err
	}
	t.say("%s leads.", leader.name)
	if err := lasting(ctx, t.pace); err != nil {
		return err
	}
	t.say("The Patroni of %s is started again.", old.name)
	if err := t.cluster.start(old); err != nil {
		return err
	}
	if err := t.untilBack(ctx, old); err != nil {
		return err
	}
	t.report("kill -9", begin, leader, before)
	return nil
}

// untilWritten waits until a new leader takes writes, and one has come to it through the pool.
func (t *story) untilWritten(ctx context.Context, leader *node) error {
	return eventually(ctx, patience, func(context.Context) error {
		taken := t.prober.writableSince(leader)
		if taken.IsZero() {
			return fmt.Errorf("%s takes no writes", leader.name)
		}
		if !t.ledger.acknowledgedSince(taken) {
			return fmt.Errorf("%s takes writes, but none comes through the pool", leader.name)
		}
		return nil
	})
}

// untilBack waits until the former leader is a replica like the others, and reads go to it.
func (t *story) untilBack(ctx context.Context, old *node) error {
	if _, err := t.cluster.untilWhole(ctx); err != nil {
		return err
	}
	t.say("%s is back as a replica.", old.name)
	if t.readers == 0 {
		return nil
	}
	before := t.reads(old)
	err := eventually(ctx, patience, func(context.Context) error {
		if t.reads(old) == before {
			return fmt.Errorf("%s serves no reads", old.name)
		}
		return nil
	})
	if err == nil {
		t.say("%s serves reads again.", old.name)
	}
	return err
}

// reads returns how many reads the pool has sent to a node.
func (t *story) reads(m *node) int64 {
	for _, peer := range t.pool.Status().Peers {
		if peer.Name == m.addr {
			return peer.Reads
		}
	}
	return 0
}

// report prints what an event has cost, and notes broken promises.
func (t *story) report(event string, begin time.Time, leader *node, before tally) {
	taken := t.prober.writableSince(leader)
	last, first := t.ledger.outage(begin, taken)
	added := first.Sub(taken)
	fmt.Fprintf(t.out, "         %s: no write was acknowledged for %s: %s until %s took one, %s.\n",
		event, lasted(first.Sub(last)), lasted(taken.Sub(last)), leader.name, share(added))
	d := t.ledger.now().minus(before)
	fmt.Fprintf(t.out, "         Of %d writes %d have an unknown outcome and %d failed otherwise; of %d reads %d failed.\n",
		d.writes, d.unknownWrites, d.failedWrites, d.reads, d.failedReads)
	if added > mostAdded {
		t.broken = append(t.broken, fmt.Errorf("%s: the pool took %s to find the new leader, not %v at most", event, lasted(added), mostAdded))
	}
}

// end looks whether every promise was kept.
func (t *story) end(ctx context.Context) error {
	leader, err := t.cluster.leader(ctx)
	if err != nil {
		return err
	}
	conn, err := leader.connect(ctx)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	audit, err := t.ledger.check(ctx, conn)
	if err != nil {
		return err
	}
	for _, text := range slices.Sorted(maps.Keys(t.ledger.errors)) {
		fmt.Fprintf(t.out, "%d x %s\n", t.ledger.errors[text], text)
	}
	fmt.Fprintln(t.out, audit)
	if t.ledger.failedReads > 0 {
		t.broken = append(t.broken, errors.New("reads failed"))
	}
	if t.ledger.failedWrites > 0 {
		t.broken = append(t.broken, errors.New("writes failed that could have waited"))
	}
	return errors.Join(errors.Join(t.broken...), audit.verdict())
}

// share says what of an outage was the pool's own.
func share(added time.Duration) string {
	if added < 0 { // both write at the same time, and the prober came second
		return "and nothing more for the pool"
	}
	return lasted(added) + " more until it took one of the pool's"
}

func lasted(d time.Duration) string {
	if d >= time.Second {
		return fmt.Sprintf("%.2f s", d.Seconds())
	}
	return fmt.Sprintf("%.1f ms", float64(d)/float64(time.Millisecond))
}
