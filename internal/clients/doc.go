// Package clients holds tests of libraries that take a *pgxpool.Pool or a *sql.DB and know nothing of multipool: they
// are given [multipool.MultiPool.Primary], their server is killed under them, and they go on. It is a module of its
// own, so that nobody else gets their dependencies.
package clients

import _ "github.com/pgmultipool/multipool" // whom the tests are of
