package multipool

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/pgmultipool/multipool/internal/dsn"
)

// Off turns a limit or a timer off in a field whose zero value means its default: [Options].Wait, MaxWaiting,
// StallAfter, WriteReserve and ReturnAfter, and the Time of a [Lag]. In a connection string, 0 has this meaning.
const Off = -1

// Options configures a pool that [Open] makes. Only Config is required. The zero value of every other field means its
// default. [Off] turns off what the comment of a field says it does; any other negative number is an error. The fields
// of Config have the meanings that pgxpool gives them. Open copies the Options, so changing them afterwards has no
// effect.
type Options struct {
	// Config is the template of every peer's pool, from [ParseConfig] or pgxpool.ParseConfig. Required. Its MaxConns,
	// MinConns and the other limits hold for every peer, not for all of them together. With several peers a
	// MaxConnLifetimeJitter of 0 means a tenth of MaxConnLifetime, a negative one ([Off]) none. multipool_* keys in its
	// RuntimeParams are taken from there, and those that its connection string does not have from MULTIPOOL_* variables of the
	// environment, as ParseConfig says; a field of this struct that is not zero wins over its key.
	Config *pgxpool.Config

	// Name is the label that tells the pool from others of the program in logs, events, metrics and Status. The default is
	// the database of Config, or its user if it has no database. Key multipool_name.
	Name string

	// Peers are the servers. If it is empty, they are the hosts of Config.ConnConfig and its Fallbacks.
	Peers []Peer

	// Proxy sets Peer.Proxy of every host of Config.ConnConfig, if Peers is empty, and of every peer that the key
	// multipool_discover finds by dns or srv. Key multipool_proxy.
	Proxy bool

	// Discover, if not nil, is called for the list of the peers: right after the pool was made, then every
	// CheckInterval (made longer or shorter by up to a fifth, at random), and within about a second after an error. It
	// is never called before an earlier call has returned. Its context ends after five seconds; it must return then.
	// See [DiscoverDNS], [DiscoverSRV], [DiscoverReplication]. Key multipool_discover.
	//
	// The list must be complete. The pool tells peers apart by their names. A new peer gets a small share of the calls
	// at first. A peer whose host or port has changed is made anew. A peer that three lists in a row leave out, or two
	// if the peer does not answer either, is drained and closed. The pool keeps a peer that the operator has drained,
	// and one that serves reads or writes that no other peer could take.
	//
	// Calls wait for the first list. The pool uses Peers, or the hosts of Config.ConnConfig, if the first call of
	// Discover fails or takes longer than two seconds, and if no peer takes writes and nothing can be discovered.
	// Otherwise an error, an empty list, or one of more than 64 peers changes nothing. Status.Discovery shows it.
	Discover Discoverer

	// Mode is how calls are spread over the peers. The default is [ModeReplicated]. Key multipool_mode.
	Mode Mode

	// ReturnAfter is how long an earlier peer must have been healthy, under [ModeOrdered], before it gets all calls
	// back. The default is 10 s; with [Off] it gets them back at once. Key multipool_return_after.
	ReturnAfter time.Duration

	// Route is used for whatever neither the context nor the model of a call says. Keys multipool_target,
	// multipool_retry.
	Route Route

	// Balancer chooses among the peers that are equally suitable for a call. By default (nil) the pool draws two at
	// random, by Peer.Weight, and takes the less busy one, so that a pool without load chooses at random. [RoundRobin]
	// and [Nearest] are others. Key multipool_balancer.
	Balancer Balancer

	// Zone is the zone that the program runs in. Reads prefer healthy peers whose Peer.Zone is the same. Other peers
	// serve if there is no such peer, or if none has a free connection. A read that has failed in the zone is sent to
	// another zone before it is sent to the primary. Under [ModeEquivalent] the same holds for writes. Under
	// [ModeOrdered] the peers of the zone come first in the order. By default ("") no peer is preferred. Key
	// multipool_zone.
	Zone string

	// Models are the routes that a context can choose by name; see [WithModel]. By default there are none.
	Models map[string]Route

	// MaxLag excludes from reads the replicas that are further behind the primary. In contrast to Route.MaxLag it is a
	// best effort: if every replica is too far behind, all of them are read. With a MaxLag every peer is checked at
	// least every 700 ms. There is no default limit. Whatever MaxLag is, the pool excludes in the same way a replica
	// whose replay is paused, and one that lacks log of the primary and receives none. Key multipool_max_lag.
	MaxLag Lag

	// CheckInterval is the time between two health checks of a healthy peer. It is made longer or shorter by up to a
	// fifth, at random, so that many programs do not check all at once. Under [ModeReplicated] some checks are more
	// frequent, whatever it is: every 0.8 s, of every peer that could be promoted, while the program uses the primary,
	// and every 25 ms, of every peer, while there is no primary. The default is 5 s, the minimum 10 ms. Key
	// multipool_check_interval.
	CheckInterval time.Duration

	// Wait is how long a call waits, if no peer can take it, until one can. The call's context may end the wait
	// earlier. The default is 5 s; with [Off] a call does not wait. In a new pool a call waits at least two seconds for
	// the first health checks of its peers, whatever Wait and MaxWaiting are. Key multipool_wait.
	Wait time.Duration

	// MaxWaiting is how many calls may wait for a peer at the same time. One more fails at once with a [NoPeerError].
	// The default is 1000; with [Off] no call may wait. Key multipool_max_waiting.
	MaxWaiting int

	// StallAfter is how long statements may run on a peer, without any of them ending, before the pool probes the peer.
	// The default is 500 ms, the minimum 100 ms. With [Off] the pool does not look for hangs, and only the callers'
	// deadlines end them. Key multipool_stall_after.
	StallAfter time.Duration

	// WriteReserve is the fraction of the primary's connections that reads may not use if they go to the primary
	// because no replica can serve them. It reserves at least one connection of two or more. The default is 0.25 and
	// the maximum 0.9. With [Off] nothing is reserved. Key multipool_write_reserve.
	WriteReserve float64

	// NoMonitorConns makes every monitor use an idle connection of its peer's pool for health checks. By default a
	// monitor has a connection of its own, which costs one backend for every peer and program, and shows changes
	// sooner. Key multipool_monitor_conns, which is the opposite: true by default.
	NoMonitorConns bool

	// Hooks are called when something happens; see [Hooks]. It may be nil.
	Hooks *Hooks
}

