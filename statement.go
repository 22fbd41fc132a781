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
// The errors are of different weight. A read taken for a write only loses its locality. A write taken for a read is refused
// by the standby and then remembered (see needs). But nothing refuses pg_advisory_lock on a standby, so whatever may be a
// call of such a function counts as one. What the text does not show, no scanner sees: a function of the user's that takes
// the lock inside, or a query in a string that is executed there.
//
// The lexical rules are those of the PostgreSQL documentation, "Lexical Structure", with standard_conforming_strings on, its
// default and what pgx insists on where it quotes. A text that ends inside a quote or a comment ends the scan there: no
// server runs it. It allocates nothing, takes time linear in len(sql), and any bytes will do.
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
			was := prev
			prev, name = tokenName, word
			switch k {
			case keywordFor:
				prev = tokenFor
			case keywordNo:
				if was == tokenFor {
					prev = tokenForNo
				}
			case keywordKey:
				switch was {
				case tokenFor:
					prev = tokenForKey
				case tokenForNo:
					prev = tokenForNoKey
				}
			case keywordShare:
				if was == tokenFor || was == tokenForKey {
					return needPrimary
				}
			case keywordUpdate:
				if was == tokenFor || was == tokenForNoKey {
					return needPrimary
				}
				fallthrough
			case keywordModify:
				// After AS ( it is a common table expression, after the last ) the statement itself.
				// Elsewhere these words are good names for columns.
				if with && (was == tokenBody || was == tokenClose && depth == 0) {
					return needPrimary
				}
			case keywordInto:
				if selects {
					return needPrimary
				}
			case keywordAs, keywordMaterialized:
				prev = tokenAs
			}

		case lexOpen:
			switch prev {
			case tokenName:
				if actsLocally(name, true) {
					return needPrimary
				}
			case tokenQuoted:
				if actsLocally(name, false) {
					return needPrimary
				}
			case tokenEscaped:
				return needPrimary // U&"\0070g_..." may spell any name, and nobody writes a read like that
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

// atomicText reports whether a text is one statement that is done as a whole or not at all: it begins with a command that
// cannot commit on its way, as CALL and DO can, and has no semicolon but at its end. Doubt says no: a semicolon in a string,
// the name of a prepared statement.
func atomicText(sql string) bool {
	i := skipBlank(sql, 0, "(")
	var buf [8]byte
	word := sql[i:wordEnd(sql, i)]
	if len(word) > len(buf) {
		return false
	}
	fold(buf[:], word)
	switch string(buf[:len(word)]) {
	case "delete", "insert", "merge", "select", "table", "truncate", "update", "values", "with":
		return !strings.Contains(strings.TrimRight(sql[i:], "; \t\n\r\v\f"), ";")
	}
	return false
}

// callsOthers reports whether a text that is a read may call something that writes: a name with an open parenthesis behind
// it that is neither a word of the language nor a function of PostgreSQL's that is known to read only. Strings and comments
// are not skipped: doubt says yes. It is asked of reads that a server which accepts writes has lost, not before.
func callsOthers(sql string) bool {
	for i := 0; i < len(sql); i++ {
		if sql[i] != '(' {
			continue
		}
		before := strings.TrimRight(sql[:i], " \t\n\r\v\f")
		begin := len(before)
		for begin > 0 && (lexClass[before[begin-1]] == lexLetter || lexClass[before[begin-1]] == lexDigit) {
			begin--
		}
		word, rest := before[begin:], before[:begin]
		if schema, qualified := strings.CutSuffix(rest, "."); qualified && !strings.HasSuffix(strings.ToLower(schema), "pg_catalog") {
			return true
		}
		if word == "" && strings.HasSuffix(before, `"`) || word != "" && !readWords[strings.ToLower(word)] {
			return true
		}
	}
	return false
}

// readWords are the words that may stand before a parenthesis in a text that only reads.
var readWords = wordSet(`
	all and any array as between by case cast char character check coalesce cross cube current date decimal distinct else end
	except exists extract false filter float from full group grouping having ilike in inner intersect interval is isnull join
	lateral left like limit materialized natural not notnull null nullif numeric offset on only or order outer over overlay
	partition position precision range right rollup row rows select sets similar some substring table then time timestamp
	timestamptz trim true union using values varchar varying when where window with within

	abs age array_agg array_length array_position array_to_json array_to_string avg bit_length bool_and bool_or btrim cardinality
	ceil ceiling char_length character_length clock_timestamp concat concat_ws corr count cume_dist current_database
	current_schema current_setting date_bin date_part date_trunc decode dense_rank div encode every exp first_value floor format
	gen_random_uuid generate_series generate_subscripts greatest initcap inet_server_addr inet_server_port json_agg
	json_array_elements json_array_elements_text json_array_length json_build_array json_build_object json_each json_each_text
	json_object json_object_agg jsonb_agg jsonb_array_elements jsonb_array_elements_text jsonb_array_length jsonb_build_array
	jsonb_build_object jsonb_each jsonb_each_text jsonb_object_agg lag last_value lead least length ln localtimestamp log lower
	lpad ltrim make_date make_interval make_timestamp max md5 min mod mode nth_value ntile now num_nonnulls octet_length
	percent_rank percentile_cont percentile_disc pg_backend_pid pg_is_in_recovery pg_last_wal_replay_lsn pg_postmaster_start_time
	pg_sleep pg_typeof plainto_tsquery power random rank regexp_match regexp_matches regexp_replace repeat replace reverse round
	row_number row_to_json rpad rtrim sign split_part sqrt starts_with statement_timestamp stddev string_agg string_to_array
	strpos substr sum to_char to_date to_json to_jsonb to_number to_timestamp to_tsquery to_tsvector transaction_timestamp
	translate trunc ts_rank unnest upper variance version websearch_to_tsquery width_bucket`)

func wordSet(words string) map[string]bool {
	set := make(map[string]bool)
	for _, w := range strings.Fields(words) {
		set[w] = true
	}
	return set
}

// A token is what the scanner remembers of the last thing it passed.
type token uint8

const (
	tokenOther    token = iota
	tokenName           // an identifier or a key word of no interest
	tokenQuoted         // "identifier"
	tokenEscaped        // U&"identifier"
	tokenDot            // .
	tokenAt             // @
	tokenClose          // )
	tokenAs             // AS, AS MATERIALIZED, AS NOT MATERIALIZED
	tokenBody           // the same and (
	tokenFor            // FOR
	tokenForNo          // FOR NO
	tokenForNoKey       // FOR NO KEY
	tokenForKey         // FOR KEY
)

// Classes of bytes. The first three are what an identifier may go on with.
const (
	lexLetter = iota // and underscores, and every byte beyond ASCII ("Identifiers and Key Words", 4.1.1)
	lexDigit
	lexDollar
	lexBlank
	lexOpen
	lexClose
	lexComment // - and /, which may begin one
	lexString
	lexQuote
	lexSemicolon
	lexDot
	lexAt
	lexOther
)

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

// wordEnd returns the end of the identifier or key word at i, which is i where there is none.
func wordEnd(sql string, i int) int {
	if i == len(sql) || lexClass[sql[i]] != lexLetter {
		return i
	}
	for i++; i < len(sql) && lexClass[sql[i]] <= lexDollar; i++ {
	}
	return i
}

// skipBlank returns the first place from i on that is neither blank, comment, nor a byte of also.
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

// skipComment returns the end of the comment at i, which is i where there is none. A carriage return ends a line too, and
// the comments of C nest ("Comments", 4.1.5).
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

// skipEscapeString returns the end of the string whose E and first quote end at i. In it a backslash escapes the next byte,
// a quote too ("String Constants with C-Style Escapes", 4.1.2.2).
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

// continuation returns where the string that ended before i goes on, or -1. After a line break it does, and it is still of
// the same kind: in the second part of an E string a \' ends nothing either ("String Constants", 4.1.2.1; that comments to
// the end of a line may stand between is in the server's scanner only).
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

// skipQuoted returns the end of the identifier whose first quote ends at i, and what stands between the quotes. Two quotes
// for one inside are left as they are: no name that matters has one.
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

// skipDollar returns the end of what the dollar sign at i begins: a dollar-quoted string ("Dollar-Quoted String Constants",
// 4.1.2.4), a parameter, or nothing but itself. A dollar sign inside an identifier never comes here.
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

// A command is the kind of statement that a first word begins.
type command uint8

const (
	commandReads command = iota
	commandSelect
	commandWith
	commandWrites
)

// commandOf reads the first word of a statement. A word that begins no command may be the name of a prepared statement,
// which pgx takes in the place of a text; VALUES, TABLE, SHOW and EXPLAIN are reads (an EXPLAIN ANALYZE that writes is
// refused by a standby).
func commandOf(word string) command {
	var buf [12]byte
	if len(word) > len(buf) {
		return commandReads
	}
	fold(buf[:], word)
	switch string(buf[:len(word)]) {
	case "select":
		return commandSelect
	case "with":
		return commandWith
	case // changes to data
		"call", "copy", "delete", "do", "insert", "merge", "truncate", "update",
		// changes to the schema and to rights
		"alter", "comment", "create", "drop", "grant", "import", "reassign", "refresh", "revoke", "security",
		// maintenance
		"analyse", "analyze", "checkpoint", "cluster", "load", "reindex", "repack", "vacuum",
		// locks and notifications
		"listen", "lock", "notify", "unlisten",
		// transactions
		"abort", "begin", "commit", "end", "prepare", "release", "rollback", "savepoint", "start",
		// the state of a session: a standby takes them, but what Exec left in a session is on the primary
		"close", "deallocate", "declare", "discard", "execute", "fetch", "move", "reset", "set":
		return commandWrites
	}
	return commandReads
}

// A keyword is a word of the grammar that decides something after the first word.
type keyword uint8

const (
	keywordNone keyword = iota
	keywordAs
	keywordFor
	keywordInto
	keywordKey
	keywordMaterialized
	keywordModify // INSERT, DELETE, MERGE
	keywordNo
	keywordShare
	keywordUpdate
)

// keywordOf looks at the length and the first letter before it compares: most words of a statement are names.
func keywordOf(word string) keyword {
	k, lower := keywordNone, ""
	switch c := word[0] | 0x20; len(word) {
	case 2:
		switch c {
		case 'a':
			k, lower = keywordAs, "as"
		case 'n':
			k, lower = keywordNo, "no"
		}
	case 3:
		switch c {
		case 'f':
			k, lower = keywordFor, "for"
		case 'k':
			k, lower = keywordKey, "key"
		}
	case 4:
		if c == 'i' {
			k, lower = keywordInto, "into"
		}
	case 5:
		switch c {
		case 'm':
			k, lower = keywordModify, "merge"
		case 's':
			k, lower = keywordShare, "share"
		}
	case 6:
		switch c {
		case 'd':
			k, lower = keywordModify, "delete"
		case 'i':
			k, lower = keywordModify, "insert"
		case 'u':
			k, lower = keywordUpdate, "update"
		}
	case 12:
		if c == 'm' {
			k, lower = keywordMaterialized, "materialized"
		}
	}
	for i := range len(lower) {
		if word[i]|0x20 != lower[i] { // right for letters, and lower is letters
			return keywordNone
		}
	}
	return k
}

// fold writes word to b in lower case. Only ASCII folds: strings.EqualFold would take the long s of Unicode for an s.
func fold(b []byte, word string) {
	for i := range len(word) {
		c := word[i]
		if 'A' <= c && c <= 'Z' {
			c |= 0x20
		}
		b[i] = c
	}
}

// actsLocally reports whether a call of the function is bound to the primary, whatever its schema. Most of these succeed on
// a standby and do the wrong thing there: they lock, signal, reset or write on a server that a draw has chosen. The others
// are refused there, some with errors that do not say why, and are listed to save the way. What only looks at its server
// (pg_stat_activity, pg_read_file, pg_is_in_recovery) is a read.
//
// An unquoted name folds to lower case, a quoted one is taken as it is ("Identifiers and Key Words", 4.1.1).
func actsLocally(name string, folds bool) bool {
	var buf [63]byte // a longer name is cut by the server, and no name below is as long
	if len(name) < 5 || len(name) > len(buf) {
		return false
	}
	switch name[0] | 0x20 {
	case 'a', 'b', 'c', 'd', 'g', 'l', 'n', 's', 't':
	case 'p':
		if name[1]|0x20 != 'g' || name[2] != '_' {
			return false
		}
	default:
		return false
	}
	fold(buf[:], name)
	b := buf[:len(name)]
	if !folds && string(b) != name {
		return false
	}
	switch string(b) {
	case // signals, files and switches of the server: "System Administration Functions"
		"pg_cancel_backend", "pg_promote", "pg_reload_conf", "pg_rotate_logfile", "pg_rotate_logfile_old",
		"pg_terminate_backend", "pg_wal_replay_pause", "pg_wal_replay_resume",
		"lo_export", "lo_import", "pg_logfile_rotate",
		// its cache
		"autoprewarm_dump_now", "autoprewarm_start_worker", "pg_prewarm",
		// its snapshots, which another connection is to import
		"pg_export_snapshot",
		// its backups, log positions and replication slots
		"pg_backup_start", "pg_backup_stop", "pg_start_backup", "pg_stop_backup",
		"pg_copy_logical_replication_slot", "pg_copy_physical_replication_slot", "pg_create_logical_replication_slot",
		"pg_create_physical_replication_slot", "pg_drop_replication_slot", "pg_replication_slot_advance",
		"pg_sync_replication_slots",
		"pg_create_restore_point", "pg_current_wal_flush_lsn", "pg_current_wal_insert_lsn", "pg_current_wal_lsn",
		"pg_logical_emit_message", "pg_switch_wal", "pg_walfile_name", "pg_walfile_name_offset",
		// the state of the session, which is where Exec left it
		"currval", "lastval", "set_config",
		// writes and numbers of transactions, which a standby refuses
		"brin_desummarize_range", "brin_summarize_new_values", "brin_summarize_range", "gin_clean_pending_list",
		"lo_creat", "lo_create", "lo_from_bytea", "lo_put", "lo_truncate", "lo_truncate64", "lo_unlink", "lowrite",
		"nextval", "pg_current_xact_id", "pg_import_system_collations", "pg_notify", "setval", "txid_current":
		return true
	}
	for _, p := range [...]string{
		"dblink",               // leaves for another server, with who knows what
		"pg_advisory_",         // excludes nobody on a standby
		"pg_buffercache_evict", // of one, a relation, all
		"pg_file_",             // adminpack: write, rename, unlink, sync
		"pg_log_",              // backend_memory_contexts, standby_snapshot
		"pg_logical_slot_",     // get and peek: the slot is on one server
		"pg_replication_origin_",
		"pg_stat_reset",
		"pg_try_advisory_",
	} {
		if len(b) >= len(p) && string(b[:len(p)]) == p {
			return true
		}
	}
	const stat, reset = "pg_stat_", "_reset" // pg_stat_statements_reset, and those of other extensions
	return len(b) > len(stat)+len(reset) && string(b[:len(stat)]) == stat && string(b[len(b)-len(reset):]) == reset
}
