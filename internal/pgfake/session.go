package pgfake

import (
	"bytes"
	"encoding/binary"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgproto3"
)

const (
	sslRequest    = 80877103
	gssEncRequest = 80877104
	cancelRequest = 80877102

	// outSize is how much a real server buffers before it sends without being asked.
	outSize = 8192
)

// session is the server's side of one connection. It belongs to the goroutine that pumps the connection.
type session struct {
	c *conn
	p *Peer

	work []byte // input; what lies before off is done
	off  int
	out  []byte // output not yet delivered
	owed bool   // out was to be delivered, but the peer hung

	answered bool // with out, all of the input is

	started  bool
	asked    bool // a password was asked for
	stuck    bool // an inline session that is never to answer again
	done     bool // the connection ends
	skipping bool // an extended-protocol error: everything up to Sync is ignored
	fixed    bool // in_hot_standby is not ours to report
	synced   bool // nothing has come since the client was told that we are ready
	standby  bool // as the client was told
	tx       byte
	readOnly bool // of the open transaction; it survives a promotion

	statements map[string]*statement
	known      map[string]*statement // by text
	portals    map[string]*portal
	unnamed    portal

	pending []effect       // of the open transaction, explicit or implicit
	marks   map[string]int // how much of it there was at every savepoint
	late    *late          // what comes at Sync

	copying  *statement
	copier   *Response
	copyRows int
	copyTail []byte
	copyText bool
}

// effect is what a statement has done, if its transaction commits.
type effect struct {
	tally *tally
	ended func(committed bool) // nil: nobody is told
}

// late is an error that comes at Sync.
type late struct {
	err       *Error
	committed bool // after the commit
}

// portal keeps its Bind message, since the input buffer moves on.
type portal struct {
	st      *statement
	bind    []byte  // from the parameter formats on
	formats []int16 // of the result
}

func newSession(c *conn) *session {
	return &session{
		c: c, p: c.peer, tx: 'I',
		statements: map[string]*statement{}, known: map[string]*statement{}, portals: map[string]*portal{},
		marks: map[string]int{},
	}
}

func (s *session) take(b []byte) {
	if s.off > 0 {
		s.work = s.work[:copy(s.work, s.work[s.off:])]
		s.off = 0
	}
	s.work = append(s.work, b...)
}

// run answers every complete message. held says that the peer hung before all of it was done.
func (s *session) run() (held, done bool) {
	if !s.flush() {
		return true, false
	}
	for !s.done {
		if s.stuck || s.p.set.Load().hung {
			return true, false
		}
		head := 5
		if !s.started && !s.asked {
			head = 4
		}
		rest := s.work[s.off:]
		if len(rest) < head {
			break
		}
		n := head - 4 + int(binary.BigEndian.Uint32(rest[head-4:]))
		if n < head {
			return false, true
		}
		if len(rest) < n {
			break
		}
		s.off += n
		if head == 4 {
			s.startup(rest[4:n])
		} else {
			s.message(rest[0], rest[5:n])
		}
	}
	if s.stuck {
		return true, false
	}
	if s.done && !s.flush() {
		return true, false
	}
	return s.owed && !s.flush(), s.done
}

// flush reports whether nothing is held back.
func (s *session) flush() bool {
	if len(s.out) == 0 {
		return true
	}
	if !s.c.deliver(s.out, s.answered) {
		return false
	}
	s.out = s.out[:0]
	s.owed, s.answered = false, false
	return true
}

// push flushes, where the connection can wait for the peer to wake: an inline one leaves it to the next run.
func (s *session) push() {
	if s.flush() {
		return
	}
	s.owed = true
	if s.c.inline {
		return
	}
	c := s.c
	c.mu.Lock()
	for !c.ended && c.peer.set.Load().hung {
		c.cond.Wait()
	}
	c.mu.Unlock()
	s.flush()
}