// Peer configures one server of a pool. The zero value of every field means its default.
type Peer struct {
	// Name identifies the peer in routes, statuses and errors. The default is host:port. No two peers may have the same
	// name.
	Name string

	// ConnString, if not empty, is a connection string with one host for this peer. Its host, port, TLS settings, user,
	// password and database replace those of Options.Config. Its channel_binding, require_auth and Kerberos names do so
	// if it has them. The peer gets the client certificate of its sslcert and sslkey; without them it gets none, not
	// even that of Options.Config. Any other key is an error, since the rest comes from Options.Config.
	ConnString string

	// Host and Port, if set, replace those of ConnString or of Options.Config. Port 0 keeps that port. Host is a name,
	// an address, or the absolute path of the directory of a Unix socket, on which there is no TLS. If Options.Config
	// has Unix sockets only, and Host is a name or an address, TLS is as the connection string of Options.Config says.
	Host string
	Port uint16

	// ServerName, if not empty, is the name to expect in the server's certificate, in place of Host. It is for peers
	// whose Host is an address. It does not change the client certificate, which comes from ConnString or else from
	// Options.Config.
	ServerName string

	// Role, if it is not RoleUnknown, is fixed and never checked. It is for servers that cannot report their role.
	Role Role

	// Proxy declares that more than one server may answer at this address, as behind a pooler or a load balancer.
	//
	// The pool asks such a peer for its role (pg_is_in_recovery), and never relies on what the pooler reports of an
	// earlier session. It makes every regular health check on a new connection. On every new connection of the program
	// it first asks which server this is, which costs one round trip. It closes the connection if that is a primary
	// that was replaced, or a standby while the peer is the primary.
	//
	// A write that a standby behind the proxy refuses waits for the primary. A write that a primary refuses with
	// SQLSTATE 25006, for example because of default_transaction_read_only, fails at once with that error.
	//
	// If a pooler assigns a server to every statement, not to every session, what was asked says nothing about the next
	// statement. docs/failures.md says what else to set, and what is not fenced.
	Proxy bool

	// MaxConns, if not 0, replaces the MaxConns of Options.Config for this peer.
	MaxConns int32

	// Weight is the peer's share of the reads, relative to other peers that can serve them. A peer of weight 2 is drawn
	// twice as often as one of weight 1, and counts as equally busy with twice the calls. The default is 1 and the
	// maximum 1000. Under [ModeEquivalent] it applies to writes too.
	Weight float64

	// LastResort keeps reads away from the peer unless no other peer, including the primary, can serve them. If the
	// peer is the primary, it keeps reads away unless no replica can serve them. Under [ModeEquivalent] it keeps writes
	// away too. Under [ModeOrdered] the peer comes last in the order. Among several peers of last resort Weight decides
	// as usual.
	LastResort bool

	// Zone is the zone that the server is in; see Options.Zone. If it is empty, the peer is in no zone, and no program
	// prefers it.
	Zone string
}

