"""A cache that huggingface_hub itself makes is listed, answers, and follows its repository."""

from pathlib import Path

import pytest

pytest.importorskip("torch")

from backends.base import EngineOptions, ModelInfo
from backends.registry import load_backends
from catalog.store import CatalogStore
from core.types import TokenPrompt
from scripts.hub_lib.server import running_hub
from tests.requests import request, run, token_ids_of
from tests.unit.catalog.scan.folders import Shelf, llama_tensors, write_model

FIRST, SECOND = "1" * 40, "2" * 40
OPTIONS = EngineOptions(max_sequences=2, threads=1, context_tokens=64, kv_tokens=128)
TOKENS = 8


async def answer(info: ModelInfo) -> list[int]:
    """Return the greedy tokens of a short prompt."""
    engine = load_backends()[info.format].open(info, OPTIONS)
    try:
        events = await run(engine, request(TokenPrompt((2, 3, 4, 5)), max_tokens=TOKENS))
    finally:
        await engine.close()
    return token_ids_of(events)


def write_bin(folder: Path) -> Path:
    """Write the same model with its weights as pytorch_model.bin."""
    import torch

    write_model(folder)
    (folder / "model.safetensors").unlink()
    tensors = {name: torch.from_numpy(value) for name, value in llama_tensors().items()}
    torch.save(tensors, folder / "pytorch_model.bin")
    return folder


async def test_a_cache_made_by_huggingface_hub_is_listed_and_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import snapshot_download

    home = tmp_path.resolve()
    cache = home / "cache"
    source = write_model(tmp_path / "source")
    as_bin = write_bin(tmp_path / "as-bin")
    (home / "models").mkdir()
    shelf = Shelf(home, CatalogStore(home / "catalog.sqlite"), extra=(cache,))
    # The tests forbid the client to use a network; this hub is none.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with running_hub() as hub:
        hub.publish("org/Nice-Model", source, FIRST)
        hub.publish("org/Old-Model", as_bin, FIRST)
        for name in ("org/Nice-Model", "org/Old-Model"):
            snapshot_download(name, endpoint=hub.endpoint, token=False, cache_dir=cache)
        shelf.scan()
        assert shelf.states() == {
            "nice-model@safetensors-f32": "ok",
            "old-model@pytorch-f32": "ok",
        }
        answers = {}
        for record in shelf.store.models():
            if record.info.files:
                assert record.info.files[0].is_symlink()
                answers[record.info.name] = await answer(record.info)
        assert len(answers["nice-model"]) == TOKENS
        assert answers["nice-model"] == answers["old-model"]
        # A new revision of the repository takes the place of the old one.
        newer = write_model(tmp_path / "newer", max_position_embeddings=96)
        hub.publish("org/Nice-Model", newer, SECOND)
        snapshot_download("org/Nice-Model", endpoint=hub.endpoint, token=False, cache_dir=cache)
    shelf.scan()
    assert len(shelf.states()) == 2
    renewed = shelf.store.get("nice-model@safetensors-f32")
    assert renewed is not None
    assert SECOND in renewed.info.files[0].parts
    assert await answer(renewed.info) == answers["nice-model"]
    shelf.scan()
    assert shelf.looked == []
    shelf.store.close()
