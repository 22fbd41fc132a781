package multipool

import (
	"context"
	"errors"
	"net"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"

	"github.com/pgmultipool/multipool/internal/pgtest"
)

// KNOWN FAILURES: what differs for the worse today and is to end. They are printed and fail nothing. Whoever mends one deletes
// its line.
var (
	knownOfOneHost      = map[known]string{}
	knownOfSeveralHosts = map[known]string{}
)

// mishaps are all there are, in the order of the schedule.
func mishaps() []*mishap {
	return []*mishap{
		{name: "none"},

		// Sessions.
		{name: "all sessions terminated", apply: (*differential).terminate},
		{name: "statements cancelled by an operator", apply: func(d *differential) {
			d.admin("select pg_cancel_backend(pid) from pg_locks where locktype = 'advisory' and not granted")
		}},
		{name: "a backend killed", apply: func(d *differential) {
			require.NoError(d.t, d.cluster.Primary().KillBackend())
			require.NoError(d.t, d.cluster.Primary().WaitReady(testContext(d.t)))
		}},
		{name: "sessions idle for too long (57P05)", apply: (*differential).endIdle},

		// Servers.
		{name: "the server killed", apply: onPrimary((*pgtest.Server).Kill), undo: onPrimary((*pgtest.Server).Start)},
		{name: "the server stopped, fast", long: true, apply: onPrimary(stop(pgtest.Fast)), undo: onPrimary((*pgtest.Server).Start)},
		{name: "the server stopped, immediate", apply: onPrimary(stop(pgtest.Immediate)), undo: onPrimary((*pgtest.Server).Start)},
		{name: "the server restarted", apply: onPrimary(func(s *pgtest.Server) error { return s.Restart(pgtest.Fast) })},
		{name: "a smart stop under way (57P03)", apply: (*differential).signalSmart, undo: (*differential).endSmart},
		{name: "the server killed, a standby promoted", several: true, apply: func(d *differential) {
			require.NoError(d.t, d.cluster.Primary().Kill())
			require.NoError(d.t, d.cluster.Standbys()[0].Promote())
		}, mend: func(d *differential) {
			for _, s := range d.cluster.Servers() {
				if s != d.cluster.Primary() {
					require.NoError(d.t, s.Follow(d.cluster.Primary()))
				}
			}
		}},
		{name: "the standby killed", several: true, apply: onStandby((*pgtest.Server).Kill), undo: onStandby((*pgtest.Server).Start)},
		{name: "the standby stopped, fast", long: true, several: true, apply: onStandby(stop(pgtest.Fast)), undo: onStandby((*pgtest.Server).Start)},
		{name: "the standby frozen", several: true, apply: onStandby((*pgtest.Server).Freeze), undo: onStandby((*pgtest.Server).Thaw)},

		// Networks.
		{name: "all connections reset", network: true, apply: (*differential).resetAll},
		{name: "the network refuses and resets", network: true,
			apply: func(d *differential) { d.refuse(true); d.resetAll() },
			undo:  func(d *differential) { d.refuse(false) }},
		{name: "the network refuses new connections", long: true, network: true,
			apply: func(d *differential) { d.refuse(true) },
			undo:  func(d *differential) { d.refuse(false) }},
		{name: "the server frozen", hangs: true, apply: onPrimary((*pgtest.Server).Freeze), undo: onPrimary((*pgtest.Server).Thaw)},
		{name: "the network a black hole", network: true, hangs: true,
			apply: func(d *differential) { d.relays[d.cluster.Primary()].Blackhole() },
			undo:  func(d *differential) { d.relays[d.cluster.Primary()].Thaw() }},
		{name: "the standby's network a black hole", network: true, several: true,
			apply: func(d *differential) { d.relays[d.cluster.Standbys()[0]].Blackhole() },
			undo:  func(d *differential) { d.relays[d.cluster.Standbys()[0]].Thaw() }},

		// This side.
		{name: "the name service out", apply: func(d *differential) { set(&d.lookup, errLookup); d.terminate() },
			undo: (*differential).clear},
		{name: "the name service out, sessions there", keeps: true, apply: func(d *differential) { set(&d.lookup, errLookup) }, undo: (*differential).clear,
			calls: more},
		{name: "no more files (EMFILE)", apply: func(d *differential) { set(&d.dial, errFiles); d.terminate() }, undo: (*differential).clear},
		{name: "no more files (EMFILE), sessions there", keeps: true, apply: func(d *differential) { set(&d.dial, errFiles) }, undo: (*differential).clear,
			calls: more},
		{name: "BeforeConnect fails", config: hooks, apply: func(d *differential) { set(&d.before, errHook); d.terminate() }, undo: (*differential).clear},
		{name: "AfterConnect fails", config: hooks, apply: func(d *differential) { set(&d.after, errHook); d.terminate() }, undo: (*differential).clear},
		{name: "PrepareConn fails", config: hooks, apply: func(d *differential) { set(&d.prepare, errHook) }, undo: (*differential).clear},
		{name: "AfterRelease keeps nothing", long: true, config: hooks, apply: func(d *differential) { d.discard.Store(true) }, undo: (*differential).clear},

		// Refusals.
		{name: "the server full (53300)", apply: (*differential).fillServer, undo: (*differential).emptyServer},
		{name: "the role's limit reached (53300)", long: true,
			apply: func(d *differential) { d.admin("alter role app connection limit 0"); d.terminate() },
			undo:  func(d *differential) { d.admin("alter role app connection limit -1") }},
		{name: "a password rotated", config: locked,
			apply: func(d *differential) { d.admin("alter role locked password 'new'"); d.terminate() },
			undo:  func(d *differential) { d.admin("alter role locked password 'old'") }},
		{name: "a password rotated, sessions there", long: true, config: locked,
			apply: func(d *differential) { d.admin("alter role locked password 'new'") },
			undo:  func(d *differential) { d.admin("alter role locked password 'old'") }},
		{name: "the role may not log in", long: true,
			apply: func(d *differential) { d.admin("alter role app nologin"); d.terminate() },
			undo:  func(d *differential) { d.admin("alter role app login") }},
		{name: "writes forbidden (25006)",
			apply: func(d *differential) {
				d.admin("alter role app set default_transaction_read_only = on")
				d.terminate()
			},
			undo: func(d *differential) { d.admin("alter role app reset default_transaction_read_only"); d.terminate() }},

		// Definitions.
		{name: "a column added under cached plans", apply: func(d *differential) { d.admin("alter table items add column more int") }},
		{name: "a column dropped under cached plans", long: true, apply: func(d *differential) { d.admin("alter table items drop column body") }},
		{name: "a table dropped under cached plans", apply: func(d *differential) { d.admin("drop table items") }},
		{name: "rights revoked", apply: func(d *differential) { d.admin("revoke all on items, log from app") }},
		{name: "a table, a type and a label that the standby lacks", several: true,
			apply: func(d *differential) {
				require.NoError(d.t, d.cluster.Standbys()[0].PauseReplay())
				require.NoError(d.t, d.cluster.Primary().Exec(testContext(d.t),
					"create table young (n int); grant all on young to app; create type mood as enum ('well'); create schema later; grant all on schema later to app"))
			},
			undo: func(d *differential) {
				require.NoError(d.t, d.cluster.Standbys()[0].ResumeReplay())
				d.admin("drop table young; drop type mood; drop schema later")
			},
			calls: []numbered{
				scalar("a table", "select count(*)::text from young"),
				scalar("a type", "select 'well'::mood::text"),
				scalar("a type's range", "select enum_first(null::mood)::text"),
			}},

		// Time. Where the server ends something it has nothing else to do but to wait.
		{name: "timeouts of every kind", calls: []numbered{
			inSession("statement_timeout", "set local statement_timeout = 10", "select pg_sleep(60)"),
			inSession("statement_timeout, many statements", "set local statement_timeout = 10", "select 1; select pg_sleep(60)"),
			inSession("lock_timeout", "set local lock_timeout = 10", "select pg_advisory_xact_lock_shared(7)"),
			cancelled("a caller's deadline", context.DeadlineExceeded),
			cancelled("a caller's cancellation", context.Canceled),
			{"a caller's deadline in a transaction", func(ctx context.Context, p eitherPool) (string, error) {
				tx, err := p.Begin(ctx)
				if err != nil {
					return "", err
				}
				ended := endWhenAsleep(ctx, context.DeadlineExceeded)
				defer ended.end(context.Canceled)
				_, err = tx.Exec(ended, "select pg_sleep(60) -- differential")
				return "", errors.Join(err, tx.Rollback(ctx))
			}},
			idleInTransaction("a transaction idle for too long", func(ctx context.Context, tx pgx.Tx) error {
				_, err := tx.Exec(ctx, "insert into log values ('too late')")
				return errors.Join(err, tx.Rollback(ctx))
			}),
			idleInTransaction("a transaction idle for too long, rolled back", func(ctx context.Context, tx pgx.Tx) error { return tx.Rollback(ctx) }),
			idleInTransaction("a transaction idle for too long, committed", func(ctx context.Context, tx pgx.Tx) error { return tx.Commit(ctx) }),
		}},
		{name: "all connections held", config: func(_ *differential, c *pgxpool.Config) { c.MaxConns = 11 }, calls: []numbered{
			{"a call that waits until its deadline", func(ctx context.Context, p eitherPool) (string, error) {
				held := p.AcquireAllIdle(ctx)
				defer func() { release(held) }()
				for range 100 {
					short, cancel := context.WithTimeout(ctx, 5*time.Millisecond)
					c, err := p.Acquire(short)
					cancel()
					if err != nil {
						return "", err
					}
					held = append(held, c)
				}
				return "", errors.New("there is no end")
			}},
		}},
		{name: "a role's limit of as many connections as the pool's",
			config: func(d *differential, c *pgxpool.Config) {
				c.MaxConns = 12
				d.admin("alter role app connection limit 12")
			},
			undo: func(d *differential) { d.admin("alter role app connection limit -1") },
			calls: []numbered{{"as many connections as there may be", func(ctx context.Context, p eitherPool) (string, error) {
				var held []*pgxpool.Conn
				defer func() { release(held) }()
				for p.Stat().AcquiredConns() < p.Stat().MaxConns() {
					c, err := p.Acquire(ctx)
					if err != nil {
						return "", err
					}
					held = append(held, c)
				}
				return "", nil
			}}}},
		{name: "a hook that a standby refuses", several: true, config: func(_ *differential, c *pgxpool.Config) {
			c.AfterConnect = func(ctx context.Context, conn *pgx.Conn) error {
				_, err := conn.Exec(ctx, "insert into log values ('connected')")
				return err
			}
		}},
		{name: "a hook that wants a session that writes", several: true, config: func(_ *differential, c *pgxpool.Config) {
			c.AfterConnect = func(ctx context.Context, conn *pgx.Conn) error {
				var readOnly string
				err := conn.QueryRow(ctx, "show transaction_read_only").Scan(&readOnly)
				if err == nil && readOnly == "on" {
					err = errHook
				}
				return err
			}
		}},
	}
}

