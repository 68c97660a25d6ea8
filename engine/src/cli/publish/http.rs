//! Publishing over HTTP: sends a file of events in batches, several under way at once.
//!
//! A thread reads lines; this one makes batches of them and keeps the books; a few senders post
//! batches and repeat each until the server has taken it. Sending a batch again is always safe, since
//! an event counts once by its id. So on any failure that may pass (no connection, 503) the whole
//! batch goes again, and on one that stays the command ends after the batches under way, saying that
//! running it again is safe.
//!
//! Batches under way may land in any order. That changes no figure: revisions carry their number.
//!
//! Memory: at most `in_flight + 1` batches of [`BATCH_LEN_MAX`] bytes, and a few thousand lines on
//! the way between the threads.

use std::error::Error as _;
use std::hash::{BuildHasher, RandomState};
use std::io::{self, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use crossbeam_channel::{Receiver, Sender, bounded, never, select};
use meterr_operators::ids::Positions;
use serde::Deserialize;

use super::NOT_EVERY_LINE;
use super::lines::{LINES_WAITING, Line, looks_like_lines, open, read_lines, too_long};
use super::totals::{RejectedLine, Totals};
use crate::cli::args::PublishArgs;
use crate::cli::client::{Client, Method, Query};
use crate::cli::{ClientError, Console, Exit, UsageError};

/// Most requests under way: each has a thread.
const IN_FLIGHT_MAX: u16 = 64;
/// A batch is sent at this size, however few lines it has.
const BATCH_LEN_MAX: usize = 4 << 20;
/// A batch is sent at this age, however small, so that a slow pipe is not held up.
const BATCH_AGE_MAX: Duration = Duration::from_millis(100);
/// Wait after the first failed attempt; doubles with each further one.
const BACK_OFF_FIRST: Duration = Duration::from_millis(100);
/// Longest wait between attempts.
const BACK_OFF_MAX: Duration = Duration::from_secs(10);

/// Lines sent together.
#[derive(Default)]
struct Batch {
    body: Vec<u8>,
    /// Number in the file of each line of the body.
    numbers: Vec<u64>,
}

/// The server's answer.
#[derive(Debug, Deserialize)]
struct Accepted {
    accepted: u64,
    rejected: Vec<RejectedLine>,
    rejected_total: u64,
    position: Positions,
}

/// What a sender tells.
enum Report {
    /// An attempt failed; another one follows.
    Retrying(String),
    /// The batch is through, or there is no point in going on.
    Done(Batch, Result<Accepted, ClientError>),
}

/// What senders do.
struct Sending {
    client: Client,
    query: Query,
    attempts: u32,
    back_off: Duration,
    /// Closed when there is no point in further attempts.
    stop: Receiver<()>,
}

/// `meterr publish`
pub fn publish(args: &PublishArgs, console: &mut Console) -> anyhow::Result<Exit> {
    publish_with(args, console, BACK_OFF_FIRST)
}

fn publish_with(
    args: &PublishArgs,
    console: &mut Console,
    back_off: Duration,
) -> anyhow::Result<Exit> {
    let started = Instant::now();
    let in_flight = args.in_flight.unwrap_or(4);
    if in_flight > IN_FLIGHT_MAX {
        let wrong =
            format!("--in-flight {in_flight} must be at most {IN_FLIGHT_MAX} without --nats");
        return Err(UsageError(wrong).into());
    }
    let (input, len) = open(&args.file, console)?;
    let mut totals = Totals::new(args, console, len)?;

    let (lines_in, lines) = bounded(LINES_WAITING);
    // Detached: where stdin never ends, neither would waiting for its reader.
    let reader = std::thread::Builder::new().name("reader".to_owned());
    reader
        .spawn(move || read_lines(input, |line| lines_in.send(line).is_ok()))
        .context("cannot start a thread")?;
    let (stopping, stop) = bounded::<()>(0);
    let sending = Arc::new(Sending {
        client: Client::new(&args.client),
        query: if args.backfill { vec![("backfill", "true".to_owned())] } else { Query::new() },
        attempts: args.attempts,
        back_off,
        stop,
    });
    let (batches_out, batches) = bounded::<Batch>(usize::from(in_flight));
    let (reports_in, reports) = bounded::<Report>(usize::from(in_flight));
    for n in 0..in_flight {
        let (sending, batches, reports) = (sending.clone(), batches.clone(), reports_in.clone());
        let sender = std::thread::Builder::new().name(format!("sender-{n}"));
        sender.spawn(move || sending.run(&batches, &reports)).context("cannot start a thread")?;
    }

    let failure = Pump {
        lines: &lines,
        reports: &reports,
        batches: &batches_out,
        stopping: Some(stopping),
        batch_lines: args.batch_lines.unwrap_or(1_000) as usize,
        in_flight_max: usize::from(in_flight),
    }
    .run(&mut totals, &mut console.err)?;

    totals.finish(args, started.elapsed(), console)?;
    match failure {
        Some(failure) => Err(anyhow::Error::new(failure).context(NOT_EVERY_LINE)),
        None if totals.rejected_total > 0 => Ok(Exit::Rejected),
        None => Ok(Exit::Done),
    }
}

/// Moves lines into batches, batches to the senders, and outcomes into the books.
struct Pump<'a> {
    lines: &'a Receiver<io::Result<Line>>,
    reports: &'a Receiver<Report>,
    batches: &'a Sender<Batch>,
    /// Dropped to tell the senders that there is no point in going on.
    stopping: Option<Sender<()>>,
    batch_lines: usize,
    in_flight_max: usize,
}

