package multipool

import (
	"context"
	"errors"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/pgmultipool/multipool/internal/pgfault"
	"github.com/pgmultipool/multipool/internal/sqltext"
)

// The wire is its connection's tracer: pgx tells it of every statement, whoever sent it and however: through the pool,
// on an acquired connection, in a transaction, a batch or a copy. That is the breaker's feed.

// AcquireTracer traces Acquire on a [MultiPool]. The pool calls ConnConfig.Tracer, if that implements AcquireTracer, as
// pgxpool calls a pgxpool.AcquireTracer. If it implements pgxpool.AcquireTracer, it is called too, with the pgxpool
// that the connection comes from.
type AcquireTracer interface {
	// TraceAcquireStart is called when an acquire from a peer's pool begins. The returned context is used for the rest
	// of the acquire and is passed to TraceAcquireEnd.
	TraceAcquireStart(ctx context.Context, pool *MultiPool, data TraceAcquireStartData) context.Context
	// TraceAcquireEnd is called when a connection has been acquired, or the acquire has failed.
	TraceAcquireEnd(ctx context.Context, pool *MultiPool, data TraceAcquireEndData)
}

// ReleaseTracer traces Release on a MultiPool; see [AcquireTracer].
type ReleaseTracer interface {
	// TraceRelease is called when Release begins.
	TraceRelease(pool *MultiPool, data TraceReleaseData)
}

// userTracers is the program's tracer, asked once for every kind it serves, and called for those. It is nil if the program has none.
type userTracers struct {
	query   pgx.QueryTracer
	batch   pgx.BatchTracer
	copy    pgx.CopyFromTracer
	prepare pgx.PrepareTracer
	connect pgx.ConnectTracer
}

func splitTracer(t pgx.QueryTracer) *userTracers {
	if t == nil {
		return nil
	}
	u := &userTracers{query: t}
	u.batch, _ = t.(pgx.BatchTracer)
	u.copy, _ = t.(pgx.CopyFromTracer)
	u.prepare, _ = t.(pgx.PrepareTracer)
	u.connect, _ = t.(pgx.ConnectTracer)
	return u
}

func (u *userTracers) TraceQueryStart(ctx context.Context, c *pgx.Conn, d pgx.TraceQueryStartData) context.Context {
	if u == nil {
		return ctx
	}
	return u.query.TraceQueryStart(ctx, c, d)
}

func (u *userTracers) TraceQueryEnd(ctx context.Context, c *pgx.Conn, d pgx.TraceQueryEndData) {
	if u != nil {
		u.query.TraceQueryEnd(ctx, c, d)
	}
}

func (u *userTracers) TraceBatchStart(ctx context.Context, c *pgx.Conn, d pgx.TraceBatchStartData) context.Context {
	if u == nil || u.batch == nil {
		return ctx
	}
	return u.batch.TraceBatchStart(ctx, c, d)
}

func (u *userTracers) TraceBatchQuery(ctx context.Context, c *pgx.Conn, d pgx.TraceBatchQueryData) {
	if u != nil && u.batch != nil {
		u.batch.TraceBatchQuery(ctx, c, d)
	}
}

func (u *userTracers) TraceBatchEnd(ctx context.Context, c *pgx.Conn, d pgx.TraceBatchEndData) {
	if u != nil && u.batch != nil {
		u.batch.TraceBatchEnd(ctx, c, d)
	}
}

func (u *userTracers) TraceCopyFromStart(ctx context.Context, c *pgx.Conn, d pgx.TraceCopyFromStartData) context.Context {
	if u == nil || u.copy == nil {
		return ctx
	}
	return u.copy.TraceCopyFromStart(ctx, c, d)
}

func (u *userTracers) TraceCopyFromEnd(ctx context.Context, c *pgx.Conn, d pgx.TraceCopyFromEndData) {
	if u != nil && u.copy != nil {
		u.copy.TraceCopyFromEnd(ctx, c, d)
	}
}

func (u *userTracers) TracePrepareStart(ctx context.Context, c *pgx.Conn, d pgx.TracePrepareStartData) context.Context {
	if u == nil || u.prepare == nil {
		return ctx
	}
	return u.prepare.TracePrepareStart(ctx, c, d)
}

func (u *userTracers) TracePrepareEnd(ctx context.Context, c *pgx.Conn, d pgx.TracePrepareEndData) {
	if u != nil && u.prepare != nil {
		u.prepare.TracePrepareEnd(ctx, c, d)
	}
}

