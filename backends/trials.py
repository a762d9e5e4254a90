"""What an engine's trial of its model found, and where results are cached."""

import json
import logging
import operator
import os
import stat
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from core.files import NotARegularFile, open_regular, why, write_atomically

logger = logging.getLogger(__name__)

_MOST_RESULTS = 512
_MOST_BYTES = 4096
_REASON_CHARACTERS = 300
_SUFFIX = ".json"


@dataclass(frozen=True, slots=True)
class TrialRow:
    """One sequence of a trial: `prompt` is computed first, then `steps` one token at a time."""

    prompt: tuple[int, ...]
    steps: tuple[int, ...]

    @property
    def tokens(self) -> tuple[int, ...]:
        """All tokens, in order."""
        return self.prompt + self.steps

    @property
    def lengths(self) -> range:
        """The lengths after which logits are compared: of the prompt, and after each step."""
        return range(len(self.prompt), len(self.tokens) + 1)


# Returns the logits after each of the row's `lengths`: (1 + steps, vocabulary), float32.
Reference = Callable[[TrialRow], NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class TrialResult:
    """What gave the same logits as a row that is computed alone, in one pass.

    `is_sound`: that row itself, compared with another runtime.  `has_cache`: single tokens after
    computed ones.  `has_batches`: rows of different lengths together.  `has_chunks`: a prompt in
    several passes.  `has_reuse`: a copied or cut cache.  `choice` is the engine's own; `reason`
    tells what the first failure was, and is empty if all is right.
    """

    is_sound: bool = True
    has_cache: bool = True
    has_batches: bool = True
    has_chunks: bool = True
    has_reuse: bool = True
    reason: str = ""
    choice: str = ""

    @property
    def is_right(self) -> bool:
        """Whether everything gave the same logits."""
        return not self.reason

    @property
    def has_all(self) -> bool:
        """Whether nothing is left out of what the engine does."""
        return (
            self.is_sound
            and self.has_cache
            and self.has_batches
            and self.has_chunks
            and self.has_reuse
        )

    def __and__(self, other: Self) -> "TrialResult":
        """Return what is right in both."""
        return self._joined(other, operator.and_)

    def __or__(self, other: Self) -> "TrialResult":
        """Return what is right in one of them: numbers that differ by chance do so only once."""
        found = self._joined(other, operator.or_)
        return replace(found, reason="") if found.has_all else found

    def _joined(self, other: Self, join: Callable[[bool, bool], bool]) -> "TrialResult":
        return TrialResult(
            join(self.is_sound, other.is_sound),
            join(self.has_cache, other.has_cache),
            join(self.has_batches, other.has_batches),
            join(self.has_chunks, other.has_chunks),
            join(self.has_reuse, other.has_reuse),
            self.reason or other.reason,
            self.choice or other.choice,
        )


class TrialStore(Protocol):
    """Keeps results by key.  Thread-safe."""

    def get(self, key: str) -> TrialResult | None:
        """Return the result of an earlier trial; None if there is none, or it is damaged."""
        ...

    def put(self, key: str, result: TrialResult) -> None:
        """Keep a result; never raises."""
        ...


class RamTrials:
    """Results of this process."""

    def __init__(self) -> None:
        self._results: OrderedDict[str, TrialResult] = OrderedDict()

    def get(self, key: str) -> TrialResult | None:
        """See `TrialStore`."""
        return self._results.get(key)

    def put(self, key: str, result: TrialResult) -> None:
        """See `TrialStore`."""
        self._results[key] = result
        while len(self._results) > _MOST_RESULTS:
            self._results.popitem(last=False)


class TrialFolder:
    """Results in a folder, one small file each; the oldest of more than 512 are deleted.

    Several processes may share it: files are replaced atomically.
    """

    def __init__(self, path: Path) -> None:
        """`path` is created with the first result."""
        self._path = path

    def get(self, key: str) -> TrialResult | None:
        """See `TrialStore`; what cannot be read counts as unknown."""
        try:
            with open_regular(self._path / (key + _SUFFIX)) as file:
                return _parsed(file.read(_MOST_BYTES + 1))
        except (OSError, NotARegularFile):
            return None

    def put(self, key: str, result: TrialResult) -> None:
        """See `TrialStore`; a full disk costs another trial at the next load."""
        data = json.dumps(asdict(result)).encode()
        try:
            self._path.mkdir(parents=True, exist_ok=True)
            write_atomically(self._path / (key + _SUFFIX), data, is_durable=False)
            self._drop_oldest()
        except OSError as problem:
            logger.warning("the result of a model's trial cannot be kept: %s", why(problem))

    def _drop_oldest(self) -> None:
        found = []
        with os.scandir(self._path) as entries:
            for entry in entries:
                with suppress(OSError):
                    status = entry.stat(follow_symlinks=False)
                    if stat.S_ISREG(status.st_mode):
                        found.append((status.st_mtime_ns, entry.path))
        for _, path in sorted(found)[: max(len(found) - _MOST_RESULTS, 0)]:
            with suppress(OSError):
                os.unlink(path)


def _parsed(data: bytes) -> TrialResult | None:
    """Return the result in a file; None if anything in it is not as it was written."""
    if len(data) > _MOST_BYTES:
        return None
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        return None
    known = {each.name: each.type for each in fields(TrialResult)}
    if not isinstance(values, dict) or values.keys() != known.keys():
        return None
    if any(type(values[name]) is not kind for name, kind in known.items()):
        return None
    return TrialResult(**values)


def shortened(reason: str) -> str:
    """Return a reason as one line that fits a result."""
    return " ".join(reason.split())[:_REASON_CHARACTERS]


@dataclass(frozen=True, slots=True)
class TrialOptions:
    """How an engine tries its model while it is opened.

    `hold` is held during each pass, as during an engine's step.  With `has_alternative`, another
    runtime can run the model: the engine raises `OtherRuntimeNeeded` instead of serving what is
    wrong.  `reference` loads the model with that runtime for the time of a trial.
    """

    store: TrialStore | None = None
    hold: Callable[[], AbstractContextManager[None]] = nullcontext
    has_alternative: bool = False
    reference: Callable[[], AbstractContextManager[Reference | None]] | None = None


class OtherRuntimeNeeded(Exception):
    """This runtime computes the model wrongly, and another one is said to be there."""

    def __init__(self, reason: str) -> None:
        """`reason` completes the sentence "MLX is not used: ..."."""
        super().__init__(reason)
        self.reason = reason


def tell(model_name: str, result: TrialResult) -> tuple[str, ...]:
    """Return one sentence for each thing that an engine does otherwise than usual."""
    texts = (
        (result.is_sound, "may answer wrongly: its logits differ from those of another runtime"),
        (result.has_cache, "may answer wrongly: its KV cache gives other logits than its text"),
        (result.has_batches, "computes requests one after the other, not together"),
        (result.has_chunks, "does not compute long prompts in pieces"),
        (result.has_reuse, "does not reuse computed prompts"),
    )
    wrong = [text for is_right, text in texts if not is_right]
    return tuple(f"{model_name} {text} ({result.reason})." for text in wrong)
