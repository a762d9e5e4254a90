"""Chooses which of a repository's models is best on this machine, and says why; pure."""

import re
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from catalog.hub.fit import Fit
from catalog.hub.remote import RemoteModel

# The fastest runtime first: on a Mac those that use its GPU.
_ON_A_MAC = ("mlx", "gguf", "safetensors", "coreml", "onnx", "pytorch")
_ELSEWHERE = ("gguf", "safetensors", "onnx", "mlx", "coreml", "pytorch")
_NAMED_BITS = re.compile(r"(?:[a-z]+)?(\d{1,2})")
# From 4 to 8 bits a weight, with scales, answers are close to the original's in half its size.
_LEAST_BITS, _MOST_BITS, _COARSE_BITS = 4.0, 9.0, 3.0
_UNKNOWN_BITS = 16.0


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model of a repository with its fit on this machine."""

    model: RemoteModel
    fit: Fit

    @property
    def bits(self) -> float:
        """Bits for each weight, from the sizes, else from the quantization's name."""
        info, entry = self.model.info, self.model.entry
        if info is not None and info.parameters and info.quantization == entry.quantization:
            return entry.weights_bytes * 8 / info.parameters
        named = _NAMED_BITS.match(entry.quantization or (info.quantization if info else ""))
        return float(named[1]) if named else _UNKNOWN_BITS


@dataclass(frozen=True, slots=True)
class HubChoice:
    """What to download; `convert_to` is the format that it has to be converted to, or empty.

    `candidate` is None where nothing of the repository can be used here; `reason` says why.
    """

    candidate: Candidate | None
    reason: str
    convert_to: str = ""


def preferred_formats(platform: str = sys.platform) -> tuple[str, ...]:
    """Return the formats in the order of their speed on a platform."""
    return _ON_A_MAC if platform == "darwin" else _ELSEWHERE


def choose(
    candidates: Sequence[Candidate],
    runnable: Collection[str],
    convertible: Mapping[str, str],
    preferred: Sequence[str],
) -> HubChoice:
    """Return the best model: one that runs as it is, and a conversion only without any.

    What fits goes before what is tight, then the faster format, then the most precise of 4 to 8
    bits.  `runnable` are the formats that run here, `convertible` those that can be converted,
    each with the format that comes of it.
    """
    usable = [one for one in candidates if not one.model.is_refused]
    native = [one for one in usable if one.model.format in runnable]
    fitting = [one for one in native if one.fit.verdict in ("fits", "tight")]
    if fitting:
        best = min(fitting, key=lambda one: _rank(one, preferred))
        return HubChoice(best, _why(best, native, preferred))
    unknown = [one for one in native if one.fit.verdict == "unknown"]
    if unknown:
        best = min(unknown, key=lambda one: (_order(one, preferred), one.fit.weights_bytes))
        return HubChoice(best, f"Whether it fits is unknown: {best.fit.reason}")
    if native:
        smallest = min(native, key=lambda one: one.fit.total_bytes)
        reason = f"Even the smallest, {_name(smallest)}, is too big. {smallest.fit.reason}"
        return HubChoice(None, reason)
    sources = [
        one for one in usable if one.model.format in convertible and one.fit.verdict != "too_big"
    ]
    if sources:
        best = min(sources, key=lambda one: _rank(one, preferred))
        target = convertible[best.model.format]
        return HubChoice(
            best,
            f"Nothing in it runs here as it is; {_name(best)} can be converted to {target}.",
            target,
        )
    return HubChoice(None, _why_not(candidates))


def _rank(one: Candidate, preferred: Sequence[str]) -> tuple[int, int, int, float]:
    verdict = ("fits", "tight", "unknown", "too_big").index(one.fit.verdict)
    band = _band(one.bits)
    # The most precise of a band; above 8 bits, the smallest.
    return verdict, _order(one, preferred), band, one.bits if band == 1 else -one.bits


def _band(bits: float) -> int:
    if _LEAST_BITS <= bits <= _MOST_BITS:
        return 0
    if bits > _MOST_BITS:
        return 1
    return 2 if bits >= _COARSE_BITS else 3


def _order(one: Candidate, preferred: Sequence[str]) -> int:
    format = one.model.format
    return preferred.index(format) if format in preferred else len(preferred)


def _name(one: Candidate) -> str:
    entry = one.model.entry
    return f"{entry.name} ({one.model.format})"


def _why(best: Candidate, native: Sequence[Candidate], preferred: Sequence[str]) -> str:
    """Return the reason for `best` among the models that run here."""
    format = best.model.format
    same = [one for one in native if one.model.format == format]
    if len({one.model.format for one in native}) > 1:
        passed = [one for one in native if _order(one, preferred) < _order(best, preferred)]
        start = (
            f"{format} fits better than {passed[0].model.format}, which is faster here."
            if passed
            else f"{format} is the fastest of its formats here."
        )
    else:
        start = f"{format} runs here."
    if len(same) > 1:
        detail = {
            0: "the most precise of 4 to 8 bits that fits",
            1: "the smallest of full precision",
            2: "the most precise that fits",
            3: "the most precise that fits; its answers suffer from so few bits",
        }[_band(best.bits)]
        start += f" {best.model.entry.quantization or best.model.entry.name} is {detail}."
    return f"{start} {best.fit.reason}"


def _why_not(candidates: Sequence[Candidate]) -> str:
    refused = [one for one in candidates if one.model.is_refused]
    if refused:
        return f"None of its models can be used here. {_name(refused[0])}: " + (
            refused[0].model.problem
        )
    if candidates:
        formats = sorted({one.model.format for one in candidates})
        return f"Its formats ({', '.join(formats)}) do not run here and cannot be converted."
    return "It has no model in a format that this server knows."
