"""The management API over a real catalog, with a stand-in for the scheduler's handle."""

import asyncio
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from backends.base import RuntimeChoice
from catalog.store import CatalogStore
from core.errors import BackendUnavailable, ImpetusError, ModelNotFound, Unavailable
from core.settings import Settings
from core.types import Capability
from core.units import GIB
from deployments.decisions import DecisionLog
from deployments.messages import (
    Decision,
    LoadContext,
    LoadPreview,
    MemoryPreview,
    ModelStates,
    Residency,
)
from deployments.router import management as management_module
from deployments.router.catalog import CatalogView
from deployments.router.management import SchedulerManagement
from deployments.router.model_states import ModelStatesWatch
from router.app import create_app
from router.services import Services
from scheduler.state import LoadPlan
from tests.fakes import MANAGING, FakeDispatcher, FakeHealth, FakeTelemetry
from tests.live_server import client_of, error_of
from tests.unit.catalog.builders import make_found, write
from tests.unit.deployments.handles import FakeHandle, answering

TINY = "tiny@gguf-q4_0"
EMBEDDER = "embedder@gguf-q4_0"
DETAILS = {
    "n_layer": 2,
    "n_embd": 64,
    "n_head_kv": 2,
    "key_length": 32,
    "value_length": 32,
    "vocabulary_size": 100,
}


async def _unchanged(model_id: str, problem: ImpetusError) -> ImpetusError:
    del model_id
    return problem


class Server:
    """The application over a catalog in a folder; `handle` notes what the scheduler is asked."""

    def __init__(self, home: Path) -> None:
        settings = Settings(home=home, formats=["gguf"], memory_budget=GIB)
        self.resident: list[Residency] = []
        self.version = 0
        self.handle: Any = FakeHandle(
            rescan=answering(None),
            ensure_loaded=self.ensure_loaded,
            unload=self.unload,
            settings_changed=answering(None),
            preview_load=self.preview_load,
            model_states=self.model_states,
            decisions=answering([Decision(5.0, "wanted", "loaded", "it fits")]),
        )
        handle: Any = self.handle
        self.view = CatalogView(settings, handle, ModelStatesWatch(handle), _unchanged)
        self.management = SchedulerManagement(settings, handle, DecisionLog())
        telemetry, self.dispatcher = FakeTelemetry(), FakeDispatcher()
        self.app = create_app(
            Services(
                settings,
                self.view,
                self.dispatcher,
                FakeHealth(),
                telemetry,
                self.management,
                MANAGING["x-impetus-token"],
            )
        )

    async def preview_load(self, model_id: str, changes: dict[str, Any]) -> MemoryPreview:
        assert model_id == TINY
        if "notes" in changes:
            raise Unavailable("It is starting.")
        return MemoryPreview(
            LoadPreview("now", LoadPlan(60), ("a",)), changes["context_length"], 50
        )

    async def model_states(self, known_version: int) -> ModelStates:
        assert known_version == -1
        self.version += 1
        return ModelStates(residencies=tuple(self.resident), version=self.version)

    async def ensure_loaded(self, model_id: str, need: LoadContext) -> Residency:
        assert need.is_retry
        self.resident = [Residency(model_id, "gguf", "r", "n", 1024, 0.1)]
        return self.resident[0]

    async def unload(self, model_id: str) -> bool:
        assert [one.model_id for one in self.resident] == [model_id]
        self.resident = []
        return True

    async def ask(self, method: str, path: str, body: Any = None) -> httpx.Response:
        async with client_of(self.app, **MANAGING) as client:
            return await client.request(method, path, json=body)


def filled_server(tmp_path: Path) -> Iterator[Server]:
    """Yield a server with two models, of which one has the alias `mine`."""
    store = CatalogStore(tmp_path / "catalog.sqlite")
    write(store, make_found(details=DETAILS), make_found("/m/b.gguf", name="other"))
    store.set_alias("mine", TINY)
    store.close()
    server = Server(tmp_path)
    yield server
    server.management.close()
    server.view.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    yield from filled_server(tmp_path)


