package multipool

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"unicode"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/pgmultipool/multipool/internal/dsn"
)

// spreadLifetimes gives a peer's pool its default jitter.
func spreadLifetimes(pool *pgxpool.Config) {
	pool.MaxConnLifetimeJitter = max(cmp.Or(pool.MaxConnLifetimeJitter, pool.MaxConnLifetime/lifetimeJitterShare), 0)
}

// peerConfig is one peer as configured: its own copy of the template, with one server in it.
type peerConfig struct {
	Peer
	pool *pgxpool.Config
}

func (c *Options) derivePeers() ([]peerConfig, error) {
	var peers []peerConfig
	var err error
	if len(c.Peers) == 0 {
		peers, err = splitHosts(c.Config)
		for i := range peers {
			peers[i].Proxy = c.Proxy
		}
	} else {
		peers, err = c.listedPeers()
	}
	if err != nil {
		return nil, err
	}
	byName := map[string]bool{}
	for _, p := range peers {
		if byName[p.Name] {
			return nil, fmt.Errorf("multipool: peer %s is given twice", p.Name)
		}
		byName[p.Name] = true
	}
	return peers, nil
}

// listedPeers makes the templates of Options.Peers.
func (c *Options) listedPeers() ([]peerConfig, error) {
	peers := make([]peerConfig, 0, len(c.Peers))
	for i, p := range c.Peers {
		own, err := c.peerFrom(p, cmp.Or(p.Name, fmt.Sprintf("#%d", i+1)))
		if err != nil {
			return nil, err
		}
		peers = append(peers, own)
	}
	return peers, nil
}

// peerFrom makes one peer's template; called is its name in errors.
func (c *Options) peerFrom(p Peer, called string) (peerConfig, error) {
	if err := p.check(); err != nil {
		return peerConfig{}, fmt.Errorf("multipool: peer %s: %w", called, err)
	}
	pool := c.Config.Copy()
	if p.ConnString != "" {
		if err := adopt(&pool.ConnConfig.Config, p.ConnString); err != nil {
			return peerConfig{}, fmt.Errorf("multipool: peer %s: %w", called, err)
		}
	}
	if p.Host != "" {
		if err := setHost(&pool.ConnConfig.Config, cmp.Or(p.ConnString, c.Config.ConnString()), p.Host); err != nil {
			return peerConfig{}, fmt.Errorf("multipool: peer %s: %w", called, err)
		}
	}
	if p.Port != 0 {
		setPort(pool, p.Port)
	}
	if p.ServerName != "" {
		setServerName(pool, p.ServerName)
	}
	split, err := splitHosts(pool)
	switch {
	case err != nil:
		return peerConfig{}, fmt.Errorf("multipool: peer %s: %w", called, err)
	case p.Host == "" && len(split) != 1:
		return peerConfig{}, fmt.Errorf("multipool: peer %s: its connection string names %d hosts: must be one", called, len(split))
	}
	own := split[0]
	if p.ConnString == "" {
		ownPassword(c.Config, own.pool)
	}
	p.Name = cmp.Or(p.Name, own.Name)
	p.Host, p.Port, p.ConnString = own.Host, own.Port, "" // which the template has taken in: fmt prints what is in a pool
	own.Peer = p
	if p.MaxConns > 0 {
		own.pool.MaxConns = p.MaxConns
	}
	return own, nil
}

// check names what cannot be of a peer.
func (p Peer) check() error {
	switch {
	case p.ConnString == "" && p.Host == "":
		return errors.New("neither Host nor ConnString is set")
	case !isHost(p.Host):
		return fmt.Errorf("its Host %w", errNoHost)
	case int(p.Role) >= len(roleNames):
		return fmt.Errorf("Role is %d: unknown", p.Role)
	case p.MaxConns < 0:
		return fmt.Errorf("MaxConns is %d: must not be negative", p.MaxConns)
	case !(p.Weight <= maxWeight):
		return fmt.Errorf("Weight is %v: must be a finite number of at most %d", p.Weight, maxWeight)
	case p.Weight < 0:
		return fmt.Errorf("Weight is %v: must not be negative (set LastResort for a peer that nobody reads while another can be)", p.Weight)
	}
	return nil
}

// called is what an error calls a peer that has no template yet: its name, or its host where that is one.
func (p Peer) called(otherwise string) string {
	if p.Name == "" && isHost(p.Host) {
		return cmp.Or(p.Host, otherwise)
	}
	return cmp.Or(p.Name, otherwise)
}

