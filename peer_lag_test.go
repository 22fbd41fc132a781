package multipool

import (
	"context"
	"math/rand/v2"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/pgmultipool/multipool/internal/pgfake"
)

func TestALagIsReadAsItIsWritten(t *testing.T) {
	t.Parallel()
	for _, l := range []Lag{{}, {Bytes: 1}, {Time: time.Second}, {Bytes: 16 << 20, Time: 90 * time.Second}} {
		read, err := parseLag(l.String())
		require.NoError(t, err)
		if !l.bounds() {
			require.False(t, read.bounds())
			continue
		}
		require.Equal(t, l, read)
	}
}

func FuzzParseLag(f *testing.F) {
	for _, s := range []string{"", "0", "10s", "16MB", "16MB,10s", "1s,1s", "-1B", "5", ",", "kB"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		l, err := parseLag(s)
		if err != nil || !l.bounds() {
			return
		}
		again, err := parseLag(l.String())
		require.NoError(t, err)
		require.Equal(t, l, again)
	})
}

func TestAnLSNIsReadAsItIsWritten(t *testing.T) {
	t.Parallel()
	for _, text := range []string{"0/1", "0/841D58", "16/B374D848", "FFFFFFFF/FFFFFFFF"} {
		require.Equal(t, text, parseLSN(text).String())
	}
	for _, text := range []string{"", "1", "/", "0/", "0/1/2", "x/1", "1FFFFFFFF/0"} {
		require.Zero(t, parseLSN(text), text)
	}
}

// A standby that has replayed everything stays before the header of a page that has no record yet.
func TestAPositionBehindAHeaderIsReplayedBeforeIt(t *testing.T) {
	t.Parallel()
	require.Equal(t, lsn(0x4000000), lsn(0x4000028).replayable(), "at the beginning of a segment")
	require.Equal(t, lsn(0x4002000), lsn(0x4002018).replayable(), "at the beginning of a page")
	require.Equal(t, lsn(0x4002020), lsn(0x4002020).replayable())
	require.Equal(t, lsn(0x4006028), lsn(0x4006028).replayable(), "a record that ends there")
	require.Equal(t, lsn(0x4002000), lsn(0x4002000).replayable())
}

// What may stand behind a header is where a record ended, too: at a megabyte that begins no segment, as 15 of 16 do not by
// PostgreSQL's default. A replica that has replayed it is not ahead.
func TestAReplicaIsNeverAheadOfWhatItsPrimaryTold(t *testing.T) {
	t.Parallel()
	primary := idlePeers("a")[0]
	for told, replayed := range map[lsn]lsn{
		0x4100028: 0x4100028, 0x4000028: 0x4000000, 0x4100018: 0x4100000, 0x4102018: 0x4102000, 0x4102028: 0x4102028,
	} {
		var s sight
		require.NoError(t, s.read([][][]byte{{[]byte("f"), []byte("1"), []byte(told.String()), []byte("f"), nil, nil, nil, nil, nil}}))
		var p positions
		p.note(primary, 1, s.position, tick, tick)
		p.note(primary, 1, s.position, 3*tick, 3*tick)
		d := p.measure(replay{replayed, 4 * tick, 4 * tick}, replay{replayed, 2 * tick, 2 * tick})
		require.Equal(t, distance{known: true, fresh: 3 * tick, reign: 1, at: 3 * tick}, d, told)
		require.Positive(t, p.measure(replay{replayed - 64, 4 * tick, 4 * tick}, replay{}).bytes, told)
	}
}

const tick = time.Second

// wrote notes a position of the primary's for every second from the first on.
func wrote(p *positions, of *peer, timeline uint32, all ...lsn) {
	for i, position := range all {
		at := time.Duration(i+1) * tick
		p.note(of, timeline, position, at, at+time.Millisecond)
	}
}

