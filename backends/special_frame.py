"""The special tokens that a tokenizer puts around a text and around a pair of texts."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from core.errors import is_panic

_PROBES = ("a", "A", "0", ".", "the")
# Of a vocabulary without any of the probes.
_MAX_TRIED_TOKENS = 64


# Source: transformers 5.23, `model_input_names` of the tokenizers' classes.
_TYPED_CLASSES = frozenset({
    "Bert", "Canine", "ConvBert", "DPRContextEncoder", "DPRQuestionEncoder",
    "Deberta", "DebertaV2", "Electra", "FNet", "LayoutLMv2", "Lxmert", "MarkupLM", "MobileBert",
    "SqueezeBert",
})  # fmt: skip
# Model types whose tokenizer is one of these, where tokenizer_config.json names none.
_TYPED_MODELS = frozenset({
    "bert", "canine", "convbert", "deberta", "deberta-v2", "electra", "ernie", "fnet", "layoutlm",
    "megatron-bert", "mobilebert", "nezha", "nomic_bert", "qdqbert", "squeezebert",
})  # fmt: skip


def gives_types(tokenizer_config: Mapping[str, Any], model_type: str) -> bool:
    """Whether transformers' tokenizer gives models the segment of each token of a pair."""
    names = tokenizer_config.get("model_input_names")
    if isinstance(names, list):
        return "token_type_ids" in names
    kind = tokenizer_config.get("tokenizer_class")
    if isinstance(kind, str):
        return kind.removesuffix("Fast").removesuffix("Tokenizer") in _TYPED_CLASSES
    return model_type in _TYPED_MODELS


@dataclass(frozen=True, slots=True)
class SpecialFrame:
    """Ids of special tokens: `single` those before and after a text.

    `pair` those before, between and after two texts; `pair_types` the segments of these five
    parts, one number for each special token, one for all tokens of a text.
    """

    single: tuple[tuple[int, ...], tuple[int, ...]]
    pair: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    pair_types: tuple[tuple[int, ...], ...]


def read_frame(tokenizer: Any) -> SpecialFrame:
    """Find the special tokens of a `tokenizers.Tokenizer` by encoding short texts.

    Without any text that it can encode, there are none.
    """
    for probe in _probes(tokenizer):
        single, pair = _encoding(tokenizer, probe), _encoding(tokenizer, probe, probe)
        if single is None or pair is None:
            continue
        one = _split(single.ids, single.sequence_ids, 1)
        two = _split(pair.ids, pair.sequence_ids, 2)
        types = _split(pair.type_ids, pair.sequence_ids, 2)
        if one is not None and two is not None and types is not None:
            return SpecialFrame(
                (one[0], one[2]),
                (two[0], two[2], two[4]),
                (types[0], types[1][:1], types[2], types[3][:1], types[4]),
            )
    return SpecialFrame(((), ()), ((), (), ()), ((), (0,), (), (0,), ()))


def lower_texts(tokenizer: Any) -> None:
    """Put a lower-casing step before the normalizer of a `tokenizers.Tokenizer`."""
    from tokenizers import normalizers

    steps = [normalizers.Lowercase()]
    if tokenizer.normalizer is not None:
        steps.append(tokenizer.normalizer)
    tokenizer.normalizer = normalizers.Sequence(steps)


def _probes(tokenizer: Any) -> Iterator[str]:
    yield from _PROBES
    for token_id in range(min(tokenizer.get_vocab_size(), _MAX_TRIED_TOKENS)):
        text = tokenizer.id_to_token(token_id)
        if text:
            yield text


def _encoding(tokenizer: Any, *texts: str) -> Any:
    """Return the encoding with special tokens, None if the vocabulary cannot encode the texts."""
    try:
        return tokenizer.encode(*texts, add_special_tokens=True)
    except BaseException as problem:
        if not (isinstance(problem, Exception) or is_panic(problem)):
            raise
        return None


def _split(
    values: Sequence[int], sequence_ids: Sequence[int | None], texts: int
) -> list[tuple[int, ...]] | None:
    """Split `values` into special tokens and texts, alternating; None if a text has no tokens."""
    parts: list[tuple[int, ...]] = []
    position = 0
    for text in range(texts):
        places = [at for at, owner in enumerate(sequence_ids) if owner == text]
        if not places:
            return None
        parts += [tuple(values[position : places[0]]), tuple(values[places[0] : places[-1] + 1])]
        position = places[-1] + 1
    return [*parts, tuple(values[position:])]
