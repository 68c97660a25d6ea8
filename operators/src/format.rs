//! Formats of records, which carry their number.
//!
//! A record is a JSON object that may have a `format`, a number from 1; without one it is 1. Whoever
//! reads it looks at that first: a record of a newer format is not read at all, whatever its other members
//! look like, since a reader that took what it understands of it would show wrong figures. A newer
//! reader reads every older format.
//!
//! A format is raised when a reader of the one before would misread a record. A member that readers may
//! pass over is added without raising it; unknown members of commit records, parts and live messages are
//! passed over. In control records none is: nothing that decides a result may be passed over, so every
//! new member of those raises their format.

use std::fmt;

use serde::Deserialize;

/// Why a record's format is not read here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FormatError {
    /// It is above what is known.
    Newer {
        /// The record's.
        found: u64,
        /// The newest known here.
        known: u32,
    },
    /// It is no number from 1, or the record is no JSON object.
    Unsound(String),
}

impl fmt::Display for FormatError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            FormatError::Newer { found, known } => write!(
                f,
                "written by a newer meterr (format {found}, this binary reads up to {known})"
            ),
            FormatError::Unsound(what) => f.write_str(what),
        }
    }
}

impl std::error::Error for FormatError {}

/// Looks at the format of a record, a JSON object; `known` is the newest that is read here.
///
/// # Errors
/// When it is newer, or none.
pub fn check(record: &[u8], known: u32) -> Result<(), FormatError> {
    #[derive(Deserialize)]
    struct Head {
        #[serde(default = "first")]
        format: u64,
    }
    fn first() -> u64 {
        1
    }
    // Lists would be taken for objects whose members come in order.
    if record.trim_ascii_start().first() != Some(&b'{') {
        return Err(FormatError::Unsound("a record is a JSON object".to_owned()));
    }
    let head: Head =
        serde_json::from_slice(record).map_err(|error| FormatError::Unsound(error.to_string()))?;
    within(head.format, known)
}

/// The same of a format that was read.
pub(crate) fn within(found: u64, known: u32) -> Result<(), FormatError> {
    match found {
        0 => Err(FormatError::Unsound("formats count from 1".to_owned())),
        _ if found > u64::from(known) => Err(FormatError::Newer { found, known }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn newer_formats_are_named_whatever_else_the_record_holds() {
        assert_eq!(check(b"{}", 1), Ok(()));
        assert_eq!(check(br#"{"epoch":"x","format":1}"#, 1), Ok(()));
        assert_eq!(check(br#"{"format":2,"epoch":3}"#, 2), Ok(()));
        for record in [
            r#"{"format":2}"#,
            r#"{"epoch":{"now":"an object"},"format":2}"#,
            r#"{"parts":[1,2,{"format":1}],"format":2}"#,
        ] {
            let error = check(record.as_bytes(), 1).unwrap_err();
            assert_eq!(
                error.to_string(),
                "written by a newer meterr (format 2, this binary reads up to 1)"
            );
        }
        assert!(matches!(
            check(br#"{"format":18446744073709551615}"#, 1),
            Err(FormatError::Newer { found: u64::MAX, known: 1 })
        ));
    }

    #[test]
    fn what_is_no_format_is_refused() {
        for record in [
            r#"{"format":0}"#,
            r#"{"format":-1}"#,
            r#"{"format":"2"}"#,
            r#"{"format":null}"#,
            r#"{"format":1.5}"#,
            r#"{"format":1,"format":2}"#,
            "[]",
            "",
            "{",
        ] {
            assert!(
                matches!(check(record.as_bytes(), 1), Err(FormatError::Unsound(_))),
                "{record}"
            );
        }
    }
}