func (s *session) startup(body []byte) {
	if len(body) < 4 {
		s.done = true
		return
	}
	switch binary.BigEndian.Uint32(body) {
	case sslRequest, gssEncRequest:
		s.out = append(s.out, 'N')
		s.push()
		return
	case cancelRequest:
		if len(body) >= 8 {
			s.p.cancel(binary.BigEndian.Uint32(body[4:]))
		}
		s.done = true
		return
	}
	if e := s.p.set.Load().startup; e != nil {
		s.out = appendError(s.out, e)
		s.done = true
		return
	}
	if s.p.password != "" {
		s.asked = true
		s.out, _ = (&pgproto3.AuthenticationCleartextPassword{}).Encode(s.out)
		s.push()
		return
	}
	s.welcome()
}

func (s *session) welcome() {
	s.started = true
	s.c.begun()
	s.out, _ = (&pgproto3.AuthenticationOk{}).Encode(s.out)
	s.standby = s.p.set.Load().standby
	_, s.fixed = s.p.params["in_hot_standby"]
	params := reported(s.p.version)
	params["in_hot_standby"] = onOff(s.standby)
	maps.Copy(params, s.p.params)
	for _, name := range slices.Sorted(maps.Keys(params)) {
		if params[name] != "" {
			s.status(name, params[name])
		}
	}
	s.out, _ = (&pgproto3.BackendKeyData{
		ProcessID: s.c.pid,
		SecretKey: binary.BigEndian.AppendUint32(nil, ^s.c.pid),
	}).Encode(s.out)
	s.ready()
}

// reported are the settings that a server of a major version reports (PostgreSQL documentation, 55.2.7 "Asynchronous
// Operations"), but the one that changes.
func reported(version int) map[string]string {
	params := map[string]string{
		"DateStyle":                     "ISO, MDY",
		"IntervalStyle":                 "postgres",
		"TimeZone":                      "UTC",
		"application_name":              "",
		"client_encoding":               "UTF8",
		"default_transaction_read_only": "off",
		"integer_datetimes":             "on",
		"is_superuser":                  "off",
		"server_encoding":               "UTF8",
		"server_version":                versionText(version),
		"session_authorization":         "app",
		"standard_conforming_strings":   "on",
	}
	if version >= 16 {
		params["scram_iterations"] = "4096"
	}
	if version >= 18 {
		params["search_path"] = `"$user", public`
	}
	return params
}

func versionText(version int) string { return strconv.Itoa(version) + ".0" }

func (s *session) status(name, value string) {
	s.out, _ = (&pgproto3.ParameterStatus{Name: name, Value: value}).Encode(s.out)
}

func (s *session) ready() {
	if standby := s.p.set.Load().standby; standby != s.standby {
		s.standby = standby
		if !s.fixed {
			s.status("in_hot_standby", onOff(standby))
		}
	}
	s.out = append(s.out, 'Z', 0, 0, 0, 5, s.tx)
	s.answered = s.off == len(s.work)
	s.push()
}

func (s *session) message(typ byte, body []byte) {
	if s.copying != nil {
		s.copyData(typ, body)
		return
	}
	if s.skipping && typ != 'S' && typ != 'X' {
		return
	}
	defer func() { s.synced = typ == 'S' || typ == 'Q' || typ == 'p' }()
	switch typ {
	case 'p':
		if password, _ := cstring(body); string(password) != s.p.password {
			s.out = appendError(s.out, &Error{
				Severity: "FATAL", Code: "28P01", Message: message("28P01"), Routine: "auth_failed",
			})
			s.done = true
			return
		}
		s.welcome()
	case 'P':
		s.parse(body)
	case 'B':
		s.bind(body)
	case 'D':
		s.describe(body)
	case 'E':
		name, _ := cstring(body)
		po := s.portal(name)
		if po == nil {
			s.fail(&Error{Code: "34000", Message: "portal " + strconv.Quote(string(name)) + " does not exist"})
			return
		}
		s.execute(po.st, po, false)
	case 'C':
		if len(body) > 0 {
			if name, _ := cstring(body[1:]); body[0] == 'S' {
				delete(s.statements, string(name))
			} else {
				delete(s.portals, string(name))
			}
		}
		s.out = append(s.out, '3', 0, 0, 0, 4)
	case 'H':
		s.push()
	case 'S':
		if s.synced {
			s.p.syncs.Add(1)
		}
		s.sync()
	case 'Q':
		sql, _ := cstring(body)
		s.query(string(sql))
	case 'X':
		s.done = true
	case 'd', 'c', 'f': // left over from a copy that failed
	default:
		s.out = appendError(s.out, &Error{
			Severity: "FATAL", Code: "08P01", Message: "invalid frontend message type " + strconv.Itoa(int(typ)),
		})
		s.done = true
	}
}

