package quota

import "sync"

// Slots are the connections that one server has, or that are being made to it.
type Slots struct {
	Limit int32 // set before first use, and never changed

	mu      sync.Mutex // guards the fields below; nothing blocks under it
	taken   [pools]int32
	waiting int           // connections that wait for a slot
	freed   chan struct{} // closed when a slot has become free; nil while nobody waits
}

// Take takes a slot and returns nil, or returns a channel that is closed when one has become free. Slots are counted but
// not limited unless limited is set.
func (s *Slots) Take(of Pool, limited bool) (freed <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if limited && sum(s.taken) >= s.Limit {
		if s.freed == nil {
			s.freed = make(chan struct{})
		}
		return s.freed
	}
	s.taken[of]++
	return nil
}

// Release gives a slot back.
func (s *Slots) Release(of Pool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.taken[of]--
	if s.freed != nil {
		close(s.freed)
		s.freed = nil
	}
}

// Wait counts n more connections as waiting for a slot, or fewer if n is negative.
func (s *Slots) Wait(n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.waiting += n
}

// Waiting returns how many connections wait for a slot.
func (s *Slots) Waiting() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.waiting
}

// Of returns how many slots a pool has.
func (s *Slots) Of(pool Pool) int32 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.taken[pool]
}

// Taken returns how many slots all pools have.
func (s *Slots) Taken() int32 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return sum(s.taken)
}
