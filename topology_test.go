package multipool

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"
)

// idlePeers makes peers of the names that do nothing and are connected to nothing.
func idlePeers(names ...string) []*peer {
	peers := make([]*peer, len(names))
	for i, name := range names {
		peers[i] = &peer{name: name, host: name, port: 5432}
		peers[i].load.limit = 4
		peers[i].load.share.Store(fullShare)
		peers[i].load.exhausted = func() bool { return false }
	}
	return peers
}

func namesOf(peers []*peer) string {
	names := make([]string, len(peers))
	for i, p := range peers {
		names[i] = p.name
	}
	return strings.Join(names, ",")
}

// listsOf writes down everything that a reader of a topology can see of its lists.
func listsOf(t *topology) string {
	var b strings.Builder
	for _, list := range []struct {
		name  string
		peers []*peer
	}{{"reads", t.reads}, {"writes", t.writes}, {"replicas", t.replicas}, {"any", t.anyone}} {
		fmt.Fprintf(&b, "%s:%s ", list.name, namesOf(list.peers))
	}
	b.WriteString("primary:" + t.primary.called())
	if len(t.rivals) > 0 {
		b.WriteString(" rivals:" + namesOf(t.rivals))
	}
	if t.refuge != nil {
		b.WriteString(" refuge:" + t.refuge.name)
	}
	for _, flag := range []struct {
		name string
		set  bool
	}{{"fallback", t.fallback}, {"settled", t.settled}, {"split", t.split}, {"unseen", t.unseen}} {
		if flag.set {
			b.WriteString(" " + flag.name)
		}
	}
	return b.String()
}

// A news is an observation of the peer called by its name; "" is the end of the time for first looks.
type news struct {
	of string
	observation
}

func heard(of string, r Role, h Health, timeline uint32) news {
	return news{of, observation{role: r, health: h, timeline: timeline}}
}

func primaryUp(of string, timeline uint32) news {
	return heard(of, RolePrimary, HealthUp, timeline)
}

func replicaUp(of string) news { return heard(of, RoleReplica, HealthUp, 0) }

func turned(of string, h Health) news { return heard(of, RoleUnknown, h, 0) }

func follows(of string, timeline uint32) news { return heard(of, RoleReplica, HealthUp, timeline) }

func finds(of string, f fitness) news { return news{of, observation{fitness: f}} }

func shows(of string, timeline uint32) news { return news{of, observation{shown: timeline}} }

func isOf(of string, system uint64) news { return news{of, observation{system: system}} }

func cannotRead(of string) news {
	return news{of, observation{hostile: errors.New("AfterConnect writes")}}
}

var settleNow = news{"", observation{settle: true}}

// tell takes news in, one after the other. After every one that asks for it all peers who answer are looked at.
func tell(top *topology, all ...news) *topology {
	for _, n := range all {
		was := top.event
		top = tellAlone(top, n)
		for i := 0; (top.event != was || top.heir != nil) && i < len(top.members); i++ {
			if m := &top.members[i]; m.answers() {
				top = tellAlone(top, looked(m.peer.name))
			}
		}
	}
	return top
}

// ticks is the clock of the news.
var ticks atomic.Int64

// tellAlone takes one piece of news in.
func tellAlone(top *topology, n news) *topology {
	for i := range top.members {
		if top.members[i].peer.name == n.of {
			n.peer = top.members[i].peer
		}
	}
	if n.asked == 0 {
		n.asked = instant(ticks.Add(1))
	}
	if n.came == 0 {
		n.came = instant(ticks.Add(1))
	}
	n.full = n.full || n.role != RoleUnknown
	return top.apply(n.observation)
}

// looked is a full look that finds what was known.
func looked(of string) news { return news{of, observation{full: true}} }

func freshTopology(names ...string) *topology {
	return newTopology(ModeReplicated, idlePeers(names...), make([]Role, len(names)))
}

