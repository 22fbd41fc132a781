package multipool

import (
	"context"
	"errors"
	"go/ast"
	"go/importer"
	"go/parser"
	gotoken "go/token"
	"go/types"
	"io"
	"maps"
	"os"
	"os/exec"
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

	_ func(context.Context, string) (*Pool, error)  = New
	_ func(context.Context, *Config) (*Pool, error) = NewWithConfig
	_ func(string) (*Config, error)                 = ParseConfig

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
	protoPath   = pgxPath + "/pgproto3"
	pgtypePath  = pgxPath + "/pgtype"
	poolPath    = pgxPath + "/pgxpool"
	puddlePath  = "github.com/jackc/puddle/v2"
	breakerPath = "github.com/sony/gobreaker/v2"
	testifyPath = "github.com/stretchr/testify"

	rootPath    = "github.com/pgmultipool/multipool"
	faultPath   = rootPath + "/internal/pgfault"
	quotaPath   = rootPath + "/internal/quota"
	sqltextPath = rootPath + "/internal/sqltext"
)

// closed is what each package of internal that decides, and knows no pool, may import besides the standard library, and
// what it keeps away from in it. The compiler sees to it that they know nothing of the root.
var closed = map[string]struct{ imports, abstains []string }{
	"pgfault": {[]string{pgxPath, pgconnPath, puddlePath}, []string{"os", "sync"}},
	"quota":   {nil, []string{"context", "net", "os"}},
	"sqltext": {nil, []string{"context", "net", "os", "time"}},
}

// imports is what each file of this package may import besides the standard library: three rooms, one direction of
// knowledge. A new file enters here when it enters the house.
var imports = map[string][]string{
	// the front
	"doc.go":        {},
	"pool.go":       {pgxPath, pgconnPath, poolPath, sqltextPath, faultPath, quotaPath},
	"attempt.go":    {pgconnPath, poolPath, puddlePath, sqltextPath, faultPath},
	"news.go":       {},
	"options.go":    {pgxPath, pgconnPath, poolPath},
	"template.go":   {pgxPath, pgconnPath, poolPath},
	"connstring.go": {pgconnPath},
	"route.go":      {pgxPath},
	"intent.go":     {sqltextPath, faultPath},
	"pick.go":       {},
	"why.go":        {},
	"rows.go":       {pgxPath, pgconnPath, pgtypePath, poolPath, sqltextPath},
	"tx.go":         {pgxPath, poolPath, faultPath},
	"batch.go":      {pgxPath, pgconnPath, poolPath, faultPath},
	"runtx.go":      {pgxPath, pgconnPath, faultPath},
	"receipt.go":    {pgxPath, poolPath, faultPath},
	"router.go":     {pgxPath, pgconnPath, poolPath},
	"follow.go":     {pgxPath, poolPath, quotaPath},
	"call.go":       {quotaPath},
	"approach.go":   {pgxPath, pgconnPath, faultPath, quotaPath},
	"drain.go":      {},
	"live.go":       {},
	"discover.go":   {pgxPath, poolPath},
	"hooks.go":      {},
	"account.go":    {faultPath},
	"herald.go":     {},
	"status.go":     {poolPath},
	"labels.go":     {},
	"errors.go":     {pgconnPath, puddlePath, faultPath},

	// the middle
	"topology.go": {},
	"election.go": {},
	"identity.go": {},
	"marks.go":    {},
	"modes.go":    {},
	"roster.go":   {},
	"draw.go":     {},
	"load.go":     {},
	"balancer.go": {},
	"lag.go":      {},
	"lsn.go":      {},

	// the back
	"peer.go":      {poolPath, faultPath, quotaPath},
	"compose.go":   {pgxPath, pgconnPath, poolPath},
	"given.go":     {pgconnPath, protoPath, poolPath, quotaPath},
	"address.go":   {pgconnPath},
	"conn.go":      {},
	"wire.go":      {pgxPath, pgconnPath, faultPath, quotaPath},
	"sockets.go":   {quotaPath},
	"cancel.go":    {pgconnPath},
	"slots.go":     {quotaPath},
	"reserve.go":   {poolPath, quotaPath},
	"peek.go":      {poolPath},
	"keepalive.go": {},
	"observe.go":   {pgxPath, pgconnPath, poolPath, sqltextPath, faultPath},
	"outcome.go":   {pgxPath, sqltextPath, faultPath},
	"breaker.go":   {breakerPath},
	"monitor.go":   {pgxPath, pgconnPath, faultPath},
	"look.go":      {pgxPath, pgconnPath, watchPath, faultPath},
	"move.go":      {pgxPath, pgconnPath, faultPath},
	"watch.go":     {},
	"twin.go":      {pgxPath, pgconnPath},
	"latency.go":   {},
}

