//! Parameters of path and query, read strictly.
//!
//! A parameter that is unknown, given twice, or not of its form is refused by name, with what would
//! have been right: a misspelt `form=` that is silently ignored shows wrong figures with a straight
//! face. The length is bounded by the HTTP parser (64 KiB of URI).

use std::borrow::Cow;
use std::ops::RangeInclusive;
use std::time::Duration;

use actix_web::HttpRequest;
use meterr_operators::event::NAME_LEN_MAX;
use meterr_operators::ids::{Positions, org_valid};
use meterr_operators::time::Time;

use super::problem::{Kind, Problem};
use crate::api::{GroupBy, Window};

/// The query string of a request, decoded.
pub(super) struct Query {
    pairs: Vec<(String, String)>,
}

impl Query {
    /// Reads the query; only the parameters `known` may occur, each once.
    pub fn of(request: &HttpRequest, known: &[&str]) -> Result<Query, Problem> {
        Query::parse(request.query_string(), known)
    }

    fn parse(text: &str, known: &[&str]) -> Result<Query, Problem> {
        let mut pairs: Vec<(String, String)> = Vec::new();
        for part in text.split('&').filter(|part| !part.is_empty()) {
            let (name, value) = part.split_once('=').unwrap_or((part, ""));
            let name = decoded(name, true)
                .ok_or_else(|| Problem::parameter(name, value, "a percent-encoded UTF-8 name"))?;
            if !known.contains(&name.as_ref()) {
                let allowed = match known {
                    [] => "left out: this route takes no parameters".to_owned(),
                    _ => format!("one of {}", known.join(", ")),
                };
                return Err(Problem::new(
                    Kind::Parameter,
                    format!(
                        "there is no parameter {:?} here; {allowed}",
                        meterr_operators::event::excerpt(&name)
                    ),
                )
                .member("parameter", meterr_operators::event::excerpt(&name))
                .member("value", meterr_operators::event::excerpt(value))
                .member("allowed", allowed));
            }
            if pairs.iter().any(|(earlier, _)| *earlier == name) {
                return Err(Problem::parameter(&name, value, "given once"));
            }
            let value = decoded(value, true)
                .ok_or_else(|| Problem::parameter(&name, value, "percent-encoded UTF-8 text"))?;
            pairs.push((name.into_owned(), value.into_owned()));
        }
        Ok(Query { pairs })
    }