func TestApplyWorksOutTheLists(t *testing.T) {
	t.Parallel()
	type all = []news
	cluster := func(more ...news) all {
		return append(all{primaryUp("a", 1), replicaUp("b"), replicaUp("c")}, more...)
	}
	for _, tc := range []struct {
		name string
		news all
		want string
	}{
		{"nothing is known", nil,
			"reads: writes: replicas: any: primary: unseen"},
		{"a healthy cluster", cluster(),
			"reads:b,c writes:a replicas:b,c any:b,c,a primary:a settled"},

		// Cold start.
		{"a replica reads before the others have answered", all{replicaUp("b")},
			"reads:b writes: replicas:b any:b primary: unseen"},
		{"a first claimant waits for the others", all{primaryUp("a", 1)},
			"reads: writes: replicas: any: primary: unseen"},
		{"a first claimant waits even beside a replica", all{primaryUp("a", 1), replicaUp("b")},
			"reads:b writes: replicas:b any:b primary: unseen"},
		{"a failure is an answer", all{primaryUp("a", 1), turned("b", HealthDown), turned("c", HealthMisconfigured)},
			"reads:a writes:a replicas: any:a primary:a fallback settled"},
		{"a suspicion is an answer", all{primaryUp("a", 1), turned("b", HealthSuspect), turned("c", HealthSuspect)},
			"reads:a writes:a replicas: any:a primary:a fallback settled"},
		{"a role without a look is no answer", all{primaryUp("a", 1), replicaUp("b"), heard("c", RoleReplica, HealthUnknown, 0)},
			"reads:b writes: replicas:b any:b primary: unseen"},
		{"the time for the first looks is over", all{primaryUp("a", 1), settleNow},
			"reads:a writes:a replicas: any:a primary:a fallback settled unseen"},
		{"the time is over before anybody answered", all{settleNow},
			"reads: writes: replicas: any: primary: settled unseen"},
		{"a first claimant after the time is over", all{settleNow, primaryUp("a", 1)},
			"reads:a writes:a replicas: any:a primary:a fallback settled unseen"},
		{"the better claimant of two that answered in time", all{primaryUp("a", 1), primaryUp("b", 2), replicaUp("c")},
			"reads:c writes:b replicas:c any:c,b primary:b rivals:a settled"},

		// Who is the primary.
		{"a promotion", cluster(primaryUp("b", 2)),
			"reads:c writes:b replicas:c any:c,b primary:b rivals:a settled"},
		{"an older timeline that appears later", all{primaryUp("b", 2), replicaUp("c"), primaryUp("a", 1)},
			"reads:c writes:b replicas:c any:c,b primary:b rivals:a settled"},
		{"an older timeline that comes back", cluster(turned("a", HealthDown), primaryUp("b", 2), turned("a", HealthUp)),
			"reads:c writes:b replicas:c any:c,b primary:b rivals:a settled"},
		{"timelines are numbers, not dates of arrival", cluster(primaryUp("b", 3), primaryUp("c", 2)),
			"reads:b writes:b replicas: any:b primary:b rivals:a,c fallback settled"},
		{"equal timelines and an incumbent", cluster(primaryUp("b", 1)),
			"reads:c writes:a replicas:c any:c,a primary:a rivals:b settled"},
		{"equal timelines and an incumbent that comes last in the list", all{replicaUp("a"), replicaUp("b"), primaryUp("c", 4), primaryUp("a", 4)},
			"reads:b writes:c replicas:b any:b,c primary:c rivals:a settled"},
		{"equal timelines, an incumbent and a third with a higher one", cluster(primaryUp("b", 1), primaryUp("c", 2)),
			"reads:c writes:c replicas: any:c primary:c rivals:a,b fallback settled"},
		{"equal timelines without an incumbent", all{primaryUp("a", 1), primaryUp("b", 1), replicaUp("c")},
			"reads:c writes: replicas:c any:c primary: rivals:a,b settled split"},
		{"a split that ends by a higher timeline", all{primaryUp("a", 1), primaryUp("b", 1), replicaUp("c"), primaryUp("b", 2)},
			"reads:c writes:b replicas:c any:c,b primary:b rivals:a settled"},
		{"a split that ends by a demotion", all{primaryUp("a", 1), primaryUp("b", 1), replicaUp("c"), replicaUp("a")},
			"reads:a,c writes:b replicas:a,c any:a,c,b primary:b settled"},
		{"equal claimants below a better one are no split", all{primaryUp("a", 1), primaryUp("b", 1), primaryUp("c", 2)},
			"reads:c writes:c replicas: any:c primary:c rivals:a,b fallback settled"},
		{"a claimant that is down is not elected", all{heard("a", RolePrimary, HealthDown, 1), primaryUp("b", 1), replicaUp("c")},
			"reads:c writes:b replicas:c any:c,b primary:b settled"},
		{"a claimant that refuses us is not elected", all{heard("a", RolePrimary, HealthMisconfigured, 1), primaryUp("b", 1), replicaUp("c")},
			"reads:c writes:b replicas:c any:c,b primary:b settled"},
		{"... nor is one whose timeline it has left behind", all{primaryUp("a", 2), turned("a", HealthDown), primaryUp("b", 1), replicaUp("c")},
			"reads:c writes: replicas:c any:c primary: rivals:b settled"},
		{"... before it comes back", all{primaryUp("a", 2), turned("a", HealthDown), primaryUp("b", 1), replicaUp("c"), turned("a", HealthUp)},
			"reads:c writes:a replicas:c any:c,a primary:a rivals:b settled"},
		{"a claimant under suspicion is elected", all{heard("a", RolePrimary, HealthSuspect, 1), replicaUp("b"), replicaUp("c")},
			"reads:b,c writes:a replicas:b,c any:b,c primary:a settled"},
		{"the old one when the promoted one is gone", cluster(primaryUp("b", 2), turned("b", HealthDown)),
			"reads:c writes: replicas:c any:c primary:b rivals:a settled"},
		{"the old one when the promoted one was demoted", cluster(primaryUp("b", 2), replicaUp("b")),
			"reads:b,c writes: replicas:b,c any:b,c primary: rivals:a settled"},
		{"an incumbent that comes back with an older timeline", all{primaryUp("a", 3), replicaUp("b"), replicaUp("c"), primaryUp("a", 1)},
			"reads:b,c writes: replicas:b,c any:b,c primary: rivals:a settled"},
		{"a claimant that has not told its timeline yet", cluster(turned("a", HealthDown), primaryUp("b", 0)),
			"reads:c writes: replicas:c any:c primary:a settled"},
		{"... and then does", cluster(turned("a", HealthDown), primaryUp("b", 0), primaryUp("b", 2)),
			"reads:c writes:b replicas:c any:c,b primary:b settled"},
		{"a demotion leaves no primary", cluster(replicaUp("a")),
			"reads:a,b,c writes: replicas:a,b,c any:a,b,c primary: settled"},
		{"a change of role forgets the timeline", cluster(replicaUp("a"), heard("a", RolePrimary, HealthUnknown, 0), primaryUp("b", 1)),
			"reads:c writes:b replicas:c any:c,b primary:b settled"},

		// Who may be believed.
		{"a higher timeline of a peer that was never seen in this cluster", all{primaryUp("a", 1), turned("b", HealthDown), replicaUp("c"), primaryUp("b", 2)},
			"reads:c writes: replicas:c any:c,a primary:a rivals:b settled split"},
		{"... is followed when the incumbent is gone", all{primaryUp("a", 1), turned("b", HealthDown), replicaUp("c"), primaryUp("b", 2), turned("a", HealthDown)},
			"reads:c writes:b replicas:c any:c,b primary:b settled"},
		{"... or was demoted", all{primaryUp("a", 1), turned("b", HealthDown), replicaUp("c"), primaryUp("b", 2), replicaUp("a")},
			"reads:a,c writes:b replicas:a,c any:a,c,b primary:b settled"},
		{"... or when a known replica follows it", all{primaryUp("a", 1), turned("b", HealthDown), replicaUp("c"), primaryUp("b", 2), follows("c", 2)},
			"reads:c writes:b replicas:c any:c,b primary:b rivals:a settled"},
		{"... but not when one does that was never seen here either", all{primaryUp("a", 1), turned("b", HealthDown), turned("c", HealthDown), primaryUp("b", 2), follows("c", 2)},
			"reads:c writes: replicas:c any:c,a primary:a rivals:b settled split"},
		{"... and is forgotten when it goes", all{primaryUp("a", 1), turned("b", HealthDown), replicaUp("c"), primaryUp("b", 2), turned("b", HealthDown)},
			"reads:c writes:a replicas:c any:c,a primary:a settled"},
		{"a higher timeline of a peer whose first look was under way at the election", all{primaryUp("a", 1), settleNow, primaryUp("b", 2), replicaUp("c")},
			"reads:c writes:b replicas:c any:c,b primary:b rivals:a settled"},
		{"a replica has seen a newer timeline than the primary's", cluster(shows("c", 2)),
			"reads:b,c writes: replicas:b,c any:b,c primary: rivals:a settled"},
		{"... before there was a primary", all{shows("c", 2), primaryUp("a", 1), replicaUp("b"), replicaUp("c"), shows("c", 2)},
			"reads:b,c writes: replicas:b,c any:b,c primary: rivals:a settled"},
		{"... and then its primary shows", cluster(shows("c", 2), primaryUp("b", 2)),
			"reads:c writes:b replicas:c any:c,b primary:b rivals:a settled"},
		{"a replica of the timeline that was left", cluster(turned("a", HealthDown), follows("c", 1), primaryUp("b", 2)),
			"reads:b writes:b replicas: any:b primary:b fallback settled"},
		{"... and then follows", cluster(turned("a", HealthDown), follows("c", 1), primaryUp("b", 2), follows("c", 2)),
			"reads:c writes:b replicas:c any:c,b primary:b settled"},
		{"... or has lost its receiver, and is old but true", cluster(turned("a", HealthDown), follows("c", 1), primaryUp("b", 2), news{"c", observation{alone: true}}),
			"reads:c writes:b replicas:c any:c,b primary:b settled"},

		// Which cluster it is.
		{"one server's word is not enough before all have been heard", all{isOf("b", 7), replicaUp("b")},
			"reads: writes: replicas: any: primary: unseen"},
		{"two that agree are", all{isOf("b", 7), replicaUp("b"), isOf("c", 7), replicaUp("c")},
			"reads:b,c writes: replicas:b,c any:b,c primary: unseen"},
		{"when the time is over one is", all{isOf("b", 7), replicaUp("b"), settleNow},
			"reads:b writes: replicas:b any:b primary: settled unseen"},
		{"another cluster's replica is refused", all{isOf("a", 7), isOf("b", 7), isOf("c", 8), primaryUp("a", 1), replicaUp("b"), replicaUp("c")},
			"reads:b writes:a replicas:b any:b,a primary:a settled"},
		{"another cluster's primary is refused whatever its timeline", all{isOf("c", 8), primaryUp("c", 9), isOf("b", 7), replicaUp("b"), isOf("a", 7), primaryUp("a", 1)},
			"reads:b writes:a replicas:b any:b,a primary:a settled"},
		{"of as many the first in the configuration", all{isOf("c", 8), primaryUp("c", 9), isOf("b", 7), replicaUp("b"), turned("a", HealthDown)},
			"reads:b writes: replicas:b any:b primary: settled"},
		{"who does not tell is believed", all{primaryUp("a", 1), isOf("b", 7), replicaUp("b"), isOf("c", 7), replicaUp("c")},
			"reads:b,c writes:a replicas:b,c any:b,c,a primary:a settled"},
		{"a server that becomes another is refused", cluster(isOf("a", 7), isOf("b", 7), isOf("c", 7), isOf("c", 8)),
			"reads:b writes:a replicas:b any:b,a primary:a settled"},
		{"all of them become another", cluster(isOf("a", 7), isOf("b", 7), isOf("c", 7), isOf("c", 8), isOf("b", 8), isOf("a", 8)),
			"reads:b,c writes:a replicas:b,c any:b,c,a primary:a settled"},

		// Whose data is what it should be.
		{"a replica that is behind", cluster(finds("b", fitBehind)),
			"reads:c writes:a replicas:c any:c,a primary:a settled"},
		{"... and has caught up", cluster(finds("b", fitPaused), finds("b", fitFit)),
			"reads:b,c writes:a replicas:b,c any:b,c,a primary:a settled"},
		{"the last replica that follows is not left out for its data", cluster(finds("b", fitBehind), finds("c", fitCutOff)),
			"reads:b writes:a replicas:b any:b,a primary:a settled"},
		{"all replicas are late", cluster(finds("b", fitBehind), finds("c", fitBehind)),
			"reads:b,c writes:a replicas:b,c any:b,c,a primary:a settled"},
		{"no replica follows", cluster(finds("b", fitPaused), finds("c", fitCutOff)),
			"reads:b,c writes:a replicas:b,c any:b,c,a primary:a refuge:a settled"},
		{"... nor is the primary well", cluster(finds("b", fitPaused), finds("c", fitCutOff), turned("a", HealthSuspect)),
			"reads:b,c writes:a replicas:b,c any:b,c primary:a settled"},
		{"... nor takes it calls", cluster(finds("b", fitPaused), finds("c", fitCutOff), drains("a")),
			"reads:b,c writes: replicas:b,c any:b,c primary:a settled"},
		{"the only replica that is up is paused, and resumed", cluster(turned("c", HealthDown), finds("b", fitPaused), finds("b", fitFit)),
			"reads:b writes:a replicas:b any:b,a primary:a settled"},
		{"... nor when the other one dies", cluster(finds("b", fitBehind), turned("c", HealthDown)),
			"reads:b writes:a replicas:b any:b,a primary:a settled"},
		{"a replica of another history is left out, and be it the last", cluster(finds("b", fitAstray), finds("c", fitAstray)),
			"reads:a writes:a replicas: any:a primary:a fallback settled"},
		{"a promotion forgets what it was as a replica", cluster(finds("b", fitBehind), primaryUp("b", 2)),
			"reads:c writes:b replicas:c any:c,b primary:b rivals:a settled"},

		// Health.
		{"a suspect is avoided", cluster(turned("b", HealthSuspect)),
			"reads:c writes:a replicas:c any:c,a primary:a settled"},
		{"a suspect that is well again", cluster(turned("b", HealthSuspect), turned("b", HealthUp)),
			"reads:b,c writes:a replicas:b,c any:b,c,a primary:a settled"},
		{"a replica that is down", cluster(turned("b", HealthDown)),
			"reads:c writes:a replicas:c any:c,a primary:a settled"},
		{"a replica that refuses us", cluster(turned("b", HealthMisconfigured)),
			"reads:c writes:a replicas:c any:c,a primary:a settled"},
		{"a suspect primary still writes", cluster(turned("a", HealthSuspect)),
			"reads:b,c writes:a replicas:b,c any:b,c primary:a settled"},
		{"a primary that is down keeps its office and gets nothing", cluster(turned("a", HealthDown)),
			"reads:b,c writes: replicas:b,c any:b,c primary:a settled"},
		{"a primary that refuses us keeps its office and gets nothing", cluster(turned("a", HealthMisconfigured)),
			"reads:b,c writes: replicas:b,c any:b,c primary:a settled"},
		{"a primary that comes back", cluster(turned("a", HealthDown), turned("a", HealthUp)),
			"reads:b,c writes:a replicas:b,c any:b,c,a primary:a settled"},
		{"a peer of unknown role gets nothing", all{primaryUp("a", 1), replicaUp("b"), turned("c", HealthUp)},
			"reads:b writes:a replicas:b any:b,a primary:a settled"},

		// What reads fall back to.
		{"no replica: the primary", cluster(turned("b", HealthDown), turned("c", HealthDown)),
			"reads:a writes:a replicas: any:a primary:a fallback settled"},
		{"replicas under suspicion: the healthy primary", cluster(turned("b", HealthSuspect), turned("c", HealthSuspect)),
			"reads:a writes:a replicas:b,c any:a primary:a fallback settled"},
		{"all under suspicion: the replicas first", cluster(turned("a", HealthSuspect), turned("b", HealthSuspect), turned("c", HealthSuspect)),
			"reads:b,c writes:a replicas:b,c any:b,c,a primary:a settled"},
		{"only a suspect primary: that", cluster(turned("a", HealthSuspect), turned("b", HealthDown), turned("c", HealthDown)),
			"reads:a writes:a replicas: any:a primary:a fallback settled"},
		{"a suspect replica and no primary", cluster(turned("a", HealthDown), turned("b", HealthSuspect), turned("c", HealthDown)),
			"reads:b writes: replicas:b any:b primary:a settled"},
		{"a suspect replica before the others have answered", all{heard("b", RoleReplica, HealthSuspect, 0)},
			"reads:b writes: replicas:b any:b primary: unseen"},
		{"nobody", cluster(turned("a", HealthDown), turned("b", HealthDown), turned("c", HealthDown)),
			"reads: writes: replicas: any: primary:a settled"},

		// The program's own set-up.
		{"a hostile set-up takes a replica out of the reads", cluster(cannotRead("b")),
			"reads:c writes:a replicas:c any:c,a primary:a settled"},
		{"... all of them: the primary", cluster(cannotRead("b"), cannotRead("c")),
			"reads:a writes:a replicas: any:a primary:a fallback settled"},
		{"... a suspect too", cluster(turned("a", HealthSuspect), cannotRead("b"), cannotRead("c"), turned("b", HealthSuspect)),
			"reads:a writes:a replicas: any:a primary:a fallback settled"},
		{"... and leaves a primary alone", cluster(cannotRead("a")),
			"reads:b,c writes:a replicas:b,c any:b,c,a primary:a settled"},
		{"... also one that was a replica", cluster(cannotRead("b"), primaryUp("b", 2)),
			"reads:c writes:b replicas:c any:c,b primary:b rivals:a settled"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			require.Equal(t, tc.want, listsOf(tell(freshTopology("a", "b", "c"), tc.news...)))
		})
	}
}

