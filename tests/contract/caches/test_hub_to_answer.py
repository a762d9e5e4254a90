"""From a search on a hub to the answer of the model that was chosen and downloaded."""

from pathlib import Path

import pytest

pytest.importorskip("gguf")

from backends.base import EngineOptions, ModelInfo
from backends.registry import load_backends
from catalog.hub.choice import Candidate, choose
from catalog.hub.client import HubClient
from catalog.hub.download.job import DownloadJob
from catalog.hub.download.run import DownloadProgress, run_download
from catalog.hub.fit import Room
from catalog.hub.reference import parse_reference
from catalog.hub.remote import fit_of, inspect_repository
from catalog.hub.repository import read_repository
from catalog.hub.search import HubQuery, search
from catalog.scan.inspector import Inspector
from catalog.store import CatalogStore
from core.types import TokenPrompt
from core.units import GIB
from scripts.hub_lib.faults import Fault
from scripts.hub_lib.server import running_hub
from tests.gguf_files import llama_gguf
from tests.requests import request, run, token_ids_of
from tests.unit.catalog.scan.folders import Shelf, write_model

OPTIONS = EngineOptions(max_sequences=2, threads=1, context_tokens=64, kv_tokens=128)
ROOM = Room(4 * GIB, 4 * GIB)
TOKENS = 8


async def answer(info: ModelInfo) -> list[int]:
    """Return the greedy tokens of a short prompt."""
    engine = load_backends()[info.format].open(info, OPTIONS)
    try:
        prompt = TokenPrompt((2, 300, 301, 302))
        events = await run(engine, request(prompt, max_tokens=TOKENS))
    finally:
        await engine.close()
    return token_ids_of(events)


async def test_a_model_of_a_hub_is_found_chosen_downloaded_and_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    home = tmp_path.resolve()
    source = write_model(home / "source")
    llama_gguf(source / "Nice-Model-F32.gguf")
    (source / "README.md").write_text("---\nlicense: mit\ntags: [gguf]\n---\n# Nice\n")
    (home / "models").mkdir()
    inspector = Inspector(["gguf", "safetensors"])
    with running_hub() as hub:
        hub.publish("org/Nice-Model-GGUF", source)
        client = HubClient(hub.endpoint, "")
        (listed,) = search(client, HubQuery(text="nice", format="gguf")).models
        reference = parse_reference(f"{hub.endpoint}/{listed.id}/tree/main", hub.endpoint)
        repository = read_repository(client, reference.repository, reference.revision)
        try:
            models = inspect_repository(client, repository, inspector.examine)
        finally:
            inspector.close()
        backends = load_backends()
        candidates = [Candidate(m, fit_of(m, backends, OPTIONS, ROOM, 64)) for m in models]
        best = choose(candidates, {"gguf", "safetensors"}, {}, ("gguf", "safetensors"))
        assert best.candidate is not None
        entry = best.candidate.model.entry
        assert (entry.name, best.candidate.fit.verdict) == ("Nice-Model-F32.gguf", "fits")
        job = DownloadJob(
            hub.endpoint, listed.id, repository.commit, entry.files, home / "models" / "Nice-Model"
        )
        # It is cut on the way.
        hub.faults.add(Fault("truncate", file=entry.name, at=100_000, times=1))
        told: list[DownloadProgress] = []
        await run_download(job, "", told.append)
        assert told[-1].done_bytes == entry.size_bytes
    shelf = Shelf(home, CatalogStore(home / "catalog.sqlite"))
    shelf.scan()
    (record,) = [one for one in shelf.store.models() if one.info.files]
    assert (record.state, record.id) == ("ok", "nice-model@gguf-f32")
    downloaded = await answer(record.info)
    assert len(downloaded) == TOKENS
    original = backends["gguf"].identify(source / "Nice-Model-F32.gguf")
    assert downloaded == await answer(original)
    shelf.store.close()
