//! Each rule once, in a small world whose registry and shards do at once what they are told.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use meterr_connectors::cluster::{Entry, RegistryError};
use meterr_operators::ids::ShardId;

use super::{Action, Member, ReleaseAnswer, ReleaseRequest, Settings};
use crate::cluster::Held;
use crate::cluster::records::{Key, Lease, Session, parse};

const SHARDS: u16 = 16;
const STEP: Duration = Duration::from_millis(50);

#[derive(Default)]
struct Registry {
    entries: BTreeMap<String, (u64, Bytes)>,
    revision: u64,
}

impl Registry {
    fn read(&self) -> Vec<Entry> {
        let entry = |(key, (revision, value)): (&String, &(u64, Bytes))| Entry {
            key: key.clone(),
            revision: *revision,
            value: value.clone(),
        };
        self.entries.iter().map(entry).collect()
    }

    fn write(&mut self, key: &str, value: &Bytes, expected: u64) -> Result<u64, RegistryError> {
        if self.entries.get(key).map_or(0, |(revision, _)| *revision) != expected {
            return Err(RegistryError::Conflict { key: key.into(), expected });
        }
        self.set(key, value.clone());
        Ok(self.revision)
    }

    fn set(&mut self, key: &str, value: impl Into<Bytes>) {
        self.revision += 1;
        self.entries.insert(key.into(), (self.revision, value.into()));
    }
}

struct Node {
    member: Member,
    held: Vec<Held>,
    /// Whether the process runs.
    runs: bool,
    reads: bool,
    writes: bool,
    /// Whether writes happen and their acknowledgements are lost.
    deaf: bool,
    /// Whether shards stop instead of standing by.
    broken: bool,
    read_at: Duration,
    /// What its shards were told.
    told: Vec<Action>,
}

struct World {
    now: Duration,
    registry: Registry,
    nodes: Vec<Node>,
}

fn settings(node: &str) -> Settings {
    Settings::new(node, SHARDS)
}

impl World {
    fn new(nodes: &[Settings]) -> World {
        let mut world =
            World { now: Duration::from_secs(100), registry: Registry::default(), nodes: vec![] };
        for settings in nodes {
            world.add(settings.clone());
        }
        world
    }

    fn add(&mut self, settings: Settings) -> usize {
        let seed = self.nodes.len() as u64 + 1;
        self.nodes.push(Node {
            held: vec![Held::Nothing; usize::from(settings.shards)],
            member: Member::new(settings, seed),
            runs: true,
            reads: true,
            writes: true,
            deaf: false,
            broken: false,
            read_at: Duration::ZERO,
            told: Vec::new(),
        });
        self.nodes.len() - 1
    }

    fn run(&mut self, time: Duration) {
        let end = self.now + time;
        while self.now < end {
            self.now += STEP;
            for node in 0..self.nodes.len() {
                if self.nodes[node].runs {
                    self.step(node);
                }
            }
            self.check();
        }
    }

    fn seconds(&mut self, seconds: f64) {
        self.run(Duration::from_secs_f64(seconds));
    }

    fn step(&mut self, number: usize) {
        let now = self.now;
        let node = &mut self.nodes[number];
        let due = now >= node.read_at + node.member.settings().ttl / 8 || node.member.look();
        if due && node.reads {
            node.read_at = now;
            node.member.read(now, now, &self.registry.read());
        }
        for action in node.member.act(now, &node.held) {
            let node = &mut self.nodes[number];
            match action {
                Action::Write { key, value, expected } => {
                    let away = RegistryError::Unavailable("away".into());
                    let mut outcome = Err(away.clone());
                    if node.writes {
                        outcome = self.registry.write(&key, &value, expected);
                    }
                    node.member.wrote(now, &key, if node.deaf { Err(away) } else { outcome });
                }
                Action::Ask { node: owner, shard, question } => {
                    let mut all = self.nodes.iter_mut();
                    let asked = all.find(|n| n.member.settings().node == owner && n.runs);
                    let answer = asked.map(|n| n.member.asked(now, &question));
                    self.nodes[number].member.answered(now, shard, answer.as_deref());
                }
                Action::Nudge => {}
                action => {
                    let (shard, held) = match action {
                        Action::StandBy(shard) if node.broken => {
                            (shard, Held::Stopped("no disk".into()))
                        }
                        Action::StandBy(shard) => (shard, Held::StandingBy { behind: 0 }),
                        Action::Own(shard, token) => (shard, Held::Owned { token, live: true }),
                        Action::Release(shard) => (shard, Held::Released),
                        Action::Drop(shard) => (shard, Held::Nothing),
                        _ => unreachable!(),
                    };
                    let at = &mut node.held[usize::from(shard.0)];
                    if !matches!(at, Held::Stopped(_)) || held == Held::Nothing {
                        *at = held;
                    }
                    node.told.push(action);
                }
            }
        }
    }

