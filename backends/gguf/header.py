"""Reads and validates a GGUF file's header, before any native code opens the file."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from backends.gguf.layout import (
    ARRAY,
    FLOAT32,
    INT32,
    STRING,
    TENSOR_TYPES,
    UINT32,
    HeaderReader,
    MetadataValue,
    broken,
    opened,
)
from backends.prompt.infill import INFILL_NAMES, InfillTokens, find_infill
from core.errors import NotThisFormat

# The newer and the older metadata key of each fill-in-the-middle token.
_INFILL_KEYS = tuple(
    (f"tokenizer.ggml.fim_{short}_token_id", f"tokenizer.ggml.{long}_token_id")
    for short, long in (("pre", "prefix"), ("suf", "suffix"), ("mid", "middle"))
)

MAX_ENTRIES = 65_536
_MAX_SIZE = 2**63 - 1
_MAX_KEY_BYTES = 65_535
_MAX_TENSOR_NAME_BYTES = 63
_TOKENS = "tokenizer.ggml.tokens"
_ALIGNMENT = "general.alignment"
TEMPLATE_KEY = "tokenizer.chat_template"
_LONGEST_TOKEN = 256
_THINK = b"<think>"
# Arrays that llama.cpp indexes by token id without checking their type and length.
_VOCABULARY_TYPES = {
    _TOKENS: (STRING,),
    "tokenizer.ggml.merges": (STRING,),
    "tokenizer.ggml.scores": (FLOAT32,),
    "tokenizer.ggml.token_type": (UINT32, INT32),
}
_PER_TOKEN = ("tokenizer.ggml.scores", "tokenizer.ggml.token_type")


def gguf_infill(
    tokens: Sequence[bytes], values: Mapping[str, MetadataValue]
) -> InfillTokens | None:
    """Return the fill-in-the-middle tokens named in the metadata, or those of a known family."""
    named = {name.encode(): name for name in INFILL_NAMES}
    ids = {named[token]: token_id for token_id, token in enumerate(tokens) if token in named}
    prefix, suffix, middle = (
        next((token_id for key in keys if _is_id(token_id := values.get(key), tokens)), None)
        for keys in _INFILL_KEYS
    )
    if isinstance(prefix, int) and isinstance(suffix, int) and isinstance(middle, int):
        if tokens[prefix] == b"[PREFIX]":
            middle = None
        return InfillTokens(prefix, suffix, middle)
    return find_infill(ids.get)


def _is_id(value: MetadataValue | None, tokens: Sequence[bytes]) -> bool:
    return type(value) is int and 0 <= value < len(tokens)


# Tensors whose place in the file is kept: the head of a reranking model, and what its inputs are.
_KEPT_TENSORS = frozenset({
    "cls.weight", "cls.output.weight", "token_embd.weight", "token_types.weight",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """One tensor's type (`f16`, `q4_k`), its number of elements and its first byte in the file."""

    type_name: str
    elements: int
    offset: int


@dataclass(frozen=True, slots=True)
class GgufFile:
    """The header of one GGUF file; of string arrays and long number arrays only the length.

    `parameters` is the number of elements of all tensors; `places` has a few of them by name.
    """

    path: Path
    size_bytes: int
    metadata: Mapping[str, MetadataValue]
    array_counts: Mapping[str, int]
    tensor_count: int = 0
    parameters: int = 0
    tensor_bytes: int = 0
    elements_by_type: Mapping[str, int] = field(default_factory=dict)
    bos_token: str = ""
    eos_token: str = ""
    has_think_token: bool = False
    infill: InfillTokens | None = None
    places: Mapping[str, TensorPlace] = field(default_factory=dict)

    @property
    def architecture(self) -> str:
        """The architecture's name in llama.cpp; empty if it is missing."""
        value = self.metadata.get("general.architecture", "")
        return value if isinstance(value, str) else ""

    @property
    def quantization(self) -> str:
        """The tensor type of most elements, as `q4_k`."""
        return max(self.elements_by_type.items(), key=lambda item: item[1], default=("", 0))[0]

    @property
    def vocabulary_size(self) -> int:
        """Number of token ids; 0 without a vocabulary."""
        return self.array_counts.get(_TOKENS, 0)

    def text(self, key: str) -> str:
        """Return a string; empty if it is missing or not a string."""
        value = self.metadata.get(key)
        return value if isinstance(value, str) else ""

    def number(self, key: str, low: int, high: int) -> int | None:
        """Return an integer, of an array the largest; None if it is missing.

        Raises BrokenModel for another type, or a value outside `low` to `high`.
        """
        value = self.metadata.get(key)
        if value is None:
            return None
        values = value if isinstance(value, tuple) else (value,)
        if not values or not all(type(item) is int and low <= item <= high for item in values):
            raise broken(self.path, f"{key} is not a whole number from {low:,} to {high:,}")
        return max(int(item) for item in values)

    def required(self, key: str, high: int) -> int:
        """Return an integer of at least 1.  Raises BrokenModel if it is missing or invalid."""
        value = self.number(key, 1, high)
        if value is None:
            raise broken(self.path, f"it has no {key}")
        return value


