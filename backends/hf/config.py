"""Reads a Hugging Face folder: config.json, chat template, license and weight file names."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from backends.hf.adapters import adapter_error
from backends.hf.chat_templates import read_templates
from backends.hf.header import broken, read_bytes, read_json, read_optional_json
from backends.sentence_files import has_modules
from core.errors import NotThisFormat
from core.files import visible_files
from core.units import KIB, MIB

_MAX_CARD_BYTES = 64 * KIB
_MAX_INDEX_BYTES = 64 * MIB
# Each class name is looked up by transformers; models have one or two.
_MAX_ARCHITECTURES = 100
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.(?:safetensors|bin)", re.DOTALL)
# Source: `variant` of transformers' and diffusers' `save_pretrained`.
_VARIANT = re.compile(
    r"(?P<stem>(?:model|pytorch_model)\.(?!index)[A-Za-z0-9_]{1,32})"
    r"(?:-\d{5}-of-(?P<count>\d{5}))?\.(?P<kind>safetensors|bin)"
)
_DEFAULT_STEM = {"safetensors": "model", "bin": "pytorch_model"}
_NOT_WEIGHTS = re.compile(
    r"(adapter|optimizer|scheduler|training_args|rng_state|openvino|consolidated)"
)
# Where configurations of multimodal models have the language model's.
NESTED = ("text_config", "llm_config", "language_config")
# The keys that configurations use for the same number.
LAYER_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
HIDDEN_KEYS = ("hidden_size", "n_embd", "d_model", "dim")
HEAD_KEYS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
KV_HEAD_KEYS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num")
HEAD_WIDTH_KEYS = ("head_dim", "kv_channels", "d_kv")
_LICENSE = re.compile(r"^license(_name)?:[ \t]*(?:\n[ \t]*-[ \t]*)?['\"]?([\w.+-]+)", re.MULTILINE)

# Source: transformers' model types with bidirectional attention and no language-model head.
ENCODERS = frozenset({
    "albert", "bert", "big_bird", "camembert", "data2vec-text", "deberta", "deberta-v2",
    "distilbert", "electra", "ernie", "esm", "eurobert", "fnet", "funnel", "ibert", "layoutlm",
    "longformer", "luke", "megatron-bert", "mobilebert", "modernbert", "mpnet", "mra", "new",
    "nezha", "nomic_bert", "nystromformer", "rembert", "roberta", "roberta-prelayernorm",
    "roc_bert", "roformer", "squeezebert", "xlm-roberta", "xlm-roberta-xl", "xmod", "yoso",
})  # fmt: skip
GENERATING = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


@dataclass(frozen=True, slots=True)
class HfFolder:
    """The configuration files of one model folder; no weights are read.

    `config` is the text decoder's, flattened: a nested `text_config` is merged into the top level
    (the outer type is kept as `wrapper_model_type`), as are `rope_theta` and `rope_scaling`.
    `chat_template` is the default one, `tool_template` and `rag_template` those
    named `tool_use` and `rag`.
    """

    path: Path
    config: Mapping[str, Any]
    generation_config: Mapping[str, Any]
    tokenizer_config: Mapping[str, Any]
    chat_template: str | None
    license: str
    tool_template: str | None = None
    rag_template: str | None = None

    @property
    def model_type(self) -> str:
        """The text model's `model_type` in transformers; empty if it is missing."""
        value = self.config.get("model_type")
        return value if isinstance(value, str) else ""

    @property
    def outer_type(self) -> str:
        """The `model_type` of the whole model, which selects mlx-lm's code."""
        value = self.config.get("wrapper_model_type") or self.config.get("model_type")
        return value if isinstance(value, str) else ""

    @property
    def architectures(self) -> tuple[str, ...]:
        """The names of the transformers classes that the weights were saved from."""
        value = self.config.get("architectures")
        names = value if isinstance(value, list) else []
        return tuple(name for name in names if isinstance(name, str))

    @property
    def is_encoder(self) -> bool:
        """Whether the model has bidirectional attention and no language-model head."""
        if any(name.endswith(GENERATING) for name in self.architectures):
            return False
        is_half = any(name.endswith("EncoderModel") for name in self.architectures)
        return is_half or self.model_type in ENCODERS

    @property
    def is_embedder(self) -> bool:
        """Whether the model is meant for embeddings, be it an encoder or a decoder."""
        if self.is_encoder or has_modules(self.path):
            return True
        names = self.architectures
        is_headless = all(name.endswith("Model") for name in names)
        return bool(names) and is_headless and not any(name.endswith(GENERATING) for name in names)

    @property
    def has_custom_code(self) -> bool:
        """Whether the configuration refers to Python files in the folder, which are never run."""
        return "auto_map" in self.config