    /// No two nodes own a shard under one token.
    fn check(&self) {
        let mut owned = std::collections::BTreeSet::new();
        for node in &self.nodes {
            for (shard, held) in node.held.iter().enumerate() {
                if let Held::Owned { token, .. } = held {
                    assert!(owned.insert((shard, *token)), "shard {shard} owned twice: {token}");
                }
            }
        }
    }

    fn loads(&self) -> Vec<usize> {
        let owned = |held: &&Held| matches!(held, Held::Owned { live: true, .. });
        self.nodes.iter().map(|node| node.held.iter().filter(owned).count()).collect()
    }

    fn tokens(&self) -> Vec<u64> {
        let token = |held: &Held| match held {
            Held::Owned { token, .. } => Some(*token),
            _ => None,
        };
        let of = |shard: u16| {
            self.nodes.iter().find_map(|node| token(&node.held[usize::from(shard)])).unwrap_or(0)
        };
        (0..SHARDS).map(of).collect()
    }

    fn session(&self, node: &str) -> Session {
        let key = format!("node.{node}");
        parse(&key, &self.registry.entries[&key].1).unwrap()
    }

    fn wanted(&self, shard: u16) -> usize {
        let view = self.nodes[0].member.view(self.now);
        let wanted = view.shards[usize::from(shard)].wanted.clone().unwrap();
        self.nodes.iter().position(|n| n.member.settings().node == wanted).unwrap()
    }
}

fn three() -> World {
    let mut world = World::new(&["a", "b", "c"].map(settings));
    world.seconds(30.0);
    assert!(world.loads().iter().all(|load| (3..=7).contains(load)), "{:?}", world.loads());
    assert_eq!(world.loads().iter().sum::<usize>(), 16);
    world
}

#[test]
fn alone_it_claims_everything_at_once() {
    let mut world = World::new(&[settings("a")]);
    world.seconds(0.5);
    assert_eq!(world.loads(), [16]);
    let view = world.nodes[0].member.view(world.now);
    assert_eq!((view.nodes[0].state.as_str(), view.nodes[0].shards.len()), ("up", 16));
    assert_eq!(view.owner(ShardId(3)), Some("a"));
    let tokens = world.tokens();
    world.seconds(60.0);
    assert_eq!(world.tokens(), tokens, "a lease is written when it changes hands only");
}

#[test]
fn nodes_that_come_get_their_share_once_things_are_settled() {
    let mut world = World::new(&[settings("a")]);
    world.seconds(1.0);
    let before = world.tokens();
    world.add(settings("b"));
    world.seconds(9.0);
    assert_eq!(world.loads(), [16, 0]);
    world.seconds(10.0);
    let loads = world.loads();
    assert!(loads[0] + loads[1] == 16 && loads[1] >= 6, "{loads:?}");
    let after = world.tokens();
    let moved = before.iter().zip(&after).filter(|(before, after)| before != after).count();
    assert_eq!(moved, loads[1], "nothing else moved");
    assert!(before.iter().zip(&after).all(|(before, after)| before <= after));
    // Each move was a hand-over.
    let releases = world.nodes[0].told.iter().filter(|a| matches!(a, Action::Release(_))).count();
    assert_eq!(releases, loads[1]);
}

