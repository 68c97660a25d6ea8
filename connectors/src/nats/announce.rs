//! Live changes on core NATS.

use async_nats::Client;
use bytes::Bytes;
use futures::future::BoxFuture;

use super::subjects;
use crate::changes::Announcer;

/// Publishes to `spend.<org>`.
pub struct SpendAnnouncer {
    client: Client,
}

impl SpendAnnouncer {
    /// On this connection.
    pub fn new(client: Client) -> SpendAnnouncer {
        SpendAnnouncer { client }
    }
}

impl Announcer for SpendAnnouncer {
    fn announce(&self, messages: Vec<(String, Bytes)>) -> BoxFuture<'static, ()> {
        let client = self.client.clone();
        Box::pin(async move {
            for (org, body) in messages {
                if let Err(error) = client.publish(subjects::spend(&org), body).await {
                    // Subscribers see the gap at the next change, or when they ask.
                    tracing::debug!(%error, "live change not published");
                }
            }
        })
    }
}
