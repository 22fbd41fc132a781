//go:build linux || darwin || freebsd

package pgtest

import (
	"context"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/stretchr/testify/require"
)

// within returns a context for one step of a test.
func within(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), d)
	t.Cleanup(cancel)
	return ctx
}

// startWithTable starts a cluster with an empty table t(n), known to all.
func startWithTable(t *testing.T, o Options) *Cluster {
	t.Helper()
	c := Start(t, o)
	ctx := within(t, patience)
	require.NoError(t, c.Primary().Exec(ctx, "create table t(n int)"))
	require.NoError(t, c.WaitCaughtUp(ctx))
	return c
}

func insert(t *testing.T, s *Server, n int) {
	t.Helper()
	require.NoError(t, s.Exec(within(t, patience), "insert into t values ($1)", n))
}

func rows(t *testing.T, s *Server) int {
	t.Helper()
	n, err := s.Int(within(t, patience), "select count(*) from t")
	require.NoError(t, err)
	return int(n)
}

func refuses(t *testing.T, s *Server) {
	t.Helper()
	_, err := net.Dial("tcp4", s.Addr())
	require.ErrorIs(t, err, syscall.ECONNREFUSED)
}

func TestStreams(t *testing.T) {
	_, err := findBinaries()
	if err == nil {
		Start(t, Options{Standbys: 2}) // makes the template
	}
	began := time.Now()
	c := Start(t, Options{Standbys: 2})
	t.Logf("1+2 from the template: %v", time.Since(began))
	ctx := within(t, patience)
	require.NoError(t, c.Primary().Exec(ctx, "create table t(n int); insert into t values (1)"))
	require.NoError(t, c.WaitCaughtUp(ctx))
	require.Len(t, c.Servers(), 3)
	require.Len(t, c.Standbys(), 2)
	for _, s := range c.Standbys() {
		require.Equal(t, 1, rows(t, s))
		var pg *pgconn.PgError
		require.ErrorAs(t, s.Exec(ctx, "insert into t values (2)"), &pg)
		require.Equal(t, "25006", pg.Code)
	}
	conn, err := pgx.Connect(ctx, c.ConnString("target_session_attrs=standby"))
	require.NoError(t, err)
	require.NoError(t, conn.Close(ctx))
}

func TestWaitCaughtUpAtPageEnd(t *testing.T) {
	require.EqualValues(t, 0x3002000, reachable8k(0x3002018))
	require.EqualValues(t, 0x3000000, reachable8k(0x3000028))
	require.EqualValues(t, 0x3000030, reachable8k(0x3000030))
	c := startWithTable(t, Options{Standbys: 1})
	ctx := within(t, patience)
	for i := range 20 {
		require.NoError(t, c.Primary().Exec(ctx, "insert into t select generate_series(1, $1)", i*37))
		require.NoError(t, c.WaitCaughtUp(ctx))
	}
}

func TestConnString(t *testing.T) {
	t.Parallel()
	c := &Cluster{}
	for i := range 2 {
		c.servers = append(c.servers, &Server{cluster: c, port: uint16(15001 + i)})
	}
	const base = "postgres://postgres@127.0.0.1:15001,127.0.0.1:15002/postgres"
	require.Equal(t, base+"?sslmode=disable", c.ConnString())
	require.Equal(t, base+"?sslmode=disable&application_name=a+b%26c", c.ConnString("application_name=a b&c"))
	require.Equal(t, base+"?sslmode=verify-full", c.ConnString("sslmode=verify-full"))
	require.Equal(t, base, c.ConnString("sslmode="))
	require.Equal(t, "postgres://postgres@127.0.0.1:15002/postgres?sslmode=disable", c.servers[1].ConnString())
}

func TestStops(t *testing.T) {
	t.Parallel()
	c := startWithTable(t, Options{})
	s := c.Primary()
	port := s.Port()
	for _, mode := range []Mode{Smart, Fast, Immediate} {
		insert(t, s, 1)
		require.NoError(t, s.Stop(mode), mode)
		require.False(t, s.Running())
		refuses(t, s)
		require.NoError(t, s.Stop(mode), "a second time")
		require.NoError(t, s.Start())
		require.NoError(t, s.Start(), "a second time")
		require.Equal(t, port, s.Port())
	}
	require.Equal(t, 3, rows(t, s))
	require.NoError(t, s.Restart(Fast))
	require.Equal(t, 3, rows(t, s))
}

