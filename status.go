package multipool

import (
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
)

// Status is a snapshot of a pool and its peers. Values of different peers are read one after another. Calls are counted
// that go through the MultiPool; what goes through a pool of its own (PeerPool, PrimaryPool, ReplicaPool) shows in the
// judgement of the peer and in that pool's Stat, and what goes through PrimaryPool and ReplicaPool in InFlight too. Under
// ModeOrdered Primary is who takes everything, under ModeEquivalent nobody.
type Status struct {
	Peers   []PeerStatus // in the order of the configuration
	Primary string       // the primary's name; "" while there is none. One that is down is the primary until it is replaced
	Rivals  []string     // names of peers that claim to be the primary and are not followed
	Split   bool         // nothing tells who is right: writes are held
	Waiting int64        // calls that wait for a peer

	Discovery DiscoveryStatus // zero without Options.Discover

	Sums
}

// Sums are pgxpool.Stat's counters, summed over all peers.
type Sums struct {
	AcquireCount            int64
	AcquireDuration         time.Duration
	AcquiredConns           int32
	CanceledAcquireCount    int64
	ConstructingConns       int32
	EmptyAcquireCount       int64
	EmptyAcquireWaitTime    time.Duration
	IdleConns               int32
	MaxConns                int32
	TotalConns              int32
	NewConnsCount           int64
	MaxLifetimeDestroyCount int64
	MaxIdleDestroyCount     int64
}

func (s *Sums) add(t *pgxpool.Stat) {
	s.AcquireCount += t.AcquireCount()
	s.AcquireDuration += t.AcquireDuration()
	s.AcquiredConns += t.AcquiredConns()
	s.CanceledAcquireCount += t.CanceledAcquireCount()
	s.ConstructingConns += t.ConstructingConns()
	s.EmptyAcquireCount += t.EmptyAcquireCount()
	s.EmptyAcquireWaitTime += t.EmptyAcquireWaitTime()
	s.IdleConns += t.IdleConns()
	s.MaxConns += t.MaxConns()
	s.TotalConns += t.TotalConns()
	s.NewConnsCount += t.NewConnsCount()
	s.MaxLifetimeDestroyCount += t.MaxLifetimeDestroyCount()
	s.MaxIdleDestroyCount += t.MaxIdleDestroyCount()
}

// PeerStatus is one peer.
type PeerStatus struct {
	Name    string
	Host    string
	Port    uint16
	Role    Role
	Primary bool   // is the primary, be it down
	Health  Health // of a pool's only peer: what its last connect has shown
	Breaker BreakerState
	Serves  bool // is a candidate of reads or writes; of a pool's only peer: its last connect did not fail
	Why     Why  // why it does not serve: WhyNone if, and only if, Serves
	// Unfit is what is wrong with a peer that answers: with the data of a replica (WhyBehind, WhyPaused, WhyCutOff,
	// WhyOtherHistory, WhyOlderTimeline, WhyRefusesSetUp), with a primary that is not followed (WhyOlderTimeline,
	// WhyDisputed), or with either (WhyOtherCluster, WhySameServer). Nothing is: WhyNone. Such a peer takes no calls, except
	// that a replica whose data is old is read where no other can be: it Serves then, and is Unfit all the same.
	Unfit   Why
	Slow    bool   // is left out of the reads for being far slower than the others
	Drained bool   // by the operator
	System  uint64 // its system identifier; 0: unknown
	// SameAs is the name of the peer that stands for the same server, and takes what goes to it; "" where there is none. Calls
	// that name this one still go here.
	SameAs     string
	Zone       string
	Weight     float64 // 1 where none was given
	LastResort bool    // see Peer.LastResort
	Timeline   uint32  // of the log that a primary writes, or that a replica receives; 0: unknown

	// How far a replica was behind the primary when it was last looked at, at least: log that it lacked in bytes, and for
	// how long the primary had had something that it did not show. LagKnown is false of a primary, and before both have
	// been looked at; and of one behind a pooler.
	LagKnown bool
	LagBytes uint64
	LagTime  time.Duration

	RoundTrip time.Duration // of the monitor's looks, smoothed; 0: not known

	InFlight int64 // calls waiting for a connection or running
	Reads    int64 // calls sent there first as reads
	Writes   int64 // ... as writes
	Retries  int64 // calls sent there after another attempt had failed
	Trips    int64 // how often the breaker has opened

	LastFault string // "" if there was none
	FaultAt   time.Time

	Stat *pgxpool.Stat `json:"-"` // of the peer's own pool
}

// Status returns a snapshot of the pool and its peers.
func (p *MultiPool) Status() Status {
	top := p.topology.Load()
	s := Status{Waiting: p.waiting.Load(), Rivals: namesOfPeers(top.rivals), Split: top.split, Discovery: p.discovery.status()}
	for i := range top.members {
		m := &top.members[i]
		q := m.peer
		ps := PeerStatus{
			Name: q.name, Host: q.host, Port: q.port,
			Role: m.role, Health: m.health, Breaker: q.breaker.shown(), Timeline: m.timeline,
			Primary: q == top.primary,
			Slow:    m.slow,
			Drained: m.drained,
			Unfit:   top.unfit(m),
			Why:     top.idle(m),
			System:  m.system,
			SameAs:  m.alias.called(),
			Zone:    q.zone, Weight: q.weight(), LastResort: q.spare, RoundTrip: q.roundTrip.known(),
			InFlight: int64(q.load.busy()), Reads: q.picks.reads.Load(), Writes: q.picks.writes.Load(),
			Retries: q.picks.retries.Load(), Trips: q.breaker.trips.Load(),
			Stat: q.pool.Stat(),
		}
		if p.solo {
			ps.Health = Health(q.health.Load())
			if ps.Why = ps.Health.why(); ps.Health == HealthUnknown {
				ps.Why = WhyNone
			}
			ps.InFlight += int64(ps.Stat.AcquiredConns())
		}
		ps.Serves = ps.Why == WhyNone
		if when, err := q.faults.last(); err != nil {
			ps.LastFault, ps.FaultAt = err.Error(), when
		}
		ps.LagBytes, ps.LagTime, ps.LagKnown = q.behind.last()
		if ps.Primary {
			s.Primary = q.name
		}
		s.Sums.add(ps.Stat)
		s.Peers = append(s.Peers, ps)
	}
	return s
}
