"""Core ML models are inspected before their download, without their weights."""

from pathlib import Path

import pytest

from backends.base import EngineOptions, ModelInfo
from backends.registry import load_backends
from catalog.hub.client import HubClient
from catalog.hub.fit import Room, Verdict
from catalog.hub.remote import RemoteModel, fit_of, inspect_repository
from catalog.hub.repository import read_repository
from catalog.scan.identify import Outcome, examine
from core.errors import BackendUnavailable
from core.units import GIB
from scripts.hub_lib.server import Hub
from tests.unit.catalog.scan.test_odd_folders import compiled_core_ml, core_ml


def look(path: Path) -> Outcome:
    return examine(path, load_backends().values())


def inspected(hub: Hub, client: HubClient, folder: Path) -> RemoteModel:
    """Return the only model of a folder, as seen from afar."""
    hub.publish("org/tiny", folder)
    hub.forget_requests()
    (found,) = inspect_repository(client, read_repository(client, "org/tiny"), look)
    return found


@pytest.mark.parametrize(("gib", "verdict"), [(8, "fits"), (0, "too_big")])
def test_hub_package_fits_or_not_before_its_download(
    hub: Hub, client: HubClient, tmp_path: Path, gib: int, verdict: Verdict
) -> None:
    pytest.importorskip("coremltools")
    from tests.unit.backends.coreml.test_coreml_backend import write_stateful_model

    folder = tmp_path / "model"
    folder.mkdir()
    local = look(write_stateful_model(folder))
    assert isinstance(local, ModelInfo)
    # The weights are not looked at, whatever they are.
    (weights,) = folder.rglob("weight.bin")
    with weights.open("ab") as stream:
        stream.truncate(GIB // 16)
    found = inspected(hub, client, folder)
    assert found.info is not None, found.problem
    assert found.info.capabilities == local.capabilities
    assert found.info.parameters == local.parameters
    assert found.info.size_bytes > GIB // 16
    assert not any("weight.bin" in logged.target for logged in hub.requests)
    room = Room(gib * GIB, gib * GIB)
    assert fit_of(found, load_backends(), EngineOptions(), room, 8).verdict == verdict


def test_hub_package_that_is_no_text_model_is_refused_before_its_download(
    hub: Hub, client: HubClient, tmp_path: Path
) -> None:
    core_ml(tmp_path / "model")
    found = inspected(hub, client, tmp_path / "model")
    assert found.is_refused
    assert "needs a config.json and the tokenizer's files" in found.problem


def test_hub_compiled_model_is_refused_before_its_download(
    hub: Hub, client: HubClient, tmp_path: Path
) -> None:
    compiled_core_ml(tmp_path / "model")
    found = inspected(hub, client, tmp_path / "model")
    assert found.is_refused
    assert "use the .mlpackage" in found.problem


def test_hub_model_with_its_weights_in_its_description_is_known_after_the_download(
    hub: Hub, client: HubClient, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    with (folder / "old.mlmodel").open("wb") as stream:
        stream.truncate(GIB // 16)
    found = inspected(hub, client, folder)
    assert (found.info, found.is_refused) == (None, False)
    assert "has the weights in it" in found.problem


def test_hub_package_for_a_newer_system_says_so_and_hides_no_other_model(
    hub: Hub, client: HubClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("coremltools")
    from tests.unit.backends.coreml.test_coreml_backend import write_stateful_model

    def refuse(*_: object, **__: object) -> None:
        raise BackendUnavailable("It needs macOS 15.")

    folder = tmp_path / "model"
    folder.mkdir()
    write_stateful_model(folder)
    found = inspected(hub, client, folder)
    monkeypatch.setattr("backends.coreml.backend.check_release", refuse)
    room = Room(8 * GIB, 8 * GIB)
    fit = fit_of(found, load_backends(), EngineOptions(), room, 8)
    assert (fit.verdict, fit.reason) == ("unknown", "It needs macOS 15.")
