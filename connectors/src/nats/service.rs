//! The questions of [`ENDPOINTS`] answered on NATS, as a micro-service: several nodes share the work
//! through one queue group, and `$SRV.PING`, `$SRV.INFO` and `$SRV.STATS` tell about them.
//!
//! A request is a JSON object of parameters, or a body, named as in HTTP; its answer is the same JSON
//! as in HTTP. A refusal has the headers `Nats-Service-Error` (a sentence) and
//! `Nats-Service-Error-Code` (the status of HTTP), and the problem document as its body. (The library
//! counts such replies as requests, not as errors; `data.problems` of `$SRV.STATS` counts them.)
//!
//! Bounds: questions about the orgs of one shard have places of their own, and so have those that wait
//! for a position, and each subject of `meterr.admin`. When all places are taken a request is refused
//! with 503 at once. So a shard that hangs fills its own places and holds up nobody else, and nothing
//! queues here; what a place holds is one request and one answer, each at most one message.
//!
//! Replies go to subjects that begin with `_` only, as inboxes do. The node may publish anywhere, and
//! who asks chooses the reply subject: without this rule, whoever may ask a question could have its
//! answer written into a log, or sent to another org's subscribers in our name.
//!
//! The pages of an answer lie in the memory of the node that gave the first one. Its cursors name it,
//! and a node that gets the cursor of another passes the request on to `….spend.<node>` or
//! `….view.<node>`, which only that node listens to.
//!
//! On a stop, what has arrived is answered and what waits for a position is refused with 503.
//! Requests on their way from the server at that moment get no answer; askers ask again, as after any
//! lost message of core NATS.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use async_nats::client::{PublishError, RequestError, RequestErrorKind};
use async_nats::service::{
    NATS_SERVICE_ERROR, NATS_SERVICE_ERROR_CODE, Request, Service, ServiceExt, endpoint,
};
use async_nats::{Client, HeaderMap};
use bytes::Bytes;
use futures::{FutureExt, StreamExt};
use meterr_operators::ids::shard_of;
use tokio::sync::{OwnedSemaphorePermit, watch};
use tokio::task::{JoinHandle, JoinSet};

use super::endpoints::{ENDPOINTS, Endpoint, Question};
pub use super::places::Counted;
use super::places::{Counters, Places, count};
use crate::api::Api;
use crate::requests::problem::{Kind, Problem};
use crate::requests::{Decoders, Desk, Limits};

/// Name of the service.
pub const SERVICE: &str = "meterr";
/// Longest sentence in a header, in characters.
const SENTENCE_CHARS_MAX: usize = 400;

/// Limits and times of the service.
#[derive(Debug, Clone)]
pub struct ServiceSettings {
    /// What holds for every surface.
    pub limits: Limits,
    /// The codec.
    pub decoders: Decoders,
    /// Questions about the orgs of one shard worked on at once.
    pub questions_max: usize,
    /// Questions about the orgs of one shard that wait for a position at once.
    pub waiting_max: usize,
    /// Requests worked on at once for each subject of `meterr.admin`.
    pub admin_max: usize,
    /// Bytes of a request under `meterr.query`. Others may fill a message.
    pub question_bytes_max: usize,
    /// How long requests may take to finish once the service stops.
    pub drain_timeout: Duration,
}

impl Default for ServiceSettings {
    fn default() -> Self {
        ServiceSettings {
            limits: Limits::default(),
            decoders: Decoders::default(),
            questions_max: 512,
            waiting_max: 256,
            admin_max: 32,
            question_bytes_max: 64 * 1024,
            drain_timeout: Duration::from_secs(10),
        }
    }
}

/// The service could not be offered.
#[derive(Debug, thiserror::Error)]
#[error("questions cannot be answered on NATS: {0}")]
pub struct ServeError(String);

/// What readers and tasks share.
struct Shared {
    client: Client,
    desk: Desk,
    settings: ServiceSettings,
    /// Name of this node in cursors.
    node: String,
    /// Places by shard.
    of_shard: Vec<Places>,
    /// Places by endpoint, for those about the deployment.
    of_endpoint: Vec<Places>,
    counters: Arc<Vec<Counters>>,
}

/// A running service. Dropping it stops it without waiting for requests under way.
pub struct ServiceHandle {
    service: Option<Service>,
    readers: Vec<JoinHandle<()>>,
    stopping: Arc<watch::Sender<bool>>,
    counters: Arc<Vec<Counters>>,
    client: Client,
    drain_timeout: Duration,
    node: String,
}

