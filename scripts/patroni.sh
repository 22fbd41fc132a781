#!/bin/sh
# Makes sure that this machine has Patroni, and an etcd for it to keep its state in, for examples/patroni. Says nothing
# where it has; otherwise installs them with apt, or says what to install.
#
# The program starts both itself, as throwaway processes: no service is wanted, and none is left running or enabled.
set -eu

packages="patroni etcd-server python3-etcd"

say() { echo "patroni: $*" >&2; }

give_up() {
	say "$*"
	say "Install Patroni with its etcd3 support (https://patroni.readthedocs.io/en/latest/installation.html)"
	say "and an etcd 3.4 or later (https://etcd.io/docs/latest/install/), so that both are in \$PATH."
	exit 1
}

# found: Patroni runs without the library of any one store, so it is asked for etcd's with its own Python.
found() {
	command -v etcd >/dev/null && program=$(command -v patroni) || return 1
	python=$(sed -n '1s/^#! *//p' "$program")
	$python -c 'import etcd' >/dev/null 2>&1
}

. "$(dirname "$0")/packages.sh"

# services: which of the packages' services would start with the machine.
services() {
	for service in patroni etcd; do
		for link in /etc/systemd/system/*.wants/$service.service /etc/rc[2345].d/S[0-9][0-9]$service; do
			[ ! -L "$link" ] || { echo $service; break; }
		done
	done
}

# disable undoes what the packages have enabled, and started if this machine's policy is to, the way an administrator
# would: updates respect it.
disable() {
	[ ! -d /run/systemd/system ] || quietly $sudo systemctl stop "$1.service" || return 1
	! command -v systemctl >/dev/null || quietly $sudo systemctl disable "$1.service" || return 1
	! command -v update-rc.d >/dev/null || quietly $sudo update-rc.d "$1" disable || return 1
}

with_apt() {
	apt update || say "apt-get update failed; trying with the lists at hand"

	# The packages start their services unless this answers that they may not. It goes away afterwards; one that is
	# there already is the administrator's and stays, whatever it answers.
	policy=/usr/sbin/policy-rc.d
	if [ ! -e $policy ] && [ ! -L $policy ]; then
		trap '$sudo rm -f "$policy"' EXIT
		trap 'exit 130' INT TERM
		printf '#!/bin/sh\nexit 101\n' | $sudo tee $policy >/dev/null
		$sudo chmod 755 $policy
	fi
	enabled=$(services)
	apt install --no-install-recommends $packages || return 1
	for service in $(services); do
		case " $(echo $enabled) " in *" $service "*) continue ;; esac
		disable "$service" || say "could not disable the service $service, which the package has enabled"
	done
}

! found || exit 0
command -v apt-get >/dev/null || give_up "no Patroni with etcd found, and no apt-get to install it with"
say "no Patroni with etcd found: installing it with apt-get"
if [ -n "$sudo" ] && ! command -v sudo >/dev/null; then
	give_up "that takes root, and there is no sudo"
fi
with_apt || give_up "apt-get could not install it ($packages)"
found || give_up "what was installed is no Patroni with etcd"