func (s *session) parse(body []byte) {
	name, rest := cstring(body)
	sql, rest := cstring(rest)
	st := s.compiled(string(sql))
	if len(rest) >= 2 {
		given := int(binary.BigEndian.Uint16(rest))
		rest = rest[2:]
		for i := 0; i < given && len(rest) >= 4; i++ {
			if i == len(st.params) {
				st.params = append(st.params, 0)
			}
			if oid := binary.BigEndian.Uint32(rest); oid != 0 {
				st.params[i] = oid
			}
			rest = rest[4:]
		}
	}
	if s.tx == 'E' && !st.endsTx() {
		s.fail(errAborted)
		return
	}
	if set := s.p.set.Load(); set.handler != nil {
		asked := s.asks(st, set)
		asked.Preparing = true
		if r := set.handler(asked); r != nil {
			if r.Err != nil && r.Err.atParse() {
				s.fail(r.Err)
				return
			}
			if r.answers() {
				st.columns = r.Columns
			}
		}
	}
	s.statements[string(name)] = st
	s.out = append(s.out, '1', 0, 0, 0, 4)
}

func (s *session) bind(body []byte) {
	name, rest := cstring(body)
	stName, rest := cstring(rest)
	st := s.statements[string(stName)]
	if st == nil {
		s.fail(&Error{
			Code: "26000", Message: "prepared statement " + strconv.Quote(string(stName)) + " does not exist",
			Routine: "FetchPreparedStatement",
		})
		return
	}
	po := &s.unnamed
	if len(name) > 0 {
		po = new(portal)
		s.portals[string(name)] = po
	}
	po.st = st
	po.bind = append(po.bind[:0], rest...)
	if !po.read() {
		s.fail(&Error{Code: "08P01", Message: "invalid message format"})
		return
	}
	s.out = append(s.out, '2', 0, 0, 0, 4)
}

// read finds the result formats, after the parameters.
func (po *portal) read() bool {
	r := reader{b: po.bind}
	for range r.int16() {
		r.int16()
	}
	for range r.int16() {
		if n := r.int32(); n > 0 {
			r.next(n)
		}
	}
	po.formats = po.formats[:0]
	for range r.int16() {
		po.formats = append(po.formats, int16(r.int16()))
	}
	return !r.short
}

// args returns the parameters with their formats; they point into the portal.
func (po *portal) args() (values [][]byte, formats []int16) {
	r := reader{b: po.bind}
	var given []int16
	for range r.int16() {
		given = append(given, int16(r.int16()))
	}
	for i := range r.int16() {
		var v []byte
		if n := r.int32(); n >= 0 {
			v = r.next(n)
		}
		values = append(values, v)
		formats = append(formats, formatOf(given, i))
	}
	return values, formats
}

// formatOf is the rule of Bind: none means text, one holds for all.
func formatOf(formats []int16, i int) int16 {
	switch {
	case len(formats) == 1:
		return formats[0]
	case i < len(formats):
		return formats[i]
	}
	return 0
}

