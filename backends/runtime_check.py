"""Decides which runtime, MLX or PyTorch, really runs a Hugging Face folder, and says why.

`check_runtimes` builds the model in both, with tensor shapes in place of weights, and compares what
they compute on a scaled-down copy.  It imports both: for limited child processes only.
`guess_runtime` reads mlx-lm's source instead.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from backends.base import RuntimeChoice
from backends.hf.checks import transformers_knows
from backends.hf.config import HfFolder, flattened, plain_floats
from backends.hf.fit import (
    Agreement,
    ComputeFailed,
    RuntimeFit,
    TensorShape,
    check_claims,
    first_line,
)
from backends.hf.header import broken, read_json
from backends.hf.shrink import WINDOW_TOKENS, shrink, window_of
from backends.mlx.check import check_mlx, compute_logits
from backends.mlx.limits import unread_setting
from backends.pytorch.check import check_torch, compute_reference
from core.errors import BackendUnavailable
from core.types import Capability

# Rounding stays below a hundredth of this; a setting that one runtime ignores is far above.
_TOLERANCE = 1e-3
_PROMPT_TOKENS = 30
_ALONE = 3
_FEWEST_TOKENS = 32
# With more, transformers takes seconds to assign them; such models are too large for it anyway.
_MANY_TENSORS = 20_000
ENCODER_REASON = "embedding and reranking models run on PyTorch"
GENERATING = frozenset({Capability.CHAT, Capability.COMPLETION})
_AGREES = "mlx-lm loads its tensors and computes what transformers computes"
_NOT_COMPARED = "its tensors fit mlx-lm's code; the results could not be compared"
_FASTER = "MLX is preferred: it computes on Apple's GPU"


@dataclass(frozen=True, slots=True)
class CheckedRuntime:
    """The choice for a folder; `mlx_context` limits the context that MLX can use, in tokens.

    `parameters` is 0 if unknown.
    """

    choice: RuntimeChoice
    parameters: int = 0
    mlx_context: int | None = None


@dataclass(frozen=True, slots=True)
class Doubt:
    """How mlx-lm differs from transformers, empty if it does not.

    `limit` is the length in tokens up to which it is right all the same, None if it is not.
    """

    difference: str = ""
    limit: int | None = None
    why_not_compared: str = ""


@dataclass(frozen=True, slots=True)
class Excluded:
    """Why a runtime is out of the question before any check; empty if it is not."""

    mlx: str = ""
    pytorch: str = ""


def guess_runtime(folder: HfFolder, excluded: Excluded) -> RuntimeChoice:
    """Return the likely runtime by mlx-lm's source; imports no runtime."""
    reason = excluded.mlx
    if not reason and not excluded.pytorch:
        reason = unread_setting(folder.outer_type, folder.config)
    if reason:
        return RuntimeChoice("pytorch", reason, "", reason)
    has_torch = not excluded.pytorch and transformers_knows(folder.model_type)
    alternative = "pytorch" if has_torch else ""
    return RuntimeChoice("mlx", "mlx-lm has code for it", alternative, excluded.pytorch or _FASTER)


def check_runtimes(
    folder: HfFolder,
    tensors: Mapping[str, TensorShape],
    excluded: Excluded,
    on_runtime: Callable[[str], None],
    *,
    dense: Mapping[str, TensorShape],
) -> CheckedRuntime:
    """Return the runtime that can load `tensors` and computes what transformers computes.

    `dense` are the same weights unpacked, as PyTorch loads them.

    Blocks for about half a second, the first time for 5 s.  Raises BrokenModel if neither can load
    it, or if config.json claims sizes that the tensors do not have; BackendUnavailable if a runtime
    cannot be imported that might have; MemoryError.  `on_runtime` is
    called with the name of each runtime before its code is used.
    """
    check_claims(folder, dense)
    mlx, torch = RuntimeFit(excluded.mlx), RuntimeFit(excluded.pytorch)
    failed: BackendUnavailable | None = None
    if not excluded.mlx:
        on_runtime("mlx")
        mlx, failed = _checked(lambda: check_mlx(folder, tensors))
    doubt = Doubt() if mlx.reason else _doubt(folder)
    is_sure = not mlx.reason and not doubt.difference
    if is_sure and len(tensors) > _MANY_TENSORS and not excluded.pytorch:
        torch = RuntimeFit(f"PyTorch was not checked: the model has {len(tensors)} tensors")
    elif not excluded.pytorch:
        on_runtime("pytorch")
        torch, problem = _checked(lambda: check_torch(folder, dense))
        failed = failed or problem
    if failed is not None and mlx.reason and torch.reason:
        raise failed
    choice = _choose(folder, mlx, torch, doubt)
    return CheckedRuntime(choice, torch.parameters or mlx.parameters, doubt.limit)


