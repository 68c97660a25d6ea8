//! How the stream of the registry's bucket must be set, and what is wrong with one that is not.

use async_nats::jetstream::stream::{Config, DiscardPolicy, RetentionPolicy, StorageType};

use super::subjects::{REGISTRY, REGISTRY_STREAM};

/// Largest value of an entry, in bytes.
pub const VALUE_LEN_MAX: usize = 64 * 1024;

/// All subjects of the bucket.
pub(super) fn subjects() -> String {
    format!("{REGISTRY}>")
}

/// The settings to create it with.
pub(super) fn config(replicas: usize) -> Config {
    Config {
        name: REGISTRY_STREAM.to_owned(),
        subjects: vec![subjects()],
        description: Some(
            "meterr: nodes and the shards they own; only nodes write here".to_owned(),
        ),
        retention: RetentionPolicy::Limits,
        storage: StorageType::File,
        discard: DiscardPolicy::New,
        num_replicas: replicas,
        max_bytes: -1,
        max_messages: -1,
        max_messages_per_subject: 1,
        max_message_size: -1,
        duplicate_window: std::time::Duration::from_secs(120),
        // What shows a stream as a bucket to the tools of NATS.
        allow_rollup: true,
        deny_delete: true,
        allow_direct: true,
        ..Config::default()
    }
}

/// What is wrong with a stream, each with what mends it. Empty when it will do.
pub(super) fn wrong(found: &Config, replicas: usize) -> Vec<String> {
    let name = REGISTRY_STREAM;
    let mut wrong = Vec::new();
    let mut edit = |is: bool, what: &str, flags: &str| {
        if is {
            wrong.push(format!("{what}; run: nats stream edit {name} {flags}"));
        }
    };
    let subjects = subjects();
    edit(
        found.subjects != [subjects.clone()],
        &format!("subjects are {:?}, not [{subjects:?}]", found.subjects),
        &format!("--subjects '{subjects}'"),
    );
    edit(
        found.num_replicas < replicas,
        &format!("it has {} replicas, fewer than {replicas}", found.num_replicas),
        &format!("--replicas={replicas}"),
    );
    edit(
        found.max_messages_per_subject != 1,
        "it keeps more than the newest value of a key",
        "--max-msgs-per-subject=1",
    );
    edit(!found.max_age.is_zero(), "entries expire (max age)", "--max-age=-1");
    let limited = found.max_bytes > 0 || found.max_messages > 0;
    edit(
        limited && found.discard != DiscardPolicy::New,
        "when full it would discard old entries",
        "--discard=new",
    );
    let room = i32::try_from(VALUE_LEN_MAX + 1024).unwrap_or(i32::MAX);
    edit(
        found.max_message_size > 0 && found.max_message_size < room,
        "it refuses values of 64 KiB",
        "--max-msg-size=-1",
    );
    edit(found.no_ack, "it does not acknowledge", "--ack");
    edit(!found.allow_direct, "entries cannot be read directly", "--allow-direct");
    edit(found.subject_transform.is_some(), "it renames keys", "--no-transform");
    let anew = [
        (found.retention != RetentionPolicy::Limits, "its retention is not \"limits\""),
        (found.storage != StorageType::File, "it is kept in memory only"),
        (found.allow_message_ttl, "entries may carry an expiry of their own"),
        (found.sealed, "it is sealed"),
        (found.mirror.is_some(), "it mirrors another stream"),
        (
            found.sources.as_ref().is_some_and(|sources| !sources.is_empty()),
            "it takes entries from other streams",
        ),
    ];
    wrong.extend(anew.into_iter().filter(|(is, _)| *is).map(|(_, what)| {
        format!(
            "{what}, which cannot be changed; with all nodes stopped, run: nats stream rm {name}, and \
             start meterr again, which creates it"
        )
    }));
    wrong
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn what_is_created_is_right() {
        assert_eq!(wrong(&config(3), 3), Vec::<String>::new());
        assert_eq!(wrong(&config(5), 3), Vec::<String>::new());
    }

    type Spoil = fn(&mut Config);

    #[test]
    fn every_dangerous_setting_is_named_with_its_remedy() {
        let spoils: [(Spoil, &str); 10] = [
            (|c| c.subjects = vec!["$KV.OTHER.>".into()], "--subjects '$KV.METERR.>'"),
            (|c| c.num_replicas = 1, "--replicas=3"),
            (|c| c.max_messages_per_subject = 5, "--max-msgs-per-subject=1"),
            (|c| c.max_age = Duration::from_secs(9), "--max-age=-1"),
            (
                |c| {
                    c.max_bytes = 1;
                    c.discard = DiscardPolicy::Old;
                },
                "--discard=new",
            ),
            (|c| c.max_message_size = 1000, "--max-msg-size=-1"),
            (|c| c.no_ack = true, "--ack"),
            (|c| c.allow_direct = false, "--allow-direct"),
            (|c| c.storage = StorageType::Memory, "stream rm KV_METERR"),
            (|c| c.allow_message_ttl = true, "expiry"),
        ];
        for (spoil, remedy) in spoils {
            let mut config = config(3);
            spoil(&mut config);
            let wrong = wrong(&config, 3);
            assert_eq!(wrong.len(), 1, "{wrong:?}");
            assert!(wrong[0].contains(remedy), "{} has no {remedy:?}", wrong[0]);
        }
    }
}