func TestAHigherTimelineWinsWhicheverIsHeardFirst(t *testing.T) {
	t.Parallel()
	const want = "reads:c writes:b replicas:c any:c,b primary:b rivals:a settled"
	old, promoted, third := primaryUp("a", 7), primaryUp("b", 8), replicaUp("c")
	for _, order := range [][]news{
		{old, promoted, third}, {promoted, old, third}, {old, third, promoted},
		{promoted, third, old}, {third, old, promoted}, {third, promoted, old},
	} {
		require.Equal(t, want, listsOf(tell(freshTopology("a", "b", "c"), order...)))
		settled := append([]news{settleNow}, order...)
		require.Equal(t, want, listsOf(tell(freshTopology("a", "b", "c"), settled...)))
	}
}

func TestBelievedRolesStandUntilSomethingElseIsHeard(t *testing.T) {
	t.Parallel()
	peers := idlePeers("a", "b")
	top := newTopology(ModeReplicated, peers, []Role{RolePrimary, RoleReplica})
	require.Equal(t, "reads: writes: replicas: any: primary: unseen", listsOf(top), "a belief is no answer")

	top = tell(top, turned("a", HealthUp), turned("b", HealthUp))
	require.Equal(t, "reads:b writes:a replicas:b any:b,a primary:a settled", listsOf(top))
}

// Where the servers do not tell a timeline, a primary that is gone must not keep its office for ever.
func TestAnUnknownTimelineDoesNotKeepADeadPrimaryInOffice(t *testing.T) {
	t.Parallel()
	top := tell(freshTopology("a", "b", "c"),
		primaryUp("a", 0), replicaUp("b"), replicaUp("c"), turned("a", HealthDown), primaryUp("b", 0))
	require.Equal(t, "reads:c writes:b replicas:c any:c,b primary:b settled", listsOf(top))
}

func TestApplyReturnsTheSameTopologyIfNothingIsNew(t *testing.T) {
	t.Parallel()
	base := func() *topology {
		return tell(freshTopology("a", "b", "c"), primaryUp("a", 3), replicaUp("b"), cannotRead("b"), turned("c", HealthDown))
	}
	for _, tc := range []struct {
		name string
		news news
		same bool
	}{
		{"the same word again", primaryUp("a", 3), true},
		{"a part of it", turned("a", HealthUp), true},
		{"nothing at all", turned("a", HealthUnknown), true},
		{"another hostile error where there is one", cannotRead("b"), true},
		{"the end of the first looks where all have been heard", settleNow, true},
		{"a peer that is not of this pool", news{"", observation{peer: &peer{}, health: HealthUp}}, true},
		{"another timeline", primaryUp("a", 4), false},
		{"another health", turned("a", HealthSuspect), false},
		{"another role", replicaUp("a"), false},
		{"a first hostile error", cannotRead("c"), false},
		{"another cause", news{"c", observation{cause: io.EOF}}, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			before := base()
			after := tell(before, tc.news)
			if tc.same {
				require.Same(t, before, after)
				return
			}
			require.NotSame(t, before, after)
			require.NotEqual(t, before.superseded, after.superseded, "who waits for the old one is told apart")
		})
	}
}

func TestTheEndOfTheFirstLooksIsNewsOnce(t *testing.T) {
	t.Parallel()
	first := freshTopology("a", "b")
	second := tell(first, settleNow)
	require.NotSame(t, first, second)
	require.Same(t, second, tell(second, settleNow))
}

func TestASoloTopologyServesEverything(t *testing.T) {
	t.Parallel()
	top := soloTopology(idlePeers("a")[0])
	require.Equal(t, "reads:a writes:a replicas:a any:a primary:a settled", listsOf(top))
	for _, pl := range []place{placeReads, placePrimary, placeReplica, placeAny, placeNamed} {
		chosen, _ := top.pick(&intent{place: pl, reason: ReasonRead}, &tried{})
		require.NotNil(t, chosen, "place %d", pl)
	}
}

// snapshot is all of a topology that must never change once it was published.
func snapshot(t *topology) string {
	var b strings.Builder
	b.WriteString(listsOf(t))
	for _, m := range t.members {
		fmt.Fprintf(&b, " | %s %v %v %d %v %v", m.peer.name, m.role, m.health, m.timeline, m.hostile, m.cause)
	}
	return b.String()
}

func TestOldTopologiesAreNeverModified(t *testing.T) {
	t.Parallel()
	top := freshTopology("a", "b", "c", "d")
	all, written := []*topology{top}, []string{snapshot(top)}
	dice := rand.New(rand.NewPCG(1, 2))
	for range 400 {
		next := tell(top, heard(
			string(rune('a'+dice.IntN(4))), Role(dice.IntN(3)), Health(dice.IntN(5)), dice.Uint32N(3)))
		if next == top {
			continue
		}
		top = next
		all, written = append(all, top), append(written, snapshot(top))
	}
	require.Greater(t, len(all), 100)
	for i, old := range all {
		require.Equal(t, written[i], snapshot(old))
		select {
		case <-old.superseded:
			require.Fail(t, "apply has closed a channel that its caller closes")
		default:
		}
	}
}

