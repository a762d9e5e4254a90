"""Reads a Hugging Face folder for the GGUF writer: numbers, vocabulary, chat template."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from catalog.convert.job import read_json
from catalog.convert.steps.gguf_tokenizer import pre_name
from core.errors import BrokenModel, UnsupportedCapability

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_MAX_TOKENS = 2**22


@dataclass(frozen=True, slots=True)
class HfSource:
    """A folder's configurations and tokenizer; `pre` is the `tokenizer.ggml.pre` in GGUF."""

    folder: Path
    config: Mapping[str, Any]
    tokenizer: Mapping[str, Any]
    tokenizer_config: Mapping[str, Any]
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


def read_source(folder: Path) -> HfSource:
    """Read a folder's configurations.  Raises BrokenModel, UnsupportedCapability."""
    config = read_json(folder / "config.json")
    if config.get("model_type") not in ARCHITECTURES:
        raise UnsupportedCapability(
            f"The architecture {config.get('model_type')!r} cannot be converted to GGUF; supported "
            f"are {', '.join(ARCHITECTURES)}.",
            param="target_format",
        )
    tokenizer = read_json(folder / "tokenizer.json")
    model = tokenizer.get("model", {})
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise UnsupportedCapability(
            "The tokenizer cannot be converted to GGUF; only byte-level BPE is supported.",
            param="target_format",
        )
    config_path = folder / "tokenizer_config.json"
    return HfSource(
        folder=folder,
        config=config,
        tokenizer=tokenizer,
        tokenizer_config=read_json(config_path) if config_path.exists() else {},
        pre=pre_name(tokenizer.get("pre_tokenizer")),
    )


def add_vocabulary(writer: Any, model: HfSource) -> None:
    """Add the tokenizer and the chat template to a GGUFWriter.  Raises BrokenModel."""
    import gguf
    from tokenizers import Tokenizer

    bpe = model.tokenizer["model"]
    added = model.tokenizer.get("added_tokens", [])
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
    merges = bpe.get("merges", [])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(model.pre)
    writer.add_token_list(texts)
    writer.add_token_types(types)
    writer.add_token_merges([item if isinstance(item, str) else " ".join(item) for item in merges])
    ids = {text: index for index, text in enumerate(texts)}
    add = {
        "bos_token": writer.add_bos_token_id,
        "eos_token": writer.add_eos_token_id,
        "pad_token": writer.add_pad_token_id,
        "unk_token": writer.add_unk_token_id,
    }
    for key, add_id in add.items():
        value = model.tokenizer_config.get(key)
        value = value.get("content") if isinstance(value, dict) else value
        if value in ids:
            add_id(ids[value])
    tokenizer = Tokenizer.from_file(str(model.folder / "tokenizer.json"))
    specials = tokenizer.encode("").ids
    writer.add_add_bos_token(bool(specials))
    writer.add_add_space_prefix(False)
    template = _chat_template(model)
    if template:
        writer.add_chat_template(template)


def _chat_template(model: HfSource) -> str:
    """Return the chat template, from its own file or the tokenizer's configuration."""
    path = model.folder / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    template = model.tokenizer_config.get("chat_template")
    return template if isinstance(template, str) else ""
