//! Changes of the `CONTROL` log: everything besides usage that decides a result.
//!
//! A record of that log is one JSON object with a `type`, and a `format` when that is not 1
//! ([`crate::format`]). A view row is a pure function of (usage
//! prefix, control prefix), so a reader that skipped a change it does not understand would show
//! wrong figures: an unknown type, an unknown field and a value out of range are all refused, and
//! the shard stops with the sentence given. What is appended is checked by the same function
//! before ([`ControlChange::parse`] of the bytes to be written), so that a refused record can only
//! come from a newer version or from damage.

use std::fmt;
use std::str::FromStr;
use std::sync::OnceLock;

use jiff::tz::{TimeZone, TimeZoneDatabase};
use serde::de::{DeserializeOwned, Error as _};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;

use crate::event::{HashKey, NAME_LEN_MAX, excerpt};
use crate::format;
use crate::ids::{SHARDS_MAX, org_valid};
use crate::price_book::{PriceEntry, check_entries};
use crate::time::{DAY, HOUR, SECOND, Time};

/// Newest format of control records read here. All are written in format 1, without saying so.
pub const CONTROL_FORMAT: u32 = 1;
/// Horizon of deduplication while the control log names none: 35 days, in seconds of log time.
pub const HORIZON_SECONDS_DEFAULT: u64 = 35 * 86_400;
/// Shortest horizon: one bucket of ids.
pub const HORIZON_SECONDS_MIN: u64 = (HOUR / SECOND) as u64;
/// Longest horizon: ten years and a few days.
pub const HORIZON_SECONDS_MAX: u64 = 3_660 * (DAY / SECOND) as u64;
/// Longest name of a declared view, in bytes.
pub const VIEW_NAME_LEN_MAX: usize = 64;
/// Most dimensions of a declared view.
pub const VIEW_DIMENSIONS_MAX: usize = 4;
/// Longest id of a dead letter, in bytes.
const DEAD_LETTER_ID_LEN_MAX: usize = 64;
/// Wrong price entries named in one sentence.
const PRICE_ERRORS_SHOWN: usize = 10;

/// Size of a window.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WindowSize {
    /// Hours of UTC.
    Hour,
    /// Days in the org's time zone.
    Day,
    /// Months in the org's time zone.
    Month,
    /// All time as one window.
    All,
}

/// What spend can be grouped by, besides the org. Written `user`, `provider`, `model`, `feature`
/// or `tag:NAME`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Dimension {
    /// The user.
    User,
    /// The provider; empty where a cost was reported without one.
    Provider,
    /// The model, whichever provider; empty where a cost was reported without one.
    Model,
    /// The feature.
    Feature,
    /// The value of a tag; empty for events without the tag.
    Tag(String),
}

impl fmt::Display for Dimension {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Dimension::User => f.write_str("user"),
            Dimension::Provider => f.write_str("provider"),
            Dimension::Model => f.write_str("model"),
            Dimension::Feature => f.write_str("feature"),
            Dimension::Tag(name) => write!(f, "tag:{name}"),
        }
    }
}

impl FromStr for Dimension {
    type Err = String;

    fn from_str(text: &str) -> Result<Dimension, String> {
        match text {
            "user" => Ok(Dimension::User),
            "provider" => Ok(Dimension::Provider),
            "model" => Ok(Dimension::Model),
            "feature" => Ok(Dimension::Feature),
            _ => match text.strip_prefix("tag:") {
                Some(name) if name_fits(name) => Ok(Dimension::Tag(name.to_owned())),
                _ => Err(format!(
                    "{:?} is no dimension; known are user, provider, model, feature and tag:NAME",
                    excerpt(text)
                )),
            },
        }
    }
}

impl Serialize for Dimension {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Dimension {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Dimension, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

/// Prices that hold from now on in the order of knowledge.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PricesChange {
    /// Entries in their order; at least one.
    pub prices: Vec<PriceEntry>,
}

/// The time zone of an org's days and months.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TimeZoneChange {
    /// The org.
    pub org: String,
    /// IANA name, such as `Asia/Kolkata`; see [`zone`].
    pub time_zone: String,
}

/// A view kept live from now on, over all usage, past usage included. Replaces a view of that name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ViewDeclared {
    /// 1–64 characters of `[A-Za-z0-9_-]`.
    pub name: String,
    /// 1–4 dimensions, each once; rows are kept per org and these.
    pub by: Vec<Dimension>,
    /// Window size.
    pub window: WindowSize,
}

