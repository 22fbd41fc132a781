// Package surface renders what a package exports as text, one declaration after another without comments, so that a change of
// the surface shows in a diff. docs/api.txt is the root's, kept by "make api" and compared by this package's test.
package surface

import (
	"bytes"
	"fmt"
	"go/ast"
	"go/build"
	"go/parser"
	"go/printer"
	"go/token"
	"maps"
	"path/filepath"
	"slices"
	"strings"
)

// Of returns the surface of the package in a folder: constants, variables, types with their exported fields and methods,
// functions, sorted by name. Test files and those of other platforms are left out.
func Of(dir string) (string, error) {
	pkg, err := build.ImportDir(dir, 0)
	if err != nil {
		return "", err
	}
	fset := token.NewFileSet()
	blocks := map[string]string{} // by a key that sorts
	for _, name := range pkg.GoFiles {
		file, err := parser.ParseFile(fset, filepath.Join(dir, name), nil, parser.SkipObjectResolution)
		if err != nil {
			return "", err
		}
		if !ast.FileExports(file) {
			continue
		}
		for _, d := range file.Decls {
			if err := add(blocks, fset, d); err != nil {
				return "", err
			}
		}
	}
	var out strings.Builder
	for _, key := range slices.Sorted(maps.Keys(blocks)) {
		fmt.Fprintf(&out, "%s\n\n", blocks[key])
	}
	return strings.TrimSuffix(out.String(), "\n"), nil
}

// add renders one declaration. A group of constants stays together, as iota and a type that is left out refer to what
// stands before; of other groups every one is on its own.
func add(blocks map[string]string, fset *token.FileSet, d ast.Decl) error {
	switch d := d.(type) {
	case *ast.FuncDecl:
		d.Body, d.Doc = nil, nil
		key := "4 " + d.Name.Name
		if d.Recv != nil {
			on := receiver(d.Recv.List[0].Type)
			if !ast.IsExported(on) {
				return nil // no program can name it
			}
			key = "3 " + on + " method " + d.Name.Name
		}
		return put(blocks, key, fset, d)
	case *ast.GenDecl:
		if d.Tok == token.IMPORT {
			return nil
		}
		d.Doc = nil
		if d.Tok == token.CONST {
			return put(blocks, "1 "+d.Specs[0].(*ast.ValueSpec).Names[0].Name, fset, d)
		}
		for _, s := range d.Specs {
			key := ""
			switch s := s.(type) {
			case *ast.TypeSpec:
				key = "3 " + s.Name.Name
			case *ast.ValueSpec:
				key = "2 " + s.Names[0].Name
			}
			if err := put(blocks, key, fset, &ast.GenDecl{Tok: d.Tok, TokPos: s.Pos(), Specs: []ast.Spec{s}}); err != nil {
				return err
			}
		}
	}
	return nil
}

func put(blocks map[string]string, key string, fset *token.FileSet, d ast.Decl) error {
	if _, twice := blocks[key]; twice {
		return fmt.Errorf("declared twice: %s", key)
	}
	ast.Inspect(d, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.Field:
			n.Doc, n.Comment = nil, nil
		case *ast.ValueSpec:
			n.Doc, n.Comment = nil, nil
		case *ast.TypeSpec:
			n.Doc, n.Comment = nil, nil
		case *ast.StructType:
			n.Incomplete = false // the printer says of it that fields were left out
		}
		return true
	})
	var b bytes.Buffer
	// A file set of its own has no lines, so that what stands between declarations in the source leaves no gap here.
	if err := (&printer.Config{Mode: printer.UseSpaces | printer.TabIndent, Tabwidth: 8}).Fprint(&b, token.NewFileSet(), d); err != nil {
		return err
	}
	blocks[key] = b.String()
	return nil
}

func receiver(t ast.Expr) string {
	switch t := t.(type) {
	case *ast.StarExpr:
		return receiver(t.X)
	case *ast.IndexExpr:
		return receiver(t.X)
	case *ast.Ident:
		return t.Name
	}
	return "?"
}
