//! Histories as text: what a failing test prints can be pasted into a regression test.
//!
//! ```text
//! control {"type":"horizon","seconds":3600}
//! usage.0.acme 3 2026-01-30T22:10:00Z
//!   {"id":"e0",…}
//! boundary
//! ```
//! A message is its subject, position and log time, then its lines, indented.

use meterr_operators::control::ControlChange;
use meterr_operators::event::{
    COST_CATEGORIES, Event, EventFields, Meter, Reason, Rejection, Tier,
};
use meterr_operators::histories::{Line, Step, UsageMessage};
use meterr_operators::ids::ShardId;
use meterr_operators::money::Atto;
use meterr_operators::time::Time;
use serde_json::Value;

/// Writes a history.
pub fn write(steps: &[Step]) -> String {
    let mut text = String::new();
    for step in steps {
        match step {
            Step::Boundary => text += "boundary\n",
            Step::Control(change) => {
                text += &format!("control {}\n", String::from_utf8(change.to_bytes()).unwrap());
            }
            Step::Message(m) => {
                text += &format!("{} {} {}\n", m.subject, m.position, m.time);
                for line in &m.lines {
                    text += &format!("  {}\n", line.text);
                }
            }
        }
    }
    text
}

/// Reads what [`write`] writes. Blank lines are passed over.
pub fn read(text: &str) -> Vec<Step> {
    let margin = text.lines().filter(|l| !l.trim().is_empty()).map(indent).min().unwrap_or(0);
    let mut steps: Vec<Step> = Vec::new();
    for line in text.lines().filter(|line| !line.trim().is_empty()) {
        let inner = indent(line) > margin;
        let line = line.trim();
        if inner {
            let Some(Step::Message(message)) = steps.last_mut() else {
                panic!("{line:?} is a line of no message");
            };
            message.lines.push(Line { text: line.to_owned(), event: event(line) });
        } else if line == "boundary" {
            steps.push(Step::Boundary);
        } else if let Some(change) = line.strip_prefix("control ") {
            steps.push(Step::Control(ControlChange::parse(change.as_bytes()).unwrap()));
        } else {
            let [subject, position, time] = line.split(' ').collect::<Vec<_>>()[..] else {
                panic!("{line:?} is no message");
            };
            steps.push(Step::Message(UsageMessage {
                shard: ShardId(subject.split('.').nth(1).unwrap().parse().unwrap()),
                position: position.parse().unwrap(),
                time: Time::parse(time).unwrap(),
                subject: subject.to_owned(),
                lines: Vec::new(),
            }));
        }
    }
    steps
}

fn indent(line: &str) -> usize {
    line.len() - line.trim_start().len()
}

/// The event of a native line. Knows just what [`meterr_operators::histories::native_json`] writes.
fn event(line: &str) -> Result<Event<'static>, Rejection> {
    let malformed = || Rejection::new(Reason::Malformed, "not a JSON object");
    let value: Value = serde_json::from_str(line).map_err(|_| malformed())?;
    let text = |name: &str| value[name].as_str().unwrap_or_default().to_owned().into();
    let count = |name: &str| value[name].as_u64().unwrap_or(0) as u32;
    let cost = |value: &Value| value.as_str().map(|text| Atto::parse(text).unwrap().0);
    let time = |name: &str| value[name].as_str().map(|text| Time::parse(text).unwrap());
    let mut fields = EventFields {
        id: text("id"),
        time: time("time").unwrap(),
        org: text("org"),
        user: text("user"),
        provider: text("provider"),
        model: text("model"),
        feature: text("feature"),
        tier: Tier::by_name(&text("service_tier")).unwrap_or_default(),
        revision: count("revision"),
        void: value["void"] == true,
        original_time: time("original_time"),
        ..EventFields::default()
    };
    let parts = [
        (Meter::CacheRead, count("cached_input_tokens")),
        (Meter::CacheWrite, count("cache_write_tokens")),
        (Meter::CacheWrite1h, count("cache_write_1h_tokens")),
        (Meter::AudioInput, count("audio_input_tokens")),
        (Meter::Reasoning, count("reasoning_tokens")),
        (Meter::AudioOutput, count("audio_output_tokens")),
        (Meter::Images, count("images")),
        (Meter::Searches, count("searches")),
    ];
    parts.iter().for_each(|(meter, units)| fields.meters[*meter as usize] = *units);
    let sum = |parts: &[(Meter, u32)]| parts.iter().map(|(_, units)| units).sum::<u32>();
    fields.meters[Meter::Input as usize] = count("input_tokens") - sum(&parts[..4]);
    fields.meters[Meter::Output as usize] = count("output_tokens") - sum(&parts[4..6]);
    if let Some(ai) = cost(&value["cost"]) {
        fields.explicit = Some([Atto::ZERO, Atto::ZERO, Atto::ZERO, ai]);
    } else if value["costs"].is_object() {
        let of = |category| cost(&value["costs"][category]).unwrap_or(Atto::ZERO);
        fields.explicit = Some(COST_CATEGORIES.map(of));
    }
    if let Some(tags) = value["tags"].as_object() {
        let tag = |(name, value): (&String, &Value)| {
            (name.clone().into(), value.as_str().unwrap().to_owned().into())
        };
        fields.tags = tags.iter().map(tag).collect();
        fields.tags.sort();
    }
    Event::new(fields)
}
