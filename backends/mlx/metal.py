"""Guards Metal's memory for MLX: clears caches while the GPU rests, sets memory limits once.

Clearing caches or changing limits while command buffers are in flight ends processes, and on some
Macs the kernel.  Sources: ml-explore/mlx issues 3186 and 3346, mlx-lm issues 883 and 1666.
"""

import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# A step that was left to the GPU and that nobody waits for is over after this time.
_LONGEST_STEP_S = 2.0
# Caches are not cleared while a pass lasts longer: it hangs, and `step_limit_s` ends its process.
_CLEAR_LIMIT_S = 30.0


def has_metal() -> bool:
    """Whether MLX computes on a GPU on this machine; does not import it."""
    return sys.platform == "darwin" and platform.machine() == "arm64"


# What Apple's driver says when it ends work on the GPU, and what to do.
# Source: MTLCommandBufferError, as MLX puts it into its RuntimeError.
_GPU_ERRORS = {
    "Interactivity": "it kept the display waiting. Lower IMPETUS_PREFILL_CHUNK_TOKENS, start the "
    "server with scripts/serve, or send a shorter prompt.",
    "Timeout": "it took too long. Lower IMPETUS_PREFILL_CHUNK_TOKENS or send a shorter prompt.",
    "OutOfMemory": "its memory ran out. Unload other models, or lower the model's context or "
    "IMPETUS_MEMORY_BUDGET.",
}


def gpu_advice(problem: BaseException) -> str:
    """Return why macOS ended work on the GPU and what to do; empty for other problems."""
    text = str(problem)
    if "ommand buffer" not in text and "kIOGPU" not in text:
        return ""
    found = next((advice for key, advice in _GPU_ERRORS.items() if key in text), "")
    return found and f"macOS ended its work on the GPU: {found}"


class GpuWork:
    """The passes of all threads of this process, and the clearing of caches between them.

    Passes of several threads overlap; clearing waits until all are over and starts none meanwhile.
    """

    def __init__(
        self,
        synchronize: Callable[[], None],
        clear: Callable[[], None],
        *,
        longest_step_s: float = _LONGEST_STEP_S,
        clear_limit_s: float = _CLEAR_LIMIT_S,
    ) -> None:
        """`synchronize` waits for the calling thread's streams; `clear` frees unused buffers."""
        self._synchronize = synchronize
        self._clear = clear
        self._longest_step_s = longest_step_s
        self._clear_limit_s = clear_limit_s
        self._changed = threading.Condition()
        self._computing = 0
        self._is_clearing = False
        # When each thread left a step to the GPU, by its id.
        self._in_flight: dict[int, float] = {}
        self._own = threading.local()

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Mark a pass of this thread; nested ones are one.  Blocks while caches are cleared."""
        depth = getattr(self._own, "depth", 0)
        if not depth:
            self._begin()
        self._own.depth = depth + 1
        try:
            yield
        finally:
            self._own.depth = depth
            if not depth:
                self._end()

    def clear(self) -> None:
        """Clear caches once no pass runs; within a pass of this thread, right after it.

        Blocks for at most 30 s; a process whose other passes last longer keeps its caches.
        """
        if getattr(self._own, "depth", 0):
            self._own.wants_clear = True
            return
        self._own.wants_clear = False
        until = time.monotonic() + self._clear_limit_s
        with self._changed:
            if not self._changed.wait_for(lambda: not self._is_clearing, self._clear_limit_s):
                return
            self._is_clearing = True
        try:
            # Also what this thread left to the GPU.
            self._settle()
            if self._rests(until):
                self._clear()
        finally:
            with self._changed:
                self._is_clearing = False
                self._changed.notify_all()

    def _begin(self) -> None:
        if self._is_clearing:
            self._settle()
        with self._changed:
            self._changed.wait_for(lambda: not self._is_clearing)
            self._computing += 1

    def _end(self) -> None:
        if self._is_clearing:
            self._settle()
        else:
            self._in_flight[threading.get_ident()] = time.monotonic()
        with self._changed:
            self._computing -= 1
            if self._is_clearing:
                self._changed.notify_all()
        if getattr(self._own, "wants_clear", False):
            self.clear()

    def _settle(self) -> None:
        """Wait for what this thread left to the GPU."""
        self._synchronize()
        with self._changed:
            self._in_flight.pop(threading.get_ident(), None)
            self._changed.notify_all()

    def _rests(self, until: float) -> bool:
        """Wait until no thread computes and nothing is in flight; False if that takes too long."""
        with self._changed:
            while True:
                now = time.monotonic()
                ends = max(self._in_flight.values(), default=-1e9) + self._longest_step_s
                if not self._computing and ends <= now:
                    self._in_flight.clear()
                    return True
                if now >= until:
                    return False
                left = until if self._computing else min(ends, until)
                self._changed.wait(left - now)


class GpuLimits:
    """MLX's limits of wired and of allocated memory, from the memory granted to open models."""

    def __init__(self, mx: Any) -> None:
        """`mx` is the module `mlx.core`, or what stands for it."""
        self._mx = mx
        self._lock = threading.Lock()
        self._granted: dict[int, int] = {}
        self._is_wired = False

    def open_model(self, key: int, granted_bytes: int, budget_bytes: int | None) -> None:
        """Note a model's memory; `budget_bytes` is that of all models of the machine, if known.

        The wired limit is set with the first model and stays: it must not change while the GPU
        computes.  It is never above the budget, which several processes share.
        """
        with self._lock:
            if not self._is_wired:
                self._is_wired = True
                most = int(self._mx.device_info()["max_recommended_working_set_size"])
                self._mx.set_wired_limit(min(most, budget_bytes or most))
            self._granted[key] = granted_bytes
            self._limit()

    def close_model(self, key: int) -> None:
        """Forget a model; idempotent."""
        with self._lock:
            if self._granted.pop(key, None) is not None:
                self._limit()

    def _limit(self) -> None:
        if self._granted:
            # MLX's own limit is one and a half times what Metal recommends: all of the RAM.
            self._mx.set_memory_limit(sum(self._granted.values()))


