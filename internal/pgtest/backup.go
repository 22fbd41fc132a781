package pgtest

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// backup copies the running server's data directory to dir, as pg_basebackup
// does, for installations that lack it: PostgreSQL documentation, 26.3.3
// "Making a Base Backup Using the Low Level API".
func (s *Server) backup(ctx context.Context, dir string) error {
	conn, err := s.Conn(ctx)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	start, stop := "select pg_backup_start('copy', true)", "select labelfile from pg_backup_stop(false)"
	if s.cluster.bin.major < 15 {
		start, stop = "select pg_start_backup('copy', true, false)", "select labelfile from pg_stop_backup(false, false)"
	}
	if _, err := conn.Exec(ctx, start); err != nil {
		return s.errorf("%w", err)
	}
	acct := s.cluster.acct
	if err := copyRunning(acct, s.dir, dir, belongsToBackup); err != nil {
		return s.errorf("copy: %w", err)
	}
	var label string
	if err := conn.QueryRow(ctx, stop).Scan(&label); err != nil {
		return s.errorf("%w", err)
	}
	if err := s.cluster.writeFile(filepath.Join(dir, "backup_label"), label); err != nil {
		return err
	}
	// What the copy needs to become consistent is written by now.
	if err := copyRunning(acct, filepath.Join(s.dir, walDir), filepath.Join(dir, walDir), nil); err != nil {
		return s.errorf("copy: %w", err)
	}
	return nil
}

const walDir, controlFile = "pg_wal", "global/pg_control"

// belongsToBackup reports whether a file of a running server belongs into its
// backup: PostgreSQL documentation, 26.3.3.3 "Backing Up the Data Directory".
func belongsToBackup(path string) bool {
	switch dir, _, _ := strings.Cut(path, "/"); dir {
	case walDir, "pg_dynshmem", "pg_notify", "pg_replslot", "pg_serial", "pg_snapshots", "pg_stat_tmp", "pg_subtrans",
		"postmaster.pid", "postmaster.opts", "standby.signal", "recovery.signal", "backup_label", "backup_label.old", "tablespace_map":
		return false
	}
	return !strings.Contains(path, "pgsql_tmp")
}

// copyRunning copies the files below one directory that keep accepts to another,
// and all directories. Files that vanish meanwhile were dropped, or are log that
// was recycled. The control file goes last, as a backup of a standby demands.
func copyRunning(acct account, from, to string, keep func(path string) bool) error {
	t, err := readRunning(from)
	if err != nil {
		return err
	}
	for _, dir := range t.dirs {
		path := filepath.Join(to, dir)
		if err := os.Mkdir(path, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		if err := acct.own(path); err != nil {
			return err
		}
	}
	slices.SortStableFunc(t.files, func(a, b treeFile) int {
		switch controlFile {
		case a.path:
			return 1
		case b.path:
			return -1
		}
		return 0
	})
	for _, f := range t.files {
		if keep != nil && !keep(f.path) {
			continue
		}
		data, err := os.ReadFile(filepath.Join(from, f.path))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		path := filepath.Join(to, f.path)
		if err := errors.Join(err, os.WriteFile(path, data, 0o600), acct.own(path)); err != nil {
			return err
		}
	}
	return nil
}