#[test]
fn few_shards_move_to_a_node_at_once() {
    let mut world = World::new(&[settings("a")]);
    world.seconds(1.0);
    world.nodes[0].member.own.leaving();
    world.add(settings("b"));
    for _ in 0..400 {
        world.run(STEP);
        // Standing by is for a move only.
        let gaining = |held: &&Held| matches!(held, Held::StandingBy { .. });
        assert!(world.nodes[1].held.iter().filter(gaining).count() <= 4);
    }
    assert!(world.loads()[1] >= 6);
}

#[test]
fn a_silent_node_is_buried_and_its_shards_are_taken() {
    let mut world = three();
    world.nodes[1].runs = false;
    // Its last beat was less than a quarter of the lease time ago.
    world.seconds(2.2);
    assert!(!world.session("b").over());
    world.seconds(1.3);
    assert!(world.session("b").over());
    let live = world.loads()[0] + world.loads()[2];
    assert_eq!(live, 16, "in a bit more than the lease time");
    let view = world.nodes[0].member.view(world.now);
    assert_eq!(view.nodes[1].state, "gone");
    // It thaws: it lets go of everything and begins anew.
    let session = world.session("b").session;
    world.nodes[1].runs = true;
    world.seconds(0.5);
    assert_eq!(world.loads()[1], 0);
    assert_ne!(world.session("b").session, session);
    world.seconds(30.0);
    assert!(world.loads()[1] >= 3, "and gets its share again");
}

#[test]
fn an_outage_of_the_registry_is_nobodys_death() {
    for reads in [false, true] {
        let mut world = three();
        let tokens = world.tokens();
        for _ in 0..5 {
            for node in &mut world.nodes {
                (node.reads, node.writes) = (reads, false);
            }
            world.seconds(17.0);
            // One comes back long before the others.
            (world.nodes[0].reads, world.nodes[0].writes) = (true, true);
            world.seconds(1.0);
            for node in &mut world.nodes {
                (node.reads, node.writes) = (true, true);
            }
            world.seconds(7.0);
        }
        assert_eq!(world.tokens(), tokens);
        assert!(["a", "b", "c"].iter().all(|node| !world.session(node).over()));
    }
}

#[test]
fn who_cannot_write_buries_nobody_and_is_buried() {
    let mut world = three();
    world.nodes[0].writes = false;
    world.seconds(10.0);
    assert_eq!(world.session("a").buried_by.as_deref().map(|by| by != "a"), Some(true));
    assert!(!world.session("b").over() && !world.session("c").over());
    assert_eq!(world.loads()[0], 0, "it read that it was buried");
    assert_eq!(world.loads().iter().sum::<usize>(), 16);
}

#[test]
fn lost_acknowledgements_are_found_out() {
    let mut world = World::new(&[settings("a")]);
    world.nodes[0].deaf = true;
    world.seconds(3.0);
    assert_eq!(world.loads(), [16]);
    let session = world.session("a").session;
    world.seconds(20.0);
    assert_eq!(world.session("a").session, session);
}

#[test]
fn a_name_belongs_to_one_process() {
    let mut world = World::new(&[settings("a")]);
    world.seconds(5.0);
    world.add(settings("a"));
    world.seconds(5.0);
    let refused = world.nodes[1].member.refused().unwrap();
    assert!(refused.contains("a node named \"a\" is already running"), "{refused}");
    assert_eq!(world.loads(), [16, 0]);
    // The first is killed; its successor waits until it is sure.
    world.nodes[0].runs = false;
    world.nodes[0].held.fill(Held::Nothing);
    world.nodes.remove(1);
    world.add(settings("a"));
    world.nodes[1].member = Member::new(settings("a"), 77);
    world.seconds(2.9);
    assert!(!world.nodes[1].member.active());
    world.seconds(0.6);
    assert_eq!(world.loads(), [0, 16], "leases of the older session are claimed at once");
}

