//! Generated workloads: the same bytes for the same options, and the views they claim.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use indicatif::ProgressBar;
use meterr_connectors::codec::decode_line;
use meterr_engine::workload::{EXPECTED, Options, Summary, generate};
use meterr_operators::control::{ControlChange, Dimension, WindowSize};
use meterr_operators::event::{Event, Meter};
use meterr_operators::ids::ShardId;
use meterr_operators::reference::Reference;
use meterr_operators::time::Time;
use serde_json::Value;

fn small() -> Options {
    Options {
        events: 20_000,
        orgs: 12,
        users: 300,
        resend_distance_max: 5_000,
        ..Options::default()
    }
}

fn written(options: &Options) -> (tempfile::TempDir, Summary) {
    let dir = tempfile::tempdir().unwrap();
    let summary = generate(options, dir.path(), &ProgressBar::hidden()).unwrap();
    (dir, summary)
}

/// All files, by name.
fn files(dir: &Path) -> BTreeMap<String, String> {
    let mut files = BTreeMap::new();
    for dir in [dir.to_owned(), dir.join("expected")] {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_file() {
                let name = path.file_name().unwrap().to_string_lossy().into_owned();
                files.insert(name, fs::read_to_string(path).unwrap());
            }
        }
    }
    files
}

/// FNV-1a 64 over names and contents.
fn fingerprint(files: &BTreeMap<String, String>) -> String {
    let bytes = files.iter().flat_map(|(name, text)| name.bytes().chain(text.bytes()));
    let hash = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    format!("{hash:016x}")
}

fn decode(line: &str) -> Event<'static> {
    decode_line(line.as_bytes()).unwrap().into_owned()
}

#[test]
fn the_views_expected_are_those_of_the_oracle() {
    let options = small();
    let (dir, summary) = written(&options);
    let files = files(dir.path());

    let mut reference = Reference::new(1);
    let mut change: Value = serde_json::from_str(&files["prices.json"]).unwrap();
    change["type"] = "prices".into();
    reference.control(&ControlChange::parse(change.to_string().as_bytes()).unwrap());
    let now = Time::parse("2026-03-03T00:00:00Z").unwrap();
    let lines: Vec<&str> = files["events.ndjson"].lines().collect();
    for (position, message) in (1..).zip(lines.chunks(100)) {
        let decoded: Vec<_> = message.iter().map(|line| Ok(decode(line))).collect();
        reference.message(ShardId(0), position, now, "usage.0.@batch", &decoded);
    }
    assert_eq!(reference.dead_letters(ShardId(0)), []);
    assert_eq!(reference.events_counted() as u64, summary.events_counted);

    for name in EXPECTED {
        let (by, window) = name.rsplit_once('_').unwrap();
        let by: &[Dimension] = match by {
            "org" => &[],
            "user" => &[Dimension::User],
            "org_model" => &[Dimension::Model],
            "org_feature" => &[Dimension::Feature],
            _ => panic!("{by}"),
        };
        let window = match window {
            "hour" => WindowSize::Hour,
            "day" => WindowSize::Day,
            _ => WindowSize::Month,
        };
        // Sorted by the names one after the other, the window last.
        let mut rows: BTreeMap<(String, Vec<String>, String), String> = BTreeMap::new();
        for org in reference.orgs() {
            for ((start, key), row) in reference.spend(&org, None, window, by) {
                let units = |meter: Meter| row.meters[meter as usize];
                let cached = units(Meter::CacheRead);
                let (input, output) = (units(Meter::Input) + cached, units(Meter::Output));
                let cost = row.cost().unwrap();
                let names: Vec<String> =
                    [org.clone()].into_iter().chain(key.clone()).chain([start.clone()]).collect();
                let text = format!(
                    "{},{},{input},{cached},{output},{cost}\n",
                    names.join("|"),
                    row.events
                );
                rows.insert((org.clone(), key, start), text);
            }
        }
        assert_eq!(summary.rows[name], rows.len() as u64, "{name}");
        let heading = "key,events,input_tokens,cached_input_tokens,output_tokens,cost\n";
        let want: String = [heading.to_owned()].into_iter().chain(rows.into_values()).collect();
        let got = &files[&format!("{name}.csv")];
        // Not `assert_eq`: the difference would be shown as two texts of thousands of lines.
        let differing = got.lines().zip(want.lines()).find(|(got, want)| got != want);
        assert_eq!(differing, None, "{name}");
        assert_eq!(got.len(), want.len(), "{name}");
    }
}

