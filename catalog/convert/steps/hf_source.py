"""Reads a Hugging Face folder for the GGUF writer: numbers, vocabulary, templates, settings."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backends.hf.config import read_folder
from backends.hf.tokenizer import END_NAMES, HfTokenizer
from catalog.convert.job import read_json
from catalog.convert.sidecars import TEMPLATES_FOLDER
from catalog.convert.steps.from_gguf import SAMPLING
from catalog.convert.steps.gguf_tokenizer import pre_name
from catalog.convert.steps.hf_defaults import complete_config
from catalog.convert.steps.rotary import attention_window
from catalog.convert.support import gguf_reason, tokenizer_reason
from core.errors import BrokenModel, UnsupportedCapability
from core.files import visible_files

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_MAX_TOKENS = 2**22
_MAX_TEMPLATES = 32
_MAX_TEMPLATE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class HfSource:
    """A folder's configurations and tokenizer; `pre` is the `tokenizer.ggml.pre` in GGUF."""

    folder: Path
    config: Mapping[str, Any]
    tokenizer_json: Mapping[str, Any]
    tokenizer_config: Mapping[str, Any]
    generation_config: Mapping[str, Any]
    tokenizer: HfTokenizer
    license: str
    pre: str

    def number(self, key: str, default: int | None = None) -> int:
        """Return a positive integer from the configuration.  Raises BrokenModel."""
        value = self.config.get(key)
        value = default if value is None else value
        if type(value) is not int or not 0 < value < 2**31:
            raise BrokenModel(
                f"config.json has no valid {key} (a positive integer).", param="model"
            )
        return value

    @property
    def heads(self) -> int:
        """Number of query heads per layer."""
        return self.number("num_attention_heads")

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads per layer."""
        return self.number("num_key_value_heads", self.heads)

    @property
    def head_dim(self) -> int:
        """Dimensions of a head."""
        return self.number("head_dim", self.number("hidden_size") // self.heads)

    @property
    def context(self) -> int:
        """The context in tokens: llama.cpp attends to all of it, so at most a sliding window."""
        longest = self.number("max_position_embeddings")
        return min(longest, attention_window(self.config) or longest)


def read_source(folder: Path, original: Path) -> HfSource:
    """Read a folder's configurations and complete them with transformers' defaults.

    `original` has the model card and the templates.  Raises BrokenModel, UnsupportedCapability.
    """
    config = complete_config(folder)
    tokenizer = read_json(folder / "tokenizer.json")
    if reason := gguf_reason(config) or tokenizer_reason(tokenizer):
        raise UnsupportedCapability(
            f"The model cannot be converted to GGUF: {reason}.", param="target_format"
        )
    described = read_folder(original)
    return HfSource(
        folder=original,
        config=config,
        tokenizer_json=tokenizer,
        tokenizer_config=described.tokenizer_config,
        generation_config=described.generation_config,
        tokenizer=HfTokenizer(original),
        license=described.license,
        pre=pre_name(tokenizer.get("pre_tokenizer")),
    )


def add_vocabulary(writer: Any, model: HfSource) -> None:
    """Add the tokenizer and the chat templates to a GGUFWriter.  Raises BrokenModel."""
    import gguf

    bpe = model.tokenizer_json["model"]
    added = model.tokenizer_json.get("added_tokens", [])
    size = model.number("vocab_size")
    largest = max([*bpe["vocab"].values(), *(token["id"] for token in added)], default=-1)
    if not largest < size <= _MAX_TOKENS:
        raise BrokenModel(
            f"vocab_size is {size}, but the tokenizer has the token id {largest} "
            f"(at most {_MAX_TOKENS:,} tokens are supported).",
            param="model",
        )
    texts = [f"[PAD{index}]" for index in range(size)]
    types = [int(gguf.TokenType.UNUSED)] * size
    for text, index in bpe["vocab"].items():
        texts[index], types[index] = text, int(gguf.TokenType.NORMAL)
    for token in added:
        kind = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
        texts[token["id"]], types[token["id"]] = token["content"], int(kind)
    if len(set(texts)) < size:
        raise BrokenModel("The vocabulary has the same token twice.", param="model")
    merges = bpe.get("merges", [])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(model.pre)
    writer.add_token_list(texts)
    writer.add_token_types(types)
    writer.add_token_merges([item if isinstance(item, str) else " ".join(item) for item in merges])
    _add_special_tokens(writer, model, {text: index for index, text in enumerate(texts)})
    writer.add_add_space_prefix(False)
    if templates := chat_templates(model):
        writer.add_chat_template(
            [{"name": name, "template": text} for name, text in templates.items()]
        )


def _add_special_tokens(writer: Any, model: HfSource, ids: Mapping[str, int]) -> None:
    """Add the special tokens, as the tokenizer and the settings name them.

    Raises UnsupportedCapability for more end tokens than GGUF has places for.
    """
    tokenizer = model.tokenizer
    main = ids.get(tokenizer.eos_text)
    if main is None:
        main = next(iter(_listed_ends(model)), None)
    if main is not None:
        writer.add_eos_token_id(main)
    names = {index: text for text, index in ids.items()}
    # llama.cpp knows the others by their names.
    unnamed = [
        each for each in _listed_ends(model) if each != main and names.get(each) not in END_NAMES
    ]
    places = (writer.add_eot_token_id, writer.add_eom_token_id)
    if len(unnamed) > len(places):
        raise UnsupportedCapability(
            f"The model ends its answers with {len(unnamed) + 1} different tokens; GGUF has places "
            f"for {len(places) + 1}.",
            param="target_format",
        )
    for add, token_id in zip(places, unnamed, strict=False):
        add(token_id)
    if tokenizer.bos_text in ids:
        writer.add_bos_token_id(ids[tokenizer.bos_text])
    for key, add_id in (("pad", writer.add_pad_token_id), ("unk", writer.add_unk_token_id)):
        value = model.tokenizer_config.get(f"{key}_token")
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str) and value in ids:
            add_id(ids[value])
    writer.add_add_bos_token(tokenizer.adds_bos)
    writer.add_add_eos_token(False)


def _listed_ends(model: HfSource) -> list[int]:
    """Return the end tokens that the settings list, in order."""
    found: dict[int, None] = {}
    for config in (model.generation_config, model.config):
        value = config.get("eos_token_id")
        for each in value if isinstance(value, list) else [value]:
            if type(each) is int and 0 <= each < model.tokenizer.vocabulary_size:
                found[each] = None
    return list(found)


def add_settings(writer: Any, model: HfSource) -> None:
    """Add the license and the recommended sampling to a GGUFWriter."""
    if model.license:
        writer.add_license(model.license)
    if model.generation_config.get("do_sample") is False:
        return
    adders = {
        "temp": writer.add_sampling_temp,
        "top_p": writer.add_sampling_top_p,
        "top_k": writer.add_sampling_top_k,
        "min_p": writer.add_sampling_min_p,
    }
    for key, name in SAMPLING.items():
        value = model.generation_config.get(key)
        if not isinstance(value, bool) and isinstance(value, int | float) and 0 <= value < 2**31:
            adders[name](int(value) if name == "top_k" else float(value))


def chat_templates(model: HfSource) -> dict[str, str]:
    """Return the chat templates by name; `default` is the one for conversations."""
    listed = model.tokenizer_config.get("chat_template")
    templates: dict[str, str] = {}
    for entry in listed if isinstance(listed, list) else ():
        if isinstance(entry, dict) and isinstance(entry.get("template"), str):
            templates[str(entry.get("name"))] = entry["template"]
    folder = model.folder / TEMPLATES_FOLDER
    for path in visible_files(folder, "*.jinja")[:_MAX_TEMPLATES] if folder.is_dir() else ():
        if path.stat().st_size <= _MAX_TEMPLATE_BYTES:
            templates[path.stem] = path.read_text(encoding="utf-8")
    default = read_folder(model.folder).chat_template
    return templates | ({"default": default} if default else {})
