"""Looks up or makes the trial of a model, and tells the user what it found."""

import logging
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from backends.base import EngineOptions, ModelInfo
from backends.engine.row_model import RowModel
from backends.engine.trial.checks import TrialTerms, run_trial
from backends.engine.trial.row_models import RowModelSubject, limited
from backends.trials import RamTrials, Reference, TrialOptions, TrialResult, tell
from core.errors import BrokenModel

logger = logging.getLogger(__name__)

# Raise it when trials find more than before.
_VERSION = 1
_of_this_process = RamTrials()


def known_result(key: str, options: TrialOptions) -> TrialResult | None:
    """Return the result of an earlier trial with the same key, if there is one."""
    return (options.store or _of_this_process).get(key)


def tried(
    name: str, key: str, options: TrialOptions, run: Callable[[], TrialResult]
) -> TrialResult:
    """Return the result that is known for `key`, or that of `run`; blocks for that.

    `name` is the model's, for the log.
    """
    found = known_result(key, options)
    if found is None:
        started = time.monotonic()
        found = run()
        (options.store or _of_this_process).put(key, found)
        logger.info("tried %s in %.2f s", name, time.monotonic() - started)
    if not found.is_right:
        logger.warning("%s: a trial while it was loaded found: %s", name, found.reason)
    return found


def try_model(
    model: RowModel,
    terms: TrialTerms,
    hold: Callable[[], AbstractContextManager[None]],
    reference: Reference | None = None,
) -> TrialResult:
    """Try a model that computes rows, and again with the limits that `limited` then sets.

    If these do not help, the result has no cache.
    """
    found = run_trial(RowModelSubject(model, hold), terms, reference)
    rows = limited(model, found)
    if rows is model or not (found.is_sound and found.has_cache):
        return found
    again = run_trial(RowModelSubject(rows, hold), terms, reference)
    return found if again.is_right else replace(found, has_cache=False)


def tried_rows(
    info: ModelInfo,
    model: RowModel,
    terms: TrialTerms,
    options: EngineOptions,
    *,
    packages: Sequence[str],
) -> tuple[RowModel, tuple[str, ...]]:
    """Try a model that computes rows; return what of it is right, and what to tell the user.

    Takes ownership of `model`; blocks.  Raises BrokenModel if no row can be computed.
    """
    trial = options.trial or TrialOptions()
    try:
        result = tried(
            info.name,
            trial_key(info.files, packages, str(terms)),
            trial,
            lambda: try_model(model, terms, trial.hold),
        )
        if not result.is_sound:
            raise BrokenModel(
                f"The model {info.name} does not run: {result.reason}. Use another file of it.",
                param="model",
            )
    except BaseException:
        model.close()
        raise
    return limited(model, result), tell(info.name, result)


def trial_key(files: Sequence[Path], packages: Sequence[str], settings: str) -> str:
    """Return a key of a model's files, the versions of `packages`, the machine and `settings`.

    Files count by path, size and modification time, as for stored prefixes.  Raises OSError.
    """
    parts = [str(_VERSION), settings, platform.platform(), platform.machine()]
    for package in packages:
        try:
            parts.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            parts.append(f"{package} is missing")
    for path in files:
        status = path.stat()
        parts.append(f"{path} {status.st_size} {status.st_mtime_ns}")
    return sha256("\n".join(parts).encode("utf-8", "surrogateescape")).hexdigest()