#[test]
fn a_name_taken_while_it_runs_ends_its_session() {
    let mut world = World::new(&[settings("a")]);
    world.seconds(5.0);
    let mut other = world.session("a");
    for beat in 0..5 {
        other.session = "f".repeat(32);
        other.beat = beat;
        world.registry.set("node.a", super::bytes_of(&other));
        world.seconds(0.5);
    }
    assert_eq!(world.loads(), [0]);
    assert!(world.nodes[0].member.refused().is_some());
}

#[test]
fn a_lost_shard_is_taken_back_under_a_higher_token() {
    let mut world = World::new(&[settings("a")]);
    world.seconds(5.0);
    let before = world.tokens();
    world.nodes[0].held[2] = Held::Lost { token: 1_000_000 };
    world.seconds(0.5);
    let after = world.tokens();
    assert!(after[2] > 1_000_000, "{after:?}");
    assert_eq!(after.iter().zip(&before).filter(|(a, b)| a != b).count(), 1);
    let lease: Lease = parse("lease.2", &world.registry.entries["lease.2"].1).unwrap();
    assert_eq!(lease.raise, 1_000_000);
    // Again at once: it waits.
    world.nodes[0].held[2] = Held::Lost { token: 2_000_000 };
    world.seconds(1.0);
    assert_eq!(world.nodes[0].held[2], Held::Nothing);
    world.seconds(3.0);
    assert!(world.tokens()[2] > 2_000_000);
}

#[test]
fn a_shard_lost_to_another_owner_is_let_go_of() {
    let mut world = three();
    let shard = world.nodes[0].held.iter().position(|h| matches!(h, Held::Owned { .. })).unwrap();
    let session = world.session("b").session;
    let lease = Lease { format: 1, node: Some("b".into()), session, raise: 0 };
    world.registry.set(&format!("lease.{shard}"), super::write(&lease));
    world.nodes[0].held[shard] = Held::Lost { token: world.registry.revision };
    world.seconds(1.0);
    assert!(matches!(world.nodes[1].held[shard], Held::Owned { .. }));
    assert!(!matches!(world.nodes[0].held[shard], Held::Owned { .. } | Held::Lost { .. }));
}

