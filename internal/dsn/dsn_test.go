package dsn

import (
	"errors"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/stretchr/testify/require"
)

func TestLookup(t *testing.T) {
	t.Setenv("DSN_TEST", "from the environment")
	for _, tc := range []struct {
		in, env, want string
		found         bool
	}{
		{"postgres://u:p%40ss@h/db?k=v&k=w", "", "w", true},
		{"postgres://u@h/db?k=a+b%2Bc", "", "a+b+c", true},
		{"postgres://u:k=v@h/db", "", "", false},
		{"postgresql://h", "DSN_TEST", "from the environment", true},
		{`host=h k = 'it''s' `, "", "it", true},
		{`host=h k='a \'b\' c' x=y`, "", "a 'b' c", true},
		{`k=a\ b host=h`, "", "a b", true},
		{"host=h", "", "", false},
	} {
		value, found := Lookup(tc.in, "k", tc.env)
		require.Equal(t, tc.want, value, tc.in)
		require.Equal(t, tc.found, found, tc.in)
	}
}

// Both forms, with another server in them, are what pgconn takes for that server.
func TestWithHost(t *testing.T) {
	for _, in := range []string{"postgres://u:p@h1,h2:7/db?application_name=a", "postgres://u:p@h/db", "postgres://u:p@h/db?", "host=h user=u password=p dbname=db"} {
		for _, host := range []string{"db.example", `/tmp/it's a \ socket`, "::1"} {
			c, err := pgconn.ParseConfig(WithHost(in, host, 6543))
			require.NoError(t, err, in)
			require.Equal(t, host, c.Host)
			require.Equal(t, uint16(6543), c.Port)
			require.Equal(t, "p", c.Password)
			require.Empty(t, c.Fallbacks[min(len(c.Fallbacks), 1):], "at most the same without TLS")
		}
	}
}

func TestNoErrorShowsAPassword(t *testing.T) {
	const secret = "s3cr3t-w0rd"
	for _, in := range []string{
		"postgres://u:" + secret + "@h:port/db", "postgres://u:" + secret + "/x@h/db?sslmode=never", "host=h password='" + secret,
		"host=h password=a " + secret + "=b connect_timeout=x", "postgres://h/db?password=" + secret + "&sslmode=never",
	} {
		_, err := pgconn.ParseConfig(in)
		require.Error(t, err, in)
		text := ParseError(in, err).Error()
		require.NotContains(t, text, secret)
		var parse *pgconn.ParseConfigError
		require.True(t, errors.As(ParseError(in, err), &parse), "a program may look for pgconn's")
		require.NotContains(t, parse.Error()+parse.ConnString, secret)
		require.True(t, strings.HasPrefix(text, "multipool: "))
	}
}
