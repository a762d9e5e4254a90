"""Makes local stand-ins for remote models: sparse files that have the real headers, no weights.

What inspects and estimates local models then does the same for one that was not downloaded.
"""

import re
import struct
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path, PurePosixPath

from backends.coreml.spec import MANIFEST
from backends.gguf.header import read_gguf
from backends.hf.header import MAX_HEADER_BYTES, TensorEntry, safetensors_header
from backends.hf.quantization import MAX_STATE_BYTES
from backends.pytorch.unpickle import MAX_PICKLE_BYTES
from backends.pytorch.weights import read_torch_file
from catalog.hub.client import HubClient
from catalog.hub.entries import HubEntry, RepositoryFile
from catalog.hub.ranged_file import RangedFile, fetch_zip_entry
from core.errors import BrokenModel, HubAnswerInvalid, NotThisFormat
from core.units import KIB, MIB, format_bytes

# Graphs are read whole up to this, configurations and tokenizers as large as they are.
_WHOLE_BYTES = 32 * MIB
# Of all files of one model together.
_TOTAL_BYTES = 192 * MIB
_GGUF_STEPS = (2 * MIB, 8 * MIB, 32 * MIB, 96 * MIB)
_SAFETENSORS_START = 256 * KIB
_WEIGHTS = (".safetensors", ".bin")
# Small tensors of bitsandbytes that are read one by one.
_STATE = ".quant_state.bitsandbytes__"
_MOST_STATES = 64
_PICKLE_STEPS = (256 * KIB, 2 * MIB, 8 * MIB, MAX_PICKLE_BYTES)
_PICKLE = re.compile(r"[^/]+/data\.pkl")
_COMPILED = "coremldata.bin"
_ZIP_MAGIC = b"PK\x03\x04"
_LENGTH = struct.Struct("<Q")
# More shards than this are not read one by one.
MAX_FILES = 256


class NoSkeleton(Exception):
    """The model tells what it is only in bytes that are not worth reading; says why."""


