//! JSON objects, read lazily: the members of one object, each with the text of its value.
//!
//! A value is looked at only when a decoder asks for it, so that prompts and answers that came
//! along cost one scan and no memory. Numbers stay text: nothing here passes through a float.
//! A key named twice is refused in every object that is read, since two readers could take
//! different ones; inside values that are never looked at it is not noticed.
//!
//! Limits: at most 40 bytes of memory for each 5 bytes of input; the scan of nested values does not
//! recurse (serde_json keeps a stack of its own on the heap, a byte a level), so depth is harmless.

use std::borrow::Cow;
use std::fmt;

use meterr_operators::event::{COST_MAX, METER_MAX, Reason, Rejection, excerpt};
use meterr_operators::money::{Atto, MoneyError};
use meterr_operators::time::Time;
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

/// Objects of up to this many members are checked for doubled keys pair by pair.
const PAIRWISE_MAX: usize = 24;

/// A refusal for a value of the wrong kind or form.
pub(super) fn bad_value(detail: String) -> Rejection {
    Rejection::new(Reason::BadValue, detail)
}

/// A refusal for what is no JSON, or no object of a known form.
pub(super) fn malformed(detail: String) -> Rejection {
    Rejection::new(Reason::Malformed, detail)
}

/// The text of one valid JSON value, without white space around it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Value<'a>(&'a str);

/// Names with their texts.
pub(super) type Texts<'a> = Vec<(Cow<'a, str>, Cow<'a, str>)>;

/// The members of one JSON object, in their order. Keys are unique.
#[derive(Debug, Default)]
pub(super) struct Object<'a> {
    members: Vec<(Cow<'a, str>, Value<'a>)>,
}

impl<'a> Object<'a> {
    /// Reads the object that makes up the whole of `text`.
    ///
    /// # Errors
    /// `malformed` when it is no JSON, no object, or names a key twice.
    pub(super) fn parse(text: &'a str) -> Result<Object<'a>, Rejection> {
        let begin = text.trim_start_matches([' ', '\t', '\n', '\r']);
        if !begin.starts_with('{') {
            return Err(malformed(format!(
                "expected a JSON object, found {:?}",
                excerpt(begin.trim_end())
            )));
        }
        let mut deserializer = serde_json::Deserializer::from_str(text);
        let members = deserializer
            .deserialize_map(Members)
            .and_then(|members| deserializer.end().map(|()| members))
            .map_err(|error| malformed(format!("not valid JSON: {}", without_line(&error))))?;
        if let Some(key) = doubled(&members) {
            return Err(malformed(format!("the key {:?} is given twice", excerpt(key))));
        }
        Ok(Object { members })
    }

    /// Members whose value is not null: a null means the same as no member at all.
    pub(super) fn members(&self) -> impl Iterator<Item = (&str, Value<'a>)> {
        self.members.iter().filter(|(_, value)| value.0 != "null").map(|(key, v)| (&**key, *v))
    }

    /// The value of a member, unless it is absent or null.
    pub(super) fn get(&self, name: &str) -> Option<Value<'a>> {
        self.members().find(|(key, _)| *key == name).map(|(_, value)| value)
    }

    /// Whether a member is there and not null.
    pub(super) fn has(&self, name: &str) -> bool {
        self.get(name).is_some()
    }

    /// A text member.
    pub(super) fn text(&self, name: &str) -> Result<Option<Cow<'a, str>>, Rejection> {
        self.get(name).map(|value| value.text(name)).transpose()
    }

    /// A text member, where an empty text means absent too.
    pub(super) fn name(&self, name: &str) -> Result<Option<Cow<'a, str>>, Rejection> {
        Ok(self.text(name)?.filter(|text| !text.is_empty()))
    }

    /// A member that counts something.
    pub(super) fn count(&self, name: &str) -> Result<Option<u32>, Rejection> {
        self.get(name).map(|value| value.count(name)).transpose()
    }

    /// All members as texts; `name` is that of the object, for the message.
    pub(super) fn into_texts(self, name: &str) -> Result<Texts<'a>, Rejection> {
        let mut texts = Vec::new();
        for (key, value) in self.members {
            if value.0 != "null" {
                let text = value.text(&format!("{name}.{}", excerpt(&key)))?;
                texts.push((key, text));
            }
        }
        Ok(texts)
    }

    /// A member that is an object; an empty one where it is absent.
    pub(super) fn object(&self, name: &str) -> Result<Object<'a>, Rejection> {
        self.get(name).map_or_else(|| Ok(Object::default()), |value| value.object(name))
    }
}