func TestSmartSignalWaitsForClients(t *testing.T) {
	t.Parallel()
	c := Start(t, Options{})
	s := c.Primary()
	ctx := within(t, patience)
	conn, err := s.Conn(ctx)
	require.NoError(t, err)
	require.NoError(t, s.Signal(Smart))
	require.NoError(t, eventually(ctx, func(ctx context.Context) error {
		var pg *pgconn.PgError
		other, err := s.Conn(ctx)
		if err == nil {
			return fmt.Errorf("still lets new sessions in: %w", other.Close(ctx))
		}
		require.ErrorAs(t, err, &pg)
		require.Equal(t, "57P03", pg.Code)
		return nil
	}))
	require.NoError(t, conn.Ping(ctx))
	require.True(t, s.Running())
	require.NoError(t, conn.Close(ctx))
	require.NoError(t, s.Stop(Smart))
}

func TestKill(t *testing.T) {
	t.Parallel()
	c := startWithTable(t, Options{Standbys: 1})
	ctx := within(t, patience)
	for _, s := range c.Servers() {
		conn, err := s.Conn(ctx)
		require.NoError(t, err)
		require.NoError(t, s.Kill())
		require.False(t, s.Running())
		refuses(t, s)
		var pg *pgconn.PgError
		err = conn.Ping(ctx)
		require.Error(t, err)
		require.NotErrorAs(t, err, &pg, "no word from a killed server")
		require.NoError(t, s.Start())
	}
	insert(t, c.Primary(), 1)
	require.NoError(t, c.WaitCaughtUp(ctx))
	require.Equal(t, 1, rows(t, c.Standbys()[0]))
}

func TestKillPostmaster(t *testing.T) {
	t.Parallel()
	c := startWithTable(t, Options{})
	s := c.Primary()
	ctx := within(t, patience)
	conn, err := s.Conn(ctx)
	require.NoError(t, err)
	result := conn.PgConn().ExecParams(ctx, "insert into t select 1 from pg_sleep(0.2)", nil, nil, nil, nil)
	require.NoError(t, s.KillPostmaster())
	refuses(t, s)
	require.False(t, s.Running())
	_, err = result.Close()
	require.NoError(t, err, "the statement under way goes on")
	require.NoError(t, s.Start(), "waits for the orphan to leave")
	require.Equal(t, 1, rows(t, s))
}

func TestKillBackend(t *testing.T) {
	t.Parallel()
	c := startWithTable(t, Options{})
	s := c.Primary()
	ctx := within(t, patience)
	victim, err := s.Conn(ctx)
	require.NoError(t, err)
	other, err := s.Conn(ctx)
	require.NoError(t, err)
	require.NoError(t, s.KillBackend())
	require.True(t, s.Running())
	require.Error(t, victim.Ping(ctx))
	require.Error(t, other.Ping(ctx))
	require.Contains(t, s.Log(), "terminating any other active server processes")
	require.NoError(t, s.WaitReady(ctx))
	insert(t, s, 1)
	require.NoError(t, s.KillBackend(), "with no session but its own")
	require.NoError(t, s.WaitReady(ctx))
	require.Equal(t, 1, rows(t, s))
}

func TestFreeze(t *testing.T) {
	t.Parallel()
	c := startWithTable(t, Options{Standbys: 1})
	s := c.Standbys()[0]
	ctx := within(t, patience)
	conn, err := s.Conn(ctx)
	require.NoError(t, err)
	require.NoError(t, s.Freeze())
	require.NoError(t, s.Freeze(), "a second time")
	require.True(t, s.Running())
	require.Error(t, s.Stop(Fast))
	dialed, err := net.Dial("tcp4", s.Addr())
	require.NoError(t, err, "the kernel accepts")
	require.NoError(t, dialed.Close())
	short := within(t, 50*time.Millisecond)
	_, err = s.Conn(short)
	require.ErrorIs(t, short.Err(), context.DeadlineExceeded)
	require.Error(t, err)

	insert(t, c.Primary(), 1)
	require.NoError(t, s.Thaw())
	require.NoError(t, s.Thaw(), "a second time")
	require.NoError(t, conn.Ping(ctx), "the old session goes on")
	require.NoError(t, c.WaitCaughtUp(ctx))
	require.Equal(t, 1, rows(t, s))

	require.NoError(t, s.Freeze())
	require.NoError(t, s.Kill(), "frozen or not")
	require.NoError(t, s.Start())
	require.NoError(t, c.WaitCaughtUp(ctx))
	require.NoError(t, c.Primary().Freeze()) // and Close must cope
}

