// Package dsn reads what pgx does not tell of a connection string that it has parsed: which keys it has, and whether a key
// that pgx took for a run-time parameter was meant to be another. Its errors name what is wrong and never show a part of
// a password.
package dsn

import (
	"errors"
	"fmt"
	"iter"
	"maps"
	"math"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
)

// Lookup finds a key in a connection string that has been parsed without error, or else in the environment variable env
// if env is not "". pgx keeps neither the keys that it knows nor whether a default was given.
func Lookup(connString, key, env string) (string, bool) {
	value, found := "", false
	for name, v := range pairs(connString) {
		if name == key {
			value, found = v, true
		}
	}
	if !found && env != "" {
		value = os.Getenv(env)
		found = value != "" // as pgx has it
	}
	return value, found
}

// pairs are the keys of a connection string that has been parsed without error, and their values; of a URI those after the
// question mark.
func pairs(connString string) iter.Seq2[string, string] {
	_, rest, isURL := cutURL(connString)
	if !isURL {
		return keywordPairs(connString)
	}
	return func(yield func(string, string) bool) {
		_, query, _ := strings.Cut(rest, "?")
		for pair := range strings.SplitSeq(query, "&") {
			name, v, is := strings.Cut(pair, "=")
			if is && !yield(decodeURI(name), decodeURI(v)) {
				return
			}
		}
	}
}

// decodeURI decodes a part of a connection URI: no form, so a plus is a plus. What is malformed pgx has refused.
func decodeURI(s string) string {
	plain, _ := url.PathUnescape(strings.Trim(s, " "))
	return plain
}

// cutURL splits a connection URI after its user information, which may hold any character but '@' and '/'.
func cutURL(connString string) (head, rest string, ok bool) {
	for _, scheme := range []string{"postgres://", "postgresql://"} {
		if p, is := strings.CutPrefix(connString, scheme); is {
			at := 0
			if i := strings.IndexAny(p, "@/"); i >= 0 && p[i] == '@' {
				at = i + 1
			}
			return connString[:len(scheme)+at], p[at:], true
		}
	}
	return "", "", false
}

// blanks separate what stands in a keyword/value connection string.
const blanks = " \t\n\r\v\f"

// keywordPairs splits a keyword/value connection string into its pairs (PostgreSQL documentation, 34.1.1.1).
func keywordPairs(s string) iter.Seq2[string, string] {
	return func(yield func(string, string) bool) {
		for s := s; ; {
			name, rest, ok := strings.Cut(s, "=")
			if !ok {
				return
			}
			value, behind := cutValue(strings.TrimLeft(rest, blanks))
			if !yield(strings.Trim(name, blanks), value) {
				return
			}
			s = behind
		}
	}
}

// cutValue splits a keyword/value string after its first value.
func cutValue(s string) (value, rest string) {
	s, quoted := strings.CutPrefix(s, "'")
	var b strings.Builder
	end := 0
	for ; end < len(s); end++ {
		ch := s[end]
		if quoted && ch == '\'' || !quoted && strings.IndexByte(blanks, ch) >= 0 {
			break
		}
		if ch == '\\' {
			if end++; end == len(s) {
				break
			}
			ch = s[end]
		}
		b.WriteByte(ch)
	}
	return b.String(), s[min(end+1, len(s)):]
}