// Appending to a list of a topology, as a careless reader might, must not reach into another list of it.
func TestTheListsOfATopologyShareNoRoomToGrow(t *testing.T) {
	t.Parallel()
	top := tell(freshTopology("a", "b", "c", "d"), primaryUp("a", 1), replicaUp("b"), replicaUp("c"), replicaUp("d"))
	require.Equal(t, "b,c,d,a", namesOf(top.anyone))
	require.Equal(t, "b,c,d", namesOf(top.reads))
	_ = append(top.reads, top.members[1].peer)
	_ = append(top.replicas, top.members[1].peer)
	require.Equal(t, "b,c,d,a", namesOf(top.anyone))
}

// permutations calls visit with every order of list, in place.
func permutations[E any](list []E, visit func([]E)) {
	if len(list) == 0 {
		visit(list)
		return
	}
	var step func(k int)
	step = func(k int) {
		if k == len(list) {
			visit(list)
			return
		}
		for i := k; i < len(list); i++ {
			list[k], list[i] = list[i], list[k]
			step(k + 1)
			list[k], list[i] = list[i], list[k]
		}
	}
	step(0)
}

func TestAnyOrderOfTheSameLastWordsEndsInTheSameLists(t *testing.T) {
	t.Parallel()
	names := []string{"a", "b", "c", "d"}
	dice := rand.New(rand.NewPCG(3, 4))
	healths := []Health{HealthUp, HealthUp, HealthUp, HealthSuspect, HealthDown, HealthMisconfigured}
	seen := map[string]bool{}
	for round := range 300 {
		var words []news
		timelines := dice.Perm(9) // no two claimants of one timeline: between those the incumbent decides
		for i, name := range names {
			n := heard(name, Role(dice.IntN(3)), healths[dice.IntN(len(healths))], 0)
			if dice.IntN(12) == 0 {
				n.health = HealthUnknown
			}
			n.system = uint64(dice.IntN(2)) // told or not
			if n.role == RolePrimary {
				n.timeline = uint32(timelines[i]) + 1
			}
			if dice.IntN(4) == 0 {
				n.hostile = io.EOF
			}
			words = append(words, n)
		}
		if round%2 == 0 {
			words = append(words, settleNow)
		}
		want := listsOf(tell(freshTopology(names...), words...))
		seen[want] = true
		permutations(words, func(order []news) {
			if got := listsOf(tell(freshTopology(names...), order...)); got != want {
				require.Equal(t, want, got, "%+v", order)
			}
		})
	}
	require.Greater(t, len(seen), 50, "the dice have thrown too few different clusters")
}

func FuzzTopology(f *testing.F) {
	f.Add([]byte{0x00, 0x00})
	f.Add([]byte("a promotion, a demotion and a split walk into a bar"))
	f.Add([]byte("1009\xff01Y"))
	f.Add([]byte("70281009102a10100B0"))
	f.Add([]byte{0x11, 0x15, 0x22, 0x05, 0x33, 0x05, 0x11, 0x19, 0x10, 0x1d, 0xff, 0xff, 0x01, 0x45})
	f.Fuzz(func(t *testing.T, events []byte) {
		peers := idlePeers("a", "b", "c", "d")
		top := newTopology(ModeReplicated, peers, make([]Role, len(peers)))
		hostile := errors.New("hostile")
		for len(events) >= 2 && len(events) < 4096 {
			who, what := events[0], events[1]
			events = events[2:]
			o := observation{
				peer:     peers[who&3],
				role:     Role(what & 3 % 3),
				health:   Health(what >> 2 & 7 % 5),
				timeline: uint32(what >> 5 & 3),
			}
			switch who >> 4 {
			case 0xf:
				o = observation{settle: true}
			case 0xe:
				o = observation{peer: peers[who&3], hostile: hostile}
			}
			before := snapshot(top)
			next := top.apply(o)
			if got := snapshot(top); got != before {
				t.Fatalf("%+v has changed an old topology:\n%s\n%s", o, before, got)
			}
			if next.timeline < top.timeline {
				t.Fatalf("%+v has set the timeline back", o)
			}
			if next.settled != top.settled && top.settled {
				t.Fatalf("%+v has unsettled the topology", o)
			}
			if again := next.apply(o); again != next {
				t.Fatalf("%+v is news twice", o)
			}
			top = next
			checkTopology(t, top, peers)
		}
	})
}

// checkTopology tests what holds of every topology.
func checkTopology(t *testing.T, top *topology, peers []*peer) {
	t.Helper()
	fail := func(what string) { t.Fatalf("%s: %s", what, snapshot(top)) }
	if len(top.members) != len(peers) {
		fail("a member is lost")
	}
	for i, p := range peers {
		if top.members[i].peer != p {
			fail("the members are not in the order of the configuration")
		}
	}
	for _, list := range [][]*peer{top.reads, top.writes, top.replicas, top.anyone} {
		for i, p := range list {
			m := top.member(p)
			switch {
			case m == nil:
				fail("a list holds a stranger")
			case slices.Contains(list[:i], p):
				fail("a list holds a peer twice")
			case m.health != HealthUp && m.health != HealthSuspect:
				fail("a list holds a peer that cannot serve")
			case m.role == RoleUnknown:
				fail("a list holds a peer of unknown role")
			case m.role == RoleReplica && m.hostile != nil:
				fail("a list holds a hostile replica")
			case m.role == RolePrimary && p != top.primary:
				fail("a list holds a fenced primary")
			case m.health != top.member(list[0]).health && m.role == top.member(list[0]).role:
				fail("a list holds the healthy beside the suspect")
			}
		}
	}
	for _, p := range top.replicas {
		if top.member(p).role != RoleReplica {
			fail("a primary among the replicas")
		}
	}
	switch {
	case len(top.writes) > 1:
		fail("two writers")
	case len(top.writes) == 1 && (top.writes[0] != top.primary || top.member(top.primary).role != RolePrimary):
		fail("the writer is not the primary")
	case top.split && len(top.writes) > 0:
		fail("a split with a writer")
	case top.primary != nil && !top.settled:
		fail("a primary before all were heard")
	case top.fallback != (len(top.reads) > 0 && top.reads[0] == top.primary):
		fail("fallback says something else than the reads")
	case !top.unseen && !top.settled:
		fail("all were heard and nothing is settled")
	}
	if len(top.writes) == 1 && top.member(top.primary).timeline < top.timeline {
		fail("the writer is of a timeline that was left")
	}
	for i := range top.members {
		m := &top.members[i]
		if len(top.writes) == 1 && m.role == RolePrimary && m.health == HealthUp && m.timeline > top.member(top.primary).timeline {
			fail("the writer is of an older timeline")
		}
		if m.health == HealthUp && m.role == RoleReplica && m.hostile == nil && !m.stray && !slices.Contains(top.reads, m.peer) {
			fail("a healthy replica does not read")
		}
	}
}

func TestPickChoosesByPlace(t *testing.T) {
	t.Parallel()
	healthy := []news{primaryUp("a", 1), replicaUp("b"), replicaUp("c")}
	for _, tc := range []struct {
		name   string
		news   []news
		place  place
		reason Reason
		tried  string
		want   string // who may be chosen
		why    Reason
	}{
		{"a read", healthy, placeReads, ReasonRead, "", "b,c", ReasonRead},
		{"a write", healthy, placePrimary, ReasonWrite, "", "a", ReasonWrite},
		{"a read that insists on a replica", healthy, placeReplica, ReasonRoute, "", "b,c", ReasonRoute},
		{"a read that goes anywhere", healthy, placeAny, ReasonRead, "", "a,b,c", ReasonRead},

		{"a read after a replica failed", healthy, placeReads, ReasonRead, "b", "c", ReasonRead},
		{"a read after all replicas failed", healthy, placeReads, ReasonRead, "b,c", "a", ReasonNoReplica},
		{"a read after everybody failed", healthy, placeReads, ReasonRead, "a,b,c", "", ReasonRead},
		{"a write after the primary failed", healthy, placePrimary, ReasonWrite, "a", "", ReasonWrite},
		{"a read that insists, after all replicas failed", healthy, placeReplica, ReasonRoute, "b,c", "", ReasonRoute},
		{"a read that goes anywhere, after all replicas failed", healthy, placeAny, ReasonRead, "b,c", "a", ReasonRead},

		{"a read where there is no replica", []news{primaryUp("a", 1), turned("b", HealthDown), turned("c", HealthDown)},
			placeReads, ReasonRead, "", "a", ReasonNoReplica},
		{"a routed read where there is no replica keeps its reason", []news{primaryUp("a", 1), turned("b", HealthDown), turned("c", HealthDown)},
			placeReads, ReasonRoute, "", "a", ReasonRoute},
		{"a read that insists where there is no replica", []news{primaryUp("a", 1), turned("b", HealthDown), turned("c", HealthDown)},
			placeReplica, ReasonRoute, "", "", ReasonRoute},
		{"a read before a replica has answered", []news{primaryUp("a", 1)}, placeReads, ReasonRead, "", "", ReasonRead},
		{"a read after the only replica heard so far failed", []news{primaryUp("a", 1), replicaUp("b")},
			placeReads, ReasonRead, "b", "", ReasonRead},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			top := tell(freshTopology("a", "b", "c"), tc.news...)
			got := map[string]bool{}
			for range 60 {
				noted := tried{}
				for i := range top.members {
					if slices.Contains(strings.Split(tc.tried, ","), top.members[i].peer.name) {
						noted.add(top.members[i].peer)
					}
				}
				chosen, why := top.pick(&intent{place: tc.place, reason: tc.reason, reads: tc.place != placePrimary}, &noted)
				require.Equal(t, tc.why, why)
				if chosen != nil {
					got[chosen.name] = true
				}
			}
			require.Equal(t, tc.want, strings.Join(sortedKeys(got), ","))
		})
	}
}

