//! Money: integer atto-dollars (10⁻¹⁸ USD) in an `i128`.
//!
//! No figure passes through a float. The only rounding rule of the project stands in
//! [`Atto::parse`]: decimals beyond the eighteenth are rounded half to even on entry, and the caller
//! is told. Bounds on what may enter (see [`crate::event`] and [`crate::price_book`]) keep every
//! sum inside `i128`: 10⁹ units × 10²² atto-dollars a unit = 10³¹ an event and meter, so more than
//! 10⁶ events of the largest kind fit even if every bound were reached at once, and more than 10¹³
//! at 1 USD a token. Arithmetic is checked (`overflow-checks`), a wrapped sum is impossible.

use std::fmt;
use std::iter::Sum;
use std::ops::{Add, AddAssign, Mul, Neg, Sub};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Decimals kept: one atto-dollar is 10⁻¹⁸ USD.
pub const DECIMALS: u32 = 18;

/// One US dollar in atto-dollars.
pub const USD: i128 = 1_000_000_000_000_000_000;

/// An amount of money in atto-dollars. May be negative (a difference).
///
/// Aligned to 8 bytes rather than 16, since millions of these stand in view rows and the padding
/// would cost 8 bytes in each.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(Rust, packed(8))]
pub struct Atto(i128);

impl Atto {
    /// Nothing.
    pub const ZERO: Atto = Atto(0);

    /// `n` atto-dollars.
    pub const fn new(n: i128) -> Self {
        Atto(n)
    }

    /// `n` whole US dollars.
    pub const fn usd(n: i64) -> Self {
        Atto(n as i128 * USD)
    }

    /// The amount in atto-dollars.
    pub const fn get(self) -> i128 {
        self.0
    }

    /// Reads a decimal such as `0.0004125`, `-3`, `2.5e-06`. The second value says whether decimals
    /// beyond the eighteenth were rounded (half to even).
    ///
    /// # Errors
    /// When the text is no decimal number of at most 100 characters, or beyond ±10²⁰ USD.
    pub fn parse(text: &str) -> Result<(Atto, bool), MoneyError> {
        parse_scaled(text, 0)
    }

    /// Reads a decimal price "per `10^power` units" as the price of one unit: USD per million
    /// tokens is `power = 6`. Rounds like [`Atto::parse`], after the division.
    ///
    /// # Errors
    /// As [`Atto::parse`].
    pub fn parse_per(text: &str, power: u32) -> Result<(Atto, bool), MoneyError> {
        parse_scaled(text, power)
    }
}

/// Why a text is no amount.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MoneyError {
    /// Not a decimal number.
    #[error("{0:?} is not a decimal number")]
    Malformed(String),
    /// A number, but beyond ±10²⁰ USD.
    #[error("{0:?} is beyond 10^20 USD")]
    TooLarge(String),
}

/// Longest text looked at; a longer one is refused before any work.
const TEXT_LEN_MAX: usize = 100;

fn parse_scaled(text: &str, power: u32) -> Result<(Atto, bool), MoneyError> {
    let malformed = || MoneyError::Malformed(text.chars().take(TEXT_LEN_MAX).collect());
    if text.len() > TEXT_LEN_MAX {
        return Err(malformed());
    }
    let bytes = text.as_bytes();
    let (negative, mut at) = match bytes.first() {
        Some(b'-') => (true, 1),
        Some(b'+') => (false, 1),
        _ => (false, 0),
    };
    // Digits without the point, and how many of them stand behind it.
    let mut digits: Vec<u8> = Vec::with_capacity(bytes.len());
    let mut decimals: i64 = 0;
    let mut point = false;
    while let Some(&b) = bytes.get(at) {
        match b {
            b'0'..=b'9' => {
                digits.push(b - b'0');
                decimals += i64::from(point);
            }
            b'.' if !point => point = true,
            _ => break,
        }
        at += 1;
    }
    if digits.is_empty() || bytes.get(at.wrapping_sub(1)) == Some(&b'.') {
        return Err(malformed());
    }
    let mut exponent: i64 = 0;
    if let Some(b'e' | b'E') = bytes.get(at) {
        exponent = text[at + 1..].parse::<i16>().map_err(|_| malformed())?.into();
        at = bytes.len();
    }
    if at != bytes.len() {
        return Err(malformed());
    }
    // value = digits × 10^(exponent − decimals) USD per 10^power = digits × 10^shift atto.
    let shift = i64::from(DECIMALS) + exponent - decimals - i64::from(power);
    let first = digits.iter().position(|d| *d != 0).unwrap_or(digits.len());
    let digits = &digits[first..];
    if digits.is_empty() {
        return Ok((Atto::ZERO, false));
    }
    // Keep `kept` leading digits; the rest falls behind the eighteenth decimal.
    let kept = digits.len() as i64 + shift.min(0);
    if digits.len() as i64 + shift > 38 {
        return Err(MoneyError::TooLarge(text.to_owned()));
    }
    let kept_len = kept.clamp(0, digits.len() as i64) as usize;
    let mut value: i128 = digits[..kept_len].iter().fold(0, |v, d| v * 10 + i128::from(*d));
    for _ in 0..shift.max(0) {
        value *= 10;
    }
    let mut rounded = false;
    if kept < digits.len() as i64 {
        // Below half, half or above half of the last kept unit; `kept < 0` is always below.
        let rest = &digits[kept_len..];
        rounded = rest.iter().any(|d| *d != 0);
        let up = kept >= 0
            && match rest[0].cmp(&5) {
                std::cmp::Ordering::Less => false,
                std::cmp::Ordering::Greater => true,
                std::cmp::Ordering::Equal => rest[1..].iter().any(|d| *d != 0) || value % 2 == 1,
            };
        value += i128::from(up);
    }
    if value > 100 * 1_000_000_000_000_000_000 * USD {
        return Err(MoneyError::TooLarge(text.to_owned()));
    }
    Ok((Atto(if negative { -value } else { value }), rounded))
}

