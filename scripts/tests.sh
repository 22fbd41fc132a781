# What the scripts that run tests share; they read it with ".".

# The race detector needs cgo and a C compiler that works, and not every platform has it. A trivial package tells; what
# it builds is needed for the tests anyway.
race=-race
if ! go test -race -run '^$' errors >/dev/null 2>&1; then
	race=
	echo "note: without the race detector, which needs a C compiler here (Debian, Ubuntu: gcc libc6-dev)" >&2
fi

# Elsewhere a machine without PostgreSQL skips the tests that need it. Here that would be a green light for nothing.
export MULTIPOOL_REQUIRE_POSTGRES=1

# The same for proxies, where scripts/proxy.sh installs them.
if command -v apt-get >/dev/null; then
	export MULTIPOOL_REQUIRE_PGBOUNCER="${MULTIPOOL_REQUIRE_PGBOUNCER-1}"
	export MULTIPOOL_REQUIRE_HAPROXY="${MULTIPOOL_REQUIRE_HAPROXY-1}"
fi
