//! Parameters of a request, read strictly.
//!
//! A parameter that is unknown, given twice, or not of its form is refused by name, with what would
//! have been right: a misspelt `form=` that is silently ignored shows wrong figures with a straight
//! face. The length is bounded by the surface that received them.

use std::fmt;
use std::ops::RangeInclusive;
use std::time::Duration;

use meterr_operators::event::{NAME_LEN_MAX, excerpt};
use meterr_operators::ids::{Positions, org_valid};
use meterr_operators::time::Time;
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

use super::malformed;
use super::problem::{Kind, Problem};
use crate::api::{GroupBy, Window};

/// Parameters that JSON may give as numbers.
const NUMBERS: [&str; 4] = ["limit", "n", "shard", "timeout_ms"];

/// Named values, each once.
#[derive(Debug, Default)]
pub(crate) struct Parameters {
    pairs: Vec<(String, String)>,
}

impl Parameters {
    /// Checks that a name is `known` and new. `value` is shown in the refusal.
    pub fn admit(&self, name: &str, value: &str, known: &[&str]) -> Result<(), Problem> {
        if !known.contains(&name) {
            let allowed = match known {
                [] => "left out: no parameters are taken here".to_owned(),
                _ => format!("one of {}", known.join(", ")),
            };
            return Err(Problem::new(
                Kind::Parameter,
                format!("there is no parameter {:?} here; {allowed}", excerpt(name)),
            )
            .member("parameter", excerpt(name))
            .member("value", excerpt(value))
            .member("allowed", allowed));
        }
        if self.text(name).is_some() {
            return Err(Problem::parameter(name, value, "given once"));
        }
        Ok(())
    }

    /// Adds a value that was [admitted](Parameters::admit).
    pub fn add(&mut self, name: String, value: String) {
        self.pairs.push((name, value));
    }

    /// Reads the members of a JSON object; nothing at all is an object without members, and null is
    /// a member left out. Only the parameters `known` may occur, each once.
    pub fn from_json(payload: &[u8], known: &[&str]) -> Result<Parameters, Problem> {
        let mut parameters = Parameters::default();
        if payload.trim_ascii().is_empty() {
            return Ok(parameters);
        }
        let Members(members) =
            serde_json::from_slice(payload).map_err(|error| malformed(&error))?;
        for (name, raw) in members {
            let raw = raw.get();
            parameters.admit(&name, raw, known)?;
            let value = match raw.as_bytes().first() {
                Some(b'n') => continue,
                Some(b'"') => serde_json::from_str(raw).map_err(|error| malformed(&error))?,
                Some(b'0'..=b'9' | b'-') if NUMBERS.contains(&name.as_str()) => raw.to_owned(),
                _ => {
                    let form = match NUMBERS.contains(&name.as_str()) {
                        true => "a number",
                        false => "a text",
                    };
                    return Err(Problem::parameter(&name, raw, form));
                }
            };
            parameters.add(name, value);
        }
        Ok(parameters)
    }