impl fmt::Display for Atto {
    /// A plain decimal in USD: no exponent, no rounding, trailing zeros trimmed.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let n = self.0;
        let (whole, part) = (n.unsigned_abs() / USD as u128, n.unsigned_abs() % USD as u128);
        let sign = if n < 0 { "-" } else { "" };
        if part == 0 {
            return write!(f, "{sign}{whole}");
        }
        let mut decimals = [0u8; DECIMALS as usize];
        let mut rest = part;
        for d in decimals.iter_mut().rev() {
            *d = b'0' + (rest % 10) as u8;
            rest /= 10;
        }
        let len = decimals.iter().rposition(|d| *d != b'0').map_or(0, |i| i + 1);
        let decimals = std::str::from_utf8(&decimals[..len]).expect("digits are ASCII");
        write!(f, "{sign}{whole}.{decimals}")
    }
}

impl fmt::Debug for Atto {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "${self}")
    }
}

impl Add for Atto {
    type Output = Atto;
    fn add(self, other: Atto) -> Atto {
        Atto(self.0 + other.0)
    }
}

impl Sub for Atto {
    type Output = Atto;
    fn sub(self, other: Atto) -> Atto {
        Atto(self.0 - other.0)
    }
}

impl Neg for Atto {
    type Output = Atto;
    fn neg(self) -> Atto {
        Atto(-self.0)
    }
}

impl Mul<i64> for Atto {
    type Output = Atto;
    fn mul(self, n: i64) -> Atto {
        Atto(self.0 * i128::from(n))
    }
}

impl AddAssign for Atto {
    fn add_assign(&mut self, other: Atto) {
        *self = *self + other;
    }
}

impl Sum for Atto {
    fn sum<I: Iterator<Item = Atto>>(iter: I) -> Atto {
        iter.fold(Atto::ZERO, Add::add)
    }
}

impl Serialize for Atto {
    /// As the decimal string of its `Display`.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Atto {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Atto, D::Error> {
        let text = String::deserialize(deserializer)?;
        Atto::parse(&text).map(|(amount, _)| amount).map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> (i128, bool) {
        let (amount, rounded) = Atto::parse(text).unwrap();
        (amount.get(), rounded)
    }

    #[test]
    fn decimals_are_exact() {
        assert_eq!(parsed("0.0004125"), (412_500_000_000_000, false));
        assert_eq!(parsed("3"), (3 * USD, false));
        assert_eq!(parsed("2.5e-06"), (2_500_000_000_000, false));
        assert_eq!(parsed("-1E2"), (-100 * USD, false));
        assert_eq!(parsed("1e-18"), (1, false));
        assert_eq!(parsed("0e999"), (0, false));
    }

    #[test]
    fn beyond_eighteen_decimals_half_goes_to_even() {
        assert_eq!(parsed("0.0000000000000000005"), (0, true));
        assert_eq!(parsed("0.0000000000000000015"), (2, true));
        assert_eq!(parsed("0.0000000000000000025"), (2, true));
        assert_eq!(parsed("0.00000000000000000251"), (3, true));
        assert_eq!(parsed("9e-20"), (0, true));
        assert_eq!(parsed("0.0000000000000000010"), (1, false));
    }

    #[test]
    fn a_price_per_million_is_divided_before_rounding() {
        assert_eq!(Atto::parse_per("0.15", 6).unwrap(), (Atto::new(150_000_000_000), false));
        assert_eq!(Atto::parse_per("0.0000000000005", 6).unwrap(), (Atto::new(0), true));
    }

    #[test]
    fn what_is_no_number_is_refused() {
        for text in ["", "-", ".", "1.", "1..2", "1e", "0x1", "NaN", "1 ", " 1", "1_0", "1e99999"] {
            assert!(matches!(Atto::parse(text), Err(MoneyError::Malformed(_))), "{text:?}");
        }
        assert!(matches!(Atto::parse("1e21"), Err(MoneyError::TooLarge(_))));
        assert!(matches!(Atto::parse("1e3000"), Err(MoneyError::TooLarge(_))));
        assert!(Atto::parse(&"9".repeat(101)).is_err());
    }

    #[test]
    fn shown_without_exponent_or_trailing_zeros() {
        for text in ["0", "3", "0.0004125", "-0.5", "123456789.000000000000000001"] {
            assert_eq!(Atto::parse(text).unwrap().0.to_string(), text);
        }
        assert_eq!(Atto::new(1_500_000_000_000_000_000).to_string(), "1.5");
    }

    #[test]
    fn eight_byte_alignment_saves_padding() {
        assert_eq!((size_of::<Atto>(), align_of::<Atto>()), (16, 8));
    }
}
