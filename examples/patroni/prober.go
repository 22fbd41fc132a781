package main

import (
	"context"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
)

// probeGap is how often the prober asks every node, and so how exact it is.
const probeGap = 2 * time.Millisecond

// prober finds out on connections of its own, one to every node, since when the node takes writes: what the cluster
// itself is to answer for, whatever the pool does.
type prober struct {
	cancel context.CancelFunc
	probes sync.WaitGroup

	mu    sync.Mutex
	since map[*node]time.Time // when it took the first write after one that it did not take
}

// startProber creates the table that is written to.
func startProber(ctx context.Context, c *cluster, leader *node) (*prober, error) {
	conn, err := leader.connect(ctx)
	if err != nil {
		return nil, err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	if _, err := conn.Exec(ctx, "create table probe (at timestamptz not null)"); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	p := &prober{cancel: cancel, since: make(map[*node]time.Time)}
	for _, m := range c.nodes {
		p.probes.Go(func() { p.watch(ctx, m) })
	}
	return p, nil
}

func (p *prober) stop() {
	p.cancel()
	p.probes.Wait()
}

// writableSince returns since when a node takes writes without interruption; zero if it does not.
func (p *prober) writableSince(m *node) time.Time {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.since[m]
}

func (p *prober) watch(ctx context.Context, m *node) {
	for ctx.Err() == nil {
		if conn, err := m.connect(ctx); err == nil {
			p.probe(ctx, conn, m)
			_ = conn.Close(ctx) // broken, as it is
		}
		p.note(m, false)
		_ = lasting(ctx, probeGap)
	}
}

// probe asks until an answer fails to come. A write is tried only once the node says that it is no standby, and when
// one was taken no more are: standbys would fill their logs with refusals, and the primary its disk.
func (p *prober) probe(ctx context.Context, conn *pgx.Conn, m *node) {
	for {
		var standby bool
		if err := conn.QueryRow(ctx, "select pg_is_in_recovery()").Scan(&standby); err != nil {
			return
		}
		if !standby && p.writableSince(m).IsZero() {
			if _, err := conn.Exec(ctx, "insert into probe values (now())"); err != nil {
				return
			}
		}
		p.note(m, !standby)
		if lasting(ctx, probeGap) != nil {
			return
		}
	}
}

func (p *prober) note(m *node, writable bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case !writable:
		delete(p.since, m)
	case p.since[m].IsZero():
		p.since[m] = time.Now()
	}
}