func TestPickKeepsToTheNamedPeers(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name  string
		news  []news
		named string
		reads bool
		tried string
		want  string
	}{
		{"a read among all", nil, "a,b,c", true, "", "b,c"},
		{"a write among all", nil, "a,b,c", false, "", "a"},
		{"a read of one replica", nil, "c", true, "", "c"},
		{"a read of the primary alone", nil, "a", true, "", "a"},
		{"a write to a replica alone", nil, "b", false, "", "b"},
		{"a write among replicas", nil, "b,c", false, "", "b,c"},
		{"a read after the named replica failed", nil, "a,b", true, "b", "a"},
		{"a read after all the named failed", nil, "b", true, "b", ""},
		{"a read of a replica that is down", []news{turned("b", HealthDown)}, "b", true, "", ""},
		{"a read of the primary and a replica that is down", []news{turned("b", HealthDown)}, "a,b", true, "", "a"},
		{"a read of a suspect that is the only one named", []news{turned("b", HealthSuspect), turned("c", HealthSuspect)}, "b", true, "", "b"},
		{"a write after a promotion", []news{primaryUp("b", 2)}, "b", false, "", "b"},
		{"a fenced primary", []news{primaryUp("b", 2)}, "a", true, "", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			top := tell(freshTopology("a", "b", "c"), append([]news{primaryUp("a", 1), replicaUp("b"), replicaUp("c")}, tc.news...)...)
			in := intent{place: placeNamed, reads: tc.reads, reason: ReasonRoute}
			noted := tried{}
			for i := range top.members {
				p := top.members[i].peer
				if slices.Contains(strings.Split(tc.named, ","), p.name) {
					in.peers = append(in.peers, p)
				}
				if slices.Contains(strings.Split(tc.tried, ","), p.name) {
					noted.add(p)
				}
			}
			got := map[string]bool{}
			for range 60 {
				chosen, why := top.pick(&in, &noted)
				require.Equal(t, ReasonRoute, why)
				if chosen != nil {
					got[chosen.name] = true
				}
			}
			require.Equal(t, tc.want, strings.Join(sortedKeys(got), ","))
		})
	}
}

// A route may give a target and names: then both hold.
func TestPickKeepsToTheNamedPeersUnderATargetToo(t *testing.T) {
	t.Parallel()
	top := tell(freshTopology("a", "b", "c"), primaryUp("a", 1), replicaUp("b"), replicaUp("c"))
	a, b := top.members[0].peer, top.members[1].peer
	for range 40 {
		chosen, _ := top.pick(&intent{place: placeReads, reads: true, reason: ReasonRead, peers: []*peer{a, b}}, &tried{})
		require.Same(t, b, chosen)
		chosen, _ = top.pick(&intent{place: placeReads, reads: true, reason: ReasonRead, peers: []*peer{a}}, &tried{})
		require.Same(t, a, chosen)
		chosen, _ = top.pick(&intent{place: placePrimary, peers: []*peer{b}}, &tried{})
		require.Nil(t, chosen)
	}
}

func TestWaitingIsHopelessOnlyIfEveryCandidateRefusesUs(t *testing.T) {
	t.Parallel()
	misfit := func(of string, r Role) news { return heard(of, r, HealthMisconfigured, 0) }
	for _, tc := range []struct {
		name  string
		place place
		named string
		news  []news
		want  bool
	}{
		{"nothing is known yet", placeReads, "", nil, false},
		{"everybody refuses", placeReads, "", []news{misfit("a", 0), misfit("b", 0), misfit("c", 0)}, true},
		{"everybody refuses a write", placePrimary, "", []news{misfit("a", 0), misfit("b", 0), misfit("c", 0)}, true},
		{"one may come back", placeReads, "", []news{misfit("a", 0), misfit("b", 0), turned("c", HealthDown)}, false},
		{"one has not answered", placeReads, "", []news{misfit("a", 0), misfit("b", 0)}, false},
		{"the primary refuses a write, replicas are well", placePrimary, "", []news{misfit("a", RolePrimary), replicaUp("b"), replicaUp("c")}, true},
		{"one of unknown role refuses a write, replicas are well", placePrimary, "", []news{misfit("a", 0), replicaUp("b"), replicaUp("c")}, true},
		{"there are replicas only: one may be promoted", placePrimary, "", []news{replicaUp("a"), replicaUp("b"), replicaUp("c")}, false},
		{"the primary is down: it may come back", placePrimary, "", []news{heard("a", RolePrimary, HealthDown, 0), replicaUp("b"), replicaUp("c")}, false},
		{"all that are named refuse", placeNamed, "b,c", []news{primaryUp("a", 1), misfit("b", 0), misfit("c", 0)}, true},
		{"one that is named does not", placeNamed, "a,b", []news{primaryUp("a", 1), misfit("b", 0), misfit("c", 0)}, false},
		{"the replicas refuse a read that goes to the primary too", placeReads, "", []news{heard("a", RolePrimary, HealthDown, 0), misfit("b", RoleReplica), misfit("c", RoleReplica)}, false},
		{"the replicas refuse a call that insists on one", placeReplica, "", []news{primaryUp("a", 1), misfit("b", RoleReplica), misfit("c", RoleReplica)}, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			top := tell(freshTopology("a", "b", "c"), tc.news...)
			in := intent{place: tc.place, reason: ReasonRead}
			for i := range top.members {
				if slices.Contains(strings.Split(tc.named, ","), top.members[i].peer.name) {
					in.peers = append(in.peers, top.members[i].peer)
				}
			}
			require.Equal(t, tc.want, top.hopeless(&in))
		})
	}
}

func TestCausesSayWhyEachPeerWasNotTaken(t *testing.T) {
	t.Parallel()
	broken := io.ErrUnexpectedEOF
	down := func(of string) news { return news{of, observation{health: HealthDown, cause: broken}} }
	for _, tc := range []struct {
		name  string
		place place
		named string
		news  []news
		want  []string
	}{
		{"nothing is known", placeReads, "", nil,
			[]string{"a not yet seen", "b not yet seen", "c not yet seen"}},
		{"a write without a primary", placePrimary, "", []news{primaryUp("a", 1), replicaUp("b"), replicaUp("c"), down("a")},
			[]string{"a down: unexpected EOF", "b is a replica", "c is a replica"}},
		{"a replica is insisted on", placeReplica, "", []news{primaryUp("a", 1), down("b"), turned("c", HealthMisconfigured)},
			[]string{"a is the primary", "b down: unexpected EOF", "c misconfigured"}},
		{"an old fault is not the cause of one that is well", placeReplica, "", []news{primaryUp("a", 1), down("a"), turned("a", HealthUp)},
			[]string{"a is the primary", "b not yet seen", "c not yet seen"}},
		{"a split", placePrimary, "", []news{primaryUp("a", 1), primaryUp("b", 1), replicaUp("c")},
			[]string{"a claims to be the primary", "b claims to be the primary", "c is a replica"}},
		{"a fenced primary", placePrimary, "", []news{primaryUp("a", 1), primaryUp("b", 2), replicaUp("c"), down("b")},
			[]string{"a is of an older timeline", "b down: unexpected EOF", "c is a replica"}},
		{"an unknown role", placeReads, "", []news{turned("a", HealthUp), down("b"), down("c")},
			[]string{"a is of unknown role", "b down: unexpected EOF", "c down: unexpected EOF"}},
		{"a hostile set-up", placeReplica, "", []news{primaryUp("a", 1), replicaUp("b"), cannotRead("b"), turned("c", HealthSuspect)},
			[]string{"a is the primary", "b refuses the program's own set-up of a connection: AfterConnect writes", "c suspect"}},
		{"others are named", placeNamed, "b", []news{primaryUp("a", 1), down("b"), replicaUp("c")},
			[]string{"a is not named by the route", "b down: unexpected EOF", "c is not named by the route"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			top := tell(freshTopology("a", "b", "c"), tc.news...)
			in := intent{place: tc.place, reason: ReasonRead}
			for i := range top.members {
				if slices.Contains(strings.Split(tc.named, ","), top.members[i].peer.name) {
					in.peers = append(in.peers, top.members[i].peer)
				}
			}
			var got []string
			for _, c := range top.causes(&in) {
				line := c.Peer + " " + c.Why.phrase()
				if c.Err != nil {
					line += ": " + c.Err.Error()
				}
				got = append(got, line)
			}
			require.Equal(t, tc.want, got)
		})
	}
}

