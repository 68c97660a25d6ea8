//! A subscriber of one org's live stream who resumes by `Last-Event-ID` after each loss, and what it
//! must have seen: the org's commits, each once and in order, and figures that are the final ones.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures::executor::block_on;
use meterr_connectors::embedded::{EmbeddedLog, EmbeddedOptions, RealFs};
use meterr_connectors::log::{Log, system_clock};
use serde_json::Value;

use crate::stage::Stage;
use crate::support::sse::{Stream, Table, apply};

/// What a subscriber saw.
pub struct Seen {
    org: String,
    shard: String,
    /// Epoch of the snapshot it began with.
    began: u64,
    /// Epochs of the changes after it.
    epochs: Vec<u64>,
    /// Snapshot and changes added up.
    table: Table,
    resumed: u64,
}

/// The state of an org as a new subscriber gets it, with its epoch.
pub fn snapshot(url: &str, org: &str) -> (u64, Table) {
    let event = Stream::open(url, org, None).unwrap().next().unwrap();
    assert_eq!(event.name, "snapshot");
    let mut table = Table::new();
    apply(&mut table, &event);
    (event.epoch(), table)
}

/// Follows an org until the stage is over and the server has ended the stream.
pub fn follow(org: &str, stage: &Stage) -> Seen {
    let mut seen = Seen {
        org: org.to_owned(),
        shard: String::new(),
        began: 0,
        epochs: Vec::new(),
        table: Table::new(),
        resumed: 0,
    };
    let mut last: Option<String> = None;
    loop {
        let over = stage.over.load(Ordering::SeqCst);
        let Ok(mut stream) = Stream::open(&stage.url(), org, last.as_deref()) else {
            if over {
                return seen;
            }
            std::thread::sleep(Duration::from_millis(3));
            continue;
        };
        seen.resumed += u64::from(last.is_some());
        while let Some(event) = stream.next() {
            match event.name.as_str() {
                "snapshot" => {
                    assert_eq!(
                        last, None,
                        "{org}: a snapshot instead of the changes since {last:?}"
                    );
                    seen.began = event.epoch();
                }
                "change" => seen.epochs.push(event.epoch()),
                other => panic!("{org}: {other} after {last:?}"),
            }
            seen.shard = event.data["shard"].to_string();
            apply(&mut seen.table, &event);
            last.clone_from(&event.id);
        }
    }
}

impl Seen {
    /// Compares with the output log, which says what was committed, and with the final state.
    pub fn check(self, data_dir: &Path, (_, state): &(u64, Table)) {
        let committed: Vec<u64> = commits_of(data_dir, &self.shard, &self.org)
            .into_iter()
            .filter(|epoch| *epoch > self.began)
            .collect();
        println!("{}: {} changes, {} times resumed", self.org, self.epochs.len(), self.resumed);
        assert!(self.resumed > 0, "{} never resumed", self.org);
        let first = self.epochs.iter().zip(&committed).find(|(seen, committed)| seen != committed);
        assert_eq!(first, None, "{}: seen and committed differ", self.org);
        assert_eq!(self.epochs.len(), committed.len(), "{}: commits after the last seen", self.org);
        for (key, figures) in state {
            assert_eq!(self.table.get(key), Some(figures), "{}: {key:?}", self.org);
        }
        let gone = self.table.iter().find(|(key, _)| !state.contains_key(*key));
        assert_eq!(gone, None, "{}: a row that is gone", self.org);
    }
}

/// Epochs whose commit changed an org, from the output log of its shard.
fn commits_of(data_dir: &Path, shard: &str, org: &str) -> Vec<u64> {
    let stream = format!("OUT_{shard}");
    let (log, report) = EmbeddedLog::open(
        &data_dir.join("log").join(&stream),
        &stream,
        EmbeddedOptions::default(),
        Arc::new(RealFs),
        system_clock(),
    )
    .unwrap();
    assert!(report.damaged.is_empty(), "{report:?}");
    let mut epochs = Vec::new();
    let mut parts: Vec<Value> = Vec::new();
    let mut from = 1;
    loop {
        let records = block_on(log.read(from, 4 << 20)).unwrap();
        let Some(last) = records.last() else { break };
        from = last.position + 1;
        for record in &records {
            let body: Value = serde_json::from_slice(&record.message.payload).unwrap();
            if record.message.subject.ends_with(".part") {
                parts.push(body);
                continue;
            }
            // Only the parts right before a commit are its own.
            let own = body["parts"].as_u64().unwrap() as usize;
            let own = parts.split_off(parts.len() - own);
            parts.clear();
            let touched = own
                .iter()
                .filter_map(|part| part["orgs"].as_array())
                .flatten()
                .any(|changes| changes["org"] == org);
            if touched {
                epochs.push(body["epoch"].as_u64().unwrap());
            }
        }
    }
    log.close().unwrap();
    epochs
}
