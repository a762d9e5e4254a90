"""Models whose files are being written, and files that arrive after a model was listed."""

import os
from pathlib import Path

import pytest

from catalog.inspections import QUIET_S
from catalog.scan import surroundings
from catalog.scan.arrivals import PROMISED_LOOK_S
from catalog.scan.packages import model_stem
from catalog.scan.unlisted import unlisted_records
from core.types import Capability
from tests.gguf_raw import minimal_gguf
from tests.hub_repository import HubRepository
from tests.unit.catalog.scan.folders import (
    Shelf,
    write_json,
    write_model,
    write_shards,
)

TINY = "tiny@safetensors-f32"


def fresh(shelf: Shelf, folder: Path) -> None:
    """Make all files of a folder as young as can be."""
    shelf.touch(*(path for path in folder.rglob("*") if path.is_file()))


def arriving(shelf: Shelf) -> dict[str, str]:
    """Return the reasons of the files that are arriving, by file name."""
    return {Path(one.path).name: one.reason for one in shelf.store.uninspected()}


def test_a_folder_that_is_being_written_is_arriving_until_it_is_quiet(shelf: Shelf) -> None:
    folder = write_model(shelf.models / "tiny")
    tokenizer = (folder / "tokenizer.json").rename(shelf.home / "tokenizer.json")
    fresh(shelf, folder)
    report = shelf.scan()
    assert shelf.states() == {}
    assert "is arriving" in arriving(shelf)["model.safetensors"]
    assert report.next_look_s == pytest.approx(QUIET_S)
    # While it is written it costs no further inspection.
    for _ in range(3):
        shelf.touch(folder / "model.safetensors")
        shelf.scan(later_s=1)
        assert folder / "model.safetensors" not in shelf.looked
    tokenizer.rename(folder / "tokenizer.json")
    shelf.scan(later_s=QUIET_S + 1)
    assert shelf.states() == {TINY: "ok"}
    assert arriving(shelf) == {}


def test_what_stays_incomplete_is_refused_when_it_is_quiet(shelf: Shelf) -> None:
    folder = write_model(shelf.models / "tiny")
    (folder / "tokenizer.json").unlink()
    fresh(shelf, folder)
    shelf.scan()
    report = shelf.scan(later_s=QUIET_S + 1)
    assert shelf.states() == {"tiny@safetensors": "refused"}
    assert "tokenizer" in shelf.reason("tiny@safetensors")
    assert report.next_look_s is None
    shelf.scan(later_s=1000)
    assert shelf.looked == []


def test_a_complete_model_is_listed_at_once(shelf: Shelf) -> None:
    fresh(shelf, write_model(shelf.models / "tiny"))
    shelf.scan()
    assert shelf.states() == {TINY: "ok"}


def test_all_missing_shards_are_one_arrival(shelf: Shelf) -> None:
    folder = write_model(shelf.models / "tiny")
    (folder / "model.safetensors").unlink()
    write_shards(folder, 5)[4].unlink()
    fresh(shelf, folder)
    shelf.scan()
    assert len(arriving(shelf)) == 1


@pytest.mark.parametrize("suffix", [".downloadInProgress", ".downloading", ".part"])
def test_an_unfinished_download_is_no_model(shelf: Shelf, suffix: str) -> None:
    """The first is llama.cpp's; the header may be there already."""
    data = minimal_gguf(shelf.home / "x.gguf").read_bytes()
    path = shelf.models / f"tiny.gguf{suffix}"
    path.write_bytes(data[:-4])
    shelf.touch(path, age_s=10_000)
    shelf.scan()
    assert (shelf.states(), shelf.looked) == ({}, [])