func TestEveryPeerThatTakesNoCallsSaysWhy(t *testing.T) {
	t.Parallel()
	type all = []news
	cluster := func(more ...news) all {
		return append(all{primaryUp("a", 1), replicaUp("b"), replicaUp("c")}, more...)
	}
	drains := func(of string) news { return news{of, observation{drained: yes}} }
	slows := func(of string) news { return news{of, observation{slow: yes}} }
	for _, tc := range []struct {
		name string
		mode Mode
		news all
		idle string // why a, b and c take no calls
		bad  string // what is wrong with them
	}{
		{"nothing is known", ModeReplicated, nil, "unknown unknown unknown", "none none none"},
		{"all is well", ModeReplicated, cluster(), "none none none", "none none none"},
		{"a fault, and a fall", ModeReplicated, cluster(turned("b", HealthSuspect), turned("c", HealthDown)), "none suspect down", "none none none"},
		{"a suspect that nobody stands in for", ModeReplicated, cluster(turned("a", HealthDown), turned("b", HealthSuspect), turned("c", HealthDown)),
			"down none down", "none none none"},
		{"a primary that was replaced", ModeReplicated, cluster(primaryUp("b", 2)), "older-timeline none none", "older-timeline none none"},
		{"... while the new one is down", ModeReplicated, cluster(primaryUp("b", 2), turned("b", HealthDown)),
			"older-timeline down none", "older-timeline none none"},
		{"... with its replica", ModeReplicated, cluster(primaryUp("b", 2), follows("c", 1)), "older-timeline none older-timeline", "older-timeline none older-timeline"},
		{"a split", ModeReplicated, all{primaryUp("a", 1), primaryUp("b", 1), replicaUp("c")}, "disputed disputed none", "disputed disputed none"},
		{"a claimant of the primary's own timeline", ModeReplicated, cluster(primaryUp("b", 1)), "none disputed none", "none disputed none"},
		{"the first to claim, before all have answered", ModeReplicated, all{primaryUp("a", 1)}, "unconfirmed unknown unknown", "none none none"},
		{"another cluster", ModeReplicated, append(cluster(isOf("a", 1), isOf("b", 1)), isOf("c", 2)), "none none other-cluster", "none none other-cluster"},
		{"a drained primary", ModeReplicated, cluster(drains("a")), "drained none none", "none none none"},
		{"well, and of no role", ModeReplicated, all{primaryUp("a", 1), replicaUp("b"), turned("c", HealthUp)}, "none none role-unknown", "none none none"},
		{"late", ModeReplicated, cluster(finds("b", fitBehind), finds("c", fitFit)), "none behind none", "none behind none"},
		{"late, and read all the same", ModeReplicated, cluster(finds("b", fitBehind), finds("c", fitPaused)), "none none paused", "none behind paused"},
		{"cut off, and of another history", ModeReplicated, cluster(finds("b", fitCutOff), finds("c", fitAstray)), "none none diverged", "none cut-off diverged"},
		{"a hostile set-up", ModeReplicated, cluster(cannotRead("b")), "none setup-fails none", "none setup-fails none"},
		{"slow", ModeReplicated, cluster(slows("b")), "none slow none", "none none none"},
		{"equals", ModeEquivalent, cluster(turned("b", HealthDown), drains("c")), "none down drained", "none none none"},
		{"in order", ModeOrdered, cluster(turned("a", HealthDown)), "down none not-first", "none none none"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			top := tell(newTopology(tc.mode, idlePeers("a", "b", "c"), make([]Role, 3)), tc.news...)
			var idle, bad []string
			for i := range top.members {
				m := &top.members[i]
				idle, bad = append(idle, top.idle(m).String()), append(bad, top.unfit(m).String())
			}
			require.Equal(t, tc.idle, strings.Join(idle, " "))
			require.Equal(t, tc.bad, strings.Join(bad, " "))
		})
	}
}

func TestAClaimantThatIsNotElectedYetIsNotCalledOld(t *testing.T) {
	t.Parallel()
	top := tell(freshTopology("a", "b"), primaryUp("a", 1))
	require.Equal(t, WhyUnconfirmed, top.causes(&intent{place: placePrimary})[0].Why)
}

// Whatever is heard, in whatever order: at most one writer, of the highest timeline that the cluster has shown; the highest
// never falls but when all have become another cluster; nobody who is refused or astray is read; and hearing the same again
// changes nothing, so that nothing alternates.
func TestInvariantsOfWhateverIsHeard(t *testing.T) {
	t.Parallel()
	names := []string{"a", "b", "c", "d"}
	writers, splits := map[string]bool{}, 0
	for seed := range uint64(400) {
		dice := rand.New(rand.NewPCG(seed, 9))
		top := freshTopology(names...)
		for range 120 {
			n := news{of: names[dice.IntN(len(names))]}
			n.role, n.health = Role(dice.IntN(3)), Health(dice.IntN(6))
			n.fitness, n.alone = fitness(dice.IntN(6)), dice.IntN(4) == 0
			if n.role != RoleUnknown {
				n.timeline = dice.Uint32N(4)
			}
			if n.role == RoleReplica {
				n.shown = dice.Uint32N(4)
			}
			switch dice.IntN(20) {
			case 0:
				n.system = 2
			case 1, 2, 3:
				n.system = 1
			case 4:
				n = settleNow
			}
			was := top
			top = tell(top, n)
			require.Same(t, top, tell(top, n), "heard twice")

			require.LessOrEqual(t, len(top.writes), 1)
			if top.system == was.system {
				require.GreaterOrEqual(t, top.timeline, was.timeline)
			}
			for _, p := range top.writes {
				m := top.member(p)
				require.Same(t, top.primary, p)
				require.False(t, top.split || m.foreign)
				require.Equal(t, RolePrimary, m.role)
				require.Equal(t, top.timeline, m.timeline)
				require.False(t, top.disputes(m))
				writers[p.name] = true
			}
			if top.split {
				splits++
				require.Empty(t, top.writes)
				require.NotEmpty(t, top.rivals)
			}
			for _, p := range slices.Concat(top.reads, top.anyone, top.replicas, top.well) {
				m := top.member(p)
				require.False(t, m.foreign || m.stray || (m.role == RolePrimary && p != top.primary))
			}
		}
	}
	require.Len(t, writers, len(names))
	require.Greater(t, splits, 20)
}

// look is all that a look tells.
func look(of string, r Role, system uint64, timeline, shown uint32) news {
	return news{of, observation{role: r, health: HealthUp, system: system, timeline: timeline, shown: shown}}
}

// lookAt is look at a server of cluster 1 that was started when it says.
func lookAt(of string, r Role, started int64, timeline, shown uint32) news {
	n := look(of, r, 1, timeline, shown)
	n.server, n.at = server{system: 1, started: started}, of
	return n
}

// At a cold start the order of the answers decides nothing, whoever is a stranger and whatever replicas have seen.
func TestTheOrderOfFirstAnswersDecidesNothing(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name string
		news []news
		want string
	}{
		{"a stranger's replica of a high timeline", []news{look("a", RolePrimary, 1, 1, 0), look("b", RoleReplica, 1, 1, 1), look("c", RoleReplica, 2, 9, 9)},
			"reads:b writes:a replicas:b any:b,a primary:a settled"},
		{"a stranger's primary", []news{look("a", RolePrimary, 1, 1, 0), look("b", RoleReplica, 1, 1, 1), look("c", RolePrimary, 2, 9, 0)},
			"reads:b writes:a replicas:b any:b,a primary:a settled"},
		{"a replica has seen more than the claimant", []news{look("a", RolePrimary, 1, 1, 0), look("b", RoleReplica, 1, 1, 1), look("c", RoleReplica, 1, 2, 2)},
			"reads:b,c writes: replicas:b,c any:b,c primary: rivals:a settled"},
		{"a stale primary and its replica", []news{look("a", RolePrimary, 1, 1, 0), look("b", RolePrimary, 1, 2, 0), look("c", RoleReplica, 1, 1, 1)},
			"reads:b writes:b replicas: any:b primary:b rivals:a fallback settled"},
	} {
		permutations(tc.news, func(order []news) {
			require.Equal(t, tc.want, listsOf(tell(freshTopology("a", "b", "c"), order...)), "%s: %+v", tc.name, order)
		})
	}
}

