package pgtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// postmaster is one run of a server.
type postmaster struct {
	pid  int
	gone chan struct{} // closed when the process has ended and was reaped
}

func (p *postmaster) running() bool {
	if p == nil {
		return false
	}
	select {
	case <-p.gone:
		return false
	default:
		return true
	}
}

// signal sends a signal. A process that has ended and is about to be reaped is no error: gone tells.
func (p *postmaster) signal(sig syscall.Signal) error {
	if err := kill(p.pid, sig); err != nil && !errors.Is(err, syscall.ESRCH) && p.running() {
		return err
	}
	return nil
}

// runTool runs a program of PostgreSQL within the folder as the servers' user
// and returns what it printed, which its error contains as well.
func runTool(ctx context.Context, acct account, f *folder, stdin io.Reader, program string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, program, args...)
	acct.apply(cmd)
	cmd.Dir, cmd.Env, cmd.Stdin = f.path, serverEnv(), stdin
	cmd.WaitDelay = time.Second // initdb has children, which may hold its output open
	out, err := cmd.CombinedOutput()
	if err != nil {
		return string(out), fmt.Errorf("pgtest: %s: %w\n%s", filepath.Base(program), err, out)
	}
	return string(out), nil
}

// process is a process of the machine.
type process struct {
	pid     int
	command string // its arguments, joined with blanks
}

// processes lists the processes whose command line keep accepts. Zombies have
// none.
func processes(keep func(command string) bool) ([]process, error) {
	if _, err := os.Stat("/proc/self/cmdline"); err != nil {
		return processesByPS(keep)
	}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, fmt.Errorf("pgtest: %w", err)
	}
	var list []process
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		raw, err := os.ReadFile("/proc/" + e.Name() + "/cmdline")
		if err != nil {
			continue // gone meanwhile
		}
		command := string(bytes.ReplaceAll(raw, []byte{0}, []byte{' '}))
		if keep(command) {
			list = append(list, process{pid, command})
		}
	}
	return list, nil
}

func processesByPS(keep func(string) bool) ([]process, error) {
	out, err := exec.Command("ps", "-axww", "-o", "pid=,command=").Output()
	if err != nil {
		return nil, fmt.Errorf("pgtest: ps: %w", err)
	}
	var list []process
	for line := range strings.Lines(string(out)) {
		pid, command, _ := strings.Cut(strings.TrimSpace(line), " ")
		if n, err := strconv.Atoi(pid); err == nil && keep(command) {
			list = append(list, process{n, command})
		}
	}
	return list, nil
}

// stopped reports whether SIGSTOP has taken effect on a process, or it is gone.
func stopped(pid int) bool { return strings.IndexByte("TtZX\x00", stateOf(pid)) >= 0 }

// ended reports whether a process is gone, or a zombie. Only then are its sockets closed and its memory given back: while
// a process dies it loses its command line first.
func ended(pid int) bool { return strings.IndexByte("ZX\x00", stateOf(pid)) >= 0 }

// stateOf returns the letter of a process's state, 0 where there is no such process.
func stateOf(pid int) byte {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err == nil {
		// The state follows the name, which is in parentheses and may hold any.
		return bytes.TrimSpace(stat[bytes.LastIndexByte(stat, ')')+1:])[0]
	}
	if _, err := os.Stat("/proc/self/stat"); err == nil {
		return 0
	}
	out, err := exec.Command("ps", "-o", "state=", "-p", strconv.Itoa(pid)).Output()
	if out = bytes.TrimSpace(out); err != nil || len(out) == 0 {
		return 0
	}
	return out[0]
}

// dying lists the processes of this name that have lost their command line, which says whose they were, and have not
// ended yet. Only where there is /proc can they be seen.
func dying(name string) (pids []int) {
	stats, _ := filepath.Glob("/proc/[0-9]*/stat") // the pattern is well-formed
	for _, file := range stats {
		stat, err := os.ReadFile(file)
		if err != nil || !bytes.Contains(stat, []byte(" ("+name+") ")) {
			continue
		}
		raw, err := os.ReadFile(filepath.Join(filepath.Dir(file), "cmdline"))
		if err == nil && len(raw) == 0 {
			pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(file))) // digits, or the pattern would not match
			pids = append(pids, pid)
		}
	}
	return pids
}