def read_gguf(path: Path) -> GgufFile:
    """Read one file's header; loads no tensors.  Blocks for some 50 ms at most.

    Raises NotThisFormat without the magic number, BrokenModel for any other defect.
    """
    with opened(path) as reader:
        tensor_count, metadata_count = _read_counts(reader)
        metadata = _read_metadata(reader, metadata_count)
        tensors = _read_tensors(reader, tensor_count, metadata.values)
        tokens = _read_tokens(reader, metadata)
    return GgufFile(
        path=path,
        size_bytes=reader.size_bytes,
        metadata=metadata.values,
        array_counts=metadata.counts,
        tensor_count=tensor_count,
        parameters=tensors.by_type.total(),
        tensor_bytes=tensors.total_bytes,
        elements_by_type=tensors.by_type,
        places=tensors.places,
        bos_token=_token(tokens, metadata.values.get("tokenizer.ggml.bos_token_id")),
        eos_token=_token(tokens, metadata.values.get("tokenizer.ggml.eos_token_id")),
        has_think_token=_THINK in tokens,
        infill=gguf_infill(tokens, metadata.values),
    )


def _read_counts(reader: HeaderReader) -> tuple[int, int]:
    if reader.size_bytes < 4 or reader.take(4) != b"GGUF":
        raise NotThisFormat("no GGUF magic number")
    version = reader.uint32()
    if version and version & 0xFFFF == 0:
        raise reader.broken("it is a big-endian GGUF file; only little-endian files are supported")
    if not 2 <= version <= 3:
        raise reader.broken(f"its GGUF version is {version}; versions 2 and 3 are supported")
    tensor_count, metadata_count = reader.uint64(), reader.uint64()
    for what, count in (("tensors", tensor_count), ("metadata entries", metadata_count)):
        if count > MAX_ENTRIES:
            raise reader.broken(f"it claims {count:,} {what}, at most {MAX_ENTRIES:,} are allowed")
    return tensor_count, metadata_count


@dataclass(slots=True)
class _Metadata:
    """Metadata values, array lengths, and the file offsets of the vocabulary."""

    values: dict[str, MetadataValue] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    tokens_start: int = 0
    tokens_end: int = 0


def _read_metadata(reader: HeaderReader, count: int) -> _Metadata:
    metadata = _Metadata()
    seen: set[str] = set()
    for _ in range(count):
        key = reader.name(_MAX_KEY_BYTES, "a metadata key")
        if key in seen:
            raise reader.broken(f"the metadata key {key[:100]!r} occurs twice")
        seen.add(key)
        type_id = reader.uint32()
        value: MetadataValue | None
        if type_id == ARRAY:
            value = _read_array(reader, key, metadata)
        elif type_id == STRING:
            value = reader.template() if key.startswith(TEMPLATE_KEY) else reader.text()
        elif key == _ALIGNMENT and type_id != UINT32:
            raise reader.broken(f"{_ALIGNMENT} has the wrong type {type_id}")
        else:
            value = reader.scalar(type_id)
        if value is not None:
            metadata.values[key] = value
    token_count = metadata.counts.get(_TOKENS)
    for key in _PER_TOKEN:
        if metadata.counts.get(key, token_count) != token_count:
            raise reader.broken(f"{key} does not have one element for each token")
    return metadata


def _read_array(reader: HeaderReader, key: str, metadata: _Metadata) -> MetadataValue | None:
    element_type, count = reader.uint32(), reader.uint64()
    metadata.counts[key] = count
    if element_type not in _VOCABULARY_TYPES.get(key, (element_type,)):
        raise reader.broken(f"{key} has the wrong element type {element_type}")
    if element_type != STRING:
        return reader.numbers(element_type, count)
    start = reader.position
    reader.skip_strings(count)
    if key == _TOKENS:
        metadata.tokens_start, metadata.tokens_end = start, reader.position
    return None


