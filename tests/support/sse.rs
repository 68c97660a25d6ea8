//! Server-sent events, read as a browser would: fields until an empty line, comments passed over.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read};
use std::time::Duration;

use serde_json::Value;

/// An event.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// Its id, `<shard>-<epoch>`.
    pub id: Option<String>,
    /// `snapshot`, `change` or `reset`.
    pub name: String,
    /// Its body.
    pub data: Value,
}

impl Event {
    /// The epoch of its id.
    pub fn epoch(&self) -> u64 {
        self.id.as_ref().unwrap().split_once('-').unwrap().1.parse().unwrap()
    }
}

/// A stream.
pub struct Stream {
    lines: std::io::Lines<BufReader<Box<dyn Read + Send>>>,
    /// Whether the server said that it stops.
    pub bye: bool,
}

impl Stream {
    /// Subscribes to an org, after the event with this id if there is one.
    pub fn open(url: &str, org: &str, after: Option<&str>) -> anyhow::Result<Stream> {
        let agent = super::agent();
        let mut request = agent.get(format!("{url}/v1/orgs/{org}/stream"));
        if let Some(id) = after {
            request = request.header("last-event-id", id);
        }
        let request = request
            .config()
            .timeout_global(None)
            .timeout_recv_response(Some(Duration::from_secs(20)))
            .timeout_recv_body(None)
            .build();
        let response = request.call()?;
        if response.status() != 200 {
            anyhow::bail!("status {}", response.status());
        }
        let body: Box<dyn Read + Send> = Box::new(response.into_body().into_reader());
        Ok(Stream { lines: BufReader::new(body).lines(), bye: false })
    }

    /// The next event; `None` once the stream has ended or broken. An event cut off by that does
    /// not count, as the standard has it.
    pub fn next(&mut self) -> Option<Event> {
        let (mut id, mut name, mut data) = (None, None, Vec::new());
        loop {
            let line = self.lines.next()?.ok()?;
            if line.is_empty() {
                if let Some(name) = name.take() {
                    let data: String = data.join("\n");
                    let data =
                        serde_json::from_str(&data).unwrap_or_else(|e| panic!("{e}: {data}"));
                    return Some(Event { id, name, data });
                }
                continue;
            }
            match line.split_once(": ").unwrap_or((line.trim_end_matches(':'), "")) {
                ("id", value) => id = Some(value.to_owned()),
                ("event", value) => name = Some(value.to_owned()),
                ("data", value) => data.push(value.to_owned()),
                ("", "bye") => self.bye = true,
                _ => {}
            }
        }
    }
}

/// (view, window start, key) → the row's figures.
pub type Table = BTreeMap<(String, Option<String>, Option<String>), Value>;

/// Applies a snapshot or a change to what a subscriber knows. Figures are absolute, so a change
/// replaces rows; a row of nothing is gone.
pub fn apply(table: &mut Table, event: &Event) {
    if event.name == "snapshot" {
        table.clear();
    }
    for (view, rows) in event.data["views"].as_object().unwrap() {
        for row in rows.as_array().unwrap() {
            let mut row = row.as_object().unwrap().clone();
            let text = |value: Option<Value>| value.and_then(|v| v.as_str().map(str::to_owned));
            let start = text(row.remove("window_start"));
            let key = text(row.remove("key"));
            let nothing = row.iter().all(|(name, figure)| match name.as_str() {
                "cost" => figure == "0",
                "costs" => figure.as_object().unwrap().values().all(|cost| cost == "0"),
                _ => figure == 0,
            });
            let of = (view.clone(), start, key);
            if nothing {
                table.remove(&of);
            } else {
                table.insert(of, Value::Object(row));
            }
        }
    }
}
