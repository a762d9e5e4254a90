"""Describes an ONNX model from its graph and the configuration files around it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from backends.base import ModelInfo
from backends.embedding.folder import read_settings
from backends.hf.chat_templates import read_templates
from backends.hf.folder import HfFolder, folder_info, read_folder
from backends.hf.header import read_optional_json
from backends.onnx.graph import OnnxGraph, read_graph
from backends.onnx.layout import DecoderLayout, EncoderLayout, read_layout, unsupported
from core.errors import NotThisFormat
from core.types import Capability

_DESCRIPTIONS = ("config.json", "genai_config.json", "tokenizer.json")
_PLAIN_STEM = re.compile(r"(decoder_model_merged|decoder_with_past_model|model)_?")
_INTEGER_OPERATORS = frozenset({
    "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM",
    "QLinearMatMul", "QAttention", "QGemm", "DequantizeLinear",
})  # fmt: skip
_DETAIL_NAMES = {
    "float32": "f32", "float16": "f16", "bfloat16": "bf16", "float64": "f64", "int8": "int8",
    "uint8": "int8", "int4": "int4", "uint4": "int4",
}  # fmt: skip
# The context of encoders without configuration whose graph does not tell it.
_DEFAULT_ENCODER_TOKENS = 512
# Source: file names of optimum's exports.
_HALF = "encoder_model"
_GENERATES = frozenset({Capability.CHAT, Capability.COMPLETION})


@dataclass(frozen=True, slots=True)
class OnnxModel:
    """One graph with its folder; `end_ids` are the end tokens of genai_config.json."""

    graph: OnnxGraph
    layout: DecoderLayout | EncoderLayout
    root: Path
    folder: HfFolder | None
    end_ids: frozenset[int]


def read_model(path: Path) -> OnnxModel:
    """Read graph and configuration, no weights.  Raises NotThisFormat, BrokenModel."""
    path = path.absolute()
    graph = read_graph(path)
    root = _model_root(path)
    genai = _genai(root)
    try:
        folder: HfFolder | None = read_folder(root)
    except NotThisFormat:
        folder = _genai_folder(root, genai) if genai else None
    layout = read_layout(graph, folder.config if folder else {})
    return OnnxModel(graph, layout, root, folder, _end_ids(genai))


def onnx_info(path: Path) -> ModelInfo:
    """Describe the model of one graph; a folder may have several, such as one per precision.

    Raises NotThisFormat, BrokenModel.
    """
    model = read_model(path)
    if isinstance(model.layout, DecoderLayout):
        return _decoder_info(model, model.layout)
    return _encoder_info(model, model.layout)


def _model_root(path: Path) -> Path:
    """Return the folder with the configuration: the graph's own, or the parent of `onnx/`."""
    folder = path.parent
    if any((folder / name).is_file() for name in _DESCRIPTIONS):
        return folder
    above = folder.parent
    is_inner = folder.name == "onnx" and any((above / name).is_file() for name in _DESCRIPTIONS)
    return above if is_inner else folder


def _genai(root: Path) -> dict[str, Any]:
    """Return genai_config.json, empty if there is none or it has no model section."""
    config = read_optional_json(root / "genai_config.json")
    return config if isinstance(config.get("model"), dict) else {}


def _end_ids(genai: Mapping[str, Any]) -> frozenset[int]:
    value = genai["model"].get("eos_token_id") if genai else None
    each = value if isinstance(value, list) else [value]
    return frozenset(one for one in each if type(one) is int and one >= 0)


def _genai_folder(root: Path, genai: Mapping[str, Any]) -> HfFolder:
    """Translate genai_config.json to the keys of config.json.

    Source: the configuration reference of onnxruntime-genai.
    """
    model = genai["model"]
    decoder = model.get("decoder")
    decoder = decoder if isinstance(decoder, dict) else {}
    config = {
        "model_type": model.get("type"),
        "architectures": ["ForCausalLM"],
        "max_position_embeddings": model.get("context_length"),
        "vocab_size": model.get("vocab_size"),
        "bos_token_id": model.get("bos_token_id"),
        "eos_token_id": model.get("eos_token_id"),
        "head_dim": decoder.get("head_size"),
        "hidden_size": decoder.get("hidden_size"),
        "num_attention_heads": decoder.get("num_attention_heads"),
        "num_key_value_heads": decoder.get("num_key_value_heads"),
        "num_hidden_layers": decoder.get("num_hidden_layers"),
    }
    search = genai.get("search")
    tokenizer_config = read_optional_json(root / "tokenizer_config.json")
    templates = read_templates(root, tokenizer_config)
    return HfFolder(
        path=root,
        config=MappingProxyType({key: value for key, value in config.items() if value is not None}),
        generation_config=MappingProxyType(search if isinstance(search, dict) else {}),
        tokenizer_config=MappingProxyType(tokenizer_config),
        chat_template=templates.default,
        license="",
        tool_template=templates.tool_use,
        rag_template=templates.rag,
    )


