//! Who sends: publishers over HTTP. Each sends again what got no answer, and notes what was
//! acknowledged.

use std::sync::Mutex;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::model::Model;
use crate::stage::Stage;
use crate::support::{agent, ask};
use crate::trouble::Source;

/// Posts lines once; the answer must be that all of them are durable.
pub fn post(url: &str, lines: &str) -> anyhow::Result<()> {
    let media_type = "application/x-ndjson";
    let answer = ask(&agent(), "POST", &format!("{url}/v1/events"), media_type, lines.as_bytes())?;
    match answer.status {
        202 => {
            let value = answer.json();
            assert_eq!(value["rejected_total"], 0, "{value}");
            assert_eq!(value["accepted"], lines.lines().count(), "{value}");
            Ok(())
        }
        // Draining, a write that failed because the process is going, or a machine so busy that the
        // request's head took longer than the server waits: nothing was acknowledged, send again.
        408 | 503 => anyhow::bail!("{}", answer.text),
        status => panic!("status {status}: {}", answer.text),
    }
}

/// Publishes until told to stop; returns how many lines were acknowledged.
pub fn publish(n: u64, seed: u64, stage: &Stage, model: &Mutex<Model>) -> u64 {
    let mut source = Source::new(n, seed);
    let mut lines = 0;
    while !stage.closing.load(Ordering::SeqCst) {
        let batch = source.batch();
        let text: String = batch.iter().map(|(id, version)| version.line(id)).collect();
        stage.insist(|url| post(url, &text));
        lines += batch.len() as u64;
        let mut model = model.lock().unwrap();
        for (id, version) in &batch {
            model.sent(id, version);
        }
        drop(model);
        if source.rng.percent(3) {
            let (id, version) = source.forged(&batch);
            let text = version.line(&id);
            stage.insist(|url| post(url, &text));
        }
        std::thread::sleep(Duration::from_micros(source.rng.below(4_000)));
    }
    lines
}