// hiddenPeer and hiddenOptions are what fmt and encoding/json print.
type (
	hiddenPeer    Peer
	hiddenOptions Options
)

func (p Peer) hidden() hiddenPeer {
	if p.ConnString != "" {
		p.ConnString = "(not shown)"
	}
	return hiddenPeer(p)
}

// Format prints the peer as fmt prints a struct, except that it does not show ConnString, which may hold a password. For an
// unexported field of another struct fmt does not call it.
func (p Peer) Format(f fmt.State, verb rune) { printHidden(f, verb, p.hidden()) }

// Format prints the options as fmt prints a struct, with its peers as their Format does.
func (c Options) Format(f fmt.State, verb rune) { printHidden(f, verb, hiddenOptions(c)) }

// printHidden prints a value of a type that has no methods under the name of the type that it stands for.
func printHidden(f fmt.State, verb rune, v any) {
	text := fmt.Sprintf(fmt.FormatString(f, verb), v)
	_, _ = io.WriteString(f, strings.Replace(text, "multipool.hidden", "multipool.", 1))
}

// MarshalJSON marshals the peer as a struct, except that it does not show ConnString, which may hold a password.
func (p Peer) MarshalJSON() ([]byte, error) { return json.Marshal(p.hidden()) }

const (
	defaultCheckInterval = 5 * time.Second
	minCheckInterval     = 10 * time.Millisecond
	defaultReturnAfter   = 10 * time.Second
	defaultWait          = 5 * time.Second
	defaultMaxWaiting    = 1000
	defaultStallAfter    = 500 * time.Millisecond
	minStallAfter        = watchTick
	defaultWriteReserve  = 0.25
	maxWriteReserve      = 0.9
	maxWeight            = 1000

	// Applied by ParseConfig where a connection string of several hosts is silent.
	defaultConnectTimeout = 5 * time.Second
	defaultPingTimeout    = time.Second

	// Applied by the constructors where a pool of several peers has MaxConnLifetimeJitter 0: a tenth of the lifetime
	// as it is by then. ParseConfig cannot: a program that shortens the lifetime afterwards would keep a long jitter.
	lifetimeJitterShare = 10
)

// setting is one connection string key of ours: how its value goes into a Config.
type setting struct {
	key string
	set func(c *Options, value string) error
}

