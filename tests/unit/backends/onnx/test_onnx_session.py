"""ONNX models run on the CPU of every machine."""

import sys
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

from backends.base import EngineOptions
from backends.onnx.backend import OnnxBackend
from tests.onnx_files import ENCODER_CONFIG, decoder, encoder, write_folder

OPTIONS = EngineOptions(max_sequences=1, threads=1, prefill_chunk_tokens=64)


@pytest.mark.parametrize("is_encoder", [True, False], ids=["encoder", "decoder"])
@pytest.mark.parametrize("system", ["darwin", "linux"])
async def test_no_other_provider_is_asked_for(
    system: str, is_encoder: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    session = onnxruntime.InferenceSession

    def record(*arguments: Any, providers: list[Any], **options: Any) -> Any:
        asked.extend(each if isinstance(each, str) else each[0] for each in providers)
        return session(*arguments, providers=["CPUExecutionProvider"], **options)

    monkeypatch.setattr(onnxruntime, "InferenceSession", record)
    monkeypatch.setattr(sys, "platform", system)
    model, config = (encoder(), ENCODER_CONFIG) if is_encoder else (decoder(), None)
    backend = OnnxBackend()
    info = backend.identify(write_folder(tmp_path / "tiny", model, config=config))
    engine = backend.open(info, OPTIONS)
    await engine.close()
    assert asked
    assert set(asked) == {"CPUExecutionProvider"}
