"""`timings` of an answer, in the form of llama.cpp's server.

Source: llama.cpp, tools/server/README.md, "timings".
"""

from collections.abc import Iterable

from core.types import JsonValue, Timing, Usage


def llama_timings(
    prompts: Iterable[Usage], answers: Iterable[Usage], timings: Iterable[Timing]
) -> dict[str, JsonValue]:
    """Return llama.cpp's `timings` of all choices together.

    `prompts` has each prompt once, `answers` each choice.  `prompt_n` tokens were computed,
    `cache_n` reused; of several choices, the longest time of each phase counts.  What cannot be
    divided is 0.
    """
    prompts, answers, timings = list(prompts), list(answers), list(timings)
    cached = sum(usage.cached_tokens for usage in prompts)
    computed = sum(usage.prompt_tokens for usage in prompts) - cached
    generated = sum(usage.completion_tokens for usage in answers)
    prefill_s = max((timing.prefill_s for timing in timings), default=0.0)
    decode_s = max((timing.decode_s for timing in timings), default=0.0)
    return {
        "cache_n": cached,
        **_phase("prompt", computed, prefill_s),
        **_phase("predicted", generated, decode_s),
    }


def _phase(name: str, tokens: int, seconds: float) -> dict[str, JsonValue]:
    milliseconds = seconds * 1000
    return {
        f"{name}_n": tokens,
        f"{name}_ms": round(milliseconds, 3),
        f"{name}_per_token_ms": round(milliseconds / tokens, 3) if tokens else 0.0,
        f"{name}_per_second": round(tokens / seconds, 3) if seconds > 0 else 0.0,
    }
