package multipool

import (
	"fmt"
	"strconv"
	"strings"
)

// lsn is a position in the log (PostgreSQL documentation, 8.20).
type lsn uint64

// parseLSN reads PostgreSQL's form, two hexadecimal numbers; 0 where there is none.
func parseLSN(text string) lsn {
	high, low, ok := strings.Cut(text, "/")
	h, err := strconv.ParseUint(high, 16, 32)
	l, err2 := strconv.ParseUint(low, 16, 32)
	if !ok || err != nil || err2 != nil {
		return 0
	}
	return lsn(h<<32 | l)
}

func (l lsn) String() string { return fmt.Sprintf("%X/%X", uint64(l)>>32, uint32(l)) }

const (
	walPage       = 8192
	leastSegment  = 1 << 20
	pageHeader    = 24 // of a page of the log
	segmentHeader = 40 // of the first page of a segment
)

// replayable is the position to which a standby can have replayed all that lies before l. Where a record ends with its
// page, pg_current_wal_insert_lsn() points past the next page's header, and a standby stays before it until there is
// another record. How long segments are is not known, so after what would be the header of one a record may have ended
// all the same: whether a standby is ahead is not to be asked of this.
func (l lsn) replayable() lsn {
	if l%walPage == pageHeader {
		return l - pageHeader
	}
	if l%leastSegment == segmentHeader {
		return l - segmentHeader
	}
	return l
}
