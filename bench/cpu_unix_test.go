//go:build unix

package bench

import (
	"syscall"
	"time"
)

// cpuTime is what the process has had of its processors, the system's share for it included.
func cpuTime() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		panic(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