func TestReplayAndReceiver(t *testing.T) {
	t.Parallel()
	c := startWithTable(t, Options{Standbys: 2})
	s, witness := c.Standbys()[0], c.Standbys()[1]
	ctx := within(t, 2*patience)

	// lags inserts a row and checks that the witness gets it and s does not.
	n := 0
	lags := func() {
		t.Helper()
		insert(t, c.Primary(), n)
		target, err := c.Primary().lsn(ctx, "pg_current_wal_insert_lsn()")
		require.NoError(t, err)
		require.NoError(t, witness.waitReplayed(ctx, reachable8k(target)))
		require.Equal(t, n+1, rows(t, witness))
		require.Equal(t, n, rows(t, s))
		n++
	}
	catchesUp := func() {
		t.Helper()
		require.NoError(t, c.WaitCaughtUp(ctx))
		require.Equal(t, n, rows(t, s))
	}

	require.NoError(t, s.PauseReplay())
	lags()
	for limit := 500 * time.Millisecond; ; limit *= 2 { // a busy machine may need longer for the connections alone
		err := c.WaitCaughtUp(within(t, limit))
		require.Error(t, err)
		if limit > patience/2 || strings.Contains(err.Error(), "replayed up to") {
			require.ErrorContains(t, err, "node2: replayed up to")
			break
		}
	}
	require.NoError(t, s.ResumeReplay())
	catchesUp()

	require.NoError(t, s.CutReceiver())
	lags()
	require.NoError(t, s.RestoreReceiver())
	catchesUp()

	require.NoError(t, s.DelayReplay(time.Hour))
	lags()
	require.NoError(t, s.DelayReplay(0))
	catchesUp()

	require.NoError(t, s.CutReceiver())
	require.NoError(t, s.Restart(Fast))
	lags() // cut off also after a restart
	require.NoError(t, s.Follow(c.Primary()))
	catchesUp()
}

func TestSwitchover(t *testing.T) {
	t.Parallel()
	c := startWithTable(t, Options{Standbys: 2})
	old, next, third := c.Servers()[0], c.Servers()[1], c.Servers()[2]
	ctx := within(t, 2*patience)
	session, err := third.Conn(ctx)
	require.NoError(t, err)

	require.NoError(t, old.Stop(Fast))
	require.NoError(t, next.Promote())
	require.Same(t, next, c.Primary())
	require.Equal(t, []*Server{third}, c.Standbys())
	insert(t, next, 1)
	require.NoError(t, third.Follow(next))
	require.NoError(t, session.Ping(ctx), "sessions survive the repointing")
	require.NoError(t, old.Follow(next))
	require.Equal(t, []*Server{old, third}, c.Standbys())
	insert(t, next, 2)
	require.NoError(t, c.WaitCaughtUp(ctx))
	for _, s := range c.Servers() {
		require.Equal(t, 2, rows(t, s), s.Name())
	}
}

// A killed primary, and one that went on writing, come back without what only they have.
func TestRejoinAfterDivergence(t *testing.T) {
	t.Parallel()
	c := startWithTable(t, Options{Standbys: 2})
	old, next, third := c.Servers()[0], c.Servers()[1], c.Servers()[2]
	ctx := within(t, 2*patience)

	require.NoError(t, next.Promote())
	insert(t, next, 1)
	insert(t, old, 2)
	insert(t, old, 3)
	require.NoError(t, third.waitReplayed(ctx, mustLSN(t, old)))
	require.Equal(t, 2, rows(t, third), "a standby of the wrong history")
	require.NoError(t, old.Kill())
	require.NoError(t, third.Follow(next))
	require.NoError(t, old.Follow(next))
	require.NoError(t, c.WaitCaughtUp(ctx))
	for _, s := range c.Servers() {
		require.Equal(t, 1, rows(t, s), s.Name())
	}

	// And back again, from a running primary.
	require.NoError(t, old.Promote())
	require.NoError(t, next.Follow(old))
	require.NoError(t, third.Follow(next), "a standby of a standby")
	insert(t, old, 4)
	require.NoError(t, c.WaitCaughtUp(ctx))
	require.Equal(t, 2, rows(t, third))
	require.Error(t, old.Follow(third), "a circle")
}

func TestFollowCopiesWhenRewindFails(t *testing.T) {
	t.Parallel()
	c := startWithTable(t, Options{Standbys: 1})
	old, next := c.Servers()[0], c.Servers()[1]
	require.NoError(t, next.Promote())
	insert(t, next, 1)
	pids := []int{old.postmaster().pid}
	require.NoError(t, old.Kill())
	require.NoError(t, os.Remove(old.Dir()+"/global/pg_control"))
	require.NoError(t, old.Follow(next))
	require.NoError(t, c.WaitCaughtUp(within(t, patience)))
	require.Equal(t, 1, rows(t, old))
	require.Empty(t, segments(t, pids), "the shared memory of the replaced folder")
}

