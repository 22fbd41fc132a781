// Package clients holds tests of libraries that know nothing of multipool. Those that take a *pgxpool.Pool or a *sql.DB are
// given [multipool.MultiPool.PrimaryPool], those that take a *pgx.Conn an acquired one, those that take an interface the
// pool itself; a server is killed under them, and they go on. It is a module of its own, so that nobody else gets their
// dependencies.
package clients

import _ "github.com/pgmultipool/multipool" // whom the tests are of