impl Pump<'_> {
    /// Runs to the end of the input, or to the first failure that stays, which it returns.
    fn run(
        mut self,
        totals: &mut Totals,
        err: &mut dyn Write,
    ) -> anyhow::Result<Option<ClientError>> {
        let (no_lines, no_deadline) = (never(), never());
        let mut batch = Batch::default();
        let mut deadline = no_deadline.clone();
        let (mut in_flight, mut ended) = (0, false);
        let (mut failure, mut retrying) = (None, false);
        loop {
            let room = in_flight < self.in_flight_max;
            let full = batch.numbers.len() >= self.batch_lines || batch.body.len() >= BATCH_LEN_MAX;
            if room && !batch.numbers.is_empty() && (full || ended) && failure.is_none() {
                self.batches.send(std::mem::take(&mut batch)).context("the senders are gone")?;
                in_flight += 1;
                deadline = no_deadline.clone();
                continue;
            }
            if in_flight == 0 && (ended || failure.is_some()) {
                return Ok(failure);
            }
            let take = !ended && !full && failure.is_none();
            let lines = if take { self.lines } else { &no_lines };
            let due = if room { &deadline } else { &no_deadline };
            select! {
                recv(lines) -> line => match line {
                    Ok(Ok(Line::Text { number, text })) => {
                        if number == 1 {
                            looks_like_lines(&text)?;
                        }
                        if batch.numbers.is_empty() {
                            deadline = crossbeam_channel::after(BATCH_AGE_MAX);
                        }
                        batch.numbers.push(number);
                        batch.body.extend_from_slice(&text);
                    }
                    Ok(Ok(Line::TooLong { number })) => totals.reject(too_long(number), None)?,
                    Ok(Err(error)) => return Err(error).context("cannot read the events"),
                    Err(_) => ended = true,
                },
                recv(due) -> _ => {
                    self.batches.send(std::mem::take(&mut batch)).context("the senders are gone")?;
                    in_flight += 1;
                    deadline = no_deadline.clone();
                }
                recv(self.reports) -> report => match report.context("the senders are gone")? {
                    // Said once, not for every attempt of every batch.
                    Report::Retrying(error) if !retrying => {
                        retrying = true;
                        totals.bar.suspend(|| writeln!(err, "trying again: {error}"))?;
                    }
                    Report::Retrying(_) => {}
                    Report::Done(batch, result) => {
                        in_flight -= 1;
                        match result {
                            Ok(accepted) => {
                                retrying = false;
                                settle(totals, &batch, accepted)?;
                            }
                            Err(error) => {
                                self.stopping = None;
                                failure.get_or_insert(error);
                            }
                        }
                    }
                }
            }
        }
    }
}

