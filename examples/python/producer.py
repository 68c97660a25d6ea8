"""Publishes usage events to meterr over NATS, with nothing but nats-py.

    pip install -r requirements.txt
    python producer.py --nats nats://127.0.0.1:4222 < events.ndjson

Reads one JSON event a line. Lines of one org go together, up to 100 a message, since that is twenty times
as fast as one by one. Every message has an id and is sent again under the same id until it is acknowledged,
so nothing is lost and nothing is stored twice; up to 256 messages are under way at once. The last line
printed says where the events stand: meterr's queries wait for that position (`min_position`).

The server maps `usage.<org>` to `usage.<shard>.<org>`. Where it cannot (a hosted server), --shards N makes
this program find the shard itself. --check FILE compares that with test vectors.

Needs a server. Which events were refused is only known to meterr: see its dead letters.
"""

import argparse
import asyncio
import json
import secrets
import sys

import nats
from nats.errors import Error as NatsError, MaxPayloadError
from nats.js.errors import APIError

LINES = 100
BYTES = 900_000
WINDOW = 256
DUPLICATE_IN_PROCESS = 10158


def fnv1a32(text):
    """FNV-1a, 32 bit, of the UTF-8 bytes."""
    value = 0x811C9DC5
    for byte in text.encode():
        value = ((value ^ byte) * 0x01000193) & 0xFFFFFFFF
    return value


def shard_of(org, shards):
    return fnv1a32(org) % shards


def batches(lines):
    """(org, payload, number of events), as soon as a batch is full."""
    waiting = {}
    for line in lines:
        line = line.strip()
        if not line:
            continue
        org = json.loads(line)["org"]
        batch = waiting.setdefault(org, [])
        if batch and sum(map(len, batch)) + len(batch) + len(line) > BYTES:
            yield org, b"\n".join(batch), len(batch)
            batch = waiting[org] = []
        batch.append(line)
        if len(batch) == LINES:
            yield org, b"\n".join(waiting.pop(org)), LINES
    for org, batch in waiting.items():
        if batch:
            yield org, b"\n".join(batch), len(batch)


class Producer:
    def __init__(self, connection, shards):
        self.jetstream = connection.jetstream()
        self.shards = shards
        self.run = secrets.token_hex(8)
        self.counts = dict(events=0, messages=0, retries=0, duplicates=0)
        self.positions = {}

    async def deliver(self, number, org, payload, events):
        """Sends one message until a stream has it."""
        subject = f"usage.{org}" if self.shards is None else f"usage.{shard_of(org, self.shards)}.{org}"
        headers = {"Nats-Msg-Id": f"{self.run}-{number}"}
        wait = 0.05
        while True:
            try:
                ack = await self.jetstream.publish(subject, payload, timeout=5, headers=headers)
                break
            except MaxPayloadError:
                raise
            except APIError as error:
                # Busy, full or without a leader passes. What is wrong with the message stays.
                if error.code < 500 and error.code != 429 and error.err_code != DUPLICATE_IN_PROCESS:
                    raise
            except (NatsError, asyncio.TimeoutError):
                pass  # No answer, no stream at the moment, no connection: it may be stored or not.
            self.counts["retries"] += 1
            await asyncio.sleep(wait)
            wait = min(2 * wait, 2.0)
        shard = int(ack.stream.removeprefix("USAGE_"))
        self.positions[shard] = max(ack.seq, self.positions.get(shard, 0))
        self.counts["events"] += events
        self.counts["messages"] += 1
        self.counts["duplicates"] += bool(ack.duplicate)

    async def publish(self, lines):
        under_way, number = set(), 0
        source = batches(lines)
        # Reading waits on a thread of its own, so that answers are heard meanwhile.
        while (batch := await asyncio.to_thread(next, source, None)) is not None:
            if len(under_way) >= WINDOW:
                done, under_way = await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
            under_way.add(asyncio.create_task(self.deliver(number, *batch)))
            number += 1
        await asyncio.gather(*under_way)
        position = ",".join(f"{shard}:{seq}" for shard, seq in sorted(self.positions.items()))
        return {**self.counts, "position": position}


async def told(error):
    """What the server says without being asked, such as a permission that lacks."""
    print(f"nats: {error}", file=sys.stderr)


async def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--nats", default="nats://127.0.0.1:4222")
    parser.add_argument("--shards", type=int, help="find the shard here instead of in the server")
    parser.add_argument("--check", metavar="FILE", help="compare the hash with test vectors, then stop")
    options = parser.parse_args()
    if options.check:
        with open(options.check) as file:
            vectors = json.load(file)["vectors"]
        for vector in vectors:
            org = vector["org"]
            assert fnv1a32(org) == vector["fnv1a32"], org
            for shards in (16, 64, 256):
                assert shard_of(org, shards) == vector[f"shard_of_{shards}"], org
        print(json.dumps({"vectors": len(vectors)}))
        return
    connection = await nats.connect(
        options.nats, max_reconnect_attempts=-1, reconnect_time_wait=0.2, error_cb=told
    )
    producer = Producer(connection, options.shards)
    print(json.dumps(await producer.publish(sys.stdin.buffer)))
    await connection.close()


asyncio.run(main())
