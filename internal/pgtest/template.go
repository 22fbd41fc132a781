package pgtest

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"
)

// template is a data directory to copy servers from, kept between runs. It is
// shut down cleanly, so that a copy is consistent from the start and a standby
// made of it serves reads even before it has met its primary.
type template struct {
	cache string
	key   string
	bin   binaries
	acct  account
	baked map[string]string
}

// A server remembers these settings in its data directory, and a standby
// refuses to start with less than is remembered. So they are part of what a
// template is, or else a setting lower than initdb's could never be used.
var bakedSettings = []string{
	"max_connections", "max_worker_processes", "max_wal_senders",
	"max_prepared_transactions", "max_locks_per_transaction", "wal_level",
	"track_commit_timestamp", "wal_log_hints",
}

const (
	templateFormat = "1" // counts changes of how a template is made
	manifestSuffix = ".manifest"
	templateAge    = 30 * 24 * time.Hour
)

func newTemplate(bin binaries, acct account, settings map[string]string, variant int) (*template, error) {
	cache, err := cacheDir()
	if err != nil {
		return nil, err
	}
	t := &template{cache: cache, bin: bin, acct: acct, baked: map[string]string{}}
	h := sha256.New()
	fmt.Fprintln(h, templateFormat, bin.dir, bin.version, acct.uid)
	if variant != 0 {
		fmt.Fprintln(h, "variant", variant)
	}
	for _, name := range bakedSettings {
		if v, ok := settings[name]; ok {
			t.baked[name] = v
			fmt.Fprintf(h, "%s=%q\n", name, v)
		}
	}
	t.key = fmt.Sprintf("pg%d-%x", bin.major, h.Sum(nil)[:6])
	return t, nil
}

// cacheDir returns the directory for templates. It is private to this user, as
// servers run with what lies in it.
func cacheDir() (string, error) {
	dir := os.Getenv("MULTIPOOL_PG_CACHE")
	if dir == "" {
		if base, err := os.UserCacheDir(); err == nil {
			dir = filepath.Join(base, "multipool-pgtest")
			if err := os.MkdirAll(dir, 0o700); err == nil && writable(dir) {
				return dir, nil
			}
		}
		// No home, as in many a container.
		dir = filepath.Join(os.TempDir(), fmt.Sprintf("multipool-pgtest-%d", os.Geteuid()))
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", fmt.Errorf("pgtest: cache: %w", err)
	}
	info, err := os.Stat(dir)
	if err != nil {
		return "", fmt.Errorf("pgtest: cache: %w", err)
	}
	if ownerOf(info) != os.Geteuid() {
		return "", fmt.Errorf("pgtest: cache %s belongs to someone else: set MULTIPOOL_PG_CACHE", dir)
	}
	return dir, nil
}

func (t *template) dir() string      { return filepath.Join(t.cache, t.key) }
func (t *template) manifest() string { return t.dir() + manifestSuffix }

// copyTo makes the directories dsts from the template, making the template
// first, within f, if there is none or it is not whole.
func (t *template) copyTo(ctx context.Context, f *folder, dsts []string) error {
	err := t.tryCopy(dsts)
	if err == nil {
		return nil
	}
	if !errors.Is(err, errNoTemplate) {
		return err
	}
	if err := t.make(ctx, f); err != nil {
		return err
	}
	return t.tryCopy(dsts)
}

var errNoTemplate = errors.New("pgtest: no usable template")

func (t *template) tryCopy(dsts []string) error {
	lock, err := lockFile(t.dir()+".lock", lockShared)
	if err != nil {
		return fmt.Errorf("pgtest: %w", err)
	}
	defer lock.Close()
	tree, err := t.read()
	if err != nil {
		return err
	}
	now := time.Now()
	_ = os.Chtimes(t.dir()+".lock", now, now) // the time of last use, for prune
	return tree.copyTo(t.acct, dsts)
}

// read returns the files of the template, or errNoTemplate if they are not those
// that its manifest says.
func (t *template) read() (*tree, error) {
	want, err := os.ReadFile(t.manifest())
	if err != nil {
		return nil, fmt.Errorf("%w: %v", errNoTemplate, err)
	}
	tree, err := readTree(t.dir())
	if err != nil {
		return nil, fmt.Errorf("%w: %v", errNoTemplate, err)
	}
	if string(want) != tree.manifest() {
		return nil, fmt.Errorf("%w: it is not whole", errNoTemplate)
	}
	return tree, nil
}

// make makes the template, unless another process has meanwhile. It is built
// within the folder of the cluster that needs it, which the servers' user can
// use and the watchdog removes; only a finished one is put into the cache.
func (t *template) make(ctx context.Context, f *folder) error {
	lock, err := lockFile(t.dir()+".lock", lockExclusive)
	if err != nil {
		return fmt.Errorf("pgtest: %w", err)
	}
	defer lock.Close()
	if _, err := t.read(); err == nil {
		return nil
	}
	built := f.join("template")
	if err := t.build(ctx, f, built); err != nil {
		return err
	}
	defer os.RemoveAll(built)
	tree, err := readTree(built)
	if err != nil {
		return fmt.Errorf("pgtest: template: %w", err)
	}
	t.prune()
	if err := t.publish(tree); err != nil {
		return fmt.Errorf("pgtest: template: %w", err)
	}
	return nil
}

