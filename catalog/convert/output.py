"""Manages a conversion's output: hidden until complete, removed after a crash."""

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from backends.base import ModelInfo
from catalog.changes import file_signature
from catalog.convert.graph import GGUF_QUANTIZED
from catalog.convert.job import write_json
from catalog.convert.support import ONNX_BUILT
from core.errors import ModelFileMissing, RequestError, Unavailable
from core.files import flush_path
from core.types import JsonValue
from core.units import MIB, format_bytes

_PARTIAL = re.compile(r"\..+\.partial-(\d+)-[0-9a-f]{8}", re.DOTALL)
_LOCK = "lock"
_HASHED_BYTES = 8 * MIB
_SPARE_BYTES = 256 * MIB
_TOOLS = (
    "impetus", "torch", "transformers", "tokenizers", "safetensors", "gguf", "llama-cpp-python",
    "mlx", "mlx-lm", "onnx", "onnxruntime", "onnxruntime-genai", "onnxscript", "coremltools",
)  # fmt: skip
# Upper bounds of the bits per weight, including scales.
_BITS = {
    "f32": 32.0, "f16": 16.5, "bf16": 16.5, "mixed": 17.0, "original": 32.0, "int8": 12.0,
    "int4": 8.0,
}  # fmt: skip
_WIDEST_QUANTIZED = 10.0


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A source file as it was when the conversion began."""

    path: Path
    size_bytes: int
    sha256: str
    file_signature: str


def fingerprint(files: Sequence[Path]) -> tuple[SourceFile, ...]:
    """Return the size and the SHA-256 of the first 8 MiB of each file; blocks while reading.

    Raises ModelFileMissing.
    """
    signatures = []
    for file in files:
        try:
            with file.open("rb") as stream:
                digest = hashlib.sha256(stream.read(_HASHED_BYTES)).hexdigest()
            signatures.append(SourceFile(file, file.stat().st_size, digest, file_signature(file)))
        except OSError as error:
            raise ModelFileMissing(
                f"The file {file.name} cannot be read ({error.strerror}). Check that it exists and "
                "that you may read it.",
                param="model",
            ) from error
    return tuple(signatures)


def require_space(
    source: ModelInfo,
    target: Path,
    quantization: str,
    route: tuple[str, ...],
    exporter: str = "auto",
) -> None:
    """Check that the disk has room for the result and the intermediate files.

    Raises Unavailable with both numbers, RequestError if the parent folder is missing.
    """
    if not target.parent.is_dir():
        raise RequestError(
            f"The folder {target.parent} does not exist; create it first.", param="target"
        )
    parameters = source.parameters or source.size_bytes // 2
    bits = _BITS.get(quantization, _WIDEST_QUANTIZED)
    # llama.cpp quantizes from a file in 32 bits.
    is_for_gguf = source.format == "safetensors" and quantization in GGUF_QUANTIZED
    through_f32 = len(route) > 2 or is_for_gguf
    needed = int(parameters * bits / 8) + _SPARE_BYTES
    if route[-1] == "onnx":
        needed += _onnx_bytes(source, parameters, quantization, exporter)
    needed += parameters * 4 if through_f32 else 0
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        raise Unavailable(
            f"The conversion needs up to {format_bytes(needed)} of disk space, but only "
            f"{format_bytes(free)} are free. Free some space, then convert again."
        )


def _onnx_bytes(source: ModelInfo, parameters: int, quantization: str, exporter: str) -> int:
    """Return what an export to ONNX writes besides: a copy in f32, and embeddings in f32.

    PyTorch's exporter needs the copy for all other types, the builder for mixed ones.
    """
    is_built = source.architecture in ONNX_BUILT and exporter != "torch"
    is_mapped = source.quantization in ("f32", *(("bf16", "f16") if is_built else ()))
    copy = 0 if is_mapped or source.format == "gguf" else parameters * 4
    sizes = [source.details.get(name) for name in ("n_embd", "vocabulary_size")]
    width, tokens = (size if type(size) is int else 0 for size in sizes)
    return copy + (0 if quantization == "f32" else min(width * tokens, parameters) * 4)


@dataclass(slots=True)
class PartialOutput:
    """The hidden folder beside the target for all output of a conversion.

    It contains a file that its owner keeps locked, so `sweep` does not remove it.
    """

    folder: Path
    target: Path
    _lock: int

    @classmethod
    def create(cls, target: Path) -> "PartialOutput":
        """Create the folder.  Raises Unavailable if that fails."""
        name = f".{target.name}.partial-{os.getpid()}-{secrets.token_hex(4)}"
        folder = target.with_name(name)
        try:
            folder.mkdir()
            # Locked before it gets its name: `sweep` finds it locked or not at all.
            unlocked = folder / "unlocked"
            lock = os.open(unlocked, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
                unlocked.rename(folder / _LOCK)
            except OSError:
                os.close(lock)
                raise
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise Unavailable(
                f"The folder {target.parent} cannot be written to ({error.strerror}). Check its "
                "permissions and the free disk space."
            ) from error
        return cls(folder, target, lock)

    def discard(self, *paths: Path) -> None:
        """Remove files and folders inside that are no longer needed."""
        for path in paths:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.is_relative_to(self.folder):
                path.unlink(missing_ok=True)

    def publish(self, result: Path) -> Path:
        """Rename `result`, a folder inside, to the target.  Raises RequestError if that exists.

        All files are synced to disk first, so the target is always complete.
        """
        for path in [*result.rglob("*"), result]:
            flush_path(path)
        taken = RequestError(
            f"{self.target.name!r} was created during the conversion; choose another name.",
            param="target",
        )
        if os.path.lexists(self.target):
            raise taken
        try:
            result.rename(self.target)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise taken from error
            raise
        flush_path(self.target.parent)
        return self.target

    def remove(self) -> None:
        """Remove the folder and its contents; may be called twice."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def sweep(folder: Path) -> tuple[Path, ...]:
    """Remove the partial output of dead processes in `folder`; return the removed paths."""
    removed = []
    with contextlib.suppress(OSError):
        for path in sorted(folder.iterdir()):
            match = _PARTIAL.fullmatch(path.name)
            if (
                match
                and path.is_dir()
                and not path.is_symlink()
                and _is_abandoned(path, int(match[1]))
            ):
                shutil.rmtree(path, ignore_errors=True)
                removed.append(path)
    return tuple(removed)


