// Follows an org's spend over NATS, with nothing but the official client: no change is missed, none is
// taken twice.
//
//     npm ci
//     node subscriber.ts --nats nats://127.0.0.1:4222 --org acme
//
// Subscribes to `spend.<org>` first, then asks `meterr.query.<org>` for a snapshot. Every change carries
// its epoch and the one before (`previous`): what is not newer than what is known is dropped, and where
// something lies between, what was missed is asked for. The same after a reconnection, when messages were
// dropped, and when it has been quiet for ten seconds, since a lost last change would never show by itself.
//
// Prints a line for each snapshot and change: the org's events and cost so far. Needs a server, and
// Node.js 22.18 or newer, which runs TypeScript as it is.

import { parseArgs } from "node:util";
import { connect, createInbox, type NatsConnection } from "@nats-io/transport-node";

const QUIET = 10_000;
const ANSWER = 5_000;
const WAITING = 10_000;

/** `[window_start, key, events, cost, …]`: totals. */
type Row = [string | null, string | null, number, string | null, ...unknown[]];

interface LiveMessage {
  kind: "snapshot" | "change" | "current";
  shard: number;
  epoch: number;
  previous?: number;
  piece?: number;
  pieces?: number;
  more?: boolean;
  views?: Record<string, Row[]>;
}

/** What is known, and the rule. */
class Follower {
  epoch: number | undefined;
  shard = 0;
  rows = new Map<string, { events: number; cost: string | null }>();
  pieces: LiveMessage[] = [];

  after(): string | undefined {
    return this.epoch === undefined ? undefined : `${this.shard}-${this.epoch}`;
  }

  take(message: LiveMessage): "applied" | "more" | "dropped" | "missed" {
    const { kind, epoch, piece = 0, pieces = 1 } = message;
    if (kind === "current") return "applied";
    if (kind === "change") {
      if (this.epoch === undefined || (message.previous ?? 0) > this.epoch) return "missed";
      if (epoch <= this.epoch) return "dropped";
    }
    // A large message comes in pieces, one after the other.
    if (piece === 0) this.pieces = [];
    const first = this.pieces[0];
    if (piece !== this.pieces.length || (first && (first.kind !== kind || first.epoch !== epoch))) return "missed";
    this.pieces.push(message);
    if (this.pieces.length < pieces) return "more";
    if (kind === "snapshot") this.rows.clear();
    for (const { views = {} } of this.pieces) {
      for (const [view, rows] of Object.entries(views)) {
        for (const [window, key, events, cost] of rows) {
          // Totals, not differences: a row takes the place of the one before.
          const name = JSON.stringify([view, window, key]);
          if (events === 0) this.rows.delete(name);
          else this.rows.set(name, { events, cost });
        }
      }
    }
    this.pieces = [];
    this.epoch = epoch;
    this.shard = message.shard;
    return "applied";
  }

  shown(kind: string) {
    const { events, cost } = this.rows.get(JSON.stringify(["org_all", null, null])) ?? { events: 0, cost: null };
    return { kind, epoch: this.epoch, events, cost };
  }
}

/** Takes one whole answer; false when there was none. */
async function ask(connection: NatsConnection, org: string, follower: Follower): Promise<boolean> {
  const after = follower.after();
  const inbox = createInbox();
  const replies = connection.subscribe(inbox);
  // Whoever waits for the next reply is let go when it does not come.
  let timer = setTimeout(() => replies.unsubscribe(), ANSWER);
  try {
    connection.publish(`meterr.query.${org}`, after ? JSON.stringify({ after }) : "", { reply: inbox });
    for await (const reply of replies) {
      // Nobody there, or not ready.
      if (reply.headers?.code === 503 || reply.headers?.has("Nats-Service-Error")) return false;
      const message: LiveMessage = reply.json();
      const taken = follower.take(message);
      if (taken === "missed") return false;
      if (taken === "applied" && message.kind !== "current") console.log(JSON.stringify(follower.shown(message.kind)));
      if (!message.more) return true;
      clearTimeout(timer);
      timer = setTimeout(() => replies.unsubscribe(), ANSWER);
    }
    return false;
  } catch {
    return false;
  } finally {
    clearTimeout(timer);
    replies.unsubscribe();
  }
}

const sleep = (ms: number) => new Promise((resolve) => setTimeout(resolve, ms));

async function follow(server: string, org: string, untilEvents: number): Promise<void> {
  const connection = await connect({ servers: server, maxReconnectAttempts: -1, reconnectTimeWait: 200, waitOnFirstConnect: true });
  const changes: LiveMessage[] = [];
  let lost = true;
  let wake = () => {};
  const missed = () => {
    lost = true;
    wake();
  };
  void (async () => {
    for await (const { type } of connection.status()) {
      // Messages were dropped, or sent while there was no connection.
      if (type === "reconnect" || type === "slowConsumer") missed();
    }
  })();
  connection.subscribe(`spend.${org}`, {
    callback: (error, message) => {
      if (error || changes.length >= WAITING) return missed();
      changes.push(message.json());
      wake();
    },
  });
  // The subscription stands before the question is asked.
  await connection.flush();
  const follower = new Follower();
  while (follower.shown("").events < untilEvents) {
    if (lost) {
      lost = false;
      if (!(await ask(connection, org, follower))) {
        lost = true;
        await sleep(200);
      }
      continue;
    }
    const change = changes.shift();
    if (change === undefined) {
      let quiet: NodeJS.Timeout | undefined;
      await new Promise<void>((resolve) => {
        wake = resolve;
        quiet = setTimeout(missed, QUIET);
      });
      clearTimeout(quiet);
      continue;
    }
    const taken = follower.take(change);
    if (taken === "missed") lost = true;
    else if (taken === "applied") console.log(JSON.stringify(follower.shown("change")));
  }
  await connection.close();
}

const { values: options } = parseArgs({
  options: {
    nats: { type: "string", default: "nats://127.0.0.1:4222" },
    org: { type: "string" },
    "until-events": { type: "string", default: "Infinity" },
  },
});
if (!options.org) throw new Error("--org is needed");
await follow(options.nats, options.org, Number(options["until-events"]));
