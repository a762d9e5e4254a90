"""Measures how far a conversion's result differs from its source, in one child process for each.

Both models are never in memory at the same time.  The figure is only as good as the text is long:
it tells a damaged result from a sound one, and 4 bits from 8, not one good quantization from
another.
"""

import asyncio
import contextlib
import os
import secrets
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from backends.base import ModelInfo
from catalog.convert.child import read_message
from catalog.convert.environment import child_environment
from catalog.convert.memory import OnMemory, watch_memory
from catalog.convert.pause import PauseSwitch
from catalog.convert.quality.child import Task
from catalog.convert.quality.figure import QualityFigure
from catalog.encoding import info_to_json
from core.child import AnswerTooLong, AsyncChild, ChildEnded, describe_exit, kill_group
from core.errors import BrokenModel, NonFiniteOutput
from core.supervision import log_failure

_KEPT = "source.npz"
_CHECK_S = 0.25
# For what is known after SIGTERM to be compared and written.
_GRACE_S = 15.0


@dataclass(frozen=True, slots=True)
class QualityLimits:
    """Bounds of a measurement.

    `tokens` of the text are compared at most, in `seconds` for each of both models, pauses not
    counted.  A model that needs more than `memory_bytes` is not opened; None: no limit.
    """

    tokens: int = 512
    seconds: float = 300.0
    memory_bytes: int | None = None
    threads: int = 1


DEFAULT_LIMITS = QualityLimits()


async def measure_quality(
    source: ModelInfo,
    result: Path,
    result_format: str,
    work: Path,
    *,
    limits: QualityLimits = DEFAULT_LIMITS,
    pause: PauseSwitch | None = None,
    on_memory: OnMemory | None = None,
) -> QualityFigure:
    """Return how the model of the format `result_format` in the folder `result` differs.

    `work` is an existing folder for temporary files, some MB, which are removed.  A source that
    cannot run here leaves the result's perplexity, and a result that cannot run here leaves
    nothing; `QualityFigure.reason` says why.  `pause` and `on_memory` are those of `convert`.
    Cancelling the task kills the child processes.  Raises BrokenModel if the result cannot be
    loaded although its source can, or computes NaN or infinity: the conversion has failed.
    """
    folder = work / f"quality-{secrets.token_hex(4)}"
    await asyncio.to_thread(folder.mkdir)
    measurement = _Measurement(folder, limits, pause or PauseSwitch(), on_memory)
    try:
        return await measurement.figure(source, result, result_format)
    finally:
        await asyncio.shield(asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True))


@dataclass(slots=True)
class _Measurement:
    folder: Path
    limits: QualityLimits
    pause: PauseSwitch
    on_memory: OnMemory | None

    async def figure(self, source: ModelInfo, result: Path, result_format: str) -> QualityFigure:
        kept = str(self.folder / _KEPT)
        task = Task(
            source.format,
            kept,
            self.limits.tokens,
            self.limits.threads,
            self.limits.memory_bytes,
            info=info_to_json(source),
        )
        answer = await self._answer(task)
        reason = "" if answer.get("done") else f"The source was not run: {_why(answer)}."
        task = replace(
            task, format=result_format, kept="" if reason else kept, info="", folder=str(result)
        )
        answer = await self._answer(task)
        if "figure" in answer:
            figure = QualityFigure.from_json(str(answer["figure"]))
            return replace(figure, reason=reason or figure.reason)
        if answer.get("error") == NonFiniteOutput.code or (
            answer.get("error") == BrokenModel.code and not reason
        ):
            raise BrokenModel(
                f"The conversion to {result_format} gave a model that cannot be used: "
                f"{_why(answer)}. Convert it again with another quantization or format.",
                param="model",
            )
        return QualityFigure(reason=f"The result was not run: {_why(answer)}.")

    async def _answer(self, task: Task) -> dict[str, Any]:
        """Run a child; return its last message, or one about its end."""
        await self.pause.wait_until_off()
        child = AsyncChild(
            [sys.executable, "-P", "-m", "catalog.convert.quality.child"],
            child_environment(self.folder, task.threads),
            self.folder,
        )
        answer: dict[str, Any] = {}
        try:
            with self.pause.controlling(child.pid), self._watched(child.pid):
                with contextlib.suppress(ChildEnded):
                    await child.write(task.to_json().encode() + b"\n")
                async for line in child.lines():
                    answer = read_message(line) or answer
            code = await child.wait()
        except AnswerTooLong:
            return {"message": "its process sent a line over 64 KiB"}
        finally:
            await asyncio.shield(child.close())
        if not answer:
            hints = {
                -signal.SIGKILL: ", perhaps because memory ran out",
                -signal.SIGTERM: " before it began to compute, because its time was over",
            }
            ended = describe_exit(code) + hints.get(code, "")
            return {"message": f"its process {ended}. {child.stderr_tail}"}
        return answer

    @contextlib.contextmanager
    def _watched(self, pid: int) -> Iterator[None]:
        """Bound the time of a child that is not reaped meanwhile, and report its memory."""
        work = [self._end_in_time(pid)]
        if self.on_memory is not None:
            work.append(watch_memory(pid, self.on_memory))
        tasks = [asyncio.create_task(each, name="quality measurement") for each in work]
        for each in tasks:
            each.add_done_callback(log_failure)
        try:
            yield
        finally:
            for each in tasks:
                each.cancel()

    async def _end_in_time(self, pid: int) -> None:
        """Ask the child to finish after its time, then kill it; pauses do not count."""
        await self._pass(self.limits.seconds)
        os.kill(pid, signal.SIGTERM)
        await self._pass(_GRACE_S)
        kill_group(pid)

    async def _pass(self, seconds: float) -> None:
        """Wait until so many seconds have passed without a pause."""
        before = time.monotonic()
        while seconds > 0:
            await asyncio.sleep(min(_CHECK_S, seconds))
            now = time.monotonic()
            if not self.pause.is_on:
                seconds -= now - before
            before = now


def _why(answer: dict[str, Any]) -> str:
    """Return a child's message as the end of a sentence."""
    return str(answer.get("message", "its process ended")).strip().removesuffix(".")
