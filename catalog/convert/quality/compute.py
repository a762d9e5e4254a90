"""Computes the texts with one engine: a source's distributions, and a result's differences."""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from backends.abilities import GivesLogits, TokenCounting
from backends.base import Engine
from catalog.convert.quality.figure import (
    Difference,
    QualityFigure,
    difference,
    embedding_figure,
    language_figure,
    perplexity,
    position_of,
)
from catalog.convert.quality.kept import (
    KeptText,
    read_texts,
    read_vectors,
    write_texts,
    write_vectors,
)
from catalog.convert.quality.text import Text, lines_of
from core.errors import ImpetusError, UnsupportedCapability
from core.types import (
    GenerationEvent,
    GenerationRequest,
    SamplingParams,
    TextPrompt,
    TokenizeOptions,
    TokenPrompt,
)

# No tokenizer makes fewer tokens of a text than one of every 16 characters.
_CHARACTERS_PER_TOKEN = 16
_LEAST_TOKENS = 2
_EMBEDDED_TEXTS = 16
_EMBEDDED_CHARACTERS = 100


class _NoEvents:
    """Receives the events of a request, which has no answer."""

    def deliver(self, batch: Sequence[tuple[str, Sequence[GenerationEvent]]]) -> None:
        """Drop the events."""


async def keep_texts(engine: Engine, texts: Sequence[Text], most: int, path: Path) -> None:
    """Write a source's distributions on up to `most` tokens of all texts together.

    If it is cancelled, what is computed is written, and the cancellation has no further effect.
    Raises UnsupportedCapability, NonFiniteOutput, and what `Engine.generate` raises.
    """
    kept: list[KeptText] = []
    try:
        for ids in await _tokenized(engine, texts, most):
            text = KeptText(ids)
            kept.append(text)

            def keep(position: int, logits: NDArray[np.float32], text: KeptText = text) -> None:
                text.positions.append(position_of(logits, text.token_ids[position + 1]))

            await _read_logits(engine, ids, keep)
    except asyncio.CancelledError:
        pass
    await asyncio.to_thread(write_texts, path, kept)


async def compare_texts(
    engine: Engine, texts: Sequence[Text], most: int, path: Path | None
) -> QualityFigure:
    """Compare a result with its source's distributions in `path`; None: there are none.

    If it is cancelled, what is computed is used.  Raises as `keep_texts` does.
    """
    own = await _tokenized(engine, texts, most)
    kept = [KeptText(ids) for ids in own] if path is None else read_texts(path)
    reason = ""
    if path is not None and any(text.token_ids not in own for text in kept):
        reason = "Its tokenizer splits the text into other tokens than that of its source."
    expected: list[float] = []
    found: list[Difference] = []
    alone: list[float] = []
    try:
        for text in kept:
            expected += [each.next_logprob for each in text.positions]

            def compare(position: int, logits: NDArray[np.float32], text: KeptText = text) -> None:
                following = text.token_ids[position + 1]
                if not text.positions:
                    alone.append(position_of(logits, following, 1).next_logprob)
                elif position < len(text.positions):
                    found.append(difference(text.positions[position], logits, following))

            # The last token's logits are not asked for.
            count = len(text.positions) + 1 if text.positions else len(text.token_ids)
            await _read_logits(engine, text.token_ids[:count], compare)
    except asyncio.CancelledError:
        reason = reason or "The time for the measurement was over before all tokens were compared."
    if alone and not found:
        return QualityFigure(tokens=len(alone), perplexity_result=perplexity(list(alone)))
    if not found:
        raise UnsupportedCapability("no token was compared within the time for the measurement")
    return language_figure(expected, list(found), reason)


async def keep_vectors(engine: Engine, texts: Sequence[Text], path: Path) -> None:
    """Write a source's embeddings of lines of the texts.  Raises as `Engine.embed` does."""
    await asyncio.to_thread(write_vectors, path, await _vectors(engine, texts))


async def compare_vectors(
    engine: Engine, texts: Sequence[Text], path: Path | None
) -> QualityFigure:
    """Compare a result's embeddings with its source's.  Raises as `Engine.embed` does."""
    found = np.array(await _vectors(engine, texts), np.float32)
    if path is None:
        return QualityFigure(tokens=len(found))
    expected = read_vectors(path)
    if not len(found) or not len(expected):
        raise UnsupportedCapability("no text was embedded within the time for the measurement")
    if found.shape[1] != expected.shape[1]:
        raise UnsupportedCapability(
            f"its vectors have {found.shape[1]} dimensions, those of its source {expected.shape[1]}"
        )
    return embedding_figure(expected, found)


async def _vectors(engine: Engine, texts: Sequence[Text]) -> list[NDArray[np.float32]]:
    vectors: list[NDArray[np.float32]] = []
    try:
        for line in lines_of(texts, _EMBEDDED_TEXTS, _EMBEDDED_CHARACTERS):
            vectors.append((await engine.embed([line])).vectors[0])
    except asyncio.CancelledError:
        pass
    return vectors


async def _tokenized(engine: Engine, texts: Sequence[Text], most: int) -> list[tuple[int, ...]]:
    """Return each text's first tokens, as many of each, with those that begin a document."""
    if not isinstance(engine, TokenCounting):
        raise UnsupportedCapability(f"models of the format {engine.info.format} show no tokens")
    # One more than is compared: the last token only follows another.
    limit = min(max(most // len(texts), 1) + 1, engine.context_tokens - 1)
    found = []
    for each in texts:
        prompt = TextPrompt(each.text[: limit * _CHARACTERS_PER_TOKEN])
        tokenized = await engine.tokenize(prompt, TokenizeOptions(parse_special=False))
        if len(ids := tokenized.token_ids[:limit]) >= _LEAST_TOKENS:
            found.append(ids)
    return found


async def _read_logits(
    engine: Engine, ids: Sequence[int], on_logits: Callable[[int, NDArray[np.float32]], None]
) -> None:
    """Give the logits after each token but the last; what `on_logits` raises is raised here."""
    if not isinstance(engine, GivesLogits):
        raise UnsupportedCapability(f"models of the format {engine.info.format} show no logits")
    problems: list[Exception] = []

    def guarded(position: int, logits: NDArray[np.float32]) -> None:
        try:
            on_logits(position, logits)
        except Exception as problem:
            problems.append(problem)

    request = GenerationRequest(
        "quality",
        engine.info.name,
        TokenPrompt(tuple(ids)),
        sampling=SamplingParams(temperature=0.0, prompt_logprobs=0),
        max_tokens=0,
        reads_cache=False,
    )
    await engine.read_logits(request, _NoEvents(), guarded)
    if problems:
        problem = problems[0]
        if isinstance(problem, ImpetusError):
            raise problem
        raise UnsupportedCapability(f"its logits cannot be compared: {problem}") from problem
