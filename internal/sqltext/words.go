package sqltext

import "strings"

// queryWords are the words with which a query begins.
var queryWords = wordSet("select show table values with")

// readWords are the words that may stand before a parenthesis in a text that only reads: words of the language, and
// functions of PostgreSQL's that only read.
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

// A command is a kind of statement, as its first word shows it.
type command uint8

const (
	commandReads command = iota
	commandSelect
	commandWith
	commandWrites
)

// commandOf returns the kind of statement that the word begins. A word that begins no command may be the name of a
// prepared statement, which pgx takes instead of a text. VALUES, TABLE, SHOW and EXPLAIN are reads: a standby refuses an
// EXPLAIN ANALYZE that writes.
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
		// the state of a session: a standby takes them, but the state that Exec left is in a session of the primary
		"close", "deallocate", "declare", "discard", "execute", "fetch", "move", "reset", "set":
		return commandWrites
	}
	return commandReads
}

// A keyword is a word of the grammar that decides something although it is not the first.
type keyword uint8

const (
	keywordNone keyword = iota
	keywordAs
	keywordCycle // and SEARCH
	keywordFor
	keywordInto
	keywordKey
	keywordMaterialized
	keywordModify // INSERT, DELETE, MERGE
	keywordNo
	keywordShare
	keywordUpdate
	keywordWith
)

// keywordOf returns the keyword that the word is. It looks at the length and the first letter before it compares, as most
// words of a statement are names.
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
		switch c {
		case 'i':
			k, lower = keywordInto, "into"
		case 'w':
			k, lower = keywordWith, "with"
		}
	case 5:
		switch c {
		case 'c':
			k, lower = keywordCycle, "cycle"
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
		case 's':
			k, lower = keywordCycle, "search"
		case 'u':
			k, lower = keywordUpdate, "update"
		}
	case 12:
		if c == 'm' {
			k, lower = keywordMaterialized, "materialized"
		}
	}
	for i := range len(lower) {
		if word[i]|0x20 != lower[i] { // right for letters, and lower has nothing else
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

// actsLocally reports whether a call of the function is bound to the primary, whatever its schema. Most of these
// functions succeed on a standby and do the wrong thing there: they lock, signal, reset or write on a server that was
// chosen by chance. A standby refuses the others, some with errors that do not say why; they are listed to save the
// round trip. A function that only looks at its server (pg_stat_get_activity, pg_read_file, pg_is_in_recovery) reads.
//
// folds says that the name was not quoted: it folds to lower case ("Identifiers and Key Words", 4.1.1).
func actsLocally(name string, folds bool) bool {
	var buf [63]byte // the server cuts a longer name, and no name below is as long
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
		// its snapshots, which another connection imports
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
		"dblink",               // runs a query of any kind on another server
		"pg_advisory_",         // excludes nobody on a standby
		"pg_buffercache_evict", // one, of a relation, all
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
