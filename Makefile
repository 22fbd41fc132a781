# Needs Go and nothing else: a missing PostgreSQL is installed by the first target that starts servers.

# How long each target of "make fuzz" is fuzzed.
FUZZTIME ?= 30s
# How many inputs of each target "make fuzz-keep" keeps.
KEEP ?= 24
# For the program or tool that a target runs, as in: make demo ARGS="-readers 10", make test ARGS="-run Failover -v".
ARGS ?=

help:
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' Makefile

demo: postgres ## watch servers die, hang, stop and come back under load, on a real cluster (40 s)
	@go run ./examples/failover $(ARGS)

patroni: postgres ## watch writers follow a Patroni cluster through a switchover and the death of its leader (a minute)
	@sh scripts/patroni.sh
	@go run ./examples/patroni $(ARGS)

guides: postgres ## run the programs of docs/guides, for those who come from Django (half a minute)
	@for name in ordered replica anywhere equals; do echo "$$name:" && go run ./examples/$$name $(ARGS) || exit 1; done

test: postgres pgbouncer haproxy ## the tests of the root module, with the race detector, on real servers (8 minutes at most)
	@sh scripts/test.sh $(ARGS)

test-all: export MULTIPOOL_RIVER = 1
test-all: test test-modules test-servers test-platforms guides test-versions ## everything but Patroni, the soak and fuzzing (two hours)

test-modules: postgres ## the tests of the nested modules, of libraries on the pool among them, and those on pgx 5.12
	@sh scripts/modules.sh $(ARGS)

test-servers: postgres ## the tests that touch a server most, on PostgreSQL 14 and 18 where they can be fetched
	@sh scripts/servers.sh $(ARGS)

test-versions: postgres ## the tests on PostgreSQL 14 to 18, two versions of pgx and of Go; writes docs/versions.md (an hour)
	@go run ./internal/versions $(ARGS)

test-platforms: ## does everything build for Windows, macOS, FreeBSD and 32 bits (go vet)
	@sh scripts/platforms.sh

soak: postgres ## random faults of servers and of the network under every kind of call, for ten minutes (MULTIPOOL_SOAK=1h)
	MULTIPOOL_SOAK="$${MULTIPOOL_SOAK:-10m}" MULTIPOOL_REQUIRE_POSTGRES=1 go test -count=1 -v -timeout 0 -run 'TestSoak$$' $(ARGS) .

api: ## docs/api.txt, the text of the exported surface, which a test compares
	@go test -count=1 ./internal/surface -args -write

lint: ## formatting, go vet, staticcheck, go.mod
	@sh scripts/lint.sh

bench: postgres ## all benchmarks
	go test -bench . -run '^$$' $(ARGS) ./bench

bench-check: postgres ## measure what the documentation promises, and fail where it does not hold
	MULTIPOOL_BENCH_CHECK=1 go test -count=1 -v -run TestCheck $(ARGS) ./bench
	MULTIPOOL_BENCH_CHECK=1 go test -count=1 -v -run 'TestAPromotionAfterAKill|TestASwitchover' .

fuzz: ## every fuzz target for FUZZTIME (30s) each
	@sh scripts/fuzz.sh $(FUZZTIME)

fuzz-keep: ## keep inputs that "make fuzz" has found in testdata/fuzz, up to KEEP (24) of each target: go test runs them
	@sh scripts/fuzz.sh keep $(KEEP)

postgres:
	@sh scripts/postgres.sh

pgbouncer haproxy:
	@sh scripts/proxy.sh $@

.PHONY: help demo patroni guides test test-all test-modules test-servers test-versions test-platforms soak api lint bench bench-check fuzz fuzz-keep postgres pgbouncer haproxy