func TestADistanceIsMeasuredAgainstThePrimarysOwnPositions(t *testing.T) {
	t.Parallel()
	primary := idlePeers("a")[0]
	var p positions
	require.Equal(t, distance{fresh: -1}, p.measure(replay{100, tick, tick}, replay{}), "nothing to compare with")
	wrote(&p, primary, 1, 1000, 2000, 2000, 3000) // seconds 1 to 4
	for _, tc := range []struct {
		name   string
		now    replay
		before replay
		want   distance
	}{
		{"caught up", replay{3000, 5 * tick, 5 * tick}, replay{}, distance{known: true, fresh: 4 * tick}},
		{"ahead of the last look, which is a second old", replay{3500, 5 * tick, 5 * tick}, replay{}, distance{known: true, fresh: 4 * tick}},
		{"behind by one position", replay{2500, 5 * tick, 5 * tick}, replay{},
			distance{known: true, bytes: 500, lacks: tick - time.Millisecond, fresh: 3 * tick}},
		{"behind by a position that stood for a while", replay{1999, 5 * tick, 5 * tick}, replay{},
			distance{known: true, bytes: 1001, lacks: 3*tick - time.Millisecond, fresh: tick}},
		{"behind all that is known", replay{10, 5 * tick, 5 * tick}, replay{},
			distance{known: true, bytes: 2990, lacks: 4*tick - time.Millisecond, fresh: -1}},
		{"it was ahead before the primary was looked at", replay{3600, 5 * tick, 5 * tick}, replay{3500, 3 * tick, 3 * tick},
			distance{known: true, fresh: 4 * tick, ahead: true}},
		{"... or only seemed to be", replay{3600, 5 * tick, 5 * tick}, replay{3500, 4*tick + 1, 4*tick + 1},
			distance{known: true, fresh: 4 * tick}},
		{"what the primary wrote while it answered does not count", replay{1000, tick + tick/2, 5 * tick}, replay{}, distance{known: true, fresh: tick}},
		{"it does not tell its position", replay{0, 5 * tick, 5 * tick}, replay{}, distance{fresh: -1}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			d := p.measure(tc.now, tc.before)
			require.Equal(t, tc.now.position > tc.before.position && tc.want.known, d.moved)
			d.moved, d.at, d.reign = false, 0, 0
			require.Equal(t, tc.want, d)
		})
	}
}

func TestPositionsOfDifferentHistoriesAreNotCompared(t *testing.T) {
	t.Parallel()
	peers := idlePeers("a", "b")
	for name, next := range map[string]func(*positions){
		"another primary":        func(p *positions) { p.note(peers[1], 1, 500, 9*tick, 9*tick) },
		"another timeline":       func(p *positions) { p.note(peers[0], 2, 500, 9*tick, 9*tick) },
		"a way back after crash": func(p *positions) { p.note(peers[0], 1, 500, 9*tick, 9*tick) },
	} {
		var p positions
		wrote(&p, peers[0], 1, 1000, 2000)
		next(&p)
		d := p.measure(replay{500, 10 * tick, 10 * tick}, replay{})
		d.reign = 0
		assert.Equal(t, distance{known: true, fresh: 9 * tick, moved: true, at: 9 * tick}, d, name)
	}
}

// However long it goes on, what is kept is bounded, the youngest positions are exact, and old ones are right if coarse.
func TestOldPositionsAreThinnedOut(t *testing.T) {
	t.Parallel()
	primary := idlePeers("a")[0]
	var p positions
	const seconds = 10_000
	for i := range seconds {
		at := time.Duration(i) * tick
		p.note(primary, 1, lsn(1000*i+1), at, at)
	}
	require.LessOrEqual(t, len(p.samples), maxSamples)
	now := time.Duration(seconds) * tick
	for _, back := range []int{1, 10, 100, 1000, 9000} {
		d := p.measure(replay{lsn(1000*(seconds-back) + 1), now, now}, replay{})
		require.LessOrEqual(t, d.lacks, time.Duration(back)*tick, "never more than it is")
		require.GreaterOrEqual(t, d.lacks, time.Duration(back)*tick*8/10-tick, "and not far less")
		require.EqualValues(t, 1000*(back-1), d.bytes)
	}
}

func TestWhatIsKnownToBeFreshIsFresh(t *testing.T) {
	t.Parallel()
	primary := idlePeers("a")[0]
	dice := rand.New(rand.NewPCG(5, 6))
	for range 2000 {
		// A primary that writes at random, and the truth about when every position was there.
		var p positions
		var at time.Duration
		position := lsn(1)
		written := map[lsn]time.Duration{position: 0}
		for range 1 + dice.IntN(600) {
			at += time.Duration(1+dice.IntN(1000)) * time.Millisecond
			if dice.IntN(3) > 0 {
				position += lsn(1 + dice.IntN(1000))
				written[position] = at
			}
			if dice.IntN(2) == 0 {
				p.note(primary, 1, position, at, at)
			}
		}
		replayed := lsn(1 + dice.IntN(int(position)))
		d := p.measure(replay{replayed, at, at}, replay{})
		if !d.known || d.fresh < 0 {
			continue
		}
		for position, when := range written {
			if when <= d.fresh {
				require.LessOrEqual(t, position, replayed, "all that was there at that time is shown")
			}
		}
	}
}