var settings = []setting{
	{"multipool_name", func(c *Options, v string) error {
		c.Name = cmp.Or(c.Name, v)
		return nil
	}},
	{"multipool_mode", func(c *Options, v string) error {
		return setName(&c.Mode, modeNames[:], v)
	}},
	{"multipool_return_after", func(c *Options, v string) error {
		return setDuration(&c.ReturnAfter, v)
	}},
	{"multipool_proxy", func(c *Options, v string) error {
		return setTrue(&c.Proxy, v, true)
	}},
	{"multipool_discover", func(c *Options, v string) error { // it takes Proxy with it
		make, ok := discoveries[v]
		if !ok {
			return fmt.Errorf("must be one of %s", strings.Join(sortedKeys(discoveries), ", "))
		}
		if c.Discover == nil {
			c.Discover = make(c.Config, c.Proxy)
		}
		return nil
	}},
	{"multipool_target", func(c *Options, v string) error {
		return setName(&c.Route.Target, targetNames[:], v)
	}},
	{"multipool_retry", func(c *Options, v string) error {
		return setName(&c.Route.Retry, retryNames[:], v)
	}},
	{"multipool_balancer", func(c *Options, v string) error {
		if !slices.Contains(balancerNames[:], v) {
			return fmt.Errorf("must be one of %s", strings.Join(balancerNames[:], ", "))
		}
		if c.Balancer == nil {
			c.Balancer = balancerNamed(v)
		}
		return nil
	}},
	{"multipool_zone", func(c *Options, v string) error {
		c.Zone = cmp.Or(c.Zone, v)
		return nil
	}},
	{"multipool_max_lag", func(c *Options, v string) error {
		l, err := parseLag(v)
		if err == nil && c.MaxLag == (Lag{}) {
			c.MaxLag = l
		}
		return err
	}},
	{"multipool_check_interval", func(c *Options, v string) error {
		if d, err := time.ParseDuration(v); err == nil && d < minCheckInterval {
			return fmt.Errorf("must be at least %v", minCheckInterval)
		}
		return setDuration(&c.CheckInterval, v)
	}},
	{"multipool_wait", func(c *Options, v string) error {
		return setDuration(&c.Wait, v)
	}},
	{"multipool_max_waiting", func(c *Options, v string) error {
		n, err := strconv.Atoi(v)
		if err != nil {
			return errors.New("must be a whole number")
		}
		if n < 0 {
			return errNegative
		}
		if n == 0 {
			n = Off
		}
		c.MaxWaiting = cmp.Or(c.MaxWaiting, n)
		return nil
	}},
	{"multipool_stall_after", func(c *Options, v string) error {
		if d, err := time.ParseDuration(v); err == nil && d > 0 && d < minStallAfter {
			return fmt.Errorf("must be at least %v, or 0 for none", minStallAfter)
		}
		return setDuration(&c.StallAfter, v)
	}},
	{"multipool_write_reserve", func(c *Options, v string) error {
		share, err := strconv.ParseFloat(v, 64)
		if err != nil || !(share >= 0 && share <= maxWriteReserve) {
			return fmt.Errorf("must be a number from 0 to %v", maxWriteReserve)
		}
		if share == 0 {
			share = Off
		}
		c.WriteReserve = cmp.Or(c.WriteReserve, share)
		return nil
	}},
	{"multipool_monitor_conns", func(c *Options, v string) error {
		return setTrue(&c.NoMonitorConns, v, false)
	}},
	{loadBalanceHosts, func(c *Options, v string) error { // after multipool_target, beside which it means something else
		switch {
		case v != "disable" && v != "random":
			return errors.New("must be one of disable, random")
		case v == "random" || c.Mode != ModeReplicated:
		case c.wantsRole():
			c.Balancer = cmp.Or(c.Balancer, inOrder)
		default:
			c.Mode = ModeOrdered
		}
		return nil
	}},
}

// ourKeys are the keys that this package adds to pgxpool's.
func ourKeys() []string {
	keys := make([]string, len(settings))
	for i, s := range settings {
		keys[i] = s.key
	}
	return keys
}

// loadBalanceHosts is a key of libpq's (PostgreSQL documentation, 34.1.2) that pgx does not know.
const loadBalanceHosts = "load_balance_hosts"

// wantsRole reports whether it has been said which of the servers are wanted, as the primary or the standbys.
func (c *Options) wantsRole() bool {
	_, role := targetOf(c.Config.ConnConfig.ValidateConnect)
	return role || !slices.Contains([]Target{TargetInherit, TargetAuto, TargetAny}, c.Route.Target)
}

// setName sets an enumeration by its name, unless it is set already.
func setName[E ~uint8](field *E, names []string, v string) error {
	i := slices.Index(names, v)
	if i < 0 {
		return fmt.Errorf("must be one of %s", strings.Join(names, ", "))
	}
	*field = cmp.Or(*field, E(i))
	return nil
}

// errNegative is of a connection string: Off is not written there as it is in the struct.
var errNegative = errors.New("must not be negative (0 means none)")

// setTrue sets a field that is not set already where the value is the one that sets it.
func setTrue(field *bool, v string, sets bool) error {
	said, err := strconv.ParseBool(v)
	if err != nil {
		return errors.New("must be true or false")
	}
	*field = *field || said == sets
	return nil
}

