//! The streams of a deployment: how they must be set, and what is wrong with one that is not.

use std::collections::HashMap;

use async_nats::jetstream::stream::{
    Config, DiscardPolicy, PersistenceMode, RetentionPolicy, StorageType,
};
use meterr_operators::ids::ShardId;

use super::subjects;

/// Metadata key under which a stream keeps the identity it was created with.
pub const IDENTITY_KEY: &str = "meterr_identity";
/// Metadata key: up to this position records were copied from another log and carry its log time in
/// the header [`TIME_HEADER`].
pub const COPIED_TO_KEY: &str = "meterr_copied_to";
/// Header of a copied record: its log time in microseconds since 1970. Counts only up to the position
/// that the stream's metadata names, so that a producer cannot set it.
pub const TIME_HEADER: &str = "Meterr-Time";

/// Largest message a stream must take.
const MESSAGE_BYTES_MIN: i32 = 1024 * 1024;

/// What one stream must be like.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// Its name.
    pub stream: String,
    /// Its one subject, with a wildcard where it has many.
    pub subject: String,
    /// What it is, for whoever lists streams.
    pub description: String,
    /// Servers that keep a copy, at least.
    pub replicas: usize,
    /// Bytes it may hold when it is created; `None`: as much as the server has. When full it refuses
    /// messages rather than lose old ones.
    pub bytes_max: Option<i64>,
    /// Whether a mirror of it in another region will do, which can only be read.
    pub mirror: bool,
}

impl Wanted {
    /// The control log's.
    pub fn control(replicas: usize, bytes_max: Option<i64>) -> Wanted {
        Wanted {
            stream: subjects::CONTROL_STREAM.to_owned(),
            subject: subjects::CONTROL_SUBJECT.to_owned(),
            description: "meterr: prices, time zones, views and all else that decides figures"
                .into(),
            replicas,
            bytes_max,
            mirror: false,
        }
    }

    /// A shard's usage log's.
    pub fn usage(shard: ShardId, replicas: usize, bytes_max: Option<i64>) -> Wanted {
        Wanted {
            stream: subjects::usage_stream(shard),
            subject: subjects::usage_all(shard),
            description: format!("meterr: usage events of shard {shard}"),
            replicas,
            bytes_max,
            mirror: false,
        }
    }

    /// A shard's output log's.
    pub fn out(shard: ShardId, replicas: usize, bytes_max: Option<i64>) -> Wanted {
        Wanted {
            stream: subjects::out_stream(shard),
            subject: subjects::out_all(shard),
            description: format!(
                "meterr: committed changes of shard {shard}; only nodes write here"
            ),
            replicas,
            bytes_max,
            mirror: false,
        }
    }

    /// The same for whoever only reads: a mirror will do.
    #[must_use]
    pub fn or_mirror(self) -> Wanted {
        Wanted { mirror: true, ..self }
    }

    /// The configuration to create it with.
    pub fn config(&self, identity: &str, copied_to: Option<u64>) -> Config {
        let mut metadata = HashMap::from([(IDENTITY_KEY.to_owned(), identity.to_owned())]);
        if let Some(position) = copied_to {
            metadata.insert(COPIED_TO_KEY.to_owned(), position.to_string());
        }
        Config {
            name: self.stream.clone(),
            subjects: vec![self.subject.clone()],
            description: Some(self.description.clone()),
            retention: RetentionPolicy::Limits,
            storage: StorageType::File,
            discard: DiscardPolicy::New,
            num_replicas: self.replicas,
            max_bytes: self.bytes_max.unwrap_or(-1),
            max_messages: -1,
            max_messages_per_subject: -1,
            max_message_size: -1,
            // Only for a producer's retries; ids count once for 35 days, by the engine.
            duplicate_window: std::time::Duration::from_secs(120),
            allow_direct: true,
            deny_delete: true,
            metadata,
            ..Config::default()
        }
    }

