//! Recommendations in cases worked out by hand, and a backtest over months of made-up load.

use meterr_operators::rng::Rng;
use meterr_operators::time::HOUR;

use super::*;
use crate::cluster::ShardView;

fn at(hour: i64) -> Time {
    Time(491_000 * HOUR + hour * HOUR)
}

/// So many events a second, for three weeks.
fn steady(rate: u64) -> LoadHistory {
    let mut load = LoadHistory::default();
    for hour in 0..504 {
        load.add(at(hour), rate * 3_600);
    }
    load
}

fn measured(rate: u64) -> ServiceRate {
    let mut service = ServiceRate::default();
    service.add(rate * 10, Duration::from_secs(10));
    service
}

fn now(load: &LoadHistory) -> Now<'_> {
    Now {
        log_time: at(504),
        load,
        busiest: None,
        service: measured(10_000),
        threads: 2,
        lag_events: 0,
        nodes: 1,
        shards: 16,
    }
}

#[test]
fn nodes_follow_load_service_rate_and_threads() {
    // A node does 20,000 a second and is to be filled to 70 %: 14,000.
    for (rate, nodes) in [(0, 1), (100, 1), (14_000, 1), (14_001, 2), (28_000, 2), (90_000, 7)] {
        let load = steady(rate);
        let found = recommend(&now(&load), &Aims::default());
        assert_eq!(found.recommended_nodes, nodes, "{rate}: {found:?}");
        let predicted = found.predicted_events_per_second.unwrap();
        assert!((predicted - rate as f64).abs() < 1e-6 * rate as f64 + 1e-9, "{found:?}");
        assert_eq!(found.service_rate_events_per_second, Some(10_000.0));
    }
    let load = steady(14_001);
    let text = recommend(&now(&load), &Aims::default()).reason;
    assert_eq!(
        text,
        "up to 14001 events/s expected within 4 h; a node does 20000 events/s (2 threads) and is to be \
         filled to 70 %"
    );
}

#[test]
fn fewer_nodes_only_with_room_to_spare() {
    // One node would do up to 14,000, and takes over from two below 85 % of that: 11,900.
    for (rate, nodes, expected) in
        [(13_000, 1, 1), (13_000, 2, 2), (11_901, 2, 2), (11_899, 2, 1), (11_899, 5, 1)]
    {
        let load = steady(rate);
        let found = recommend(&Now { nodes, ..now(&load) }, &Aims::default());
        assert_eq!(found.recommended_nodes, expected, "{rate} on {nodes}: {found:?}");
        assert_eq!(found.reason.contains("too little room"), expected > 1, "{found:?}");
    }
}

#[test]
fn lag_is_worked_off_in_time() {
    let load = steady(10_000);
    let aims = Aims { lag_within: Duration::from_secs(600), ..Aims::default() };
    // 10,000/s come in, 20,000/s go out of each node: one node catches up 10,000/s.
    for (lag, nodes) in [(0, 1), (5_999_999, 1), (6_000_001, 2), (60_000_000, 6)] {
        let found = recommend(&Now { lag_events: lag, ..now(&load) }, &aims);
        assert_eq!(found.recommended_nodes, nodes, "{lag}: {found:?}");
    }
    let found = recommend(&Now { lag_events: 60_000_000, ..now(&load) }, &aims);
    let expected = "60000000 events behind: 6 nodes of 20000 events/s work them off within 10 min while \
                    10000 events/s come in";
    assert_eq!(found.reason, expected);
}

#[test]
fn bounds_are_kept_and_said() {
    let load = steady(1_000_000);
    let found = recommend(&now(&load), &Aims::default());
    assert_eq!(found.recommended_nodes, 16);
    assert!(
        found.reason.ends_with("more nodes than the 16 shards have nothing to do"),
        "{found:?}"
    );
    let load = steady(1);
    let found = recommend(&now(&load), &Aims { nodes_min: 3, ..Aims::default() });
    assert_eq!(found.recommended_nodes, 3);
    assert!(found.reason.ends_with("3 are wanted in any case"), "{found:?}");
    let busiest = Some((ShardId(7), 12_000.0));
    let found = recommend(&Now { busiest, ..now(&load) }, &Aims::default());
    assert!(found.reason.contains("shard 7 alone takes in 12000 events/s"), "{found:?}");
}