@pytest.mark.parametrize("suffix", [".aria2", ".part", ".crdownload", ".incomplete", ".tmp"])
def test_an_unfinished_download_beside_it_keeps_a_file_arriving(shelf: Shelf, suffix: str) -> None:
    path = shelf.models / "tiny.gguf"
    path.write_bytes(bytes(1000))
    control = shelf.models / f"tiny.gguf{suffix}"
    control.write_bytes(b"x")
    shelf.touch(path, age_s=100)
    shelf.touch(control, age_s=30)
    shelf.scan()
    assert shelf.states() == {}
    assert control.name in arriving(shelf)["tiny.gguf"]
    # Given up long ago, it says nothing any more.
    shelf.scan(later_s=10_000)
    assert shelf.states() == {"tiny@gguf": "refused"}
    control.unlink()
    minimal_gguf(path)
    shelf.scan(later_s=10_000)
    assert shelf.states() == {"tiny@gguf-f32": "ok"}


@pytest.mark.parametrize(
    ("unfinished", "name"),
    [
        (["tiny.gguf.crdownload"], "tiny.gguf"),
        (["tiny.Q4_0.gguf.PART"], "tiny.Q4_0.gguf"),
        (["model-00001-of-00002.safetensors.part", "model-00002-of-00002.safetensors.part"],
         "model-00001-of-00002.safetensors"),
    ],
)  # fmt: skip
def test_a_model_of_which_only_the_download_is_there_is_arriving(
    shelf: Shelf, unfinished: list[str], name: str
) -> None:
    paths = [shelf.models / each for each in unfinished]
    for path in paths:
        path.write_bytes(b"GGUF")
        shelf.touch(path, age_s=60)
    report = shelf.scan()
    assert list(arriving(shelf)) == [name]
    assert f"the download {unfinished[0]} is not finished" in arriving(shelf)[name]
    assert (shelf.states(), shelf.looked) == ({}, [])
    assert report.next_look_s == pytest.approx(PROMISED_LOOK_S)
    # Given up, or cancelled.
    shelf.scan(later_s=1000)
    assert arriving(shelf) == {}
    for path in paths:
        shelf.touch(path)
    shelf.scan()
    assert list(arriving(shelf)) == [name]
    for path in paths:
        path.unlink()
    assert shelf.scan().next_look_s is None
    assert arriving(shelf) == {}


def test_an_unfinished_download_in_the_folder_of_a_model_is_no_other_one(shelf: Shelf) -> None:
    folder = write_model(shelf.models / "tiny")
    (folder / "half.safetensors.part").write_bytes(b"x")
    shelf.touch(folder / "half.safetensors.part")
    shelf.scan()
    assert (shelf.states(), arriving(shelf)) == ({TINY: "ok"}, {})


def test_a_model_whose_download_ends_is_listed_once(shelf: Shelf) -> None:
    download = shelf.models / "tiny.gguf.crdownload"
    minimal_gguf(download)
    shelf.touch(download)
    shelf.scan()
    (record,) = unlisted_records(shelf.store.uninspected(), ())
    assert (record.id, record.state) == ("tiny@gguf", "uninspected")
    download.rename(shelf.models / "tiny.gguf")
    shelf.scan(later_s=QUIET_S + 1)
    assert (shelf.states(), arriving(shelf)) == ({"tiny@gguf-f32": "ok"}, {})
    # An update of a model that is served says nothing of it.
    download.write_bytes(b"GGUF")
    shelf.touch(download)
    shelf.scan()
    assert (shelf.states(), arriving(shelf)) == ({"tiny@gguf-f32": "ok"}, {})


def test_a_download_into_a_cache_keeps_its_repository_arriving(
    shelf: Shelf, tmp_path: Path
) -> None:
    source = write_model(tmp_path / "source")
    (source / "model.safetensors").unlink()
    shards = write_shards(source, 2)
    repository = HubRepository(shelf.models, "org/tiny")
    names = [path.name for path in source.iterdir() if path != shards[1]]
    repository.add("a" * 40, source, *names)
    unfinished = repository.folder / "blobs" / f"{'0' * 64}.incomplete"
    unfinished.write_bytes(b"x")
    shelf.touch(unfinished)
    shelf.scan(later_s=QUIET_S + 30)
    assert shelf.states() == {}
    assert list(arriving(shelf)) == [shards[0].name]
    unfinished.unlink()
    repository.add("a" * 40, source, shards[1].name)
    shelf.scan(later_s=QUIET_S + 30)
    assert shelf.states() == {TINY: "ok"}


