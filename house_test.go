package multipool

import (
	"context"
	"go/parser"
	gotoken "go/token"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"
)

// A program that swaps pgxpool for this package calls the same functions.
var (
	_ func(context.Context, string) (*MultiPool, error)          = New
	_ func(context.Context, *pgxpool.Config) (*MultiPool, error) = NewWithConfig
	_ func(string) (*pgxpool.Config, error)                      = ParseConfig

	_ func(context.Context, string) (*Pool, error)      = New
	_ func(context.Context, *PoolConfig) (*Pool, error) = NewWithConfig
	_ func(string) (*PoolConfig, error)                 = ParseConfig

	_ pgx.Tx = (*Tx)(nil)
)

// requireMethodsOf tests that ours has every exported method of theirs with the same type.
func requireMethodsOf(t *testing.T, theirs, ours reflect.Type) {
	t.Helper()
	require.Positive(t, theirs.NumMethod())
	for i := range theirs.NumMethod() {
		want := theirs.Method(i)
		got, ok := ours.MethodByName(want.Name)
		if !ok {
			t.Errorf("%v lacks %s", ours, want.Name)
			continue
		}
		require.Equal(t, signature(want.Type), signature(got.Type), want.Name)
	}
}

// signature is a method's type without its receiver.
func signature(f reflect.Type) string {
	var in, out []reflect.Type
	for i := 1; i < f.NumIn(); i++ {
		in = append(in, f.In(i))
	}
	for i := range f.NumOut() {
		out = append(out, f.Out(i))
	}
	return reflect.FuncOf(in, out, f.IsVariadic()).String()
}

func TestMultiPoolHasEveryMethodOfPgxpoolsPool(t *testing.T) {
	t.Parallel()
	requireMethodsOf(t, reflect.TypeFor[*pgxpool.Pool](), reflect.TypeFor[*MultiPool]())
}

func TestTxHasEveryMethodOfPgxpoolsTx(t *testing.T) {
	t.Parallel()
	requireMethodsOf(t, reflect.TypeFor[*pgxpool.Tx](), reflect.TypeFor[*Tx]())
}

func TestOurTypesExportNoFieldOfThePoolOrTheTransaction(t *testing.T) {
	t.Parallel()
	for _, typ := range []reflect.Type{reflect.TypeFor[MultiPool](), reflect.TypeFor[Tx]()} {
		for i := range typ.NumField() {
			require.False(t, typ.Field(i).IsExported(), "%v.%s", typ, typ.Field(i).Name)
		}
	}
}

const (
	pgxPath     = "github.com/jackc/pgx/v5"
	pgconnPath  = pgxPath + "/pgconn"
	watchPath   = pgconnPath + "/ctxwatch"
	pgtypePath  = pgxPath + "/pgtype"
	poolPath    = pgxPath + "/pgxpool"
	puddlePath  = "github.com/jackc/puddle/v2"
	breakerPath = "github.com/sony/gobreaker/v2"
)

// imports is what each file of this package may import besides the standard library: three rooms, one direction of
// knowledge. A new file enters here when it enters the house.
var imports = map[string][]string{
	"doc.go":        {},
	"pool.go":       {pgxPath, pgconnPath, poolPath, puddlePath},
	"attempt.go":    {pgxPath, pgconnPath, poolPath, puddlePath},
	"options.go":    {pgxPath, pgconnPath, poolPath},
	"route.go":      {pgxPath},
	"statement.go":  {},
	"needs.go":      {},
	"connstring.go": {pgconnPath},
	"balancer.go":   {},
	"candidates.go": {},
	"roster.go":     {},
	"topology.go":   {},
	"lag.go":        {},
	"drain.go":      {},
	"live.go":       {puddlePath},
	"discover.go":   {pgxPath, poolPath},
	"election.go":   {},
	"modes.go":      {},
	"lsn.go":        {},
	"peer.go":       {pgxPath, pgconnPath, poolPath, puddlePath},
	"wire.go":       {pgxPath, pgconnPath, poolPath},
	"breaker.go":    {breakerPath},
	"watch.go":      {},
	"peek.go":       {poolPath},
	"keepalive.go":  {},
	"classify.go":   {pgxPath, pgconnPath, puddlePath},
	"observe.go":    {pgxPath, pgconnPath, poolPath},
	"monitor.go":    {pgxPath, pgconnPath, watchPath},
	"rows.go":       {pgxPath, pgconnPath, pgtypePath, poolPath},
	"tx.go":         {pgxPath, pgconnPath, poolPath},
	"runtx.go":      {pgxPath, pgconnPath, poolPath},
	"session.go":    {pgxPath, pgconnPath, poolPath},
	"router.go":     {pgxPath, pgconnPath, poolPath},
	"follow.go":     {pgxPath, poolPath, puddlePath},
	"approach.go":   {pgxPath, pgconnPath},
	"seats.go":      {},
	"hooks.go":      {},
	"status.go":     {poolPath},
	"errors.go":     {},
}