func mustLSN(t *testing.T, s *Server) uint64 {
	t.Helper()
	lsn, err := s.lsn(within(t, patience), "pg_current_wal_insert_lsn()")
	require.NoError(t, err)
	return reachable8k(lsn)
}

func TestSyncApply(t *testing.T) {
	t.Parallel()
	c := startWithTable(t, Options{Standbys: 2, SyncApply: true})
	old, next, third := c.Servers()[0], c.Servers()[1], c.Servers()[2]
	ctx := within(t, 2*patience)
	for i := range 20 {
		insert(t, old, i)
		for _, s := range c.Standbys() {
			require.Equal(t, i+1, rows(t, s))
		}
	}
	require.NoError(t, third.PauseReplay())
	require.Error(t, old.Exec(within(t, 50*time.Millisecond), "insert into t values (0)"))
	require.NoError(t, third.ResumeReplay())

	require.NoError(t, old.Kill())
	require.NoError(t, next.Promote())
	insert(t, next, 0) // waits for nobody
	require.NoError(t, third.Follow(next))
	require.NoError(t, old.Follow(next))
	names, err := next.String(ctx, "show synchronous_standby_names")
	require.NoError(t, err)
	require.Equal(t, "FIRST 2 (node1, node3)", names)
	insert(t, next, 0)
	require.Equal(t, rows(t, next), rows(t, old))
}

// Whether a commit waits for standbys at all is for the checkpointer to say, which may come late.
func TestSyncApplyHoldsWhenFollowReturns(t *testing.T) {
	t.Parallel()
	c := startWithTable(t, Options{Standbys: 2, SyncApply: true})
	old, next, third := c.Servers()[0], c.Servers()[1], c.Servers()[2]
	require.NoError(t, old.Kill())
	require.NoError(t, next.Promote())
	list, err := next.processes()
	require.NoError(t, err)
	i := slices.IndexFunc(list, func(p process) bool { return strings.Contains(p.command, "checkpointer") })
	require.GreaterOrEqual(t, i, 0, "%v", list)
	require.NoError(t, kill(list[i].pid, sigStop))
	followed := make(chan error, 1)
	go func() { followed <- third.Follow(next) }()
	select {
	case err = <-followed:
	case <-time.After(time.Second): // it waits, as it should
		require.NoError(t, kill(list[i].pid, sigCont))
		err = <-followed
	}
	require.NoError(t, err)
	require.NoError(t, third.PauseReplay())
	require.Error(t, next.Exec(within(t, time.Second), "insert into t values (0)"))
	require.NoError(t, third.ResumeReplay())
}

func TestSettings(t *testing.T) {
	t.Parallel()
	// Fewer connections than initdb's 100 need a template of their own.
	c := Start(t, Options{Standbys: 1, Settings: map[string]string{"max_connections": "30", "work_mem": "1MB"}})
	ctx := within(t, patience)
	for _, s := range c.Servers() {
		v, err := s.String(ctx, "select current_setting('max_connections') || ' ' || current_setting('work_mem')")
		require.NoError(t, err)
		require.Equal(t, "30 1MB", v)
	}
	s := c.Primary()
	odd := `it's a \ "path"`
	require.NoError(t, s.Set(map[string]string{"search_path": "public", "log_line_prefix": odd}))
	v, err := s.String(ctx, "show log_line_prefix")
	require.NoError(t, err)
	require.Equal(t, odd, v)
	require.ErrorContains(t, s.Set(map[string]string{"work_mem": "much"}), "work_mem")
	require.ErrorContains(t, s.Set(map[string]string{"port": "1"}), "port")
	require.NoError(t, s.Set(map[string]string{"work_mem": "2MB", "max_connections": "40"}), "the latter at the next start")
	require.NoError(t, s.Restart(Fast))
	v, err = s.String(ctx, "show max_connections")
	require.NoError(t, err)
	require.Equal(t, "40", v)
}

func TestBadSettingFailsWithLog(t *testing.T) {
	t.Parallel()
	if _, err := findBinaries(); err != nil {
		t.Skip(err)
	}
	_, err := New(context.Background(), Options{Settings: map[string]string{"work_mem": "much"}})
	require.ErrorContains(t, err, "work_mem")
}

