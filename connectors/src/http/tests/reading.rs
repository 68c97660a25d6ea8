//! Every route that reads or changes, good and bad.

use meterr_operators::ids::ShardId;
use meterr_operators::time::Time;

use super::super::HttpSettings;
use super::*;
use crate::api::*;

fn spend_query() -> SpendQuery {
    SpendQuery {
        org: "acme".to_owned(),
        user: None,
        window: Window::All,
        from: None,
        to: None,
        by: GroupBy::None,
        min_position: None,
    }
}

#[test]
fn spend_asks_what_the_parameters_say() {
    let server = run(small());
    let page = server.get("/v1/orgs/acme/spend").ok(200);
    assert_eq!(server.fake.last(), format!("{:?}", spend_query()));
    assert_eq!(page["rows"][0]["cost"], "3");
    assert_eq!(page["rows"][0]["window_start"], "2026-01-02T00:00:00+01:00");
    assert_eq!(page["next_cursor"], Value::Null);
    assert_eq!(page["as_of"], "3:7");
    assert_eq!(page["epochs"], serde_json::json!([[3, 7]]));

    server
        .get(
            "/v1/orgs/acme/spend?window=day&by=tag:team%2F1&from=2026-01-02T00:00:00%2B01:00\
             &to=2026-01-03T00:00:00Z&min_position=3:7,c:2&timeout_ms=500&limit=5",
        )
        .ok(200);
    let query = SpendQuery {
        window: Window::Day,
        by: GroupBy::Tag("team/1".to_owned()),
        from: Some(Time::parse("2026-01-01T23:00:00Z").unwrap()),
        to: Some(Time::parse("2026-01-03T00:00:00Z").unwrap()),
        min_position: Some("3:7,c:2".parse().unwrap()),
        ..spend_query()
    };
    assert_eq!(server.fake.last(), format!("{query:?}"));
}

#[test]
fn a_user_may_have_any_name() {
    let server = run(small());
    for (path, user) in [("u-1", "u-1"), ("a%2Fb", "a/b"), ("%25", "%"), ("%2541+%C3%A4", "%41+ä")]
    {
        server.get(&format!("/v1/orgs/acme/users/{path}/spend?window=month")).ok(200);
        let query =
            SpendQuery { user: Some(user.to_owned()), window: Window::Month, ..spend_query() };
        assert_eq!(server.fake.last(), format!("{query:?}"));
    }
    for path in ["%FF", "%00", "%C3", &"x".repeat(129)] {
        let reply = server.get(&format!("/v1/orgs/acme/users/{path}/spend"));
        assert_eq!(reply.problem(400, "parameter")["parameter"], "user", "{path}");
    }
}

#[test]
fn wrong_parameters_are_named() {
    let server = run(small());
    for (path, parameter) in [
        ("/v1/orgs/a.b/spend", "org"),
        ("/v1/orgs/a%20b/spend", "org"),
        ("/v1/orgs/acme/spend?window=week", "window"),
        ("/v1/orgs/acme/spend?windows=day", "windows"),
        ("/v1/orgs/acme/spend?by=org", "by"),
        ("/v1/orgs/acme/spend?from=yesterday", "from"),
        ("/v1/orgs/acme/spend?from=2026-01-02T00:00:00Z&to=2026-01-01T00:00:00Z", "to"),
        ("/v1/orgs/acme/spend?limit=0", "limit"),
        ("/v1/orgs/acme/spend?limit=10001", "limit"),
        ("/v1/orgs/acme/spend?min_position=4:1", "min_position"),
        ("/v1/orgs/acme/spend?timeout_ms=30001", "timeout_ms"),
        ("/v1/orgs/acme/spend?cursor=x", "cursor"),
        ("/v1/orgs/acme/spend?by=user&by=user", "by"),
        ("/v1/orgs/acme/unpriced?limit=1", "limit"),
        ("/v1/top?by=provider", "by"),
        ("/v1/top?n=1001", "n"),
        ("/v1/top?by=user&window=hour", "window"),
        ("/v1/top?by=org&org=acme", "org"),
        ("/v1/top?by=user&org=a.b", "org"),
        ("/v1/top?at=x", "at"),
        ("/v1/dead-letters?reason=late", "reason"),
        ("/v1/dead-letters?shard=4", "shard"),
        ("/v1/dead-letters?before=7", "before"),
        ("/v1/dead-letters?limit=1001", "limit"),
        ("/v1/dead-letters/x", "id"),
        ("/v1/prices?org=acme", "org"),
        ("/v1/views?x=1", "x"),
        ("/v1/views/By-team/orgs/acme", "name"),
        ("/v1/views/v/orgs/a.b", "org"),
        ("/v1/views/v/orgs/acme?window=day", "window"),
        ("/v1/shards?shard=1", "shard"),
        ("/v1/orgs/acme/stream?last_event_id=x", "last_event_id"),
        ("/healthz?x", "x"),
        ("/metrics?x", "x"),
        ("/openapi.json?x", "x"),
    ] {
        let problem = server.get(path).problem(400, "parameter");
        assert_eq!(problem["parameter"], parameter, "{path}: {problem}");
        let allowed = problem["allowed"].as_str().unwrap();
        assert!(problem["detail"].as_str().unwrap().contains(allowed), "{problem}");
    }
    assert!(server.fake.asked.lock().is_empty());
}

