package multipool

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/pgmultipool/multipool/internal/pgfake"
	"github.com/pgmultipool/multipool/internal/pgfault"
)

// Errors that come before the command tag of a write, or after it, in a bubble: what is done and what the caller is told
// are compared with the table of docs/outcomes.md.

// answer is an error, and where it comes.
type answer struct {
	err       pgfake.Error
	tagged    bool // after the tag
	committed bool // and, under the extended protocol, after Sync's commit
}

var (
	byTermination   = pgfake.Error{Severity: "FATAL", Code: "57P01", Message: "terminating connection", Routine: "ProcessInterrupts"}
	byCancel        = pgfake.Error{Code: "57014", Message: "canceling statement", Routine: "ProcessInterrupts"}
	byConstraint    = pgfake.Error{Code: "23514", Message: "odd", Routine: "exec_stmt_raise"}
	bySerialization = pgfake.Error{Code: "40001", Message: "could not serialize", Routine: "PreCommit_CheckForSerializationFailure"}
	beforeTag       = []answer{{err: byTermination}, {err: byCancel}, {err: byConstraint}, {err: bySerialization}}
	afterTag        = []answer{{err: byTermination, tagged: true}, {err: byCancel, tagged: true}}
	beforeSync      = []answer{{err: byConstraint, tagged: true}, {err: bySerialization, tagged: true}} // raised by the commit
	afterCommit     = []answer{{err: byTermination, tagged: true, committed: true}}
)

func (a answer) String() string {
	where := "before the tag"
	switch {
	case a.committed:
		where = "after the commit"
	case a.tagged:
		where = "after the tag"
	}
	return a.err.Code + " " + where
}

// atSync reports whether the answer comes at Sync: its commit raises it, or has been.
func (a answer) atSync() bool { return a.committed || a.tagged && a.err.Routine != "ProcessInterrupts" }

// response has the fake give the answer, in the words of the message.
func (a answer) response(message string) *pgfake.Response {
	e := a.err
	e.Message = message
	if a.tagged {
		return &pgfake.Response{Late: &e, LateCommitted: a.committed}
	}
	return &pgfake.Response{Err: &e}
}

// claims is the first table of docs/outcomes.md, by the answer. internal/pgfault holds it to the code.
var claims = sync.OnceValue(func() map[string][]pgfault.Outcome {
	page, err := os.ReadFile("docs/outcomes.md")
	if err != nil {
		panic(err)
	}
	words := map[string]pgfault.Outcome{"no": pgfault.NotExecuted, "unknown": pgfault.Unknown, "its own word": pgfault.InPart}
	rows := map[string][]pgfault.Outcome{}
	for line := range strings.Lines(string(page)) {
		cells := strings.Split(strings.Trim(line, "| \n"), " | ")
		if _, is := words[cells[len(cells)-1]]; !is || len(cells) != 6 {
			continue
		}
		for _, cell := range cells[1:] {
			rows[cells[0]] = append(rows[cells[0]], words[cell])
		}
	}
	return rows
})

// claim is what the table says of a statement that the answer has come for.
func (a answer) claim(simple, batch bool) pgfault.Outcome {
	row := claims()[map[string]string{
		"23514": "an error of the statement", "40001": "a deferred constraint, a serialization failure",
		"57014": "57014, query_canceled", "57P01": "57P01, admin_shutdown",
	}[a.err.Code]]
	if len(row) == 0 {
		panic("the table lacks " + a.err.Code)
	}
	switch {
	case batch:
		return row[4]
	case simple && a.tagged:
		return row[3]
	case simple:
		return row[2]
	case a.tagged:
		return row[1]
	default:
		return row[0]
	}
}

// xacts has a fake tell the numbers of transactions, and what became of them.
type xacts struct {
	mu     sync.Mutex
	status []string // by number
}

// answer is nil for what is no question about a transaction.
func (x *xacts) answer(s pgfake.Statement) *pgfake.Response {
	text := func(names ...string) (columns []pgfake.Column) {
		for _, name := range names {
			columns = append(columns, pgfake.Column{Name: name, OID: pgfake.TextOID})
		}
		return columns
	}
	row := text("xid", "system", "timeline", "redo")
	x.mu.Lock()
	defer x.mu.Unlock()
	switch s.SQL {
	case whatBecame:
		r := &pgfake.Response{Columns: text("status")}
		if !s.Preparing {
			n, _ := strconv.Atoi(string(s.Args[0]))
			r.Rows = [][]any{{x.status[n]}}
		}
		return r
	case strings.TrimSpace("select null," + whereAmI):
		return &pgfake.Response{Columns: row, Rows: [][]any{{nil, "1", "00000001", "0/1"}}}
	case whoAmI:
		r := &pgfake.Response{Columns: row}
		if !s.Preparing {
			n := len(x.status)
			x.status = append(x.status, "in progress")
			r.Rows = [][]any{{strconv.Itoa(n), "1", "00000001", "0/1"}}
			r.Ended = func(committed bool) {
				x.mu.Lock()
				defer x.mu.Unlock()
				x.status[n] = map[bool]string{true: "committed", false: "aborted"}[committed]
			}
		}
		return r
	}
	return nil
}

// insertion is a way to write: the text that writes, the one that the answer comes for, and how.
type insertion struct {
	name    string
	write   string
	meets   string
	simple  bool
	batch   bool
	settles bool // it asks what became of its COMMIT
	copies  bool
	do      func(ctx context.Context, p *MultiPool) error
}