// abstains is what the files that decide keep away from of the standard library: clocks, networks, contexts.
var abstains = map[string][]string{
	"topology.go": {"context", "net", "os", "sync", "sync/atomic", "time"},
	"election.go": {"context", "net", "os", "sync", "sync/atomic", "time"},
	"identity.go": {"context", "net", "os", "sync", "sync/atomic", "time"},
	"marks.go":    {"context", "net", "os", "sync", "sync/atomic", "time"},
	"modes.go":    {"context", "net", "os", "sync", "sync/atomic", "time"},
	"roster.go":   {"context", "net", "os", "sync", "sync/atomic", "time"},
	"pick.go":     {"context", "net", "os", "sync", "sync/atomic", "time"},
	"why.go":      {"context", "net", "os", "sync", "sync/atomic", "time"},
	"intent.go":   {"context", "net", "os", "sync", "sync/atomic", "time"},
	"draw.go":     {"context", "net", "os", "sync", "time"},
	"load.go":     {"context", "net", "os", "sync", "time"},
	"balancer.go": {"context", "net", "os", "sync"},
	"route.go":    {"net", "os", "sync", "time"},
	"lag.go":      {"context", "net", "os"},
	"lsn.go":      {"context", "net", "os", "sync", "time"},
	"errors.go":   {"context", "net", "os", "sync", "time", faultPath},
	"outcome.go":  {"net", "os", "sync", "time"},
}

// knowsNot is what the files that keep the topology do not speak of: who asks for a peer, and how it is talked to.
var knowsNot = []string{"MultiPool", "intent", "tried", "wire", "attempt"}

// houseFiles parses the files of the package, tests excepted.
func houseFiles(t *testing.T) map[string]*ast.File {
	t.Helper()
	names, err := filepath.Glob("*.go")
	require.NoError(t, err)
	files := map[string]*ast.File{}
	for _, name := range names {
		if !strings.HasSuffix(name, "_test.go") {
			files[name], err = parser.ParseFile(gotoken.NewFileSet(), name, nil, parser.SkipObjectResolution)
			require.NoError(t, err)
		}
	}
	return files
}

