package multipool

import (
	"context"
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