// WithHost returns connString for another server.
func WithHost(connString, host string, port uint16) string {
	if head, rest, isURL := cutURL(connString); isURL {
		at := "host=" + strings.ReplaceAll(url.QueryEscape(host), "+", "%20") + "&port=" + strconv.Itoa(int(port)) // no form: a plus is a plus
		rest = strings.TrimRight(rest, "&")
		sep := "?"
		switch {
		case strings.HasSuffix(rest, "?"):
			sep = ""
		case strings.Contains(rest, "?"):
			sep = "&"
		}
		return head + rest + sep + at
	}
	escape := strings.NewReplacer(`\`, `\\`, `'`, `\'`)
	return fmt.Sprintf("%s host='%s' port=%d", connString, escape.Replace(host), port)
}

// CheckForm names the form where a string, whether or not pgx takes it, is neither a URI nor key=value pairs: of another
// scheme it makes one long key, which the server refuses.
func CheckForm(connString string) error {
	if _, _, isURL := cutURL(connString); isURL || strings.Trim(connString, blanks) == "" {
		return nil
	}
	if key, _, is := strings.Cut(connString, "="); is && !strings.ContainsAny(key, ":/@?,[") {
		return nil
	}
	return &stringError{"multipool: cannot parse the connection string: it must begin with postgres:// or postgresql://, or be key=value pairs"}
}

// CheckHosts names an empty element of a list of hosts. To libpq it is the default host: to a pool of several servers one
// more, which nobody meant.
func CheckHosts(connString string) error {
	hosts := strings.Split(hostsOf(connString), ",")
	if i := slices.IndexFunc(hosts, func(h string) bool { return strings.Trim(h, " ") == "" }); i >= 0 && len(hosts) > 1 {
		return &stringError{fmt.Sprintf("multipool: host #%d of %d in the list is empty", i+1, len(hosts))}
	}
	return nil
}

// hostsOf is the list of hosts of a connection string that has been parsed without error, or else of the environment.
func hostsOf(connString string) string {
	if hosts, given := Lookup(connString, "host", ""); given {
		return hosts
	}
	if _, rest, isURL := cutURL(connString); isURL {
		// What a port is does not matter here, so that the colons of an address do no harm either.
		if end := strings.IndexAny(rest, "/?"); end >= 0 {
			rest = rest[:end]
		}
		var hosts []string
		for h := range strings.SplitSeq(decodeURI(rest), ",") {
			if strings.HasPrefix(h, ":") {
				h = "" // a port alone
			}
			hosts = append(hosts, h)
		}
		if list := strings.Join(hosts, ","); list != "" {
			return list
		}
	}
	hosts, _ := Lookup("", "", "PGHOST")
	return hosts
}

// CheckKey names a run-time parameter that was meant to be a key of ours or of pgxpool's, and the key that was meant. No
// server has a parameter of such a name.
func CheckKey(key, connString string, ours []string) error {
	if slices.Contains(KnownKeys(ours), key) {
		return nil
	}
	like, near := likelyKey(key, ours)
	if !near {
		return nil
	}
	if holdsSecret(key, connString) {
		return &stringError{"multipool: unknown key (it is not shown, as it may be a part of the password: " + like + ")"}
	}
	return fmt.Errorf("multipool: unknown key %s (%s)", key, like)
}

// likelyKey says which key was meant by one that is not known; false: it looks like none of them. A name with a dot is a
// program's own parameter.
func likelyKey(key string, ours []string) (string, bool) {
	if strings.Contains(key, ".") {
		return "", false
	}
	folded := strings.ReplaceAll(strings.ToLower(key), "-", "_")
	best, least := "", maxTypos+1
	var kin []string // of its prefix
	for _, known := range KnownKeys(ours) {
		if d := editDistance(folded, known, least); d < least {
			best, least = known, d
		}
		for _, prefix := range []string{"multipool", "pool_"} {
			if strings.HasPrefix(folded, prefix) && strings.HasPrefix(known, prefix) {
				kin = append(kin, known)
			}
		}
	}
	switch {
	case best != "":
		return "did you mean " + best + "?", true
	case len(kin) > 0:
		return "known: " + strings.Join(kin, ", "), true
	}
	return "", false
}

// maxTypos is by how many letters a key may differ from the one that was meant.
const maxTypos = 2

// editDistance is Levenshtein's, of strings that differ by less than limit; of others any number that is not less.
func editDistance(a, b string, limit int) int {
	if len(a) >= len(b)+limit || len(b) >= len(a)+limit {
		return limit
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost = 1 + min(diagonal, row[j], row[j+1])
			}
			diagonal, row[j+1] = row[j+1], cost
		}
	}
	return row[len(b)]
}

// KnownKeys returns ours, the keys that the package adds, and after them pgxpool's.
func KnownKeys(ours []string) []string {
	return slices.Concat(ours, slices.Sorted(maps.Keys(PoolKeys)))
}

// PeerKeys are the keys of a peer's own connection string: which server it is, how it is known to be it, and who asks.
var PeerKeys = []string{
	"host", "port", "dbname", "database", "user", "password", "passfile", "service", "servicefile",
	"ssl", "sslmode", "sslrootcert", "sslcert", "sslkey", "sslpassword", "sslcertmode", "sslnegotiation", "sslsni",
	"channel_binding", "require_auth", "krbsrvname", "krbspn",
}

// CheckPeerKeys names a key that a peer's own connection string cannot have: what is said there, and not heeded, would be
// believed to hold.
func CheckPeerKeys(connString string, ours []string) error {
	behind := false // the password
	for key := range pairs(connString) {
		switch {
		case slices.Contains(PeerKeys, key):
			behind = behind || strings.HasSuffix(key, "password")
		case !IsCommonKey(key, ours) && (behind || holdsSecret(key, connString)):
			// Where a password should have been quoted or encoded, what is taken for a key is a part of it.
			return fmt.Errorf("ConnString has a key behind the password that is not a peer's own, or the password is not quoted (its own are %s)", strings.Join(PeerKeys, ", "))
		default:
			meant := ""
			if like, near := likelyKey(key, ours); near && !IsCommonKey(key, ours) {
				meant = " (" + like + ")"
			}
			return fmt.Errorf("ConnString: %s is not a peer's own%s: set it in Options.Config (its own are %s)", key, meant, strings.Join(PeerKeys, ", "))
		}
	}
	return nil
}

// IsCommonKey reports whether a key is one beyond doubt, and no part of a password.
func IsCommonKey(key string, ours []string) bool {
	return slices.Contains(KnownKeys(ours), key) ||
		slices.Contains([]string{"application_name", "connect_timeout", "options", "target_session_attrs"}, key)
}

