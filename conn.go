package multipool

import "sync/atomic"

// connState says what a connection is used for, as far as it matters to whoever would close it.
//
//	             ┌───────── restart ─────────┐
//	             ▼                           │
//	┌─────► connSetup ───────── cut ──────► connCut ◄── cut ──┐
//	│         │   ▲ │                        ▲              │
//	│   ready │   │ └─ pass ─┐   cut, evict  │              │
//	│         ▼   │ check    │               │              │
//	│       connIdle ────────┼───────────────┘              │
//	│         │   ▲          │                              │
//	│   claim │   │ settle   │                              │
//	│         ▼   │          ▼                              │
//	└ settle ─ connHeld ◄────┘ ── read ──► connRead ────────┤
//	             ▲                         │   │            │
//	             └────────── keep ─────────┘   │ show       │
//	                                           ▼            │
//	                                        connRow ────────┘
//
// settle, the end of a use, leads from every state except connCut to connIdle, or to connSetup while something is still
// to be done before the connection is idle. cut leaves a connection in connHeld where it is, although its socket is
// closed: its user finds out. connCut is the end, except for a connection that is still being made, for which pgx may
// dial again.
//
// The order of the constants is the order in which cut spares them.
type connState uint8

const (
	// connSetup is the zero value: the connection is being made, is in the hands of a hook of the program, or was left
	// by a caller who did not wait for its end.
	connSetup connState = iota
	// connIdle is in its pool. Whoever wants the connection claims it; whoever wants its slot evicts it.
	connIdle
	// connRead runs a read that has handed out no row, and that may be sent again on another connection.
	connRead
	// connRow is the same, with the row here and its caller yet to scan it.
	connRow
	// connHeld is everything else: a write, a transaction, a stream, a connection that the program holds.
	connHeld
	// connCut is closed, or about to be closed, by the pool itself.
	connCut
)

// connUse is the state of one connection. Every change is a method of its own, which refuses where the state is not
// what it must be: the user of the connection and whoever closes it may ask at once. All methods may be called from
// any goroutine at any time; the comments say whose part they are.
type connUse struct{ word atomic.Int32 }

// state returns the state, which may have changed by the time the caller looks at it.
func (u *connUse) state() connState { return connState(u.word.Load()) }

// change is the one step that all changes are made of.
func (u *connUse) change(from, to connState) bool {
	return u.word.CompareAndSwap(int32(from), int32(to))
}

// restart begins another try to make the connection, after one that may have been cut. It belongs to who dials, and
// refuses a connection that has been made.
func (u *connUse) restart() bool {
	for {
		switch was := u.state(); {
		case was == connSetup:
			return true
		case was != connCut:
			return false
		case u.change(connCut, connSetup):
			return true
		}
	}
}

// ready ends the making of the connection, or the program's part of a release.
func (u *connUse) ready() bool { return u.change(connSetup, connIdle) }

// claim takes an idle connection out of its pool for a user.
func (u *connUse) claim() bool { return u.change(connIdle, connHeld) }

// check takes an idle connection for a hook of the program that is to say whether it will do. pass or ready ends it.
func (u *connUse) check() bool { return u.change(connIdle, connSetup) }

// pass gives a connection that was checked to its user.
func (u *connUse) pass() bool { return u.change(connSetup, connHeld) }

// read says that what its user is about to send is a read that may be sent again.
func (u *connUse) read() bool { return u.change(connHeld, connRead) }

// show says that the row of a QueryRow is here. It refuses if the connection was cut: then the read is sent again.
// Where the connection was not running such a read, nothing changes.
func (u *connUse) show() bool { return u.advance(connRow) }

// keep says that the program has something of what the connection runs, a row or a transaction, so that it cannot be
// sent again. It refuses if the connection was cut. Where the connection was not running such a read, nothing changes.
func (u *connUse) keep() bool { return u.advance(connHeld) }

func (u *connUse) advance(to connState) bool { return u.change(connRead, to) || u.state() != connCut }

// settle ends the use of the connection. It leaves it idle, or in setup if the program's hook or pgx has yet to end its
// part. It refuses a connection that was cut.
func (u *connUse) settle(idle bool) bool {
	to := connSetup
	if idle {
		to = connIdle
	}
	for {
		switch was := u.state(); {
		case was == connCut:
			return false
		case u.change(was, to):
			return true
		}
	}
}

// evict takes an idle connection in order to close it.
func (u *connUse) evict() bool { return u.change(connIdle, connCut) }

// cut takes the connection in order to close it, if its state is at most the given one, and reports whether it may be
// closed. A connection that is held stays so: its user will meet the error, and gives it back.
func (u *connUse) cut(most connState) bool {
	for {
		switch was := u.state(); {
		case was == connCut:
			return true
		case was > most:
			return false
		case was == connHeld, u.change(was, connCut):
			return true
		}
	}
}

// idle reports whether the connection is in its pool.
func (u *connUse) idle() bool { return u.state() == connIdle }

// reading reports whether the connection runs a read that may be sent again and has shown nothing.
func (u *connUse) reading() bool { return u.state() == connRead }

// wasCut reports whether the pool itself closes the connection.
func (u *connUse) wasCut() bool { return u.state() == connCut }
