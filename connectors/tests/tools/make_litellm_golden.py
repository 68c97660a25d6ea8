"""Asks LiteLLM what requests cost, for `tests/price_golden.rs`.

    python3 -m venv venv && venv/bin/pip install litellm==1.109.1
    venv/bin/python connectors/tests/tools/make_litellm_golden.py connectors/tests/golden

writes two files into the directory:

* `litellm_prices.json`: the price fields of the models asked for, numbers as they stand in LiteLLM's
  map, so that a test reads what the importer would read;
* `litellm_costs.json`: per model a list of [tier, counts, cost]: counts are those of meterr's meters,
  disjoint and in the order of `event::Meter`; cost is the float LiteLLM arrived at, as Python shows
  it, or null where it refused. Models none of whose token cases it can price are left out.

Which models: all of the SPEND-1 workload, then every n-th of each provider and of each group of
models that share the same set of price fields, so that rare fields are met. Everything is
deterministic; running it twice gives the same bytes.
"""

import hashlib
import json
import os
import random
import re
import sys
from datetime import datetime, timezone

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
os.environ["LITELLM_LOG"] = "ERROR"

import litellm  # noqa: E402
import litellm.litellm_core_utils.llm_cost_calc.utils as calc  # noqa: E402
from litellm.cost_calculator import cost_per_token  # noqa: E402
from litellm.litellm_core_utils.llm_cost_calc.tool_call_cost_tracking import (  # noqa: E402
    StandardBuiltInToolCostTracking,
)
from litellm.types.llms.openai import ResponsesAPIResponse  # noqa: E402
from litellm.types.utils import (  # noqa: E402
    CacheCreationTokenDetails,
    CompletionTokensDetailsWrapper,
    ImageObject,
    ImageResponse,
    PromptTokensDetailsWrapper,
    Usage,
)

VERSION = "1.109.1"
# A Tuesday, outside every off-peak window of the map: off-peak prices are not imported.
NOW = datetime(2026, 11, 24, 2, 0, tzinfo=timezone.utc)
calc.current_billing_time = lambda: NOW

SPEND_1 = [
    "gpt-4o", "gpt-4o-mini", "gpt-5", "gpt-5-mini", "gpt-4.1", "gpt-4.1-mini", "o3", "o4-mini",
    "claude-sonnet-4-5", "claude-haiku-4-5", "gemini/gemini-2.5-pro", "gemini/gemini-2.5-flash",
    "mistral/mistral-large-latest", "deepseek/deepseek-chat", "text-embedding-3-small",
    "text-embedding-3-large",
]  # fmt: skip
PER_GROUP = 2
PER_PROVIDER = 4

# LiteLLM's name of a provider when it routes a request, and the price book's.
ROUTE = {"bedrock_converse": "bedrock", "azure_text": "azure", "cohere_chat": "cohere_chat"}
BOOK = {
    "gemini": "google", "bedrock_converse": "bedrock", "text-completion-openai": "openai",
    "azure_text": "azure", "cohere_chat": "cohere", "text-completion-codestral": "codestral",
    "text-completion-inception": "inception", "fireworks_ai-embedding-models": "fireworks_ai",
}  # fmt: skip
MONEY = ("cost", "price", "pricing", "uplift", "multiplier", "billing", "free_requests")
TIERS = ["standard", "batch", "flex", "priority"]


def route(provider):
    if provider.startswith("vertex_ai"):
        return "vertex_ai"
    if provider == "fireworks_ai-embedding-models":
        return "fireworks_ai"
    return ROUTE.get(provider, provider)


def book(provider):
    return "vertex_ai" if provider.startswith("vertex_ai") else BOOK.get(provider, provider)


def without_provider(key, provider):
    prefix, slash, rest = key.partition("/")
    same = prefix in (provider, route(provider), book(provider), provider.replace("_", "-"))
    return rest if slash and same else key


def of_money(field):
    return any(part in field for part in MONEY)


