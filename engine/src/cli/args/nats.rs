//! Where a NATS server is, for the commands that talk to one.

use std::path::PathBuf;

use clap::Args;
use meterr_connectors::nats::connection::NatsSettings;

/// Where the NATS server is, if one is to be used.
#[derive(Debug, Clone, Default, Args)]
pub struct NatsArgs {
    /// NATS servers to use instead of HTTP, separated by commas, such as nats://127.0.0.1:4222
    #[arg(
        long,
        env = "METERR_NATS",
        hide_env_values = true,
        value_name = "URL",
        help_heading = "NATS"
    )]
    pub nats: Option<String>,
    /// Credentials file for NATS (JWT and key)
    #[arg(long, value_name = "FILE", requires = "nats", help_heading = "NATS")]
    pub nats_credentials: Option<PathBuf>,
    /// Certificate authority of the NATS servers, PEM; connections use TLS then
    #[arg(long, value_name = "FILE", requires = "nats", help_heading = "NATS")]
    pub nats_ca: Option<PathBuf>,
    /// Certificate that shows the NATS servers who we are, PEM, where they ask for one
    #[arg(long, value_name = "FILE", requires_all = ["nats", "nats_key"], help_heading = "NATS")]
    pub nats_certificate: Option<PathBuf>,
    /// Key of that certificate, PEM
    #[arg(
        long,
        value_name = "FILE",
        requires_all = ["nats", "nats_certificate"],
        help_heading = "NATS"
    )]
    pub nats_key: Option<PathBuf>,
    /// First part of the subjects answers come on, where permissions ask for one, such as _INBOX.acme
    #[arg(long, value_name = "PREFIX", requires = "nats", help_heading = "NATS")]
    pub nats_inbox: Option<String>,
}

impl NatsArgs {
    /// How to connect; nothing when no server is named.
    pub fn settings(&self) -> Option<NatsSettings> {
        Some(NatsSettings {
            url: self.nats.clone()?,
            credentials: self.nats_credentials.clone(),
            ca: self.nats_ca.clone(),
            certificate: self.nats_certificate.clone().zip(self.nats_key.clone()),
            inbox_prefix: self.nats_inbox.clone(),
        })
    }
}
