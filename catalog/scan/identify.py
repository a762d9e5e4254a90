"""Identifies the format of a model file by asking every backend."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeAlias, runtime_checkable

from backends.base import Backend, ModelInfo
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

    `took_memory`: reading it needed more memory than the process could get.
    """

    format: str
    reason: str
    took_memory: bool = False


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
    format that recognizes it.  One that cannot be read for now is uninspected.
    """
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
        return answers.refusals[0]
    return Uninspected(answers.unasked[0]) if answers.unasked else Unknown(tuple(answers.others))


def identify(path: Path, backends: Iterable[Backend]) -> ModelInfo:
    """Return what `path` is.

    Raises BrokenModel, Unavailable, or NotThisFormat with every backend's reason.
    """
    match examine(path, backends):
        case ModelInfo() as info:
            return info
        case Refused(reason=reason):
            raise BrokenModel(reason, param="model")
        case Uninspected(reason=reason):
            raise Unavailable(f"{path.name!r} was not inspected: {reason}.", param="model")
        case Unknown(reasons=reasons):
            raise NotThisFormat("; ".join(reasons) or "no backend was asked")
