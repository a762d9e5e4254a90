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
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from backends.base import ModelInfo
from catalog.changes import file_signature
from catalog.convert.job import write_json
from catalog.convert.quality.figure import QualityFigure
from core.errors import ModelFileMissing, RequestError, Unavailable
from core.files import flush_path
from core.types import JsonValue
from core.units import MIB

_PARTIAL = re.compile(r"\..+\.partial-(\d+)-[0-9a-f]{8}", re.DOTALL)
_LOCK = "lock"
_HASHED_BYTES = 8 * MIB
_TOOLS = (
    "impetus", "torch", "transformers", "tokenizers", "safetensors", "gguf", "llama-cpp-python",
    "mlx", "mlx-lm", "onnx", "onnxruntime", "onnxruntime-genai", "onnxscript", "coremltools",
)  # fmt: skip


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
    quality: QualityFigure | None = None,
) -> None:
    """Write provenance.json: the source, parameters, tool versions and time of the conversion.

    `peak_bytes` is the highest memory of a step, `quality` what was measured of the result.  Raises
    Unavailable if the source changed during the conversion.
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
            "quality": None if quality is None else asdict(quality),
            "tools": _tool_versions(),
        },
    )


def _tool_versions() -> dict[str, str]:
    versions = {}
    for tool in _TOOLS:
        with contextlib.suppress(PackageNotFoundError):
            versions[tool] = version(tool)
    return versions
