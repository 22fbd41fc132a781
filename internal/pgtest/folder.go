package pgtest

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"time"
)

const (
	folderPrefix = "multipool-pg-"
	ownerLock    = "owner.lock"

	// A server takes about 25 MB and grows with what is written to it.
	roomNeeded = 512 << 20
)

// folder is where everything of one cluster lies. Its owner holds a lock in
// it as long as it lives, which says more than a process id: it holds between
// containers that share the file system, and is never another process's.
type folder struct {
	path string
	lock *os.File
}

func (f *folder) join(name string) string { return filepath.Join(f.path, name) }

// newFolder makes a folder for the servers' user below root.
func newFolder(acct account, root string) (*folder, error) {
	for range 100 {
		path := filepath.Join(root, fmt.Sprintf("%s%d-%08x", folderPrefix, os.Getpid(), rand.Uint32()))
		err := os.Mkdir(path, 0o700)
		if errors.Is(err, os.ErrExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("pgtest: %w", err)
		}
		// The lock fails if a sweep got between these two lines.
		lock, err := lockFile(filepath.Join(path, ownerLock), lockTry)
		if err != nil {
			_ = os.RemoveAll(path)
			continue
		}
		if err := acct.own(path); err != nil {
			lock.Close()
			_ = os.RemoveAll(path)
			return nil, fmt.Errorf("pgtest: %w", err)
		}
		return &folder{path: path, lock: lock}, nil
	}
	return nil, fmt.Errorf("pgtest: cannot make a folder in %s", root)
}

// remove removes what is left of the folder; normally the watchdog already did.
func (f *folder) remove() error {
	defer f.lock.Close()
	if err := os.RemoveAll(f.path); err != nil {
		return fmt.Errorf("pgtest: %w", err)
	}
	return nil
}

// dataRoot returns the directory to make folders in: the first that the
// servers' user can reach, memory before disk.
func dataRoot(acct account) (string, error) {
	if freeBytes("/dev/shm") > roomNeeded && writable("/dev/shm") && reachable(acct, "/dev/shm") {
		return "/dev/shm", nil
	}
	for _, dir := range []string{os.TempDir(), "/tmp", "/var/tmp"} {
		if writable(dir) && reachable(acct, dir) {
			return dir, nil
		}
	}
	return "", errors.New("pgtest: no directory for temporary files that the servers can use: set TMPDIR")
}

func writable(dir string) bool {
	probe, err := os.MkdirTemp(dir, folderPrefix+"probe-")
	return err == nil && os.Remove(probe) == nil
}

func reachable(acct account, dir string) bool {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return false
	}
	if dir, err = filepath.EvalSymlinks(dir); err != nil {
		return false
	}
	for ; ; dir = filepath.Dir(dir) {
		info, err := os.Stat(dir)
		if err != nil || !acct.reaches(info) {
			return false
		}
		if dir == filepath.Dir(dir) {
			return true
		}
	}
}

// sweep removes the clusters below root whose owner and watchdog are both
// gone, as after a kill of everything at once.
func sweep(acct account, root string) {
	dirs, _ := filepath.Glob(filepath.Join(root, folderPrefix+"*")) // the pattern is well-formed
	for _, dir := range dirs {
		info, err := os.Lstat(dir)
		if err != nil || !info.IsDir() || ownerOf(info) != acct.uid || strings.Contains(dir, "probe-") {
			continue
		}
		if _, err := os.Stat(filepath.Join(dir, ownerLock)); err != nil {
			// Either it is being made right now or its owner did not get further.
			if time.Since(info.ModTime()) > time.Hour {
				_ = os.RemoveAll(dir)
			}
			continue
		}
		lock, err := lockFile(filepath.Join(dir, ownerLock), lockTry)
		if err != nil {
			continue
		}
		_ = watchdogCommand(acct, dir).Run() // its input is empty: it works at once
		_ = os.RemoveAll(dir)
		lock.Close()
	}
}
