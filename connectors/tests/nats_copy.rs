//! Logs copied to JetStream and back: over a server that is killed meanwhile, a cluster that loses its
//! leader, streams that somebody else writes to, and messages that a server does not take.

#![allow(clippy::unwrap_used)]

#[path = "../../tests/support/nats.rs"]
mod nats;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::executor::block_on;
use meterr_connectors::copy::{self, Compared, CopyError, Place, Plan};
use meterr_connectors::embedded::{EmbeddedOptions, EmbeddedPlace, FaultFs};
use meterr_connectors::log::{Log, LogError, Message};
use meterr_connectors::memory::MemoryLog;
use meterr_connectors::nats::connection::NatsSettings;
use meterr_connectors::nats::import::JetStreamPlace;
use meterr_connectors::nats::log::{Connections, JetStreamLog};
use meterr_connectors::nats::streams::Wanted;
use meterr_operators::ids::ShardId;
use meterr_operators::time::Time;
use nats::{Cluster, NatsOptions, NatsServer};
use tokio::runtime::Runtime;

/// A connection with the runtime it needs.
struct Connected {
    runtime: Runtime,
    connections: Connections,
}

impl Connected {
    fn to(url: &str) -> Connected {
        let runtime = Runtime::new().unwrap();
        let settings = NatsSettings { url: url.to_owned(), ..NatsSettings::default() };
        let connections = runtime.block_on(Connections::connect(&settings)).unwrap();
        Connected { runtime, connections }
    }

    fn place(&self, replicas: usize) -> JetStreamPlace {
        JetStreamPlace::new(self.connections.clone(), replicas, None)
    }

    /// A producer's stream.
    fn usage(&self, create: Option<&str>) -> JetStreamLog {
        let wanted = Wanted::usage(ShardId(0), 1, None);
        let open = JetStreamLog::open(&self.connections, &wanted, create);
        self.runtime.block_on(open).unwrap()
    }
}

fn message(subject: &str, n: u64) -> Message {
    // More than one header, in an order that JetStream will not keep.
    let headers = [("ce-type", "t"), ("ce-id", "ü"), ("a", "1"), ("a", "2")];
    let headers = headers.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec();
    Message {
        subject: subject.to_owned(),
        headers: if n.is_multiple_of(3) { headers } else { Vec::new() },
        payload: format!("{n:0width$}", width = 1 + n as usize % 200).into(),
    }
}

/// A deployment of one shard that was at work in 2023, with a clock that once went back.
fn deployment(n: u64) -> Vec<MemoryLog> {
    let [usage, out, control] = ["USAGE_0", "OUT_0", "CONTROL"].map(MemoryLog::new);
    for at in 1..=n {
        let time = Time(1_700_000_000_000_000 + at as i64 * 1_234_567);
        usage.append_at(vec![message("usage.0.acme", at)], time).unwrap();
        out.append_at(vec![message("out.0.part", at), message("out.0.commit", at)], time).unwrap();
    }
    control.append_at(vec![message("control", 1)], Time(5)).unwrap();
    vec![usage, out, control]
}

fn planned(logs: &[Arc<dyn Log>], place: &dyn Place) -> Result<Plan, CopyError> {
    copy::plan(logs, place, &mut |_| ())
}

fn copied(logs: &[Arc<dyn Log>], place: &dyn Place) -> Result<u64, CopyError> {
    let plan = planned(logs, place)?;
    copy::copy(&plan, place, &mut |_| ())?;
    Ok(plan.missing)
}

fn shared(logs: &[MemoryLog]) -> Vec<Arc<dyn Log>> {
    logs.iter().map(|log| Arc::new(log.clone()) as Arc<dyn Log>).collect()
}

fn found(logs: &[Arc<dyn Log>], place: &dyn Place) -> Vec<Arc<dyn Log>> {
    logs.iter().map(|log| place.find(&log.identity().stream).unwrap().unwrap()).collect()
}

