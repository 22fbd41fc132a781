package main

import (
	"context"

	"github.com/pgmultipool/multipool"
)

func open(ctx context.Context, peers string) (*multipool.MultiPool, error) {
	return multipool.New(ctx, "postgres://postgres@"+peers+"/postgres"+
		"?multipool_mode=equivalent&multipool_check_interval=2s&multipool_retry=reads")
}

func databases(ctx context.Context, peers, userPeers string) (*multipool.Router, error) {
	rest, err := open(ctx, peers)
	if err != nil {
		return nil, err
	}
	users, err := open(ctx, userPeers)
	if err != nil {
		rest.Close()
		return nil, err
	}
	return multipool.NewRouter(rest, map[string]*multipool.MultiPool{"user": users, "login": users})
}

func product(ctx context.Context, db *multipool.Router) (server int, err error) {
	err = db.QueryRow(ctx, "select inet_server_port() from product where id = 7").Scan(&server)
	return server, err
}

func sell(ctx context.Context, db *multipool.Router) (server int, err error) {
	err = db.QueryRow(ctx, "insert into sale (product) values (7) returning inet_server_port()").Scan(&server)
	return server, err
}

func user(ctx context.Context, db *multipool.Router) (server int, err error) {
	ctx = multipool.WithModel(ctx, "user")
	err = db.QueryRow(ctx, "select inet_server_port() from account where id = 7").Scan(&server)
	return server, err
}