async def test_change_is_written_told_and_shown(server: Server, tmp_path: Path) -> None:
    changes = {"context_length": 512, "keep_alive_s": 1.5, "pin": True}
    answer = await server.ask("PATCH", "/api/models/mine", changes)
    assert answer.status_code == 200, answer.text
    assert (answer.json()["id"], answer.json()["max_model_len"]) == (TINY, 512)
    assert server.handle.settings_changed.calls == [(TINY,)]

    store = CatalogStore(tmp_path / "catalog.sqlite")
    record = store.get(TINY)
    store.close()
    assert record is not None
    assert (record.settings.context_length, record.settings.keep_alive_s) == (512, 1.5)

    shown = {
        model["id"]: model["settings"]
        for model in (await server.ask("GET", "/api/models")).json()["models"]
    }
    assert shown[TINY] == answer.json()["settings"]
    assert set(shown["other@gguf-q4_0"].values()) == {None}


async def test_tool_parser_is_one_of_the_families(server: Server) -> None:
    answer = await server.ask("PATCH", "/api/models/mine", {"tool_parser": "mistral"})
    assert answer.json()["settings"]["tool_parser"] == "mistral"
    refused = await server.ask("PATCH", "/api/models/mine", {"tool_parser": "nobody"})
    assert (refused.status_code, error_of(refused)["param"]) == (400, "tool_parser")
    assert "mistral" in error_of(refused)["message"]
    shown = await server.ask("GET", "/api/models/mine")
    assert shown.json()["settings"]["tool_parser"] == "mistral"


async def test_determinism_is_a_setting_of_models_that_generate(
    server: Server, tmp_path: Path
) -> None:
    store = CatalogStore(tmp_path / "catalog.sqlite")
    capabilities = frozenset({Capability.EMBEDDING})
    write(store, make_found("/m/e.gguf", name="embedder", capabilities=capabilities))
    store.close()
    answer = await server.ask("PATCH", "/api/models/mine", {"deterministic": True})
    assert answer.json()["settings"]["deterministic"] is True
    refused = await server.ask("PATCH", f"/api/models/{EMBEDDER}", {"deterministic": True})
    error = error_of(refused)
    assert (refused.status_code, error["code"]) == (400, "unsupported_parameter")
    assert error["param"] == "deterministic"
    assert "generates no text" in error["message"]
    unset = await server.ask("PATCH", f"/api/models/{EMBEDDER}", {"deterministic": False})
    assert unset.json()["settings"]["deterministic"] is False


async def test_what_a_trial_found_is_shown_of_a_loaded_model(server: Server) -> None:
    assert (await server.ask("GET", "/api/models/mine")).json()["limitations"] == []
    told = ("tiny computes requests one after the other, not together (they differ by 40%).",)
    server.resident = [Residency(TINY, "gguf", "r", "n", 1024, 0.1, limitations=told)]
    await server.view._model_states.refresh()
    assert (await server.ask("GET", "/api/models/mine")).json()["limitations"] == list(told)


async def test_runtime_is_one_that_the_scan_found(server: Server, tmp_path: Path) -> None:
    store = CatalogStore(tmp_path / "catalog.sqlite")
    two = RuntimeChoice("mlx", "its tensors fit", "pytorch", "MLX is faster")
    one = RuntimeChoice("pytorch", "why", "", "MLX ignores its sliding window")
    for path, choice in (("/m/two.safetensors", two), ("/m/one.safetensors", one)):
        scanned = make_found(path, name=Path(path).stem)
        write(store, replace(scanned, info=replace(scanned.info, choice=choice)))
    store.close()
    answer = await server.ask("PATCH", "/api/models/two@gguf-q4_0", {"runtime": "pytorch"})
    assert answer.status_code == 200, answer.text
    shown = (await server.ask("GET", "/api/models/two@gguf-q4_0")).json()
    assert (shown["settings"]["runtime"], shown["runtime"]) == ("pytorch", "pytorch")
    assert shown["runtime_choice"] == asdict(two)
    listed = (await server.ask("GET", "/v1/models")).json()["data"]
    assert not any("runtime_choice" in model for model in listed)
    refused = await server.ask("PATCH", "/api/models/one@gguf-q4_0", {"runtime": "mlx"})
    assert (refused.status_code, error_of(refused)["param"]) == (400, "runtime")
    assert "MLX ignores its sliding window" in error_of(refused)["message"]
    refused = await server.ask("PATCH", "/api/models/mine", {"runtime": "mlx"})
    assert (refused.status_code, error_of(refused)["param"]) == (400, "runtime")
    assert "one runtime" in error_of(refused)["message"]


