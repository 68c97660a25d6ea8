//! Entries of the registry as they stand in its bucket, and what to do about a write that was not
//! acknowledged; pure.

use bytes::Bytes;

use super::subjects::REGISTRY;
use crate::cluster::Entry;
use crate::log::Record;

/// Longest key, in bytes.
pub const KEY_LEN_MAX: usize = 128;
/// Header that tells a write from every other.
pub(super) const MARK: &str = "Meterr-Write";
/// Header of a removed key.
pub(super) const OPERATION: &str = "KV-Operation";

/// What stands under a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Standing {
    pub revision: u64,
    /// `None`: the key was removed.
    pub value: Option<Bytes>,
    pub mark: Option<String>,
}

/// What was sent.
pub(super) struct Wrote {
    /// `None`: the key is to be removed.
    pub value: Option<Bytes>,
    pub mark: String,
}

/// What to do about a write that was not acknowledged.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Landed(u64),
    /// It may be tried on this sequence.
    Again(u64),
    Conflict,
    /// Who answered does not know yet what the caller knew.
    Behind,
}

/// Decides from what the leader says. `head` is the bucket's newest sequence by the leader.
pub(super) fn verdict(
    standing: Option<&Standing>,
    head: u64,
    expected: u64,
    wrote: &Wrote,
) -> Verdict {
    match standing {
        Some(Standing { revision, mark: Some(found), .. }) if *found == wrote.mark => {
            Verdict::Landed(*revision)
        }
        Some(Standing { revision, value: Some(value), .. })
            if *revision > expected && wrote.value.as_ref() == Some(value) =>
        {
            Verdict::Landed(*revision)
        }
        Some(Standing { revision, value: Some(_), .. }) if *revision == expected => {
            Verdict::Again(expected)
        }
        Some(Standing { revision, value: None, .. }) if expected == 0 => Verdict::Again(*revision),
        None if expected == 0 => Verdict::Again(0),
        Some(Standing { revision, .. }) if *revision >= expected => Verdict::Conflict,
        _ if head < expected => Verdict::Behind,
        _ => Verdict::Conflict,
    }
}

impl Standing {
    pub fn of(record: Record) -> Standing {
        let header = |name: &str| {
            let headers = record.message.headers.iter();
            headers.rev().find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, v)| v.clone())
        };
        let mark = header(MARK);
        let removed = header(OPERATION).is_some_and(|what| what == "DEL" || what == "PURGE");
        let value = (!removed).then(|| record.message.payload.clone());
        Standing { revision: record.position, value, mark }
    }
}

/// An entry from what stands in the bucket; nothing for a removed key or a strange one.
pub(super) fn entry(record: Record) -> Option<Entry> {
    let key = record.message.subject.strip_prefix(REGISTRY)?.to_owned();
    if strange(&key).is_some() {
        tracing::debug!(key, "entry of somebody else");
        return None;
    }
    let standing = Standing::of(record);
    Some(Entry { key, revision: standing.revision, value: standing.value? })
}

/// What is wrong with a key.
pub(super) fn strange(key: &str) -> Option<String> {
    let part = |part: &str| {
        !part.is_empty()
            && part.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-'))
    };
    let good = key.len() <= KEY_LEN_MAX && key.split('.').all(part);
    (!good).then(|| {
        format!(
            "{key:?} is no key: parts of letters, digits, '_' and '-' joined by dots, at most \
             {KEY_LEN_MAX} bytes"
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_stands_decides() {
        let standing = |revision, there: bool, mark: &str| Standing {
            revision,
            value: there.then(|| Bytes::from_static(b"theirs")),
            mark: (!mark.is_empty()).then(|| mark.to_owned()),
        };
        let wrote = Wrote { value: Some(Bytes::from_static(b"v")), mark: "me-1".to_owned() };
        let of = |standing: Option<Standing>, head, expected| {
            verdict(standing.as_ref(), head, expected, &wrote)
        };
        // Ours, whatever the rest says.
        assert_eq!(of(Some(standing(9, true, "me-1")), 0, 5), Verdict::Landed(9));
        assert_eq!(of(Some(standing(9, false, "me-1")), 0, 5), Verdict::Landed(9));
        assert_eq!(of(Some(standing(9, true, "me-1")), 0, 0), Verdict::Landed(9));
        // Ours, of a call before; but not what was there all along.
        let same = |revision| {
            Some(Standing { value: wrote.value.clone(), ..standing(revision, true, "me-0") })
        };
        assert_eq!(of(same(9), 0, 5), Verdict::Landed(9));
        assert_eq!(of(same(5), 0, 5), Verdict::Again(5));
        // As expected.
        assert_eq!(of(Some(standing(5, true, "me-0")), 0, 5), Verdict::Again(5));
        assert_eq!(of(Some(standing(5, false, "you")), 0, 0), Verdict::Again(5));
        assert_eq!(of(None, 0, 0), Verdict::Again(0));
        // Somebody else's.
        assert_eq!(of(Some(standing(9, true, "me-2")), 0, 5), Verdict::Conflict);
        assert_eq!(of(Some(standing(9, true, "")), 0, 0), Verdict::Conflict);
        assert_eq!(of(Some(standing(9, false, "you")), 0, 5), Verdict::Conflict);
        // A removed key is at no revision.
        assert_eq!(of(Some(standing(5, false, "you")), 0, 5), Verdict::Conflict);
        assert_eq!(of(None, 5, 5), Verdict::Conflict);
        assert_eq!(of(Some(standing(4, true, "you")), 5, 5), Verdict::Conflict);
        // Who answers is behind.
        assert_eq!(of(None, 4, 5), Verdict::Behind);
        assert_eq!(of(Some(standing(4, true, "you")), 0, 5), Verdict::Behind);
        assert_eq!(of(Some(standing(4, false, "you")), 0, 5), Verdict::Behind);
    }

    #[test]
    fn keys_are_parts_joined_by_dots() {
        for good in ["node.a", "lease.12", "x", "a_b-C.9"] {
            assert_eq!(strange(good), None, "{good}");
        }
        let long = "k".repeat(KEY_LEN_MAX + 1);
        for bad in ["", ".", "a.", ".a", "a..b", "a b", "a*", "a.>", "ä", "a\r\nb", &long] {
            assert!(strange(bad).is_some(), "{bad:?}");
        }
    }
}