def read_folder(path: Path) -> HfFolder:
    """Read the configuration files in the folder `path`.

    Raises NotThisFormat without a config.json, BrokenModel for damaged or oversized files.
    """
    path = path.absolute()
    try:
        config = read_json(path / "config.json")
    except FileNotFoundError:
        if (path / "adapter_config.json").is_file():
            raise adapter_error(path / "adapter_config.json") from None
        raise NotThisFormat(f"{path.name} has no config.json") from None
    _check_values(path / "config.json", config)
    tokenizer_config = read_optional_json(path / "tokenizer_config.json")
    templates = read_templates(path, tokenizer_config)
    return HfFolder(
        path=path,
        config=MappingProxyType(flattened(config)),
        generation_config=MappingProxyType(read_optional_json(path / "generation_config.json")),
        tokenizer_config=MappingProxyType(tokenizer_config),
        chat_template=templates.default,
        license=_license(path / "README.md"),
        tool_template=templates.tool_use,
        rag_template=templates.rag,
    )


def _check_values(path: Path, config: Mapping[str, Any]) -> None:
    """Raise BrokenModel for values that no runtime can use, and that are costly to try."""
    names = config.get("architectures")
    if isinstance(names, list) and len(names) > _MAX_ARCHITECTURES:
        raise broken(path, f"it names {len(names)} architectures, at most {_MAX_ARCHITECTURES}")
    left: list[tuple[str, object]] = [("", config)]
    while left:
        key, value = left.pop()
        if isinstance(value, Mapping):
            left += value.items()
        elif isinstance(value, list):
            left += ((key, one) for one in value)
        elif isinstance(value, float) and math.isnan(value):
            raise broken(path, f"its {key[:100]} is not a number (NaN)")


def flattened(config: dict[str, Any]) -> dict[str, Any]:
    """Return a copy in the form of `HfFolder.config`."""
    flat = dict(config)
    for key in NESTED:
        inner = config.get(key)
        if isinstance(inner, dict):
            del flat[key]
            kept = {name: value for name, value in inner.items() if value is not None}
            kept.pop("architectures", None)
            if kept.get("model_type", flat.get("model_type")) != flat.get("model_type"):
                flat["wrapper_model_type"] = flat.get("model_type")
            flat |= kept
            break
    _lift_rope(flat)
    return flat


def plain_floats(value: Any) -> Any:
    """Return a copy with infinities and NaN as floats: transformers 5 writes `{"__float__": …}`."""
    if isinstance(value, Mapping):
        if set(value) == {"__float__"} and value["__float__"] in ("Infinity", "-Infinity", "NaN"):
            return float(value["__float__"])
        return {key: plain_floats(one) for key, one in value.items()}
    if isinstance(value, list):
        return [plain_floats(one) for one in value]
    return value


def _lift_rope(config: dict[str, Any]) -> None:
    """Copy transformers 5's `rope_parameters` to the older keys that other code reads."""
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict):
        return
    full = rope.get("full_attention")
    sliding = rope.get("sliding_attention")
    if isinstance(sliding, dict) and "rope_theta" in sliding:
        config.setdefault("rope_local_base_freq", sliding["rope_theta"])
    rope = full if isinstance(full, dict) else rope
    for key in ("rope_theta", "partial_rotary_factor"):
        if config.get(key) is None and rope.get(key) is not None:
            config[key] = rope[key]
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default" and config.get("rope_scaling") is None:
        left = ("rope_theta", "partial_rotary_factor")
        config["rope_scaling"] = {key: value for key, value in rope.items() if key not in left}


