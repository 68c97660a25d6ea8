//! Questions to the micro-service at a fixed rate, with events published at another beside them.
//!
//! Every question has its moment, whatever became of the ones before, and latency counts from it.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use async_nats::{Client, Subscriber};
use bytes::Bytes;
use futures::StreamExt;
use meterr_operators::ids::Positions;
use tokio::runtime::Handle;

use super::ingest::compare;
use super::nats::{Batch, Stage};
use super::nats_latency::on_schedule;
use super::spend1::Rows;

/// Longest wait for an answer.
const PATIENCE: Duration = Duration::from_secs(60);

/// What was measured.
#[derive(Debug, Default)]
pub struct Asked {
    /// Milliseconds from the moment a question was to be asked until its answer; infinite when it was
    /// refused since too many were under way.
    pub answer: Vec<f64>,
    /// How many were refused.
    pub refused: usize,
    /// Milliseconds by which questions were late to leave.
    pub late: Vec<f64>,
    /// Bytes of all answers.
    pub bytes: usize,
    /// Where the events beside them stand.
    pub positions: Positions,
}

/// Asks `meterr.query.<org>.spend` of one org after the other, `rate` times a second, while messages
/// are published at `beside` events a second; questions end with them.
///
/// # Errors
/// When a message is not taken, or a question is not answered, or refused but for too many others.
pub fn offered(
    stage: &Stage,
    orgs: &[String],
    question: &str,
    rate: f64,
    messages: &[Batch],
    beside: f64,
) -> Result<Asked> {
    let events: usize = messages.iter().map(|message| message.events).sum();
    let questions = (events as f64 / beside * rate) as usize;
    let (asker, publisher) = (stage.connect()?, stage.connect()?);
    let inbox = asker.new_inbox();
    let answers = stage.runtime.block_on(async {
        let answers = asker.subscribe(format!("{inbox}.*")).await?;
        asker.flush().await?;
        Ok::<_, anyhow::Error>(answers)
    })?;
    // Soon, so that the first is not late.
    let begin = Instant::now() + Duration::from_millis(50);
    let answers = stage.runtime.spawn(take_down(answers, questions, begin, rate));
    let handle = stage.runtime.handle();
    let (published, late) = thread::scope(|scope| {
        let publishing =
            scope.spawn(|| on_schedule(handle, publisher.clone(), messages, begin, beside));
        let asking = scope.spawn(|| {
            let subjects: Vec<String> =
                orgs.iter().map(|org| format!("meterr.query.{org}.spend")).collect();
            ask(handle, &asker, &inbox, &subjects, question, begin, rate, questions)
        });
        (publishing.join(), asking.join())
    });
    let panicked = |_| anyhow!("a thread of the bench panicked");
    let (acks, _) = published.map_err(panicked)??;
    let late = late.map_err(panicked)??;
    stage.runtime.block_on(async {
        let mut asked = answers.await??;
        asked.late = late;
        for (message, ack) in messages.iter().zip(acks) {
            asked.positions.raise(message.shard, ack.await?.sequence);
        }
        Ok(asked)
    })
}

#[allow(clippy::too_many_arguments, reason = "what a thread is given")]
fn ask(
    handle: &Handle,
    client: &Client,
    inbox: &str,
    subjects: &[String],
    question: &str,
    begin: Instant,
    rate: f64,
    questions: usize,
) -> Result<Vec<f64>> {
    let body = Bytes::copy_from_slice(question.as_bytes());
    let mut late = Vec::with_capacity(questions);
    for n in 0..questions {
        let due = begin + Duration::from_secs_f64(n as f64 / rate);
        thread::sleep(due.saturating_duration_since(Instant::now()));
        late.push(due.elapsed().as_secs_f64() * 1e3);
        let subject = subjects[n % subjects.len()].clone();
        let reply = format!("{inbox}.{n}");
        handle.block_on(client.publish_with_reply(subject, reply, body.clone()))?;
    }
    Ok(late)
}

async fn take_down(
    mut answers: Subscriber,
    questions: usize,
    begin: Instant,
    rate: f64,
) -> Result<Asked> {
    let mut asked = Asked::default();
    while asked.answer.len() < questions {
        let answer = tokio::time::timeout(PATIENCE, answers.next()).await;
        let answer = answer.with_context(|| {
            format!("{} of {questions} questions were answered", asked.answer.len())
        })?;
        let answer = answer.context("the connection ended")?;
        let at = Instant::now();
        if let Some(headers) = &answer.headers {
            let code = headers.get("Nats-Service-Error-Code").map(|code| code.as_str());
            if code != Some("503") {
                let said = String::from_utf8_lossy(&answer.payload);
                bail!("a question was refused: {code:?} {said}");
            }
            asked.refused += 1;
            asked.answer.push(f64::INFINITY);
            continue;
        }
        let number = answer.subject.rsplit('.').next().and_then(|number| number.parse().ok());
        let number: u32 = number.context("an answer names its question")?;
        let due = begin + Duration::from_secs_f64(f64::from(number) / rate);
        asked.answer.push(at.saturating_duration_since(due).as_secs_f64() * 1e3);
        asked.bytes += answer.payload.len();
    }
    Ok(asked)
}

/// Asks for the months of every org and compares them with what they must be.
///
/// # Errors
/// Names the first row that differs.
pub fn check(stage: &Stage, orgs: &[String], expected: &Rows) -> Result<()> {
    let client = stage.connect()?;
    let mut seen = 0;
    for org in orgs {
        let request = client.request(
            format!("meterr.query.{org}.spend"),
            Bytes::from_static(br#"{"window":"month"}"#),
        );
        let answer = stage.runtime.block_on(request)?;
        let answer: serde_json::Value = serde_json::from_slice(&answer.payload)?;
        seen += compare(org, "month", &answer, expected)?;
    }
    if seen != expected.len() {
        bail!("{seen} rows instead of {}", expected.len());
    }
    Ok(())
}
