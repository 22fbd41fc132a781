#!/bin/sh
# Fuzzes every Fuzz function of the module, one after another (go test fuzzes one at a time):
#
#	fuzz.sh 30s       for the time given
#	fuzz.sh keep 24   no fuzzing: fills testdata/fuzz of every target up to 24 inputs, of those that runs have found
#
# Runs find inputs that reach new code, and go test keeps them in its build cache. Those in testdata are run by every go test.
set -eu
cd "$(dirname "$0")/.."

# keep copies inputs of one target, evenly from the shortest to the longest, as a target's code is reached by both.
keep() {
	found=$(go env GOCACHE)/fuzz/$1/$2
	kept=$3/testdata/fuzz/$2
	[ -d "$found" ] || return 0
	there=$(ls "$kept" 2>/dev/null | wc -l)
	new=$(ls -rS "$found" | while read -r input; do
		[ -e "$kept/$input" ] || [ "$(wc -c <"$found/$input")" -gt 4096 ] || echo "$input"
	done)
	chosen=$(echo "$new" | awk -v room=$(($4 - there)) 'NF { all[n++] = $0 }
		END { if (room > n) room = n; for (i = 0; i < room; i++) print all[int(i * n / room)] }')
	[ -n "$chosen" ] || return 0
	mkdir -p "$kept"
	for input in $chosen; do cp "$found/$input" "$kept/$input"; done
	echo "$1 $2: $(echo "$chosen" | wc -l) kept"
}

files=$(go list -f '{{$dir := .Dir}}{{$path := .ImportPath}}{{range .TestGoFiles}}{{$path}} {{$dir}}/{{.}}
{{end}}{{range .XTestGoFiles}}{{$path}} {{$dir}}/{{.}}
{{end}}' ./...)

echo "$files" | while read -r package file; do
	[ -n "$package" ] || continue
	for name in $(sed -n 's/^func \(Fuzz[A-Za-z0-9_]*\)(.*/\1/p' "$file"); do
		if [ "${1-}" = keep ]; then
			keep "$package" "$name" "$(dirname "$file")" "${2:-24}"
			continue
		fi
		echo "$package $name"
		# Not from this loop's input: the list of files is there.
		go test -run '^$' -fuzz "^$name\$" -fuzztime "${1:-30s}" "$package" </dev/null
	done
done
