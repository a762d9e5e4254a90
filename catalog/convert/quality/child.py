"""Child process that computes a text with one model: `python -m catalog.convert.quality.child`.

Reads a task as one line of JSON from stdin.  A source's distributions are written to the task's
file; a result is compared with them.  The last line on stdout is `{"done": true}`,
`{"figure": …}` or `{"error": code, "message": …}`.  SIGTERM ends the computation early: what is
known by then is used.  The process kills itself at the end of stdin, because its parent has died.
"""

import asyncio
import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

from backends.base import Backend, EngineOptions, ModelInfo
from backends.registry import load_backends
from catalog.convert.quality.compute import (
    compare_texts,
    compare_vectors,
    keep_texts,
    keep_vectors,
)
from catalog.convert.quality.figure import QualityFigure
from catalog.convert.quality.text import Text, read_texts
from catalog.encoding import info_from_json
from core.child import die_with_input, die_with_parent, give_way, take_stdout
from core.errors import (
    BackendUnavailable,
    BrokenModel,
    ImpetusError,
    InsufficientMemory,
    NotThisFormat,
    UnsupportedCapability,
)
from core.files import visible_files
from core.types import Capability

_TEXT = frozenset({Capability.CHAT, Capability.COMPLETION})
_LEAST_CONTEXT = 64
_LONGEST_MESSAGE = 1000


@dataclass(frozen=True, slots=True)
class Task:
    """What a child computes.

    `info` is the JSON of a source's description, empty for a result: that is identified in
    `folder`.  A source is written to `kept`; a result is compared with it unless it is empty.
    """

    format: str
    kept: str
    tokens: int
    threads: int
    memory_bytes: int | None
    info: str = ""
    folder: str = ""

    def to_json(self) -> str:
        """Return the task as one line of JSON."""
        return json.dumps(asdict(self))


def find_model(folder: Path, backend: Backend) -> ModelInfo:
    """Return the model in a conversion's folder.  Raises BrokenModel."""
    for path in visible_files(folder, "**/*"):
        with suppress(NotThisFormat):
            return backend.identify(path)
    raise BrokenModel(f"{folder.name} has no model of the format {backend.name}.", param="model")


async def run(task: Task) -> QualityFigure | None:
    """Compute the task; None for a source.  Raises ImpetusError."""
    backend = load_backends().get(task.format)
    if backend is None:
        raise UnsupportedCapability(f"no installed format is named {task.format}")
    available = backend.availability()
    if not available.is_available:
        raise BackendUnavailable(available.reason)
    info = info_from_json(task.info) if task.info else find_model(Path(task.folder), backend)
    generates = bool(info.capabilities & _TEXT)
    if not generates and Capability.EMBEDDING not in info.capabilities:
        raise UnsupportedCapability("it neither generates text nor embeds it")
    texts = read_texts()
    options = _options(task, texts, info)
    estimate = backend.estimate(info, options)
    if task.memory_bytes is not None and estimate.total_bytes > task.memory_bytes:
        raise InsufficientMemory("it does not fit the memory of the measurement")
    engine = await asyncio.to_thread(backend.open, info, options.granted(estimate))
    kept = Path(task.kept) if task.kept else None
    if task.info:
        assert kept is not None
        if generates:
            await keep_texts(engine, texts, task.tokens, kept)
        else:
            await keep_vectors(engine, texts, kept)
        return None
    if generates:
        return await compare_texts(engine, texts, task.tokens, kept)
    return await compare_vectors(engine, texts, kept)


def _options(task: Task, texts: Sequence[Text], info: ModelInfo) -> EngineOptions:
    """Return options for one sequence that is as long as one text."""
    context = max(task.tokens // len(texts) + 8, _LEAST_CONTEXT)
    context = min(context, info.context_length or context)
    options = EngineOptions(
        max_sequences=1,
        threads=task.threads,
        context_tokens=context,
        memory_limit_bytes=task.memory_bytes,
        warm_tokens=0,
    )
    if not info.capabilities & _TEXT:
        return replace(options, context_tokens=None)
    return options


async def _answer(task: Task) -> Mapping[str, Any]:
    """Compute the task until SIGTERM; return the last message."""
    loop = asyncio.get_running_loop()
    current = asyncio.current_task()
    assert current is not None
    loop.add_signal_handler(signal.SIGTERM, current.cancel)
    try:
        figure = await run(task)
    except asyncio.CancelledError:
        return _message(UnsupportedCapability("loading it takes longer than the measurement may"))
    except ImpetusError as error:
        return _message(error)
    except MemoryError:
        return _message(InsufficientMemory("its memory ran out"))
    except Exception as error:
        return _message(ImpetusError(f"{type(error).__name__}: {error}"))
    return {"done": True} if figure is None else {"figure": figure.to_json()}


async def _run_and_exit(task: Task, pipe: IO[str]) -> None:
    pipe.write(json.dumps(await _answer(task)) + "\n")
    pipe.close()
    sys.stderr.flush()
    # Threads of libraries, and memory that is freed piece by piece, must not delay the exit.
    os._exit(0)


def _message(error: ImpetusError) -> Mapping[str, Any]:
    return {"error": error.code, "message": error.message[:_LONGEST_MESSAGE]}


def main() -> None:
    """Compute the task that stdin describes."""
    # A paused process cannot notice the end of stdin, so the kernel kills it.
    die_with_parent()
    give_way()
    pipe = take_stdout()
    task = Task(**json.loads(sys.stdin.readline()))
    die_with_input(sys.stdin)
    asyncio.run(_run_and_exit(task, pipe))


if __name__ == "__main__":
    main()
