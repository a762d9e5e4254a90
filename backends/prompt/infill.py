"""Builds fill-in-the-middle prompts from prefix and suffix, with a model's infill tokens."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from backends.stepper import Tokenizer
from core.types import InfillPrompt

# Token names by family: before the prefix, before the suffix, before the middle.
# Sources: llama.cpp's llama-vocab.cpp; Mistral's tokenizers, whose code models expect the suffix
# first and nothing between the prefix and the middle.
_FAMILIES = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),
    ("<PRE>", "<SUF>", "<MID>"),
    ("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"),
    ("[PREFIX]", "[SUFFIX]", ""),
)
INFILL_NAMES = frozenset(name for family in _FAMILIES for name in family if name)


@dataclass(frozen=True, slots=True)
class InfillTokens:
    """Ids of a model's infill tokens; if `middle` is None the suffix comes first."""

    prefix: int
    suffix: int
    middle: int | None

    def token_ids(self, prompt: InfillPrompt, tokenizer: Tokenizer) -> list[int]:
        """Return the prompt's token ids; special tokens within its texts are not parsed."""
        start = tokenizer.encode("", add_bos=True, parse_special=False)
        before = tokenizer.encode(prompt.prefix, add_bos=False, parse_special=False)
        behind = tokenizer.encode(prompt.suffix, add_bos=False, parse_special=False)
        if self.middle is None:
            return [*start, self.suffix, *behind, self.prefix, *before]
        return [*start, self.prefix, *before, self.suffix, *behind, self.middle]


def find_infill(id_of: Callable[[str], int | None]) -> InfillTokens | None:
    """Return the infill tokens of the first family in a vocabulary, or None."""
    for names in _FAMILIES:
        prefix, suffix = id_of(names[0]), id_of(names[1])
        middle = id_of(names[2]) if names[2] else None
        if prefix is not None and suffix is not None and (middle is not None or not names[2]):
            return InfillTokens(prefix, suffix, middle)
    return None


def infill_details(tokens: InfillTokens | None) -> dict[str, int]:
    """Return the ids as stored in `ModelInfo.details`."""
    if tokens is None:
        return {}
    ids = {"infill_prefix": tokens.prefix, "infill_suffix": tokens.suffix}
    return ids if tokens.middle is None else {**ids, "infill_middle": tokens.middle}


def read_infill(details: Mapping[str, int | float | str | bool]) -> InfillTokens | None:
    """Return the tokens that `infill_details` stored, or None."""
    prefix, suffix = details.get("infill_prefix"), details.get("infill_suffix")
    if not isinstance(prefix, int) or not isinstance(suffix, int):
        return None
    middle = details.get("infill_middle")
    return InfillTokens(prefix, suffix, middle if isinstance(middle, int) else None)