def _checked(check: Callable[[], RuntimeFit]) -> tuple[RuntimeFit, BackendUnavailable | None]:
    """Return what a check found, and the problem if its runtime cannot be imported."""
    try:
        return check(), None
    except BackendUnavailable as problem:
        return RuntimeFit(problem.message), problem


def _choose(folder: HfFolder, mlx: RuntimeFit, torch: RuntimeFit, doubt: Doubt) -> RuntimeChoice:
    against = mlx.reason or doubt.difference
    if not against:
        alternative = "" if torch.reason else "pytorch"
        return RuntimeChoice(
            "mlx", doubt.why_not_compared or _AGREES, alternative, torch.reason or _FASTER
        )
    if not torch.reason:
        if doubt.limit:
            note = f"{against}; on MLX the context is limited to {doubt.limit} tokens"
            return RuntimeChoice("pytorch", against, "mlx", note)
        return RuntimeChoice("pytorch", against, "", against)
    if doubt.limit:
        reason = f"{against}; PyTorch cannot run it: {torch.reason}"
        return RuntimeChoice("mlx", reason, "", torch.reason)
    raise broken(
        folder.path / "config.json",
        f"no runtime can run the model. PyTorch: {torch.reason}. MLX: {against}",
    )


def _doubt(folder: HfFolder) -> Doubt:
    """Compare what mlx-lm and transformers compute, or else look into mlx-lm's source."""
    found = compare(folder)
    if not found.unknown:
        return _difference(folder, found)
    unread = unread_setting(folder.outer_type, folder.config)
    return Doubt(unread, why_not_compared=_NOT_COMPARED)


def _difference(folder: HfFolder, found: Agreement) -> Doubt:
    if found.failure:
        return Doubt(f"mlx-lm cannot compute with its configuration: {found.failure}")
    if found.error <= _TOLERANCE:
        return Doubt()
    window = window_of(folder.config)
    if window is not None and found.within_window <= _TOLERANCE:
        return Doubt(f"mlx-lm ignores its sliding window of {window} tokens", window)
    share = f"{found.error:.1%} other logits" if np.isfinite(found.error) else "other logits"
    return Doubt(f"mlx-lm computes {share} than transformers with its configuration")


def compare(folder: HfFolder) -> Agreement:
    """Return how far mlx-lm and transformers agree on a scaled-down copy with random weights."""
    try:
        small = shrink(plain_floats(read_json(folder.path / "config.json")))
        return _compared(json.dumps(small, sort_keys=True))
    except MemoryError:
        raise
    except (Exception, SystemExit) as problem:
        return Agreement(unknown=first_line(problem))


@lru_cache(maxsize=256)
def _compared(config: str) -> Agreement:
    raw: dict[str, Any] = json.loads(config)
    size = flattened(dict(raw)).get("vocab_size") or _FEWEST_TOKENS
    tokens = [(7 + 31 * index) % min(int(size), 300) for index in range(_PROMPT_TOKENS)]
    wanted = compute_reference(raw, tokens)
    try:
        found = compute_logits(raw, wanted.weights, tokens, alone=_ALONE)
    except ComputeFailed as problem:
        return Agreement(failure=str(problem))
    width = min(found.shape[1], wanted.logits.shape[1])
    difference = np.linalg.norm(found[:, :width] - wanted.logits[:, :width], axis=1)
    errors = difference / (np.linalg.norm(wanted.logits[:, :width], axis=1) + 1e-30)
    errors = np.nan_to_num(errors, nan=np.inf)
    return Agreement(float(errors.max()), float(errors[:WINDOW_TOKENS].max()))