// What a pool has to live through after that.
func TestAClusterIsFollowedThroughItsLife(t *testing.T) {
	t.Parallel()
	start := []news{look("a", RolePrimary, 1, 1, 0), look("b", RoleReplica, 1, 1, 1)}
	for _, tc := range []struct {
		name string
		news []news
		want string
	}{
		{"a copy with the primary's own timeline is not its successor", []news{turned("c", HealthDown), look("c", RolePrimary, 1, 1, 0), turned("a", HealthDown)},
			"reads:b writes: replicas:b any:b primary:a rivals:c settled split"},
		{"... and the primary comes back", []news{turned("c", HealthDown), look("c", RolePrimary, 1, 1, 0), turned("a", HealthDown), turned("a", HealthUp)},
			"reads:b writes:a replicas:b any:b,a primary:a rivals:c settled"},
		{"... or another is promoted", []news{turned("c", HealthDown), look("c", RolePrimary, 1, 1, 0), turned("a", HealthDown), look("b", RolePrimary, 1, 2, 0)},
			"reads:b writes:b replicas: any:b primary:b rivals:c fallback settled"},
		{"... or it becomes a replica and is promoted itself", []news{turned("c", HealthDown), look("c", RolePrimary, 1, 1, 0), look("c", RoleReplica, 1, 1, 1), turned("a", HealthDown), look("c", RolePrimary, 1, 2, 0)},
			"reads:c writes:c replicas: any:c primary:c fallback settled"},
		{"a stranger does not win while the primary only stalls", []news{turned("c", HealthDown), look("c", RolePrimary, 1, 2, 0), turned("a", HealthDown)},
			"reads:b writes: replicas:b any:b primary:a rivals:c settled split"},
		{"... but when its replica has lost it", []news{turned("c", HealthDown), look("c", RolePrimary, 1, 2, 0), turned("a", HealthDown), {"b", observation{alone: true}}},
			"reads:b writes:c replicas:b any:b,c primary:c settled"},
		{"a stranger that a replica follows, as an ordinary role sees it", []news{turned("c", HealthDown), {"b", observation{alone: true}}, look("c", RolePrimary, 1, 2, 0), shows("b", 2)},
			"reads:b writes:c replicas:b any:b,c primary:c rivals:a settled"},
		{"an upgrade makes another cluster of all", []news{turned("c", HealthDown), look("b", RolePrimary, 1, 9, 0), look("a", RoleReplica, 1, 9, 9), look("c", RoleReplica, 1, 9, 9),
			look("b", RolePrimary, 2, 1, 0), look("a", RoleReplica, 2, 1, 1), look("c", RoleReplica, 2, 1, 1)},
			"reads:a,c writes:b replicas:a,c any:a,c,b primary:b settled"},
		{"two strangers of one timeline, of which one goes", []news{turned("c", HealthDown), turned("d", HealthDown), look("c", RolePrimary, 1, 2, 0), look("d", RolePrimary, 1, 2, 0), turned("d", HealthDown)},
			"reads:b writes: replicas:b any:b,a primary:a rivals:c settled split"},
		{"... and then the other", []news{turned("c", HealthDown), turned("d", HealthDown), look("c", RolePrimary, 1, 2, 0), look("d", RolePrimary, 1, 2, 0), turned("d", HealthDown), turned("c", HealthDown)},
			"reads:b writes:a replicas:b any:b,a primary:a settled"},
		{"a copy with the primary's own timeline is promoted, and nobody knows of what", []news{look("c", RoleReplica, 1, 1, 1), look("c", RolePrimary, 1, 1, 0), turned("c", HealthDown), look("c", RolePrimary, 1, 2, 0)},
			"reads:b writes: replicas:b any:b,a primary:a rivals:c settled split"},
		{"... and a replica follows it", []news{look("c", RoleReplica, 1, 1, 1), look("c", RolePrimary, 1, 1, 0), turned("c", HealthDown), look("c", RolePrimary, 1, 2, 0), look("b", RoleReplica, 1, 2, 2)},
			"reads:b writes:c replicas:b any:b,c primary:c rivals:a settled"},
		{"a second name of the primary is seen as the next before the next is", []news{turned("c", HealthDown), look("c", RolePrimary, 1, 1, 0), turned("a", HealthDown), turned("c", HealthDown),
			look("c", RolePrimary, 1, 2, 0), look("b", RolePrimary, 1, 2, 0)},
			"reads:b writes:b replicas: any:b primary:b rivals:c fallback settled"},
		{"two strangers dispute, and a replica follows their timeline", []news{turned("c", HealthDown), turned("d", HealthDown), look("c", RolePrimary, 1, 2, 0), look("d", RolePrimary, 1, 2, 0), look("b", RoleReplica, 1, 2, 2)},
			"reads:b writes: replicas:b any:b primary: rivals:a,c,d settled split"},
		{"a stranger claims a timeline beyond the one that a replica follows", []news{turned("c", HealthDown), look("b", RoleReplica, 1, 2, 2), look("c", RolePrimary, 1, 3, 0)},
			"reads:b writes: replicas:b any:b primary: rivals:a,c settled split"},
		{"a replica that had strayed is rebuilt", []news{lookAt("c", RoleReplica, 1, 1, 1), lookAt("c", RoleReplica, 1, 2, 2), lookAt("c", RoleReplica, 2, 1, 1)},
			"reads:b,c writes:a replicas:b,c any:b,c,a primary:a settled"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			names := []string{"a", "b", "c"}
			if slices.ContainsFunc(tc.news, func(n news) bool { return n.of == "d" }) {
				names = append(names, "d")
			}
			require.Equal(t, tc.want, listsOf(tell(freshTopology(names...), append(start[:2:2], tc.news...)...)))
		})
	}
	// One server answers in time, and it is the stranger.
	top := tell(freshTopology("a", "b", "c"), look("c", RolePrimary, 2, 1, 0), settleNow, look("a", RolePrimary, 1, 1, 0), look("b", RoleReplica, 1, 1, 1))
	require.Equal(t, "reads:b writes:a replicas:b any:b,a primary:a settled", listsOf(top))
}

// Who was primary for a while leaves an open transaction behind, whoever is elected when.
func TestAnEarlierPrimaryIsCutOnceItIsKnownToBeReplaced(t *testing.T) {
	t.Parallel()
	start := []news{look("a", RolePrimary, 1, 1, 0), look("b", RoleReplica, 1, 1, 1), turned("c", HealthDown), turned("d", HealthDown)}
	for name, news := range map[string][]news{
		"by one of two":  {look("c", RolePrimary, 1, 2, 0), look("d", RolePrimary, 1, 2, 0), turned("d", HealthDown), look("b", RoleReplica, 1, 2, 2)},
		"as a stranger":  {look("b", RoleReplica, 2, 1, 1), look("c", RolePrimary, 2, 1, 0)},
		"as an impostor": {look("b", RoleReplica, 2, 1, 1), look("c", RoleReplica, 2, 1, 1)},
	} {
		top := tell(freshTopology("a", "b", "c", "d"), start...)
		if name != "by one of two" { // it alone had answered
			top = tell(freshTopology("a", "b", "c", "d"), start[0], settleNow)
		}
		first := top.primary
		require.Equal(t, "a", first.called())
		cut := false
		for _, n := range news {
			next := tell(top, n)
			cut = cut || top.primary == first && next.replaced(first)
			top = next
		}
		require.True(t, cut, name)
	}
}

// at is a look at a server of cluster 1 by the name of another.
func at(of string, n news) news {
	n.of = of
	return n
}

// One server under several names is one: it votes, claims and is drawn once.
func TestOneServerUnderTwoNames(t *testing.T) {
	t.Parallel()
	primary, replica := lookAt("a", RolePrimary, 10, 1, 0), lookAt("c", RoleReplica, 11, 1, 1)
	for _, tc := range []struct {
		name string
		news []news
		want string
	}{
		{"the primary", []news{primary, at("b", primary), replica},
			"reads:c writes:a replicas:c any:c,a primary:a settled"},
		{"the primary, and nobody else", []news{primary, at("b", primary), turned("c", HealthDown)},
			"reads:a writes:a replicas: any:a primary:a fallback settled"},
		{"a copy of it, as it was told apart", []news{primary, {"b", observation{role: RolePrimary, health: HealthUp, system: 1, timeline: 1, server: server{1, 10, 2}, at: "b"}}, replica},
			"reads:c writes: replicas:c any:c primary: rivals:a,b settled split"},
		{"a replica", []news{primary, replica, at("b", replica)},
			"reads:b writes:a replicas:b any:b,a primary:a settled"},
		{"the other name when one fails", []news{primary, at("b", primary), replica, turned("a", HealthDown)},
			"reads:c writes:b replicas:c any:c,b primary:b settled"},
		{"... and it comes back", []news{primary, at("b", primary), replica, turned("a", HealthDown), turned("a", HealthUp)},
			"reads:c writes:b replicas:c any:c,b primary:b settled"},
		{"one name is drained: that is said of the server", []news{primary, replica, at("b", replica), turned("b", HealthUp), drains("b")},
			"reads:a writes:a replicas: any:a primary:a fallback settled"},
		{"the primary's is", []news{primary, at("b", primary), replica, drains("b")},
			"reads:c writes: replicas:c any:c primary:b settled"},
		{"another address of the same server", []news{primary, replica, turned("b", HealthDown), {"a", observation{server: primary.server, at: "another"}}},
			"reads:c writes:a replicas:c any:c,a primary:a settled"},
		{"two names of a stranger are one vote", []news{at("a", lookOf(2, 20)), at("b", lookOf(2, 20)), at("c", lookOf(1, 10))},
			"reads:a writes: replicas:a any:a primary: settled"},
		{"the primary's server by another name, when its own leads elsewhere", []news{primary, lookAt("b", RoleReplica, 12, 1, 1), replica, at("b", primary), at("a", lookAt("", RoleReplica, 12, 1, 1))},
			"reads:a,c writes:b replicas:a,c any:a,c,b primary:b settled"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			require.Equal(t, tc.want, listsOf(tell(freshTopology("a", "b", "c"), tc.news...)))
		})
	}
	top := tell(freshTopology("a", "b", "c"), primary, at("b", primary), replica)
	require.Equal(t, WhySameServer, top.members[1].unfit())
	b := top.members[1].peer
	for _, reads := range []bool{true, false} {
		chosen, _ := top.pick(&intent{place: placeNamed, reads: reads, peers: []*peer{b}}, &tried{})
		require.Same(t, b, chosen, "a call that names it goes there")
	}
}

