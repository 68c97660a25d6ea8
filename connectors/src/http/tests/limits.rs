//! Limits in bytes, time and number, and hostile bytes.

use proptest::prelude::*;

use super::super::HttpSettings;
use super::*;

#[test]
fn a_body_beyond_the_limit_is_refused_told_or_not() {
    let server = run(HttpSettings { body_bytes_max: 1_000, ..small() });
    let body = vec![b'\n'; 1_001];
    let problem = server.ndjson(&body).problem(413, "too-large");
    assert_eq!(problem["limit"], 1_000);
    let head = "POST /v1/events HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n";
    let chunked = [head.as_bytes(), b"3e9\r\n", &body, b"\r\n0\r\n\r\n"].concat();
    server.raw(&chunked).problem(413, "too-large");
    // The valid twin: as large as allowed.
    server.ndjson(&body[1..]).problem(400, "body");
    let json = [b"{\"prices\":[]}".as_slice(), &body].concat();
    server.post("/v1/prices", "application/json", &json).problem(413, "too-large");
}

#[test]
fn a_large_body_is_refused_before_it_is_sent() {
    let server = run(small());
    let head = "POST /v1/events HTTP/1.1\r\nhost: localhost\r\ncontent-length: 99999999999\r\n\r\n";
    server.raw(head.as_bytes()).problem(413, "too-large");
}

#[test]
fn bodies_together_are_bounded_and_given_back() {
    let server = run(HttpSettings { bodies_bytes_max: 1_000, ..small() });
    // Held twice: as received, and as batches.
    let line = |length: usize| format!("{:<length$}", "{\"id\":\"1\",\"org\":\"acme\"}");
    for _ in 0..3 {
        let reply = server.ndjson(line(600).as_bytes());
        reply.problem(503, "unavailable");
        assert_eq!(reply.header("retry-after"), Some("1"));
        server.ndjson(line(500).as_bytes()).ok(202);
    }
}

#[test]
fn a_body_that_trickles_is_given_up() {
    let server = run(HttpSettings { request_timeout: Duration::from_millis(50), ..small() });
    let head = "POST /v1/events HTTP/1.1\r\nhost: localhost\r\ncontent-length: 10\r\n\r\n{";
    let mut stream = server.connect();
    stream.write_all(head.as_bytes()).unwrap();
    Reply::read(&mut stream).problem(408, "slow-request");
    // The connection is not kept: the rest of the body would be taken for the next request.
    assert_eq!(stream.read(&mut [0; 1]).unwrap_or(0), 0);
}

#[test]
fn a_head_that_trickles_is_given_up() {
    let server = run(HttpSettings { head_timeout: Duration::from_millis(50), ..small() });
    let mut stream = server.connect();
    stream.write_all(b"GET /healthz HTTP/1.1\r\nhost: lo").unwrap();
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).unwrap();
    assert!(rest.starts_with(b"HTTP/1.1 408 "), "{:?}", String::from_utf8_lossy(&rest));
}

#[test]
fn heads_are_bounded() {
    let server = run(small());
    let many: String = (0..200).map(|n| format!("x-{n}: y\r\n")).collect();
    let long = format!("x: {}\r\n", "y".repeat(140_000));
    for headers in [many, long] {
        let mut stream = server.connect();
        let head = format!("GET /healthz HTTP/1.1\r\nhost: localhost\r\n{headers}\r\n");
        // The server may close before it has read all of it.
        let _ = stream.write_all(head.as_bytes());
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest);
        let status = rest.get(9..12).unwrap_or_default();
        assert!(
            rest.is_empty() || status.starts_with(b"4"),
            "{:?}",
            String::from_utf8_lossy(&rest)
        );
    }
    server.get("/healthz").ok(200);
}

#[test]
fn foreign_hosts_and_origins_are_refused() {
    let server = run(small());
    let head = "GET /v1/prices HTTP/1.1\r\nhost: evil.example\r\n\r\n";
    server.raw(head.as_bytes()).problem(421, "misdirected");
    let headers = [("origin", "http://evil.example"), ("content-type", "text/plain")];
    let reply = server.send("POST", "/v1/events", &headers, b"{\"id\":\"1\",\"org\":\"a\"}");
    reply.problem(403, "foreign-origin");
    assert!(server.fake.published.lock().is_empty());
}

#[test]
fn only_the_loopback_interface_unless_told() {
    let fake: Arc<Fake> = Arc::default();
    let settings =
        HttpSettings { address: SocketAddr::from(([0, 0, 0, 0], 0)), ..HttpSettings::default() };
    let error = match serve(settings.clone(), fake, decoders()) {
        Err(error) => error.to_string(),
        Ok(_) => panic!("must be refused"),
    };
    assert!(
        error.contains("\"0.0.0.0:0\"") && error.contains("http.allow_non_loopback"),
        "{error}"
    );
    let server = run(HttpSettings { allow_non_loopback: true, ..settings });
    let port = server.address.port();
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream.write_all(b"GET /healthz HTTP/1.1\r\nhost: meterr.internal\r\n\r\n").unwrap();
    Reply::read(&mut stream).ok(200);
}

#[test]
fn an_address_in_use_is_named() {
    let server = run(small());
    let settings = HttpSettings { address: server.address, ..small() };
    let Err(error) = serve(settings, Arc::<Fake>::default(), decoders()) else {
        panic!("must be refused")
    };
    assert!(error.to_string().contains(&server.address.to_string()), "{error}");
}

/// Whatever stands in path, query and body, the answer is a status a client can act upon, a refusal
/// is a problem document, and the server lives.
#[test]
fn hostile_requests_get_an_answer() {
    let server = run(small());
    let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(256) };
    let word = prop_oneof![
        Just("v1".to_owned()),
        Just("orgs".to_owned()),
        Just("acme".to_owned()),
        Just("users".to_owned()),
        Just("spend".to_owned()),
        Just("top".to_owned()),
        Just("views".to_owned()),
        Just("dead-letters".to_owned()),
        "(%[0-9a-fA-F]{2}|[!-~]|[¡-ÿ]){0,8}",
    ];
    let pair = ("(window|by|from|n|cursor|min_position|before|[a-z%]{1,4})", "[!-~]{0,12}");
    let path = (prop::collection::vec(word, 1..7), prop::collection::vec(pair, 0..3));
    let method = prop_oneof![Just("GET"), Just("POST"), Just("PUT"), Just("DELETE"), Just("BREW")];
    let body = prop::collection::vec(any::<u8>(), 0..40);
    proptest!(config, |(path in path, method in method, body in body)| {
        let (words, pairs) = path;
        let pairs: Vec<String> =
            pairs.iter().map(|(name, value)| format!("{name}={value}")).collect();
        let path = format!("/{}?{}", words.join("/"), pairs.join("&"));
        let reply = server.send(method, &path, &[("connection", "close")], &body);
        prop_assert!((200..500).contains(&reply.status), "{}", reply.status);
        let ours = reply.header("content-type") == Some("application/problem+json");
        // A request line the parser refuses has no route and no body.
        prop_assert!(reply.status < 400 || ours || reply.body.is_empty());
    });
    // Bytes that are no HTTP at all.
    let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(64) };
    proptest!(config, |(bytes in prop::collection::vec(any::<u8>(), 1..200))| {
        let mut stream = server.connect();
        let _ = stream.write_all(&bytes);
        let _ = stream.write_all(b"\r\n\r\n");
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest);
        prop_assert!(rest.is_empty() || rest.starts_with(b"HTTP/1.1 4"));
    });
    server.get("/healthz").ok(200);
}