/// A declared view no longer kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ViewRemoved {
    /// Its name. A name that is not declared removes nothing.
    pub name: String,
}

/// How long ids are remembered after their arrival.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HorizonChange {
    /// Seconds of log time, [`HORIZON_SECONDS_MIN`] to [`HORIZON_SECONDS_MAX`].
    pub seconds: u64,
}

/// What is fixed for the life of the deployment, and the versions it began with. Ends what a new control log
/// begins with.
/// A later one may raise `decoder` and change `tzdb`, never the others.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Seed {
    /// Number of shards.
    pub shards: u16,
    /// Version of the decoders in force.
    pub decoder: u32,
    /// Version of the time zone database in force, such as `2026a`.
    pub tzdb: String,
    /// Key of the hashes of ids and content, 32 hexadecimal digits.
    #[serde(with = "hash_key_hex")]
    pub hash_key: HashKey,
}

/// A dead letter was published again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeadLetterReplayed {
    /// `<shard>-<epoch>-<n>`.
    pub id: String,
    /// When.
    pub time: Time,
}

/// One record of the control log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ControlChange {
    /// Prices.
    Prices(PricesChange),
    /// Time zone of an org.
    TimeZone(TimeZoneChange),
    /// A view declared.
    View(ViewDeclared),
    /// A declared view removed.
    ViewRemoved(ViewRemoved),
    /// Horizon of deduplication.
    Horizon(HorizonChange),
    /// Number of shards and versions in force.
    Seed(Seed),
    /// A dead letter published again.
    DeadLetterReplayed(DeadLetterReplayed),
}

impl ControlChange {
    /// Reads and checks one record.
    ///
    /// # Errors
    /// A sentence saying what is wrong.
    pub fn parse(bytes: &[u8]) -> Result<ControlChange, String> {
        let value: Value =
            serde_json::from_slice(bytes).map_err(|e| format!("a control change is JSON: {e}"))?;
        ControlChange::from_value(value)
    }

    // By hand rather than by serde's internally tagged enums: those cannot read a number while
    // serde_json keeps numbers as text (`arbitrary_precision`).
    fn from_value(value: Value) -> Result<ControlChange, String> {
        let Value::Object(mut fields) = value else {
            return Err("a control change is a JSON object".to_owned());
        };
        // First of all: of a newer format nothing can be said, not even its type.
        if let Some(found) = fields.remove("format") {
            let found = found.as_u64().ok_or("the format of a control change is a number")?;
            format::within(found, CONTROL_FORMAT).map_err(|error| error.to_string())?;
        }
        let kind = match fields.remove("type") {
            Some(Value::String(kind)) => kind,
            Some(_) => return Err("the type of a control change is a text".to_owned()),
            None => return Err("a control change needs a \"type\"".to_owned()),
        };
        let body = Value::Object(fields);
        let change = match kind.as_str() {
            "prices" => ControlChange::Prices(read(&kind, body)?),
            "time_zone" => ControlChange::TimeZone(read(&kind, body)?),
            "view" => ControlChange::View(read(&kind, body)?),
            "view_removed" => ControlChange::ViewRemoved(read(&kind, body)?),
            "horizon" => ControlChange::Horizon(read(&kind, body)?),
            "seed" => ControlChange::Seed(read(&kind, body)?),
            "dead_letter_replayed" => ControlChange::DeadLetterReplayed(read(&kind, body)?),
            _ => {
                return Err(format!(
                    "control change of type {:?} is not known here; it was written by a newer \
                     version",
                    excerpt(&kind)
                ));
            }
        };
        change.check().map_err(|what| format!("control change of type {kind:?}: {what}"))?;
        Ok(change)
    }

