"""Recognises the inputs and outputs of Core ML language models and encoders."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.coreml.spec import CoremlSpec, Feature, broken

# Source: swift-transformers, LanguageModel.swift, and apple/mistral-coreml.
_TOKENS = ("inputIds", "input_ids")
_CAUSAL = ("causalMask", "causal_mask", "fullAttentionMask")
_SLIDING = "slidingAttentionMask"
_PADDING = ("attentionMask", "attention_mask")
_TYPES = ("token_type_ids", "tokenTypeIds")
_LOGITS = ("logits", "output_logits")
_WINDOW_KEY = "co.huggingface.exporters.sliding_window"
# The smallest float16; sums below it become -inf, which masks as well.
_MASKED = -65504.0
_ANEMLL = frozenset({"current_pos", "hidden_states", "output_hidden_states", "logits1"})


@dataclass(frozen=True, slots=True)
class Layout:
    """The names of a model's inputs and outputs, and the token counts that it accepts.

    `causal` is empty if the whole text is computed in each step; `types` and `padding` are empty
    if the model has no such input.  `lengths` are the only token counts allowed, None for any.
    """

    tokens: Feature
    output: str
    context: int
    lengths: tuple[int, ...] = ()
    causal: str = ""
    sliding: str = ""
    window: int = 0
    padding: str = ""
    types: str = ""
    is_encoder: bool = False

    def step_length(self, wanted: int) -> int:
        """Return how many of `wanted` tokens a stateful model computes at once."""
        fitting = [length for length in self.lengths if length <= wanted]
        return max(fitting) if self.lengths else wanted

    def padded_length(self, wanted: int) -> int:
        """Return the number of tokens with padding that a stateless model is given."""
        return min((n for n in self.lengths if n >= wanted), default=max(wanted, self.shortest))

    @property
    def shortest(self) -> int:
        """The smallest number of tokens that the model accepts."""
        return self.tokens.shortest(1)


def read_layout(spec: CoremlSpec, trained_context: int) -> Layout:
    """Return the layout of a model.  Raises BrokenModel, with the reason, for unsupported ones."""
    tokens = _first(spec.inputs, _TOKENS)
    if _ANEMLL & {*spec.inputs, *spec.outputs}:
        raise broken(
            spec.package,
            "it is one chunk of a split model; only models in one package are supported",
        )
    if tokens is None or len(tokens.bounds) != 2:
        raise broken(
            spec.package, "it has no input of token ids (inputIds), so it is not a text model"
        )
    causal = _first(spec.inputs, _CAUSAL)
    output = _first(spec.outputs, _LOGITS)
    padding = _first(spec.inputs, _PADDING)
    kinds = _first(spec.inputs, _TYPES)
    sliding = spec.inputs.get(_SLIDING)
    known = [feature.name for feature in (tokens, causal, padding, kinds, sliding) if feature]
    _refuse_others(spec, known)
    limits = [tokens.longest(1), trained_context]
    if spec.states:
        if causal is None or output is None:
            raise broken(spec.package, "it has a state but no causalMask, or it gives no logits")
        limits.append(_stateful_context(spec, tokens, causal))
    elif causal is not None:
        raise broken(spec.package, "it has an input causalMask but no state")
    elif output is None and padding is None and tokens.shortest(1) > 1:
        raise broken(spec.package, "it has a fixed length but no attention mask for shorter texts")
    return Layout(
        tokens=tokens,
        output=output.name if output is not None else _hidden_output(spec).name,
        context=min(limit for limit in limits if limit is not None),
        lengths=tokens.lengths(1),
        causal=causal.name if causal else "",
        sliding=sliding.name if sliding else "",
        window=_window(spec) if sliding else 0,
        padding=padding.name if padding else "",
        types=kinds.name if kinds else "",
        is_encoder=output is None,
    )


def _first(features: Mapping[str, Feature], names: Sequence[str]) -> Feature | None:
    return next((features[name] for name in names if name in features), None)


def _refuse_others(spec: CoremlSpec, known: Sequence[str]) -> None:
    for name, feature in spec.inputs.items():
        if name not in known and not feature.is_optional:
            raise broken(spec.package, f"its input {name!r} is unknown")


def _stateful_context(spec: CoremlSpec, tokens: Feature, causal: Feature) -> int | None:
    if len(causal.bounds) != 4 or causal.shortest(3) == causal.longest(3):
        raise broken(spec.package, "its causalMask is not of shape (1, 1, tokens, total)")
    if tokens.shortest(1) != 1:
        raise broken(
            spec.package,
            f"it computes at least {tokens.shortest(1)} tokens at once, so it cannot generate "
            "text token by token",
        )
    longest = causal.longest(3)
    if longest is not None:
        return longest
    shapes = [state.shape for state in spec.states.values()]
    return min((shape[-2] for shape in shapes if len(shape) > 2), default=None)


def _window(spec: CoremlSpec) -> int:
    text = spec.metadata.get(_WINDOW_KEY, "")
    if not (text.isdecimal() and int(text[:10]) > 0):
        raise broken(spec.package, f"it has a sliding mask but no {_WINDOW_KEY}")
    return int(text[:10])


def _hidden_output(spec: CoremlSpec) -> Feature:
    names = (
        "sentence_embedding", "embeddings", "embedding", "last_hidden_state", "hidden_states",
        "pooler_output",
    )  # fmt: skip
    output = _first(spec.outputs, names)
    if output is None and len(spec.outputs) == 1:
        (output,) = spec.outputs.values()
    if output is None:
        raise broken(spec.package, "it gives neither logits nor a vector per token or text")
    return output


def causal_mask(past: int, new: int, window: int = 0) -> NDArray[np.float16]:
    """Return the additive mask float16 (1, 1, new, past + new); sliding if `window` is set."""
    keys, queries = np.arange(past + new)[None], np.arange(past, past + new)[:, None]
    hidden = keys > queries
    if window:
        hidden |= keys <= queries - window
    return np.where(hidden, np.float16(_MASKED), np.float16(0))[None, None]


def token_inputs(layout: Layout, tokens: Sequence[int], length: int) -> dict[str, NDArray[Any]]:
    """Return the inputs of one row, padded to `length`, without the causal masks."""
    padding = length - len(tokens)
    inputs: dict[str, NDArray[Any]] = {
        layout.tokens.name: np.array([[*tokens, *[0] * padding]], np.int32)
    }
    if layout.padding:
        inputs[layout.padding] = np.array([[1] * len(tokens) + [0] * padding], np.int32)
    if layout.types:
        inputs[layout.types] = np.zeros((1, length), np.int32)
    return inputs