#[test]
fn pages_show_one_moment() {
    let server = run(small());
    *server.fake.rows.lock() = fake::rows(5);
    let path = "/v1/orgs/acme/spend?by=user&window=day&limit=2";
    let mut page = server.get(path).ok(200);
    // Spend goes on; the pages do not.
    *server.fake.rows.lock() = fake::rows(1);
    server.fake.reached.send_replace(8);
    let mut keys = Vec::new();
    loop {
        assert_eq!(page["as_of"], "3:7");
        let rows = page["rows"].as_array().unwrap();
        keys.extend(rows.iter().map(|row| row["key"].as_str().unwrap().to_owned()));
        let Some(cursor) = page["next_cursor"].as_str().map(str::to_owned) else { break };
        let alone = server.get(&format!("/v1/orgs/acme/spend?limit=2&cursor={cursor}")).ok(200);
        page = server.get(&format!("{path}&cursor={cursor}")).ok(200);
        assert_eq!(alone, page, "a page may be asked for again");
        let other = server.get(&format!("/v1/orgs/acme/spend?by=model&cursor={cursor}"));
        assert_eq!(other.problem(400, "parameter")["parameter"], "cursor");
        let other = server.get(&format!("/v1/orgs/other/spend?cursor={cursor}"));
        assert_eq!(other.problem(400, "parameter")["parameter"], "cursor");
    }
    assert_eq!(keys, ["u-0", "u-1", "u-2", "u-3", "u-4"]);
    assert_eq!(server.fake.asked.lock().len(), 1);
    assert_eq!(server.get(path).ok(200)["as_of"], "3:8");
}

#[test]
fn an_expired_cursor_says_begin_again() {
    let server = run(HttpSettings { cursor_lifetime: Duration::ZERO, ..small() });
    *server.fake.rows.lock() = fake::rows(3);
    let page = server.get("/v1/orgs/acme/spend?limit=2").ok(200);
    let cursor = page["next_cursor"].as_str().unwrap();
    let problem =
        server.get(&format!("/v1/orgs/acme/spend?cursor={cursor}")).problem(410, "cursor-expired");
    assert!(problem["detail"].as_str().unwrap().contains("begin again"));
}

#[test]
fn an_answer_beyond_what_is_kept_is_refused() {
    let server = run(HttpSettings { cursor_rows_max: 4, ..small() });
    *server.fake.rows.lock() = fake::rows(5);
    let problem = server.get("/v1/orgs/acme/spend?limit=2").problem(422, "answer-too-large");
    assert_eq!((&problem["rows"], &problem["limit"]), (&5.into(), &4.into()));
    assert_eq!(server.get("/v1/orgs/acme/spend?limit=5").ok(200)["next_cursor"], Value::Null);
}

