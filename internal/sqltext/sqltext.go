// Package sqltext tells from the text of a statement where it may run, and remembers it.
//
// The MultiPool asks a Cache before every call that has a text, and tells the Cache when a standby has refused one. The
// other questions are asked after something has failed: whether the text is done as a whole (Atomic), whether a read may
// have written (MayWrite), whether a refusal means that nothing was done (RefusedWhole).
//
// The package knows neither servers nor connections. Any bytes will do as a text.
package sqltext

import "strings"

// A Need is what a statement's text says about where it may run.
type Need uint8

const (
	Unknown     Need = iota // the text has not been looked at
	AnyServer               // a read
	PrimaryOnly             // a standby refuses it, or silently does the wrong thing
)

// Of returns where the statement may run: AnyServer or PrimaryOnly, never Unknown.
//
// It is a scanner, not a parser. A statement is a read unless its text shows otherwise:
//
//   - its first word starts a command that a standby cannot run, or that leaves state in a session;
//   - it has a locking clause (FOR UPDATE, FOR NO KEY UPDATE, FOR SHARE, FOR KEY SHARE);
//   - it is a SELECT or WITH that holds INTO, or a WITH that holds INSERT, UPDATE, DELETE or MERGE;
//   - anything except blanks, comments and semicolons follows a semicolon;
//   - it calls a function that acts on the server it runs on (see actsLocally).
//
// The two possible errors differ in weight. A read taken for a write runs on the primary, where it need not. A write
// taken for a read is refused by the standby, and the Cache then learns it. But nothing refuses pg_advisory_lock on a
// standby, so whatever may be a call of such a function counts as one. No scanner sees what the text does not show: a
// function of the user's that takes such a lock, or a query in a string that the server executes.
//
// The lexical rules are those of the PostgreSQL documentation, "Lexical Structure", with standard_conforming_strings on,
// which is the default and which pgx insists on where it quotes. A text that ends inside a quote or a comment ends the
// scan there: no server runs it. Of allocates nothing and takes time linear in len(sql).
func Of(sql string) Need {
	i := skipBlank(sql, 0, "(;")
	var selects, with bool
	switch commandOf(sql[i:wordEnd(sql, i)]) {
	case commandWrites:
		return PrimaryOnly
	case commandSelect:
		selects = true
	case commandWith:
		selects, with = true, true
	}
	var (
		prev  = tokenOther // the token before i, blanks and comments excepted
		name  string       // the identifier, if prev is tokenName or tokenQuoted
		depth int          // of parentheses, not counting those before the first word
		loose bool         // it can no longer be told where a statement begins
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
				k = keywordNone // a column, one of pgx's named arguments, or a label: any word may be one
			}
			body := false
			if with {
				// A common table expression follows AS (, and the statement itself follows the last ). An expression may hold
				// a WITH of its own, and may be followed by SEARCH and CYCLE, which take names.
				loose = loose || k == keywordWith && prev == tokenBody || k == keywordCycle && prev == tokenClose
				body = loose || prev == tokenBody || prev == tokenClose && depth == 0
			}
			next, writes := readKeyword(k, prev, body)
			if writes || k == keywordInto && selects {
				return PrimaryOnly
			}
			prev, name = next, word

		case lexOpen:
			if callsLocally(prev, name) {
				return PrimaryOnly
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
			// A doubled quote inside a string, and a string after B, N, U& or X, scan as strings side by side.
			end := strings.IndexByte(sql[i+1:], '\'')
			if end < 0 {
				return AnyServer
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
				return PrimaryOnly
			}
			return AnyServer

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
	return AnyServer
}

// readKeyword returns the token that a word makes, and whether the word makes the statement a write. body says that a
// statement may begin at the word: elsewhere INSERT, UPDATE, DELETE and MERGE may be names of columns.
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

// callsLocally reports whether a parenthesis after the token makes a call that is bound to the primary.
func callsLocally(prev token, name string) bool {
	switch prev {
	case tokenName:
		return actsLocally(name, true)
	case tokenQuoted:
		return actsLocally(name, false)
	}
	return prev == tokenEscaped // U&"\0070g_..." may spell any name, and no program writes a read like that
}

// Atomic reports whether the text is one statement that takes effect as a whole or not at all: it begins with a command
// that cannot commit midway, as CALL and DO can, and has no semicolon except at its end. In doubt it returns false: for
// a semicolon in a string, or the name of a prepared statement.
func Atomic(sql string) bool {
	switch verbOf(sql) {
	case "delete", "insert", "merge", "select", "table", "truncate", "update", "values", "with":
		return !holdsMore(sql)
	}
	return false
}

// verbOf returns the first word of a text, in lower case.
func verbOf(sql string) string {
	i := skipBlank(sql, 0, "(")
	return strings.ToLower(sql[i:wordEnd(sql, i)])
}

// holdsMore reports whether a text may hold more than one statement: a semicolon that is not at its end.
func holdsMore(sql string) bool {
	return strings.Contains(strings.TrimRight(sql[skipBlank(sql, 0, "("):], ";"+blanks), ";")
}

// MayWrite reports whether a text that Of takes for a read may still write. It may if it does not begin as a query does
// (the name of a prepared statement, EXPLAIN ANALYZE), or if it holds a name before an open parenthesis that is neither
// a word of the language nor a function of PostgreSQL's that is known only to read. Strings and comments are not
// skipped: in doubt it returns true. It is asked only of a read that was lost on a server that accepts writes.
func MayWrite(sql string) bool {
	begin := skipBlank(sql, 0, "(;")
	if !queryWords[strings.ToLower(sql[begin:wordEnd(sql, begin)])] {
		return true
	}
	commented := false // the current line may hold a comment
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

// readsOnly reports whether a parenthesis after the text is certainly no call of a function that may write.
func readsOnly(before string) bool {
	text := strings.TrimRight(before, blanks)
	if blank := before[len(text):]; strings.HasSuffix(text, "*/") || strings.ContainsAny(blank, "\n\r") && endsInComment(text) {
		return false // the word may stand before the comment
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

// endsInCatalog reports whether the last word of a text is pg_catalog, PostgreSQL's own schema.
func endsInCatalog(text string) bool {
	text = strings.TrimRight(text, blanks)
	begin := len(text) - len("pg_catalog")
	return begin >= 0 && strings.EqualFold(text[begin:], "pg_catalog") && (begin == 0 || lexClass[text[begin-1]] > lexDollar)
}

// endsInComment reports whether the last line of a text may hold a comment.
func endsInComment(text string) bool {
	return strings.Contains(text[strings.LastIndexAny(text, "\n\r")+1:], "--")
}

// RefusedWhole reports whether a text that a standby has refused has done nothing: it is a single command, and neither
// one that can commit midway, as CALL and DO can, nor one that may stand for another, as the name of a prepared
// statement.
func RefusedWhole(sql string) bool {
	switch word := verbOf(sql); word {
	case "call", "do", "execute":
		return false
	default:
		return (commandOf(word) != commandReads || queryWords[word]) && !holdsMore(sql)
	}
}
