package multipool

import (
	"context"
	"fmt"
	"testing"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/stretchr/testify/require"

	"github.com/pgmultipool/multipool/internal/pgfault"
	"github.com/pgmultipool/multipool/internal/sqltext"
)

// routedPool makes a pool that is connected to nothing and knows its routes.
func routedPool(t *testing.T, base Route, models map[string]Route, names ...string) *MultiPool {
	t.Helper()
	p := &MultiPool{config: Options{Route: base, Models: models}}
	p.of(idlePeers(names...))
	require.NoError(t, p.resolveConfigured())
	return p
}

// of gives a pool peers that it has not made.
func (p *MultiPool) of(peers []*peer) {
	p.topology.Store(newTopology(ModeReplicated, peers, make([]Role, len(peers))))
}

func TestAZeroFieldOfARouteInherits(t *testing.T) {
	t.Parallel()
	full := Route{Target: TargetAny, Peers: []string{"x"}, Retry: RetryReads}
	for _, tc := range []struct {
		name             string
		over, base, want Route
	}{
		{"everything", Route{}, full, full},
		{"nothing", full, Route{Target: TargetPrimary, Peers: []string{"y"}, Retry: RetryNever}, full},
		{"from nothing", full, Route{}, full},
		{"all but the target", Route{Target: TargetPrimary}, full, Route{Target: TargetPrimary, Peers: []string{"x"}, Retry: RetryReads}},
		{"all but the peers", Route{Peers: []string{"y", "z"}}, full, Route{Target: TargetAny, Peers: []string{"y", "z"}, Retry: RetryReads}},
		{"all but the retry", Route{Retry: RetrySafe}, full, Route{Target: TargetAny, Peers: []string{"x"}, Retry: RetrySafe}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			require.Equal(t, tc.want, tc.over.over(tc.base))
		})
	}
}

func TestContextsMergeInAnyNesting(t *testing.T) {
	t.Parallel()
	type wrap = func(context.Context) context.Context
	target := func(to Target) wrap {
		return func(ctx context.Context) context.Context { return WithRoute(ctx, Route{Target: to}) }
	}
	retry := func(r Retry) wrap {
		return func(ctx context.Context) context.Context { return WithRoute(ctx, Route{Retry: r}) }
	}
	peers := func(names ...string) wrap {
		return func(ctx context.Context) context.Context { return WithPeer(ctx, names...) }
	}
	model := func(name string) wrap {
		return func(ctx context.Context) context.Context { return WithModel(ctx, name) }
	}
	other := func(ctx context.Context) context.Context { return context.WithValue(ctx, t, "the program's own") }

	models := map[string]Route{
		"audit":   {Target: TargetPrimary, Retry: RetryNever},
		"reports": {Peers: []string{"c"}},
		"plain":   {},
	}
	base := Route{Target: TargetAny, Retry: RetryReads}
	for _, tc := range []struct {
		name  string
		wraps []wrap
		want  Route
	}{
		{"nothing said", nil, base},
		{"a value of the program's", []wrap{other}, base},
		{"a target", []wrap{WithPrimary}, Route{Target: TargetPrimary, Retry: RetryReads}},
		{"a replica and nothing else", []wrap{WithReplica}, Route{Target: TargetReplica, Retry: RetryReads}},
		{"a replica", []wrap{WithPreferReplica}, Route{Target: TargetPreferReplica, Retry: RetryReads}},
		{"peers", []wrap{peers("a", "b")}, Route{Target: TargetAny, Peers: []string{"a", "b"}, Retry: RetryReads}},
		{"the inner one wins", []wrap{WithPrimary, WithPreferReplica}, Route{Target: TargetPreferReplica, Retry: RetryReads}},
		{"the inner one wins, the other way about", []wrap{WithPreferReplica, WithPrimary}, Route{Target: TargetPrimary, Retry: RetryReads}},
		{"the inner peers win", []wrap{peers("a"), peers("b")}, Route{Target: TargetAny, Peers: []string{"b"}, Retry: RetryReads}},
		{"different fields meet", []wrap{WithPrimary, peers("a"), retry(RetryNever)}, Route{Target: TargetPrimary, Peers: []string{"a"}, Retry: RetryNever}},
		{"different fields meet in another order", []wrap{retry(RetryNever), peers("a"), WithPrimary}, Route{Target: TargetPrimary, Peers: []string{"a"}, Retry: RetryNever}},
		{"something else between", []wrap{WithPrimary, other, retry(RetrySafe)}, Route{Target: TargetPrimary, Retry: RetrySafe}},
		{"inherit inherits", []wrap{WithPrimary, target(TargetInherit)}, Route{Target: TargetPrimary, Retry: RetryReads}},
		{"auto does not", []wrap{WithPrimary, target(TargetAuto)}, Route{Target: TargetAuto, Retry: RetryReads}},
		{"auto over a model", []wrap{model("audit"), target(TargetAuto)}, Route{Target: TargetAuto, Retry: RetryNever}},
		{"no peers inherit", []wrap{peers("a"), peers()}, Route{Target: TargetAny, Peers: []string{"a"}, Retry: RetryReads}},

		{"a model over the configuration", []wrap{model("audit")}, Route{Target: TargetPrimary, Retry: RetryNever}},
		{"a model that says nothing", []wrap{model("plain")}, base},
		{"a model of peers", []wrap{model("reports")}, Route{Target: TargetAny, Peers: []string{"c"}, Retry: RetryReads}},
		{"the context over the model", []wrap{model("audit"), WithPreferReplica}, Route{Target: TargetPreferReplica, Retry: RetryNever}},
		{"the context over a model that is named later", []wrap{WithPreferReplica, model("audit")}, Route{Target: TargetPreferReplica, Retry: RetryNever}},
		{"the inner model wins whole", []wrap{model("audit"), model("reports")}, Route{Target: TargetAny, Peers: []string{"c"}, Retry: RetryReads}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			p := routedPool(t, base, models, "a", "b", "c")
			ctx := context.Background()
			for _, w := range tc.wraps {
				ctx = w(ctx)
			}
			r := p.routeOf(ctx)
			require.NoError(t, r.err)
			require.Equal(t, tc.want, r.route)
			require.Len(t, r.peers, len(tc.want.Peers))
			for i, q := range r.peers {
				require.Equal(t, tc.want.Peers[i], q.name)
			}
		})
	}
}

