//! Makes `config/price_book.toml`, the book that ships, from LiteLLM's price map: the providers most
//! requests go to, without the regional and per-size variants that only few events name.
//!
//! `cargo run -p meterr-connectors --example price_book -- model_prices.json 2026-11-24 1.109.1`
//! writes the book to standard output and what was not carried over to standard error.

use meterr_connectors::price_import::{litellm, write_toml};
use meterr_operators::price_book::PriceEntry;

/// Providers of the book that ships.
const PROVIDERS: [&str; 14] = [
    "anthropic",
    "azure",
    "bedrock",
    "cerebras",
    "cohere",
    "dashscope",
    "deepseek",
    "google",
    "groq",
    "mistral",
    "openai",
    "vertex_ai",
    "voyage",
    "xai",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let (Some(path), Some(date), Some(version)) = (args.next(), args.next(), args.next()) else {
        return Err("usage: price_book MODEL_PRICES.json DATE LITELLM_VERSION".into());
    };
    let import = litellm::import(&std::fs::read(path)?, None)?;
    for (field, unmapped) in &import.unmapped {
        eprintln!("not carried over: {field} ({}; {:?})", unmapped.models, unmapped.examples);
    }
    for skipped in &import.skipped {
        eprintln!("skipped {}: {}", skipped.key, skipped.reason);
    }
    for rounded in &import.rounded {
        eprintln!("rounded {} {}: {}", rounded.key, rounded.field, rounded.text);
    }
    eprintln!("{} entries in all", import.entries.len());
    let mut entries = import.entries;
    // A slash in a name is a region or an image size, but part of the name at Groq and Vertex AI.
    let variant = |entry: &PriceEntry| {
        entry.model.contains('/') && !matches!(entry.provider.as_str(), "groq" | "vertex_ai")
    };
    entries.retain(|entry| PROVIDERS.contains(&entry.provider.as_str()) && !variant(entry));
    eprintln!("{} entries in the book", entries.len());
    let header = format!(
        "Price book of {date}: prices in USD per million tokens (image and search: per piece).\n\
         It seeds a new deployment and is not read again; change prices by `meterr prices`.\n\
         Entries have no effective_from, so history is priced too. Field rules: config/PRICES.md.\n\
         \n\
         Made by `cargo run -p meterr-connectors --example price_book` from\n\
         model_prices_and_context_window.json of LiteLLM {version}, which is under the MIT licence:\n\
         \n\
         MIT License, Copyright (c) 2023 Berri AI\n\
         Permission is hereby granted, free of charge, to any person obtaining a copy of this\n\
         software and associated documentation files (the \"Software\"), to deal in the Software\n\
         without restriction, including without limitation the rights to use, copy, modify, merge,\n\
         publish, distribute, sublicense, and/or sell copies of the Software, and to permit persons\n\
         to whom the Software is furnished to do so, subject to the following conditions:\n\
         The above copyright notice and this permission notice shall be included in all copies or\n\
         substantial portions of the Software.\n\
         THE SOFTWARE IS PROVIDED \"AS IS\", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED,\n\
         INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR\n\
         PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE\n\
         FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR\n\
         OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER\n\
         DEALINGS IN THE SOFTWARE."
    );
    print!("{}", write_toml(&entries, &header)?);
    Ok(())
}
