// Publishes usage events to meterr over NATS, with nothing but the official client.
//
//     npm ci
//     node producer.ts --nats nats://127.0.0.1:4222 < events.ndjson
//
// Reads one JSON event a line. Lines of one org go together, up to 100 a message, since that is twenty
// times as fast as one by one. Every message has an id and is sent again under the same id until it is
// acknowledged, so nothing is lost and nothing is stored twice; up to 256 messages are under way at once.
// The last line printed says where the events stand: meterr's queries wait for that position
// (`min_position`).
//
// The server maps `usage.<org>` to `usage.<shard>.<org>`. Where it cannot (a hosted server), --shards N
// makes this program find the shard itself. --check FILE compares that with test vectors.
//
// Needs a server, and Node.js 22.18 or newer, which runs TypeScript as it is.

import { randomBytes } from "node:crypto";
import { readFileSync } from "node:fs";
import { createInterface } from "node:readline";
import { parseArgs } from "node:util";
import { jetstream, JetStreamApiError, type JetStreamClient, type PubAck } from "@nats-io/jetstream";
import { connect } from "@nats-io/transport-node";

const LINES = 100;
const BYTES = 900_000;
const WINDOW = 256;
const DUPLICATE_IN_PROCESS = 10158;

/** FNV-1a, 32 bit, of the UTF-8 bytes. */
export function fnv1a32(text: string): number {
  let value = 0x811c9dc5;
  for (const byte of new TextEncoder().encode(text)) {
    value = Math.imul(value ^ byte, 0x01000193) >>> 0;
  }
  return value;
}

export function shardOf(org: string, shards: number): number {
  return fnv1a32(org) % shards;
}

interface Batch {
  org: string;
  lines: string[];
  bytes: number;
}

/** Batches, as soon as they are full. */
async function* batches(lines: AsyncIterable<string>): AsyncGenerator<Batch> {
  const waiting = new Map<string, Batch>();
  for await (const line of lines) {
    if (line.trim() === "") continue;
    const org: string = JSON.parse(line).org;
    const bytes = Buffer.byteLength(line) + 1;
    let batch = waiting.get(org);
    if (batch && batch.bytes + bytes > BYTES) {
      yield batch;
      batch = undefined;
    }
    if (!batch) waiting.set(org, (batch = { org, lines: [], bytes: 0 }));
    batch.lines.push(line);
    batch.bytes += bytes;
    if (batch.lines.length === LINES) {
      waiting.delete(org);
      yield batch;
    }
  }
  yield* waiting.values();
}

const sleep = (ms: number) => new Promise((resolve) => setTimeout(resolve, ms));

/** Whether sending it again may help. */
function passes(error: unknown): boolean {
  if (error instanceof JetStreamApiError) {
    // Busy, full or without a leader passes. What is wrong with the message stays.
    return error.status >= 500 || error.status === 429 || error.code === DUPLICATE_IN_PROCESS;
  }
  const name = (error as Error).name;
  // No answer, no stream at the moment, no connection: it may be stored or not.
  return !["InvalidArgumentError", "InvalidSubjectError", "PermissionViolationError"].includes(name);
}

class Producer {
  counts = { events: 0, messages: 0, retries: 0, duplicates: 0 };
  positions = new Map<number, number>();
  run = randomBytes(8).toString("hex");
  client: JetStreamClient;
  shards: number | undefined;

  constructor(client: JetStreamClient, shards: number | undefined) {
    this.client = client;
    this.shards = shards;
  }

  /** Sends one message until a stream has it. */
  async deliver(number: number, batch: Batch): Promise<void> {
    const { org, lines } = batch;
    const subject = this.shards === undefined ? `usage.${org}` : `usage.${shardOf(org, this.shards)}.${org}`;
    const payload = lines.join("\n");
    let ack: PubAck;
    for (let wait = 50; ; wait = Math.min(2 * wait, 2_000)) {
      try {
        ack = await this.client.publish(subject, payload, { msgID: `${this.run}-${number}`, timeout: 5_000, retries: 0 });
        break;
      } catch (error) {
        if (!passes(error)) throw error;
      }
      this.counts.retries += 1;
      await sleep(wait);
    }
    const shard = Number(ack.stream.replace("USAGE_", ""));
    this.positions.set(shard, Math.max(ack.seq, this.positions.get(shard) ?? 0));
    this.counts.events += lines.length;
    this.counts.messages += 1;
    this.counts.duplicates += ack.duplicate ? 1 : 0;
  }

  async publish(lines: AsyncIterable<string>): Promise<object> {
    const underWay = new Set<Promise<void>>();
    let number = 0;
    for await (const batch of batches(lines)) {
      if (underWay.size >= WINDOW) await Promise.race(underWay);
      const sending = this.deliver(number++, batch).then(() => void underWay.delete(sending));
      underWay.add(sending);
    }
    await Promise.all(underWay);
    const sorted = [...this.positions].sort(([a], [b]) => a - b);
    return { ...this.counts, position: sorted.map(([shard, seq]) => `${shard}:${seq}`).join(",") };
  }
}

const { values: options } = parseArgs({
  options: {
    nats: { type: "string", default: "nats://127.0.0.1:4222" },
    shards: { type: "string" },
    check: { type: "string" },
  },
});

if (options.check) {
  const { vectors } = JSON.parse(readFileSync(options.check, "utf8"));
  for (const vector of vectors) {
    const wrong =
      fnv1a32(vector.org) !== vector.fnv1a32 ||
      [16, 64, 256].some((shards) => shardOf(vector.org, shards) !== vector[`shard_of_${shards}`]);
    if (wrong) throw new Error(`another shard for ${vector.org}`);
  }
  console.log(JSON.stringify({ vectors: vectors.length }));
} else {
  const connection = await connect({ servers: options.nats, maxReconnectAttempts: -1, reconnectTimeWait: 200, waitOnFirstConnect: true });
  const producer = new Producer(jetstream(connection), options.shards === undefined ? undefined : Number(options.shards));
  const lines = createInterface({ input: process.stdin, crlfDelay: Infinity });
  console.log(JSON.stringify(await producer.publish(lines)));
  await connection.close();
}
