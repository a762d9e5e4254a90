"""Request fields that all APIs share: base models, limits, sampling, stop strings, schemas."""

import json
import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, TypeVar

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator

from core.errors import RequestError, UnsupportedParameter
from core.types import JsonValue, SamplingParams, TokenRules
from core.units import format_bytes
from router.requests.limits import (
    MAX_BAD_WORD_CHARACTERS,
    MAX_BAD_WORDS,
    MAX_FIELDS_PER_OBJECT,
    MAX_INT32,
    MAX_LIST_LENGTHS,
    MAX_LOGIT_BIASES,
    MAX_LOGPROBS,
    MAX_N,
    MAX_SCHEMA_BYTES,
    MAX_SCHEMA_DEPTH,
    MAX_STOP_CHARACTERS,
    MAX_STOP_TOKENS,
    MAX_STOPS,
    too_many,
)
from router.requests.other_fields import ALREADY_SO, REFUSED
from router.requests.refused_values import REASONS

Effort: TypeAlias = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]

OPENAI_HINTS = frozenset(
    {
        "metadata",
        "store",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
    }
)

SEED_MODULUS = 2**64
# Larger floats have lost digits of the integer that was meant.
_EXACT_FLOAT = 2**53

JsonObject: TypeAlias = dict[str, Any]
Penalty: TypeAlias = Annotated[float, Field(ge=-2, le=2)]
# The tiers that choose a priority; any other name is ignored and reported.
KNOWN_TIERS = frozenset({"auto", "default", "flex", "priority", "scale"})
ServiceTier: TypeAlias = Annotated[str, Field(max_length=64)]


def whole_number(value: object) -> object:
    """Return a float without a fraction, such as 5.0, as an integer; anything else unchanged."""
    if type(value) is float and value.is_integer() and abs(value) <= _EXACT_FLOAT:
        return int(value)
    return value


def _none_if_false(value: object) -> object:
    """Return None for false, which some clients send to leave log-probabilities out."""
    return None if value is False else value


def _limit_or_none(value: object) -> object:
    """Return None for -1, which LM Studio and llama.cpp document as "no limit"."""
    value = whole_number(value)
    return None if type(value) is int and value == -1 else value


WholeNumber = BeforeValidator(whole_number)
NoLimit = BeforeValidator(_limit_or_none)
TokenCount: TypeAlias = Annotated[int, Field(ge=1, le=MAX_INT32), WholeNumber]
# How many alternatives are listed for each token; 0 lists the token itself.
LogprobCount: TypeAlias = Annotated[int, Field(ge=0, le=MAX_LOGPROBS), WholeNumber]
TokenLimit: TypeAlias = Annotated[TokenCount | None, NoLimit]
TokenId: TypeAlias = Annotated[int, Field(ge=0, le=MAX_INT32), WholeNumber]
BadWord: TypeAlias = Annotated[str, Field(min_length=1, max_length=MAX_BAD_WORD_CHARACTERS)]


Part = TypeVar("Part")


def _let_others_run(value: object) -> object:
    """Return `value`; between two items Python can switch to the event loop's thread."""
    return value


# A list whose validation stops at its first invalid item.
Items = Annotated[list[Annotated[Part, BeforeValidator(_let_others_run)]], Field(fail_fast=True)]


class RequestPart(BaseModel):
    """Base of all request models: no conversions, no NaN; unknown fields are kept for reporting."""

    model_config = ConfigDict(
        extra="allow",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,
        protected_namespaces=(),
    )


def unknown_fields(part: RequestPart, prefix: str) -> set[str]:
    """Return the names of a part's unknown fields as `messages.cache_control`."""
    return {f"{prefix}.{name}" for name in part.model_extra or ()}


def _without_default(schema: dict[str, Any]) -> None:
    """Leave out of a description a default that the schema itself does not allow."""
    del schema["default"]


