//! Server-sent events.

use bytes::Bytes;
use futures::StreamExt;
use futures::channel::mpsc;
use meterr_operators::ids::ShardId;

use super::super::HttpSettings;
use super::*;
use crate::api::StreamEvent;

const PATH: &str = "/v1/orgs/acme/stream";

fn change(epoch: u64) -> StreamEvent {
    StreamEvent::Change {
        shard: ShardId(3),
        epoch,
        body: Bytes::from(format!("{{\"n\":{epoch}}}")),
    }
}

fn snapshot(epoch: u64) -> StreamEvent {
    StreamEvent::Snapshot { shard: ShardId(3), epoch, body: Bytes::from_static(b"{\"rows\":[]}") }
}

/// Prepares the engine's next stream.
fn feed(server: &Running) -> mpsc::UnboundedSender<StreamEvent> {
    let (sender, receiver) = mpsc::unbounded();
    server.fake.streams.lock().push_back(receiver.boxed());
    sender
}

/// Subscribes and reads what opens the stream.
fn follow(server: &Running, path: &str, headers: &[(&str, &str)]) -> (TcpStream, String) {
    let mut stream = server.connect();
    stream.write_all(&request("GET", path, headers, b"")).unwrap();
    let head = Reply::head(&mut stream);
    assert_eq!(head.status, 200);
    assert_eq!(head.header("content-type"), Some("text/event-stream"));
    assert_eq!(head.header("cache-control"), Some("no-store"));
    let opening = next(&mut stream).unwrap();
    (stream, opening)
}

fn next(stream: &mut TcpStream) -> Option<String> {
    chunk(stream).map(|bytes| String::from_utf8(bytes).unwrap())
}

#[test]
fn a_snapshot_then_changes_then_the_end() {
    let server = run(small());
    let sender = feed(&server);
    let (mut stream, opening) = follow(&server, PATH, &[("accept-encoding", "gzip")]);
    assert_eq!(opening, "retry: 2000\n\n");
    assert_eq!(server.fake.last(), "follow acme None");
    sender.unbounded_send(snapshot(7)).unwrap();
    let expected = "id: 3-7\nevent: snapshot\ndata: {\"rows\":[]}\n\n";
    assert_eq!(next(&mut stream).as_deref(), Some(expected));
    sender.unbounded_send(change(9)).unwrap();
    let expected = "id: 3-9\nevent: change\ndata: {\"n\":9}\n\n";
    assert_eq!(next(&mut stream).as_deref(), Some(expected));
    // The engine ends the stream of a slow reader; the client comes back by itself.
    drop(sender);
    assert_eq!(next(&mut stream), None);
}

#[test]
fn a_client_resumes_by_header_before_parameter() {
    let server = run(small());
    for (path, header, expected) in [
        (
            PATH.to_owned(),
            Some("3-7"),
            "follow acme Some(StreamId { shard: ShardId(3), epoch: 7 })",
        ),
        (
            format!("{PATH}?last_event_id=3-5"),
            None,
            "follow acme Some(StreamId { shard: ShardId(3), epoch: 5 })",
        ),
        (
            format!("{PATH}?last_event_id=3-5"),
            Some("3-7"),
            "follow acme Some(StreamId { shard: ShardId(3), epoch: 7 })",
        ),
        (PATH.to_owned(), Some(""), "follow acme None"),
    ] {
        let headers: Vec<_> = header.map(|id| ("last-event-id", id)).into_iter().collect();
        let (_, opening) = follow(&server, &path, &headers);
        assert_eq!(opening, "retry: 2000\n\n");
        assert_eq!(server.fake.last(), expected);
    }
}

#[test]
fn an_id_that_is_none_is_reset() {
    let server = run(small());
    let sender = feed(&server);
    let (mut stream, opening) = follow(&server, PATH, &[("last-event-id", "from-elsewhere")]);
    assert_eq!(opening, "retry: 2000\n\nid:\nevent: reset\ndata: {}\n\n");
    assert_eq!(server.fake.last(), "follow acme None");
    sender.unbounded_send(snapshot(7)).unwrap();
    assert!(next(&mut stream).unwrap().starts_with("id: 3-7\nevent: snapshot\n"));
    sender.unbounded_send(StreamEvent::Reset).unwrap();
    assert_eq!(next(&mut stream).as_deref(), Some("id:\nevent: reset\ndata: {}\n\n"));
}

#[test]
fn a_quiet_stream_shows_signs_of_life() {
    let server = run(HttpSettings { heartbeat_interval: Duration::from_millis(5), ..small() });
    let sender = feed(&server);
    let (mut stream, _) = follow(&server, PATH, &[]);
    assert_eq!(next(&mut stream).as_deref(), Some(":\n\n"));
    assert_eq!(next(&mut stream).as_deref(), Some(":\n\n"));
    sender.unbounded_send(change(1)).unwrap();
    while next(&mut stream).as_deref() == Some(":\n\n") {}
    assert_eq!(next(&mut stream).as_deref(), Some(":\n\n"));
}

#[test]
fn streams_are_bounded_and_a_lost_client_makes_room() {
    let server = run(HttpSettings {
        sse_subscribers_max: 1,
        heartbeat_interval: Duration::from_millis(5),
        ..small()
    });
    let (stream, _) = follow(&server, PATH, &[]);
    let reply = server.get(PATH);
    reply.problem(503, "unavailable");
    assert_eq!(reply.header("retry-after"), Some("1"));
    drop(stream);
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    loop {
        let mut stream = server.connect();
        stream.write_all(&request("GET", PATH, &[], b"")).unwrap();
        if Reply::head(&mut stream).status == 200 {
            break;
        }
        assert!(std::time::Instant::now() < deadline, "the place was not given back");
    }
}

/// A reader that takes nothing: what was queued for it is given back when the kernel gives up.
#[cfg(target_os = "linux")]
#[test]
fn a_stuck_reader_loses_its_connection() {
    let server = run(HttpSettings {
        sse_subscribers_max: 1,
        write_timeout: Duration::from_millis(200),
        ..small()
    });
    let body = Bytes::from(vec![b'x'; 1 << 20]);
    let endless =
        futures::stream::repeat(StreamEvent::Change { shard: ShardId(3), epoch: 1, body });
    server.fake.streams.lock().push_back(endless.boxed());
    let (stuck, _) = follow(&server, PATH, &[]);
    let deadline = std::time::Instant::now() + Duration::from_secs(15);
    loop {
        let mut stream = server.connect();
        stream.write_all(&request("GET", PATH, &[], b"")).unwrap();
        if Reply::head(&mut stream).status == 200 {
            break;
        }
        assert!(std::time::Instant::now() < deadline, "the stuck reader kept its place");
    }
    drop(stuck);
}

#[test]
fn a_refusal_of_the_engine_takes_no_place() {
    let server = run(HttpSettings { sse_subscribers_max: 1, ..small() });
    for _ in 0..2 {
        *server.fake.error.lock() = Some(crate::api::ApiError::NotFound("no such org".to_owned()));
        server.get(PATH).problem(404, "not-found");
    }
    *server.fake.error.lock() = None;
    follow(&server, PATH, &[]);
}