func TestEveryFileImportsOnlyWhatItsRoomMay(t *testing.T) {
	t.Parallel()
	stale := maps.Clone(imports)
	for name, file := range houseFiles(t) {
		base := name
		for _, system := range []string{"_linux", "_other"} {
			base = strings.Replace(base, system+".go", ".go", 1)
		}
		allowed, known := imports[base]
		if !known {
			t.Errorf("%s has no line in the table of imports", name)
			continue
		}
		delete(stale, base)
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
	require.Empty(t, stale, "lines of files that are gone")
}

// What the compiler does not close: an internal package imports no other, and what decides reads no clock and no network.
func TestInternalPackagesImportNeitherTheRootNorOneAnother(t *testing.T) {
	t.Parallel()
	files, err := filepath.Glob("internal/*/*.go")
	require.NoError(t, err)
	missing := maps.Clone(closed)
	for _, name := range files {
		pkg, test := filepath.Base(filepath.Dir(name)), strings.HasSuffix(name, "_test.go")
		rules, is := closed[pkg]
		tool := slices.Contains([]string{"netfault", "pgfake", "pgtest"}, pkg)
		if !is && (!tool || test) { // the rest is programs and tests of the whole
			continue
		}
		delete(missing, pkg)
		file, err := parser.ParseFile(gotoken.NewFileSet(), name, nil, parser.ImportsOnly)
		require.NoError(t, err)
		for _, spec := range file.Imports {
			path, err := strconv.Unquote(spec.Path.Value)
			require.NoError(t, err)
			first, _, _ := strings.Cut(path, "/")
			switch foreign := strings.Contains(first, "."); {
			case strings.HasPrefix(path, rootPath),
				is && !test && foreign && !slices.Contains(rules.imports, path),
				is && !test && slices.Contains(rules.abstains, path):
				t.Errorf("%s imports %s", name, path)
			}
		}
	}
	require.Empty(t, missing, "packages that are gone")
}

// Only internal/pgfault reads SQLSTATEs: a second place that does would judge an error by rules of its own.
func TestNoFileOfTheRootReadsASQLSTATE(t *testing.T) {
	t.Parallel()
	var found []string
	info := houseTypes(t)
	code, _, _ := types.LookupFieldOrMethod(info.pgError, true, nil, "Code")
	require.NotNil(t, code)
	for expr, selection := range info.Selections {
		if selection.Obj() == code || selection.Kind() == types.MethodVal && selection.Obj().Name() == "SQLState" { // CallEnd has a field for it
			found = append(found, info.fset.Position(expr.Pos()).String())
		}
	}
	require.Empty(t, found, "questions for internal/pgfault")
}

// Only conn.go changes the state of a connection: elsewhere a change would be one that its diagram does not have.
func TestOnlyConnGoTouchesAConnectionsState(t *testing.T) {
	t.Parallel()
	info, uses := houseTypes(t), 0
	var found []string
	for expr, selection := range info.Selections {
		if selection.Obj().Name() != "word" || !strings.HasSuffix(selection.Recv().String(), ".connUse") {
			continue
		}
		if at := info.fset.Position(expr.Pos()); at.Filename == "conn.go" {
			uses++
		} else {
			found = append(found, at.String())
		}
	}
	require.Empty(t, found)
	require.NotZero(t, uses, "the field has another name")
}

// houseInfo is what the type checker knows of the package, tests excepted.
type houseInfo struct {
	types.Info
	fset    *gotoken.FileSet
	pgError types.Type // pgconn.PgError
}

// houseTypes checks the types of the package, with the dependencies as the go command has compiled them.
func houseTypes(t *testing.T) houseInfo {
	t.Helper()
	list := exec.Command("go", "list", "-export", "-deps", "-f", "{{.ImportPath}}={{.Export}}={{if not .DepOnly}}{{join .GoFiles \",\"}}{{end}}", ".")
	list.Stderr = os.Stderr
	out, err := list.Output()
	if errors.Is(err, exec.ErrNotFound) {
		t.Skip("needs the go command")
	}
	require.NoError(t, err)
	compiled := map[string]string{}
	info := houseInfo{Info: types.Info{Selections: map[*ast.SelectorExpr]*types.Selection{}}, fset: gotoken.NewFileSet()}
	var files []*ast.File
	for line := range strings.Lines(string(out)) {
		fields := strings.Split(strings.TrimSpace(line), "=")
		compiled[fields[0]] = fields[1]
		for name := range strings.SplitSeq(fields[2], ",") {
			if name != "" {
				file, err := parser.ParseFile(info.fset, name, nil, parser.SkipObjectResolution)
				require.NoError(t, err)
				files = append(files, file)
			}
		}
	}
	require.NotEmpty(t, files)
	config := types.Config{Importer: importer.ForCompiler(info.fset, "gc", func(path string) (io.ReadCloser, error) { return os.Open(compiled[path]) })}
	root, err := config.Check(rootPath, info.fset, files, &info.Info)
	require.NoError(t, err)
	for _, pkg := range root.Imports() {
		if pkg.Path() == pgconnPath {
			info.pgError = pkg.Scope().Lookup("PgError").Type()
		}
	}
	require.NotNil(t, info.pgError)
	return info
}

// What is known of the peers does not depend on who asks.
func TestTheTopologyKnowsNothingOfCallsAndConnections(t *testing.T) {
	t.Parallel()
	files := houseFiles(t)
	for _, name := range []string{"topology.go", "election.go", "identity.go", "marks.go", "modes.go", "roster.go", "lag.go", "lsn.go"} {
		ast.Inspect(files[name], func(n ast.Node) bool {
			if id, is := n.(*ast.Ident); is && slices.Contains(knowsNot, id.Name) {
				t.Errorf("%s speaks of %s", name, id.Name)
			}
			return true
		})
	}
}

// What our balancers use of the candidates, a program's can use too.
func TestOurBalancersUseTheExportedSurface(t *testing.T) {
	t.Parallel()
	var used []string
	for _, d := range houseFiles(t)["balancer.go"].Decls {
		f, is := d.(*ast.FuncDecl)
		if !is {
			continue
		}
		for _, param := range f.Type.Params.List {
			if typ, is := param.Type.(*ast.Ident); !is || typ.Name != "Candidates" {
				continue
			}
			ast.Inspect(f.Body, func(n ast.Node) bool {
				sel, is := n.(*ast.SelectorExpr)
				if !is {
					return true
				}
				if on, is := sel.X.(*ast.Ident); is && on.Name == param.Names[0].Name {
					used = append(used, sel.Sel.Name)
					if !sel.Sel.IsExported() {
						t.Errorf("%s uses %s.%s", f.Name.Name, on.Name, sel.Sel.Name)
					}
				}
				return true
			})
		}
	}
	require.Subset(t, used, []string{"Len", "Reads", "Ready", "Usable", "RoundTrip", "LessBusy", "Named"})
}

// A signature that has a name is written by it.
func TestTheHouseWritesDiscovererOnce(t *testing.T) {
	t.Parallel()
	var written []string
	for name := range houseFiles(t) {
		text, err := os.ReadFile(name)
		require.NoError(t, err)
		for range strings.Count(string(text), "func(context.Context) ([]Peer, error)") {
			written = append(written, name)
		}
	}
	require.Equal(t, []string{"discover.go"}, written)
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
	require.ElementsMatch(t, []string{pgxPath, puddlePath, breakerPath, testifyPath}, direct)
	require.NotContains(t, string(text), "replace ")
}
