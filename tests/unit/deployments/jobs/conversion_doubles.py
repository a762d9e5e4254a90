"""Stand-ins for what conversion jobs use: the conversion, the catalog, the memory."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from catalog.convert.pause import PauseSwitch
from catalog.convert.quality.figure import QualityFigure
from catalog.convert.run import ConversionProgress, ConversionRequest, Measure
from catalog.models import Local, ModelRecord
from core.errors import ModelNotFound
from deployments.jobs.quality import Comparison
from deployments.messages import MemoryLease
from tests.unit.catalog.builders import make_info

ID = "m@safetensors-bf16"
HELD_BYTES = 123
FIGURE = QualityFigure(tokens=8, kl_mean=0.125)


def record(**changes: Any) -> ModelRecord:
    info = replace(
        make_info("/m/model.safetensors"),
        format="safetensors",
        name="m",
        size_bytes=16 * 10**9,
        parameters=8 * 10**9,
        quantization="bf16",
    )
    source = changes.pop("source", Local("/m"))
    return replace(ModelRecord(ID, info, source, "1:", 0.0), **changes)


class Converter:
    """Stands in for the conversion itself: waits for the gate, then ends as it is told."""

    def __init__(self) -> None:
        self.requests: list[ConversionRequest] = []
        self.pauses: list[PauseSwitch] = []
        self.gate = asyncio.Event()
        self.fraction = 0.25
        self.outcome: Exception | None = None
        self.cancelled = 0
        self.figures: list[QualityFigure] = []

    async def __call__(
        self,
        request: ConversionRequest,
        note: Callable[[ConversionProgress], None],
        pause: PauseSwitch,
        on_memory: Callable[[int], None],
        measure: Measure,
    ) -> Path:
        self.requests.append(request)
        self.pauses.append(pause)
        on_memory(HELD_BYTES)
        note(ConversionProgress(self.fraction, 1, 1, "reading"))
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.outcome is not None:
            raise self.outcome
        place(request)
        self.figures.append(await measure(request.target, request.target.parent))
        return request.target


class Quality:
    """Stands in for the measurement of a result; notes what is to be compared."""

    def __init__(self) -> None:
        self.compared: list[Comparison] = []

    async def measure(
        self, comparison: Comparison, result: Path, folder: Path, pause: PauseSwitch
    ) -> QualityFigure:
        del result, folder, pause
        self.compared.append(comparison)
        return FIGURE


def place(request: ConversionRequest) -> None:
    """Write what a conversion leaves of its choices."""
    request.target.mkdir(parents=True)
    parameters = {
        "model_id": request.model_id,
        "target_format": request.target_format,
        "quantization": request.quantization,
        "group_size": request.group_size if request.target_format == "mlx" else None,
    }
    text = json.dumps({"parameters": parameters})
    (request.target / "provenance.json").write_text(text)


class Library:
    """Stands in for the catalog: some records, and what became of the folders."""

    def __init__(self, *records: ModelRecord) -> None:
        self.all = list(records)
        self.registered: list[Path] = []
        self.refusal: Exception | None = None

    async def source(self, name: str) -> ModelRecord:
        found = next((one for one in self.all if one.id == name), None)
        if found is None:
            raise ModelNotFound.of(name, [])
        return found

    async def records(self) -> list[ModelRecord]:
        return self.all

    async def register(self, folder: Path) -> None:
        self.registered.append(folder)
        if self.refusal is not None:
            raise self.refusal


class Memory:
    """Grants memory at once, later, or not at all; notes what was asked for and measured."""

    def __init__(self, refusal: Exception | None = None) -> None:
        self.refusal = refusal
        self.gate = asyncio.Event()
        self.gate.set()
        self.asked: list[MemoryLease] = []
        self.measured: list[int] = []
        self.ended = 0

    @asynccontextmanager
    async def held(self, lease: MemoryLease) -> AsyncIterator[Callable[[int], None]]:
        self.asked.append(lease)
        try:
            await self.gate.wait()
            if self.refusal is not None:
                raise self.refusal
            yield self.measured.append
        finally:
            self.ended += 1
