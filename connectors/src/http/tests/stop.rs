//! Stopping: what runs finishes, what never ends is told so.

use futures::FutureExt;

use super::super::HttpSettings;
use super::*;

/// Begins to stop the server and waits until it is visible.
fn begin(server: &Running) -> std::thread::JoinHandle<()> {
    let handle = server.handle.clone();
    let thread = std::thread::spawn(move || futures::executor::block_on(handle.stop()));
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    while !*server.handle.stopping.borrow() {
        assert!(std::time::Instant::now() < deadline);
        std::thread::yield_now();
    }
    thread
}

fn asked(server: &Running) {
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    while server.fake.asked.lock().is_empty() && server.fake.published.lock().is_empty() {
        assert!(std::time::Instant::now() < deadline);
        std::thread::yield_now();
    }
}

#[test]
fn streams_end_with_bye_and_connections_are_closed() {
    let mut server = run(small());
    let mut live = server.connect();
    live.write_all(&request("GET", "/v1/orgs/acme/stream", &[], b"")).unwrap();
    assert_eq!(Reply::head(&mut live).status, 200);
    assert_eq!(chunk(&mut live).as_deref(), Some(b"retry: 2000\n\n".as_slice()));
    let mut idle = server.connect();
    idle.write_all(&request("GET", "/healthz", &[], b"")).unwrap();
    Reply::read(&mut idle).ok(200);

    let stopping = begin(&server);
    assert_eq!(chunk(&mut live).as_deref(), Some(b": bye\n\n".as_slice()));
    assert_eq!(chunk(&mut live), None);
    assert_eq!(idle.read(&mut [0; 1]).unwrap_or(0), 0);
    stopping.join().unwrap();
    server.stop();
    assert!(TcpStream::connect(server.address).is_err());
}

#[test]
fn a_request_under_way_is_answered() {
    let fake = Fake::default();
    fake.gate.send_replace(false);
    let mut server = run_with(HttpSettings { workers: 2, ..small() }, fake);
    // A write that waits for its shard, as the log makes it durable.
    let mut stream = server.connect();
    let body = b"{\"id\":\"1\",\"org\":\"acme\"}";
    *server.fake.slow_publish.lock() = true;
    stream.write_all(&request("POST", "/v1/events", &[], body)).unwrap();
    asked(&server);
    let stopping = begin(&server);
    server.fake.gate.send_replace(true);
    assert_eq!(Reply::read(&mut stream).ok(202)["accepted"], 1);
    stopping.join().unwrap();
    server.stop();
}

#[test]
fn a_wait_for_a_position_ends() {
    let mut server = run(small());
    let mut stream = server.connect();
    let path = "/v1/orgs/acme/spend?min_position=3:99";
    stream.write_all(&request("GET", path, &[], b"")).unwrap();
    asked(&server);
    let stopping = begin(&server);
    Reply::read(&mut stream).problem(503, "unavailable");
    stopping.join().unwrap();
    server.stop();
}

#[test]
fn a_request_that_hangs_does_not_hold_the_stop_for_ever() {
    let settings = HttpSettings { shutdown_timeout: Duration::from_secs(1), ..small() };
    let mut server = run(settings);
    server.fake.hanging.lock().insert(meterr_operators::ids::shard_of("acme", fake::SHARDS));
    let mut stream = server.connect();
    let body = b"{\"id\":\"1\",\"org\":\"acme\"}";
    stream.write_all(&request("POST", "/v1/events", &[], body)).unwrap();
    asked(&server);
    let began = std::time::Instant::now();
    server.stop();
    assert!(began.elapsed() < Duration::from_secs(10));
}

#[test]
fn stopping_twice_is_stopping() {
    let mut server = run(small());
    let handle = server.handle.clone();
    server.stop();
    assert!(handle.stop().now_or_never().is_some());
}