#[test]
fn the_summary_counts_what_the_file_holds() {
    let options = Options {
        late_ppm: 100_000,
        duplicate_ppm: 50_000,
        correction_ppm: 40_000,
        void_ppm: 30_000,
        ..small()
    };
    let (dir, summary) = written(&options);
    let files = files(dir.path());
    let events: Vec<_> = files["events.ndjson"].lines().map(decode).collect();
    assert_eq!(summary.bytes, files["events.ndjson"].len() as u64);
    let mut by_id: BTreeMap<String, Vec<&Event<'_>>> = BTreeMap::new();
    for event in &events {
        by_id.entry(event.id.to_string()).or_default().push(event);
    }
    let ids = |holds: &dyn Fn(&[&Event<'_>]) -> bool| {
        by_id.values().filter(|versions| holds(versions)).count() as u64
    };
    let newest_first = |versions: &[&Event<'_>]| versions[0].revision > 0;
    let twice = |versions: &[&Event<'_>]| {
        versions.iter().filter(|version| version.revision == 0).count() == 2
    };
    let corrected = |versions: &[&Event<'_>]| versions.iter().any(|v| v.revision > 0 && !v.void);
    let voided = |versions: &[&Event<'_>]| versions.iter().any(|v| v.void);
    let counted = |versions: &[&Event<'_>]| {
        !versions.iter().max_by_key(|version| version.revision).unwrap().void
    };
    assert_eq!(summary.lines, events.len() as u64);
    assert_eq!(summary.events, options.events);
    assert_eq!(summary.events, ids(&|_| true));
    assert_eq!(summary.events_counted, ids(&counted));
    assert_eq!(summary.duplicates, ids(&twice));
    assert_eq!(summary.corrections, ids(&corrected));
    assert_eq!(summary.voids, ids(&voided));
    assert_eq!(summary.out_of_order, ids(&newest_first));
    // Within three standard deviations of what was asked for.
    for (got, ppm) in [
        (summary.late, options.late_ppm),
        (summary.duplicates, options.duplicate_ppm),
        (summary.corrections, options.correction_ppm),
        (summary.voids, options.void_ppm),
    ] {
        let want = options.events * u64::from(ppm) / 1_000_000;
        assert!(got.abs_diff(want).pow(2) < 9 * want, "{got}, {want}");
    }
    assert!(summary.out_of_order > 0);
    let workload: Value = serde_json::from_str(&files["workload.json"]).unwrap();
    assert_eq!(serde_json::from_value::<Summary>(workload["summary"].clone()).unwrap(), summary);
    assert_eq!(serde_json::from_value::<Options>(workload["options"].clone()).unwrap(), options);
}

#[test]
fn the_same_options_give_the_same_bytes_on_every_machine() {
    let options = Options { events: 2_000, resend_distance_max: 500, ..small() };
    let (first, _) = written(&options);
    let (second, _) = written(&options);
    assert!(files(first.path()) == files(second.path()));
    // A change of this number is a change of every workload on record: say so in the changelog.
    assert_eq!(fingerprint(&files(first.path())), "29b1406879fc6f10");
    let (other, _) = written(&Options { seed: 2, ..options });
    assert!(files(first.path())["events.ndjson"] != files(other.path())["events.ndjson"]);
}

#[test]
fn a_directory_is_written_anew() {
    let options = Options { events: 500, ..small() };
    let (dir, summary) = written(&options);
    let again = generate(&options, dir.path(), &ProgressBar::hidden()).unwrap();
    assert_eq!(again, summary);
    // What cannot be written leaves no workload behind that looks complete.
    fs::remove_file(dir.path().join("prices.json")).unwrap();
    fs::create_dir(dir.path().join("prices.json")).unwrap();
    let error = generate(&options, dir.path(), &ProgressBar::hidden()).unwrap_err();
    assert!(error.to_string().ends_with("not written"), "{error}");
    assert!(!dir.path().join("workload.json").exists());
}

#[test]
fn options_out_of_range_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let refused = |options: Options| {
        generate(&options, dir.path(), &ProgressBar::hidden()).unwrap_err().to_string()
    };
    let events = refused(Options { events: 0, ..small() });
    assert_eq!(events, "events is 0; it must be between 1 and 100000000");
    let zipf = refused(Options { zipf: f64::NAN, ..small() });
    assert_eq!(zipf, "zipf is NaN; it must be between 0 and 4");
    let start = refused(Options { start: Time(-1), ..small() });
    assert!(start.contains("between 1970 and 2200"), "{start}");
    assert!(fs::read_dir(dir.path()).unwrap().next().is_none());
    let least = Options { events: 1, orgs: 1, users: 1, days: 1, ..small() };
    generate(&least, dir.path(), &ProgressBar::hidden()).unwrap();
}