// A default of the primary is undone for one call, whose reads go to the replicas again; Explain says of both what they are.
func TestAutoUndoesADefaultTarget(t *testing.T) {
	bubble(t, 1, func(c *Options) { c.Route.Target = TargetPrimary }, func(ctx context.Context, x *fakes) {
		settled()
		for _, tc := range []struct {
			ctx  context.Context
			sql  string
			want Decision
		}{
			{ctx, "select 1", Decision{"primary:5432", ReasonRoute, 1, KindRead}},
			{ctx, "insert into t values (1)", Decision{"primary:5432", ReasonRoute, 1, KindWrite}},
			{WithRoute(ctx, Route{Target: TargetAuto}), "select 1", Decision{"replica1:5432", ReasonRead, 1, KindRead}},
			{WithRoute(ctx, Route{Target: TargetAuto}), "insert into t values (1)", Decision{"primary:5432", ReasonStatement, 1, KindWrite}},
			{WithRoute(ctx, Route{}), "select 1", Decision{"primary:5432", ReasonRoute, 1, KindRead}},
		} {
			require.Equal(t, tc.want, explained(t, x.pool, tc.ctx, tc.sql))
			rows, err := x.pool.Query(tc.ctx, tc.sql)
			require.NoError(t, err)
			rows.Close()
			require.Equal(t, []Decision{tc.want}, x.journal.take())
		}
	})
}

func TestAnOuterContextKeepsItsRoute(t *testing.T) {
	t.Parallel()
	p := routedPool(t, Route{}, nil, "a", "b")
	outer := WithPrimary(context.Background())
	inner := WithPreferReplica(outer)
	require.Equal(t, TargetPreferReplica, p.routeOf(inner).route.Target)
	require.Equal(t, TargetPrimary, p.routeOf(outer).route.Target)
}

func TestARouteTakesACopyOfItsPeers(t *testing.T) {
	t.Parallel()
	p := routedPool(t, Route{}, nil, "a", "b")
	list := []string{"a"}
	ctx := WithPeer(context.Background(), list...)
	list[0] = "b"
	require.Equal(t, "a", namesOf(p.routeOf(ctx).peers))
}

