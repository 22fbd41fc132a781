package multipool

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"strconv"
	"strings"
	"testing"
)

// The topology against a model of what every server truly is: sequences of looks, names that move, promotions, restores,
// copies, discovery, time, stops and restarts of the process, drawn from a seed or by the fuzzer.
//
//	MULTIPOOL_MODEL_RUNS=1000000 go test -run TestTheTopologyAgainstAModel -timeout 1h .

// lots gives the numbers by which a run is drawn.
type lots interface{ draw(n int) int }

type seeded struct{ *rand.Rand }

func (s seeded) draw(n int) int { return s.IntN(n) }

// given is lots from the fuzzer's bytes; zeroes when they have been used.
type given struct{ left []byte }

func (g *given) draw(n int) int {
	if len(g.left) == 0 {
		return 0
	}
	b := g.left[0]
	g.left = g.left[1:]
	return int(b) % n
}

// trueServer is what a server is.
type trueServer struct {
	server
	role     Role
	timeline uint32
	shut     bool   // its role is told no timeline: it has no rights of pg_monitor
	up       bool   // answers
	shown    uint32 // the timeline that the pool knows it to have; 0 if there is none
}

// trueName is where a name leads, and what the pool's monitor knows of it.
type trueName struct {
	peer    *peer
	moves   bool // its address is another where it leads to another server
	home    int  // where it leads when all is well
	leads   int
	gone    bool // discovery has left it out
	looking *trueLook
	misses  int
	missing instant
}

type trueLook struct {
	asked instant
	seen  observation
	of    *trueServer
	lost  bool
}

type world struct {
	lots
	names   []*trueName
	servers []*trueServer
	now     instant
	born    int64
	top     *topology
	log     []string
}

const second = instant(1e9)

func newWorld(c lots) *world {
	w := &world{lots: c, now: 1}
	for i := range 2 + c.draw(3) {
		s := &trueServer{server: server{system: 1, started: w.start()}, role: RoleReplica, timeline: 1, up: true, shut: c.draw(12) == 0}
		if i == 0 {
			s.role = RolePrimary
		}
		w.servers = append(w.servers, s)
		p := idlePeers(string(rune('a' + i)))[0]
		n := &trueName{peer: p, home: i, leads: i}
		switch c.draw(8) {
		case 0:
			p.proxy = true
		case 1, 2:
			n.moves = true
		}
		w.names = append(w.names, n)
	}
	for range c.draw(6) / 4 { // another name of the first
		w.names = append(w.names, &trueName{peer: idlePeers("z")[0]})
	}
	w.restart()
	return w
}

func (w *world) start() int64 { w.born++; return w.born }

// restart begins the process anew.
func (w *world) restart() {
	var peers []*peer
	for _, n := range w.names {
		n.looking, n.misses = nil, 0
		if !n.gone {
			peers = append(peers, n.peer)
		}
	}
	for _, s := range w.servers {
		s.shown = 0
	}
	w.top = newTopology(ModeReplicated, peers, make([]Role, len(peers)))
}

func (w *world) note(format string, args ...any) {
	w.log = append(w.log, fmt.Sprintf("%6.2f ", float64(w.now)/1e9)+fmt.Sprintf(format, args...))
}

// begin begins a look, which shows what there is now and tells it later.
func (w *world) begin(n *trueName) {
	s := w.servers[n.leads]
	o := observation{peer: n.peer, asked: w.now, full: true, health: HealthUp, role: s.role, system: s.system, server: s.server, at: n.peer.name}
	if n.moves {
		o.at += strconv.Itoa(n.leads)
	}
	switch {
	case s.role == RolePrimary:
		o.timeline = s.timeline
	case s.shut:
		o.alone, o.shown = true, s.timeline
	default:
		o.timeline, o.shown = s.timeline, s.timeline
	}
	n.looking = &trueLook{asked: w.now, seen: o, of: s, lost: !s.up}
	copied := *s
	n.looking.of = s
	n.looking.seen.server = copied.server
}

// end ends a look.
func (w *world) end(n *trueName) {
	l := n.looking
	n.looking = nil
	if n.gone {
		return
	}
	if l.lost {
		n.misses++
		if n.misses == 1 {
			n.missing = w.now
		}
		aged := n.misses >= silentLooks && w.now-n.missing >= 60*second
		w.hear(observation{peer: n.peer, health: HealthDown, aged: aged, came: w.now})
		return
	}
	n.misses = 0
	l.seen.came = w.now
	w.hear(l.seen)
	// What the pool has taken in is known, as long as the server truly has it.
	if l.of.server == l.seen.server && l.of.timeline == max(l.seen.timeline, l.seen.shown) && w.top.timeline >= l.of.timeline {
		l.of.shown = l.of.timeline
	}
}