func TestBrokenTemplateIsMadeAnew(t *testing.T) {
	bin, err := findBinaries()
	if err != nil {
		t.Skip(err)
	}
	t.Setenv("MULTIPOOL_PG_CACHE", t.TempDir())
	acct, err := serverAccount()
	require.NoError(t, err)
	tmpl, err := newTemplate(bin, acct, Options{}.settings(), 0)
	require.NoError(t, err)
	Start(t, Options{})
	require.NoError(t, os.Remove(tmpl.dir()+"/PG_VERSION")) // which the manifest shows
	Start(t, Options{})
	control := tmpl.dir() + "/global/pg_control"
	info, err := os.Stat(control)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(control, make([]byte, info.Size()), 0o600)) // which it does not
	Start(t, Options{})
}

func TestFindsBinaries(t *testing.T) {
	for text, want := range map[string]int{
		"postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)": 15,
		"postgres (PostgreSQL) 19beta1":                        19,
		"postgres (PostgreSQL) 17devel":                        17,
	} {
		major, err := majorVersion(text)
		require.NoError(t, err)
		require.Equal(t, want, major)
	}
	_, err := majorVersion("oranges 3")
	require.Error(t, err)

	t.Setenv("MULTIPOOL_PG_BIN", t.TempDir())
	_, err = New(context.Background(), Options{})
	require.ErrorContains(t, err, "MULTIPOOL_PG_BIN")
	fake := &fakeTB{TB: t}
	t.Setenv("MULTIPOOL_REQUIRE_POSTGRES", "")
	require.PanicsWithValue(t, "skip", func() { Start(fake, Options{}) })
	t.Setenv("MULTIPOOL_REQUIRE_POSTGRES", "1")
	require.PanicsWithValue(t, "fatal", func() { Start(fake, Options{}) })

	t.Setenv("MULTIPOOL_PG_BIN", "")
	t.Setenv("PATH", t.TempDir())
	if bin, err := findBinaries(); err == nil {
		require.GreaterOrEqual(t, bin.major, oldestMajor, "an installed one")
	} else {
		require.ErrorContains(t, err, "install")
	}
}

// fakeTB ends a test in a way that the caller survives.
type fakeTB struct{ TB }

func (fakeTB) Skipf(string, ...any)  { panic("skip") }
func (fakeTB) Fatalf(string, ...any) { panic("fatal") }

func TestPasswordAndTLS(t *testing.T) {
	t.Parallel()
	c := Start(t, Options{TLS: true, HBA: []string{
		"hostssl all app 127.0.0.1/32 scram-sha-256",
		"host all app 127.0.0.1/32 reject",
	}})
	ctx := within(t, patience)
	require.NoError(t, c.Primary().Exec(ctx, "create role app login password 'secret'"))
	secure := []string{"user=app", "sslmode=verify-full", "sslrootcert=" + c.CA()}

	conn, err := pgx.Connect(ctx, c.ConnString(append(secure, "password=secret")...))
	require.NoError(t, err)
	require.NoError(t, conn.Close(ctx))
	for code, params := range map[string][]string{
		"28P01": append(secure, "password=wrong"),
		"28000": {"user=app", "password=secret"},
	} {
		var pg *pgconn.PgError
		_, err = pgx.Connect(ctx, c.ConnString(params...))
		require.ErrorAs(t, err, &pg)
		require.Equal(t, code, pg.Code)
	}
}

func TestTwoClustersAtOnce(t *testing.T) {
	t.Parallel()
	results := make(chan *Cluster, 2)
	for range 2 {
		go func() {
			c, err := New(context.Background(), Options{Standbys: 1})
			if err != nil {
				t.Error(err)
			}
			results <- c
		}()
	}
	a, b := <-results, <-results
	if a == nil || b == nil {
		return
	}
	require.NoError(t, a.Close())
	require.NoError(t, a.Close(), "a second time")
	require.Error(t, a.Primary().Start(), "closed")
	require.NoError(t, b.Primary().Exec(within(t, patience), "select 1"))
	require.NoError(t, b.Close())
}

func TestPortTakenByAnother(t *testing.T) {
	t.Parallel()
	c := Start(t, Options{})
	s := c.Primary()
	require.NoError(t, s.Stop(Fast))
	l, err := net.Listen("tcp4", s.Addr())
	require.NoError(t, err)
	err = s.Start()
	require.NoError(t, l.Close())
	require.ErrorContains(t, err, "Address already in use")
	require.NoError(t, s.Start())
}