func (u *userTracers) TraceConnectStart(ctx context.Context, d pgx.TraceConnectStartData) context.Context {
	if u == nil || u.connect == nil {
		return ctx
	}
	return u.connect.TraceConnectStart(ctx, d)
}

func (u *userTracers) TraceConnectEnd(ctx context.Context, d pgx.TraceConnectEndData) {
	if u != nil && u.connect != nil {
		u.connect.TraceConnectEnd(ctx, d)
	}
}

// begin marks the connection busy, in a place of its own: a counter that all callers share would cost them more than the
// rest of the tracing. One mark per connection, and not a count, because pgx ends a failed batch twice, and a copy that
// fails early never.
func (w *wire) begin() {
	if n := w.seq.Load(); n&1 == 0 {
		w.started, w.reported = w.peer.generation.Load(), false
		w.gone = w.pg.IsClosed()
		w.seq.Store(n + 1)
	}
}

// settle ends the mark. It is called at the statement's end and again at release, for what pgx forgot.
func (w *wire) settle() {
	if n := w.seq.Load(); n&1 == 1 {
		w.seq.Store(n + 1)
	}
}

// end settles and reports how the statement ended.
func (w *wire) end(ctx context.Context, err error) {
	w.settle()
	if w.peer.solo {
		return
	}
	if w.gone {
		return // nothing was asked of the server
	}
	w.tellRole(w.started)
	if err == nil {
		w.generation = w.started
		if w.peer.proxy {
			w.peer.answers.Add(1)
		}
		if w.peer.suspected.Load() {
			w.peer.breaker.success()
		}
		return
	}
	v := pgfault.Statement(ctx, err, pgfault.Ending{Standby: w.standby})
	w.reportOnce(v, err)
	if w.peer.asksRole() && w.pg.TxStatus() == 'E' && pgfault.RefusedByStandby(err) {
		w.peer.monitor.mistrust() // elsewhere the session is asked: see recovers
	}
	if v.Class == pgfault.Caller && errors.Is(ctx.Err(), context.DeadlineExceeded) {
		w.peer.doubt()
	}
}

// reportOnce reports a statement's fault: pgx tells of one at its preparation and again at its end, and ends a batch
// twice.
func (w *wire) reportOnce(v pgfault.Verdict, err error) {
	if w.reported && v.BlamesServer() {
		return
	}
	w.reported = v.BlamesServer()
	w.peer.report(w.generation, v, err)
}

func (w *wire) TraceQueryStart(ctx context.Context, c *pgx.Conn, d pgx.TraceQueryStartData) context.Context {
	w.begin()
	w.sent.takes(d.SQL, d.Args)
	return w.user.TraceQueryStart(ctx, c, d)
}

func (w *wire) TraceQueryEnd(ctx context.Context, c *pgx.Conn, d pgx.TraceQueryEndData) {
	w.sent.tagged = d.CommandTag.String() != "" || d.Err != nil && w.dropped(d.Err)
	w.end(ctx, d.Err)
	w.user.TraceQueryEnd(ctx, c, d)
}

// dropped reports whether a command tag had come before the error by which the connection was lost: under the extended
// protocol pgx drops it then, and only the reader of the result still has it.
func (w *wire) dropped(err error) bool {
	if w.pg == nil || !w.pg.IsClosed() {
		return false
	}
	if w.reader == nil {
		return true
	}
	tag, of := w.reader.Close() // it reads nothing: the connection is closed
	return tag.String() != "" && of != nil && errors.Is(err, of)
}

// readerOf returns the reader that pgx uses for every result of the connection, nil if it makes new ones. Nothing is sent
// under a context that has ended.
func readerOf(pg *pgconn.PgConn) *pgconn.ResultReader {
	ended, end := context.WithCancel(context.Background())
	end()
	first := pg.ExecParams(ended, "", nil, nil, nil, nil)
	if first != pg.ExecParams(ended, "", nil, nil, nil, nil) {
		return nil
	}
	return first
}

func (w *wire) TraceBatchStart(ctx context.Context, c *pgx.Conn, d pgx.TraceBatchStartData) context.Context {
	w.begin()
	w.sent.takes("", nil)
	return w.user.TraceBatchStart(ctx, c, d)
}

func (w *wire) TraceBatchQuery(ctx context.Context, c *pgx.Conn, d pgx.TraceBatchQueryData) {
	w.user.TraceBatchQuery(ctx, c, d)
}

func (w *wire) TraceBatchEnd(ctx context.Context, c *pgx.Conn, d pgx.TraceBatchEndData) {
	w.end(ctx, d.Err)
	w.user.TraceBatchEnd(ctx, c, d)
}