    /// The text of a parameter, if given.
    pub fn text(&self, name: &str) -> Option<&str> {
        self.pairs.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    /// The text of a parameter that must be given.
    pub fn required(&self, name: &str, what: &str) -> Result<&str, Problem> {
        self.text(name).ok_or_else(|| {
            Problem::new(
                Kind::Parameter,
                format!("parameter {name:?} is missing; it must be {what}"),
            )
            .member("parameter", name)
            .member("value", "")
            .member("allowed", what)
        })
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

/// What an org must be.
pub(crate) const ORG_FORM: &str = "1 to 128 characters of A-Z, a-z, 0-9, '_' and '-'";

/// An org, checked.
pub(crate) fn org(text: &str) -> Result<String, Problem> {
    if org_valid(text) {
        Ok(text.to_owned())
    } else {
        Err(Problem::parameter("org", text, ORG_FORM))
    }
}

/// A name of the kind events carry (user, tag, …), checked.
pub(crate) fn name(parameter: &str, text: &str) -> Result<String, Problem> {
    if name_valid(text) {
        return Ok(text.to_owned());
    }
    Err(Problem::parameter(
        parameter,
        text,
        "1 to 128 bytes of UTF-8 text without control characters",
    ))
}

/// The rule of the event codec for names.
fn name_valid(text: &str) -> bool {
    (1..=NAME_LEN_MAX).contains(&text.len()) && !text.chars().any(char::is_control)
}

/// The members of an object as they stand, so that one given twice is seen.
struct Members<'a>(Vec<(String, &'a RawValue)>);

impl<'de> Deserialize<'de> for Members<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Members<'de>, D::Error> {
        struct Reader;
        impl<'de> Visitor<'de> for Reader {
            type Value = Members<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of parameters")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Members<'de>, A::Error> {
                let mut members = Vec::new();
                while let Some(member) = map.next_entry()? {
                    members.push(member);
                }
                Ok(Members(members))
            }
        }
        deserializer.deserialize_map(Reader)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const KNOWN: &[&str] = &["from", "n", "by", "window", "min_position", "model"];

    fn read(text: &str) -> Result<Parameters, String> {
        Parameters::from_json(text.as_bytes(), KNOWN).map_err(|problem| problem.to_string())
    }

    #[test]
    fn members_are_parameters() {
        let parameters =
            read(r#" {"n":7, "by":"tag:a\u0020b","from":null,"model":"7","window":"day"} "#)
                .unwrap();
        assert_eq!(parameters.number("n", 1..=9).unwrap(), Some(7));
        assert_eq!(parameters.group_by().unwrap(), Some(GroupBy::Tag("a b".to_owned())));
        assert_eq!((parameters.text("from"), parameters.text("model")), (None, Some("7")));
        assert_eq!(parameters.window().unwrap(), Some(Window::Day));
        assert_eq!(read(r#"{"n":"7"}"#).unwrap().number("n", 1..=9).unwrap(), Some(7));
        for nothing in ["", " \n", "{}"] {
            assert!(!read(nothing).unwrap().any(KNOWN), "{nothing:?}");
        }
    }

    #[test]
    fn a_wrong_member_is_named_with_what_it_may_be() {
        for (text, part) in [
            (r#"{"form":1}"#, "there is no parameter \"form\" here; one of from, n"),
            (r#"{"n":1,"n":2}"#, "given once"),
            (r#"{"n":1,"\u006e":2}"#, "given once"),
            (r#"{"model":7}"#, "parameter \"model\" is \"7\", but must be a text"),
            (r#"{"n":[1]}"#, "parameter \"n\" is \"[1]\", but must be a number"),
            (r#"{"n":true}"#, "must be a number"),
            (r#"{"by":{}}"#, "must be a text"),
            ("[]", "an object of parameters"),
            ("7", "an object of parameters"),
            (r#"{"n":1}{"#, "trailing characters"),
            (r#"{"n":1"#, "EOF"),
            (r#"{"by":"\ud800"}"#, "the body is not JSON"),
        ] {
            let refused = read(text).unwrap_err();
            assert!(refused.contains(part), "{text}: {refused}");
        }
        let refused = |text: &str| read(text).unwrap().number("n", 0..=9).unwrap_err().to_string();
        for text in [r#"{"n":-1}"#, r#"{"n":1.0}"#, r#"{"n":1e0}"#, r#"{"n":10}"#] {
            assert!(refused(text).contains("a whole number from 0 to 9"), "{text}");
        }
        let missing = read("{}").unwrap().required("model", "a model").unwrap_err().to_string();
        assert_eq!(missing, "parameter \"model\" is missing; it must be a model");
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..60)) {
            let _ = Parameters::from_json(&bytes, KNOWN);
        }

        #[test]
        fn any_object_is_read_or_refused(text in "\\{(\"(n|by|from|x)\":(1|-|\"a\"|null|\\[\\]|tru),?){0,3}\\}?") {
            if let Ok(parameters) = Parameters::from_json(text.as_bytes(), KNOWN) {
                let _ = parameters.number("n", 0..=5);
                let _ = parameters.group_by();
                let _ = parameters.time("from");
            }
        }
    }
}