func TestUnknownNamesAreErrorsThatNameTheKnown(t *testing.T) {
	t.Parallel()
	p := routedPool(t, Route{}, map[string]Route{"y": {}, "x": {}}, "a", "b")
	for _, tc := range []struct {
		name string
		ctx  context.Context
		says []string
	}{
		{"a peer", WithPeer(context.Background(), "a", "q"), []string{`peer "q"`, "a, b"}},
		{"a model", WithModel(context.Background(), "q"), []string{`model "q"`, "x, y"}},
		{"a target", WithRoute(context.Background(), Route{Target: 99}), []string{"unknown target"}},
		{"a retry", WithRoute(context.Background(), Route{Retry: 99}), []string{"unknown retry"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			_, err := intentOn(p, tc.ctx, opExec, "")
			require.ErrorIs(t, err, ErrUnknownName)
			for _, part := range tc.says {
				require.ErrorContains(t, err, part)
			}
		})
	}
}

func TestUnknownNamesOfTheConfigurationAreErrorsOfTheConstructor(t *testing.T) {
	t.Parallel()
	p := &MultiPool{config: Options{Route: Route{Peers: []string{"q"}}}}
	p.of(idlePeers("a"))
	require.ErrorIs(t, p.resolveConfigured(), ErrUnknownName)

	p = &MultiPool{config: Options{Models: map[string]Route{"good": {}, "bad": {Peers: []string{"q"}}}}}
	p.of(idlePeers("a"))
	err := p.resolveConfigured()
	require.ErrorIs(t, err, ErrUnknownName)
	require.ErrorContains(t, err, `"q"`)
	require.ErrorContains(t, err, `in model "bad"`)
}

func TestAContextIsResolvedOnceForAPoolAndRightForEach(t *testing.T) {
	t.Parallel()
	one := routedPool(t, Route{Retry: RetryReads}, nil, "a", "b")
	two := routedPool(t, Route{Retry: RetryNever}, nil, "b", "a")
	ctx := WithPeer(context.Background(), "b")
	first := one.routeOf(ctx)
	require.Same(t, first, one.routeOf(ctx))
	for range 3 {
		require.Same(t, one.peers()[1], one.routeOf(ctx).peers[0])
		require.Equal(t, RetryReads, one.routeOf(ctx).route.Retry)
		require.Same(t, two.peers()[0], two.routeOf(ctx).peers[0])
		require.Equal(t, RetryNever, two.routeOf(ctx).route.Retry)
	}
	require.Same(t, one.route.Load(), one.routeOf(context.Background()), "a bare context has what the pool has")
}

func TestRoutingACallAllocatesNothing(t *testing.T) {
	p := routedPool(t, Route{}, map[string]Route{"m": {Target: TargetAny}}, "a", "b")
	ctx := WithModel(WithPeer(context.Background(), "a"), "m")
	for range 3 { // a text is remembered at its second sighting
		_, err := intentOn(p, context.Background(), opQuery, "select 1")
		require.NoError(t, err)
		_, err = intentOn(p, ctx, opQuery, "select 1")
		require.NoError(t, err)
	}
	var sink intent
	require.Zero(t, testing.AllocsPerRun(200, func() { sink, _ = intentOn(p, ctx, opQuery, "select 1") }))
	require.Equal(t, placeNamed, sink.place)
	require.Zero(t, testing.AllocsPerRun(200, func() { sink, _ = intentOn(p, context.Background(), opQuery, "select 1") }))
	require.Equal(t, placeReads, sink.place)
}