func TestFitnessIsJudgedByLooksAndBounds(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name string
		d    distance
		s    sight
		max  Lag
		was  fitness
		want fitness
	}{
		{"all is well", distance{known: true}, sight{}, Lag{Bytes: 10}, fitUnsaid, fitFit},
		{"no bound", distance{known: true, bytes: 1 << 40, lacks: time.Hour}, sight{}, Lag{}, fitFit, fitFit},
		{"bytes at the bound", distance{known: true, bytes: 10}, sight{}, Lag{Bytes: 10}, fitFit, fitFit},
		{"bytes beyond it", distance{known: true, bytes: 11}, sight{}, Lag{Bytes: 10}, fitFit, fitBehind},
		{"time at the bound", distance{known: true, bytes: 1, lacks: tick}, sight{}, Lag{Time: tick}, fitFit, fitFit},
		{"time beyond it", distance{known: true, bytes: 1, lacks: tick + 1}, sight{}, Lag{Time: tick}, fitFit, fitBehind},
		{"either bound", distance{known: true, bytes: 1, lacks: tick + 1}, sight{}, Lag{Bytes: 10, Time: tick}, fitFit, fitBehind},
		{"not yet well within it", distance{known: true, bytes: 9}, sight{}, Lag{Bytes: 10}, fitBehind, fitBehind},
		{"well within it again", distance{known: true, bytes: 8}, sight{}, Lag{Bytes: 10}, fitBehind, fitFit},
		{"replay paused", distance{known: true}, sight{paused: true}, Lag{}, fitFit, fitPaused},
		{"no receiver, and nothing to receive", distance{known: true}, sight{alone: true}, Lag{}, fitFit, fitFit},
		{"it does not move", distance{known: true, bytes: 1, stuck: stuckLooks, lacks: stuckTime}, sight{}, Lag{}, fitFit, fitCutOff},
		{"... for a moment", distance{known: true, bytes: 1, stuck: stuckLooks, lacks: stuckTime - 1}, sight{}, Lag{}, fitFit, fitFit},
		{"... at a look or two", distance{known: true, bytes: 1, stuck: stuckLooks - 1, lacks: stuckTime}, sight{}, Lag{}, fitFit, fitFit},
		{"... and is beyond the bound", distance{known: true, bytes: 9, stuck: stuckLooks, lacks: stuckTime}, sight{}, Lag{Bytes: 8}, fitFit, fitBehind},
		{"no receiver, and something to receive", distance{known: true, bytes: 1}, sight{alone: true}, Lag{}, fitFit, fitCutOff},
		{"no receiver, and it goes on from an archive", distance{known: true, bytes: 1, moved: true}, sight{alone: true}, Lag{}, fitFit, fitFit},
		{"no receiver, and nothing is known of the primary", distance{}, sight{alone: true}, Lag{}, fitFit, fitFit},
		{"ahead of its primary", distance{known: true, ahead: true}, sight{paused: true}, Lag{}, fitFit, fitAstray},
	} {
		t.Run(tc.name, func(t *testing.T) {
			require.Equal(t, tc.want, tc.d.judge(tc.s, tc.max, tc.was))
		})
	}
}

func TestABoundIsKeptOnlyByWhatIsKnown(t *testing.T) {
	t.Parallel()
	var b behind
	b.forget()
	require.False(t, b.within(Lag{Bytes: 1 << 50}, 0))
	require.False(t, b.within(Lag{Time: time.Hour}, tick))
	b.set(distance{known: true, bytes: 10, lacks: tick, fresh: 5 * tick, at: 5 * tick})
	require.True(t, b.within(Lag{Bytes: 10}, 6*tick))
	require.False(t, b.within(Lag{Bytes: 9}, 6*tick))
	require.False(t, b.within(Lag{Bytes: 10}, 7*tick), "what was measured long ago is not known")
	require.True(t, b.within(Lag{Time: tick}, 6*tick))
	require.False(t, b.within(Lag{Time: tick}, 6*tick+1), "time passes between looks")
	require.False(t, b.within(Lag{Bytes: 10, Time: tick}, 7*tick))
	b.set(distance{known: true, bytes: 10, fresh: -1})
	require.False(t, b.within(Lag{Time: time.Hour}, 0))
	b.set(distance{})
	_, _, known := b.last()
	require.False(t, known)
}

