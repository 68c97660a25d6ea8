//! One name per provider.
//!
//! The price book is looked up by the provider's name exactly as the event has it, so both sides
//! must agree. Sources disagree: LiteLLM splits a provider by kind of model
//! (`vertex_ai-language-models`), OpenTelemetry qualifies names (`aws.bedrock`). This table maps
//! what they write to the names of the price book; every other name stands for itself.

use std::borrow::Cow;

/// The price book's name of a provider, for a name as LiteLLM or OpenTelemetry writes it.
pub fn provider_name(name: &str) -> &str {
    match name {
        // Gemini by Google's own API; by the cloud it has other prices and is `vertex_ai`.
        "gemini" | "gcp.gemini" | "gcp.gen_ai" => "google",
        "vertex_ai_beta" | "gcp.vertex_ai" => "vertex_ai",
        "bedrock_converse" | "aws.bedrock" => "bedrock",
        "text-completion-openai" => "openai",
        "azure_text" | "azure.ai.openai" | "az.ai.openai" => "azure",
        "azure.ai.inference" | "az.ai.inference" => "azure_ai",
        "cohere_chat" => "cohere",
        "text-completion-codestral" => "codestral",
        "text-completion-inception" => "inception",
        "fireworks_ai-embedding-models" => "fireworks_ai",
        "mistral_ai" => "mistral",
        "x_ai" => "xai",
        "ibm.watsonx.ai" => "watsonx",
        "moonshot_ai" => "moonshot",
        name if name.starts_with("vertex_ai-") => "vertex_ai",
        name => name,
    }
}

/// [`provider_name`] of a name at hand: borrowed stays borrowed, so that the decoders do not copy.
pub(crate) fn renamed(name: Cow<'_, str>) -> Cow<'_, str> {
    match name {
        Cow::Borrowed(name) => Cow::Borrowed(provider_name(name)),
        Cow::Owned(name) => match provider_name(&name) {
            ours if ours == name => Cow::Owned(name),
            ours => Cow::Owned(ours.to_owned()),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::{provider_name, renamed};

    #[test]
    fn known_spellings_meet_in_one_name_and_others_stand_for_themselves() {
        for (name, ours) in [
            ("gemini", "google"),
            ("google", "google"),
            ("vertex_ai-language-models", "vertex_ai"),
            ("vertex_ai", "vertex_ai"),
            ("aws.bedrock", "bedrock"),
            ("bedrock_converse", "bedrock"),
            ("bedrock_mantle", "bedrock_mantle"),
            ("openai", "openai"),
            ("our-own-gpu", "our-own-gpu"),
        ] {
            assert_eq!(provider_name(name), ours);
            assert_eq!(provider_name(ours), ours, "a name of ours is final");
            assert_eq!(renamed(name.into()), ours);
            assert_eq!(renamed(name.to_owned().into()), ours);
        }
    }
}