def _decoder_info(model: OnnxModel, layout: DecoderLayout) -> ModelInfo:
    if model.folder is None:
        raise unsupported(
            model.graph,
            "there is neither config.json nor genai_config.json beside it; download one of them",
        )
    heads = max(tensor.heads for tensor in layout.cache)
    info = _graph_info(
        model,
        model.folder,
        {
            "vocabulary_size": layout.vocabulary_size,
            "n_layer_kv": layout.layers,
            "n_head_kv": heads,
            "head_dim": max(tensor.head_dim for tensor in layout.cache),
            "kv_dtype": layout.cache_dtype,
            "batching": "ragged" if layout.is_ragged else "padded" if layout.is_batchable else "",
            "is_encoder": False,
        },
    )
    # The graph decides over the configuration: it has a language-model head.
    return replace(info, capabilities=(info.capabilities - {Capability.EMBEDDING}) | _GENERATES)


def _encoder_info(model: OnnxModel, layout: EncoderLayout) -> ModelInfo:
    details: dict[str, int | float | str | bool] = {"is_encoder": True, "output": layout.output}
    if model.graph.path.stem.startswith(_HALF):
        raise unsupported(
            model.graph,
            "it is the encoder half of an encoder-decoder model; use a decoder or an embedding "
            "model",
        )
    limits = (None if layout.is_scored else read_settings(model.root).max_tokens, layout.length)
    context = min((limit for limit in limits if limit), default=None)
    if model.folder is None:
        info = _bare_encoder(model, layout, details)
    else:
        info = _graph_info(model, model.folder, details)
    length = min(info.context_length, context or info.context_length)
    use = Capability.RERANK if layout.is_scored else Capability.EMBEDDING
    return replace(info, capabilities=frozenset({use}), context_length=length)


def _graph_info(
    model: OnnxModel, folder: HfFolder, details: Mapping[str, int | float | str | bool]
) -> ModelInfo:
    graph = model.graph
    info = folder_info(
        "onnx",
        folder,
        (graph.path, *graph.external_files),
        parameters=graph.parameters,
        weights_bytes=_weights_bytes(graph),
        quantization=quantization_of(graph, model.layout),
        details={**details, "opset": graph.opsets.get("", 0)},
    )
    files = [*info.files, *_existing(model.root / "genai_config.json")]
    variant = _PLAIN_STEM.sub("", graph.path.stem, count=1)
    return replace(
        info,
        name=f"{info.name}-{variant}" if variant else info.name,
        files=tuple(files),
        size_bytes=sum(file.stat().st_size for file in files),
    )


def _bare_encoder(
    model: OnnxModel, layout: EncoderLayout, details: Mapping[str, int | float | str | bool]
) -> ModelInfo:
    """Describe an encoder without configuration; its tokenizer comes from another folder."""
    graph = model.graph
    files = (graph.path, *graph.external_files)
    positions = [
        shape[0]
        for name, shape in graph.shapes.items()
        if "position_embeddings" in name and len(shape) == 2 and shape[1] > 1
    ]
    is_named_so = graph.path.stem == "model"
    return ModelInfo(
        format="onnx",
        name=graph.path.parent.name if is_named_so else graph.path.stem,
        architecture="encoder",
        quantization=quantization_of(graph, layout),
        files=files,
        size_bytes=sum(file.stat().st_size for file in files),
        parameters=graph.parameters,
        context_length=min(positions, default=_DEFAULT_ENCODER_TOKENS),
        capabilities=frozenset({Capability.EMBEDDING}),
        details={
            **details,
            "n_embd": layout.dimension,
            "weights_bytes": _weights_bytes(graph),
            "opset": graph.opsets.get("", 0),
        },
    )


def _existing(*paths: Path) -> list[Path]:
    return [path for path in paths if path.is_file()]


def _weights_bytes(graph: OnnxGraph) -> int:
    return sum(graph.weights.values())


def quantization_of(graph: OnnxGraph, layout: DecoderLayout | EncoderLayout) -> str:
    """Return the weights' precision as one word, such as `int4` or `q4f16`."""
    if graph.packed:
        bits = max(graph.packed.items(), key=lambda item: item[1])[0]
        is_half = isinstance(layout, DecoderLayout) and layout.cache_dtype == "float16"
        return f"q{bits}f16" if is_half else f"int{bits}"
    largest = max(graph.weights.items(), key=lambda item: item[1], default=("", 0))[0]
    if _INTEGER_OPERATORS & graph.operators.keys() and largest not in ("int4", "uint4"):
        return "int8"
    return _DETAIL_NAMES.get(largest, largest)
