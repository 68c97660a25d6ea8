//! Any node answers for any org; nobody answers with less than what was wanted.

use std::time::{Duration, Instant};

use meterr_connectors::api::{
    Api, ApiError, Drain, GroupBy, Move, SpendAnswer, SpendQuery, TopBy, TopQuery, Window,
};
use meterr_engine::asking::STALENESS_MS_MAX;
use meterr_engine::cluster::Held;
use meterr_engine::service::Service;
use meterr_operators::ids::{Positions, ShardId, shard_of};
use meterr_operators::money::Atto;

use crate::nodes::{Deployment, Node, SHARDS};

pub fn spend(org: &str, min_position: Option<Positions>) -> SpendQuery {
    SpendQuery {
        org: org.to_owned(),
        user: None,
        window: Window::All,
        from: None,
        to: None,
        by: GroupBy::None,
        min_position,
    }
}

pub fn at(shard: ShardId, position: u64) -> Positions {
    let mut positions = Positions::default();
    positions.raise(shard, position);
    positions
}

async fn events(service: &Service, org: &str, min: Positions) -> (i64, SpendAnswer) {
    let answer = service.spend(spend(org, Some(min))).await.unwrap();
    (answer.rows.first().map_or(0, |row| row.figures.events), answer)
}

/// An org of each shard.
fn orgs() -> Vec<String> {
    let of = |shard| {
        let named = |n: &u32| shard_of(&format!("org-{n}"), SHARDS) == ShardId(shard);
        format!("org-{}", (0..).find(named).unwrap())
    };
    (0..SHARDS).map(of).collect()
}

async fn two() -> (Deployment, Node, Node) {
    let deployment = Deployment::new(&["n1", "n2"]);
    let (n1, n2) =
        (Node::start(&deployment, "n1", false).await, Node::start(&deployment, "n2", false).await);
    for shard in 0..SHARDS {
        let node = if shard % 2 == 0 { &n1 } else { &n2 };
        node.own(&deployment, ShardId(shard)).await;
    }
    (deployment, n1, n2)
}

