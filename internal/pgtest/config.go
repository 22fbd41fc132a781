package pgtest

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// writeConfig writes the server's configuration files. They are held in memory
// and written as a whole, so that they are right again after pg_rewind or
// pg_basebackup has brought those of another server.
func (s *Server) writeConfig() error {
	s.files.Lock()
	defer s.files.Unlock()
	if err := s.writeFile("postgresql.conf", s.renderConfig()); err != nil {
		return err
	}
	return s.writeFile("pg_hba.conf", s.cluster.renderHBA())
}

// renderConfig returns the text of postgresql.conf.
func (s *Server) renderConfig() string {
	s.mu.Lock()
	conf := maps.Clone(s.conf)
	upstream, cut := s.upstream, s.cut
	s.mu.Unlock()

	conf["primary_conninfo"] = ""
	if upstream != nil && !cut {
		conf["primary_conninfo"] = fmt.Sprintf(
			"host=127.0.0.1 port=%d user=postgres sslmode=disable application_name=%s", upstream.port, s.name)
	}
	if _, ok := conf["synchronous_standby_names"]; !ok && s.cluster.options.SyncApply {
		conf["synchronous_standby_names"] = s.cluster.syncNames(s)
	}
	var b strings.Builder
	for _, name := range slices.Sorted(maps.Keys(conf)) {
		fmt.Fprintf(&b, "%s = %s\n", name, quoteSetting(conf[name]))
	}
	return b.String()
}

var settingQuoter = strings.NewReplacer(`\`, `\\`, `'`, `''`, "\n", `\n`)

func quoteSetting(v string) string { return "'" + settingQuoter.Replace(v) + "'" }

// syncNames returns the synchronous_standby_names of s: all that follow it.
func (c *Cluster) syncNames(s *Server) string {
	var names []string
	for _, f := range c.servers {
		if f.follows() == s {
			names = append(names, f.name)
		}
	}
	if len(names) == 0 {
		return ""
	}
	return fmt.Sprintf("FIRST %d (%s)", len(names), strings.Join(names, ", "))
}

func (c *Cluster) renderHBA() string {
	lines := []string{
		"host all,replication postgres 127.0.0.1/32 trust", // for this package
	}
	lines = append(lines, c.options.HBA...)
	lines = append(lines, "host all,replication all 127.0.0.1/32 trust", "")
	return strings.Join(lines, "\n")
}

// writeFile replaces a file of the data directory in one step, because the
// server may read it at any time.
func (s *Server) writeFile(name, text string) error {
	path := filepath.Join(s.dir, name)
	if err := s.cluster.writeFile(path+".new", text); err != nil {
		return err
	}
	if err := os.Rename(path+".new", path); err != nil {
		return s.errorf("%w", err)
	}
	return nil
}

func (c *Cluster) writeFile(path, text string) error { return writeFile(c.acct, path, text) }

// writeFile writes a file that the servers' user owns and nobody else reads.
func writeFile(acct account, path, text string) error {
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		return fmt.Errorf("pgtest: %w", err)
	}
	if err := acct.own(path); err != nil {
		return fmt.Errorf("pgtest: %w", err)
	}
	return nil
}
