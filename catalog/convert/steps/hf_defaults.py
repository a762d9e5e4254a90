"""Completes a config.json with the defaults of transformers, which other programs do not share.

For example, mlx-lm takes Llama's output layer to be tied where nothing says so, and the heads of
Qwen 3 have 128 dimensions where the file does not tell their width.
"""

from pathlib import Path
from typing import Any

from backends.hf.config import NESTED
from catalog.convert.job import read_json, with_legacy_rope_keys, write_json

# What is not about the model itself; the tokenizer and the generation settings name the tokens.
_NOT_SETTINGS = frozenset({
    "_name_or_path", "transformers_version", "dtype", "torch_dtype", "return_dict",
    "output_attentions", "output_hidden_states", "use_cache", "problem_type",
    "chunk_size_feed_forward", "is_encoder_decoder", "bos_token_id", "eos_token_id",
    "pad_token_id", "unk_token_id", "sep_token_id", "cls_token_id", "decoder_start_token_id",
})  # fmt: skip
_ROPE = ("rope_theta", "rope_scaling", "rope_parameters")


def complete_config(folder: Path) -> dict[str, Any]:
    """Add what config.json in `folder` leaves to transformers; return the whole.

    Does nothing for types that transformers does not have.  Raises BrokenModel.
    """
    from transformers import AutoConfig

    path = folder / "config.json"
    config = read_json(path)
    if any(isinstance(config.get(key), dict) for key in NESTED):
        # The outer model's defaults are not those of the language model in it.
        return config
    try:
        known: dict[str, Any] = AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        ).to_dict()
    except Exception:
        # mlx-lm may support what transformers does not.
        return config
    defaults = {key: value for key, value in known.items() if _is_setting(key, value)}
    if not any(config.get(key) for key in _ROPE):
        defaults["rope_parameters"] = known.get("rope_parameters")
    completed = with_legacy_rope_keys(defaults | config)
    write_json(path, completed)
    return completed


def _is_setting(key: str, value: object) -> bool:
    is_plain = isinstance(value, bool | int | float | str) or key == "layer_types"
    return is_plain and key not in _NOT_SETTINGS
