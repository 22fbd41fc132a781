package multipool

import "strings"

// A need is what a statement's text says about where it may run.
type need uint8

const (
	needUnknown need = iota // nobody has looked yet
	needReplica             // a read: any server may run it
	needPrimary             // a standby refuses it, or would do the wrong thing without a word
)

// needOf reads the text of a statement and says where it may run: needReplica or needPrimary, never needUnknown.
//
// It is a scanner, not a parser. A statement is a read unless its text shows otherwise:
//
//   - its first word starts a command that a standby cannot run, or that leaves state in a session;
//   - it has a locking clause (FOR UPDATE, FOR NO KEY UPDATE, FOR SHARE, FOR KEY SHARE);
//   - it is a SELECT or WITH that holds INTO, or a WITH that holds INSERT, UPDATE, DELETE or MERGE;
//   - more than blanks, comments and semicolons follow a semicolon;
//   - it calls a function that acts on the server it runs on (see actsLocally).
//
// The errors are of different weight. A read taken for a write only loses its locality. A write taken for a read is
// refused by the standby and then remembered (see needs). But nothing refuses pg_advisory_lock on a standby, so
// whatever may be a call of such a function counts as one. What the text does not show, no scanner sees: a function of
// the user's that takes the lock inside, or a query in a string that is executed there.
//
// The lexical rules are those of the PostgreSQL documentation, "Lexical Structure", with standard_conforming_strings
// on, its default and what pgx insists on where it quotes. A text that ends inside a quote or a comment ends the scan
// there: no server runs it. It allocates nothing, takes time linear in len(sql), and any bytes will do.
func needOf(sql string) need {
	i := skipBlank(sql, 0, "(;")
	var selects, with bool
	switch commandOf(sql[i:wordEnd(sql, i)]) {
	case commandWrites:
		return needPrimary
	case commandSelect:
		selects = true
	case commandWith:
		selects, with = true, true
	}
	var (
		prev  = tokenOther // what stands before i, blanks and comments aside
		name  string       // the identifier, where prev is tokenName or tokenQuoted
		depth int          // of parentheses, not counting those before the first word
		loose bool         // where a statement begins is not to be told any more
	)
	for i < len(sql) {
		switch lexClass[sql[i]] {
		case lexBlank:
			i++

		case lexLetter:
			end := wordEnd(sql, i)
			word := sql[i:end]
			rest := sql[end:]
			i = end
			if len(word) == 1 && rest != "" {
				switch c := word[0] | 0x20; {
				case c == 'e' && rest[0] == '\'':
					i = skipEscapeString(sql, i+1)
					prev = tokenOther
					continue
				case c == 'u' && strings.HasPrefix(rest, `&"`):
					i, _ = skipQuoted(sql, i+2)
					prev = tokenEscaped
					continue
				}
			}
			k := keywordOf(word)
			if prev == tokenDot || prev == tokenAt || prev == tokenAs && k != keywordMaterialized {
				k = keywordNone // a column's name, pgx's named argument, or a label: any word will do there
			}
			body := false
			if with {
				// After AS ( there is a common table expression, after the last ) the statement itself. Inside another there
				// may be a WITH of its own, and behind one SEARCH and CYCLE with names to their ends.
				loose = loose || k == keywordWith && prev == tokenBody || k == keywordCycle && prev == tokenClose
				body = loose || prev == tokenBody || prev == tokenClose && depth == 0
			}
			next, writes := readKeyword(k, prev, body)
			if writes || k == keywordInto && selects {
				return needPrimary
			}
			prev, name = next, word

		case lexOpen:
			if callsLocally(prev, name) {
				return needPrimary
			}
			if prev == tokenAs {
				prev = tokenBody
			} else {
				prev = tokenOther
			}
			depth++
			i++

		case lexClose:
			prev = tokenClose
			depth--
			i++

		case lexComment:
			if end := skipComment(sql, i); end > i {
				i = end
				continue
			}
			prev = tokenOther
			i++

		case lexString:
			// Two quotes for one inside, and the strings that B, N, U& and X begin, read as strings side by side.
			end := strings.IndexByte(sql[i+1:], '\'')
			if end < 0 {
				return needReplica
			}
			prev = tokenOther
			i += end + 2

		case lexQuote:
			i, name = skipQuoted(sql, i+1)
			prev = tokenQuoted

		case lexDigit:
			// The point belongs to the number: 1.into is 1. and INTO before PostgreSQL 15.
			for i++; i < len(sql) && (lexClass[sql[i]] == lexDigit || sql[i] == '.'); i++ {
			}
			prev = tokenOther

		case lexDollar:
			i = skipDollar(sql, i)
			prev = tokenOther

		case lexSemicolon:
			if skipBlank(sql, i, ";") < len(sql) {
				return needPrimary
			}
			return needReplica

		case lexDot:
			prev = tokenDot
			i++

		case lexAt:
			prev = tokenAt
			i++

		default:
			prev = tokenOther
			i++
		}
	}
	return needReplica
}