#[tokio::test(flavor = "multi_thread")]
async fn any_node_answers_for_any_org_and_waits_where_the_shard_is() {
    let (deployment, n1, n2) = two().await;
    for (n, org) in orgs().iter().enumerate() {
        let mut last = (ShardId(0), 0);
        for id in 0..=n as u64 {
            last = deployment.publish(org, id).await;
        }
        for node in [&n1, &n2] {
            let (found, answer) = events(&node.service, org, at(last.0, last.1)).await;
            assert_eq!(found, n as i64 + 1, "{org} from {}", node.name);
            assert_eq!(answer.as_of.as_of.of(last.0), Some(last.1));
            assert_eq!(answer.as_of.staleness_ms, None, "owners are current");
        }
    }
    // What every shard knows a share of.
    let query =
        |by| TopQuery { by, window: Window::All, at: None, n: 3, org: None, min_position: None };
    for by in [TopBy::Org, TopBy::User, TopBy::Model, TopBy::Feature] {
        let (own, as_of) = n1.service.top(query(by)).await.unwrap();
        let (other, _) = n2.service.top(query(by)).await.unwrap();
        assert_eq!(own, other);
        assert_eq!(as_of.epochs.len(), usize::from(SHARDS));
        if by == TopBy::Org {
            let costs: Vec<_> = own.iter().map(|row| row.figures.cost.unwrap()).collect();
            assert_eq!(costs, [4, 3, 2].map(Atto::usd));
        }
    }
    let (n1_views, n2_views) = (n1.service.status().await, n2.service.status().await);
    for (of_n1, of_n2) in n1_views.iter().zip(&n2_views) {
        assert_eq!((&of_n1.owner, &of_n1.state), (&of_n2.owner, &of_n2.state));
        assert_eq!(of_n1.usage_position, of_n2.usage_position);
        assert_eq!(of_n1.elsewhere, !of_n2.elsewhere);
        assert_eq!(of_n1.state, "live");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_position_that_is_not_reached_ends_in_where_the_shard_stands() {
    let (deployment, n1, _n2) = two().await;
    let org = &orgs()[1];
    let (shard, last) = deployment.publish(org, 1).await;
    events(&n1.service, org, at(shard, last)).await;
    let error = n1.service.spend(spend(org, Some(at(shard, last + 5)))).await.unwrap_err();
    let ApiError::Timeout { current } = error else { panic!("{error}") };
    assert_eq!(current.of(shard), Some(last));
    let beyond = n1.service.spend(spend(org, Some(at(ShardId(9), 1)))).await.unwrap_err();
    assert!(matches!(beyond, ApiError::Invalid(_)), "{beyond}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_stands_by_answers_when_the_owner_is_gone_but_never_with_less_than_wanted() {
    let (deployment, n1, n2) = two().await;
    let org = &orgs()[1];
    let (shard, first) = deployment.publish(org, 1).await;
    events(&n1.service, org, at(shard, first)).await;
    n1.stand_by(&deployment, shard).await;
    let (_, second) = deployment.publish(org, 2).await;
    // The owner is there: it answers, although something stands by here.
    let (found, answer) = events(&n1.service, org, at(shard, second)).await;
    assert_eq!((found, answer.as_of.staleness_ms), (2, None));

    deployment.wires.cut("n2");
    *n1.staleness.lock() = Some(1_234);
    let (found, answer) = events(&n1.service, org, at(shard, first)).await;
    assert_eq!((found, answer.as_of.staleness_ms), (1, Some(1_234)));
    assert_eq!(answer.as_of.as_of.of(shard), Some(first));
    *n1.staleness.lock() = None;
    let (_, answer) = events(&n1.service, org, Positions::default()).await;
    assert_eq!(answer.as_of.staleness_ms, Some(STALENESS_MS_MAX));

    // It lacks the second event: it waits, and then says what is going on.
    let error = n1.service.spend(spend(org, Some(at(shard, second)))).await.unwrap_err();
    let ApiError::Unavailable(why) = error else { panic!("{error}") };
    assert!(why.contains("\"n2\" does not listen"), "{why}");

    // A silent owner is given up for what stands by, sooner than the question.
    deployment.wires.silent.lock().push("n2".to_owned());
    meterr_connectors::cluster::Peers::serve(&*deployment.wires, "n2", n2.service.answerer())
        .await
        .unwrap();
    let begun = Instant::now();
    assert_eq!(events(&n1.service, org, at(shard, first)).await.0, 1);
    assert!(begun.elapsed() < Duration::from_millis(2_900), "{:?}", begun.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_question_waits_for_a_shard_on_the_move() {
    let (deployment, n1, n2) = two().await;
    let org = &orgs()[1];
    let (shard, first) = deployment.publish(org, 1).await;
    events(&n2.service, org, at(shard, first)).await;
    n2.release(shard).await;
    deployment.owned_by(shard, None);
    let service = n1.service.clone();
    let query = spend(org, Some(at(shard, first)));
    let mut asked = tokio::spawn(async move { service.spend(query).await });
    let early = tokio::time::timeout(Duration::from_millis(300), &mut asked).await;
    assert!(early.is_err(), "nobody has the shard: {early:?}");
    n2.own(&deployment, shard).await;
    let answer = asked.await.unwrap().unwrap();
    assert_eq!(answer.rows[0].figures.events, 1);

    // The node that was asked waits for a position when the shard moves to the asker.
    let service = n1.service.clone();
    let query = spend(org, Some(at(shard, first + 1)));
    let mut asked = tokio::spawn(async move { service.spend(query).await });
    let early = tokio::time::timeout(Duration::from_millis(300), &mut asked).await;
    assert!(early.is_err(), "not published yet: {early:?}");
    n2.release(shard).await;
    n1.own(&deployment, shard).await;
    deployment.publish(org, 2).await;
    let answer = asked.await.unwrap().unwrap();
    assert_eq!(answer.rows[0].figures.events, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_answers_from_what_it_follows() {
    let (deployment, n1, _n2) = two().await;
    let org = &orgs()[0];
    let (shard, first) = deployment.publish(org, 1).await;
    events(&n1.service, org, at(shard, first)).await;
    let replica = Node::start(&deployment, "r1", true).await;
    // While it has nothing yet it asks the owner.
    assert_eq!(events(&replica.service, org, at(shard, first)).await.1.as_of.staleness_ms, None);
    replica.stand_by(&deployment, shard).await;
    *replica.staleness.lock() = Some(7);
    deployment.wires.asked.lock().clear();
    let (_, second) = deployment.publish(org, 2).await;
    events(&n1.service, org, at(shard, second)).await;
    let (found, answer) = events(&replica.service, org, at(shard, first)).await;
    assert_eq!((found, answer.as_of.staleness_ms), (1, Some(7)));
    assert!(deployment.wires.asked.lock().is_empty());
    let error = replica.service.spend(spend(org, Some(at(shard, second)))).await.unwrap_err();
    assert!(matches!(error, ApiError::Timeout { .. }), "{error}");
    let here = replica.service.status().await[usize::from(shard.0)].here.clone();
    assert_eq!(here.as_deref(), Some("standing by"));
    replica.hold(shard, Held::Nothing);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_newer_format_is_refused_with_a_sentence() {
    let (_deployment, n1, _n2) = two().await;
    let answer =
        (n1.service.answerer())(bytes::Bytes::from_static(br#"{"format":2,"body":{"riddle":{}}}"#));
    let answer = String::from_utf8(answer.await.to_vec()).unwrap();
    assert!(answer.contains("unreadable") && answer.contains("format 2"), "{answer}");
    for junk in [&b""[..], b"{", b"[1]", b"{\"format\":1,\"body\":{\"shard\":{}}}"] {
        let answer = (n1.service.answerer())(bytes::Bytes::copy_from_slice(junk)).await;
        let answer = String::from_utf8(answer.to_vec()).unwrap();
        assert!(answer.contains("unreadable"), "{answer}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_cluster_is_shown_and_steered_from_any_node() {
    let (deployment, n1, n2) = two().await;
    let (shard, last) = deployment.publish(&orgs()[1], 1).await;
    events(&n1.service, &orgs()[1], at(shard, last)).await;
    deployment.view.send_modify(|view| view.shards[1].wanted = Some("n1".to_owned()));
    for node in [&n1, &n2] {
        let cluster = node.service.cluster().await.unwrap();
        assert_eq!((cluster.node.as_str(), cluster.recommended_nodes), (&*node.name, Some(2)));
        assert_eq!(cluster.reason.as_deref(), Some("much comes in"));
        assert_eq!(cluster.predicted_events_per_second, Some(1_350.0));
        assert_eq!(cluster.service_rate_events_per_second, Some(1_000.0));
        let owners: Vec<_> = cluster.shards.iter().filter_map(|s| s.owner.as_deref()).collect();
        assert_eq!(owners, ["n1", "n2", "n1", "n2"]);
        assert!(cluster.shards.iter().all(|shard| shard.state == "live" && shard.lag == 0));
        assert_eq!(cluster.shards[1].wanted.as_deref(), Some("n1"));
        let rates: Vec<_> = cluster.nodes.iter().map(|node| node.events_per_second).collect();
        assert_eq!(rates, [Some(1_000.0), None]);
    }
    let drain = |node: &str| Drain { node: node.to_owned(), drain: true };
    n2.service.drain(drain("n1")).await.unwrap();
    let to = |node: &str| Move { shard, node: Some(node.to_owned()) };
    n2.service.move_shard(to("n1")).await.unwrap();
    assert_eq!(*n2.wishes.0.lock(), ["drain n1 true", "pin 1 Some(\"n1\")"]);
    let unknown = n2.service.drain(drain("n9")).await.unwrap_err();
    assert!(matches!(unknown, ApiError::NotFound(_)), "{unknown}");
    deployment.view.send_modify(|view| view.nodes[0].state = "draining".to_owned());
    let refused = n2.service.move_shard(to("n1")).await.unwrap_err();
    assert!(matches!(refused, ApiError::Conflict(_)), "{refused}");

    // An owner that does not tell shows as away, the rest as it is.
    deployment.wires.cut("n2");
    let cluster = n1.service.cluster().await.unwrap();
    let states: Vec<_> = cluster.shards.iter().map(|shard| shard.state.as_str()).collect();
    assert_eq!(states, ["live", "away", "live", "away"]);
    assert!(cluster.shards[1].problem.as_ref().unwrap().contains("does not listen"));
}
