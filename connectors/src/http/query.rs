//! Parameters as URLs carry them. The length is bounded by the HTTP parser (64 KiB of URI).

use std::borrow::Cow;

use actix_web::HttpRequest;

use super::problem::Problem;
use crate::requests::parameters::{self, Parameters};

/// The query of a request, decoded; only the parameters `known` may occur, each once.
pub(super) fn of(request: &HttpRequest, known: &[&str]) -> Result<Parameters, Problem> {
    parsed(request.query_string(), known)
}

fn parsed(text: &str, known: &[&str]) -> Result<Parameters, Problem> {
    let mut parameters = Parameters::default();
    for part in text.split('&').filter(|part| !part.is_empty()) {
        let (name, value) = part.split_once('=').unwrap_or((part, ""));
        let name = decoded(name, true)
            .ok_or_else(|| Problem::parameter(name, value, "a percent-encoded UTF-8 name"))?;
        parameters.admit(&name, value, known)?;
        let value = decoded(value, true)
            .ok_or_else(|| Problem::parameter(&name, value, "percent-encoded UTF-8 text"))?;
        parameters.add(name.into_owned(), value.into_owned());
    }
    Ok(parameters)
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
    parameters::org(&segment(request, index, "org")?)
}

/// A name of the kind events carry (user, tag, …) at segment `index` of the path.
pub(super) fn name(
    request: &HttpRequest,
    index: usize,
    parameter: &str,
) -> Result<String, Problem> {
    parameters::name(parameter, &segment(request, index, parameter)?)
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
    use crate::api::GroupBy;
    use meterr_operators::time::Time;
    use proptest::prelude::*;

    const KNOWN: &[&str] = &["from", "n", "by", "window", "min_position", "backfill"];

    fn query(text: &str) -> Parameters {
        parsed(text, KNOWN).unwrap_or_else(|problem| panic!("{text:?}: {problem}"))
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
            refused(parsed("form=1", &["from", "to"])),
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
        assert!(refused(parsed("n=1&n=2", KNOWN)).contains("given once"));
        assert!(refused(parsed("n=%ff", KNOWN)).contains("UTF-8"));
        assert!(refused(parsed("n=%4", KNOWN)).contains("percent-encoded"));
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
            if let Ok(query) = parsed(&text, KNOWN) {
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