def test_a_download_into_a_plain_folder_is_seen(shelf: Shelf) -> None:
    folder = write_model(shelf.models / "tiny")
    (folder / "model.safetensors").unlink()
    write_shards(folder, 2)[1].unlink()
    download = folder / ".cache" / "huggingface" / "download" / "x.incomplete"
    download.parent.mkdir(parents=True)
    download.write_bytes(b"x")
    shelf.touch(download)
    shelf.scan(later_s=QUIET_S + 30)
    assert "x.incomplete is not finished" in next(iter(arriving(shelf).values()))


def test_a_download_into_a_subfolder_of_a_plain_folder_is_seen(shelf: Shelf) -> None:
    """`hf download --local-dir` notes it at the top, below the subfolder's name."""
    top = shelf.models / "some-GGUF"
    shard = top / "Q4_K_M" / "m-Q4_K_M-00001-of-00002.gguf"
    shard.parent.mkdir(parents=True)
    minimal_gguf(shard, split__count=2)
    download = top / ".cache" / "huggingface" / "download" / "Q4_K_M" / "x.incomplete"
    download.parent.mkdir(parents=True)
    download.write_bytes(b"x")
    shelf.touch(download)
    shelf.scan(later_s=QUIET_S + 30)
    assert shelf.states() == {}
    assert "x.incomplete is not finished" in next(iter(arriving(shelf).values()))


def test_a_known_model_that_is_overwritten_is_arriving_and_keeps_its_entry(shelf: Shelf) -> None:
    path = minimal_gguf(shelf.models / "tiny.gguf")
    whole = path.read_bytes()
    shelf.scan()
    shelf.store.set_alias("mine", "tiny@gguf-f32")
    path.write_bytes(b"GGUF" + bytes(2 * len(whole)))
    shelf.touch(path)
    shelf.scan()
    assert shelf.states() == {"tiny@gguf-f32": "uninspected"}
    assert "arriving" in shelf.reason("tiny@gguf-f32")
    path.write_bytes(whole)
    shelf.touch(path)
    shelf.scan(later_s=QUIET_S + 1)
    assert shelf.states() == {"tiny@gguf-f32": "ok"}
    assert len(shelf.store.resolve("mine")) == 1


def test_a_known_model_that_was_truncated_is_refused_at_once(shelf: Shelf) -> None:
    path = minimal_gguf(shelf.models / "tiny.gguf")
    shelf.scan()
    path.write_bytes(path.read_bytes()[:-50])
    shelf.touch(path)
    shelf.scan()
    assert shelf.states() == {"tiny@gguf-f32": "refused"}
    assert "was truncated" in shelf.reason("tiny@gguf-f32")


def test_files_from_the_future_do_not_wait_for_it(shelf: Shelf) -> None:
    path = shelf.models / "tiny.gguf"
    path.write_bytes(b"GGUF" + bytes(3))
    shelf.touch(path, age_s=-1e6)
    shelf.scan()
    assert shelf.states() == {"tiny@gguf": "refused"}


@pytest.mark.parametrize(
    "late",
    [
        "tokenizer.json",
        "config.json",
    ],
)
def test_what_was_missing_mends_a_refused_model(shelf: Shelf, late: str) -> None:
    folder = write_model(shelf.models / "tiny")
    (folder / late).rename(shelf.home / late)
    shelf.scan()
    assert list(shelf.states().values()) == ["refused"]
    (shelf.home / late).rename(folder / late)
    shelf.scan()
    assert shelf.states() == {TINY: "ok"}


def test_a_config_that_is_edited_in_place_mends_a_refused_model(shelf: Shelf) -> None:
    folder = write_model(shelf.models / "tiny", hidden_size=None)
    shelf.scan()
    assert list(shelf.states().values()) == ["refused"]
    config = folder / "config.json"
    before = folder.stat()
    config.write_text(config.read_text().replace("null", "16"))
    os.utime(folder, ns=(before.st_atime_ns, before.st_mtime_ns))
    shelf.scan()
    assert shelf.states() == {TINY: "ok"}


