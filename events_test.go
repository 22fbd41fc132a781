package multipool

import (
	"context"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// A bubble fails where its goroutines wait for one another.
func TestCloseInsideAHookClosesThePool(t *testing.T) {
	for name, inside := range map[string]func(*Options, func(context.Context)){
		"PeerChanged": func(c *Options, f func(context.Context)) {
			c.Hooks = &Hooks{PeerChanged: func(PeerEvent) { f(context.Background()) }}
		},
		"PrimaryChanged": func(c *Options, f func(context.Context)) {
			c.Hooks = &Hooks{PrimaryChanged: func(PrimaryEvent) { f(context.Background()) }}
		},
		"deep in a joined hook": func(c *Options, f func(context.Context)) {
			var descend func(int)
			descend = func(n int) {
				if n == 0 {
					f(context.Background())
					return
				}
				descend(n - 1)
			}
			c.Hooks = JoinHooks(&Hooks{PeerChanged: func(PeerEvent) {}}, &Hooks{PeerChanged: func(PeerEvent) { descend(300) }})
		},
		"Routed": func(c *Options, f func(context.Context)) {
			c.Hooks = &Hooks{Routed: func(ctx context.Context, _ Decision) { f(ctx) }}
		},
		"Discover": func(c *Options, f func(context.Context)) {
			c.Discover = func(ctx context.Context) ([]Peer, error) { f(ctx); return nil, nil }
		},
	} {
		t.Run(name, func(t *testing.T) {
			opened := make(chan *MultiPool, 1)
			closed := 0
			bubble(t, 2, func(c *Options) {
				opened = make(chan *MultiPool, 1) // in the bubble
				inside(c, func(context.Context) {
					if p, more := <-opened; more {
						close(opened)
						p.Close()
						closed++
					}
				})
			}, func(ctx context.Context, x *fakes) {
				opened <- x.pool
				var n int
				_ = x.pool.QueryRow(ctx, "select 1").Scan(&n)
				settled()
				assert.Equal(t, 1, closed)
				require.ErrorIs(t, x.pool.Ping(ctx), ErrClosedPool)
				assert.Zero(t, x.pool.Status().Total.TotalConns)
			})
		})
	}
}

// Events that wait are told after the hook that has closed the pool.
func TestCloseOfAnotherWaitsForTheHooks(t *testing.T) {
	for _, name := range []string{"a goroutine", "a hook of another pool"} {
		t.Run(name, func(t *testing.T) {
			released, told := make(chan struct{}), 0
			bubble(t, 2, func(c *Options) {
				released = make(chan struct{})
				c.Hooks = &Hooks{PeerChanged: func(PeerEvent) { <-released; told++ }}
			}, func(ctx context.Context, x *fakes) {
				settled()
				over := make(chan struct{})
				closing := func() { x.pool.Close(); close(over) }
				if name == "a goroutine" {
					go closing()
				} else {
					other := Options{Config: x.pool.Config(), Hooks: &Hooks{PrimaryChanged: func(PrimaryEvent) { closing() }}}
					p, err := Open(ctx, other)
					require.NoError(t, err)
					defer p.Close()
				}
				time.Sleep(time.Minute)
				synctest.Wait()
				ended := false
				select {
				case <-over:
					ended = true
				default:
				}
				assert.Equal(t, name != "a goroutine", ended, "a hook waits for no hook")
				close(released)
				<-over
				x.pool.Close()
				assert.Equal(t, 3, told)
			})
		})
	}
}

func TestAPoolHasANameInAllThatItTells(t *testing.T) {
	withoutEnvironment(t)
	for name, of := range map[string]struct {
		options Options
		dsn     string
	}{
		"orders":  {Options{Name: "orders"}, "postgres://app@a,b/shop?multipool_name=other"},
		"by key":  {Options{}, "host=a,b user=app dbname=shop multipool_name='by key'"},
		"shop":    {Options{}, "postgres://app@a,b/shop"},
		"app":     {Options{}, "postgres://app@a,b"},
		"of solo": {Options{Name: "of solo"}, "postgres://app@a/shop"},
	} {
		of.options.Config, _ = ParseConfig(of.dsn)
		complete, _ := completed(t, of.options)
		assert.Equal(t, name, complete.Name)
	}

	var log strings.Builder // of the one goroutine that calls hooks
	var mu sync.Mutex
	names := map[string]int{}
	bubble(t, 1, func(c *Options) {
		c.Name = "orders"
		c.Hooks = JoinHooks(SlogHooks(testLogger(&log)), &Hooks{
			PeerChanged:    func(e PeerEvent) { mu.Lock(); names[e.Pool]++; mu.Unlock() },
			PrimaryChanged: func(e PrimaryEvent) { mu.Lock(); names[e.Pool]++; mu.Unlock() },
		})
	}, func(ctx context.Context, x *fakes) {
		settled()
		assert.Equal(t, "orders", x.pool.Status().Name)
		x.pool.Close()
		assert.Equal(t, map[string]int{"orders": 3}, names)
		lines := strings.Split(strings.TrimSpace(log.String()), "\n")
		assert.Len(t, lines, 3)
		for _, line := range lines {
			assert.Contains(t, line, "pool=orders")
		}
	})
}
