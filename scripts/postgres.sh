#!/bin/sh
# Makes sure that this machine has the server programs of a PostgreSQL that the tests and the demonstration can start.
# Says nothing where it has; otherwise installs them with the system's package manager, or says what to install.
#
# The servers are started as throwaway clusters by internal/pgtest: no service is wanted, and none is left running.
set -eu

oldest=14

say() { echo "postgres: $*" >&2; }

give_up() {
	say "$*"
	say "Install the server programs (initdb, postgres) of PostgreSQL $oldest or later, from"
	say "https://www.postgresql.org/download/ for instance, or set MULTIPOOL_PG_BIN to the folder that holds them."
	exit 1
}

# usable: does the folder hold a PostgreSQL that is new enough?
usable() {
	[ -n "$1" ] && [ -e "$1/initdb" ] || return 1
	major=$("$1/postgres" --version 2>/dev/null | sed -n 's/.*(PostgreSQL) \([0-9]*\).*/\1/p')
	[ "${major:-0}" -ge "$oldest" ]
}

# The folder of a program in $PATH, behind symbolic links. Not readlink -f: macOS has it since version 12.3 only.
folder_of() {
	at=$(command -v "$1") || return 0
	while [ -L "$at" ]; do
		to=$(readlink "$at")
		case $to in /*) at=$to ;; *) at=$(dirname "$at")/$to ;; esac
	done
	(cd "$(dirname "$at")" && pwd -P)
}

# found looks where internal/pgtest looks (binaries.go), so that what is found here is found there.
found() {
	if [ -n "${MULTIPOOL_PG_BIN-}" ]; then
		usable "$MULTIPOOL_PG_BIN"
		return
	fi
	usable "$(folder_of initdb)" && return
	usable "$(pg_config --bindir 2>/dev/null || :)" && return
	for dir in \
		/usr/lib/postgresql/*/bin /usr/lib/postgresql*/bin /usr/lib64/postgresql*/bin /usr/pgsql-*/bin \
		/usr/libexec/postgresql* /usr/local/pgsql/bin \
		/opt/homebrew/opt/postgresql*/bin /usr/local/opt/postgresql*/bin /opt/local/lib/postgresql*/bin \
		/Applications/Postgres.app/*/*/*/bin /home/linuxbrew/.linuxbrew/opt/p*/bin; do
		usable "$dir" && return
	done
	return 1
}

. "$(dirname "$0")/packages.sh"

with_apt() {
	apt update || say "apt-get update failed; trying with the lists at hand"
	candidate=$(apt-cache policy postgresql | sed -n 's/^ *Candidate: \([0-9]*\).*/\1/p')
	[ "${candidate:-0}" -ge "$oldest" ] ||
		give_up "this system's own PostgreSQL is ${candidate:-missing}; see https://wiki.postgresql.org/wiki/Apt"

	# The package makes and starts a cluster on port 5432 unless told not to. The drop-in goes away afterwards: whoever
	# installs PostgreSQL on this machine later for another purpose gets what the documentation says.
	dropin=/etc/postgresql-common/createcluster.d/multipool-no-cluster.conf
	trap '$sudo rm -f "$dropin"' EXIT
	trap 'exit 130' INT TERM
	$sudo mkdir -p "${dropin%/*}"
	echo "create_main_cluster = false" | $sudo tee "$dropin" >/dev/null
	apt install --no-install-recommends postgresql
}

found && exit 0
[ -z "${MULTIPOOL_PG_BIN-}" ] || give_up "MULTIPOOL_PG_BIN=$MULTIPOOL_PG_BIN holds no PostgreSQL $oldest or later"

for manager in apt-get dnf apk brew none; do
	! command -v $manager >/dev/null || break
done
[ $manager != none ] || give_up "no PostgreSQL $oldest or later found, and no package manager that this script knows"
say "no PostgreSQL $oldest or later found: installing it with $manager"
if [ $manager != brew ] && [ -n "$sudo" ] && ! command -v sudo >/dev/null; then
	give_up "that takes root, and there is no sudo"
fi
case $manager in
apt-get) with_apt ;;
dnf) quietly $sudo dnf -qy install postgresql-server ;;
apk) quietly $sudo apk add --quiet --no-cache postgresql ;;
brew) quietly brew install --quiet postgresql@17 ;;
esac || give_up "$manager could not install it"
found || give_up "what was installed is not PostgreSQL $oldest or later"
