#!/bin/sh
# Runs the tests of the nested modules, and those of the root that pgx 5.12 may answer otherwise. Arguments go to go test.
set -eu
cd "$(dirname "$0")/.."
. scripts/tests.sh

status=0
for module in $(find . -mindepth 2 -name go.mod -not -path './.*/*' -exec dirname {} \; | sort); do
	echo "module $module:"
	(cd "$module" && go test $race -shuffle=on -timeout 20m -p 1 "$@" ./...) || status=1
done

# What pgx 5.12 does otherwise than the release that go.mod requires: a program may still have it, by a replace.
if [ $# -eq 0 ]; then
	echo "pgx 5.12:"
	go test -modfile=internal/compat/pgx512.mod -timeout 5m -run "Certificate|Classif|FieldOf" . ./internal/pgfault || status=1
fi
exit $status