def usage(m):
    fresh, read, write, write_1h, output, reasoning, audio_in, audio_out = m[:8]
    prompt = fresh + read + write + write_1h + audio_in
    completion = output + reasoning + audio_out
    details = {}
    if write or write_1h:
        details["cache_write_tokens"] = write + write_1h
        details["cache_creation_token_details"] = CacheCreationTokenDetails(
            ephemeral_5m_input_tokens=write, ephemeral_1h_input_tokens=write_1h
        )
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        prompt_tokens_details=PromptTokensDetailsWrapper(
            text_tokens=fresh, cached_tokens=read, audio_tokens=audio_in, **details
        ),
        completion_tokens_details=CompletionTokensDetailsWrapper(
            reasoning_tokens=reasoning or None, audio_tokens=audio_out or None
        ),
    )


def makes_images(key):
    fields = litellm.model_cost[key]
    return "output_cost_per_image" in fields or fields.get("mode") == "image_generation"


def cost(key, provider, tier, m):
    name, via = without_provider(key, provider), route(provider)
    try:
        if m[8] and not makes_images(key):
            details = PromptTokensDetailsWrapper(image_count=m[8])
            looked_at = Usage(prompt_tokens=0, completion_tokens=0, prompt_tokens_details=details)
            return sum(cost_per_token(model=name, custom_llm_provider=via, usage_object=looked_at))
        if m[8]:
            return calc.CostCalculatorUtils.route_image_generation_cost_calculator(
                model=name,
                custom_llm_provider=via,
                completion_response=ImageResponse(data=[ImageObject(url="x")] * m[8]),
                n=m[8],
                size="1024-x-1024",
            )
        if m[9] and via == "perplexity":
            details = PromptTokensDetailsWrapper(web_search_requests=m[9])
            asked = Usage(prompt_tokens=0, completion_tokens=0, prompt_tokens_details=details)
            return sum(cost_per_token(model=name, custom_llm_provider=via, usage_object=asked))
        if m[9]:
            # As both kinds of response tell it: a count in the usage, and one item a search.
            searches = PromptTokensDetailsWrapper(web_search_requests=m[9])
            asked = Usage(prompt_tokens_details=searches, server_tool_use={"web_search_requests": m[9]})
            item = {"type": "web_search_call", "id": "x", "status": "completed"}
            response = ResponsesAPIResponse(id="x", created_at=0, output=[item] * m[9])
            return StandardBuiltInToolCostTracking._handle_web_search_cost(
                model=name,
                custom_llm_provider=via,
                usage=asked,
                standard_built_in_tools_params={},
                response_object=response,
            )
        prompt, completion = cost_per_token(
            model=name,
            custom_llm_provider=via,
            usage_object=usage(m),
            prompt_tokens=usage(m).prompt_tokens,
            completion_tokens=usage(m).completion_tokens,
            call_type="retrieve_batch" if tier == "batch" else "completion",
            service_tier=tier if tier in ("flex", "priority") else None,
        )
        return prompt + completion
    except Exception as error:  # a refusal is a result too
        print(f"{key}: {type(error).__name__}: {str(error)[:100]}", file=sys.stderr)
        return None


def thresholds(fields):
    found = set()
    for field, value in fields.items():
        step = re.search(r"_above_(\d+)k_tokens", field)
        if step and value is not None:
            found.add(int(step.group(1)) * 1000)
    for tier in fields.get("tiered_pricing") or []:
        found.update(int(bound) for bound in tier.get("range", []) if 0 < bound < 1_000_000)
    return sorted(found)


