# What the scripts that install something share; they read it with ".".

# What gives a command the rights that installing takes. Where nobody can type a password sudo must not ask.
sudo=
if [ "$(id -u)" -ne 0 ]; then
	sudo="sudo -n"
	[ ! -t 0 ] || sudo=sudo
fi

# quietly shows what a command has to say only if it fails: package managers say a great deal.
quietly() {
	log=$(mktemp)
	"$@" </dev/null >"$log" 2>&1 && rm -f "$log" && return
	cat "$log" >&2
	rm -f "$log"
	return 1
}

apt() { quietly $sudo env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=120 "$@"; }