async def test_model_is_loaded_and_unloaded(server: Server) -> None:
    loaded = await server.ask("POST", "/api/models/mine/load", {})
    assert (loaded.json()["state"], loaded.json()["max_model_len"]) == ("resident", 1024)
    unloaded = await server.ask("POST", f"/api/models/{TINY}/unload", {})
    assert unloaded.json()["state"] == "available"
    assert [name for name, _ in server.handle.ensure_loaded.calls] == [TINY]
    assert server.handle.unload.calls == [(TINY,)]


async def test_refusal_of_the_scheduler_reaches_the_client(server: Server) -> None:
    server.handle.ensure_loaded = FakeHandle(
        refuse=answering(BackendUnavailable("There is no runtime."))
    ).refuse
    answer = await server.ask("POST", f"/api/models/{TINY}/load", {})
    assert (answer.status_code, error_of(answer)["code"]) == (503, "backend_unavailable")


async def test_decisions_of_the_scheduler_are_shown(server: Server) -> None:
    answer = await server.ask("GET", "/api/decisions")
    assert answer.json() == {
        "decisions": [{"at": 5.0, "event": "wanted", "action": "loaded", "reason": "it fits"}]
    }


async def test_decisions_are_refused_where_the_scheduler_hangs(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hang() -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(management_module, "_NOTICE_TIMEOUT_S", 0.01)
    server.handle.decisions = FakeHandle(tell=hang).tell
    answer = await server.ask("GET", "/api/decisions")
    assert (answer.status_code, error_of(answer)["code"]) == (503, "unavailable")


@pytest.mark.parametrize("problem", [ImpetusError("It died."), None])
async def test_change_is_kept_where_the_scheduler_cannot_be_told(
    server: Server,
    problem: ImpetusError | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def hang(model_id: str) -> None:
        del model_id
        await asyncio.Event().wait()

    monkeypatch.setattr(management_module, "_NOTICE_TIMEOUT_S", 0.01)
    answer = answering(problem) if problem else hang
    server.handle.settings_changed = FakeHandle(tell=answer).tell
    changed = await server.ask("PATCH", f"/api/models/{TINY}", {"pin": True})
    assert (changed.status_code, changed.json()["settings"]["pin"]) == (200, True)
    assert "cannot notify" in caplog.text


async def test_settings_of_a_model_that_is_gone_cannot_be_changed(server: Server) -> None:
    with pytest.raises(ModelNotFound):
        await server.management.change_settings("gone@gguf-q4_0", {"pin": True})
    assert await server.management.settings_of(["gone@gguf-q4_0"]) == {}
    assert server.handle.settings_changed.calls == []


async def test_copies_of_a_model_name_each_other(server: Server, tmp_path: Path) -> None:
    store = CatalogStore(tmp_path / "catalog.sqlite")
    same = {**DETAILS, "content": "0123"}
    write(
        store,
        make_found("/m/c.gguf", name="copied", details=same),
        make_found("/n/d.gguf", name="copy", details=same),
        make_found("/n/e.gguf", name="refused", details=same, reason="damaged"),
    )
    store.close()
    models = (await server.ask("GET", "/api/models")).json()["models"]
    shown = {model["id"].partition("@")[0]: model["duplicates"] for model in models}
    assert shown == {
        "copied": ["copy@gguf-q4_0"],
        "copy": ["copied@gguf-q4_0"],
        "refused": [],
        "tiny": [],
        "other": [],
    }
