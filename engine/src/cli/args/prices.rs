//! Arguments of `meterr prices`.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use meterr_operators::event::Tier;
use meterr_operators::time::Time;

use super::ClientArgs;
use super::values::{date_or_time, org, tier};

/// `prices …`
#[derive(Debug, Clone, Subcommand)]
pub enum PricesCommand {
    /// Show the price book in force
    List(PricesListArgs),
    /// Take over a price book: ours (TOML or JSON) or LiteLLM's model price map
    Import(PricesImportArgs),
    /// Show what taking over a price book would change, without doing it
    Preview(PricesPreviewArgs),
    /// Set the price of one model
    Set(Box<PricesSetArgs>),
}

/// `prices list`
#[derive(Debug, Clone, Args)]
pub struct PricesListArgs {
    /// Only this model
    #[arg(long)]
    pub model: Option<String>,
    /// Where the server is.
    #[command(flatten)]
    pub client: ClientArgs,
}

/// `prices import`
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
Shows how the file differs from what is in force and what that does to spend, then asks. Only \
entries that differ are sent; prices the file does not mention stay. A price from an earlier date \
changes history: the usage concerned is priced anew.

Examples:
  meterr prices import config/price_book.toml
  meterr prices import model_prices_and_context_window.json --effective-from 2026-01-15
  meterr prices import prices.toml --yes")]
pub struct PricesImportArgs {
    /// The price book, or - for stdin
    #[arg(value_name = "FILE|-")]
    pub file: PathBuf,
    /// Date or RFC 3339 time from which entries hold that do not say so themselves
    #[arg(long, value_name = "DATE", value_parser = date_or_time)]
    pub effective_from: Option<Time>,
    /// Do not ask
    #[arg(long)]
    pub yes: bool,
    /// Where the server is.
    #[command(flatten)]
    pub client: ClientArgs,
}

/// `prices preview`
#[derive(Debug, Clone, Args)]
pub struct PricesPreviewArgs {
    /// The price book, or - for stdin
    #[arg(value_name = "FILE|-")]
    pub file: PathBuf,
    /// Date or RFC 3339 time from which entries hold that do not say so themselves
    #[arg(long, value_name = "DATE", value_parser = date_or_time)]
    pub effective_from: Option<Time>,
    /// Where the server is.
    #[command(flatten)]
    pub client: ClientArgs,
}

/// `prices set`
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
Prices are in USD per million tokens, of images and searches per piece. What is left out costs as \
a fall-back: cached input and cache writes as input, reasoning as output.

Examples:
  meterr prices set openai gpt-4o-mini --input 0.15 --cached-input 0.075 --output 0.60
  meterr prices set openai gpt-4o --input 2.50 --output 10 --effective-from 2026-01-15
  meterr prices set acme-llm big --input 1 --output 2 --org acme --yes")]
pub struct PricesSetArgs {
    /// Provider, as events name it
    pub provider: String,
    /// Model, as events name it
    pub model: String,
    /// Fresh input
    #[arg(long, value_name = "USD", help_heading = "Prices")]
    pub input: Option<String>,
    /// Input read from a cache
    #[arg(long, value_name = "USD", help_heading = "Prices")]
    pub cached_input: Option<String>,
    /// Input written to the short cache
    #[arg(long, value_name = "USD", help_heading = "Prices")]
    pub cache_write: Option<String>,
    /// Input written to the one-hour cache
    #[arg(long = "cache-write-1h", value_name = "USD", help_heading = "Prices")]
    pub cache_write_1h: Option<String>,
    /// Output
    #[arg(long, value_name = "USD", help_heading = "Prices")]
    pub output: Option<String>,
    /// Reasoning output
    #[arg(long, value_name = "USD", help_heading = "Prices")]
    pub reasoning: Option<String>,
    /// Audio input
    #[arg(long, value_name = "USD", help_heading = "Prices")]
    pub audio_input: Option<String>,
    /// Audio output
    #[arg(long, value_name = "USD", help_heading = "Prices")]
    pub audio_output: Option<String>,
    /// One image
    #[arg(long, value_name = "USD", help_heading = "Prices")]
    pub image: Option<String>,
    /// One search
    #[arg(long, value_name = "USD", help_heading = "Prices")]
    pub search: Option<String>,
    /// End the price instead: usage from then on is unpriced, or falls back
    #[arg(long, conflicts_with_all = [
        "input", "cached_input", "cache_write", "cache_write_1h", "output", "reasoning",
        "audio_input", "audio_output", "image", "search",
    ])]
    pub withdraw: bool,
    /// Date or RFC 3339 time from which it holds [default: from the beginning]
    #[arg(long, value_name = "DATE", value_parser = date_or_time)]
    pub effective_from: Option<Time>,
    /// Service tier: standard, batch, flex or priority
    #[arg(long, default_value = "standard", value_parser = tier)]
    pub tier: Tier,
    /// Only for requests with more input tokens than this
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub min_input_tokens: u64,
    /// Only for this org
    #[arg(long, value_parser = org)]
    pub org: Option<String>,
    /// Do not ask
    #[arg(long)]
    pub yes: bool,
    /// Where the server is.
    #[command(flatten)]
    pub client: ClientArgs,
}
