//! Values of arguments: each read strictly, with an error that says what would be right.

use meterr_operators::event::{ALL_REASONS, ALL_TIERS, Reason, Tier};
use meterr_operators::ids::{Positions, org_valid};
use meterr_operators::time::Time;

use crate::backup::cut::Until;
use crate::copy::Location;

/// A server: scheme, host and port, nothing else.
pub(super) fn base_url(text: &str) -> Result<String, String> {
    let rest = match text.split_once("://") {
        Some(("http", rest)) => rest,
        Some(("https", _)) => {
            return Err("only http is spoken; put a proxy that does TLS in between".to_owned());
        }
        _ => return Err("must begin with http://, such as http://127.0.0.1:8080".to_owned()),
    };
    let rest = rest.trim_end_matches('/');
    let host_only = !rest.is_empty()
        && !rest.contains(['/', '?', '#', '@'])
        && !rest.chars().any(|c| c.is_whitespace() || c.is_control());
    match host_only {
        true => Ok(format!("http://{rest}")),
        false => Err("must be a host and port only, such as http://127.0.0.1:8080".to_owned()),
    }
}

pub(super) fn location(text: &str) -> Result<Location, &'static str> {
    text.parse()
}

pub(super) fn until(text: &str) -> Result<Until, &'static str> {
    text.parse()
}

pub(super) fn org(text: &str) -> Result<String, &'static str> {
    match org_valid(text) {
        true => Ok(text.to_owned()),
        false => Err("an org is 1 to 128 characters of A-Z, a-z, 0-9, '_' and '-'"),
    }
}

pub(super) fn group_by(text: &str) -> Result<String, &'static str> {
    let known = matches!(text, "none" | "user" | "model" | "provider" | "feature")
        || text.strip_prefix("tag:").is_some_and(|tag| !tag.is_empty());
    match known {
        true => Ok(text.to_owned()),
        false => Err("must be none, user, model, provider, feature or tag:NAME"),
    }
}

pub(super) fn position(text: &str) -> Result<Positions, &'static str> {
    text.parse()
}

/// A date (its beginning in UTC) or an RFC 3339 time.
pub(super) fn date_or_time(text: &str) -> Result<Time, String> {
    let time = match text.len() {
        10 => Time::parse(&format!("{text}T00:00:00Z")),
        _ => Time::parse(text),
    };
    time.map_err(|what| format!("{what}, or a date such as 2026-01-02"))
}

pub(super) fn tier(text: &str) -> Result<Tier, String> {
    Tier::by_name(text)
        .ok_or_else(|| format!("must be one of {}", ALL_TIERS.map(Tier::name).join(", ")))
}

pub(super) fn reason(text: &str) -> Result<Reason, String> {
    ALL_REASONS
        .into_iter()
        .find(|reason| reason.name() == text)
        .ok_or_else(|| format!("must be one of {}", ALL_REASONS.map(Reason::name).join(", ")))
}

pub(super) fn speed(text: &str) -> Result<f64, &'static str> {
    match text.parse::<f64>() {
        Ok(speed) if (0.0..=1e9).contains(&speed) => Ok(speed),
        _ => Err("must be a number from 0 to 1000000000"),
    }
}

pub(super) fn zipf(text: &str) -> Result<f64, &'static str> {
    match text.parse::<f64>() {
        Ok(exponent) if (0.0..=4.0).contains(&exponent) => Ok(exponent),
        _ => Err("must be a number from 0 to 4"),
    }
}

/// Percent as parts per million.
pub(super) fn per_million(text: &str) -> Result<u32, &'static str> {
    match text.trim_end_matches('%').parse::<f64>() {
        Ok(percent) if (0.0..=100.0).contains(&percent) => Ok((percent * 10_000.0).round() as u32),
        _ => Err("must be a percentage from 0 to 100"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_mean_what_they_say() {
        assert_eq!(per_million("0.1%").unwrap(), 1_000);
        assert_eq!(per_million("100").unwrap(), 1_000_000);
        assert_eq!(date_or_time("2026-01-02").unwrap().to_string(), "2026-01-02T00:00:00Z");
        assert_eq!(base_url("http://[::1]:8080/").unwrap(), "http://[::1]:8080");
    }
}
