"""Runs arrivals of models in child processes: progress, errors, clean-up.

Cancelling the task stops the child; the next run goes on with what is there.
"""

import asyncio
import contextlib
import json
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from catalog.jobs import JobInterrupted
from catalog.uploads.arrival import Arrival
from core.child import AnswerTooLong, AsyncChild, ChildEnded, describe_exit, kept_environment
from core.errors import ImpetusError, error_of

_CODE_FOLDER = Path(__file__).resolve().parents[2]
_KEPT_VARIABLES = ("PATH", "HOME", "LANG", "LC_ALL", "VIRTUAL_ENV")


async def run_arrival(
    arrival: Arrival,
    home: Path,
    formats: Sequence[str],
    roots: Sequence[Path],
    on_progress: Callable[[int, int], None],
) -> None:
    """Check, copy, inspect and publish a model; `on_progress` is told done and all bytes.

    Raises BrokenModel for what cannot be used, RequestError, InsufficientDisk, Unavailable, and
    JobInterrupted for a process that died.
    """
    child = AsyncChild(
        [sys.executable, "-P", "-m", "catalog.uploads.child"],
        kept_environment(*_KEPT_VARIABLES)
        | {"PYTHONPATH": str(_CODE_FOLDER), "PYTHONWARNINGS": "ignore"},
        _CODE_FOLDER,
    )
    task = {
        "arrival": arrival.to_json(),
        "home": str(home),
        "formats": list(formats),
        "roots": [str(root) for root in roots],
    }
    last: dict[str, Any] = {}
    try:
        with contextlib.suppress(ChildEnded):
            await child.write(json.dumps(task).encode() + b"\n")
        async for line in child.lines():
            with contextlib.suppress(ValueError):
                last = json.loads(line)
                if "total_bytes" in last:
                    on_progress(int(last["done_bytes"]), int(last["total_bytes"]))
        code = await child.wait()
    except AnswerTooLong:
        raise ImpetusError(
            f"The inspection of {arrival.name} was stopped: its process sent a line over 64 KiB, "
            "which is a bug. Please report it."
        ) from None
    finally:
        await asyncio.shield(child.close())
    if "error" in last:
        raise error_of(last["error"], str(last["message"]), last["retry_after_s"])
    if not last.get("done"):
        hint = ", perhaps because memory ran out" if code == -signal.SIGKILL else ""
        raise JobInterrupted(
            f"The inspection of {arrival.name} {describe_exit(code)}{hint}. {child.stderr_tail}"
        )


def discard(arrival: Arrival, home: Path, *, with_model: bool = False) -> None:
    """Delete what has arrived; with `with_model` also the model's folder, if it is our copy."""
    shutil.rmtree(home / "incoming" / arrival.id, ignore_errors=True)
    if with_model and arrival.how != "in_place":
        shutil.rmtree(arrival.folder(home), ignore_errors=True)
