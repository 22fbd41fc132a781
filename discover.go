package multipool

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// discovery asks for the peers that there are, and has the pool follow.
type discovery struct {
	pending chan discovered // of the call that is under way; nil if none is. Of run's goroutine
	missed  map[string]int  // how often in a row a peer was left out; under the owner's changing

	mu     sync.Mutex
	last   DiscoveryStatus
	failed error // why it fails, or nil
}

type discovered struct {
	peers []Peer
	err   error
}

// Discoverer returns the complete list of the peers that exist now; see [Options].Discover. [DiscoverDNS],
// [DiscoverSRV] and [DiscoverReplication] return one.
type Discoverer func(context.Context) ([]Peer, error)

// DiscoveryStatus is the result of the last call of Options.Discover.
type DiscoveryStatus struct {
	At    time.Time `json:"at,omitzero"`   // zero if no call has returned yet
	Peers int       `json:"peers"`         // length of the list
	Err   string    `json:"err,omitempty"` // why the list was not used; "" if it was
}

const (
	maxDiscovered    = 64
	discoverTimeout  = 5 * time.Second
	discoverAgain    = time.Second // after a failure, at most
	discoverPatience = 2 * time.Second
)

var errNothingDiscovered = errors.New("multipool: discover: no peer was found")

// run asks until ctx ends. The first peers' monitors are set going when it has answered, or failed to within a while: until
// then it may replace them.
func (d *discovery) run(ctx context.Context, p *MultiPool) {
	launch := sync.OnceFunc(func() {
		p.changing.Lock()
		defer p.changing.Unlock()
		if !p.closed.Load() {
			p.launch()
		}
	})
	patience := time.AfterFunc(discoverPatience, launch)
	defer patience.Stop()
	for {
		found, err := d.ask(ctx, p)
		if ctx.Err() != nil {
			return
		}
		if err == nil {
			err = p.comply(found)
		} else {
			p.fallBack()
		}
		if e, changed := d.note(len(found), err); changed {
			p.herald.discovery(e)
		}
		patience.Stop()
		launch()
		pause := p.config.CheckInterval
		if err != nil {
			pause = min(pause, discoverAgain)
		}
		select {
		case <-time.After(jittered(pause)):
		case <-ctx.Done():
			return
		}
	}
}

// ask asks once. What is found comes back as templates.
func (d *discovery) ask(ctx context.Context, p *MultiPool) ([]peerConfig, error) {
	ctx, cancel := context.WithTimeout(context.WithValue(ctx, discovering{}, p), discoverTimeout)
	defer cancel()
	found, err := d.call(ctx, p)
	switch {
	case err != nil:
		return nil, err
	case len(found) == 0:
		return nil, errNothingDiscovered
	case len(found) > maxDiscovered:
		return nil, fmt.Errorf("multipool: discover: %d peers were found: at most %d are taken", len(found), maxDiscovered)
	}
	configs := make([]peerConfig, 0, len(found))
	known := map[string]bool{}
	for i, peer := range found {
		c, err := p.config.peerFrom(peer, peer.called(fmt.Sprintf("#%d", i+1)))
		if err != nil {
			return nil, err
		}
		if !known[c.Name] {
			known[c.Name] = true
			configs = append(configs, c)
		}
	}
	return configs, nil
}

// callDiscover is the function under which every call of Options.Discover runs; see inside.
//
//go:noinline
func callDiscover(ctx context.Context, f Discoverer) (found discovered) {
	found.peers, found.err = f(ctx)
	return found
}

