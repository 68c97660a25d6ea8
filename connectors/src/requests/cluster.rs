//! The cluster: who is there, which shard is where, and operators' wishes about both.

use meterr_operators::event::excerpt;
use meterr_operators::ids::{SHARDS_MAX, ShardId};

use super::problem::{Kind, Problem};
use super::{Answer, Desk, json};
use crate::api::{Drain, Move};

/// What the name of a node must be.
pub(crate) const NODE_FORM: &str = "1 to 64 characters of A-Z, a-z, 0-9, '_' and '-'";
/// What the number of a shard must be.
pub(crate) const SHARD_FORM: &str = "a number from 0 to 255";

impl Desk {
    /// The nodes, and which shard is where.
    pub async fn cluster(&self) -> Answer {
        json(&self.plain(self.api.cluster()).await?)
    }

    /// Drains a node, or ends that.
    pub async fn drain(&self, drain: Drain) -> Answer {
        checked(&drain.node)?;
        self.plain(self.api.drain(drain.clone())).await?;
        json(&drain)
    }

    /// Moves a shard.
    pub async fn move_shard(&self, to: Move) -> Answer {
        to.node.as_deref().map(checked).transpose()?;
        if to.shard.0 >= self.shards() {
            return Err(Problem::new(
                Kind::NotFound,
                format!("there is no shard {}; there are {}", to.shard, self.shards()),
            ));
        }
        self.plain(self.api.move_shard(to.clone())).await?;
        json(&to)
    }
}

/// Refuses a node's name in a body that cannot be one.
fn checked(node: &str) -> Result<(), Problem> {
    match node_valid(node) {
        true => Ok(()),
        false => Err(Problem::new(
            Kind::Body,
            format!("node is {:?}, but must be {NODE_FORM}", excerpt(node)),
        )),
    }
}

fn node_valid(text: &str) -> bool {
    (1..=64).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-')
}

/// The name of a node, checked.
pub(crate) fn node(text: &str) -> Result<String, Problem> {
    match node_valid(text) {
        true => Ok(text.to_owned()),
        false => Err(Problem::parameter("node", text, NODE_FORM)),
    }
}

/// The number of a shard, checked.
pub(crate) fn shard(text: &str) -> Result<ShardId, Problem> {
    let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    match text.parse() {
        Ok(shard) if digits && shard < SHARDS_MAX => Ok(ShardId(shard)),
        _ => Err(Problem::parameter("shard", text, SHARD_FORM)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_nodes_and_numbers_of_shards() {
        for good in ["n1", "meterr-0_a", &"n".repeat(64)] {
            assert!(node(good).is_ok(), "{good}");
        }
        for bad in ["", "n 1", "n>", "é", "a/b", "a.b", &"n".repeat(65)] {
            assert!(node(bad).is_err(), "{bad}");
            assert!(checked(bad).is_err(), "{bad}");
        }
        assert_eq!(shard("255").unwrap(), ShardId(255));
        for bad in ["", "256", "+1", "-1", "x", "99999999999"] {
            assert!(shard(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn letting_placement_decide_must_be_said() {
        let read = serde_json::from_str::<Move>;
        assert_eq!(read(r#"{"shard":3,"node":null}"#).unwrap().node, None);
        assert_eq!(read(r#"{"shard":3,"node":"n1"}"#).unwrap().node.as_deref(), Some("n1"));
        assert!(read(r#"{"shard":3}"#).is_err());
    }
}
