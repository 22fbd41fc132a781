package sqltext

import (
	"fmt"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// Statements that any server may run, by what tempts the scanner to think otherwise.
var readTexts = map[string][]string{
	"plain": {
		``, ` `, `;`, `;;`, `-- nothing`, `/* nothing */`, `select 1`, `SELECT 1;`, `select 1 ; -- done`, `select 1;;/* a */;`,
		`with x as (select 1) select * from x`, `values (1), (2)`, `table t`, `show server_version`, `explain select 1`,
		`explain (analyze, buffers) select 1`, `(select 1)`, `((select 1) union (select 2))`, `; select 1`,
		"-- name: GetUser :one\nselect * from users where id = $1",
	},
	"prepared names": {`get_user`, `insert_user`, `updateuser`, `stmtcache_123`, `"insert"`, `delete_`, `ſet`},
	"explained":      {`explain insert into t values (1)`, `explain update t set a = 1`},
	"words": {
		`select updated_at, for_update, forupdate, into_, deleted from t`, `select a for_ from t`, `select insert, update, delete, merge from t`,
		`select lock, listen, notify, set, copy from t`, `select t.into, t.for, t . update from t`, `select a as into from t`,
		`select * from t where a = @into and b = @for`, `select "into" from t`, `select "for" update from t`,
		`select 1 from t where a for "update"`, `select f(for, update)`, `select for.update`, `select for, key share`, `select no key update`,
		`select for no update`, `select for key update`, `select for no key share`, `select a as for, share from t`, `select for 1 update`,
		`select * from t for read only`, `select fοr update`, `select for ſhare`, `select 1 as for update`,
		`select coalesce(update, delete) from t`,
		`select fox update`, `select for upload`, `select for shard`, `select for nu key update`, `select for no kit update`, `select for kit share`,
		`select item from t`, `with x as (direct from t) select 1`, `with x as (ignore t) select 1`, `with x as (model) select 1`, `with x as (upload) select 1`,
		`with x at (delete from t) select 1`, `with x multilateral (delete from t) select 1`,
	},
	"functions of the grammar": {
		`select substring(x for 3)`, `select substring(x from 1 for 2)`, `select overlay(x placing 'y' from 1 for 2)`,
		`select extract(year from x)`, `select position('a' in b)`, `select trim(both 'x' from y)`, `select substring(x for "update")`,
	},
	"common table expressions": {
		`with x as (select max(update) from t) select * from x`, `with x (update, delete) as (select 1, 2) select * from x`,
		`with x as (select count(*) delete from t) select * from x`, `with x as materialized (select 1) select * from x`,
		`with x as not materialized (select 1) select insert from x`, `with update as (select 1) select * from update`,
		`with x as (select cast(delete as int) from t) select coalesce(merge, 1) from x`, `select * from f(1) as (delete int)`,
		`with x as (with y as (select 1) select * from y) select count(*) from x`, `with x as (select 1) select a search, b cycle, delete from x`,
		`with recursive x(a) as (select 1 union all select a + 1 from x) search depth first by a set o cycle a set c using p select * from x`,
	},
	"strings": {
		`select 'for update'`, `select 'it''s; drop table t'`, `select ''';delete from t'`, `select 'a\'`, `select 'a\', 'for update'`,
		`select E'a\'; delete from t'`, `select e'\\', ' for update '`, `select E'a''; b\'; c'`, `select E'\\\'for update'`,
		"select E'a'\n'b\\'; delete from t'", "select E'a' -- c\n\t'b\\'; x'", "select E'a'--'\r'b\\'; x'", "select E'a'\n'b'\n'c\\'; x'",
		`select U&'d\0061t; for update'`, `select u&'\'`, `select B'01;'`, `select x'1f;'`, `select N'a;b'`, `select n';'`,
		`select 'for' update`, `select for 'update'`, `select date 'x;y'`, `select 'pg_advisory_lock(1)'`,
	},
	"dollar quotes": {
		`select $$for update$$`, `select $a$ $$; delete from t $b$ $a$`, `select $é1_$;$é1_$`, `select $a$ $a b$a$`, `select $_$;$_$`,
		`select $A$ ;$a$; $A$`, `select $1$a$;$a$`, `select 1$a$;$a$`, `select $a$x$a$::text`, `select $$a$$ || $$;$$`, `select $a$$b$;$b$$a$`,
	},
	"comments": {
		`/* insert */ select 1`, "-- insert\nselect 1", `select 1 /* for update */`, `select 1 -- for update`, `select 1 /* /* */ ; x */`,
		`select 1 /* ' */ + /* " */ 2 /* $$ */`, "select 1 -- ;'\n + 2", "select 1 -- x\r + 2", `select 1 /*/ for update */`, `select 1 /***/ /**/`,
		`select 1 /* **/`, `select 1 */* ; */2`, `select 1 +-- ;`, `select 1 for/* */no /* */ key`, "/*/**/insert*/select 1", `select 1; /*;*/ --;`,
	},
	"quoted names": {
		`select "for update"`, `select "a;b"`, `select "a"";b"`, `select "it's" from t`, `select U&"d\0061t; for update"`, `select u&"a"";"`,
		`select "a -- b", "/*"`, `select "pg_advisory_lock" from t`, `select "PG_ADVISORY_LOCK"(1)`, `select "pg_notify""x"(1)`,
		`select "x""pg_notify"(1)`,
	},
	"identifiers with dollars": {`select a$b$c from t`, `select pg_notify$(1)`, `select é$a$ from t`},
	"numbers and operators": {
		`select 1e5, 0x1f, 1.5, .5, 1_000`, `select $1::int, a::text`, `select a->>'b', a @> b, a <@ b, a || b, @a, a - b / c`, `select a[1:2]`,
	},
	"open to the end": {
		`select 'for update`, `select "for update`, `select $$; delete`, `select $a$ ;$b$`, `select /* ; x`, `select /* /* */ ; x`, `select E'\`, `select E'a\';`,
		`select U&"; x`, `select U&'; x`, `select $`, `select $a`, `select $a b`, `select E'a'`, "select E'a'\n", `select a -`, `select a /`, `select u&`, `select e`, `select 1.`,
		`select ((`, `select ))`, `"`, `'`, `$`, `$$`, `(`, `-`, `/`, `/*`, `e'`, `u&"`,
	},
	"new in PostgreSQL 19": {
		`wait for lsn '0/3000060'`, `WAIT FOR LSN '0/3000060' WITH (TIMEOUT '100ms')`,
		`select * from graph_table (g match (a is customer)-[o is ordered]->(b) where a.id = 1 columns (a.name, b.id))`,
		`select * from t for portion`,
	},
	"functions that read": {
		`select pg_is_in_recovery()`, `select pg_last_wal_replay_lsn()`, `select now(), random(), gen_random_uuid()`, `select pg_sleep(1)`,
		`select pg_backend_pid()`, `select pg_current_xact_id_if_assigned()`, `select pg_current_snapshot(), txid_current_snapshot()`,
		`select pg_stat_get_bgwriter_stat_reset_time()`, `select pg_get_wal_replay_pause_state()`, `select lo_get(1)`, `select current_setting('a')`,
		`select pg_size_pretty(pg_database_size('a'))`, `select pg_export_snapshot_(1)`, `select xpg_notify(1)`, `select pg_notify from t`,
		`select pg_notify.x(1)`, `select pg_notify + (1)`, `select count(*), sum(n), lower(b), to_char(c, 'x')`, `select setvalue(1), nextvalue(1)`,
		`select pgxnotify(1)`, `select pg_notify, (1)`, `select nextval from (select 1) t`, `select pg_stat_reset`, `select dblin(1)`, `select pg_stat__resets()`,
		`select x` + strings.Repeat("pg_notify", 9) + `(1)`, `select dblink` + strings.Repeat("x", 70) + `(1)`,
	},
}

// Statements for the primary alone, by what gives them away.
var writeTexts = map[string][]string{
	"first word": {
		`insert into t values (1)`, `INSERT INTO t SELECT 1`, `update t set a = 1`, `delete from t`, `merge into t using s on true when matched then do nothing`,
		`create table t ()`, `create temp table t as select 1`, `alter system set a = 1`, `drop table t`, `truncate t`, `grant all on t to u`, `revoke all on t from u`,
		`comment on table t is 'x'`, `security label on table t is 'x'`, `import foreign schema s from server x into y`, `reassign owned by a to b`,
		`refresh materialized view v`, `reindex table t`, `cluster t`, `vacuum`, `analyze t`, `analyse t`, `checkpoint`, `load 'x'`, `copy t to stdout`, `copy t from stdin`,
		`call p()`, `do $$begin end$$`, `repack t`, `listen c`, `notify c`, `unlisten *`, `lock t`,
		`begin`, `start transaction`, `commit`, `end`, `rollback`, `abort`, `savepoint a`, `release a`, `prepare transaction 'x'`, `prepare p as select 1`,
		`set a = 1`, `reset a`, `discard all`, `deallocate p`, `execute p`, `declare c cursor for select 1`, `fetch c`, `move c`, `close c`,
		" \t\r\n\v\fInSeRt into t values (1)", "-- a\ninsert into t values (1)", "-- a\rinsert into t values (1)", `/* a /* b */ */insert into t values (1)`,
		`(insert into t values (1))`, `( /* a */ ( delete from t))`, `;delete from t`, `;-- a` + "\n" + `;delete from t`, `insert`, `begin;`, `delete"t"`, `delete/**/from t`,
	},
	"new in PostgreSQL 19": {
		`insert into t values (1) on conflict (id) do select returning *`, `with x as (insert into t values (1) on conflict (id) do select for update returning *) select * from x`,
		`update t for portion of valid_at from '2026-01-01' to '2027-01-01' set a = 1`, `delete from t for portion of valid_at (@x)`,
		`with x as (update t for portion of valid_at from 'a' to 'b' set a = 1 returning *) select * from x`, `repack (verbose) t`,
		`select * from graph_table (g match (a) columns (a.id)) for update`,
	},
	"locking clause": {
		`select * from t for update`, `select * from t FOR UPDATE`, `select * from t for no key update`, `select * from t for share`, `select * from t for key share`,
		"select * from t for\n\tupdate of t nowait", `select * from t for/**/update`, "select * from t for -- a\nno /* b */ key/**/update skip locked",
		`select * from (select * from t for share) x`, `with x as (select * from t for update) select * from x`, `table t for update`, `(select 1 from t)for update`,
		`select * from t where a = 'b'for update`, `select * from t where a = "b"for update`, `select * from t where a = $1for update`, `select * from t limit 1for update`,
		`select * from t where a = $$b$$for update`, `select 1 as for for update`, `select a for from t for update`, `select * from t where a = @for for update`,
		`explain select * from t for update`, `select for.x from t for update`, `select * from t limit 1.for update`, `stmt for update`, `select * from t for for update`,
	},
	"after what looks open": {
		`select 'it''s' from t for update`, `select '\' from t for update`, `select E'\'' from t for update`, `select E'\\' from t for update`, `select E'''' from t for update`,
		`select E'a' 'b\' from t for update`, "select E'a' /*\n*/ 'b\\' for update", `select E'a''' from t for update --'`, `select type'\' from t for update`,
		`select U&'\' from t for update`, `select B'1''0' from t for update`, `select U&"\" from t for update`, `select "a""b" from t for update`,
		`select $a$ $b$ $a$ from t for update`, `select a$b$ from t for update`, `select $1 from t where b = $2 for update`, `select é$$ from t for update`,
		`select $1$ from t for update`, `select $a from t for update -- $a$`, "select 1 -- '\nfor update", "select 1 -- '\rfor update", `select 1 /* ' */ for update`,
		`select /*/*/ ' */*/ 1 for update`, `select 1 /***/ for update`, `select 1 - -1 for update`, `select 2 / 1 for update`, `select 1 */**/ 2 for update`,
		"select \x00 for update", "select \xff for update", `select a$$b for update $$`, `select "" for update`, `select '' for update`, `select $$$$ for update`,
	},
	"into": {
		`select * into t from s`, `select 1 into temp t`, `select 1 INTO UNLOGGED table t`, `with x as (select 1) select * into t from x`, `(select 1 into t)`,
		`select 1.into t`, `select 'a'into t`, `with x as (select 1) insert into t select * from x`, `with x as (select 1) merge into t using x on true when matched then do nothing`,
	},
	"common table expression": {
		`with x as (insert into t values (1) returning *) select * from x`, `with x as (update t set a = 1 returning *) select * from x`,
		`with x as (delete from t returning *) select * from x`, `WITH x AS (DELETE FROM t RETURNING *) SELECT * FROM x`, `with x as materialized (delete from t returning *) select * from x`,
		`with x as not materialized (update t set a = 1 returning *) select * from x`, `with x as ( /* a */ delete from t returning *) select * from x`,
		`with y as (select 1), x(a, b) as (delete from t returning *) select * from x`, `with recursive x as(update t set a = 1 returning a) table x`,
		`with x as (select 1) update t set a = 1`, `with x as (select 1) delete from t using x`, `with x as (select (1)) /* a */ delete from t`, `(with x as (select 1) delete from t)`,
		`with x as (with y as (select 1) delete from t using y returning *) select * from x`,
		`with x as materialized(with y as (select 1), z as (select 2) update t set a = 1 returning *) select * from x`,
		`with recursive x(a) as (select 1 union all select a + 1 from x) search depth first by a set o delete from t using x`,
		`with recursive x(a) as (select 1 union all select a from x) cycle a set c using p update t set b = 1 from x`,
		`with recursive x(a) as (select 1 union all select a from x) CYCLE a set c using "p"merge into t using x on true when matched then delete`,
		`with "x" as (delete from t returning *) select 1`, `with x as (merge into t using s on true when matched then delete returning *) select * from x`,
	},
	"second statement": {
		`select 1; select 2`, `select 1;select 2;`, `select 1; insert into t values (1)`, `select 1;;x`, "select 1; -- a\n delete from t", `select 1; /* a */ (`, `select 1;'a'`,
		`select ';';;"a"`, `select $$a$$;$$b$$`, `stmt;x`, `show a; show b`, `select 1;-`,
	},
}

// Calls that must not go to a standby, by name; "..." stands for any ending.
var localFunctions = strings.Fields(`
	pg_advisory_lock pg_advisory_lock_shared pg_advisory_xact_lock pg_advisory_xact_lock_shared
	pg_advisory_unlock pg_advisory_unlock_shared pg_advisory_unlock_all
	pg_try_advisory_lock pg_try_advisory_lock_shared pg_try_advisory_xact_lock pg_try_advisory_xact_lock_shared
	pg_terminate_backend pg_cancel_backend pg_reload_conf pg_rotate_logfile pg_rotate_logfile_old pg_logfile_rotate
	pg_promote pg_wal_replay_pause pg_wal_replay_resume pg_log_backend_memory_contexts pg_log_standby_snapshot
	pg_stat_reset pg_stat_reset_shared pg_stat_reset_slru pg_stat_reset_single_table_counters pg_stat_reset_single_function_counters
	pg_stat_reset_replication_slot pg_stat_reset_subscription_stats pg_stat_statements_reset pg_stat_kcache_reset
	pg_switch_wal pg_create_restore_point pg_current_wal_lsn pg_current_wal_insert_lsn pg_current_wal_flush_lsn
	pg_walfile_name pg_walfile_name_offset pg_logical_emit_message pg_export_snapshot
	pg_start_backup pg_stop_backup pg_backup_start pg_backup_stop
	pg_create_physical_replication_slot pg_create_logical_replication_slot pg_copy_physical_replication_slot
	pg_copy_logical_replication_slot pg_drop_replication_slot pg_replication_slot_advance pg_sync_replication_slots
	pg_logical_slot_get_changes pg_logical_slot_get_binary_changes pg_logical_slot_peek_changes
	pg_replication_origin_create pg_replication_origin_drop pg_replication_origin_advance pg_replication_origin_session_setup
	pg_file_write pg_file_rename pg_file_unlink pg_file_sync
	pg_import_system_collations pg_notify pg_current_xact_id txid_current
	lo_import lo_export lo_creat lo_create lo_from_bytea lo_put lo_unlink lowrite lo_truncate lo_truncate64
	nextval setval currval lastval set_config
	dblink dblink_exec dblink_connect dblink_send_query
	pg_prewarm autoprewarm_dump_now autoprewarm_start_worker pg_buffercache_evict pg_buffercache_evict_all
	brin_summarize_new_values brin_summarize_range brin_desummarize_range gin_clean_pending_list`)

func TestOfReads(t *testing.T) {
	for group, texts := range readTexts {
		for _, sql := range texts {
			require.Equal(t, AnyServer, Of(sql), "%s: %q", group, sql)
		}
	}
}

func TestOfWrites(t *testing.T) {
	for group, texts := range writeTexts {
		for _, sql := range texts {
			require.Equal(t, PrimaryOnly, Of(sql), "%s: %q", group, sql)
		}
	}
}

func TestOfLocalFunctions(t *testing.T) {
	calls := []string{
		"select %s(1)", "select * from %s (1) x", "SELECT pg_catalog.%s(1)", "select pg_catalog . %s\n(1)", "select s.%s/* ' */(1)", "select a, %s -- (\n (1)",
		`select "%s"(1)`, `select "pg_catalog"."%s" (1)`, `select pg_catalog."%s"/**/(1)`, "with x as materialized (select %s(1)) select * from x",
		"select 1 where $1 = %s(1)", "select '\\', %s(1)", "select E'\\'', %s(1)", "select f(%s(1))", "select not %s(1)", "explain analyze select %s()", "values (%s())",
		"select 1e5,%s(1)", "select @%s(1)", "select -%s(1)", "select 1 as x, /*/**/*/%s(1)", "select a$b, %s(1), c$b$", "stmt %s(1)", "select s.\"x\"\"y\".%s(1)",
	}
	for _, name := range localFunctions {
		for _, call := range calls {
			sql := fmt.Sprintf(call, name)
			require.Equal(t, PrimaryOnly, Of(sql), "%q", sql)
		}
		require.Equal(t, PrimaryOnly, Of("select "+strings.ToUpper(name)+"(1)"), name)
		for _, read := range []string{"select %s from t", "select '%s(1)'", `select "x%s"(1)`, "select x%s(1)", "select %s.x(1)", "select %s + (1)", "select 1 -- %s(1)", "select $$%s(1)$$", "select 1 as %s, (2)"} {
			sql := fmt.Sprintf(read, name)
			require.Equal(t, AnyServer, Of(sql), "%q", sql)
		}
		require.Equal(t, AnyServer, Of(`select "`+strings.ToUpper(name)+`"(1)`), "a quoted name does not fold: %s", name)
	}
	// An escaped name may be any, so no such call is a read.
	require.Equal(t, PrimaryOnly, Of(`select U&"\0070g_advisory_lock"(1)`))
	require.Equal(t, PrimaryOnly, Of(`select pg_catalog.u&"!0070g_notify" /**/ (1)`))
}

// allTexts calls f with every text of the tables, and with what it needs.
func allTexts(f func(sql string, want Need)) {
	for _, texts := range readTexts {
		for _, sql := range texts {
			f(sql, AnyServer)
		}
	}
	for _, texts := range writeTexts {
		for _, sql := range texts {
			f(sql, PrimaryOnly)
		}
	}
	for _, name := range localFunctions {
		f("select s."+name+"(1)", PrimaryOnly)
		f(`select "`+name+`"(1)`, PrimaryOnly)
		f("select "+name, AnyServer)
	}
}

// What stands between the tokens, and the case of what is not quoted, do not change a verdict.
func TestOfIgnoresBlanksCommentsAndCase(t *testing.T) {
	blanks := []string{" ", "\n", "\t\r\n\f", "/**/", "/* ' /* \" */ ; $$ for update */", "-- ' \" ; $a$\n", "--\r", " /*/**/*/ -- insert\n "}
	n := 0
	allTexts(func(sql string, want Need) {
		toks, open := lexAgain(sql)
		if open {
			return
		}
		n++
		for _, b := range blanks {
			require.Equal(t, want, Of(b+sql+"\n"+b), "%q around %q", b, sql)
			var s strings.Builder
			for i, tok := range toks {
				switch {
				case i == 0:
				case tok.kind == 's' && toks[i-1].kind == 's': // a line break would join them
					s.WriteString(" ")
				default:
					s.WriteString(b)
				}
				if tok.kind == 'w' {
					s.WriteString(swapCase(tok.text))
				} else {
					s.WriteString(tok.text)
				}
			}
			require.Equal(t, want, Of(s.String()), "%q between the tokens of %q: %q", b, sql, s.String())
		}
	})
	require.Greater(t, n, 500)
}

func swapCase(s string) string {
	b := []byte(s)
	for i, c := range b {
		if 'a' <= c|0x20 && c|0x20 <= 'z' {
			b[i] ^= 0x20
		}
	}
	return string(b)
}

// The tables against the second opinion that the fuzzing is held to: it has to be right about what we know.
func TestOfAgainstReference(t *testing.T) {
	allTexts(func(sql string, want Need) {
		require.Equal(t, want, ofAgain(sql), "%q", sql)
	})
}

func FuzzNeed(f *testing.F) {
	allTexts(func(sql string, _ Need) { f.Add(sql) })
	f.Fuzz(func(t *testing.T, sql string) {
		got := Of(sql)
		if len(sql) > 500 {
			return // the second opinion is slow
		}
		require.Equal(t, ofAgain(sql), got, "%q", sql)
		require.Equal(t, got, Of("/* insert */ -- '\n"+sql), "a comment before it")
		require.Equal(t, got, Of("\t\n "+sql), "blanks before it")
		toks, open := lexAgain(sql)
		if open {
			return
		}
		require.Equal(t, got, Of(sql+"\n/* ; delete from t */ -- ;x"), "a comment after it")
		require.Equal(t, got, Of(sql+"\n;; /**/ ;\n"), "semicolons after it")
		require.Equal(t, PrimaryOnly, Of(sql+"\nfor no key update"+"\n,for update"), "a locking clause after it")
		require.Equal(t, PrimaryOnly, Of(sql+"\n, pg_catalog.pg_advisory_lock(1)"), "a call after it")
		require.Equal(t, AnyServer, Of("select $fuzz_tag$"+strings.ReplaceAll(sql, "$fuzz_tag$", "")+" $fuzz_tag$"), "quoted")
		require.Equal(t, AnyServer, Of("select '"+strings.ReplaceAll(sql, "'", "''")+"'"), "quoted")
		require.Equal(t, AnyServer, Of(`select "`+strings.ReplaceAll(sql, `"`, `""`)+`"`), "quoted")
		if strings.Trim(kinds(toks), "(;") != "" {
			require.Equal(t, PrimaryOnly, Of(sql+"\n; select 1"), "a second statement")
		}
	})
}

// A scan that looked again at what it passed would take minutes for these.
func TestOfIsLinear(t *testing.T) {
	const size = 256 << 10
	for _, part := range []string{
		"a", "a ", "1", "1 ", "(", ")", "'", "''", `"`, `""`, "$", "$a", "$a ", "$a$", "$a$b", "$1", "$1a", "$aa$ $aa", "/", "/*", "*/", "/**/", "-", "- ", "--", "--\n", "--\r", ".", "@", ";", ";a",
		"E'", "E'a'", "E'a'\n", "E'\n", "E'\\'", "\\", "e''--\n", "U&\"", "u&", "U&\"\"", "for ", "for no key ", "as (", "with ", "é", "\x00", "\xff", " ", "pg_notify ", "dblink.", "pg_", "e", "x$",
	} {
		for _, head := range []string{"", "with x as (", "select E'a'", "select /*"} {
			sql := head + strings.Repeat(part, size/len(part))
			began := time.Now()
			Of(sql)
			require.Less(t, time.Since(began), 3*time.Second, "%q and many %q", head, part)
		}
	}
}

func TestOfAllocatesNothing(t *testing.T) {
	allTexts(func(sql string, _ Need) {
		require.Zero(t, testing.AllocsPerRun(50, func() { Of(sql) }), "%q", sql)
	})
}

// A second opinion: the lexical rules as regular expressions, which follow the server's scan.l, and the routing rules as
// regular expressions over the text without its comments and quotes. Slow, and made otherwise than the scanner.
type tokenAgain struct {
	kind byte // w a word, q a quoted name, u an escaped one, s a string, n a number, or the byte itself
	text string
}

const (
	reLine   = `--[^\n\r]*`
	reBroken = `(?:[ \t\f\v]|` + reLine + `)*[\n\r](?:[ \t\n\r\f\v]|` + reLine + `[\n\r])*`
)

var lexRules = []struct {
	kind byte
	re   *regexp.Regexp
}{
	{' ', regexp.MustCompile(`(?s)^(?:[ \t\n\r\f\v]|` + reLine + `)+`)},
	{'s', regexp.MustCompile(`(?s)^[eE]'(?:[^'\\]|\\.|'')*'(?:` + reBroken + `'(?:[^'\\]|\\.|'')*')*`)},
	{'s', regexp.MustCompile(`(?s)^(?:[bBnNxX]|[uU]&)?'(?:[^']|'')*'`)},
	{'u', regexp.MustCompile(`(?s)^[uU]&"(?:[^"]|"")*"`)},
	{'q', regexp.MustCompile(`(?s)^"(?:[^"]|"")*"`)},
	{'!', regexp.MustCompile(`^(?:[eEbBnNxX]'|[uU]&['"]|['"])`)}, // opened, and not closed above
	{'w', regexp.MustCompile(`^[a-zA-Z_\x80-\xff][a-zA-Z_\x80-\xff0-9$]*`)},
	{'n', regexp.MustCompile(`^(?:[0-9][0-9.]*|\$[0-9]+)`)},
	{'$', regexp.MustCompile(`^\$(?:[a-zA-Z_\x80-\xff][a-zA-Z_\x80-\xff0-9]*)?\$`)},
}

var notTheEnd = regexp.MustCompile(`^(?:` + reBroken + `)?'`)

// lexAgain cuts a text into tokens, and reports whether it ends inside a comment or, in the last token, a quote.
func lexAgain(sql string) (toks []tokenAgain, open bool) {
	// The expressions work on runes: every byte becomes one.
	runes := make([]rune, len(sql))
	for i := range len(sql) {
		runes[i] = rune(sql[i])
	}
	at := func(i int) string { return string(runes[i:]) }
next:
	for i := 0; i < len(sql); {
		if strings.HasPrefix(sql[i:], "/*") {
			depth := 0
			for {
				switch {
				case i == len(sql):
					return toks, true
				case strings.HasPrefix(sql[i:], "/*"):
					depth, i = depth+1, i+2
				case strings.HasPrefix(sql[i:], "*/"):
					depth, i = depth-1, i+2
				default:
					i++
				}
				if depth == 0 {
					continue next
				}
			}
		}
		for _, r := range lexRules {
			m := r.re.FindString(at(i))
			if m == "" {
				continue
			}
			n := len([]rune(m))
			kind := r.kind
			switch kind {
			case ' ':
				i += n
				continue next
			case 's':
				// An expression that does not find the end of an E string steps back to an end that was none.
				if sql[i]|0x20 == 'e' && notTheEnd.MatchString(at(i+n)) {
					return append(toks, tokenAgain{'s', sql[i:]}), true
				}
			case '!':
				return append(toks, tokenAgain{'s', sql[i:]}), true
			case '$':
				tag := sql[i : i+n]
				end := strings.Index(sql[i+n:], tag)
				if end < 0 {
					return append(toks, tokenAgain{'s', sql[i:]}), true
				}
				kind, n = 's', n+end+n
			}
			toks = append(toks, tokenAgain{kind, sql[i : i+n]})
			i += n
			continue next
		}
		toks = append(toks, tokenAgain{sql[i], sql[i : i+1]})
		i++
	}
	return toks, false
}

var (
	firstWord = regexp.MustCompile(`^[ (;]*(?:(select|with)|(abort|alter|analy[sz]e|begin|call|checkpoint|close|cluster|comment|commit|copy|create|` +
		`deallocate|declare|delete|discard|do|drop|end|execute|fetch|grant|import|insert|listen|load|lock|merge|move|notify|prepare|reassign|refresh|` +
		`reindex|release|repack|reset|revoke|rollback|savepoint|security|set|start|truncate|unlisten|update|vacuum)) `)
	labels        = regexp.MustCompile(`[.@] [a-z_]+ `)
	asLabels      = regexp.MustCompile(` as (?:as|for|into|key|share|merge|delete|insert|update|no) `)
	lockingClause = regexp.MustCompile(` for (?:update|no key update|share|key share) `)
	cteWrite      = regexp.MustCompile(` (?:as|materialized) \( (?:insert|update|delete|merge) `)
	looseWrite    = regexp.MustCompile(` (?:(?:as|materialized) \( with|\) (?:search|cycle)) (?:.* )?(?:insert|update|delete|merge) `)
	bracketed     = regexp.MustCompile(`\([^()]*\)`)
	localCall     = regexp.MustCompile(` (?:U|N(?:` +
		`(?:pg_advisory_|pg_try_advisory_|pg_log_|pg_stat_reset|pg_replication_origin_|pg_logical_slot_|pg_file_|pg_buffercache_evict|dblink)\S*|pg_stat_\S+_reset|` +
		strings.Join(localFunctions, "|") + `)) \( `)
)

// ofAgain is Of by other means.
func ofAgain(sql string) Need {
	toks, _ := lexAgain(sql)
	words, names := " ", " " // names has function names alone: quoted ones do not fold
	for i, tok := range toks {
		low := lowerASCII(tok.text)
		switch tok.kind {
		case 'w':
			words += low + " "
			names += nameAgain(low) + " "
		case 'q':
			words += "q "
			names += nameAgain(tok.text[1:len(tok.text)-1]) + " "
		case 'u':
			words += "q "
			names += "U "
		case 's', 'n':
			words += "0 "
			names += "0 "
		case ';':
			words += "; "
			names += "; "
			if i > 0 && regexp.MustCompile(`[^;( ]`).MatchString(strings.TrimSuffix(words, "; ")) && regexp.MustCompile(`[^;]`).MatchString(kinds(toks[i:])) {
				return PrimaryOnly
			}
		default:
			words += tok.text + " "
			names += tok.text + " "
		}
	}
	if localCall.MatchString(names) {
		return PrimaryOnly
	}
	first := firstWord.FindStringSubmatch(strings.TrimPrefix(words, " "))
	if first != nil && first[2] != "" {
		return PrimaryOnly
	}
	for { // twice, as matches share a blank
		s := labels.ReplaceAllString(words, ". x ")
		s = asLabels.ReplaceAllString(s, " as x ")
		if s == words {
			break
		}
		words = s
	}
	if lockingClause.MatchString(words) {
		return PrimaryOnly
	}
	if first == nil {
		return AnyServer
	}
	if strings.Contains(words, " into ") || first[1] == "with" && (cteWrite.MatchString(words) || looseWrite.MatchString(words)) {
		return PrimaryOnly
	}
	if first[1] == "with" {
		main := strings.TrimLeft(words, " (;")
		for bracketed.MatchString(main) {
			main = bracketed.ReplaceAllString(main, "0]")
		}
		if i := strings.IndexByte(main, ')'); i >= 0 && strings.IndexByte(main, '(') < 0 {
			main = main[:i] // one of those before the first word
		}
		if strings.IndexByte(main, '(') < 0 && regexp.MustCompile(`0\] (?:insert|update|delete|merge) `).MatchString(main) {
			return PrimaryOnly
		}
	}
	return AnyServer
}

func kinds(toks []tokenAgain) (s string) {
	for _, tok := range toks {
		s += string(rune(tok.kind))
	}
	return s
}

// nameAgain makes one word of any name, and another of those that the server cuts.
func nameAgain(name string) string {
	if len(name) > 63 {
		return "cut"
	}
	return "N" + strings.Map(func(r rune) rune {
		if strings.ContainsRune(" \t\n\r\f\v", r) {
			return '$'
		}
		return r
	}, name)
}

func lowerASCII(s string) string {
	b := []byte(s)
	for i, c := range b {
		if 'A' <= c && c <= 'Z' {
			b[i] = c + 'a' - 'A'
		}
	}
	return string(b)
}

func TestAReadThatCallsNothingOfTheProgramsIsNoWrite(t *testing.T) {
	t.Parallel()
	for _, sql := range []string{
		"select * from t where id = $1", "select count(*), max (x) from t where id in (1, 2) and (a or not (b))",
		"with x as (select 1) select * from x", "select pg_catalog.count(*) from t", "select PG_CATALOG . count(*) from t", "values (1), (2)", "(select 1)",
		"select numeric(10, 2) '1'", "select 1", "-- name: GetThing :one\nSELECT count(*) from t -- all\nwhere a in (1)", "select coalesce(a, (b), NOW()) from t group by rollup (a)",
	} {
		require.False(t, MayWrite(sql), sql)
	}
	for _, sql := range []string{
		"select place_order($1)", "select app.count(1)", "select app . count(1)", "select my_pg_catalog.count(1)", `select "place_order"($1)`, "select * from place_order ()",
		"select count(*) from t where place_order\n(1)", "select nextval('s')", "select 'f(x)'", "select é(1)",
		"place_order", "", "explain analyze update t set n = n + 1", "select place_order /* the id */ (7)",
		"select place_order -- all\n(7)", "select orders$replace(7)", "execute place_order(7)",
	} {
		require.True(t, MayWrite(sql), sql)
	}
}

func TestALongLineIsReadOnce(t *testing.T) {
	t.Parallel()
	sql := "select * from t where (a, b) in ((1, 2)" + strings.Repeat(", (1, 2)", 1<<17) + ")"
	begun := time.Now()
	require.False(t, MayWrite(sql))
	require.Less(t, time.Since(begun), 5*time.Second, "a megabyte; a minute if each parenthesis read the line")
}
