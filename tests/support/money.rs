//! Money as tests count it: whole pico-dollars (10⁻¹² USD) in `i128`, by arithmetic of their own.

/// Reads a plain decimal in USD; panics on anything finer than a pico-dollar, which no price used
/// in tests leads to.
pub fn pico(text: &str) -> i128 {
    let (sign, digits) = text.strip_prefix('-').map_or((1, text), |digits| (-1, digits));
    let (whole, part) = digits.split_once('.').unwrap_or((digits, ""));
    assert!(part.len() <= 12, "{text} is finer than a pico-dollar");
    let whole: i128 = whole.parse().unwrap();
    let part: i128 = format!("{part:0<12}").parse().unwrap();
    sign * (whole * 1_000_000_000_000 + part)
}

/// A price in pico-dollars a token as the price book writes it: USD per million tokens.
pub fn per_million(pico_per_token: i128) -> String {
    format!("{}.{:06}", pico_per_token / 1_000_000, pico_per_token % 1_000_000)
}