func TestIntentOfPutsTheRouteOverTheOperationOverTheText(t *testing.T) {
	t.Parallel()
	to := func(target Target) resolution { return resolution{route: Route{Target: target}} }
	named := resolution{peers: idlePeers("a")}
	both := func(target Target) resolution {
		return resolution{route: Route{Target: target}, peers: idlePeers("a")}
	}
	byModel := resolution{route: Route{Target: TargetPrimary}, model: true}
	softModel := resolution{route: Route{Target: TargetAny}, model: true}
	type w = intent // the parts of it that are decided
	for _, tc := range []struct {
		name  string
		op    operation
		need  sqltext.Need
		route resolution
		want  w
	}{
		{"a read", opQuery, sqltext.AnyServer, to(TargetAuto), w{place: placeReads, reads: true, reason: ReasonRead}},
		{"a query nobody has looked at", opQuery, sqltext.Unknown, to(TargetAuto), w{place: placeReads, reads: true, reason: ReasonRead}},
		{"a query that writes", opQuery, sqltext.PrimaryOnly, to(TargetAuto), w{place: placePrimary, reason: ReasonStatement}},
		{"a read-only transaction", opReadTx, sqltext.Unknown, to(TargetAuto), w{place: placeReads, reads: true, reason: ReasonRead}},
		{"a transaction", opBegin, sqltext.Unknown, to(TargetAuto), w{place: placePrimary, reason: ReasonWrite}},
		{"an exec", opExec, sqltext.Unknown, to(TargetAuto), w{place: placePrimary, reason: ReasonWrite}},
		{"a batch", opBatch, sqltext.Unknown, to(TargetAuto), w{place: placePrimary, reason: ReasonWrite}},
		{"a copy", opCopy, sqltext.Unknown, to(TargetAuto), w{place: placePrimary, reason: ReasonWrite}},
		{"an acquire", opAcquire, sqltext.Unknown, to(TargetAuto), w{place: placePrimary, reason: ReasonWrite}},
		{"a ping", opPing, sqltext.Unknown, to(TargetAuto), w{place: placePrimary, reason: ReasonWrite}},

		{"a read to the primary", opQuery, sqltext.AnyServer, to(TargetPrimary), w{place: placePrimary, reads: true, forced: true, reason: ReasonRoute}},
		{"a read-only transaction to the primary", opReadTx, sqltext.Unknown, to(TargetPrimary), w{place: placePrimary, reads: true, forced: true, reason: ReasonRoute}},
		{"a write to the primary", opExec, sqltext.Unknown, to(TargetPrimary), w{place: placePrimary, forced: true, reason: ReasonRoute}},
		{"a read that insists on a replica", opQuery, sqltext.AnyServer, to(TargetReplica), w{place: placeReplica, reads: true, forced: true, reason: ReasonRoute}},
		{"a write forced on a replica", opExec, sqltext.Unknown, to(TargetReplica), w{place: placeReplica, forced: true, reason: ReasonRoute}},
		{"a query that writes, forced on a replica", opQuery, sqltext.PrimaryOnly, to(TargetReplica), w{place: placeReplica, forced: true, reason: ReasonRoute}},
		{"a read that prefers a replica", opQuery, sqltext.AnyServer, to(TargetPreferReplica), w{place: placeReads, reads: true, forced: true, reason: ReasonRoute}},
		{"a transaction that prefers a replica", opBegin, sqltext.Unknown, to(TargetPreferReplica), w{place: placeReads, forced: true, reason: ReasonRoute}},
		{"a read anywhere", opQuery, sqltext.AnyServer, to(TargetAny), w{place: placeAny, reads: true, reason: ReasonRead}},
		{"a read-only transaction anywhere", opReadTx, sqltext.Unknown, to(TargetAny), w{place: placeAny, reads: true, reason: ReasonRead}},
		{"a query that writes, anywhere", opQuery, sqltext.PrimaryOnly, to(TargetAny), w{place: placePrimary, reason: ReasonStatement}},
		{"a write anywhere", opExec, sqltext.Unknown, to(TargetAny), w{place: placePrimary, reason: ReasonWrite}},

		{"a read by name", opQuery, sqltext.AnyServer, named, w{place: placeNamed, reads: true, forced: true, reason: ReasonRoute, peers: named.peers}},
		{"a write by name", opExec, sqltext.Unknown, named, w{place: placeNamed, forced: true, reason: ReasonRoute, peers: named.peers}},
		{"a read by name, anywhere", opQuery, sqltext.AnyServer, both(TargetAny), w{place: placeNamed, reads: true, forced: true, reason: ReasonRoute, peers: named.peers}},
		{"a read by name, to the primary", opQuery, sqltext.AnyServer, both(TargetPrimary), w{place: placePrimary, reads: true, forced: true, reason: ReasonRoute, peers: named.peers}},
		{"a read by name, to a replica", opQuery, sqltext.AnyServer, both(TargetReplica), w{place: placeReplica, reads: true, forced: true, reason: ReasonRoute, peers: named.peers}},

		{"a read of a model", opQuery, sqltext.AnyServer, byModel, w{place: placePrimary, reads: true, forced: true, reason: ReasonModel}},
		{"a read of a model that forces nothing", opQuery, sqltext.AnyServer, softModel, w{place: placeAny, reads: true, reason: ReasonRead}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			tc.route.route.Retry = RetryReads
			got := intentOf(tc.op, "text", tc.need, &tc.route)
			tc.want.op, tc.want.sql, tc.want.retry = tc.op, "text", RetryReads
			require.Equal(t, namesOf(tc.want.peers), namesOf(got.peers))
			got.peers, tc.want.peers = nil, nil
			require.Equal(t, tc.want, got)
		})
	}
}

