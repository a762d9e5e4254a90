"""A library that can be scanned, with a backend that only identifies."""

from dataclasses import dataclass
from pathlib import Path

from backends.base import (
    Availability,
    Backend,
    Engine,
    EngineOptions,
    MemoryEstimate,
    ModelInfo,
)
from backends.gguf.file import gguf_info
from catalog.models import ScanReport
from catalog.scan.scan import scan
from catalog.store import CatalogStore
from core.settings import Settings


class GgufIdentification(Backend):
    """The identification half of the GGUF backend; counts the files it opened."""

    name = "gguf"

    def __init__(self) -> None:
        self.asked: list[str] = []

    def availability(self) -> Availability:
        """Say yes."""
        return Availability(True)

    def identify(self, path: Path) -> ModelInfo:
        """Read the file's header."""
        self.asked.append(path.name)
        return gguf_info(path)

    def estimate(self, info: ModelInfo, options: EngineOptions) -> MemoryEstimate:
        """Not part of identification."""
        raise NotImplementedError

    def open(self, info: ModelInfo, options: EngineOptions) -> Engine:
        """Not part of identification."""
        raise NotImplementedError


@dataclass(slots=True)
class Library:
    """A home folder with its models, catalog and backend."""

    home: Path
    store: CatalogStore
    backend: GgufIdentification
    extra: tuple[Path, ...] = ()
    starters: bool = False

    @property
    def models(self) -> Path:
        """The folder that is always scanned."""
        return self.home / "models"

    def scan(self) -> ScanReport:
        """Scan at time 100, forgetting which files were asked about before."""
        self.backend.asked.clear()
        settings = Settings(home=self.home, models_path=list(self.extra), starters=self.starters)
        return scan(settings, self.store, [self.backend], clock=lambda: 100.0)

    def ids(self) -> list[str]:
        """Return the ids of all entries."""
        return [record.id for record in self.store.models()]
