"""Converts models between formats: one child process per step, all or nothing.

The result, with a provenance.json, is renamed to its final name when complete; a failed or
cancelled conversion leaves nothing behind.
"""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from backends.base import ModelInfo
from catalog.convert.child import error_from_code, read_message
from catalog.convert.disk import require_space
from catalog.convert.environment import child_environment
from catalog.convert.graph import FULL_PRECISION, MLX_GROUP_SIZES, ORIGINAL, check
from catalog.convert.graph import Conversion as Conversion
from catalog.convert.graph import conversions_from as conversions_from
from catalog.convert.graph import plan as plan
from catalog.convert.job import Job
from catalog.convert.memory import OnMemory, watch_memory
from catalog.convert.output import (
    PartialOutput,
    fingerprint,
    require_unchanged,
    write_provenance,
)
from catalog.convert.output import sweep as sweep
from catalog.convert.pause import PauseSwitch
from catalog.convert.quality.figure import QualityFigure
from catalog.jobs import JobInterrupted
from core.child import AnswerTooLong, AsyncChild, ChildEnded, describe_exit
from core.errors import ImpetusError, ModelFileMissing, RequestError, Unavailable
from core.files import visible_files
from core.supervision import log_failure
from core.types import JsonValue

# The share of a conversion that is done when its result is measured.
_STEPS_DONE = 0.99
_EXPORTERS = ("auto", "genai", "torch")
# How users and the system, which is short of memory, end processes.
_KILLED = (-signal.SIGKILL, -signal.SIGTERM)


@dataclass(frozen=True, slots=True)
class ConversionRequest:
    """A conversion to run; `target` is a folder that does not exist yet.

    An empty `quantization` means the target format's default, see `Conversion.quantizations`.
    `group_size` is for MLX, `exporter` ("auto", "genai", "torch") for ONNX, `context_tokens` for
    Core ML (None: its default).  `model_id` names the source in provenance.json.
    """

    source: ModelInfo
    target_format: str
    target: Path
    quantization: str = ""
    group_size: int = 64
    exporter: str = "auto"
    context_tokens: int | None = None
    threads: int = 1
    model_id: str = ""


@dataclass(frozen=True, slots=True)
class ConversionProgress:
    """Progress of a conversion: `fraction` of the whole from 0 to 1; `doing` is the activity."""

    fraction: float
    step: int
    steps: int
    doing: str


OnProgress = Callable[[ConversionProgress], None]
# (the result's folder, an existing folder for temporary files): compares it with its source.
Measure = Callable[[Path, Path], Awaitable[QualityFigure]]


async def convert(
    request: ConversionRequest,
    on_progress: OnProgress | None = None,
    pause: PauseSwitch | None = None,
    on_memory: OnMemory | None = None,
    measure: Measure | None = None,
) -> Path:
    """Run a conversion and return the folder it made, `request.target`.

    While `pause` is on, no step starts and the running one is stopped.  `on_memory` gets the
    memory of the child processes in bytes.  `measure` is awaited with the result before it becomes
    visible: what it returns is part of provenance.json, what it raises ends the conversion.
    Cancelling the task kills the processes and removes their files.  Raises RequestError (an
    existing target, unknown options), UnsupportedCapability, ModelFileMissing, BrokenModel,
    Unavailable (no disk space, a changed source), JobInterrupted if a child was killed, else
    ImpetusError with the reason.
    """
    quantization = _checked_quantization(request)
    route = plan(request.source.format, request.target_format, quantization)
    before = await asyncio.to_thread(fingerprint, request.source.files)
    await asyncio.to_thread(
        require_space, request.source, request.target, quantization, route, request.exporter
    )
    partial = await asyncio.to_thread(PartialOutput.create, request.target)
    try:
        try:
            result, peak_bytes = await _run_steps(
                request, quantization, route, partial, on_progress, pause or PauseSwitch(),
                on_memory,
            )  # fmt: skip
        except ImpetusError as error:
            # A source that changes meanwhile fails in many ways; this is the reason for all.
            await asyncio.to_thread(require_unchanged, before, error)
            raise
        quality = None
        if measure is not None:
            if on_progress is not None:
                steps = len(route) - 1
                on_progress(ConversionProgress(_STEPS_DONE, steps, steps, "measuring the quality"))
            quality = await measure(result, partial.folder)
        await asyncio.to_thread(
            write_provenance,
            result,
            request.source,
            before,
            _parameters(request, quantization, route),
            peak_bytes,
            quality,
        )
        return await asyncio.to_thread(partial.publish, result)
    except OSError as error:
        raise Unavailable(
            f"The converted model could not be written ({error.strerror}). Check the free "
            "disk space and the permissions of the folder, then convert again."
        ) from error
    finally:
        # Shielded: a second cancellation must not leave files behind.
        await asyncio.shield(asyncio.to_thread(partial.remove))