func setDuration(field *time.Duration, v string) error {
	d, err := time.ParseDuration(v)
	if err != nil {
		return dsn.ErrNoDuration
	}
	if d < 0 {
		return errNegative
	}
	if d == 0 {
		d = Off
	}
	*field = cmp.Or(*field, d)
	return nil
}

// ParseConfig parses connString as pgxpool.ParseConfig does, and checks the multipool_* keys below. The keys stay in
// ConnConfig.RuntimeParams until a constructor takes them. The error for a multipool_* or pool_* key names the key, the
// value and the bound. No error contains a password.
//
// If connString lists several hosts, or has multipool_discover, ParseConfig sets these fields of the result, except
// those that connString sets:
//
//   - ConnConfig.ConnectTimeout to 5 s and PingTimeout to 1 s. The defaults of pgxpool, two minutes and none, are for a
//     program that has no other server to go to.
//   - ShouldPing to [ShouldPing], which checks a connection without a round trip.
//   - ConnConfig.DialFunc to a dialer with TCP keepalive and, on Linux, TCP_USER_TIMEOUT, which ends a connection to a
//     host that is gone within 15 s. On other systems a connection with unacknowledged data ends when the system gives
//     up, or when the pool finds its peer to be down.
//
// The keys are:
//
//   - multipool_name: the pool's name in logs and metrics (default the database)
//   - multipool_mode: replicated, equivalent, ordered (default replicated)
//   - multipool_return_after: duration string (default 10s; 0 means at once)
//   - multipool_proxy: true or false (default false): true declares every host a Peer.Proxy
//   - multipool_discover: none, dns (all addresses of the hosts), srv (the host is the name of SRV records), replication (the
//     primary's standbys) (default none)
//   - multipool_target: inherit, auto, primary, prefer-replica, replica, any (default inherit, which is auto)
//   - multipool_retry: inherit, safe, reads, never (default inherit, which is safe)
//   - multipool_balancer: default, round-robin, nearest (default default)
//   - multipool_zone: the program's zone (default none)
//   - multipool_max_lag: duration, size such as 16MB, or both with a comma between (default 0, none)
//   - multipool_check_interval: duration string of at least 10ms (default 5s)
//   - multipool_wait: duration string (default 5s; 0 means that a call does not wait)
//   - multipool_max_waiting: integer (default 1000; 0 means none)
//   - multipool_stall_after: duration string of at least 100ms (default 500ms; 0 means that hangs are not looked for)
//   - multipool_write_reserve: number from 0 to 0.9 (default 0.25; 0 means none)
//   - multipool_monitor_conns: true or false (default true)
//   - load_balance_hosts: libpq's key: random, disable (default random); disable is the order of the list: multipool_mode=ordered,
//     or where target_session_attrs or multipool_target ask for a role, the first server of the list that has it
//
// A key that the string does not have may stand in a variable of the environment, as MULTIPOOL_WAIT does for multipool_wait, and
// PGLOADBALANCEHOSTS for load_balance_hosts. Such variables are read here, so that a bad value is an error here, by
// [ParseOptions] and by every constructor; an empty one says nothing. They are not added to RuntimeParams, so that pgx can use what
// is returned. Variables of other names are not looked at.
//
// Two keys that contradict each other are an error: target_session_attrs and multipool_target, load_balance_hosts and
// multipool_mode or multipool_balancer. So is an empty host in a list of several; a key that pgx does not know and that resembles one
// of ours or of pgxpool's (multipool_wiat, Pool_Max_Conns, pool_size), with the name of the likely one; and a string that neither
// begins with postgres:// or postgresql:// nor consists of key=value pairs. Every other key is a run-time parameter, as pgx has it.
func ParseConfig(connString string) (*pgxpool.Config, error) {
	config, err := pgxpool.ParseConfig(connString)
	if err != nil {
		return nil, cmp.Or(dsn.CheckForm(connString), dsn.CheckPoolKeys(connString), dsn.ParseError(connString, err))
	}
	probe := Options{Config: config}
	if err := probe.takeKeys(maps.Clone(config.ConnConfig.RuntimeParams)); err != nil {
		return nil, err
	}
	peers, err := splitHosts(config)
	if err != nil {
		return nil, err
	}
	if len(peers) == 1 && probe.Discover == nil {
		return config, nil
	}
	if _, set := dsn.Lookup(connString, "connect_timeout", "PGCONNECT_TIMEOUT"); !set && config.ConnConfig.ConnectTimeout == 0 {
		config.ConnConfig.ConnectTimeout = defaultConnectTimeout
	}
	if _, set := dsn.Lookup(connString, "pool_ping_timeout", ""); !set && config.PingTimeout == 0 {
		config.PingTimeout = defaultPingTimeout
	}
	config.ShouldPing = ShouldPing
	config.ConnConfig.DialFunc = newDialer().DialContext
	return config, nil
}

