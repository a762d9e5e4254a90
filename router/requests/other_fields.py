"""Fields of other servers' APIs that change what an answer means and are not honoured here.

One table for all APIs: where an API reads such a field itself, its own reading applies.
Sources: vLLM's SamplingParams and OpenAI-compatible server, llama.cpp's server README, SGLang's
sampling parameters, Hugging Face's TGI.
"""

from collections.abc import Mapping

from core.types import JsonValue

# Each field with the values that mean "off", which are accepted.
REFUSED: Mapping[str, tuple[JsonValue, ...]] = {
    "add_generation_prompt": (True,),
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "continue_final_message": (False,),
    "documents": ([],),
    "ebnf": ("",),
    "echo": (False,),
    "format": ("",),
    "grammar": ("",),
    "grammar_lazy": (False,),
    "guided_choice": ([],),
    "guided_grammar": ("",),
    "guided_json": (),
    "guided_regex": ("",),
    "guided_structural_tag": (),
    "ignore_eos": (False,),
    "include_stop_str_in_output": (False,),
    "json_schema": (),
    "logits_processors": ([],),
    "min_tokens": (0,),
    "n": (1,),
    "prompt_logprobs": (False,),
    "regex": ("",),
    "response_format": ({"type": "text"},),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "stop": ([],),
    "stop_sequences": ([],),
    "stop_token_ids": ([],),
    "structural_tag": (),
    "structured_outputs": ({},),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
}

# What happens in any case: named by clients, and neither refused nor called ignored.
ALREADY_SO: Mapping[str, tuple[JsonValue, ...]] = {
    "background": (False,),
    "cache_prompt": (True,),
}

# What OpenAI and Anthropic document and no local server has: their audio, caches, billing, agents.
_DOCUMENTED_HINTS = (
    "access_programs", "audio", "background", "background_options", "betas", "billing_policy",
    "container", "context_management", "diagnostics", "fallback_credit_token", "fallbacks", "image",
    "mcp_servers", "personality", "prediction", "speed", "user_profile_id", "verbosity",
    "web_search_options", "workspace_id",
)  # fmt: skip
# Hints that are known to be sent to every server; like unknown fields they are ignored and named.
HINTS = (
    *_DOCUMENTED_HINTS,
    "cache_prompt", "dry_multiplier", "guided_decoding_backend", "id_slot", "mirostat",
    "provider", "timings_per_token", "transforms", "typical_p", "xtc_probability",
)  # fmt: skip