/// Answers every question of [`ENDPOINTS`] until stopped. Must be called in a tokio runtime, whose
/// threads then do the work; when it returns, the server knows the subscriptions.
///
/// # Errors
/// When the server does not answer, or does not allow `$SRV.PING` to be asked and answered.
pub async fn serve_queries(
    client: Client,
    api: Arc<dyn Api>,
    settings: ServiceSettings,
) -> Result<ServiceHandle, ServeError> {
    let failed = |error: &dyn std::fmt::Display| ServeError(error.to_string());
    let counters: Arc<Vec<Counters>> =
        Arc::new(ENDPOINTS.iter().map(|_| Counters::default()).collect());
    let counted = counters.clone();
    let service = client
        .service_builder()
        .description("Exact, live figures of AI spend")
        .stats_handler(move |name, _| stats(&counted, &name))
        .start(SERVICE, env!("CARGO_PKG_VERSION"))
        .await
        .map_err(|error| failed(&error))?;
    let node = service.info().await.id;
    let desk = Desk::new(api, settings.decoders, settings.limits.clone(), &node);
    let stopping = desk.stopping.clone();
    let drain_timeout = settings.drain_timeout;
    let places = |_| Places::new(settings.questions_max, settings.waiting_max);
    let admin_places = |_| Places::new(settings.admin_max, settings.admin_max);
    let shared = Arc::new(Shared {
        client: client.clone(),
        of_shard: (0..desk.shards()).map(places).collect(),
        of_endpoint: (0..ENDPOINTS.len()).map(admin_places).collect(),
        node: node.clone(),
        desk,
        settings,
        counters: counters.clone(),
    });
    let mut handle = ServiceHandle {
        service: None,
        readers: Vec::new(),
        stopping,
        counters,
        client,
        drain_timeout,
        node,
    };
    for (at, offered) in ENDPOINTS.iter().enumerate() {
        let pattern = offered.pattern(&handle.node);
        let requests = service.endpoint_builder().name(offered.name).add(pattern).await;
        let requests = requests.map_err(|error| failed(&error))?;
        let stopping = handle.stopping.subscribe();
        handle.readers.push(tokio::spawn(read(shared.clone(), at, requests, stopping)));
    }
    handle.service = Some(service);
    handle.settled().await.map_err(|error| failed(&error))?;
    tracing::info!(node = handle.node, "questions are answered on NATS");
    Ok(handle)
}

impl ServiceHandle {
    /// Name of this node among those of the service: its id in `$SRV.PING`, and in its cursors.
    pub fn node(&self) -> &str {
        &self.node
    }

    /// What was done so far, by the names of [`ENDPOINTS`].
    pub fn counted(&self) -> impl Iterator<Item = (&'static str, Counted)> {
        ENDPOINTS.iter().zip(self.counters.iter()).map(|(of, counters)| (of.name, counters.read()))
    }

    /// Waits until the server has read what was sent before. (A flush ends when the bytes are written;
    /// the answer to a request comes after the server has read them.)
    async fn settled(&self) -> Result<(), RequestError> {
        let ping = format!("$SRV.PING.{SERVICE}.{}", self.node);
        self.client.request(ping, Bytes::new()).await.map(drop)
    }

    /// Takes no more requests, answers what has arrived (what waits for a position with 503), and
    /// returns when all of it is sent, or [`ServiceSettings::drain_timeout`] later.
    pub async fn stop(mut self) {
        self.stopping.send_replace(true);
        let mut readers = std::mem::take(&mut self.readers);
        let drained = async {
            for reader in &mut readers {
                // A reader does not panic; if one did, there is nothing left to wait for.
                let _ = reader.await;
            }
            // A server that does not answer has nobody to send questions from either.
            let _ = self.settled().await;
        };
        if tokio::time::timeout(self.drain_timeout, drained).await.is_err() {
            tracing::warn!("requests took too long to finish; the service ends without them");
            readers.iter().for_each(JoinHandle::abort);
        }
    }
}

impl Drop for ServiceHandle {
    fn drop(&mut self) {
        self.stopping.send_replace(true);
        self.readers.iter().for_each(JoinHandle::abort);
        if let Some(service) = self.service.take() {
            // Does not wait for anything.
            let _ = service.stop().now_or_never();
        }
    }
}

