package pgtest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"
)

// Promote makes a standby a primary and returns when it accepts writes.
// Cluster.Primary returns it from then on. The former primary stays what it is,
// which is a primary too if it runs, and standbys follow whom they followed.
func (s *Server) Promote() error {
	s.op.Lock()
	defer s.op.Unlock()
	if s.follows() == nil {
		return s.errorf("promote: not a standby")
	}
	if err := s.mustAnswer("promote"); err != nil {
		return err
	}
	ctx, cancel := bounded()
	defer cancel()
	// Its own wait looks only every 100 ms.
	if err := s.Exec(ctx, "select pg_promote(false)"); err != nil {
		return err
	}
	err := eventually(ctx, func(ctx context.Context) error {
		recovering, err := s.String(ctx, "select pg_is_in_recovery()::text")
		if err == nil && recovering == "true" {
			err = s.errorf("still in recovery after its promotion")
		}
		return err
	})
	if err != nil {
		return err
	}
	former := s.follows()
	s.mu.Lock()
	s.upstream, s.cut = nil, false
	s.mu.Unlock()
	s.cluster.mu.Lock()
	s.cluster.primary = s
	s.cluster.mu.Unlock()
	return s.cluster.refreshSyncNames(former, s)
}

// mustAnswer returns an error unless the server runs and is not frozen.
func (s *Server) mustAnswer(what string) error {
	switch {
	case !s.Running():
		return s.errorf("%s: %w", what, errNotRunning)
	case s.isFrozen():
		return s.errorf("%s: %w", what, errFrozen)
	}
	return nil
}

// errDiverged says that a server has written or replayed what the one that it
// is to follow has not.
var errDiverged = errors.New("its history has diverged")

// Follow makes the server a standby of another, whatever it was, and returns
// when it streams from it. A running standby is repointed, and its sessions
// survive; a running primary is shut down first. What the server has written
// and the other has not is lost: its data directory is rewound, or copied anew
// if that fails. Cluster.Primary stays the same: promote another server first.
func (s *Server) Follow(primary *Server) error {
	s.op.Lock()
	defer s.op.Unlock()
	if primary.cluster != s.cluster || primary.root() == s || s == primary {
		return s.errorf("cannot follow %s", primary.name)
	}
	if s.isFrozen() {
		return s.errorf("follow: %w", errFrozen)
	}
	if err := primary.mustAnswer("be followed"); err != nil {
		return err
	}
	former := s.follows()
	err := s.attach(primary, former != nil)
	if errors.Is(err, errDiverged) {
		err = s.rebuild(primary)
	}
	if err != nil {
		return err
	}
	return s.cluster.refreshSyncNames(former, primary)
}

// attach makes the server follow primary with the data it has. It fails with
// errDiverged if that cannot be.
func (s *Server) attach(primary *Server, wasStandby bool) error {
	s.mu.Lock()
	s.upstream, s.cut = primary, false
	s.mu.Unlock()
	if !wasStandby {
		// Once written to, always suspect. It has to stop anyway.
		return errDiverged
	}
	since := s.logSize()
	if s.Running() {
		if err := s.applyConfig(); err != nil {
			return err
		}
		return s.waitFollowing(primary, since)
	}
	return s.startFollowing(primary)
}

// rebuild makes the data of a server with a history of its own that of a
// standby of primary.
func (s *Server) rebuild(primary *Server) error {
	if err := s.stop(Fast); err != nil {
		return err
	}
	errRewind := s.rewind(primary)
	if errRewind == nil {
		errRewind = s.startFollowing(primary)
		if errRewind == nil {
			return nil
		}
		if err := s.stop(Immediate); err != nil {
			return err
		}
	}
	if err := s.copyFrom(primary); err != nil {
		return fmt.Errorf("%w\nafter: %w", err, errRewind)
	}
	return s.startFollowing(primary)
}