class SkeletonBuilder:
    """Writes the stand-ins of one repository's models; all methods block.

    `read_bytes` counts what was read of the hub.
    """

    def __init__(self, client: HubClient, repository: str, commit: str, folder: Path) -> None:
        self._client = client
        self._repository = repository
        self._commit = commit
        self._folder = folder
        self.read_bytes = 0
        self._states = 0

    def build(self, entry: HubEntry) -> Path:
        """Write the files of a model; return the one that identifies it.

        Raises NoSkeleton, BrokenModel for a damaged header, and the errors `Hub…`.
        """
        if len(entry.files) > MAX_FILES:
            raise NoSkeleton(f"it has {len(entry.files)} files, over the limit of {MAX_FILES}")
        write = _WRITERS.get(entry.format)
        if write is None:
            raise NoSkeleton(f"the size of {entry.format} models is known after the download")
        for file in entry.sides:
            # Weights of modules are not read before they are used.
            if PurePosixPath(file.path).suffix.lower() in _WEIGHTS:
                self._sparse(file)
            else:
                self._write_whole(file)
        for file in entry.weights:
            write(self, file)
        return self._folder / _identifying(entry)

    def write_gguf(self, file: RepositoryFile) -> None:
        """Write a GGUF file's header, reading on until it is complete."""
        target = self._sparse(file)
        had = 0
        for step in _GGUF_STEPS:
            count = min(step, file.size_bytes)
            self._fetch(file, target, had, count - had)
            had = count
            try:
                read_gguf(target)
            except NotThisFormat:
                raise BrokenModel(f"{file.path} is not a GGUF file.", param="model") from None
            except BrokenModel:
                # Also what lacks its end for now.
                if had in (file.size_bytes, _GGUF_STEPS[-1]):
                    raise
            else:
                return

    def write_safetensors(self, file: RepositoryFile) -> None:
        """Write a safetensors file's header."""
        if PurePosixPath(file.path).suffix.lower() == ".npz":
            raise NoSkeleton("the tensors of .npz files are described all over them")
        target = self._sparse(file)
        start = min(_SAFETENSORS_START, file.size_bytes)
        self._fetch(file, target, 0, start)
        with target.open("rb") as stream:
            head = stream.read(_LENGTH.size)
        length = _LENGTH.unpack(head)[0] if len(head) == _LENGTH.size else 0
        if length > MAX_HEADER_BYTES:
            raise BrokenModel(
                f"{file.path} claims a header of {format_bytes(length)}; the limit is "
                f"{format_bytes(MAX_HEADER_BYTES)}.",
                param="model",
            )
        end = min(_LENGTH.size + length, file.size_bytes)
        self._fetch(file, target, start, end - start)
        try:
            tensors = safetensors_header(target).tensors
        except (BrokenModel, NotThisFormat):
            # What inspects the stand-in says why.
            return
        self._fetch_states(file, target, [tensors[name] for name in tensors if _STATE in name])

    def _fetch_states(
        self, file: RepositoryFile, target: Path, states: Sequence[TensorEntry]
    ) -> None:
        """Read the small tensors that have the shapes of 4-bit weights.  Raises NoSkeleton."""
        self._states += len(states)
        if self._states > _MOST_STATES:
            raise NoSkeleton(
                f"{self._states} of its weights have their shapes in other parts of its files"
            )
        for state in states:
            self._fetch(file, target, state.start, min(state.nbytes, MAX_STATE_BYTES))

    def write_pickled(self, file: RepositoryFile) -> None:
        """Write what a PyTorch file has but its tensors: the directory and the pickle."""
        target = self._sparse(file)
        had = min(_PICKLE_STEPS[0], file.size_bytes)
        self._fetch(file, target, 0, had)
        with target.open("rb") as stream:
            is_zip = stream.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC
            if is_zip:
                fetch = partial(self._fetch, file, target)
                ranged = RangedFile(stream, file.size_bytes, fetch)
                fetch_zip_entry(ranged, _PICKLE, MAX_PICKLE_BYTES)
        for step in (had, *_PICKLE_STEPS[1:]):
            count = min(step, file.size_bytes)
            self._fetch(file, target, had, count - had)
            had = max(count, had)
            try:
                tensors = read_torch_file(target).tensors
            except (NotThisFormat, BrokenModel):
                # Those before the zip layout may lack the end of their pickles for now.
                if is_zip:
                    return
                continue
            if any(_STATE in name for name in tensors):
                raise NoSkeleton("some of its weights have their shapes in other parts of its file")
            return

    def write_graph(self, file: RepositoryFile) -> None:
        """Write a graph whole and its data as a sparse file."""
        if Path(file.path).suffix.lower() == ".onnx":
            if file.size_bytes > _WHOLE_BYTES:
                raise NoSkeleton("its graph has the weights in it, and is known once downloaded")
            self._write_whole(file)
        else:
            self._sparse(file)

    def write_package(self, file: RepositoryFile) -> None:
        """Write a Core ML model's manifest and description whole, its weights sparse."""
        path = PurePosixPath(file.path)
        if path.suffix.lower() != ".mlmodel" and path.name != MANIFEST:
            self._sparse(file)
        elif file.size_bytes > _WHOLE_BYTES:
            raise NoSkeleton("its description has the weights in it, and is known once downloaded")
        else:
            self._write_whole(file)

    def _write_whole(self, file: RepositoryFile) -> None:
        target = self._sparse(file)
        self._fetch(file, target, 0, file.size_bytes)

    def _sparse(self, file: RepositoryFile) -> Path:
        """Create the file with its size and no content."""
        target = self._folder / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("xb") as stream:
            stream.truncate(file.size_bytes)
        return target

    def _fetch(self, file: RepositoryFile, target: Path, start: int, count: int) -> None:
        """Copy `count` bytes from `start` of the remote file into the local one."""
        if count <= 0:
            return
        self.read_bytes += count
        if self.read_bytes > _TOTAL_BYTES:
            raise NoSkeleton(f"its headers have more than {format_bytes(_TOTAL_BYTES)}")
        address = self._client.file_address(self._repository, self._commit, file.path)
        headers = {"Range": f"bytes={start}-{start + count - 1}"}
        with self._client.opened(address, self._repository, headers) as response:
            expected = f"bytes {start}-{start + count - 1}/{file.size_bytes}"
            is_part = response.status_code == 206
            if is_part and response.headers.get("content-range", "") != expected:
                raise HubAnswerInvalid(
                    f"{self._client.host} sent another part of {file.path} than was asked for."
                )
            if not is_part and start:
                raise HubAnswerInvalid(
                    f"{self._client.host} does not send parts of files (it ignores Range)."
                )
            data = self._client.read(response, count, is_cut=True)
        if len(data) < count:
            raise HubAnswerInvalid(
                f"{self._client.host} sent {len(data):,} of {count:,} bytes of {file.path}."
            )
        with target.open("r+b") as stream:
            stream.seek(start)
            stream.write(data)


def _identifying(entry: HubEntry) -> str:
    """Return the path of the file that a model is recognized by."""
    compiled = f"{entry.name}/{_COMPILED}"
    return next((file.path for file in entry.weights if file.path == compiled), entry.files[0].path)


_WRITERS: dict[str, Callable[[SkeletonBuilder, RepositoryFile], None]] = {
    "gguf": SkeletonBuilder.write_gguf,
    "safetensors": SkeletonBuilder.write_safetensors,
    "mlx": SkeletonBuilder.write_safetensors,
    "onnx": SkeletonBuilder.write_graph,
    "coreml": SkeletonBuilder.write_package,
    "pytorch": SkeletonBuilder.write_pickled,
}