// errNoHost does not say what was given: it is a connection string, more often than not.
var errNoHost = errors.New("must be a name, an address, or the absolute path of a socket's directory " +
	"(it is not shown, as it may hold a password; a connection string goes into ConnString)")

// isHost reports whether a host may be one. It becomes a part of the peer's name, which is told everywhere.
func isHost(host string) bool {
	return isSocket(host) || !strings.ContainsAny(host, "@/=,") && !strings.ContainsFunc(host, unicode.IsSpace)
}

// isSocket reports whether a host is the directory of a Unix socket.
func isSocket(host string) bool {
	network, _ := pgconn.NetworkAddress(host, 0)
	return network == "unix"
}

// adopt gives to the server of a peer's own connection string, with its TLS, and the identity that is used there. How the
// server has to prove its own stays as the template says where the string says nothing.
func adopt(to *pgconn.Config, connString string) error {
	from, err := pgconn.ParseConfig(connString)
	if err := dsn.CheckForm(connString); err != nil {
		return err
	}
	if err != nil {
		return dsn.ParseError(connString, err)
	}
	if err := dsn.CheckHosts(connString); err != nil {
		return err
	}
	if err := dsn.CheckPeerKeys(connString, ourKeys()); err != nil {
		return err
	}
	graft(to, from, peerFields...)
	to.KerberosSrvName = cmp.Or(from.KerberosSrvName, to.KerberosSrvName)
	to.KerberosSpn = cmp.Or(from.KerberosSpn, to.KerberosSpn)
	if _, given := dsn.Lookup(connString, "channel_binding", ""); given || from.ChannelBinding != "prefer" {
		to.ChannelBinding = from.ChannelBinding
	}
	if _, given := dsn.Lookup(connString, "require_auth", ""); given || from.RequireAuth != "" {
		to.RequireAuth = from.RequireAuth
	}
	return nil
}

// What a configuration says of the way to a server, and what a peer's own connection string always says of it.
var (
	wayFields  = []string{"Host", "Port", "TLSConfig", "Fallbacks"}
	peerFields = append([]string{"SSLNegotiation", "SSLCertMode", "User", "Password", "Database"}, wayFields...)
)

// graft gives to the named fields of from. It does so by a whole copy of from, onto which goes everything else that to has: pgx
// keeps the files of client certificates in a field of its own, which belongs to the *tls.Config of that configuration and
// of no other. For the same reason nothing here clones one: every configuration is a copy that pgx has made, and what is in it is
// changed in place.
func graft(to, from *pgconn.Config, fields ...string) {
	had := reflect.ValueOf(*to)
	*to = *from
	into := reflect.ValueOf(to).Elem()
	for i := range into.NumField() {
		if f := into.Type().Field(i); f.IsExported() && !slices.Contains(fields, f.Name) {
			into.Field(i).Set(had.Field(i))
		}
	}
}

// setHost points cc, which has been made from connString, at one host, with its way of TLS: a certificate is checked for the
// new name.
func setHost(cc *pgconn.Config, connString, host string) error {
	ways, err := waysTo(cc, connString, host)
	if err != nil {
		return err
	}
	port := cc.Port
	for _, w := range ways {
		if w.TLSConfig != nil && w.TLSConfig.ServerName == w.Host {
			w.TLSConfig.ServerName = host
		}
		w.Host, w.Port = host, port
	}
	setWays(cc, ways)
	return nil
}

// waysOf are a configuration's hosts in their order, each as often as there are ways to connect to it.
func waysOf(cc *pgconn.Config) []*pgconn.FallbackConfig {
	return append([]*pgconn.FallbackConfig{{Host: cc.Host, Port: cc.Port, TLSConfig: cc.TLSConfig}}, cc.Fallbacks...)
}

// setWays leaves cc these ways to connect, which are its own.
func setWays(cc *pgconn.Config, ways []*pgconn.FallbackConfig) {
	cc.Host, cc.Port, cc.TLSConfig, cc.Fallbacks = ways[0].Host, ways[0].Port, ways[0].TLSConfig, ways[1:]
}

// waysTo are the ways to a host that cc does not list: those to the first that it lists of the same kind, socket or not.
// There is no TLS on a socket, and pgx forgets there what the string says of it: where cc lists sockets only, and the program
// has not given them TLS of its own, the string is asked again.
func waysTo(cc *pgconn.Config, connString, host string) ([]*pgconn.FallbackConfig, error) {
	all := waysOf(cc)
	like := slices.IndexFunc(all, func(w *pgconn.FallbackConfig) bool { return isSocket(w.Host) == isSocket(host) })
	if like < 0 && isSocket(host) {
		return []*pgconn.FallbackConfig{{}}, nil
	}
	if like < 0 {
		like = slices.IndexFunc(all, func(w *pgconn.FallbackConfig) bool { return w.TLSConfig != nil })
	}
	if like < 0 {
		return saidWays(cc, connString, host)
	}
	to := *all[like]
	return slices.DeleteFunc(all, func(w *pgconn.FallbackConfig) bool { return w.Host != to.Host || w.Port != to.Port }), nil
}

