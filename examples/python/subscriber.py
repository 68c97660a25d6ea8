"""Follows an org's spend over NATS, with nothing but nats-py: no change is missed, none is taken twice.

    pip install -r requirements.txt
    python subscriber.py --nats nats://127.0.0.1:4222 --org acme

Subscribes to `spend.<org>` first, then asks `meterr.query.<org>` for a snapshot. Every change carries its
epoch and the one before (`previous`): what is not newer than what is known is dropped, and where something
lies between, what was missed is asked for. The same after a reconnection, when messages were dropped, and
when it has been quiet for ten seconds, since a lost last change would never show by itself.

Prints a line for each snapshot and change: the org's events and cost so far. Needs a server.
"""

import argparse
import asyncio
import json

import nats
from nats.errors import Error as NatsError

QUIET = 10.0
ANSWER = 5.0
WAITING = 10_000


class Follower:
    """What is known, and the rule. `take` says "applied", "more", "dropped" or "missed"."""

    def __init__(self):
        self.epoch = None
        self.shard = None
        self.rows = {}
        self.pieces = []

    def after(self):
        return None if self.epoch is None else f"{self.shard}-{self.epoch}"

    def take(self, message):
        kind, epoch = message["kind"], message["epoch"]
        if kind == "current":
            return "applied"
        if kind == "change":
            if self.epoch is None or message["previous"] > self.epoch:
                return "missed"
            if epoch <= self.epoch:
                return "dropped"
        # A large message comes in pieces, one after the other.
        if message.get("piece", 0) == 0:
            self.pieces = []
        elif not self.pieces or (self.pieces[0]["kind"], self.pieces[0]["epoch"]) != (kind, epoch):
            return "missed"
        if message.get("piece", 0) != len(self.pieces):
            return "missed"
        self.pieces.append(message)
        if len(self.pieces) < message.get("pieces", 1):
            return "more"
        if kind == "snapshot":
            self.rows = {}
        for piece in self.pieces:
            for view, rows in piece.get("views", {}).items():
                for window, key, events, cost, *_ in rows:
                    # Totals, not differences: a row takes the place of the one before.
                    self.rows[view, window, key] = (events, cost)
                    if events == 0:
                        del self.rows[view, window, key]
        self.pieces = []
        self.epoch, self.shard = epoch, message["shard"]
        return "applied"

    def shown(self, kind):
        events, cost = self.rows.get(("org_all", None, None), (0, None))
        return {"kind": kind, "epoch": self.epoch, "events": events, "cost": cost}


async def ask(connection, org, follower):
    """Takes one whole answer; False when there was none."""
    after = follower.after()
    request = json.dumps({"after": after}).encode() if after else b""
    inbox = connection.new_inbox()
    replies = await connection.subscribe(inbox)
    try:
        await connection.publish(f"meterr.query.{org}", request, reply=inbox)
        more = True
        while more:
            reply = await replies.next_msg(timeout=ANSWER)
            headers = reply.headers or {}
            if headers.get("Status") == "503" or "Nats-Service-Error" in headers:
                return False  # Nobody there, or not ready.
            message = json.loads(reply.data)
            taken = follower.take(message)
            if taken == "missed":
                return False
            if taken == "applied" and message["kind"] != "current":
                print(json.dumps(follower.shown(message["kind"])), flush=True)
            more = message.get("more", False)
        return True
    except (NatsError, asyncio.TimeoutError):
        return False
    finally:
        try:
            await replies.unsubscribe()
        except NatsError:
            pass


async def follow(options):
    changes = asyncio.Queue(WAITING)
    lost = asyncio.Event()

    async def heard(message):
        try:
            changes.put_nowait(message.data)
        except asyncio.QueueFull:
            lost.set()

    async def missed(*_):
        lost.set()  # Messages were dropped, or sent while there was no connection.
        if changes.empty():
            changes.put_nowait(None)

    connection = await nats.connect(
        options.nats,
        max_reconnect_attempts=-1,
        reconnect_time_wait=0.2,
        error_cb=missed,
        reconnected_cb=missed,
    )
    await connection.subscribe(f"spend.{options.org}", cb=heard)
    # The subscription stands before the question is asked.
    await connection.flush()
    follower = Follower()
    lost.set()
    while follower.shown("")["events"] < options.until_events:
        if lost.is_set():
            lost.clear()
            if not await ask(connection, options.org, follower):
                lost.set()
                await asyncio.sleep(0.2)
            continue
        try:
            change = await asyncio.wait_for(changes.get(), QUIET)
        except asyncio.TimeoutError:
            lost.set()
            continue
        if change is None:
            continue
        taken = follower.take(json.loads(change))
        if taken == "missed":
            lost.set()
        elif taken == "applied":
            print(json.dumps(follower.shown("change")), flush=True)
    await connection.close()


parser = argparse.ArgumentParser()
parser.add_argument("--nats", default="nats://127.0.0.1:4222")
parser.add_argument("--org", required=True)
parser.add_argument("--until-events", type=float, default=float("inf"), help="stop at so many events")
asyncio.run(follow(parser.parse_args()))
