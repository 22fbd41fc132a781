//go:build linux || darwin || freebsd

package pgtest

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
)

// startChild runs the test binary in a child mode and returns what it reports.
func startChild(t *testing.T, cmd *exec.Cmd, mode string) childReport {
	t.Helper()
	if cmd.Env == nil {
		cmd.Env = os.Environ()
	}
	cmd.Env = append(cmd.Env, childMode+"="+mode)
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	var report childReport
	line, err := bufio.NewReader(out).ReadBytes('\n')
	if !errors.Is(err, io.EOF) {
		require.NoError(t, err)
	}
	require.NoError(t, json.Unmarshal(line, &report), "%q", line)
	require.Empty(t, report.Err)
	return report
}

// segments returns the System V segments that a process of pids made.
func segments(t *testing.T, pids []int) []string {
	t.Helper()
	text, err := os.ReadFile("/proc/sysvipc/shm")
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	require.NoError(t, err)
	var list []string
	for line := range strings.Lines(string(text)) {
		fields := strings.Fields(line)
		for _, pid := range pids {
			if fields[4] == strconv.Itoa(pid) { // cpid
				list = append(list, line)
			}
		}
	}
	return list
}

// requireNothingLeft waits until no trace of a cluster is left.
func requireNothingLeft(t *testing.T, report childReport) {
	t.Helper()
	require.NoError(t, eventually(within(t, patience), func(context.Context) error {
		list, err := processes(func(command string) bool {
			return strings.Contains(command, filepath.Base(report.Folder)+"/")
		})
		require.NoError(t, err)
		if len(list) > 0 {
			return fmt.Errorf("left: %q", list)
		}
		if s := segments(t, report.Pids); len(s) > 0 {
			return fmt.Errorf("left: segments %q", s)
		}
		if _, err := os.Stat(report.Folder); err == nil {
			return fmt.Errorf("left: folder %s", report.Folder)
		}
		return nil
	}))
}

func TestNothingIsLeft(t *testing.T) {
	for _, mode := range []string{"killed", "frozen", "orphans", "close", "panic"} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			if _, err := findBinaries(); err != nil {
				t.Skip(err)
			}
			cmd := exec.Command(os.Args[0])
			report := startChild(t, cmd, mode)
			require.Greater(t, len(report.Pids), 6)
			if mode != "close" && mode != "panic" {
				require.NotEmpty(t, report.Folder)
				_, err := os.Stat(report.Folder)
				require.NoError(t, err)
				if _, err := os.Stat("/proc/sysvipc/shm"); err == nil {
					require.Len(t, segments(t, report.Pids), 2, "one per server, to be removed")
				}
				require.NoError(t, cmd.Process.Kill())
			}
			_ = cmd.Wait()
			requireNothingLeft(t, report)
		})
	}
}

// A cluster whose watchdog died with its owner is removed by the next one.
func TestSweep(t *testing.T) {
	t.Parallel()
	if _, err := findBinaries(); err != nil {
		t.Skip(err)
	}
	cmd := exec.Command(os.Args[0])
	report := startChild(t, cmd, "killed")
	_, err := os.Stat(report.Folder)
	require.NoError(t, err)
	require.Equal(t, 1, killChildren(t, cmd.Process.Pid, "/bin/sh"), "the watchdog")
	require.NoError(t, cmd.Process.Kill())
	_ = cmd.Wait()
	// From here on it may be gone: every start sweeps, be it in a test that runs beside this one.
	Start(t, Options{})
	requireNothingLeft(t, report)
}

// killChildren kills the children of a process that run a program, and returns how many there were.
func killChildren(t *testing.T, parent int, program string) (n int) {
	t.Helper()
	list, err := processes(func(command string) bool { return strings.HasPrefix(command, program+" ") })
	require.NoError(t, err)
	for _, p := range list {
		out, err := exec.Command("ps", "-o", "ppid=", "-p", strconv.Itoa(p.pid)).Output()
		if err == nil && strings.TrimSpace(string(out)) == strconv.Itoa(parent) {
			require.NoError(t, syscall.Kill(p.pid, syscall.SIGKILL))
			n++
		}
	}
	return n
}

// Root runs servers as another user; everyone else as themselves.
func TestAsOrdinaryUser(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skip("every other test has just done so")
	}
	if _, err := findBinaries(); err != nil {
		t.Skip(err)
	}
	nobody, err := user.Lookup("nobody")
	if err != nil {
		t.Skip(err)
	}
	uid, err := strconv.Atoi(nobody.Uid)
	require.NoError(t, err)
	gid, err := strconv.Atoi(nobody.Gid)
	require.NoError(t, err)
	// Not t.TempDir, whose parent is closed to others; neither is the folder
	// that go test has put this binary in open.
	home, err := os.MkdirTemp("/tmp", "pgtest-home-")
	require.NoError(t, err)
	t.Cleanup(func() { os.RemoveAll(home) })
	// Copied by another process: a file that this one had open for writing may
	// be open in a child that a parallel test is just forking, and so be busy.
	program := filepath.Join(home, "program")
	require.NoError(t, exec.Command("cp", os.Args[0], program).Run())
	require.NoError(t, os.Chmod(program, 0o755))
	require.NoError(t, os.Chmod(home, 0o755))
	require.NoError(t, os.Chown(home, uid, gid))

	cmd := exec.Command(program)
	cmd.Dir = home
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + home, "MULTIPOOL_PG_BIN=" + os.Getenv("MULTIPOOL_PG_BIN")}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}}
	report := startChild(t, cmd, "killed")
	info, err := os.Stat(report.Folder)
	require.NoError(t, err)
	require.Equal(t, uid, ownerOf(info))
	require.NoError(t, cmd.Process.Kill())
	_ = cmd.Wait()
	requireNothingLeft(t, report)
}