// abstains is what the files that decide keep away from of the standard library: clocks, networks, contexts.
var abstains = map[string][]string{
	"topology.go":   {"context", "net", "os", "sync", "sync/atomic", "time"},
	"election.go":   {"context", "net", "os", "sync", "sync/atomic", "time"},
	"modes.go":      {"context", "net", "os", "sync", "sync/atomic", "time"},
	"balancer.go":   {"context", "net", "os", "sync", "time"},
	"candidates.go": {"context", "net", "os", "sync"},
	"roster.go":     {"context", "net", "os", "sync", "sync/atomic", "time"},
	"route.go":      {"net", "os", "sync", "time"},
	"statement.go":  {"context", "net", "os", "time"},
	"needs.go":      {"context", "net", "os", "time"},
	"lag.go":        {"context", "net", "os"},
	"lsn.go":        {"context", "net", "os", "sync", "time"},
	"errors.go":     {"context", "net", "os", "sync", "time"},
	"classify.go":   {"os", "sync"},
}

func TestEveryFileImportsOnlyWhatItsRoomMay(t *testing.T) {
	t.Parallel()
	files, err := filepath.Glob("*.go")
	require.NoError(t, err)
	checked := 0
	for _, name := range files {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		checked++
		base := name
		for _, system := range []string{"_unix", "_linux", "_windows", "_other"} {
			base = strings.Replace(base, system+".go", ".go", 1)
		}
		allowed, known := imports[base]
		if !known {
			t.Errorf("%s has no line in the table of imports", name)
			continue
		}
		file, err := parser.ParseFile(gotoken.NewFileSet(), name, nil, parser.ImportsOnly)
		require.NoError(t, err)
		for _, spec := range file.Imports {
			path, err := strconv.Unquote(spec.Path.Value)
			require.NoError(t, err)
			first, _, _ := strings.Cut(path, "/")
			switch {
			case strings.Contains(first, "."): // not of the standard library
				if !slices.Contains(allowed, path) {
					t.Errorf("%s imports %s", name, path)
				}
			case slices.Contains(abstains[base], path):
				t.Errorf("%s imports %s", name, path)
			}
		}
	}
	require.Greater(t, checked, 10)
}

// The middle of the house starts nothing and knows no clock: topology.go has no goroutine either.
func TestTheTopologyStartsNoGoroutine(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("topology.go")
	require.NoError(t, err)
	require.NotRegexp(t, `(?m)^\s*go (func|\w+\()`, string(text))
}

func TestTheModuleRequiresFourModules(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("go.mod")
	require.NoError(t, err)
	var direct []string
	for _, m := range regexp.MustCompile(`(?m)^(?:require)?\s+(\S+) v\S+( // indirect)?$`).FindAllStringSubmatch(string(text), -1) {
		if m[2] == "" {
			direct = append(direct, m[1])
		}
	}
	require.ElementsMatch(t, []string{pgxPath, puddlePath, breakerPath, "github.com/stretchr/testify"}, direct)
	require.NotContains(t, string(text), "replace ")
}