def _is_abandoned(path: Path, owner: int) -> bool:
    """Whether the folder's owner is dead; the lock tells even if its process id is reused."""
    try:
        lock = os.open(path / _LOCK, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return not psutil.pid_exists(owner)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(lock)
    return True


def require_unchanged(before: Sequence[SourceFile], cause: Exception | None = None) -> None:
    """Raise Unavailable, with its cause, if a source file changed during the conversion."""
    for file in before:
        try:
            is_same = file_signature(file.path) == file.file_signature
        except OSError:
            is_same = False
        if not is_same:
            raise Unavailable(
                f"{file.path.name} changed during the conversion; convert again."
            ) from cause


def write_provenance(
    result: Path,
    source: ModelInfo,
    before: Sequence[SourceFile],
    parameters: Mapping[str, JsonValue],
    peak_bytes: int = 0,
) -> None:
    """Write provenance.json: the source, parameters, tool versions and time of the conversion.

    `peak_bytes` is the highest memory of a step.  Raises Unavailable if the source changed during
    the conversion.
    """
    require_unchanged(before)
    files = [
        {"path": str(file.path), "size_bytes": file.size_bytes, "sha256_8mib": file.sha256}
        for file in before
    ]
    write_json(
        result / "provenance.json",
        {
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "source": {
                "name": source.name,
                "format": source.format,
                "architecture": source.architecture,
                "quantization": source.quantization,
                "license": source.license,
                "files": files,
            },
            "parameters": dict(parameters),
            "peak_memory_bytes": peak_bytes,
            "tools": _tool_versions(),
        },
    )


def _tool_versions() -> dict[str, str]:
    versions = {}
    for tool in _TOOLS:
        with contextlib.suppress(PackageNotFoundError):
            versions[tool] = version(tool)
    return versions
