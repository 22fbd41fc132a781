package sqltext

import "strings"

// A token is what the scanner remembers of the last thing it has passed.
type token uint8

const (
	tokenOther    token = iota
	tokenName           // an identifier, or a key word that decides nothing
	tokenQuoted         // "identifier"
	tokenEscaped        // U&"identifier"
	tokenDot            // .
	tokenAt             // @
	tokenClose          // )
	tokenAs             // AS, AS MATERIALIZED, AS NOT MATERIALIZED
	tokenBody           // AS (, AS MATERIALIZED (, AS NOT MATERIALIZED (
	tokenFor            // FOR
	tokenForNo          // FOR NO
	tokenForNoKey       // FOR NO KEY
	tokenForKey         // FOR KEY
)

// Classes of bytes. An identifier goes on with the first three.
const (
	lexLetter = iota // letters, underscores and all bytes beyond ASCII ("Identifiers and Key Words", 4.1.1)
	lexDigit
	lexDollar
	lexBlank
	lexOpen
	lexClose
	lexComment // - and /, which may begin a comment
	lexString
	lexQuote
	lexSemicolon
	lexDot
	lexAt
	lexOther
)

// blanks are the bytes of lexBlank.
const blanks = " \t\n\r\v\f"

var lexClass = func() (t [256]uint8) {
	for i := range t {
		switch c := byte(i); {
		case 'a' <= c|0x20 && c|0x20 <= 'z', c == '_', c >= 0x80:
			t[i] = lexLetter
		case '0' <= c && c <= '9':
			t[i] = lexDigit
		case c == ' ', '\t' <= c && c <= '\r':
			t[i] = lexBlank
		default:
			t[i] = lexOther
		}
	}
	t['$'] = lexDollar
	t['('] = lexOpen
	t[')'] = lexClose
	t['-'] = lexComment
	t['/'] = lexComment
	t['\''] = lexString
	t['"'] = lexQuote
	t[';'] = lexSemicolon
	t['.'] = lexDot
	t['@'] = lexAt
	return t
}()

// wordEnd returns the end of the identifier or key word at i, or i if there is none.
func wordEnd(sql string, i int) int {
	if i == len(sql) || lexClass[sql[i]] != lexLetter {
		return i
	}
	for i++; i < len(sql) && lexClass[sql[i]] <= lexDollar; i++ {
	}
	return i
}

// skipBlank returns the first index from i on at which there is neither a blank, nor a comment, nor a byte of also.
func skipBlank(sql string, i int, also string) int {
	for i < len(sql) {
		switch end := skipComment(sql, i); {
		case end > i:
			i = end
		case lexClass[sql[i]] == lexBlank, strings.IndexByte(also, sql[i]) >= 0:
			i++
		default:
			return i
		}
	}
	return i
}

// skipComment returns the end of the comment at i, or i if there is none. A carriage return ends a line, too, and C-style
// comments nest ("Comments", 4.1.5).
func skipComment(sql string, i int) int {
	switch {
	case strings.HasPrefix(sql[i:], "--"):
		for i += 2; i < len(sql) && sql[i] != '\n' && sql[i] != '\r'; i++ {
		}
	case strings.HasPrefix(sql[i:], "/*"):
		i += 2
		for open := 1; open > 0 && i < len(sql); {
			switch {
			case strings.HasPrefix(sql[i:], "*/"):
				open--
				i += 2
			case strings.HasPrefix(sql[i:], "/*"):
				open++
				i += 2
			default:
				i++
			}
		}
	}
	return i
}

// skipEscapeString returns the end of the string whose E and first quote end at i. In it a backslash escapes the next
// byte, even a quote ("String Constants with C-Style Escapes", 4.1.2.2).
func skipEscapeString(sql string, i int) int {
	for i < len(sql) {
		switch sql[i] {
		case '\\':
			i += 2
		case '\'':
			if strings.HasPrefix(sql[i+1:], "'") {
				i += 2
				continue
			}
			next := continuation(sql, i+1)
			if next < 0 {
				return i + 1
			}
			i = next
		default:
			i++
		}
	}
	return len(sql)
}

// continuation returns where the string that ended before i continues, or -1 if it does not. A string continues after a
// line break, and is still of the same kind: a \' does not end the second part of an E string either ("String
// Constants", 4.1.2.1; only the server's scanner shows that comments to the end of a line may stand in between).
func continuation(sql string, i int) int {
	broken := false
	for i < len(sql) {
		switch c := sql[i]; {
		case c == '\n', c == '\r':
			broken = true
			i++
		case lexClass[c] == lexBlank:
			i++
		case c == '\'' && broken:
			return i + 1
		case strings.HasPrefix(sql[i:], "--"):
			i = skipComment(sql, i)
		default:
			return -1
		}
	}
	return -1
}

// skipQuoted returns the end of the identifier whose first quote ends at i, and the text between the quotes. A doubled
// quote in it is left as it is: no name that matters has one.
func skipQuoted(sql string, i int) (end int, name string) {
	start := i
	for i < len(sql) {
		n := strings.IndexByte(sql[i:], '"')
		if n < 0 {
			break
		}
		i += n + 1
		if i == len(sql) || sql[i] != '"' {
			return i, sql[start : i-1]
		}
		i++
	}
	return len(sql), ""
}

// skipDollar returns the end of what the dollar sign at i begins: a dollar-quoted string ("Dollar-Quoted String
// Constants", 4.1.2.4), a parameter, or only itself. It is never called for a dollar sign inside an identifier.
func skipDollar(sql string, i int) int {
	end := i + 1
	for end < len(sql) && lexClass[sql[end]] <= lexDigit {
		end++
	}
	switch {
	case end > i+1 && lexClass[sql[i+1]] == lexDigit:
		for end = i + 2; end < len(sql) && lexClass[sql[end]] == lexDigit; end++ {
		}
		return end
	case end == len(sql) || sql[end] != '$':
		return i + 1
	}
	end++
	n := strings.Index(sql[end:], sql[i:end])
	if n < 0 {
		return len(sql)
	}
	return end + n + end - i
}