    /// The record's bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("only texts, numbers and lists, which JSON can hold")
    }

    fn check(&self) -> Result<(), String> {
        match self {
            ControlChange::Prices(change) if change.prices.is_empty() => {
                Err("prices must not be empty".to_owned())
            }
            ControlChange::Prices(change) => check_entries(&change.prices).map_err(|errors| {
                let shown = errors.iter().take(PRICE_ERRORS_SHOWN).map(ToString::to_string);
                let shown = shown.collect::<Vec<_>>().join("; ");
                match errors.len().saturating_sub(PRICE_ERRORS_SHOWN) {
                    0 => shown,
                    more => format!("{shown}; and {more} more"),
                }
            }),
            ControlChange::TimeZone(change) => {
                if !org_valid(&change.org) {
                    return Err(format!("org {:?} is no valid org", excerpt(&change.org)));
                }
                zone(&change.time_zone).map(drop)
            }
            ControlChange::View(view) => {
                view_name_valid(&view.name)?;
                let dimensions = view.by.len();
                if !(1..=VIEW_DIMENSIONS_MAX).contains(&dimensions) {
                    return Err(format!(
                        "by has {dimensions} dimensions; a view has 1 to {VIEW_DIMENSIONS_MAX}"
                    ));
                }
                for (at, dimension) in view.by.iter().enumerate() {
                    if view.by[..at].contains(dimension) {
                        return Err(format!("by names {:?} twice", dimension.to_string()));
                    }
                }
                Ok(())
            }
            ControlChange::ViewRemoved(view) => view_name_valid(&view.name),
            ControlChange::Horizon(change) => {
                if (HORIZON_SECONDS_MIN..=HORIZON_SECONDS_MAX).contains(&change.seconds) {
                    return Ok(());
                }
                Err(format!(
                    "seconds is {}; it must be between {HORIZON_SECONDS_MIN} and \
                     {HORIZON_SECONDS_MAX}",
                    change.seconds
                ))
            }
            ControlChange::Seed(seed) => {
                if !(1..=SHARDS_MAX).contains(&seed.shards) {
                    return Err(format!(
                        "shards is {}; it must be between 1 and {SHARDS_MAX}",
                        seed.shards
                    ));
                }
                if !name_fits(&seed.tzdb) {
                    return Err(format!("tzdb {:?} is no version", excerpt(&seed.tzdb)));
                }
                Ok(())
            }
            ControlChange::DeadLetterReplayed(letter) => {
                let id = &letter.id;
                let fits = (1..=DEAD_LETTER_ID_LEN_MAX).contains(&id.len())
                    && id.bytes().all(|b| b.is_ascii_digit() || b == b'-');
                if fits { Ok(()) } else { Err(format!("{:?} is no dead letter id", excerpt(id))) }
            }
        }
    }
}

impl<'de> Deserialize<'de> for ControlChange {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<ControlChange, D::Error> {
        ControlChange::from_value(Value::deserialize(deserializer)?).map_err(D::Error::custom)
    }
}

fn read<T: DeserializeOwned>(kind: &str, body: Value) -> Result<T, String> {
    serde_json::from_value(body).map_err(|e| format!("control change of type {kind:?}: {e}"))
}

fn name_fits(text: &str) -> bool {
    (1..=NAME_LEN_MAX).contains(&text.len()) && !text.chars().any(char::is_control)
}

fn view_name_valid(name: &str) -> Result<(), String> {
    if name.len() <= VIEW_NAME_LEN_MAX && org_valid(name) {
        return Ok(());
    }
    Err(format!(
        "view name {:?} must be 1 to {VIEW_NAME_LEN_MAX} characters of A-Z, a-z, 0-9, '_' and '-'",
        excerpt(name)
    ))
}

/// The zone of an IANA name, from the database compiled in. Never from the machine's own: two nodes
/// would cut days apart differently, and a system update would change committed figures.
///
/// # Errors
/// A sentence, when the database has no such zone.
pub fn zone(name: &str) -> Result<TimeZone, String> {
    static BUNDLED: OnceLock<TimeZoneDatabase> = OnceLock::new();
    BUNDLED.get_or_init(TimeZoneDatabase::bundled).get(name).map_err(|_| {
        format!("time zone {:?} is not in the IANA database compiled in", excerpt(name))
    })
}

mod hash_key_hex {
    use super::*;

