//! The ledger: which checkpoint of each shard was acknowledged last.
//!
//! When bytes of its file are damaged, sled may open without a word in an older state, even an empty
//! one. The ledger is a small file of its own beside sled's, so that such a loss is noticed and
//! reported. It decides nothing else: what may be believed is decided by the manifests.
//!
//! It is written to `ledger.new`, synced and renamed, so a crash leaves the old or the new one. It
//! follows the manifest: after a crash it may be behind the database, never ahead of it.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::path::Path;

use meterr_operators::ids::SHARDS_MAX;

use super::directory::sync_dir;
use crate::frame::{self, Form};

const LEDGER_FORM: Form = Form { kind: 6, schema: 1, len_max: 64 * 1024 };
const NAME: &str = "ledger";

/// The last acknowledged checkpoint of a shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq, bincode::Encode, bincode::Decode)]
pub(super) struct Tip {
    pub generation: u64,
    pub index: u32,
    /// Hash of the framed manifest.
    pub hash: [u8; 32],
}

/// Tips by shard.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Ledger {
    pub tips: BTreeMap<u16, Tip>,
}

impl Ledger {
    /// Reads the ledger of a directory.
    ///
    /// # Errors
    /// With the reason when it is missing or damaged.
    pub fn read(dir: &Path) -> Result<Ledger, String> {
        let bytes = fs::read(dir.join(NAME)).map_err(|error| format!("ledger: {error}"))?;
        let tips = frame::decode::<Vec<(u16, Tip)>, { 1 << 20 }>(LEDGER_FORM, &bytes)
            .map_err(|error| format!("ledger: {error}"))?;
        if tips.iter().any(|(shard, _)| *shard >= SHARDS_MAX) {
            return Err("ledger: it names a shard that cannot be".to_owned());
        }
        Ok(Ledger { tips: tips.into_iter().collect() })
    }

    /// Makes the ledger durable.
    pub fn write(&self, dir: &Path) -> io::Result<()> {
        let tips: Vec<(u16, Tip)> = self.tips.iter().map(|(shard, tip)| (*shard, *tip)).collect();
        let bytes =
            frame::encode::<_, { 1 << 20 }>(LEDGER_FORM, &tips).map_err(io::Error::other)?;
        let new = dir.join("ledger.new");
        let mut file = fs::File::create(&new)?;
        file.write_all(&bytes)?;
        file.sync_all()?;
        fs::rename(&new, dir.join(NAME))?;
        sync_dir(dir)
    }
}
