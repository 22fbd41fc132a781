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
	"sync"
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
	dsnPath     = rootPath + "/internal/dsn"
	faultPath   = rootPath + "/internal/pgfault"
	quotaPath   = rootPath + "/internal/quota"
	sqltextPath = rootPath + "/internal/sqltext"
)

// closed is what every package of internal that decides, and knows no pool, may import besides the standard library, and
// what it keeps away from in it. The compiler sees to it that they know nothing of the root.
var closed = map[string]struct{ imports, abstains []string }{
	"dsn":     {[]string{pgconnPath}, []string{"context", "net", "sync", "sync/atomic"}},
	"pgfault": {[]string{pgxPath, pgconnPath, puddlePath}, []string{"os", "sync"}},
	"quota":   {nil, []string{"context", "net", "os"}},
	"sqltext": {nil, []string{"context", "net", "os", "time"}},
}

// imports is what every file of this package may import besides the standard library. A file belongs to the group of the
// first word of its name. A new file needs a line here.
var imports = map[string][]string{
	// what a program sees
	"doc.go":           {},
	"pool.go":          {pgxPath, pgconnPath, poolPath, sqltextPath, faultPath, quotaPath},
	"options.go":       {dsnPath, pgxPath, pgconnPath, poolPath},
	"options_given.go": {dsnPath, pgconnPath, protoPath, poolPath, quotaPath},
	"options_peers.go": {dsnPath, pgxPath, pgconnPath, poolPath},
	"balancer.go":      {},
	"breaker.go":       {breakerPath},
	"route.go":         {pgxPath},
	"router.go":        {pgxPath, pgconnPath, poolPath},
	"errors.go":        {pgconnPath, puddlePath, faultPath},
	"hooks.go":         {},
	"status.go":        {poolPath},
	"why.go":           {},
	"labels.go":        {},
	"admin_drain.go":   {},
	"admin_peers.go":   {},
	"discover.go":      {pgxPath, poolPath},

	// one call, from start to end
	"call.go":         {pgconnPath, poolPath, puddlePath, sqltextPath, faultPath},
	"call_account.go": {faultPath},
	"call_batch.go":   {pgxPath, pgconnPath, poolPath, faultPath},
	"call_commit.go":  {pgxPath, poolPath, faultPath},
	"call_outcome.go": {pgxPath, sqltextPath, faultPath},
	"call_plan.go":    {sqltextPath, faultPath},
	"call_rows.go":    {pgxPath, pgconnPath, pgtypePath, poolPath, sqltextPath},
	"call_runtx.go":   {pgxPath, pgconnPath, faultPath},
	"call_tx.go":      {pgxPath, poolPath, faultPath},

	// which peer gets it
	"choose.go":      {},
	"choose_load.go": {},
	"choose_two.go":  {},

	// the one writer of the snapshot, and what tells the hooks
	"state.go":       {},
	"state_locks.go": {},
	"events.go":      {},

	// the pools that follow a promotion
	"follow.go":         {pgxPath, poolPath, quotaPath},
	"follow_acquire.go": {quotaPath},
	"follow_dial.go":    {pgxPath, pgconnPath, faultPath, quotaPath},

	// one server
	"peer.go":         {poolPath, faultPath, quotaPath},
	"peer_address.go": {pgconnPath},
	"peer_check.go":   {pgxPath, pgconnPath, watchPath, faultPath},
	"peer_lag.go":     {},
	"peer_latency.go": {},
	"peer_monitor.go": {pgxPath, pgconnPath, faultPath},
	"peer_move.go":    {pgxPath, pgconnPath, faultPath},
	"peer_permits.go": {poolPath, quotaPath},
	"peer_pool.go":    {pgxPath, pgconnPath, poolPath},
	"peer_slots.go":   {quotaPath},
	"peer_stall.go":   {},
	"peer_twin.go":    {pgxPath, pgconnPath},

	// one connection
	"conn.go":           {},
	"conn_alive.go":     {poolPath},
	"conn_cancel.go":    {pgconnPath},
	"conn_data.go":      {pgxPath, pgconnPath, faultPath, quotaPath},
	"conn_keepalive.go": {},
	"conn_socket.go":    {quotaPath},
	"conn_tracer.go":    {pgxPath, pgconnPath, poolPath, sqltextPath, faultPath},

	// what is known of the servers: decisions, without clock, network or pool
	"topology.go":           {},
	"topology_election.go":  {},
	"topology_identity.go":  {},
	"topology_list.go":      {},
	"topology_lsn.go":       {},
	"topology_modes.go":     {},
	"topology_timelines.go": {},
}

// abstains is what the files that decide keep away from of the standard library: clocks, networks, contexts.
var abstains = map[string][]string{
	"topology.go":           {"context", "net", "os", "sync", "sync/atomic", "time"},
	"topology_election.go":  {"context", "net", "os", "sync", "sync/atomic", "time"},
	"topology_identity.go":  {"context", "net", "os", "sync", "sync/atomic", "time"},
	"topology_timelines.go": {"context", "net", "os", "sync", "sync/atomic", "time"},
	"topology_modes.go":     {"context", "net", "os", "sync", "sync/atomic", "time"},
	"topology_list.go":      {"context", "net", "os", "sync", "sync/atomic", "time"},
	"choose.go":             {"context", "net", "os", "sync", "sync/atomic", "time"},
	"why.go":                {"context", "net", "os", "sync", "sync/atomic", "time"},
	"call_plan.go":          {"context", "net", "os", "sync", "sync/atomic", "time"},
	"choose_two.go":         {"context", "net", "os", "sync", "time"},
	"choose_load.go":        {"context", "net", "os", "sync", "time"},
	"balancer.go":           {"context", "net", "os", "sync"},
	"route.go":              {"net", "os", "sync", "time"},
	"peer_lag.go":           {"context", "net", "os"},
	"topology_lsn.go":       {"context", "net", "os", "sync", "time"},
	"errors.go":             {"context", "net", "os", "sync", "time", faultPath},
	"call_outcome.go":       {"net", "os", "sync", "time"},
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
	root    *types.Package
	pgError types.Type // pgconn.PgError
}