var (
	errLookup error = &net.DNSError{Err: "server misbehaving", Name: "db", IsTemporary: true}
	errFiles  error = &net.OpError{Op: "dial", Net: "tcp", Err: os.NewSyscallError("socket", syscall.EMFILE)}
	errHook         = errors.New("the hook's own error")
)

func set(p *atomic.Pointer[error], err error) { p.Store(&err) }

// hooks are what a program may have, until they are to fail.
func hooks(d *differential, c *pgxpool.Config) {
	c.BeforeConnect = func(context.Context, *pgx.ConnConfig) error { return fails(&d.before) }
	c.AfterConnect = func(context.Context, *pgx.Conn) error { return fails(&d.after) }
	c.PrepareConn = func(context.Context, *pgx.Conn) (bool, error) { return true, fails(&d.prepare) }
	c.AfterRelease = func(*pgx.Conn) bool { return !d.discard.Load() }
}

// locked logs in by a password.
func locked(_ *differential, c *pgxpool.Config) {
	c.ConnConfig.User, c.ConnConfig.Password = "locked", "old"
}

func onPrimary(do func(*pgtest.Server) error) func(*differential) {
	return func(d *differential) { d.t.Helper(); require.NoError(d.t, do(d.cluster.Primary())) }
}

func onStandby(do func(*pgtest.Server) error) func(*differential) {
	return func(d *differential) { d.t.Helper(); require.NoError(d.t, do(d.cluster.Standbys()[0])) }
}

