"""Converts models that cannot run here, one at a time, started by a request."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import TypeAlias

from backends.base import Backend, EngineOptions, ModelInfo
from catalog.convert.choice import least_lossy_conversion, smaller_conversion
from catalog.convert.memory import OnMemory, needed_bytes
from catalog.convert.pause import PauseSwitch
from catalog.convert.run import ConversionProgress, ConversionRequest, convert, plan, sweep
from catalog.models import Converted, ModelRecord
from core.errors import BackendUnavailable, ImpetusError, InsufficientMemory, Unavailable
from core.files import passing_cause
from core.settings import Settings
from core.supervision import Supervisor

logger = logging.getLogger(__name__)

# A failed conversion is not retried for this long, or until the server restarts.
_FAILURE_KEPT_S = 600.0
# The same for a shortage of memory, disk space or processes, which may pass.
_PASSING_KEPT_S = 30.0
_FIRST_GUESS_S = 30
_LONGEST_RETRY_S = 120
_MEMORY_WAIT_S = 600.0

# (name, bytes, timeout in seconds): waits for memory, then reserves it: `Reservations.reserve`.
ReserveMemory: TypeAlias = Callable[[str, int, float], AbstractAsyncContextManager[OnMemory]]


@dataclass(slots=True)
class _Conversion:
    """One running conversion; `fraction` is 0 to 1."""

    target_format: str
    quantization: str
    started_at: float
    fraction: float = 0.0
    doing: str = "waiting"


class Conversions:
    """Runs conversions and answers requests for their models.  Belongs to one event loop."""

    def __init__(
        self,
        settings: Settings,
        backends: Mapping[str, Backend],
        options: EngineOptions,
        rescan: Callable[[], Awaitable[None]],
        reserve_memory: ReserveMemory,
    ) -> None:
        self._folder = settings.home / "models"
        self._is_on = settings.auto_convert
        self._threads = settings.threads or 1
        self._backends = backends
        self._options = options
        self._rescan = rescan
        self._reserve_memory = reserve_memory
        self._running: dict[str, _Conversion] = {}
        self._supervisor = Supervisor()
        self._failures: dict[str, tuple[float, str]] = {}
        self._one_at_a_time = asyncio.Lock()
        self._pause = PauseSwitch()

    @property
    def is_paused(self) -> bool:
        """Whether conversions are paused."""
        return self._pause.is_on

    def is_converted(self, model_id: str) -> bool:
        """Whether a conversion reads the model, or waits to."""
        return model_id in self._running

    @property
    def is_running(self) -> bool:
        """Whether one runs or waits for its turn, and none is paused."""
        return bool(self._running) and not self.is_paused

    def pause(self, *, is_on: bool) -> None:
        """Pause or resume the running conversion and those that wait."""
        self._pause.switch(is_on=is_on)

    def sweep(self) -> None:
        """Remove leftovers of conversions whose process died; blocks while folders are listed."""
        if self._folder.is_dir():
            inside = (path for path in self._folder.iterdir() if not path.is_symlink())
            for folder in [self._folder, *(path for path in inside if path.is_dir())]:
                sweep(folder)

    def answer(
        self, record: ModelRecord, problem: ImpetusError, others: Sequence[ModelRecord]
    ) -> ImpetusError:
        """Return the error for a request for a model that cannot run here.

        Starts the conversion that helps, if any; `problem` is why it is needed.  `others` is the
        catalog: if it has converted versions, they cannot run here either.
        """
        results = [
            other.id
            for other in others
            if isinstance(other.source, Converted) and other.source.model_id == record.id
        ]
        if results:
            return _with_note(
                problem, f"Its converted versions cannot run here either: {', '.join(results)}."
            )
        running = self._running.get(record.id)
        if running is None:
            until, reason = self._failures.get(record.id, (0.0, ""))
            if time.monotonic() < until:
                return _with_note(problem, f"Its conversion failed: {reason}")
            choice = self._choose(record, problem) if self._is_on else None
            if choice is None:
                return problem
            running = self._start(record, *choice)
        what = f"{running.target_format} {running.quantization}"
        doing = "paused until the machine has recovered" if self._pause.is_on else running.doing
        return Unavailable(
            f"{problem.message} It is being converted to {what} ({doing}, "
            f"{running.fraction:.0%}); try again later.",
            param="model",
            retry_after_s=_seconds_left(running),
        )

    def _choose(self, record: ModelRecord, problem: ImpetusError) -> tuple[str, str] | None:
        if isinstance(record.source, Converted):
            return None
        runnable = {
            name for name, backend in self._backends.items() if backend.availability().is_available
        }
        if isinstance(problem, InsufficientMemory):
            return smaller_conversion(record.info, runnable, self._fits)
        if isinstance(problem, BackendUnavailable):
            return least_lossy_conversion(record.info, runnable)
        return None

    def _fits(self, info: ModelInfo) -> bool:
        try:
            self._backends[info.format].estimate(info, self._options)
        except ImpetusError:
            return False
        return True

    def _start(self, record: ModelRecord, target_format: str, quantization: str) -> _Conversion:
        conversion = _Conversion(target_format, quantization, time.monotonic())
        self._running[record.id] = conversion
        self._supervisor.run_once(f"conversion of {record.id}", self._run(record, conversion))
        return conversion

    async def _run(self, record: ModelRecord, conversion: _Conversion) -> None:
        def on_progress(progress: ConversionProgress) -> None:
            conversion.fraction, conversion.doing = progress.fraction, progress.doing

        kind = f"{conversion.target_format}-{conversion.quantization}"
        target = self._folder / kind / record.info.name
        request = ConversionRequest(
            record.info,
            conversion.target_format,
            target,
            quantization=conversion.quantization,
            threads=self._threads,
            model_id=record.id,
        )
        try:
            async with self._one_at_a_time:
                await self._pause.wait_until_off()
                conversion.doing = "waiting for memory"
                async with self._reserve_memory(
                    f"conversion of {record.id}", _needed_bytes(request), _MEMORY_WAIT_S
                ) as measured:
                    conversion.started_at = time.monotonic()
                    await asyncio.to_thread(target.parent.mkdir, parents=True, exist_ok=True)
                    await convert(request, on_progress, self._pause, measured)
            logger.info("converted %s to %s", record.id, kind)
            await self._rescan()
        except ImpetusError as problem:
            logger.warning("converting %s to %s failed: %s", record.id, kind, problem)
            self._note_failure(record.id, problem, problem.message)
        except Exception as problem:
            logger.exception("converting %s to %s failed", record.id, kind)
            self._note_failure(record.id, problem, str(problem)[:500])
        finally:
            del self._running[record.id]

    def _note_failure(self, model_id: str, problem: Exception, reason: str) -> None:
        """Note why and until when the model is not converted again."""
        may_pass = isinstance(problem, Unavailable) or passing_cause(problem) is not None
        kept_s = _PASSING_KEPT_S if may_pass else _FAILURE_KEPT_S
        self._failures[model_id] = (time.monotonic() + kept_s, reason)

    def cancel(self) -> None:
        """Cancel the tasks; a step's process ends with this one in any case."""
        self._supervisor.cancel()


def _needed_bytes(request: ConversionRequest) -> int:
    way = plan(request.source.format, request.target_format, request.quantization)
    return needed_bytes(request.source, way)


def _seconds_left(conversion: _Conversion) -> int:
    elapsed = time.monotonic() - conversion.started_at
    if conversion.fraction <= 0:
        return _FIRST_GUESS_S
    left = elapsed * (1 - conversion.fraction) / conversion.fraction
    return max(1, min(int(left) + 1, _LONGEST_RETRY_S))


def _with_note(problem: ImpetusError, note: str) -> ImpetusError:
    return type(problem)(
        f"{problem.message} {note}", param=problem.param, retry_after_s=problem.retry_after_s
    )
