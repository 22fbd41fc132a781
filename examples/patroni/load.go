package main

import (
	"context"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/pgmultipool/multipool"
)

const (
	items = 1000

	readDeadline = 5 * time.Second

	// Longer than Patroni takes to miss a leader, so that writers outlast that by waiting. The pool waits as long.
	writeDeadline = 60 * time.Second

	// How long a caller rests between two calls, on average. Without a rest the callers would measure how a few cores
	// are shared out, and not the pool.
	readerRest = 25 * time.Millisecond
	writerRest = 25 * time.Millisecond
)

// load is readers and writers that share one pool.
type load struct {
	stopped chan struct{}
	callers sync.WaitGroup
}

func startLoad(pool *multipool.MultiPool, l *ledger, readers, writers int) *load {
	o := &load{stopped: make(chan struct{})}
	for range readers {
		o.callers.Go(func() {
			o.repeat(readerRest, readDeadline, func(ctx context.Context) {
				var text string
				l.read(pool.QueryRow(ctx, "select text from item where id = $1", 1+rand.N(items)).Scan(&text))
			})
		})
	}
	for range writers {
		o.callers.Go(func() {
			o.repeat(writerRest, writeDeadline, func(ctx context.Context) {
				number := l.begin()
				_, err := pool.Exec(ctx, "insert into written values ($1)", number)
				l.wrote(number, err)
			})
		})
	}
	return o
}

// repeat calls and rests until the load is stopped. A call in progress then is let finish: one that the program itself
// cut off would count as an error.
func (o *load) repeat(rest, deadline time.Duration, call func(context.Context)) {
	for {
		select {
		case <-o.stopped:
			return
		case <-time.After(rand.N(2 * rest)):
		}
		ctx, cancel := context.WithTimeout(context.Background(), deadline)
		call(ctx)
		cancel()
	}
}

// stop returns when the last call has.
func (o *load) stop() {
	close(o.stopped)
	o.callers.Wait()
}