class RequestBody(RequestPart):
    """Base of whole request bodies.

    `unsupported` maps the API's fields that are not supported here to the values that mean "off";
    `harmless` are fields that do not change the answer.
    """

    unsupported: ClassVar[Mapping[str, tuple[JsonValue, ...]]] = {}
    harmless: ClassVar[frozenset[str]] = frozenset()
    # Whether the answer is generated, so that fields of generation mean something.
    generates: ClassVar[bool] = True

    # Empty if the request names none; `RouteContext.model` then chooses.
    model: str = Field(default="", min_length=1, json_schema_extra=_without_default)
    user: str | None = None

    @classmethod
    def check_counts(cls, data: dict[str, Any]) -> None:
        """Raise RequestError for too many messages, parts, tools or fields, before validation."""
        todo: list[tuple[str, dict[str, Any]]] = [("", data)]
        while todo:
            prefix, part = todo.pop()
            if len(part) > MAX_FIELDS_PER_OBJECT:
                raise too_many(prefix.rstrip("."), len(part), "fields", MAX_FIELDS_PER_OBJECT)
            for name, limit in MAX_LIST_LENGTHS.items():
                items = part.get(name)
                if not isinstance(items, list) or not items or isinstance(items[0], int):
                    continue
                param = prefix + name
                if len(items) > limit:
                    raise too_many(param, len(items), "items", limit)
                todo += _objects(items, param)

    def refuse_unsupported(self) -> None:
        """Raise UnsupportedParameter for a known field that is not supported here."""
        for name, value in (self.model_extra or {}).items():
            off = self.off_values(name)
            if off is not None and value is not None:
                refuse_unless_off(name, value, off)

    def ignored_names(self) -> list[str]:
        """Return the unknown fields, in the order they were sent."""
        return [
            name
            for name, value in (self.model_extra or {}).items()
            if self.off_values(name) is None
            and name not in self.harmless
            and value not in ALREADY_SO.get(name, ())
        ]

    @classmethod
    def off_values(cls, name: str) -> tuple[JsonValue, ...] | None:
        """Return which values of an unread field mean "off"; None for a field not refused."""
        if name in cls.unsupported:
            return cls.unsupported[name]
        return REFUSED.get(name) if cls.generates else None


