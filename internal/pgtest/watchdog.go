package pgtest

import (
	_ "embed"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"time"
)

//go:embed watchdog.sh
var watchdogScript string

// watchdog is the shell process that removes a cluster when its owner ends.
// It reads a pipe whose write end no other process holds (Go closes it on
// exec), so that the kernel itself tells it, whatever the owner died of.
type watchdog struct {
	cmd   *exec.Cmd
	leash io.Closer
}

// startWatchdog starts the watchdog of a folder. It runs as the servers' user,
// which may end what it has to end and remove what it has to remove, and
// nothing else.
func startWatchdog(acct account, folder string) (*watchdog, error) {
	cmd := watchdogCommand(acct, folder)
	leash, err := cmd.StdinPipe()
	if err != nil {
		return nil, fmt.Errorf("pgtest: watchdog: %w", err)
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("pgtest: watchdog: %w", err)
	}
	return &watchdog{cmd: cmd, leash: leash}, nil
}

func watchdogCommand(acct account, folder string) *exec.Cmd {
	// The script goes by the environment, so that a list of processes shows one short line.
	cmd := exec.Command("/bin/sh", "-c", `eval "$MULTIPOOL_PG_WATCHDOG"`, "watchdog of "+filepath.Base(folder))
	acct.apply(cmd)
	cmd.Dir = "/"
	cmd.Env = append(serverEnv(), "MULTIPOOL_PG_FOLDER="+folder, "MULTIPOOL_PG_WATCHDOG="+watchdogScript)
	return cmd
}

// release makes the watchdog do its work and waits until it is done.
func (w *watchdog) release() error {
	w.leash.Close()
	done := make(chan error, 1)
	go func() { done <- w.cmd.Wait() }()
	select {
	case <-done: // its exit code tells nothing: the folder's absence does
		return nil
	case <-time.After(patience):
		_ = w.cmd.Process.Kill()
		<-done
		return errors.New("pgtest: the watchdog did not finish")
	}
}

// serverEnv is the environment of every process this package starts: without
// the variables that steer PostgreSQL, and with messages in English.
func serverEnv() []string {
	env := []string{"LC_ALL=C", "PATH=" + os.Getenv("PATH") + ":/usr/bin:/bin:/usr/sbin:/sbin"}
	for _, name := range []string{"TZ", "TMPDIR", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH"} {
		if v, ok := os.LookupEnv(name); ok {
			env = append(env, name+"="+v)
		}
	}
	return env
}
