//! A subscriber of one org's live changes on core NATS with the plain client, who stays connected
//! through everything: subscribe, ask for a snapshot, then take changes, and ask for what was missed.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use async_nats::{Client, Subscriber};
use futures::StreamExt;
use meterr_connectors::changes::{LiveKind, LiveMessage};
use serde_json::json;
use tokio::time::timeout;

use crate::connect;
use crate::seen::Seen;
use crate::stage::Stage;
use crate::table::Table;

/// A watcher.
#[derive(Debug, Default)]
pub struct Watcher {
    /// What it saw.
    pub seen: Seen,
    shard: Option<u16>,
    /// Changes that came by themselves and were taken.
    pub live: u64,
    /// Questions answered.
    pub asked: u64,
    /// Pieces of a change that is not whole yet.
    pieces: Vec<LiveMessage>,
}

/// What to do after a live message.
#[derive(Debug, PartialEq)]
enum Next {
    Wait,
    Ask,
}

impl Watcher {
    fn new(org: &str) -> Watcher {
        Watcher { seen: Seen::new(org), ..Watcher::default() }
    }

    /// Takes in a change that came by itself.
    fn heard(&mut self, message: LiveMessage) -> Next {
        assert_eq!(message.kind, LiveKind::Change, "{message:?}");
        assert_eq!(message.org, self.seen.org);
        if message.epoch <= self.seen.last() {
            return Next::Wait;
        }
        if message.previous.unwrap() > self.seen.last() {
            return Next::Ask;
        }
        if self.pieces.first().is_some_and(|first| first.epoch != message.epoch) {
            // The rest of those is lost.
            self.pieces.clear();
            return Next::Ask;
        }
        if message.piece as usize != self.pieces.len() {
            self.pieces.clear();
            return Next::Ask;
        }
        let whole = message.piece + 1 == message.pieces;
        self.pieces.push(message);
        if whole {
            let pieces = std::mem::take(&mut self.pieces);
            self.change(&pieces);
            self.live += 1;
        }
        Next::Wait
    }

    /// Takes in a whole change.
    fn change(&mut self, pieces: &[LiveMessage]) {
        let epoch = pieces[0].epoch;
        for piece in pieces {
            assert!(
                piece.epoch == epoch && epoch > self.seen.last(),
                "{}: {piece:?}",
                self.seen.org
            );
            assert!(
                piece.previous.unwrap() <= self.seen.last(),
                "{}: a gap: {piece:?}",
                self.seen.org
            );
        }
        for piece in pieces {
            self.seen.change(epoch, &piece.views);
        }
    }

    /// Takes in a whole answer.
    fn answered(&mut self, answer: Vec<LiveMessage>) {
        self.asked += 1;
        self.pieces.clear();
        assert!(answer.iter().all(|message| message.org == self.seen.org));
        let shard = answer[0].shard.0;
        match answer[0].kind {
            LiveKind::Snapshot => {
                assert_eq!(
                    self.shard, None,
                    "{}: a snapshot instead of what was missed",
                    self.seen.org
                );
                for (n, piece) in answer.iter().enumerate() {
                    assert_eq!((piece.kind, piece.piece as usize), (LiveKind::Snapshot, n));
                    assert_eq!(
                        (piece.pieces as usize, piece.epoch),
                        (answer.len(), answer[0].epoch)
                    );
                    self.seen.table.apply(&piece.views);
                }
                self.seen.began = answer[0].epoch;
                self.shard = Some(shard);
            }
            LiveKind::Current => {
                assert_eq!(answer.len(), 1);
                // An engine that has just started may know less than we have seen of another.
            }
            LiveKind::Change => {
                for pieces in answer.chunk_by(|a, b| a.epoch == b.epoch) {
                    assert_eq!(pieces.len(), pieces[0].pieces as usize);
                    self.change(pieces);
                }
            }
        }
        assert_eq!(self.shard, Some(shard));
    }
}

/// Asks once; nothing when there is no whole answer.
async fn ask(client: &Client, org: &str, after: Option<String>) -> Option<Vec<LiveMessage>> {
    let inbox = client.new_inbox();
    let mut answers = client.subscribe(inbox.clone()).await.ok()?;
    let body = after.map_or(String::new(), |after| json!({ "after": after }).to_string());
    let sent = client.publish_with_reply(format!("meterr.query.{org}"), inbox, body.into()).await;
    sent.ok()?;
    let mut messages = Vec::new();
    loop {
        let message = timeout(Duration::from_secs(2), answers.next()).await.ok()??;
        if message.status.is_some() {
            // Nobody is there to answer.
            return None;
        }
        let headers = message.headers.unwrap_or_default();
        if let Some(error) = headers.get("Nats-Service-Error") {
            let code = headers.get("Nats-Service-Error-Code").map_or("none", |code| code.as_str());
            assert!(code == "503" || code == "504", "{org}: {code} {error:?}");
            return None;
        }
        let message: LiveMessage = serde_json::from_slice(&message.payload).unwrap();
        let more = message.more;
        messages.push(message);
        if !more {
            return Some(messages);
        }
    }
}

/// Asks until there is an answer, and takes it in.
async fn catch_up(client: &Client, watcher: &mut Watcher) {
    loop {
        let after = watcher.shard.map(|shard| format!("{shard}-{}", watcher.seen.last()));
        match ask(client, &watcher.seen.org, after).await {
            Some(answer) => return watcher.answered(answer),
            None => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}

/// What a new watcher gets.
pub async fn snapshot(url: &str, org: &str) -> Table {
    let client = connect(url).await;
    let mut watcher = Watcher::new(org);
    catch_up(&client, &mut watcher).await;
    watcher.seen.table
}

/// Watches an org until the stage is over.
pub async fn watch(org: &str, url: &str, stage: &Stage) -> Watcher {
    let client = connect(url).await;
    let connects = || client.statistics().connects.load(Ordering::Relaxed);
    let mut changes: Subscriber = client.subscribe(format!("spend.{org}")).await.unwrap();
    let mut watcher = Watcher::new(org);
    catch_up(&client, &mut watcher).await;
    let (mut connected, mut quiet) = (connects(), Instant::now());
    loop {
        let over = stage.over.load(Ordering::SeqCst);
        let heard = timeout(Duration::from_millis(50), changes.next()).await;
        let next = match heard {
            Ok(message) => {
                quiet = Instant::now();
                let message = message.expect("the client stays connected");
                watcher.heard(serde_json::from_slice(&message.payload).unwrap())
            }
            Err(_) if over => {
                catch_up(&client, &mut watcher).await;
                return watcher;
            }
            Err(_) if quiet.elapsed() > Duration::from_secs(2) => Next::Ask,
            Err(_) => Next::Wait,
        };
        let now = connects();
        if next == Next::Ask || std::mem::replace(&mut connected, now) != now {
            catch_up(&client, &mut watcher).await;
            quiet = Instant::now();
        }
    }
}