// houseTypes returns what the type checker knows.
func houseTypes(t *testing.T) houseInfo {
	t.Helper()
	info, err := checkHouse()
	if errors.Is(err, exec.ErrNotFound) {
		t.Skip("needs the go command")
	}
	require.NoError(t, err)
	require.NotNil(t, info.pgError)
	return info
}

// checkHouse checks the types of the package, once, with the dependencies as the go command has compiled them.
var checkHouse = sync.OnceValues(func() (houseInfo, error) {
	info := houseInfo{fset: gotoken.NewFileSet(), Info: types.Info{
		Selections: map[*ast.SelectorExpr]*types.Selection{}, Uses: map[*ast.Ident]types.Object{},
	}}
	list := exec.Command("go", "list", "-export", "-deps", "-f", "{{.ImportPath}}={{.Export}}={{if not .DepOnly}}{{join .GoFiles \",\"}}{{end}}", ".")
	list.Stderr = os.Stderr
	out, err := list.Output()
	if err != nil {
		return info, err
	}
	compiled := map[string]string{}
	var files []*ast.File
	for line := range strings.Lines(string(out)) {
		fields := strings.Split(strings.TrimSpace(line), "=")
		compiled[fields[0]] = fields[1]
		for name := range strings.SplitSeq(fields[2], ",") {
			if name == "" {
				continue
			}
			file, err := parser.ParseFile(info.fset, name, nil, parser.SkipObjectResolution)
			if err != nil {
				return info, err
			}
			files = append(files, file)
		}
	}
	config := types.Config{Importer: importer.ForCompiler(info.fset, "gc", func(path string) (io.ReadCloser, error) { return os.Open(compiled[path]) })}
	if info.root, err = config.Check(rootPath, info.fset, files, &info.Info); err != nil {
		return info, err
	}
	for _, pkg := range info.root.Imports() {
		if pkg.Path() == pgconnPath {
			info.pgError = pkg.Scope().Lookup("PgError").Type()
		}
	}
	return info, nil
})

// groupOf returns the first word of a file's name.
func groupOf(file string) string {
	word, _, _ := strings.Cut(strings.TrimSuffix(file, ".go"), "_")
	return word
}

// The root's size on this platform, and which group of files uses which. Neither may grow without a reason. What has become
// smaller becomes the new bound.
//
//	go test -v -run TestTheHouseCounts .
func TestTheHouseCounts(t *testing.T) {
	t.Parallel()
	info := houseTypes(t)
	files, names := map[string]bool{}, 0
	for _, name := range info.root.Scope().Names() {
		if !gotoken.IsExported(name) {
			names++
		}
	}
	edges := map[[2]string]map[[2]string]bool{} // by groups, the pairs of files
	for id, obj := range info.Uses {
		from := info.fset.Position(id.Pos()).Filename
		files[from] = true
		if obj.Pkg() != info.root || obj.Pos() == 0 {
			continue
		}
		if _, field := obj.(*types.Var); field && obj.Parent() != info.root.Scope() {
			continue // a field, which comes with its type, or a variable of a function
		}
		to := info.fset.Position(obj.Pos()).Filename
		if a, b := groupOf(from), groupOf(to); a != b {
			pair := [2]string{a, b}
			if edges[pair] == nil {
				edges[pair] = map[[2]string]bool{}
			}
			edges[pair][[2]string{from, to}] = true
		}
	}
	t.Logf("%d files, %d unexported names", len(files), names)
	total, uses := 0, []string{}
	for _, pair := range slices.SortedFunc(maps.Keys(edges), func(a, b [2]string) int { return strings.Compare(a[0]+" "+a[1], b[0]+" "+b[1]) }) {
		t.Logf("%10s -> %-10s %d", pair[0], pair[1], len(edges[pair]))
		total += len(edges[pair])
		if pair[0] == "topology" {
			uses = append(uses, pair[1])
		}
	}
	t.Logf("%d edges among files of different groups", total)
	require.LessOrEqual(t, len(files), 62)
	require.LessOrEqual(t, names, 504)
	require.LessOrEqual(t, total, 359)
	// labels, why and balancer are types that a program sees; the snapshot holds pointers to peers, and a list of them how
	// busy they are.
	require.Equal(t, []string{"balancer", "choose", "labels", "peer", "why"}, uses, "what is known of the servers depends on nobody who asks")
}

// What is known of the peers does not depend on who asks.
func TestTheTopologyKnowsNothingOfCallsAndConnections(t *testing.T) {
	t.Parallel()
	files := houseFiles(t)
	for _, name := range []string{"topology.go", "topology_election.go", "topology_identity.go", "topology_timelines.go", "topology_modes.go", "topology_list.go", "peer_lag.go", "topology_lsn.go"} {
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
