"""Core ML backend: coremltools on macOS, elsewhere a reference interpreter."""

import importlib.util
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from backends.base import (
    Availability,
    Backend,
    Engine,
    EngineOptions,
    MemoryEstimate,
    ModelInfo,
)
from backends.coreml.layout import Layout, read_layout, token_inputs
from backends.coreml.mil.program import Blob, data_bits, read_program
from backends.coreml.rows import CoremlRows
from backends.coreml.runtime import Runtime, open_runtime
from backends.coreml.spec import ML_PROGRAM, CoremlSpec, broken, read_spec
from backends.coreml.system import check_release
from backends.embedding.batch import BatchLimits
from backends.embedding.engine import EmbeddingEngine
from backends.embedding.folder import read_settings
from backends.embedding.head import VectorHead
from backends.embedding.inputs import padded
from backends.embedding.texts import TextInputs
from backends.engine.row_stepper import RowStepper
from backends.engine.trial.checks import TrialTerms
from backends.engine.trial.results import tried_rows
from backends.hf.engine import open_token_engine
from backends.hf.folder import HfFolder, folder_info, read_folder, tokenizer_files
from backends.hf.tokenizer import HfTokenizer
from core.errors import BackendUnavailable, EngineFailed, InsufficientMemory, NotThisFormat
from core.types import Capability
from core.units import MIB, format_bytes

# Every row's state has the size of the whole context, and rows run one by one.
_MAX_ROWS = 4
# Models compute logits for each token of a chunk, so long chunks cost memory and save little.
_MAX_CHUNK_TOKENS = 128
_BASE_BYTES = 256 * MIB
# Measured for the child that coremltools is in, without a model, on Linux.
_CHILD_BYTES = 96 * MIB
_F32_BYTES = 4
_GENERIC_NAMES = frozenset({"model", "weights", "coreml"})
_QUANTIZATIONS = {
    "float16": "f16",
    "float32": "f32",
    "bfloat16": "bf16",
    "int4": "int4",
    "int8": "int8",
    "uint8": "8bit",
    "uint6": "6bit",
    "uint4": "4bit",
    "uint3": "3bit",
    "uint2": "2bit",
    "uint1": "1bit",
}


