package multipool

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"maps"
	"net"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/pgmultipool/multipool/internal/pgfault"
	"github.com/pgmultipool/multipool/internal/quota"
)

// approach is the making of one connection of a pool that follows. A pool returns the error of a connect to its caller
// and does not try again, so a connect must bear that its server dies under it. pgx tries the addresses of a
// configuration one after another: the approach lists all peers several times, each with its own way of TLS, and
// decides at every dial whether this entry is the one to take. The others are passed over at once. Before every peer there is
// an entry that leads nowhere. There the approach decides which peer is next, and waits if it must: pgx gives every entry the
// connect timeout, from which that wait is not to be taken.
type approach struct {
	follower *follower
	call     *call // for whom; nil if it is nobody's
	wire     *wire
	own      map[*peer]*pgx.ConnConfig // the peers' configurations, copied once: see ownOf
	timeout  time.Duration             // the pool's own bound, where the program has none
	entries  []entry
	base     context.Context // the pool's
	ctx      context.Context // of waits: ends with the call too
	end      func()

	want    *peer           // the peer that is to be tried; nil if none is chosen yet
	to      *peer           // for whom everything is prepared
	ours    *pgx.ConnConfig // to's configuration, after the program's BeforeConnect
	knocked bool            // at want, since it was chosen
	trail   trail
	visits  []visit // one for every entry that pgx has come to
	failed  error   // ends the approach

	arrived atomic.Pointer[pgconn.DialFunc] // the program's way to dial the peer; nil if not yet
}

// entry is one address in pgx's hands: a peer's, or its second with the other way of TLS (sslmode=prefer, allow).
type entry struct {
	peer   *peer // nil: nobody's, a place to wait
	second bool
}

// visit is what became of an entry.
type visit struct {
	peer       *peer // nil: passed over
	generation uint64
	dialled    bool // what failed, if anything did, came later: in the handshake
}

const (
	// walkRounds is how often a peer can be tried in one approach, with a pause for news in between.
	walkRounds = 6
	// walkMost bounds the walk where there are very many peers.
	walkMost = 1024
)

var (
	errElsewhere  = errors.New("multipool: another peer is wanted")
	errNotPrimary = errors.New("multipool: the server is no primary")
)

// beforeConnect is the pool's: it waits until there is a peer to go to, and puts the approach into the private copy of
// the configuration.
func (f *follower) beforeConnect(ctx context.Context, cc *pgx.ConnConfig) error {
	a := &approach{
		follower: f, wire: &wire{pool: f.kind}, own: make(map[*peer]*pgx.ConnConfig), timeout: cc.ConnectTimeout,
	}
	a.call, _ = ctx.Value(callKey{}).(*call)
	a.wire.approach = a
	a.bind(ctx)
	err := errPeerDown
	for errors.Is(err, errPeerDown) { // it fell while we waited at its door
		if err = a.next(); err == nil {
			err = a.prepare()
		}
	}
	if err != nil {
		a.end()
		return err
	}
	a.wire.user = splitTracer(a.ours.Tracer)
	a.impersonate(cc)
	return nil
}

// starts puts the list into the configuration that pgx works on, and returns one for the program's tracer, without it. The list
// comes here, and not before, as pgx has copied by now what it was given: what is put in stays as it is.
func (a *approach) starts(cc *pgx.ConnConfig) *pgx.ConnConfig {
	a.impersonate(cc)
	cc.Fallbacks = a.list()
	cc.Host, cc.Port = "#0", 1
	shown := *a.ours
	return &shown
}

// ownOf returns the approach's copy of a peer's configuration. There is one of each: the *tls.Config in it is in pgx's list, and
// pgx finds a client certificate's files by that pointer, in the configuration with which it was copied.
func (a *approach) ownOf(q *peer) *pgx.ConnConfig {
	if a.own[q] == nil {
		a.own[q] = q.config.ConnConfig.Copy()
	}
	return a.own[q]
}

