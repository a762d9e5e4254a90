"""Checks the events of an engine before they are formatted: order, valid Unicode, sane numbers.

Formatters and metrics rely on it, so that no engine's fault can break an answer's JSON.
"""

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import TypeAlias, get_args

from core.errors import EngineFailed
from core.text import well_formed
from core.types import (
    CacheOutcome,
    Finished,
    FinishReason,
    GenerationEvent,
    MismatchKind,
    PrefillProgress,
    ReasoningDelta,
    TextDelta,
    Timing,
    ToolCallDelta,
    Usage,
)

TaggedEvent: TypeAlias = tuple[int, GenerationEvent]

_REASONS = frozenset(get_args(FinishReason))
_MISMATCHES = frozenset(get_args(MismatchKind))
# The largest integer that every JSON parser reads exactly.
_MAX_COUNT = 2**53 - 1
# Formatters multiply times; a year is longer than any request.
_MAX_SECONDS = 3.2e7


def valid_events(index: int, events: Iterable[GenerationEvent]) -> list[TaggedEvent]:
    """Return `events` of the choice `index`, up to its last.

    Lone surrogates, negative counts and non-finite times are replaced.  Raises EngineFailed for
    anything that is not an event.
    """
    valid: list[TaggedEvent] = []
    for event in events:
        # The common case first: it costs every token.
        if (
            type(event) is TextDelta
            and type(text := event.text) is str
            and type(event.logprobs) is tuple
            and (text.isascii() or well_formed(text) is text)
        ):
            valid.append((index, event))
            continue
        if (
            type(event) is ReasoningDelta
            and type(text := event.text) is str
            and (text.isascii() or well_formed(text) is text)
        ):
            valid.append((index, event))
            continue
        try:
            checked = _valid(event)
        except (TypeError, ValueError, AttributeError, OverflowError) as problem:
            raise _failed() from problem
        valid.append((index, checked))
        if isinstance(checked, Finished):
            break
    return valid


def _failed() -> EngineFailed:
    return EngineFailed("The engine sent an event that is not valid; send the request again.")


def _valid(event: GenerationEvent) -> GenerationEvent:
    match event:
        case TextDelta():
            return replace(
                event, text=well_formed(event.text or ""), logprobs=tuple(event.logprobs or ())
            )
        case ReasoningDelta():
            return replace(event, text=well_formed(event.text or ""))
        case ToolCallDelta():
            return replace(
                event,
                index=_count(event.index),
                id=_text_or_none(event.id),
                name=_text_or_none(event.name),
                arguments=well_formed(event.arguments or ""),
            )
        case PrefillProgress():
            return PrefillProgress(
                _count(event.done_tokens), _count(event.total_tokens), tuple(event.logprobs or ())
            )
        case Finished():
            return _valid_end(event)
    raise _failed()


def _valid_end(event: Finished) -> Finished:
    if event.reason not in _REASONS:
        raise _failed()
    usage, timing, cache = event.usage, event.timing, event.cache
    prompt_tokens = _count(usage.prompt_tokens)
    return Finished(
        event.reason,
        Usage(
            prompt_tokens,
            _count(usage.completion_tokens),
            min(_count(usage.cached_tokens), prompt_tokens),
            _count(usage.reasoning_tokens),
        ),
        Timing(
            queued_s=_seconds(timing.queued_s),
            prefill_s=_seconds(timing.prefill_s),
            decode_s=_seconds(timing.decode_s),
            load_s=_seconds(timing.load_s),
            throttled_s=_seconds(timing.throttled_s),
            evicted=tuple(map(well_formed, timing.evicted)),
            resumed=_count(timing.resumed),
        ),
        _text_or_none(event.stop),
        tuple(kind for kind in event.mismatches or () if kind in _MISMATCHES),
        None if cache is None else _valid_reuse(cache),
    )


def _valid_reuse(cache: CacheOutcome) -> CacheOutcome:
    return replace(
        cache,
        cells_tokens=_count(cache.cells_tokens),
        ram_tokens=_count(cache.ram_tokens),
        disk_tokens=_count(cache.disk_tokens),
    )


def _count(value: int) -> int:
    return max(0, min(int(value), _MAX_COUNT))


def _seconds(value: float) -> float:
    return min(max(value, 0.0), _MAX_SECONDS) if math.isfinite(value) else 0.0


def _text_or_none(text: str | None) -> str | None:
    return None if text is None else well_formed(text)