// ReasonModel is for a route that a model has decided, not for every call that names a model.
func TestTheReasonIsTheModelOnlyWhereTheModelDecides(t *testing.T) {
	t.Parallel()
	p := routedPool(t, Route{}, map[string]Route{
		"audit": {Target: TargetPrimary}, "careful": {Retry: RetryNever}, "near": {Peers: []string{"a"}},
	}, "a", "b")
	bg := context.Background()
	for _, tc := range []struct {
		name string
		ctx  context.Context
		want Reason
	}{
		{"the model's target", WithModel(bg, "audit"), ReasonModel},
		{"the model's peers", WithModel(bg, "near"), ReasonModel},
		{"the context's target", WithPrimary(bg), ReasonRoute},
		{"the context's target over the model's", WithPreferReplica(WithModel(bg, "audit")), ReasonRoute},
		{"the context's target beside a model without one", WithPrimary(WithModel(bg, "careful")), ReasonRoute},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			in, err := intentOn(p, tc.ctx, opQuery, "select 1")
			require.NoError(t, err)
			require.Equal(t, tc.want, in.reason)
		})
	}
}

func TestTheIntentOfAnErrorIsWhatTheCallNeeded(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		in   intent
		want Intent
	}{
		{intent{place: placeReads, reads: true, reason: ReasonRead}, IntentRead},
		{intent{place: placePrimary}, IntentPrimary},
		{intent{place: placeReplica, reads: true}, IntentReplica},
		{intent{place: placeAny, reads: true, reason: ReasonRead}, IntentRead},
		{intent{place: placeNamed, reads: true}, IntentRead},
		{intent{place: placeNamed}, IntentPrimary},
	} {
		require.Equal(t, tc.want, tc.in.needs(), "%+v", tc.in)
	}
}

