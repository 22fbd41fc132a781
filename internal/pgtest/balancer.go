package pgtest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
)

// Balancer is a HAProxy in front of the servers of a cluster, with several ports. It checks nobody: whom a port leads to is
// what the test says, so that a test decides what its checks would have found, and when. Established sessions stay
// where they are until the test, or their server, ends them.
type Balancer struct {
	cluster *Cluster
	program string
	name    string
	ports   map[string]uint16

	op  sync.Mutex // held during an operation
	run *postmaster
}

// StartBalancer starts a HAProxy for a test, with a port of every name that leads nowhere yet, and closes it when the test and its
// subtests are over. Where there is no HAProxy it skips the test, or fails it if MULTIPOOL_REQUIRE_HAPROXY=1.
func StartBalancer(t TB, c *Cluster, ports ...string) *Balancer {
	t.Helper()
	requireProxy(t, "haproxy")
	b, err := c.NewBalancer(context.Background(), ports...)
	if err != nil {
		t.Fatalf("%v", err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("end of the log of %s, %s:\n%s", b.name, t.Name(), b.Log())
		}
		if err := b.Close(); err != nil {
			t.Logf("%v", err)
		}
	})
	return b
}

// NewBalancer starts a HAProxy and returns when it answers. It lives until its Close, or the cluster's.
func (c *Cluster) NewBalancer(ctx context.Context, names ...string) (*Balancer, error) {
	program, err := findProxy("haproxy")
	if err != nil {
		return nil, err
	}
	b := &Balancer{cluster: c, program: program, ports: map[string]uint16{}}
	for _, name := range names {
		port, err := ports.reserve(c.cache)
		if err != nil {
			return nil, errors.Join(err, b.Close())
		}
		b.ports[name] = port
		b.name = fmt.Sprintf("haproxy%d", port)
	}
	if err := b.start(ctx); err != nil {
		return nil, errors.Join(err, b.Close())
	}
	return b, nil
}

func (b *Balancer) start(ctx context.Context) (err error) {
	var config strings.Builder
	fmt.Fprintf(&config, "global\n stats socket %s mode 600 level admin\n maxconn 1000\n", b.file(".sock"))
	config.WriteString("defaults\n mode tcp\n timeout connect 2s\n timeout client 1h\n timeout server 1h\n")
	for name, port := range b.ports {
		fmt.Fprintf(&config, "listen %s\n bind 127.0.0.1:%d\n balance roundrobin\n", name, port)
		for _, s := range b.cluster.servers {
			fmt.Fprintf(&config, " server %s %s disabled\n", s.Name(), s.Addr())
		}
	}
	if err := b.cluster.writeFile(b.file(".cfg"), config.String()); err != nil {
		return err
	}
	if b.run, err = b.cluster.spawn(b.file(".log"), b.program, "-db", "-f", b.file(".cfg")); err != nil {
		return b.errorf("%w", err)
	}
	return eventually(ctx, func(context.Context) error {
		if !b.run.running() {
			return permanent{b.errorf("%w: it ended while it was starting", errNotRunning)}
		}
		_, err := b.command("show version")
		return err
	})
}

// Port returns the port of a name.
func (b *Balancer) Port(name string) uint16 { return b.ports[name] }

// Lead makes new sessions of a port go to the given servers, one after the other; none: they are refused.
func (b *Balancer) Lead(port string, servers ...*Server) error {
	b.op.Lock()
	defer b.op.Unlock()
	for _, s := range b.cluster.servers {
		state := "maint"
		for _, one := range servers {
			if one == s {
				state = "ready"
			}
		}
		if _, err := b.command(fmt.Sprintf("set server %s/%s state %s", port, s.Name(), state)); err != nil {
			return err
		}
	}
	return nil
}

// Cut ends the sessions of a port with a server.
func (b *Balancer) Cut(port string, s *Server) error {
	b.op.Lock()
	defer b.op.Unlock()
	_, err := b.command(fmt.Sprintf("shutdown sessions server %s/%s", port, s.Name()))
	return err
}

// command says a command to the admin socket, which answers, where there is nothing to tell, with an empty line.
func (b *Balancer) command(command string) (string, error) {
	conn, err := net.Dial("unix", b.file(".sock"))
	if err != nil {
		return "", b.errorf("%w", err)
	}
	defer conn.Close()
	if _, err := io.WriteString(conn, command+"\n"); err != nil {
		return "", b.errorf("%s: %w", command, err)
	}
	text, err := io.ReadAll(conn)
	answer := strings.TrimSpace(string(text))
	if err != nil {
		return "", b.errorf("%s: %w", command, err)
	}
	if answer != "" && !strings.HasPrefix(command, "show") {
		return "", b.errorf("%s: %s", command, answer)
	}
	return answer, nil
}

func (b *Balancer) file(suffix string) string { return b.cluster.folder.join(b.name + suffix) }

// Log returns the end of what HAProxy has printed, up to 16 KiB.
func (b *Balancer) Log() string {
	text, _ := os.ReadFile(b.file(".log")) // what could be read is what there is to show
	return string(text[max(0, len(text)-16<<10):])
}

func (b *Balancer) errorf(format string, args ...any) error {
	return &serverError{fmt.Errorf("pgtest: "+b.name+": "+format, args...), strings.TrimSpace(b.Log())}
}

// Close ends HAProxy and removes what it left.
func (b *Balancer) Close() error {
	b.op.Lock()
	defer b.op.Unlock()
	err := b.run.kill()
	for _, port := range b.ports {
		ports.release(port)
	}
	b.ports = nil
	for _, suffix := range []string{".cfg", ".sock", ".log"} {
		if e := os.Remove(b.file(suffix)); e != nil && !errors.Is(e, os.ErrNotExist) {
			err = errors.Join(err, e)
		}
	}
	return err
}
