//! Problem documents (RFC 9457): the one form in which surfaces say no.
//!
//! Every refusal, from a wrong parameter to a panic, leaves as `application/problem+json` with a
//! stable `type`. Clients branch on `type`, people read `detail`. [`KINDS`] lists all of them, is
//! served at `GET /problems/{kind}`, and tests hold the OpenAPI and AsyncAPI documents against it.

use std::fmt;

use meterr_operators::event::{Rejection, excerpt};
use serde_json::{Map, Value, json};

use crate::api::ApiError;

/// Media type of a problem document.
pub const MEDIA_TYPE: &str = "application/problem+json";

/// Header that says when to try again, in seconds.
const RETRY_AFTER: &str = "retry-after";

/// What kind of refusal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The request is wrong in a way only the engine could see.
    Invalid,
    /// A parameter of path or query is wrong.
    Parameter,
    /// The body cannot be read.
    Body,
    /// A web page of another origin tries to change something.
    ForeignOrigin,
    /// No such thing.
    NotFound,
    /// The route exists, the method does not.
    Method,
    /// No acceptable encoding of the answer.
    NotAcceptable,
    /// The request took too long to arrive.
    SlowRequest,
    /// The change contradicts what is.
    Conflict,
    /// A cursor's pinned answer is gone.
    CursorExpired,
    /// The request is beyond a limit.
    TooLarge,
    /// A media type or content encoding that is not read.
    MediaType,
    /// Asked by a host name that is not this machine's.
    Misdirected,
    /// The answer is too large to be pinned for paging.
    AnswerTooLarge,
    /// A fault of ours.
    Internal,
    /// Not now.
    Unavailable,
    /// A part of a request's events may not be durable.
    NotWritten,
    /// Not within the time given.
    Timeout,
}

/// Name, status, title and meaning of each kind, in the order of [`Kind`].
pub const KINDS: [(Kind, &str, u16, &str, &str); 18] = [
    (
        Kind::Invalid,
        "invalid",
        400,
        "the request is wrong",
        "the engine refused the request; detail says why. Sending it again as it is will not help.",
    ),
    (
        Kind::Parameter,
        "parameter",
        400,
        "a parameter is wrong",
        "parameter, value and allowed name the parameter, what it was and what it may be.",
    ),
    (
        Kind::Body,
        "body",
        400,
        "the body cannot be read",
        "the body is damaged, truncated or not of the form the route takes.",
    ),
    (
        Kind::ForeignOrigin,
        "foreign-origin",
        403,
        "the request comes from another web site",
        "a browser sent the request for a page of another origin; only pages of this server may \
         change anything.",
    ),
    (
        Kind::NotFound,
        "not-found",
        404,
        "no such thing",
        "nothing is known under that name or path.",
    ),
    (
        Kind::Method,
        "method",
        405,
        "the method is not offered here",
        "the Allow header lists the methods of this path.",
    ),
    (
        Kind::NotAcceptable,
        "not-acceptable",
        406,
        "no acceptable encoding",
        "answers come as identity, gzip, deflate or zstd; Accept-Encoding excludes all of them.",
    ),
    (
        Kind::SlowRequest,
        "slow-request",
        408,
        "the request took too long to arrive",
        "the body was not complete within the server's request timeout; nothing was done.",
    ),
    (
        Kind::Conflict,
        "conflict",
        409,
        "the change contradicts what is",
        "what was asked for does not go together with the present state; detail says what is in the \
         way. Nothing was done.",
    ),
    (
        Kind::CursorExpired,
        "cursor-expired",
        410,
        "the cursor has expired",
        "pages of one answer are kept for a minute, less under load. Begin again without cursor.",
    ),
    (
        Kind::TooLarge,
        "too-large",
        413,
        "the request is too large",
        "limit says how much is taken at once; nothing was done. Split the request.",
    ),
    (
        Kind::MediaType,
        "media-type",
        415,
        "the media type is not read here",
        "allowed lists the media types or content encodings taken.",
    ),
    (
        Kind::Misdirected,
        "misdirected",
        421,
        "the request names another host",
        "a server that listens on the loopback interface only answers to the names of this machine, \
         so that no foreign web page reaches it by a name of its own.",
    ),
    (
        Kind::AnswerTooLarge,
        "answer-too-large",
        422,
        "the answer is too large",
        "the rows do not fit the memory kept for paging, or one message. Narrow from and to, group by \
         less, or ask for smaller pages with limit.",
    ),
    (
        Kind::Internal,
        "internal",
        500,
        "a fault of this server",
        "the server's log has the cause. Reads may be repeated; publishing may, since ids make it \
         idempotent.",
    ),
    (
        Kind::Unavailable,
        "unavailable",
        503,
        "not now",
        "the server starts, stops, is overloaded, or a shard is stopped; Retry-After says when to \
         try again.",
    ),
    (
        Kind::NotWritten,
        "not-written",
        503,
        "not every event is known to be durable",
        "failed lists the lines whose write failed; lines neither there nor in rejected are durable. \
         Send those lines, or the whole request, again: ids count once.",
    ),
    (
        Kind::Timeout,
        "timeout",
        504,
        "not within the time given",
        "with min_position, current says where the shards stand; ask again or wait longer with \
         timeout_ms.",
    ),
];

