"""Compiles a Core ML model and keeps the result; runs in the process of the model.

Core ML specializes a compiled model for the machine when it is opened, and finds that again by the
model's place.  So a model is compiled into its final place before it is opened there.
"""

import errno
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from core.files import flush_path
from core.units import MIB

logger = logging.getLogger(__name__)

PARTIAL = ".partial-"
_SPARE_BYTES = 256 * MIB


def open_model(coremltools: Any, package: str, compiled: str) -> Any:
    """Open a model, from `compiled` if it is there, else compile it to there first.

    Without `compiled` nothing is kept.  Blocks, for minutes if it compiles.  Raises what
    coremltools raises, and OSError.
    """
    models = coremltools.models
    if not compiled:
        return models.MLModel(package)
    target = Path(compiled)
    if target.is_dir():
        try:
            return models.CompiledMLModel(compiled)
        except Exception as problem:
            logger.warning("%s is compiled again: %s", target.name, problem)
            shutil.rmtree(target)
    _compile(coremltools, package, target)
    try:
        return models.CompiledMLModel(compiled)
    except Exception:
        shutil.rmtree(target, ignore_errors=True)
        raise


def _compile(coremltools: Any, package: str, target: Path) -> None:
    """Compile to a folder beside `target`, and rename it: `target` is complete or missing."""
    _check_room(Path(package), target.parent)
    prefix = f"{PARTIAL}{os.getpid()}-"
    with tempfile.TemporaryDirectory(prefix=prefix, dir=target.parent) as scratch:
        made = Path(scratch, target.name)
        coremltools.models.utils.compile_model(package, str(made))
        for path in made.rglob("*"):
            if path.is_file():
                flush_path(path)
        try:
            made.rename(target)
        except OSError as problem:
            # Another process was faster; its result is as good.
            if problem.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise


def _check_room(package: Path, folder: Path) -> None:
    """Raise OSError if the disk is full: Core ML's own error does not tell."""
    files = [path for path in package.rglob("*") if path.is_file()] or [package]
    needed = sum(path.stat().st_size for path in files) + _SPARE_BYTES
    if shutil.disk_usage(folder).free < needed:
        raise OSError(errno.ENOSPC, f"compiling the model needs {needed // MIB} MiB of disk")