def _read_tokens(reader: HeaderReader, metadata: _Metadata) -> list[bytes]:
    """Return the vocabulary.  Raises BrokenModel for duplicates.

    llama.cpp aborts the process if two tokens are equal up to their first NUL byte.
    """
    tokens = reader.strings_between(metadata.tokens_start, metadata.tokens_end)
    texts = tokens
    if b"\0" in b"".join(tokens):
        texts = [token.partition(b"\0")[0] for token in tokens]
    if len(set(texts) - {b""}) != len(texts) - texts.count(b""):
        twice = next(text for text, count in Counter(texts).items() if text and count > 1)
        raise reader.broken(f"its vocabulary has the token {twice[:100]!r} twice")
    if metadata.values.get("tokenizer.ggml.model") == "llama" and tokens:
        _check_byte_tokens(reader, frozenset(texts))
    return tokens


def _check_byte_tokens(reader: HeaderReader, texts: frozenset[bytes]) -> None:
    """Check that a SentencePiece vocabulary has a token for every byte.

    llama.cpp aborts the process at the first byte without a token.
    """
    for value in range(256):
        if b"<0x%02X>" % value not in texts and bytes([value]) not in texts:
            raise reader.broken(f"its vocabulary has no token for the byte 0x{value:02X}")


def _token(tokens: list[bytes], token_id: object) -> str:
    if not isinstance(token_id, int) or not 0 <= token_id < len(tokens):
        return ""
    return tokens[token_id][:_LONGEST_TOKEN].decode("utf-8", "replace")


@dataclass(slots=True)
class _Tensors:
    """Sums over the list of tensors: elements by type, bytes, and the places of a few."""

    by_type: Counter[str] = field(default_factory=Counter)
    total_bytes: int = 0
    places: dict[str, TensorPlace] = field(default_factory=dict)


def _read_tensors(
    reader: HeaderReader, count: int, metadata: Mapping[str, MetadataValue]
) -> _Tensors:
    """Read the list of tensors and check that they lie in the file one after the other."""
    alignment = metadata.get(_ALIGNMENT, 32)
    if not (isinstance(alignment, int) and 8 <= alignment <= 4096 and alignment.bit_count() == 1):
        raise reader.broken(f"{_ALIGNMENT} is not a power of two from 8 to 4096")
    names: set[str] = set()
    tensors = _Tensors()
    next_offset, end = 0, 0
    for _ in range(count):
        name = reader.name(_MAX_TENSOR_NAME_BYTES, "a tensor's name")
        if name in names:
            raise reader.broken(f"the tensor {name!r} occurs twice")
        names.add(name)
        type_name, elements, size = _read_shape(reader, name)
        offset = reader.uint64()
        if offset != next_offset:
            raise reader.broken(
                f"tensor {name!r} is at offset {offset:,}, expected {next_offset:,}"
            )
        tensors.by_type[type_name] += elements
        tensors.total_bytes += size
        if name in _KEPT_TENSORS:
            tensors.places[name] = TensorPlace(type_name, elements, offset)
        end = offset + size
        next_offset = -(-end // alignment) * alignment
        if next_offset > _MAX_SIZE:
            raise reader.broken("its tensors together are too large")
    data_start = -(-reader.position // alignment) * alignment
    missing = data_start + end - reader.size_bytes
    if count and missing > 0:
        raise reader.broken(
            f"it is truncated: {missing:,} bytes of its tensors are missing; download it again"
        )
    for name, place in tensors.places.items():
        tensors.places[name] = replace(place, offset=data_start + place.offset)
    return tensors


def _read_shape(reader: HeaderReader, name: str) -> tuple[str, int, int]:
    """Return a tensor's type name, its number of elements and its bytes."""
    dimension_count = reader.uint32()
    if not 1 <= dimension_count <= 4:
        raise reader.broken(
            f"tensor {name!r} has {dimension_count:,} dimensions; 1 to 4 are allowed"
        )
    dimensions = [reader.uint64() for _ in range(dimension_count)]
    type_id = reader.uint32()
    if type_id not in TENSOR_TYPES:
        raise reader.broken(f"tensor {name!r} has the unknown type {type_id}")
    type_name, block_elements, block_bytes = TENSOR_TYPES[type_id]
    elements = math.prod(dimensions)
    size = elements // block_elements * block_bytes
    if not (elements and elements <= _MAX_SIZE and size <= _MAX_SIZE):
        raise reader.broken(f"tensor {name!r} has an impossible shape {dimensions}")
    if dimensions[0] % block_elements:
        raise reader.broken(
            f"tensor {name!r} has rows of {dimensions[0]:,} elements, which is not a multiple of "
            f"{block_elements}, the block size of {type_name}"
        )
    return type_name, elements, size
