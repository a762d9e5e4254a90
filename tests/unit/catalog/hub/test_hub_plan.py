"""Which model of a repository is meant, and where its download goes."""

from dataclasses import replace
from pathlib import Path

import pytest

from catalog.hub.entries import RepositoryFile, group
from catalog.hub.plan import meant_entries, repository_download, url_download
from catalog.hub.reference import HubReference, is_plain_address, parse_reference
from catalog.hub.repository import HubRepository, Safety
from catalog.hub.search import describe
from core.errors import RequestError

FOLDER = Path("/models")
FILES = tuple(
    RepositoryFile(path, size, "0" * 40)
    for path, size in [
        ("tiny-Q8_0.gguf", 80),
        ("tiny-Q4_K_M.gguf", 40),
        ("a/model.onnx", 30),
        ("b/model.onnx", 31),
        ("model.safetensors", 160),
        ("config.json", 1),
        ("README.md", 2),
    ]
)


def repository(*files: RepositoryFile) -> HubRepository:
    # What the hub calls itself is never part of a path.
    model = describe({"id": "../../evil"})
    safety = Safety((), (), (), is_scanned=True)
    entries = group(files, ())
    return HubRepository(model, "c" * 40, files, entries, safety, has_readme=True)


def names(text: str, name: str = "") -> list[str]:
    found = meant_entries(repository(*FILES), parse_reference(text), name)
    return sorted(entry.name for entry in found)


@pytest.mark.parametrize(
    ("text", "entries"),
    [
        ("org/tiny:Q4_K_M", ["tiny-Q4_K_M.gguf"]),
        ("org/tiny:q8_0", ["tiny-Q8_0.gguf"]),
        ("org/tiny/tiny-Q8_0.gguf", ["tiny-Q8_0.gguf"]),
        ("https://huggingface.co/org/tiny/tree/main/b", ["b/model.onnx"]),
        ("https://hf.co/org/tiny/resolve/main/model.safetensors", ["model.safetensors"]),
    ],
)
def test_reference_means_a_model(text: str, entries: list[str]) -> None:
    assert names(text) == entries


@pytest.mark.parametrize(
    ("tag", "entries"),
    [
        ("UD-IQ2_M", ["m-UD-IQ2_M.gguf"]),
        ("ud-iq2_m", ["m-UD-IQ2_M.gguf"]),
        ("IQ2_M", ["m-IQ2_M.gguf", "m-UD-IQ2_M.gguf"]),
        ("UD-Q4_K_XL", ["big/m-UD-Q4_K_XL.gguf"]),
        ("Q4_K_XL", ["big/m-UD-Q4_K_XL.gguf"]),
        ("fp16", ["m-f16.gguf"]),
        ("m-IQ2_M.gguf", ["m-IQ2_M.gguf"]),
        ("m-ud-q4_k_xl", ["big/m-UD-Q4_K_XL.gguf"]),
        ("m-UD-Q4_K_XL-00002-of-00002.gguf", ["big/m-UD-Q4_K_XL.gguf"]),
    ],
)
def test_tags_are_understood_as_ollama_and_model_cards_write_them(
    tag: str, entries: list[str]
) -> None:
    paths = (
        *("m-UD-IQ2_M.gguf", "m-IQ2_M.gguf", "m-f16.gguf"),
        *(f"big/m-UD-Q4_K_XL-0000{number}-of-00002.gguf" for number in (1, 2)),
    )
    files = (RepositoryFile(path, 10, "0" * 40) for path in paths)
    found = meant_entries(repository(*files), parse_reference(f"hf.co/org/tiny:{tag}"))
    assert sorted(entry.name for entry in found) == sorted(entries)


def test_name_of_an_entry_goes_before_all_and_nothing_means_all() -> None:
    assert names("org/tiny:Q4_K_M", "a/model.onnx") == ["a/model.onnx"]
    assert len(names("org/tiny")) == 5


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("org/tiny:Q2_K", "", r"org/tiny has no quantization 'Q2_K'\. It has: .*q4_k_m"),
        ("org/tiny/README.md", "", "has no model in 'README.md'"),
        ("org/tiny", "x", "has no model 'x'"),
    ],
)
def test_what_is_not_there_is_told_with_what_is(text: str, name: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        names(text, name)


def test_repository_without_a_model_is_refused_with_what_it_is() -> None:
    adapter = repository(RepositoryFile("adapter_model.safetensors", 10, "0" * 40))
    for text in ("org/tiny", "org/tiny:Q4_K_M", "org/tiny/adapter_model.safetensors"):
        with pytest.raises(RequestError, match=r"org/tiny: It has an adapter"):
            meant_entries(adapter, parse_reference(text))


def test_each_model_has_a_folder_of_its_own() -> None:
    found = repository(*FILES)
    reference = HubReference("org/tiny")
    jobs = [repository_download("", reference, found, one, FOLDER) for one in found.entries]
    targets = [str(job.target) for job in jobs]
    assert len(set(targets)) == len(targets) == 5
    # What they share with any other model of that folder is not fetched again.
    assert {job.library for job in jobs} == {"/models"}
    assert all(target.startswith("/models/org/tiny-") for target in targets)
    gguf = next(job for job in jobs if job.files[0].path == "tiny-Q8_0.gguf")
    assert (gguf.target.name, gguf.commit) == ("tiny-q8_0-gguf", "c" * 40)
    # A repository with one model, and another revision of it.
    single = repository(*FILES[4:])
    (entry,) = single.entries
    plain = repository_download("", reference, single, entry, FOLDER)
    assert (plain.target.name, [file.path for file in plain.files]) == (
        "tiny",
        ["model.safetensors", "config.json"],
    )
    other = replace(reference, revision="refs/pr/1")
    target = repository_download("", other, single, entry, FOLDER).target
    assert target.name == "tiny-cccccccc"


def test_model_without_all_its_shards_is_not_downloaded() -> None:
    found = repository(RepositoryFile("m-00001-of-00003.gguf", 5, "0" * 40))
    with pytest.raises(RequestError, match=r"2 of the shards of m\.gguf are missing"):
        repository_download("", HubReference("org/m"), found, found.entries[0], FOLDER)


def test_address_has_a_folder_of_its_own() -> None:
    file = RepositoryFile("m.gguf", 5, "")
    first = url_download("https://a.example/m.gguf?sig=1", file, FOLDER)
    second = url_download("https://b.example/m.gguf", file, FOLDER)
    assert first.target != second.target
    assert first.target.parent == FOLDER / "web"
    assert (first.url, first.files) == ("https://a.example/m.gguf?sig=1", (file,))


@pytest.mark.parametrize(
    ("text", "is_plain"),
    [
        (" https://example.com/m.gguf", True),
        ("HTTP://example.com/m.gguf", True),
        ("https://huggingface.co/org/m", False),
        ("http://hub.local:9000/org/m", False),
        ("org/m", False),
        ("https://[", False),
    ],
)
def test_address_outside_of_the_hub_is_told_apart(text: str, is_plain: bool) -> None:
    assert is_plain_address(text, "http://hub.local:9000") is is_plain