// hear has the pool take news in, and tests what holds of every topology.
func (w *world) hear(o observation) {
	was := w.top
	w.top = was.apply(o)
	if o.forgets != "" {
		w.note("forget %s -> %s marks %+v", o.forgets, listsOf(w.top), w.top.marks)
	}
	if o.peer != nil && w.top != was {
		w.note("%s: %s%s tl %d/%d -> %s tl %d", o.peer.name, o.role, o.health, o.timeline, o.shown, listsOf(w.top), w.top.timeline)
	}
	if w.top.system != was.system {
		for _, s := range w.servers {
			s.shown = 0
		}
	}
}

// check returns what must not be; "" if all is well.
func (w *world) check() string {
	if len(w.top.writes) > 1 {
		return "two primaries"
	}
	for _, p := range w.top.writes {
		m := w.top.member(p)
		for _, s := range w.servers {
			if s.system == w.top.system && s.shown > m.timeline {
				return fmt.Sprintf("%s is written to on timeline %d, while server %d is known to have %d", p.name, m.timeline, s.started, s.shown)
			}
		}
	}
	drawn := map[server]bool{}
	for _, p := range w.top.anyone {
		m := w.top.member(p)
		if m.server.started != 0 && drawn[m.server] {
			return "one server is drawn by two names"
		}
		drawn[m.server] = true
	}
	return ""
}

// become makes a server another incarnation: started anew, in another role or on another timeline.
func (s *trueServer) become(w *world, role Role, timeline uint32) {
	if timeline != s.timeline {
		s.shown = 0
	}
	s.server.started, s.role, s.timeline = w.start(), role, timeline
}

// step does one thing.
func (w *world) step() {
	w.now += instant(w.draw(20)) * second / 10
	n := w.names[w.draw(len(w.names))]
	s := w.servers[w.draw(len(w.servers))]
	other := w.servers[w.draw(len(w.servers))]
	switch w.draw(40) {
	case 0: // a promotion
		if s.up && s.role == RoleReplica {
			s.role, s.shown = RolePrimary, 0
			s.timeline++
			w.note("server %d is promoted to %d", s.started, s.timeline)
		}
	case 1, 2:
		s.up = false
		w.note("server %d is silent", s.started)
	case 3, 4, 5:
		s.up = true
		w.note("server %d answers", s.started)
	case 6: // crash and restart
		s.become(w, s.role, s.timeline)
		w.note("restarted as %d", s.started)
	case 7, 8: // rebuilt as a standby
		if s != other && s.system == other.system {
			s.become(w, RoleReplica, other.timeline)
			s.up = true
			w.note("rebuilt as %d of %d on %d", s.started, other.started, s.timeline)
		}
	case 9: // restored from a snapshot, in its role
		if s.timeline > 1 {
			s.become(w, s.role, s.timeline-1)
			w.note("restored as %d on %d", s.started, s.timeline)
		}
	case 10: // a name moves
		if n.moves || n.peer.proxy {
			n.leads = w.draw(len(w.servers))
			w.note("%s leads to %d", n.peer.name, w.servers[n.leads].started)
		}
	case 11: // a copy, of a running machine or of its disk, at a name that moves
		if n.moves && len(w.servers) < 7 {
			c := *s
			c.shown = 0
			if w.draw(2) == 0 {
				c.server.copy = int32(len(w.servers))
			} else {
				c.server.started = w.start()
			}
			w.servers = append(w.servers, &c)
			n.leads = len(w.servers) - 1
			w.note("%s leads to a copy %d of %d", n.peer.name, c.started, s.started)
		}
	case 12: // discovery
		if n.gone = !n.gone; n.gone {
			w.hear(observation{peer: n.peer, leaves: true, came: w.now})
			w.note("%s is gone", n.peer.name)
		} else {
			w.hear(observation{peer: n.peer, joins: true, came: w.now})
			w.note("%s is back", n.peer.name)
		}
	case 13: // the process is stopped
		w.now += instant(w.draw(300)) * second
		w.note("stopped")
	case 14:
		if w.draw(4) == 0 {
			w.restart()
			w.note("restart")
		}
	case 15:
		w.hear(observation{settle: true, came: w.now})
	case 16:
		w.hear(observation{over: w.top.waitsSince(), came: w.now})
	default:
		if n.looking == nil {
			w.begin(n)
		} else {
			w.end(n)
		}
	}
}