func (w *wire) TraceCopyFromStart(ctx context.Context, c *pgx.Conn, d pgx.TraceCopyFromStartData) context.Context {
	w.begin()
	w.sent.takes(copyText, nil)
	return w.user.TraceCopyFromStart(ctx, c, d)
}

func (w *wire) TraceCopyFromEnd(ctx context.Context, c *pgx.Conn, d pgx.TraceCopyFromEndData) {
	w.sent.tagged = d.CommandTag.String() != "" || w.pg.IsClosed() // then pgx drops the tag that had come
	w.end(ctx, d.Err)
	w.user.TraceCopyFromEnd(ctx, c, d)
}

func (w *wire) TracePrepareStart(ctx context.Context, c *pgx.Conn, d pgx.TracePrepareStartData) context.Context {
	// A statement that the program prepares is later called by its name, which tells nothing: remember what its text
	// tells. pgx's own names are digests of texts.
	if d.Name != "" && !strings.HasPrefix(d.Name, "stmtcache_") && sqltext.Of(d.SQL) == sqltext.PrimaryOnly {
		w.peer.owner.texts.Learn(d.Name)
	}
	return w.user.TracePrepareStart(ctx, c, d)
}

func (w *wire) TracePrepareEnd(ctx context.Context, c *pgx.Conn, d pgx.TracePrepareEndData) {
	// An error here reaches the end of the statement that needed it, except for a copy's, which pgx ends with nothing.
	if d.Err != nil && !w.peer.solo && !w.gone {
		w.reportOnce(pgfault.Statement(ctx, d.Err, pgfault.Ending{Standby: w.standby}), d.Err)
	}
	w.user.TracePrepareEnd(ctx, c, d)
}

func (w *wire) TraceConnectStart(ctx context.Context, d pgx.TraceConnectStartData) context.Context {
	w.config = d.ConnConfig
	if w.approach != nil {
		d.ConnConfig = w.approach.starts(d.ConnConfig)
	} else {
		w.config.Tracer = w.own.Tracer
		defer w.hide(w.config)
	}
	return w.user.TraceConnectStart(ctx, d)
}

func (w *wire) TraceConnectEnd(ctx context.Context, d pgx.TraceConnectEndData) {
	w.shook()
	if d.Err == nil {
		w.made()
	} else {
		w.stand()
	}
	w.show()
	switch {
	case w.approach != nil:
		w.approach.ended(d.Err)
	case w.peer.solo:
		w.peer.met(d.Err)
	case d.Err == nil:
		w.peer.knocks.ended(nil)
	default:
		w.peer.knocks.ended(d.Err)
		v := pgfault.Acquire(ctx, d.Err, false)
		w.peer.report(w.generation, v, d.Err)
	}
	w.config, w.own = nil, nil
	w.over.Store(true)
	w.user.TraceConnectEnd(ctx, d)
}

// poolTracer is the tracer of a peer's pool: of releases for us, of both for the program. In whatever else is made from a
// copy of the pool's configuration it is the program's own tracer and nothing more.
type poolTracer struct {
	*userTracers
	owner   *MultiPool
	pool    *pgxpool.Pool
	given   pgx.QueryTracer // the program's
	acquire AcquireTracer
	release ReleaseTracer

	poolAcquire pgxpool.AcquireTracer
	poolRelease pgxpool.ReleaseTracer
}

// acquiringTracer is the poolTracer of a program that traces acquires: pgxpool finds the interface by assertion, and
// having it costs every acquire something.
type acquiringTracer struct{ *poolTracer }

func newPoolTracer(p *MultiPool, user pgx.QueryTracer) poolTracer {
	t := poolTracer{owner: p, given: user, userTracers: splitTracer(user)}
	t.acquire, _ = user.(AcquireTracer)
	t.release, _ = user.(ReleaseTracer)
	t.poolAcquire, _ = user.(pgxpool.AcquireTracer)
	t.poolRelease, _ = user.(pgxpool.ReleaseTracer)
	return t
}

// tracer returns what fits ConnConfig.Tracer of a peer's pool.
func (t *poolTracer) tracer() pgx.QueryTracer {
	if t.acquire != nil || t.poolAcquire != nil {
		return acquiringTracer{t}
	}
	return t
}

// of says which pool is ours, before anybody has it.
func (t *poolTracer) of(pool *pgxpool.Pool) { t.pool = pool }

// programs returns the program's tracer.
func (t *poolTracer) programs() pgx.QueryTracer { return t.given }