/// What `$SRV.STATS` says about an endpoint besides what the library counts.
fn stats(counters: &[Counters], name: &str) -> serde_json::Value {
    let at = ENDPOINTS.iter().position(|endpoint| endpoint.name == name);
    let Counted { answers, problems, overloads, ignored } =
        at.and_then(|at| counters.get(at)).map(Counters::read).unwrap_or_default();
    serde_json::json!({
        "answers": answers, "problems": problems, "overloads": overloads, "ignored": ignored
    })
}

/// Takes the requests of an endpoint until the service stops, then waits for those under way.
async fn read(
    shared: Arc<Shared>,
    at: usize,
    mut requests: endpoint::Endpoint,
    mut stopping: watch::Receiver<bool>,
) {
    let mut tasks = JoinSet::new();
    let mut open = true;
    loop {
        tokio::select! {
            biased;
            () = async { drop(stopping.wait_for(|stopping| *stopping).await) }, if open => {
                open = false;
                // What has arrived is still read. An error means that the connection is gone.
                let _ = requests.stop().await;
            }
            Some(_) = tasks.join_next(), if !tasks.is_empty() => {}
            request = requests.next() => match request {
                Some(request) => shared.clone().take(at, request, &mut tasks),
                None => break,
            },
        }
    }
    while tasks.join_next().await.is_some() {}
}

impl Shared {
    /// Begins a request, or refuses it at once. Never waits.
    fn take(self: Arc<Self>, at: usize, request: Request, tasks: &mut JoinSet<()>) {
        if !request.message.reply.as_deref().is_some_and(|reply| reply.starts_with('_')) {
            count(&self.counters[at].ignored);
            tracing::debug!(
                subject = %request.message.subject,
                reply = request.message.reply.as_deref(),
                "request ignored: its reply subject is none that begins with an underscore"
            );
            return;
        }
        let endpoint = &ENDPOINTS[at];
        if endpoint.of_org() && request.message.payload.len() > self.settings.question_bytes_max {
            let max = self.settings.question_bytes_max;
            let detail = format!("the question is larger than the limit of {max} bytes");
            return self.refuse_now(at, &request, &Problem::too_large(detail, max));
        }
        let places = self.places(at, &request);
        match places.now.clone().try_acquire_owned() {
            Ok(place) => {
                tasks.spawn(self.serve(at, request, place));
            }
            Err(_) => {
                count(&self.counters[at].overloads);
                self.refuse_now(at, &request, &taken(places.now_max));
            }
        }
    }

    fn places(&self, at: usize, request: &Request) -> &Places {
        if !ENDPOINTS[at].of_org() {
            return &self.of_endpoint[at];
        }
        let org = request.message.subject.split('.').nth(2).unwrap_or("");
        let shards = u16::try_from(self.of_shard.len()).unwrap_or(u16::MAX);
        &self.of_shard[usize::from(shard_of(org, shards).0)]
    }

    async fn serve(self: Arc<Self>, at: usize, request: Request, place: OwnedSemaphorePermit) {
        // A task shares nothing that a panic could leave half done: the engine's state lies behind
        // channels, the cursors' lock is not held across a call, and places are given back by drop.
        let answered = AssertUnwindSafe(self.answered(at, &request, place)).catch_unwind().await;
        // The panic hook has reported it.
        let answered = answered.unwrap_or_else(|_| {
            Err(Problem::new(Kind::Internal, "the handler of this request panicked"))
        });
        let sent = match &answered {
            Ok((answer, _place)) => self.send(at, &request, answer).await,
            Err(problem) => self.refuse(at, &request, problem).await,
        };
        if let Err(error) = sent {
            tracing::debug!(%error, subject = %request.message.subject, "answer not sent");
        }
    }

