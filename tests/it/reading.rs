//! Reads: read-your-write, pages of one moment, top lists, tags, problems, metrics, description.

use serde_json::json;

use crate::{launch, line};

#[test]
fn a_read_with_the_position_of_a_write_shows_it() {
    let dir = tempfile::tempdir().unwrap();
    let server = launch(dir.path()).start();
    for n in 1..=100 {
        let position =
            server.publish(&line(&format!("e{n}"), "acme", "u1", "2026-02-03T04:05:06Z"));
        let path = format!("/v1/orgs/acme/users/u1/spend?window=all&min_position={position}");
        let answer = server.get(&path).expect(200);
        assert_eq!(answer["rows"][0]["events"], n, "{answer}");
    }
}

#[test]
fn a_position_that_does_not_come_is_answered_with_where_things_stand() {
    let dir = tempfile::tempdir().unwrap();
    let server = launch(dir.path()).start();
    let position = server.publish(&line("e1", "acme", "u1", "2026-02-03T04:05:06Z"));
    server.get(&format!("/v1/orgs/acme/spend?min_position={position}")).expect(200);
    let (shard, at) = position.split_once(':').unwrap();
    let beyond = at.parse::<u64>().unwrap() + 1;
    let path = format!("/v1/orgs/acme/spend?min_position={shard}:{beyond}&timeout_ms=50");
    let answer = server.get(&path);
    assert_eq!(answer.media_type, "application/problem+json");
    let problem = answer.expect(504);
    assert_eq!(problem["current"], position, "{problem}");
    // Its valid twin waits until somebody writes.
    let url = server.url.clone();
    let waiting = std::thread::spawn(move || {
        let agent = crate::support::agent();
        let url = format!(
            "{url}/v1/orgs/acme/spend?window=all&min_position={shard}:{beyond}",
            shard = path_shard(&path)
        );
        crate::support::ask(&agent, "GET", &url, "", b"").unwrap().expect(200)
    });
    server.publish(&line("e2", "acme", "u1", "2026-02-03T04:05:06Z"));
    assert_eq!(waiting.join().unwrap()["rows"][0]["events"], 2);
}

fn path_shard(path: &str) -> String {
    path.split("min_position=").nth(1).unwrap().split(':').next().unwrap().to_owned()
}

#[test]
fn pages_of_a_cursor_show_one_moment() {
    let dir = tempfile::tempdir().unwrap();
    let server = launch(dir.path()).start();
    let lines = |from: u32| -> String {
        (0..25)
            .map(|n| {
                line(&format!("e{from}-{n}"), "acme", &format!("u{n:02}"), "2026-02-03T04:05:06Z")
            })
            .collect()
    };
    let position = server.publish(&lines(0));
    let path = format!("/v1/orgs/acme/spend?window=day&by=user&limit=10&min_position={position}");
    let first = server.get(&path).expect(200);
    assert_eq!(first["rows"].as_array().unwrap().len(), 10);
    // Whatever comes now is not in the pages to come.
    let later = server.publish(&lines(1));
    server.get(&format!("/v1/orgs/acme/spend?min_position={later}")).expect(200);
    let mut rows = first["rows"].as_array().unwrap().clone();
    let mut cursor = first["next_cursor"].as_str().map(str::to_owned);
    let mut pages = 1;
    while let Some(next) = cursor {
        let page = server.get(&format!("/v1/orgs/acme/spend?limit=10&cursor={next}")).expect(200);
        assert_eq!(page["as_of"], first["as_of"]);
        rows.extend(page["rows"].as_array().unwrap().iter().cloned());
        cursor = page["next_cursor"].as_str().map(str::to_owned);
        pages += 1;
    }
    assert_eq!((pages, rows.len()), (3, 25));
    assert!(rows.iter().all(|row| row["events"] == 1), "{rows:?}");
    // A question asked anew shows it.
    assert!(server.rows("/v1/orgs/acme/spend?window=day&by=user").iter().all(|r| r["events"] == 2));
}

#[test]
fn top_lists_run_across_shards() {
    let dir = tempfile::tempdir().unwrap();
    let server = launch(dir.path()).start();
    let mut lines = String::new();
    for org in 1..=9 {
        for n in 0..org {
            lines.push_str(&line(
                &format!("e{n}"),
                &format!("org{org}"),
                &format!("u{n}"),
                "2026-02-03T04:05:06Z",
            ));
        }
    }
    let position = server.publish(&lines);
    let path =
        format!("/v1/top?by=org&window=month&at=2026-02-10T00:00:00Z&n=3&min_position={position}");
    let rows = server.get(&path).expect(200)["rows"].clone();
    let top: Vec<_> =
        rows.as_array().unwrap().iter().map(|r| (r["key"].clone(), r["cost"].clone())).collect();
    assert_eq!(
        top,
        [("org9", "1.35"), ("org8", "1.2"), ("org7", "1.05")].map(|(k, c)| (json!(k), json!(c)))
    );
    let users = server.get("/v1/top?by=user&window=all&n=100").expect(200);
    assert_eq!(users["rows"].as_array().unwrap().len(), 45);
    let models = server.get("/v1/top?by=model&window=all").expect(200);
    assert_eq!(models["rows"][0]["events"], 45);
    // Another month is empty.
    let path = "/v1/top?by=org&window=month&at=2026-03-10T00:00:00Z";
    assert_eq!(server.get(path).expect(200)["rows"], json!([]));
}