#[test]
fn a_position_is_waited_for() {
    let server = run(small());
    let mut stream = server.connect();
    let path = "/v1/orgs/acme/spend?min_position=3:9";
    stream.write_all(&request("GET", path, &[], b"")).unwrap();
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    while server.fake.asked.lock().is_empty() {
        assert!(std::time::Instant::now() < deadline);
        std::thread::yield_now();
    }
    server.fake.reached.send_replace(9);
    Reply::read(&mut stream).ok(200);
}

#[test]
fn a_position_not_reached_says_where_the_shards_stand() {
    let server = run(HttpSettings { min_position_timeout: Duration::from_millis(20), ..small() });
    let problem = server
        .get("/v1/orgs/acme/spend?min_position=1:3,3:9,c:2&timeout_ms=0")
        .problem(504, "timeout");
    assert_eq!(problem["current"], "1:7,3:7,c:7");
    let path = "/v1/top?min_position=c:9";
    assert_eq!(server.get(path).problem(504, "timeout")["current"], "c:7");
    let path = "/v1/orgs/acme/unpriced?min_position=0:8";
    assert_eq!(server.get(path).problem(504, "timeout")["current"], "0:7");
}

#[test]
fn a_slow_answer_is_not_a_position_missed() {
    let server = run(small());
    server.fake.gate.send_replace(false);
    let mut stream = server.connect();
    let path = "/v1/orgs/acme/spend?min_position=3:7&timeout_ms=0";
    stream.write_all(&request("GET", path, &[], b"")).unwrap();
    // Twice: by then the wait for the position is certainly over.
    server.get("/healthz").ok(200);
    server.get("/healthz").ok(200);
    server.fake.gate.send_replace(true);
    Reply::read(&mut stream).ok(200);
}

#[test]
fn the_small_routes_answer() {
    let server = run(small());
    let get = |path: &str| server.get(path).ok(200);
    let json = "application/json";

    assert_eq!(get("/v1/orgs/acme/unpriced")["rows"][0]["model"], "gpt-x");
    assert_eq!(get("/v1/orgs/acme/time-zone")["time_zone"], "UTC");
    assert_eq!(get("/v1/views")["views"][0]["name"], "by_team");
    assert_eq!(get("/v1/prices?model=gpt-4o")["as_of"], "c:19");
    assert_eq!(server.fake.last(), "prices Some(\"gpt-4o\")");
    assert_eq!(get("/v1/shards")["shards"][3]["state"], "live");

    let top = get("/v1/top?by=model&window=month&n=3&org=acme&at=2026-01-02T00:00:00Z");
    assert_eq!(top["rows"][0]["key"], "acme");
    let query = TopQuery {
        by: TopBy::Model,
        window: Window::Month,
        at: Some(Time::parse("2026-01-02T00:00:00Z").unwrap()),
        n: 3,
        org: Some("acme".to_owned()),
        min_position: None,
    };
    assert_eq!(server.fake.last(), format!("{query:?}"));

    get("/v1/views/by_team/orgs/acme?from=2026-01-02T00:00:00Z");
    assert!(server.fake.last().starts_with("view by_team SpendQuery { org: \"acme\""));

    let body =
        br#"{"prices":[{"provider":"openai","model":"gpt-4o","input":"2.5","output":"10"}]}"#;
    assert_eq!(server.post("/v1/prices", json, body).ok(202)["position"], "c:19");
    assert_eq!(server.fake.last(), "set 1 prices");
    let effect = server.post("/v1/prices/preview", json, body).ok(200);
    assert_eq!(effect["entries_changed"], 1);

    let reply =
        server.send("PUT", "/v1/orgs/acme/time-zone", &[], b"{\"time_zone\":\"Asia/Tokyo\"}");
    assert_eq!(reply.ok(202)["position"], "c:19");
    assert_eq!(server.fake.last(), "time zone of acme is Asia/Tokyo");

    let view = br#"{"name":"by_model","by":["model"],"window":"day"}"#;
    assert_eq!(server.post("/v1/views", json, view).ok(202)["position"], "c:19");
    server.send("DELETE", "/v1/views/by_model", &[], b"").ok(202);
    assert_eq!(server.fake.last(), "remove by_model");
}

