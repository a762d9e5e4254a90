"""Child process that runs one step of a conversion: `python -m catalog.convert.child`.

Reads the job as one line of JSON from stdin.  Writes progress to stdout as lines of JSON,
`{"fraction": …, "doing": …}`; the last line is `{"done": true, "peak_bytes": …}` or
`{"error": code, "message": …}`.  Output of libraries goes to stderr.  The process kills itself
at the end of stdin, because its parent has died.
"""

import errno
import importlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, cast

from catalog.convert.job import Job
from catalog.convert.memory import peak_bytes
from core.child import die_with_input, die_with_parent, give_way, take_stdout
from core.errors import (
    BrokenModel,
    ImpetusError,
    InsufficientMemory,
    RequestError,
    Unavailable,
    UnsupportedCapability,
)

_STEPS: Mapping[tuple[str, str], str] = {
    ("pytorch", "safetensors"): "catalog.convert.steps.to_safetensors:to_safetensors",
    ("safetensors", "safetensors"): "catalog.convert.steps.to_safetensors:to_safetensors",
    ("gguf", "safetensors"): "catalog.convert.steps.from_gguf:gguf_to_safetensors",
    ("gguf", "gguf"): "catalog.convert.steps.to_gguf:requantize",
    ("gguf", "mlx"): "catalog.convert.steps.gguf_to_mlx:gguf_to_mlx",
    ("safetensors", "mlx"): "catalog.convert.steps.to_mlx:to_mlx",
    ("safetensors", "gguf"): "catalog.convert.steps.to_gguf:to_gguf",
    ("safetensors", "onnx"): "catalog.convert.steps.to_onnx:to_onnx",
    ("safetensors", "coreml"): "catalog.convert.child:to_coreml",
}
_LONGEST_MESSAGE = 2000
DEFAULT_COREML_CONTEXT = 2048
_FULL_DISK = "The disk is full; free some space, then convert again."


def to_coreml(job: Job, report: Callable[[float, str], None]) -> None:
    """Write a folder with a Core ML package named after the job, and its tokenizer."""
    from backends.hf.config import read_folder
    from catalog.convert.job import link_source
    from catalog.convert.sidecars import copy_sidecars
    from catalog.convert.steps.coreml_decoder import longest_context
    from catalog.convert.steps.hf_defaults import complete_config
    from catalog.convert.steps.to_coreml import Precision, convert_to_coreml

    source, made = link_source(job), job.work / job.name
    complete_config(source)
    longest = longest_context(read_folder(source))
    convert_to_coreml(
        source,
        made,
        precision=cast(Precision, job.quantization),
        context_tokens=job.context_tokens or min(DEFAULT_COREML_CONTEXT, longest),
        progress=report,
    )
    # The converter refuses an existing target, and the output folder already exists.
    made.rename(job.output)
    copy_sidecars(job.folder, job.output)


def run_step(job: Job, report: Callable[[float, str], None]) -> None:
    """Run the step.  Raises every failure as an ImpetusError."""
    module, name = _STEPS[job.source_format, job.target_format].split(":")
    try:
        getattr(importlib.import_module(module), name)(job, report)
    except ImpetusError:
        raise
    except SystemExit as error:
        # Some modules of libraries end the process when they are imported.
        raise UnsupportedCapability(
            f"A library that converts {job.name} from {job.source_format} to {job.target_format} "
            f"gave up ({error.code}); it does not support this model."
        ) from error
    except MemoryError:
        raise InsufficientMemory(
            "The conversion ran out of memory. Unload models or choose a smaller one, then convert "
            "again."
        ) from None
    except ModuleNotFoundError as error:
        raise UnsupportedCapability(
            f"The conversion needs the package {error.name}, which is not installed; install the "
            "extra `torch`."
        ) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise Unavailable(_FULL_DISK) from error
        raise _as_impetus_error(job, error) from error
    except Exception as error:
        raise _as_impetus_error(job, error) from error


def _as_impetus_error(job: Job, error: Exception) -> ImpetusError:
    """Return the ImpetusError for an exception that a library raised."""
    text = f"{type(error).__name__}: {error}"[:_LONGEST_MESSAGE]
    if "No space left" in text:
        return Unavailable(_FULL_DISK)
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if kinds & {"SafetensorError", "UnpicklingError", "BadZipFile", "EOFError"}:
        return BrokenModel(
            f"{job.name} cannot be read, its files may be damaged: {text}", param="model"
        )
    return ImpetusError(
        f"{job.name} could not be converted from {job.source_format} to {job.target_format}: {text}"
    )


def read_message(line: bytes) -> dict[str, Any]:
    """Return the message in a line from the child; empty if it is not a JSON object."""
    try:
        message = json.loads(line)
    except ValueError:
        return {}
    return message if isinstance(message, dict) else {}


def error_from_code(code: str, message: str) -> ImpetusError:
    """Return the error for a code and message that the child reported."""
    kinds = (BrokenModel, UnsupportedCapability, RequestError, InsufficientMemory, Unavailable)
    for kind in kinds:
        if kind.code == code:
            return kind(message)
    return ImpetusError(message)


def main() -> None:
    """Run the job that stdin describes."""
    # A paused process cannot notice the end of stdin, so the kernel kills it.
    die_with_parent()
    give_way()
    pipe = take_stdout()

    def send(message: Mapping[str, Any]) -> None:
        pipe.write(json.dumps(message) + "\n")
        pipe.flush()

    job = Job.from_json(sys.stdin.readline())
    die_with_input(sys.stdin)
    job.output.mkdir()
    try:
        run_step(job, lambda fraction, doing: send({"fraction": fraction, "doing": doing}))
    except ImpetusError as error:
        sys.stderr.flush()
        if error.__cause__ is not None:
            import traceback

            traceback.print_exception(error.__cause__)
        send({"error": error.code, "message": error.message})
        pipe.close()
        # Threads of libraries must not delay the exit.
        os._exit(1)
    send({"done": True, "peak_bytes": peak_bytes()})
    pipe.close()
    os._exit(0)


if __name__ == "__main__":
    main()
