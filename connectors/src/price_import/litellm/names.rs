//! What a model of the map is called in events.
//!
//! The provider is `litellm_provider` by [`provider_name`]. The model is the key without a leading
//! `<provider>/`, in any of the provider's spellings: `gemini/gemini-2.5-pro` is model
//! `gemini-2.5-pro` of provider `google`, `azure/eu/gpt-4o` is model `eu/gpt-4o` of `azure` (a
//! region has its own price, so it stays part of the name), `fireworks_ai/accounts/…` keeps the path
//! its API uses.

use crate::price_import::provider_name;

/// Provider and model of a key.
pub(super) fn name<'a>(key: &'a str, litellm_provider: &'a str) -> (&'a str, &'a str) {
    let provider = provider_name(litellm_provider);
    if let Some((prefix, model)) = key.split_once('/') {
        // `amazon_nova` writes its keys with a hyphen.
        let same = prefix == litellm_provider
            || provider_name(prefix) == provider
            || prefix.replace('-', "_") == litellm_provider;
        if same && !model.is_empty() {
            return (provider, model);
        }
    }
    (provider, key)
}

#[cfg(test)]
mod tests {
    use super::name;

    #[test]
    fn a_leading_provider_is_no_part_of_the_model() {
        for (key, provider, expected) in [
            ("gpt-4o", "openai", ("openai", "gpt-4o")),
            ("gemini/gemini-2.5-pro", "gemini", ("google", "gemini-2.5-pro")),
            ("gemini-2.5-pro", "vertex_ai-language-models", ("vertex_ai", "gemini-2.5-pro")),
            (
                "vertex_ai/claude-opus-4",
                "vertex_ai-anthropic_models",
                ("vertex_ai", "claude-opus-4"),
            ),
            ("azure/eu/gpt-4o", "azure", ("azure", "eu/gpt-4o")),
            ("bedrock/us-east-1/claude", "bedrock", ("bedrock", "us-east-1/claude")),
            ("amazon-nova/nova-lite-v1", "amazon_nova", ("amazon_nova", "nova-lite-v1")),
            ("high/1024-x-1024/gpt-image-1", "openai", ("openai", "high/1024-x-1024/gpt-image-1")),
            ("openrouter/openai/gpt-4o", "openrouter", ("openrouter", "openai/gpt-4o")),
            ("groq/", "groq", ("groq", "groq/")),
        ] {
            assert_eq!(name(key, provider), expected, "{key}");
        }
    }
}