_work: GpuWork | None = None
_limits: GpuLimits | None = None
_starting = threading.Lock()


def guard_metal() -> None:
    """Make MLX and mlx-lm clear caches by `GpuWork`, and leave the wired limit alone.

    Call it after the import of mlx-lm.  Does nothing without Metal; idempotent.
    """
    global _work, _limits
    if not has_metal():
        return
    import importlib

    import mlx.core as mx

    # `mlx_lm.generate` is also the name of a function that the package exports.
    generate: Any = importlib.import_module("mlx_lm.generate")
    with _starting:
        if _work is not None:
            return

        def synchronize() -> None:
            mx.synchronize(generate.generation_stream)
            mx.synchronize()

        _work, _limits = GpuWork(synchronize, mx.clear_cache), GpuLimits(mx)
        # Called by mlx-lm after each piece of a prompt and every 512 steps.
        mx.clear_cache = _work.clear
        # Each of its generators would set the limit, and set it back when another one still runs.
        generate.maybe_set_recommended_wired_limit = lambda: None


@contextmanager
def computing() -> Iterator[None]:
    """Mark a pass on the GPU; see `GpuWork.computing`.  Does nothing without Metal."""
    if _work is None:
        yield
        return
    with _work.computing():
        yield


def settle_and_clear() -> None:
    """Free unused buffers once the GPU rests; see `GpuWork.clear`."""
    import mlx.core as mx

    if _work is None:
        mx.clear_cache()
    else:
        _work.clear()


def limit_memory(key: int, granted_bytes: int, budget_bytes: int | None) -> None:
    """Set MLX's limits for a model that is opened; does nothing without Metal."""
    if _limits is not None:
        _limits.open_model(key, granted_bytes, budget_bytes)


def forget_memory(key: int) -> None:
    """Set MLX's limits for a model that was closed; does nothing without Metal."""
    if _limits is not None:
        _limits.close_model(key)
