#!/bin/sh
# Makes sure that a Debian machine has a proxy that the tests start: pgbouncer or haproxy. Says nothing where it has. Other
# systems skip these tests, and so does MULTIPOOL_REQUIRE_PGBOUNCER=0 or MULTIPOOL_REQUIRE_HAPROXY=0.
#
# Each test starts its own, as a process of the test: no service is wanted, and none is left running.
set -eu

name=$1
require=MULTIPOOL_REQUIRE_$(echo "$name" | tr a-z A-Z)
say() { echo "$name: $*" >&2; }

. "$(dirname "$0")/packages.sh"

# Where internal/pgtest looks (pooler.go).
found() {
	command -v "$name" >/dev/null && return
	for dir in /usr/sbin /usr/local/sbin /usr/local/bin; do
		[ -x "$dir/$name" ] && return
	done
	return 1
}

# The package starts its service unless a policy forbids it (Debian: invoke-rc.d, "policy-rc.d"), and enables it for the
# next start of the machine. A policy that is there already is somebody's own and stays.
with_apt() {
	apt update || say "apt-get update failed; trying with the lists at hand"
	policy=/usr/sbin/policy-rc.d
	if [ ! -e $policy ]; then
		trap '$sudo rm -f $policy' EXIT
		trap 'exit 130' INT TERM
		printf '#!/bin/sh\nexit 101\n' | $sudo tee $policy >/dev/null
		$sudo chmod 755 $policy
	fi
	apt install --no-install-recommends "$name"
	quietly $sudo update-rc.d "$name" disable
}

[ "$(eval echo "\${$require-1}")" != 0 ] || exit 0
! found && command -v apt-get >/dev/null || exit 0
say "not found: installing it with apt-get"
if [ -z "$sudo" ] || command -v sudo >/dev/null; then
	with_apt && found && exit 0
fi
say "could not install it: apt-get install $name, or set $require=0 to skip the tests that need it"
exit 1
