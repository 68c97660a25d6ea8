//! The HTTP client of the commands that talk to a server: blocking, without TLS, with bounds on
//! time and size, and errors that say what to do.

use std::io::Read;
use std::time::Duration;

use serde_json::Value;
use ureq::http::StatusCode;

use super::args::ClientArgs;

/// Largest answer read, in bytes. The server pages long ones.
const ANSWER_LEN_MAX: u64 = 256 << 20;
/// Longest time a connection may take to be made.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// A live stream that is silent for this long is taken for dead. The server sends a comment more
/// often than that.
const STREAM_SILENCE_MAX: Duration = Duration::from_secs(60);

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No connection, or it broke, or took too long.
    #[error(
        "cannot reach {url}; start the server with \"meterr serve\", or name another one with --url"
    )]
    Unreachable {
        /// The server.
        url: String,
        /// Why.
        #[source]
        source: Box<ureq::Error>,
    },
    /// The server is there and did not answer in time.
    #[error("no answer from {url} within {within:?}; --timeout waits longer")]
    Silent {
        /// The server.
        url: String,
        /// How long it had.
        within: Duration,
    },
    /// The server said no.
    #[error("the server refused with status {status}: {detail}")]
    Refused {
        /// HTTP status.
        status: u16,
        /// What was wrong, as the server's problem document says it.
        detail: String,
        /// After how many seconds it makes sense to try again.
        retry_after: Option<u64>,
    },
    /// What answers is no meterr server, or one of another version.
    #[error("{url} does not answer like a meterr server ({what}); check --url")]
    Strange {
        /// The server.
        url: String,
        /// What was odd.
        what: String,
    },
}

impl ClientError {
    /// Whether the same request may succeed a little later.
    pub fn passing(&self) -> bool {
        match self {
            ClientError::Unreachable { .. } | ClientError::Silent { .. } => true,
            ClientError::Refused { status, .. } => matches!(status, 408 | 429 | 502 | 503 | 504),
            ClientError::Strange { .. } => false,
        }
    }
}

/// Method of a request with a body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// POST
    Post,
    /// PUT
    Put,
}

/// A server. Cloning shares its connections.
#[derive(Debug, Clone)]
pub struct Client {
    agent: ureq::Agent,
    url: String,
    timeout: Duration,
}

/// What a request asks with, beside its path.
pub type Query = Vec<(&'static str, String)>;

impl Client {
    /// The server that the arguments name.
    pub fn new(args: &ClientArgs) -> Client {
        let agent = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .user_agent(concat!("meterr/", env!("CARGO_PKG_VERSION")))
            // The default would send requests for 127.0.0.1 to whatever http_proxy names.
            .proxy(None)
            .max_redirects(0)
            .timeout_connect(Some(CONNECT_TIMEOUT))
            .max_idle_connections_per_host(64)
            .build()
            .new_agent();
        Client { agent, url: args.url.clone(), timeout: args.timeout }
    }

    /// Asks.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn get(&self, path: &str, query: &Query) -> Result<Value, ClientError> {
        let request = self.agent.get(format!("{}{path}", self.url)).query_pairs(pairs(query));
        let request = request.config().timeout_global(Some(self.timeout)).build();
        self.answer(request.call())
    }

    /// Sends a body.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn send(
        &self,
        method: Method,
        path: &str,
        query: &Query,
        media_type: &str,
        body: &[u8],
    ) -> Result<Value, ClientError> {
        let url = format!("{}{path}", self.url);
        let request = match method {
            Method::Post => self.agent.post(url),
            Method::Put => self.agent.put(url),
        };
        let request = request.query_pairs(pairs(query)).content_type(media_type);
        let request = request.config().timeout_global(Some(self.timeout)).build();
        self.answer(request.send(body))
    }

    /// Sends JSON.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn send_json(
        &self,
        method: Method,
        path: &str,
        body: &Value,
    ) -> Result<Value, ClientError> {
        let body = body.to_string();
        self.send(method, path, &Query::new(), "application/json", body.as_bytes())
    }

    /// Deletes.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn delete(&self, path: &str) -> Result<Value, ClientError> {
        let request = self.agent.delete(format!("{}{path}", self.url));
        self.answer(request.config().timeout_global(Some(self.timeout)).build().call())
    }

    /// Opens a live stream, after the event with the id `after` if there is one.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn stream(
        &self,
        path: &str,
        after: Option<&str>,
    ) -> Result<impl Read + use<>, ClientError> {
        let request = self.agent.get(format!("{}{path}", self.url));
        let mut request = request.header("accept", "text/event-stream");
        if let Some(id) = after {
            request = request.header("last-event-id", id);
        }
        let request = request
            .config()
            .timeout_recv_response(Some(self.timeout))
            .timeout_per_read(Some(STREAM_SILENCE_MAX))
            .build();
        let response = request.call().map_err(|error| self.unreachable(error))?;
        if response.status() != StatusCode::OK {
            return Err(self.answer(Ok(response)).map_or_else(
                |error| error,
                |_| self.strange("a live stream answered with something else".to_owned()),
            ));
        }
        if response.body().mime_type() != Some("text/event-stream") {
            return Err(self.strange("not an event stream".to_owned()));
        }
        Ok(response.into_body().into_reader())
    }

    fn answer(
        &self,
        result: Result<ureq::http::Response<ureq::Body>, ureq::Error>,
    ) -> Result<Value, ClientError> {
        let mut response = result.map_err(|error| self.unreachable(error))?;
        let status = response.status();
        let retry_after = response
            .headers()
            .get("retry-after")
            .and_then(|value| value.to_str().ok()?.trim().parse::<u64>().ok());
        let body = response.body_mut().with_config().limit(ANSWER_LEN_MAX).read_to_vec();
        let body = match body {
            Ok(body) => body,
            Err(ureq::Error::BodyExceedsLimit(_)) => {
                return Err(self.strange("an answer of more than 256 MiB".to_owned()));
            }
            Err(error) => return Err(self.unreachable(error)),
        };
        let json = serde_json::from_slice::<Value>(&body);
        if !status.is_success() {
            let told = json.ok().and_then(|problem| {
                let text = problem.get("detail").or(problem.get("title"))?.as_str()?;
                Some(text.to_owned())
            });
            let detail = told.unwrap_or_else(|| {
                status.canonical_reason().unwrap_or("no reason given").to_lowercase()
            });
            return Err(ClientError::Refused { status: status.as_u16(), detail, retry_after });
        }
        if body.is_empty() {
            return Ok(Value::Null);
        }
        json.map_err(|error| {
            self.strange(format!("status {} and no JSON: {error}", status.as_u16()))
        })
    }

    fn unreachable(&self, error: ureq::Error) -> ClientError {
        if let ureq::Error::Timeout(at) = error
            && at != ureq::Timeout::Connect
        {
            return ClientError::Silent { url: self.url.clone(), within: self.timeout };
        }
        ClientError::Unreachable { url: self.url.clone(), source: Box::new(error) }
    }

    /// An answer that is not of the form expected.
    pub fn strange(&self, what: String) -> ClientError {
        ClientError::Strange { url: self.url.clone(), what }
    }

    /// Reads an answer, or a part of it, as a type.
    ///
    /// # Errors
    /// [`ClientError::Strange`] when it is of another form.
    pub fn read<T: serde::de::DeserializeOwned>(&self, value: &Value) -> Result<T, ClientError> {
        T::deserialize(value).map_err(|error| self.strange(error.to_string()))
    }

    /// The list under `name`, each element read as a type.
    ///
    /// # Errors
    /// [`ClientError::Strange`] when there is none, or of another form.
    pub fn list<T: serde::de::DeserializeOwned>(
        &self,
        answer: &Value,
        name: &str,
    ) -> Result<Vec<T>, ClientError> {
        match answer.get(name) {
            Some(Value::Array(items)) => items.iter().map(|item| self.read(item)).collect(),
            _ => Err(self.strange(format!("no list {name:?} in the answer"))),
        }
    }
}