def _license(card: Path) -> str:
    """Return the license that the model card's front matter names."""
    try:
        text = read_bytes(card, _MAX_CARD_BYTES, count=_MAX_CARD_BYTES).decode("utf-8", "replace")
    except FileNotFoundError:
        return ""
    front = text.partition("\n---")[0] if text.startswith("---") else ""
    found = {match[1]: match[2] for match in _LICENSE.finditer(front)}
    license_ = found.get(None, "")
    return found.get("_name", license_) if license_ == "other" else license_


def weight_files(folder: Path, kind: Literal["safetensors", "bin"]) -> tuple[Path, ...]:
    """Return the model's weight files in `folder`, in order; empty if there are none.

    They are found by an index, or else by their names; adapters and training states are skipped.
    Raises BrokenModel for an index that lists a file which is missing or outside the folder, for
    an incomplete set of shards, and for a folder with an adapter only.
    """
    folder = folder.absolute()
    index = folder / f"{_DEFAULT_STEM[kind]}.{kind}.index.json"
    if index.is_file():
        return _indexed(index)
    found = visible_files(folder, f"*.{kind}")
    weights = [path for path in found if not _NOT_WEIGHTS.match(path.name)]
    if not weights:
        adapters = [path for path in found if path.name.startswith("adapter")]
        if adapters:
            raise adapter_error(adapters[0])
        # Some models are published in this layout only.
        weights = [path for path in found if path.name.startswith("consolidated")]
    usual = [path for path in weights if path.name.startswith(_DEFAULT_STEM[kind])]
    weights = usual or weights
    # Variants are other versions of the same weights: they are used if nothing else is there.
    weights = [path for path in weights if not _VARIANT.fullmatch(path.name)] or list(
        variant_files(weights[0]) if weights else ()
    )
    single = folder / f"{_DEFAULT_STEM[kind]}.{kind}"
    if single in weights:
        return (single,)
    shards = {match[1]: match for path in weights if (match := _SHARD.fullmatch(path.name))}
    if not shards:
        return tuple(weights)
    stem, match = sorted(shards.items())[0]
    return _shards(folder, stem, int(match[3]), kind)


def variant_files(path: Path) -> tuple[Path, ...]:
    """Return the files of the variant that `path` belongs to, such as `model.fp16.safetensors`.

    A variant holds the same weights in another type; empty for other names.  Raises BrokenModel
    for an incomplete set of shards.
    """
    match = _VARIANT.fullmatch(path.name)
    if match is None:
        return ()
    if match["count"] is None:
        return (path,)
    return _shards(path.parent, match["stem"], int(match["count"]), match["kind"])


def _shards(folder: Path, stem: str, count: int, kind: str) -> tuple[Path, ...]:
    files = []
    for number in range(1, count + 1):
        path = folder / f"{stem}-{number:05d}-of-{count:05d}.{kind}"
        if not path.is_file():
            raise broken(path, f"shard {number} of {count} is missing; download it too")
        files.append(path)
    return tuple(files)


def _indexed(index: Path) -> tuple[Path, ...]:
    weight_map = read_json(index, _MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise broken(index, "it has no weight_map; download it again")
    names = set()
    for name in weight_map.values():
        if not isinstance(name, str) or not name or name in (".", ".."):
            raise broken(index, "its weight_map has a value that is not a file name")
        if "/" in name or "\\" in name or "\0" in name:
            raise broken(index, f"it lists {name[:200]!r}, which is not a file beside it")
        names.add(name)
    files = tuple(index.with_name(name) for name in sorted(names))
    for path in files:
        if not path.is_file():
            raise broken(index, f"the file {path.name!r} that it lists is missing; download it too")
    return files