    /// The text of a parameter, if given.
    pub fn text(&self, name: &str) -> Option<&str> {
        self.pairs.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    /// Whether any of these parameters is given.
    pub fn any(&self, names: &[&str]) -> bool {
        names.iter().any(|name| self.text(name).is_some())
    }

    /// One of named choices.
    pub fn choice<T: Copy>(&self, name: &str, choices: &[(&str, T)]) -> Result<Option<T>, Problem> {
        let Some(text) = self.text(name) else { return Ok(None) };
        match choices.iter().find(|(known, _)| *known == text) {
            Some((_, value)) => Ok(Some(*value)),
            None => {
                let names: Vec<&str> = choices.iter().map(|(known, _)| *known).collect();
                Err(Problem::parameter(name, text, &format!("one of {}", names.join(", "))))
            }
        }
    }

    /// A whole number in a range.
    pub fn number(&self, name: &str, range: RangeInclusive<u64>) -> Result<Option<u64>, Problem> {
        let Some(text) = self.text(name) else { return Ok(None) };
        match text.parse::<u64>() {
            Ok(number) if range.contains(&number) => Ok(Some(number)),
            _ => Err(Problem::parameter(
                name,
                text,
                &format!("a whole number from {} to {}", range.start(), range.end()),
            )),
        }
    }

    /// `true` or `false`; false when left out.
    pub fn flag(&self, name: &str) -> Result<bool, Problem> {
        Ok(self.choice(name, &[("true", true), ("false", false)])?.unwrap_or(false))
    }

    /// An instant.
    pub fn time(&self, name: &str) -> Result<Option<Time>, Problem> {
        let Some(text) = self.text(name) else { return Ok(None) };
        // An offset's "+" that was not percent-encoded arrives as a space. Nothing else can stand
        // there, so it is read as what was meant.
        let mut mended = text.to_owned();
        let offset_at = text.len().wrapping_sub(6);
        if text.len() > 20 && text.as_bytes().get(offset_at) == Some(&b' ') {
            mended.replace_range(offset_at..=offset_at, "+");
        }
        let time = Time::parse(&mended).ok().filter(|time| (Time::MIN..Time::MAX).contains(time));
        let Some(time) = time else {
            return Err(Problem::parameter(
                name,
                text,
                "an RFC 3339 time such as 2026-01-02T03:04:05Z, from 1970 to 2199",
            ));
        };
        Ok(Some(time))
    }

    /// Window size.
    pub fn window(&self) -> Result<Option<Window>, Problem> {
        self.choice(
            "window",
            &[
                ("hour", Window::Hour),
                ("day", Window::Day),
                ("month", Window::Month),
                ("all", Window::All),
            ],
        )
    }

    /// Grouping of a spend query.
    pub fn group_by(&self) -> Result<Option<GroupBy>, Problem> {
        let Some(text) = self.text("by") else { return Ok(None) };
        let by = match text {
            "none" => GroupBy::None,
            "user" => GroupBy::User,
            "model" => GroupBy::Model,
            "provider" => GroupBy::Provider,
            "feature" => GroupBy::Feature,
            _ => match text.strip_prefix("tag:") {
                Some(tag) if name_valid(tag) => GroupBy::Tag(tag.to_owned()),
                _ => {
                    return Err(Problem::parameter(
                        "by",
                        text,
                        "one of none, user, model, provider, feature, tag:NAME",
                    ));
                }
            },
        };
        Ok(Some(by))
    }

    /// Positions an answer must include. A shard that does not exist would never be reached, so it
    /// is refused here.
    pub fn min_position(&self, shards: u16) -> Result<Option<Positions>, Problem> {
        let Some(text) = self.text("min_position") else { return Ok(None) };
        let allowed = "a position as publishing returns it, such as 3:1042,7:88,c:19";
        let positions: Positions =
            text.parse().map_err(|_| Problem::parameter("min_position", text, allowed))?;
        match positions.shards.iter().find(|(shard, _)| shard.0 >= shards) {
            Some(_) => Err(Problem::parameter(
                "min_position",
                text,
                &format!("a position of this deployment, whose shards are 0 to {}", shards - 1),
            )),
            None => Ok(Some(positions)),
        }
    }

    /// How long to wait for `min_position`.
    pub fn timeout(&self, max: Duration) -> Result<Duration, Problem> {
        let max_ms = u64::try_from(max.as_millis()).unwrap_or(u64::MAX);
        Ok(self.number("timeout_ms", 0..=max_ms)?.map_or(max, Duration::from_millis))
    }
}

/// Segment `index` of the path, decoded. Taken from the path as sent: the router's own decoding
/// replaces bytes that are not UTF-8, which would show one user's spend under another's name.
pub(super) fn segment(request: &HttpRequest, index: usize, name: &str) -> Result<String, Problem> {
    let raw = request.uri().path().split('/').nth(index + 1).unwrap_or("");
    match decoded(raw, false) {
        Some(text) => Ok(text.into_owned()),
        None => Err(Problem::parameter(name, raw, "percent-encoded UTF-8 text")),
    }
}

/// The org at segment `index` of the path.
pub(super) fn org(request: &HttpRequest, index: usize) -> Result<String, Problem> {
    let org = segment(request, index, "org")?;
    if org_valid(&org) { Ok(org) } else { Err(org_wrong(&org)) }
}

/// The refusal of an org that cannot exist.
pub(super) fn org_wrong(org: &str) -> Problem {
    Problem::parameter("org", org, "1 to 128 characters of A-Z, a-z, 0-9, '_' and '-'")
}

/// A name of the kind events carry (user, tag, …) at segment `index` of the path.
pub(super) fn name(
    request: &HttpRequest,
    index: usize,
    parameter: &str,
) -> Result<String, Problem> {
    let name = segment(request, index, parameter)?;
    if name_valid(&name) {
        return Ok(name);
    }
    Err(Problem::parameter(
        parameter,
        &name,
        "1 to 128 bytes of UTF-8 text without control characters",
    ))
}

/// The rule of the event codec for names.
fn name_valid(text: &str) -> bool {
    (1..=NAME_LEN_MAX).contains(&text.len()) && !text.chars().any(char::is_control)
}

/// Percent-decodes; `None` when an escape is not one, or the result is not UTF-8.
fn decoded(text: &str, plus_is_space: bool) -> Option<Cow<'_, str>> {
    if !text.bytes().any(|b| b == b'%' || (plus_is_space && b == b'+')) {
        return Some(Cow::Borrowed(text));
    }
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        rest = tail;
        match first {
            b'%' => {
                let (high, low) = (hex(*rest.first()?)?, hex(*rest.get(1)?)?);
                bytes.push(high << 4 | low);
                rest = &rest[2..];
            }
            b'+' if plus_is_space => bytes.push(b' '),
            _ => bytes.push(first),
        }
    }
    String::from_utf8(bytes).ok().map(Cow::Owned)
}

