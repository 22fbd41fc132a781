package main

import (
	"context"

	"github.com/pgmultipool/multipool"
)

func open(ctx context.Context, servers string) (*multipool.MultiPool, error) {
	config, err := multipool.ParseConfig("postgres://postgres@" + servers + "/postgres")
	if err != nil {
		return nil, err
	}
	return multipool.Open(ctx, multipool.Options{
		Config: config,
		Models: map[string]multipool.Route{"account": {Target: multipool.TargetPrimary}},
	})
}

func product(ctx context.Context, pool *multipool.MultiPool) (server int, err error) {
	err = pool.QueryRow(ctx, "select inet_server_port() from product where id = 7").Scan(&server)
	return server, err
}

func account(ctx context.Context, pool *multipool.MultiPool) (server int, err error) {
	ctx = multipool.WithModel(ctx, "account")
	err = pool.QueryRow(ctx, "select inet_server_port() from account where id = 7").Scan(&server)
	return server, err
}

func sell(ctx context.Context, pool *multipool.MultiPool) (server int, err error) {
	err = pool.QueryRow(ctx, "insert into sale (product) values (7) returning inet_server_port()").Scan(&server)
	return server, err
}
