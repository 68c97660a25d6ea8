//! A durable reader of a shard's output log, who keeps its position through everything that happens
//! to the server, believes parts only by their commit, and checks all that can be checked about a
//! commit: order of epochs, fencing tokens, positions, number and hash of its parts.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::time::Duration;

use async_nats::jetstream::consumer::{AckPolicy, DeliverPolicy, pull};
use async_nats::jetstream::{self, Context};
use futures::StreamExt;
use meterr_connectors::changes::OrgChanges;
use serde::Deserialize;
use tokio::time::timeout;

use crate::connect;
use crate::stage::Stage;
use crate::table::Table;

/// A commit record, as far as it is checked.
#[derive(Debug, Clone, Default, Deserialize)]
struct Commit {
    epoch: u64,
    usage_position: u64,
    control_position: u64,
    token: u64,
    attempt: u32,
    parts: usize,
    hash: String,
    #[serde(default)]
    seal: bool,
}

#[derive(Debug, Deserialize)]
struct Part {
    epoch: u64,
    token: u64,
    attempt: u32,
    part: usize,
    #[serde(default)]
    orgs: Vec<OrgChanges>,
}

/// What a shard's output log says.
#[derive(Debug, Default)]
pub struct Believed {
    shard: u16,
    position: u64,
    /// Parts no commit has come for yet.
    parts: Vec<bytes::Bytes>,
    last: Commit,
    /// Epochs whose commit changed an org, in order.
    pub epochs: BTreeMap<String, Vec<u64>>,
    /// Rows by org.
    pub tables: BTreeMap<String, Table>,
    /// Commits that are no seals.
    pub commits: u64,
    /// Times the shard was taken over.
    pub seals: u64,
    /// Parts that had no commit.
    pub disbelieved: u64,
}

impl Believed {
    fn take(&mut self, position: u64, subject: &str, payload: bytes::Bytes) {
        assert_eq!(position, self.position + 1, "OUT_{}: records are missing", self.shard);
        self.position = position;
        if subject.ends_with(".part") {
            self.parts.push(payload);
            return;
        }
        assert!(subject.ends_with(".commit"), "{subject}");
        let commit: Commit = serde_json::from_slice(&payload).unwrap();
        let last = &self.last;
        let what = format!("OUT_{}: at {position} {commit:?} behind {last:?}", self.shard);
        assert!(commit.usage_position >= last.usage_position, "{what}");
        assert!(commit.control_position >= last.control_position, "{what}");
        let before = std::mem::take(&mut self.parts);
        assert!(before.len() >= commit.parts, "{what}: parts are missing");
        if commit.seal {
            assert!(commit.token > last.token && commit.epoch == last.epoch, "{what}");
            assert_eq!((commit.parts, commit.usage_position), (0, last.usage_position), "{what}");
            self.seals += 1;
        } else {
            // Whoever was fenced off has a lower token.
            assert!(commit.token == last.token && commit.epoch == last.epoch + 1, "{what}");
            self.commits += 1;
        }
        let (disbelieved, own) = before.split_at(before.len() - commit.parts);
        self.disbelieved += disbelieved.len() as u64;
        let mut hasher = blake3::Hasher::new();
        for (n, payload) in own.iter().enumerate() {
            hasher.update(payload);
            let part: Part = serde_json::from_slice(payload).unwrap();
            let header = (part.epoch, part.token, part.attempt, part.part);
            assert_eq!(header, (commit.epoch, commit.token, commit.attempt, n), "{what}");
            for changes in part.orgs {
                let epochs = self.epochs.entry(changes.org.clone()).or_default();
                if epochs.last() != Some(&commit.epoch) {
                    epochs.push(commit.epoch);
                }
                self.tables.entry(changes.org).or_default().apply(&changes.views);
            }
        }
        if !commit.seal {
            assert_eq!(hasher.finalize().to_hex().as_str(), commit.hash, "{what}");
        }
        self.last = commit;
    }
}

/// Reads a shard's output log until the stage is over and its end is reached.
pub async fn read(shard: u16, url: &str, stage: &Stage) -> Believed {
    let context = jetstream::context::ContextBuilder::new()
        .timeout(Duration::from_secs(1))
        .build(connect(url).await);
    let mut believed = Believed { shard, ..Believed::default() };
    loop {
        let over = stage.over.load(Ordering::SeqCst);
        let at = believed.position;
        let whole = some(&context, &mut believed).await.is_some();
        if over && whole && believed.position == at {
            return believed;
        }
    }
}

/// Reads what there is from the position on with a consumer made for that. Nothing when the server
/// did not answer to the end.
async fn some(context: &Context, believed: &mut Believed) -> Option<()> {
    let name = format!("OUT_{}", believed.shard);
    let config = pull::Config {
        deliver_policy: DeliverPolicy::ByStartSequence { start_sequence: believed.position + 1 },
        ack_policy: AckPolicy::None,
        inactive_threshold: Duration::from_secs(5),
        memory_storage: true,
        ..pull::Config::default()
    };
    let Ok(consumer) = context.create_consumer_on_stream(config, name).await else {
        // Not made yet, or away.
        tokio::time::sleep(Duration::from_millis(20)).await;
        return None;
    };
    loop {
        let fetch = consumer.fetch().max_messages(500).expires(Duration::from_millis(300));
        let mut messages = timeout(Duration::from_secs(2), fetch.messages()).await.ok()?.ok()?;
        let mut any = false;
        loop {
            let message = match timeout(Duration::from_secs(2), messages.next()).await.ok()? {
                None => break,
                Some(message) => message.ok()?,
            };
            let position = message.info().ok()?.stream_sequence;
            if position != believed.position + 1 {
                // Some were lost on the way; a new consumer sends them again.
                return None;
            }
            any = true;
            let subject = message.subject.to_string();
            believed.take(position, &subject, message.message.payload);
        }
        if !any {
            return Some(());
        }
    }
}