func (s *session) portal(name []byte) *portal {
	if len(name) > 0 {
		return s.portals[string(name)]
	}
	if s.unnamed.st == nil {
		return nil
	}
	return &s.unnamed
}

func (s *session) describe(body []byte) {
	if len(body) == 0 {
		return
	}
	name, _ := cstring(body[1:])
	if body[0] == 'P' {
		po := s.portal(name)
		if po == nil {
			s.fail(&Error{Code: "34000", Message: "portal " + strconv.Quote(string(name)) + " does not exist"})
			return
		}
		s.describeRow(po.st.columns, po.formats)
		return
	}
	st := s.statements[string(name)]
	if st == nil {
		s.fail(&Error{Code: "26000", Message: "prepared statement " + strconv.Quote(string(name)) + " does not exist"})
		return
	}
	s.out, _ = (&pgproto3.ParameterDescription{ParameterOIDs: st.params}).Encode(s.out)
	s.describeRow(st.columns, nil)
}

func (s *session) describeRow(columns []Column, formats []int16) {
	if len(columns) == 0 {
		s.out = append(s.out, 'n', 0, 0, 0, 4)
		return
	}
	s.out = appendRowDescription(s.out, columns, formats)
}

// sync ends the flight of the extended protocol, and the transaction where no BEGIN has opened one: that is its commit.
func (s *session) sync() {
	l := s.late
	s.late = nil
	switch {
	case s.skipping:
	case l != nil && !l.committed:
		s.fail(l.err)
	case s.tx == 'I' && !s.commit():
		s.cut()
		return
	case l != nil:
		s.fail(l.err)
	}
	s.skipping = false
	if !s.done {
		s.ready()
	}
}

// takeEffect notes what a statement does. A COMMIT does what its transaction has done; false: the connection has ended.
func (s *session) takeEffect(st *statement, r *Response) bool {
	switch {
	case st.kind == kindCommit && s.tx != 'E':
		s.pending = append(s.pending, effect{st.tally, r.Ended})
		return s.commit()
	case st.kind == kindCommit, st.kind == kindRollback:
		s.rollback()
		st.tally.applied.Add(1)
	case st.kind == kindRollbackTo:
		s.end(s.marks[st.lastWord()], false)
		st.tally.applied.Add(1)
	case st.kind == kindBegin:
		st.tally.applied.Add(1)
	case st.kind == kindSavepoint:
		s.marks[st.lastWord()] = len(s.pending)
		st.tally.applied.Add(1)
	default:
		s.pending = append(s.pending, effect{st.tally, r.Ended})
	}
	return true
}

// commit makes what is pending last, and reports false where the connection has ended before.
func (s *session) commit() bool {
	if len(s.pending) == 0 {
		return true
	}
	if !s.c.commit(s.pending) {
		return false
	}
	s.end(0, true)
	return true
}

// rollback undoes what is pending.
func (s *session) rollback() { s.end(0, false) }

// end is the end of what has become pending since there were n effects.
func (s *session) end(n int, committed bool) {
	n = min(n, len(s.pending))
	for _, e := range s.pending[n:] {
		if e.ended != nil {
			e.ended(committed)
		}
	}
	s.pending = s.pending[:n]
}

// query is the simple protocol. The texts are told apart at every semicolon outside of quotes.
func (s *session) query(sql string) {
	texts := splitStatements(sql)
	for i, text := range texts {
		st := s.compile(text)
		if !s.execute(st, nil, i == len(texts)-1) || s.done || s.stuck || s.copying != nil {
			break
		}
	}
	if s.done || s.stuck || s.copying != nil {
		return
	}
	s.skipping = false
	s.ready()
}

// fail answers with an error and does what an error does to the session.
func (s *session) fail(e *Error) bool {
	s.out = appendError(s.out, e)
	s.skipping = true
	switch s.tx {
	case 'I':
		s.rollback()
	case 'T':
		s.tx = 'E' // undone at its end, or at a ROLLBACK TO
	}
	s.done = s.done || e.fatal()
	return false
}

