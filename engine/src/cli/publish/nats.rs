//! Publishing to JetStream: lines are decoded here, so that what is wrong is told at once, brought
//! together by shard, and sent in messages of about 100 events with many under way.
//!
//! A message is repeated until it is acknowledged, or `--timeout` is over, or it is refused for good;
//! then nothing more is read, what is under way is waited for, and it is said how many lines are not
//! known to be durable. The same after Ctrl-C.
//!
//! Memory: the producer's window, [`LINES_WAITING`] lines from the reader, the open groups.

use std::io::Write;
use std::time::{Duration, Instant};

use anyhow::Context;
use futures::FutureExt;
use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use meterr_connectors::codec::decode_line;
use meterr_connectors::log::Message;
use meterr_connectors::nats::connection::{NatsSettings, shown};
use meterr_connectors::nats::producer::{Acked, NotSent, Producer, ProducerSettings};
use meterr_connectors::nats::subjects;
use meterr_operators::event::{Reason, Rejection};
use meterr_operators::ids::shard_of;
use tokio::sync::mpsc;
use tokio::time::{interval, sleep_until};

use super::NOT_EVERY_LINE;
use super::groups::{Group, Groups};
use super::lines::{LINES_WAITING, Line, looks_like_lines, open, read_lines, too_long};
use super::totals::{RejectedLine, Totals};
use crate::cli::args::PublishArgs;
use crate::cli::{Console, Exit};
use crate::shutdown::{self, Shutdown};

/// Events in a message when not said otherwise: twenty times the rate of single ones, and more of them
/// bring little.
const LINES: u32 = 100;
/// Messages under way when not said otherwise.
const WINDOW: u16 = 256;
/// Most bytes of a message, as far as the server takes so many.
const MESSAGE_LEN_MAX: usize = 900_000;
/// Room for subject and headers within what the server takes.
const HEADERS_LEN: usize = 1_024;
/// A group from a pipe is sent at this age, however small, so that a slow one is not held up.
const AGE_MAX: Duration = Duration::from_millis(5);
/// After Ctrl-C, time for what is under way.
const FINISH: Duration = Duration::from_secs(10);
/// How often trouble is looked for.
const LOOK: Duration = Duration::from_millis(200);

pub fn publish(
    args: &PublishArgs,
    server: &NatsSettings,
    console: &mut Console,
) -> anyhow::Result<Exit> {
    let started = Instant::now();
    let (input, len) = open(&args.file, console)?;
    let mut totals = Totals::new(args, console, len)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start the threads")?;
    let ended = runtime.block_on(async {
        let window = usize::from(args.in_flight.unwrap_or(WINDOW));
        let settings = ProducerSettings {
            window,
            give_up_after: Some(args.client.timeout),
            ..ProducerSettings::default()
        };
        let producer = Producer::connect(server, "meterr publish", settings).await?;
        let shards = producer.shards().await.with_context(|| shown(&server.url))?;
        let (lines_in, lines) = mpsc::channel(LINES_WAITING);
        // Detached: where stdin never ends, neither would waiting for its reader.
        let reader = std::thread::Builder::new().name("reader".to_owned());
        reader
            .spawn(move || read_lines(input, |line| lines_in.blocking_send(line).is_ok()))
            .context("cannot start a thread")?;
        let (trigger, interrupted) = shutdown::channel();
        tokio::spawn(shutdown::on_signals(trigger));
        let bytes_max =
            MESSAGE_LEN_MAX.min(producer.message_bytes_max().saturating_sub(HEADERS_LEN));
        let groups = Groups::new(shards, args.batch_lines.unwrap_or(LINES).into(), bytes_max);
        Pump {
            pipe: len.is_none(),
            whose: if args.backfill { "@backfill" } else { "@batch" },
            shards,
            groups,
            producer,
            interrupted,
            under_way: FuturesUnordered::new(),
            lines_read: 0,
            ending: None,
            told: None,
        }
        .run(lines, &mut totals, &mut console.err)
        .await
    });
    // A pipe that does not end must not hold up the end.
    runtime.shutdown_background();
    let ended = ended?;
    totals.finish(args, started.elapsed(), console)?;
    let unsent = totals.unsent.unwrap_or(0);
    match ended {
        Ended::Through if totals.rejected_total > 0 => Ok(Exit::Rejected),
        Ended::Through => Ok(Exit::Done),
        Ended::Failed(failure) => Err(anyhow::Error::new(failure).context(NOT_EVERY_LINE)),
        Ended::Interrupted { read } => {
            let s = if unsent == 1 { "" } else { "s" };
            writeln!(
                console.err,
                "interrupted at line {read}: {unsent} line{s} before it and all behind it are not \
                 known to be sent; it is safe to publish the whole file again"
            )?;
            Ok(Exit::Interrupted)
        }
    }
}

