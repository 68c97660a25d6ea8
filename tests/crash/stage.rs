//! What publishers, administrator and subscribers share.

use std::sync::Mutex;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

/// Where the server is at the moment, and how far the test is.
#[derive(Default)]
pub struct Stage {
    url: Mutex<Option<String>>,
    /// Publishers finish what they have begun and end.
    pub closing: AtomicBool,
    /// Subscribers end when they have seen everything.
    pub over: AtomicBool,
    /// Held while a change is under way. A request that gets no answer may still be done, so whoever
    /// freezes a server takes this first: once it thaws, no old change may come out of it.
    pub changing: Mutex<()>,
}

impl Stage {
    /// Address of the server, once there is one.
    pub fn url(&self) -> String {
        loop {
            if let Some(url) = self.url.lock().unwrap().clone() {
                return url;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Says where the server is, or that it is gone.
    pub fn set_url(&self, url: Option<&str>) {
        *self.url.lock().unwrap() = url.map(str::to_owned);
    }

    /// Does something until it is acknowledged, on whatever server there is.
    pub fn insist(&self, mut attempt: impl FnMut(&str) -> anyhow::Result<()>) -> u64 {
        for attempts in 1.. {
            if attempt(&self.url()).is_ok() {
                return attempts;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        unreachable!("the loop has no end")
    }
}
