package multipool

import (
	"context"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/pgmultipool/multipool/internal/quota"
)

// readReserve is the part of a primary's connections that writes leave alone whose commits wait for standbys: while no
// standby answers such writes hold their connections, and reads must not wait with them.
const readReserve = 0.1

// reserve limits the connections of writes that wait for standbys, and of reads that have fallen back to this peer as the
// primary.
func (p *peer) reserve(c *Options) {
	if c.Mode == ModeReplicated {
		p.guests = quota.NewBulkhead(c.WriteReserve, p.load.limit)
	}
	if p.load.limit > 1 {
		p.writers = quota.NewBulkhead(readReserve, p.load.limit)
	}
}

// takePlace takes a place and a connection, which holds it from then on as bit says: no longer than the peer stands, and no
// longer than until better says that a call of the kind is better off elsewhere; nil if never.
func (p *peer) takePlace(ctx context.Context, s quota.Bulkhead, bit int32, better func(*topology) bool) (c *pgxpool.Conn, err error) {
	if err := p.awaitPlace(ctx, s, better); err != nil {
		return nil, err
	}
	defer func() {
		if c == nil { // as in acquire
			<-s
		}
	}()
	if c, err = p.takeWhileUp(ctx); err != nil {
		return nil, err
	}
	wireOf(c.Conn()).out.Or(bit)
	return c, nil
}

// awaitPlace waits for a place. One that is free is taken whatever the news, since the replica that is up again may be one
// that has just failed the call.
func (p *peer) awaitPlace(ctx context.Context, s quota.Bulkhead, better func(*topology) bool) error {
	top := p.owner.topology.Load()
	for was := top; !s.Try(); top = p.owner.topology.Load() {
		if better != nil && !better(was) && better(top) {
			return errPeerDown // it is not, but a replica is up
		}
		select {
		case s <- struct{}{}:
			return nil
		case <-top.superseded:
		case <-p.era.Load().Done():
			return errPeerDown
		case <-p.owner.lifetime.Done():
			return ErrClosedPool
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

// hasReplica reports whether reads that fell back to the primary have a replica to go to.
func (t *topology) hasReplica() bool { return !t.fallback }

// commits reports whether a call is one that commits by itself, and so may wait for a standby: not a transaction, and
// nothing that hands a connection out, as both may read first and for long.
func (in *intent) commits() bool {
	switch in.op {
	case opExec, opBatch, opCopy:
		return true
	}
	return in.op.hasText() && !in.reads
}
