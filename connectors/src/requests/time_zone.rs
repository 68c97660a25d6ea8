//! An org's time zone: what its days and months go by.

use meterr_operators::event::excerpt;
use serde::Serialize;

use super::problem::{Kind, Problem};
use super::{Answer, Desk, changed, json};

/// Longest name of a time zone; the longest in use has 32 bytes.
const TIME_ZONE_LEN_MAX: usize = 64;

#[derive(Debug, Serialize)]
struct TimeZone {
    org: String,
    time_zone: String,
}

impl Desk {
    /// The time zone of an org.
    pub async fn time_zone(&self, org: String) -> Answer {
        let time_zone = self.plain(self.api.time_zone(org.clone())).await?;
        json(&TimeZone { org, time_zone })
    }

    /// Changes the time zone of an org.
    pub async fn set_time_zone(&self, org: String, time_zone: String) -> Answer {
        // Whether there is such a zone is for the engine, which knows the database version in force.
        let form = (1..=TIME_ZONE_LEN_MAX).contains(&time_zone.len())
            && time_zone.bytes().all(|b| b.is_ascii_alphanumeric() || b"/_+-".contains(&b));
        if !form {
            return Err(Problem::new(
                Kind::Body,
                format!(
                    "time_zone {:?} is not an IANA name such as \"Europe/Berlin\"",
                    excerpt(&time_zone)
                ),
            ));
        }
        changed(self.plain(self.api.set_time_zone(org, time_zone)).await?)
    }
}
