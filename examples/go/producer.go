//go:build ignore

// Publishes usage events to meterr over NATS, with nothing but the official client.
//
//	go get github.com/nats-io/nats.go@v1.48
//	go run producer.go -nats nats://127.0.0.1:4222 < events.ndjson
//
// The same as producer.py and producer.ts, which the tests run: lines of one org go together, every message
// is sent again under its id until it is acknowledged, and up to 256 are under way at once.
// With -shards N it finds the shard itself, for servers that cannot map subjects. Needs a server.
package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"hash/fnv"
	"log"
	"os"
	"sort"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

const (
	lines              = 100
	size               = 900_000
	window             = 256
	duplicateInProcess = 10158
)

// shardOf is FNV-1a, 32 bit, of the org's bytes, modulo the number of shards.
func shardOf(org string, shards uint32) uint32 {
	hash := fnv.New32a()
	hash.Write([]byte(org))
	return hash.Sum32() % shards
}

type batch struct {
	payload bytes.Buffer
	events  int
}

type producer struct {
	js     jetstream.JetStream
	shards uint32
	run    string

	mutex                                 sync.Mutex
	events, messages, retries, duplicates int
	positions                             map[string]uint64
}

// passes says whether sending it again may help.
func passes(err error) bool {
	var refused *jetstream.APIError
	if errors.As(err, &refused) {
		// Busy, full or without a leader passes. What is wrong with the message stays.
		return refused.Code >= 500 || refused.Code == 429 || refused.ErrorCode == duplicateInProcess
	}
	// No answer, no stream at the moment, no connection: it may be stored or not.
	return !errors.Is(err, nats.ErrMaxPayload) && !errors.Is(err, nats.ErrBadSubject) &&
		!errors.Is(err, nats.ErrPermissionViolation)
}

// deliver sends one message until a stream has it.
func (p *producer) deliver(number int, org string, b *batch) {
	subject := "usage." + org
	if p.shards > 0 {
		subject = fmt.Sprintf("usage.%d.%s", shardOf(org, p.shards), org)
	}
	id := fmt.Sprintf("%s-%d", p.run, number)
	for wait := 50 * time.Millisecond; ; wait = min(2*wait, 2*time.Second) {
		patience, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		ack, err := p.js.Publish(patience, subject, b.payload.Bytes(), jetstream.WithMsgID(id))
		cancel()
		p.mutex.Lock()
		if err == nil {
			shard := strings.TrimPrefix(ack.Stream, "USAGE_")
			p.positions[shard] = max(p.positions[shard], ack.Sequence)
			p.events += b.events
			p.messages++
			if ack.Duplicate {
				p.duplicates++
			}
			p.mutex.Unlock()
			return
		}
		p.retries++
		p.mutex.Unlock()
		if !passes(err) {
			log.Fatal(err)
		}
		time.Sleep(wait)
	}
}

func main() {
	url := flag.String("nats", nats.DefaultURL, "server")
	shards := flag.Uint("shards", 0, "find the shard here instead of in the server")
	flag.Parse()
	connection, err := nats.Connect(*url, nats.MaxReconnects(-1), nats.ReconnectWait(200*time.Millisecond))
	if err != nil {
		log.Fatal(err)
	}
	defer connection.Close()
	js, err := jetstream.New(connection)
	if err != nil {
		log.Fatal(err)
	}
	run := make([]byte, 8)
	if _, err := rand.Read(run); err != nil {
		log.Fatal(err)
	}
	p := &producer{js: js, shards: uint32(*shards), run: hex.EncodeToString(run), positions: map[string]uint64{}}

	var sending sync.WaitGroup
	room := make(chan struct{}, window)
	number := 0
	send := func(org string, b *batch) {
		room <- struct{}{}
		sending.Add(1)
		go func(number int) {
			defer func() { <-room; sending.Done() }()
			p.deliver(number, org, b)
		}(number)
		number++
	}
	waiting := map[string]*batch{}
	input := bufio.NewScanner(os.Stdin)
	input.Buffer(nil, size)
	for input.Scan() {
		line := bytes.TrimSpace(input.Bytes())
		if len(line) == 0 {
			continue
		}
		var event struct {
			Org string `json:"org"`
		}
		if err := json.Unmarshal(line, &event); err != nil {
			log.Fatal(err)
		}
		b := waiting[event.Org]
		if b != nil && b.payload.Len()+len(line)+1 > size {
			send(event.Org, b)
			b = nil
		}
		if b == nil {
			b = &batch{}
			waiting[event.Org] = b
		}
		b.payload.Write(line)
		b.payload.WriteByte('\n')
		if b.events++; b.events == lines {
			delete(waiting, event.Org)
			send(event.Org, b)
		}
	}
	if err := input.Err(); err != nil {
		log.Fatal(err)
	}
	for org, b := range waiting {
		send(org, b)
	}
	sending.Wait()

	var position []string
	for shard, sequence := range p.positions {
		position = append(position, fmt.Sprintf("%s:%d", shard, sequence))
	}
	sort.Strings(position)
	fmt.Printf("%d events in %d messages, %d retries, %d duplicates, position %s\n",
		p.events, p.messages, p.retries, p.duplicates, strings.Join(position, ","))
}
