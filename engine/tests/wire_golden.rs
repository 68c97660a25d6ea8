//! From the golden events and control records to the golden parts, commit records and live messages:
//! one shard takes the former in as its logs hold them, and what it writes must be the latter, byte
//! for byte.

#![allow(clippy::unwrap_used)]

#[path = "../../tests/support/wire.rs"]
mod wire;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::executor::block_on;
use futures::future::BoxFuture;
use meterr_connectors::changes::{Announcer, LiveKind, LiveMessage};
use meterr_connectors::checkpoint_memory::MemoryCheckpointStore;
use meterr_connectors::log::{Log, Message};
use meterr_connectors::memory::MemoryLog;
use meterr_engine::announce;
use meterr_engine::epoch::Limits;
use meterr_engine::live::{Checkpointing, LiveShard, Logs, Progress, ShardSpec};
use meterr_engine::records::control_changes;
use meterr_engine::snapshot;
use meterr_engine::wire::{Commit, Part, parts_hash};
use meterr_engine::worker::timely_worker;
use meterr_operators::control::ControlChange;
use meterr_operators::ids::{ShardId, shard_of};
use meterr_operators::rollup::ViewSet;
use meterr_operators::time::Time;
use parking_lot::Mutex;
use tokio::sync::{Semaphore, watch};

const SHARD: ShardId = ShardId(15);
const SHARDS: u16 = 16;

/// A line that becomes a dead letter.
const NO_USER: &str = r#"{"id":"01J9ZQ4Y9C","time":"2026-01-02T03:04:09Z","org":"acme","provider":"openai","model":"gpt-4o","input_tokens":12,"output_tokens":3}"#;

/// Keeps what would be published.
#[derive(Default)]
struct Heard(Mutex<Vec<(String, Bytes)>>);

impl Announcer for Heard {
    fn announce(&self, messages: Vec<(String, Bytes)>) -> BoxFuture<'static, ()> {
        self.0.lock().extend(messages);
        Box::pin(async {})
    }
}

#[test]
fn golden_records_become_golden_output() {
    let [usage, control, out] = ["USAGE_15", "CONTROL", "OUT_15"].map(MemoryLog::new);
    let heard = Arc::new(Heard::default());
    let seed = ControlChange::parse(&wire::read("control/seed.json")).unwrap();
    let ControlChange::Seed(seed) = seed else { panic!("the seed is a seed") };
    let never = Duration::from_secs(3600);
    let spec = || ShardSpec {
        id: SHARD,
        shards: SHARDS,
        key: seed.hash_key,
        logs: Logs {
            usage: Arc::new(usage.clone()),
            control: Arc::new(control.clone()),
            out: Arc::new(out.clone()),
        },
        checkpoints: Arc::new(MemoryCheckpointStore::new(snapshot::FORMAT)),
        views: ViewSet::DEFAULT,
        limits: Limits { events_max: 1_000, age_max: never, age_max_loaded: never },
        checkpointing: Checkpointing { interval: never, updates_max: usize::MAX, base_ratio: 0.5 },
        time_jump_max: i64::MAX,
        progress: watch::channel(Progress::default()).0,
        announcer: Some(heard.clone() as Arc<dyn Announcer>),
        shared_checkpoints: false,
    };
    let mut worker = timely_worker();
    let mut live = LiveShard::open(&mut worker, spec(), |_, _, _| ()).unwrap();

    for name in ["horizon", "prices", "time_zone", "view", "seed"] {
        let record = Message::new("control", wire::read(&format!("control/{name}.json")));
        control.append_at(vec![record], at("2026-01-02T03:00:00Z")).unwrap();
    }
    assert_eq!((shard_of("acme", SHARDS), shard_of("adatum", SHARDS)), (SHARD, SHARD));
    let cloudevent = wire::json("events/cloudevent.json");
    let headers = cloudevent["headers"].as_object().unwrap().iter();
    let first = [
        Message::new("usage.15.acme", wire::read("events/event.json")),
        Message::new("usage.15.@batch", wire::read("events/batch.ndjson")),
        Message {
            headers: headers.map(|(k, v)| (k.clone(), v.as_str().unwrap().to_owned())).collect(),
            ..Message::new("usage.15.acme", cloudevent["data"].to_string())
        },
        Message::new("usage.15.acme", NO_USER),
    ];
    let second = ["correction", "void"]
        .map(|name| Message::new("usage.15.acme", wire::read(&format!("events/{name}.json"))));
    for (messages, time) in
        [(first.to_vec(), "2026-01-02T03:05:00Z"), (second.to_vec(), "2026-01-02T03:06:00Z")]
    {
        usage.append_at(messages, at(time)).unwrap();
        let progress = live.progress();
        let changes = control_changes(&control, progress.control + 1, None).unwrap();
        let records = block_on(usage.read(progress.usage + 1, usize::MAX)).unwrap();
        live.give_control(&changes);
        live.give_usage(records, Arc::new(Semaphore::new(1)).try_acquire_owned().unwrap());
        let append = live.pump(&mut worker).unwrap().expect("there is something to commit");
        live.committed(block_on(append)).unwrap();
    }

    let progress = live.progress();
    assert_eq!((progress.epoch, progress.usage, progress.control), (2, 6, 5));
    let as_of = live.as_of().as_of;
    let snapshot = announce::rows(LiveKind::Snapshot, SHARD, 2, None, &as_of, &live.rows("acme"));
    assert_eq!(snapshot.len(), 1);
    let current = announce::current(SHARD, 2, &as_of, "acme");
    // A second owner: its first commit record seals what the first one wrote.
    drop(live);
    let mut worker = timely_worker();
    drop(LiveShard::open(&mut worker, spec(), |_, _, _| ()).unwrap());

    let records = out.records();
    let written: Vec<(&str, &[u8])> =
        records.iter().map(|r| (&*r.message.subject, &*r.message.payload)).collect();
    let [_, rows, letters, commit, _, _, sealing] = written.as_slice() else {
        panic!("seal, two parts and their commit, a part and its commit, seal: {written:?}");
    };
    for (name, subject, written) in [
        ("out/part.json", "out.15.part", rows),
        ("out/part_dead_letters.json", "out.15.part", letters),
        ("out/commit.json", "out.15.commit", commit),
        ("out/commit_sealing.json", "out.15.commit", sealing),
    ] {
        assert_eq!(written.0, subject, "{name}");
        wire::check(name, written.1);
    }
    let heard = heard.0.lock();
    let [first, of_adatum, change] = heard.as_slice() else { panic!("three changes: {heard:?}") };
    assert_eq!((&*first.0, &*of_adatum.0, &*change.0), ("acme", "adatum", "acme"));
    wire::check("live/change.json", &change.1);
    // The answer to who took nothing yet of what both commits changed.
    let missed = announce::answer(vec![first.1.clone(), change.1.clone()]);
    wire::check("live/change_more.json", &missed[0]);
    assert_eq!(missed[1], change.1);
    wire::check("live/snapshot.json", &snapshot[0]);
    wire::check("live/current.json", &current);
}

