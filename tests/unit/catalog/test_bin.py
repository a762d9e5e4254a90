"""The bin: which files of a model go, that they come back whole, and what is not followed."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from catalog import bin as model_bin
from catalog.bin import BIN_FOLDER, KEPT_S, BinEntry
from catalog.models import (
    ARRIVAL_RECORD,
    DOWNLOAD_RECORD,
    BuiltIn,
    Converted,
    Local,
    ModelRecord,
    ModelSettings,
    Package,
    Source,
)
from core.errors import NotFound, RequestError, Unavailable
from tests.unit.catalog.builders import make_record

NOW = 1_000_000.0


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = Path(os.path.realpath(tmp_path)) / "models"
    folder.mkdir()
    return folder


def record(root: Path, *names: str, **changes: str) -> ModelRecord:
    """Write files of 10 bytes each and return the model that they are."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"0123456789")
    made = make_record(names[0], files=tuple(root / name for name in names), **changes)
    return replace(made, source=Local(str(root)))


def delete(one: ModelRecord, root: Path, *others: ModelRecord) -> BinEntry:
    assert model_bin.check_deletable(one, [root]) == root
    return model_bin.move_to_bin(one, root, [one, *others], NOW)


def visible(root: Path) -> list[str]:
    found = (path for path in root.rglob("*") if BIN_FOLDER not in path.parts)
    return sorted(str(path.relative_to(root)) for path in found)


def test_shards_go_and_come_back_and_their_neighbours_stay(root: Path) -> None:
    one = record(root, "a/x-1.gguf", "a/x-2.gguf")
    one = replace(one, aliases=("coder",), settings=ModelSettings(pin=True))
    other = record(root, "b.gguf")
    entry = delete(one, root, other)
    assert visible(root) == ["b.gguf"]
    assert (entry.size_bytes, entry.purge_at) == (20, NOW + 24 * 3600)
    assert model_bin.entries([root]) == [entry]
    assert (entry.aliases, entry.settings) == (("coder",), {"pin": True})
    model_bin.restore(model_bin.find(entry.id, [root]))
    assert visible(root) == ["a", "a/x-1.gguf", "a/x-2.gguf", "b.gguf"]
    assert not (root / BIN_FOLDER).exists()


def test_a_folder_of_one_model_goes_as_a_whole(root: Path) -> None:
    one = record(root, "m/model.safetensors", format="safetensors")
    (root / "m" / "config.json").write_bytes(b"{}")
    entry = delete(one, root)
    assert visible(root) == []
    assert entry.size_bytes == 12
    model_bin.restore(entry)
    assert visible(root) == ["m", "m/config.json", "m/model.safetensors"]


@pytest.mark.parametrize("inner", ["", "m.mlpackage/Data/weights/", "onnx/"])
def test_a_converted_model_goes_with_its_provenance_and_stays_when_its_source_goes(
    root: Path, inner: str
) -> None:
    source = record(root, "source/model.safetensors", format="safetensors")
    made = record(root, f"gguf-q8_0/m/{inner}weights.bin", f"gguf-q8_0/m/{inner}more.bin")
    made = replace(made, source=Converted(str(root), source.id))
    (root / "gguf-q8_0" / "m" / "provenance.json").write_bytes(b"{}")
    before = visible(root)
    delete(source, root, made)
    assert all(name.startswith("gguf-q8_0") for name in visible(root))
    entry = delete(made, root)
    # Else the same conversion would count as made.
    assert not (root / "gguf-q8_0" / "m").exists()
    model_bin.restore(entry)
    assert visible(root) == [name for name in before if name.startswith("gguf-q8_0")]


@pytest.mark.parametrize("name", [DOWNLOAD_RECORD, ARRIVAL_RECORD])
def test_what_came_with_a_model_goes_and_comes_back(root: Path, name: str) -> None:
    one = record(root, "hub/m/q4/x.gguf")
    (root / "hub/m/README.md").write_bytes(b"read me")
    names = ["q4/x.gguf", "README.md", "../outside.txt", "gone.txt", 5]
    listed = {"version": 1, "files": [{"path": name} for name in names]}
    (root / "hub/m" / name).write_text(json.dumps(listed))
    (root / "hub/outside.txt").write_bytes(b"the user's")
    entry = delete(one, root)
    assert visible(root) == ["hub", "hub/outside.txt"]
    model_bin.restore(entry)
    whole = sorted(["README.md", name, "q4", "q4/x.gguf"])
    assert visible(root) == [
        "hub",
        "hub/m",
        *(f"hub/m/{name}" for name in whole),
        "hub/outside.txt",
    ]
    # What is the user's own, and what another model needs, stays.
    (root / "hub/m/notes.txt").write_bytes(b"notes")
    model_bin.restore(delete(one, root))
    other = record(root, "hub/m/y.gguf")
    delete(one, root, other)
    assert "hub/m/README.md" in visible(root)


