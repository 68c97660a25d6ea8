//! Identities that must not be mixed up, and the function that puts an org into a shard.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A shard: a fixed set of orgs with one log of their own. `0..N`, N at most 256.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ShardId(pub u16);

/// Most shards a deployment may have.
pub const SHARDS_MAX: u16 = 256;

impl fmt::Display for ShardId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The shard an org lives in: FNV-1a 32 of its bytes, modulo the number of shards. The same
/// function as the server-side mapping `{{partition(N,1)}}` of NATS, so that producers, server and
/// engine agree. Never changes for a deployment.
pub fn shard_of(org: &str, shards: u16) -> ShardId {
    let hash = org
        .bytes()
        .fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    ShardId((hash % u32::from(shards)) as u16)
}

/// Whether `text` may be an org: 1–128 bytes of `[A-Za-z0-9_-]`, so that it is one token of a
/// NATS subject.
pub fn org_valid(text: &str) -> bool {
    (1..=128).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-')
}

/// How far a set of logs has been read or written: last position per shard, and of the control log.
/// Shown as `3:1042,7:88,c:19`. Opaque to clients.
///
/// A position counts from 1; 0 means nothing yet.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Positions {
    /// Shard and last usage position, ascending by shard.
    pub shards: Vec<(ShardId, u64)>,
    /// Last control position.
    pub control: Option<u64>,
}

impl Positions {
    /// Raises the position of one shard.
    pub fn raise(&mut self, shard: ShardId, position: u64) {
        match self.shards.binary_search_by_key(&shard, |(s, _)| *s) {
            Ok(i) => self.shards[i].1 = self.shards[i].1.max(position),
            Err(i) => self.shards.insert(i, (shard, position)),
        }
    }

    /// The position of one shard, if named.
    pub fn of(&self, shard: ShardId) -> Option<u64> {
        let found = self.shards.binary_search_by_key(&shard, |(s, _)| *s);
        found.ok().map(|i| self.shards[i].1)
    }
}

impl fmt::Display for Positions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut comma = "";
        for (shard, position) in &self.shards {
            write!(f, "{comma}{shard}:{position}")?;
            comma = ",";
        }
        if let Some(control) = self.control {
            write!(f, "{comma}c:{control}")?;
        }
        Ok(())
    }
}

impl FromStr for Positions {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Positions, &'static str> {
        const FORM: &str = "not a position such as \"3:1042,7:88,c:19\"";
        let mut positions = Positions::default();
        // One entry per shard and one for the control log: anything longer is not ours.
        if text.len() > 27 * (SHARDS_MAX as usize + 1) {
            return Err(FORM);
        }
        for part in text.split(',').filter(|part| !part.is_empty()) {
            let (log, position) = part.split_once(':').ok_or(FORM)?;
            let position: u64 = position.parse().map_err(|_| FORM)?;
            match log {
                "c" => positions.control = Some(position),
                shard => {
                    let shard: u16 = shard.parse().map_err(|_| FORM)?;
                    if shard >= SHARDS_MAX {
                        return Err(FORM);
                    }
                    positions.raise(ShardId(shard), position);
                }
            }
        }
        Ok(positions)
    }
}

impl Serialize for Positions {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Positions {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Positions, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fnv_1a_is_the_published_function() {
        // Test vectors of the FNV reference (Landon Curt Noll), with a modulus that shows them whole.
        let fnv = |text: &str| {
            text.bytes().fold(0x811c_9dc5_u32, |h, b| (h ^ u32::from(b)).wrapping_mul(0x0100_0193))
        };
        assert_eq!((fnv(""), fnv("a"), fnv("foobar")), (0x811c_9dc5, 0xe40c_292c, 0xbf9c_f968));
        assert_eq!(shard_of("foobar", 16), ShardId((0xbf9c_f968_u32 % 16) as u16));
        assert_eq!(shard_of("acme", 1), ShardId(0));
    }

    #[test]
    fn positions_read_what_they_show() {
        let text = "3:1042,7:88,c:19";
        assert_eq!(text.parse::<Positions>().unwrap().to_string(), text);
        assert_eq!("".parse::<Positions>().unwrap(), Positions::default());
        for wrong in ["3", "x:1", "3:", "3:-1", "256:1", "c:"] {
            assert!(wrong.parse::<Positions>().is_err(), "{wrong}");
        }
    }
}
