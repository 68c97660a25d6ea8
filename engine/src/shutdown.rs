//! Stopping in order: the first SIGTERM or Ctrl-C asks everything to drain, the second one ends the
//! process at once. Nothing is lost by the second either, since what was acknowledged is in the log;
//! only the next start has more to read again.

use tokio::sync::watch;

/// Exit code after a second signal, as shells show for an interrupted command.
pub const INTERRUPTED: u8 = 130;

/// Asks for draining.
#[derive(Debug, Clone)]
pub struct Trigger(watch::Sender<bool>);

/// Learns that draining was asked for.
#[derive(Debug, Clone)]
pub struct Shutdown(watch::Receiver<bool>);

/// A trigger and what it triggers. When every trigger is gone, that counts as asking.
pub fn channel() -> (Trigger, Shutdown) {
    let (sender, receiver) = watch::channel(false);
    (Trigger(sender), Shutdown(receiver))
}

impl Trigger {
    /// Asks for draining; further calls change nothing.
    pub fn drain(&self) {
        self.0.send_replace(true);
    }
}

impl Shutdown {
    /// Whether draining was asked for.
    pub fn requested(&self) -> bool {
        *self.0.borrow() || self.0.has_changed().is_err()
    }

    /// Resolves once draining was asked for; at once when it was before.
    pub async fn wait(&mut self) {
        // An error means that every trigger is gone: nobody could ask any more.
        let _ = self.0.wait_for(|requested| *requested).await;
    }
}

/// Watches the signals of this process: drains on the first and exits on the second. Runs until
/// then; spawn it on the runtime.
///
/// # Errors
/// When the signal handlers cannot be installed.
pub async fn on_signals(trigger: Trigger) -> std::io::Result<()> {
    let mut signals = Signals::new()?;
    let name = signals.next().await;
    tracing::info!(signal = name, "draining; a second signal exits at once");
    trigger.drain();
    let name = signals.next().await;
    tracing::warn!(signal = name, "exiting without draining");
    std::process::exit(i32::from(INTERRUPTED));
}

#[cfg(unix)]
struct Signals {
    interrupt: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
}

#[cfg(unix)]
impl Signals {
    fn new() -> std::io::Result<Signals> {
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Signals {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
        })
    }

    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.interrupt.recv() => "SIGINT",
            _ = self.terminate.recv() => "SIGTERM",
        }
    }
}

#[cfg(not(unix))]
struct Signals;

#[cfg(not(unix))]
impl Signals {
    fn new() -> std::io::Result<Signals> {
        Ok(Signals)
    }

    async fn next(&mut self) -> &'static str {
        // Without a handler there is nothing to wait for; the default action ends the process.
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
        "Ctrl-C"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_drain_reaches_everyone_also_those_who_ask_later() {
        let (trigger, mut shutdown) = channel();
        let mut early = shutdown.clone();
        let waiting = tokio::spawn(async move { early.wait().await });
        assert!(!shutdown.requested());
        trigger.drain();
        waiting.await.unwrap();
        shutdown.wait().await;
        assert!(shutdown.clone().requested());
    }

    #[tokio::test]
    async fn a_lost_trigger_counts_as_a_drain() {
        let (trigger, mut shutdown) = channel();
        drop(trigger);
        shutdown.wait().await;
        assert!(shutdown.requested());
    }

    #[cfg(unix)]
    #[tokio::test]
    async fn sigterm_asks_for_a_drain() {
        let (trigger, mut shutdown) = channel();
        // The first poll installs the handlers, so the signal below cannot end the test process.
        let mut signals = std::pin::pin!(on_signals(trigger));
        assert!(futures::poll!(&mut signals).is_pending());
        let pid = std::process::id().to_string();
        let sent = std::process::Command::new("kill").args(["-TERM", &pid]).status().unwrap();
        assert!(sent.success());
        tokio::select! {
            () = shutdown.wait() => {}
            ended = &mut signals => panic!("ended early: {ended:?}"),
        }
    }
}