#[test]
fn wrong_bodies_are_refused_with_their_place() {
    let server = run(small());
    let json = "application/json";
    for (method, path, body, part) in [
        ("POST", "/v1/prices", "{\"prices\":\n[}", "line 2"),
        ("POST", "/v1/prices", "{\"prices\":[]}", "no entry"),
        ("POST", "/v1/prices", "{\"price\":[]}", "unknown field"),
        ("POST", "/v1/prices/preview", "", "EOF"),
        ("PUT", "/v1/orgs/acme/time-zone", "{\"time_zone\":\"a b\"}", "IANA"),
        ("PUT", "/v1/orgs/acme/time-zone", "{\"time_zone\":7}", "expected a string"),
        ("POST", "/v1/views", "{\"name\":\"V\",\"by\":[\"model\"],\"window\":\"day\"}", "a-z"),
        ("POST", "/v1/views", "{\"name\":\"v\",\"by\":[],\"window\":\"week\"}", "week"),
        ("POST", "/v1/views", "{\"name\":\"v\",\"by\":[],\"window\":\"day\",\"x\":1}", "`x`"),
        ("POST", "/v1/dead-letters/3-7-0/replay", "rubbish", "expected value"),
    ] {
        let reply = server.send(method, path, &[("content-type", json)], body.as_bytes());
        let problem = reply.problem(400, "body");
        assert!(problem["detail"].as_str().unwrap().contains(part), "{problem}");
    }
    server.post("/v1/prices", "text/csv", b"x").problem(415, "media-type");
    assert!(server.fake.asked.lock().is_empty());
}

#[test]
fn dead_letters_are_listed_page_by_page() {
    let server = run(small());
    let page = server.get("/v1/dead-letters?reason=too_late&shard=3&limit=2").ok(200);
    assert_eq!(page["rows"].as_array().unwrap().len(), 2);
    assert_eq!(page["next_before"], "3-7-1");
    let query = DeadLetterQuery {
        reason: Some(meterr_operators::event::Reason::TooLate),
        shard: Some(ShardId(3)),
        before: None,
        limit: 3,
    };
    assert_eq!(server.fake.last(), format!("{query:?}"));
    assert_eq!(server.get("/v1/dead-letters?before=3-7-1").ok(200)["next_before"], Value::Null);
    assert_eq!(server.get("/v1/dead-letters/3-7-0").ok(200)["raw"], "{");
}