/// How it ended.
enum Ended {
    /// Every line is durable or rejected.
    Through,
    /// A message was refused, or time was up.
    Failed(NotSent),
    /// By a signal, when so many lines had been read.
    Interrupted { read: u64 },
}

/// Moves lines into groups, groups to the producer, and outcomes into the books.
struct Pump {
    /// Whether lines may come slowly.
    pipe: bool,
    whose: &'static str,
    shards: u16,
    groups: Groups,
    producer: Producer,
    interrupted: Shutdown,
    under_way: FuturesUnordered<BoxFuture<'static, Outcome>>,
    lines_read: u64,
    ending: Option<Ended>,
    /// Trouble as last told.
    told: Option<String>,
}

struct Outcome {
    lines: u64,
    bytes: u64,
    result: Result<Acked, NotSent>,
}

type Lines = mpsc::Receiver<std::io::Result<Line>>;

impl Pump {
    async fn run(
        mut self,
        mut lines: Lines,
        totals: &mut Totals,
        err: &mut dyn Write,
    ) -> anyhow::Result<Ended> {
        let mut unsent = 0;
        let mut due = None;
        let mut look = interval(LOOK);
        while self.ending.is_none() {
            let age = async {
                match due {
                    Some(due) => sleep_until(due).await,
                    None => std::future::pending().await,
                }
            };
            let complete = tokio::select! {
                biased;
                () = self.interrupted.wait() => {
                    self.ending = Some(Ended::Interrupted { read: self.lines_read });
                    continue;
                }
                Some(outcome) = self.under_way.next(), if !self.under_way.is_empty() => {
                    unsent += self.settle(outcome, totals);
                    continue;
                }
                _ = look.tick() => {
                    self.tell(totals, err)?;
                    continue;
                }
                () = age => self.groups.close_all(),
                line = lines.recv() => match line {
                    Some(line) => self.take(line.context("cannot read the events")?, totals)?,
                    None => break,
                },
            };
            let now = tokio::time::Instant::now();
            due =
                if self.groups.empty() || !self.pipe { None } else { due.or(Some(now + AGE_MAX)) };
            for group in complete {
                unsent += self.send(group, totals, err).await?;
            }
        }
        drop(lines);
        if self.ending.is_none() {
            for group in self.groups.close_all() {
                unsent += self.send(group, totals, err).await?;
            }
        }
        unsent += self.groups.lines();
        let mut finishing = false;
        loop {
            if self.ending.is_some() && !std::mem::replace(&mut finishing, self.ending.is_some()) {
                self.producer.finish_within(FINISH);
            }
            tokio::select! {
                biased;
                () = self.interrupted.wait(), if self.ending.is_none() => {
                    self.ending = Some(Ended::Interrupted { read: self.lines_read });
                }
                outcome = self.under_way.next() => match outcome {
                    Some(outcome) => unsent += self.settle(outcome, totals),
                    None => break,
                },
                _ = look.tick() => self.tell(totals, err)?,
            }
        }
        totals.unsent = Some(unsent);
        totals.retries = self.producer.counts().retried;
        Ok(self.ending.unwrap_or(Ended::Through))
    }

