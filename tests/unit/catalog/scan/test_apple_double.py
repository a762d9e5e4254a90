"""Files that macOS writes beside others on exFAT, SMB and in archives belong to no model."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from catalog.store import CatalogStore
from core.files import visible_files
from tests.gguf_files import llama_gguf
from tests.onnx_files import decoder
from tests.onnx_files import write_folder as write_onnx
from tests.unit.backends.coreml.test_coreml_backend import write_model as write_coreml
from tests.unit.catalog.scan.folders import (
    Shelf,
    llama_tensors,
    write_model,
    write_shards,
)
from tests.unit.catalog.scan.test_embedding_folders import write_encoder, write_modules

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


def of_pytorch(folder: Path) -> None:
    torch = pytest.importorskip("torch")
    (write_model(folder) / "model.safetensors").unlink()
    tensors = {name: torch.from_numpy(value) for name, value in llama_tensors().items()}
    torch.save(tensors, folder / "my-weights.bin")


def of_shards(folder: Path) -> None:
    (write_model(folder) / "model.safetensors").unlink()
    write_shards(folder)


def of_mlx(folder: Path) -> None:
    (write_model(folder) / "model.safetensors").unlink()
    for number, name in enumerate(sorted(llama_tensors())):
        arrays: dict[str, Any] = {name: llama_tensors()[name]}
        np.savez(folder / f"weights.{number:02}.npz", **arrays)


def of_modules(folder: Path) -> None:
    write_encoder(folder / "0_Transformer")
    write_modules(folder, "0_Transformer", "model.safetensors")


def of_gguf(folder: Path) -> None:
    folder.mkdir()
    llama_gguf(folder / "tiny.gguf")


def of_onnx(folder: Path) -> None:
    write_onnx(folder, decoder())


def of_coreml(folder: Path) -> None:
    folder.mkdir()
    write_coreml(folder, "BertModel", "last_hidden_state")


WRITERS = (of_pytorch, of_shards, of_mlx, of_modules, of_gguf, of_onnx, of_coreml)


def scanned(home: Path, catalog: Path) -> dict[str, tuple[str, str, list[Path]]]:
    """Scan with a catalog that knows nothing; return state, reason and files of each model."""
    store = CatalogStore(catalog)
    try:
        shelf = Shelf(home, store)
        shelf.scan()
        listed = [one for one in store.models() if one.info.files]
        return {one.id: (one.state, one.reason, sorted(one.info.files)) for one in listed}
    finally:
        store.close()


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__.removeprefix("of_"))
def test_every_format_is_the_same_model_among_them(
    write: Callable[[Path], None], tmp_path: Path
) -> None:
    home = tmp_path.resolve()
    folder = home / "models" / "tiny"
    folder.parent.mkdir()
    write(folder)
    plain = scanned(home, home / "plain.sqlite")
    assert [state for state, _, _ in plain.values()] == ["ok"]
    add_apple_double(folder)
    # Finder writes these too.
    (folder / ".DS_Store").write_bytes(APPLE_DOUBLE)
    (folder / "__MACOSX").mkdir()
    for path in [path for path in folder.iterdir() if path.is_file()]:
        (folder / "__MACOSX" / f"._{path.name}").write_bytes(APPLE_DOUBLE)
    assert scanned(home, home / "again.sqlite") == plain


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
OWN = {
    "backends/coreml/compile.py",
    "backends/coreml/compiled.py",
    "backends/prefixes/disk.py",
    "catalog/convert/disk.py",
    "catalog/convert/output.py",
    "catalog/hub/download/record.py",
    "catalog/hub/download/run.py",
    "catalog/uploads/child.py",
    "catalog/uploads/copy.py",
}


def test_folders_of_models_are_listed_without_hidden_files() -> None:
    """`Path.glob` finds hidden files too, so models' folders are read by `visible_files`."""
    sources = [path for room in ("backends", "catalog") for path in (ROOT / room).rglob("*.py")]
    listing = [
        str(path.relative_to(ROOT))
        for path in sources
        if re.search(r"\.r?glob\(", path.read_text("utf-8"))
    ]
    assert set(listing) <= OWN
