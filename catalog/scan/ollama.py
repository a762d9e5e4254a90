"""Names the blobs of an Ollama store by the manifests that refer to them.

A store has `manifests/<host>/<owner>/<model>/<tag>`, JSON files that list layers by digest, and
`blobs/sha256-<digest>`.  Text layers hold parameters, a system prompt, a template
and licences.
Source: Ollama's server/manifest.go, its media types, and the options of its api/types.go.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from backends.hf.header import read_json, read_text
from backends.prompt.go_templates import to_jinja
from catalog.models import DEFAULT_CONTEXT, STOP_STRINGS, SYSTEM_PROMPT
from core.errors import BrokenModel, ImpetusError
from core.units import KIB, MIB

_MAX_MANIFESTS = 5000
_MAX_DEPTH = 6
_MAX_MANIFEST_BYTES = MIB
_MAX_LAYERS = 20_000
_DIGEST = re.compile(r"sha256[:-]([0-9a-f]{64})")
_BLOB = re.compile(r"sha256-[0-9a-f]{64}")
_MEDIA_TYPE = "application/vnd.ollama.image."
# Layers that are GGUF files; the others are texts and settings.
_FILES = ("model", "projector", "adapter")
_DEFAULT_TAG = "latest"
# What a model's layers say of it is one of these, or a detail of `ModelInfo` by its name.
LICENSE, CHAT_TEMPLATE = "license", "chat_template"
_SAMPLING = {
    "temperature": "sampling_temp",
    "top_k": "sampling_top_k",
    "top_p": "sampling_top_p",
    "min_p": "sampling_min_p",
}
_MAX_TEXT_BYTES = 256 * KIB
_LONGEST_PROMPT = 32_000
_LONGEST_LICENSE = 100
_LARGEST_NUMBER = 1e6
_LEAST_CONTEXT = 256
_LONGEST_STOP, _MOST_STOPS = 200, 16


@dataclass(frozen=True, slots=True)
class OllamaStore:
    """What the manifests say: the names of each blob, and manifests that cannot be served.

    `refused` has the model's name and the reason by manifest.  `texts` are blobs that are not
    models: templates, licenses, parameters and configurations.  `facts` are what the texts say of
    each blob, by name.  `folders` have the manifests.
    """

    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    texts: frozenset[str] = frozenset()
    facts: Mapping[str, Mapping[str, float | str]] = field(default_factory=dict)
    refused: Mapping[Path, tuple[str, str]] = field(default_factory=dict)
    folders: frozenset[Path] = frozenset()


def is_store(folder: Path) -> bool:
    """Whether `folder` has the two parts of an Ollama store."""
    if not (folder / "manifests").is_dir() or not (folder / "blobs").is_dir():
        return False
    try:
        with os.scandir(folder / "blobs") as listing:
            return any(_BLOB.match(entry.name) for entry in listing)
    except OSError:
        return False


def read_store(folder: Path) -> OllamaStore:
    """Read the manifests of a store; blocks while up to 5,000 and their text layers are read."""
    names: dict[str, list[str]] = {}
    texts: set[str] = set()
    facts: dict[str, Mapping[str, float | str]] = {}
    refused: dict[Path, tuple[str, str]] = {}
    manifests = list(islice(_manifests(folder / "manifests", 1), _MAX_MANIFESTS))
    for manifest in sorted(manifests, key=_latest_last):
        name = _model_name(manifest)
        try:
            layers = _sorted_layers(_layers(manifest))
            reason = layers.problem(folder / "blobs")
        except BrokenModel as problem:
            refused[manifest] = name, problem.message
            continue
        except OSError:
            continue
        texts |= layers.texts.keys()
        if reason:
            refused[manifest] = name, reason
            # Parts of a model that is refused are not models of their own.
            texts |= {blob for blob, kind in layers.files.items() if kind != "model"}
            continue
        for blob, kind in layers.files.items():
            names.setdefault(blob, []).append(name if kind == "model" else f"{name}-{kind}")
            if kind == "model" and blob not in facts:
                # That of the tag that names the model.
                facts[blob] = _facts(folder / "blobs", layers.texts)
    return OllamaStore(
        {blob: tuple(found) for blob, found in names.items()},
        frozenset(texts - names.keys()),
        facts,
        refused,
        frozenset(place for one in manifests for place in list(one.parents)[:3]),
    )


def _manifests(folder: Path, depth: int) -> Iterator[Path]:
    try:
        with os.scandir(folder) as listing:
            entries = list(listing)
    except OSError:
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            if depth < _MAX_DEPTH:
                yield from _manifests(Path(entry.path), depth + 1)
        elif entry.is_file(follow_symlinks=False):
            yield Path(entry.path)


def _latest_last(manifest: Path) -> tuple[bool, int, str]:
    """Sort key: of several tags of one blob the first that says more than "latest" names it."""
    return manifest.name == _DEFAULT_TAG, len(manifest.name), str(manifest)


def _model_name(manifest: Path) -> str:
    """Return model and tag as one name; the tag "latest" says nothing and is left out."""
    model, tag = manifest.parent.name, manifest.name
    return model if tag == _DEFAULT_TAG else f"{model}-{tag}"


def _layers(manifest: Path) -> list[dict[str, Any]]:
    content = read_json(manifest, _MAX_MANIFEST_BYTES)
    layers = content.get("layers")
    if not isinstance(layers, list) or not all(isinstance(one, dict) for one in layers):
        raise BrokenModel("Its manifest has no layers; pull the model again.", param="model")
    if len(layers) > _MAX_LAYERS:
        raise BrokenModel(
            f"Its manifest has {len(layers):,} layers, more than {_MAX_LAYERS:,}.", param="model"
        )
    config = content.get("config")
    return [*layers, config] if isinstance(config, dict) else layers


@dataclass(frozen=True, slots=True)
class _Layers:
    """A manifest's blobs: GGUF files and texts with their kinds, and the number of tensors."""

    files: Mapping[str, str]
    texts: Mapping[str, str]
    tensors: int

    def problem(self, blobs: Path) -> str:
        """Return why the model cannot be served, empty if it can."""
        if self.tensors:
            return (
                f"Ollama stores this model tensor by tensor ({self.tensors:,} files), which only "
                "Ollama reads; pull a GGUF version of it, or download its safetensors."
            )
        if "adapter" in self.files.values():
            return (
                "Its tag has an adapter (LoRA) over another model, which only Ollama applies; use "
                "a model that it was merged into."
            )
        for blob in self.files:
            if not (blobs / blob).is_file():
                return f"Its file {blob[:19]}… is missing in Ollama's blobs; pull the model again."
        return "" if self.files else "Its manifest names no weights; pull the model again."