#[test]
fn pins_and_drains_are_obeyed_at_once() {
    let mut world = three();
    let from = world.wanted(5);
    let to = (from + 1) % 3;
    let name = ["a", "b", "c"][to];
    world.registry.set("pin.5", format!(r#"{{"format":1,"node":"{name}"}}"#));
    world.seconds(1.5);
    assert!(matches!(world.nodes[to].held[5], Held::Owned { .. }));
    // The pinned node is drained: even what is pinned there goes.
    world.registry.set(&format!("drain.{name}"), r#"{"format":1,"drained":true}"#);
    world.seconds(6.0);
    let loads = world.loads();
    assert_eq!((loads[to], loads.iter().sum::<usize>()), (0, 16), "{loads:?}");
    assert_eq!(world.nodes[0].member.view(world.now).nodes[to].state, "draining");
    world.registry.set(&format!("drain.{name}"), r#"{"format":1,"drained":false}"#);
    world.seconds(2.0);
    assert!(matches!(world.nodes[to].held[5], Held::Owned { .. }), "the pin counts again");
}

#[test]
fn who_leaves_hands_over_first_and_nobody_waits_for_it() {
    let mut world = three();
    let now = world.now;
    world.nodes[2].member.leave(now);
    let before = world.tokens();
    world.seconds(4.0);
    assert!(world.nodes[2].member.left());
    assert!(world.session("c").left);
    let loads = world.loads();
    assert_eq!((loads[0] + loads[1], loads[2]), (16, 0));
    assert!(world.tokens().iter().zip(&before).all(|(after, before)| after >= before));
    assert_eq!(world.nodes[0].member.view(world.now).nodes.len(), 2);
}

#[test]
fn who_leaves_alone_goes_at_once_and_comes_back_at_once() {
    let mut world = World::new(&[settings("a")]);
    world.seconds(5.0);
    let now = world.now;
    world.nodes[0].member.leave(now);
    world.seconds(0.5);
    assert!(world.nodes[0].member.left());
    assert_eq!(world.loads(), [0]);
    assert!(world.nodes[0].told.iter().any(|a| matches!(a, Action::Release(_))));
    world.add(settings("a"));
    world.seconds(0.5);
    assert_eq!(world.loads(), [0, 16]);
}

#[test]
fn who_leaves_does_not_wait_for_ever() {
    let mut world = World::new(&[settings("a"), settings("b")]);
    world.seconds(30.0);
    world.nodes[1].broken = true;
    let now = world.now;
    world.nodes[0].member.leave(now);
    world.seconds(29.0);
    assert!(!world.nodes[0].member.left());
    world.seconds(2.0);
    assert!(world.nodes[0].member.left());
}

#[test]
fn a_wanted_node_that_cannot_blocks_nobody() {
    let mut world = three();
    let shard = 4;
    let wanted = world.wanted(shard);
    let others: Vec<usize> = (0..3).filter(|node| *node != wanted).collect();
    world.nodes[wanted].held[usize::from(shard)] = Held::Stopped("damaged".into());
    // It gives the lease back, and does not claim it again.
    world.registry.set("lease.4", r#"{"format":1}"#);
    world.seconds(2.5);
    assert_eq!(world.tokens()[4], 0);
    world.seconds(1.0);
    assert!(others.iter().any(|node| matches!(world.nodes[*node].held[4], Held::Owned { .. })));
}

#[test]
fn a_replica_stands_by_for_everything_and_owns_nothing() {
    let replica = Settings { replica: true, ..settings("r") };
    let mut world = World::new(&[replica, settings("a")]);
    world.seconds(20.0);
    assert_eq!(world.loads(), [0, 16]);
    assert!(world.nodes[0].held.iter().all(|held| matches!(held, Held::StandingBy { .. })));
    world.nodes[1].runs = false;
    world.seconds(20.0);
    assert_eq!(world.loads()[0], 0, "not even when nobody else is there");
}

#[test]
fn as_many_stand_by_as_are_asked_for() {
    let with = |name| Settings { standbys: 1, ..settings(name) };
    let mut world = World::new(&["a", "b", "c"].map(with));
    world.seconds(40.0);
    for shard in 0..usize::from(SHARDS) {
        let count =
            |of: fn(&Held) -> bool| world.nodes.iter().filter(|node| of(&node.held[shard])).count();
        assert_eq!(count(|held| matches!(held, Held::Owned { .. })), 1);
        assert_eq!(count(|held| matches!(held, Held::StandingBy { .. })), 1);
    }
}

#[test]
fn an_owner_goes_on_when_the_gaining_node_vanishes() {
    let mut world = World::new(&[settings("a"), settings("b")]);
    world.seconds(0.5);
    // Not settled yet: b asks on its own.
    let shard = (0..SHARDS).find(|s| world.wanted(*s) == 1).unwrap();
    let request = ReleaseRequest {
        format: 1,
        ask: "release".into(),
        shard: ShardId(shard),
        node: "b".into(),
        session: world.session("b").session,
        lease: world.nodes[0].member.revision(&Key::Lease(ShardId(shard))),
    };
    world.nodes[1].runs = false;
    let now = world.now;
    let before = world.tokens()[usize::from(shard)];
    let owner = &mut world.nodes[0];
    // Its shard takes its time.
    let answer = owner.member.asked(now, &super::write(&request));
    assert!(parse::<ReleaseAnswer>("", &answer).unwrap().releasing);
    owner.held[usize::from(shard)] = Held::Releasing;
    world.seconds(5.0);
    assert!(world.session("b").over());
    let after = world.tokens()[usize::from(shard)];
    assert!(after > before, "{before} {after}");
}

#[test]
fn requests_that_do_not_fit_are_refused() {
    let mut world = World::new(&[settings("a"), settings("b")]);
    world.seconds(0.5);
    let now = world.now;
    let shard = (0..SHARDS).map(ShardId).find(|s| world.wanted(s.0) == 1).unwrap();
    let kept = (0..SHARDS).map(ShardId).find(|s| world.wanted(s.0) == 0).unwrap();
    let session = world.session("b").session;
    let member = &mut world.nodes[0].member;
    let lease = |member: &Member, shard| member.revision(&Key::Lease(shard));
    let good = ReleaseRequest {
        format: 1,
        ask: "release".into(),
        shard,
        node: "b".into(),
        session,
        lease: lease(member, shard),
    };
    let kept = ReleaseRequest { shard: kept, lease: lease(member, kept), ..good.clone() };
    let bad = [
        (ReleaseRequest { ask: "own".into(), ..good.clone() }, "not a request"),
        (ReleaseRequest { shard: ShardId(16), ..good.clone() }, "not a request"),
        (ReleaseRequest { node: "b.*".into(), ..good.clone() }, "not a request"),
        (ReleaseRequest { lease: 1, ..good.clone() }, "lease is at revision"),
        (ReleaseRequest { session: "0".into(), ..good.clone() }, "session is not known"),
        (ReleaseRequest { node: "x".into(), ..good.clone() }, "session is not known"),
        (ReleaseRequest { format: 2, ..good.clone() }, "newer meterr"),
        (kept, "go elsewhere"),
    ];
    let mut ask = |question: &[u8]| {
        parse::<ReleaseAnswer>("", &member.asked(now, question)).expect("an answer")
    };
    for (request, why) in bad {
        let answer = ask(&super::write(&request));
        assert!(!answer.releasing && answer.why.contains(why), "{why}: {answer:?}");
    }
    assert!(!ask(b"\xff").releasing);
    assert!(ask(&super::write(&good)).releasing);
    assert!(ask(&super::write(&good)).releasing, "asking twice is no harm");
}

#[test]
fn what_a_newer_version_wrote_is_left_alone() {
    let mut world = World::new(&[settings("a")]);
    world.registry.set("lease.3", r#"{"format":2}"#);
    world.registry.set("node.z", r#"{"format":2}"#);
    let lease = Lease { format: 1, node: Some("z".into()), session: "s".into(), raise: 0 };
    world.registry.set("lease.4", super::write(&lease));
    world.seconds(20.0);
    assert_eq!(world.loads(), [14]);
    assert_eq!(world.nodes[0].member.problems().len(), 2);
    assert_eq!(world.nodes[0].member.view(world.now).nodes[1].state, "newer");
    world.registry.set("node.a", r#"{"format":2}"#);
    world.seconds(1.0);
    assert!(world.nodes[0].member.refused().unwrap().contains("newer meterr"));
    assert_eq!(world.loads(), [0]);
}

#[test]
fn leases_of_sessions_that_are_over_are_void() {
    // A node without an entry is buried like a silent one.
    let mut world = World::new(&[settings("a")]);
    let lease = |session: &str| {
        let (node, session) = (Some("z".to_owned()), session.to_owned());
        super::write(&Lease { format: 1, node, session, raise: 0 })
    };
    world.registry.set("lease.1", lease("s1"));
    world.seconds(2.0);
    assert_eq!(world.loads(), [15]);
    world.seconds(3.0);
    assert_eq!(world.loads(), [16]);
    // A newer session of that node.
    let session = Session { session: "s2".into(), ..world.session("a") };
    world.registry.set("lease.2", lease("s1"));
    world.registry.set("node.z", super::bytes_of(&session));
    world.seconds(0.5);
    assert!(matches!(world.nodes[0].held[2], Held::Owned { .. }));
    // A lease above the entry of its node may be one of a session that is not seen yet.
    world.registry.set("lease.3", lease("s3"));
    world.seconds(2.9);
    assert!(!matches!(world.nodes[0].held[3], Held::Owned { .. }));
    world.seconds(0.6);
    assert!(matches!(world.nodes[0].held[3], Held::Owned { .. }));
}

#[test]
fn a_registry_made_anew_is_filled_again() {
    let mut world = three();
    let sessions = ["a", "b", "c"].map(|node| world.session(node).session);
    world.registry = Registry::default();
    world.seconds(25.0);
    assert_eq!(world.loads().iter().sum::<usize>(), 16);
    assert_eq!(["a", "b", "c"].map(|node| world.session(node).session), sessions);
}
