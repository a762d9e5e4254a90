"""Reads the description of a Core ML model with size limits, without coremltools."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from backends.coreml.mil.wire import Message, WireError, read_varint
from core.errors import BrokenModel, NotThisFormat
from core.files import visible_files
from core.units import MIB

ML_PROGRAM = 502
MANIFEST = "Manifest.json"
_MAX_MANIFEST_BYTES = MIB
_MAX_DESCRIPTION_BYTES = 16 * MIB
_MAX_ENTRIES = 1000
_MAX_DIMENSION = 2**31 - 1
_MAX_RANK = 8
# Source: the format's Model.proto, the oneof Type.
_MODEL_TYPES = range(200, 4000)
# Source: FeatureTypes.proto, ArrayFeatureType.ArrayDataType.
_ARRAY_TYPES = {
    65552: "float16",
    65568: "float32",
    65600: "float64",
    131104: "int32",
    131080: "int8",
}


@dataclass(frozen=True, slots=True)
class Feature:
    """One input, output or state: an array of `dtype` (a numpy name) with bounds on each axis.

    `bounds` are (lowest, highest) lengths, highest None for no limit; `allowed` are the only
    shapes allowed, if the model enumerates them.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    bounds: tuple[tuple[int, int | None], ...] = ()
    allowed: tuple[tuple[int, ...], ...] = ()
    is_optional: bool = False

    def lengths(self, axis: int) -> tuple[int, ...]:
        """Return the lengths of an axis if they are enumerated or fixed, else none."""
        if self.allowed:
            return tuple(sorted({shape[axis] for shape in self.allowed}))
        low, high = self.bounds[axis]
        return (low,) if low == high else ()

    def longest(self, axis: int) -> int | None:
        """Return the maximum length of an axis, None for no limit."""
        lengths = self.lengths(axis)
        return lengths[-1] if lengths else self.bounds[axis][1]

    def shortest(self, axis: int) -> int:
        """Return the minimum length of an axis."""
        lengths = self.lengths(axis)
        return lengths[0] if lengths else self.bounds[axis][0]


@dataclass(frozen=True, slots=True)
class CoremlSpec:
    """A model's description.  `files` are all files of the model; the first identifies it.

    `root` is the folder that paths in the program are relative to; `functions` are the names of
    the functions of a package that has several.
    """

    files: tuple[Path, ...]
    model_file: Path
    root: Path
    version: int
    kind: int
    inputs: Mapping[str, Feature]
    outputs: Mapping[str, Feature]
    states: Mapping[str, Feature]
    functions: tuple[str, ...] = ()
    default_function: str = "main"
    license: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def package(self) -> Path:
        """The `.mlpackage` folder, or the `.mlmodel` file."""
        return self.files[0].parent if self.files[0].name == MANIFEST else self.files[0]


def broken(path: Path, problem: str) -> BrokenModel:
    """Return the error for a damaged or unusable model."""
    return BrokenModel(f"{path.name} cannot be used as a Core ML model: {problem}.", param="model")


def read_spec(path: Path) -> CoremlSpec:
    """Read the model of `path`: a package's manifest or another file of it, or an `.mlmodel`.

    Reads the description only, at most 16 MiB of it.  Raises NotThisFormat, BrokenModel.
    """
    path = path.absolute()
    _refuse_compiled(path)
    manifest = _manifest_of(path)
    if manifest is None:
        return _read_model(path, (path,), path.parent)
    model_file, weights = _package_files(manifest)
    files = (manifest, model_file, *weights)
    if path not in files:
        raise NotThisFormat(
            f"{path.name} is not listed in the manifest of the Core ML package around it"
        )
    return _read_model(model_file, files, model_file.parent)


def _refuse_compiled(path: Path) -> None:
    folder = path.parent
    if path.name != "coremldata.bin" or not (folder / "weights").is_dir():
        return
    raise broken(
        folder,
        "it is compiled (.mlmodelc), which has too little description; use the .mlpackage that "
        "it was compiled from",
    )


def _manifest_of(path: Path) -> Path | None:
    """Return the manifest of the package that `path` is in, None for an `.mlmodel` file."""
    if path.name == MANIFEST:
        return path
    for folder in list(path.parents)[:5]:
        if folder.suffix == ".mlpackage" and (folder / MANIFEST).is_file():
            return folder / MANIFEST
    if path.suffix != ".mlmodel":
        raise NotThisFormat(f"{path.name} is neither in a Core ML package nor a .mlmodel file")
    return None


def _package_files(manifest: Path) -> tuple[Path, tuple[Path, ...]]:
    """Return the model file and the weight files that the manifest lists."""
    content = _read_json(manifest)
    items, root = content.get("itemInfoEntries"), content.get("rootModelIdentifier")
    if not isinstance(items, dict) or not isinstance(root, str):
        raise NotThisFormat(f"{manifest.name} is not the manifest of a Core ML package")
    if len(items) > _MAX_ENTRIES:
        raise broken(manifest.parent, f"its manifest lists more than {_MAX_ENTRIES} items")
    model_file = _item(manifest, items.get(root))
    if not model_file.is_file():
        raise broken(manifest.parent, f"{model_file.name} is missing from the package")
    weights: list[Path] = []
    for identifier in sorted(items):
        item = _item(manifest, items[identifier])
        found = visible_files(item, "**/*")[:_MAX_ENTRIES] if item.is_dir() else [item]
        weights += [file for file in found if file.is_file() and file != model_file]
    return model_file, tuple(weights)


