use meterr_operators::shard::Counts;
use meterr_operators::time::HOUR;

use super::*;

fn commit(usage: u64, hour: i64, lines: u64) -> Committed {
    Committed {
        counts: Counts { lines, counted: lines, repeated: 0 },
        rejected: Vec::new(),
        oldest: None,
        usage,
        records: 1,
        log_time: Time(491_000 * HOUR + hour * HOUR),
        busy: Duration::from_secs(1),
        took: Duration::from_secs(2),
        append_took: Duration::from_secs(1),
    }
}

fn entry(key: &str, value: Bytes) -> Entry {
    Entry { key: key.to_owned(), revision: 3, value }
}

#[test]
fn what_was_counted_is_due_when_a_shard_is_let_go_of_and_adds_to_what_stands() {
    let (a, b) = (Measured::default(), Measured::default());
    a.committed(ShardId(1), &commit(5, 0, 100));
    assert_eq!(a.due(ShardId(1), true), None, "an owner waits");
    assert_eq!(a.due(ShardId(0), false), None);
    let first = a.due(ShardId(1), false).unwrap();
    assert_eq!(a.take(ShardId(1)).unwrap(), first);
    assert_eq!(a.take(ShardId(1)), None);
    a.give_back(ShardId(1), &first);
    b.committed(ShardId(1), &commit(9, 1, 40));
    let mut loads = BTreeMap::new();
    b.add_to(&mut loads);
    a.add_to(&mut loads);
    let mut whole = ShardLoad::default();
    whole.add(5, commit(5, 0, 0).log_time, 100);
    whole.add(9, commit(9, 1, 0).log_time, 40);
    assert_eq!(loads[&ShardId(1)], whole, "in whatever order owners write");
    assert_eq!(a.events_per_record(), 100.0);
}

#[test]
fn entries_of_nodes_and_shards_make_an_outlook() {
    let mut load = ShardLoad::default();
    load.add(1, Time(491_000 * HOUR), 3_600 * 900);
    load.add(2, Time(491_001 * HOUR), 0);
    let session = |threads: f64| {
        let figures = format!(
            r#"{{"service_events":10000,"service_busy_seconds":10,"threads":{threads},"lag_events":-5}}"#
        );
        Bytes::from(format!(
            r#"{{"format":1,"session":"a","beat":1,"capacity":1.0,"figures":{figures}}}"#
        ))
    };
    let entries = [
        entry("load.0", write(&Load { format: FORMAT, load: load.clone() })),
        entry("load.1", Bytes::from_static(b"{")),
        entry("load.2", Bytes::from_static(br#"{"format":9}"#)),
        entry("load.9", write(&Load { format: FORMAT, load })),
        entry("node.a", session(1.0)),
        entry("node.b", session(2.0)),
    ];
    let found = Found::read(&entries, 4);
    assert_eq!(found.newer, [ShardId(2)], "left alone");
    assert_eq!(found.entries.keys().copied().collect::<Vec<_>>(), [ShardId(0), ShardId(1)]);
    assert_eq!(found.loads.len(), 1, "a damaged one begins anew, one of no shard is none");
    let outlook = found.outlook(Time(491_001 * HOUR), 4, &["a", "b"], &Aims::default());
    assert_eq!(outlook.events_per_second["a"], 1_000.0);
    assert_eq!(outlook.events_per_second["b"], 2_000.0);
    let forecast = outlook.forecast.unwrap();
    // 900/s at half as much again, on nodes that do 1,000/s and are to be filled to 70 %.
    assert_eq!(forecast.predicted_events_per_second, Some(1_350.0));
    assert_eq!(forecast.service_rate_events_per_second, Some(1_000.0));
    assert_eq!(forecast.recommended_nodes, 2, "{}", forecast.reason);
}
