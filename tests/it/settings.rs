//! Prices, time zones and declared views: what an administrator changes while it runs.

use serde_json::json;

use crate::support::{ran, run, run_json};
use crate::{launch, line, line_of};

const TIME: &str = "2026-02-03T04:05:06Z";

fn price(input: &str, from: Option<&str>) -> serde_json::Value {
    json!({ "prices": [{
        "provider": "openai", "model": "gpt-4o-mini", "effective_from": from,
        "input": input, "output": "0.60",
    }] })
}

#[test]
fn a_price_change_is_previewed_then_changes_history() {
    let dir = tempfile::tempdir().unwrap();
    let launch = launch(dir.path());
    let server = launch.start();
    server.publish(&line("e1", "acme", "u1", "2026-01-10T00:00:00Z"));
    let position = server.publish(&line("e2", "acme", "u1", "2026-01-20T00:00:00Z"));
    let question = "/v1/orgs/acme/spend?window=day&min_position=";
    server.get(&format!("{question}{position}")).expect(200);
    let halved = price("0.075", Some("2026-01-15T00:00:00Z"));
    let effect = server.json("POST", "/v1/prices/preview", &halved).expect(200);
    assert_eq!((&effect["orgs"], &effect["events"]), (&json!(1), &json!(1)), "{effect}");
    assert_eq!((&effect["cost_before"], &effect["cost_after"]), (&json!("0.15"), &json!("0.075")));
    // Looking changes nothing.
    let costs = |position: &str| -> Vec<String> {
        let rows = server.rows(&format!("{question}{position}"));
        rows.iter().map(|row| row["cost"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(costs(&position), ["0.15", "0.15"]);
    let answer = server.json("POST", "/v1/prices", &halved).expect(202);
    assert_eq!(costs(answer["position"].as_str().unwrap()), ["0.15", "0.075"]);
    // Prices hold from a quarter of an hour on; others are refused.
    let odd = price("1", Some("2026-01-15T00:07:00Z"));
    assert_eq!(server.json("POST", "/v1/prices", &odd).status, 400);
    server.stop();
    launch.verified();
}

#[test]
fn usage_without_a_price_is_no_zero_and_fills_in_when_the_price_comes() {
    let dir = tempfile::tempdir().unwrap();
    let server = launch(dir.path()).start();
    let url = server.url.as_str();
    let position = server.publish(&line_of("e1", "acme", "u1", TIME, "no-such-model"));
    let rows = server.rows(&format!("/v1/orgs/acme/spend?window=all&min_position={position}"));
    assert_eq!((&rows[0]["cost"], &rows[0]["unpriced_events"]), (&json!(null), &json!(1)));
    let unpriced = run_json(&["unpriced", "acme", "--json", "--url", url]);
    assert_eq!(unpriced["rows"][0]["model"], "no-such-model");
    let (code, out, err) = ran(&run(&[
        "prices",
        "set",
        "openai",
        "no-such-model",
        "--input",
        "2",
        "--output",
        "3",
        "--yes",
        "--url",
        url,
    ]));
    assert_eq!(code, 0, "{out}{err}");
    server.until("the price", || {
        (server.rows("/v1/orgs/acme/spend?window=all")[0]["cost"] == "2").then_some(())
    });
    assert_eq!(run_json(&["unpriced", "acme", "--json", "--url", url])["rows"], json!([]));
}

#[test]
fn a_time_zone_cuts_days_anew_history_included() {
    let dir = tempfile::tempdir().unwrap();
    let launch = launch(dir.path());
    let server = launch.start();
    // The night in which Berlin's clocks went forward: the day begins at +01:00 and ends at +02:00.
    server.publish(&line("e1", "acme", "u1", "2026-03-28T23:30:00Z"));
    let position = server.publish(&line("e2", "acme", "u1", "2026-03-29T22:30:00Z"));
    let days = |position: &str| -> Vec<String> {
        let rows = server.rows(&format!("/v1/orgs/acme/spend?window=day&min_position={position}"));
        rows.iter().map(|row| row["window_start"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(days(&position), ["2026-03-28T00:00:00Z", "2026-03-29T00:00:00Z"]);
    let body = json!({ "time_zone": "Europe/Berlin" });
    let answer = server.json("PUT", "/v1/orgs/acme/time-zone", &body).expect(202);
    let position = answer["position"].as_str().unwrap();
    assert_eq!(days(position), ["2026-03-29T00:00:00+01:00", "2026-03-30T00:00:00+02:00"]);
    assert_eq!(server.get("/v1/orgs/acme/time-zone").expect(200)["time_zone"], "Europe/Berlin");
    let wrong = json!({ "time_zone": "Europe/Atlantis" });
    assert_eq!(server.json("PUT", "/v1/orgs/acme/time-zone", &wrong).status, 400);
    let url = server.url.as_str();
    let (code, out, _) = ran(&run(&["time-zone", "get", "acme", "--url", url]));
    assert_eq!(code, 0);
    assert!(out.contains("Europe/Berlin"), "{out}");
    server.kill();
    let server = launch.start();
    let rows = server.rows("/v1/orgs/acme/spend?window=day");
    assert_eq!(rows[1]["window_start"], "2026-03-30T00:00:00+02:00");
}

#[test]
fn a_declared_view_has_history_and_stays_live() {
    let dir = tempfile::tempdir().unwrap();
    let server = launch(dir.path()).start();
    server.publish(&line("e1", "acme", "u1", TIME));
    let view = json!({ "name": "user_feature", "by": ["user", "feature"], "window": "day" });
    let declared = server.json("POST", "/v1/views", &view).expect(202);
    let control = declared["position"].as_str().unwrap();
    let rows = server.rows(&format!("/v1/views/user_feature/orgs/acme?min_position={control}"));
    assert_eq!((&rows[0]["key"], &rows[0]["events"]), (&json!("[\"u1\",\"chat\"]"), &json!(1)));
    let position = server.publish(&line("e2", "acme", "u1", TIME));
    let path = format!("/v1/views/user_feature/orgs/acme?min_position={position}");
    assert_eq!(server.rows(&path)[0]["events"], 2);
    server.kill();
    let server = launch(dir.path()).start();
    assert_eq!(server.rows("/v1/views/user_feature/orgs/acme?limit=5")[0]["events"], 2);
    let url = server.url.as_str();
    assert_eq!(
        run_json(&["views", "list", "--json", "--url", url])["views"][0]["name"],
        "user_feature"
    );
    let (code, _, err) = ran(&run(&["views", "remove", "user_feature", "--url", url]));
    assert_eq!(code, 0, "{err}");
    server.until("the removal", || {
        (server.get("/v1/views/user_feature/orgs/acme").status == 404).then_some(())
    });
    assert_eq!(server.send("DELETE", "/v1/views/user_feature", "", b"").status, 404);
}

#[test]
fn views_and_zones_may_be_declared_by_the_file_that_seeds() {
    let dir = tempfile::tempdir().unwrap();
    let launch = launch(dir.path()).argument("--config").argument("config/examples/seeded.toml");
    let server = launch.start();
    assert_eq!(server.get("/v1/orgs/acme/time-zone").expect(200)["time_zone"], "Europe/Berlin");
    assert_eq!(server.get("/v1/views").expect(200)["views"][0]["name"], "user_by_feature");
}