// call calls Options.Discover, and goes on without it where it does not heed its context: it is not called again before it
// has returned. Close waits for it.
func (d *discovery) call(ctx context.Context, p *MultiPool) ([]Peer, error) {
	if d.pending == nil {
		answer := make(chan discovered, 1)
		d.pending = answer
		p.asking.Go(func() { answer <- callDiscover(ctx, p.config.Discover) })
	}
	select {
	case found := <-d.pending:
		d.pending = nil
		return found.peers, found.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// note keeps what came of asking. Whether discovery fails stays as it was where the pool had no peer to ask: that is told as
// such.
func (d *discovery) note(peers int, err error) (e DiscoveryEvent, changed bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.last = DiscoveryStatus{At: time.Now(), Peers: peers}
	if err != nil {
		d.last.Err = err.Error()
	}
	if none := new(NoPeerError); errors.Is(err, ErrNoPrimary) || errors.As(err, &none) {
		return e, false
	}
	changed = (err == nil) != (d.failed == nil)
	d.failed = err
	return DiscoveryEvent{Cause: err, Peers: peers, At: d.last.At}, changed
}

// failure returns why discovery fails, or nil.
func (d *discovery) failure() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.failed
}

func (d *discovery) status() DiscoveryStatus {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.last
}

// comply makes the pool's peers those that were found: first the new ones come, then the others go. One that is found at
// another place than it was makes way for itself. What is left out once may only be late: it goes when it was left out
// thrice in a row, or twice where it does not answer either; never while the operator has it drained, or nobody else serves.
func (p *MultiPool) comply(found []peerConfig) error {
	p.changing.Lock()
	defer p.changing.Unlock()
	wanted := make(map[string]bool, len(found))
	for _, c := range found {
		wanted[c.Name] = true
		q := p.named(c.Name)
		if q != nil && (q.host != c.Host || q.port != c.Port) {
			p.part(q, "")
			q = nil
		}
		if q == nil {
			if err := p.join(c); err != nil {
				return err
			}
		}
	}
	missed := make(map[string]int)
	for _, q := range p.peers() {
		switch {
		case wanted[q.name], p.indispensable(q), q.drained.Load():
		case q.leave == nil, p.discovery.missed[q.name] >= missesOf(q):
			p.part(q, "")
		default:
			missed[q.name] = p.discovery.missed[q.name] + 1
		}
	}
	p.discovery.missed = missed
	return nil
}

// missesOf is how often in a row a peer may be left out before it goes with the next time.
func missesOf(q *peer) int {
	if Health(q.health.Load()) == HealthUp {
		return 2
	}
	return 1
}

// fallBack takes the configured peers in again where nothing can be discovered and nobody takes writes: who could be asked
// may be gone with the only primary that was known.
func (p *MultiPool) fallBack() {
	p.changing.Lock()
	defer p.changing.Unlock()
	if len(p.topology.Load().writes) > 0 {
		return
	}
	if p.orphaned.Load() == 0 { // there was no primary yet: there may be none among those that serve
		if p.anybodyServes() {
			return
		}
	} else if p.orphanedFor() < fallBackAfter {
		return
	}
	for _, c := range p.seeds {
		if p.named(c.Name) == nil {
			_ = p.join(c) // there is room, or else there are peers enough
		}
	}
}

// fallBackAfter is how long there is no primary before the configured peers are tried again.
const fallBackAfter = time.Second

// indispensable reports whether a peer that is not found any more stays: it serves, and without it nobody would take the
// reads, or the writes.
func (p *MultiPool) indispensable(q *peer) bool {
	top := p.topology.Load()
	if !top.member(q).stands() {
		return false
	}
	without := top.apply(observation{peer: q, leaves: true})
	return len(without.reads) == 0 && len(top.reads) > 0 || len(without.writes) == 0 && len(top.writes) > 0
}

// discoveries are the values of the connection string key multipool_discover; proxy is [Options].Proxy.
var discoveries = map[string]func(c *pgxpool.Config, proxy bool) Discoverer{
	"none": func(*pgxpool.Config, bool) Discoverer { return nil },
	"dns": func(c *pgxpool.Config, proxy bool) Discoverer {
		return discoverHosts(c, proxy, DiscoverDNS)
	},
	"srv": func(c *pgxpool.Config, proxy bool) Discoverer {
		return discoverHosts(c, proxy, discoverSRVName)
	},
	"replication": func(*pgxpool.Config, bool) Discoverer { return DiscoverReplication() },
}

// discoverHosts joins what is discovered of every host of a connection string.
func discoverHosts(c *pgxpool.Config, proxy bool, each func(string, uint16) Discoverer) Discoverer {
	hosts, err := splitHosts(c)
	return func(ctx context.Context) ([]Peer, error) {
		if err != nil {
			return nil, err
		}
		var all []Peer
		for _, h := range hosts {
			found, err := each(h.Host, h.Port)(ctx)
			if err != nil {
				return nil, err
			}
			all = append(all, found...)
		}
		for i := range all {
			all[i].Proxy = proxy
		}
		return all, nil
	}
}

// resolver looks names up; a test has its own.
var resolver interface {
	LookupNetIP(ctx context.Context, network, host string) ([]netip.Addr, error)
	LookupSRV(ctx context.Context, service, proto, name string) (string, []*net.SRV, error)
} = net.DefaultResolver

// DiscoverDNS returns a [Discoverer] for [Options].Discover that finds a peer at every address of a host. It uses the
// host's A records, or its AAAA records if there are no A records, because a server with both would become two peers.
// Certificates are checked for the name of the host. Port 0 means the port of Options.Config.
func DiscoverDNS(host string, port uint16) Discoverer {
	return func(ctx context.Context) ([]Peer, error) {
		addrs, err := resolver.LookupNetIP(ctx, "ip", host)
		if err != nil {
			return nil, fmt.Errorf("multipool: discover: look-up of the addresses of %s failed: %w", host, err)
		}
		four := slices.DeleteFunc(slices.Clone(addrs), func(a netip.Addr) bool { return !a.Unmap().Is4() })
		if len(four) > 0 {
			addrs = four
		}
		peers := make([]Peer, 0, len(addrs))
		for _, a := range addrs {
			peers = append(peers, Peer{Host: a.Unmap().String(), Port: port, ServerName: host})
		}
		return peers, nil
	}
}

// DiscoverSRV returns a [Discoverer] for [Options].Discover that finds a peer at every target of a name's SRV records
// (RFC 2782). For example, service "postgresql", proto "tcp" and name "example.com" look up
// _postgresql._tcp.example.com. If service and proto are empty, it looks up name itself. It ignores priorities and
// weights.
func DiscoverSRV(service, proto, name string) Discoverer {
	return func(ctx context.Context) ([]Peer, error) {
		_, records, err := resolver.LookupSRV(ctx, service, proto, name)
		if err != nil {
			full := name
			if service != "" || proto != "" {
				full = "_" + service + "._" + proto + "." + name
			}
			return nil, fmt.Errorf("multipool: discover: look-up of the SRV records of %s failed: %w", full, err)
		}
		peers := make([]Peer, 0, len(records))
		for _, r := range records {
			peers = append(peers, Peer{Host: strings.TrimSuffix(r.Target, "."), Port: r.Port})
		}
		return peers, nil
	}
}

func discoverSRVName(name string, _ uint16) Discoverer {
	return DiscoverSRV("", "", name)
}

// DiscoverReplication returns a [Discoverer] for [Options].Discover that finds the pool's primary, and the standbys
// that its pg_stat_replication lists as streaming and replaying (PostgreSQL documentation, 28.2.4). It is for
// [ModeReplicated], and the program's role needs the rights of pg_monitor.
//
// A standby is used at the address that it connects from and the primary's port, or at host:port if its
// application_name (cluster_name) has that form. Certificates are checked for the address, or for the host if an
// application_name gives one. Standbys of standbys are not found.
func DiscoverReplication() Discoverer {
	return func(ctx context.Context) ([]Peer, error) {
		p, _ := ctx.Value(discovering{}).(*MultiPool)
		if p == nil || p.config.Mode != ModeReplicated {
			return nil, errors.New("multipool: DiscoverReplication is for Options.Discover under ModeReplicated")
		}
		top := p.topology.Load()
		if len(top.writes) == 0 {
			return nil, ErrNoPrimary
		}
		primary := top.writes[0]
		// Both are said, so that neither is taken from Options.Route: a program that reads from replicas alone asks there too.
		rows, err := p.Query(WithRoute(ctx, Route{Target: TargetPrimary, Peers: []string{primary.name}}), standbysOf)
		if err != nil {
			return nil, err
		}
		return pgx.AppendRows([]Peer{{Name: primary.name, Host: primary.host, Port: primary.port}}, rows,
			func(row pgx.CollectableRow) (Peer, error) {
				var name string
				var addr *string
				if err := row.Scan(&name, &addr); err != nil {
					return Peer{}, err
				}
				return standbyAt(name, addr, primary.port)
			})
	}
}

// standbysOf asks for those who replay: backups and logical subscribers only receive. Where nothing is shown, for want of
// rights, all are asked for, so that the want is told.
const standbysOf = `select r.application_name, host(r.client_addr) from pg_catalog.pg_stat_replication r
 where (r.state is null or r.state = 'streaming' and r.replay_lsn is not null
 and not exists (select from pg_catalog.pg_replication_slots s where s.active_pid = r.pid and s.slot_type = 'logical'))
 and (r.state is null or r.client_addr is not null or r.application_name like '%:%')`

// discovering is where a Discover's context holds its pool.
type discovering struct{}

// standbyAt is where a standby is, by its application_name and the address it connects from.
func standbyAt(name string, addr *string, port uint16) (Peer, error) {
	if host, digits, err := net.SplitHostPort(name); err == nil && host != "" && isHost(host) {
		if own, err := strconv.ParseUint(digits, 10, 16); err == nil && own != 0 {
			return Peer{Host: host, Port: uint16(own)}, nil
		}
	}
	if addr == nil {
		return Peer{}, fmt.Errorf("multipool: discover: the address of standby %q is not shown: the role needs pg_monitor, or the standby an application_name of host:port", name)
	}
	return Peer{Host: *addr, Port: port}, nil
}
