package pgtest

import (
	"context"
	"slices"

	"github.com/jackc/pgx/v5"
)

// Kill ends all processes of the server at once with SIGKILL, as the end of its
// machine would, except that the kernel still closes its sockets. It works on a
// frozen server too, and ends what KillPostmaster has left.
func (s *Server) Kill() error {
	s.op.Lock()
	defer s.op.Unlock()
	ctx, cancel := bounded()
	defer cancel()
	if err := s.killAll(ctx); err != nil {
		return err
	}
	s.mu.Lock()
	s.frozen = false
	s.mu.Unlock()
	return nil
}

// KillPostmaster ends the postmaster alone with SIGKILL: no new connection is
// accepted, but sessions go on until they notice, which they do when they next
// wait for their client. One in the middle of a statement may still commit.
func (s *Server) KillPostmaster() error {
	s.op.Lock()
	defer s.op.Unlock()
	run := s.postmaster()
	if !run.running() {
		return nil
	}
	if err := run.signal(sigKill); err != nil {
		return s.errorf("kill: %w", err)
	}
	<-run.gone
	return nil
}

// KillBackend ends one session with SIGKILL, upon which the server ends all
// others and recovers as after a crash. It returns when they have ended, and
// does not wait for the recovery: see WaitReady. The victim is the
// session that has been connected longest, or else one of this package's own.
func (s *Server) KillBackend() error {
	s.op.Lock()
	defer s.op.Unlock()
	if s.isFrozen() {
		return s.errorf("%w", errFrozen)
	}
	ctx, cancel := bounded()
	defer cancel()
	conn, err := s.Conn(ctx)
	if err != nil {
		return err
	}
	defer conn.Close(ctx)
	before, err := s.killSession(ctx, conn)
	if err != nil {
		return err
	}
	return s.waitGone(ctx, before)
}

// killSession kills the session that has been connected longest, and returns the server's processes as they were before.
func (s *Server) killSession(ctx context.Context, conn *pgx.Conn) (before []process, err error) {
	err = eventually(ctx, func(ctx context.Context) error {
		var victim int
		err := conn.QueryRow(ctx, `select pid from pg_stat_activity where backend_type = 'client backend'
			order by pid = pg_backend_pid(), backend_start limit 1`).Scan(&victim)
		if err != nil {
			return permanent{s.errorf("%w", err)}
		}
		// The eldest may be one that its client has left, and that is about to end in order, which is no crash. One that
		// is stopped and still there does not.
		if kill(victim, sigStop) != nil {
			return s.errorf("session %d has ended by itself", victim)
		}
		err = eventually(ctx, func(context.Context) error {
			if !stopped(victim) {
				return s.errorf("session %d does not freeze", victim)
			}
			return nil
		})
		if err != nil {
			return permanent{err}
		}
		if before, err = s.processes(); err != nil {
			return permanent{err}
		}
		if !slices.ContainsFunc(before, func(p process) bool { return p.pid == victim }) {
			return s.errorf("session %d has ended by itself", victim)
		}
		if err := kill(victim, sigKill); err != nil {
			return permanent{s.errorf("kill: %w", err)}
		}
		return nil
	})
	return before, err
}

// waitGone waits until of the processes only the postmaster is left.
func (s *Server) waitGone(ctx context.Context, before []process) error {
	run := s.postmaster()
	return eventually(ctx, func(context.Context) error {
		for _, p := range before {
			if p.pid != run.pid && !ended(p.pid) {
				return s.errorf("%q survives the crash", p.command)
			}
		}
		return nil
	})
}

// Freeze stops all processes of the server with SIGSTOP: connections stay
// open, new ones are accepted by the kernel, and nothing answers. Freezing a
// frozen server does nothing.
func (s *Server) Freeze() error {
	s.op.Lock()
	defer s.op.Unlock()
	run := s.postmaster()
	if !run.running() {
		return s.errorf("freeze: %w", errNotRunning)
	}
	s.mu.Lock()
	s.frozen = true
	s.mu.Unlock()
	ctx, cancel := bounded()
	defer cancel()
	return s.stopAll(ctx, run.pid)
}

// Thaw makes a frozen server go on as if nothing had been. It does nothing to
// one that is not frozen.
func (s *Server) Thaw() error {
	s.op.Lock()
	defer s.op.Unlock()
	if !s.isFrozen() {
		return nil
	}
	list, err := s.processes()
	if err != nil {
		return err
	}
	for _, p := range list {
		_ = kill(p.pid, sigCont) // an orphan may end as soon as another goes on
	}
	s.mu.Lock()
	s.frozen = false
	s.mu.Unlock()
	return nil
}