// sharingTLS returns a copy of cc, of which everything may be changed, with the same *tls.Config in it.
func sharingTLS(cc *pgx.ConnConfig) *pgx.ConnConfig {
	shared := *cc
	shared.RuntimeParams = maps.Clone(cc.RuntimeParams)
	shared.Fallbacks = nil
	for _, f := range cc.Fallbacks {
		own := *f
		shared.Fallbacks = append(shared.Fallbacks, &own)
	}
	return &shared
}

// bind makes the context of the approach's waits. The pool detaches its own from the caller's, so that the caller's
// end would be known to nobody: a connection that nobody waits for any more is made if it can be, and not waited for.
func (a *approach) bind(ctx context.Context) {
	a.base = ctx
	bound, end := context.WithCancel(ctx)
	a.ctx, a.end = bound, end
	if a.call != nil {
		stop := context.AfterFunc(a.call, end)
		a.end = func() { stop(); end() }
	}
}

// next chooses who is to be tried, and waits where there is nobody; the call's turn goes there too.
func (a *approach) next() error {
	f := a.follower
	if a.want != nil && f.keeps(f.owner.topology.Load(), a.want) {
		return nil
	}
	a.want, a.knocked = nil, false
	q, top, err := f.seek(a.ctx, &a.trail, f.forConn, a.letGo)
	if err != nil {
		return err
	}
	a.want, err = a.bring(q, top)
	return err
}

// bring takes the call to a peer, and returns the one where it has a turn then: its own, where there is no room and its own
// will do; nil if it has none.
func (a *approach) bring(q *peer, top *topology) (*peer, error) {
	c := a.call
	if c == nil || c.move(q, top) {
		return q, nil
	}
	if at := c.where(); at != nil && contains(a.follower.candidates(top), at) && !a.trail.tried.has(at) {
		return at, nil
	}
	a.letGo()
	if err := c.take(q, top); err != nil {
		return nil, err
	}
	return q, nil
}

// letGo gives back all that is held of the last peer, before a wait: whoever is waited for may be waiting for just that.
func (a *approach) letGo() {
	a.retreat()
	if a.call != nil {
		a.call.letGo()
	}
}

// retreat gives back what was prepared.
func (a *approach) retreat() {
	a.wire.shook()
	a.wire.stand()
	a.to = nil
}

// prepare prepares what it takes to connect to the peer that is wanted: the program's own part, a seat, a place among
// the handshakes.
func (a *approach) prepare() error {
	q, w := a.want, a.wire
	if q == a.to {
		return nil
	}
	a.retreat()
	ours := sharingTLS(a.ownOf(q))
	if ours.ConnectTimeout <= 0 {
		ours.ConnectTimeout = a.timeout
	}
	if before := a.follower.user.BeforeConnect; before != nil {
		if err := before(a.base, ours); err != nil {
			return err
		}
	}
	w.peer, w.generation = q, q.generation.Load()
	w.started = w.generation
	if err := q.knocks.wait(a.ctx, q.era.Load()); err != nil {
		return err
	}
	if err := w.sit(a.ctx); err != nil {
		return err
	}
	if err := w.shake(a.ctx); err != nil {
		w.stand()
		return err
	}
	a.to, a.ours, w.own, w.mode = q, ours, ours, ours.DefaultQueryExecMode
	return nil
}

// list gives pgx the addresses, by numbers that dial understands: the first peer's, then all peers'.
func (a *approach) list() (all []*pgconn.FallbackConfig) {
	peers := a.follower.owner.peers()
	a.entries = append(a.entries, entry{peer: a.to})
	add := func(e entry, c *tls.Config) {
		all = append(all, &pgconn.FallbackConfig{Host: "#" + strconv.Itoa(len(a.entries)), Port: 1, TLSConfig: c})
		a.entries = append(a.entries, e)
	}
	for _, second := range a.ours.Fallbacks {
		add(entry{a.to, true}, second.TLSConfig)
	}
	for range max(2, min(walkRounds, walkMost/len(peers))) {
		for _, q := range peers {
			add(entry{}, nil)
			own := a.ours
			if q != a.to {
				own = a.ownOf(q)
			}
			add(entry{peer: q}, own.TLSConfig)
			for _, second := range own.Fallbacks {
				add(entry{q, true}, second.TLSConfig)
			}
		}
	}
	return all
}