// lookOf is a look at a replica of some cluster.
func lookOf(system uint64, started int64) news {
	n := look("", RoleReplica, system, 1, 1)
	n.server, n.at = server{system: system, started: started}, "there"
	return n
}

// A read port and a write port in front of one cluster: both lead to the promoted server for a moment.
func TestPortsThatMeetAtThePromotedServer(t *testing.T) {
	t.Parallel()
	for _, told := range []int64{0, 1} { // whether servers tell when they were started
		top := tell(freshTopology("w", "r"), lookAt("w", RolePrimary, told*10, 1, 0), lookAt("r", RoleReplica, told*11, 1, 1), turned("w", HealthDown))
		top = tell(top, lookAt("r", RolePrimary, told*11, 2, 0))
		require.Equal(t, "r", namesOf(top.writes))
		top = tell(top, lookAt("w", RolePrimary, told*11, 2, 0))
		require.Equal(t, "r", namesOf(top.writes))
		top = tell(top, lookAt("r", RoleReplica, told*12, 2, 2))
		require.Equal(t, "reads:r writes:w replicas:r any:r,w primary:w settled", listsOf(top))
	}
}

// An earlier server's word on which cluster this is does not count for ever.
func TestTheWordOfASilentServerAges(t *testing.T) {
	t.Parallel()
	upgraded := look("a", RolePrimary, 2, 1, 0)
	silent := news{"b", observation{health: HealthDown, aged: true}}
	start := []news{look("a", RolePrimary, 1, 3, 0), look("b", RoleReplica, 1, 3, 3)}
	for _, tc := range []struct {
		name string
		news []news
		want string
	}{
		{"one that is down has its word", []news{turned("b", HealthDown), upgraded}, ""},
		{"one that has been for long has not", []news{turned("b", HealthDown), upgraded, silent}, "a"},
		{"... whenever it began", []news{silent, upgraded}, "a"},
		{"... not against who never was the primary", []news{{"a", observation{health: HealthDown, aged: true}}, look("b", RolePrimary, 2, 1, 0)}, ""},
		{"... and has it again when it answers", []news{silent, look("b", RoleReplica, 1, 3, 3), upgraded}, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			require.Equal(t, tc.want, namesOf(tell(freshTopology("a", "b"), append(start[:2:2], tc.news...)...).writes))
		})
	}
}

// A timeline that nobody shows any more is dropped by evidence, or by the operator.
func TestATimelineIsDroppedByEvidenceOnly(t *testing.T) {
	t.Parallel()
	forget := func(of string) news { return news{"", observation{forgets: of}} }
	start := []news{lookAt("a", RolePrimary, 1, 1, 0), lookAt("b", RoleReplica, 2, 1, 1), lookAt("c", RoleReplica, 3, 1, 1),
		lookAt("b", RolePrimary, 2, 2, 0)} // a promotion by mistake
	back := lookAt("b", RoleReplica, 9, 1, 1)
	elsewhere := back
	elsewhere.at = "elsewhere"
	dumb := lookAt("b", RoleReplica, 9, 0, 1)
	again := lookAt("c", RoleReplica, 3, 1, 1)
	for _, tc := range []struct {
		name string
		news []news
		want string
	}{
		{"its server is back, and all have told since", []news{back}, "a"},
		{"its server is gone", []news{turned("b", HealthDown)}, ""},
		{"another is silent", []news{turned("c", HealthDown), back}, ""},
		{"... and is back", []news{turned("c", HealthDown), back, again}, "a"},
		{"another follows it", []news{lookAt("c", RoleReplica, 3, 2, 2), back}, ""},
		{"its name leads elsewhere", []news{elsewhere}, ""},
		{"it does not tell", []news{dumb}, ""},
		{"it is another server, which runs for longer", []news{lookAt("b", RoleReplica, 1, 1, 1)}, ""},
		{"discovery has left it out", []news{{"b", observation{leaves: true}}}, ""},
		{"the operator has removed it", []news{{"b", observation{leaves: true, forgets: "b"}}}, "a"},
		{"the operator has it forgotten", []news{turned("b", HealthDown), forget("b")}, "a"},
		{"... while it shows it", []news{forget("b")}, "b"},
		{"... and it comes back with it", []news{turned("b", HealthDown), forget("b"), lookAt("b", RolePrimary, 2, 2, 0)}, ""},
		{"... another's", []news{turned("b", HealthDown), forget("c")}, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			require.Equal(t, tc.want, namesOf(tell(freshTopology("a", "b", "c"), append(start[:4:4], tc.news...)...).writes))
		})
	}
}

// What the others told before the server was back says nothing: they may have followed it since.
func TestATimelineIsNotDroppedByEarlierLooks(t *testing.T) {
	t.Parallel()
	top := tell(freshTopology("a", "b", "c"), lookAt("a", RolePrimary, 1, 1, 0), lookAt("b", RoleReplica, 2, 1, 1), lookAt("c", RoleReplica, 3, 1, 1),
		lookAt("b", RolePrimary, 2, 2, 0))
	top = tellAlone(top, lookAt("b", RoleReplica, 9, 1, 1))
	require.Empty(t, top.writes)
	top = tellAlone(top, looked("a"))
	require.Empty(t, top.writes)
	require.Empty(t, tell(top, lookAt("c", RoleReplica, 3, 2, 2)).writes)
	require.Equal(t, "a", namesOf(tell(top, lookAt("c", RoleReplica, 3, 1, 1)).writes))
	gone := tell(top, news{"b", observation{leaves: true}}, lookAt("c", RoleReplica, 3, 1, 1))
	require.Empty(t, gone.writes, "what discovery has left out may have more than it told last")
}

// Two failovers to one timeline: who was not seen beside the first when that fell silent takes over.
func TestTwoFailoversToOneTimeline(t *testing.T) {
	t.Parallel()
	start := []news{lookAt("a", RolePrimary, 1, 1, 0), lookAt("b", RoleReplica, 2, 1, 1), lookAt("c", RoleReplica, 3, 1, 1),
		turned("a", HealthDown), lookAt("b", RolePrimary, 2, 2, 0)}
	second := lookAt("c", RolePrimary, 3, 2, 0)
	top := tell(freshTopology("a", "b", "c"), start...)
	require.Equal(t, "b", namesOf(top.writes))

	hanging := tellAlone(top, second) // b gives no look any more, and has not been judged
	require.Equal(t, "b", namesOf(hanging.writes))
	hanging = tell(hanging, turned("b", HealthDown))
	require.Equal(t, "reads:c writes:c replicas: any:c primary:c fallback settled", listsOf(hanging))
	require.Equal(t, "c", namesOf(tell(hanging, turned("b", HealthUp)).writes), "who was elected stays")

	beside := tell(tell(top, second), turned("b", HealthDown))
	require.True(t, beside.split, "it was seen beside the first: nothing tells who is right")
	require.Equal(t, "c", namesOf(tell(beside, news{"", observation{forgets: "b"}}).writes))
}

// Nobody is elected before all who answer have been looked at since he claims it, or the time for that is over.
func TestAClaimIsHeldAgainstLooksThatBeganAfterIt(t *testing.T) {
	t.Parallel()
	top := tell(freshTopology("a", "b", "c"), lookAt("a", RolePrimary, 1, 1, 0), lookAt("b", RoleReplica, 2, 1, 1), lookAt("c", RoleReplica, 3, 1, 1), turned("a", HealthDown))
	early := lookAt("c", RoleReplica, 3, 1, 1)
	early.asked = instant(ticks.Add(1))
	claimed := tellAlone(top, lookAt("b", RolePrimary, 2, 2, 0))
	require.Equal(t, "b", claimed.heir.called())
	require.Empty(t, claimed.writes)
	require.Empty(t, tellAlone(claimed, early).writes, "it began before")
	require.Empty(t, tellAlone(claimed, news{"c", observation{health: HealthSuspect}}).writes)
	require.Equal(t, "b", namesOf(tellAlone(claimed, lookAt("c", RoleReplica, 3, 1, 1)).writes))
	require.Equal(t, "b", namesOf(tellAlone(claimed, turned("c", HealthDown)).writes))
	require.Equal(t, "b", namesOf(tellAlone(claimed, news{"", observation{over: claimed.waitsSince()}}).writes))
	require.Empty(t, tellAlone(claimed, lookAt("c", RoleReplica, 3, 3, 3)).writes, "there is a newer one")

	back := tellAlone(top, turned("a", HealthUp)) // the primary itself, as another may have been promoted meanwhile
	require.Empty(t, back.writes)
	require.Equal(t, "a", namesOf(tell(back, looked("b"), looked("c")).writes))
}