class CoremlBackend(Backend):
    """Runs `.mlpackage` and `.mlmodel` decoders and encoders with a tokenizer beside them."""

    name: ClassVar[str] = "coreml"
    starts_on_demand: ClassVar[bool] = True
    process_bytes: ClassVar[int] = 512 * MIB
    # It takes minutes for the Neural Engine; a process that hangs delays no other model.
    compile_s: ClassVar[float] = 1800.0 if sys.platform == "darwin" else 0.0

    def availability(self) -> Availability:
        """Available on macOS with coremltools, elsewhere with coremltools and PyTorch."""
        needed = ("coremltools",) if sys.platform == "darwin" else ("coremltools", "torch")
        missing = [module for module in needed if importlib.util.find_spec(module) is None]
        if not missing:
            return Availability(True)
        return Availability(False, f"{' and '.join(missing)} is not installed; run scripts/setup")

    def identify(self, path: Path) -> ModelInfo:
        """Read the package's description and the shapes of its weights."""
        return coreml_info(path)

    def estimate(self, info: ModelInfo, options: EngineOptions) -> MemoryEstimate:
        """Return the bytes of weights, of all rows' states and of one step's activations.

        Raises BackendUnavailable if the model needs a newer macOS, InsufficientMemory.
        """
        version, has_states = _number(info, "specification"), _number(info, "state_elements") > 0
        check_release(info.name, version, has_states=has_states)
        return estimate_coreml(info, options)

    def open(self, info: ModelInfo, options: EngineOptions) -> Engine:
        """Load the model; on macOS the first load compiles it for minutes."""
        available = self.availability()
        if not available.is_available:
            raise BackendUnavailable(available.reason)
        granted = self.estimate(info, options)
        spec = read_spec(info.files[0])
        check_release(info.name, spec.version, has_states=bool(spec.states))
        if spec.kind != ML_PROGRAM and sys.platform != "darwin":
            raise BackendUnavailable(
                f"The model {info.name} is not an ML program; only macOS runs such older models.",
                param="model",
            )
        folder = _folder_of(spec)
        layout = read_layout(spec, info.context_length)
        options = replace(
            options,
            max_sequences=min(options.max_sequences, _MAX_ROWS),
            context_tokens=granted.context_tokens,
            kv_tokens=granted.kv_tokens,
            prefill_chunk_tokens=min(options.prefill_chunk_tokens, _MAX_CHUNK_TOKENS),
        )
        tokenizer = HfTokenizer(folder.path)
        if layout.is_encoder:
            return _open_encoder(info, spec, folder, layout, tokenizer, options)
        rows = max(granted.kv_tokens // granted.context_tokens, 1)
        opened: list[Runtime] = []

        def open_stepper() -> RowStepper:
            runtime = open_runtime(spec, options.threads, options.child)
            opened.append(runtime)
            model, limitations = tried_rows(
                info,
                CoremlRows(runtime, spec, layout, rows),
                TrialTerms.of(info, folder.config, granted.context_tokens),
                options,
                packages=("coremltools",),
            )
            stepper = RowStepper(model, tokenizer, options)
            stepper.limitations = limitations
            return stepper

        return open_token_engine(
            info,
            folder,
            tokenizer,
            open_stepper,
            options,
            context_tokens=granted.context_tokens,
            interrupt=lambda: opened[0].interrupt(),
        )


def coreml_info(path: Path) -> ModelInfo:
    """Describe the model that `path` belongs to.  Raises NotThisFormat, BrokenModel."""
    spec = read_spec(path)
    folder = _folder_of(spec)
    elements = _elements(spec)
    weights_bytes = sum(count * data_bits(kind) // 8 for kind, count in elements.items())
    dominant = elements.most_common(1)[0][0] if elements else ""
    info = folder_info(
        "coreml",
        folder,
        spec.files,
        parameters=elements.total(),
        weights_bytes=weights_bytes,
        quantization=_QUANTIZATIONS.get(dominant, dominant),
    )
    layout = read_layout(spec, info.context_length)
    if folder.is_encoder and not layout.is_encoder:
        raise broken(
            spec.package, "it scores texts; only decoders and embedding models are supported"
        )
    return replace(
        info,
        name=_name(spec, info),
        context_length=layout.context,
        capabilities=_capabilities(info, layout),
        license=info.license or spec.license,
        details={
            **info.details,
            "runtime": "coreml" if sys.platform == "darwin" else "reference",
            "state_elements": sum(
                int(np.prod(state.shape, dtype=object)) for state in spec.states.values()
            ),
            "reads_all": not spec.states,
            "specification": spec.version,
        },
    )


def _folder_of(spec: CoremlSpec) -> HfFolder:
    """Return the folder with configuration and tokenizer: the package, or the one around it."""
    for path in (spec.package, spec.package.parent):
        if not path.is_dir() or not tokenizer_files(path):
            continue
        try:
            return read_folder(path)
        except NotThisFormat:
            continue
    raise broken(
        spec.package,
        "it needs a config.json and the tokenizer's files (tokenizer.json) beside it or in it",
    )


def _elements(spec: CoremlSpec) -> Counter[str]:
    """Return the number of elements of each type in the weight files."""
    if spec.kind != ML_PROGRAM:
        return Counter()
    elements: Counter[str] = Counter()
    for constant in read_program(spec).constants():
        if isinstance(constant.value, Blob):
            elements[constant.dtype] += constant.elements
    return elements


def _name(spec: CoremlSpec, info: ModelInfo) -> str:
    stem = "".join(char for char in spec.package.stem if char.isprintable()).strip()[:200]
    return info.name if not stem or stem.lower() in _GENERIC_NAMES else stem


def _capabilities(info: ModelInfo, layout: Layout) -> frozenset[Capability]:
    if layout.is_encoder:
        return frozenset({Capability.EMBEDDING})
    found = info.capabilities - {Capability.EMBEDDING}
    return (found - {Capability.RERANK}) | {Capability.CHAT, Capability.COMPLETION}


def estimate_coreml(info: ModelInfo, options: EngineOptions) -> MemoryEstimate:
    """Return the memory of `info` with as many rows as fit the limit.

    A state has the size of the package's whole context, so a shorter context saves nothing.
    Raises InsufficientMemory if not even one row fits.
    """
    is_reference = info.details.get("runtime") == "reference"
    weights = info.parameters * _F32_BYTES if is_reference else _number(info, "weights_bytes")
    weights = weights or info.size_bytes
    state = _number(info, "state_elements") * (_F32_BYTES if is_reference else 2)
    context = min(options.context_tokens or info.context_length, info.context_length)
    reads_all = info.details.get("reads_all") is True
    chunk = context if reads_all else min(options.prefill_chunk_tokens, _MAX_CHUNK_TOKENS)
    width = 8 * _number(info, "n_embd") + 4 * _number(info, "n_ff")
    attention = 3 * context * _number(info, "n_head")
    logits = 0 if Capability.EMBEDDING in info.capabilities else _number(info, "vocabulary_size")
    base = _BASE_BYTES + (0 if is_reference else _CHILD_BYTES)
    transient = base + chunk * (width + attention + 2 * logits) * _F32_BYTES
    rows = max(min(options.max_sequences, _MAX_ROWS), 1)
    if options.kv_tokens is not None:
        rows = max(min(rows, options.kv_tokens // context), 1)
    limit = options.memory_limit_bytes
    if limit is not None:
        free = limit - weights - transient
        if free < state:
            raise InsufficientMemory(
                f"The model {info.name} needs {format_bytes(weights + transient + state)} with "
                f"its context of {info.context_length} tokens, more than the "
                f"{format_bytes(limit)} that models may use; use a smaller quantization.",
                param="model",
            )
        rows = min(rows, free // state) if state else rows
    return MemoryEstimate(weights, rows * state, transient, context, rows * context)


def _number(info: ModelInfo, key: str) -> int:
    value = info.details.get(key, 0)
    return int(value) if isinstance(value, int | float) else 0


def _open_encoder(
    info: ModelInfo,
    spec: CoremlSpec,
    folder: HfFolder,
    layout: Layout,
    tokenizer: HfTokenizer,
    options: EngineOptions,
) -> Engine:
    assert options.context_tokens is not None
    settings = read_settings(folder.path)
    if settings.lower_case:
        tokenizer.lower_texts()
    head = VectorHead(settings)
    opened: list[Runtime] = []

    def open_model() -> CoremlEmbeddingModel:
        opened.append(open_runtime(spec, options.threads, options.child))
        return CoremlEmbeddingModel(opened[0], layout, tokenizer, head)

    return EmbeddingEngine(
        info,
        open_model,
        context_tokens=min(options.context_tokens, settings.max_tokens or options.context_tokens),
        batch_limits=BatchLimits(max(options.prefill_chunk_tokens, 1)),
        max_waiting=options.max_waiting,
        prompts=settings.prompts,
        truncates=tokenizer.truncation_side,
        is_unit=settings.is_unit,
        interrupt=lambda: opened[0].interrupt(),
    )


class CoremlEmbeddingModel(TextInputs):
    """A text encoder that computes one row at a time; implements `EmbeddingModel`."""

    def __init__(
        self, runtime: Runtime, layout: Layout, tokenizer: HfTokenizer, head: VectorHead
    ) -> None:
        super().__init__(tokenizer)
        self._runtime: Runtime | None = runtime
        self._layout = layout
        self._head = head

    def encode(self, token_lists: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Return the pooled vectors (len(token_lists), dimension).  Raises EngineFailed."""
        assert self._runtime is not None
        vectors = []
        for tokens in token_lists:
            inputs = token_inputs(self._layout, tokens, self._layout.padded_length(len(tokens)))
            output = np.array(self._runtime.compute(inputs, None, self._layout.output))
            vectors.append(self._vector(output, tokens))
        return np.stack(vectors)

    def _vector(self, output: NDArray[np.float32], tokens: Sequence[int]) -> NDArray[np.float32]:
        """Return one text's vector, pooled here unless the model pools itself."""
        if output.ndim == 3:
            return np.asarray(self._head.pool(output[:, : len(tokens)], padded([tokens]))[0])
        if output.ndim > 3 or not output.size:
            raise EngineFailed(
                f"The model's output {self._layout.output!r} has the shape {output.shape}; "
                "expected (1, tokens, dimension) or (1, dimension)."
            )
        return np.asarray(self._head.finish(output.reshape(1, -1))[0])

    def close(self) -> None:
        """Free the weights."""
        if self._runtime is not None:
            self._runtime.close()
        self._runtime = None
