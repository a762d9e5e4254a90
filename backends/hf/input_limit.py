"""The longest input, in tokens, that an encoder was made for."""

from backends.hf.config import HfFolder
from backends.sentence_files import settings_root
from backends.small_json import read_object

# Their position table starts after the padding token's id.
_OFFSET_POSITIONS = frozenset({
    "camembert", "data2vec-text", "ibert", "longformer", "luke", "mpnet", "roberta",
    "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
})  # fmt: skip
# With any of these keys, positions are computed and not looked up in a table.
_COMPUTED_POSITIONS = (
    "rope_theta", "rope_parameters", "rope_scaling", "rotary_emb_base", "rotary_emb_fraction",
    "global_rope_theta", "rotary_embedding_base",
)  # fmt: skip
_MOST = 2**31 - 1


def position_offset(folder: HfFolder) -> int:
    """Return how many rows of the position table stand before that of the first token."""
    if folder.model_type not in _OFFSET_POSITIONS:
        return 0
    padding = folder.config.get("pad_token_id")
    return (padding if type(padding) is int and padding >= 0 else 1) + 1


def input_limit(folder: HfFolder, positions: int) -> int:
    """Return the limit of an embedding or reranking model with that many positions.

    sentence_bert_config.json decides, else tokenizer_config.json, as in sentence-transformers;
    neither exceeds a table of positions.  `positions` is at least 1.
    """
    root = settings_root(folder.path)
    configs = [read_object(each / "sentence_bert_config.json") for each in (folder.path, root)]
    stated = next((config["max_seq_length"] for config in configs if "max_seq_length" in config), 0)
    if type(stated) is int and 0 < stated <= _MOST:
        has_table = not any(folder.config.get(key) for key in _COMPUTED_POSITIONS)
        return min(stated, positions) if has_table else stated
    limit = folder.tokenizer_config.get("model_max_length")
    if isinstance(limit, int | float) and 0 < limit <= _MOST:
        return min(int(limit), positions)
    return positions
