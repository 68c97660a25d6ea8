//! Questions from node to node as [`Peers`], on `meterr.node.<name>` of core NATS.
//!
//! An answer comes in pieces ([`PIECE_LEN_MAX`]) on a reply subject of its own. After every few
//! pieces the node that answers waits until the other has them: so neither the server nor a reader is
//! given more than it can hold, and nothing more is sent to one that is gone.
//!
//! At most [`QUESTIONS_MAX`] questions are answered at once; others wait in the connection, and their
//! askers with them. Replies, and the signs to go on, go to subjects that begin with `_` only, for the
//! reason given in [`super::service`].

use std::sync::Arc;
use std::time::Duration;

use async_nats::client::Request;
use async_nats::{Client, HeaderMap, Message, StatusCode, Subject, Subscriber};
use bytes::Bytes;
use futures::StreamExt;
use futures::future::BoxFuture;
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::Semaphore;
use tokio::task::AbortHandle;
use tokio::time::{Instant, timeout, timeout_at};

use super::asking::AWAY;
use super::connection::{ConnectError, Line, NatsSettings, echoes};
use super::log::BackOff;
pub use super::pieces::{ANSWER_LEN_MAX, PIECE_LEN_MAX};
use super::pieces::{Joining, cut};
use super::subjects;
use super::write::told;
use crate::cluster::{Answerer, PeerError, Peers};

/// Questions answered at once.
pub const QUESTIONS_MAX: usize = 256;
/// Largest question, in bytes.
pub const QUESTION_LEN_MAX: usize = 512 * 1024;

/// Pieces sent before the other must have them.
const WINDOW: usize = 8;
/// Time the other may take to have them.
const WINDOW_PATIENCE: Duration = Duration::from_secs(10);
/// Room for subject and headers beside a piece.
const OVERHEAD_BYTES: usize = 1024;

/// Questions over NATS, on a connection of its own; clones share it. What is served ends with the last
/// clone.
#[derive(Clone)]
pub struct NatsPeers {
    shared: Arc<Shared>,
    serving: Arc<Serving>,
}

struct Shared {
    line: Line,
    runtime: Handle,
}

#[derive(Default)]
struct Serving(Mutex<Vec<AbortHandle>>);

impl Drop for Serving {
    fn drop(&mut self) {
        self.0.get_mut().iter().for_each(AbortHandle::abort);
    }
}

/// Whether a text may be the name of a node: 1 to 64 letters, digits, `_` and `-`.
pub fn node_name(name: &str) -> bool {
    (1..=64).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-'))
}

impl NatsPeers {
    /// Connects. Work is done on the runtime of the caller.
    ///
    /// # Errors
    /// When no server answers.
    pub async fn connect(settings: &NatsSettings) -> Result<NatsPeers, ConnectError> {
        let line = Line::connect(settings, "meterr peers").await?;
        let shared = Arc::new(Shared { line, runtime: Handle::current() });
        Ok(NatsPeers { shared, serving: Arc::default() })
    }
}

/// Whether something may be sent to this reply subject.
fn inbox(reply: Option<&Subject>) -> Option<&Subject> {
    reply.filter(|reply| reply.starts_with('_'))
}

impl Shared {
    async fn ask(
        self: &Arc<Self>,
        node: &str,
        question: Bytes,
        until: Instant,
    ) -> Result<Bytes, PeerError> {
        let silent = |what: String| PeerError::Silent { node: node.to_owned(), what };
        if !node_name(node) {
            return Err(PeerError::Absent(node.to_owned()));
        }
        if question.len() > QUESTION_LEN_MAX {
            let bytes = question.len();
            return Err(silent(format!("the question has {bytes} bytes of {QUESTION_LEN_MAX}")));
        }
        let asked = timeout_at(until, self.send(node, question)).await;
        let (client, mut pieces) = asked
            .map_err(|_| silent("the question could not be sent".to_owned()))?
            .map_err(silent)?;
        let mut joining = Joining::default();
        loop {
            let Ok(piece) = timeout_at(until, pieces.next()).await else {
                let shared = self.clone();
                tokio::spawn(async move { shared.line.probe().await });
                return Err(silent("not all of the answer came in time".to_owned()));
            };
            let piece = piece.ok_or_else(|| silent(AWAY.to_owned()))?;
            if piece.status == Some(StatusCode::NO_RESPONDERS) {
                return Err(PeerError::Absent(node.to_owned()));
            }
            let answer = joining.take(piece.headers.as_ref(), &piece.payload).map_err(silent)?;
            if let Some(answer) = answer {
                return Ok(answer);
            }
            if let Some(reply) = inbox(piece.reply.as_ref()) {
                let more = timeout_at(until, client.publish(reply.clone(), Bytes::new())).await;
                more.map_err(|late| silent(late.to_string()))?.map_err(|e| silent(told(&e)))?;
            }
        }
    }

