package multipool

import (
	"errors"
	"fmt"
	"net/url"
	"os"
	"strconv"
	"strings"

	"github.com/jackc/pgx/v5/pgconn"
)

// What pgx does not tell of a connection string it has parsed, and what it tells too much of one it has not.

// lookup finds a key in a connection string that has been parsed without error, or in the environment (env "": not
// there). pgx keeps neither the keys it knows nor whether a default was given.
func lookup(connString, key, env string) (string, bool) {
	value, found := "", false
	if _, rest, isURL := cutURL(connString); isURL {
		_, query, _ := strings.Cut(rest, "?")
		for pair := range strings.SplitSeq(query, "&") {
			name, v, _ := strings.Cut(pair, "=")
			if decodeURI(name) == key {
				value, found = decodeURI(v), true
			}
		}
	} else {
		value, found = lookupKeyword(connString, key)
	}
	if !found && env != "" {
		value = os.Getenv(env)
		found = value != "" // as pgx has it
	}
	return value, found
}

// decodeURI decodes a part of a connection URI: no form, so a plus is a plus. What is malformed pgx has refused.
func decodeURI(s string) string {
	plain, _ := url.PathUnescape(strings.Trim(s, " "))
	return plain
}

// cutURL splits a connection URI behind its user information, which may hold any character but '@' and '/'.
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

// lookupKeyword finds the last value of key in a keyword/value connection string (PostgreSQL documentation, 34.1.1.1).
func lookupKeyword(s, key string) (value string, found bool) {
	const space = " \t\n\r\v\f"
	for {
		name, rest, ok := strings.Cut(s, "=")
		if !ok {
			return value, found
		}
		rest = strings.TrimLeft(rest, space)
		end, quoted := 0, strings.HasPrefix(rest, "'")
		if quoted {
			rest = rest[1:]
		}
		var b strings.Builder
		for ; end < len(rest); end++ {
			ch := rest[end]
			if quoted && ch == '\'' || !quoted && strings.IndexByte(space, ch) >= 0 {
				break
			}
			if ch == '\\' {
				if end++; end == len(rest) {
					break
				}
				ch = rest[end]
			}
			b.WriteByte(ch)
		}
		if strings.Trim(name, space) == key {
			value, found = b.String(), true
		}
		s = rest[min(end+1, len(rest)):]
	}
}

// withHost returns connString for another server.
func withHost(connString, host string, port uint16) string {
	if head, rest, isURL := cutURL(connString); isURL {
		v := url.Values{"host": {host}, "port": {strconv.Itoa(int(port))}}
		rest = strings.TrimRight(rest, "&")
		sep := "?"
		switch {
		case strings.HasSuffix(rest, "?"):
			sep = ""
		case strings.Contains(rest, "?"):
			sep = "&"
		}
		return head + rest + sep + v.Encode()
	}
	escape := strings.NewReplacer(`\`, `\\`, `'`, `\'`)
	return fmt.Sprintf("%s host='%s' port=%d", connString, escape.Replace(host), port)
}

// connStringError replaces pgconn.ParseConfigError, whose exported ConnString holds the password, and whose cause may
// quote a part of it.
type connStringError struct{ text string }

func (e *connStringError) Error() string { return e.text }

// As gives errors.As a pgconn.ParseConfigError without the string, for programs that look for the type.
func (e *connStringError) As(target any) bool {
	if t, ok := target.(**pgconn.ParseConfigError); ok {
		*t = pgconn.NewParseConfigError("", e.text, nil).(*pgconn.ParseConfigError)
		return true
	}
	return false
}

func newConnStringError(connString string, err error) error {
	text := err.Error()
	if parse := new(pgconn.ParseConfigError); errors.As(err, &parse) {
		// Its text is: cannot parse `<redacted string>`: <what> (<why>)
		if _, what, ok := strings.Cut(text, "`: "); ok {
			text = what
		}
	}
	if first, last := strings.IndexByte(text, '"'), strings.LastIndexByte(text, '"'); strings.Contains(text, "failed to parse as ") && first >= 0 {
		// It quotes the string where it is malformed, which may be behind what looks like the password's end.
		text = text[:first] + "..." + text[last+1:]
	}
	for _, secret := range secretsOf(connString) {
		if sharesRun(text, secret) {
			text = "it is malformed near the password: percent-encode special characters in a URI, quote them in keyword/value form"
			break
		}
	}
	return &connStringError{"multipool: cannot parse the connection string: " + text}
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
		rest = strings.TrimLeft(rest, " \t\n\r\v\f=")
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
