//! Every question, good and bad.

use serde_json::json;

use super::service::World;
use crate::api::*;
use meterr_operators::time::Time;

#[test]
fn members_of_a_request_are_the_parameters_of_http() {
    let world = World::new();
    let node = world.node();
    let page = world.ask("meterr.query.acme.spend", "").ok();
    let plain = SpendQuery {
        org: "acme".to_owned(),
        user: None,
        window: Window::All,
        from: None,
        to: None,
        by: GroupBy::None,
        min_position: None,
    };
    assert_eq!(node.fake.last(), format!("{plain:?}"));
    assert_eq!((&page["rows"][0]["cost"], &page["as_of"]), (&json!("3"), &json!("3:7")));

    world
        .ask(
            "meterr.query.acme.spend",
            r#"{"user":"u/1","window":"day","by":"tag:team","from":"2026-01-02T00:00:00+01:00",
                "to":"2026-01-03T00:00:00Z","min_position":"3:7,c:2","timeout_ms":500,"limit":5}"#,
        )
        .ok();
    let query = SpendQuery {
        user: Some("u/1".to_owned()),
        window: Window::Day,
        by: GroupBy::Tag("team".to_owned()),
        from: Some(Time::parse("2026-01-01T23:00:00Z").unwrap()),
        to: Some(Time::parse("2026-01-03T00:00:00Z").unwrap()),
        min_position: Some("3:7,c:2".parse().unwrap()),
        ..plain
    };
    assert_eq!(node.fake.last(), format!("{query:?}"));

    let prices = r#"{"prices":[{"provider":"openai","model":"gpt-4o","input":"2.5"}]}"#;
    for (subject, body, asked) in [
        (
            "meterr.query.acme.view",
            r#"{"name":"by_team"}"#,
            "view by_team SpendQuery { org: \"acme\"",
        ),
        ("meterr.query.acme.unpriced", "{}", "unpriced acme"),
        ("meterr.query.acme.time-zone", "", "time zone of acme"),
        ("meterr.query.acme", "", "catch_up acme None"),
        (
            "meterr.query.acme",
            r#"{"after":"3-42"}"#,
            "catch_up acme Some(StreamId { shard: ShardId(3), epoch: 42 })",
        ),
        (
            "meterr.admin.top",
            r#"{"by":"model","n":3,"window":"day"}"#,
            "TopQuery { by: Model, window: Day",
        ),
        ("meterr.admin.prices", r#"{"model":"gpt-4o"}"#, "prices Some(\"gpt-4o\")"),
        ("meterr.admin.prices.set", prices, "set 1 prices"),
        ("meterr.admin.prices.preview", prices, "preview 1 prices"),
        ("meterr.admin.views", "", "views"),
        (
            "meterr.admin.views.declare",
            r#"{"name":"by_model","by":["model"],"window":"day"}"#,
            "declare by_model",
        ),
        ("meterr.admin.views.remove", r#"{"name":"by_model"}"#, "remove by_model"),
        (
            "meterr.admin.time-zone.set",
            r#"{"org":"acme","time_zone":"Asia/Tokyo"}"#,
            "time zone of acme is Asia/Tokyo",
        ),
        ("meterr.admin.dead-letters", r#"{"shard":3,"limit":2}"#, "DeadLetterQuery { reason: None"),
        ("meterr.admin.dead-letters.show", r#"{"id":"3-7-0"}"#, "dead letter 3-7-0"),
        ("meterr.admin.dead-letters.replay", r#"{"id":"3-7-0"}"#, "replay 3-7-0 None"),
        (
            "meterr.admin.dead-letters.replay",
            "{\"id\":\"3-7-0\",\"event\":{\"id\":\"1\",\n\"org\":\"acme\"}}",
            "replay 3-7-0 Some(b\"{\\\"id\\\":\\\"1\\\", \\\"org\\\":\\\"acme\\\"}\")",
        ),
    ] {
        world.ask(subject, body).ok();
        assert!(node.fake.last().starts_with(asked), "{subject} {body}: {}", node.fake.last());
    }
    let status = world.ask("meterr.admin.status", "").ok();
    assert_eq!(status["shards"][3]["state"], "live");
}

#[test]
fn what_is_wrong_is_a_problem_of_http() {
    let world = World::new();
    let node = world.node();
    for (subject, body, kind, part) in [
        (
            "meterr.query.acme.spend",
            r#"{"windows":"day"}"#,
            "parameter",
            "no parameter \"windows\"",
        ),
        ("meterr.query.acme.spend", r#"{"org":"other"}"#, "parameter", "no parameter \"org\""),
        ("meterr.query.acme.spend", r#"{"window":"week"}"#, "parameter", "hour, day, month, all"),
        ("meterr.query.acme.spend", r#"{"limit":0}"#, "parameter", "from 1 to 10000"),
        ("meterr.query.acme.spend", r#"{"user":""}"#, "parameter", "1 to 128 bytes"),
        ("meterr.query.acme.spend", r#"{"user":"\u0000"}"#, "parameter", "control characters"),
        ("meterr.query.acme.spend", "[]", "body", "an object of parameters"),
        ("meterr.query.acme.spend", "{", "body", "EOF"),
        ("meterr.query.a+b.spend", "", "parameter", "A-Z, a-z, 0-9"),
        ("meterr.query.@batch", "", "parameter", "A-Z, a-z, 0-9"),
        ("meterr.query.acme", r#"{"after":"x"}"#, "parameter", "<shard>-<epoch>"),
        ("meterr.query.acme.view", "", "parameter", "\"name\" is missing"),
        ("meterr.query.acme.view", r#"{"name":"By"}"#, "parameter", "a-z, 0-9"),
        ("meterr.query.acme.time-zone", r#"{"x":1}"#, "parameter", "no parameters are taken"),
        ("meterr.admin.top", r#"{"by":"user","window":"hour"}"#, "parameter", "unless by=org"),
        ("meterr.admin.prices.set", "", "body", "EOF"),
        ("meterr.admin.prices.set", r#"{"prices":[]}"#, "body", "no entry"),
        ("meterr.admin.prices.preview", r#"{"price":[]}"#, "body", "unknown field"),
        (
            "meterr.admin.views.declare",
            r#"{"name":"v","by":[],"window":"day"}"#,
            "body",
            "0 dimensions",
        ),
        ("meterr.admin.views.remove", "{}", "parameter", "\"name\" is missing"),
        (
            "meterr.admin.time-zone.set",
            r#"{"org":"acme"}"#,
            "parameter",
            "\"time_zone\" is missing",
        ),
        ("meterr.admin.time-zone.set", r#"{"time_zone":"UTC"}"#, "parameter", "\"org\" is missing"),
        ("meterr.admin.time-zone.set", r#"{"org":"a","time_zone":"a b"}"#, "body", "IANA"),
        ("meterr.admin.dead-letters", r#"{"shard":4}"#, "parameter", "from 0 to 3"),
        ("meterr.admin.dead-letters.show", r#"{"id":"7"}"#, "parameter", "such as 3-1042-0"),
        ("meterr.admin.dead-letters.replay", r#"{"id":"3-7-0","event":7}"#, "body", "invalid type"),
        ("meterr.admin.dead-letters.replay", r#"{"id":"3-7-0","x":7}"#, "body", "unknown field"),
    ] {
        let problem = world.ask(subject, body).problem(400, kind);
        let detail = problem["detail"].as_str().unwrap();
        assert!(detail.contains(part), "{subject} {body}: {detail}");
    }
    assert!(node.fake.asked.lock().is_empty());

    for (error, status, kind) in [
        (ApiError::Invalid("no".to_owned()), 400, "invalid"),
        (ApiError::NotFound("no\nsuch view".to_owned()), 404, "not-found"),
        (ApiError::Unavailable("starting".to_owned()), 503, "unavailable"),
        (ApiError::Internal("broken".to_owned()), 500, "internal"),
    ] {
        *node.fake.error.lock() = Some(error);
        let reply = world.ask("meterr.admin.views", "");
        assert_eq!(reply.json()["type"], format!("/problems/{kind}"));
        assert_eq!(reply.header("Nats-Service-Error-Code"), Some(status.to_string().as_str()));
        assert!(!reply.header("Nats-Service-Error").unwrap().contains('\n'));
    }
    *node.fake.error.lock() = None;
    *node.fake.panics.lock() = true;
    world.ask("meterr.admin.views", "").problem(500, "internal");
    *node.fake.panics.lock() = false;
    world.ask("meterr.admin.views", "").ok();
    let counted: Vec<_> = node.handle.counted().filter(|(name, _)| *name == "views").collect();
    assert_eq!((counted[0].1.answers, counted[0].1.problems), (1, 5));
}