def cases(key, fields):
    """Counts in the order of the meters: fresh, read, write, write 1h, output, reasoning, audio in,
    audio out, images, searches."""
    rng = random.Random(hashlib.sha256(key.encode()).digest())
    n = rng.randint
    audio = any("audio" in field for field in fields)
    reasoning = any("reasoning" in field for field in fields)
    caches = any("cache" in field for field in fields)

    def mix(total):
        """An input of exactly `total` tokens, with everything the model may have in it."""
        read, write = n(1, total // 3), n(1, total // 9)
        write_1h, audio_in = n(1, total // 9), n(1, total // 9) if audio else 0
        fresh = total - read - write - write_1h - audio_in
        return [fresh, read, write, write_1h, n(1, 9999), n(1, 9999), audio_in, audio and n(1, 999)]

    out = []
    steps = thresholds(fields)
    for tier in TIERS:
        suffix = {"batch": "_batches"}.get(tier, f"_{tier}")
        own = tier == "standard" or any(field.endswith(suffix) for field in fields)
        out.append((tier, [n(1, 9999), 0, 0, 0, n(1, 9999), 0, 0, 0]))
        if not own:
            continue
        if caches:
            out.append((tier, [n(1, 999), n(1, 9999), 0, 0, n(1, 999), 0, 0, 0]))
            out.append((tier, [n(1, 999), n(1, 999), n(1, 999), n(1, 999), n(1, 999), 0, 0, 0]))
        if reasoning or tier != "standard":
            out.append((tier, [n(1, 9999), 0, 0, 0, n(1, 999), n(1, 9999), 0, 0]))
        if audio:
            out.append((tier, [n(1, 9999), 0, 0, 0, n(1, 999), 0, n(1, 9999), n(1, 9999)]))
        out.append((tier, mix(n(1000, 30_000))))
        for step in steps:
            out.append((tier, mix(step)))
            out.append((tier, mix(step + 1)))
        if steps:
            out.append((tier, mix(n(900_000, 1_000_000))))
    out = [(tier, [int(count) for count in m] + [0, 0]) for tier, m in out]
    if "search_context_cost_per_query" in fields:
        out.append(("standard", [0] * 9 + [n(1, 20)]))
    if "output_cost_per_image" in fields or "input_cost_per_image" in fields:
        out.append(("standard", [0] * 8 + [n(1, 20), 0]))
    return out


def chosen(models):
    by_group, by_provider = {}, {}
    for key, fields in models.items():
        provider = fields.get("litellm_provider")
        priced = any(of_money(field) and "token" in field for field in fields)
        # LiteLLM logs in to Copilot before it says what a batch costs there.
        if key == "sample_spec" or provider in (None, "github_copilot") or not priced:
            continue
        group = frozenset(field for field in fields if of_money(field)), book(provider) == "openai"
        by_group.setdefault(group, []).append(key)
        by_provider.setdefault(book(provider), []).append(key)
    keys = set(SPEND_1)
    for groups, number in ((by_group, PER_GROUP), (by_provider, PER_PROVIDER)):
        for members in groups.values():
            members = sorted(members, key=lambda key: hashlib.sha256(key.encode()).digest())
            keys.update(members[:number])
    # A name with two keys is priced by the one with the provider's prefix.
    names = {}
    for key in sorted(keys):
        provider = models[key]["litellm_provider"]
        names.setdefault((book(provider), without_provider(key, provider)), []).append(key)
    for both in names.values():
        keys.difference_update(sorted(both, key=len)[:-1])
    for key in list(keys):
        if "/" not in key and f"{route(models[key]['litellm_provider'])}/{key}" in models:
            keys.discard(key)
    return sorted(keys)


def main(directory):
    path = os.path.join(os.path.dirname(litellm.__file__), "model_prices_and_context_window_backup.json")
    with open(path) as file:
        # Floats stay text, between marks that are taken away when the file is written.
        models = json.load(file, parse_float=lambda text: f"@@{text}@@")
    keep, golden = {}, []
    for key in chosen(models):
        fields = models[key]
        provider = fields["litellm_provider"]
        keep[key] = {
            field: value
            for field, value in fields.items()
            if of_money(field) or field in ("litellm_provider", "mode", "provider_specific_entry")
        }
        plain = json.loads(re.sub(r'"@@(.*?)@@"', r"\1", json.dumps(keep[key])))
        results = []
        for tier, m in cases(key, plain):
            result = cost(key, provider, tier, m)
            results.append([tier, m, None if result is None else repr(float(result))])
        if all(result is None for tier, m, result in results if not m[8] and not m[9] and tier != "batch"):
            del keep[key]
            continue
        golden.append(
            {"key": key, "provider": book(provider), "model": without_provider(key, provider), "cases": results}
        )
    text = json.dumps(keep, indent=0, sort_keys=True)
    write(directory, "litellm_prices.json", re.sub(r'"@@(.*?)@@"', r"\1", text))
    lines = [json.dumps(model, separators=(",", ":")) for model in golden]
    head = f'{{"litellm":"{VERSION}","billing_time":"{NOW:%Y-%m-%dT%H:%M:%SZ}","models":['
    write(directory, "litellm_costs.json", head + "\n" + ",\n".join(lines) + "\n]}")
    print(len(keep), "models,", sum(len(model["cases"]) for model in golden), "cases", file=sys.stderr)


def write(directory, name, text):
    with open(os.path.join(directory, name), "w") as file:
        file.write(text + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
