#!/bin/sh
# What must hold of the source before anything is run. All checks run, so that one round shows everything.
set -eu
cd "$(dirname "$0")/.."

# Pinned: a new release must not turn an old commit red. Not a dependency in go.mod: users of the package would see it.
staticcheck=honnef.co/go/tools/cmd/staticcheck@v0.8.2

status=0
fail() {
	echo "lint: $*" >&2
	status=1
}

unformatted=$(gofmt -s -l .)
[ -z "$unformatted" ] || fail "not as gofmt -s would have it:
$unformatted"

have_staticcheck=yes
if ! go run $staticcheck -version >/dev/null 2>&1; then
	have_staticcheck=no
	echo "note: without staticcheck, which could not be fetched or built" >&2
fi

for module in $(find . -name go.mod -not -path './.*/*' -exec dirname {} \; | sort); do
	cd "$module"
	go vet ./... || fail "go vet, module $module"
	[ $have_staticcheck = no ] || go run $staticcheck ./... || fail "staticcheck, module $module"
	go mod tidy -diff || fail "go.mod or go.sum of module $module is not tidy: go mod tidy"
	go mod verify >/dev/null || fail "go mod verify, module $module"
	cd - >/dev/null
done
exit $status
