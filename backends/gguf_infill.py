"""The tokens around a gap, as a GGUF file's metadata and vocabulary name them."""

from collections.abc import Mapping, Sequence

from backends.gguf_layout import MetadataValue
from backends.infill import INFILL_NAMES, InfillTokens, find_infill

# The newer and the older key of each of the tokens around a gap.
_INFILL_KEYS = tuple(
    (f"tokenizer.ggml.fim_{short}_token_id", f"tokenizer.ggml.{long}_token_id")
    for short, long in (("pre", "prefix"), ("suf", "suffix"), ("mid", "middle"))
)


def gguf_infill(
    tokens: Sequence[bytes], values: Mapping[str, MetadataValue]
) -> InfillTokens | None:
    """Return the tokens that the metadata names for filling in, or those of a known family."""
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
