"""Identifies the format of a model file by asking every backend."""

import logging
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol, TypeAlias, runtime_checkable

from backends.base import Backend, ModelInfo
from backends.hf.kinds.other import refusal
from catalog.scan.other_formats import describe, is_lfs_pointer, kind_around
from catalog.scan.packages import Packages, natural_format
from core.errors import BrokenModel, NotThisFormat, Unavailable
from core.files import passing_cause, why

logger = logging.getLogger(__name__)


@runtime_checkable
class HasBuiltInModels(Protocol):
    """A backend with built-in models, which have no files."""

    def built_in(self) -> tuple[ModelInfo, ...]:
        """Return the built-in models."""
        ...


@dataclass(frozen=True, slots=True)
class Refused:
    """A file of a known format that cannot be used; `reason` says why.

    `took_memory`: reading it needed more memory than the process could get.  `is_guess`: no
    backend recognizes it; what it is was told from its name and its start.
    """

    format: str
    reason: str
    took_memory: bool = False
    is_guess: bool = False


@dataclass(frozen=True, slots=True)
class Unknown:
    """A file that no backend recognizes, with each backend's reason."""

    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Uninspected:
    """A file whose inspection failed; `reason` says nothing about its content."""

    reason: str


Outcome: TypeAlias = ModelInfo | Refused | Unknown | Uninspected


def passing_reason(problem: BaseException) -> str:
    """Return the system's error behind an exception if it may pass by itself, else nothing."""
    cause = passing_cause(problem)
    return "" if cause is None else why(cause)


@dataclass(slots=True)
class _Answers:
    """What the backends said of one file; `failure` is an error that may pass."""

    claims: list[ModelInfo] = field(default_factory=list)
    refusals: list[Refused] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    unasked: list[str] = field(default_factory=list)
    failure: str = ""

    def ask(self, backend: Backend, path: Path) -> None:
        try:
            self.claims.append(backend.identify(path))
        except Unavailable as problem:
            self.unasked.append(problem.message)
        except MemoryError:
            self.refusals.append(
                Refused(
                    backend.name,
                    "Identifying the file took too much memory; it may be damaged.",
                    took_memory=True,
                )
            )
        except Exception as problem:
            self.failure = self.failure or passing_reason(problem)
            self._add(backend, path, problem)

    def _add(self, backend: Backend, path: Path, problem: Exception) -> None:
        match problem:
            case NotThisFormat():
                self.others.append(f"{backend.name}: {problem}")
            case BrokenModel():
                self.refusals.append(Refused(backend.name, problem.message))
            case _:
                # A bug in a plug-in must not hide the models of other formats.
                logger.error(
                    "the backend %s failed to identify a file",
                    backend.name,
                    exc_info=problem,
                    extra={"file": str(path)},
                )
                self.others.append(f"{backend.name}: its identification failed")


def examine(path: Path, backends: Iterable[Backend]) -> Outcome:
    """Ask every backend about `path`; blocks while headers are read.

    A file that several formats recognize is refused, and so is one that is damaged in the only
    format that recognizes it, or that looks like a model of a format that is not served.  One
    that cannot be read for now is uninspected.
    """
    backends = tuple(backends)
    outcome = _asked(path, backends)
    if not isinstance(outcome, Unknown):
        return outcome
    return _guessed(path, [backend.name for backend in backends]) or outcome


def _asked(path: Path, backends: Iterable[Backend]) -> Outcome:
    """Return what the backends say of `path`."""
    answers = _Answers()
    for backend in backends:
        answers.ask(backend, path)
    if answers.failure:
        # Another format might have recognized it as well.
        return Uninspected(f"it could not be read ({answers.failure})")
    if len(answers.claims) == 1:
        return answers.claims[0]
    if answers.claims:
        names = " and ".join(info.format for info in answers.claims)
        return Refused(
            answers.claims[0].format,
            f"The formats {names} all recognize the file {path.name!r}; it is ambiguous.",
        )
    if answers.refusals:
        return _explained(path, answers.refusals)
    if answers.unasked:
        return Uninspected(answers.unasked[0])
    return Unknown(tuple(answers.others))


def _explained(path: Path, refusals: list[Refused]) -> Refused:
    """Return the refusal of the format that the file's name promises, or what the model is for."""
    promised = natural_format(path)
    first = next((one for one in refusals if one.format == promised), refusals[0])
    if first.took_memory or first.format == "gguf":
        return first
    if is_lfs_pointer(path):
        reason = f"{path.name} is a Git LFS pointer; its content was not downloaded."
        return Refused(promised or first.format, reason)
    return replace(first, reason=_other_purpose(path) or first.reason)


def _guessed(path: Path, asked: Collection[str]) -> Refused | None:
    """Return why a file is refused that no backend recognizes; None if it is not a model.

    Of the models of a format that is switched off nothing is said.
    """
    promised = natural_format(path)
    described = None if promised and promised not in asked else describe(path)
    if described is None:
        return None
    format, reason = described
    purpose = _other_purpose(path) if format != "gguf" else ""
    return Refused(format, purpose or reason, is_guess=True)


def _other_purpose(path: Path) -> str:
    """Return the reason for refusing a model that is not for text; empty if it may be."""
    package = Packages().of(path, Path(path.anchor))
    kind = kind_around(path, package if package.is_dir() else path.parent)
    if not kind:
        return ""
    return f"The model of {path.name} cannot be used: {refusal(kind)}."


def identify(path: Path, backends: Iterable[Backend]) -> ModelInfo:
    """Return what `path` is.

    Raises BrokenModel, Unavailable, or NotThisFormat with every backend's reason.
    """
    match _asked(path, backends):
        case ModelInfo() as info:
            return info
        case Refused(reason=reason):
            raise BrokenModel(reason, param="model")
        case Uninspected(reason=reason):
            raise Unavailable(f"{path.name!r} was not inspected: {reason}.", param="model")
        case Unknown(reasons=reasons):
            raise NotThisFormat("; ".join(reasons) or "no backend was asked")
