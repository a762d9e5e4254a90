"""Types of the answers about texts: completions, embeddings, relevance and tokens."""

from typing import Literal, NotRequired

from typing_extensions import TypedDict

from router.v1.answer_types.common import (
    CompletionUsage,
    LlamaTimings,
    PhaseTimes,
    PromptTokenLogprob,
    exact,
)


@exact
class CompletionLogprobs(TypedDict):
    """The log-probabilities of a text, a column each; null for the first token of a prompt."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


@exact
class CompletionChoice(TypedDict):
    """A continuation, or a piece of it; `finish_reason` is null before its end."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    prompt_logprobs: NotRequired[list[dict[str, PromptTokenLogprob] | None]]


@exact
class CompletionAnswer(TypedDict):
    """A whole answer; `timings` are sent if the request asks for them."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: CompletionUsage
    timings: NotRequired[LlamaTimings]


@exact
class CompletionChunk(TypedDict):
    """The data of an event of a streamed answer, which ends with `[DONE]`.

    With `stream_options.include_usage` the last chunk has no choices, but usage and timing.
    """

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: NotRequired[CompletionUsage | None]
    timing: NotRequired[PhaseTimes]
    timings: NotRequired[LlamaTimings]


@exact
class InputUsage(TypedDict):
    """The tokens of all inputs; `truncated_tokens` were left out of inputs that were too long."""

    prompt_tokens: int
    total_tokens: int
    truncated_tokens: int


@exact
class EmbeddingVector(TypedDict):
    """The vector of an input; as base64 it is little-endian float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


@exact
class EmbeddingsAnswer(TypedDict):
    """One vector for each input, in order."""

    object: Literal["list"]
    data: list[EmbeddingVector]
    model: str
    usage: InputUsage


@exact
class RankedText(TypedDict):
    """A document's text."""

    text: str


@exact
class RankedDocument(TypedDict):
    """A document by its index in the request, with its text if the request asks for it."""

    index: int
    relevance_score: float
    document: NotRequired[RankedText]


@exact
class ApiVersion(TypedDict):
    """The version of Cohere's API that was called."""

    version: Literal["1", "2"]


@exact
class BilledUnits(TypedDict):
    """What Cohere's service would bill."""

    search_units: int


@exact
class RerankTokens(TypedDict):
    """The tokens that were computed."""

    input_tokens: int
    output_tokens: int


@exact
class RerankMeta(TypedDict):
    """The usage as Cohere's API gives it."""

    api_version: ApiVersion
    billed_units: BilledUnits
    tokens: RerankTokens


@exact
class RerankAnswer(TypedDict):
    """The documents, the most relevant one first."""

    id: str
    object: Literal["list"]
    model: str
    results: list[RankedDocument]
    usage: InputUsage
    meta: RerankMeta


@exact
class TokenPiece(TypedDict):
    """A token and its text, or its bytes if they are not a text."""

    id: int
    piece: str | list[int]


@exact
class TokensAnswer(TypedDict):
    """The tokens of a text or a conversation."""

    tokens: list[int] | list[TokenPiece]
    count: int
    max_model_len: int
    token_strs: list[str] | None


@exact
class DetokenizedAnswer(TypedDict):
    """The text of tokens, as llama.cpp and as vLLM name it."""

    content: str
    prompt: str


@exact
class TemplateAnswer(TypedDict):
    """The text that a conversation becomes."""

    prompt: str