def _checked_quantization(request: ConversionRequest) -> str:
    """Return the quantization to use.  Raises RequestError for invalid options."""
    quantization = check(request.source, request.target_format, request.quantization)
    if request.group_size not in MLX_GROUP_SIZES:
        raise RequestError(
            f"group_size is {request.group_size}; MLX supports 32, 64 and 128.", param="group_size"
        )
    if request.exporter not in _EXPORTERS:
        raise RequestError(
            f"exporter is {request.exporter!r}; it must be one of {', '.join(_EXPORTERS)}.",
            param="exporter",
        )
    if request.context_tokens is not None and not 1 <= request.context_tokens <= 2**20:
        raise RequestError(
            f"context_tokens is {request.context_tokens:,}; it must be from 1 to 1,048,576.",
            param="context_tokens",
        )
    if not 1 <= request.threads <= 256:
        raise RequestError(
            f"threads is {request.threads}; it must be from 1 to 256.", param="threads"
        )
    if not request.source.files:
        raise RequestError(f"{request.source.name} has no files to convert.", param="model")
    name = request.target.name
    if not name or name.startswith(".") or not name.isprintable():
        raise RequestError(
            f"{name!r} is not a valid folder name: it must not be empty, start with a dot or "
            "contain control characters.",
            param="target",
        )
    if os.path.lexists(request.target):
        raise RequestError(f"{name!r} already exists; choose another name.", param="target")
    return quantization


def _parameters(
    request: ConversionRequest, quantization: str, route: tuple[str, ...]
) -> dict[str, JsonValue]:
    return {
        "model_id": request.model_id or request.source.name,
        "target_format": request.target_format,
        "formats": list(route),
        "quantization": quantization,
        "group_size": request.group_size if request.target_format == "mlx" else None,
        "exporter": request.exporter if request.target_format == "onnx" else None,
        "context_tokens": request.context_tokens,
    }


async def _run_steps(
    request: ConversionRequest,
    quantization: str,
    route: tuple[str, ...],
    partial: PartialOutput,
    on_progress: OnProgress | None,
    pause: PauseSwitch,
    on_memory: OnMemory | None,
) -> tuple[Path, int]:
    """Run all steps, each on the result of the one before.

    Return the last folder, and the highest memory of a step in bytes.
    """
    files, output, peak_bytes = request.source.files, partial.folder, 0
    steps = len(route) - 1
    for step in range(steps):
        is_last = step == steps - 1
        start, end = route[step], route[step + 1]
        output = partial.folder / f"step-{step}"
        work = partial.folder / f"work-{step}"
        await asyncio.to_thread(work.mkdir)
        job = Job(
            source_format=start,
            target_format=end,
            files=tuple(file.absolute() for file in files),
            output=output,
            work=work,
            name=request.target.name,
            quantization=quantization if is_last else _intermediate(start, route, quantization),
            group_size=request.group_size,
            exporter=request.exporter,
            context_tokens=request.context_tokens or 0,
            threads=request.threads,
        )

        def report(fraction: float, doing: str, step: int = step) -> None:
            if on_progress is not None:
                done = (step + min(max(fraction, 0.0), 1.0)) / steps
                on_progress(ConversionProgress(done, step + 1, steps, doing))

        await pause.wait_until_off()
        peak_bytes = max(peak_bytes, await _run_step(job, report, pause, on_memory))
        # Files that only this step needed must not take disk space during the next one.
        await asyncio.to_thread(partial.discard, work, *files if step else ())
        files = tuple(visible_files(output, "**/*"))
    return output, peak_bytes


