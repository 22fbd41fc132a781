package pgtest

import (
	"context"
	"encoding/json"
	"os"
	"testing"
)

// childMode makes the test binary another program: one that starts a cluster, tells
// about it on its standard output and does what the mode says.
const childMode = "MULTIPOOL_PGTEST_CHILD"

type childReport struct {
	Folder string
	Pids   []int
	Err    string
}

func TestMain(m *testing.M) {
	if mode := os.Getenv(childMode); mode != "" {
		runChild(mode)
		return
	}
	os.Exit(m.Run())
}

func runChild(mode string) {
	var report childReport
	c, err := New(context.Background(), Options{Standbys: 1})
	if err != nil {
		report.Err = err.Error()
		_ = json.NewEncoder(os.Stdout).Encode(report)
		os.Exit(1)
	}
	report.Folder = c.folder.path
	if _, err := findProxy("pgbouncer"); err == nil {
		p, err := c.Primary().NewPooler(context.Background(), nil)
		if err != nil {
			report.Err = err.Error()
		} else {
			report.Pids = append(report.Pids, p.run.pid)
		}
	}
	for _, s := range c.servers {
		list, err := s.processes()
		if err != nil {
			report.Err = err.Error()
		}
		for _, p := range list {
			report.Pids = append(report.Pids, p.pid)
		}
	}
	switch mode {
	case "frozen":
		if err := c.Servers()[0].Freeze(); err != nil {
			report.Err = err.Error()
		}
	case "orphans":
		if err := c.Servers()[0].Freeze(); err != nil {
			report.Err = err.Error()
		}
		if err := c.Servers()[0].KillPostmaster(); err != nil {
			report.Err = err.Error()
		}
	case "close":
		if err := c.Close(); err != nil {
			report.Err = err.Error()
		}
	}
	_ = json.NewEncoder(os.Stdout).Encode(report)
	switch mode {
	case "close":
		return
	case "panic":
		panic("as a test may")
	}
	select {} // until killed
}
