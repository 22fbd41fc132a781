#!/bin/sh
# Runs the tests of the root module, on real servers. With arguments go test runs those that they select.
set -eu
cd "$(dirname "$0")/.."
. scripts/tests.sh

[ $# -gt 0 ] || exec go run ./internal/parts $race
exec go test $race -shuffle=on -timeout 30m -p 1 "$@" ./...