/// Compares every record; returns how many there are.
fn same(logs: &[Arc<dyn Log>], place: &dyn Place) -> u64 {
    let mut compared = Compared::default();
    for (source, copied) in logs.iter().zip(found(logs, place)) {
        copy::compare(&**source, &*copied, &mut compared, &mut |_| ()).unwrap();
    }
    assert_eq!(compared.differences_total, 0, "{compared:?}");
    compared.records
}

#[test]
fn there_and_back_again_nothing_changes() {
    let server = NatsServer::start(NatsOptions::new());
    let connected = Connected::to(&server.url());
    let logs = deployment(2_500);
    let sources = shared(&logs);
    let place = connected.place(1);
    assert_eq!(copied(&sources, &place).unwrap(), 7_501);
    assert_eq!(same(&sources, &place), 7_501);
    assert!(!place.unfinished().unwrap());
    for (source, copy) in sources.iter().zip(found(&sources, &place)) {
        assert_eq!(copy.last_time(), source.last_time(), "not the server's time of the copy");
    }
    assert_eq!(copied(&sources, &connected.place(1)).unwrap(), 0, "again: nothing is missing");

    let fs = FaultFs::new();
    let back = EmbeddedPlace::new(Path::new("d"), EmbeddedOptions::default(), Arc::new(fs));
    let there = found(&sources, &place);
    assert_eq!(copied(&there, &back).unwrap(), 7_501);
    assert_eq!(same(&there, &back), 7_501);
    assert_eq!(same(&sources, &back), 7_501);

    // What producers publish to the copy has the server's time, whatever a header says; a log that was
    // published to can be copied on, but not onto.
    let mut message = message("usage.0.acme", 1);
    message.headers = vec![("Meterr-Time".to_owned(), "7".to_owned())];
    block_on(connected.usage(None).append(vec![message])).unwrap();
    let there = found(&sources, &place);
    assert_eq!(copied(&there, &back).unwrap(), 1);
    assert_eq!(same(&there, &back), 7_502);
    let last = block_on(back.find("USAGE_0").unwrap().unwrap().read(2_501, 1)).unwrap();
    assert!(last[0].time > Time(1_750_000_000_000_000), "{:?}", last[0].time);
    let usage = back.find("USAGE_0").unwrap().unwrap();
    block_on(usage.append(vec![Message::new("usage.0.acme", "x")])).unwrap();
    let on = found(&sources, &back);
    let error = planned(&on, &connected.place(1)).map(|plan| plan.missing).unwrap_err();
    assert!(error.to_string().contains("records 2501 to 2501 were published to it"), "{error}");
}

#[test]
fn a_copy_goes_on_where_it_was_interrupted_and_is_not_taken_for_whole() {
    let server = NatsServer::start(NatsOptions::new());
    let connected = Connected::to(&server.url());
    let logs = deployment(300);
    let sources = shared(&logs);
    // The process ends after the first log.
    let place = connected.place(1);
    let plan = planned(&sources, &place).unwrap();
    let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        copy::copy(&plan, &place, &mut |_| std::panic::resume_unwind(Box::new("ended")))
    }));
    assert!(ended.is_err());
    let place = connected.place(1);
    drop(found(&sources, &place));
    assert!(place.unfinished().unwrap(), "the control log lacks its records");
    assert_eq!(copied(&sources, &place).unwrap(), 601);
    assert_eq!(same(&sources, &place), 901);
    let place = connected.place(1);
    same(&sources, &place);
    assert!(!place.unfinished().unwrap());
}

#[test]
fn a_server_killed_in_the_middle_is_waited_for() {
    let mut server = NatsServer::start(NatsOptions::new());
    let connected = Connected::to(&server.url());
    let logs = deployment(8_000);
    let sources = shared(&logs);
    let place = connected.place(1);
    std::thread::scope(|scope| {
        let copying = scope.spawn(|| copied(&sources, &place));
        let mut kills = 0;
        let began = Instant::now();
        for wanted in [100, 2_000, 5_000] {
            loop {
                let info = server.request("$JS.API.STREAM.INFO.USAGE_0", "");
                let last = info.and_then(|info| info["state"]["last_seq"].as_u64()).unwrap_or(0);
                if last >= wanted || copying.is_finished() {
                    break;
                }
                assert!(began.elapsed() < Duration::from_secs(60), "the copy does not go on");
            }
            kills += usize::from(!copying.is_finished());
            server.restart();
        }
        assert!(kills > 0, "the copy was over before the first kill");
        assert_eq!(copying.join().unwrap().unwrap(), 24_001);
    });
    assert_eq!(same(&sources, &connected.place(1)), 24_001);
}