func (s *Server) rewind(primary *Server) error {
	ctx, cancel := bounded()
	defer cancel()
	if err := s.waitNoOrphans(ctx); err != nil {
		return err
	}
	// A promoted server notes its new timeline only at a checkpoint, and
	// pg_rewind goes by that note: without it, it sees nothing to do.
	if primary.follows() == nil {
		if err := primary.Exec(ctx, "checkpoint"); err != nil {
			return err
		}
	}
	c := s.cluster
	if !c.bin.has("pg_rewind") {
		return s.errorf("this installation has no pg_rewind")
	}
	_, err := runTool(ctx, c.acct, c.folder, nil, c.bin.path("pg_rewind"),
		"--target-pgdata="+s.dir, "--source-server="+primary.toolConnString(), "--no-sync")
	return err
}

func (s *Server) copyFrom(primary *Server) error {
	ctx, cancel := bounded()
	defer cancel()
	if err := s.waitNoOrphans(ctx); err != nil {
		return err
	}
	s.removeSharedMemory(ctx)
	if err := os.RemoveAll(s.dir); err != nil {
		return s.errorf("%w", err)
	}
	c := s.cluster
	if !c.bin.has("pg_basebackup") {
		return primary.backup(ctx, s.dir)
	}
	_, err := runTool(ctx, c.acct, c.folder, nil, c.bin.path("pg_basebackup"),
		"--pgdata="+s.dir, "--dbname="+primary.toolConnString(),
		"--checkpoint=fast", "--wal-method=fetch", "--no-sync", "--no-manifest")
	return err
}

func (s *Server) toolConnString() string {
	return fmt.Sprintf("host=127.0.0.1 port=%d user=postgres dbname=postgres sslmode=disable", s.port)
}

// startFollowing starts the server as a standby and waits until it streams.
func (s *Server) startFollowing(primary *Server) error {
	if err := s.writeFile("standby.signal", ""); err != nil {
		return err
	}
	since := s.logSize()
	if err := s.start(); err != nil {
		if diverged(s.logFrom(since)) {
			err = fmt.Errorf("%w: %w", errDiverged, err)
		}
		return err
	}
	return s.waitFollowing(primary, since)
}

// timeline is the present timeline of a server. The checkpoint's is old for a
// while after a promotion, but a standby that receives nothing has no other.
const timeline = `select case when pg_is_in_recovery()
	then coalesce((select received_tli from pg_stat_wal_receiver), (select timeline_id from pg_control_checkpoint()))
	else ('x' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))::bit(32)::int end`

// waitFollowing waits until the server streams from primary, as both see it,
// or its log from the offset since says that it never will. The timeline
// matters: a server with a history of its own streams as well, for a moment,
// namely the end of what they have in common.
func (s *Server) waitFollowing(primary *Server, since int64) error {
	ctx, cancel := bounded()
	defer cancel()
	return eventually(ctx, func(ctx context.Context) error {
		if !s.Running() || !primary.Running() {
			return permanent{s.errorf("follow %s: %w", primary.name, errNotRunning)}
		}
		if diverged(s.logFrom(since)) {
			return permanent{s.errorf("follow %s: %w", primary.name, errDiverged)}
		}
		tli, err := primary.Int(ctx, timeline)
		if err != nil {
			return err
		}
		const receiving = `select count(*) from pg_stat_wal_receiver
			where status = 'streaming' and sender_port = $1 and received_tli = $2`
		if n, err := s.Int(ctx, receiving, int(primary.port), tli); err != nil || n == 0 {
			return errors.Join(err, s.errorf("does not receive from %s", primary.name))
		}
		const sending = "select count(*) from pg_stat_replication where state = 'streaming' and application_name = $1"
		if n, err := primary.Int(ctx, sending, s.name); err != nil || n == 0 {
			return errors.Join(err, s.errorf("%s does not send to it", primary.name))
		}
		return nil
	})
}

// diverged reports whether a standby's log says that it cannot follow its
// primary with the data it has.
func diverged(log string) bool {
	for _, sign := range []string{
		"forked off current database system timeline",
		"this server's history",
		"is not a child of database system timeline",
		"is behind recovery timeline",
		"is ahead of the WAL flush position",
		"has already been removed",
	} {
		if strings.Contains(log, sign) {
			return true
		}
	}
	return false
}

