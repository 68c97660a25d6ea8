//! `gen`, `publish` and `query` together: the workload with corrections, voids, duplicates and late
//! events leads to the views written beside it.

use std::collections::BTreeMap;
use std::path::Path;

use crate::launch;
use crate::support::{Server, read, run_json};

/// Key without the window, and window → events, input, cached, output, cost.
type Rows = BTreeMap<String, Vec<String>>;

fn expected(dir: &Path, name: &str) -> Rows {
    let text = read(&dir.join("expected").join(format!("{name}.csv")));
    let row = |line: &str| {
        let (key, figures) = line.split_once(',').unwrap();
        (key.to_owned(), figures.split(',').map(str::to_owned).collect())
    };
    text.lines().skip(1).map(row).collect()
}

fn shown(server: &Server, orgs: &[String], window: &str, by: &str, length: usize) -> Rows {
    let mut rows = Rows::new();
    for org in orgs {
        let path = format!("/v1/orgs/{org}/spend?window={window}&by={by}&limit=10000");
        for row in server.rows(&path) {
            let start = row["window_start"].as_str().unwrap();
            let start = if length == 0 { start } else { &start[..length] };
            let key = match row["key"].as_str() {
                Some(key) => format!("{org}|{key}|{start}"),
                None => format!("{org}|{start}"),
            };
            let mut figures: Vec<String> =
                ["events", "input_tokens", "cached_input_tokens", "output_tokens"]
                    .iter()
                    .map(|name| row[name].to_string())
                    .collect();
            figures.push(row["cost"].as_str().unwrap().to_owned());
            rows.insert(key, figures);
        }
    }
    rows
}

#[test]
fn a_generated_workload_leads_to_the_views_beside_it() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("workload");
    let text = out.to_str().unwrap();
    let summary = run_json(&[
        "gen",
        text,
        "--events",
        "30000",
        "--orgs",
        "20",
        "--users",
        "400",
        "--corrections",
        "5",
        "--voids",
        "2",
        "--duplicates",
        "3",
        "--json",
    ]);
    let launch = launch(&dir.path().join("data"));
    let server = launch.start();
    let url = server.url.as_str();
    let prices = out.join("prices.json");
    run_json(&["prices", "import", prices.to_str().unwrap(), "--yes", "--json", "--url", url]);
    let events = out.join("events.ndjson");
    let published = run_json(&["publish", events.to_str().unwrap(), "--json", "--url", url]);
    assert_eq!(published["accepted"], summary["lines"]);
    let position = published["position"].as_str().unwrap();
    let path = format!("/v1/top?by=org&window=all&n=1000&min_position={position}");
    let top = server.get(&path).expect(200);
    let orgs: Vec<String> = top["rows"]
        .as_array()
        .unwrap()
        .iter()
        .map(|r| r["key"].as_str().unwrap().to_owned())
        .collect();
    let events: i64 =
        top["rows"].as_array().unwrap().iter().map(|r| r["events"].as_i64().unwrap()).sum();
    assert_eq!(Some(events), summary["events_counted"].as_i64());
    for (name, window, by, length) in [
        ("org_hour", "hour", "none", 0),
        ("org_day", "day", "none", 10),
        ("org_month", "month", "none", 7),
        ("user_day", "day", "user", 10),
        ("user_month", "month", "user", 7),
        ("org_model_day", "day", "model", 10),
        ("org_feature_day", "day", "feature", 10),
    ] {
        let (expected, found) = (expected(&out, name), shown(&server, &orgs, window, by, length));
        let wrong = expected.iter().find(|(key, figures)| found.get(*key) != Some(figures));
        assert_eq!(wrong, None, "{name}: shown {:?}", wrong.map(|(key, _)| found.get(key)));
        assert_eq!(found.len(), expected.len(), "{name}");
        assert!(!expected.is_empty(), "{name}");
    }
    server.stop();
    launch.verified();
}
