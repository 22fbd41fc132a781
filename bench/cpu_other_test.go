//go:build !unix

package bench

import "time"

// cpuTime is the wall clock's where the process cannot be asked for its own.
func cpuTime() time.Duration { return wallTime() }