fn pairs(query: &Query) -> impl Iterator<Item = (&str, &str)> {
    query.iter().map(|(name, value)| (*name, value.as_str()))
}

/// A path of these segments, percent-encoded.
pub fn path(segments: &[&str]) -> String {
    let mut path = String::new();
    for segment in segments {
        path.push('/');
        for byte in segment.bytes() {
            match byte {
                b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => {
                    path.push(char::from(byte));
                }
                _ => path.push_str(&format!("%{byte:02X}")),
            }
        }
    }
    path
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::testing::{Server, client_args, reply};
    use super::*;

    #[test]
    fn paths_and_queries_are_encoded() {
        let server = Server::new(vec![reply(200, "{}")]);
        let client = Client::new(&client_args(server.url()));
        let path = path(&["v1", "orgs", "acme", "users", "ü/ ?"]);
        client.get(&path, &vec![("by", "tag:a b&c".to_owned())]).unwrap();
        assert_eq!(
            server.requests()[0].target,
            "/v1/orgs/acme/users/%C3%BC%2F%20%3F?by=tag%3Aa%20b%26c"
        );
    }

    #[test]
    fn a_problem_document_becomes_one_sentence() {
        let problem = json!({"type": "/problems/parameter", "title": "t", "detail": "say x"});
        let server = Server::new(vec![
            reply(400, &problem.to_string()),
            reply(503, "busy").header("retry-after", "7"),
            reply(200, "<html>"),
        ]);
        let client = Client::new(&client_args(server.url()));
        let error = client.get("/x", &Query::new()).unwrap_err();
        assert_eq!(error.to_string(), "the server refused with status 400: say x");
        assert!(!error.passing());
        let error = client.get("/x", &Query::new()).unwrap_err();
        assert_eq!(error.to_string(), "the server refused with status 503: service unavailable");
        assert!(error.passing());
        assert!(matches!(error, ClientError::Refused { retry_after: Some(7), .. }));
        let error = client.get("/x", &Query::new()).unwrap_err();
        assert!(error.to_string().contains("does not answer like a meterr server"), "{error}");
    }

    #[test]
    fn a_server_that_is_not_there_is_unreachable() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        drop(listener);
        let error = Client::new(&client_args(url)).get("/x", &Query::new()).unwrap_err();
        assert!(error.to_string().contains("start the server with \"meterr serve\""), "{error}");
        assert!(matches!(error, ClientError::Unreachable { .. }) && error.passing());
    }
}
