package pgfake

import (
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

type kind int

const (
	kindOther kind = iota // a bare tag
	kindEmpty
	kindSelect
	kindSeries
	kindShow
	kindBegin
	kindCommit
	kindRollback
	kindRollbackTo
	kindSavepoint
	kindDeallocate
	kindCopy
)

// statement is what a text means to the built-in answers.
type statement struct {
	sql    string // as sent, except for a semicolon at its end
	lower  string // without leading comments
	kind   kind
	tag    string
	writes bool // moves the log
	// onStandby is why a standby refuses the statement; inReadOnly, why a read-only transaction does.
	onStandby, inReadOnly *Error
	params                []uint32
	columns               []Column
	exprs                 []expr
	fixed                 [2][]byte // the row of constants in text and in binary; nil if it is made anew every time
	series                string    // the upper bound: digits or $1
	setting               string
	tally                 *tally
}

func (st *statement) endsTx() bool {
	return st.kind == kindCommit || st.kind == kindRollback || st.kind == kindRollbackTo
}

func (st *statement) lastWord() string { return st.lower[strings.LastIndexByte(st.lower, ' ')+1:] }

var (
	seriesPattern  = regexp.MustCompile(`generate_series\s*\(\s*1\s*,\s*(\$1|'?\d+'?)`)
	paramPattern   = regexp.MustCompile(`\$(\d+)(?:\s*::\s*([a-z_][a-z0-9_]*(?:\[\])?))?`)
	quotedPattern  = regexp.MustCompile(`'(?:[^']|'')*'`)
	lockPattern    = regexp.MustCompile(`\bfor\s+(no\s+key\s+update|update|key\s+share|share)\b`)
	ctePattern     = regexp.MustCompile(`\b(insert)\s+into\b|\b(update)\s+\S+\s+set\b|\b(delete)\s+from\b|\b(merge)\s+into\b`)
	volatile       = regexp.MustCompile(`\b(nextval|setval|lo_create)\s*\(`)
	inRecovery     = regexp.MustCompile(`\b(txid_current|pg_current_xact_id|pg_notify)\s*\(`)
	castPattern    = regexp.MustCompile(`(?i)^(.*\S)\s*::\s*([a-z_][a-z0-9_]*(?:\[\])?)$`)
	aliasPattern   = regexp.MustCompile(`(?i)^(.*\S)\s+as\s+("[^"]+"|[a-z_][a-z0-9_]*)$`)
	identPattern   = regexp.MustCompile(`(?i)^(?:(?:"[^"]+"|[a-z_]\w*)\.)*("[^"]+"|[a-z_]\w*)$`)
	callPattern    = regexp.MustCompile(`(?i)^([a-z_]\w*)\s*\(`)
	numberPattern  = regexp.MustCompile(`^-?\d+$`)
	stringPattern  = regexp.MustCompile(`^'(?:[^']|'')*'$`)
	argPattern     = regexp.MustCompile(`^\$(\d+)$`)
	controlPattern = regexp.MustCompile(`(?i)^\(?select (system_identifier|timeline_id) from pg_control_(?:system|checkpoint)\(\)\)?$`)
)

var typeOIDs = map[string]uint32{
	"bool": BoolOID, "boolean": BoolOID, "bytea": ByteaOID, "name": NameOID, "int8": Int8OID, "bigint": Int8OID,
	"int2": Int2OID, "smallint": Int2OID, "int4": Int4OID, "int": Int4OID, "integer": Int4OID, "text": TextOID,
	"oid": OIDOID, "json": 114, "float8": Float8OID, "varchar": VarcharOID, "date": 1082, "timestamp": 1114,
	"timestamptz": TimestamptzOID, "numeric": 1700, "uuid": 2950, "pg_lsn": LSNOID, "jsonb": 3802,
	"int4[]": 1007, "int[]": 1007, "text[]": 1009, "int8[]": 1016,
}

func readOnlyError(what string) *Error {
	return &Error{
		Code: "25006", Message: "cannot execute " + what + " in a read-only transaction", Routine: "PreventCommandIfReadOnly",
	}
}

func recoveryError(what string) *Error {
	return &Error{
		Code: "25006", Message: "cannot execute " + what + " during recovery", Routine: "PreventCommandDuringRecovery",
	}
}

// refuses is what a real server finds when it begins to execute.
func (s *session) refuses(st *statement, set *settings) *Error {
	if set.standby && st.onStandby != nil {
		return st.onStandby
	}
	if set.standby || s.tx != 'I' && s.readOnly {
		return st.inReadOnly
	}
	return nil
}

// compiled is compile with a memory: a monitor asks the same long question thousands of times.
func (s *session) compiled(sql string) *statement {
	known := s.known[sql]
	if known == nil {
		known = s.compile(sql)
		if len(s.known) < maxKnown {
			s.known[sql] = known
		}
	}
	st := *known
	st.params, st.columns = slices.Clone(known.params), slices.Clone(known.columns)
	st.tally = s.p.tallyOf(st.sql)
	return &st
}

const maxKnown = 64

// compile never fails: a text that it does not know is a select or a command by its first word.
func (s *session) compile(sql string) *statement {
	sql = strings.TrimSpace(strings.TrimRight(strings.TrimSpace(sql), ";"))
	st := &statement{sql: sql, tally: s.p.tallyOf(sql)}
	text := stripComments(strings.ToValidUTF8(sql, "?"))
	st.lower = lowerASCII(text)
	words := strings.Fields(st.lower)
	if len(words) == 0 {
		st.kind = kindEmpty
		return st
	}
	st.findParams()
	verb := strings.Trim(words[0], "(")
	next := ""
	if len(words) > 1 {
		next = words[1]
	}
	st.tag = strings.ToUpper(verb)
	write := func(what string) {
		st.inReadOnly = readOnlyError(what)
		st.writes = true
	}
	switch verb {
	case "select", "with", "values", "table":
		st.kind = kindSelect
		bare := quotedPattern.ReplaceAllString(st.lower, "''")
		if m := lockPattern.FindStringSubmatch(bare); m != nil {
			st.inReadOnly = readOnlyError("SELECT FOR " + strings.ToUpper(strings.Join(strings.Fields(m[1]), " ")))
		}
		if m := volatile.FindStringSubmatch(bare); m != nil {
			write(m[1] + "()")
		}
		if m := inRecovery.FindStringSubmatch(bare); m != nil {
			st.onStandby = recoveryError(m[1] + "()")
		}
		if m := ctePattern.FindStringSubmatch(bare); verb == "with" && m != nil {
			write(strings.ToUpper(m[1] + m[2] + m[3] + m[4]))
		}
		list := "1"
		if verb == "select" {
			list = strings.TrimLeft(text, "(")[len("select"):]
		}
		s.compileSelect(st, strings.TrimSpace(list))
	case "insert", "update", "delete", "merge":
		write(st.tag)
		st.tag += " 1"
		if verb == "insert" {
			st.tag = "INSERT 0 1"
		}
		if i := strings.Index(st.lower, "returning "); i >= 0 {
			s.compileList(st, text[i+len("returning "):])
		}
	case "begin", "start":
		st.kind, st.tag = kindBegin, "BEGIN"
		if verb == "start" {
			st.tag = "START TRANSACTION"
		}
		switch {
		case strings.Contains(st.lower, "serializable"):
			st.onStandby = &Error{
				Code: "0A000", Message: "cannot use serializable mode in a hot standby",
				Hint: "You can use REPEATABLE READ instead.", Routine: "GetSerializableTransactionSnapshot",
			}
		case strings.Contains(st.lower, "read write"):
			st.onStandby = &Error{
				Code: "0A000", Message: "cannot set transaction read-write mode during recovery", Routine: "check_XactReadOnly",
			}
		}
	case "commit", "end":
		st.kind, st.tag = kindCommit, "COMMIT"
	case "rollback", "abort":
		st.kind, st.tag = kindRollback, "ROLLBACK"
		if next == "to" {
			st.kind = kindRollbackTo
		}
	case "savepoint":
		st.kind = kindSavepoint
	case "deallocate":
		st.kind = kindDeallocate
	case "show":
		st.kind = kindShow
		st.setting = strings.Join(words[1:], " ")
		st.columns = []Column{{Name: st.setting, OID: TextOID}}
	case "copy":
		if strings.Contains(st.lower, "from stdin") {
			st.kind = kindCopy
			st.inReadOnly = readOnlyError("COPY FROM")
			st.onStandby = recoveryError("COPY FROM")
		}
	case "create", "alter", "drop":
		st.tag += " " + strings.ToUpper(next)
		write(st.tag)
	case "truncate":
		st.tag = "TRUNCATE TABLE"
		write(st.tag)
	case "grant", "revoke", "refresh", "comment", "import", "security":
		write(st.tag)
	case "lock":
		st.tag = "LOCK TABLE"
		st.onStandby = recoveryError(st.tag)
	case "listen", "notify", "vacuum", "analyze", "reindex", "cluster", "prepare":
		if verb != "prepare" || next == "transaction" {
			st.onStandby = recoveryError(st.tag)
		}
	case "call", "do":
	case "discard":
		st.tag += " " + strings.ToUpper(next)
	}
	return st
}

func (s *session) compileSelect(st *statement, list string) {
	m := seriesPattern.FindStringSubmatch(st.lower)
	if m == nil {
		s.compileList(st, list)
		return
	}
	st.kind = kindSeries
	st.series = strings.Trim(m[1], "'")
	if st.series == "$1" && st.params[0] == 0 {
		st.params[0] = Int4OID
	}
	if strings.HasPrefix(list, "*") {
		st.columns = []Column{{"id", Int4OID}, {"payload", TextOID}}
		return
	}
	for _, text := range splitList(list) {
		column, _ := s.compileExpr(text)
		st.columns = append(st.columns, column)
	}
}

func (s *session) compileList(st *statement, list string) {
	fixed := true
	for _, text := range splitList(list) {
		column, e := s.compileExpr(text)
		if e.param > 0 && column.OID == 0 {
			column.OID = TextOID
		}
		if e.refused != nil {
			st.onStandby = e.refused
		}
		st.columns = append(st.columns, column)
		st.exprs = append(st.exprs, e)
		fixed = fixed && e.value == nil && e.param == 0
	}
	if !fixed {
		return
	}
	values := make([]any, len(st.exprs))
	for i, e := range st.exprs {
		values[i] = e.constant
	}
	st.fixed[0] = appendRow(nil, st.columns, nil, values)
	st.fixed[1] = appendRow(nil, st.columns, []int16{1}, values)
}

// expr is one column: a constant, a parameter, or something that depends on the state of the peer.
type expr struct {
	constant any
	param    int // from 1
	value    func(*Peer, *settings) any
	refused  *Error // by a standby
}

func (s *session) compileExpr(text string) (Column, expr) {
	name := ""
	if m := aliasPattern.FindStringSubmatch(text); m != nil {
		text, name = m[1], strings.Trim(m[2], `"`)
	}
	var oid uint32
	if m := castPattern.FindStringSubmatch(text); m != nil {
		text, oid = m[1], typeOIDs[strings.ToLower(m[2])]
		if oid == 0 {
			oid = TextOID
		}
		if name == "" {
			name = strings.ToLower(m[2])
		}
	}
	text = strings.TrimPrefix(strings.TrimSpace(text), "pg_catalog.")
	text = strings.ReplaceAll(text, "(pg_catalog.", "(")

	column := Column{Name: name, OID: oid}
	e := expr{constant: 1}
	set := func(fallback string, oid uint32) {
		if column.Name == "" {
			column.Name = fallback
		}
		if column.OID == 0 {
			column.OID = oid
		}
	}
	switch {
	case numberPattern.MatchString(text):
		n, _ := strconv.ParseInt(text, 10, 64)
		e.constant = n
		if n == int64(int32(n)) {
			set("?column?", Int4OID)
		} else {
			set("?column?", Int8OID)
		}
	case stringPattern.MatchString(text):
		e.constant = strings.ReplaceAll(text[1:len(text)-1], "''", "'")
		set("?column?", TextOID)
	case strings.EqualFold(text, "true"), strings.EqualFold(text, "false"):
		e.constant = strings.EqualFold(text, "true")
		set("bool", BoolOID)
	case strings.EqualFold(text, "null"):
		e.constant = nil
		set("?column?", TextOID)
	case argPattern.MatchString(text):
		e.param, _ = strconv.Atoi(text[1:])
		set("?column?", 0)
	case text == "*":
		set("id", Int4OID)
	case identPattern.MatchString(text):
		ident := strings.Trim(identPattern.FindStringSubmatch(text)[1], `"`)
		oid := s.p.columns[ident]
		if oid == 0 {
			oid = Int4OID
		}
		set(ident, oid)
	case controlPattern.MatchString(text):
		if strings.Contains(lowerASCII(text), "system_identifier") {
			e.value = func(_ *Peer, set *settings) any { return set.systemID }
			set("system_identifier", Int8OID)
		} else {
			e.value = func(_ *Peer, set *settings) any { return set.timeline }
			set("timeline_id", Int4OID)
		}
	default:
		call := ""
		if m := callPattern.FindStringSubmatch(text); m != nil {
			call = lowerASCII(m[1])
		}
		oid := Int4OID
		switch call {
		case "count":
			oid = Int8OID
		case "pg_is_in_recovery":
			oid, e.value = BoolOID, func(_ *Peer, set *settings) any { return set.standby }
		case "pg_current_wal_lsn", "pg_current_wal_insert_lsn", "pg_current_wal_flush_lsn":
			e.refused = recovering(call)
			oid, e.value = LSNOID, func(p *Peer, _ *settings) any { return formatLSN(p.lsn.Load()) }
		case "pg_last_wal_replay_lsn", "pg_last_wal_receive_lsn":
			oid, e.value = LSNOID, func(p *Peer, set *settings) any {
				if !set.standby {
					return nil
				}
				return formatLSN(p.lsn.Load())
			}
		case "pg_walfile_name":
			e.refused = recovering(call)
			oid, e.value = TextOID, func(p *Peer, set *settings) any {
				lsn := p.lsn.Load() - 1 // a position on the edge of a file belongs to the one before
				return fmt.Sprintf("%08X%08X%08X", set.timeline, lsn>>32, uint32(lsn)>>24)
			}
		}
		if call == "" {
			call = "?column?"
		}
		set(call, oid)
	}
	if b, ok := e.constant.(int); ok && b == 1 && column.OID == BoolOID {
		e.constant = true
	}
	return column, e
}

func recovering(routine string) *Error {
	return &Error{
		Code: "55000", Message: "recovery is in progress", Hint: "WAL control functions cannot be executed during recovery.",
		Routine: routine,
	}
}

func formatLSN(lsn uint64) string { return fmt.Sprintf("%X/%X", lsn>>32, uint32(lsn)) }

// answer sends the rows of a statement that nobody refused.
func (s *session) answer(st *statement, po *portal, formats []int16, set *settings) (tag string) {
	switch st.kind {
	case kindBegin:
		s.tx = 'T'
		s.readOnly = set.standby || strings.Contains(st.lower, "read only")
	case kindCommit:
		tag = st.tag
		if s.tx == 'E' {
			tag = "ROLLBACK"
		}
		s.tx = 'I'
		return tag
	case kindRollback:
		s.tx = 'I'
	case kindRollbackTo:
		s.tx = 'T'
	case kindDeallocate:
		words := strings.Fields(st.sql)
		if name := words[len(words)-1]; strings.EqualFold(name, "all") {
			clear(s.statements)
			return "DEALLOCATE ALL"
		} else {
			delete(s.statements, strings.Trim(name, `"`))
		}
	case kindCopy:
		s.startCopy(st)
	case kindShow:
		s.row(st.columns, formats, []any{s.show(st.setting, set)})
	case kindSeries:
		n := st.seriesLen(po)
		for i := 1; i <= n; i++ {
			s.row(st.columns, formats, seriesRow(st.columns, i))
		}
		return "SELECT " + strconv.Itoa(n)
	default:
		if len(st.exprs) == 0 {
			return st.tag
		}
		s.selectRow(st, po, formats, set)
		if st.kind == kindSelect {
			return "SELECT 1"
		}
	}
	return st.tag
}

func seriesRow(columns []Column, i int) []any {
	row := make([]any, len(columns))
	for k, c := range columns {
		switch c.oid() {
		case Int2OID, Int4OID, Int8OID, OIDOID, Float8OID:
			row[k] = i
		case BoolOID:
			row[k] = true
		default:
			row[k] = c.Name + " " + strconv.Itoa(i)
		}
	}
	return row
}

func (s *session) selectRow(st *statement, po *portal, formats []int16, set *settings) {
	if st.fixed[0] != nil && len(formats) <= 1 {
		s.out = append(s.out, st.fixed[formatOf(formats, 0)&1]...)
		return
	}
	values := make([]any, len(st.exprs))
	var args [][]byte
	for i, e := range st.exprs {
		switch {
		case e.param > 0:
			if args == nil && po != nil {
				args = st.textArgs(po)
			}
			if e.param <= len(args) && args[e.param-1] != nil {
				values[i] = string(args[e.param-1])
			}
		case e.value != nil:
			values[i] = e.value(s.p, set)
		default:
			values[i] = e.constant
		}
	}
	s.row(st.columns, formats, values)
}

func (s *session) show(setting string, set *settings) string {
	switch setting {
	case "transaction_read_only":
		return onOff(set.standby || s.tx != 'I' && s.readOnly)
	case "in_hot_standby":
		return onOff(set.standby)
	case "default_transaction_read_only":
		return "off"
	case "transaction isolation level", "transaction_isolation":
		return "read committed"
	case "server_version":
		return versionText(s.p.version)
	}
	return s.p.params[setting]
}

func (st *statement) seriesLen(po *portal) int {
	text := st.series
	if text == "$1" && po != nil {
		if args := st.textArgs(po); len(args) > 0 {
			text = string(args[0])
		}
	}
	n, _ := strconv.Atoi(text)
	return n
}

// textArgs are the arguments as text where the type is known.
func (st *statement) textArgs(po *portal) [][]byte {
	values, formats := po.args()
	for i, v := range values {
		if v != nil && formats[i] == 1 && i < len(st.params) {
			values[i] = textOf(st.params[i], v)
		}
	}
	return values
}

// findParams takes the types from casts; 0 lets pgx go by the Go value.
func (st *statement) findParams() {
	for _, m := range paramPattern.FindAllStringSubmatch(quotedPattern.ReplaceAllString(st.lower, "''"), -1) {
		n, _ := strconv.Atoi(m[1])
		if n < 1 || n > 65535 {
			continue
		}
		for len(st.params) < n {
			st.params = append(st.params, 0)
		}
		if oid := typeOIDs[m[2]]; oid != 0 {
			st.params[n-1] = oid
		}
	}
}

// stripComments removes white space and comments in front of the first word.
func stripComments(sql string) string {
	for {
		sql = strings.TrimLeft(sql, " \t\r\n")
		switch {
		case strings.HasPrefix(sql, "--"):
			_, rest, ok := strings.Cut(sql, "\n")
			if !ok {
				return ""
			}
			sql = rest
		case strings.HasPrefix(sql, "/*"):
			_, rest, ok := strings.Cut(sql, "*/")
			if !ok {
				return ""
			}
			sql = rest
		default:
			return sql
		}
	}
}

// scan calls f with every byte outside of quotes and its depth of parentheses, until f returns false.
func scan(s string, f func(i, depth int) bool) {
	var quote byte
	depth := 0
	for i := 0; i < len(s); i++ {
		switch b := s[i]; {
		case quote != 0:
			if b == quote {
				quote = 0
			}
			continue
		case b == '\'' || b == '"':
			quote = b
			continue
		case b == '(':
			depth++
		case b == ')':
			depth--
		}
		if !f(i, depth) {
			return
		}
	}
}

func splitStatements(sql string) []string {
	var texts []string
	start := 0
	add := func(text string) {
		if strings.TrimSpace(text) != "" {
			texts = append(texts, text)
		}
	}
	scan(sql, func(i, _ int) bool {
		if sql[i] == ';' {
			add(sql[start:i])
			start = i + 1
		}
		return true
	})
	add(sql[start:])
	if len(texts) == 0 {
		return []string{sql}
	}
	return texts
}

// splitList splits a select list at its commas, and ends it at its FROM.
func splitList(s string) []string {
	var list []string
	start, end := 0, len(s)
	scan(s, func(i, depth int) bool {
		switch {
		case depth == 0 && s[i] == ',':
			list = append(list, strings.TrimSpace(s[start:i]))
			start = i + 1
		case depth == 0 && i > 0 && isSpace(s[i-1]) && isFrom(s[i:]):
			// The one FROM that is part of an expression we know: a subselect without its parentheses.
			if !controlPattern.MatchString("select " + s) {
				end = i
			}
			return false
		}
		return true
	})
	if end == len(s) && controlPattern.MatchString("select "+s) {
		return []string{"select " + s}
	}
	return append(list, strings.TrimSpace(s[start:end]))
}

func isFrom(s string) bool {
	return len(s) >= 4 && strings.EqualFold(s[:4], "from") && (len(s) == 4 || isSpace(s[4]))
}

// lowerASCII keeps the length, so that an offset holds in both texts.
func lowerASCII(s string) string {
	return strings.Map(func(r rune) rune {
		if 'A' <= r && r <= 'Z' {
			return r + ('a' - 'A')
		}
		return r
	}, s)
}

func isSpace(b byte) bool { return b == ' ' || b == '\t' || b == '\n' || b == '\r' }
