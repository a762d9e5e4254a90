"""Engines hold the accelerator's lock during each forward pass and at no other time."""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from backends.base import EngineLoad
from backends.echo import echo_info
from backends.embedding.batch import BatchLimits
from backends.embedding.engine import EmbeddingEngine
from backends.engine.accelerator_lock import SharesAccelerator
from backends.engine.batching import BatchingEngine
from backends.stepper import SequenceSpec, StepOutput
from core.errors import EngineFailed
from tests.requests import request, run, text_of
from tests.unit.backends.engine.test_batching import FakeStepper, open_engine


class FakeLock:
    """Counts how often it was held, and knows whether it is held now."""

    def __init__(self) -> None:
        self.count = 0
        self.is_held = False

    @contextmanager
    def hold(self) -> Iterator[None]:
        self.count += 1
        self.is_held = True
        try:
            yield
        finally:
            self.is_held = False


class WatchedStepper(FakeStepper):
    """Remembers during which calls the lock was held."""

    def __init__(self, lock: FakeLock) -> None:
        super().__init__()
        self.lock = lock
        self.held: set[str] = set()
        self.free: set[str] = set()

    def note(self, call: str) -> None:
        (self.held if self.lock.is_held else self.free).add(call)

    def add(self, spec: SequenceSpec) -> None:
        self.note("add")
        super().add(spec)

    def remove(self, sequence_id: int) -> None:
        self.note("remove")
        super().remove(sequence_id)

    def step(self) -> list[StepOutput]:
        self.note("step")
        return super().step()

    def counters(self) -> EngineLoad:
        self.note("counters")
        return super().counters()


def sharing(engine: Any, lock: FakeLock) -> Any:
    assert isinstance(engine, SharesAccelerator)
    engine.share_accelerator(lock)  # type: ignore[arg-type]
    return engine


async def test_a_token_engine_holds_the_lock_for_its_steps_only() -> None:
    lock = FakeLock()
    stepper = WatchedStepper(lock)
    engine: BatchingEngine = sharing(open_engine(stepper), lock)
    assert text_of(await run(engine, request("a", max_tokens=3))) == "xxx"
    await engine.close()
    assert (stepper.held, stepper.free) == ({"step"}, {"add", "remove", "counters"})
    assert lock.count == 3


async def test_a_failed_step_releases_the_lock() -> None:
    lock = FakeLock()
    stepper = WatchedStepper(lock)
    stepper.problem = ValueError("broken")
    engine: BatchingEngine = sharing(open_engine(stepper), lock)
    with pytest.raises(EngineFailed):
        await run(engine, request("a"))
    await engine.close()
    assert lock.count == 1
    assert not lock.is_held


async def test_an_embedding_engine_holds_the_lock_for_each_batch() -> None:
    lock = FakeLock()
    held: list[bool] = []

    def tokenize(text: str, prompt: str = "") -> list[int]:
        del prompt
        held.append(lock.is_held)
        return [1] * len(text)

    def encode(token_lists: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        held.append(lock.is_held)
        return np.ones((len(token_lists), 2), np.float32)

    engine: EmbeddingEngine = sharing(
        EmbeddingEngine(
            echo_info(),
            lambda: SimpleNamespace(
                vocabulary_size=2,
                special_tokens=((), ()),
                tokenize=tokenize,
                encode=encode,
                close=lambda: None,
            ),
            context_tokens=8,
            batch_limits=BatchLimits(4),
        ),
        lock,
    )
    vectors = await asyncio.wait_for(engine.embed(["aaaa", "aaa"]), 20)
    await engine.close()
    assert vectors.vectors.shape == (2, 2)
    assert held == [False, False, True, True]
    assert lock.count == 2
