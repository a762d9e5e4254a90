"""What the process of long jobs reads of a hub: searches, what fits, the best, READMEs."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from backends.base import EngineOptions
from backends.registry import backends_for
from catalog.hub.client import HubClient
from catalog.hub.fit import Room
from catalog.scan.identify import Outcome, examine
from core.errors import HubAccessDenied, HubNotFound, HubUnavailable, RequestError
from core.units import GIB
from deployments.jobs.hub import HubReader
from router.hub_service import HubSearch
from scripts.hub_lib.faults import Fault
from scripts.hub_lib.server import Hub, running_hub
from tests.gguf_raw import RawTensor, minimal_metadata, write_gguf

F16 = 1
SMALL, LARGE = "tiny-Q4_K_M.gguf", "tiny-F16.gguf"


class Here:
    """Identifies files in this process: a child takes seconds to start."""

    count = 0

    def __init__(self, formats: list[str]) -> None:
        self._backends = backends_for(formats)
        Here.count += 1

    def examine(self, path: Path) -> Outcome:
        return examine(path, self._backends.values())

    def close(self) -> None:
        pass


def write_model(path: Path, rows: int) -> None:
    """Write a model with a tensor of `rows` times 32 numbers, which are 0."""
    write_gguf(path, minimal_metadata(), [RawTensor("token_embd.weight", (32, rows), F16)])
    with path.open("r+b") as stream:
        stream.truncate(-(-path.stat().st_size // 32) * 32 + 32 * rows * 2)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("deployments.jobs.hub.Inspector", Here)
    monkeypatch.setattr(Here, "count", 0)
    source = tmp_path / "source"
    source.mkdir()
    for name, rows in ((SMALL, 32), (LARGE, 32 * 1024)):
        write_model(source / name, rows)
    (source / "README.md").write_text("# Tiny\n<script>x</script>")
    with running_hub() as running:
        running.publish("org/tiny", source)
        yield running


def reader(hub: Hub, folder: Path, budget: int = 4 * GIB) -> HubReader:
    async def room() -> Room:
        return Room(budget, budget)

    backends = backends_for(["gguf"])
    return HubReader(
        backends, EngineOptions(), folder, room, lambda: HubClient(hub.endpoint, token="")
    )


async def test_search_tells_whether_results_fit(hub: Hub, tmp_path: Path) -> None:
    found = await reader(hub, tmp_path).search(HubSearch(text="tiny"))
    (model,) = found.models
    assert (model.id, model.author, found.cursor) == ("org/tiny", "org", "")
    assert model.fit.verdict in ("fits", "unknown")
    assert model.fit.reason
    assert (await reader(hub, tmp_path).search(HubSearch(text="other"))).models == ()


async def test_repository_has_each_quantization_with_its_fit(hub: Hub, tmp_path: Path) -> None:
    read = reader(hub, tmp_path)
    found = await read.repository("org/tiny", "", 16)
    assert {entry.name for entry in found.entries} == {SMALL, LARGE}
    assert {entry.fit.verdict for entry in found.entries} == {"fits"}
    small = next(entry for entry in found.entries if entry.name == SMALL)
    assert (small.quantization, small.files, small.is_downloaded) == ("q4_k_m", (SMALL,), False)
    assert small.fit.context_length == 16
    assert small.fit.total_bytes > small.fit.weights_bytes > 0
    assert found.choice.entry == SMALL
    assert found.choice.reason
    # Another context asks for nothing but the listing.
    hub.forget_requests()
    again = await read.repository("org/tiny", "main", 32)
    assert again.commit == found.commit
    assert {entry.fit.context_length for entry in again.entries} == {32}
    assert (len(hub.requests), Here.count) == (1, 1)


async def test_what_is_too_big_is_not_chosen(hub: Hub, tmp_path: Path) -> None:
    read = reader(hub, tmp_path, budget=1000)
    found = await read.repository("org/tiny", "", 16)
    assert {entry.fit.verdict for entry in found.entries} == {"too_big"}
    assert (found.choice.entry, "too big" in found.choice.reason) == ("", True)
    with pytest.raises(RequestError, match=r"Nothing of org/tiny was chosen.*too big"):
        await read.plan("org/tiny", "", "")
    # One that the user names is downloaded all the same.
    assert (await read.plan("org/tiny", "", LARGE)).files[0].path == LARGE


async def test_best_is_planned_where_several_are_meant(hub: Hub, tmp_path: Path) -> None:
    read = reader(hub, tmp_path)
    found = await read.repository("org/tiny", "", 16)
    job = await read.plan("org/tiny", "", "")
    assert (job.files[0].path, job.commit) == (SMALL, found.commit)
    assert job.target.is_relative_to(tmp_path)


@pytest.mark.parametrize(
    ("model", "entry"), [("org/art", ""), ("org/art:q4_0", ""), ("org/art", "flux-Q4_0.gguf")]
)
async def test_what_cannot_run_here_is_refused_before_its_download(
    hub: Hub, tmp_path: Path, model: str, entry: str
) -> None:
    source = tmp_path / "art"
    source.mkdir()
    write_gguf(source / "flux-Q4_0.gguf", {**minimal_metadata(), "general.architecture": "flux"})
    hub.publish("org/art", source)
    with pytest.raises(RequestError, match="image or video generator") as caught:
        await reader(hub, tmp_path).plan(model, "", entry)
    assert "all the same" not in caught.value.message


async def test_repository_without_a_model_says_what_it_is(hub: Hub, tmp_path: Path) -> None:
    source = tmp_path / "lora"
    source.mkdir()
    (source / "adapter_model.safetensors").write_bytes(b"x")
    hub.publish("org/lora", source)
    found = await reader(hub, tmp_path).repository("org/lora", "", 16)
    assert (found.entries, found.choice.entry) == ((), "")
    assert "has an adapter" in found.choice.reason


async def test_named_model_of_a_repository_that_was_shown_is_not_inspected_again(
    hub: Hub, tmp_path: Path
) -> None:
    read = reader(hub, tmp_path)
    await read.repository("org/tiny", "", 16)
    hub.forget_requests()
    await read.plan("org/tiny:q4_k_m", "", "")
    assert (len(hub.requests), Here.count) == (1, 1)


async def test_gated_repository_is_shown_and_its_download_says_how_to_get_access(
    hub: Hub, tmp_path: Path
) -> None:
    """D11: what the hub shows of it is public, its files are not."""
    hub.publish("org/gated", tmp_path / "source", gated="manual")
    read = reader(hub, tmp_path)
    found = await read.repository("org/gated", "", 16)
    assert found.gated == "manual"
    assert {entry.name for entry in found.entries} == {SMALL, LARGE}
    for entry in found.entries:
        assert (entry.is_refused, entry.fit.verdict) == (False, "unknown")
        assert "accept its terms" in entry.fit.reason
        assert entry.fit.weights_bytes == entry.size_bytes
    for model in ("org/gated", "org/gated:q4_k_m"):
        with pytest.raises(HubAccessDenied, match="accept its terms"):
            await read.plan(model, "", "")


async def test_named_model_of_a_hub_that_fails_meanwhile_is_downloaded_later(
    hub: Hub, tmp_path: Path
) -> None:
    hub.faults.add(Fault("status", file=SMALL, value="503"))
    assert (await reader(hub, tmp_path).plan("org/tiny:q4_k_m", "", "")).files[0].path == SMALL


async def test_the_only_model_of_a_repository_is_not_chosen_if_it_is_too_big(
    hub: Hub, tmp_path: Path
) -> None:
    source = tmp_path / "one"
    source.mkdir()
    write_model(source / SMALL, 32)
    hub.publish("org/one", source)
    read = reader(hub, tmp_path, budget=1000)
    with pytest.raises(RequestError, match=r"too big.*Name an entry to download it all the same"):
        await read.plan("org/one", "", "")
    assert (await read.plan("org/one:q4_k_m", "", "")).files[0].path == SMALL


async def test_readme_has_no_scripts(hub: Hub, tmp_path: Path) -> None:
    assert await reader(hub, tmp_path).readme("org/tiny", "") == "# Tiny"


async def test_distinct_states_of_the_hub(hub: Hub, tmp_path: Path) -> None:
    read = reader(hub, tmp_path)
    with pytest.raises(HubNotFound):
        await read.repository("org/none", "", 16)
    with pytest.raises(HubNotFound, match="no such revision"):
        await read.repository("org/tiny", "other", 16)
    with pytest.raises(RequestError):
        await read.repository("org/..", "", 16)
    hub.faults.add(Fault("status", file="search", value="503"))
    with pytest.raises(HubUnavailable):
        await read.search(HubSearch(text="tiny"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" org/tiny:Q4_K_M ", {"repository": "org/tiny", "quantization": "Q4_K_M"}),
        ("ollama run hf.co/org/tiny", {"repository": "org/tiny"}),
        (
            "https://huggingface.co/org/tiny/blob/v1/a/b.gguf",
            {"repository": "org/tiny", "revision": "v1", "file": "a/b.gguf"},
        ),
        ("HUB/org/tiny/tree/main", {"repository": "org/tiny", "revision": "main"}),
        (
            " https://example.org/m.gguf ",
            {"kind": "url", "url": "https://example.org/m.gguf"},
        ),
    ],
)
async def test_pasted_texts_are_resolved_without_asking_the_hub(
    hub: Hub, tmp_path: Path, text: str, expected: dict[str, str]
) -> None:
    found = await reader(hub, tmp_path).resolve(text.replace("HUB", hub.endpoint))
    nothing = dict.fromkeys(("repository", "revision", "file", "quantization", "url"), "")
    assert found.model_dump() == {"kind": "repository", **nothing, **expected}
    assert hub.requests == []


@pytest.mark.parametrize("text", ["tiny", "ftp://example.org/x", "datasets/org/tiny", "a/../b"])
async def test_texts_that_refer_to_nothing_are_refused(hub: Hub, tmp_path: Path, text: str) -> None:
    with pytest.raises(RequestError) as caught:
        await reader(hub, tmp_path).resolve(text)
    assert caught.value.param == "text"
