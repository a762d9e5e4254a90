"""Recognises the inputs and outputs of ONNX decoders with past key values, and of encoders."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from backends.hf.kinds.other import refusal
from backends.onnx.graph import GraphValue, OnnxGraph
from backends.onnx.purpose import other_purpose
from core.errors import BrokenModel

# Input names in exports of optimum, transformers.js, torch.onnx scripts and the genai builder.
_PAST = re.compile(r"past_key_values[._](\d+)[._](key|value)|past_(key|value)s?[._](\d+)")
_DECODER_INPUTS = frozenset({
    "input_ids", "attention_mask", "position_ids", "cache_position", "use_cache_branch",
    "num_logits_to_keep",
})  # fmt: skip
_ENCODER_INPUTS = frozenset({"input_ids", "attention_mask", "token_type_ids"})
# Pooled outputs, which are preferred to token vectors.
_POOLED = ("sentence_embedding",)
# The vector of a text in the space of images.
_CLIP = "text_embeds"
_HIDDEN = ("last_hidden_state", "token_embeddings", "hidden_states")
_INTEGERS = frozenset({"int64", "int32"})
_FLOATS = frozenset({"float32", "float16"})
_RAGGED = "GroupQueryAttention"
_MAX_HEADS = 4096
_MAX_HEAD_DIM = 65_536
_MAX_VOCABULARY = 1 << 24


@dataclass(frozen=True, slots=True)
class CacheTensor:
    """One layer's keys or values (rows, heads, tokens, head_dim), as input and as output."""

    past: str
    present: str
    heads: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class DecoderLayout:
    """A decoder with past key values.

    `dtypes` are those of the other inputs by name, `scalars` the inputs without dimensions.
    `is_ragged`: its attention takes each row's length from the mask and can write new keys in
    place (GroupQueryAttention).  `is_batchable`: rows of different lengths can be computed
    together.
    """

    cache: tuple[CacheTensor, ...]
    cache_dtype: str
    dtypes: Mapping[str, str]
    scalars: frozenset[str]
    logits_dtype: str
    vocabulary_size: int
    is_ragged: bool
    is_batchable: bool

    @property
    def layers(self) -> int:
        """Number of layers with a KV cache."""
        return len(self.cache) // 2


@dataclass(frozen=True, slots=True)
class EncoderLayout:
    """An encoder; `is_pooled`: the output is one vector per text, else one per token.

    `is_scored`: the output is the score of a pair of texts.  `length` is the only number of
    tokens that the graph takes, 0 for any; `is_batchable`: it takes several rows.
    """

    dtypes: Mapping[str, str]
    output: str
    is_pooled: bool
    dimension: int
    is_scored: bool = False
    length: int = 0
    is_batchable: bool = True


def unsupported(graph: OnnxGraph, reason: str) -> BrokenModel:
    """Return the error for a graph that is intact but not supported."""
    return BrokenModel(
        f"The ONNX model {graph.path.name} is not supported: {reason}.", param="model"
    )


def read_layout(graph: OnnxGraph, config: Mapping[str, object]) -> DecoderLayout | EncoderLayout:
    """Return the layout of the graph; `config` supplies sizes that its shapes leave open.

    Raises BrokenModel with the first input that is not supported.
    """
    past = tuple(value for value in graph.inputs if _PAST.fullmatch(value.name))
    allowed = _DECODER_INPUTS if past else _ENCODER_INPUTS
    for value in graph.inputs:
        if value.name not in allowed and value not in past:
            purpose = other_purpose(graph)
            unknown = f"its input {value.name[:100]!r} is unknown"
            raise unsupported(graph, f"{unknown}: {purpose}" if purpose else unknown)
    ids = graph.input("input_ids")
    if ids is None:
        raise unsupported(graph, other_purpose(graph) or "it has no input 'input_ids'")
    dtypes = {value.name: _input_dtype(graph, value) for value in graph.inputs if value not in past}
    if past:
        return _decoder(graph, past, dtypes, config)
    return _encoder(graph, ids, dtypes, config)


def _input_dtype(graph: OnnxGraph, value: GraphValue) -> str:
    allowed = frozenset({"bool"}) if value.name == "use_cache_branch" else _INTEGERS
    if value.dtype not in allowed:
        raise unsupported(graph, f"its input {value.name!r} is of the type {value.dtype!r}")
    ranks = {"cache_position": (1,), "num_logits_to_keep": (0, 1), "use_cache_branch": (0, 1)}
    if len(value.shape) not in ranks.get(value.name, (2,)):
        raise unsupported(graph, f"its input {value.name!r} has {len(value.shape)} dimensions")
    return value.dtype


