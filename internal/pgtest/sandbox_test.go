//go:build linux || darwin || freebsd

package pgtest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// manager starts what stands for a cluster manager: a program that makes a server, in a session that is not its own,
// and outlives the start.
func manager(t *testing.T, b *Sandbox, node string) *Process {
	t.Helper()
	port, err := b.Port()
	require.NoError(t, err)
	dir := b.Path(node)
	require.NoError(t, b.WriteFile(node+".patroni.sh", fmt.Sprintf(`set -e
		%[1]s/initdb -D %[2]s --no-sync --auth=trust >/dev/null
		%[1]s/pg_ctl start -D %[2]s -l %[2]s.server.log -o "-c port=%[3]d -c cluster_name=%[4]s -c fsync=off \
			-c listen_addresses=127.0.0.1 -c unix_socket_directories= -c dynamic_shared_memory_type=mmap \
			-c autovacuum_naptime=1d" # a worker would come and go
		sleep 1000 &
		echo started
		wait`, b.BinDir(), dir, port, b.Name())))
	p, err := b.Start(node, "/bin/sh", b.Path(node+".patroni.sh"))
	require.NoError(t, err)
	require.NoError(t, eventually(within(t, patience), func(context.Context) error {
		if !p.Running() {
			return permanent{errors.New(p.Log())}
		}
		if !strings.HasSuffix(p.Log(), "started\n") {
			return errors.New(p.Log())
		}
		return nil
	}))
	return p
}

// alive returns the processes that a sandbox may be answerable for.
func alive(t *testing.T, pids []int) []process {
	t.Helper()
	list, err := processes(func(command string) bool { return command != "" })
	require.NoError(t, err)
	var of []process
	for _, p := range list {
		for _, pid := range pids {
			if p.pid == pid {
				of = append(of, p)
			}
		}
	}
	return of
}

func TestSandbox(t *testing.T) {
	t.Parallel()
	if _, err := findBinaries(); err != nil {
		t.Skip(err)
	}
	b, err := NewSandbox()
	require.NoError(t, err)
	t.Cleanup(func() { _ = b.Close() })
	one, two := manager(t, b, "node1"), manager(t, b, "node2")
	first, err := b.familyOf(one, []string{b.Path("node1")})
	require.NoError(t, err)
	second, err := b.familyOf(two, []string{b.Path("node2")})
	require.NoError(t, err)
	for _, family := range [][]int{first, second} {
		require.Greater(t, len(family), 6, "a shell, its sleep, a server of several processes: %v", family)
		require.Len(t, alive(t, family), len(family))
	}

	require.NoError(t, b.Kill(one, b.Path("node1")))
	require.False(t, one.Running())
	require.Empty(t, alive(t, first))
	require.True(t, two.Running())
	require.Len(t, alive(t, second), len(second), "the other one is spared")
	require.NoError(t, b.Kill(one, b.Path("node1")), "a second time")

	folder := b.Path("")
	require.NoError(t, b.Close())
	require.NoError(t, b.Close())
	require.Empty(t, alive(t, second))
	require.Empty(t, segments(t, append(first, second...)))
	_, err = os.Stat(folder)
	require.ErrorIs(t, err, os.ErrNotExist)
	_, err = b.Start("late", "/bin/sh")
	require.Error(t, err)
}