    /// Sends a question; the answer comes by the subscription. A dead client is replaced once.
    async fn send(&self, node: &str, question: Bytes) -> Result<(Client, Subscriber), String> {
        let mut revived = false;
        loop {
            // What is sent now would go out when the connection is back.
            if !self.line.connected() {
                return Err(AWAY.to_owned());
            }
            let client = self.line.client();
            let inbox = client.new_inbox();
            let sent = async {
                let pieces = client.subscribe(inbox.clone()).await.map_err(|e| told(&e))?;
                let subject = subjects::node(node);
                let sent = client.publish_with_reply(subject, inbox, question.clone()).await;
                sent.map_err(|e| told(&e)).map(|()| pieces)
            };
            match sent.await {
                Ok(pieces) => return Ok((client, pieces)),
                Err(why) if std::mem::replace(&mut revived, true) => return Err(why),
                Err(_) => drop(self.line.revive().await),
            }
        }
    }

    async fn listen(self: Arc<Self>, node: String, answerer: Answerer, first: Subscriber) {
        let places = Arc::new(Semaphore::new(QUESTIONS_MAX));
        let mut questions = Some(first);
        let mut wait = BackOff::new();
        loop {
            if let Some(mut questions) = questions.take() {
                while let Some(question) = questions.next().await {
                    wait = BackOff::new();
                    let Some(reply) = inbox(question.reply.as_ref()).cloned() else {
                        tracing::debug!(node, "question ignored: nowhere to answer");
                        continue;
                    };
                    // Never closed.
                    let Ok(place) = places.clone().acquire_owned().await else { return };
                    let (shared, answerer) = (self.clone(), answerer.clone());
                    tokio::spawn(async move {
                        shared.answer(question, reply, &answerer).await;
                        drop(place);
                    });
                }
            }
            // Only a dead client ends a subscription.
            tracing::debug!(node, "listening for questions again");
            wait.wait().await;
            self.line.revive().await;
            questions = self.line.client().subscribe(subjects::node(&node)).await.ok();
        }
    }

    async fn answer(&self, question: Message, reply: Subject, answerer: &Answerer) {
        let pieces = if question.payload.len() > QUESTION_LEN_MAX {
            Vec::new()
        } else {
            let answer = answerer(question.payload).await;
            let room = self.line.client().server_info().max_payload;
            cut(answer, room.saturating_sub(OVERHEAD_BYTES))
        };
        let client = self.line.client();
        let len = pieces.len();
        for (n, (headers, piece)) in pieces.into_iter().enumerate() {
            let windowed = (n + 1) % WINDOW == 0 && n + 1 < len;
            if let Err(why) = send_piece(&client, &reply, headers, piece, windowed).await {
                tracing::debug!(why, piece = n + 1, pieces = len, "an answer was not sent");
                return;
            }
        }
    }
}

async fn send_piece(
    client: &Client,
    reply: &Subject,
    headers: HeaderMap,
    piece: Bytes,
    windowed: bool,
) -> Result<(), String> {
    if windowed {
        let request = Request::new().headers(headers).payload(piece);
        let request = request.timeout(Some(WINDOW_PATIENCE));
        return client.send_request(reply.clone(), request).await.map(drop).map_err(|e| told(&e));
    }
    client.publish_with_headers(reply.clone(), headers, piece).await.map_err(|e| told(&e))
}

impl Peers for NatsPeers {
    fn ask(
        &self,
        node: &str,
        question: Bytes,
        timeout: Duration,
    ) -> BoxFuture<'static, Result<Bytes, PeerError>> {
        let (shared, node) = (self.shared.clone(), node.to_owned());
        let until = Instant::now() + timeout;
        let whom = node.clone();
        let task =
            self.shared.runtime.spawn(async move { shared.ask(&node, question, until).await });
        Box::pin(async move {
            let gave_up = |error: tokio::task::JoinError| {
                Err(PeerError::Silent { node: whom, what: error.to_string() })
            };
            task.await.unwrap_or_else(gave_up)
        })
    }

    fn serve(&self, node: &str, answerer: Answerer) -> BoxFuture<'static, Result<(), PeerError>> {
        let (shared, serving, node) = (self.shared.clone(), self.serving.clone(), node.to_owned());
        Box::pin(async move {
            let silent =
                |what: &str| PeerError::Silent { node: node.clone(), what: what.to_owned() };
            if !node_name(&node) {
                return Err(silent(
                    "its name must be 1 to 64 letters, digits, underscores and hyphens",
                ));
            }
            let client = shared.line.client();
            let late = |_| silent("the server does not answer");
            let questions = client.subscribe(subjects::node(&node));
            let questions = timeout(super::log::ANSWER, questions).await.map_err(late)?;
            let questions = questions.map_err(|error| silent(&told(&error)))?;
            if !echoes(&client, super::log::ANSWER).await {
                return Err(silent("the server does not answer"));
            }
            let listening = shared.runtime.clone().spawn(shared.listen(node, answerer, questions));
            serving.0.lock().push(listening.abort_handle());
            Ok(())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_one_token() {
        for good in ["a", "node-1", "N_9", &"x".repeat(64)] {
            assert!(node_name(good), "{good}");
        }
        for bad in ["", "a.b", "*", ">", "a b", "ä", "a\r\nPUB", &"x".repeat(65)] {
            assert!(!node_name(bad), "{bad:?}");
        }
    }
}
