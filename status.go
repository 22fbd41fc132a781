package multipool

import (
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
)

// Status is a snapshot of a pool and its peers. Values of different peers are read one after another. Calls are counted
// that go through the MultiPool; what goes through a pool of its own (PeerPool, PrimaryPool, ReplicaPool) shows in the
// judgement of the peer and in that pool's Stat, and what goes through PrimaryPool and ReplicaPool in InFlight too. Under
// ModeOrdered Primary is the peer that takes everything, under ModeEquivalent none.
//
// Its JSON is part of the interface, and so is that of the other types with tags: names in snake_case, states as their labels,
// durations as whole nanoseconds in names that end in _ns, times as RFC 3339 and left out where they are zero, errors as their
// texts, the system identifier as a string, since a JavaScript number cannot hold it. Everything but PeerStatus.Stat is read
// back as it was written.
type Status struct {
	Name    string       `json:"name"`             // Options.Name
	Peers   []PeerStatus `json:"peers"`            // in the order of the configuration
	Primary string       `json:"primary"`          // the primary's name; "" while there is none. One that is down is the primary until it is replaced
	Rivals  []string     `json:"rivals,omitempty"` // names of peers that claim to be the primary and are not followed
	Split   bool         `json:"split"`            // nothing tells which is right: writes are held
	Waiting int64        `json:"waiting"`          // calls that wait for a peer

	// Discarded is how many events the hooks were not told of, because one of them was slow.
	Discarded int64 `json:"discarded"`

	Discovery DiscoveryStatus `json:"discovery,omitzero"` // zero without Options.Discover

	Total PoolTotals `json:"total"`
}

// PoolTotals are the counters of pgxpool.Stat, summed over the pools of all peers.
type PoolTotals struct {
	AcquireCount            int64         `json:"acquire_count"`
	AcquireDuration         time.Duration `json:"acquire_duration_ns"`
	AcquiredConns           int32         `json:"acquired_conns"`
	CanceledAcquireCount    int64         `json:"canceled_acquire_count"`
	ConstructingConns       int32         `json:"constructing_conns"`
	EmptyAcquireCount       int64         `json:"empty_acquire_count"`
	EmptyAcquireWaitTime    time.Duration `json:"empty_acquire_wait_time_ns"`
	IdleConns               int32         `json:"idle_conns"`
	MaxConns                int32         `json:"max_conns"`
	TotalConns              int32         `json:"total_conns"`
	NewConnsCount           int64         `json:"new_conns_count"`
	MaxLifetimeDestroyCount int64         `json:"max_lifetime_destroy_count"`
	MaxIdleDestroyCount     int64         `json:"max_idle_destroy_count"`
}

func (s *PoolTotals) add(t *pgxpool.Stat) {
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
	Name    string       `json:"name"`
	Host    string       `json:"host"`
	Port    uint16       `json:"port"`
	Role    Role         `json:"role"`
	Primary bool         `json:"primary"` // is the primary, be it down
	Health  Health       `json:"health"`  // of a pool's only peer: what its last connect has shown
	Breaker BreakerState `json:"breaker"`
	Serves  bool         `json:"serves"` // is a candidate of reads or writes; of a pool's only peer: its last connect did not fail
	Why     Why          `json:"why"`    // why it does not serve: WhyNone if, and only if, Serves
	// Unfit is what is wrong with a peer that answers: with the data of a replica (WhyBehind, WhyPaused, WhyCutOff,
	// WhyOtherHistory, WhyOlderTimeline, WhyRefusesSetUp), with a primary that is not followed (WhyOlderTimeline,
	// WhyDisputed), or with either (WhyOtherCluster, WhySameServer). Nothing is: WhyNone. Such a peer takes no calls, except
	// that a replica whose data is old is read where no other can be: it Serves then, and is Unfit all the same.
	Unfit   Why    `json:"unfit"`
	Slow    bool   `json:"slow"`          // is left out of the reads for being far slower than the others
	Drained bool   `json:"drained"`       // by the operator
	System  uint64 `json:"system,string"` // its system identifier; 0: unknown
	// SameAs is the name of the peer that stands for the same server, and takes what goes to it; "" where there is none. Calls
	// that name this one still go here.
	SameAs     string  `json:"same_as,omitempty"`
	Zone       string  `json:"zone,omitempty"`
	Weight     float64 `json:"weight"`      // 1 where none was given
	LastResort bool    `json:"last_resort"` // see Peer.LastResort
	Timeline   uint32  `json:"timeline"`    // of the log that a primary writes, or that a replica receives; 0: unknown

	// Lag is how far a replica was behind the primary when it was last looked at, at least: log that it lacked in bytes, and
	// for how long the primary had had something that it did not show. LagKnown is false of a primary, before both have
	// been looked at, and of a peer behind a pooler.
	Lag      Lag  `json:"lag"`
	LagKnown bool `json:"lag_known"`

	RoundTrip time.Duration `json:"round_trip_ns"` // of the monitor's looks, smoothed; 0: not known

	InFlight int64 `json:"in_flight"` // calls waiting for a connection or running
	Reads    int64 `json:"reads"`     // calls sent there first as reads
	Writes   int64 `json:"writes"`    // ... as writes
	Retries  int64 `json:"retries"`   // calls sent there after another attempt had failed
	Trips    int64 `json:"trips"`     // how often the breaker has opened

	LastFault string    `json:"last_fault,omitempty"` // "" if there was none
	FaultAt   time.Time `json:"fault_at,omitzero"`

	Stat *pgxpool.Stat `json:"-"` // of the peer's own pool
}

// Status returns a snapshot of the pool and its peers.
func (p *MultiPool) Status() Status {
	top := p.topology.Load()
	s := Status{Name: p.config.Name, Waiting: p.waiting.Load(), Rivals: namesOfPeers(top.rivals), Split: top.split, Discovery: p.discovery.status(), Discarded: p.herald.lost()}
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
		ps.Lag.Bytes, ps.Lag.Time, ps.LagKnown = q.behind.last()
		if ps.Primary {
			s.Primary = q.name
		}
		s.Total.add(ps.Stat)
		s.Peers = append(s.Peers, ps)
	}
	return s
}