#[test]
fn revisions_and_voids_replace_and_take_back() {
    let dir = tempfile::tempdir().unwrap();
    let server = launch(dir.path()).start();
    let time = "2026-02-03T04:05:06Z";
    server.publish(&line("e1", "acme", "u1", time));
    let revised = line("e1", "acme", "u2", time).replace("\"id\"", "\"revision\":1,\"id\"");
    let position = server.publish(&revised);
    let path = "/v1/orgs/acme/spend?window=all&by=user&min_position=";
    let rows = server.rows(&format!("{path}{position}"));
    assert_eq!((rows.len(), &rows[0]["key"], &rows[0]["cost"]), (1, &json!("u2"), &json!("0.15")));
    let void = format!(
        "{{\"id\":\"e1\",\"org\":\"acme\",\"time\":\"{time}\",\"revision\":2,\"void\":true}}\n"
    );
    let position = server.publish(&void);
    assert_eq!(server.rows(&format!("{path}{position}")).len(), 0);
    // What was sent before means nothing now.
    let position = server.publish(&revised);
    assert_eq!(server.rows(&format!("{path}{position}")).len(), 0);
}

#[test]
fn tags_and_explicit_costs_are_grouped_on_read() {
    let dir = tempfile::tempdir().unwrap();
    let server = launch(dir.path()).start();
    let lines = "\
        {\"id\":\"a\",\"time\":\"2026-02-03T04:05:06Z\",\"org\":\"acme\",\"user\":\"u1\",\"cost\":\"0.000000000000000001\",\"tags\":{\"team\":\"red\"}}\n\
        {\"id\":\"b\",\"time\":\"2026-02-03T04:05:06Z\",\"org\":\"acme\",\"user\":\"u1\",\"costs\":{\"compute\":\"2\",\"storage\":\"0.5\"},\"tags\":{\"team\":\"blue\"}}\n\
        {\"id\":\"c\",\"time\":\"2026-02-03T04:05:06Z\",\"org\":\"acme\",\"user\":\"u1\",\"cost\":1.10}\n";
    let position = server.publish(lines);
    let rows =
        server.rows(&format!("/v1/orgs/acme/spend?window=day&by=tag:team&min_position={position}"));
    let found: Vec<_> =
        rows.iter().map(|r| (r["key"].as_str().unwrap(), r["cost"].as_str().unwrap())).collect();
    assert_eq!(found, [("", "1.1"), ("blue", "2.5"), ("red", "0.000000000000000001")]);
    assert_eq!(
        rows[1]["costs"],
        json!({"compute": "2", "storage": "0.5", "bandwidth": "0", "ai": "0"})
    );
}

#[test]
fn wrong_questions_are_problems_beside_their_valid_twins() {
    let dir = tempfile::tempdir().unwrap();
    let server = launch(dir.path()).start();
    for (right, wrong, status, part) in [
        ("/v1/orgs/acme/spend?window=day", "/v1/orgs/acme/spend?window=week", 400, "window"),
        ("/v1/orgs/acme/spend?by=tag:x", "/v1/orgs/acme/spend?by=planet", 400, "by"),
        ("/v1/orgs/acme/spend", "/v1/orgs/ac.me/spend", 400, "org"),
        ("/v1/top?n=5", "/v1/top?n=0", 400, "n"),
        ("/v1/prices", "/v1/price", 404, "/v1/price"),
        ("/v1/dead-letters", "/v1/dead-letters?reason=bad_luck", 400, "reason"),
    ] {
        server.get(right).expect(200);
        let answer = server.get(wrong);
        assert_eq!(answer.media_type, "application/problem+json", "{wrong}");
        let problem = answer.expect(status);
        assert!(problem.to_string().contains(part), "{wrong}: {problem}");
    }
}

#[test]
fn metrics_have_their_names_and_no_orgs() {
    let dir = tempfile::tempdir().unwrap();
    let server = launch(dir.path()).start();
    let mut lines = line("e1", "secretive", "u1", "2026-02-03T04:05:06Z");
    lines.push_str(&line("e1", "secretive", "u1", "2026-02-03T04:05:06Z"));
    let position = server.publish(&lines);
    server.get(&format!("/v1/orgs/secretive/spend?min_position={position}")).expect(200);
    let text = server.until("the metrics of a commit", || {
        let answer = server.get("/metrics");
        assert_eq!(answer.media_type, "text/plain");
        answer.text.contains("meterr_duplicates_total 1").then_some(answer.text)
    });
    for name in [
        "meterr_events_total",
        "meterr_rejected_total",
        "meterr_duplicates_total",
        "meterr_event_to_view_seconds_bucket",
        "meterr_lag_records",
        "meterr_epoch_events_bucket",
        "meterr_epoch_seconds_count",
        "meterr_commit_seconds_count",
        "meterr_state_rows",
        "meterr_state_bytes",
        "meterr_shard_stopped",
        "meterr_sse_subscribers",
        "meterr_build_info",
    ] {
        assert!(text.lines().any(|line| line.starts_with(name)), "{name} is missing: {text}");
    }
    assert!(!text.contains("secretive") && !text.contains("u1"), "{text}");
}

#[test]
fn the_description_names_every_route_that_answers() {
    let dir = tempfile::tempdir().unwrap();
    let server = launch(dir.path()).start();
    let document = server.get("/openapi.json").expect(200);
    assert_eq!(document["openapi"].as_str().unwrap().split('.').next(), Some("3"));
    let paths = document["paths"].as_object().unwrap();
    for path in
        ["/v1/events", "/v1/orgs/{org}/spend", "/v1/orgs/{org}/stream", "/v1/prices", "/readyz"]
    {
        assert!(paths.contains_key(path), "{path}");
    }
    for (path, item) in
        paths.iter().filter(|(path, item)| !path.contains('{') && item.get("get").is_some())
    {
        let status = server.get(path).status;
        assert_eq!(status, 200, "{path}: {item}");
    }
}