func (t *template) build(ctx context.Context, f *folder, dir string) error {
	_, err := runTool(ctx, t.acct, f, nil, t.bin.path("initdb"), "-D", dir,
		"--no-sync", "--no-instructions", "--auth=trust", "--username=postgres",
		"--locale=C", "--encoding=UTF8", "--wal-segsize=1",
		"--data-checksums") // without them or wal_log_hints, pg_rewind refuses
	if err != nil {
		return err
	}
	// One run of the server makes it remember the baked settings. It also
	// drops template0, a quarter of what there is to copy.
	args := []string{"--single", "-D", dir, "-c", "fsync=off",
		"-c", "dynamic_shared_memory_type=mmap"} // else a kill leaves a file in /dev/shm
	for name, value := range t.baked {
		args = append(args, "-c", name+"="+value)
	}
	const drop = "update pg_database set datistemplate = false where datname = 'template0'\ndrop database template0\n"
	_, err = runTool(ctx, t.acct, f, strings.NewReader(drop), t.bin.path("postgres"), append(args, "postgres")...)
	return err
}

// publish puts a copy of the tree in the cache. The manifest goes last: a
// template without it does not count.
func (t *template) publish(tree *tree) error {
	manifest := t.manifest()
	if err := os.Remove(manifest); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err := os.RemoveAll(t.dir()); err != nil {
		return err
	}
	if err := tree.copyTo(account{}, []string{t.dir()}); err != nil {
		return err
	}
	if err := os.WriteFile(manifest+".new", []byte(tree.manifest()), 0o600); err != nil {
		return err
	}
	return os.Rename(manifest+".new", manifest)
}

// forget removes the template, so that the next use makes it anew.
func (t *template) forget() error {
	lock, err := lockFile(t.dir()+".lock", lockExclusive)
	if err != nil {
		return err
	}
	defer lock.Close()
	return os.Remove(t.manifest())
}

// prune removes templates that nobody has used for templateAge.
func (t *template) prune() {
	locks, _ := filepath.Glob(filepath.Join(t.cache, "pg*.lock")) // the pattern is well-formed
	for _, path := range locks {
		dir := strings.TrimSuffix(path, ".lock")
		info, err := os.Stat(path)
		if err != nil || dir == t.dir() || time.Since(info.ModTime()) < templateAge {
			continue
		}
		if lock, err := lockFile(path, lockTry); err == nil {
			_ = os.Remove(dir + manifestSuffix)
			_ = os.RemoveAll(dir)
			lock.Close()
		}
	}
}

// tree is a directory as it was read: what copying needs, without the contents.
type tree struct {
	root  string
	dirs  []string   // relative, parents first
	files []treeFile // relative
	size  int64
}

type treeFile struct {
	path string
	size int64
}

func readTree(root string) (*tree, error) { return walkTree(root, nil) }

// readRunning is readTree where files come and go.
func readRunning(root string) (*tree, error) { return walkTree(root, fs.ErrNotExist) }

// walkTree reads a tree, and leaves out what gives the tolerated error, if that is not nil.
func walkTree(root string, tolerated error) (*tree, error) {
	t := &tree{root: root}
	unless := func(err error) error {
		if errors.Is(err, tolerated) {
			return nil
		}
		return err
	}
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return unless(err)
		}
		rel, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		if d.IsDir() {
			t.dirs = append(t.dirs, rel)
			return nil
		}
		info, err := d.Info()
		if err != nil {
			return unless(err)
		}
		t.files = append(t.files, treeFile{rel, info.Size()})
		t.size += info.Size()
		return nil
	})
	return t, err
}

func (t *tree) manifest() string {
	h := sha256.New()
	for _, f := range t.files {
		fmt.Fprintf(h, "%q %d\n", f.path, f.size)
	}
	return fmt.Sprintf("%d folders, %d files, %d bytes, %x\n", len(t.dirs), len(t.files), t.size, h.Sum(nil))
}

// copyTo makes the directories dsts, owned by acct. Every file is read once for
// all of them.
func (t *tree) copyTo(acct account, dsts []string) error {
	for _, dir := range t.dirs {
		for _, dst := range dsts {
			path := filepath.Join(dst, dir)
			if err := errors.Join(os.Mkdir(path, 0o700), acct.own(path)); err != nil {
				return fmt.Errorf("pgtest: copy of the template: %w", err)
			}
		}
	}
	const workers = 4
	queue := make(chan string, len(t.files))
	for _, f := range t.files {
		queue <- f.path
	}
	close(queue)
	errs := make([]error, workers)
	var wg sync.WaitGroup
	for i := range workers {
		wg.Go(func() { errs[i] = t.copyFiles(acct, dsts, queue) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

func (t *tree) copyFiles(acct account, dsts []string, queue <-chan string) error {
	var buf bytes.Buffer
	for path := range queue {
		if err := readInto(&buf, filepath.Join(t.root, path)); err != nil {
			return fmt.Errorf("%w: %v", errNoTemplate, err)
		}
		for _, dst := range dsts {
			to := filepath.Join(dst, path)
			if err := errors.Join(os.WriteFile(to, buf.Bytes(), 0o600), acct.own(to)); err != nil {
				return fmt.Errorf("pgtest: copy of the template: %w", err)
			}
		}
	}
	return nil
}

func readInto(buf *bytes.Buffer, path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	buf.Reset()
	_, err = buf.ReadFrom(f)
	return err
}