def _intermediate(start: str, route: tuple[str, ...], quantization: str) -> str:
    """Return the quantization between two steps, which must not lose precision.

    MLX computes in 16 bits beside quantized weights, so nothing more has to be stored for it.
    """
    if start != "gguf":
        return ORIGINAL
    if route[-1] != "mlx":
        return "f32"
    return quantization if quantization in FULL_PRECISION else "bf16"


async def _run_step(
    job: Job,
    report: Callable[[float, str], None],
    pause: PauseSwitch,
    on_memory: OnMemory | None,
) -> int:
    """Run one step in a child process; return the highest memory that it reports, in bytes.

    Raises the error that the child reports.
    """
    if missing := [file.name for file in job.files if not file.is_file()]:
        raise ModelFileMissing(
            f"{job.name}: the file {missing[0]} no longer exists.", param="model"
        )
    child = AsyncChild(
        [sys.executable, "-P", "-m", "catalog.convert.child"],
        child_environment(job.work, job.threads),
        job.work,
    )
    watching = None
    if on_memory is not None:
        watching = asyncio.create_task(watch_memory(child.pid, on_memory), name="conversion memory")
        watching.add_done_callback(log_failure)
    try:
        with pause.controlling(child.pid):
            code, peak_bytes, error = await _follow(child, job, report)
    finally:
        if watching is not None:
            watching.cancel()
        await asyncio.shield(child.close())
    if error is not None:
        raise error
    if code != 0 or peak_bytes is None:
        kind = JobInterrupted if code in _KILLED else ImpetusError
        raise kind(_exit_message(job, code, child.stderr_tail))
    return peak_bytes


async def _follow(
    child: AsyncChild, job: Job, report: Callable[[float, str], None]
) -> tuple[int, int | None, ImpetusError | None]:
    """Report progress until the child exits.

    Return its exit code, its highest memory in bytes (None if it did not report completion), and
    the error it reported.
    """
    error: ImpetusError | None = None
    peak_bytes: int | None = None
    with contextlib.suppress(ChildEnded):
        await child.write(job.to_json().encode() + b"\n")
    try:
        async for line in child.lines():
            message = read_message(line)
            if message.get("done"):
                peak_bytes = int(message.get("peak_bytes", 0))
            if "error" in message:
                error = error_from_code(str(message["error"]), str(message.get("message", "")))
            elif "fraction" in message:
                report(float(message["fraction"]), str(message.get("doing", "")))
    except AnswerTooLong:
        return (
            0,
            None,
            ImpetusError(
                f"The conversion of {job.name} from {job.source_format} to {job.target_format} was "
                "stopped: its process sent a line over 64 KiB, which is a bug. Please report it."
            ),
        )
    return await child.wait(), peak_bytes, error


def _exit_message(job: Job, code: int, stderr_tail: str) -> str:
    """Return the error message for a child that exited without reporting an error."""
    hint = ", perhaps because memory ran out" if code == -signal.SIGKILL else ""
    output = f" The last lines of its output: {stderr_tail}" if stderr_tail else ""
    return (
        f"The conversion of {job.name} from {job.source_format} to {job.target_format} "
        f"{describe_exit(code)}{hint}.{output}"
    )