impl Kind {
    /// Its row of [`KINDS`].
    fn row(self) -> &'static (Kind, &'static str, u16, &'static str, &'static str) {
        &KINDS[self as usize]
    }

    /// Status, as in HTTP.
    pub fn status(self) -> u16 {
        self.row().2
    }
}

/// A refusal on its way to the client.
#[derive(Debug, Clone)]
pub struct Problem {
    kind: Kind,
    detail: String,
    members: Map<String, Value>,
    headers: Vec<(&'static str, String)>,
}

impl Problem {
    /// A problem with a sentence for a person: lower case, no final stop, values quoted.
    pub fn new(kind: Kind, detail: impl Into<String>) -> Problem {
        let mut problem =
            Problem { kind, detail: detail.into(), members: Map::new(), headers: Vec::new() };
        if matches!(kind, Kind::Unavailable | Kind::NotWritten) {
            problem = problem.header(RETRY_AFTER, "1");
        }
        problem
    }

    /// A wrong parameter. `why` completes "parameter "x" is "value": …".
    pub fn parameter(name: &str, value: &str, allowed: &str) -> Problem {
        let value = excerpt(value);
        Problem::new(
            Kind::Parameter,
            format!("parameter {name:?} is {value:?}, but must be {allowed}"),
        )
        .member("parameter", name)
        .member("value", value)
        .member("allowed", allowed)
    }

    /// A limit that was passed.
    pub fn too_large(detail: impl Into<String>, limit: usize) -> Problem {
        Problem::new(Kind::TooLarge, detail).member("limit", limit)
    }

    /// A body refused by a decoder.
    pub fn rejection(rejection: Rejection) -> Problem {
        Problem::new(Kind::Body, rejection.detail).member("reason", rejection.reason.name())
    }

    /// Adds an extension member.
    pub fn member(mut self, name: &str, value: impl Into<Value>) -> Problem {
        self.members.insert(name.to_owned(), value.into());
        self
    }

    /// Adds a header, its name in lower case, for surfaces that have them.
    pub fn header(mut self, name: &'static str, value: impl Into<String>) -> Problem {
        self.headers.push((name, value.into()));
        self
    }

    /// The kind.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Headers it goes with.
    pub fn headers(&self) -> &[(&'static str, String)] {
        &self.headers
    }

    /// The document.
    pub fn body(&self) -> String {
        let (_, name, status, title, _) = self.kind.row();
        let mut body = Map::new();
        body.insert("type".into(), format!("/problems/{name}").into());
        body.insert("title".into(), (*title).into());
        body.insert("status".into(), (*status).into());
        body.insert("detail".into(), self.detail.as_str().into());
        body.extend(self.members.clone());
        Value::Object(body).to_string()
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.detail)
    }
}

impl From<ApiError> for Problem {
    fn from(error: ApiError) -> Problem {
        let detail = error.to_string();
        match error {
            ApiError::Invalid(_) => Problem::new(Kind::Invalid, detail),
            ApiError::NotFound(_) => Problem::new(Kind::NotFound, detail),
            ApiError::Conflict(_) => Problem::new(Kind::Conflict, detail),
            ApiError::Timeout { current } => {
                Problem::new(Kind::Timeout, detail).member("current", current.to_string())
            }
            ApiError::Unavailable(_) => Problem::new(Kind::Unavailable, detail),
            ApiError::Internal(_) => {
                tracing::error!(%detail, "request failed");
                Problem::new(Kind::Internal, detail)
            }
        }
    }
}

/// Description of one kind, for `GET /problems/{kind}`.
pub(crate) fn described(name: &str) -> Option<Value> {
    KINDS.iter().find(|(_, known, ..)| *known == name).map(|(_, name, status, title, meaning)| {
        json!({"type": format!("/problems/{name}"), "status": status, "title": title, "meaning": meaning})
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_in_the_order_of_the_kinds() {
        for (kind, name, status, ..) in KINDS {
            assert_eq!(kind.row().1, name);
            assert_eq!(kind.status(), status);
        }
    }

    #[test]
    fn a_timeout_says_where_the_shards_stand() {
        let current: meterr_operators::ids::Positions = "3:7,c:1".parse().unwrap();
        let problem = Problem::from(ApiError::Timeout { current });
        let body: Value = serde_json::from_str(&problem.body()).unwrap();
        assert_eq!(body["type"], "/problems/timeout");
        assert_eq!(body["status"], 504);
        assert_eq!(body["current"], "3:7,c:1");
    }
}
