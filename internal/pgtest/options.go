package pgtest

import (
	"context"
	"fmt"
	"maps"
	"os"
)

// TB is what Start needs of a [testing.TB]. It is an interface of its own so
// that a program which uses this package does not link package testing.
type TB interface {
	Helper()
	Skipf(format string, args ...any)
	Fatalf(format string, args ...any)
	Logf(format string, args ...any)
	Cleanup(func())
	Failed() bool
	Name() string
}

// Options says what cluster to start. The zero value is a lone primary.
type Options struct {
	// Standbys is the number of hot standbys that stream from the primary.
	// At most 9, as a server has 10 walsenders by default.
	Standbys int

	// Settings are settings of postgresql.conf for every server, over the
	// defaults of this package. port, cluster_name, data_directory and
	// primary_conninfo cannot be set.
	Settings map[string]string

	// SyncApply makes a commit on the primary return only when every standby
	// that follows it has applied it, so that whoever reads a standby sees
	// every acknowledged write. Writes then wait for as long as one of these
	// standbys is down or frozen; a standby ceases to be one of them when it
	// is promoted or follows another server. The setting
	// synchronous_standby_names, if set, takes precedence.
	SyncApply bool

	// HBA are lines for pg_hba.conf, such as
	// "host all app 127.0.0.1/32 scram-sha-256". They precede the default, which
	// trusts everyone on 127.0.0.1. They do not govern the role postgres,
	// through which this package works itself and which is always trusted.
	HBA []string

	// Variant chooses the cluster's system identifier. Clusters of one variant
	// may have the same, as they are copies of one initdb; those of different
	// variants never do.
	Variant int

	// TLS turns ssl on, with a certificate for 127.0.0.1 and localhost that
	// Cluster.CA vouches for. Connections without TLS are accepted too,
	// unless HBA says otherwise.
	TLS bool
}

const maxStandbys = 9

func (o Options) validate() error {
	if o.Standbys < 0 || o.Standbys > maxStandbys {
		return fmt.Errorf("pgtest: %d standbys: must be between 0 and %d", o.Standbys, maxStandbys)
	}
	for _, name := range []string{"port", "cluster_name", "data_directory", "primary_conninfo"} {
		if _, ok := o.Settings[name]; ok {
			return fmt.Errorf("pgtest: setting %s belongs to the package", name)
		}
	}
	return nil
}

// Start starts a cluster for a test and closes it when the test and its
// subtests are over; if the test has failed by then it logs the end of every
// server's log. It fails the test if the cluster cannot be started. Where there
// is no PostgreSQL it skips the test, or fails it if
// MULTIPOOL_REQUIRE_POSTGRES=1.
func Start(t TB, o Options) *Cluster {
	t.Helper()
	if _, err := findBinaries(); err != nil {
		if os.Getenv("MULTIPOOL_REQUIRE_POSTGRES") == "1" {
			t.Fatalf("%v", err)
		}
		t.Skipf("%v", err)
	}
	c, err := New(context.Background(), o)
	if err != nil {
		t.Fatalf("%v", err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			for _, s := range c.servers {
				t.Logf("end of the log of %s (%s), %s:\n%s", s.name, s.Addr(), t.Name(), s.Log())
			}
		}
		if err := c.Close(); err != nil {
			t.Logf("%v", err)
		}
	})
	return c
}

// settings returns the settings of every server: the package's, which make it
// start fast, be small and notice changes at once, and over them the caller's.
func (o Options) settings() map[string]string {
	m := map[string]string{
		"listen_addresses":           "127.0.0.1",
		"unix_socket_directories":    "",
		"fsync":                      "off",
		"shared_buffers":             "8MB",
		"huge_pages":                 "off",
		"max_connections":            "100",
		"max_wal_senders":            "10",
		"wal_level":                  "replica",
		"hot_standby":                "on",
		"wal_keep_size":              "64MB",
		"min_wal_size":               "2MB",
		"max_wal_size":               "256MB",
		"autovacuum":                 "off",
		"jit":                        "off",
		"log_line_prefix":            "%m [%p] ",
		"logging_collector":          "off",
		"recovery_target_timeline":   "latest",
		"dynamic_shared_memory_type": "mmap",

		// The default of 5 s is what a standby waits that starts before its
		// primary, as the standbys of a new cluster do.
		"wal_retrieve_retry_interval": "20ms",
	}
	if o.SyncApply {
		m["synchronous_commit"] = "remote_apply"
	}
	maps.Copy(m, o.Settings)
	return m
}
