"""Groups the files of a repository into models, one for each quantization; pure."""

import posixpath
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from catalog.scan.packages import is_part, natural_format
from core.units import MIB

_MAX_SIDE_BYTES = 64 * MIB
# Of texts that say nothing of tokenizers: data and logs of a training are larger.
_MAX_OTHER_BYTES = MIB
_LARGE = re.compile(
    r".*(?:token|vocab|merges|config|\.index\.json|tekken|template|bpe|encoder|spiece).*|"
    r".*\.(?:model|tiktoken)",
    re.IGNORECASE | re.DOTALL,
)
_SHARD = re.compile(r"(.+?)[-._](\d{5})-of-(\d{5})(\.\w+)", re.DOTALL)
QUANTIZATION = re.compile(
    r"(?:^|[-._/ ])((?:ud-|i1-)?(?:i?q\d(?:_\w+|f16)?|tq\d_\d|b?f16|f32|fp16|fp32|fp8|fp4|"
    r"mxfp4(?:_moe)?|nvfp4|\d{1,2}-?bit|u?int[48]|bnb4|quantized))(?=$|[-._/ ])",
    re.IGNORECASE,
)
# What `mlx` models and older GGUF repositories name differently from this server.
_SAME = {"fp16": "f16", "fp32": "f32", "quantized": "int8"}
_PROJECTOR = re.compile(r"(?:.*[-._])?mmproj(?:[-._].*)?", re.IGNORECASE)
_MATRIX = re.compile(r"(?:.*[-._])?imatrix(?:[-._].*)?", re.IGNORECASE)
_SIDE_SUFFIXES = frozenset({".json", ".txt", ".model", ".jinja", ".tiktoken", ".vocab"})
# Folders of modules that belong to the model of the folder around them.
_MODULES = re.compile(r"\d+_[A-Z]\w*")
# The first of them is the transformer itself.
_LATER_MODULES = re.compile(r"0*[1-9]\d*_[A-Z]\w*")
_INDEX = ".index.json"
# Of diffusers: the models in its folders are parts of one that makes images.
_PIPELINE = "model_index.json"
_PIECE = re.compile(
    r"\.gguf(?:\.part\d*of\d+|[._-]split[._-]?\w+|\.part\w*|\.\d{3})", re.IGNORECASE
)
_ADAPTER = re.compile(r"(?:.*/)?(?:adapter_model|adapters|pytorch_lora_weights)\b.*", re.DOTALL)
_MODULE_LIST = "modules.json"
_SAFE_MODULE, _PICKLED_MODULE = "model.safetensors", "pytorch_model.bin"
_PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib"})
# Weights in safetensors that are not those which transformers loads.
_COPIES = re.compile(r"(?:consolidated|adapter)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class RepositoryFile:
    """A file of a repository; `sha256` is empty for small files, which have a git hash alone."""

    path: str
    size_bytes: int
    git_oid: str
    sha256: str = ""

    @property
    def is_pickle(self) -> bool:
        """Whether loading it the usual way could run code."""
        return PurePosixPath(self.path).suffix.lower() in _PICKLES


@dataclass(frozen=True, slots=True)
class HubEntry:
    """One model of a repository, with the files that it needs, weights first.

    `name` identifies it in its repository: the path of its weights without shard numbers.
    `quantization` is as in this server's ids, empty if the name does not tell it.  `missing` says
    how many of its shards are not there.
    """

    name: str
    format: str
    quantization: str
    weights: tuple[RepositoryFile, ...]
    sides: tuple[RepositoryFile, ...]
    missing: int = 0

    @property
    def files(self) -> tuple[RepositoryFile, ...]:
        """All files, as they are downloaded."""
        return self.weights + self.sides

    @property
    def weights_bytes(self) -> int:
        """Bytes of the weights."""
        return sum(file.size_bytes for file in self.weights)

    @property
    def size_bytes(self) -> int:
        """Bytes to download."""
        return sum(file.size_bytes for file in self.files)

    @property
    def pickles(self) -> tuple[str, ...]:
        """The weights that are pickles."""
        return tuple(file.path for file in self.weights if file.is_pickle)


@dataclass(frozen=True, slots=True)
class _Tree:
    """The files by folder and name, and the folders of modules by the folder around them."""

    files: Mapping[str, Mapping[str, RepositoryFile]]
    modules: Mapping[str, Sequence[str]]

    @classmethod
    def of(cls, files: Iterable[RepositoryFile]) -> "_Tree":
        found: dict[str, dict[str, RepositoryFile]] = {}
        for file in files:
            folder, base = posixpath.split(file.path)
            found.setdefault(folder, {})[base] = file
        modules: dict[str, list[str]] = {}
        for folder in found:
            around, base = posixpath.split(folder)
            if _MODULES.fullmatch(base):
                modules.setdefault(around, []).append(folder)
        return cls(found, modules)

    def has(self, folder: str, base: str) -> bool:
        return base in self.files.get(folder, ())

    def is_of_module(self, path: str) -> bool:
        """Whether weights are of a listed module after the transformer."""
        around, module = posixpath.split(posixpath.dirname(path))
        return self.has(around, _MODULE_LIST) and _LATER_MODULES.fullmatch(module) is not None

    def is_module_weights(self, path: str) -> bool:
        """Whether a file has such a module's weights; of two formats the safe one."""
        folder, base = posixpath.split(path)
        is_chosen = base == _SAFE_MODULE or (
            base == _PICKLED_MODULE and not self.has(folder, _SAFE_MODULE)
        )
        return is_chosen and self.is_of_module(path)


def group(files: Sequence[RepositoryFile], tags: Iterable[str]) -> tuple[HubEntry, ...]:
    """Return the models in `files`, by format and size; `tags` are the repository's."""
    is_mlx = "mlx" in tags
    groups: dict[tuple[str, str], dict[str, list[RepositoryFile]]] = {}
    tree = _Tree.of(files)
    is_pipeline = tree.has("", _PIPELINE)
    for file in files:
        format = _format(file.path, is_mlx)
        if is_pipeline and format != "gguf":
            continue
        if format and not tree.is_of_module(file.path):
            name, shards = _name(file.path, format)
            sets = groups.setdefault((format, name), {})
            sets.setdefault(shards, []).append(file)
    found = [
        _entry(format, name, shards, sets, tree)
        for (format, name), sets in groups.items()
        # Data whose graph is not there is no model.
        if format != "onnx" or tree.has(*posixpath.split(name))
        for shards in sets
    ]
    return tuple(sorted(found, key=lambda entry: (entry.format, entry.weights_bytes, entry.name)))


def why_none(files: Iterable[RepositoryFile]) -> str:
    """Return why a repository has no models, from its files."""
    paths = [file.path for file in files]
    if _PIPELINE in paths:
        return "It is a pipeline of diffusers, for images or video; this server runs text models."
    if any(map(_ADAPTER.fullmatch, paths)):
        return (
            "It has an adapter (LoRA) for another model, which cannot run by itself; look for a "
            "repository that has it merged into that model."
        )
    if any(map(_PIECE.search, paths)):
        return (
            "Its GGUF files are cut into pieces that have to be joined by hand: download them, "
            "join them with `cat`, and put the result into a model folder."
        )
    return "It has no model in a format that this server knows."


def quantization_in(name: str) -> str:
    """Return the quantization that a file's path names, as this server writes it, or nothing."""
    found = QUANTIZATION.findall(name)
    text = found[-1].lower().removeprefix("ud-").removeprefix("i1-") if found else ""
    return _SAME.get(text, text.replace("-bit", "bit"))


def _format(path: str, is_mlx: bool) -> str:
    """Return the format of a file that is weights, or beside them data of the same model."""
    package = _package(path)
    if package:
        return natural_format(Path(package))
    # External data is of the format of its graph.
    local = Path(_without_data(path))
    found = natural_format(local)
    if not found or is_part(local) or (found == "gguf" and _is_gguf_part(local.name)):
        return ""
    if found == "safetensors":
        return "" if _COPIES.match(local.name) else "mlx" if is_mlx else found
    # Of other programs' data only what transformers writes is a model.
    is_other = found == "pytorch" and not local.name.startswith(("pytorch_model", "model"))
    return "" if is_other else found


def _is_gguf_part(name: str) -> bool:
    """Whether it is a projector, or the matrix that models were quantized with."""
    is_matrix = _MATRIX.fullmatch(name) is not None and not quantization_in(name)
    return is_matrix or _PROJECTOR.fullmatch(name) is not None


def _package(path: str) -> str:
    """Return the outermost folder around `path` that is a Core ML model, or nothing."""
    parts = path.split("/")
    for index, part in enumerate(parts[:-1]):
        if part.lower().endswith((".mlpackage", ".mlmodelc")):
            return "/".join(parts[: index + 1])
    return ""


def _without_data(path: str) -> str:
    """Return the graph's path for a file of its external data, else `path`."""
    match = re.fullmatch(r"(.+?\.onnx)(?:[._](?:onnx_)?data(?:_\d+)?)", path, re.DOTALL)
    return match[1] if match else path


def _name(path: str, format: str) -> tuple[str, str]:
    """Return what the files of one model have in common, and its number of shards as digits."""
    package = _package(path)
    if package:
        return package, ""
    if format == "onnx":
        return _without_data(path), ""
    match = _SHARD.fullmatch(path)
    return (f"{match[1]}{match[4]}", match[3]) if match else (path, "")


def _entry(
    format: str, name: str, shards: str, sets: Mapping[str, list[RepositoryFile]], tree: _Tree
) -> HubEntry:
    """Return the model of one of the `sets` of files, by their numbers of shards."""
    ordered = tuple(sorted(sets[shards], key=lambda file: file.path))
    is_alone = len(sets) == 1
    # GGUF files and compiled packages have everything in them.
    sides = () if format == "gguf" else tuple(_sides(name, ordered, tree))
    if not is_alone and not shards:
        sides = tuple(file for file in sides if not file.path.endswith(_INDEX))
    stem, extension = posixpath.splitext(name)
    return HubEntry(
        name if is_alone or not shards else f"{stem}-of-{shards}{extension}",
        format,
        quantization_in(name),
        ordered,
        sides,
        max(int(shards or "0") - len(ordered), 0),
    )


def _sides(name: str, weights: Sequence[RepositoryFile], tree: _Tree) -> Iterable[RepositoryFile]:
    """Yield the configuration, tokenizer, template and modules beside a model, and at the top."""
    own = posixpath.dirname(name)
    taken = {file.path for file in weights}
    top = dict.fromkeys(("", own))
    near = [*top, *(module for folder in top for module in tree.modules.get(folder, ()))]
    for folder in dict.fromkeys(near):
        for base, file in tree.files.get(folder, {}).items():
            is_kept = PurePosixPath(base).suffix.lower() in _SIDE_SUFFIXES or base == "LICENSE"
            if base.endswith(_INDEX):
                # An index names the files of one set of weights.
                is_kept = folder == own and base == f"{posixpath.basename(name)}{_INDEX}"
            is_small = is_kept and file.size_bytes <= _most_bytes(base)
            if file.path not in taken and (is_small or tree.is_module_weights(file.path)):
                yield file


def _most_bytes(name: str) -> int:
    """Return how large a file beside a model may be to be downloaded with it."""
    return _MAX_SIDE_BYTES if _LARGE.fullmatch(name) else _MAX_OTHER_BYTES
