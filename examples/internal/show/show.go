// Package show is what the programs of the guides have in common: callers that go on whatever happens, scenes that say who
// served them, and promises that are checked.
package show

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"os/signal"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/pgmultipool/multipool"
	"github.com/pgmultipool/multipool/internal/pgtest"
)

const (
	// deadline is what a call may take: far more than it does, and more than calls are held for a server that restarts.
	deadline = 15 * time.Second
	// rest is how long a caller pauses between two calls, on average.
	rest = 10 * time.Millisecond
	// fewest is how many calls a scene shows at least, however slow the machine.
	fewest = 20
	// grace is how long a server is waited for that is expected to serve and has not yet.
	grace = 5 * time.Second
	// patience bounds every wait. It is far above what any takes.
	patience = 20 * time.Second
)

// Main runs a program of a guide and ends the process: with status 1 where it fails or a promise is broken.
func Main(name string, run func(ctx context.Context, out io.Writer, pace time.Duration) error) {
	pace := flag.Duration("pace", time.Second, "how long each scene is shown")
	flag.Parse()
	if flag.NArg() > 0 || *pace <= 0 {
		flag.Usage()
		os.Exit(2)
	}
	ctx, release := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	context.AfterFunc(ctx, release) // a second Ctrl-C ends the program at once
	if err := run(ctx, os.Stdout, *pace); err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", name, err)
		os.Exit(1)
	}
}

// Show is callers, and what became of their calls.
type Show struct {
	out     io.Writer
	pace    time.Duration
	begun   time.Time
	names   map[int]string // of the servers, by port
	kinds   []string
	stopped chan struct{}
	callers sync.WaitGroup
	kept    int
	broken  []string
	err     error // what ended the show; nothing is done or promised after it

	mu    sync.Mutex
	page  *Page
	pages []*Page
}

// New begins a show of servers, which are called as names says or, where that is nil, by their own names.
func New(out io.Writer, pace time.Duration, servers []*pgtest.Server, names ...string) *Show {
	s := &Show{out: out, pace: pace, begun: time.Now(), names: map[int]string{}, stopped: make(chan struct{})}
	for i, server := range servers {
		name := server.Name()
		if names != nil {
			name = names[i]
		}
		s.names[int(server.Port())] = name
	}
	s.turn(nil)
	return s
}

// Page is the calls that began in a span of time.
type Page struct {
	show   *Show
	number int // of its place among the pages
	excuse func(kind string, err error) bool
	calls  map[string]*tally // by kind
}

type tally struct {
	done   int
	by     map[string]int // who did it
	failed map[string]int
	excess int // of failed, what nothing excuses
}

// turn opens a new page.
func (s *Show) turn(excuse func(kind string, err error) bool) *Page {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.page = &Page{show: s, number: len(s.pages), excuse: excuse, calls: map[string]*tally{}}
	s.pages = append(s.pages, s.page)
	return s.page
}

// Callers starts n callers of one kind. A call returns the port of the server that did it.
func (s *Show) Callers(kind string, n int, call func(ctx context.Context) (port int, err error)) {
	s.kinds = append(s.kinds, kind)
	for range n {
		s.callers.Go(func() {
			for {
				select {
				case <-s.stopped:
					return
				case <-time.After(rand.N(2 * rest)):
				}
				s.call(kind, call)
			}
		})
	}
}

func (s *Show) call(kind string, call func(ctx context.Context) (port int, err error)) {
	s.mu.Lock()
	page := s.page
	s.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), deadline)
	defer cancel()
	port, err := call(ctx)
	s.mu.Lock()
	defer s.mu.Unlock()
	t := page.of(kind)
	if err == nil {
		t.done++
		t.by[s.names[port]]++
		return
	}
	t.failed[short(err)]++
	// What is announced strikes calls that are in flight, too, which may have begun on a page before.
	if !slices.ContainsFunc(s.pages[page.number:], func(p *Page) bool { return p.excuse != nil && p.excuse(kind, err) }) {
		t.excess++
	}
}

