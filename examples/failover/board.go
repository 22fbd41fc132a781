package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/pgmultipool/multipool"
	"github.com/pgmultipool/multipool/internal/pgtest"
)

// board shows every second what the callers saw and what the pool thinks of its peers. On a terminal the table is
// drawn over the last one and announcements scroll above it; elsewhere everything is lines, one a second, and a peer
// gets a line of its own when its state changes.
type board struct {
	out      io.Writer
	terminal bool
	quiet    bool
	begun    time.Time
	pool     *multipool.MultiPool
	load     *load
	names    map[string]string // of the servers, by address, which is the pool's name for them

	mu     sync.Mutex       // announcements and tables do not mix
	table  string           // as it stands on the terminal
	since  time.Time        // of the last refresh
	reads  map[string]int64 // by peer, then
	states map[string]string

	stopped chan struct{}
	ended   chan struct{}
}

func startBoard(out io.Writer, cluster *pgtest.Cluster, pool *multipool.MultiPool, l *load, quiet bool) *board {
	b := &board{
		out: out, terminal: isTerminal(out), quiet: quiet, begun: time.Now(), since: time.Now(), pool: pool, load: l,
		names: make(map[string]string), reads: make(map[string]int64), states: make(map[string]string),
		stopped: make(chan struct{}), ended: make(chan struct{}),
	}
	for _, s := range cluster.Servers() {
		b.names[s.Addr()] = s.Name()
	}
	go b.run()
	return b
}

func (b *board) run() {
	defer close(b.ended)
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-b.stopped:
			return
		case <-tick.C:
			b.refresh()
		}
	}
}

// stop leaves the last table where it is.
func (b *board) stop() {
	close(b.stopped)
	<-b.ended
}

// announce says what happens next.
func (b *board) announce(what string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	line := fmt.Sprintf("%5.1f s  %s\n", time.Since(b.begun).Seconds(), what)
	io.WriteString(b.out, b.erase()+line+b.table)
}

// refresh shows the time since the last refresh.
func (b *board) refresh() {
	b.mu.Lock()
	defer b.mu.Unlock()
	now := time.Now()
	elapsed := now.Sub(b.since)
	b.since = now
	peers := b.peers()
	reads, writes := b.load.reads.take(), b.load.writes.take()
	switch {
	case b.quiet:
	case b.terminal:
		table := drawTable(elapsed, reads, writes, peers)
		io.WriteString(b.out, b.erase()+table)
		b.table = table
	default:
		io.WriteString(b.out, b.drawLines(elapsed, reads, writes, peers))
	}
}

// erase returns what puts a terminal's cursor where the table begins and clears from there.
func (b *board) erase() string {
	if b.table == "" {
		return ""
	}
	return fmt.Sprintf("\x1b[%dA\x1b[J", strings.Count(b.table, "\n"))
}

// peer is one row of the table.
type peer struct {
	multipool.PeerStatus
	name  string
	share float64 // of the reads since the last refresh, in percent
}

func (b *board) peers() []peer {
	var peers []peer
	var sum int64
	before := b.reads
	b.reads = make(map[string]int64)
	for _, s := range b.pool.Status().Peers {
		b.reads[s.Name] = s.Reads
		sum += s.Reads - before[s.Name]
		peers = append(peers, peer{PeerStatus: s, name: b.names[s.Name]})
	}
	for i := range peers {
		p := &peers[i]
		p.share = 100 * float64(p.Reads-before[p.Name]) / float64(max(sum, 1))
	}
	return peers
}

func drawTable(elapsed time.Duration, reads, writes second, peers []peer) string {
	var t strings.Builder
	fmt.Fprintf(&t, "\n  %-7s %8s %8s %10s %10s %14s\n", "", "calls/s", "errors", "p50", "p99", "worst so far")
	for _, row := range []struct {
		name string
		second
	}{{"reads", reads}, {"writes", writes}} {
		fmt.Fprintf(&t, "  %-7s %8.0f %8d %10s %10s %14s\n", row.name,
			row.rate(elapsed), row.failed, millis(row.quantile(0.5)), millis(row.quantile(0.99)), millis(row.worst))
	}
	fmt.Fprintf(&t, "\n  %-7s %-16s %-8s %-10s %-14s %5s\n", "peer", "address", "role", "breaker", "health", "reads")
	for _, p := range peers {
		fmt.Fprintf(&t, "  %-7s %-16s %-8s %-10s %-14s %3.0f %%\n",
			p.name, p.Name, p.Role, p.Breaker, p.Health, p.share)
	}
	return t.String()
}

func (b *board) drawLines(elapsed time.Duration, reads, writes second, peers []peer) string {
	var t strings.Builder
	for _, p := range peers {
		state := fmt.Sprintf("%s, breaker %s, %s", p.Role, p.Breaker, p.Health)
		if state != b.states[p.name] {
			fmt.Fprintf(&t, "%10s%s: %s\n", "", p.name, state)
			b.states[p.name] = state
		}
	}
	fmt.Fprintf(&t, "%5.1f s  reads %5.0f/s %d errors p50 %s p99 %s, worst so far %s",
		time.Since(b.begun).Seconds(), reads.rate(elapsed), reads.failed,
		millis(reads.quantile(0.5)), millis(reads.quantile(0.99)), millis(reads.worst))
	fmt.Fprintf(&t, " | writes %4.0f/s %d errors | reads by peer", writes.rate(elapsed), writes.failed)
	for _, p := range peers {
		fmt.Fprintf(&t, " %.0f%%", p.share)
	}
	return t.String() + "\n"
}

func (s second) rate(elapsed time.Duration) float64 { return float64(len(s.took)) / elapsed.Seconds() }

func millis(d time.Duration) string {
	return fmt.Sprintf("%.1f ms", float64(d)/float64(time.Millisecond))
}

// isTerminal reports whether out can be drawn on. A device that is none, such as /dev/null, does no harm.
func isTerminal(out io.Writer) bool {
	f, ok := out.(*os.File)
	if !ok || os.Getenv("TERM") == "" || os.Getenv("TERM") == "dumb" {
		return false
	}
	info, err := f.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0
}