// dial is pgx's: for the entries of the list one after another, and then as any connection's is. pgx sends cancel
// requests also on behalf of a try that has failed, while it goes on: they are refused.
func (a *approach) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	if own := a.arrived.Load(); own != nil {
		return a.wire.dialer(*own)(ctx, network, addr)
	}
	e, is := a.entryOf(network, addr)
	if !is {
		return nil, errElsewhere
	}
	a.visits = append(a.visits, visit{})
	switch {
	case a.failed != nil:
		return nil, a.failed
	case e.peer == nil:
		a.turn()
		return nil, errElsewhere
	case e.peer != a.to, e.second != a.knocked:
		return nil, errElsewhere
	}
	return a.knock(ctx, e)
}

func (a *approach) entryOf(network, addr string) (e entry, is bool) {
	host, _, err := net.SplitHostPort(addr)
	i, is := strings.CutPrefix(host, "#")
	if !is || err != nil || network == "unix" {
		return e, false
	}
	n, err := strconv.Atoi(i)
	if err != nil || n >= len(a.entries) {
		return e, false
	}
	return a.entries[n], true
}

// turn decides who is next, waits where it has to, and prepares the try.
func (a *approach) turn() {
	if a.knocked {
		// pgx comes to another entry when the last has failed; why it does not say before the end.
		a.want.doubt()
		a.trail.tried.add(a.want)
		a.want, a.knocked = nil, false
	}
	err := a.next()
	if err == nil {
		err = a.prepare()
	}
	if err == nil {
		a.impersonate(a.wire.config)
	} else if !errors.Is(err, errPeerDown) { // it fell while we waited at its door: the next turn asks again
		a.failed = err
	}
}

// impersonate makes of a configuration the peer's, with the approach in it. The one in pgx's hands is read after the dial.
func (a *approach) impersonate(cc *pgx.ConnConfig) {
	had := *cc
	*cc = *a.ours
	if cc.OnNotification == nil {
		cc.OnNotification = had.OnNotification // pgx's own
	}
	cc.Tracer = a.wire
	cc.DialFunc = a.dial
	cc.LookupFunc = func(_ context.Context, host string) ([]string, error) { return []string{host}, nil } // dial resolves
	cc.ValidateConnect = a.validate
	cc.AfterConnect = a.wire.authenticated(a.ours.AfterConnect)
}

// knock dials one address of the peer after another.
func (a *approach) knock(ctx context.Context, e entry) (net.Conn, error) {
	host, port := a.ours.Host, a.ours.Port
	if e.second && len(a.ours.Fallbacks) > 0 {
		host, port = a.ours.Fallbacks[0].Host, a.ours.Fallbacks[0].Port
	}
	now := &a.visits[len(a.visits)-1]
	now.peer, now.generation = a.to, a.to.generation.Load()
	a.wire.generation, a.wire.started = now.generation, now.generation
	a.knocked = true
	a.wire.use.restart() // the last try may have been cut
	conn, err := a.dialHost(ctx, host, port)
	now.dialled = err == nil
	if err != nil && a.base.Err() == nil {
		a.to.report(now.generation, pgfault.Dial(err), err)
	}
	return conn, err
}

func (a *approach) dialHost(ctx context.Context, host string, port uint16) (net.Conn, error) {
	if network, addr := pgconn.NetworkAddress(host, port); network == "unix" {
		return a.wire.dial(ctx, a.ours.DialFunc, network, addr, true)
	}
	found, err := a.to.address.pinned(a.ours.LookupFunc, &a.to.generation)(ctx, host)
	if err != nil {
		return nil, err
	}
	errs := []error{}
	for _, one := range found {
		addr := one
		if _, _, err := net.SplitHostPort(one); err != nil { // a look-up may tell the port too
			_, addr = pgconn.NetworkAddress(one, port)
		}
		conn, err := a.wire.dial(ctx, a.ours.DialFunc, "tcp", addr, true)
		if err == nil {
			return conn, nil
		}
		errs = append(errs, err)
	}
	return nil, errors.Join(errs...)
}