// round looks at every name once.
func (w *world) round() {
	for _, n := range w.names {
		w.begin(n)
	}
	w.now += second / 100
	for _, n := range w.names {
		w.end(n)
	}
	w.now += second
}

// end of a run: what has to come of it within two minutes.
type conclusion int

const (
	promoted  conclusion = iota // one is promoted beyond whatever was, and the others follow it
	restored                    // all are restored to the first timeline
	forgotten                   // ... and what was shown is forgotten by the operator
)

// heal brings the servers into order, and returns the server that writes should go to, nil if they should go nowhere.
func (w *world) heal(e conclusion) *trueServer {
	best := w.servers[w.names[w.draw(len(w.names))].home]
	highest := uint32(0)
	for _, s := range w.servers {
		highest = max(highest, s.timeline)
	}
	for _, k := range w.top.marks {
		highest = max(highest, k.timeline)
	}
	to := highest + 1
	if e != promoted {
		to = 1
	}
	told := true
	for _, n := range w.names {
		told = told && !n.peer.proxy && !n.moves
		n.leads, n.looking = n.home, nil
		if n.gone {
			n.gone = false
			w.hear(observation{peer: n.peer, joins: true, came: w.now})
		}
	}
	for _, s := range w.servers {
		role := RoleReplica
		if s == best {
			role = RolePrimary
		}
		s.become(w, role, to)
		s.up, s.shut = true, false
	}
	w.note("healed, %d: server %d is the primary of %d", e, best.started, to)
	if e == restored && !told {
		return nil
	}
	if e == forgotten {
		w.round() // nobody shows it any more
		for _, k := range w.top.marks {
			w.hear(observation{forgets: k.name, came: w.now})
		}
	}
	return best
}

// play plays a run, and returns what was wrong with it.
func play(c lots, steps int) (w *world, wrong string) {
	w = newWorld(c)
	for range steps {
		w.step()
		if wrong := w.check(); wrong != "" {
			return w, wrong
		}
	}
	want := w.heal(conclusion(w.draw(3)))
	for range 100 {
		w.round()
		if wrong := w.check(); wrong != "" {
			return w, wrong
		}
		if want != nil && w.writesTo() == want {
			return w, ""
		}
	}
	if want != nil {
		return w, fmt.Sprintf("server %d is not written to two minutes after all is well: %s, marks %+v", want.started, listsOf(w.top), w.top.marks)
	}
	return w, ""
}

func (w *world) writesTo() *trueServer {
	for _, p := range w.top.writes {
		for _, n := range w.names {
			if n.peer == p {
				return w.servers[n.leads]
			}
		}
	}
	return nil
}

func TestTheTopologyAgainstAModel(t *testing.T) {
	t.Parallel()
	runs := map[bool]int{false: 2000, true: 800}[raceEnabled]
	if n, ok := envNumber(t, "MULTIPOOL_MODEL_RUNS"); ok {
		runs = n
	}
	const workers = 2
	t.Run("all", func(t *testing.T) {
		for k := range workers {
			t.Run(strconv.Itoa(k), func(t *testing.T) {
				t.Parallel()
				for i := range runs / workers {
					seed := uint64(i*workers + k)
					if w, wrong := play(seeded{rand.New(rand.NewPCG(seed, 11))}, 60); wrong != "" {
						t.Fatalf("seed %d: %s\n%s", seed, wrong, strings.Join(w.log, "\n"))
					}
				}
			})
		}
	})
}

func FuzzTheTopologyAgainstAModel(f *testing.F) {
	for seed := range uint64(8) {
		dice := rand.New(rand.NewPCG(seed, 12))
		var b []byte
		for range 32 {
			b = binary.LittleEndian.AppendUint64(b, dice.Uint64())
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, drawn []byte) {
		steps := min(len(drawn)/5, 300)
		if w, wrong := play(&given{drawn}, steps); wrong != "" {
			t.Fatalf("%s\n%s", wrong, strings.Join(w.log, "\n"))
		}
	})
}
