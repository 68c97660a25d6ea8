//! `GET /v1/orgs/{org}/stream`: spend of an org as it changes, as server-sent events.
//!
//! A `snapshot` first (or, with `Last-Event-ID`, the changes missed), then a `change` for every
//! commit that touched the org. Each carries `id: <shard>-<epoch>`; a browser sends the last one
//! back by itself. An id that is too old or unknown gets `reset` and a new snapshot. A comment every
//! [`heartbeat_interval`](super::HttpSettings::heartbeat_interval) keeps proxies from closing a quiet
//! stream and shows a dead client for what it is; a stopping server says `bye`.
//!
//! Memory is bounded: at most [`sse_subscribers_max`](super::HttpSettings::sse_subscribers_max)
//! streams, each pulled only as fast as its socket takes it. What queues up behind a slow reader is
//! bounded in the engine, which then ends the stream; the client resumes by its last id. A reader
//! that takes nothing at all loses its connection after
//! [`write_timeout`](super::HttpSettings::write_timeout).

use std::convert::Infallible;

use actix_web::http::header;
use actix_web::{HttpRequest, HttpResponse, web};
use bytes::{BufMut, Bytes, BytesMut};
use futures::StreamExt;
use futures::stream::{self, BoxStream, Stream};
use tokio::sync::{OwnedSemaphorePermit, watch};
use tokio::time::{Interval, MissedTickBehavior, interval_at};

use super::State;
use super::problem::{Kind, Problem};
use super::query;
use crate::api::{StreamEvent, StreamId};
use crate::requests::live::{STREAM_ID_FORM, stream_id};
use crate::requests::parameters::Parameters;

pub(super) async fn follow(
    state: web::Data<State>,
    request: HttpRequest,
) -> Result<HttpResponse, Problem> {
    let org = query::org(&request, 2)?;
    let query = query::of(&request, &["last_event_id"])?;
    let (after, unknown) = resume_from(&request, &query)?;
    if state.desk.stopping() {
        return Err(Problem::new(Kind::Unavailable, "the server is stopping"));
    }
    let permit = state.subscribers.clone().try_acquire_owned().map_err(|_| {
        Problem::new(
            Kind::Unavailable,
            format!("all {} streams are taken", state.settings.sse_subscribers_max),
        )
    })?;
    let events = state.desk.plain(state.desk.api.follow(org, after)).await?;
    let mut opening = BytesMut::new();
    opening.extend_from_slice(
        format!("retry: {}\n\n", state.settings.sse_retry.as_millis()).as_bytes(),
    );
    if unknown {
        frame(&mut opening, &StreamEvent::Reset);
    }
    let every = state.settings.heartbeat_interval;
    let mut beat = interval_at(tokio::time::Instant::now() + every, every);
    beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let live = Live {
        opening: Some(opening.freeze()),
        events,
        beat,
        stopping: state.desk.stopping.subscribe(),
        _permit: permit,
    };
    Ok(HttpResponse::Ok()
        .content_type("text/event-stream")
        .insert_header((header::CACHE_CONTROL, "no-store"))
        // Not compressed: an encoder holds events back, and costs memory per subscriber.
        .insert_header((header::CONTENT_ENCODING, "identity"))
        // Asks nginx not to collect the answer before passing it on.
        .insert_header(("x-accel-buffering", "no"))
        .streaming(live.frames()))
}

/// The id to resume from, and whether one was sent that is none of ours. The header goes before the
/// parameter: a browser reconnects with the URL of its first request and the newest id in the header.
fn resume_from(
    request: &HttpRequest,
    query: &Parameters,
) -> Result<(Option<StreamId>, bool), Problem> {
    if let Some(value) = request.headers().get("last-event-id") {
        // A browser can only repeat what it was sent, so an unknown id is answered, not refused.
        let id = value.to_str().ok().and_then(stream_id);
        return Ok((id, id.is_none() && !value.is_empty()));
    }
    match query.text("last_event_id") {
        None => Ok((None, false)),
        Some(text) => match stream_id(text) {
            Some(id) => Ok((Some(id), false)),
            None => Err(Problem::parameter("last_event_id", text, STREAM_ID_FORM)),
        },
    }
}

