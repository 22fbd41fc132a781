package multipool

import (
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
)

// Status is a snapshot of a pool and its peers. The values of different peers are read one after the other.
//
// The counters of a PeerStatus count calls on the MultiPool. A call on a pool that PeerPool, PrimaryPool or ReplicaPool
// has returned counts for the health of the peer and in that pool's Stat. A call on the pools of PrimaryPool and
// ReplicaPool also counts in InFlight. In [ModeOrdered] Primary is the peer that takes all calls. In [ModeEquivalent]
// it is "".
//
// The JSON form is part of the interface, and so is that of the other types with tags. Names are in snake_case. States
// are their labels. Durations are whole nanoseconds, under names that end in _ns. Times are RFC 3339, and are left out
// if they are zero. Errors are their texts. The system identifier is a string, since a JavaScript number cannot hold
// it. Everything except PeerStatus.Stat is marshaled, and unmarshals to what it was.
type Status struct {
	Name    string       `json:"name"`             // Options.Name
	Peers   []PeerStatus `json:"peers"`            // in the order of the configuration
	Primary string       `json:"primary"`          // the primary's name; "" while there is none. One that is down is the primary until it is replaced
	Rivals  []string     `json:"rivals,omitempty"` // peers that claim to be the primary and get no writes
	Split   bool         `json:"split"`            // nothing tells which peer is the primary: writes wait
	Waiting int64        `json:"waiting"`          // calls that wait for a peer

	// Discarded is how many events were not passed to the hooks, because a hook was slow.
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

// PeerStatus is a snapshot of one peer.
type PeerStatus struct {
	Name    string       `json:"name"`
	Host    string       `json:"host"`
	Port    uint16       `json:"port"`
	Role    Role         `json:"role"`
	Primary bool         `json:"primary"` // is the primary, even if it is down
	Health  Health       `json:"health"`  // in a pool of one peer: as its last connect showed
	Breaker BreakerState `json:"breaker"`
	Serves  bool         `json:"serves"` // takes reads or writes; in a pool of one peer: its last connect did not fail
	Why     Why          `json:"why"`    // why it does not serve; WhyNone if, and only if, Serves
	// Unfit says what is wrong with a peer that answers, or is WhyNone. It may be the data of a replica (WhyBehind,
	// WhyPaused, WhyCutOff, WhyDiverged, WhyOlderTimeline, WhySetupFails), the claim of a primary that does not
	// get the writes (WhyOlderTimeline, WhyDisputed), or either (WhyOtherCluster, WhySameServer). An unfit peer takes
	// no calls, with one exception: a replica with old data serves reads if no other peer can. Then Serves is true
	// although Unfit is set.
	Unfit   Why    `json:"unfit"`
	Slow    bool   `json:"slow"`          // gets no reads because it is far slower than the others
	Drained bool   `json:"drained"`       // by Drain or DrainPrimary
	System  uint64 `json:"system,string"` // system identifier; 0 if unknown
	// SameAs is the name of the peer that is the same server and takes its calls, or "" if there is none. Calls whose
	// route names this peer still go here.
	SameAs     string  `json:"same_as,omitempty"`
	Zone       string  `json:"zone,omitempty"`
	Weight     float64 `json:"weight"`      // 1 if none was configured
	LastResort bool    `json:"last_resort"` // see Peer.LastResort
	Timeline   uint32  `json:"timeline"`    // of the log that a primary writes or a replica receives; 0 if unknown

	// Lag is how far, at least, a replica was behind the primary at its last health check: the bytes of log that it
	// lacked, and how long the primary had had something that it did not show. LagKnown is false for a primary, for a
	// peer behind a pooler, and until both the peer and the primary have been checked.
	Lag      Lag  `json:"lag"`
	LagKnown bool `json:"lag_known"`

	RoundTrip time.Duration `json:"round_trip_ns"` // smoothed duration of the health checks; 0 if unknown

	InFlight int64 `json:"in_flight"` // calls waiting for a connection or running
	Reads    int64 `json:"reads"`     // reads whose first attempt went here
	Writes   int64 `json:"writes"`    // writes whose first attempt went here
	Retries  int64 `json:"retries"`   // calls sent here after an earlier attempt had failed
	Trips    int64 `json:"trips"`     // how often the peer went down

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