    /// What is wrong with a stream, each with what mends it. Empty when it will do.
    pub fn wrong(&self, found: &Config) -> Vec<String> {
        let name = &self.stream;
        let mirrors = self.mirror && found.mirror.is_some();
        let mut wrong = Vec::new();
        let mut edit = |is: bool, what: &str, flags: &str| {
            if is {
                wrong.push(format!("{what}; run: nats stream edit {name} {flags}"));
            }
        };
        edit(
            !mirrors && found.subjects != [self.subject.clone()],
            &format!("subjects are {:?}, not [{:?}]", found.subjects, self.subject),
            &format!("--subjects '{}'", self.subject),
        );
        edit(
            found.num_replicas < self.replicas,
            &format!("it has {} replicas, fewer than {}", found.num_replicas, self.replicas),
            &format!("--replicas={}", self.replicas),
        );
        edit(!found.max_age.is_zero(), "messages expire (max age)", "--max-age=-1");
        edit(
            found.max_messages_per_subject > 0,
            "it keeps only some messages of a subject",
            "--max-msgs-per-subject=-1",
        );
        let limited = found.max_bytes > 0 || found.max_messages > 0;
        edit(
            limited && found.discard != DiscardPolicy::New,
            "when full it would discard old messages",
            "--discard=new",
        );
        edit(
            found.max_message_size > 0 && found.max_message_size < MESSAGE_BYTES_MIN,
            "it refuses messages of 1 MiB",
            "--max-msg-size=-1",
        );
        edit(found.no_ack, "it does not acknowledge", "--ack");
        edit(found.allow_rollup, "a message could purge others (rollup)", "--no-allow-rollup");
        edit(!found.allow_direct, "messages cannot be read directly", "--allow-direct");
        edit(found.subject_transform.is_some(), "it renames subjects", "--no-transform");
        // What cannot be changed once a stream is there.
        let mut anew = |is: bool, what: &str| {
            if is {
                wrong.push(format!(
                    "{what}, which cannot be changed; if it is empty, run: nats stream rm {name}, and \
                     start meterr again, which creates it"
                ));
            }
        };
        anew(found.retention != RetentionPolicy::Limits, "its retention is not \"limits\"");
        anew(found.storage != StorageType::File, "it is kept in memory only");
        anew(found.sealed, "it is sealed");
        anew(
            found.sources.as_ref().is_some_and(|sources| !sources.is_empty()),
            "it takes messages from other streams, which get new positions",
        );
        anew(found.allow_message_ttl, "messages can carry an expiry");
        anew(found.allow_message_counter, "it is a counter");
        anew(
            found.persist_mode == Some(PersistenceMode::Async),
            "it acknowledges before it writes (persist mode \"async\")",
        );
        if found.mirror.is_some() && !self.mirror {
            wrong.push(
                "it mirrors another region's and can only be read; to take over, run: meterr promote \
                 (a replica can read it: --replica)"
                    .to_owned(),
            );
        }
        wrong
    }
}

/// Position up to which records were copied, by a stream's metadata.
pub fn copied_to(config: &Config) -> u64 {
    config.metadata.get(COPIED_TO_KEY).and_then(|text| text.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn what_is_created_is_right() {
        let shard = ShardId(3);
        for wanted in [
            Wanted::usage(shard, 1, None),
            Wanted::out(shard, 3, Some(1 << 30)),
            Wanted::control(1, None),
        ] {
            let config = wanted.config("id", None);
            assert_eq!(wanted.wrong(&config), Vec::<String>::new());
            assert_eq!(copied_to(&config), 0);
            assert_eq!(copied_to(&wanted.config("id", Some(7))), 7);
        }
    }

    type Spoil = fn(&mut Config);

    #[test]
    fn every_dangerous_setting_is_named_with_its_remedy() {
        let wanted = Wanted::usage(ShardId(3), 3, None);
        let spoils: [(Spoil, &str); 13] = [
            (|c| c.subjects = vec!["usage.>".into()], "--subjects 'usage.3.*'"),
            (|c| c.num_replicas = 1, "--replicas=3"),
            (|c| c.max_age = Duration::from_secs(9), "--max-age=-1"),
            (|c| c.max_messages_per_subject = 1, "--max-msgs-per-subject=-1"),
            (
                |c| {
                    c.max_bytes = 1;
                    c.discard = DiscardPolicy::Old;
                },
                "--discard=new",
            ),
            (|c| c.max_message_size = 1000, "--max-msg-size=-1"),
            (|c| c.no_ack = true, "--ack"),
            (|c| c.allow_rollup = true, "--no-allow-rollup"),
            (|c| c.allow_direct = false, "--allow-direct"),
            (|c| c.retention = RetentionPolicy::WorkQueue, "stream rm USAGE_3"),
            (|c| c.storage = StorageType::Memory, "stream rm USAGE_3"),
            (|c| c.allow_message_ttl = true, "expiry"),
            (|c| c.persist_mode = Some(PersistenceMode::Async), "async"),
        ];
        for (spoil, remedy) in spoils {
            let mut config = wanted.config("id", None);
            spoil(&mut config);
            let wrong = wanted.wrong(&config);
            assert_eq!(wrong.len(), 1, "{wrong:?}");
            assert!(wrong[0].contains(remedy), "{} has no {remedy:?}", wrong[0]);
        }
    }
}