/// One subscriber.
struct Live {
    opening: Option<Bytes>,
    events: BoxStream<'static, StreamEvent>,
    beat: Interval,
    stopping: watch::Receiver<bool>,
    _permit: OwnedSemaphorePermit,
}

impl Live {
    fn frames(self) -> impl Stream<Item = Result<Bytes, Infallible>> {
        stream::unfold(Some(self), |live| async move {
            let (frame, live) = live?.next().await?;
            Some((Ok(frame), live))
        })
    }

    /// The next frame, and what goes on after it; `None` when the engine ended the stream.
    async fn next(mut self) -> Option<(Bytes, Option<Live>)> {
        if let Some(opening) = self.opening.take() {
            return Some((opening, Some(self)));
        }
        let next = tokio::select! {
            biased;
            // An error means that the server itself is gone.
            _ = self.stopping.wait_for(|stopping| *stopping) => {
                return Some((Bytes::from_static(b": bye\n\n"), None));
            }
            event = self.events.next() => Some(event?),
            _ = self.beat.tick() => None,
        };
        let bytes = match next {
            Some(event) => {
                self.beat.reset();
                let mut bytes = BytesMut::new();
                frame(&mut bytes, &event);
                bytes.freeze()
            }
            None => Bytes::from_static(b":\n\n"),
        };
        Some((bytes, Some(self)))
    }
}

/// Writes one event in the form of the HTML standard, "9.2.5 Parsing an event stream".
fn frame(out: &mut BytesMut, event: &StreamEvent) {
    let (name, shard, epoch, body) = match event {
        StreamEvent::Snapshot { shard, epoch, body } => ("snapshot", shard, epoch, body),
        StreamEvent::Change { shard, epoch, body } => ("change", shard, epoch, body),
        StreamEvent::Reset => {
            // The empty id makes a client that drops off right here begin anew.
            out.extend_from_slice(b"id:\nevent: reset\ndata: {}\n\n");
            return;
        }
    };
    out.reserve(body.len() + 64);
    out.extend_from_slice(format!("id: {shard}-{epoch}\nevent: {name}\n").as_bytes());
    // A line end in the body would end the field; as lines of one event they are put together again.
    for line in body.split(|byte| matches!(byte, b'\n' | b'\r')) {
        out.extend_from_slice(b"data: ");
        out.extend_from_slice(line);
        out.put_u8(b'\n');
    }
    out.put_u8(b'\n');
}

#[cfg(test)]
mod tests {
    use super::*;
    use meterr_operators::ids::ShardId;
    use proptest::prelude::*;

    fn framed(event: &StreamEvent) -> String {
        let mut out = BytesMut::new();
        frame(&mut out, event);
        String::from_utf8(out.to_vec()).unwrap()
    }

    #[test]
    fn frames_are_those_of_the_standard() {
        let (shard, epoch) = (ShardId(3), 7);
        let body = Bytes::from_static(b"{\"rows\":[]}");
        assert_eq!(
            framed(&StreamEvent::Change { shard, epoch, body }),
            "id: 3-7\nevent: change\ndata: {\"rows\":[]}\n\n"
        );
        let body = Bytes::from_static(b"{\n}");
        assert_eq!(
            framed(&StreamEvent::Snapshot { shard, epoch, body }),
            "id: 3-7\nevent: snapshot\ndata: {\ndata: }\n\n"
        );
        assert_eq!(framed(&StreamEvent::Reset), "id:\nevent: reset\ndata: {}\n\n");
    }

    proptest! {
        #[test]
        fn a_body_cannot_forge_a_field(body in "[a-z:\\r\\n ]{0,60}") {
            let event = StreamEvent::Change { shard: ShardId(0), epoch: 1, body: body.into() };
            let text = framed(&event);
            let lines: Vec<&str> = text.split('\n').collect();
            let (head, tail) = lines.split_at(2);
            prop_assert_eq!(head, ["id: 0-1", "event: change"]);
            let (data, end) = tail.split_at(tail.len() - 2);
            prop_assert!(data.iter().all(|line| line.starts_with("data: ") && !line.contains('\r')));
            prop_assert_eq!(end, ["", ""]);
        }
    }
}