    /// The answer, and the place it keeps until it is sent.
    async fn answered(
        &self,
        at: usize,
        request: &Request,
        mut place: OwnedSemaphorePermit,
    ) -> Result<(Reply, OwnedSemaphorePermit), Problem> {
        let endpoint = &ENDPOINTS[at];
        let question = endpoint.read(&request.message.subject, &request.message.payload)?;
        if question.waits() {
            let places = self.places(at, request);
            let waiting = places.waiting.clone().try_acquire_owned();
            place = waiting.map_err(|_| {
                count(&self.counters[at].overloads);
                taken(places.waiting_max)
            })?;
        }
        if let Some(node) = self.elsewhere(endpoint, &question) {
            return Ok((self.passed_on(request, node).await?, place));
        }
        let messages = question.answer(&self.desk).await?;
        let max = self.client.max_payload();
        if let Some(large) = messages.iter().map(Bytes::len).find(|bytes| *bytes > max) {
            let detail = format!(
                "the answer has {large} bytes, and a message of this NATS server holds {max}; {}",
                endpoint.narrower()
            );
            return Err(Problem::new(Kind::AnswerTooLarge, detail).member("limit", max));
        }
        Ok((Reply::Own(messages), place))
    }

    /// The other node that has the pages of the cursor asked by, if it is another.
    fn elsewhere<'q>(&self, endpoint: &Endpoint, question: &'q Question) -> Option<&'q str> {
        let node = question.cursor()?.splitn(3, '.').nth(2)?;
        let token =
            (1..=64).contains(&node.len()) && node.bytes().all(|b| b.is_ascii_alphanumeric());
        // A request is passed on once.
        (token && node != self.node && !endpoint.of_node()).then_some(node)
    }

    async fn passed_on(&self, request: &Request, node: &str) -> Result<Reply, Problem> {
        let subject = format!("{}.{node}", request.message.subject);
        let asking = self.client.request(subject, request.message.payload.clone());
        match tokio::time::timeout(self.settings.limits.request_timeout, asking).await {
            Ok(Ok(reply)) => Ok(Reply::OfAnother(reply.headers, reply.payload)),
            Ok(Err(error)) if error.kind() == RequestErrorKind::NoResponders => Err(Problem::new(
                Kind::CursorExpired,
                "the node that kept the answer of this cursor is gone; begin again without cursor",
            )),
            Ok(Err(_)) | Err(_) => Err(Problem::new(
                Kind::Timeout,
                "the node that keeps the answer of this cursor did not reply; ask again",
            )),
        }
    }

    async fn send(&self, at: usize, request: &Request, reply: &Reply) -> Result<(), PublishError> {
        match reply {
            Reply::Own(messages) => {
                count(&self.counters[at].answers);
                let Some((last, before)) = messages.split_last() else { return Ok(()) };
                for message in before {
                    let Some(to) = request.message.reply.clone() else { return Ok(()) };
                    self.client.publish(to, message.clone()).await?;
                }
                request.respond(Ok(last.clone())).await
            }
            Reply::OfAnother(headers, payload) => {
                let refused = headers
                    .as_ref()
                    .is_some_and(|headers| headers.get(NATS_SERVICE_ERROR).is_some());
                let counters = &self.counters[at];
                count(if refused { &counters.problems } else { &counters.answers });
                let headers = headers.clone().unwrap_or_default();
                request.respond_with_headers(Ok(payload.clone()), headers).await
            }
        }
    }

    async fn refuse(
        &self,
        at: usize,
        request: &Request,
        problem: &Problem,
    ) -> Result<(), PublishError> {
        count(&self.counters[at].problems);
        let mut headers = HeaderMap::new();
        headers.insert(NATS_SERVICE_ERROR, sentence(problem).as_str());
        headers.insert(NATS_SERVICE_ERROR_CODE, problem.kind().status().to_string().as_str());
        request.respond_with_headers(Ok(problem.body().into()), headers).await
    }

    /// Refuses without waiting: while the connection takes nothing, the refusal is lost, as a message
    /// may be.
    fn refuse_now(&self, at: usize, request: &Request, problem: &Problem) {
        // Nor for its turn on the thread, which would lose the refusal just as well.
        let refusing = tokio::task::unconstrained(self.refuse(at, request, problem));
        let _ = refusing.now_or_never();
    }
}

/// What is sent back.
enum Reply {
    Own(Vec<Bytes>),
    OfAnother(Option<HeaderMap>, Bytes),
}

fn taken(max: usize) -> Problem {
    Problem::new(
        Kind::Unavailable,
        format!("all {max} places for requests of this kind are taken; try again"),
    )
}

/// A problem's detail as a header can carry it.
fn sentence(problem: &Problem) -> String {
    let shown = problem.to_string();
    shown.chars().take(SENTENCE_CHARS_MAX).map(|c| if c.is_control() { ' ' } else { c }).collect()
}
