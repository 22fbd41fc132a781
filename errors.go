package multipool

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/puddle/v2"

	"github.com/pgmultipool/multipool/internal/pgfault"
)

var (
	// ErrNoPrimary matches, with errors.Is, the error of a call that needed the primary when there was none, or none
	// that could be reached, until the wait of the call was over (Options.Wait). Nothing was executed.
	ErrNoPrimary = errors.New("multipool: no primary")

	// ErrNoReplica matches the error of a call whose route allows replicas only ([TargetReplica]) when none could serve
	// it. Nothing was executed.
	ErrNoReplica = errors.New("multipool: no replica")

	// ErrOutcomeUnknown matches the error of a write that may or may not have been executed. One of these has happened:
	//
	//   - The connection was lost, or the caller's context ended, after the write was handed to the connection and
	//     before the server's answer came.
	//   - The server stopped the write when it may already have been committed.
	//   - A proxy failed the write with an error of its own (docs/outcomes.md has the table).
	//
	// It may also match the error of a Query or QueryRow that is a read by its text, if that was sent to a server that
	// accepts writes and calls a function that is not known to be read-only. [RetryReads] excludes that, because it
	// declares that reads do not write.
	//
	// The error unwraps to the original one. JDBC reports the same condition as SQLSTATE 08007, transaction resolution
	// unknown. In a pool of one peer it marks nothing except the COMMIT of RunTx.
	ErrOutcomeUnknown = errors.New("multipool: the outcome of the statement is unknown")

	// ErrSplitBrain matches the error of a write while two peers claim to be the primary and nothing tells which of
	// them is right. The error is a [NoPeerError]. Nothing was executed.
	ErrSplitBrain = errors.New("multipool: two peers claim to be the primary")

	// ErrIsPrimary matches the error of Drain and RemovePeer if the named peer is the primary.
	ErrIsPrimary = errors.New("multipool: the peer is the primary")

	// ErrClosedPool is the error of every call on a closed pool. It is puddle.ErrClosedPool, the value that pgxpool
	// returns, so errors.Is finds either of them in an error that wraps the other.
	ErrClosedPool = puddle.ErrClosedPool

	// ErrUnknownName matches the error of
	//
	//   - a call whose route or model names a peer that the pool never had, unless Options.Discover is set;
	//   - a call whose context names a model that the pool does not have;
	//   - Open, if a route in the Options names such a peer;
	//   - Drain, Resume and RemovePeer for a peer that the pool does not have, and Forget for a name that it has never
	//     seen.
	ErrUnknownName = errors.New("multipool: unknown name")
)

// PeerCause says why one peer could not take a call.
type PeerCause struct {
	Peer string `json:"peer"` // the peer's name
	Why  Why    `json:"why"`  // WhyNone if it was healthy, but had no free connection or had been tried
	Err  error  `json:"-"`    // the fault that led to Why, or nil; in JSON its text, as "err"
}

// MarshalJSON writes the cause with its error as text.
func (c PeerCause) MarshalJSON() ([]byte, error) {
	type fields PeerCause
	return json.Marshal(struct {
		fields
		Err errorText `json:"err,omitzero"`
	}{fields(c), errorText{c.Err}})
}

// UnmarshalJSON is the inverse of MarshalJSON, except that Err becomes an error of which only the text is the same.
func (c *PeerCause) UnmarshalJSON(data []byte) error {
	type fields PeerCause
	in := struct {
		*fields
		Err errorText `json:"err"`
	}{fields: (*fields)(c)}
	err := json.Unmarshal(data, &in)
	c.Err = in.Err.error
	return err
}

// errorText is an error as its text: its own fields may hold a whole connection configuration.
type errorText struct{ error }

func (e errorText) MarshalText() ([]byte, error) { return []byte(e.Error()), nil }

func (e *errorText) UnmarshalText(text []byte) error {
	e.error = errors.New(string(text))
	return nil
}

// NoPeerError reports that no peer could take a call, and why, for every peer. Nothing was executed that had an effect.
//
// It matches [ErrNoPrimary] if Intent is IntentPrimary, and [ErrNoReplica] if Intent is IntentReplica. It unwraps to
// the Err of every peer, to the last error that the call itself met, to the context's error if the caller's context
// ended the wait, to [ErrSplitBrain] if that is the reason, and to the error of Options.Discover while that fails.
type NoPeerError struct {
	Intent Intent      `json:"intent"` // what the call needed
	Peers  []PeerCause `json:"peers"`  // in the order of the configuration

	also      []error
	discovery error // why Options.Discover fails; nil where it does not
	lost      bool  // no peer has ever claimed to be the primary, and all are known
}

