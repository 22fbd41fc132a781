package multipool

import (
	"context"
	"io"
	"maps"
	"reflect"
	"strings"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/pgmultipool/multipool/internal/dsn"
	"github.com/pgmultipool/multipool/internal/quota"
)

// What Config gives out is for pgx and pgxpool: they send every run-time parameter to the server, and connect to the first
// host that answers. And it is for a constructor of ours, which gets from it what the first one got. So our keys are taken
// out of it and carried along where only we find them, and who shall be connected to is said by a function of our own.

// giveOut makes the configuration that Config returns of one that has come in. primary says that what the program
// connects to is to be the primary, where it has not said otherwise.
func giveOut(given *pgxpool.Config, primary bool) *pgxpool.Config {
	c := given.Copy()
	cc := c.ConnConfig
	keys := maps.Clone(cc.RuntimeParams)
	maps.DeleteFunc(keys, func(key, _ string) bool { return !isOurKey(key) })
	maps.DeleteFunc(cc.RuntimeParams, func(key, _ string) bool { return isOurKey(key) })
	if len(keys) > 0 {
		cc.BuildFrontend = (&carrier{cc.BuildFrontend, keys}).buildFrontend
	}
	if primary && cc.ValidateConnect == nil && !saysAny(c.ConnString()) {
		cc.ValidateConnect = wantPrimary
	}
	return c
}

// takeIn returns a copy of what a constructor is given, as it was before giveOut, or a pool of ours, had it in hand. A key
// that the program has set since wins over the one that was carried.
func takeIn(given *pgxpool.Config) *pgxpool.Config {
	c := given.Copy()
	cc := c.ConnConfig
	cc.Tracer = ownTracer(cc.Tracer)
	if sameFunc(cc.ValidateConnect, wantPrimary) || sameFunc(cc.ValidateConnect, preferReplica) {
		cc.ValidateConnect = nil
	}
	if !sameFunc(cc.BuildFrontend, (*carrier)(nil).buildFrontend) {
		return c
	}
	var ask asked
	cc.BuildFrontend(&ask, io.Discard)
	keys := maps.Clone(ask.carrier.keys)
	maps.Copy(keys, cc.RuntimeParams)
	cc.BuildFrontend, cc.RuntimeParams = ask.carrier.own, keys
	return c
}

// carrier carries our keys in a configuration: a field that is never nil, and that a program replaces hardly ever, has a
// function of ours, and so has every copy.
type carrier struct {
	own  pgconn.BuildFrontendFunc
	keys map[string]string
}

func (c *carrier) buildFrontend(r io.Reader, w io.Writer) *pgproto3.Frontend {
	if ask, is := r.(*asked); is {
		ask.carrier = c
		return nil
	}
	return c.own(r, w)
}

// asked is what a carrier is asked with.
type asked struct{ carrier *carrier }

func (*asked) Read([]byte) (int, error) { return 0, io.EOF }

// wantPrimary and preferReplica are pgx's checks where the program has asked for none: other functions, so that takeIn
// tells them from target_session_attrs.
func wantPrimary(ctx context.Context, pg *pgconn.PgConn) error {
	return pgconn.ValidateConnectTargetSessionAttrsPrimary(ctx, pg)
}

func preferReplica(ctx context.Context, pg *pgconn.PgConn) error {
	return pgconn.ValidateConnectTargetSessionAttrsPreferStandby(ctx, pg)
}

// checkOf returns what chooses the server of a connection that the program makes itself, from a copy of the configuration of
// the pool that follows.
func checkOf(k quota.Pool) pgconn.ValidateConnectFunc {
	if k == quota.Replicas {
		return preferReplica
	}
	return wantPrimary
}

func isOurKey(key string) bool {
	return strings.HasPrefix(key, "multipool_") || key == loadBalanceHosts
}

// saysAny reports whether a connection string asks for any server, of which pgx tells as little as of one that says
// nothing.
func saysAny(connString string) bool {
	v, _ := dsn.Lookup(connString, "target_session_attrs", "PGTARGETSESSIONATTRS")
	return v == "any"
}

// sameFunc reports whether two functions, or methods of whatever receivers, are the same.
func sameFunc[F any](a, b F) bool {
	return reflect.ValueOf(a).Pointer() == reflect.ValueOf(b).Pointer()
}
