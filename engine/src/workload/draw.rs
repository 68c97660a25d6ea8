//! What workloads are drawn from: Zipf's law, a real trace of token counts, sixteen models with
//! their prices.
//!
//! Everything is the same on every machine: weights are integers, and the powers they come from use
//! only operations that IEEE 754 rounds exactly (`powf` may differ from one libm to the next).

use meterr_operators::rng::Rng;

/// A model and its prices in pico-dollars a token.
#[derive(Debug, Clone, Copy)]
pub(super) struct Model {
    pub(super) provider: &'static str,
    pub(super) name: &'static str,
    pub(super) input: u64,
    pub(super) cached_input: u64,
    pub(super) output: u64,
}

const fn model(
    provider: &'static str,
    name: &'static str,
    input: u64,
    cached_input: u64,
    output: u64,
) -> Model {
    Model { provider, name, input, cached_input, output }
}

/// The models, most used first. List prices of November 2025 as gathered by LiteLLM
/// (`model_prices_and_context_window.json`, MIT licence).
pub(super) const MODELS: [Model; 16] = [
    model("openai", "gpt-4o", 2_500_000, 1_250_000, 10_000_000),
    model("openai", "gpt-4o-mini", 150_000, 75_000, 600_000),
    model("openai", "gpt-5", 1_250_000, 125_000, 10_000_000),
    model("openai", "gpt-5-mini", 250_000, 25_000, 2_000_000),
    model("openai", "gpt-4.1", 2_000_000, 500_000, 8_000_000),
    model("openai", "gpt-4.1-mini", 400_000, 100_000, 1_600_000),
    model("openai", "o3", 2_000_000, 500_000, 8_000_000),
    model("openai", "o4-mini", 1_100_000, 275_000, 4_400_000),
    model("anthropic", "claude-sonnet-4-5", 3_000_000, 300_000, 15_000_000),
    model("anthropic", "claude-haiku-4-5", 1_000_000, 100_000, 5_000_000),
    model("google", "gemini-2.5-pro", 1_250_000, 125_000, 10_000_000),
    model("google", "gemini-2.5-flash", 300_000, 30_000, 2_500_000),
    model("mistral", "mistral-large-latest", 500_000, 50_000, 1_500_000),
    model("deepseek", "deepseek-chat", 280_000, 28_000, 420_000),
    model("openai", "text-embedding-3-small", 20_000, 20_000, 0),
    model("openai", "text-embedding-3-large", 130_000, 130_000, 0),
];

/// Features.
pub(super) const FEATURES: [&str; 5] = ["agent", "chat", "embed", "search", "summarize"];

/// Zipf's law: item `k` (from 0) has weight 1 / (k + 1)^exponent.
pub(super) struct Zipf {
    /// Sum of the weights up to and with item `k`.
    cumulative: Vec<u64>,
}

impl Zipf {
    /// `n` items, at least one.
    pub(super) fn new(n: u32, exponent: f64) -> Zipf {
        const SCALE: f64 = (1_u64 << 40) as f64;
        let mut sum = 0;
        let weight = |k: u32| ((SCALE / power(f64::from(k), exponent)) as u64).max(1);
        let cumulative = (1..=n.max(1))
            .map(|k| {
                sum += weight(k);
                sum
            })
            .collect();
        Zipf { cumulative }
    }

    /// An item.
    pub(super) fn draw(&self, rng: &mut Rng) -> u32 {
        self.draw_among(rng, self.cumulative.len() as u32)
    }

    /// One of the first `n` items, by the same law.
    pub(super) fn draw_among(&self, rng: &mut Rng, n: u32) -> u32 {
        let among = &self.cumulative[..(n as usize).clamp(1, self.cumulative.len())];
        let total = among[among.len() - 1];
        let at = rng.below(total);
        among.partition_point(|sum| *sum <= at) as u32
    }

    /// The share of item `k` in `of`, rounded down.
    pub(super) fn share(&self, k: u32, of: u32) -> u32 {
        let at = k as usize;
        let before = if at == 0 { 0 } else { self.cumulative[at - 1] };
        let weight = u128::from(self.cumulative[at] - before);
        let total = u128::from(self.cumulative[self.cumulative.len() - 1]);
        (weight * u128::from(of) / total) as u32
    }
}

/// `base` to the power of `exponent` ≥ 0, to 20 binary digits of the exponent.
fn power(base: f64, exponent: f64) -> f64 {
    let mut result = 1.0;
    for _ in 0..exponent as u32 {
        result *= base;
    }
    let (mut rest, mut root) = (exponent.fract(), base);
    for _ in 0..20 {
        root = root.sqrt();
        rest *= 2.0;
        if rest >= 1.0 {
            rest -= 1.0;
            result *= root;
        }
    }
    result
}

/// Context and generated tokens of 19,366 real requests to a chat service: the Azure Public
/// Dataset's `AzureLLMInferenceTrace_conv`, CC-BY 4.0; Patel et al., "Splitwise: Efficient
/// generative LLM inference using phase splitting", ISCA 2024.
pub(super) fn trace() -> Vec<(u32, u32)> {
    const TRACE: &str = include_str!("../../../examples/data/azure_llm_conv_2023.csv");
    let mut requests = Vec::new();
    for line in TRACE.lines() {
        let mut fields = line.trim().rsplit(',');
        let output = fields.next().and_then(|tokens| tokens.parse().ok());
        let input = fields.next().and_then(|tokens| tokens.parse().ok());
        // The heading has no numbers.
        if let (Some(input), Some(output)) = (input, output) {
            requests.push((input, output));
        }
    }
    requests
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_trace_is_read_whole() {
        let trace = trace();
        assert_eq!((trace.len(), trace[0], trace[3]), (19_366, (374, 44), (91, 16)));
        // What `Sums` in `expected.rs` relies on.
        let cost = |m: &Model, (input, output): (u32, u32)| {
            u64::from(input) * m.input.max(m.cached_input) + u64::from(output) * m.output
        };
        let costs = trace.iter().flat_map(|tokens| MODELS.iter().map(|m| cost(m, *tokens)));
        let most = costs.max().unwrap();
        assert!(most < 50_000_000_000, "{most}");
        assert!(most.checked_mul(super::super::EVENTS_MAX).is_some(), "{most}");
    }

    #[test]
    fn powers_are_close_to_the_true_ones() {
        for (base, exponent) in [(2.0, 0.5), (1000.0, 1.1), (7.0, 0.8), (3.0, 2.0), (5.0, 0.0)] {
            let (got, want) = (power(base, exponent), f64::powf(base, exponent));
            assert!((got / want - 1.0).abs() < 1e-4, "{base}^{exponent}: {got}, {want}");
        }
    }

    #[test]
    fn zipf_follows_its_law() {
        let zipf = Zipf::new(4, 1.0);
        let mut rng = Rng::new(1);
        let mut counts = [0_u32; 4];
        for _ in 0..25_000 {
            counts[zipf.draw(&mut rng) as usize] += 1;
        }
        // Weights 12 : 6 : 4 : 3, thus 12,000, 6,000, 4,000 and 3,000 of 25,000.
        for (count, want) in counts.into_iter().zip([12_000, 6_000, 4_000, 3_000]) {
            assert!(count.abs_diff(want) < 400, "{counts:?}");
        }
        // Rounded down, the weights too.
        for (k, want) in (0..4).zip([1_200, 600, 400, 300]) {
            assert!((want - 1..=want).contains(&zipf.share(k, 2_500)), "{k}");
        }
        assert!((0..1_000).all(|_| zipf.draw_among(&mut rng, 2) < 2));
    }
}
