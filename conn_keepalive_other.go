//go:build !linux

package multipool

import (
	"syscall"
	"time"
)

// setUserTimeout does nothing: the system has no such limit, or another name for it.
func setUserTimeout(syscall.RawConn, time.Duration) error { return nil }