// ParseOptions parses connString as [ParseConfig] does, with the same errors, and returns [Options] whose fields have the
// values of the multipool_* keys, so that a program can change them before [Open]. The returned Options.Config no longer
// has the keys.
func ParseOptions(connString string) (Options, error) {
	config, err := ParseConfig(connString)
	if err != nil {
		return Options{}, err
	}
	o := Options{Config: config}
	err = o.takeKeys(config.ConnConfig.RuntimeParams)
	return o, err
}

// saying is the value of one of our keys, and the name of what gives it: the key, or a variable.
type saying struct{ name, value string }

// said returns what is said of our keys: in params, or where neither they nor the connection string say it, nor the
// contrary, in the environment.
func said(params map[string]string, connString string) map[string]saying {
	given := func(key string) bool {
		_, there := params[key]
		_, inString := dsn.Lookup(connString, key, "")
		return there || inString
	}
	all := map[string]saying{}
	for _, s := range settings {
		if value, is := params[s.key]; is {
			all[s.key] = saying{s.key, value}
		} else if value := os.Getenv(variableOf(s.key)); value != "" && !given(s.key) && !slices.ContainsFunc(overruling[s.key], given) {
			all[s.key] = saying{variableOf(s.key), value}
		}
	}
	return all
}

// variableOf is the variable of the environment that stands for one of our keys.
func variableOf(key string) string {
	if key == loadBalanceHosts {
		return "PGLOADBALANCEHOSTS"
	}
	return strings.ToUpper(key)
}

// overruling are the other keys of a string by which the variable of a key is not heeded: they may say the contrary.
var overruling = map[string][]string{
	"multipool_target": {"target_session_attrs"}, "multipool_mode": {loadBalanceHosts}, "multipool_balancer": {loadBalanceHosts},
	loadBalanceHosts: {"multipool_mode", "multipool_balancer"},
}

// takeKeys moves our keys out of params into the fields that are still zero, and with them what the environment says.
func (c *Options) takeKeys(params map[string]string) error {
	connString := c.Config.ConnString()
	if err := dsn.CheckForm(connString); err != nil {
		return err
	}
	if len(c.Peers) == 0 && c.Config.ConnConfig.Fallbacks != nil {
		if err := dsn.CheckHosts(connString); err != nil {
			return err
		}
	}
	ours := ourKeys()
	for _, key := range sortedKeys(params) {
		if err := dsn.CheckKey(key, connString, ours); err != nil {
			return err
		}
	}
	all := said(params, connString)
	for _, s := range settings {
		say, is := all[s.key]
		if !is {
			continue
		}
		if err := s.set(c, say.value); err != nil {
			return fmt.Errorf("multipool: %s=%q: %w", say.name, say.value, err)
		}
		delete(params, s.key)
	}
	if err := checkContradictions(all, connString); err != nil {
		return err
	}
	return c.checkBounds()
}

// checkContradictions names two keys of which one says the contrary of the other. Every value is valid.
func checkContradictions(all map[string]saying, connString string) error {
	attrs := saying{name: "target_session_attrs"}
	attrs.value, _ = dsn.Lookup(connString, attrs.name, "")
	if target := all["multipool_target"]; attrs.value == "" && target.name != "multipool_target" {
		attrs = saying{"PGTARGETSESSIONATTRS", os.Getenv("PGTARGETSESSIONATTRS")} // both are of the environment
	}
	hosts := all[loadBalanceHosts]
	for _, pair := range []struct {
		one   saying
		other string   // a key
		agree []string // values of it
	}{
		{attrs, "multipool_target", attrsTargets[attrs.value]},
		{hosts, "multipool_mode", hostsModes[hosts.value]},
		{hosts, "multipool_balancer", hostsBalancers[hosts.value]},
	} {
		if other, is := all[pair.other]; is && pair.agree != nil && !slices.Contains(pair.agree, other.value) {
			return fmt.Errorf("multipool: %s=%s and %s=%s contradict each other", pair.one.name, pair.one.value, other.name, other.value)
		}
	}
	return nil
}