    /// Takes a line; gives the groups that are complete with it.
    fn take(&mut self, line: Line, totals: &mut Totals) -> anyhow::Result<Vec<Group>> {
        let (number, text) = match line {
            Line::Text { number, text } => (number, text),
            Line::TooLong { number } => {
                self.lines_read = number;
                totals.reject(too_long(number), None)?;
                return Ok(Vec::new());
            }
        };
        if number == 1 {
            looks_like_lines(&text)?;
        }
        self.lines_read = number;
        let line = text.trim_ascii();
        let len_max = self.groups.line_len_max();
        let shard = if line.len() > len_max {
            let detail = format!("the line has {} bytes; the server takes {len_max}", line.len());
            Err(Rejection { reason: Reason::TooLarge, detail })
        } else {
            decode_line(line).map(|event| shard_of(&event.org, self.shards))
        };
        match shard {
            Ok(shard) => Ok(self.groups.add(shard, number, line)),
            Err(Rejection { reason, detail }) => {
                let reason = reason.name().to_owned();
                totals.reject(RejectedLine { line: number, reason, detail }, Some(&text))?;
                Ok(Vec::new())
            }
        }
    }

    /// Hands a group over as soon as there is room; gives the number of lines that were not sent
    /// because it came to an end before.
    async fn send(
        &mut self,
        group: Group,
        totals: &mut Totals,
        err: &mut dyn Write,
    ) -> anyhow::Result<u64> {
        let mut unsent = 0;
        while let Some(Some(outcome)) = self.under_way.next().now_or_never() {
            unsent += self.settle(outcome, totals);
        }
        if self.ending.is_some() {
            return Ok(unsent + group.lines);
        }
        let Group { shard, body, lines, .. } = group;
        let bytes = body.len() as u64;
        let message = Message {
            subject: subjects::usage(shard, self.whose),
            headers: Vec::new(),
            payload: body.into(),
        };
        let producer = self.producer.clone();
        let mut sending = std::pin::pin!(producer.send(shard, message));
        let mut look = interval(LOOK);
        loop {
            tokio::select! {
                biased;
                sent = &mut sending => {
                    let outcome = sent.map(move |result| Outcome { lines, bytes, result });
                    self.under_way.push(outcome.boxed());
                    return Ok(unsent);
                }
                () = self.interrupted.wait() => {
                    self.ending = Some(Ended::Interrupted { read: self.lines_read });
                    return Ok(unsent + lines);
                }
                Some(outcome) = self.under_way.next(), if !self.under_way.is_empty() => {
                    unsent += self.settle(outcome, totals);
                    if self.ending.is_some() {
                        return Ok(unsent + lines);
                    }
                }
                _ = look.tick() => self.tell(totals, err)?,
            }
        }
    }

    /// Takes an outcome into the books; gives the number of lines not known to be durable.
    fn settle(&mut self, outcome: Outcome, totals: &mut Totals) -> u64 {
        match outcome.result {
            Ok(acked) => {
                acked.raise(&mut totals.position);
                totals.accept(outcome.lines, outcome.bytes);
                0
            }
            Err(failure) => {
                self.ending.get_or_insert(Ended::Failed(failure));
                outcome.lines
            }
        }
    }

    /// Says once what stands in the way, until it is another thing.
    fn tell(&mut self, totals: &Totals, err: &mut dyn Write) -> anyhow::Result<()> {
        let trouble = self.producer.trouble();
        if let Some(trouble) = &trouble
            && self.told.as_ref() != Some(trouble)
        {
            totals.bar.suspend(|| writeln!(err, "trying again: {trouble}"))?;
        }
        self.told = trouble;
        Ok(())
    }
}