#[test]
fn without_measurements_it_stays_as_it_is() {
    let load = steady(90_000);
    let idle = Now { service: ServiceRate::default(), nodes: 3, ..now(&load) };
    let found = recommend(&idle, &Aims::default());
    assert_eq!((found.recommended_nodes, found.service_rate_events_per_second), (3, None));
    assert_eq!(found.reason, "not enough work measured yet to say more than what is there");
    let none = LoadHistory::default();
    let found = recommend(&Now { nodes: 3, ..now(&none) }, &Aims::default());
    assert_eq!((found.recommended_nodes, found.predicted_events_per_second), (3, None));
    // Numbers from outside that are none.
    for odd in [f64::NAN, f64::INFINITY, -1.0, 0.0] {
        let aims = Aims { utilisation: odd, quantile: odd, shrink_below: odd, ..Aims::default() };
        let found = recommend(&now(&load), &aims);
        assert!((1..=16).contains(&found.recommended_nodes), "{odd}: {found:?}");
    }
}

#[test]
fn the_service_rate_is_that_of_the_last_minutes_of_work() {
    let mut service = ServiceRate::default();
    service.add(1_000, Duration::from_millis(400));
    assert_eq!(service.events_per_second(), None);
    for _ in 0..3_600 {
        service.add(5_000, Duration::from_secs(1));
    }
    assert!((service.events_per_second().unwrap() - 5_000.0).abs() < 10.0);
    for _ in 0..3_600 {
        service.add(20_000, Duration::from_secs(1));
    }
    assert!((service.events_per_second().unwrap() - 20_000.0).abs() < 300.0);
    let mut both = measured(10_000);
    both.merge(&measured(30_000));
    assert_eq!(both.events_per_second(), Some(20_000.0));
}

#[test]
fn lag_belongs_to_owners() {
    let shard = |shard: u16, owner: Option<&str>| ShardView {
        shard: ShardId(shard),
        owner: owner.map(str::to_owned),
        token: 1,
        wanted: None,
        pinned: None,
    };
    let shards =
        vec![shard(0, Some("a")), shard(1, Some("b")), shard(2, Some("a")), shard(3, None)];
    let view = ClusterView { shards, ..ClusterView::default() };
    let lag = lag_by_node(&view, &[5, 7, 11, 13]);
    let expected = [(None, 13), (Some("a".to_owned()), 16), (Some("b".to_owned()), 7)];
    assert_eq!(lag, BTreeMap::from(expected));
}

/// A made-up deployment: nights, weekends, 4 % growth a week, noise by the hour and by the day, a step
/// of a third in week 9 that stays, and hours of outage with their flood behind it. With `jobs`, two
/// hours of them every working night.
fn made_up(seed: u64, weeks: i64, jobs: bool) -> Vec<u64> {
    let mut rng = Rng::stream(seed, 1);
    let mut noise =
        |percent: i64| 1.0 + rng.between(-percent * 100, percent * 100) as f64 / 10_000.0;
    let mut day_noise = 1.0;
    let hours = weeks * 168;
    let mut made = Vec::new();
    for hour in 0..hours {
        if hour % 24 == 0 {
            day_noise = noise(8);
        }
        let (of_day, day) = ((hour % 24) as f64, hour / 24 % 7);
        let daily = 0.35 + 0.65 * (1.0 - ((of_day - 14.0) / 12.0).powi(2)).max(0.0);
        let weekly = if day >= 5 { 0.4 } else { 1.0 };
        let growth = 1.04_f64.powf(hour as f64 / 168.0);
        let step = if hour >= 9 * 168 + 30 { 1.33 } else { 1.0 };
        let outage = match hour - 6 * 168 {
            50..54 => 0.1,
            54..56 => 2.5,
            _ => 1.0,
        };
        let job = if jobs && day < 5 && (2..4).contains(&(hour % 24)) { 1.2 } else { 0.0 };
        let rate = 40_000.0 * (daily * weekly + job) * growth * step * outage;
        let rate = rate * day_noise * noise(12);
        made.push((rate * 3_600.0) as u64);
    }
    made
}