#[test]
fn a_dead_letter_is_replayed_as_it_is_or_mended() {
    let server = run(small());
    let path = "/v1/dead-letters/3-7-0/replay";
    assert_eq!(server.send("POST", path, &[], b"").ok(202)["position"], "3:8");
    assert_eq!(server.fake.last(), "replay 3-7-0 None");
    let mended = b"{\"id\":\"1\",\n\"org\":\"acme\"}\n";
    server.post(path, "application/json", mended).ok(202);
    assert_eq!(server.fake.last(), r#"replay 3-7-0 Some(b"{\"id\":\"1\", \"org\":\"acme\"}")"#);
}

#[test]
fn what_the_engine_refuses_is_passed_on() {
    let server = run(small());
    for (error, status, kind) in [
        (ApiError::Invalid("no".to_owned()), 400, "invalid"),
        (ApiError::NotFound("no".to_owned()), 404, "not-found"),
        (ApiError::Timeout { current: "3:7".parse().unwrap() }, 504, "timeout"),
        (ApiError::Unavailable("no".to_owned()), 503, "unavailable"),
        (ApiError::Internal("no".to_owned()), 500, "internal"),
    ] {
        *server.fake.error.lock() = Some(error);
        let reply = server.get("/v1/orgs/acme/spend");
        reply.problem(status, kind);
        assert_eq!(reply.header("retry-after").is_some(), status == 503);
    }
}

#[test]
fn a_panic_is_one_requests_500() {
    let server = run(small());
    *server.fake.panics.lock() = true;
    server.get("/v1/orgs/acme/spend").problem(500, "internal");
    *server.fake.panics.lock() = false;
    server.get("/v1/orgs/acme/spend").ok(200);
}

#[test]
fn readiness_follows_the_shards_and_health_does_not() {
    let server = run(small());
    assert_eq!(server.get("/readyz").ok(200)["status"], "ready");
    *server.fake.state.lock() = "replay".to_owned();
    let problem = server.get("/readyz").problem(503, "unavailable");
    assert_eq!(problem["shards"][0]["state"], "replay");
    assert!(problem["detail"].as_str().unwrap().contains("0 of 4"));
    assert_eq!(server.get("/healthz").ok(200)["status"], "ok");
    let metrics = server.get("/metrics");
    assert_eq!(metrics.header("content-type"), Some("text/plain; version=0.0.4"));
    assert_eq!(metrics.body, b"meterr_events_total 1\n");
}

#[test]
fn unknown_paths_and_methods_are_problems() {
    let server = run(small());
    for path in ["/", "/v1/orgs/acme", "/v1/orgs//spend", "/v1/orgs/acme/spend/", "/problems/x"] {
        server.get(path).problem(404, "not-found");
    }
    let reply = server.send("DELETE", "/v1/prices", &[], b"");
    reply.problem(405, "method");
    assert_eq!(reply.header("allow"), Some("GET, HEAD, POST"));
    server.get("/v1/events").problem(405, "method");
    let kind = server.get("/problems/timeout").ok(200);
    assert_eq!((&kind["type"], &kind["status"]), (&"/problems/timeout".into(), &504.into()));
}

#[test]
fn head_answers_like_get_without_a_body() {
    let server = run(small());
    let mut stream = server.connect();
    // Two requests on one connection: a body after the first would be taken for the second's head.
    for path in ["/v1/orgs/acme/spend", "/healthz"] {
        stream.write_all(&request("HEAD", path, &[], b"")).unwrap();
        let reply = Reply::head(&mut stream);
        assert_eq!(reply.status, 200, "{path}");
    }
    let mut stream = server.connect();
    stream.write_all(&request("HEAD", "/v1/orgs/acme/stream", &[], b"")).unwrap();
    assert_eq!(Reply::head(&mut stream).status, 405);
}

#[test]
fn answers_are_compressed_when_asked() {
    let server = run(small());
    *server.fake.rows.lock() = fake::rows(100);
    let plain = server.get("/v1/orgs/acme/spend");
    assert_eq!(plain.header("content-encoding"), None);
    for coding in ["gzip", "zstd"] {
        let headers = [("accept-encoding", coding)];
        let reply = server.send("GET", "/v1/orgs/acme/spend", &headers, b"");
        assert_eq!(reply.header("content-encoding"), Some(coding));
        assert_eq!(
            reply.header("vary").map(str::to_ascii_lowercase).as_deref(),
            Some("accept-encoding")
        );
        assert!(reply.body.len() < plain.body.len() / 4);
        let mut body = Vec::new();
        match coding {
            "gzip" => {
                let mut decoder = flate2::read::GzDecoder::new(reply.body.as_slice());
                decoder.read_to_end(&mut body).unwrap();
            }
            _ => body = zstd::decode_all(reply.body.as_slice()).unwrap(),
        }
        assert_eq!(body, plain.body);
    }
    let headers = [("accept-encoding", "br, identity;q=0")];
    server.send("GET", "/v1/orgs/acme/spend", &headers, b"").problem(406, "not-acceptable");
}

/// What is sent is what the types read, so that a client in Rust can use them.
#[test]
fn rows_read_back_into_their_types() {
    let server = run(small());
    let body = server.get("/v1/orgs/acme/spend").body;
    #[derive(serde::Deserialize)]
    struct Page {
        rows: Vec<SpendRow>,
        #[serde(flatten)]
        as_of: AsOf,
    }
    let page: Page = serde_json::from_slice(&body).unwrap();
    assert_eq!(page.rows, fake::rows(1));
    assert_eq!(page.as_of.epochs, [(ShardId(3), 7)]);
}
