"""Models on their way into the catalog, in a child process: hashes, inspection, publishing."""

import hashlib
import json
import os
import pickle
from pathlib import Path

import psutil
import pytest

from catalog.jobs import JobInterrupted
from catalog.uploads.arrival import Arrival, arrival_of
from catalog.uploads.run import discard, run_arrival
from catalog.uploads.store import UploadStore
from catalog.uploads.upload import Announced
from core.errors import BrokenModel, ImpetusError, RequestError, error_of
from tests.gguf_files import llama_gguf
from tests.unit.catalog.scan.folders import write_model

FORMATS = ["gguf", "safetensors", "pytorch"]


class Canary:
    """A pickle that makes a file where it is loaded."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self._path}",)


def uploaded(home: Path, files: dict[str, bytes], *, sha256: str | None = None) -> Arrival:
    """Return the arrival of a finished upload of these files."""
    store = UploadStore(home)
    announced = [
        Announced(path, len(data), hashlib.sha256(data).hexdigest() if sha256 is None else sha256)
        for path, data in files.items()
    ]
    upload = store.create(announced, "").upload
    for number, data in enumerate(files.values()):
        store.write_chunk(upload.id, number, 0, data, hashlib.sha256(data).digest())
    return arrival_of(store.finish(upload.id))


async def arrive(home: Path, arrival: Arrival, roots: list[Path] | None = None) -> list[int]:
    told: list[int] = []
    await run_arrival(arrival, home, FORMATS, roots or [], lambda done, _: told.append(done))
    return told


async def test_uploaded_folder_is_checked_and_moved_by_one_rename(tmp_path: Path) -> None:
    source = write_model(tmp_path / "nice")
    files = {f"nice/{path.name}": path.read_bytes() for path in source.iterdir()}
    home = tmp_path / "home"
    arrival = uploaded(home, files)
    assert Arrival.from_json(arrival.to_json()) == arrival
    inode = arrival.quarantine(home).stat().st_ino
    told = await arrive(home, arrival)
    assert told[-1] == sum(map(len, files.values()))
    target = home / "models" / "uploads" / "nice"
    assert arrival.folder(home) == target
    assert target.stat().st_ino == inode
    listed = json.loads((target / "upload.json").read_text())["files"]
    assert {f"nice/{file['path']}" for file in listed} == files.keys()
    (target / "upload.json").unlink()
    assert {f"nice/{path.name}": path.read_bytes() for path in target.iterdir()} == files
    # A process that ended before this was stored does it again.
    await arrive(home, arrival)
    discard(arrival, home)
    assert list((home / "incoming").iterdir()) == []
    assert target.exists()


async def test_hostile_models_end_with_the_reason_and_nothing_runs(tmp_path: Path) -> None:
    """M1, M3: a truncated GGUF and a pickle that calls a function are refused in quarantine."""
    home, canary = tmp_path / "home", tmp_path / "canary"
    whole = llama_gguf(tmp_path / "whole.gguf").read_bytes()
    hostile = {
        "cut.gguf": whole[:200],
        "evil/pytorch_model.bin": pickle.dumps(Canary(canary)),
        "notes.txt": b"hello",
    }
    for path, data in hostile.items():
        arrival = uploaded(home, {path: data})
        with pytest.raises(BrokenModel) as caught:
            await arrive(home, arrival)
        assert caught.value.message
        assert not arrival.folder(home).exists()
        discard(arrival, home, with_model=True)
    assert not canary.exists()
    assert list((home / "incoming").iterdir()) == []


async def test_hash_that_was_announced_is_checked_p2(tmp_path: Path) -> None:
    """P2: a file whose bytes are not those that were announced."""
    data = llama_gguf(tmp_path / "a.gguf").read_bytes()
    arrival = uploaded(tmp_path / "home", {"a.gguf": data}, sha256="0" * 64)
    with pytest.raises(BrokenModel, match=r"and 0000.* were announced"):
        await arrive(tmp_path / "home", arrival)


async def test_target_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    home = tmp_path / "home"
    arrival = uploaded(home, {"a.gguf": llama_gguf(tmp_path / "a.gguf").read_bytes()})
    arrival.folder(home).mkdir(parents=True)
    with pytest.raises(RequestError, match="was created meanwhile"):
        await arrive(home, arrival)
    assert list(arrival.folder(home).iterdir()) == []


async def test_killed_child_is_told_and_the_next_goes_on(tmp_path: Path) -> None:
    home = tmp_path / "home"
    arrival = uploaded(home, {"a.gguf": llama_gguf(tmp_path / "a.gguf").read_bytes()})

    killed: list[psutil.Process] = []

    def kill(_done: int, _total: int) -> None:
        if not killed:
            children = psutil.Process().children()
            killed.extend(one for one in children if "catalog.uploads.child" in one.cmdline())
            killed[0].kill()

    with pytest.raises(JobInterrupted, match="perhaps because memory ran out"):
        await run_arrival(arrival, home, FORMATS, [], kill)
    await arrive(home, arrival)
    assert (arrival.folder(home) / "a.gguf").exists()


@pytest.mark.parametrize("how", ["copy", "clone"])
async def test_import_leaves_the_source_and_takes_the_model(tmp_path: Path, how: str) -> None:
    source, home = write_model(tmp_path / "theirs" / "nice"), tmp_path / "home"
    (source / ".DS_Store").write_text("junk")
    arrival = Arrival.from_json(
        json.dumps({"id": "a" * 32, "name": "mine", "how": how, "source": str(source), "files": []})
    )
    told = await arrive(home, arrival)
    target = home / "models" / "uploads" / "mine"
    kept = {path.name: path.read_bytes() for path in target.iterdir()}
    assert kept.pop("upload.json")
    assert kept == {p.name: p.read_bytes() for p in source.iterdir() if p.name != ".DS_Store"}
    assert told[-1] == sum(map(len, kept.values()))
    (target / "config.json").write_text("changed")
    assert (source / "config.json").read_text() != "changed"


async def test_in_place_is_inspected_and_not_moved(tmp_path: Path) -> None:
    source = write_model(tmp_path / "theirs" / "nice")
    before = sorted(path.name for path in source.iterdir())
    arrival = Arrival("b" * 32, "nice", "in_place", str(source))
    await arrive(tmp_path / "home", arrival)
    assert sorted(path.name for path in source.iterdir()) == before
    discard(arrival, tmp_path / "home", with_model=True)
    assert source.exists()


def test_errors_of_a_child_are_the_same_here() -> None:
    assert type(error_of("broken_model", "x")) is BrokenModel
    assert type(error_of("nonsense", "x")) is ImpetusError
