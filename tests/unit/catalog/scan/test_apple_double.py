"""Files that macOS writes beside others on exFAT, SMB and in archives belong to no model."""

import re
from pathlib import Path

import pytest

from core.files import visible_files
from tests.unit.catalog.scan.folders import Shelf, write_model

ROOT = Path(__file__).resolve().parents[4]
# The start of such a file: magic number, version, and who wrote it.
APPLE_DOUBLE = bytes.fromhex("0005160700020000") + b"Mac OS X        " + bytes(4072)


def add_apple_double(folder: Path) -> None:
    """Write `._name` beside each file below `folder`."""
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        path.with_name(f"._{path.name}").write_bytes(APPLE_DOUBLE)


@pytest.mark.parametrize("name", ["model", "tiny-final", "weights.00"])
def test_weights_of_any_name_are_found_among_them(name: str, shelf: Shelf) -> None:
    folder = write_model(shelf.models / "tiny")
    (folder / "model.safetensors").rename(folder / f"{name}.safetensors")
    add_apple_double(folder)
    shelf.scan()
    (listed,) = [record for record in shelf.store.models() if record.info.files]
    assert (listed.state, listed.reason) == ("ok", "")
    assert [path.name for path in listed.info.files if path.suffix == ".safetensors"] == [
        f"{name}.safetensors"
    ]


def test_hidden_files_match_no_pattern(tmp_path: Path) -> None:
    for name in ("b.bin", "a.bin", "._a.bin", "sub/c.bin", "sub/._c.bin", "c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "folder.bin").mkdir()
    assert [path.name for path in visible_files(tmp_path, "*.bin")] == ["a.bin", "b.bin"]
    found = [path.name for path in visible_files(tmp_path, "**/*.bin")]
    assert found == ["a.bin", "b.bin", "c.bin"]
    assert visible_files(tmp_path / "absent", "*") == []


# Folders of our own files, which macOS gives no companions that would be read.
OWN = {"backends/prefixes/disk.py", "catalog/convert/output.py"}


def test_folders_of_models_are_listed_without_hidden_files() -> None:
    """`Path.glob` finds hidden files too, so models' folders are read by `visible_files`."""
    sources = [path for room in ("backends", "catalog") for path in (ROOT / room).rglob("*.py")]
    listing = [
        str(path.relative_to(ROOT))
        for path in sources
        if re.search(r"\.r?glob\(", path.read_text("utf-8"))
    ]
    assert set(listing) <= OWN