func insertions() []insertion {
	const (
		literal  = "insert into t values (7)"
		argument = "insert into t values ($1::int8)"
		simply   = pgx.QueryExecModeSimpleProtocol
	)
	exec := func(sql string, args ...any) func(context.Context, *MultiPool) error {
		return func(ctx context.Context, p *MultiPool) error { _, err := p.Exec(ctx, sql, args...); return err }
	}
	query := func(sql string, args ...any) func(context.Context, *MultiPool) error {
		return func(ctx context.Context, p *MultiPool) error {
			rows, err := p.Query(ctx, sql, args...)
			if err != nil {
				return err
			}
			_, err = pgx.CollectRows(rows, pgx.RowTo[int])
			return err
		}
	}
	queryRow := func(sql string, args ...any) func(context.Context, *MultiPool) error {
		return func(ctx context.Context, p *MultiPool) error { return p.QueryRow(ctx, sql, args...).Scan(new(int)) }
	}
	batch := func(n int, args ...any) func(context.Context, *MultiPool) error {
		return func(ctx context.Context, p *MultiPool) error {
			b := &pgx.Batch{}
			for range n - 1 {
				b.Queue("select 1")
			}
			b.Queue(argument, args...)
			return p.SendBatch(ctx, b).Close()
		}
	}
	insert := func(ctx context.Context) func(pgx.Tx) error {
		return func(tx pgx.Tx) error { _, err := tx.Exec(ctx, literal); return err }
	}
	all := []insertion{
		{name: "Exec without arguments", write: literal, simple: true, do: exec(literal)},
		{name: "Exec", write: argument, do: exec(argument, 7)},
		{name: "Exec, not prepared", write: argument, do: exec(argument, pgx.QueryExecModeExec, 7)},
		{name: "Query", write: literal + " returning v", do: query(literal + " returning v")},
		{name: "Query with an argument", write: argument + " returning v", do: query(argument+" returning v", 7)},
		{name: "Query, simple", write: literal + " returning v", simple: true, do: query(literal+" returning v", simply)},
		{name: "QueryRow", write: argument + " returning v", do: queryRow(argument+" returning v", 7)},
		{name: "QueryRow, simple", write: literal + " returning v", simple: true, do: queryRow(literal+" returning v", simply)},
		{name: "SendBatch of one", write: argument, batch: true, do: batch(1, 7)},
		{name: "SendBatch of two", write: argument, batch: true, do: batch(2, 7)},
		{name: "CopyFrom", write: `copy "t" ( "v" ) from stdin binary`, simple: true, copies: true, do: func(ctx context.Context, p *MultiPool) error {
			_, err := p.CopyFrom(ctx, pgx.Identifier{"t"}, []string{"v"}, pgx.CopyFromRows([][]any{{int32(7)}}))
			return err
		}},
		{name: "Commit", write: literal, meets: "commit", simple: true, do: func(ctx context.Context, p *MultiPool) error {
			return pgx.BeginFunc(ctx, p, insert(ctx))
		}},
		{name: "RunTx", write: literal, meets: "commit", simple: true, settles: true, do: func(ctx context.Context, p *MultiPool) error {
			return p.RunTx(ctx, pgx.TxOptions{}, insert(ctx))
		}},
	}
	for i := range all {
		if all[i].meets == "" {
			all[i].meets = all[i].write
		}
	}
	return all
}

func TestAnAnswerIsJudgedByWhatCameBeforeIt(t *testing.T) {
	for _, w := range insertions() {
		answers := append(append([]answer{}, beforeTag...), afterTag...)
		if !w.simple {
			answers = append(append(answers, beforeSync...), afterCommit...)
		}
		for _, a := range answers {
			t.Run(w.name+"/"+a.String(), func(t *testing.T) {
				bubble(t, 1, nil, func(ctx context.Context, x *fakes) { meets(t, ctx, x, w, a) })
			})
		}
	}
}

// meets makes one write, of which the first try meets the answer.
func meets(t *testing.T, ctx context.Context, x *fakes, w insertion, a answer) {
	require.NoError(t, x.pool.Ping(ctx))
	settled()
	var asked xacts
	given := 0 // by one session after another
	x.primary.Handle(answering(func(s pgfake.Statement) *pgfake.Response {
		if s.SQL == w.meets && !s.Preparing && given == 0 {
			given++
			return a.response(a.err.Message)
		}
		return asked.answer(s)
	}))
	err := w.do(ctx, x.pool)
	settled()
	require.Equal(t, 1, given)
	done, marked := x.primary.Applied(w.write), errors.Is(err, ErrOutcomeUnknown)
	fatal := a.err.Severity == "FATAL"
	claim := a.claim(w.simple, w.batch)
	if w.copies && fatal {
		if pgfault.NeverSent(err) { // the session had ended before the copy was handed over whole
			assert.False(t, marked, "%v", err)
			assert.Zero(t, done)
			return
		}
		claim = pgfault.Unknown // pgx drops a copy's tag with the connection
	}
	again := claim == pgfault.NotExecuted && (fatal && !w.meetsCommit() || w.settles && (fatal || a.err.Code == "40001"))
	switch {
	case w.settles && claim == pgfault.Unknown, again:
		require.NoError(t, err, "the server was asked, or it was sent again")
		assert.Equal(t, 1, done)
	case claim == pgfault.Unknown:
		require.ErrorIs(t, err, ErrOutcomeUnknown)
		assert.LessOrEqual(t, done, 1)
	default:
		require.Error(t, err)
		assert.False(t, marked, "%v", err)
		assert.Zero(t, done)
	}
	var answered *pgconn.PgError
	if err != nil && assert.ErrorAs(t, err, &answered) {
		assert.Equal(t, a.err.Code, answered.Code)
	}
	if a.tagged && (w.simple || a.committed) {
		assert.Equal(t, 1, done, "the fake had committed")
	}
	assert.Zero(t, x.pool.Status().Total.AcquiredConns, fmt.Sprint(err))
}

func (w insertion) meetsCommit() bool { return w.meets == "commit" }
