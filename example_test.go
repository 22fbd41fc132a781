package multipool_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"log/slog"
	"math/rand/v2"
	"time"

	"github.com/pgmultipool/multipool"
)

func Example() {
	ctx := context.Background()
	pool, err := multipool.New(ctx, "postgres://postgres@127.0.0.1:5432,127.0.0.1:5433/postgres")
	if err != nil {
		log.Fatal(err)
	}
	defer pool.Close()

	if _, err := pool.Exec(ctx, "create table if not exists greeting (text text)"); err != nil {
		log.Fatal(err) // on the primary
	}
	var now string
	if err := pool.QueryRow(ctx, "select now()::text").Scan(&now); err != nil {
		log.Fatal(err) // on a replica
	}
	next, err := pool.Explain(ctx, "select 1")
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(now, next.Peer, next.Reason)
	for _, peer := range pool.Status().Peers {
		fmt.Println(peer.Name, peer.Role, peer.Breaker, peer.Reads, peer.Writes)
	}
}

func ExampleOpen() {
	ctx := context.Background()
	config, err := multipool.ParseConfig("postgres://app@db1,db2,db3/app?pool_max_conns=20")
	if err != nil {
		log.Fatal(err)
	}
	pool, err := multipool.Open(ctx, multipool.Options{
		Config: config,
		Models: map[string]multipool.Route{
			"reports":  {Peers: []string{"db3:5432"}},
			"payments": {Target: multipool.TargetPrimary},
			"any":      {Target: multipool.TargetAny}, // reads on the primary too
		},
		Hooks: multipool.SlogHooks(slog.Default()),
	})
	if err != nil {
		log.Fatal(err)
	}
	defer pool.Close()

	var total int
	err = pool.QueryRow(multipool.WithModel(ctx, "reports"), "select count(*) from orders").Scan(&total)
	fmt.Println(total, err)
}

func ExampleMultiPool_Exec() {
	var pool *multipool.MultiPool // of New or Open
	ctx := context.Background()

	_, err := pool.Exec(ctx, "update account set balance = balance - 10 where id = $1", 7)
	switch {
	case errors.Is(err, multipool.ErrOutcomeUnknown):
		// It may have been done: look before doing it again.
	case errors.Is(err, multipool.ErrNoPrimary):
		// It has certainly not been done.
	}
}

func ExampleWithPrimary() {
	var pool *multipool.MultiPool // of New or Open
	ctx := context.Background()

	// What must see a write just made reads where it was made.
	var balance int
	_ = pool.QueryRow(multipool.WithPrimary(ctx), "select balance from account where id = $1", 7).Scan(&balance)
}

// lowestLatency reads where reads have been quickest, whatever the weights.
type lowestLatency struct{}

func (lowestLatency) Pick(c multipool.Candidates) int {
	best := -1 // until something is known the default chooses
	for i := range c.Len() {
		if !c.Usable(i) || c.Latency(i) == 0 {
			continue
		}
		if best < 0 || c.Latency(i) < c.Latency(best) {
			best = i
		}
	}
	if best >= 0 && rand.IntN(20) == 0 {
		return -1 // and now and then, or the others would never be measured again
	}
	return best
}

func ExampleNewCandidates() {
	c := multipool.NewCandidates(true,
		multipool.CandidatePeer{Name: "north", Latency: 5 * time.Millisecond},
		multipool.CandidatePeer{Name: "south", Latency: time.Millisecond, Tried: true},
		multipool.CandidatePeer{Name: "west", Latency: 3 * time.Millisecond, Full: true},
	)
	for i := range c.Len() {
		fmt.Println(c.Name(i), c.Usable(i), c.Ready(i))
	}
	fmt.Println(c.Name(multipool.RoundRobin().Pick(c)))
	// Output:
	// north true true
	// south false false
	// west true false
	// north
}

func ExampleBalancer() {
	config, err := multipool.ParseConfig("postgres://app@db1,db2,db3/app")
	if err != nil {
		log.Fatal(err)
	}
	pool, err := multipool.Open(context.Background(), multipool.Options{Config: config, Balancer: lowestLatency{}})
	if err != nil {
		log.Fatal(err)
	}
	defer pool.Close()
	next, err := pool.Explain(context.Background(), "select 1") // asks it, as a query would
	fmt.Println(next.Peer, err)
}

func ExampleConfig_zone() {
	config, err := multipool.ParseConfig("postgres://app@db1/app?multipool_zone=north") // as this program's machine says
	if err != nil {
		log.Fatal(err)
	}
	pool, err := multipool.Open(context.Background(), multipool.Options{
		Config: config,
		Peers: []multipool.Peer{
			{Host: "db1", Zone: "north"},
			{Host: "db2", Zone: "north", Weight: 2}, // twice the machine, twice the reads
			{Host: "db3", Zone: "south"},            // read when the others cannot
			{Host: "backup", LastResort: true},      // ... and this one when not even the primary can
		},
	})
	if err != nil {
		log.Fatal(err)
	}
	defer pool.Close()
	for _, peer := range pool.Status().Peers {
		fmt.Println(peer.Name, peer.Zone, peer.Weight, peer.LastResort)
	}
	// Output:
	// db1:5432 north 1 false
	// db2:5432 north 2 false
	// db3:5432 south 1 false
	// backup:5432  1 true
}