@pytest.mark.parametrize("text", ["", "[]", '{"files": 5}', '{"files": [{"path": "other.gguf"}]}'])
def test_files_beside_a_record_of_something_else_stay(root: Path, text: str) -> None:
    one = record(root, "m/x.gguf")
    (root / "m" / DOWNLOAD_RECORD).write_text(text)
    (root / "m" / "other.gguf").write_bytes(b"0")
    delete(one, root)
    assert visible(root) == ["m", f"m/{DOWNLOAD_RECORD}", "m/other.gguf"]


@pytest.mark.parametrize("name", ["m/model.safetensors", "model.gguf"])
def test_p6_a_download_into_the_same_folder_keeps_what_arrived(root: Path, name: str) -> None:
    one = record(root, f"org/{name}", format="gguf" if name.endswith("gguf") else "safetensors")
    arrived = root / "org" / ".m-q4_0-gguf.download" / ".partial" / "0.part"
    arrived.parent.mkdir(parents=True)
    arrived.write_bytes(b"half")
    entry = delete(one, root)
    assert not (root / "org" / name).exists()
    assert arrived.read_bytes() == b"half"
    model_bin.purge(entry)
    assert arrived.read_bytes() == b"half"


@pytest.mark.parametrize(
    "foreign", ["train.py", "notes.txt", "data.json", "photo.jpg", "sub/data.csv", "draft-Q4.gguf"]
)
def test_what_is_no_part_of_the_model_stays_where_it_is(root: Path, foreign: str) -> None:
    """P6: the folder may be that of a user's project, and the bin is emptied after a day."""
    one = record(root, "m/model.safetensors", "m/config.json", format="safetensors")
    (root / "m" / foreign).parent.mkdir(exist_ok=True)
    (root / "m" / foreign).write_bytes(b"mine")
    entry = delete(one, root)
    model_bin.purge(entry)
    assert (root / "m" / foreign).read_bytes() == b"mine"
    assert not (root / "m" / "model.safetensors").exists()


