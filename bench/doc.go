// Package bench compares package multipool with bare pgxpool. It holds benchmarks and tests only:
//
//	go test -bench . -run '^$' ./bench                                  # everything
//	MULTIPOOL_BENCH_CHECK=1 go test -count=1 -v -run TestCheck ./bench  # what the documentation promises, as a table
//
// Two programs on one machine cannot be told apart to a percent by running one after the other, and neither can two
// pools: the clock of the processor changes, neighbours come and go, and a pool is faster or slower by where its
// memory or its server's processes happen to lie. So the sides take turns of less than a millisecond, in random order;
// what is reported is the median of their differences within a turn; and pgxpool takes part twice. The difference of
// pgxpool to itself (control) is what the method cannot resolve.
package bench
