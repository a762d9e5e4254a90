"""Where conversions write, and what is left of them."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from backends.base import ModelInfo
from catalog.convert.output import (
    PartialOutput,
    fingerprint,
    sweep,
    write_provenance,
)
from catalog.scan.walk import walk
from core.errors import ModelFileMissing, RequestError, Unavailable

ONE_STEP = ("safetensors", "mlx")


def model(file: Path, parameters: int = 1000) -> ModelInfo:
    return ModelInfo(
        format="safetensors",
        name="tiny",
        architecture="llama",
        quantization="f32",
        files=(file,),
        size_bytes=4 * parameters,
        parameters=parameters,
        context_length=64,
        capabilities=frozenset(),
    )


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"weights")
    return path


@pytest.fixture
def dead_pid() -> int:
    """The number of a process that has ended."""
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"],
                          capture_output=True, text=True, check=True)  # fmt: skip
    return int(done.stdout)


def test_a_partial_folder_is_hidden_from_scans_and_published_in_one_step(tmp_path: Path) -> None:
    partial = PartialOutput.create(tmp_path / "made")
    result = partial.folder / "step-0"
    result.mkdir()
    (result / "model.safetensors").write_bytes(b"x")
    assert walk([tmp_path]).candidates == []
    assert partial.publish(result) == tmp_path / "made"
    partial.remove()
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    assert (tmp_path / "made" / "model.safetensors").read_bytes() == b"x"


def test_publishing_refuses_a_name_taken_meanwhile(tmp_path: Path) -> None:
    partial = PartialOutput.create(tmp_path / "made")
    result = partial.folder / "step-0"
    result.mkdir()
    (tmp_path / "made").mkdir()
    with pytest.raises(RequestError, match="created during the conversion"):
        partial.publish(result)
    partial.remove()
    partial.remove()
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_publishing_never_replaces_what_came_after_the_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = PartialOutput.create(tmp_path / "made")
    result = partial.folder / "step-0"
    result.mkdir()
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "theirs").touch()
    monkeypatch.setattr("os.path.lexists", lambda _path: False)
    with pytest.raises(RequestError, match="created during the conversion"):
        partial.publish(result)
    partial.remove()
    assert (tmp_path / "made" / "theirs").exists()


def test_an_unwritable_place_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="cannot be written to"):
        PartialOutput.create(tmp_path / "missing" / "made")


def test_sweep_spares_the_living(tmp_path: Path) -> None:
    partial = PartialOutput.create(tmp_path / "made")
    assert sweep(tmp_path) == ()
    assert partial.folder.is_dir()
    partial.remove()


def test_sweep_removes_what_the_dead_left(tmp_path: Path, dead_pid: int) -> None:
    unlocked = tmp_path / f".a.partial-{dead_pid}-0123abcd"
    unlocked.mkdir()
    (unlocked / "weights").write_bytes(b"x")
    # The number of a dead owner may belong to another process by now.
    reused = tmp_path / f".b.partial-{os.getpid()}-0123abcd"
    reused.mkdir()
    (reused / "lock").touch()
    starting = tmp_path / f".c.partial-{os.getpid()}-0123abcd"
    starting.mkdir()
    assert sweep(tmp_path) == (unlocked, reused)
    assert list(tmp_path.iterdir()) == [starting]


def test_sweep_touches_nothing_else(tmp_path: Path, dead_pid: int) -> None:
    kept = [tmp_path / ".hidden", tmp_path / "model", tmp_path / f"a.partial-{dead_pid}-0123abcd"]
    for path in kept:
        path.mkdir()
    link = tmp_path / f".link.partial-{dead_pid}-0123abcd"
    link.symlink_to(kept[1])
    assert sweep(tmp_path) == ()
    assert sorted(tmp_path.iterdir()) == sorted([*kept, link])
    assert sweep(tmp_path / "missing") == ()


def test_provenance_names_files_tools_and_parameters(weights: Path, tmp_path: Path) -> None:
    result = tmp_path / "made"
    result.mkdir()
    write_provenance(result, model(weights), fingerprint([weights]), {"quantization": "f32"})
    provenance = json.loads((result / "provenance.json").read_text())
    (file,) = provenance["source"]["files"]
    assert file["path"] == str(weights)
    assert file["size_bytes"] == 7
    assert file["sha256_8mib"].startswith("9a129038")
    assert provenance["parameters"] == {"quantization": "f32"}
    assert "transformers" in provenance["tools"]


def test_a_source_that_changes_meanwhile_is_noticed(weights: Path, tmp_path: Path) -> None:
    before = fingerprint([weights])
    weights.write_bytes(b"other weights")
    with pytest.raises(Unavailable, match="changed"):
        write_provenance(tmp_path, model(weights), before, {})
    weights.unlink()
    with pytest.raises(Unavailable, match="changed"):
        write_provenance(tmp_path, model(weights), before, {})
    with pytest.raises(ModelFileMissing):
        fingerprint([weights])
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_neither_a_folder_nor_a_descriptor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    opened = len(os.listdir("/dev/fd"))
    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(Unavailable, match="No space"):
        PartialOutput.create(tmp_path / "target")
    assert os.listdir(tmp_path) == []
    assert len(os.listdir("/dev/fd")) == opened
