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
)

// Off turns off what a field bounds or times: [Options].Wait, MaxWaiting, StallAfter, WriteReserve, ReturnAfter, and the
// Time of a [Lag], where the zero means the default. In a connection string it is 0.
const Off = -1

// Options are everything there is to set on a pool that [Open] makes. A zero field means its default, and [Off] in a field
// whose comment says so that there is none. Any other negative number is an error, except in Config, whose fields are
// pgxpool's. Open takes a copy; changing it afterwards has no effect.
type Options struct {
	// Pool is the template of every peer's pool, from [ParseConfig] or pgxpool.ParseConfig. Required. Its MaxConns,
	// MinConns and the other limits hold for each peer, not for all of them together. With several peers a
	// MaxConnLifetimeJitter of 0 means a tenth of MaxConnLifetime, a negative one ([Off]) none. multipool_* keys in its
	// RuntimeParams are taken from there, and those that its connection string does not have from MULTIPOOL_* variables of the
	// environment, as ParseConfig says; a field of this struct that is not zero wins over its key.
	Config *pgxpool.Config

	// Name tells the pool from others of the program: a label of logs, events, metrics and Status, and nothing else. Default:
	// the database of Config, or its user where it has none. Key multipool_name.
	Name string

	// Peers are the servers. Empty: the hosts of Config.ConnConfig and its Fallbacks.
	Peers []Peer

	// Proxy says of every host of Config.ConnConfig, where Peers is empty, and of every peer that the key multipool_discover
	// finds by dns or srv, that it is a Peer.Proxy. Key multipool_proxy.
	Proxy bool

	// Discover, where set, is asked for the peers that there are: at first, and then every CheckInterval, spread by a
	// fifth at random; after an error within about a second. What it returns is the whole list; peers are told apart by
	// their names. A new one is used gently at first, one that is at another host or port by the same name is made
	// anew, one that is missing three times in a row (twice, if it does not answer either) is drained and closed; but
	// not while it serves and nobody would take the reads, or the writes, without it, nor one that is drained by the
	// operator. Until the first answer calls wait;
	// where that fails, or takes two seconds, or nobody takes writes and nothing can be discovered, Peers or the hosts
	// of Config.ConnConfig are used. An error, an empty list, or one of more than 64 peers changes nothing else; Status
	// tells it. It must heed its context, which ends after five seconds. See
	// [DiscoverDNS], [DiscoverSRV], [DiscoverReplication]. Key multipool_discover.
	Discover Discoverer

	// Mode is how the peers stand to each other. Key multipool_mode.
	Mode Mode

	// ReturnAfter is how long an earlier peer must have been well under ModeOrdered before it takes everything back. Default
	// 10 s; [Off]: at once. Key multipool_return_after.
	ReturnAfter time.Duration

	// Route is what holds where the context and the model say nothing. Keys multipool_target, multipool_retry.
	Route Route

	// Balancer chooses among the peers that may take a call alike. Nil: the default, of two drawn at random by Peer.Weight
	// the less busy one, so that an idle pool is random. [RoundRobin] and [Nearest] are others. Key multipool_balancer.
	Balancer Balancer

	// Zone is where the program runs. Reads prefer healthy peers whose Peer.Zone is the same; where there is none, or
	// those have no free connection, the others serve, and a read that has failed in the zone goes to another before it
	// goes to the primary. Under ModeEquivalent this holds of writes too; under ModeOrdered the peers of the zone come
	// first in the order. Default: no zone, and no preference. Key multipool_zone.
	Zone string

	// Models are named routes; see [WithModel].
	Models map[string]Route

	// MaxLag leaves replicas out of the reads that are further behind the primary, as Route.MaxLag does, but as a best
	// effort: if every replica is behind, all are read. Peers are then looked at every 700 ms at least. Default: none. Whatever it says,
	// replicas whose replay was paused, or that lack what the primary has while nothing fetches it, are left out in the
	// same way. Key multipool_max_lag.
	MaxLag Lag

	// CheckInterval is how often each peer's monitor looks at it while it is well; spread by a fifth at random so
	// that the programs of a fleet do not look all at once. Whatever it says, under ModeReplicated every peer that could be
	// promoted is looked at every 0.8 s while the program uses the primary, and every peer every 25 ms while there is no
	// primary. Default 5 s, at least 10 ms. Key multipool_check_interval.
	CheckInterval time.Duration

	// Wait is how long a call waits for a peer that can take it where none can, within its own context. Default 5 s;
	// [Off]: it does not wait. For the first looks at the peers of a new pool it waits two seconds at least,
	// whatever this and MaxWaiting say. Key multipool_wait.
	Wait time.Duration

	// MaxWaiting is how many calls may wait at once; one more fails with [NoPeerError]. Default 1000; [Off]: none.
	// Key multipool_max_waiting.
	MaxWaiting int

	// StallAfter is how long statements may run on a peer without any of them ending before the peer is probed. Default
	// 500 ms, at least 100 ms; [Off]: hangs are found by the callers' deadlines alone. Key multipool_stall_after.
	StallAfter time.Duration

	// WriteReserve is the part of the primary's connections that reads leave alone which fall back to it because no
	// replica can serve. Default 0.25, one connection at least where there are two; at most 0.9; [Off]: none. Key
	// multipool_write_reserve.
	WriteReserve float64

	// NoMonitorConns makes the monitors look through an idle connection of the peer's pool instead of one of their
	// own: one backend less per peer and program, and later news. Key multipool_monitor_conns (true by default).
	NoMonitorConns bool

	// Hooks are told what happens; see [Hooks]. May be nil.
	Hooks *Hooks
}

