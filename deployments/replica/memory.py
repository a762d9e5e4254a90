"""Measures each model's memory from the process footprint before and after load and unload."""

import asyncio
import gc
import sys
from collections.abc import Awaitable, Callable, Collection
from typing import TypeVar

from backends.abilities import Measured
from backends.base import Backend, MemoryEstimate
from core.errors import ImpetusError
from deployments.messages import LoadRequest, UnloadResult
from scheduler.footprint import FootprintBook
from scheduler.sensors.process_memory import Meter, open_meter, trim_heap

# macOS' GPU driver gives memory back this long after a model is closed.  Source: oMLX measured 0.1
# to 0.3 s.
_SETTLE_S = 0.5
_SETTLE_STEP_S = 0.05
# Of what a model held, the share whose return ends the wait.
_SETTLED_SHARE = 0.9

Result = TypeVar("Result")


class ModelMemory:
    """Measures one replica's models.  Used from its event loop; readings take microseconds.

    All values are 0, so the estimates stay in force, if the system has no such reading.
    """

    def __init__(self, backend: Backend, meter: Meter | None = None) -> None:
        self._backend = backend
        self._meter = meter or open_meter()
        self._book: FootprintBook | None = None
        self._is_frozen = False

    async def measure_open(
        self, request: LoadRequest, open_: Callable[[], Result], key: str = ""
    ) -> Result:
        """Run `open_` on a thread and record how much memory it took.

        `key` names the load where a process holds a model twice; empty: the model's id.
        """
        backend, key = self._backend, key or request.model_id
        if isinstance(backend, Measured):
            await asyncio.to_thread(backend.preload, request.info, request.options)
        if not self._is_frozen:
            # Only before the first engine: what is frozen while it is referenced stays forever.
            self._is_frozen = True
            await asyncio.to_thread(gc.collect)
            _freeze()
        before = self._meter.read()
        result = await asyncio.to_thread(open_)
        after = self._meter.read()
        if before is None or after is None:
            return result
        if self._book is None:
            self._book = FootprintBook(before)
        try:
            estimate = backend.estimate(request.info, request.options)
        except ImpetusError:
            estimate = MemoryEstimate(request.info.size_bytes, 0, 0, 0, 0)
        later = estimate.transient_bytes + estimate.prefix_bytes
        if not (isinstance(backend, Measured) and backend.reserves_kv):
            later += estimate.kv_bytes
        self._book.opened(
            key,
            before,
            after,
            floor_bytes=request.info.size_bytes,
            later_bytes=later,
            estimated_bytes=estimate.total_bytes,
        )
        return result

    async def measure_close(self, key: str, close: Callable[[], Awaitable[None]]) -> UnloadResult:
        """Await `close` and return how much memory was freed; `key` as for `measure_open`."""
        before = self._meter.read()
        await close()
        # Engines have reference cycles; collect them now instead of at some later time.
        await asyncio.to_thread(gc.collect)
        await asyncio.to_thread(trim_heap)
        held_bytes = 0 if self._book is None else self._book.held_bytes(key)
        after = await self._settled(before, held_bytes)
        if before is None or after is None or self._book is None:
            return UnloadResult()
        returned = self._book.closed(key, before, after)
        return UnloadResult(
            returned.held_bytes, returned.returned_bytes, self._book.kept_bytes, is_known=True
        )

    async def _settled(self, before: int | None, held_bytes: int) -> int | None:
        """Return a reading after a close; on macOS waits up to 0.5 s for the memory to return."""
        after = self._meter.read()
        if sys.platform != "darwin" or before is None:
            return after
        for _ in range(round(_SETTLE_S / _SETTLE_STEP_S)):
            if after is None or before - after >= _SETTLED_SHARE * held_bytes:
                break
            await asyncio.sleep(_SETTLE_STEP_S)
            after = self._meter.read()
        return after

    def sample(self, active: Collection[str]) -> None:
        """Take a reading; `active` are the models that ran since the last one."""
        now = self._meter.read()
        if self._book is not None and now is not None:
            self._book.sample(now, active)

    def measured_bytes(self, key: str) -> int:
        """Return the most a model will hold; 0 if not measured."""
        return 0 if self._book is None else self._book.measured_bytes(key)

    @property
    def kept_bytes(self) -> int:
        """Bytes the process holds beside its models."""
        return 0 if self._book is None else self._book.kept_bytes


def _freeze() -> None:
    """Exempt what lives as long as the process from collection; call it before a model is opened.

    A collection holds the interpreter's lock, so it stalls all engines: over the runtimes'
    280,000 objects it takes 0.15 s, over one model's less than a millisecond.
    """
    gc.freeze()
