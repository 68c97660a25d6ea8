//! The log on stderr: lines for people or one JSON object a line. Stdout belongs to results.
//!
//! Colours only where stderr is a terminal, and never when `NO_COLOR` is set (no-color.org) or
//! `TERM` is `dumb`.

use std::io::IsTerminal;

use tracing::Subscriber;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

use crate::settings::{Format, Telemetry};

/// Why there is no log.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// The directives do not parse. Checked settings cannot lead here.
    #[error("telemetry.log {0:?} is not a level or directive")]
    Directives(String),
    /// Somebody else has set one up in this process.
    #[error("the log is set up already")]
    Twice,
}

/// Sets up the log of this process.
///
/// # Errors
/// When called twice, or with settings that were not checked.
pub fn init(telemetry: &Telemetry) -> Result<(), TelemetryError> {
    let colours = colours(std::io::stderr().is_terminal(), std::env::var_os);
    let subscriber = subscriber(telemetry, colours, std::io::stderr)?;
    tracing::subscriber::set_global_default(subscriber).map_err(|_| TelemetryError::Twice)
}

/// Whether to use colours on an output.
pub fn colours(
    terminal: bool,
    variable: impl Fn(&'static str) -> Option<std::ffi::OsString>,
) -> bool {
    let no_color = variable("NO_COLOR").is_some_and(|value| !value.is_empty());
    let dumb = variable("TERM").is_some_and(|value| value == "dumb");
    terminal && !no_color && !dumb
}

fn subscriber<W>(
    telemetry: &Telemetry,
    colours: bool,
    writer: W,
) -> Result<Box<dyn Subscriber + Send + Sync>, TelemetryError>
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    // What the HTTP server says of its own threads and the NATS client of its connections (which we
    // report ourselves) is of no use to an operator; the setting comes after it and may say otherwise.
    let filter = EnvFilter::builder()
        .parse(format!("actix_server=warn,async_nats=error,{}", telemetry.log))
        .map_err(|_| TelemetryError::Directives(telemetry.log.clone()))?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(writer);
    Ok(match telemetry.format {
        Format::Human => Box::new(builder.with_ansi(colours).finish()),
        Format::Json => Box::new(builder.json().flatten_event(true).with_ansi(false).finish()),
    })
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;
    use std::io::Write;
    use std::sync::Arc;

    use parking_lot::Mutex;

    use super::*;

    #[derive(Clone, Default)]
    struct Memory(Arc<Mutex<Vec<u8>>>);

    impl Write for Memory {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn logged(log: &str, format: Format, colours: bool) -> String {
        let memory = Memory::default();
        let writer = memory.clone();
        let telemetry = Telemetry { log: log.into(), format };
        let subscriber = subscriber(&telemetry, colours, move || writer.clone()).unwrap();
        tracing::subscriber::with_default(subscriber, || {
            tracing::info!(shard = 3, "shard is live");
            tracing::debug!("details");
        });
        let bytes = memory.0.lock().clone();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn json_is_one_object_a_line_with_values_as_fields() {
        let text = logged("info", Format::Json, true);
        assert_eq!(text.lines().count(), 1, "debug is below info");
        let line: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(line["message"], "shard is live");
        assert_eq!(line["shard"].to_string(), "3");
        assert_eq!(line["level"], "INFO");
    }

    #[test]
    fn people_get_colours_only_where_asked() {
        assert!(!logged("debug", Format::Human, false).contains('\x1b'));
        assert!(logged("debug", Format::Human, true).contains('\x1b'));
        assert_eq!(logged("debug", Format::Human, false).lines().count(), 2);
    }

    #[test]
    fn no_color_and_dumb_terminals_are_honoured() {
        let with = |name: &'static str, value: &'static str| {
            move |asked: &'static str| (asked == name).then(|| OsString::from(value))
        };
        assert!(colours(true, |_| None));
        assert!(colours(true, with("NO_COLOR", "")), "an empty NO_COLOR does not count");
        assert!(!colours(true, with("NO_COLOR", "1")));
        assert!(!colours(true, with("TERM", "dumb")));
        assert!(!colours(false, |_| None));
    }

    #[test]
    fn wrong_directives_are_an_error() {
        let telemetry = Telemetry { log: "x=loud".into(), format: Format::Json };
        let error = subscriber(&telemetry, false, std::io::sink).map(drop).unwrap_err();
        assert_eq!(error.to_string(), "telemetry.log \"x=loud\" is not a level or directive");
    }
}
