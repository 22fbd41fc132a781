#!/bin/sh
# Runs the tests of all modules, on real servers. Arguments go to go test.
set -eu
cd "$(dirname "$0")/.."

# The race detector needs cgo and a C compiler that works, and not every platform has it. A trivial package tells; what
# it builds is needed for the tests anyway.
race=-race
if ! go test -race -run '^$' errors >/dev/null 2>&1; then
	race=
	echo "note: without the race detector, which needs a C compiler here (Debian, Ubuntu: gcc libc6-dev)" >&2
fi

# Half of the cores run test binaries: the servers that these start need the other half, and tests that measure time
# must not starve each other. What is built is built on all cores first, as -p limits that too.
cores=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
at_once=$(((cores + 1) / 2))

# Elsewhere a machine without PostgreSQL skips the tests that need it. Here that would be a green light for nothing.
export MULTIPOOL_REQUIRE_POSTGRES=1

# The same for proxies, where scripts/proxy.sh installs them.
if command -v apt-get >/dev/null; then
	export MULTIPOOL_REQUIRE_PGBOUNCER="${MULTIPOOL_REQUIRE_PGBOUNCER-1}"
	export MULTIPOOL_REQUIRE_HAPROXY="${MULTIPOOL_REQUIRE_HAPROXY-1}"
fi

status=0
for module in $(find . -name go.mod -not -path './.*/*' -exec dirname {} \; | sort); do
	[ "$module" = . ] || echo "module $module:"
	(
		cd "$module"
		go build $race -o /dev/null ./... && go test $race -shuffle=on -timeout 30m -p "$at_once" "$@" ./...
	) || status=1
done

# What pgx 5.12 does otherwise than the release that go.mod requires: a program may still have it, by a replace.
if [ $# -eq 0 ]; then
	go test -modfile=internal/compat/pgx512.mod -timeout 5m -run "Certificate|Classif|FieldOf" . || status=1
fi
exit $status