// refreshSyncNames makes the servers wait for those that follow them now.
func (c *Cluster) refreshSyncNames(servers ...*Server) error {
	if !c.options.SyncApply {
		return nil
	}
	for _, s := range servers {
		if s == nil {
			continue
		}
		if err := s.applyConfig(); err != nil {
			return err
		}
		if c.syncNames(s) == "" || s.mustAnswer("") != nil {
			continue
		}
		// Commits wait for standbys only when the checkpointer has said so, which it does when it next looks at its
		// settings. It has before a checkpoint that was asked for when the last one was over, if not before that.
		for range 2 {
			ctx, cancel := bounded()
			err := s.Exec(ctx, "checkpoint")
			cancel()
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// PauseReplay makes a standby receive without applying, until ResumeReplay.
func (s *Server) PauseReplay() error {
	return s.replay("select pg_wal_replay_pause()", "paused")
}

// ResumeReplay ends what PauseReplay began.
func (s *Server) ResumeReplay() error {
	return s.replay("select pg_wal_replay_resume()", "not paused")
}

func (s *Server) replay(sql, state string) error {
	s.op.Lock()
	defer s.op.Unlock()
	if err := s.mustAnswer("replay"); err != nil {
		return err
	}
	ctx, cancel := bounded()
	defer cancel()
	if err := s.Exec(ctx, sql); err != nil {
		return err
	}
	return eventually(ctx, func(ctx context.Context) error {
		now, err := s.String(ctx, "select pg_get_wal_replay_pause_state()")
		if err == nil && now != state {
			err = s.errorf("replay is %s, not %s", now, state)
		}
		return err
	})
}

// DelayReplay makes a standby apply commits d (in whole milliseconds) after they
// happened on the primary. Zero ends it.
func (s *Server) DelayReplay(d time.Duration) error {
	return s.Set(map[string]string{"recovery_min_apply_delay": strconv.FormatInt(d.Milliseconds(), 10) + "ms"})
}

// CutReceiver makes a standby lose its connection to the server it follows and
// not look for it again, until RestoreReceiver, Follow or Promote, while it goes
// on serving reads.
func (s *Server) CutReceiver() error {
	s.op.Lock()
	defer s.op.Unlock()
	up := s.follows()
	if up == nil {
		return s.errorf("cut: not a standby")
	}
	s.mu.Lock()
	s.cut = true
	s.mu.Unlock()
	if err := s.applyConfig(); err != nil {
		return err
	}
	if !s.Running() || s.isFrozen() {
		return nil
	}
	ctx, cancel := bounded()
	defer cancel()
	return eventually(ctx, func(ctx context.Context) error {
		if n, err := s.Int(ctx, "select count(*) from pg_stat_wal_receiver"); err != nil || n > 0 {
			return errors.Join(err, s.errorf("still receives"))
		}
		if up.mustAnswer("") != nil {
			return nil
		}
		// The sender notices a moment later; until it does, it could be taken
		// for the one of a restored connection.
		n, err := up.Int(ctx, "select count(*) from pg_stat_replication where application_name = $1", s.name)
		if err != nil || n > 0 {
			return errors.Join(err, s.errorf("%s still sends to it", up.name))
		}
		return nil
	})
}

// RestoreReceiver ends what CutReceiver began, and returns when the standby
// streams again, or at once if the server it follows does not run.
func (s *Server) RestoreReceiver() error {
	s.op.Lock()
	defer s.op.Unlock()
	up := s.follows()
	if up == nil {
		return s.errorf("restore: not a standby")
	}
	s.mu.Lock()
	s.cut = false
	s.mu.Unlock()
	since := s.logSize()
	if err := s.applyConfig(); err != nil {
		return err
	}
	if s.mustAnswer("") != nil || up.mustAnswer("") != nil {
		return nil
	}
	return s.waitFollowing(up, since)
}
