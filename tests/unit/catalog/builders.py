"""Builders of catalog entries."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from backends.base import ModelInfo
from catalog.models import Local, ModelRecord, ScannedModel, ScanReport
from catalog.store import CatalogStore
from core.types import Capability


def make_info(path: str = "/m/tiny.gguf", **changes: Any) -> ModelInfo:
    """Return a small GGUF model's description."""
    info = ModelInfo(
        format="gguf",
        name="tiny",
        architecture="llama",
        quantization="q4_0",
        files=(Path(path),),
        size_bytes=1000,
        parameters=10,
        context_length=2048,
        capabilities=frozenset({Capability.CHAT, Capability.COMPLETION}),
        chat_template="{{ messages }}",
        tool_template="{{ tools }}{{ messages }}",
        rag_template="{{ documents }}{{ messages }}",
        details={"n_layer": 2, "sampling_temp": 0.5, "bos_token": "<s>", "is_tied": True},
    )
    return replace(info, **changes)


def make_found(path: str = "/m/tiny.gguf", reason: str = "", **changes: Any) -> ScannedModel:
    """Return what a scan would find at `path`."""
    return ScannedModel(make_info(path, **changes), Local("/m"), f"1:{path}", reason)


def make_record(record_id: str, **changes: Any) -> ModelRecord:
    """Return a catalog entry."""
    state = changes.pop("state", "ok")
    return ModelRecord(record_id, make_info(**changes), Local("/m"), "1:", 0.0, state=state)


def write(store: CatalogStore, *found: ScannedModel, missing: tuple[str, ...] = ()) -> ScanReport:
    """Record a scan's result at time 100."""
    return store.record_scan(found, missing, (), now=100.0)