def test_a_folder_that_cannot_be_listed_may_have_anything(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = record(root, "m/model.safetensors", format="safetensors")
    (root / "m" / "private").mkdir()
    (root / "m" / "private" / "diary.txt").write_bytes(b"mine")
    scandir = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("private"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    entry = delete(one, root)
    monkeypatch.undo()
    assert entry.paths == ("m/model.safetensors",)
    assert (root / "m" / "private" / "diary.txt").read_bytes() == b"mine"


def test_what_repositories_have_beside_a_model_goes_with_it(root: Path) -> None:
    one = record(root, "m/model.safetensors", "m/config.json", format="safetensors")
    others = (
        *("README.md", "LICENSE", "LICENSE.txt", ".gitattributes", ".DS_Store", "._config.json"),
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "merges.txt"),
        *("vocab.json", "vocab.txt", "generation_config.json", "model.safetensors.index.json"),
        *("chat_template.jinja", "preprocessor_config.json", "tf_model.h5", "USE_POLICY.md"),
        *("original/params.json", "1_Pooling/config.json", ".git/objects/ab/cd", "spiece.model"),
        *(".cache/huggingface/download/x.lock", "onnx/model_q4.onnx", "configuration_phi.py"),
        "odd name of the repository.json",
    )
    for name in (*others, "download.json"):
        (root / "m" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "m" / name).write_bytes(b"{}")
    written = {"files": [{"path": "odd name of the repository.json"}]}
    (root / "m" / "download.json").write_text(json.dumps(written))
    delete(one, root)
    assert visible(root) == []


def test_a_shared_folder_and_shared_files_stay(root: Path) -> None:
    one = record(root, "m/model.safetensors", format="safetensors")
    other = record(root, "m/model.onnx", format="onnx")
    delete(one, root, other)
    assert visible(root) == ["m", "m/model.onnx"]
    third = record(root, "n/a.gguf", "n/shared.gguf")
    fourth = record(root, "n/b.gguf", "n/shared.gguf")
    delete(third, root, fourth)
    assert visible(root) == ["m", "m/model.onnx", "n", "n/b.gguf", "n/shared.gguf"]


def test_links_are_moved_and_not_followed(root: Path) -> None:
    outside = root.parent / "outside"
    outside.mkdir()
    (outside / "kept.gguf").write_bytes(b"kept")
    one = record(root, "m/model.safetensors", format="safetensors")
    (root / "m" / "tokenizer.json").symlink_to(outside)
    os.link(root / "m" / "model.safetensors", root / "second.bin")
    entry = delete(one, root)
    assert entry.size_bytes == 0
    model_bin.purge(entry)
    assert visible(root) == ["second.bin"]
    assert (outside / "kept.gguf").read_bytes() == b"kept"

    # A folder of the model is a link out of the model folder.
    (root / "away").symlink_to(outside)
    with pytest.raises(RequestError, match="outside of"):
        model_bin.check_deletable(
            replace(one, info=replace(one.info, files=(root / "away" / "kept.gguf",))), [root]
        )


@pytest.mark.parametrize(
    ("source", "files", "words"),
    [
        (Package("llm", "1"), ("m.gguf",), "installed package"),
        (BuiltIn(), (), "installed package"),
        (None, ("models--a--b/snapshots/1/m.gguf",), "hf cache rm"),
        (None, ("blobs/sha256-" + "0" * 64,), "ollama rm"),
        (Local("/elsewhere"), ("m.gguf",), "not one of the configured"),
    ],
)
def test_what_is_not_the_user_s_alone_stays(
    root: Path, source: Source | None, files: tuple[str, ...], words: str
) -> None:
    one = record(root, *(files or ("x.gguf",)))
    info = one.info if files else replace(one.info, files=())
    one = replace(one, info=info, source=source or one.source)
    with pytest.raises(RequestError, match=words):
        model_bin.check_deletable(one, [root])


def test_what_took_the_place_is_not_overwritten(root: Path) -> None:
    entry = delete(record(root, "a.gguf"), root)
    (root / "a.gguf").write_bytes(b"new")
    with pytest.raises(RequestError, match="exists"):
        model_bin.restore(entry)
    assert (root / "a.gguf").read_bytes() == b"new"
    assert model_bin.entries([root]) == [entry]


def test_a_move_that_fails_halfway_moves_nothing(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = record(root, "x-1.gguf", "x-2.gguf")
    rename = Path.rename

    def fails(path: Path, target: Path) -> Path:
        if path.name == "x-2.gguf":
            raise PermissionError(13, "Permission denied")
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fails)
        with pytest.raises(Unavailable, match="was not deleted"):
            delete(one, root)
    assert visible(root) == ["x-1.gguf", "x-2.gguf"]
    assert model_bin.entries([root]) == []


def test_a_clock_that_was_set_back_gives_the_whole_day_again(root: Path) -> None:
    """What was deleted in the future is neither purged at once nor kept for years."""
    delete(record(root, "a.gguf"), root)
    earlier = NOW - 30 * KEPT_S
    assert model_bin.purge_expired([root], earlier) == []
    (entry,) = model_bin.entries([root])
    assert (entry.deleted_at, entry.purge_at) == (earlier, earlier + KEPT_S)
    assert model_bin.purge_expired([root], earlier + KEPT_S - 1) == []
    assert model_bin.purge_expired([root], earlier + KEPT_S) == [entry]


def test_after_a_day_it_is_purged_and_before_not(root: Path) -> None:
    entry = delete(record(root, "a.gguf"), root)
    assert model_bin.purge_expired([root], NOW + KEPT_S - 1) == []
    assert model_bin.purge_expired([root], NOW - 60) == []
    assert model_bin.purge_expired([root], NOW + KEPT_S) == [entry]
    assert not (root / BIN_FOLDER).exists()
    with pytest.raises(NotFound):
        model_bin.find(entry.id, [root])


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"paths": ["../../x"]}', "\ud800"])
def test_damaged_and_hostile_manifests_are_left_alone(root: Path, text: str) -> None:
    entry = delete(record(root, "a.gguf"), root)
    manifest = entry.folder / "manifest.json"
    if "x" in text:
        text = manifest.read_text().replace('"a.gguf"', '"../../x"')
    manifest.write_bytes(text.encode("utf-8", "surrogatepass"))
    assert model_bin.entries([root]) == []
    assert model_bin.purge_expired([root], NOW + 2 * KEPT_S) == []
    assert len(os.listdir(entry.folder)) == 2
