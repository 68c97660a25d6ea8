//go:build ignore

// Follows an org's spend over NATS, with nothing but the official client: no change is missed, none is
// taken twice.
//
//	go get github.com/nats-io/nats.go@v1.48
//	go run subscriber.go -nats nats://127.0.0.1:4222 -org acme
//
// The same as subscriber.py and subscriber.ts, which the tests run: subscribe, ask for a snapshot, drop
// changes that are not newer, ask for what was missed where an epoch lies between, after a reconnection,
// when messages were dropped, and when it has been quiet for ten seconds. Needs a server.
package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"log"
	"time"

	"github.com/nats-io/nats.go"
)

const (
	quiet   = 10 * time.Second
	answer  = 5 * time.Second
	waiting = 10_000
)

type liveMessage struct {
	Kind     string
	Shard    int
	Epoch    uint64
	Previous uint64
	Piece    int
	Pieces   int
	More     bool
	// [window_start, key, events, cost, ...]: totals, not differences.
	Views map[string][][]json.RawMessage
}

type figures struct {
	Events int64
	Cost   *string
}

// follower holds what is known, and the rule.
type follower struct {
	known  bool
	epoch  uint64
	shard  int
	rows   map[string]figures
	pieces []liveMessage
}

const orgAll = `org_all null null`

// take says "applied", "more", "dropped" or "missed".
func (f *follower) take(m liveMessage) string {
	switch m.Kind {
	case "current":
		return "applied"
	case "change":
		if !f.known || m.Previous > f.epoch {
			return "missed"
		}
		if m.Epoch <= f.epoch {
			return "dropped"
		}
	}
	// A large message comes in pieces, one after the other.
	if m.Piece == 0 {
		f.pieces = nil
	}
	if m.Piece != len(f.pieces) || m.Piece > 0 && (f.pieces[0].Kind != m.Kind || f.pieces[0].Epoch != m.Epoch) {
		return "missed"
	}
	f.pieces = append(f.pieces, m)
	if len(f.pieces) < m.Pieces {
		return "more"
	}
	if m.Kind == "snapshot" {
		f.rows = map[string]figures{}
	}
	for _, piece := range f.pieces {
		for view, rows := range piece.Views {
			for _, row := range rows {
				if len(row) < 4 {
					log.Fatalf("a row of %d items", len(row))
				}
				name := fmt.Sprintf("%s %s %s", view, row[0], row[1])
				var of figures
				if json.Unmarshal(row[2], &of.Events) != nil || json.Unmarshal(row[3], &of.Cost) != nil {
					log.Fatalf("a row that is none: %s", row)
				}
				f.rows[name] = of
				if of.Events == 0 {
					delete(f.rows, name)
				}
			}
		}
	}
	f.pieces = nil
	f.known, f.epoch, f.shard = true, m.Epoch, m.Shard
	return "applied"
}

func (f *follower) show(kind string) {
	of := f.rows[orgAll]
	line, _ := json.Marshal(map[string]any{"kind": kind, "epoch": f.epoch, "events": of.Events, "cost": of.Cost})
	fmt.Println(string(line))
}

// ask takes one whole answer; false when there was none.
func ask(connection *nats.Conn, org string, f *follower) bool {
	var request []byte
	if f.known {
		request = fmt.Appendf(nil, `{"after":"%d-%d"}`, f.shard, f.epoch)
	}
	inbox := connection.NewRespInbox()
	replies, err := connection.SubscribeSync(inbox)
	if err != nil {
		return false
	}
	defer replies.Unsubscribe()
	if connection.PublishRequest("meterr.query."+org, inbox, request) != nil {
		return false
	}
	for {
		// No answer, or nobody there.
		reply, err := replies.NextMsg(answer)
		if err != nil || reply.Header.Get("Nats-Service-Error") != "" {
			return false
		}
		var m liveMessage
		if json.Unmarshal(reply.Data, &m) != nil {
			return false
		}
		taken := f.take(m)
		if taken == "missed" {
			return false
		}
		if taken == "applied" && m.Kind != "current" {
			f.show(m.Kind)
		}
		if !m.More {
			return true
		}
	}
}

func main() {
	url := flag.String("nats", nats.DefaultURL, "server")
	org := flag.String("org", "", "org to follow")
	flag.Parse()
	// Messages were dropped, or sent while there was no connection.
	missed := make(chan struct{}, 1)
	miss := func() {
		select {
		case missed <- struct{}{}:
		default:
		}
	}
	connection, err := nats.Connect(*url, nats.MaxReconnects(-1), nats.ReconnectWait(200*time.Millisecond),
		nats.ReconnectHandler(func(*nats.Conn) { miss() }),
		nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) { log.Print(err); miss() }))
	if err != nil {
		log.Fatal(err)
	}
	changes := make(chan *nats.Msg, waiting)
	if _, err := connection.ChanSubscribe("spend."+*org, changes); err != nil {
		log.Fatal(err)
	}
	// The subscription stands before the question is asked.
	if err := connection.Flush(); err != nil {
		log.Fatal(err)
	}
	f := &follower{rows: map[string]figures{}}
	miss()
	for {
		select {
		case <-missed:
			if !ask(connection, *org, f) {
				time.Sleep(200 * time.Millisecond)
				miss()
			}
		case change := <-changes:
			var m liveMessage
			if err := json.Unmarshal(change.Data, &m); err != nil {
				log.Fatal(err)
			}
			switch f.take(m) {
			case "missed":
				miss()
			case "applied":
				f.show("change")
			}
		case <-time.After(quiet):
			miss()
		}
	}
}