#[test]
fn a_cluster_that_loses_its_leader_takes_every_record_once() {
    let mut cluster = Cluster::start(3);
    let connected = Connected::to(&cluster.url());
    let logs = deployment(4_000);
    let sources = shared(&logs);
    let place = connected.place(3);
    std::thread::scope(|scope| {
        let copying = scope.spawn(|| copied(&sources, &place));
        let mut leader = cluster.leader("USAGE_0");
        let began = Instant::now();
        loop {
            let info = cluster.server(leader).request("$JS.API.STREAM.INFO.USAGE_0", "");
            if info.and_then(|info| info["state"]["last_seq"].as_u64()).unwrap_or(0) >= 100 {
                break;
            }
            assert!(began.elapsed() < Duration::from_secs(60), "the copy does not go on");
            leader = cluster.leader("USAGE_0");
        }
        cluster.server(leader).kill();
        assert_eq!(copying.join().unwrap().unwrap(), 12_001);
        cluster.server(leader).restart();
    });
    assert_eq!(same(&sources, &connected.place(3)), 12_001);
}

#[test]
fn streams_of_others_and_other_writers_are_noticed() {
    let server = NatsServer::start(NatsOptions::new());
    let connected = Connected::to(&server.url());
    let logs = deployment(50);
    let sources = shared(&logs);
    // Somebody publishes while the copy is made.
    let place = connected.place(1);
    let plan = planned(&sources, &place).unwrap();
    let mut publish = true;
    let error = copy::copy(&plan, &place, &mut |_| {
        if std::mem::take(&mut publish) {
            let subject = "out.0.part".to_owned();
            let publish = async {
                let client = connected.connections.output.clone();
                let context = async_nats::jetstream::new(client);
                context.publish(subject, "foreign".into()).await?.await
            };
            connected.runtime.block_on(publish).unwrap();
        }
    })
    .unwrap_err();
    let CopyError::Log(LogError::Changed { stream, what }) = &error else { panic!("{error}") };
    assert_eq!(stream, "OUT_0");
    assert!(what.contains("the record at 1 is not of this copy"), "{what}");

    // A deployment that began by itself.
    let server = NatsServer::start(NatsOptions::new());
    let connected = Connected::to(&server.url());
    drop(connected.usage(Some("another")));
    let error = planned(&sources, &connected.place(1)).map(|plan| plan.missing).unwrap_err();
    assert!(error.to_string().contains("its identity is another"), "{error}");
}

#[test]
fn messages_above_the_servers_limit_are_named_before_anything_is_copied() {
    let limit = NatsOptions::new().text("max_payload: 8192");
    let mut server = NatsServer::start(limit);
    let connected = Connected::to(&server.url());
    let logs = deployment(3);
    let large = Message::new("usage.0.acme", vec![b'x'; 8_000]);
    logs[0].append_at(vec![large], Time(i64::MAX / 2)).unwrap();
    let sources = shared(&logs);
    let place = connected.place(1);
    let error = planned(&sources, &place).map(|plan| plan.missing).unwrap_err().to_string();
    assert!(error.contains("cannot take 1 records; nothing was copied"), "{error}");
    assert!(error.contains("USAGE_0 position 4: 8256 bytes, above"), "{error}");
    assert!(error.contains("set max_payload: 1048576"), "{error}");
    assert!(place.streams().unwrap().is_empty());
    drop(connected);
    server.restart_with(NatsOptions::new().text("max_payload: 1048576"));
    let connected = Connected::to(&server.url());
    assert_eq!(copied(&sources, &connected.place(1)).unwrap(), 11);
    assert_eq!(same(&sources, &connected.place(1)), 11);
}