func stop(mode pgtest.Mode) func(*pgtest.Server) error {
	return func(s *pgtest.Server) error { return s.Stop(mode) }
}

const programs = "usename in ('app', 'locked')"

// terminate ends every session of the program on every server, and waits for their ends.
func (d *differential) terminate() {
	for _, s := range d.cluster.Servers() {
		d.awaitNone(s, "with those as materialized (select pid from pg_stat_activity where "+programs+") "+
			"select string_agg(pid::text, ',') from those where pg_terminate_backend(pid)")
	}
}

// awaitNone waits for the ends of the sessions whose process ids a query tells.
func (d *differential) awaitNone(s *pgtest.Server, query string) {
	d.t.Helper()
	pids, err := s.String(testContext(d.t), "select coalesce(("+query+"), '')")
	require.NoError(d.t, err)
	if pids == "" {
		return
	}
	waitFor(d.t, "the sessions to end", differPatience, func() bool {
		n, err := s.Int(testContext(d.t), "select count(*) from pg_stat_activity where pid in ("+pids+")")
		return err == nil && n == 0
	})
}

// awaitGone waits until no server has the sessions any more.
func (d *differential) awaitGone(pids ...uint32) {
	d.t.Helper()
	for _, s := range d.cluster.Servers() {
		waitFor(d.t, "the sessions to end", differPatience, func() bool {
			n, err := s.Int(testContext(d.t), "select count(*) from pg_stat_activity where "+programs+" and pid = any ($1)", pids)
			return err == nil && n == 0
		})
	}
}