// Of many replicas one alone is within the bound; it is found, and nobody else is chosen.
func TestTheOneReplicaWithinABoundIsFound(t *testing.T) {
	t.Parallel()
	peers := idlePeers("a", "b", "c", "d", "e", "f", "g", "h")
	for _, p := range peers {
		p.behind.forget()
		p.role.Store(int32(RoleReplica))
	}
	in := intent{reads: true, reason: ReasonRead, fresh: freshness{max: Lag{Bytes: 100}}}
	for range 100 {
		require.Nil(t, in.draw(&roster{peers: peers}, &tried{}))
	}
	peers[5].behind.set(distance{known: true, at: 0})
	for range 100 {
		require.Same(t, peers[5], in.draw(&roster{peers: peers}, &tried{}))
	}
	peers[2].role.Store(int32(RolePrimary))
	chosen := map[string]bool{}
	for range 100 {
		chosen[in.draw(&roster{peers: peers}, &tried{}).name] = true
	}
	require.Equal(t, map[string]bool{"c": true, "f": true}, chosen, "the primary is never behind")
	in.reads = false
	for range 1000 {
		chosen[in.draw(&roster{peers: peers}, &tried{}).name] = true
	}
	require.Len(t, chosen, len(peers), "a bound is of reads")
}

func TestAReplicaThatMovesNowAndThenIsStuck(t *testing.T) {
	t.Parallel()
	const stands, moves, has = 's', 'm', 'h'
	for _, tc := range []struct {
		looks string
		want  int
	}{
		{"", 0}, {"ss", 2}, {"sss", 3}, {"ssssssssss", 2 * stuckLooks}, {"ssm", 1}, {"m", 0}, {"ssssssmmm", stuckLooks},
		{"ssssssmmmm", stuckLooks - 1}, {"sssh", 0}, {"ssshs", 1},
	} {
		d := distance{}
		for _, look := range tc.looks {
			was := d.stuck
			d = distance{known: true, bytes: 1, moved: look == moves}
			if look == has {
				d.bytes = 0
			}
			require.True(t, look == stands || look == moves || look == has)
			d.stands(was)
		}
		require.Equal(t, tc.want, d.stuck, tc.looks)
	}
}

// A replica that cannot follow, as it has what a failover has discarded: its receiver comes and goes, an ordinary role is told
// no timeline, and the primary has long been past it when the program starts.
func TestAReplicaThatNeverMovesCountsAsCutOff(t *testing.T) {
	bubble(t, 2, nil, func(ctx context.Context, x *fakes) {
		var head atomic.Uint64
		var follows atomic.Bool
		head.Store(1 << 20)
		look := func(seen func() sight) pgfake.Handler {
			return func(s pgfake.Statement) *pgfake.Response {
				if !asksLook(s) || s.Preparing {
					return answering(nil)(s)
				}
				return lookAnswer(s, seen())
			}
		}
		x.primary.Handle(look(func() sight {
			return sight{role: RolePrimary, system: 1, timeline: 2, position: lsn(head.Add(8192))}
		}))
		x.replicas[0].Handle(look(func() sight { return sight{role: RoleReplica, system: 1, position: lsn(head.Load())} }))
		x.replicas[1].Handle(look(func() sight {
			if follows.Load() {
				return sight{role: RoleReplica, system: 1, position: lsn(head.Load())}
			}
			return sight{role: RoleReplica, system: 1, position: 1 << 16}
		}))
		time.Sleep(time.Minute)
		settled()
		assert.Empty(t, x.peer("replica1").Unfit)
		assert.Equal(t, WhyCutOff, x.peer("replica2").Unfit)
		for range 20 {
			require.Equal(t, "replica1:5432", x.read(ctx))
		}
		follows.Store(true)
		time.Sleep(10 * time.Second)
		settled()
		assert.Empty(t, x.peer("replica2").Unfit)
	})
}
