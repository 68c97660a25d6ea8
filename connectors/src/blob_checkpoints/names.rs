//! Names of blobs that hold checkpoints.

use meterr_operators::ids::ShardId;

use crate::checkpoint::Manifest;

/// A manifest's name, taken apart. The order is that of places, then of tokens.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Name {
    pub generation: u64,
    pub index: u32,
    pub token: u64,
    pub text: String,
}

pub(super) fn shard_prefix(shard: ShardId) -> String {
    format!("checkpoint/{:03}/", shard.0)
}

/// Name of a manifest.
pub(super) fn name_of(manifest: &Manifest, hash: &[u8; 32]) -> Name {
    let Manifest { generation, index, token, .. } = *manifest;
    let hash: String = hash[..8].iter().map(|byte| format!("{byte:02x}")).collect();
    let prefix = shard_prefix(manifest.shard_id());
    let text = format!("{prefix}{generation:020}-{token:020}/{index:010}-{hash}");
    Name { generation, index, token, text }
}

pub(super) fn part_name(name: &str, part: usize) -> String {
    format!("{name}.{part:05}")
}

/// Reads what follows the shard in a name: generation, token, index, and the part if it is one. Nothing
/// for what is not named as it would be here.
pub(super) fn parse(rest: &str) -> Option<(u64, u64, u32, Option<usize>)> {
    fn number<T: std::str::FromStr>(text: &str, digits: usize) -> Option<T> {
        let plain = text.len() == digits && text.bytes().all(|b| b.is_ascii_digit());
        plain.then(|| text.parse().ok()).flatten()
    }
    let (dir, file) = rest.split_once('/')?;
    let (generation, token) = dir.split_once('-')?;
    let (index, hash) = file.split_once('-')?;
    let (hash, part) = match hash.split_once('.') {
        Some((hash, part)) => (hash, Some(number(part, 5)?)),
        None => (hash, None),
    };
    let hex = hash.len() == 16 && hash.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    hex.then_some((number(generation, 20)?, number(token, 20)?, number(index, 10)?, part))
}