// of returns the tally of a kind. The caller holds mu.
func (p *Page) of(kind string) *tally {
	t := p.calls[kind]
	if t == nil {
		t = &tally{by: map[string]int{}, failed: map[string]int{}}
		p.calls[kind] = t
	}
	return t
}

// short is what is printed of an error.
func short(err error) string {
	switch {
	case errors.Is(err, multipool.ErrOutcomeUnknown):
		return "outcome unknown"
	case ReadOnly(err):
		return "refused by a standby (25006)"
	}
	return err.Error()
}

// ReadOnly reports whether a standby has refused a write.
func ReadOnly(err error) bool {
	var pgErr *pgconn.PgError
	return errors.As(err, &pgErr) && pgErr.Code == "25006"
}

// Scene announces what happens, does it, and then shows for a while who serves; it returns what it has shown. excuse says
// which errors of calls that began in the scene, or were in flight then, break no promise; nil if there is none. After an error, which
// End returns, there are no more scenes.
func (s *Show) Scene(ctx context.Context, what string, excuse func(kind string, err error) bool, actions ...func(context.Context) error) *Page {
	change := s.turn(excuse)
	if s.err != nil {
		return change
	}
	fmt.Fprintf(s.out, "%5.1f s  %s\n", time.Since(s.begun).Seconds(), what)
	for _, action := range actions {
		if s.err = action(ctx); s.err != nil {
			return change
		}
	}
	page := s.turn(excuse)
	after := time.Now().Add(s.pace)
	s.err = eventually(ctx, "nobody is served", func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return time.Now().After(after) && page.of(s.kinds[0]).done >= fewest
	})
	for _, kind := range s.kinds {
		fmt.Fprintf(s.out, "           %-10s %s\n", kind, s.line(kind, page, change))
	}
	return page
}

// line says who did the calls of one kind, and which failed, those that began during the change included.
func (s *Show) line(kind string, page, change *Page) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	t := page.of(kind)
	text := fmt.Sprintf("%5d", t.done)
	for _, name := range slices.Sorted(maps.Keys(t.by)) {
		text += fmt.Sprintf("  %s %.0f %%", name, 100*float64(t.by[name])/float64(t.done))
	}
	if t.done == 0 {
		text += "  they wait"
	}
	failed := maps.Clone(t.failed)
	for what, n := range change.of(kind).failed {
		failed[what] += n
	}
	for _, what := range slices.Sorted(maps.Keys(failed)) {
		text += fmt.Sprintf("; %d x %s", failed[what], what)
	}
	return text
}

// Only reports whether these servers did every call of a kind, each of them some, and none failed. It waits a while for one
// that has done none yet: one that has just returned gets few, and one that was slow for a moment none.
func (p *Page) Only(kind string, servers ...string) bool {
	for deadline := time.Now().Add(grace); ; time.Sleep(5 * time.Millisecond) {
		missing, wrong := p.compare(kind, servers)
		if !missing || wrong || time.Now().After(deadline) {
			return !missing && !wrong
		}
	}
}

func (p *Page) compare(kind string, servers []string) (missing, wrong bool) {
	p.show.mu.Lock()
	defer p.show.mu.Unlock()
	t := p.of(kind)
	for _, server := range servers {
		missing = missing || t.by[server] == 0
	}
	for server := range t.by {
		wrong = wrong || !slices.Contains(servers, server)
	}
	return missing, wrong || len(t.failed) > 0
}

// Without reports whether a server did no call of the page.
func (p *Page) Without(server string) bool {
	p.show.mu.Lock()
	defer p.show.mu.Unlock()
	for _, t := range p.calls {
		if t.by[server] > 0 {
			return false
		}
	}
	return true
}

// Promise notes, and says, whether a promise is kept.
func (s *Show) Promise(what string, kept bool) {
	switch {
	case s.err != nil:
		return
	case kept:
		s.kept++
		fmt.Fprintf(s.out, "           kept: %s\n", what)
		return
	}
	s.broken = append(s.broken, what)
	fmt.Fprintf(s.out, "           BROKEN: %s\n", what)
}