fn hex(digit: u8) -> Option<u8> {
    char::from(digit).to_digit(16).map(|value| value as u8)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const KNOWN: &[&str] = &["from", "n", "by", "window", "min_position", "backfill"];

    fn query(text: &str) -> Query {
        Query::parse(text, KNOWN).unwrap_or_else(|problem| panic!("{text:?}: {problem}"))
    }

    fn refused<T>(result: Result<T, Problem>) -> String {
        result.err().map(|problem| problem.to_string()).expect("must be refused")
    }

    #[test]
    fn good_parameters() {
        assert_eq!(query("by=tag:a%20b+c").group_by().unwrap(), Some(GroupBy::Tag("a b c".into())));
        assert_eq!(query("n=7&&").number("n", 1..=9).unwrap(), Some(7));
        assert!(query("backfill=true").flag("backfill").unwrap());
        assert!(!query("").flag("backfill").unwrap());
        let at = Time::parse("2026-01-02T01:04:05Z").unwrap();
        for from in ["2026-01-02T03:04:05%2B02:00", "2026-01-02T03:04:05+02:00"] {
            assert_eq!(query(&format!("from={from}")).time("from").unwrap(), Some(at), "{from}");
        }
        let position = query("min_position=3:7,c:1").min_position(4).unwrap().unwrap();
        assert_eq!(position.to_string(), "3:7,c:1");
    }

    #[test]
    fn a_wrong_parameter_is_named_with_what_it_may_be() {
        assert_eq!(
            refused(Query::parse("form=1", &["from", "to"])),
            "there is no parameter \"form\" here; one of from, to"
        );
        assert_eq!(
            refused(query("window=week").window()),
            "parameter \"window\" is \"week\", but must be one of hour, day, month, all"
        );
        assert_eq!(
            refused(query("n=0").number("n", 1..=9)),
            "parameter \"n\" is \"0\", but must be a whole number from 1 to 9"
        );
        assert!(refused(Query::parse("n=1&n=2", KNOWN)).contains("given once"));
        assert!(refused(Query::parse("n=%ff", KNOWN)).contains("UTF-8"));
        assert!(refused(Query::parse("n=%4", KNOWN)).contains("percent-encoded"));
        assert!(refused(query("by=tag:").group_by()).contains("tag:NAME"));
        assert!(refused(query("by=tag:%00").group_by()).contains("tag:NAME"));
        assert!(refused(query("from=2026-01-02").time("from")).contains("RFC 3339"));
        assert!(refused(query("from=2300-01-02T00:00:00Z").time("from")).contains("2199"));
        assert!(refused(query("min_position=4:1").min_position(4)).contains("0 to 3"));
        assert!(refused(query("min_position=x").min_position(4)).contains("3:1042"));
    }

    proptest! {
        #[test]
        fn any_query_is_read_or_refused(text in "[ -~]{0,80}") {
            if let Ok(query) = Query::parse(&text, KNOWN) {
                let _ = query.time("from");
                let _ = query.number("n", 0..=5);
                let _ = query.group_by();
                let _ = query.min_position(3);
            }
        }

        #[test]
        fn what_is_encoded_is_decoded(text in any::<String>()) {
            let encoded: String = text.bytes().map(|b| format!("%{b:02X}")).collect();
            prop_assert_eq!(decoded(&encoded, true).unwrap(), text);
        }
    }
}
