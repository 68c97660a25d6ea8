//! Durations and sizes as people write them in the configuration and on the command line: a whole
//! number and one unit (`"20ms"`, `"64MiB"`). No fractions and no sums of units, so that there is one
//! obvious way to write a value.

use std::time::Duration;

/// Units of a duration in milliseconds, largest first.
const DURATION_UNITS: [(&str, u64); 5] =
    [("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1_000), ("ms", 1)];

/// Units of a size in bytes, largest first.
const SIZE_UNITS: [(&str, u64); 5] =
    [("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1)];

/// Reads a duration such as `20ms`, `30s`, `15m`, `24h` or `35d`.
///
/// # Errors
/// A phrase that says what a duration looks like.
pub fn parse_duration(text: &str) -> Result<Duration, &'static str> {
    const FORM: &str = "a whole number with the unit ms, s, m, h or d, such as \"30s\"";
    parse(text, &DURATION_UNITS).map(Duration::from_millis).ok_or(FORM)
}

/// Reads a size such as `512B`, `64KiB`, `64MiB` or `1GiB`.
///
/// # Errors
/// A phrase that says what a size looks like.
pub fn parse_size(text: &str) -> Result<u64, &'static str> {
    const FORM: &str = "a whole number with the unit B, KiB, MiB, GiB or TiB, such as \"64MiB\"";
    parse(text, &SIZE_UNITS).ok_or(FORM)
}

/// Shows a duration in the largest unit that divides it; below a millisecond is cut off.
pub fn show_duration(duration: Duration) -> String {
    show(u64::try_from(duration.as_millis()).unwrap_or(u64::MAX), &DURATION_UNITS)
}

/// Shows a size in the largest unit that divides it.
pub fn show_size(bytes: u64) -> String {
    show(bytes, &SIZE_UNITS)
}

fn parse(text: &str, units: &[(&str, u64)]) -> Option<u64> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let (_, factor) = units.iter().find(|(name, _)| *name == unit)?;
    number.parse::<u64>().ok()?.checked_mul(*factor)
}

fn show(value: u64, units: &[(&str, u64)]) -> String {
    let fits = |factor: u64| value != 0 && value.is_multiple_of(factor);
    let (unit, factor) =
        units.iter().find(|(_, factor)| fits(*factor)).unwrap_or(&units[units.len() - 1]);
    format!("{}{unit}", value / factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_shown_is_read_back() {
        for text in ["0ms", "1ms", "1500ms", "30s", "15m", "25h", "35d"] {
            assert_eq!(show_duration(parse_duration(text).unwrap()), text);
        }
        for text in ["0B", "1B", "1KiB", "1025B", "64MiB", "1GiB", "3TiB"] {
            assert_eq!(show_size(parse_size(text).unwrap()), text);
        }
        assert_eq!(show_duration(Duration::from_secs(60)), "1m");
        assert_eq!(show_size(1024 * 1024), "1MiB");
    }

    #[test]
    fn anything_else_is_refused() {
        for text in
            ["", "30", "s", "-1s", "1.5s", "1h30m", " 1s", "1 s", "1S", "99999999999999999d"]
        {
            assert!(parse_duration(text).is_err(), "{text:?}");
        }
        for text in ["", "64", "64MB", "64 MiB", "1.5GiB", "-1B", "99999999999999999TiB"] {
            assert!(parse_size(text).is_err(), "{text:?}");
        }
    }
}