impl Sending {
    fn run(&self, batches: &Receiver<Batch>, reports: &Sender<Report>) {
        while let Ok(batch) = batches.recv() {
            let result = self.delivered(&batch, reports);
            if reports.send(Report::Done(batch, result)).is_err() {
                return;
            }
        }
    }

    /// Posts a batch until the server has taken it, or there is no point in going on.
    fn delivered(&self, batch: &Batch, reports: &Sender<Report>) -> Result<Accepted, ClientError> {
        let mut attempt = 0;
        loop {
            attempt += 1;
            let error = match self.posted(batch) {
                Ok(accepted) => return Ok(accepted),
                Err(error) => error,
            };
            if !error.passing() || attempt >= self.attempts {
                return Err(error);
            }
            let wait = wait(self.back_off, attempt, &error);
            let chain = std::iter::successors(error.source(), |error| (*error).source());
            let text = chain.fold(error.to_string(), |text, cause| format!("{text}: {cause}"));
            if reports.send(Report::Retrying(text)).is_err() {
                return Err(error);
            }
            // Nothing is ever sent: this ends early only when the channel is closed.
            if self.stop.recv_timeout(wait)
                == Err(crossbeam_channel::RecvTimeoutError::Disconnected)
            {
                return Err(error);
            }
        }
    }

    fn posted(&self, batch: &Batch) -> Result<Accepted, ClientError> {
        let media_type = "application/x-ndjson";
        let answer =
            self.client.send(Method::Post, "/v1/events", &self.query, media_type, &batch.body)?;
        self.client.read(&answer)
    }
}

/// How long to wait after a failed attempt: twice as long each time, half of it at random so that
/// clients do not come back all at once, and not shorter than the server asks for.
fn wait(first: Duration, attempt: u32, error: &ClientError) -> Duration {
    let whole = first.saturating_mul(1 << attempt.saturating_sub(1).min(10)).min(BACK_OFF_MAX);
    let asked = match error {
        ClientError::Refused { retry_after: Some(seconds), .. } => Duration::from_secs(*seconds),
        _ => Duration::ZERO,
    };
    let random = RandomState::new().hash_one(attempt) as f64 / u64::MAX as f64;
    whole.mul_f64(0.5 + random / 2.0).max(asked.min(BACK_OFF_MAX))
}