// validate refuses a server that says of itself that it is no primary, where one is wanted.
func (a *approach) validate(ctx context.Context, pg *pgconn.PgConn) error {
	if own := a.ours.ValidateConnect; own != nil {
		if err := own(ctx, pg); err != nil {
			return err
		}
	}
	q := a.to
	at, err := q.introduce(ctx, pg)
	if err != nil {
		return err
	}
	a.wire.at.Store(at)
	if a.follower.kind != quota.Primary || q.owner.config.Mode == ModeOrdered || q.asked || pg.ParameterStatus("in_hot_standby") != "on" {
		return nil
	}
	if a.wire.generation == q.generation.Load() {
		q.isReplica()
		q.monitor.nudge()
	}
	return errNotPrimary
}

// ended takes in how the connect ended. Of one that failed it judges every try, and gives the caller an error that says
// what came of it instead of pgx's list of all addresses.
func (a *approach) ended(err error) {
	a.end()
	w := a.wire
	w.approach = nil
	a.arrived.Store(&a.ours.DialFunc)
	// What the approach was for is over: from here on the connection is one of its peer's.
	shown := *a.ours
	shown.DialFunc, shown.OnNotification = w.config.DialFunc, w.config.OnNotification // ours, and pgx's
	*w.config = shown
	if err == nil {
		a.to.knocks.ended(nil)
		return
	}
	last := a.judge(err)
	if a.call != nil && a.call.Err() == nil {
		a.call.fail(a.outcome(last))
	}
}

// judge reports what every visit has met, and returns the last of it as the caller is to see it.
func (a *approach) judge(err error) (last error) {
	met := eachOf(err)
	if len(met) == 0 && len(a.visits) > 0 {
		met = make([]error, len(a.visits))
		met[len(met)-1] = err // after the last: the program's own AfterConnect
	}
	last = err
	for i, v := range a.visits {
		if v.peer == nil || i >= len(met) || met[i] == nil {
			continue
		}
		failure := &connectError{peer: v.peer.name, err: met[i], whole: err}
		if inner := errors.Unwrap(met[i]); inner != nil {
			failure.err = inner // without the entry's number
		}
		last = failure
		v.peer.knocks.ended(failure)
		if v.dialled {
			v.peer.report(v.generation, pgfault.Check(failure), failure)
		}
	}
	return last
}

// outcome is the error of the call: of its wait where it ended in one, else of its last try.
func (a *approach) outcome(last error) error {
	var none *NoPeerError
	switch {
	case errors.As(a.failed, &none):
		none.also = append(none.also, last)
		return none
	case a.failed != nil:
		return a.failed
	case !pgfault.Check(last).BlamesServer():
		return last
	}
	f := a.follower
	return f.owner.noPeer(f.owner.topology.Load(), &f.intent, &trail{last: last}, nil)
}

// eachOf takes pgx's error of a connect apart, into one for every address that it tried.
func eachOf(err error) []error {
	var whole *pgconn.ConnectError
	if !errors.As(err, &whole) {
		return nil
	}
	if all, ok := whole.Unwrap().(interface{ Unwrap() []error }); ok {
		return all.Unwrap()
	}
	return nil
}

// connectError is what one try to connect has met. It answers errors.As for the pgconn.ConnectError of all.
type connectError struct {
	peer  string
	err   error
	whole error
}

func (e *connectError) Error() string {
	return fmt.Sprintf("multipool: connect to %s: %v", e.peer, e.err)
}
func (e *connectError) Unwrap() error { return e.err }

func (e *connectError) As(target any) bool {
	if _, ok := target.(**pgconn.ConnectError); ok {
		return errors.As(e.whole, target)
	}
	return false
}
