//! Usage as most formats state it (wholes and their parts), turned into disjoint meters.
//!
//! The one place where parts are taken out of their wholes: whatever a format calls things, its
//! reader fills a [`Usage`] whose `input` and `output` are wholes, and a token can then be billed
//! by one meter only.

use meterr_operators::event::{Meter, Meters, Rejection};

use super::json::bad_value;

/// Wholes and parts. Each count is at most `METER_MAX`, so sums of them fit.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct Usage {
    /// All input tokens.
    pub input: u32,
    /// Of them, read from a cache.
    pub cached: u32,
    /// Of them, written to the short cache.
    pub cache_write: u32,
    /// Of them, written to the one-hour cache.
    pub cache_write_1h: u32,
    /// Of them, audio.
    pub audio_input: u32,
    /// All output tokens.
    pub output: u32,
    /// Of them, reasoning.
    pub reasoning: u32,
    /// Of them, audio.
    pub audio_output: u32,
    /// Images, by piece.
    pub images: u32,
    /// Searches, by piece.
    pub searches: u32,
}

impl Usage {
    /// Disjoint meters.
    ///
    /// # Errors
    /// `bad_value` when parts add up to more than their whole.
    #[inline]
    pub(super) fn meters(&self) -> Result<Meters, Rejection> {
        let input_parts = u64::from(self.cached)
            + u64::from(self.cache_write)
            + u64::from(self.cache_write_1h)
            + u64::from(self.audio_input);
        let output_parts = u64::from(self.reasoning) + u64::from(self.audio_output);
        if input_parts > u64::from(self.input) {
            return Err(bad_value(format!(
                "cached, cache-write and audio tokens add up to {input_parts}, more than the {} \
                 input tokens they are parts of",
                self.input
            )));
        }
        if output_parts > u64::from(self.output) {
            return Err(bad_value(format!(
                "reasoning and audio tokens add up to {output_parts}, more than the {} output \
                 tokens they are parts of",
                self.output
            )));
        }
        let mut meters = Meters::default();
        // The parts fit `u32`, since each sum is at most its whole.
        meters[Meter::Input as usize] = self.input - input_parts as u32;
        meters[Meter::CacheRead as usize] = self.cached;
        meters[Meter::CacheWrite as usize] = self.cache_write;
        meters[Meter::CacheWrite1h as usize] = self.cache_write_1h;
        meters[Meter::Output as usize] = self.output - output_parts as u32;
        meters[Meter::Reasoning as usize] = self.reasoning;
        meters[Meter::AudioInput as usize] = self.audio_input;
        meters[Meter::AudioOutput as usize] = self.audio_output;
        meters[Meter::Images as usize] = self.images;
        meters[Meter::Searches as usize] = self.searches;
        Ok(meters)
    }

    /// Cuts audio to what other parts leave over. Providers count an audio token that was read from
    /// the cache under both names; it is billed as cached.
    pub(super) fn clamp_audio(&mut self) {
        let input_left = u64::from(self.input).saturating_sub(
            u64::from(self.cached) + u64::from(self.cache_write) + u64::from(self.cache_write_1h),
        );
        self.audio_input = u64::from(self.audio_input).min(input_left) as u32;
        self.audio_output = self.audio_output.min(self.output.saturating_sub(self.reasoning));
    }
}