// End lets the callers finish, checks that no call failed without an excuse, and returns what is broken as an error.
func (s *Show) End() error {
	close(s.stopped)
	s.callers.Wait()
	if s.err != nil {
		return s.err
	}
	calls, failed, excess := map[string]int{}, map[string]int{}, map[string]int{}
	for _, page := range s.pages {
		for kind, t := range page.calls {
			calls[kind] += t.done
			for _, n := range t.failed {
				failed[kind] += n
			}
			excess[kind] += t.excess
		}
	}
	for _, kind := range s.kinds {
		what := fmt.Sprintf("%s: %d done, none failed", kind, calls[kind])
		if failed[kind] > 0 {
			what = fmt.Sprintf("%s: %d done, %d failed, all of them as announced", kind, calls[kind], failed[kind])
		}
		if excess[kind] > 0 {
			what = fmt.Sprintf("%s: %d done, %d failed, %d of them without an excuse", kind, calls[kind], failed[kind], excess[kind])
		}
		s.Promise(what, excess[kind] == 0)
	}
	if len(s.broken) > 0 {
		return fmt.Errorf("%d promises broken: %s", len(s.broken), strings.Join(s.broken, "; "))
	}
	fmt.Fprintf(s.out, "%5.1f s  %d promises, all kept.\n", time.Since(s.begun).Seconds(), s.kept)
	return nil
}

// What scenes do.

// To does something to every server, one after another.
func To(do func(*pgtest.Server) error, servers ...*pgtest.Server) func(context.Context) error {
	return func(context.Context) error {
		for _, server := range servers {
			if err := do(server); err != nil {
				return err
			}
		}
		return nil
	}
}

// Stop shuts a server down as for maintenance.
func Stop(s *pgtest.Server) error { return s.Stop(pgtest.Fast) }

// Serving waits until a pool uses servers.
func Serving(pool *multipool.MultiPool, servers ...*pgtest.Server) func(context.Context) error {
	return until("used", pool, servers, func(p multipool.PeerStatus) bool { return p.Serves })
}

// Fallen waits until a pool knows that servers are down.
func Fallen(pool *multipool.MultiPool, servers ...*pgtest.Server) func(context.Context) error {
	return until("known to be down", pool, servers, func(p multipool.PeerStatus) bool { return !p.Serves && p.Health != multipool.HealthUp })
}

// Well waits until servers answer a pool.
func Well(pool *multipool.MultiPool, servers ...*pgtest.Server) func(context.Context) error {
	return until("seen well", pool, servers, func(p multipool.PeerStatus) bool { return p.Health == multipool.HealthUp })
}

// Leads waits until a server takes the writes, or under ModeOrdered everything.
func Leads(pool *multipool.MultiPool, server *pgtest.Server) func(context.Context) error {
	return until("in the lead", pool, []*pgtest.Server{server}, func(p multipool.PeerStatus) bool { return p.Primary && p.Health == multipool.HealthUp })
}

func until(what string, pool *multipool.MultiPool, servers []*pgtest.Server, so func(multipool.PeerStatus) bool) func(context.Context) error {
	return func(ctx context.Context) error {
		for _, server := range servers {
			err := eventually(ctx, server.Addr()+" is not "+what, func() bool {
				return slices.ContainsFunc(pool.Status().Peers, func(p multipool.PeerStatus) bool { return p.Name == server.Addr() && so(p) })
			})
			if err != nil {
				return err
			}
		}
		return nil
	}
}

// eventually waits until something is so; if that takes too long, complaint is the error.
func eventually(ctx context.Context, complaint string, so func() bool) error {
	ctx, cancel := context.WithTimeoutCause(ctx, patience, fmt.Errorf("%s, after %v", complaint, patience))
	defer cancel()
	for !so() {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(5 * time.Millisecond):
		}
	}
	return nil
}

// Hosts is the servers as a connection string lists them.
func Hosts(servers ...*pgtest.Server) string {
	addrs := make([]string, len(servers))
	for i, server := range servers {
		addrs[i] = server.Addr()
	}
	return strings.Join(addrs, ",")
}
