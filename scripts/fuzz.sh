#!/bin/sh
# Fuzzes every Fuzz function of the module, one after another, for the time given (go test fuzzes one at a time).
set -eu
cd "$(dirname "$0")/.."
time=${1:-30s}

files=$(go list -f '{{$dir := .Dir}}{{$path := .ImportPath}}{{range .TestGoFiles}}{{$path}} {{$dir}}/{{.}}
{{end}}{{range .XTestGoFiles}}{{$path}} {{$dir}}/{{.}}
{{end}}' ./...)

echo "$files" | while read -r package file; do
	[ -n "$package" ] || continue
	for name in $(sed -n 's/^func \(Fuzz[A-Za-z0-9_]*\)(.*/\1/p' "$file"); do
		echo "$package $name"
		# Not from this loop's input: the list of files is there.
		go test -run '^$' -fuzz "^$name\$" -fuzztime "$time" "$package" </dev/null
	done
done
