//! Points in time and the windows cut from them.
//!
//! [`Time`] serves for event time and log time alike. Event time is data in the key, never a
//! watermark: a late event is an ordinary update. A [`Slot`] is the grain at which usage is kept:
//! every IANA offset in use since 1970 and every price boundary falls on one.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Microseconds in one second.
pub const SECOND: i64 = 1_000_000;
/// Microseconds in one minute.
pub const MINUTE: i64 = 60 * SECOND;
/// Microseconds in one hour.
pub const HOUR: i64 = 60 * MINUTE;
/// Microseconds in one day.
pub const DAY: i64 = 24 * HOUR;
/// Microseconds in one slot: 15 minutes.
pub const SLOT: i64 = 15 * MINUTE;

/// A point in time: microseconds since 1970-01-01T00:00:00Z, leap seconds not counted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Time(pub i64);

impl Time {
    /// Earliest event time taken: 1970-01-01T00:00:00Z.
    pub const MIN: Time = Time(0);
    /// First instant no longer taken: 2200-01-01T00:00:00Z. Bounded so that a slot fits `u32` and
    /// every calendar computation stays inside its library's range.
    pub const MAX: Time = Time(7_258_118_400 * SECOND);

    /// The slot this instant lies in. Only for instants in `MIN..MAX`; others are clamped.
    pub fn slot(self) -> Slot {
        let t = self.0.clamp(Self::MIN.0, Self::MAX.0 - 1);
        Slot((t / SLOT) as u32)
    }
}

impl fmt::Display for Time {
    /// RFC 3339 in UTC, with as many decimals of a second as needed (none, 3 or 6).
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let micros = self.0.rem_euclid(SECOND);
        let seconds = self.0.div_euclid(SECOND);
        let (year, month, day) = civil_from_days(seconds.div_euclid(86_400));
        let of_day = seconds.rem_euclid(86_400);
        let (h, m, s) = (of_day / 3_600, of_day / 60 % 60, of_day % 60);
        write!(f, "{year:04}-{month:02}-{day:02}T{h:02}:{m:02}:{s:02}")?;
        match (micros, micros % 1_000) {
            (0, _) => write!(f, "Z"),
            (_, 0) => write!(f, ".{:03}Z", micros / 1_000),
            _ => write!(f, ".{micros:06}Z"),
        }
    }
}

impl Time {
    /// Reads RFC 3339 (`2026-01-02T03:04:05.123Z`, `…+02:00`). Decimals beyond the sixth are cut
    /// off. A leap second (`:60`) counts as the last microsecond before it ends.
    ///
    /// # Errors
    /// A sentence saying what is wrong.
    pub fn parse(text: &str) -> Result<Time, &'static str> {
        parse_rfc3339(text.as_bytes())
    }
}

fn parse_rfc3339(b: &[u8]) -> Result<Time, &'static str> {
    const FORM: &str = "not an RFC 3339 time such as 2026-01-02T03:04:05Z";
    if b.len() < 20 || b.len() > 64 {
        return Err(FORM);
    }
    let two = |at: usize| -> Result<i64, &'static str> {
        let (x, y) = (b[at].wrapping_sub(b'0'), b[at + 1].wrapping_sub(b'0'));
        if x > 9 || y > 9 { Err(FORM) } else { Ok(i64::from(x) * 10 + i64::from(y)) }
    };
    if b[4] != b'-' || b[7] != b'-' || b[13] != b':' || b[16] != b':' {
        return Err(FORM);
    }
    if !matches!(b[10], b'T' | b't' | b' ') {
        return Err(FORM);
    }
    let year = two(0)? * 100 + two(2)?;
    let (month, day) = (two(5)?, two(8)?);
    let (hour, minute, second) = (two(11)?, two(14)?, two(17)?);
    if !(1..=12).contains(&month) || day < 1 || day > days_in_month(year, month) {
        return Err("no such day in the calendar");
    }
    if hour > 23 || minute > 59 || second > 60 {
        return Err("no such time of day");
    }
    let mut at = 19;
    let mut micros: i64 = 0;
    if b[at] == b'.' {
        at += 1;
        let start = at;
        let mut scale = 100_000;
        while at < b.len() && b[at].is_ascii_digit() {
            micros += i64::from(b[at] - b'0') * scale;
            scale /= 10;
            at += 1;
        }
        if at == start {
            return Err(FORM);
        }
    }
    let offset = match b.get(at) {
        Some(b'Z' | b'z') if b.len() == at + 1 => 0,
        Some(sign @ (b'+' | b'-')) if b.len() == at + 6 && b[at + 3] == b':' => {
            let (h, m) = (two(at + 1)?, two(at + 4)?);
            if h > 23 || m > 59 {
                return Err("no such offset from UTC");
            }
            (h * 3_600 + m * 60) * if *sign == b'-' { -1 } else { 1 }
        }
        _ => return Err("an RFC 3339 time ends in Z or an offset such as +02:00"),
    };
    if second == 60 {
        micros = SECOND - 1;
    }
    let of_day = hour * 3_600 + minute * 60 + second.min(59);
    let seconds = days_from_civil(year, month, day) * 86_400 + of_day - offset;
    Ok(Time(seconds * SECOND + micros))
}

