//! The golden messages of `config/wire` through the decoders and encoders of this crate and the one
//! beneath: events, control records, live messages, dead letters, problem documents. (Requests and
//! replies are asked over a real server beside the service; what shards write, beside the engine.)

#![allow(clippy::unwrap_used)]

#[path = "../../tests/support/wire.rs"]
mod wire;

use meterr_connectors::api::DeadLetter;
use meterr_connectors::changes::{LiveKind, LiveMessage};
use meterr_connectors::codec::{decode_line, decode_message};
use meterr_connectors::log::Message;
use meterr_connectors::requests::problem::{Kind, Problem};
use meterr_operators::control::ControlChange;
use meterr_operators::event::Meter;
use meterr_operators::ids::{ShardId, shard_of};

#[test]
fn events_are_taken() {
    let line = wire::read("events/event.json");
    let event = decode_line(&line).unwrap();
    assert_eq!((&*event.id, &*event.org, &*event.user), ("01J9ZQ4Y7M", "acme", "u-17"));
    assert_eq!(event.meters[Meter::Input as usize], 254);
    assert_eq!(event.meters[Meter::CacheRead as usize], 120);
    let line = wire::read("events/correction.json");
    let correction = decode_line(&line).unwrap();
    assert_eq!((&correction.id, correction.revision, correction.void), (&event.id, 1, false));
    let line = wire::read("events/void.json");
    let void = decode_line(&line).unwrap();
    assert_eq!((&*void.id, void.revision, void.void), ("01J9ZQ4Y8B", 1, true));
}

#[test]
fn a_batch_is_events_of_one_shard() {
    let message = Message::new("usage.15.@batch", wire::read("events/batch.ndjson"));
    let decoded = decode_message(&message);
    let mut orgs = Vec::new();
    for (_, _, event) in decoded.lines() {
        let event = event.unwrap();
        assert_eq!(shard_of(&event.org, 16), ShardId(15));
        orgs.push(event.org.to_string());
    }
    assert_eq!(orgs, ["acme", "adatum", "adatum"]);
}

#[test]
fn a_cloudevent_in_binary_mode_is_an_event() {
    let golden = wire::json("events/cloudevent.json");
    let headers = golden["headers"].as_object().unwrap().iter();
    let message = Message {
        headers: headers.map(|(k, v)| (k.clone(), v.as_str().unwrap().to_owned())).collect(),
        ..Message::new("usage.15.acme", golden["data"].to_string())
    };
    let decoded = decode_message(&message);
    let events: Vec<_> = decoded.lines().map(|(_, _, event)| event.unwrap()).collect();
    let [event] = events.as_slice() else { panic!("one event: {events:?}") };
    assert_eq!((&*event.id, &*event.org, &*event.user), ("A234-1234-1234", "acme", "u-17"));
    assert_eq!(event.meters[Meter::Input as usize], 254);
    // The valid message without its attributes is none.
    let bare = Message::new("usage.15.acme", golden["data"].to_string());
    assert!(decode_message(&bare).lines().all(|(_, _, event)| event.is_err()));
}

#[test]
fn control_records_are_written_as_they_are_read() {
    let names = wire::names().into_iter().filter(|name| name.starts_with("control/"));
    let mut seen = Vec::new();
    for name in names {
        let bytes = wire::read(&name);
        let change = ControlChange::parse(&bytes).unwrap_or_else(|error| panic!("{name}: {error}"));
        wire::check(&name, &change.to_bytes());
        // Every kind has its file: a new one does not compile here without being named.
        let kind = match change {
            ControlChange::Prices(_) => "prices",
            ControlChange::TimeZone(_) => "time_zone",
            ControlChange::View(_) => "view",
            ControlChange::ViewRemoved(_) => "view_removed",
            ControlChange::Horizon(_) => "horizon",
            ControlChange::Seed(_) => "seed",
            ControlChange::DeadLetterReplayed(_) => "dead_letter_replayed",
        };
        assert_eq!(name, format!("control/{kind}.json"));
        seen.push(kind);
    }
    assert_eq!(seen.len(), 7, "{seen:?}");
}

#[test]
fn live_messages_are_read() {
    for (name, kind) in [
        ("live/snapshot.json", LiveKind::Snapshot),
        ("live/change.json", LiveKind::Change),
        ("live/change_more.json", LiveKind::Change),
        ("live/current.json", LiveKind::Current),
    ] {
        let message: LiveMessage = serde_json::from_slice(&wire::read(name)).unwrap();
        assert_eq!((message.kind, &*message.org), (kind, "acme"), "{name}");
        assert_eq!(message.more, name.ends_with("_more.json"), "{name}");
        assert_eq!(message.shard, shard_of("acme", 16), "{name}");
        assert_eq!(message.previous.is_some(), kind == LiveKind::Change, "{name}");
        assert_eq!((message.piece, message.pieces), (0, 1), "{name}");
    }
}

#[test]
fn a_dead_letter_is_written_as_it_is_read() {
    let golden = wire::json("out/part_dead_letters.json");
    let letter: DeadLetter = serde_json::from_value(golden["dead_letters"][0].clone()).unwrap();
    assert_eq!(serde_json::to_value(&letter).unwrap(), golden["dead_letters"][0]);
    assert_eq!(letter.id, "15-1-0");
}

#[test]
fn a_problem_is_written_as_the_golden_one() {
    let problem = Problem::parameter("window", "week", "one of hour, day, month, all");
    assert_eq!(problem.kind(), Kind::Parameter);
    wire::check_json("replies/problem.json", problem.body().as_bytes());
}
