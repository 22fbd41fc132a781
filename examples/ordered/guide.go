package main

import (
	"context"

	"github.com/pgmultipool/multipool"
)

func open(ctx context.Context, servers string) (*multipool.MultiPool, error) {
	return multipool.New(ctx, "postgres://postgres@"+servers+"/postgres"+
		"?multipool_mode=ordered&multipool_return_after=3s&multipool_retry=reads")
}

func read(ctx context.Context, pool *multipool.MultiPool) (server int, err error) {
	err = pool.QueryRow(ctx, "select inet_server_port() from product where id = 7").Scan(&server)
	return server, err
}

func write(ctx context.Context, pool *multipool.MultiPool) (server int, err error) {
	err = pool.QueryRow(ctx, "insert into sale (product) values (7) returning inet_server_port()").Scan(&server)
	return server, err
}