func TestAfterDecidesWhatFollowsAFailure(t *testing.T) {
	t.Parallel()
	allOps := []operation{opQuery, opReadTx, opBegin, opExec, opBatch, opCopy, opAcquire, opPing}
	intentFor := func(op operation, r Retry) intent {
		res := &resolution{route: Route{Retry: r}}
		return intentOf(op, "", sqltext.Unknown, res)
	}

	t.Run("what no other peer can cure ends the call", func(t *testing.T) {
		t.Parallel()
		for _, c := range []pgfault.Class{pgfault.Application, pgfault.Caller, pgfault.Closed} {
			for _, op := range allOps {
				for _, sent := range []bool{false, true} {
					in := intentFor(op, RetryReads)
					if c == pgfault.Application && in.reads && !sent {
						continue // a hook has refused the peer
					}
					require.Equal(t, stepStop, in.after(judged(c, pgfault.NotExecuted), sent, true), "class %d, operation %d", c, op)
				}
			}
		}
	})

	t.Run("a read for which a hook has refused the peer goes elsewhere, and nothing else does", func(t *testing.T) {
		t.Parallel()
		for _, c := range []pgfault.Class{pgfault.Application, pgfault.Behind} {
			for _, op := range allOps {
				want := stepStop
				if op.reads() {
					want = stepElsewhere
				}
				in := intentFor(op, RetryNever)
				require.Equal(t, want, in.after(judged(c, pgfault.NotExecuted), false, true), "class %d, operation %d", c, op)
			}
		}
	})

	t.Run("what was not sent is free to go elsewhere", func(t *testing.T) {
		t.Parallel()
		for _, c := range []pgfault.Class{pgfault.Server, pgfault.Starting, pgfault.Config, pgfault.Overload, pgfault.Refused, pgfault.Conflict} {
			for _, op := range allOps {
				for _, r := range []Retry{RetryInherit, RetrySafe, RetryReads, RetryNever} {
					in := intentFor(op, r)
					require.Equal(t, stepElsewhere, in.after(judged(c, pgfault.NotExecuted), false, false), "class %d, operation %d", c, op)
				}
			}
		}
	})

	t.Run("a batch and a copy go on only when acquiring failed", func(t *testing.T) {
		t.Parallel()
		for _, op := range []operation{opBatch, opCopy} {
			for c := pgfault.Application; c <= pgfault.Behind; c++ {
				for _, standby := range []bool{false, true} {
					in := intentFor(op, RetryReads)
					require.Equal(t, stepStop, in.after(judged(c, pgfault.NotExecuted), true, standby), "class %d, operation %d", c, op)
				}
			}
		}
	})

	t.Run("nothing that was sent is sent again under RetryNever", func(t *testing.T) {
		t.Parallel()
		for c := pgfault.Application; c <= pgfault.Behind; c++ {
			for _, op := range allOps {
				in := intentFor(op, RetryNever)
				require.Equal(t, stepStop, in.after(judged(c, pgfault.NotExecuted), true, true), "class %d, operation %d", c, op)
			}
		}
	})

	lost, never := judged(pgfault.Server, pgfault.Unknown), judged(pgfault.Server, pgfault.NotExecuted)
	for _, tc := range []struct {
		name    string
		op      operation
		need    sqltext.Need
		target  Target
		retry   Retry
		verdict pgfault.Verdict
		standby bool
		want    step
	}{
		{"a read lost on a standby", opQuery, sqltext.AnyServer, 0, 0, lost, true, stepElsewhere},
		{"... said to be safe", opQuery, sqltext.AnyServer, 0, RetrySafe, lost, true, stepElsewhere},
		{"a read lost where writes are accepted", opQuery, sqltext.AnyServer, 0, 0, lost, false, stepStop},
		{"... said to be safe where writes are accepted", opQuery, sqltext.AnyServer, 0, RetrySafe, lost, false, stepStop},
		{"... promised not to write", opQuery, sqltext.AnyServer, 0, RetryReads, lost, false, stepElsewhere},
		{"a read that never left", opQuery, sqltext.AnyServer, 0, 0, never, false, stepElsewhere},
		{"a read routed to a replica and lost there", opQuery, sqltext.AnyServer, TargetReplica, 0, lost, true, stepElsewhere},
		{"a query that writes, lost", opQuery, sqltext.PrimaryOnly, 0, RetryReads, lost, false, stepStop},
		{"a query that writes, lost on a standby", opQuery, sqltext.PrimaryOnly, 0, RetryReads, lost, true, stepStop},
		{"a write lost", opExec, 0, 0, RetryReads, lost, false, stepStop},
		{"a write lost on a standby", opExec, 0, 0, RetryReads, lost, true, stepStop},
		{"a write that never left", opExec, 0, 0, 0, never, false, stepElsewhere},
		{"a begin lost", opBegin, 0, 0, 0, lost, false, stepElsewhere},
		{"a read-only begin lost", opReadTx, 0, 0, 0, lost, false, stepElsewhere},
		{"a ping lost", opPing, 0, 0, 0, lost, false, stepElsewhere},

		{"a read refused by a standby", opQuery, sqltext.AnyServer, 0, 0, judged(pgfault.Refused, pgfault.NotExecuted), true, stepPrimary},
		{"a write refused by a standby", opExec, 0, 0, 0, judged(pgfault.Refused, pgfault.NotExecuted), true, stepPrimary},
		{"a begin refused by a standby", opBegin, 0, 0, 0, judged(pgfault.Refused, pgfault.NotExecuted), true, stepPrimary},
		{"... by one that was promoted", opQuery, sqltext.AnyServer, 0, 0, judged(pgfault.Refused, pgfault.NotExecuted), false, stepStop},
		{"... where a route insists", opExec, 0, TargetReplica, 0, judged(pgfault.Refused, pgfault.NotExecuted), true, stepStop},
		{"... where a route prefers", opExec, 0, TargetPreferReplica, 0, judged(pgfault.Refused, pgfault.NotExecuted), true, stepStop},
		{"... where TargetAny does not insist", opQuery, sqltext.AnyServer, TargetAny, 0, judged(pgfault.Refused, pgfault.NotExecuted), true, stepPrimary},

		{"a read of what is not replayed yet", opQuery, sqltext.AnyServer, 0, 0, judged(pgfault.Behind, pgfault.NotExecuted), true, stepPrimary},
		{"... by a write", opExec, 0, 0, 0, judged(pgfault.Behind, pgfault.NotExecuted), true, stepStop},
		{"... where a route insists", opQuery, sqltext.AnyServer, TargetReplica, 0, judged(pgfault.Behind, pgfault.NotExecuted), true, stepStop},
		{"... on one that was promoted", opQuery, sqltext.AnyServer, 0, 0, judged(pgfault.Behind, pgfault.NotExecuted), false, stepStop},

		{"a read cancelled by replay", opQuery, sqltext.AnyServer, 0, 0, judged(pgfault.Conflict, pgfault.NotExecuted), true, stepElsewhere},
		{"a read where there is no more room", opQuery, sqltext.AnyServer, 0, 0, judged(pgfault.Overload, pgfault.NotExecuted), false, stepElsewhere},
		{"a read on a server that shuts down", opQuery, sqltext.AnyServer, 0, 0, judged(pgfault.Starting, pgfault.Unknown), true, stepElsewhere},
		{"a read refused by configuration after it was sent", opQuery, sqltext.AnyServer, 0, 0, judged(pgfault.Config, pgfault.Unknown), true, stepStop},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			in := intentOf(tc.op, "", tc.need, &resolution{route: Route{Target: tc.target, Retry: tc.retry}})
			require.Equal(t, tc.want, in.after(tc.verdict, true, tc.standby))
		})
	}
}