def _sorted_layers(layers: list[dict[str, Any]]) -> _Layers:
    """Sort a manifest's layers.  Raises BrokenModel for a digest that is none."""
    files: dict[str, str] = {}
    texts: dict[str, str] = {}
    tensors = 0
    for layer in layers:
        match = _DIGEST.fullmatch(str(layer.get("digest")))
        if match is None:
            raise BrokenModel(
                f"Its manifest has the invalid digest {str(layer.get('digest'))[:80]!r}; pull the "
                "model again.",
                param="model",
            )
        blob = f"sha256-{match[1]}"
        kind = str(layer.get("mediaType")).removeprefix(_MEDIA_TYPE).partition(";")[0]
        if kind in _FILES:
            files[blob] = kind
        else:
            texts[blob] = kind
            tensors += kind == "tensor"
    return _Layers(files, texts, tensors)


def _facts(blobs: Path, texts: Mapping[str, str]) -> dict[str, float | str]:
    """Return what a model's text layers say; what cannot be read is left out."""
    facts: dict[str, float | str] = {}
    for blob, kind in texts.items():
        if kind not in ("params", "system", "license", "template"):
            continue
        try:
            whole = read_text(blobs / blob, _MAX_TEXT_BYTES)
        except (OSError, ImpetusError):
            continue
        text = whole.strip()
        if kind == "template":
            facts |= {CHAT_TEMPLATE: made} if (made := to_jinja(whole)) else {}
        elif kind == "params":
            facts |= _parameters(text)
        elif kind == "system" and 0 < len(text) <= _LONGEST_PROMPT:
            facts[SYSTEM_PROMPT] = text
        elif kind == "license" and text:
            # The first of several: the others are of what the model was made from.
            first = "".join(char for char in text.splitlines()[0] if char.isprintable())
            facts.setdefault(LICENSE, first.strip()[:_LONGEST_LICENSE])
    return facts


def _parameters(text: str) -> dict[str, float | str]:
    try:
        options = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(options, dict):
        return {}
    given = {detail: options.get(name) for name, detail in _SAMPLING.items()}
    found: dict[str, float | str] = {
        detail: value
        for detail, value in given.items()
        if isinstance(value, int | float)
        and not isinstance(value, bool)
        and 0 <= value <= _LARGEST_NUMBER
    }
    context = options.get("num_ctx")
    if type(context) is int and _LEAST_CONTEXT <= context <= _LARGEST_NUMBER:
        found[DEFAULT_CONTEXT] = context
    stop = options.get("stop")
    texts = stop if isinstance(stop, list) else []
    if kept := [one for one in texts if isinstance(one, str) and 0 < len(one) <= _LONGEST_STOP]:
        found[STOP_STRINGS] = json.dumps(kept[:_MOST_STOPS])
    return found
