package multipool

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/pgmultipool/multipool/internal/pgfake"
)

// Names that have several addresses, and addresses that move from one server to another.

// homes is a pool whose host db has the addresses a and b, a server at each.
type homes struct {
	at   map[string]*pgfake.Peer
	pool *MultiPool
}

func inHomes(t *testing.T, connString string, f func(ctx context.Context, x *homes)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		x := &homes{at: map[string]*pgfake.Peer{}}
		network := pgfake.Network{}
		for _, name := range []string{"a", "b", "replica"} {
			x.at[name] = pgfake.New(pgfake.Options{Standby: name == "replica"})
			x.at[name].Handle(answering(nil))
			network[name+":5432"] = x.at[name]
		}
		defer network.Close()
		pool, err := ParseConfig(connString)
		require.NoError(t, err)
		pool.ConnConfig.DialFunc = network.Dial
		pool.ConnConfig.LookupFunc = func(_ context.Context, host string) ([]string, error) {
			if host == "db" {
				return []string{"a", "b"}, nil
			}
			return []string{host}, nil
		}
		x.pool, err = NewWithConfig(t.Context(), pool)
		require.NoError(t, err)
		defer x.pool.Close()
		f(context.Background(), x)
	})
}

// used returns the address of db on which the pool writes, and the other.
func (x *homes) used(ctx context.Context, t *testing.T) (now, other *pgfake.Peer) {
	t.Helper()
	const write = "insert into t values (0)"
	before := x.at["a"].Count(write)
	_, err := x.pool.Exec(ctx, write)
	require.NoError(t, err)
	if x.at["a"].Count(write) > before {
		return x.at["a"], x.at["b"]
	}
	return x.at["b"], x.at["a"]
}

func TestTheOnlyHostsOtherAddressIsUsed(t *testing.T) {
	for name, leave := range map[string]func(*pgfake.Peer){
		"dies":              (*pgfake.Peer).Die,
		"becomes a standby": func(p *pgfake.Peer) { p.SetStandby(true); p.CutConns() },
		"swallows packets":  (*pgfake.Peer).Isolate,
	} {
		t.Run(name, func(t *testing.T) {
			inHomes(t, "postgres://app@db/app?sslmode=disable&target_session_attrs=read-write&connect_timeout=1", func(ctx context.Context, x *homes) {
				for range 3 { // from one to the other and back
					now, other := x.used(ctx, t)
					leave(now)
					lost, cancel := context.WithTimeout(ctx, 5*time.Second)
					_ = x.pool.Ping(lost) // what pgxpool loses, too
					cancel()
					then, _ := x.used(ctx, t)
					assert.Same(t, other, then)
					now.SetStandby(false)
					now.Thaw()
					now.Revive()
				}
			})
		})
	}
}

func TestADeadAddressOfAPeerGivesWayToTheOther(t *testing.T) {
	for name, leave := range map[string]func(*pgfake.Peer){"dies": (*pgfake.Peer).Die, "swallows packets": (*pgfake.Peer).Isolate} {
		t.Run(name, func(t *testing.T) {
			inHomes(t, "postgres://app@db,replica/app?sslmode=disable", func(ctx context.Context, x *homes) {
				for range 3 {
					now, other := x.used(ctx, t)
					leave(now)
					begun := time.Now()
					lost, cancel := context.WithTimeout(ctx, time.Second)
					_ = x.pool.Ping(lost)
					cancel()
					then, _ := x.used(ctx, t)
					assert.Same(t, other, then)
					assert.Less(t, time.Since(begun), 6*time.Second)
					now.Thaw()
					now.Revive()
					time.Sleep(time.Minute)
				}
			})
		})
	}
}