// ownTracer is the program's tracer where t is one of ours.
func ownTracer(t pgx.QueryTracer) pgx.QueryTracer {
	if ours, is := t.(interface{ programs() pgx.QueryTracer }); is {
		return ours.programs()
	}
	return t
}

func (t *poolTracer) TraceRelease(pool *pgxpool.Pool, d pgxpool.TraceReleaseData) {
	if w := wireOf(d.Conn); w != nil && pool == t.pool {
		if w.peer.shared.Load() && w.peer.slots.Waiting() > 0 {
			farewell(d.Conn)
		}
		w.released()
		if w.quiet {
			w.quiet = false
			return
		}
	}
	t.tellRelease(pool, d)
}

// tellRelease tells the program.
func (t *poolTracer) tellRelease(pool *pgxpool.Pool, d pgxpool.TraceReleaseData) {
	switch {
	case t.release != nil && pool == t.pool:
		t.release.TraceRelease(t.owner, d)
	case t.poolRelease != nil:
		t.poolRelease.TraceRelease(pool, d)
	}
}

func (t acquiringTracer) TraceAcquireStart(ctx context.Context, pool *pgxpool.Pool, d pgxpool.TraceAcquireStartData) context.Context {
	return t.tellAcquire(ctx, pool, d)
}

func (t acquiringTracer) TraceAcquireEnd(ctx context.Context, pool *pgxpool.Pool, d pgxpool.TraceAcquireEndData) {
	t.tellAcquired(ctx, pool, d)
}

// tellAcquire tells the program.
func (t *poolTracer) tellAcquire(ctx context.Context, pool *pgxpool.Pool, d pgxpool.TraceAcquireStartData) context.Context {
	if _, ours := ctx.(warming); ours {
		return ctx
	}
	switch {
	case t.acquire != nil && pool == t.pool:
		return t.acquire.TraceAcquireStart(ctx, t.owner, d)
	case t.poolAcquire != nil:
		return t.poolAcquire.TraceAcquireStart(ctx, pool, d)
	}
	return ctx
}

func (t *poolTracer) tellAcquired(ctx context.Context, pool *pgxpool.Pool, d pgxpool.TraceAcquireEndData) {
	if _, ours := ctx.(warming); ours {
		return
	}
	switch {
	case t.acquire != nil && pool == t.pool:
		t.acquire.TraceAcquireEnd(ctx, t.owner, d)
	case t.poolAcquire != nil:
		t.poolAcquire.TraceAcquireEnd(ctx, pool, d)
	}
}

// farewell closes a connection that its caller is releasing, so that the pool drops it.
func farewell(c *pgx.Conn) {
	ctx, cancel := context.WithTimeout(context.Background(), lookTimeout)
	defer cancel()
	_ = c.Close(ctx)
}

// released settles the connection's marks. Where the program has an AfterRelease, which pgxpool calls next, the connection stays
// what it was to the peer until that has ended.
func (w *wire) released() {
	w.settle()
	closed, hook := w.pg.IsClosed(), w.peer.config.AfterRelease != nil
	// While the program's hook has it, or pgx cleans up after it, it is not idle: it has its slot until it is closed.
	w.use.settle(!hook && !(closed && w.peer.shared.Load()))
	if closed || !hook {
		w.leave()
	}
}

// tellRole publishes the session's report of the role where it is news. The report came with the end of a statement
// that began in the given generation: one from before the peer's last change of role says nothing about the present.
func (w *wire) tellRole(generation uint64) {
	p := w.peer
	if p.solo || p.asked || w.pg == nil {
		return
	}
	if role := w.readRole(); role != RoleUnknown && role != Role(p.role.Load()) && generation == p.generation.Load() {
		p.owner.observe(observation{peer: p, role: role})
		p.monitor.nudge() // the session does not tell the timeline
	}
}

// connected is pgconn's AfterConnect of every connection: it is authenticated, and no statement has run on it.
func (w *wire) connected(pg *pgconn.PgConn) {
	pg.CustomData()[wireKey] = w
	w.pg = pg
	if !w.peer.solo {
		w.reader = readerOf(pg)
	}
	if w.peer.asked {
		w.presume()
	}
	w.tellRole(w.generation)
}

// hostile notes that the program's own set-up of a connection cannot run on a standby: the peer leaves the reads.
func (w *wire) hostile(err error) {
	if w.standby && !w.peer.solo && pgfault.RefusedByStandby(err) {
		w.peer.owner.observe(observation{peer: w.peer, hostile: err})
	}
}