def test_a_template_that_arrives_later_changes_a_listed_model(shelf: Shelf) -> None:
    folder = write_model(shelf.models / "tiny")
    shelf.scan()
    (folder / "chat_template.jinja").write_text("{{ messages }}{% if tools %}{% endif %}")
    shelf.scan()
    record = shelf.store.get(TINY)
    assert record is not None
    assert record.info.chat_template is not None
    assert Capability.TOOLS in record.info.capabilities


def test_a_template_for_tools_that_arrives_later_changes_a_listed_model(shelf: Shelf) -> None:
    folder = write_model(shelf.models / "tiny")
    templates = folder / "additional_chat_templates"
    templates.mkdir()
    (templates / "rag.jinja").write_text("{{ documents }}")
    shelf.scan()
    for text in ("{{ tools }}", "{{ tools }} once more"):
        (templates / "tool_use.jinja").write_text(text)
        shelf.scan()
        record = shelf.store.get(TINY)
        assert record is not None
        assert record.info.tool_template == text
        assert record.info.rag_template == "{{ documents }}"
        assert Capability.TOOLS in record.info.capabilities


def test_modules_that_arrive_later_make_an_embedding_model(shelf: Shelf) -> None:
    folder = write_model(shelf.models / "tiny")
    shelf.scan()
    kinds = {"": "Transformer", "1_Pooling": "Pooling"}
    modules = [
        {"path": path, "type": f"sentence_transformers.models.{kind}"}
        for path, kind in kinds.items()
    ]
    write_json(folder / "modules.json", modules)
    shelf.scan()
    record = shelf.store.get(TINY)
    assert record is not None
    assert record.info.capabilities == {Capability.EMBEDDING}
    before = record.info.files
    write_json(folder / "1_Pooling" / "config.json", {"pooling_mode_mean_tokens": True})
    shelf.scan()
    record = shelf.store.get(TINY)
    assert record is not None
    assert len(record.info.files) == len(before) + 1


def test_an_index_that_arrives_later_changes_the_weights(shelf: Shelf) -> None:
    folder = write_model(shelf.models / "tiny")
    shelf.scan()
    shards = write_shards(folder, 2)
    shelf.scan()
    states = shelf.states()
    assert [one for one, state in states.items() if state == "ok"] == [TINY]
    record = shelf.store.get(TINY)
    assert record is not None
    assert set(shards) <= set(record.info.files)


def test_another_model_in_the_folder_costs_the_others_nothing(shelf: Shelf) -> None:
    for number in range(20):
        minimal_gguf(shelf.models / f"model-{number}x.gguf")
    (shelf.models / "broken.gguf").write_bytes(b"GGUF" + bytes(3))
    shelf.scan()
    path = minimal_gguf(shelf.models / "another.gguf")
    shelf.scan()
    assert shelf.looked == [path]


def test_sixty_models_are_inspected_once(shelf: Shelf) -> None:
    for number in range(30):
        write_model(shelf.models / f"folder-{number}x")
        minimal_gguf(shelf.models / f"file-{number}x.gguf")
    shelf.scan()
    assert list(shelf.states().values()) == ["ok"] * 60
    files = sum(path.is_file() for path in shelf.models.rglob("*"))
    assert len(shelf.looked) == len(set(shelf.looked)) <= files
    version = shelf.store.data_version()
    shelf.scan(later_s=1e6)
    assert shelf.looked == []
    assert shelf.store.data_version() == version


def test_many_refused_files_in_a_folder_are_compared_once(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(100):
        (shelf.models / f"file-{number}x.gguf").write_bytes(b"GGUF" + bytes(3))
        (shelf.models / f"file-{number}x.onnx").write_bytes(b"nonsense")
    shelf.scan()
    assert list(shelf.states().values()) == ["refused"] * 200
    compared: list[Path] = []

    def counted(path: Path) -> Path:
        compared.append(path)
        return model_stem(path)

    monkeypatch.setattr(surroundings, "model_stem", counted)
    shelf.scan()
    assert shelf.looked == []
    # Each file once as a file of its folder, and once for its own entry.
    assert len(compared) == 400