def _read_json(manifest: Path) -> dict[str, Any]:
    try:
        with manifest.open("rb") as file:
            data = file.read(_MAX_MANIFEST_BYTES + 1)
    except OSError as problem:
        raise NotThisFormat(f"{manifest.name} cannot be read: {problem.strerror}") from problem
    if len(data) > _MAX_MANIFEST_BYTES:
        raise NotThisFormat(f"{manifest.name} is too large for the manifest of a package")
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as problem:
        if manifest.parent.suffix != ".mlpackage":
            raise NotThisFormat(f"{manifest.name} is not valid JSON") from problem
        raise broken(manifest.parent, "its manifest is not valid JSON") from problem
    return content if isinstance(content, dict) else {}


def _item(manifest: Path, entry: object) -> Path:
    path = entry.get("path") if isinstance(entry, dict) else None
    if not isinstance(path, str) or not path:
        raise broken(manifest.parent, "an item of its manifest has no path")
    return inside(manifest.parent / "Data", path)


def inside(folder: Path, name: str) -> Path:
    """Return the path of `name` in `folder`.  Raises BrokenModel for paths outside of it."""
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts or "\0" in name:
        raise broken(folder.parent, f"the path {name[:100]!r} is outside of it")
    return folder / relative


def _read_model(model_file: Path, files: tuple[Path, ...], root: Path) -> CoremlSpec:
    try:
        with model_file.open("rb") as file:
            version, description, kinds = _scan(file, model_file.stat().st_size)
        if len(kinds) != 1 or not 1 <= version <= 100 or description is None:
            raise WireError("it has no version, description or model")
        return _describe(Message(description), model_file, files, root, version, kinds.pop())
    except (WireError, OSError) as problem:
        if len(files) > 1:
            raise broken(files[0].parent, f"{model_file.name} is damaged ({problem})") from problem
        raise NotThisFormat(f"{model_file.name} is not a Core ML model: {problem}") from problem


def _scan(file: BinaryIO, size: int) -> tuple[int, memoryview | None, set[int]]:
    """Read the model's top level without the weights; return version, description and types."""
    version = 0
    description: memoryview | None = None
    kinds: set[int] = set()
    for number, value, start in top_level(file, size):
        if start is None:
            version = value if number == 1 else version
        elif number == 2:
            if value > _MAX_DESCRIPTION_BYTES:
                raise WireError("its description is too large")
            file.seek(start)
            description = memoryview(file.read(value))
        elif number in _MODEL_TYPES:
            kinds.add(number)
    return version, description, kinds


def top_level(file: BinaryIO, size: int) -> Iterator[tuple[int, int, int | None]]:
    """Yield the fields of a model file: number, then value and None, or length and offset."""
    position = 0
    while position < size:
        file.seek(position)
        head = memoryview(file.read(20))
        tag, used = read_varint(head, 0)
        value, used = read_varint(head, used)
        position += used
        if tag & 7 == 0:
            yield tag >> 3, value, None
        elif tag & 7 != 2:
            raise WireError("it has a field of an unknown type")
        elif value > size - position:
            raise WireError("it is cut off")
        else:
            yield tag >> 3, value, position
            position += value


def _describe(
    description: Message,
    model_file: Path,
    files: tuple[Path, ...],
    root: Path,
    version: int,
    kind: int,
) -> CoremlSpec:
    functions = description.messages(20)
    default = description.text(21) or "main"
    chosen, fields = description, (1, 10, 13)
    for function in functions:
        if function.text(1) == default:
            chosen, fields = function, (2, 3, 6)
    inputs, outputs, states = (_features(chosen.messages(number)) for number in fields)
    metadata = description.message(100)
    user = {key: str(value, "utf-8", "replace") for key, value in metadata.entries(100).items()}
    return CoremlSpec(
        files=files,
        model_file=model_file,
        root=root,
        version=version,
        kind=kind,
        inputs=inputs,
        outputs=outputs,
        states=states,
        functions=tuple(function.text(1) for function in functions),
        default_function=default,
        license="".join(char for char in metadata.text(4) if char.isprintable())[:200],
        metadata=user,
    )


def _features(messages: list[Message]) -> dict[str, Feature]:
    if len(messages) > _MAX_ENTRIES:
        raise WireError("it has too many inputs or outputs")
    features = (_feature(message) for message in messages)
    return {feature.name: feature for feature in features}


def _feature(message: Message) -> Feature:
    kind = message.message(3)
    array = kind.message(8).message(1) if 8 in kind else kind.message(5)
    is_array = 8 in kind or 5 in kind
    shape = tuple(array.numbers(1))
    ranges = [(each.number(1), each.number(2)) for each in array.message(31).messages(1)]
    allowed = tuple(tuple(each.numbers(1)) for each in array.message(21).messages(1))
    if ranges and len(ranges) != len(shape):
        shape = tuple(low for low, _ in ranges)
    for lengths in (shape, *allowed):
        if len(lengths) != len(shape) or len(shape) > _MAX_RANK:
            raise WireError(f"the shape of an input or output is invalid: {lengths[:_MAX_RANK]}")
        if not all(0 <= length <= _MAX_DIMENSION for length in lengths):
            raise WireError(f"a dimension of an input or output is invalid: {lengths}")
    bounds = tuple((low, None if high < 0 else high) for low, high in ranges)
    return Feature(
        name=message.text(1)[:200],
        dtype=_ARRAY_TYPES.get(array.number(2), "") if is_array else "",
        shape=shape,
        bounds=bounds or tuple((length, length) for length in shape),
        allowed=allowed,
        is_optional=bool(kind.number(1000)),
    )
