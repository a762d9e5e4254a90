"""What engines report of their work, which is known after a death of their process."""

import asyncio
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from backends.abilities import count_tokens
from backends.base import Engine
from backends.engine.activity import REQUEST_ID, Activity, RecordsActivity
from core.types import TextPrompt
from tests.requests import request, run
from tests.unit.backends.embedding.test_embedding_engine import Encoder
from tests.unit.backends.embedding.test_embedding_engine import open_engine as open_embedder
from tests.unit.backends.engine.test_batching import FakeStepper, open_engine, until


class Recorder:
    """Remembers reports, and what is being worked on now."""

    def __init__(self) -> None:
        self.working_on: list[str] = []
        self.worked: list[tuple[str, ...]] = []
        self.prefills: set[str] = set()
        self.steps = 0
        self.is_in_step = False
        self.step: AbstractContextManager[object] = self._step()

    @contextmanager
    def working(self, *request_ids: str) -> Iterator[None]:
        self.worked.append(request_ids)
        self.working_on.extend(request_ids)
        yield
        for name in request_ids:
            self.working_on.remove(name)

    def begin_prefill(self, request_id: str) -> None:
        self.prefills.add(request_id)

    def end_prefill(self, request_id: str) -> None:
        self.prefills.discard(request_id)

    def _step(self) -> "Recorder._Step":
        return Recorder._Step(self)

    class _Step:
        def __init__(self, recorder: "Recorder") -> None:
            self._recorder = recorder

        def __enter__(self) -> None:
            self._recorder.steps += 1
            self._recorder.is_in_step = True

        def __exit__(self, *_: object) -> None:
            self._recorder.is_in_step = False


def recorded(engine: Engine) -> Recorder:
    recorder: Activity = Recorder()
    assert isinstance(engine, RecordsActivity)
    engine.record_activity(recorder)
    assert isinstance(recorder, Recorder)
    return recorder


async def test_a_request_is_in_prefill_until_its_first_token() -> None:
    stepper = FakeStepper()
    engine = open_engine(stepper)
    recorder = recorded(engine)
    stepper.gate.clear()
    wanted = request("abc", max_tokens=3)
    answer = asyncio.ensure_future(run(engine, wanted))
    await until(stepper.stepping.is_set)
    assert (recorder.prefills, recorder.is_in_step) == ({wanted.id}, True)
    # Prepared, and added to the stepper.
    assert recorder.worked == [(wanted.id,)] * 2
    assert recorder.working_on == []
    stepper.gate.set()
    await answer
    assert recorder.steps >= 3
    assert recorder.prefills == set()
    await until(lambda: not recorder.is_in_step)
    await engine.close()


async def test_a_client_that_leaves_during_its_prefill_leaves_no_report() -> None:
    stepper = FakeStepper()
    engine = open_engine(stepper)
    recorder = recorded(engine)
    stepper.gate.clear()
    answer = asyncio.ensure_future(run(engine, request("abc", max_tokens=3)))
    await until(stepper.stepping.is_set)
    answer.cancel()
    await asyncio.wait([answer])
    stepper.gate.set()
    await until(lambda: not recorder.prefills)
    await engine.close()


async def test_a_step_that_raises_is_over() -> None:
    stepper = FakeStepper()
    stepper.problem = MemoryError()
    engine = open_engine(stepper)
    recorder = recorded(engine)
    await asyncio.gather(run(engine, request("abc")), return_exceptions=True)
    assert recorder.steps
    await until(lambda: not recorder.is_in_step)
    await engine.close()


async def test_token_counts_are_reported_under_their_request() -> None:
    engine = open_engine(FakeStepper())
    recorder = recorded(engine)
    REQUEST_ID.set("count")
    assert await count_tokens(engine, TextPrompt("abc")) == 3
    assert recorder.worked == [("count",)]
    await engine.close()


async def test_embeddings_are_reported_by_batch() -> None:
    encoder = Encoder()
    engine = open_embedder(encoder)
    recorder = recorded(engine)
    encoder.free.clear()

    async def embed(name: str) -> None:
        REQUEST_ID.set(name)
        await engine.embed([name])

    first = asyncio.ensure_future(embed("a"))
    await encoder.until_started()
    assert recorder.working_on == ["a"]
    others = [asyncio.ensure_future(embed(name)) for name in ("b", "c")]
    await until(lambda: engine.load().waiting == 2)
    encoder.free.set()
    await asyncio.gather(first, *others)
    # Each was tokenized alone; later batches hold what was queued by then.
    assert {name for batch in recorder.worked for name in batch} == {"a", "b", "c"}
    assert recorder.worked[:2] == [("a",), ("a",)]
    await until(lambda: not recorder.working_on)
    await engine.close()