// Error lists the causes, each with the names of the peers that have it. For an error in connecting it shows the cause
// only. If every peer is a replica and none has ever been the primary, it asks where the primary is. If
// Options.Discover fails, it says so. The text never contains a password or a connection string.
func (e *NoPeerError) Error() string {
	type group struct {
		what  string
		peers []string
	}
	var groups []group
	for _, p := range e.Peers {
		what := p.Why.phrase()
		if p.Err != nil {
			what += " (" + gist(p.Err) + ")"
		}
		i := slices.IndexFunc(groups, func(g group) bool { return g.what == what })
		if i < 0 {
			i = len(groups)
			groups = append(groups, group{what: what})
		}
		groups[i].peers = append(groups[i].peers, p.Peer)
	}
	var says []string
	for _, g := range groups {
		if len(g.peers) == 1 {
			says = append(says, g.peers[0]+" "+g.what)
		} else {
			says = append(says, g.what+": "+strings.Join(g.peers, ", "))
		}
	}
	if e.lost {
		says = append(says, "is the primary in the list?")
	}
	if e.discovery != nil {
		says = append(says, "discovery: "+strings.TrimPrefix(e.discovery.Error(), "multipool: discover: "))
	}
	text := "multipool: no peer for " + e.Intent.purpose()
	if len(says) > 0 {
		text += ": " + strings.Join(says, "; ")
	}
	return text
}

// gist is the text of an error beside the name of its peer. Of a pgconn.ConnectError, which tells user, database and address of
// every try, it is what the tries have met, every cause once.
func gist(err error) string {
	dial, is := err.(*pgconn.ConnectError)
	if !is {
		return err.Error()
	}
	tries := []error{dial.Unwrap()}
	if joined, is := tries[0].(interface{ Unwrap() []error }); is {
		tries = joined.Unwrap()
	}
	var causes []string
	for _, try := range tries {
		text := try.Error()
		if inner := errors.Unwrap(try); inner != nil && strings.HasSuffix(text, "): "+inner.Error()) {
			text = inner.Error() // without the address
		}
		if !slices.Contains(causes, text) {
			causes = append(causes, text)
		}
	}
	if len(causes) > 1 {
		causes = slices.DeleteFunc(causes, func(text string) bool { return strings.HasSuffix(text, pgfault.TLSRefused) })
	}
	return strings.Join(causes, "; ")
}

// Is reports whether target is the error that belongs to Intent: ErrNoPrimary or ErrNoReplica.
func (e *NoPeerError) Is(target error) bool {
	switch target {
	case ErrNoPrimary:
		return e.Intent == IntentPrimary
	case ErrNoReplica:
		return e.Intent == IntentReplica
	}
	return false
}

// Unwrap returns the causes; see [NoPeerError].
func (e *NoPeerError) Unwrap() []error {
	causes := make([]error, 0, len(e.Peers)+len(e.also))
	for _, p := range e.Peers {
		if p.Err != nil {
			causes = append(causes, p.Err)
		}
	}
	if e.discovery != nil {
		causes = append(causes, e.discovery)
	}
	return append(causes, e.also...)
}

// unknownOutcome marks the error of a write that may have run.
type unknownOutcome struct{ err error }

func (e *unknownOutcome) Error() string        { return ErrOutcomeUnknown.Error() + ": " + e.err.Error() }
func (e *unknownOutcome) Is(target error) bool { return target == ErrOutcomeUnknown }
func (e *unknownOutcome) Unwrap() error        { return e.err }

// SafeToRetry answers pgconn.SafeToRetry, which asks the first error of the chain that has an opinion: pgx says
// true for a statement in flight when it loses the connection under the simple protocol.
func (e *unknownOutcome) SafeToRetry() bool { return false }

// errSolo is that of what needs several peers.
var errSolo = errors.New("multipool: a pool that was opened with one peer is a pgxpool")

func unknownName(kind, name string, known []string) error {
	return fmt.Errorf("%w: %s %q (known: %s)", ErrUnknownName, kind, name, strings.Join(known, ", "))
}

// foreignError says that a server belongs to another cluster than the pool's.
type foreignError struct{ system, cluster uint64 }

func (e *foreignError) Error() string {
	return fmt.Sprintf("multipool: the server belongs to another cluster (system identifier %d, the pool's is %d)", e.system, e.cluster)
}

// sameServer says for which peer's server a peer is another name.
type sameServer struct{ of string }

func (e *sameServer) Error() string { return "multipool: the server is that of " + e.of }

// boundedLag says how far behind a replica was allowed to be.
type boundedLag struct{ max Lag }

func (e *boundedLag) Error() string {
	return "multipool: the route bounds the lag to " + e.max.String()
}

// modelError says in which model of the configuration a route is wrong.
type modelError struct {
	model string
	err   error
}

func (e *modelError) Error() string { return fmt.Sprintf("%v, in model %q", e.err, e.model) }
func (e *modelError) Unwrap() error { return e.err }
