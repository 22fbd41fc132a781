package multipool

import (
	"context"
	"net"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

// compose returns the configuration of the peer's pool: the program's, with our hooks chained after its own.
func (p *peer) compose() *pgxpool.Config {
	user := p.config
	c := user.Copy()
	tracer := newPoolTracer(p.owner, user.ConnConfig.Tracer)
	c.ConnConfig.Tracer = tracer.tracer()
	c.BeforeConnect = func(ctx context.Context, cc *pgx.ConnConfig) error {
		cc.Tracer = user.ConnConfig.Tracer
		if user.BeforeConnect != nil {
			if err := user.BeforeConnect(ctx, cc); err != nil {
				return err
			}
		}
		return p.wireUp(ctx, cc)
	}
	c.AfterConnect = afterConnect(user)
	c.AfterRelease = afterRelease(user)
	if !p.solo {
		c.PrepareConn = prepareConn(user)
	}
	return c
}

// newPool makes a pool of a composed configuration, and then has it show the program's own: pgxpool has taken what it uses.
// The tracer it reads for every new connection; in a pool of the program's, made from a copy, it is the program's alone.
func newPool(ctx context.Context, c, user *pgxpool.Config) (*pgxpool.Pool, error) {
	pool, err := pgxpool.NewWithConfig(ctx, c)
	if err != nil {
		return pool, err
	}
	c.ConnConfig.Tracer.(interface{ of(*pgxpool.Pool) }).of(pool)
	c.BeforeConnect, c.AfterConnect = user.BeforeConnect, user.AfterConnect
	c.PrepareConn, c.AfterRelease = user.PrepareConn, user.AfterRelease
	c.MinConns, c.MinIdleConns, c.MaxConns = user.MinConns, user.MinIdleConns, user.MaxConns
	return pool, nil
}

// afterConnect ends the making of a connection, after the program's own part in it.
func afterConnect(user *pgxpool.Config) func(context.Context, *pgx.Conn) error {
	return func(ctx context.Context, conn *pgx.Conn) error {
		w := wireOf(conn)
		if w != nil {
			if err := w.introduce(ctx); err != nil {
				return err
			}
		}
		if user.AfterConnect != nil {
			if err := user.AfterConnect(ctx, conn); err != nil {
				if w != nil {
					w.hostile(err)
				}
				return err
			}
		}
		if w != nil {
			w.use.ready()
		}
		return nil
	}
}

// afterRelease ends a release, after the program's own part in it: until then the connection is the program's. It returns nil
// if the program has no part in it: then the release has ended, and a hook would cost every release a goroutine.
func afterRelease(user *pgxpool.Config) func(*pgx.Conn) bool {
	own := user.AfterRelease
	if own == nil {
		return nil
	}
	return func(conn *pgx.Conn) bool {
		w := wireOf(conn)
		if w != nil && w.swept {
			w.swept = false
			w.use.ready()
			return true
		}
		ok := own(conn)
		if ok && w != nil { // else it is closed, and gives back then what it has
			w.use.ready()
			w.leave()
		}
		return ok
	}
}

// wireUp puts a wire into the private copy of the configuration that one connection is made from. It comes after the
// program's BeforeConnect, which may have put its own things there, and waits for a place among the handshakes: not in
// the dial, where the wait would be taken from the connect timeout.
func (p *peer) wireUp(ctx context.Context, cc *pgx.ConnConfig) error {
	w := &wire{peer: p, user: splitTracer(cc.Tracer), generation: p.generation.Load()}
	w.started = w.generation
	if !p.solo {
		if err := p.knocks.allow(); err != nil {
			return err
		}
		if err := w.sit(ctx); err != nil {
			return err
		}
		if err := w.shake(ctx); err != nil {
			w.stand()
			return err
		}
	}
	w.own = new(pgx.ConnConfig)
	*w.own = *cc
	cc.Tracer = w // puts in the rest
	return nil
}

// hide puts ours into the configuration in pgx's hands, after the program's tracer has seen it.
func (w *wire) hide(cc *pgx.ConnConfig) {
	p := w.peer
	*w.own = *cc
	w.mode = cc.DefaultQueryExecMode
	cc.Tracer = w
	if !p.solo {
		cc.DialFunc = w.dialer(cc.DialFunc)
		cc.LookupFunc = p.address.pinned(cc.LookupFunc, &p.generation)
	}
	cc.AfterConnect = w.authenticated(cc.AfterConnect)
}

// show puts the program's own back into the configuration in pgx's hands, which copies it for whoever asks the
// connection for it, and tells it with an error. DialFunc stays ours: cancel requests are dialled by it.
func (w *wire) show() {
	cc, own := w.config, w.own
	cc.Tracer, cc.LookupFunc = own.Tracer, own.LookupFunc
	cc.AfterConnect, cc.ValidateConnect = own.AfterConnect, own.ValidateConnect
}

// dialer is the DialFunc of a connection's configuration: it makes the connection, and dials its cancel requests. One
// made from a copy of that configuration is none of ours, and dialled as the program says.
func (w *wire) dialer(own pgconn.DialFunc) pgconn.DialFunc {
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		network, addr, cancels := cancelTarget(network, addr)
		if !cancels && w.over.Load() {
			return own(ctx, network, addr)
		}
		return w.dial(ctx, own, network, addr, !cancels)
	}
}

// authenticated is pgconn's AfterConnect of every connection, in front of the program's own.
func (w *wire) authenticated(after func(context.Context, *pgconn.PgConn) error) func(context.Context, *pgconn.PgConn) error {
	return func(ctx context.Context, pg *pgconn.PgConn) error {
		w.connected(pg)
		w.peer.address.keep(pg, w.peer.generation.Load())
		if after != nil {
			return after(ctx, pg)
		}
		return nil
	}
}

// dial makes the network connections of one wire: the connection itself, or one for a cancel request. A dial ends when the
// peer falls.
func (w *wire) dial(ctx context.Context, dial pgconn.DialFunc, network, addr string, main bool) (net.Conn, error) {
	p := w.peer
	if p.sockets.refuses() {
		return nil, errPeerDown
	}
	if w.committing.Load() {
		return nil, errCommitting
	}
	ctx, done := p.era.Load().within(ctx)
	defer done()
	raw, err := dial(ctx, network, addr)
	if err != nil {
		return nil, err
	}
	s := &socket{Conn: raw, wire: w, peer: p, main: main, network: network, addr: addr}
	if !p.sockets.add(s) { // it fell while we dialled
		_ = raw.Close()
		return nil, errPeerDown
	}
	if main {
		w.main.Store(s)
		w.eye.open(raw)
	}
	return s, nil
}

// prepareConn marks a connection as held, after the program's own say. pgxpool calls it on every way out of the pool,
// PeerPool and AcquireAllIdle included.
func prepareConn(user *pgxpool.Config) func(context.Context, *pgx.Conn) (bool, error) {
	say := sayOf(user)
	return func(ctx context.Context, c *pgx.Conn) (bool, error) {
		return wireOf(c).claim(ctx, c, say)
	}
}

// sayOf returns the program's own PrepareConn, in whichever form; nil if it has none.
func sayOf(user *pgxpool.Config) func(context.Context, *pgx.Conn) (bool, error) {
	//lint:ignore SA1019 a program may still use it
	if before := user.BeforeAcquire; user.PrepareConn == nil && before != nil {
		return func(ctx context.Context, c *pgx.Conn) (bool, error) { return before(ctx, c), nil }
	}
	return user.PrepareConn
}