/// Takes the server's answer into the books.
fn settle(totals: &mut Totals, batch: &Batch, answer: Accepted) -> anyhow::Result<()> {
    for (shard, position) in &answer.position.shards {
        totals.position.raise(*shard, *position);
    }
    totals.rejected_total += answer.rejected_total.saturating_sub(answer.rejected.len() as u64);
    if !answer.rejected.is_empty() {
        let lines: Vec<&[u8]> = batch.body.split_inclusive(|byte| *byte == b'\n').collect();
        for mut rejected in answer.rejected {
            let at = usize::try_from(rejected.line).ok().and_then(|line| line.checked_sub(1));
            rejected.line = at.and_then(|at| batch.numbers.get(at)).copied().unwrap_or(0);
            totals.reject(rejected, at.and_then(|at| lines.get(at)).copied())?;
        }
    }
    totals.accept(answer.accepted, batch.body.len() as u64);
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::path::PathBuf;

    use serde_json::json;

    use super::*;
    use crate::cli::args::NatsArgs;
    use crate::cli::testing::{
        Reply, Request, Server, client_args, hang_up, reply, run, run_with_input,
    };

    /// Takes what a server would: rejects lines that hold "bad".
    fn taken(request: &Request) -> Reply {
        let lines: Vec<&str> = request.body.lines().collect();
        let rejected: Vec<_> = lines
            .iter()
            .enumerate()
            .filter(|(_, line)| line.contains("bad"))
            .map(|(at, _)| json!({"line": at + 1, "reason": "malformed", "detail": "no JSON"}))
            .collect();
        let answer = json!({
            "accepted": lines.len() - rejected.len(),
            "rejected_total": rejected.len(),
            "rejected": rejected,
            "position": "3:7",
        });
        reply(202, &answer.to_string())
    }

    fn file(text: &str) -> (tempfile::TempDir, String) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("events.ndjson");
        std::fs::write(&path, text).unwrap();
        (dir, path.to_str().unwrap().to_owned())
    }

    #[test]
    fn rejected_lines_are_named_by_their_number_in_the_file() {
        let server = Server::answering(taken);
        let text: String = (1..=95)
            .map(|n| match n {
                7 => "\n".to_owned(),
                20 | 90 => format!("bad {n}\n"),
                n => format!("{{\"id\":\"{n}\"}}\n"),
            })
            .collect();
        let (dir, path) = file(text.trim_end());
        let kept = dir.path().join("kept");
        let kept = kept.to_str().unwrap();
        let ran = run(&[
            "publish",
            &path,
            "--url",
            &server.url(),
            "--batch-lines",
            "10",
            "--in-flight",
            "3",
            "--rejected-to",
            kept,
            "--backfill",
        ]);
        assert_eq!(ran.exit, Exit::Rejected, "{}", ran.err);
        assert_eq!(ran.err, "line 20: malformed: no JSON\nline 90: malformed: no JSON\n");
        assert!(ran.out.starts_with("92 accepted, 2 rejected, "), "{}", ran.out);
        assert!(ran.out.ends_with("\nposition 3:7\n"), "{}", ran.out);
        let mut kept: Vec<String> =
            std::fs::read_to_string(kept).unwrap().lines().map(str::to_owned).collect();
        kept.sort();
        assert_eq!(kept, ["bad 20", "bad 90"]);

        let requests = server.requests();
        assert_eq!(requests.len(), 10, "94 lines in batches of 10");
        assert!(requests.iter().all(|r| r.target == "/v1/events?backfill=true"));
        assert!(requests.iter().all(|r| r.header("content-type") == Some("application/x-ndjson")));
        let mut sent: Vec<&str> = requests.iter().flat_map(|r| r.body.lines()).collect();
        sent.sort_unstable();
        let mut lines: Vec<&str> = text.lines().filter(|line| !line.is_empty()).collect();
        lines.sort_unstable();
        assert_eq!(sent, lines, "every line once");
    }

    fn args(file: &str, url: String) -> PublishArgs {
        PublishArgs {
            file: PathBuf::from(file),
            backfill: false,
            batch_lines: Some(2),
            in_flight: Some(1),
            attempts: 3,
            rejected_to: None,
            nats: NatsArgs::default(),
            client: client_args(url),
        }
    }

    fn quickly(args: &PublishArgs) -> anyhow::Result<Exit> {
        let mut console = Console {
            input: None,
            out: Box::new(io::sink()),
            err: Box::new(io::sink()),
            interactive: false,
            progress: false,
        };
        publish_with(args, &mut console, Duration::from_millis(1))
    }

    #[test]
    fn what_may_pass_is_sent_again_as_it_was() {
        let (_dir, path) = file("{\"id\":\"1\"}\n{\"id\":\"2\"}\n{\"id\":\"3\"}\n");
        let accepted = r#"{"accepted":2,"rejected":[],"rejected_total":0,"position":"0:1"}"#;
        let partly = r#"{"type":"/problems/not-written","detail":"no","accepted":1,"failed":[]}"#;
        let server = Server::new(vec![
            hang_up(),
            reply(503, partly).header("retry-after", "0"),
            reply(202, accepted),
            reply(504, "{}"),
            reply(202, accepted),
        ]);
        assert_eq!(quickly(&args(&path, server.url())).unwrap(), Exit::Done);
        let bodies: Vec<String> = server.requests().into_iter().map(|r| r.body).collect();
        let (first, second) = ("{\"id\":\"1\"}\n{\"id\":\"2\"}\n", "{\"id\":\"3\"}\n");
        assert_eq!(bodies, [first, first, first, second, second]);
    }

    #[test]
    fn what_does_not_pass_ends_it_and_says_that_repeating_is_safe() {
        let (_dir, path) = file(&"{}\n".repeat(1_000));
        let server = Server::answering(|_| reply(503, r#"{"detail":"draining"}"#));
        let error = quickly(&args(&path, server.url())).unwrap_err();
        assert_eq!(
            format!("{error:#}"),
            "not every line was sent; it is safe to publish the whole file again: the server \
             refused with status 503: draining"
        );
        assert_eq!(server.requests().len(), 3, "three attempts of one batch, then no more");

        let server = Server::answering(|_| reply(413, r#"{"detail":"too large"}"#));
        assert!(quickly(&args(&path, server.url())).is_err());
        assert_eq!(server.requests().len(), 1, "a refusal is not repeated");
    }

    #[test]
    fn a_server_that_is_not_there_has_an_exit_code_of_its_own() {
        let (_dir, path) = file("{}\n");
        let url = "http://127.0.0.1:1";
        let ran = run(&["publish", &path, "--url", url, "--attempts", "1"]);
        assert_eq!(ran.exit, Exit::Unreachable, "{}", ran.err);
        assert!(ran.err.contains("cannot reach http://127.0.0.1:1"), "{}", ran.err);
    }

    #[test]
    fn stdin_is_read_and_json_has_the_form_of_the_api() {
        let server = Server::answering(taken);
        let ran =
            run_with_input(&["publish", "-", "--url", &server.url(), "--json"], "{\"id\":1}\nbad");
        assert_eq!(ran.exit, Exit::Rejected);
        assert_eq!(
            serde_json::from_str::<serde_json::Value>(&ran.out).unwrap(),
            json!({"accepted": 1, "rejected_total": 1, "position": "3:7",
                   "rejected": [{"line": 2, "reason": "malformed", "detail": "no JSON"}]})
        );
    }

    #[test]
    fn a_slow_pipe_is_not_held_up() {
        // The batch is far from full and the input has not ended: only its age can send it.
        struct Slow(bool, Receiver<()>);
        impl Read for Slow {
            fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
                if std::mem::replace(&mut self.0, true) {
                    let _ = self.1.recv();
                    return Ok(0);
                }
                buffer[..3].copy_from_slice(b"{}\n");
                Ok(3)
            }
        }
        let (end, ended) = bounded(0);
        let (seen, arrived) = bounded(1);
        let server = Server::answering(move |request| {
            let _ = seen.try_send(());
            taken(request)
        });
        let args = PublishArgs { batch_lines: Some(1_000), ..args("-", server.url()) };
        let publishing = std::thread::spawn(move || {
            let mut console = Console {
                input: Some(Box::new(io::BufReader::new(Slow(false, ended)))),
                out: Box::new(io::sink()),
                err: Box::new(io::sink()),
                interactive: false,
                progress: false,
            };
            publish_with(&args, &mut console, Duration::from_millis(1)).unwrap()
        });
        arrived.recv_timeout(Duration::from_secs(10)).expect("sent before the input ended");
        drop(end);
        assert_eq!(publishing.join().unwrap(), Exit::Done);
    }

    #[test]
    fn waits_grow_and_follow_the_server() {
        let busy =
            |retry_after| ClientError::Refused { status: 503, detail: "".into(), retry_after };
        let first = Duration::from_millis(100);
        for attempt in 1..40 {
            let wait = wait(first, attempt, &busy(None));
            let whole = (first * (1 << (attempt - 1).min(10))).min(BACK_OFF_MAX);
            assert!(whole / 2 <= wait && wait <= whole, "{attempt}: {wait:?}");
        }
        assert_eq!(wait(first, 1, &busy(Some(3))), Duration::from_secs(3));
        assert_eq!(wait(first, 1, &busy(Some(1_000_000))), BACK_OFF_MAX);
    }
}