// What goes with a value of libpq's keys; anything goes with one that is not here.
var (
	attrsTargets = map[string][]string{
		"read-write": {"inherit", "primary"}, "primary": {"inherit", "primary"},
		"read-only": {"inherit", "replica"}, "standby": {"inherit", "replica"}, "prefer-standby": {"inherit", "auto", "prefer-replica"},
	}
	hostsModes     = map[string][]string{"disable": {"ordered"}, "random": {"replicated", "equivalent"}}
	hostsBalancers = map[string][]string{"disable": {"default"}}
)

// checkBounds names the first field whose value cannot be.
func (c *Options) checkBounds() error {
	if err := c.checkSigns(); err != nil {
		return err
	}
	switch {
	case c.CheckInterval != 0 && c.CheckInterval < minCheckInterval:
		return fmt.Errorf("multipool: CheckInterval (multipool_check_interval) is %v: must be at least %v", c.CheckInterval, minCheckInterval)
	case c.StallAfter > 0 && c.StallAfter < minStallAfter:
		return fmt.Errorf("multipool: StallAfter (multipool_stall_after) is %v: must be at least %v", c.StallAfter, minStallAfter)
	case c.WriteReserve > maxWriteReserve || c.WriteReserve != c.WriteReserve:
		return fmt.Errorf("multipool: WriteReserve (multipool_write_reserve) is %v: must be at most %v", c.WriteReserve, maxWriteReserve)
	case c.Config.MaxConns < 1: // of which puddle says that MaxSize must be
		return fmt.Errorf("multipool: Config.MaxConns (pool_max_conns) is %d: must be at least 1", c.Config.MaxConns)
	case c.Config.HealthCheckPeriod <= 0: // at which pgxpool panics, in a goroutine of its own
		return fmt.Errorf("multipool: Config.HealthCheckPeriod (pool_health_check_period) is %v: must be more than 0", c.Config.HealthCheckPeriod)
	case int(c.Mode) >= len(modeNames):
		return fmt.Errorf("multipool: Mode is %d: unknown", c.Mode)
	}
	if err := c.Route.check("Route"); err != nil {
		return err
	}
	for _, name := range sortedKeys(c.Models) {
		if err := c.Models[name].check(fmt.Sprintf("Models[%q]", name)); err != nil {
			return err
		}
	}
	return nil
}

// check names what cannot be of a route in the options; called is where it stands.
func (r Route) check(called string) error {
	switch {
	case int(r.Target) >= len(targetNames):
		return fmt.Errorf("multipool: %s.Target is %d: unknown", called, r.Target)
	case int(r.Retry) >= len(retryNames):
		return fmt.Errorf("multipool: %s.Retry is %d: unknown", called, r.Retry)
	}
	if err := r.MaxLag.check(); err != nil {
		return fmt.Errorf("multipool: %s.MaxLag: %w", called, err)
	}
	return nil
}

// checkSigns names the first field that has a negative number other than Off.
func (c *Options) checkSigns() error {
	for _, field := range []struct {
		name  string
		wrong bool
		value any
	}{
		{"ReturnAfter (multipool_return_after)", c.ReturnAfter < 0 && c.ReturnAfter != Off, c.ReturnAfter},
		{"Wait (multipool_wait)", c.Wait < 0 && c.Wait != Off, c.Wait},
		{"MaxWaiting (multipool_max_waiting)", c.MaxWaiting < 0 && c.MaxWaiting != Off, c.MaxWaiting},
		{"StallAfter (multipool_stall_after)", c.StallAfter < 0 && c.StallAfter != Off, c.StallAfter},
		{"WriteReserve (multipool_write_reserve)", c.WriteReserve < 0 && c.WriteReserve != Off, c.WriteReserve},
	} {
		if field.wrong {
			return fmt.Errorf("multipool: %s is %v: must be positive, 0 for the default, or Off", field.name, field.value)
		}
	}
	if err := c.MaxLag.check(); err != nil {
		return fmt.Errorf("multipool: MaxLag (multipool_max_lag): %w", err)
	}
	return nil
}

