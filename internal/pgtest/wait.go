package pgtest

import (
	"context"
	"errors"
	"fmt"
	"time"
)

const (
	// patience bounds every wait. It is far above what any of them takes, so
	// that a busy machine does not fail a test.
	patience = 20 * time.Second
	pollGap  = 2 * time.Millisecond
)

// permanent marks the error of a condition that will never become true.
type permanent struct{ error }

func (p permanent) Unwrap() error { return p.error }

// eventually calls cond until it returns nil, returns a permanent error, or
// ctx or patience ends. The error then is cond's last one: what is missing.
func eventually(ctx context.Context, cond func(ctx context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	start := time.Now()
	var last error
	for {
		err := cond(ctx)
		if err == nil {
			return nil
		}
		var p permanent
		if errors.As(err, &p) {
			return p.error
		}
		// What fails because the time is up says nothing about the condition.
		if last == nil || ctx.Err() == nil {
			last = err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w (waited %v)", last, time.Since(start).Round(time.Millisecond))
		case <-time.After(pollGap):
		}
	}
}

func bounded() (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.Background(), patience)
}
