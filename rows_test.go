package multipool

import (
	"context"
	"errors"
	"io"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/pgmultipool/multipool/internal/netfault"
	"github.com/pgmultipool/multipool/internal/pgfake"
)

// losing makes a peer send the rows of a statement and not their end.
func losing(p *pgfake.Peer, sql string) {
	p.Handle(answering(func(s pgfake.Statement) *pgfake.Response {
		if s.Preparing || s.SQL != sql {
			return nil
		}
		return &pgfake.Response{Cut: pgfake.CutBeforeTag}
	}))
}

func TestARowWhoseEndIsLostIsReadAgain(t *testing.T) {
	for name, args := range map[string][]any{
		"extended": nil, "simple": {pgx.QueryExecModeSimpleProtocol}, "named": {pgx.NamedArgs{"unused": 1}},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, 2, nil, func(ctx context.Context, x *fakes) {
				settled()
				losing(x.replicas[0], "select 7")
				for range 10 {
					var n int
					require.NoError(t, x.pool.QueryRow(ctx, "select 7", args...).Scan(&n))
					require.Equal(t, 7, n)
				}
				assert.Positive(t, x.replicas[0].Applied("select 7"), "it was asked, and lost the end")
				assert.Positive(t, x.peer("replica2").Retries)
				assert.Zero(t, x.primary.Applied("select 7"))
				for _, q := range x.pool.peers() {
					assert.Zero(t, q.load.busy(), "every connection is back")
				}
			})
		})
	}
}

// One that every replica loses is sent again as often as any other, and shows the last error.
func TestARowWhoseEndIsAlwaysLost(t *testing.T) {
	bubble(t, 2, nil, func(ctx context.Context, x *fakes) {
		settled()
		for _, p := range append(x.replicas, x.primary) {
			losing(p, "select 7")
		}
		err := x.pool.QueryRow(ctx, "select 7").Scan(new(int))
		require.ErrorIs(t, err, io.ErrUnexpectedEOF)
		assert.NotErrorIs(t, err, ErrOutcomeUnknown)
		trips := x.journal.take()
		require.NotEmpty(t, trips)
		require.LessOrEqual(t, len(trips), 1+maxResent)
		for i, d := range trips {
			assert.Equal(t, i+1, d.Attempt)
		}
	})
}

func TestARowWhoseEndIsLostIsReadOnceWhereItMayNotBeReadAgain(t *testing.T) {
	bubble(t, 2, nil, func(ctx context.Context, x *fakes) {
		settled()
		for _, p := range append(x.replicas, x.primary) {
			losing(p, "select 7")
		}
		never := WithRoute(ctx, Route{Retry: RetryNever})
		require.ErrorIs(t, x.pool.QueryRow(never, "select 7").Scan(new(int)), io.ErrUnexpectedEOF)
		assert.Len(t, x.journal.take(), 1)
		require.ErrorIs(t, x.pool.QueryRow(WithPrimary(ctx), "select 7").Scan(new(int)), io.ErrUnexpectedEOF)
		assert.Len(t, x.journal.take(), 1)
	})
}

// pickyScanner is a destination whose error is the program's, whatever it is.
type pickyScanner struct{}

func (pickyScanner) Scan(any) error { return io.ErrUnexpectedEOF }

func TestAFailedScanIsNoLostConnection(t *testing.T) {
	bubble(t, 2, nil, func(ctx context.Context, x *fakes) {
		settled()
		for range 10 {
			err := x.pool.QueryRow(ctx, "select 7").Scan(pickyScanner{})
			var scan pgx.ScanArgError
			require.True(t, errors.As(err, &scan), "%v", err)
			settled()
		}
		assert.Len(t, x.journal.take(), 10)
		for _, name := range []string{"replica1", "replica2"} {
			assert.Empty(t, x.peer(name).LastFault)
		}
	})
}

// The caller has not scanned the row when its server falls: the connection is cut, as a read's before its first row.
func TestARowThatWaitsForItsCallerIsReadAgainWhenItsPeerFalls(t *testing.T) {
	bubble(t, 2, nil, func(ctx context.Context, x *fakes) {
		settled()
		var n int
		row := x.pool.QueryRow(ctx, "select * from generate_series(1, 100000)") // the end is far
		first := x.journal.take()
		x.pool.named(first[0].Peer).monitor.fall(healthDown, errStalled)
		require.NoError(t, row.Scan(&n, nil))
		assert.Equal(t, 1, n)
		again := x.journal.take()
		require.Len(t, again, 1)
		assert.NotEqual(t, first[0].Peer, again[0].Peer)
	})
}

func TestFaultARowWithoutItsEnd(t *testing.T) {
	s, relay := relayed(t, Config{})
	ctx := testContext(t)
	for i := range 10 {
		// The tag of this statement and of no other: a look has seven columns, and the same tag.
		cut := relay.Cut(netfault.Cut{From: netfault.Server, Type: 'C', Match: func(m []byte) bool {
			return strings.Contains(string(m), "SELECT 3")
		}})
		s.cutRead(ctx, i, cut)
	}
}

// cutRead reads until a cut has been made.
func (s *stage) cutRead(ctx context.Context, i int, cut <-chan struct{}) {
	for {
		var n int
		require.NoError(s.t, s.pool.QueryRow(ctx, "select $1::int + n from generate_series(0, 2) n", i).Scan(&n))
		require.Equal(s.t, i, n)
		select {
		case <-cut:
			return
		default:
		}
	}
}
