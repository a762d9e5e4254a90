"""Models in an Ollama store: the manifests name the blobs."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from backends.prompt.go_templates import to_jinja
from catalog.models import ModelRecord
from tests.gguf_raw import minimal_gguf, write_gguf
from tests.unit.catalog.scan.folders import Shelf, write_json

MODEL = "application/vnd.ollama.image.model"
TEMPLATE = "application/vnd.ollama.image.template"


class OllamaStore:
    """An Ollama store in a model folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "blobs").mkdir(parents=True)

    def blob(self, data: bytes) -> str:
        """Add a blob; return its digest."""
        digest = hashlib.sha256(data).hexdigest()
        (self.folder / "blobs" / f"sha256-{digest}").write_bytes(data)
        return f"sha256:{digest}"

    def gguf(self, tmp_path: Path, **metadata: Any) -> str:
        """Add a small GGUF model; return its digest."""
        return self.blob(minimal_gguf(tmp_path / "blob.gguf", **metadata).read_bytes())

    def tag(self, name: str, *layers: tuple[str, str]) -> Path:
        """Add a manifest with layers of a media type and a digest."""
        described = [{"mediaType": kind, "digest": digest, "size": 1} for kind, digest in layers]
        path = self.folder / "manifests" / "registry.ollama.ai" / name
        return write_json(path, {"schemaVersion": 2, "layers": described})


@pytest.fixture
def ollama(shelf: Shelf) -> OllamaStore:
    return OllamaStore(shelf.models / "ollama")


@pytest.mark.parametrize(
    ("tag", "name"),
    [
        ("library/llama3.2/1b", "llama3.2-1b"),
        ("library/llama3/latest", "llama3"),
        ("library/qwen2.5/7b-instruct-q4_K_M", "qwen2.5-7b-instruct"),
        ("someone/Their-Model/v2", "their-model-v2"),
        ("library/nomic-embed-text/v1.5", "nomic-embed-text-v1.5"),
    ],
)
def test_a_model_is_named_by_its_tag(
    shelf: Shelf, ollama: OllamaStore, tmp_path: Path, tag: str, name: str
) -> None:
    digest = ollama.gguf(tmp_path, general__name="A Title From Training")
    ollama.tag(tag, (MODEL, digest), (TEMPLATE, ollama.blob(b"{{ .Prompt }}")))
    shelf.scan()
    assert shelf.states() == {f"{name}@gguf-f32": "ok"}
    _, _, model_and_tag = tag.partition("/")
    (record,) = shelf.store.resolve(model_and_tag.replace("/", ":"))
    assert record.info.name == name
    shelf.scan()
    assert shelf.looked == []


def test_all_tags_of_one_blob_name_one_model(
    shelf: Shelf, ollama: OllamaStore, tmp_path: Path
) -> None:
    digest = ollama.gguf(tmp_path)
    for tag in ("library/llama3.2/latest", "library/llama3.2/1b", "me/copy/latest"):
        ollama.tag(tag, (MODEL, digest))
    shelf.scan()
    assert shelf.states() == {"llama3.2-1b@gguf-f32": "ok"}
    for asked in ("llama3.2", "llama3.2:latest", "LLAMA3.2:1B", "copy", "llama3.2-1b"):
        assert [one.id for one in shelf.store.resolve(asked)] == ["llama3.2-1b@gguf-f32"]
    assert shelf.store.resolve("llama3.2:3b") == []
    assert shelf.store.resolve("llama3") == []


def test_a_new_tag_names_a_known_blob(shelf: Shelf, ollama: OllamaStore, tmp_path: Path) -> None:
    ollama.gguf(tmp_path, general__name="Old Title")
    shelf.scan()
    assert shelf.states() == {"old-title@gguf-f32": "ok"}
    digest = ollama.gguf(tmp_path, general__name="Old Title")
    ollama.tag("library/fresh/latest", (MODEL, digest))
    shelf.scan()
    assert shelf.states() == {"fresh@gguf-f32": "ok"}


