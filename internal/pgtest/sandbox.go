package pgtest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
)

// Sandbox is a place for programs that run PostgreSQL servers of their own, as Patroni does: a folder, ports and
// processes under the servers' user, all of which go as those of a Cluster do.
//
// What its watchdog finds is what names a path below the folder in its command line and is postgres, one of its tools,
// patroni or etcd; and the processes of servers whose cluster_name is Name. These servers need
// dynamic_shared_memory_type=mmap: what else they put there outlives them, and nobody knows whose it was.
type Sandbox struct {
	bin    binaries
	acct   account
	cache  string
	folder *folder
	dog    *watchdog

	mu        sync.Mutex // held for no wait
	closed    bool
	processes []*Process
	ports     []uint16

	closeOnce sync.Once
	closeErr  error
}

// NewSandbox makes an empty sandbox. It lives until Close or the end of the process.
func NewSandbox() (*Sandbox, error) {
	bin, err := findBinaries()
	if err != nil {
		return nil, err
	}
	acct, err := serverAccount()
	if err != nil {
		return nil, err
	}
	cache, err := cacheDir()
	if err != nil {
		return nil, err
	}
	root, err := dataRoot(acct)
	if err != nil {
		return nil, err
	}
	sweep(acct, root)
	f, err := newFolder(acct, root)
	if err != nil {
		return nil, err
	}
	dog, err := startWatchdog(acct, f.path)
	if err != nil {
		return nil, errors.Join(err, f.remove())
	}
	return &Sandbox{bin: bin, acct: acct, cache: cache, folder: f, dog: dog}, nil
}

// Name returns the name of the folder, without its path. It differs from that of any other sandbox or cluster.
func (b *Sandbox) Name() string { return filepath.Base(b.folder.path) }

// Path returns the path of a file in the folder.
func (b *Sandbox) Path(name string) string { return b.folder.join(name) }

// BinDir returns the folder of PostgreSQL's programs.
func (b *Sandbox) BinDir() string { return b.bin.dir }

// Version returns what postgres --version says.
func (b *Sandbox) Version() string { return b.bin.version }

// Port reserves a TCP port of 127.0.0.1 until Close.
func (b *Sandbox) Port() (uint16, error) {
	port, err := ports.reserve(b.cache)
	if err != nil {
		return 0, err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.ports = append(b.ports, port)
	return port, nil
}

// WriteFile writes a file that the servers' user owns and nobody else reads.
func (b *Sandbox) WriteFile(name, text string) error { return writeFile(b.acct, b.Path(name), text) }

// Start starts a program as the servers' user, in the folder and with no more of the environment than servers get. What
// it prints goes to the file <name>.log there.
func (b *Sandbox) Start(name, program string, args ...string) (*Process, error) {
	p := &Process{name: name, log: b.Path(name + ".log")}
	log, err := os.OpenFile(p.log, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return nil, fmt.Errorf("pgtest: %w", err)
	}
	defer log.Close()
	cmd := exec.Command(program, args...)
	b.acct.apply(cmd)
	cmd.Dir, cmd.Env = b.folder.path, serverEnv()
	cmd.Stdout, cmd.Stderr = log, log

	// Under the lock that Close takes, so that it sees all of this or none.
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return nil, errors.New("pgtest: the sandbox is closed")
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("pgtest: %w", err)
	}
	p.run = &postmaster{pid: cmd.Process.Pid, gone: make(chan struct{})}
	go func() {
		_ = cmd.Wait() // whoever cares reads the log
		close(p.run.gone)
	}()
	b.processes = append(b.processes, p)
	return p, nil
}

// Process is a program in a sandbox.
type Process struct {
	name, log string
	run       *postmaster
}

// Running reports whether the program lives.
func (p *Process) Running() bool { return p.run.running() }

// Log returns the end of what the program has printed, up to 2 KiB.
func (p *Process) Log() string {
	f, err := os.Open(p.log)
	if err != nil {
		return ""
	}
	defer f.Close()
	if info, err := f.Stat(); err == nil && info.Size() > 2<<10 {
		_, _ = f.Seek(-2<<10, io.SeekEnd)
	}
	text, _ := io.ReadAll(f) // what could be read is what there is to show
	return string(text)
}

// Kill ends a program, everything that it has started, and the servers in the folders given, which need not be its
// children, all at once with SIGKILL, as the end of their machine would, except that the kernel still closes their
// sockets.
func (b *Sandbox) Kill(p *Process, dataDirs ...string) error {
	ctx, cancel := bounded()
	defer cancel()
	// Frozen first, or those killed last would notice the end of the others and tell their clients.
	var family []int
	err := eventually(ctx, func(context.Context) (err error) {
		if family, err = b.familyOf(p, dataDirs); err != nil {
			return permanent{err}
		}
		running := 0
		for _, pid := range family {
			if !stopped(pid) {
				_ = kill(pid, sigStop)
				running++
			}
		}
		if running > 0 {
			return fmt.Errorf("pgtest: %d processes of %s do not freeze", running, p.name)
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, pid := range family {
		_ = kill(pid, sigKill)
	}
	return b.waitEnded(ctx, family, p)
}

// waitEnded waits until processes that were killed have ended, and programs have been reaped.
func (b *Sandbox) waitEnded(ctx context.Context, pids []int, programs ...*Process) error {
	return eventually(ctx, func(context.Context) error {
		for _, p := range programs {
			if p.Running() {
				return fmt.Errorf("pgtest: %s survives kill -9", p.name)
			}
		}
		if i := slices.IndexFunc(pids, func(pid int) bool { return !ended(pid) }); i >= 0 {
			return fmt.Errorf("pgtest: process %d survives kill -9", pids[i])
		}
		return nil
	})
}

// familyOf returns the process ids of a program, of the postmasters in the folders, and of all their descendants.
func (b *Sandbox) familyOf(p *Process, dataDirs []string) ([]int, error) {
	servers, err := processes(func(command string) bool {
		return slices.ContainsFunc(dataDirs, func(dir string) bool { return strings.Contains(command+" ", " -D "+dir+" ") })
	})
	if err != nil {
		return nil, err
	}
	var family []int
	if p.Running() {
		family = append(family, p.run.pid)
	}
	for _, s := range servers {
		family = append(family, s.pid)
	}
	return withDescendants(family)
}

// Close ends all processes without letting them finish anything, and removes the folder. Calls after the first return
// what the first did.
func (b *Sandbox) Close() error {
	b.closeOnce.Do(func() { b.closeErr = b.close() })
	return b.closeErr
}

func (b *Sandbox) close() error {
	b.mu.Lock()
	b.closed = true
	b.mu.Unlock()
	// Each is the leader of a group, whose members may have names that the watchdog does not know.
	var leaders []int
	for _, p := range b.processes {
		if p.Running() {
			leaders = append(leaders, p.run.pid)
		}
	}
	family, err := withDescendants(leaders)
	for _, pid := range leaders {
		_ = kill(-pid, sigKill)
	}
	err = errors.Join(err, b.dog.release())
	ctx, cancel := bounded()
	defer cancel()
	err = errors.Join(err, b.waitEnded(ctx, family, b.processes...))
	for _, port := range b.ports {
		ports.release(port)
	}
	return errors.Join(err, b.folder.remove())
}
