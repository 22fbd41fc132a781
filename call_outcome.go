package multipool

import (
	"context"
	"strings"

	"github.com/jackc/pgx/v5"

	"github.com/pgmultipool/multipool/internal/pgfault"
	"github.com/pgmultipool/multipool/internal/sqltext"
)

// markUnknown is the one place that gives a statement's error the mark of an unknown outcome.
func markUnknown(ctx context.Context, end pgfault.Ending, err error) error {
	if pgfault.Statement(ctx, err, end).Outcome == pgfault.Unknown {
		return &unknownOutcome{err}
	}
	return err
}

// sent is the statement that was last handed to a connection, as far as its outcome depends on it.
type sent struct {
	text   string // "" of a batch
	args   []any  // where they begin with one of pgx's options; nil elsewhere
	bare   bool   // no arguments were given
	query  bool   // by Query or QueryRow of a MultiPool
	tagged bool   // a command tag has come
}

// copyText stands for the text of a CopyFrom.
const copyText = "copy"

// takes notes a statement that pgx is about to send.
func (s *sent) takes(text string, args []any) {
	s.text, s.args, s.bare, s.tagged = text, nil, len(args) == 0, false
	if !s.bare {
		switch args[0].(type) {
		case pgx.QueryExecMode, pgx.QueryRewriter, pgx.QueryResultFormats, pgx.QueryResultFormatsByOID:
			s.args = args
		}
	}
}

// whole reports whether the statement is done as a whole or not at all, whatever ends it.
func (s *sent) whole() bool {
	return (!rewrites(s.args) && sqltext.Atomic(s.text)) || s.text == copyText || strings.EqualFold(s.text, "commit")
}

// simply reports whether pgx has sent the statement by the simple query protocol, or may have: Exec does so without
// arguments, and a copy always. mode is the connection's.
func (s *sent) simply(mode pgx.QueryExecMode) bool {
	bare := s.bare
	for _, arg := range s.args {
		switch arg := arg.(type) {
		case pgx.QueryExecMode:
			mode, bare = arg, true
			continue
		case pgx.QueryResultFormats, pgx.QueryResultFormatsByOID:
			bare = true
			continue
		case pgx.NamedArgs, pgx.StrictNamedArgs:
			_, values, err := arg.(pgx.QueryRewriter).RewriteQuery(context.Background(), nil, s.text, nil)
			bare = err != nil || len(values) == 0
		case pgx.QueryRewriter:
			bare = true // nobody knows what it makes
		default:
			bare = false
		}
		break
	}
	return mode == pgx.QueryExecModeSimpleProtocol || s.text == copyText || bare && !s.query
}