// withDefaults returns the configuration with every zero field filled in, and hooks of its own.
func (c Options) withDefaults() Options {
	c.CheckInterval = cmp.Or(c.CheckInterval, defaultCheckInterval)
	c.ReturnAfter = max(cmp.Or(c.ReturnAfter, defaultReturnAfter), 0)
	c.Route.Target = cmp.Or(c.Route.Target, TargetAuto)
	c.Wait = max(cmp.Or(c.Wait, defaultWait), 0)
	c.StallAfter = cmp.Or(c.StallAfter, defaultStallAfter)
	c.WriteReserve = max(cmp.Or(c.WriteReserve, defaultWriteReserve), 0)
	c.MaxWaiting = max(cmp.Or(c.MaxWaiting, defaultMaxWaiting), 0)
	hooks := Hooks{}
	if c.Hooks != nil {
		hooks = *c.Hooks
	}
	c.Hooks = &hooks
	return c
}

// complete turns what the user gave into a configuration without zero fields and the peers' own templates.
func (c Options) complete() (Options, []peerConfig, error) {
	if c.Config == nil {
		return c, nil, errors.New("multipool: Options.Config is required: make it with ParseConfig")
	}
	if c.Config.ConnConfig == nil {
		panic("config must be created by ParseConfig") // as pgxpool.NewWithConfig does
	}
	given := takeIn(c.Config)
	c.Config = given.Copy()
	c.Route.Peers = slices.Clone(c.Route.Peers)
	c.Models = maps.Clone(c.Models)
	for name, r := range c.Models {
		r.Peers = slices.Clone(r.Peers)
		c.Models[name] = r
	}
	if err := c.takeKeys(c.Config.ConnConfig.RuntimeParams); err != nil {
		return c, nil, err
	}
	c.Name = cmp.Or(c.Name, c.Config.ConnConfig.Database, c.Config.ConnConfig.User) // the user's is the server's default, too
	peers, err := c.derivePeers()
	if err != nil {
		return c, nil, err
	}
	c.Peers = slices.Clone(c.Peers)
	for i := range c.Peers {
		c.Peers[i].ConnString = "" // as in the peers' own
	}
	if len(peers) > 1 || c.Discover != nil {
		c.takeSessionAttrs(given.ConnString(), peers)
		spreadLifetimes(c.Config) // the template of peers to come
		for _, p := range peers {
			spreadLifetimes(p.pool)
		}
	}
	return c.withDefaults(), peers, nil
}

// takeSessionAttrs turns target_session_attrs, by which libpq chooses one server, into the pool's route, and clears
// the check that would make a peer's pool refuse its own server.
func (c *Options) takeSessionAttrs(connString string, peers []peerConfig) {
	check := c.Config.ConnConfig.ValidateConnect
	target, role := targetOf(check)
	if check == nil && saysAny(connString) {
		target = TargetAny
	} else if check != nil && !role {
		return // the program's own check
	}
	c.Config.ConnConfig.ValidateConnect = nil
	c.Route.Target = cmp.Or(c.Route.Target, target)
	for _, p := range peers {
		p.pool.ConnConfig.ValidateConnect = nil
	}
}

// targetOf is what a check of pgx's for target_session_attrs asks for; false: it is none of these.
func targetOf(check pgconn.ValidateConnectFunc) (Target, bool) {
	switch {
	case check == nil:
		return TargetInherit, false
	case sameFunc(check, pgconn.ValidateConnectTargetSessionAttrsReadWrite),
		sameFunc(check, pgconn.ValidateConnectTargetSessionAttrsPrimary):
		return TargetPrimary, true
	case sameFunc(check, pgconn.ValidateConnectTargetSessionAttrsReadOnly),
		sameFunc(check, pgconn.ValidateConnectTargetSessionAttrsStandby):
		return TargetReplica, true
	}
	return TargetInherit, sameFunc(check, pgconn.ValidateConnectTargetSessionAttrsPreferStandby)
}
