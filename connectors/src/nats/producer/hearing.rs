//! What a producer hears about its connection: that it went away, that it is back, and what its user
//! may not do. A refused publish is never answered; the server only says so on the connection.

use std::collections::VecDeque;

use async_nats::{Event, ServerError};

use super::decision::short;

/// Refusals remembered; each is asked for within one attempt.
const DENIALS_KEPT: usize = 1_024;

/// What was heard.
#[derive(Debug, Clone, Default)]
pub struct Heard {
    /// Whether there is a connection.
    pub connected: bool,
    /// How often it was lost.
    pub losses: u64,
    /// How many refused publishes there were.
    pub denials: u64,
    /// Subjects of the last ones.
    denied: VecDeque<String>,
    /// Why answers cannot arrive, if they cannot.
    pub deaf: Option<String>,
}

/// Something the user may not do.
#[derive(Debug, PartialEq, Eq)]
enum Denial {
    Publish(String),
    Subscribe(String),
}

/// Reads the server's sentence, such as `Permissions Violation for Publish to "usage.3.@batch"`.
fn denial(text: &str) -> Option<Denial> {
    let head = text.get(.."permissions violation for ".len())?;
    if !head.eq_ignore_ascii_case("permissions violation for ") {
        return None;
    }
    let rest = &text[head.len()..];
    let subject = rest.split('"').nth(1)?.to_owned();
    let starts = |word: &str| rest.get(..word.len()).is_some_and(|w| w.eq_ignore_ascii_case(word));
    // `Publish with Reply of "…"` means that no answer can come.
    if starts("publish to") {
        Some(Denial::Publish(subject))
    } else if starts("subscription to") || starts("publish with reply") {
        Some(Denial::Subscribe(subject))
    } else {
        None
    }
}

impl Heard {
    /// Of a connection just made.
    pub fn connected() -> Heard {
        Heard { connected: true, ..Heard::default() }
    }

    /// Takes an event of the connection; says whether anything changed.
    pub fn hear(&mut self, event: &Event) -> bool {
        match event {
            Event::Connected => {
                self.connected = true;
                // Permissions may be others now.
                self.deaf = None;
            }
            Event::Disconnected | Event::Closed => {
                self.losses += u64::from(self.connected);
                self.connected = false;
            }
            Event::ServerError(ServerError::Other(text)) => match denial(text) {
                Some(Denial::Publish(subject)) => {
                    self.denials += 1;
                    self.denied.push_back(subject);
                    if self.denied.len() > DENIALS_KEPT {
                        self.denied.pop_front();
                    }
                }
                // Of this connection's subscriptions only the answers' is ours.
                Some(Denial::Subscribe(subject)) => {
                    self.deaf = Some(format!(
                        "acknowledgements cannot arrive, since this user may not subscribe to {:?}; \
                         allow it to subscribe to its inbox",
                        short(&subject)
                    ));
                }
                None => return false,
            },
            _ => return false,
        }
        true
    }

    /// Whether a publish to one of `subjects` was refused after `before` refusals.
    pub fn denied_since(&self, subjects: &[String], before: u64) -> bool {
        let new = usize::try_from(self.denials.saturating_sub(before)).unwrap_or(usize::MAX);
        self.denied.iter().rev().take(new).any(|denied| subjects.contains(denied))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(text: &str) -> Event {
        Event::ServerError(ServerError::Other(text.to_owned()))
    }

    #[test]
    fn refusals_are_read_from_the_servers_sentences() {
        let publish = |s: &str| Some(Denial::Publish(s.to_owned()));
        let subscribe = |s: &str| Some(Denial::Subscribe(s.to_owned()));
        let table = [
            (r#"Permissions Violation for Publish to "usage.3.@batch""#, publish("usage.3.@batch")),
            (r#"permissions violation for publish to "a""#, publish("a")),
            (r#"Permissions Violation for Subscription to "_INBOX.x.*""#, subscribe("_INBOX.x.*")),
            (
                r#"Permissions Violation for Publish with Reply of "_INBOX.x""#,
                subscribe("_INBOX.x"),
            ),
            (r#"Permissions Violation for Subscription to "a" using queue "q""#, subscribe("a")),
            ("Permissions Violation for Publish to a", None),
            ("Permissions Violation for ", None),
            ("maximum connections exceeded", None),
            ("é", None),
        ];
        for (text, expected) in table {
            assert_eq!(denial(text), expected, "{text}");
        }
    }

    #[test]
    fn only_new_refusals_of_the_same_subject_count() {
        let mut heard = Heard::default();
        let a = ["x".to_owned(), "a".to_owned()];
        assert!(heard.hear(&error(r#"Permissions Violation for Publish to "a""#)));
        let before = heard.denials;
        assert!(heard.denied_since(&a, 0) && !heard.denied_since(&a, before));
        for n in 0..2 * DENIALS_KEPT {
            heard.hear(&error(&format!(r#"Permissions Violation for Publish to "b{n}""#)));
        }
        assert_eq!(heard.denied.len(), DENIALS_KEPT);
        assert!(!heard.denied_since(&a, 0), "forgotten");
        assert!(heard.denied_since(&[format!("b{}", 2 * DENIALS_KEPT - 1)], before));
        assert!(!heard.hear(&error("other")));
    }

    #[test]
    fn a_loss_counts_once_and_a_new_connection_may_have_new_rights() {
        let mut heard = Heard::default();
        heard.hear(&Event::Connected);
        heard.hear(&error(r#"Permissions Violation for Subscription to "_INBOX.x.*""#));
        assert!(heard.deaf.is_some());
        heard.hear(&Event::Disconnected);
        heard.hear(&Event::Closed);
        assert_eq!((heard.connected, heard.losses), (false, 1));
        heard.hear(&Event::Connected);
        assert_eq!((heard.connected, heard.deaf.clone()), (true, None));
    }
}
