"""Models are inspected from ranges of their remote files as if they had been downloaded."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from backends.base import EngineOptions, ModelInfo
from backends.registry import load_backends
from catalog.hub.client import HubClient
from catalog.hub.fit import Room
from catalog.hub.remote import MOST_INSPECTED, RemoteModel, fit_of, inspect_repository
from catalog.hub.repository import read_repository
from catalog.scan.identify import Outcome, examine
from catalog.scan.inspector import Inspector
from core.errors import HubAnswerInvalid
from core.units import GIB, MIB
from scripts.hub_lib.faults import Fault
from scripts.hub_lib.server import Hub
from tests.gguf_raw import RawTensor, minimal_gguf, minimal_metadata, write_gguf
from tests.unit.backends.test_quantized_folders import folder_of
from tests.unit.catalog.hub.conftest import LIMITS
from tests.unit.catalog.scan.folders import (
    LLAMA,
    llama_tensors,
    write_json,
    write_model,
    write_shards,
)
from tests.unit.catalog.scan.test_embedding_folders import write_encoder, write_modules

F16 = 1
ROWS = 2**18
OPTIONS = EngineOptions()
ROOM = Room(8 * GIB, 8 * GIB)


def look(path: Path) -> Outcome:
    return examine(path, load_backends().values())


def large_gguf(path: Path, columns: int) -> Path:
    """Write a sparse model of 512 KiB for each column, with a long vocabulary."""
    tokens = [f"token-{number}" for number in range(250_000)]
    tensors = [RawTensor("token_embd.weight", (columns, ROWS), F16)]
    write_gguf(path, minimal_metadata(tokenizer__ggml__tokens=tokens), tensors)
    header = path.stat().st_size
    with path.open("r+b") as stream:
        stream.truncate(-(-header // 32) * 32 + columns * ROWS * 2)
    return path


@pytest.fixture
def inspect(hub: Hub, client: HubClient) -> Callable[..., dict[str, RemoteModel]]:
    """Publish a folder and inspect it from afar; large files get a hash that nobody computes."""

    def inspected(folder: Path, look: Callable[[Path], Outcome] = look) -> dict[str, RemoteModel]:
        sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
        stated = {name: f"{size:064x}" for name, size in sizes.items() if size > 100 * MIB}
        hub.publish("org/tiny", folder, stated=stated)
        hub.forget_requests()
        repository = read_repository(client, "org/tiny")
        models = inspect_repository(client, repository, look)
        return {model.entry.name: model for model in models}

    return inspected


def without_paths(info: ModelInfo) -> ModelInfo:
    return replace(info, files=tuple(Path(file.name) for file in info.files), name="")


def test_hub_large_gguf_is_inspected_from_its_header(
    hub: Hub, tmp_path: Path, inspect: Callable[..., dict[str, RemoteModel]]
) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    large_gguf(folder / "m-Q8_0.gguf", 8192)
    small = large_gguf(folder / "m-Q4_K_M.gguf", 4096)
    models = inspect(folder)
    local = look(small)
    assert isinstance(local, ModelInfo)
    found = models["m-Q4_K_M.gguf"]
    assert found.info is not None
    assert without_paths(found.info) == without_paths(local)
    # The other one differs in its size alone, and was not read.
    larger = models["m-Q8_0.gguf"].info
    assert larger is not None
    assert larger.quantization == "q8_0"
    assert larger.size_bytes == (folder / "m-Q8_0.gguf").stat().st_size
    ranges = [logged.headers.get("range") for logged in hub.requests if "cdn" not in logged.host]
    assert {"bytes=0-2097151", "bytes=2097152-8388607"} <= set(ranges)
    assert not any("Q8_0" in logged.target for logged in hub.requests)
    verdicts = {
        name: fit_of(model, load_backends(), OPTIONS, Room(3 * GIB, 3 * GIB), 256).verdict
        for name, model in models.items()
    }
    assert verdicts == {"m-Q4_K_M.gguf": "fits", "m-Q8_0.gguf": "too_big"}


def test_hub_models_in_folders_of_their_own_are_told_apart(
    hub: Hub, client: HubClient, tmp_path: Path
) -> None:
    for name, columns in (("7B", 32), ("13B", 64), ("Q8_0", 32)):
        (tmp_path / "models" / name).mkdir(parents=True)
        large_gguf(tmp_path / "models" / name / "ggml-model-Q4_0.gguf", columns)
    hub.publish("org/tiny", tmp_path / "models")
    repository = read_repository(client, "org/tiny")
    found = {one.entry.name: one.info for one in inspect_repository(client, repository, look)}
    sizes = {name: info.parameters if info else 0 for name, info in found.items()}
    assert sizes["7B/ggml-model-Q4_0.gguf"] == 32 * ROWS
    assert sizes["13B/ggml-model-Q4_0.gguf"] == 64 * ROWS


@pytest.mark.parametrize("sharded", [False, True])
def test_hub_safetensors_are_inspected_from_their_headers(
    tmp_path: Path, inspect: Callable[..., dict[str, RemoteModel]], sharded: bool
) -> None:
    folder = write_model(tmp_path / "model")
    if sharded:
        (folder / "model.safetensors").unlink()
        write_shards(folder)
    first = min(folder.glob("*.safetensors"))
    local = look(first)
    assert isinstance(local, ModelInfo)
    (found,) = inspect(folder).values()
    assert found.info is not None
    assert without_paths(found.info) == without_paths(local)
    fit = fit_of(found, load_backends(), OPTIONS, ROOM, 64)
    assert (fit.verdict, fit.context_tokens) == ("fits", 64)


@pytest.mark.parametrize("most", [64, 0])
@pytest.mark.parametrize("name", ["gptq", "awq", "bnb-nf4", "bnb-int8", "fp8-blocks", "ct-int4"])
def test_hub_quantized_weights_are_inspected_from_their_headers(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    inspect: Callable[..., dict[str, RemoteModel]],
    name: str,
    most: int,
) -> None:
    """What bitsandbytes stores among its weights is read too, unless that is too much."""
    torch_file = pytest.importorskip("safetensors.torch")
    monkeypatch.setattr("catalog.hub.skeleton._SAFETENSORS_START", 8)
    monkeypatch.setattr("catalog.hub.skeleton._MOST_STATES", most)
    folder = tmp_path / "model"
    folder.mkdir()
    torch_file.save_file(folder_of(folder, name), folder / "model.safetensors")
    local = look(folder / "model.safetensors")
    assert isinstance(local, ModelInfo)
    (found,) = inspect(folder).values()
    if name == "bnb-nf4" and not most:
        assert (found.info, found.is_refused) == (None, False)
        assert "1 of its weights have their shapes in other parts" in found.problem
    else:
        assert found.info is not None, found.problem
        assert without_paths(found.info) == without_paths(local)


@pytest.mark.parametrize("kind", ["zip", "before zip", "checkpoint", "shards"])
def test_hub_pickled_weights_are_inspected_without_their_tensors(
    hub: Hub, tmp_path: Path, inspect: Callable[..., dict[str, RemoteModel]], kind: str
) -> None:
    torch = pytest.importorskip("torch")
    folder = write_model(tmp_path / "model", vocab_size=ROWS)
    (folder / "model.safetensors").unlink()
    tensors = {name: torch.from_numpy(value) for name, value in llama_tensors().items()}
    tensors["model.embed_tokens.weight"] = torch.zeros(ROWS, LLAMA["hidden_size"])
    value = {"epoch": 3, "model": tensors} if kind == "checkpoint" else tensors
    first = folder / "pytorch_model.bin"
    if kind == "shards":
        names = sorted(tensors)
        files = [f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2)]
        for index, file in enumerate(files):
            torch.save({name: tensors[name] for name in names[index::2]}, folder / file)
        places = {name: files[index % 2] for index, name in enumerate(names)}
        write_json(folder / "pytorch_model.bin.index.json", {"weight_map": places})
        first = folder / files[0]
    else:
        torch.save(value, first, _use_new_zipfile_serialization=kind != "before zip")
    local = look(first)
    assert isinstance(local, ModelInfo), local
    (found,) = inspect(folder).values()
    assert found.info is not None, found.problem
    assert without_paths(found.info) == without_paths(local)
    assert fit_of(found, load_backends(), OPTIONS, ROOM, 64).verdict == "fits"
    asked = [logged.headers.get("range", "") for logged in hub.requests if ".bin" in logged.target]
    ends = [text.removeprefix("bytes=").split("-") for text in asked if text]
    assert ends
    assert sum(int(end) - int(start) for start, end in ends) < 4 * MIB


@pytest.mark.parametrize(
    "data", [b"\0" * 1000, b"PK\3\4" + b"x" * 1000, b"version https://git-lfs.github.com/spec/v1"]
)
def test_hub_file_that_is_not_pytorchs_is_refused_before_its_download(
    tmp_path: Path, inspect: Callable[..., dict[str, RemoteModel]], data: bytes
) -> None:
    """Such as the `metal/model.bin` of gpt-oss."""
    folder = write_model(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / "model.bin").write_bytes(data)
    (found,) = inspect(folder).values()
    assert (found.info, found.is_refused) == (None, True)


@pytest.mark.parametrize(
    ("card", "name", "stated", "format"),
    [
        ("tags: [mlx]", "model.safetensors", "mlx", "safetensors"),
        ("license: mit", "model.onnx", "onnx", "gguf"),
    ],
)
def test_hub_model_is_of_the_format_that_its_content_has(
    tmp_path: Path,
    inspect: Callable[..., dict[str, RemoteModel]],
    card: str,
    name: str,
    stated: str,
    format: str,
) -> None:
    """M9: a tag, or the end of a name, may be of another one."""
    folder = write_model(tmp_path / "model")
    if name != "model.safetensors":
        (folder / "model.safetensors").unlink()
        minimal_gguf(folder / name)
    (folder / "README.md").write_text(f"---\n{card}\n---\n")
    (found,) = inspect(folder).values()
    assert found.info is not None, found.problem
    assert (found.entry.format, found.format) == (stated, format)
    backends = {format: load_backends()[format]}
    assert fit_of(found, backends, OPTIONS, ROOM, 64).verdict == "fits"


def test_hub_large_tokenizer_is_read_whole(
    tmp_path: Path, inspect: Callable[..., dict[str, RemoteModel]]
) -> None:
    folder = write_model(tmp_path / "model")
    with (folder / "tokenizer.json").open("a") as tokenizer:
        tokenizer.write(" " * 33 * MIB)
    assert isinstance(look(folder / "model.safetensors"), ModelInfo)
    (found,) = inspect(folder).values()
    assert found.info is not None, found.problem


def test_hub_older_mlx_weights_are_known_after_the_download(
    tmp_path: Path, inspect: Callable[..., dict[str, RemoteModel]]
) -> None:
    folder = tmp_path / "model"
    write_json(folder / "config.json", LLAMA)
    np.savez(folder / "weights.npz", allow_pickle=True, **llama_tensors())
    (found,) = inspect(folder).values()
    assert (found.info, found.is_refused) == (None, False)
    assert "before the download" in found.problem


def test_hub_weights_of_modules_are_not_read(
    hub: Hub, tmp_path: Path, inspect: Callable[..., dict[str, RemoteModel]]
) -> None:
    folder = write_encoder(tmp_path / "model")
    write_modules(folder, "", "model.safetensors")
    (found,) = inspect(folder).values()
    assert found.info is not None, found.problem
    assert not any("2_Dense/model" in logged.target for logged in hub.requests)


def test_hub_model_that_cannot_run_here_says_why(
    tmp_path: Path, inspect: Callable[..., dict[str, RemoteModel]]
) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "broken-Q4_0.gguf").write_bytes(b"GGUF" + b"\xff" * 1000)
    (folder / "page-Q8_0.gguf").write_bytes(b"<html>" * 100)
    (folder / "half-F16-00001-of-00002.gguf").write_bytes(b"GGUF")
    (folder / "weights.npz").write_bytes(b"x" * 1000)
    write_gguf(folder / "art-Q2_K.gguf", {**minimal_metadata(), "general.architecture": "flux"})
    models = inspect(folder)
    problems = {name: (model.is_refused, model.problem) for name, model in models.items()}
    assert [problems[name][0] for name in sorted(problems)] == [True, True, True, True, False]
    assert "GGUF version" in problems["broken-Q4_0.gguf"][1]
    assert "is not a GGUF file" in problems["page-Q8_0.gguf"][1]
    assert problems["half-F16.gguf"][1] == "1 of its shards are missing."
    assert "image or video generator" in problems["art-Q2_K.gguf"][1]
    unknown = fit_of(models["weights.npz"], load_backends(), OPTIONS, ROOM)
    assert (unknown.verdict, unknown.weights_bytes) == ("unknown", 1000)
    assert "before the download" in unknown.reason


def test_hub_model_in_the_limited_process(
    tmp_path: Path, inspect: Callable[..., dict[str, RemoteModel]]
) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    large_gguf(folder / "m-F16.gguf", 64)
    inspector = Inspector(["gguf"])
    try:
        (found,) = inspect(folder, inspector.examine).values()
    finally:
        inspector.close()
    assert found.info is not None, found.problem
    assert found.info.parameters == 64 * ROWS


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (Fault("wrong-range", file="*.gguf", at=0), "another part of m-F16.gguf"),
        (Fault("ignore-range", file="*.gguf"), "does not send parts of files"),
    ],
    ids=lambda value: value.kind if isinstance(value, Fault) else "",
)
def test_hub_that_sends_other_parts_is_noticed(
    hub: Hub,
    tmp_path: Path,
    inspect: Callable[..., dict[str, RemoteModel]],
    fault: Fault,
    said: str,
) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    large_gguf(folder / "m-F16.gguf", 64)
    hub.faults.add(fault)
    with pytest.raises(HubAnswerInvalid, match=said):
        inspect(folder)


def test_hub_that_states_an_impossible_size_is_noticed(
    hub: Hub, client: HubClient, tmp_path: Path
) -> None:
    hub.publish("org/tiny", write_model(tmp_path / "model"))
    found = read_repository(client, "org/tiny")
    (entry,) = found.entries
    vast = replace(entry, weights=(replace(entry.weights[0], size_bytes=2**62),))
    (model,) = inspect_repository(client, replace(found, entries=(vast,)), look)
    assert (model.info, model.is_refused) == (None, False)
    assert "not inspected" in model.problem
    assert fit_of(model, load_backends(), OPTIONS, ROOM).verdict == "too_big"


def test_hub_that_is_slow_leaves_a_model_uninspected(hub: Hub, tmp_path: Path) -> None:
    """Not each network can read a large tokenizer within the limit of one answer."""
    hub.publish("org/tiny", write_model(tmp_path / "model"))
    limits = replace(LIMITS, total_s=0.5)
    client = HubClient(hub.endpoint, token="", limits=limits)
    repository = read_repository(client, "org/tiny")
    hub.faults.add(Fault("slow", file="tokenizer.json", value="100"))
    (model,) = inspect_repository(client, repository, look)
    assert (model.info, model.is_refused) == (None, False)
    assert "was not finished" in model.problem


def test_hub_repository_of_very_many_models_is_inspected_in_part(
    hub: Hub, client: HubClient, tmp_path: Path
) -> None:
    """Each would be read for its header, one after the other."""
    models = tmp_path / "models"
    models.mkdir()
    for number in range(MOST_INSPECTED + 2):
        write_gguf(models / f"model-{number}.gguf", minimal_metadata())
    hub.publish("org/tiny", tmp_path / "models")
    looked: list[Path] = []

    def count(path: Path) -> Outcome:
        looked.append(path)
        return look(path)

    found = inspect_repository(client, read_repository(client, "org/tiny"), count)
    assert (len(found), len(looked)) == (MOST_INSPECTED + 2, MOST_INSPECTED)
    left = [model for model in found if "not inspected" in model.problem]
    assert len(left) == 2
    assert not left[0].is_refused
    assert f"{MOST_INSPECTED + 2} models" in left[0].problem


def test_hub_that_is_slow_does_not_hold_up_a_repository_of_many_models(
    hub: Hub, client: HubClient, tmp_path: Path
) -> None:
    models = tmp_path / "models"
    models.mkdir()
    for number in range(3):
        write_gguf(models / f"model-{number}.gguf", minimal_metadata())
    hub.publish("org/tiny", tmp_path / "models")
    times = iter(range(0, 1000, 50))
    found = inspect_repository(
        client, read_repository(client, "org/tiny"), look, clock=lambda: float(next(times))
    )
    assert ["not inspected" in model.problem for model in found] == [False, True, True]


def test_hub_leaves_nothing_in_the_temporary_folder(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    inspect: Callable[..., dict[str, RemoteModel]],
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(work))
    folder = write_model(tmp_path / "model")
    write_json(folder / "config.json", {"model_type": "llama"})
    inspect(folder)
    assert list(work.iterdir()) == []