def _objects(items: list[Any], param: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for index, item in enumerate(items):
        if isinstance(item, dict):
            yield f"{param}[{index}].", item


def refuse_unless_off(name: str, value: JsonValue, off: tuple[JsonValue, ...]) -> None:
    """Raise UnsupportedParameter unless `value` is one of the values that mean "off"."""
    if value in off:
        return
    accepted = ", ".join(dict.fromkeys(json.dumps(choice) for choice in (None, *off)))
    reason = f": {REASONS[name]}" if name in REASONS else ""
    raise UnsupportedParameter(
        f"{name} is not supported{reason}; leave it out or send one of: {accepted}.", param=name
    )


def parse_stop(value: object) -> tuple[str, ...]:
    """Return the stop strings of null, a string or a list; raises ValueError."""
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError("must be a string or a list of strings")
    if len(stops) > MAX_STOPS:
        raise ValueError(f"has {len(stops)} stop strings; at most {MAX_STOPS} are accepted")
    if not all(1 <= len(stop) <= MAX_STOP_CHARACTERS for stop in stops):
        raise ValueError(f"each stop string must have 1 to {MAX_STOP_CHARACTERS} characters")
    return tuple(stops)


def parse_logit_bias(value: object) -> dict[int, float]:
    """Return token id → bias of null, an object, or llama.cpp's pairs; raises ValueError.

    A bias of false excludes the token, as in llama.cpp's server.
    """
    if value is None:
        return {}
    if not isinstance(value, dict | list) or len(value) > MAX_LOGIT_BIASES:
        raise ValueError(f"must be an object or a list of at most {MAX_LOGIT_BIASES} entries")
    biases: dict[int, float] = {}
    for entry in value.items() if isinstance(value, dict) else value:
        if not isinstance(entry, tuple | list) or len(entry) != 2:
            raise ValueError("its entries must be pairs of a token id and a bias")
        key, bias = entry
        key = str(key) if type(key) is int else key
        if not (isinstance(key, str) and key.isascii() and key.isdigit() and len(key) <= 10):
            raise ValueError("its keys must be token ids")
        if int(key) > MAX_INT32:
            raise ValueError("its keys must be token ids")
        if bias is not False and (type(bias) not in (int, float) or not -100 <= bias <= 100):
            raise ValueError("its values must be numbers from -100 to 100, or false")
        biases[int(key)] = -100.0 if bias is False else float(bias)
    return biases


def parse_inputs(value: object) -> tuple[str | tuple[int, ...], ...]:
    """Return the inputs of a string, strings, token ids or lists of them; raises ValueError."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value):
            return tuple(value)
        if _is_tokens(value):
            return (tuple(value),)
        if all(isinstance(item, list) and _is_tokens(item) for item in value):
            if not all(value):
                raise ValueError(f"the list at index {value.index([])} is empty; remove it")
            return tuple(tuple(item) for item in value)
    raise ValueError("must be a string, strings, token ids or lists of token ids, and not empty")


def _is_tokens(items: list[Any]) -> bool:
    return all(type(item) is int and 0 <= item <= MAX_INT32 for item in items)


def check_schema(schema: JsonValue, param: str) -> None:
    """Raise RequestError for a schema that is too deep, too large or not JSON."""
    level: list[JsonValue] = [schema]
    depth = size = 0
    while level:
        depth += 1
        if depth > MAX_SCHEMA_DEPTH + 1:
            raise RequestError(
                f"{param}: nested deeper than {MAX_SCHEMA_DEPTH} levels", param=param
            )
        children: list[JsonValue] = []
        for item in level:
            size += _own_bytes(item, param)
            if size > MAX_SCHEMA_BYTES:
                raise RequestError(
                    f"{param}: larger than {format_bytes(MAX_SCHEMA_BYTES)}", param=param
                )
            children += _children(item)
        level = children


def _own_bytes(item: JsonValue, param: str) -> int:
    """Return about how many bytes `item` takes as JSON, without what it contains."""
    match item:
        case str():
            return len(item) + 2 if item.isascii() else len(item.encode()) + 2
        case float():
            if not math.isfinite(item):
                raise RequestError(
                    f"{param}: contains a number that is infinite or NaN", param=param
                )
            return len(repr(item))
        case dict():
            return 2 + sum(len(name) + 5 for name in item)
        case list():
            return 2 + 2 * len(item)
        case int():
            return item.bit_length() * 3 // 10 + 2
    return 4


def _children(item: JsonValue) -> list[JsonValue]:
    if isinstance(item, dict):
        return list(item.values())
    return item if isinstance(item, list) else []


class StreamOptions(RequestPart):
    """Options of a stream."""

    include_usage: bool | None = None


class SamplingFields(RequestBody):
    """Sampling parameters and stop strings."""

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_INT32), WholeNumber] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=SEED_MODULUS), WholeNumber] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=2)] | None = Field(
        default=None, validation_alias=AliasChoices("repetition_penalty", "repeat_penalty")
    )
    logit_bias: Annotated[dict[int, float], PlainValidator(parse_logit_bias)] = Field(
        default_factory=dict
    )
    stop: Annotated[tuple[str, ...], PlainValidator(parse_stop)] = ()
    service_tier: ServiceTier | None = None

    def ignored_names(self) -> list[str]:
        """Also name a service tier that chooses nothing here."""
        names = super().ignored_names()
        if self.service_tier is not None and self.service_tier not in KNOWN_TIERS:
            names.append("service_tier")
        return names

    def sampling(
        self, *, top_logprobs: int | None, prompt_logprobs: int | None = None, index: int = 0
    ) -> SamplingParams:
        """Return the sampling of the choice `index`; choices after the first get other seeds."""
        seed = self.seed
        if seed is not None and seed + index >= SEED_MODULUS:
            seed -= SEED_MODULUS
        return SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k if self.top_k is None else max(self.top_k, 0),
            min_p=self.min_p,
            seed=None if seed is None else seed + index,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=self.repetition_penalty or 1.0,
            logit_bias=self.logit_bias,
            top_logprobs=top_logprobs,
            prompt_logprobs=prompt_logprobs,
        )


class GenerationFields(SamplingFields):
    """The fields that chat and completions have in common.

    `ignore_eos`, `min_tokens`, `stop_token_ids` and `bad_words` are vLLM's names, the first one
    llama.cpp's as well; `cache_prompt` and `timings_per_token` are llama.cpp's.
    """

    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MAX_INT32), WholeNumber] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKENS)] | None = None
    bad_words: Annotated[list[BadWord], Field(max_length=MAX_BAD_WORDS)] | None = None
    cache_prompt: bool | None = None
    timings_per_token: bool | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N), WholeNumber] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    prompt_logprobs: Annotated[LogprobCount | None, BeforeValidator(_none_if_false)] = None

    @property
    def includes_usage(self) -> bool:
        """Whether the stream ends with a usage chunk."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def token_limit(self) -> int | None:
        """The maximum of generated tokens, None without a limit."""
        return None

    def rules(self) -> TokenRules | None:
        """Return which tokens end the answer and which texts are not in it; None without any.

        Raises RequestError if the answer would have to be longer than its limit.
        """
        least, most = self.min_tokens or 0, self.token_limit
        if most is not None and least > most:
            raise RequestError(
                f"min_tokens: {least} is more than the limit of {most} tokens; lower it, or raise "
                "max_tokens",
                param="min_tokens",
            )
        rules = TokenRules(
            ignore_eos=bool(self.ignore_eos),
            min_tokens=least,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            bad_words=tuple(self.bad_words or ()),
        )
        return None if rules == TokenRules() else rules

    def refuse_unsupported(self) -> None:
        """Also refuse stream options where nothing is streamed, and what no stream has."""
        super().refuse_unsupported()
        if self.stream and self.prompt_logprobs is not None:
            raise UnsupportedParameter(
                "prompt_logprobs: not given in a stream; leave stream out",
                param="prompt_logprobs",
            )
        if self.stream_options is not None and not self.stream:
            raise RequestError(
                "stream_options: only allowed together with stream: true", param="stream_options"
            )