def test_a_projector_is_refused_as_what_it_is(
    shelf: Shelf, ollama: OllamaStore, tmp_path: Path
) -> None:
    projector = write_gguf(
        tmp_path / "p.gguf", {"general.architecture": "clip", "general.type": "mmproj"}, []
    )
    digest = ollama.blob(projector.read_bytes())
    ollama.tag(
        "library/llava/7b",
        (MODEL, ollama.gguf(tmp_path)),
        ("application/vnd.ollama.image.projector", digest),
    )
    shelf.scan()
    assert shelf.states() == {"llava-7b@gguf-f32": "ok", "llava-7b-projector@gguf": "refused"}
    assert "projector" in shelf.reason("llava-7b-projector@gguf")


def test_a_tag_with_an_adapter_is_not_served_as_the_model_below_it(
    shelf: Shelf, ollama: OllamaStore, tmp_path: Path
) -> None:
    """Its answers would be those of another model."""
    model = ollama.gguf(tmp_path)
    adapter = write_gguf(
        tmp_path / "a.gguf", {"general.architecture": "llama", "general.type": "adapter"}, []
    )
    kind = "application/vnd.ollama.image.adapter"
    ollama.tag("library/llama3/8b", (MODEL, model))
    ollama.tag("me/mine/latest", (MODEL, model), (kind, ollama.blob(adapter.read_bytes())))
    shelf.scan()
    assert shelf.states() == {"llama3-8b@gguf-f32": "ok", "mine@gguf": "refused"}
    assert "an adapter (LoRA)" in shelf.reason("mine@gguf")
    assert [one.id for one in shelf.store.resolve("mine") if one.state == "ok"] == []


def test_a_model_of_single_tensors_is_refused_once(shelf: Shelf, ollama: OllamaStore) -> None:
    kind = "application/vnd.ollama.image.tensor"
    ollama.tag("library/gemma/mlx", *((kind, ollama.blob(bytes([n]))) for n in range(40)))
    shelf.scan()
    assert shelf.states() == {"gemma@gguf": "refused"}
    assert "tensor by tensor (40 files)" in shelf.reason("gemma@gguf")
    assert shelf.looked == []


def test_a_missing_blob_is_refused_until_it_is_there(
    shelf: Shelf, ollama: OllamaStore, tmp_path: Path
) -> None:
    digest = ollama.gguf(tmp_path)
    blob = ollama.folder / "blobs" / digest.replace(":", "-")
    data = blob.read_bytes()
    blob.unlink()
    ollama.blob(b"keeps the store one")
    ollama.tag("library/tiny/latest", (MODEL, digest))
    shelf.scan()
    assert "missing in Ollama's blobs" in shelf.reason("tiny@gguf")
    blob.write_bytes(data)
    shelf.scan()
    assert shelf.states()["tiny@gguf-f32"] == "ok"


@pytest.mark.parametrize(
    "manifest",
    [
        "not json",
        "[1, 2]",
        '{"layers": 7}',
        '{"layers": ["x"]}',
        '{"layers": [{"digest": "sha256:../../../../etc/passwd"}]}',
        '{"layers": [{"digest": null}]}',
        '{"layers": []}',
        '{"a":' * 100_000,
    ],
)
def test_a_hostile_manifest_is_refused_and_harms_no_other(
    shelf: Shelf, ollama: OllamaStore, tmp_path: Path, manifest: str
) -> None:
    ollama.tag("library/good/latest", (MODEL, ollama.gguf(tmp_path)))
    path = ollama.tag("library/bad/latest")
    path.write_text(manifest)
    shelf.scan()
    assert shelf.states() == {"good@gguf-f32": "ok", "bad@gguf": "refused"}
    assert shelf.reason("bad@gguf")


def test_manifests_that_are_links_pipes_or_deep_are_left_alone(
    shelf: Shelf, ollama: OllamaStore, tmp_path: Path
) -> None:
    ollama.tag("library/good/latest", (MODEL, ollama.gguf(tmp_path)))
    manifests = ollama.folder / "manifests"
    (manifests / "loop").symlink_to(manifests)
    (manifests / "link").symlink_to("/etc/passwd")
    os.mkfifo(manifests / "pipe")
    manifests.joinpath(*"abcdefghij").mkdir(parents=True)
    shelf.scan()
    assert shelf.states() == {"good@gguf-f32": "ok"}


def test_unfinished_blobs_are_left_alone(shelf: Shelf, ollama: OllamaStore) -> None:
    ollama.blob(b"text")
    for name in ("-partial", "-partial-0", "-partial-12"):
        (ollama.folder / "blobs" / f"sha256-{'0' * 64}{name}").write_bytes(b"GGUF" + bytes(100))
    shelf.scan()
    assert shelf.states() == {}