// Peer is one server of a pool.
type Peer struct {
	// Name is what routes, status and errors call it. Default: host:port. Names must differ.
	Name string

	// ConnString, where set, is a connection string of this peer's own (one host): its host, port, TLS, user, password
	// and database replace those of Options.Config, its channel_binding, require_auth and Kerberos names where it has them.
	// Its sslcert and sslkey are the client certificate that this peer is shown; without them it is shown none, not that of
	// Options.Config. Another key in it is an error: the rest is Options.Config's.
	ConnString string

	// Host and Port, where set, replace those of Options.Config or of ConnString. Port 0 keeps the template's. Host is a name,
	// an address, or the absolute path of a Unix socket's directory, which has no TLS. To a host beside a template of sockets
	// TLS is as the template's connection string says.
	Host string
	Port uint16

	// ServerName, where set, is the name in the server's certificate, where that is not Host: for peers by address. It changes
	// nothing about the client certificate, which is that of ConnString or else of Options.Config.
	ServerName string

	// Role, where it is not RoleUnknown, is fixed and never checked: for servers that cannot tell it.
	Role Role

	// Proxy says that more than one server may answer at this address, as behind a pooler or a load balancer. The role
	// of such a peer is asked (pg_is_in_recovery), never taken from what the pooler reports of some earlier session. Each of
	// its regular looks is made on a new connection, and each new connection of the program's tells which server it has met
	// before anything else runs there, which costs one round trip: where that is a primary that has been replaced, or a
	// standby while the peer takes the writes, it is closed. A write that a standby refuses there waits for the primary; one
	// that a primary refuses with 25006, as by default_transaction_read_only, fails with that at once. Where a pooler hands on
	// statements instead of sessions none of it binds the next statement. docs/failures.md says what else to set, and
	// what is not fenced.
	Proxy bool

	// MaxConns, where it is not 0, replaces Options.Config's MaxConns for this peer.
	MaxConns int32

	// Weight is the peer's part of the reads beside others that may serve them: one of weight 2 is drawn twice as often as
	// one of weight 1, and counts as equally busy with twice the calls. 0 means 1; at most 1000. Under ModeEquivalent
	// writes go by weight too.
	Weight float64

	// LastResort keeps the reads from the peer unless nobody else can serve them, the primary included; on the primary,
	// unless no replica can. Under ModeEquivalent writes keep away too; under ModeOrdered the peer comes last in the order.
	// Among several peers of last resort Weight decides as among others.
	LastResort bool

	// Zone is where the server stands; see Options.Zone. Empty: in none, which is no program's own.
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
		return errNoDuration
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

// ParseConfig parses connString as pgxpool.ParseConfig does, multipool_* keys included: they are checked here and stay
// in ConnConfig.RuntimeParams until a constructor takes them. Where the string lists several hosts, or has
// multipool_discover, it sets what it is silent about, visibly: ConnConfig.ConnectTimeout to 5 s and PingTimeout to 1 s
// (pgxpool's defaults, two minutes and none, are for a program that has nowhere else to go), [ShouldPing] to look
// instead of ping, and ConnConfig.DialFunc to a dialer with TCP keepalive and, on Linux, TCP_USER_TIMEOUT, by which a
// connection to a host that is gone ends within 15 s; on other systems one with data under way ends when that system gives
// it up, or when its peer is found to be down. The error of a multipool_* or pool_* key names the key, the value
// and the bound; none holds a password.
//
//   - multipool_name: the pool's name in logs and metrics (default the database)
//   - multipool_mode: replicated, equivalent, ordered (default replicated)
//   - multipool_return_after: duration string (default 10s; 0: at once)
//   - multipool_proxy: true or false (default false): true declares every host a Peer.Proxy
//   - multipool_discover: none, dns (all addresses of the hosts), srv (the host is the name of SRV records), replication (the
//     primary's standbys) (default none)
//   - multipool_target: inherit, auto, primary, prefer-replica, replica, any (default inherit, which is auto)
//   - multipool_retry: inherit, safe, reads, never (default inherit, which is safe)
//   - multipool_balancer: default, round-robin, nearest (default default)
//   - multipool_zone: the program's zone (default none)
//   - multipool_max_lag: duration, size such as 16MB, or both with a comma between (default 0, none)
//   - multipool_check_interval: duration string of at least 10ms (default 5s)
//   - multipool_wait: duration string (default 5s; 0: a call does not wait)
//   - multipool_max_waiting: integer (default 1000; 0: none)
//   - multipool_stall_after: duration string of at least 100ms (default 500ms; 0: hangs are not looked for)
//   - multipool_write_reserve: number from 0 to 0.9 (default 0.25; 0: none)
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
		return nil, cmp.Or(checkForm(connString), poolKeyError(connString), newConnStringError(connString, err))
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
	if _, set := lookup(connString, "connect_timeout", "PGCONNECT_TIMEOUT"); !set && config.ConnConfig.ConnectTimeout == 0 {
		config.ConnConfig.ConnectTimeout = defaultConnectTimeout
	}
	if _, set := lookup(connString, "pool_ping_timeout", ""); !set && config.PingTimeout == 0 {
		config.PingTimeout = defaultPingTimeout
	}
	config.ShouldPing = ShouldPing
	config.ConnConfig.DialFunc = newDialer().DialContext
	return config, nil
}

// ParseOptions parses connString as [ParseConfig] does, and returns what its multipool_* keys set as fields, so that a
// program can change them before [Open]. The keys are gone from the returned Options.Config. Its errors are
// ParseConfig's.
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
		_, inString := lookup(connString, key, "")
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
	if err := checkForm(connString); err != nil {
		return err
	}
	if len(c.Peers) == 0 && c.Config.ConnConfig.Fallbacks != nil {
		if err := checkHosts(connString); err != nil {
			return err
		}
	}
	for _, key := range sortedKeys(params) {
		if err := checkKey(key, connString); err != nil {
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
	attrs.value, _ = lookup(connString, attrs.name, "")
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
