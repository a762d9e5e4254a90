"""Judges whether a model fits on this machine at a context, with the numbers; pure."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from backends.base import EngineOptions, MemoryEstimate, ModelInfo
from core.errors import InsufficientMemory
from core.units import format_bytes

Verdict: TypeAlias = Literal["fits", "tight", "too_big", "unknown"]
Estimate: TypeAlias = Callable[[ModelInfo, EngineOptions], MemoryEstimate]

DEFAULT_CONTEXT = 8192
# Above this share of the budget little is left for a second model or for prefixes.
_COMFORTABLE = 0.9
# Of Q4_K_M, and of 4 bits of MLX in groups of 64.
_USUAL_BITS = 4.8
# Of the weights, for keys, values and computing at a usual context.
_LISTED_SHARE = 0.2


@dataclass(frozen=True, slots=True)
class Room:
    """Memory for models on this machine: the budget of all, and what is free of it now."""

    budget_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class Fit:
    """Whether a model fits, and why; bytes are 0 where they are unknown.

    fits: beside what is loaded now.  tight: others may have to be unloaded, or little is left.
    too_big: not even alone.  `context_tokens` is the context that was asked about, at most the
    model's own; `largest_context` the longest that fits alone, 0 if none does.
    """

    verdict: Verdict
    reason: str
    room: Room
    weights_bytes: int = 0
    kv_bytes: int = 0
    overhead_bytes: int = 0
    context_tokens: int = 0
    largest_context: int = 0

    @property
    def total_bytes(self) -> int:
        """What the model needs at this context."""
        return self.weights_bytes + self.kv_bytes + self.overhead_bytes


def judge(
    info: ModelInfo,
    estimate: Estimate,
    options: EngineOptions,
    room: Room,
    context_tokens: int = DEFAULT_CONTEXT,
) -> Fit:
    """Return whether `info` fits; `estimate` is that of its format's backend.

    `options` are this server's; memory that only makes prefixes faster does not count.
    """
    context = min(context_tokens, info.context_length) or context_tokens
    asked = replace(options, context_tokens=context, kv_tokens=context, memory_limit_bytes=None)
    found = estimate(info, asked)
    fit = Fit(
        verdict="fits",
        reason="",
        room=room,
        weights_bytes=found.weights_bytes,
        kv_bytes=found.kv_bytes,
        overhead_bytes=found.transient_bytes,
        context_tokens=context,
        largest_context=_largest_context(info, estimate, options, room),
    )
    return _decided(fit)


def judge_size(weights_bytes: int, why_unknown: str, room: Room) -> Fit:
    """Return what the bytes of the weights alone tell: too big, or unknown with the reason."""
    fit = Fit("unknown", why_unknown, room, weights_bytes=weights_bytes)
    if weights_bytes > room.budget_bytes:
        return _decided(fit)
    return fit


def judge_listed(parameters: int, weights_bytes: int, formats: Collection[str], room: Room) -> Fit:
    """Return what a search's result tells: an estimate, as the repository is not read yet.

    `weights_bytes` are those of safetensors files.  GGUF and MLX repositories usually have 4-bit
    quantizations, which their number of parameters gives the size of.  The KV cache and
    computing are allowed for by a share of the weights.  Unknown without any of the numbers.
    """
    has_small = not {"gguf", "mlx"}.isdisjoint(formats)
    weights = int(parameters * _USUAL_BITS / 8) if has_small and parameters else weights_bytes
    if not weights:
        return Fit("unknown", "The hub does not state its size.", room)
    kind = f" in {_USUAL_BITS:g} bits a weight" if has_small and parameters else ""
    fit = _decided(
        Fit("unknown", "", room, weights_bytes=weights, overhead_bytes=int(weights * _LISTED_SHARE))
    )
    return replace(
        fit,
        reason=f"Estimated from {format_bytes(weights)} of weights{kind}. {fit.reason}",
    )


def _decided(fit: Fit) -> Fit:
    """Return `fit` with its verdict and the reason in words."""
    room, total = fit.room, fit.total_bytes
    context = f" with a context of {fit.context_tokens:,} tokens" if fit.context_tokens else ""
    needs = f"It needs {format_bytes(total)}{context}"
    if total > room.budget_bytes:
        hint = "choose a smaller quantization"
        if fit.largest_context:
            hint = f"the longest context that fits is {fit.largest_context:,} tokens"
        return replace(
            fit,
            verdict="too_big",
            reason=f"{needs}; models may use {format_bytes(room.budget_bytes)}: {hint}.",
        )
    if total > room.free_bytes:
        return replace(
            fit,
            verdict="tight",
            reason=f"{needs}; {format_bytes(max(room.free_bytes, 0))} of "
            f"{format_bytes(room.budget_bytes)} are free now: other models are unloaded for it.",
        )
    if total > room.budget_bytes * _COMFORTABLE:
        return replace(
            fit,
            verdict="tight",
            reason=f"{needs}, nearly all of the {format_bytes(room.budget_bytes)} that models may "
            "use.",
        )
    return replace(
        fit,
        verdict="fits",
        reason=f"{needs}; {format_bytes(room.free_bytes)} are free.",
    )


def _largest_context(
    info: ModelInfo, estimate: Estimate, options: EngineOptions, room: Room
) -> int:
    """Return the longest context that is granted within the budget, 0 if none is."""
    wanted = replace(
        options, context_tokens=None, kv_tokens=None, memory_limit_bytes=room.budget_bytes
    )
    try:
        return estimate(info, wanted).context_tokens
    except InsufficientMemory:
        return 0
