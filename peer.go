package multipool

import (
	"context"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

// peer is one server: its pool, its breaker, its counters. It has an identity, not an index: snapshots point at it.
type peer struct {
	name  string
	host  string
	port  uint16
	owner *MultiPool
	solo  bool // the pool's only peer: nothing is judged
	asked bool // its role is asked by the monitor, or believed; sessions are not listened to
	vouch Role // the role that the configuration vouches for; RoleUnknown: discovered

	config  *pgxpool.Config // the template as configured, with the program's hooks and none of ours
	pool    *pgxpool.Pool
	breaker *breaker
	monitor *monitor
	sockets sockets
	address addressPin

	// generation counts the verdicts about the peer. What began in an older one says nothing about the present, so
	// that twenty connections lost at once are one event.
	generation atomic.Uint64
	suspected  atomic.Bool  // a fault was reported and the probe's verdict is out
	role       atomic.Int32 // the topology's Role, for a comparison at each statement's end

	load   load
	picks  counters
	faults faultLog
}

// counters are what a peer was chosen for.
type counters struct {
	reads, writes, retries atomic.Int64
}

// faultLog keeps the last fault.
type faultLog struct {
	mu   sync.Mutex
	err  error
	when time.Time
}

func (l *faultLog) note(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.err, l.when = err, time.Now()
}

func (l *faultLog) last() (when time.Time, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.when, l.err
}

// newPeer makes a peer and its pool. The pool dials in the background if the template has minimum sizes.
func newPeer(ctx context.Context, owner *MultiPool, c peerConfig, solo bool) (*peer, error) {
	p := &peer{
		name: c.Name, host: c.Host, port: c.Port, owner: owner, solo: solo,
		asked:  c.Proxy || c.Role != RoleUnknown,
		vouch:  c.Role,
		config: c.pool,
	}
	if !solo {
		p.monitor = newMonitor(p, &owner.config)
	}
	p.load.limit = c.pool.MaxConns
	p.load.exhausted = p.exhausted
	p.breaker = newBreaker(p.name)
	p.address.offset = rand.Uint32()
	var err error
	p.pool, err = pgxpool.NewWithConfig(ctx, p.compose())
	return p, err
}

// compose returns the configuration of the peer's pool: the program's, with our hooks chained behind its own.
func (p *peer) compose() *pgxpool.Config {
	user := p.config
	c := user.Copy()
	c.ConnConfig.Tracer = newPoolTracer(p, user.ConnConfig.Tracer)
	c.BeforeConnect = func(ctx context.Context, cc *pgx.ConnConfig) error {
		cc.Tracer = user.ConnConfig.Tracer
		if user.BeforeConnect != nil {
			if err := user.BeforeConnect(ctx, cc); err != nil {
				return err
			}
		}
		p.wireUp(cc)
		return nil
	}
	if user.AfterConnect != nil {
		c.AfterConnect = func(ctx context.Context, conn *pgx.Conn) error {
			err := user.AfterConnect(ctx, conn)
			if err != nil {
				if w := wireOf(conn); w != nil {
					w.hostile(err)
				}
			}
			return err
		}
	}
	if !p.solo {
		c.PrepareConn = p.prepareConn(user)
	}
	return c
}

// wireUp puts a wire into the private copy of the configuration that one connection is made from. It comes after the
// program's BeforeConnect, which may have put its own things there.
func (p *peer) wireUp(cc *pgx.ConnConfig) {
	w := &wire{peer: p, user: splitTracer(cc.Tracer), generation: p.generation.Load()}
	w.started = w.generation
	cc.Tracer = w
	dial := cc.DialFunc
	cc.DialFunc = func(ctx context.Context, network, addr string) (net.Conn, error) {
		raw, err := dial(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		s := &socket{Conn: raw, wire: w}
		p.sockets.add(s)
		return s, nil
	}
	cc.LookupFunc = p.address.pinned(cc.LookupFunc, &p.generation)
	after := cc.AfterConnect
	cc.AfterConnect = func(ctx context.Context, pg *pgconn.PgConn) error {
		w.connected(pg)
		p.address.keep(pg, p.generation.Load())
		if after != nil {
			return after(ctx, pg)
		}
		return nil
	}
}

// prepareConn marks a connection as handed out, behind the program's own say. pgxpool calls it on every way out of the
// pool, AcquireAllIdle included.
func (p *peer) prepareConn(user *pgxpool.Config) func(context.Context, *pgx.Conn) (bool, error) {
	say := user.PrepareConn
	//lint:ignore SA1019 a program may still use it
	if say == nil && user.BeforeAcquire != nil {
		//lint:ignore SA1019 a program may still use it
		say = func(ctx context.Context, c *pgx.Conn) (bool, error) { return user.BeforeAcquire(ctx, c), nil }
	}
	return func(ctx context.Context, c *pgx.Conn) (bool, error) {
		if say != nil {
			if ok, err := say(ctx, c); !ok || err != nil {
				return ok, err
			}
		}
		if w := wireOf(c); w != nil && !w.out {
			w.out = true
			p.load.out.Add(1)
		}
		return true, nil
	}
}

// acquire takes a connection from the peer's pool.
func (p *peer) acquire(ctx context.Context) (*pgxpool.Conn, error) {
	p.load.waiting.Add(1)
	c, err := p.pool.Acquire(ctx)
	p.load.waiting.Add(-1)
	return c, err
}

// exhausted asks the pool whether a call would have to wait for somebody else's connection.
func (p *peer) exhausted() bool {
	s := p.pool.Stat()
	return s.IdleConns() == 0 && s.AcquiredConns()+s.ConstructingConns() >= s.MaxConns()
}

// report takes in how a statement or a dial ended. Only what blames the peer, and is of the present generation, counts:
// the first such fault makes the peer suspect and its monitor probe it at once; the breaker counts them all.
func (p *peer) report(generation uint64, v verdict, err error) {
	if p.owner.topology.Load() == nil {
		return // the pool is being made; its monitors begin with a look
	}
	if v.class == classConfig || v.class == classStarting {
		p.faults.note(err)
		p.monitor.nudge()
	}
	if !v.blamesPeer() || generation != p.generation.Load() {
		return
	}
	p.faults.note(err)
	if p.breaker.failure() {
		p.down(err)
		return
	}
	if p.suspected.CompareAndSwap(false, true) {
		p.owner.observe(observation{peer: p, health: healthSuspect, cause: err})
		p.monitor.nudge()
	}
}

// down publishes that the peer's breaker has opened, and throws away what the pool holds of it.
func (p *peer) down(cause error) {
	p.generation.Add(1)
	p.suspected.Store(false)
	p.owner.observe(observation{peer: p, health: healthDown, cause: cause})
	p.pool.Reset()
	p.monitor.nudge()
}

// addressPin keeps a peer on one server where its name has several addresses: a peer is a server, and what is known
// of one does not hold for another behind the same name. The pin lasts for a generation, so that a dead address is
// left when the peer has been judged.
type addressPin struct {
	mu         sync.Mutex
	address    string
	generation uint64
	offset     uint32 // where this program starts in the list, so that not all programs choose the same server
}

// pinned wraps a look-up: the pinned address alone while it is among the answers, else all of them in an order that is
// the same for every dial.
func (a *addressPin) pinned(find pgconn.LookupFunc, generation *atomic.Uint64) pgconn.LookupFunc {
	return func(ctx context.Context, host string) ([]string, error) {
		found, err := find(ctx, host)
		if err != nil || len(found) < 2 {
			return found, err
		}
		a.mu.Lock()
		defer a.mu.Unlock()
		if a.address != "" && a.generation == generation.Load() && slices.Contains(found, a.address) {
			return []string{a.address}, nil
		}
		ordered := slices.Sorted(slices.Values(found))
		k := int(a.offset % uint32(len(ordered)))
		return append(ordered[k:len(ordered):len(ordered)], ordered[:k]...), nil
	}
}

// keep pins the address that a connection has reached.
func (a *addressPin) keep(pg *pgconn.PgConn, generation uint64) {
	host, _, err := net.SplitHostPort(pg.Conn().RemoteAddr().String())
	if err != nil {
		return // a Unix socket, or a connection of the program's own making
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.address == "" || a.generation != generation {
		a.address, a.generation = host, generation
	}
}