PARAMS, SYSTEM, LICENSE = (
    f"application/vnd.ollama.image.{kind}" for kind in ("params", "system", "license")
)


def only(shelf: Shelf) -> ModelRecord:
    """Return the one model that has files."""
    (record,) = (one for one in shelf.store.models() if one.info.files)
    return record


def test_parameters_system_prompt_and_licence_of_a_tag_are_read(
    shelf: Shelf, ollama: OllamaStore, tmp_path: Path
) -> None:
    model = (MODEL, ollama.gguf(tmp_path))
    params = {"temperature": 0.6, "top_k": 20, "stop": ["x", 1, "", "y" * 999, "<end>"],
              "top_p": True, "min_p": -1, "num_ctx": 8192}  # fmt: skip
    ollama.tag(
        "library/tiny/1b",
        model,
        (PARAMS, ollama.blob(json.dumps(params).encode())),
        (SYSTEM, ollama.blob(b"You are tiny.\n")),
        (LICENSE, ollama.blob(b"Apache License\nVersion 2.0")),
        (LICENSE, ollama.blob(b"Another")),
    )
    shelf.scan()
    record = only(shelf)
    details = record.info.details
    sampling = {name: value for name, value in details.items() if name.startswith("sampling_")}
    assert sampling == {"sampling_temp": 0.6, "sampling_top_k": 20}
    assert (details["system_prompt"], record.info.license) == ("You are tiny.", "Apache License")
    assert (details["stop_strings"], details["default_context"]) == ('["x", "<end>"]', 8192)
    assert not shelf.scan().has_changes

    # The model is made anew with another prompt and without parameters.
    ollama.tag("library/tiny/1b", model, (SYSTEM, ollama.blob(b"Be kind.")))
    assert shelf.scan().changed == (record.id,)
    changed = only(shelf)
    assert changed.info.details["system_prompt"] == "Be kind."
    gone = {"sampling_temp", "stop_strings", "default_context"}
    assert not gone & changed.info.details.keys()
    assert not shelf.scan().has_changes


def test_the_template_of_a_tag_is_used_where_the_model_has_none(
    shelf: Shelf, ollama: OllamaStore, tmp_path: Path
) -> None:
    text = "{{ if .Prompt }}U: {{ .Prompt }}\n{{ end }}A: {{ .Response }}\n"
    own, template = "{{ messages[0].content }}", ollama.blob(text.encode())
    with_own = ollama.gguf(tmp_path, **{"tokenizer.chat_template": own})
    ollama.tag("library/bare/1b", (MODEL, ollama.gguf(tmp_path)), (TEMPLATE, template))
    ollama.tag("library/own/1b", (MODEL, with_own), (TEMPLATE, template))
    shelf.scan()
    templates = {
        one.info.name: one.info.chat_template for one in shelf.store.models() if one.info.files
    }
    assert templates == {"own-1b": own, "bare-1b": to_jinja(text)}
    assert not shelf.scan().has_changes

    # One that has no equivalent leaves the plain form.
    other = ollama.blob(b"{{ printf .Prompt }}")
    ollama.tag("library/bare/1b", (MODEL, ollama.gguf(tmp_path)), (TEMPLATE, other))
    shelf.scan()
    bare = next(one for one in shelf.store.models() if one.info.name == "bare-1b")
    assert bare.info.chat_template is None


@pytest.mark.parametrize(
    "text",
    [b"", b"[]", b"{", b"\xff", b"[" * 99_999, b'{"top_k": NaN}', b'{"stop": "x", "num_ctx": 2.5}'],
)
def test_damaged_layers_cost_no_model(
    shelf: Shelf, ollama: OllamaStore, tmp_path: Path, text: bytes
) -> None:
    missing = "sha256:" + "0" * 64
    layers = [(PARAMS, ollama.blob(text)), (SYSTEM, missing), (LICENSE, ollama.blob(b" \n"))]
    ollama.tag("library/tiny/1b", (MODEL, ollama.gguf(tmp_path)), *layers)
    shelf.scan()
    record = only(shelf)
    assert record.state == "ok"
    unread = {"sampling_top_k", "system_prompt", "stop_strings", "default_context"}
    assert not unread & record.info.details.keys()
    assert not shelf.scan().has_changes
