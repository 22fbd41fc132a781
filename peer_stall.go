package multipool

import (
	"context"
	"time"
)

// watch sees what no error tells: a peer on which statements run and none ends, and one whose reads take far longer than
// the others'. One goroutine for all peers samples what the connections count, so that no call looks at a clock.
type watch struct {
	pool    *MultiPool
	written time.Time // when the program was seen to use the primary last
}

const (
	watchTick   = 100 * time.Millisecond
	compareEach = 500 * time.Millisecond
	// lateTick voids a tick, or a probe: this process itself was stopped, and what it would find is its own doing.
	lateTick = 100 * time.Millisecond
	// forgiveAfter is how long a replica stays out of the reads at most whose sessions could not be set up.
	forgiveAfter = 10 * time.Minute
	// easeTime is how long a risen peer takes to get its whole share.
	easeTime = 10 * time.Second
)

// run ticks until ctx ends.
func (w *watch) run(ctx context.Context) {
	ticker := time.NewTicker(watchTick)
	defer ticker.Stop()
	last := time.Now()
	for n := 1; ; n++ {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		now := time.Now()
		void := now.Sub(last) > watchTick+lateTick
		last = now
		top := w.pool.topology.Load()
		for _, p := range top.peers {
			if w.count(p, now, void) && p == top.primary {
				w.written = now
			}
			p.load.easeOut()
		}
		if now.Sub(w.written) <= writtenFor {
			w.pursue()
		}
		if w.pool.config.Mode == ModeOrdered {
			w.steady(now)
		}
		if due(n, compareEach) {
			w.compare()
		}
		if due(n, time.Second) {
			for _, p := range w.pool.peers() {
				p.rate.next()
			}
		}
		if due(n, forgiveAfter) {
			w.forgive()
		}
	}
}

// pursue has those looked at that may have replaced the primary which the program writes to: what is written to one that was
// replaced is lost, and where nothing is read from the next nothing else tells.
func (w *watch) pursue() {
	for _, p := range w.pool.peers() {
		if p.mayRise() && p.monitor.summons.since() > writingLook-watchTick {
			p.monitor.nudge()
		}
	}
}

// due reports whether what is done each so often is done at the n-th tick.
func due(n int, each time.Duration) bool { return n%int(each/watchTick) == 0 }

// forgive has replicas tried again that have refused the program's set-up of a connection, which may be another by now,
// or was one session's: if they still do, it costs one read a detour.
func (w *watch) forgive() {
	for _, p := range w.pool.peers() {
		w.pool.observe(observation{peer: p, forgiven: true})
	}
}

// steady says of those that have been well for long enough that they may lead again.
func (w *watch) steady(now time.Time) {
	top := w.pool.topology.Load()
	for i := range top.members {
		m := &top.members[i]
		since := time.Unix(0, m.peer.rose.Load())
		if m.health == HealthUp && !m.steady && now.Sub(since) >= w.pool.config.ReturnAfter {
			w.pool.observe(observation{peer: m.peer, steady: true})
		}
	}
}

// stall is how long a peer has been without an answer while something waited for one.
type stall struct {
	quiet    time.Duration
	patience time.Duration // what is borne before the next suspicion; 0 means the configured time
}

// count takes in what has ended on a peer since the last tick, and reports whether the program has used it.
func (w *watch) count(p *peer, now time.Time, void bool) (used bool) {
	var ended int64
	var have int32 // calls that have a connection
	running, served := false, false
	sent := p.picks.writes.Load() // of what goes past pgx the watch sees nothing but that
	used, p.sent = sent != p.sent, sent
	p.sockets.wires(func(c *wire) {
		c.age(now)
		seq := c.seq.Load()
		ended += int64(seq>>1 - c.seen>>1)
		used = used || seq&1 == 1 || seq != c.seen
		if seq&1 == 1 && seq == c.seen { // it ran at the last tick already
			running = true
			if c.use.reading() && c.noted != seq && seq > 1 { // not the first, which is prepared there, too
				c.noted = seq             // once, however long it runs: it is one read
				p.latency.note(watchTick) // at least; a peer that is slow enough gets too few reads to be sampled
			}
		}
		c.seen = seq
		out := c.out.Load()
		if out&outAll != 0 {
			have++
		}
		served = served || out>>outBits != c.calls
		c.calls = out >> outBits
	})
	p.rate.add(ended)
	stallAfter := w.pool.config.StallAfter
	if stallAfter < 0 {
		return used // hangs are not looked for
	}
	waits := p.load.out.Load() > have && !served // for a connection, to be made, pinged or cleaned up, and nobody gets one
	switch {
	case void || ended > 0 || !running && !waits || !p.breaker.closed():
		p.stall = stall{}
	default:
		p.stall.quiet += watchTick
		if p.stall.quiet >= max(stallAfter, p.stall.patience) {
			// A long statement is no hang: the probe answers, and the next suspicion comes when it is twice as old.
			p.stall.patience = max(2*time.Second, 2*p.stall.quiet)
			p.suspect(errStalled)
		}
	}
	return used
}

// compare finds the replicas whose reads take far longer than those of the quickest. Those of other zones are compared
// with each other: distance is no fault.
func (w *watch) compare() {
	var best, bestAway time.Duration
	peers := w.pool.peers() // as they are now: they may change
	medians := make([]time.Duration, len(peers))
	for i, p := range peers {
		d := p.latency.median()
		if w.pool.config.Mode == ModeReplicated && Role(p.role.Load()) != RoleReplica || d == 0 {
			continue
		}
		medians[i] = d
		if best == 0 || d < best {
			best = d
		}
		if p.away && (bestAway == 0 || d < bestAway) {
			bestAway = d
		}
	}
	for i, p := range peers {
		if medians[i] == 0 {
			continue
		}
		quickest := best
		if p.away {
			quickest = bestAway
		}
		limit := slowFactor*quickest + slowMargin
		p.judge(medians[i] > limit, limit)
	}
}

// judge says whether the peer is slow, unless it has fallen since its reads were compared: then they were forgotten, and
// nobody would take back what they said. One that is slow shows by its looks that it is not any more. They only acquit: its
// reads are forgotten then, and a look, which is less than a read, is no measure for the others'.
func (p *peer) judge(slow bool, limit time.Duration) {
	p.verdicts.Lock()
	defer p.verdicts.Unlock()
	if p.latency.median() == 0 {
		return
	}
	said := no
	switch d := p.latency.ofLooks(); {
	case !slow:
		p.latency.forgetLooks()
	case d != 0 && d <= limit:
		p.latency.forget()
	default:
		said = yes
	}
	p.owner.observe(observation{peer: p, slow: said})
}

// A replica is left out of the reads where its median is over three times the best and a millisecond: SQL mixes point
// reads with reports, and a median, unlike a mean, does not care for one report.
const (
	slowFactor = 3
	slowMargin = time.Millisecond
)