// stringError replaces pgconn.ParseConfigError, whose exported ConnString holds the password, and whose cause may
// quote a part of it.
type stringError struct{ text string }

func (e *stringError) Error() string { return e.text }

// As gives errors.As a pgconn.ParseConfigError without the string, for programs that look for the type.
func (e *stringError) As(target any) bool {
	if t, ok := target.(**pgconn.ParseConfigError); ok {
		*t = pgconn.NewParseConfigError("", e.text, nil).(*pgconn.ParseConfigError)
		return true
	}
	return false
}

// ParseError returns pgconn's error of a string that it cannot parse, without the string and without the password.
func ParseError(connString string, err error) error {
	text := err.Error()
	if parse := new(pgconn.ParseConfigError); errors.As(err, &parse) {
		// Its text is: cannot parse `<redacted string>`: <what> (<why>)
		if _, what, ok := strings.Cut(text, "`: "); ok {
			text = what
		}
	}
	if first, last := strings.IndexByte(text, '"'), strings.LastIndexByte(text, '"'); strings.Contains(text, "failed to parse as ") && first >= 0 {
		// It quotes the string where it is malformed, which may be after what looks like the password's end.
		text = text[:first] + "..." + text[last+1:]
	}
	if holdsSecret(text, connString) {
		text = "it is malformed near the password: percent-encode special characters in a URI, quote them in keyword/value form"
	}
	return &stringError{"multipool: cannot parse the connection string: " + text}
}

// PoolKeys are pgxpool's keys, each with what its value must be.
var PoolKeys = map[string]func(string) error{
	"pool_max_conns":                wholeNumber(1),
	"pool_min_conns":                wholeNumber(math.MinInt32),
	"pool_min_idle_conns":           wholeNumber(math.MinInt32),
	"pool_max_conn_lifetime":        duration,
	"pool_max_conn_lifetime_jitter": duration,
	"pool_max_conn_idle_time":       duration,
	"pool_health_check_period":      duration,
	"pool_ping_timeout":             duration,
}

func wholeNumber(least int64) func(string) error {
	return func(v string) error {
		if n, err := strconv.ParseInt(v, 10, 32); err != nil || n < least {
			return fmt.Errorf("must be a whole number from %d to %d", least, math.MaxInt32)
		}
		return nil
	}
}

// ErrNoDuration says what a duration must be.
var ErrNoDuration = errors.New("must be a duration such as 500ms or 5s")

func duration(v string) error {
	if _, err := time.ParseDuration(v); err != nil {
		return ErrNoDuration
	}
	return nil
}

// CheckPoolKeys returns an error that names the key of pgxpool's, and its value, which pgxpool refuses without naming them. It
// returns nil if none of those keys is wrong.
func CheckPoolKeys(connString string) error {
	config, err := pgconn.ParseConfig(connString)
	if err != nil {
		return nil
	}
	for _, key := range slices.Sorted(maps.Keys(PoolKeys)) {
		value, given := config.RuntimeParams[key]
		if !given {
			continue
		}
		if err := PoolKeys[key](value); err != nil {
			if !holdsSecret(value, connString) {
				key = fmt.Sprintf("%s=%q", key, value)
			}
			return &stringError{fmt.Sprintf("multipool: %s: %v", key, err)}
		}
	}
	return nil
}

// holdsSecret reports whether text may hold a part of connString's password.
func holdsSecret(text, connString string) bool {
	return slices.ContainsFunc(secretsOf(connString), func(secret string) bool { return sharesRun(text, secret) })
}

// secretsOf returns everything in a string, well-formed or not, that might be a password: too much rather than too
// little.
func secretsOf(connString string) []string {
	var out []string
	add := func(s string) {
		out = append(out, s)
		if plain, err := url.QueryUnescape(s); err == nil && plain != s {
			out = append(out, plain)
		}
	}
	if i := strings.LastIndexByte(connString, '@'); i >= 0 {
		head := connString[:i]
		if _, rest, ok := strings.Cut(head, "://"); ok {
			head = rest
		}
		if _, password, ok := strings.Cut(head, ":"); ok {
			add(password)
		}
	}
	for s := connString; ; {
		_, rest, ok := strings.Cut(s, "password")
		if !ok {
			return out
		}
		rest = strings.TrimLeft(rest, blanks+"=")
		end := strings.IndexAny(rest, "& \t\n")
		if quoted, is := strings.CutPrefix(rest, "'"); is {
			rest = quoted
			end = strings.IndexByte(rest, '\'')
		}
		if end < 0 {
			end = len(rest)
		}
		add(rest[:end])
		s = rest
	}
}

// sharesRun reports whether text holds secret, or any run of four of its characters.
func sharesRun(text, secret string) bool {
	const run = 4
	if secret == "" {
		return false
	}
	if len(secret) <= run {
		return strings.Contains(text, secret)
	}
	for i := 0; i+run <= len(secret); i++ {
		if strings.Contains(text, secret[i:i+run]) {
			return true
		}
	}
	return false
}