// An Exec without arguments may hold several statements, and a procedure may commit on its way: a server that
// terminates such a session has perhaps done a part of it.
func TestAWriteThatMayHaveCommittedOnItsWayIsNotSentAgain(t *testing.T) {
	t.Parallel()
	terminated := &pgconn.PgError{Severity: "FATAL", SeverityUnlocalized: "FATAL", Code: "57P01", Routine: "ProcessInterrupts"}
	for sql, op := range map[string]operation{
		"begin; insert into t values (1); commit; select pg_sleep(60)":               opExec,
		"call move_a_million_rows()":                                                 opExec,
		"do $$ begin insert into t values (1); commit; perform pg_sleep(60); end $$": opExec,
		"select 1, and the program's pgx.QueryRewriter sends a call":                 opRewritten,
		"insert, and the program's pgx.QueryRewriter sends a call":                   opRewritten,
	} {
		t.Run(sql[:4], func(t *testing.T) {
			t.Parallel()
			p := routedPool(t, Route{}, nil, "a", "b")
			p.topology.Store(tell(newTopology(ModeReplicated, p.peers(), make([]Role, 2)), primaryUp("a", 1), replicaUp("b")))
			p.budget.Reserve = 10
			a := p.peers()[0]
			a.role.Store(int32(RolePrimary))
			in, err := intentOn(p, context.Background(), op, sql)
			require.NoError(t, err)
			require.False(t, p.goOn(context.Background(), &in, &trail{}, failure{at: a, sent: true, err: terminated}),
				"it would be executed twice")
			require.ErrorIs(t, p.mark(context.Background(), &in, failure{at: a, sent: true, err: terminated}), ErrOutcomeUnknown)
		})
	}
}

func TestNamesOfRoutesAreThoseOfTheConnectionString(t *testing.T) {
	t.Parallel()
	for want, name := range map[string]fmt.Stringer{
		"inherit": TargetInherit, "auto": TargetAuto, "primary": TargetPrimary, "prefer-replica": TargetPreferReplica, "replica": TargetReplica,
		"any": TargetAny, "unknown target": Target(99), "safe": RetrySafe, "reads": RetryReads,
		"never": RetryNever, "unknown retry": Retry(99), "replicated": ModeReplicated, "unknown mode": Mode(99),
		"unknown": RoleUnknown, "unknown role": Role(99), "model": ReasonModel, "one-peer": ReasonOnePeer, "unknown reason": Reason(99),
	} {
		require.Equal(t, want, name.String())
	}
}

// intentOn is what a call on the pool wants.
func intentOn(p *MultiPool, ctx context.Context, op operation, sql string) (in intent, err error) {
	err = p.intend(ctx, op, sql, &in)
	return in, err
}

// intentOf is what a call under a route wants.
func intentOf(op operation, sql string, n sqltext.Need, r *resolution) (in intent) {
	in.decide(op, sql, n, r)
	return in
}

func judged(c pgfault.Class, o pgfault.Outcome) pgfault.Verdict {
	return pgfault.Verdict{Class: c, Outcome: o}
}