#[test]
fn golden_output_reads_back() {
    let commit: Commit = serde_json::from_slice(&wire::read("out/commit.json")).unwrap();
    let sealing: Commit = serde_json::from_slice(&wire::read("out/commit_sealing.json")).unwrap();
    assert_eq!((commit.epoch, commit.parts, commit.seal, commit.attempt), (1, 2, false, 1));
    assert_eq!((sealing.epoch, sealing.parts, sealing.seal, sealing.attempt), (2, 0, true, 0));
    assert_eq!((commit.token, sealing.token), (1, 2));
    let parts = ["out/part.json", "out/part_dead_letters.json"].map(wire::read);
    assert_eq!(parts_hash(parts.iter().map(Vec::as_slice)), commit.hash);
    let [rows, letters] = parts.map(|part| serde_json::from_slice::<Part>(&part).unwrap());
    assert_eq!(rows.orgs.iter().map(|org| &*org.org).collect::<Vec<_>>(), ["acme", "adatum"]);
    assert_eq!((rows.part, letters.part, letters.dead_letters.len()), (0, 1, 1));
    assert_eq!(letters.dead_letters[0].id, "15-1-0");

    // What is left of acme's day after the correction and the void: the corrected event and the
    // CloudEvent, in the time zone of the golden control record.
    let change: LiveMessage = serde_json::from_slice(&wire::read("live/change.json")).unwrap();
    assert_eq!((change.epoch, change.previous, change.shard), (2, Some(1), SHARD));
    let day = &change.views["org_day"][0];
    assert_eq!(day.window_start.as_deref(), Some("2026-01-02T00:00:00+01:00"));
    assert_eq!(day.figures.events, 2);
    // In millionths: 280 × 2.5 + 120 × 1.25 + 44 × 10 = 1290, 254 × 2.5 + 120 × 1.25 + 44 × 10 = 1225.
    assert_eq!(day.figures.cost.unwrap().to_string(), "0.002515");
    let snapshot: LiveMessage = serde_json::from_slice(&wire::read("live/snapshot.json")).unwrap();
    assert_eq!(snapshot.views["org_day"], change.views["org_day"]);
    let current: LiveMessage = serde_json::from_slice(&wire::read("live/current.json")).unwrap();
    assert_eq!((current.kind, current.epoch, current.views.len()), (LiveKind::Current, 2, 0));
}

fn at(text: &str) -> Time {
    Time::parse(text).unwrap()
}
