//! Random numbers from a seed, for generated histories and workloads: the same seed gives the same
//! numbers on every machine and in every version. Not for secrets.
//!
//! The generator is SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number
//! generators", OOPSLA 2014), in the constants of `java.util.SplittableRandom`. Written out here
//! because golden files depend on its sequence, which a library may change with a major version.

/// A stream of random numbers.
#[derive(Debug, Clone)]
pub struct Rng(u64);

impl Rng {
    /// The stream of a seed.
    pub const fn new(seed: u64) -> Self {
        Rng(seed)
    }

    /// Stream `n` of a seed, independent of the other streams of that seed.
    pub fn stream(seed: u64, n: u64) -> Self {
        let origin = Rng::new(seed).bits();
        Rng::new(Rng::new(origin ^ n).bits())
    }

    /// 64 random bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number in `0..n`, or 0 when `n` is 0. The bias is below `n` in 2⁶⁴.
    pub fn below(&mut self, n: u64) -> u64 {
        ((u128::from(self.bits()) * u128::from(n)) >> 64) as u64
    }

    /// A number in `low..=high`, or `low` when there is none.
    pub fn between(&mut self, low: i64, high: i64) -> i64 {
        let width = u64::try_from(i128::from(high) - i128::from(low)).unwrap_or(0);
        low.wrapping_add_unsigned(self.below(width.saturating_add(1)))
    }

    /// True in `per_million` of a million cases.
    pub fn chance(&mut self, per_million: u32) -> bool {
        self.below(1_000_000) < u64::from(per_million)
    }

    /// True in `percent` of a hundred cases.
    pub fn percent(&mut self, percent: u32) -> bool {
        self.below(100) < u64::from(percent)
    }

    /// One of the choices.
    ///
    /// # Panics
    /// When there is none.
    pub fn pick<'a, T>(&mut self, choices: &'a [T]) -> &'a T {
        &choices[self.below(choices.len() as u64) as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sequence_is_the_published_one() {
        // First outputs for seed 1234567 as listed at Rosetta Code, "Pseudo-random numbers/
        // Splitmix64".
        let mut rng = Rng::new(1_234_567);
        assert_eq!(
            [rng.bits(), rng.bits(), rng.bits()],
            [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423]
        );
    }

    #[test]
    fn numbers_stay_in_range_and_reach_its_ends() {
        let mut rng = Rng::new(1);
        let mut seen = [false; 5];
        for _ in 0..200 {
            let n = rng.between(-2, 2);
            seen[usize::try_from(n + 2).unwrap()] = true;
        }
        assert_eq!(seen, [true; 5]);
        assert_eq!((rng.below(0), rng.between(7, 7), rng.between(7, 6)), (0, 7, 7));
        rng.between(i64::MIN, i64::MAX);
    }
}