fn days_in_month(year: i64, month: i64) -> i64 {
    match month {
        2 if year % 4 == 0 && (year % 100 != 0 || year % 400 == 0) => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

/// Days since 1970-01-01 of a date in the proleptic Gregorian calendar. Algorithm:
/// Howard Hinnant, "chrono-compatible low-level date algorithms", `days_from_civil`.
pub fn days_from_civil(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let year_of_era = year - era * 400;
    let day_of_year = (153 * (month + if month > 2 { -3 } else { 9 }) + 2) / 5 + day - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    era * 146_097 + day_of_era - 719_468
}

/// Year, month and day of a count of days since 1970-01-01; the inverse of [`days_from_civil`].
pub fn civil_from_days(days: i64) -> (i64, i64, i64) {
    let days = days + 719_468;
    let era = days.div_euclid(146_097);
    let doe = days - era * 146_097;
    let yoe = (doe - doe / 1_460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let day = doy - (153 * mp + 2) / 5 + 1;
    let month = if mp < 10 { mp + 3 } else { mp - 9 };
    (yoe + era * 400 + i64::from(month <= 2), month, day)
}

impl Serialize for Time {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Time {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Time, D::Error> {
        let text = String::deserialize(deserializer)?;
        Time::parse(&text).map_err(|what| serde::de::Error::custom(format!("{text:?} is {what}")))
    }
}

/// Quarters of an hour since 1970-01-01T00:00:00Z: the grain of usage and of price boundaries.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot(pub u32);

impl Slot {
    /// The first slot.
    pub const MIN: Slot = Slot(0);
    /// One past the last slot an event can lie in.
    pub const END: Slot = Slot((Time::MAX.0 / SLOT) as u32);

    /// The instant the slot begins.
    pub fn start(self) -> Time {
        Time(i64::from(self.0) * SLOT)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rfc3339_reads_and_shows() {
        for (text, micros, shown) in [
            ("1970-01-01T00:00:00Z", 0, "1970-01-01T00:00:00Z"),
            ("2026-01-02T03:04:05.123Z", 1_767_323_045_123_000, "2026-01-02T03:04:05.123Z"),
            ("2026-01-02T05:04:05.123+02:00", 1_767_323_045_123_000, "2026-01-02T03:04:05.123Z"),
            ("2024-02-29 23:59:60.5z", 1_709_251_199_999_999, "2024-02-29T23:59:59.999999Z"),
            (
                "2026-01-02T03:04:05.1234567891Z",
                1_767_323_045_123_456,
                "2026-01-02T03:04:05.123456Z",
            ),
        ] {
            let time = Time::parse(text).unwrap();
            assert_eq!((time.0, time.to_string().as_str()), (micros, shown), "{text}");
        }
    }

    #[test]
    fn wrong_times_are_refused() {
        for text in [
            "",
            "2026-01-02",
            "2026-01-02T03:04:05",
            "2026-13-02T03:04:05Z",
            "2026-02-30T03:04:05Z",
            "2026-01-02T24:00:00Z",
            "2026-01-02T03:04:05.Z",
            "2026-01-02T03:04:05+2:00",
            "2026-01-02T03:04:05ZZ",
            "2026-01-02T03:04:05+24:00",
            "２026-01-02T03:04:05Z",
        ] {
            assert!(Time::parse(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn civil_dates_invert() {
        for days in (-800_000..800_000).step_by(37) {
            let (y, m, d) = civil_from_days(days);
            assert_eq!(days_from_civil(y, m, d), days);
        }
    }
}