// endIdle has the servers end the idle sessions of the pool.
func (d *differential) endIdle() {
	d.t.Helper()
	conns := d.pool.AcquireAllIdle(testContext(d.t))
	var pids []uint32
	for _, c := range conns {
		pids = append(pids, c.Conn().PgConn().PID())
		_, err := c.Exec(testContext(d.t), "set idle_session_timeout = 10")
		require.NoError(d.t, err)
	}
	release(conns)
	d.awaitGone(pids...)
}

func (d *differential) resetAll() {
	for _, r := range d.relays {
		r.Reset()
	}
}

func (d *differential) refuse(refuse bool) {
	d.t.Helper()
	for _, r := range d.relays {
		require.NoError(d.t, r.Refuse(refuse))
	}
}

// signalSmart has the server refuse new sessions, and waits until it does.
func (d *differential) signalSmart() {
	s := d.cluster.Primary()
	require.NoError(d.t, s.Signal(pgtest.Smart))
	waitFor(d.t, "refusals", differPatience, func() bool {
		conn, err := s.Conn(testContext(d.t))
		if err == nil {
			_ = conn.Close(testContext(d.t))
		}
		return err != nil && strings.Contains(err.Error(), "57P03")
	})
}

// endSmart ends what the smart stop waits for.
func (d *differential) endSmart() {
	require.NoError(d.t, d.cluster.Primary().Restart(pgtest.Fast))
}