// readKeyword returns what a word leaves behind for the next, and whether it makes the statement a write. body says
// that a statement may begin at the word: elsewhere INSERT and its like are good names for columns.
func readKeyword(k keyword, prev token, body bool) (next token, writes bool) {
	switch k {
	case keywordAs, keywordMaterialized:
		return tokenAs, false
	case keywordFor:
		return tokenFor, false
	case keywordNo:
		if prev == tokenFor {
			return tokenForNo, false
		}
	case keywordKey:
		switch prev {
		case tokenFor:
			return tokenForKey, false
		case tokenForNo:
			return tokenForNoKey, false
		}
	case keywordShare:
		return tokenName, prev == tokenFor || prev == tokenForKey
	case keywordUpdate:
		return tokenName, prev == tokenFor || prev == tokenForNoKey || body
	case keywordModify:
		return tokenName, body
	}
	return tokenName, false
}

// callsLocally reports whether a parenthesis behind the token makes a call that is bound to the primary.
func callsLocally(prev token, name string) bool {
	switch prev {
	case tokenName:
		return actsLocally(name, true)
	case tokenQuoted:
		return actsLocally(name, false)
	}
	return prev == tokenEscaped // U&"\0070g_..." may spell any name, and nobody writes a read like that
}

// atomicText reports whether a text is one statement that is done as a whole or not at all: it begins with a command
// that cannot commit on its way, as CALL and DO can, and has no semicolon but at its end. Doubt says no: a semicolon in
// a string, the name of a prepared statement.
func atomicText(sql string) bool {
	switch verbOf(sql) {
	case "delete", "insert", "merge", "select", "table", "truncate", "update", "values", "with":
		return !holdsMore(sql)
	}
	return false
}

// verbOf returns the word that a text begins with, in lower case.
func verbOf(sql string) string {
	i := skipBlank(sql, 0, "(")
	return strings.ToLower(sql[i:wordEnd(sql, i)])
}

// holdsMore reports whether a text may hold more than one statement: a semicolon that is not at its end.
func holdsMore(sql string) bool {
	return strings.Contains(strings.TrimRight(sql[skipBlank(sql, 0, "("):], ";"+blanks), ";")
}

// callsOthers reports whether a text that is a read may call something that writes: a name with an open parenthesis
// behind it that is neither a word of the language nor a function of PostgreSQL's that is known to read only; and any
// text that does not begin as a query does, as the name of a prepared statement, or an EXPLAIN ANALYZE. Strings and
// comments are not skipped: doubt says yes. It is asked of reads that a server which accepts writes has lost, not
// before.
func callsOthers(sql string) bool {
	begin := skipBlank(sql, 0, "(;")
	if !queryWords[strings.ToLower(sql[begin:wordEnd(sql, begin)])] {
		return true
	}
	commented := false // this line holds what may be a comment
	for i := begin; i < len(sql); i++ {
		switch sql[i] {
		case '\n', '\r':
			commented = false
		case '-':
			commented = commented || strings.HasPrefix(sql[i:], "--")
		case '(':
			if commented || !readsOnly(sql[:i]) {
				return true
			}
		}
	}
	return false
}

// readsOnly reports whether a parenthesis behind the text is for certain no call of what may write.
func readsOnly(before string) bool {
	text := strings.TrimRight(before, blanks)
	if blank := before[len(text):]; strings.HasSuffix(text, "*/") || strings.ContainsAny(blank, "\n\r") && endsInComment(text) {
		return false // what stands before the comment?
	}
	begin := len(text)
	for begin > 0 && lexClass[text[begin-1]] <= lexDollar {
		begin--
	}
	word := strings.ToLower(text[begin:])
	if schema, qualified := strings.CutSuffix(strings.TrimRight(text[:begin], blanks), "."); qualified && !endsInCatalog(schema) {
		return false
	}
	return readWords[word] || word == "" && !strings.HasSuffix(text, `"`)
}

// endsInCatalog reports whether the last word of a text is the name of PostgreSQL's own schema.
func endsInCatalog(text string) bool {
	text = strings.TrimRight(text, blanks)
	begin := len(text) - len("pg_catalog")
	return begin >= 0 && strings.EqualFold(text[begin:], "pg_catalog") && (begin == 0 || lexClass[text[begin-1]] > lexDollar)
}

// endsInComment reports whether the last line of a text holds what may be a comment.
func endsInComment(text string) bool {
	return strings.Contains(text[strings.LastIndexAny(text, "\n\r")+1:], "--")
}

// refusedWhole reports whether a text that a standby refuses has done nothing: it is one command, and none that commits on
// its way, as CALL and DO can, or that may be any other, as the name of a prepared statement.
func refusedWhole(sql string) bool {
	switch word := verbOf(sql); word {
	case "call", "do", "execute":
		return false
	default:
		return (commandOf(word) != commandReads || queryWords[word]) && !holdsMore(sql)
	}
}
