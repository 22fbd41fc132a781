package main

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// patience is how long things are waited for that are not bounded by Patroni's ttl; far above what any of them takes.
const patience = 60 * time.Second

// permanent marks an error that waiting does not mend.
type permanent struct{ error }

func (p permanent) Unwrap() error { return p.error }

// eventually calls so until it returns nil; if that takes too long, what is missing is the error.
func eventually(ctx context.Context, limit time.Duration, so func(context.Context) error) error {
	begin := time.Now()
	for {
		err := so(ctx)
		switch {
		case err == nil:
			return nil
		case errors.As(err, new(permanent)):
			return err
		case time.Since(begin) > limit:
			return fmt.Errorf("after %v: %w", limit, err)
		}
		if err := lasting(ctx, 50*time.Millisecond); err != nil {
			return err
		}
	}
}

// lasting lets some time pass.
func lasting(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}
