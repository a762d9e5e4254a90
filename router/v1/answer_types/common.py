"""Types that answers of several APIs share: usage, times and log-probabilities."""

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict

exact = with_config(ConfigDict(extra="forbid"))


@exact
class PromptTokensDetails(TypedDict):
    """How many tokens of the prompt were computed before."""

    cached_tokens: int


@exact
class CompletionTokensDetails(TypedDict):
    """How many tokens of the answer are reasoning."""

    reasoning_tokens: int


@exact
class CompletionUsage(TypedDict):
    """The tokens of all choices together, each prompt counted once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


@exact
class PhaseTimes(TypedDict):
    """Milliseconds by phase, the models that were evicted, and how often the answer was resumed."""

    queued: float
    load: float
    prefill: float
    decode: float
    throttled: float
    evicted: list[str]
    resumed: int


@exact
class LlamaTimings(TypedDict):
    """The times as llama.cpp's server gives them."""

    cache_n: int
    prompt_n: int
    prompt_ms: float
    prompt_per_token_ms: float
    prompt_per_second: float
    predicted_n: int
    predicted_ms: float
    predicted_per_token_ms: float
    predicted_per_second: float


@exact
class AlternativeLogprob(TypedDict):
    """A token that could have come; `bytes` are its UTF-8 text."""

    token: str
    bytes: list[int]
    logprob: float


@exact
class TokenLogprob(TypedDict):
    """A token of an answer, with the likeliest ones at its place."""

    token: str
    bytes: list[int]
    logprob: float
    top_logprobs: list[AlternativeLogprob]


@exact
class PromptTokenLogprob(TypedDict):
    """A token of a prompt as vLLM shows it; `rank` is null beyond the known ones."""

    logprob: float
    rank: int | None
    decoded_token: str
