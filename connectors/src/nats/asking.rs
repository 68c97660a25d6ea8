//! One question of the live protocol, asked: a request of its own reply subject, and the messages of
//! the answer as they come.

use std::time::Duration;

use async_nats::connection::State;
use async_nats::{Client, Message, StatusCode};
use bytes::Bytes;
use futures::stream::{BoxStream, unfold};
use futures::{FutureExt, StreamExt};
use tokio::time::{Instant, sleep_until, timeout};

use crate::api::StreamId;
use crate::changes::LiveMessage;

/// Why nothing can be asked while there is no connection.
pub(super) const AWAY: &str = "the connection to the server is lost";

/// What to ask, and whom.
pub(super) struct Query {
    pub(super) client: Client,
    pub(super) subject: String,
    /// The follower's number for it.
    pub(super) number: u64,
    pub(super) after: Option<StreamId>,
    /// Not before.
    pub(super) at: Instant,
    /// Longest time until an answer begins, and between two messages of it.
    pub(super) patience: Duration,
}

/// What a question brings.
pub(super) enum Answer {
    /// A message of the answer.
    Message(u64, LiveMessage),
    /// There is none, or not all of it: why.
    Failed(u64, String),
}

enum Asking {
    Begin(Query),
    Going(Query, async_nats::Subscriber),
    Over,
}

/// Asks. The stream ends with the answer, or with why there is none; dropping it gives the question
/// up. How much an answer may be is for whoever takes it to say.
pub(super) fn ask(query: Query) -> BoxStream<'static, Answer> {
    unfold(Asking::Begin(query), |asking| async move {
        let (query, mut replies) = match asking {
            Asking::Begin(query) => match begin(&query).await {
                Ok(replies) => (query, replies),
                Err(why) => return Some((Answer::Failed(query.number, why), Asking::Over)),
            },
            Asking::Going(query, replies) => (query, replies),
            Asking::Over => return None,
        };
        let reply = match timeout(query.patience, replies.next()).await {
            Ok(Some(reply)) => read(&reply),
            Ok(None) => Err("the connection was closed".to_owned()),
            Err(_) => Err(format!("no answer within {:?}", query.patience)),
        };
        Some(match reply {
            Ok(message) => {
                let (number, more) = (query.number, message.more);
                let then = if more { Asking::Going(query, replies) } else { Asking::Over };
                (Answer::Message(number, message), then)
            }
            Err(why) => (Answer::Failed(query.number, why), Asking::Over),
        })
    })
    .boxed()
}

/// Sends the question.
async fn begin(query: &Query) -> Result<async_nats::Subscriber, String> {
    sleep_until(query.at).await;
    let Query { client, subject, after, .. } = query;
    // What is sent now would go out when the connection is back, together with all that is asked
    // until then.
    if client.connection_state() != State::Connected {
        return Err(AWAY.to_owned());
    }
    let payload = after.map_or_else(String::new, |after| {
        format!("{{\"after\":\"{}-{}\"}}", after.shard, after.epoch)
    });
    let inbox = client.new_inbox();
    let sent = async {
        let replies = client.subscribe(inbox.clone()).await.map_err(|error| error.to_string())?;
        let payload = Bytes::from(payload);
        let sent = client.publish_with_reply(subject.clone(), inbox, payload).await;
        sent.map_err(|error| error.to_string()).map(|()| replies)
    };
    // Where commands wait for a connection there may be no place for more.
    let sent = timeout(query.patience, sent).map(|sent| sent.map_err(|late| late.to_string()));
    sent.await?
}

/// Reads a message of an answer.
fn read(reply: &Message) -> Result<LiveMessage, String> {
    if reply.status == Some(StatusCode::NO_RESPONDERS) {
        return Err("no engine is there to answer".to_owned());
    }
    let header =
        |name: &str| reply.headers.as_ref()?.get(name).map(|value| value.as_str().to_owned());
    if let Some(error) = header("Nats-Service-Error") {
        let code = header("Nats-Service-Error-Code").unwrap_or_default();
        return Err(format!("the engine answers {code}: {error}"));
    }
    LiveMessage::read(&reply.payload).map_err(|error| format!("the answer cannot be read: {error}"))
}
