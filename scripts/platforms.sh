#!/bin/sh
# Whether the package, its tests and its programs build for the systems that nobody here runs: go vet of the whole module.
set -eu
cd "$(dirname "$0")/.."

status=0
for platform in windows/amd64 darwin/arm64 freebsd/amd64 linux/386 linux/arm; do
	CGO_ENABLED=0 GOOS=${platform%/*} GOARCH=${platform#*/} go vet ./... || {
		echo "go vet, $platform" >&2
		status=1
	}
done
exit $status