// saidWays are the ways to a host by what connString says; cc takes them in. What cc says otherwise of TLS the program has set
// since: it would be lost, or at odds with the rest.
func saidWays(cc *pgconn.Config, connString, host string) ([]*pgconn.FallbackConfig, error) {
	said, err := pgconn.ParseConfig(dsn.WithHost(connString, host, cc.Port))
	if err != nil {
		return nil, dsn.ParseError(connString, err)
	}
	switch {
	case slices.ContainsFunc(waysOf(said), func(w *pgconn.FallbackConfig) bool { return w.Host != host }):
		return nil, errors.New("what the connection string says of TLS cannot be told for another host: give the peer a ConnString")
	case said.SSLNegotiation != cc.SSLNegotiation:
		return nil, changedError("SSLNegotiation", "sslnegotiation", cc.SSLNegotiation, said.SSLNegotiation)
	case said.SSLCertMode != cc.SSLCertMode:
		return nil, changedError("SSLCertMode", "sslcertmode", cc.SSLCertMode, said.SSLCertMode)
	}
	graft(cc, said, wayFields...)
	return waysOf(cc), nil
}

func changedError(field, key, set, said string) error {
	return fmt.Errorf("the template's %s is %q, and its connection string, by which a host that is no socket has TLS, says %q: set %s there", field, set, said, key)
}

// setPort gives pool's one host another port, also where its way of TLS has a fallback.
func setPort(pool *pgxpool.Config, port uint16) {
	cc := pool.ConnConfig
	for _, f := range cc.Fallbacks {
		if f.Host == cc.Host && f.Port == cc.Port {
			f.Port = port
		}
	}
	cc.Port = port
}

// setServerName has certificates checked for another name than the host's.
func setServerName(pool *pgxpool.Config, name string) {
	for _, w := range waysOf(&pool.ConnConfig.Config) {
		if w.TLSConfig != nil {
			w.TLSConfig.ServerName = name
		}
	}
}

// splitHosts makes one template for every host of config. pgx lists a host twice under sslmode=prefer and allow, once
// with TLS and once without: that is one peer with a fallback.
func splitHosts(config *pgxpool.Config) ([]peerConfig, error) {
	all := waysOf(&config.ConnConfig.Config)
	var names []string
	ways := map[string][]int{} // of every name, by their places in all
	for i, e := range all {
		if !isHost(e.Host) {
			return nil, fmt.Errorf("multipool: host #%d %w", len(names)+1, errNoHost)
		}
		name := peerName(e.Host, e.Port)
		switch known := ways[name]; {
		case len(known) == 0:
			names = append(names, name)
		case len(known) > 1, (all[known[0]].TLSConfig == nil) == (e.TLSConfig == nil):
			return nil, fmt.Errorf("multipool: peer %s is given twice", name)
		}
		ways[name] = append(ways[name], i)
	}
	peers := make([]peerConfig, 0, len(names))
	for _, name := range names {
		own := config.Copy()
		cc := &own.ConnConfig.Config
		copied := waysOf(cc)
		var kept []*pgconn.FallbackConfig
		for _, i := range ways[name] {
			kept = append(kept, copied[i])
		}
		setWays(cc, kept)
		peers = append(peers, peerConfig{Peer: Peer{Name: name, Host: cc.Host, Port: cc.Port}, pool: own})
	}
	for i := range peers[1:] {
		ownPassword(config, peers[i+1].pool)
	}
	return peers, nil
}

// ownPassword looks a peer's password up in .pgpass: pgx does so for the first host of a list only. A password that
// the program has set itself stays.
func ownPassword(config, own *pgxpool.Config) {
	connString := config.ConnString()
	first, err := pgconn.ParseConfig(connString)
	if err != nil || first.Password != config.ConnConfig.Password {
		return
	}
	again, err := pgconn.ParseConfig(dsn.WithHost(connString, own.ConnConfig.Host, own.ConnConfig.Port))
	if err == nil && again.Host == own.ConnConfig.Host && again.Password != "" {
		own.ConnConfig.Password = again.Password
	}
}

func peerName(host string, port uint16) string {
	return net.JoinHostPort(host, strconv.Itoa(int(port)))
}
