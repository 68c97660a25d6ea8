//! The bytes of a refused line, as a dead letter keeps them.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

/// Most bytes of a line a dead letter keeps: 64 KiB.
pub const RAW_LEN_MAX: usize = 64 * 1024;

/// The line as text where it is UTF-8, else in base64; and whether it was longer than
/// [`RAW_LEN_MAX`] and is cut. Exactly one of the two is there.
pub fn raw_text(raw: &[u8]) -> (Option<String>, Option<String>, bool) {
    let truncated = raw.len() > RAW_LEN_MAX;
    let kept = &raw[..raw.len().min(RAW_LEN_MAX)];
    match std::str::from_utf8(kept) {
        Ok(text) => (Some(text.to_owned()), None, truncated),
        // Only the cut made it no UTF-8: up to three bytes of a last character are left.
        Err(error) if truncated && error.error_len().is_none() => {
            let text = String::from_utf8_lossy(&kept[..error.valid_up_to()]).into_owned();
            (Some(text), None, truncated)
        }
        Err(_) => (None, Some(STANDARD.encode(kept)), truncated),
    }
}