/// How a rule fares: hours in which nodes were filled beyond 70 %, hours in which they could not keep
/// up, node hours, and changes of their number.
#[derive(Debug, Default)]
struct Fared {
    hours: u32,
    above_target: u32,
    overloaded: u32,
    node_hours: u32,
    changes: u32,
}

impl Fared {
    fn hour(&mut self, nodes: u32, before: u32, events: u64) {
        let filled = events as f64 / 3_600.0 / (20_000.0 * f64::from(nodes));
        self.hours += 1;
        self.above_target += u32::from(filled > 0.7);
        self.overloaded += u32::from(filled > 1.0);
        self.node_hours += nodes;
        self.changes += u32::from(nodes != before);
    }
}

/// Runs the rules over five deployments from their third week on: ours, and nodes by the last hour
/// filled to these shares. Also the mean error of the predicted peak, and how often it lay below the
/// upper figure.
fn backtest(jobs: bool, shares: [f64; 2]) -> (Fared, [Fared; 2], f64, f64) {
    let (mut ours, mut last) = (Fared::default(), <[Fared; 2]>::default());
    let (mut errors, mut within, mut predictions) = (0.0, 0, 0);
    for seed in 0..5 {
        let made = made_up(seed, 14, jobs);
        let mut load = LoadHistory::default();
        let (mut nodes, mut nodes_last) = (3, [3; 2]);
        for (hour, events) in (0..).zip(&made) {
            if hour >= 2 * 168 {
                let asked = Now { log_time: at(hour), nodes, shards: 64, ..now(&load) };
                let recommended = recommend(&asked, &Aims::default());
                let before = std::mem::replace(&mut nodes, recommended.recommended_nodes);
                ours.hour(nodes, before, *events);

                let rate = made[hour as usize - 1] as f64 / 3_600.0;
                for ((share, nodes), fared) in shares.iter().zip(&mut nodes_last).zip(&mut last) {
                    let wanted = bounded(rate / (20_000.0 * share)).max(1);
                    let before = std::mem::replace(nodes, wanted);
                    fared.hour(wanted, before, *events);
                }

                let ahead = Aims::default().ahead_hours;
                if let Some(came) = made.get(hour as usize..hour as usize + ahead) {
                    let came = came.iter().max().copied().unwrap() as f64 / 3_600.0;
                    let said = load.predict(at(hour), ahead, 0.95).unwrap();
                    errors += (said.peak - came).abs() / came;
                    within += u32::from(came <= said.upper);
                    predictions += 1;
                }
            }
            load.add(at(hour), *events);
        }
    }
    (ours, last, errors / f64::from(predictions), f64::from(within) / f64::from(predictions))
}

#[test]
fn a_backtest_beats_the_rule_of_the_last_hour() {
    // The second share of the last hour's rule costs at least as many node hours as ours.
    for (jobs, costly) in [(false, 0.503), (true, 0.458)] {
        let (ours, [cheap, costly], error, covered) = backtest(jobs, [0.7, costly]);
        println!(
            "jobs {jobs}: mean error {:.1} %, covered {:.1} %",
            error * 100.0,
            covered * 100.0
        );
        for (rule, fared) in [("ours", &ours), ("last hour", &cheap), ("as costly", &costly)] {
            println!("  {rule:<10} {fared:?}");
        }
        assert!(error < 0.1 && covered > 0.92, "{error} {covered}");
        assert!(ours.above_target * 200 < ours.hours && cheap.above_target * 10 > cheap.hours);
        assert!(ours.node_hours <= costly.node_hours, "not the same cost");
        assert!(ours.above_target * 2 < costly.above_target && ours.changes * 2 < costly.changes);
        // What comes every night is no surprise to one of them.
        assert!(ours.overloaded <= if jobs { costly.overloaded / 20 } else { costly.overloaded });
    }
}