// fillServer ends the program's sessions and takes all room that there is for the likes of it.
func (d *differential) fillServer() {
	d.admin("alter role app connection limit 0") // so that nobody is faster
	d.terminate()
	ctx := testContext(d.t)
	for {
		conn, err := pgx.Connect(ctx, d.cluster.Primary().ConnString("user=crowd"))
		var refusal *pgconn.PgError
		if errors.As(err, &refusal) && refusal.Code == "53300" {
			break
		}
		require.NoError(d.t, err)
		d.filler = append(d.filler, conn)
	}
	d.admin("alter role app connection limit -1")
}

func (d *differential) emptyServer() {
	for _, conn := range d.filler {
		_ = conn.Close(testContext(d.t))
	}
	d.filler = nil
	waitFor(d.t, "room", differPatience, func() bool {
		n, err := d.cluster.Primary().Int(testContext(d.t), "select count(*) from pg_stat_activity where usename = 'crowd'")
		return err == nil && n == 0
	})
}

// more is calls for which there is no connection: what fails them is to do no harm to those that come after.
var more = []numbered{{"more calls than connections", func(ctx context.Context, p eitherPool) (string, error) {
	defer release(p.AcquireAllIdle(ctx))
	var all []error
	for range 3 {
		_, errWrite := p.Exec(ctx, "insert into log values ('one more')")
		all = append(all, errWrite, p.QueryRow(ctx, "select 1").Scan(new(int)))
	}
	return "", errors.Join(all...)
}}}

func scalar(name, sql string) numbered {
	return numbered{name, func(ctx context.Context, p eitherPool) (value string, err error) {
		err = p.QueryRow(ctx, sql).Scan(&value)
		return value, err
	}}
}

// inSession runs a statement in a transaction that has been set up for it.
func inSession(name, set, sql string) numbered {
	return numbered{name, func(ctx context.Context, p eitherPool) (string, error) {
		tx, err := p.Begin(ctx)
		if err != nil {
			return "", err
		}
		if _, err := tx.Exec(ctx, set); err != nil {
			return "", err
		}
		_, err = tx.Exec(ctx, sql)
		return "", errors.Join(err, tx.Rollback(ctx))
	}}
}

// idleInTransaction is a transaction that the server has ended before its end.
func idleInTransaction(name string, end func(context.Context, pgx.Tx) error) numbered {
	return numbered{name, func(ctx context.Context, p eitherPool) (string, error) {
		tx, err := p.Begin(ctx)
		if err != nil {
			return "", err
		}
		pid := tx.Conn().PgConn().PID()
		if _, err := tx.Exec(ctx, "set idle_in_transaction_session_timeout = 10"); err != nil {
			return "", err
		}
		stageOf(ctx).awaitGone(pid)
		return "", end(ctx, tx)
	}}
}

// cancelled is a statement whose caller's context ends once the statement runs.
func cancelled(name string, err error) numbered {
	return numbered{name, func(ctx context.Context, p eitherPool) (string, error) {
		ended := endWhenAsleep(ctx, err)
		defer ended.end(context.Canceled)
		tag, err := p.Exec(ended, "insert into log select pg_sleep(60)::text -- differential")
		return tag.String(), err
	}}
}

// endWhenAsleep returns a context that ends when a statement of the program is seen to sleep.
func endWhenAsleep(ctx context.Context, err error) *endedContext {
	d, ended := stageOf(ctx), newEndedContext(ctx)
	go func() {
		for {
			n, failed := d.cluster.Primary().Int(ctx, "select count(*) from pg_stat_activity where wait_event = 'PgSleep' and "+programs)
			if n > 0 || failed != nil {
				ended.end(err)
				return
			}
		}
	}()
	return ended
}

type stageKey struct{}

// stageOf is the stage on which a call is made.
func stageOf(ctx context.Context) *differential { return ctx.Value(stageKey{}).(*differential) }
