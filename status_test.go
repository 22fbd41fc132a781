package multipool

import (
	"encoding/json"
	"errors"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/stretchr/testify/require"
)

// requireJSON tests that a value is written as it is promised, and read back as it was.
func requireJSON[V any](t *testing.T, want string, v V) {
	t.Helper()
	text, err := json.Marshal(v)
	require.NoError(t, err)
	require.JSONEq(t, want, string(text))
	var back V
	require.NoError(t, json.Unmarshal(text, &back))
	require.Equal(t, v, back)
}

var noon = time.Date(2026, time.December, 1, 12, 0, 0, 5e8, time.UTC)

func TestTheJSONOfAStatus(t *testing.T) {
	t.Parallel()
	requireJSON(t, `{
		"name": "orders", "peers": [{
			"name": "db1:5432", "host": "db1", "port": 5432, "role": "primary", "primary": true, "health": "up",
			"breaker": "half-open", "serves": false, "why": "older-timeline", "unfit": "older-timeline", "slow": true,
			"drained": true, "system": "18446744073709551615", "same_as": "db3", "zone": "a", "weight": 1.5, "last_resort": true, "timeline": 7,
			"lag": {"bytes": 16, "time_ns": 1500000000}, "lag_known": true, "round_trip_ns": 250000,
			"in_flight": 1, "reads": 2, "writes": 3, "retries": 4, "trips": 5,
			"last_fault": "refused", "fault_at": "2026-12-01T12:00:00.5Z"
		}, {
			"name": "", "host": "", "port": 0, "role": "unknown", "primary": false, "health": "unknown", "breaker": "closed",
			"serves": false, "why": "none", "unfit": "none", "slow": false, "drained": false, "system": "0", "weight": 0, "last_resort": false,
			"timeline": 0, "lag": {"bytes": 0, "time_ns": 0}, "lag_known": false, "round_trip_ns": 0, "in_flight": 0,
			"reads": 0, "writes": 0, "retries": 0, "trips": 0
		}],
		"primary": "db2:5432", "rivals": ["db1:5432"], "split": true, "waiting": 6, "discarded": 7,
		"discovery": {"at": "2026-12-01T12:00:00.5Z", "peers": 2, "err": "late"},
		"total": {
			"acquire_count": 1, "acquire_duration_ns": 2, "acquired_conns": 3, "canceled_acquire_count": 4,
			"constructing_conns": 5, "empty_acquire_count": 6, "empty_acquire_wait_time_ns": 7, "idle_conns": 8,
			"max_conns": 9, "total_conns": 10, "new_conns_count": 11, "max_lifetime_destroy_count": 12,
			"max_idle_destroy_count": 13
		}
	}`, Status{
		Name: "orders",
		Peers: []PeerStatus{{
			Name: "db1:5432", Host: "db1", Port: 5432, Role: RolePrimary, Primary: true, Health: HealthUp,
			Breaker: BreakerHalfOpen, Why: WhyOlderTimeline, Unfit: WhyOlderTimeline, Slow: true,
			Drained: true, System: 1<<64 - 1, SameAs: "db3", Zone: "a", Weight: 1.5, LastResort: true, Timeline: 7,
			Lag: Lag{16, 1500 * time.Millisecond}, LagKnown: true, RoundTrip: 250 * time.Microsecond,
			InFlight: 1, Reads: 2, Writes: 3, Retries: 4, Trips: 5,
			LastFault: "refused", FaultAt: noon,
		}, {}},
		Primary: "db2:5432", Rivals: []string{"db1:5432"}, Split: true, Waiting: 6, Discarded: 7,
		Discovery: DiscoveryStatus{At: noon, Peers: 2, Err: "late"},
		Total:     PoolTotals{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13},
	})
	requireJSON(t, `{"name":"","peers":null,"primary":"","split":false,"waiting":0,"discarded":0,"total":{
		"acquire_count": 0, "acquire_duration_ns": 0, "acquired_conns": 0, "canceled_acquire_count": 0,
		"constructing_conns": 0, "empty_acquire_count": 0, "empty_acquire_wait_time_ns": 0, "idle_conns": 0,
		"max_conns": 0, "total_conns": 0, "new_conns_count": 0, "max_lifetime_destroy_count": 0,
		"max_idle_destroy_count": 0}}`, Status{})
}

func TestTheJSONOfWhatHooksAndErrorsSay(t *testing.T) {
	t.Parallel()
	requireJSON(t, `{"peer": "a", "reason": "no-replica", "attempt": 2, "kind": "read"}`, Decision{"a", ReasonNoReplica, 2, KindRead})
	requireJSON(t, `{"pool": "orders", "peer": "a", "role": "replica", "from_role": "primary", "from": "up", "to": "down", "slow": true, "drained": true,
		"unfit": "cut-off", "was_slow": true, "was_drained": true, "was_unfit": "behind", "cause": "refused", "at": "2026-12-01T12:00:00.5Z"}`,
		PeerEvent{Pool: "orders", Peer: "a", Role: RoleReplica, FromRole: RolePrimary, From: HealthUp, To: HealthDown, Slow: true, Drained: true, Unfit: WhyCutOff,
			WasSlow: true, WasDrained: true, WasUnfit: WhyBehind,
			Cause: errors.New("refused"), At: noon})
	requireJSON(t, `{"pool": "", "peer": "a", "role": "unknown", "from_role": "unknown", "from": "unknown", "to": "gone", "slow": false,
		"drained": false, "unfit": "none", "was_slow": false, "was_drained": false, "was_unfit": "none"}`, PeerEvent{Peer: "a", To: HealthGone})
	requireJSON(t, `{"pool": "orders", "primary": "b", "previous": "a", "timeline": 2, "rivals": ["a"], "split": true, "next_primary": "c", "forgotten": "d",
		"at": "2026-12-01T12:00:00.5Z"}`,
		PrimaryEvent{Pool: "orders", Primary: "b", Previous: "a", Timeline: 2, Rivals: []string{"a"}, Split: true, NextPrimary: "c", Forgotten: "d", At: noon})
	requireJSON(t, `{"pool": "orders", "operation": "commit", "peer": "a", "reason": "write", "attempt": 2, "kind": "write",
		"outcome": "unknown", "sqlstate": "57P01", "duration_ns": 5}`,
		CallEnd{"orders", OperationCommit, Decision{"a", ReasonWrite, 2, KindWrite}, OutcomeUnknown, "57P01", 5})
	requireJSON(t, `{"peer": "a", "why": "down", "err": "refused"}`, PeerCause{"a", WhyDown, errors.New("refused")})
	requireJSON(t, `{"peer": "a", "why": "replica"}`, PeerCause{Peer: "a", Why: WhyReplica})
	text, err := json.Marshal(PeerEvent{Cause: hideText{&pgconn.ConnectError{Config: &pgconn.Config{Password: "hunter2-hunter2"}}}})
	require.NoError(t, err)
	require.NotContains(t, string(text), "hunter2")
}