// withDescendants returns pids and the process ids of all that they have started, directly or not, and that lives.
func withDescendants(pids []int) ([]int, error) {
	parents, err := parents()
	if err != nil {
		return nil, err
	}
	all := slices.Clone(pids)
	for i := 0; i < len(all); i++ {
		for pid, parent := range parents {
			if parent == all[i] && !slices.Contains(all, pid) {
				all = append(all, pid)
			}
		}
	}
	return all, nil
}

// parents returns the process id of every process's parent.
func parents() (map[int]int, error) {
	of := map[int]int{}
	stats, _ := filepath.Glob("/proc/[0-9]*/stat") // the pattern is well-formed
	for _, file := range stats {
		stat, err := os.ReadFile(file)
		if err != nil {
			continue // gone meanwhile
		}
		var state string
		var parent int
		// They follow the name, which is in parentheses and may hold any.
		if _, err := fmt.Sscan(string(stat[bytes.LastIndexByte(stat, ')')+1:]), &state, &parent); err != nil {
			return nil, fmt.Errorf("pgtest: %s: %w", file, err)
		}
		pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(file))) // digits, or the pattern would not match
		of[pid] = parent
	}
	if len(of) > 0 {
		return of, nil
	}
	out, err := exec.Command("ps", "-ax", "-o", "pid=,ppid=").Output()
	if err != nil {
		return nil, fmt.Errorf("pgtest: ps: %w", err)
	}
	for line := range strings.Lines(string(out)) {
		var pid, parent int
		if _, err := fmt.Sscan(line, &pid, &parent); err == nil {
			of[pid] = parent
		}
	}
	return of, nil
}

// processes lists the server's processes: the postmaster, its children, and
// children that outlived it.
func (s *Server) processes() ([]process, error) {
	argument := " -D " + s.dir + " "
	title := "postgres: " + s.clusterName() + ": "
	return processes(func(command string) bool {
		return strings.Contains(command, title) || strings.Contains(command+" ", argument)
	})
}

// killAll ends every process of the server with SIGKILL and waits until there
// is none. It freezes them first, or those killed last would notice the end
// of the others and tell their clients.
func (s *Server) killAll(ctx context.Context) error {
	if run := s.postmaster(); run.running() {
		if err := s.stopAll(ctx, run.pid); err != nil && run.running() {
			return err
		}
	}
	var killed []int
	return eventually(ctx, func(context.Context) error {
		list, err := s.processes()
		if err != nil {
			return permanent{err}
		}
		for _, p := range list {
			_ = kill(p.pid, sigKill) // it may be gone by now
			killed = append(killed, p.pid)
		}
		killed = slices.DeleteFunc(killed, ended)
		if p := s.postmaster(); len(list) > 0 || len(killed) > 0 || p.running() {
			return s.errorf("%d processes survive kill -9", max(len(list), len(killed)))
		}
		return nil
	})
}

// removeSharedMemory removes the System V segment that a killed postmaster has
// left. The next start in the same folder would do so, and so does the watchdog,
// but once the folder is replaced nobody knows of it.
func (s *Server) removeSharedMemory(ctx context.Context) {
	text, err := os.ReadFile(filepath.Join(s.dir, "postmaster.pid"))
	if err != nil {
		return // it ended in order
	}
	lines := strings.Split(string(text), "\n")
	if len(lines) < 7 {
		return
	}
	if fields := strings.Fields(lines[6]); len(fields) == 2 { // key, id
		c := s.cluster
		_, _ = runTool(ctx, c.acct, c.folder, nil, "ipcrm", "-m", fields[1]) // it may be gone
	}
}

// stopAll freezes every process of the server: the postmaster first, so that
// no other is born meanwhile.
func (s *Server) stopAll(ctx context.Context, pid int) error {
	if err := kill(pid, sigStop); err != nil {
		return s.errorf("freeze: %w", err)
	}
	return eventually(ctx, func(context.Context) error {
		if !stopped(pid) {
			return s.errorf("the postmaster does not freeze")
		}
		list, err := s.processes()
		if err != nil {
			return permanent{err}
		}
		running := 0
		for _, p := range list {
			if !stopped(p.pid) {
				_ = kill(p.pid, sigStop)
				running++
			}
		}
		if running > 0 {
			return s.errorf("%d processes do not freeze", running)
		}
		return nil
	})
}