var errAborted = &Error{
	Code:    "25P02",
	Message: "current transaction is aborted, commands ignored until end of transaction block",
	Routine: "exec_parse_message",
}

func (s *session) asks(st *statement, set *settings) Statement {
	return Statement{
		SQL: st.sql, InTx: s.tx != 'I',
		Standby: set.standby, Timeline: set.timeline, SystemID: set.systemID, LSN: s.p.lsn.Load(),
	}
}

// execute runs one statement, up to CommandComplete, and reports whether the next one of the same flight may run. po is
// nil in the simple protocol, where the last statement of a text ends the transaction that no BEGIN has opened.
func (s *session) execute(st *statement, po *portal, last bool) bool {
	simple := po == nil
	set := s.p.set.Load()
	if !s.p.record(s.c, st) {
		s.cut()
		return false
	}
	if s.tx == 'E' && !st.endsTx() {
		return s.fail(errAborted)
	}
	if e := s.p.nextFailure(); e != nil {
		if st.endsTx() {
			s.tx = 'I'
		}
		return s.fail(e)
	}
	var r *Response
	if set.handler != nil {
		asked := s.asks(st, set)
		asked.Simple = simple
		if po != nil {
			asked.Args = st.textArgs(po)
		}
		r = set.handler(asked)
	}
	if r == nil {
		r = &builtin
	}
	if r.Cut == CutBeforeExecute {
		s.cut()
		return false
	}

	var refused *Error
	answers := r.answers()
	if answers {
		refused = r.Err
	} else {
		refused = s.refuses(st, set)
	}
	if refused == nil && st.kind != kindCopy {
		if !s.c.moves(st.writes && !set.standby) || !s.takeEffect(st, r) {
			s.cut()
			return false
		}
		// What is cut was sent whole, and a server goes on to Sync.
		if s.tx == 'I' && (simple && last || r.Cut != CutNever || r.Hang) && !s.commit() {
			s.cut()
			return false
		}
	}
	if r.Cut == CutBeforeAnswer {
		s.cut()
		return false
	}
	if d := set.delay + r.Delay; d > 0 || r.Hang {
		if ok := s.wait(d, r.Hang); !ok {
			return false
		}
	}

	columns := st.columns
	if answers && r.Columns != nil {
		columns = r.Columns
	}
	var formats []int16
	if po != nil {
		formats = po.formats
	}
	if refused != nil && (!answers || len(r.Rows) == 0) {
		if st.endsTx() {
			s.tx = 'I'
		}
		return s.fail(refused)
	}
	if simple && len(columns) > 0 {
		s.out = appendRowDescription(s.out, columns, nil)
	}
	var tag string
	if answers {
		for _, row := range r.Rows {
			s.row(columns, formats, row)
		}
		if refused != nil {
			return s.fail(refused)
		}
		if tag = r.Tag; tag == "" {
			tag = "SELECT " + strconv.Itoa(len(r.Rows))
		}
	} else {
		tag = s.answer(st, po, formats, set)
	}
	if s.copying != nil {
		s.copier = r
		s.push()
		return true
	}
	switch {
	case r.Cut == CutBeforeTag:
		s.push()
		s.cut()
		return false
	case st.kind == kindEmpty && !answers:
		s.out = append(s.out, 'I', 0, 0, 0, 4)
	default:
		s.out = appendTag(s.out, tag)
	}
	switch {
	case r.Cut == CutAfterAnswer:
		s.ready()
		s.cut()
		return false
	case r.Late != nil && simple:
		return s.fail(r.Late)
	case r.Late != nil:
		s.late = &late{r.Late, r.LateCommitted}
	}
	return true
}

var builtin Response

func (s *session) cut() {
	s.out = s.out[:0]
	s.done = true
}