impl<'a> Value<'a> {
    /// The JSON text.
    pub(super) fn raw(self) -> &'a str {
        self.0
    }

    /// Whether this is an object.
    pub(super) fn object_like(self) -> bool {
        self.0.starts_with('{')
    }

    /// The value as a text; `name` is for the message.
    pub(super) fn text(self, name: &str) -> Result<Cow<'a, str>, Rejection> {
        let Some(inner) = self.0.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')) else {
            return Err(bad_value(format!("{name} must be a string, not {}", self.shown())));
        };
        if !inner.contains('\\') {
            return Ok(Cow::Borrowed(inner));
        }
        serde_json::from_str(self.0).map(Cow::Owned).map_err(|error| {
            malformed(format!("{name} is no valid JSON string: {}", without_line(&error)))
        })
    }

    /// The value as a count: a JSON number without sign, point or exponent.
    pub(super) fn count(self, name: &str) -> Result<u32, Rejection> {
        let bytes = self.0.as_bytes();
        if !bytes.iter().all(u8::is_ascii_digit) {
            return Err(bad_value(format!(
                "{name} must be a whole number such as 374, not {}",
                self.shown()
            )));
        }
        bounded_count(name, self.0)
    }

    /// The value as an object.
    pub(super) fn object(self, name: &str) -> Result<Object<'a>, Rejection> {
        if !self.object_like() {
            return Err(bad_value(format!("{name} must be an object, not {}", self.shown())));
        }
        Object::parse(self.0)
    }

    /// The value as `true` or `false`.
    pub(super) fn boolean(self, name: &str) -> Result<bool, Rejection> {
        match self.0 {
            "true" => Ok(true),
            "false" => Ok(false),
            _ => Err(bad_value(format!("{name} must be true or false, not {}", self.shown()))),
        }
    }

    /// The value as an amount of USD: a decimal string, or a number read as decimal text. Decimals
    /// beyond the eighteenth are rounded half to even.
    pub(super) fn amount(self, name: &str) -> Result<Atto, Rejection> {
        let no_decimal = || {
            bad_value(format!(
                "{name} must be a decimal such as \"0.0004125\", not {}",
                self.shown()
            ))
        };
        let text = match self.0.as_bytes().first() {
            Some(b'"') => self.text(name)?,
            Some(b'-' | b'0'..=b'9') => Cow::Borrowed(self.0),
            _ => return Err(no_decimal()),
        };
        match Atto::parse(&text) {
            Ok((amount, _)) if (Atto::ZERO..=COST_MAX).contains(&amount) => Ok(amount),
            Ok(_) | Err(MoneyError::TooLarge(_)) => Err(Rejection::new(
                Reason::OutOfBounds,
                format!("{name} is {} USD; it must be between 0 and {COST_MAX}", excerpt(&text)),
            )),
            Err(MoneyError::Malformed(_)) => Err(no_decimal()),
        }
    }

    /// The value as an RFC 3339 time.
    pub(super) fn time(self, name: &str) -> Result<Time, Rejection> {
        let text = self.text(name)?;
        parse_time(name, &text)
    }

    /// Beginning of the value, for a message.
    pub(super) fn shown(self) -> String {
        excerpt(self.0)
    }
}

/// An RFC 3339 time, with the member's name in the message.
pub(super) fn parse_time(name: &str, text: &str) -> Result<Time, Rejection> {
    Time::parse(text).map_err(|what| bad_value(format!("{name} {:?}: {what}", excerpt(text))))
}

/// A count from digits.
pub(super) fn bounded_count(name: &str, digits: &str) -> Result<u32, Rejection> {
    match digits.parse::<u32>() {
        Ok(count) if u64::from(count) <= METER_MAX => Ok(count),
        _ => Err(Rejection::new(
            Reason::OutOfBounds,
            format!("{name} is {}; one event may carry at most {METER_MAX}", excerpt(digits)),
        )),
    }
}

/// serde_json's sentence; "line 1" is left out, as it is no line the sender knows.
fn without_line(error: &serde_json::Error) -> String {
    error.to_string().replace(" at line 1 column ", " at column ")
}

/// A key that is there twice. Sorting keeps an object of many members from costing the square.
fn doubled<'m>(members: &'m [(Cow<'_, str>, Value<'_>)]) -> Option<&'m str> {
    if members.len() <= PAIRWISE_MAX {
        let earlier = |at: usize| members[..at].iter().any(|(key, _)| *key == members[at].0);
        return (1..members.len()).find(|at| earlier(*at)).map(|at| &*members[at].0);
    }
    let mut keys: Vec<&str> = members.iter().map(|(key, _)| &**key).collect();
    keys.sort_unstable();
    keys.windows(2).find(|pair| pair[0] == pair[1]).map(|pair| pair[0])
}

/// Collects the members of an object without looking into their values.
struct Members;

impl<'de> Visitor<'de> for Members {
    type Value = Vec<(Cow<'de, str>, Value<'de>)>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut members = Vec::with_capacity(16);
        while let Some(Key(key)) = map.next_key()? {
            let value: &'de RawValue = map.next_value()?;
            members.push((key, Value(value.get())));
        }
        Ok(members)
    }
}

/// A key, borrowed unless it has escapes.
struct Key<'de>(Cow<'de, str>);

impl<'de> Deserialize<'de> for Key<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct KeyVisitor;
        impl<'de> Visitor<'de> for KeyVisitor {
            type Value = Key<'de>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a key")
            }
            fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Key<'de>, E> {
                Ok(Key(Cow::Borrowed(text)))
            }
            fn visit_str<E>(self, text: &str) -> Result<Key<'de>, E> {
                Ok(Key(Cow::Owned(text.to_owned())))
            }
        }
        deserializer.deserialize_str(KeyVisitor)
    }
}

/// Reads the elements of the JSON array that makes up the whole of `text`.
///
/// # Errors
/// `malformed` when it is no JSON array.
pub(super) fn elements<'a>(text: &'a str) -> Result<Vec<Value<'a>>, Rejection> {
    let raw: Vec<&'a RawValue> = serde_json::from_str(text)
        .map_err(|error| malformed(format!("not a valid JSON array: {}", without_line(&error))))?;
    Ok(raw.into_iter().map(|value| Value(value.get())).collect())
}
