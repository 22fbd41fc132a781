package multipool

import (
	"errors"
	"fmt"
	"math"
	"sort"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// Lag limits how far a replica may be behind the primary, or in [PeerStatus] is how far it was. Bytes counts the log
// that the replica has not replayed. Time is how long the primary has had something that the replica does not show. A
// zero field means no limit. In a [Route] the zero Lag is inherited, and a Time of [Off] means that there is no limit.
// Any other negative Time is an error.
//
// Both are measured against positions of the primary that the pool has read itself, not by a replica's clock or by what
// the replica has received. Those look good even on a replica that is cut off.
type Lag struct {
	Bytes uint64        `json:"bytes"`
	Time  time.Duration `json:"time_ns"`
}

// check returns what is wrong with the bound.
func (l Lag) check() error {
	if l.Time < 0 && l.Time != Off {
		return fmt.Errorf("its Time is %v: must be positive, 0, or Off", l.Time)
	}
	return nil
}

// bounds reports whether anything is bounded.
func (l Lag) bounds() bool { return l.Bytes > 0 || l.Time > 0 }

// String returns l in the form that the connection string key multipool_max_lag takes, such as "16777216B,10s", or "0".
func (l Lag) String() string {
	var parts []string
	if l.Bytes > 0 {
		parts = append(parts, strconv.FormatUint(l.Bytes, 10)+"B")
	}
	if l.Time > 0 {
		parts = append(parts, l.Time.String())
	}
	if len(parts) == 0 {
		return "0"
	}
	return strings.Join(parts, ",")
}

// sizes are PostgreSQL's units of memory (documentation, 20.1.1), longest first.
var sizes = []struct {
	unit  string
	bytes uint64
}{{"TB", 1 << 40}, {"GB", 1 << 30}, {"MB", 1 << 20}, {"kB", 1 << 10}, {"B", 1}}

var errLagSyntax = errors.New("must be a duration such as 10s, a size such as 16MB, or both with a comma between")

// parseLag is the reverse of Lag.String; "0" is no bound, said.
func parseLag(v string) (Lag, error) {
	if v == "0" {
		return Lag{Time: Off}, nil
	}
	var l Lag
	for part := range strings.SplitSeq(v, ",") {
		n, isSize, err := parseSize(part)
		switch {
		case err != nil:
			return Lag{}, err
		case isSize && l.Bytes == 0 && n > 0:
			l.Bytes = n
		case isSize:
			return Lag{}, errLagSyntax
		default:
			d, err := time.ParseDuration(part)
			if err != nil || d <= 0 || l.Time != 0 {
				return Lag{}, errLagSyntax
			}
			l.Time = d
		}
	}
	return l, nil
}

func parseSize(v string) (n uint64, isSize bool, err error) {
	for _, s := range sizes {
		digits, ok := strings.CutSuffix(v, s.unit)
		if !ok {
			continue
		}
		n, err := strconv.ParseUint(digits, 10, 64)
		if err != nil || n > math.MaxUint64/s.bytes {
			return 0, false, errLagSyntax
		}
		return n * s.bytes, true, nil
	}
	return 0, false, nil
}

// distance is how far a replica was behind the primary when it was looked at, by positions of the primary that were read
// before: at least so far.
type distance struct {
	known bool          // there is a position of the primary's to compare with
	bytes uint64        // log that the primary had and the replica had not replayed
	lacks time.Duration // how long the primary has had something that the replica does not show
	fresh time.Duration // the replica shows all that was there at this time of the pool's clock; -1: nothing is known
	ahead bool          // the replica had replayed what the primary did not have yet
	reign uint64        // of which primary; it counts them
	moved bool          // the replica has replayed something since the look before
	stuck int           // looks at which it lacked something and had not, less those at which it had
	at    time.Duration // when the position was read that it is measured by
}

// judge returns the fitness of a replica by what a look saw of it and how far it is behind. One that was left out for
// being behind comes back when it is within three quarters of the bound, so that it does not come and go.
func (d distance) judge(s sight, max Lag, was fitness) fitness {
	if was == fitBehind {
		max.Bytes, max.Time = max.Bytes-max.Bytes/4, max.Time-max.Time/4
	}
	switch {
	case d.ahead:
		return fitAstray
	case s.paused:
		return fitPaused
	case d.known && d.bytes > 0 && s.alone && !d.moved: // one that is fed from an archive moves
		return fitCutOff
	case max.Bytes > 0 && d.bytes > max.Bytes, max.Time > 0 && d.lacks > max.Time:
		return fitBehind
	case d.stuck >= stuckLooks && d.lacks >= stuckTime: // whatever its receiver does: it may not be able to follow
		return fitCutOff
	}
	return fitFit
}

// A replica that lacks something and has not moved at so many looks, and for so long, counts as cut off. It has to move at
// a few to be trusted again, unless it has all.
const (
	stuckLooks = 3
	stuckTime  = 5 * time.Second
)

// stands counts a look at a replica that lacks something: had is the count of the looks before.
func (d *distance) stands(had int) {
	switch {
	case !d.known || d.bytes == 0:
	case d.moved:
		d.stuck = max(had-1, 0)
	default:
		d.stuck = min(had+1, 2*stuckLooks)
	}
}

// positions is the primary's way through its log, as the looks have seen it. Times are the pool's own clock's.
type positions struct {
	mu       sync.Mutex
	of       *peer
	timeline uint32
	reign    uint64   // counts who was measured by
	samples  []sample // ascending
}

// sample is one position of the primary's, as it told it. What had been committed by the time last lies before it, and by
// the time first the primary was there.
type sample struct {
	position    lsn
	first, last time.Duration
}

// maxSamples is how many positions are kept. When they are full, those are dropped without which the gap is still less
// than a part of their age, so that a month needs about two hundred: what is asked is whether a replica is behind by
// more than a bound, and a long bound bears a coarse answer.
const (
	maxSamples = 256
	gapShare   = 12
)

func (p *positions) thinOut() {
	last := len(p.samples) - 1
	newest := p.samples[last].first
	kept := p.samples[:1]
	for i := 1; i <= last; i++ {
		if i == last || p.samples[i+1].first-kept[len(kept)-1].first > (newest-p.samples[i].first)/gapShare {
			kept = append(kept, p.samples[i])
		}
	}
	if most := maxSamples * 3 / 4; len(kept) > most {
		kept = kept[len(kept)-most:]
	}
	p.samples = kept
}

// note takes a position of the primary's that was asked for at one time and had come by another. Another primary, a new
// timeline, or a way back after a crash begin anew: positions of different histories do not compare.
func (p *positions) note(of *peer, timeline uint32, position lsn, asked, came time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if position == 0 {
		return // the server does not tell
	}
	if p.of != of || p.timeline != timeline {
		p.reign++
	}
	n := len(p.samples)
	if p.of != of || p.timeline != timeline || (n > 0 && position < p.samples[n-1].position) {
		p.of, p.timeline, p.samples, n = of, timeline, nil, 0
	}
	switch {
	case n > 0 && p.samples[n-1].position == position:
		p.samples[n-1].last = asked
		return
	case n == maxSamples:
		p.thinOut()
	}
	p.samples = append(p.samples, sample{position, came, asked})
}

// replay is how far a replica had come at some time between the question and the answer.
type replay struct {
	position    lsn
	asked, came time.Duration
}

// measure returns how far a replica is behind. before is what its last look saw: only a position of the primary's that
// is younger than the replica's can show that the replica was ahead.
func (p *positions) measure(now, before replay) distance {
	p.mu.Lock()
	defer p.mu.Unlock()
	// What the primary was seen to write while the replica was answering does not count against it.
	n := sort.Search(len(p.samples), func(i int) bool { return p.samples[i].first > now.asked })
	if n == 0 || now.position == 0 {
		return distance{fresh: -1, reign: p.reign}
	}
	latest := p.samples[n-1]
	d := distance{known: true, fresh: -1, reign: p.reign, at: min(now.asked, latest.last)}
	d.ahead = before.position > latest.position && latest.last > before.came
	d.moved = now.position > before.position
	lacking := sort.Search(n, func(i int) bool { return p.samples[i].position.replayable() > now.position })
	if lacking > 0 {
		d.fresh = min(p.samples[lacking-1].last, now.asked)
	}
	if lacking < n {
		d.bytes = uint64(latest.position - now.position)
		d.lacks = now.asked - p.samples[lacking].first
	}
	return d
}

// behind is what is known of a peer's lag, for the choice among peers: read without a lock.
type behind struct {
	bytes atomic.Uint64 // unknownBytes: not known
	lacks atomic.Int64
	fresh atomic.Int64 // the pool's clock when all was committed that the peer shows; -1: not known
	at    atomic.Int64 // when the position was read that the bytes are measured by
}

const unknownBytes = math.MaxUint64

func (b *behind) set(d distance) {
	if !d.known {
		b.forget()
		return
	}
	b.at.Store(int64(d.at))
	b.bytes.Store(d.bytes)
	b.lacks.Store(int64(d.lacks))
	b.fresh.Store(int64(d.fresh))
}

func (b *behind) forget() {
	b.bytes.Store(unknownBytes)
	b.lacks.Store(0)
	b.fresh.Store(-1)
}

// last returns what the last look measured.
func (b *behind) last() (bytes uint64, lacks time.Duration, known bool) {
	if bytes = b.bytes.Load(); bytes == unknownBytes {
		return 0, 0, false
	}
	return bytes, time.Duration(b.lacks.Load()), true
}

// bytesHoldFor is how long a measure in bytes is taken for the present: a late look's time.
const bytesHoldFor = 2 * maxLagLook

// within reports whether the peer is known to be no further behind than max.
func (b *behind) within(max Lag, now time.Duration) bool {
	if max.Bytes > 0 && (b.bytes.Load() > max.Bytes || now-time.Duration(b.at.Load()) > bytesHoldFor) {
		return false
	}
	if max.Time > 0 {
		fresh := time.Duration(b.fresh.Load())
		return fresh >= 0 && now-fresh <= max.Time
	}
	return true
}

// freshness is a bound on lag, at a time of the pool's clock.
type freshness struct {
	max Lag
	now time.Duration
}

func (f *freshness) bounds() bool { return f.max.bounds() }

// holds reports whether p is known to be within the bound; nil holds everybody. The primary is never behind itself.
func (f *freshness) holds(p *peer) bool {
	return f == nil || Role(p.role.Load()) == RolePrimary || p.behind.within(f.max, f.now)
}