def _encoder(
    graph: OnnxGraph,
    ids: GraphValue,
    dtypes: Mapping[str, str],
    config: Mapping[str, object],
) -> EncoderLayout:
    if graph.output(_CLIP) is not None:
        raise unsupported(graph, "it is the text half of a model for texts and images (CLIP)")
    batch, length = ids.shape
    made = partial(
        EncoderLayout,
        dtypes,
        length=length if isinstance(length, int) and length > 0 else 0,
        is_batchable=not isinstance(batch, int),
    )
    for name in (*_POOLED, *_HIDDEN):
        value = graph.output(name)
        rank = 2 if name in _POOLED else 3
        if value is not None and value.dtype in _FLOATS and len(value.shape) == rank:
            last = value.shape[-1]
            dimension = last if isinstance(last, int) and last > 0 else 0
            return made(name, name in _POOLED, dimension)
    logits = graph.output("logits")
    if logits is not None and logits.dtype in _FLOATS and len(logits.shape) == 2:
        labels = logits.shape[-1]
        labels = labels if isinstance(labels, int) else _label_count(config)
        if labels != 1:
            raise unsupported(graph, refusal(f"a classifier with {labels or 'several'} labels"))
        return made(logits.name, True, 1, is_scored=True)
    if logits is not None and "token_type_ids" not in dtypes:
        raise unsupported(graph, "it has no past key values; export the model with them")
    raise unsupported(graph, "it has no output of token vectors, such as 'last_hidden_state'")


def _label_count(config: Mapping[str, object]) -> int:
    """Return the number of labels of a classifier; 0 if its configuration does not say."""
    labels = config.get("id2label")
    return len(labels) if isinstance(labels, dict) else _number(config, "num_labels")


def _decoder(
    graph: OnnxGraph,
    past: tuple[GraphValue, ...],
    dtypes: Mapping[str, str],
    config: Mapping[str, object],
) -> DecoderLayout:
    logits = graph.output("logits")
    if logits is None or logits.dtype not in _FLOATS or len(logits.shape) != 3:
        raise unsupported(graph, "it has no output 'logits' of floating-point numbers")
    cache = tuple(_cache_tensor(graph, value, config) for value in past)
    kinds = {value.dtype for value in past}
    if len(kinds) != 1 or not kinds <= _FLOATS:
        raise unsupported(graph, f"its past key values are of the type {', '.join(sorted(kinds))}")
    vocabulary = logits.shape[2]
    if not isinstance(vocabulary, int):
        vocabulary = _number(config, "vocab_size")
    if not 0 < vocabulary <= _MAX_VOCABULARY:
        raise unsupported(graph, "the size of its vocabulary is not known; add config.json")
    batch = (graph.input("input_ids") or logits).shape[0]
    can_batch = not isinstance(batch, int)
    is_ragged = "attention_mask" in dtypes and all(
        graph.consumers[tensor.past] == {_RAGGED} and graph.producers[tensor.present] == _RAGGED
        for tensor in cache
    )
    return DecoderLayout(
        cache=cache,
        cache_dtype=past[0].dtype,
        dtypes=dtypes,
        scalars=frozenset(value.name for value in graph.inputs if not value.shape),
        logits_dtype=logits.dtype,
        vocabulary_size=vocabulary,
        is_ragged=is_ragged and can_batch,
        is_batchable=can_batch and {"attention_mask", "position_ids"} <= dtypes.keys(),
    )


def _cache_tensor(graph: OnnxGraph, value: GraphValue, config: Mapping[str, object]) -> CacheTensor:
    if len(value.shape) != 4:
        raise unsupported(graph, f"its input {value.name!r} has {len(value.shape)} dimensions")
    _, heads, tokens, width = value.shape
    if isinstance(tokens, int):
        raise unsupported(graph, f"its input {value.name!r} has a fixed length")
    if not isinstance(heads, int):
        heads = _number(config, "num_key_value_heads") or _number(config, "num_attention_heads")
    if not isinstance(width, int):
        width = _number(config, "head_dim") or _number(config, "hidden_size") // max(
            _number(config, "num_attention_heads"), 1
        )
    if not (0 < heads <= _MAX_HEADS and 0 < width <= _MAX_HEAD_DIM):
        raise unsupported(
            graph, f"the shape of its input {value.name!r} is not known; add config.json"
        )
    return CacheTensor(value.name, _present(graph, value.name), heads, width)


def _present(graph: OnnxGraph, past: str) -> str:
    names = (
        past.replace("past_key_values", "present", 1),
        past.replace("past_key_values", "present_key_values", 1),
        past.replace("past", "present", 1),
    )
    for name in names:
        if graph.output(name) is not None:
            return name
    raise unsupported(graph, f"no output belongs to its input {past!r}")


def _number(config: Mapping[str, object], key: str) -> int:
    value = config.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) else 0