// wait lets the statement take its time. A client that leaves does not end it.
func (s *session) wait(d time.Duration, hang bool) bool {
	if s.c.inline {
		if hang {
			s.stuck = true
			return false
		}
		return true
	}
	select { // a cancel request that came when nothing ran is void
	case <-s.c.cancelled:
	default:
	}
	var timer <-chan time.Time
	if !hang {
		t := time.NewTimer(d)
		defer t.Stop()
		timer = t.C
	}
	select {
	case <-timer:
		return true
	case <-s.c.cancelled:
		s.fail(&Error{Code: "57014", Message: message("57014"), Routine: "ProcessInterrupts"})
	case <-s.c.down:
		s.cut()
	}
	return false
}

func (s *session) row(columns []Column, formats []int16, values []any) {
	s.out = appendRow(s.out, columns, formats, values)
	if len(s.out) >= outSize {
		s.push()
	}
}

func (s *session) startCopy(st *statement) {
	s.copying = st
	s.copyRows = 0
	s.copyTail = s.copyTail[:0]
	s.copyText = !strings.Contains(st.lower, "binary")
	format := byte(1)
	if s.copyText {
		format = 0
	}
	s.out, _ = (&pgproto3.CopyInResponse{OverallFormat: format}).Encode(s.out)
}

// copyData counts rows: lines of the text format; tuples of the binary one.
func (s *session) copyData(typ byte, body []byte) {
	switch typ {
	case 'd':
		if s.copyText {
			s.copyRows += bytes.Count(body, []byte{'\n'})
			return
		}
		s.copyTail = append(s.copyTail, body...)
		s.copyTuples()
	case 'c':
		st, r := s.copying, s.copier
		s.copying, s.copier = nil, nil
		if !s.c.moves(true) || !s.takeEffect(st, r) || s.tx == 'I' && !s.commit() {
			s.cut()
			return
		}
		s.out = appendTag(s.out, "COPY "+strconv.Itoa(s.copyRows))
		if r.Late != nil {
			s.fail(r.Late)
		}
		s.copied()
	case 'f':
		s.copying, s.copier = nil, nil
		reason, _ := cstring(body)
		s.fail(&Error{Code: "57014", Message: "COPY from stdin failed: " + string(reason)})
		s.copied()
	case 'X':
		s.done = true
	}
}

// copied ends the simple query that began the copy.
func (s *session) copied() {
	s.skipping = false
	if !s.done {
		s.ready()
	}
}

func (s *session) copyTuples() {
	const signature = 11 + 4 + 4
	b := s.copyTail
	if s.copyRows == 0 && bytes.HasPrefix(b, []byte("PGCOPY\n")) {
		if len(b) < signature {
			return
		}
		b = b[signature:]
	}
	for {
		r := reader{b: b}
		fields := r.int16()
		if r.short || int16(fields) < 0 {
			break
		}
		for range fields {
			if n := r.int32(); n > 0 {
				r.next(n)
			}
		}
		if r.short {
			break
		}
		s.copyRows++
		b = r.b
	}
	s.copyTail = append(s.copyTail[:0], b...)
}

func onOff(b bool) string {
	if b {
		return "on"
	}
	return "off"
}

// cstring splits b after its first zero byte.
func cstring(b []byte) (s, rest []byte) {
	i := bytes.IndexByte(b, 0)
	if i < 0 {
		return b, nil
	}
	return b[:i], b[i+1:]
}

// reader reads big-endian numbers; one that runs out gives zeros and says so.
type reader struct {
	b     []byte
	short bool
}

func (r *reader) next(n int) []byte {
	if n > len(r.b) {
		r.b, r.short = nil, true
		return nil
	}
	b := r.b[:n:n]
	r.b = r.b[n:]
	return b
}

func (r *reader) int16() int {
	if b := r.next(2); b != nil {
		return int(binary.BigEndian.Uint16(b))
	}
	return 0
}

func (r *reader) int32() int {
	if b := r.next(4); b != nil {
		return int(int32(binary.BigEndian.Uint32(b)))
	}
	return 0
}