    pub(super) fn serialize<S: Serializer>(key: &HashKey, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(&format_args!("{:032x}", u128::from_be_bytes(key.0)))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<HashKey, D::Error> {
        let text = String::deserialize(from)?;
        let hex = text.len() == 32 && text.bytes().all(|b| b.is_ascii_hexdigit());
        let key = u128::from_str_radix(&text, 16).ok().filter(|_| hex);
        // The text is not shown: it is a secret of the deployment.
        key.map(|key| HashKey(key.to_be_bytes()))
            .ok_or_else(|| D::Error::custom("hash_key must be 32 hexadecimal digits"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(text: &str) -> String {
        ControlChange::parse(text.as_bytes()).unwrap_err()
    }

    #[test]
    fn every_type_reads_what_it_writes() {
        for text in [
            r#"{"type":"prices","prices":[{"provider":"openai","model":"gpt-4o","effective_from":"2026-01-15T00:00:00Z","input":"2.5","tier":"batch","min_input_tokens":200000,"org":"acme"}]}"#,
            r#"{"type":"time_zone","org":"acme","time_zone":"Asia/Kolkata"}"#,
            r#"{"type":"view","name":"by-team","by":["user","tag:team"],"window":"day"}"#,
            r#"{"type":"view_removed","name":"by-team"}"#,
            r#"{"type":"horizon","seconds":86400}"#,
            r#"{"type":"seed","shards":16,"decoder":1,"tzdb":"2026a","hash_key":"000102030405060708090a0b0c0d0eff"}"#,
            r#"{"type":"dead_letter_replayed","id":"3-17-1","time":"2026-01-02T03:04:05Z"}"#,
        ] {
            let change = ControlChange::parse(text.as_bytes()).unwrap();
            assert_eq!(String::from_utf8(change.to_bytes()).unwrap(), text);
            assert_eq!(serde_json::from_str::<ControlChange>(text).unwrap(), change);
        }
    }

    #[test]
    fn a_newer_version_is_recognised() {
        assert_eq!(
            refused(r#"{"type":"budget","org":"acme"}"#),
            "control change of type \"budget\" is not known here; it was written by a newer version"
        );
        assert!(
            refused(r#"{"type":"horizon","seconds":86400,"why":""}"#).contains("unknown field")
        );
    }

    #[test]
    fn wrong_values_are_refused_with_a_sentence() {
        for (text, part) in [
            ("", "is JSON"),
            ("[]", "is a JSON object"),
            (r#"{"seconds":1}"#, "needs a \"type\""),
            (r#"{"type":1}"#, "is a text"),
            (r#"{"type":"prices","prices":[]}"#, "must not be empty"),
            (
                r#"{"type":"prices","prices":[{"provider":"p","model":"","input":"-1"}]}"#,
                "entry 1 (\"p\", \"\"): \"model\" is required; entry 1 (\"p\", \"\"): input is -1",
            ),
            (r#"{"type":"horizon","seconds":3599}"#, "between 3600 and"),
            (r#"{"type":"horizon","seconds":"1h"}"#, "invalid type"),
            (r#"{"type":"horizon"}"#, "missing field `seconds`"),
            (r#"{"type":"time_zone","org":"a.b","time_zone":"UTC"}"#, "\"a.b\" is no valid org"),
            (r#"{"type":"time_zone","org":"a","time_zone":"Mars/Olympus"}"#, "\"Mars/Olympus\""),
            (r#"{"type":"view","name":"","by":["user"],"window":"day"}"#, "view name \"\""),
            (r#"{"type":"view","name":"v","by":[],"window":"day"}"#, "0 dimensions"),
            (r#"{"type":"view","name":"v","by":["user","user"],"window":"day"}"#, "\"user\" twice"),
            (r#"{"type":"view","name":"v","by":["tag:"],"window":"day"}"#, "no dimension"),
            (r#"{"type":"view","name":"v","by":["user"],"window":"week"}"#, "unknown variant"),
            (
                r#"{"type":"seed","shards":0,"decoder":1,"tzdb":"2026a","hash_key":"000102030405060708090a0b0c0d0eff"}"#,
                "shards is 0",
            ),
            (
                r#"{"type":"seed","shards":1,"decoder":1,"tzdb":"2026a","hash_key":"+00102030405060708090a0b0c0d0eff"}"#,
                "32 hexadecimal digits",
            ),
            (r#"{"type":"dead_letter_replayed","id":"x","time":"2026-01-02T03:04:05Z"}"#, "\"x\""),
        ] {
            let sentence = refused(text);
            assert!(sentence.contains(part), "{text}: {sentence}");
        }
    }

    #[test]
    fn zones_come_from_the_bundled_database() {
        for name in ["Asia/Kolkata", "America/New_York", "Australia/Lord_Howe", "Pacific/Apia"] {
            assert!(zone(name).is_ok(), "{name}");
        }
    }
}
