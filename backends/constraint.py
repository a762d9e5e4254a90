"""Constrained decoding for every token-level format, with llguidance."""

import json
from collections.abc import Mapping, Sequence

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from numpy.typing import NDArray

from backends.base import Constraint
from core.errors import UnsupportedParameter
from core.types import JsonValue, Tool

# Weak models loop on free whitespace, so JSON is written compactly.
_JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def json_constraint(
    schema: Mapping[str, JsonValue] | None, *, reasoning: str | None = None
) -> Constraint:
    """Return what makes the answer JSON valid for `schema`, or any object without one.

    `reasoning` is the text that ends the model's reasoning, which then may go first.
    """
    return _lark(f"%json {_styled(schema or {'type': 'object'})}", reasoning, "response_format")


def call_constraint(
    tools: Sequence[Tool], opening: str, closing: str, *, reasoning: str | None = None
) -> Constraint:
    """Return what makes the answer one call of one of `tools`, between its two tags."""
    calls = []
    for tool in tools:
        arguments: JsonValue = dict(tool.parameters) or {"type": "object"}
        # Definitions are looked up from the root, so they move there.
        definitions = arguments.pop("$defs", None) if isinstance(arguments, dict) else None
        call: dict[str, JsonValue] = {
            "type": "object",
            "properties": {"name": {"const": tool.name}, "arguments": arguments},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        if definitions is not None:
            call["$defs"] = definitions
        calls.append(f"%json {_styled(call)}")
    body = " | ".join(f"call{index}" for index in range(len(calls)))
    rules = "\n".join(f"call{index}: {call}" for index, call in enumerate(calls))
    text = f"{_quoted(opening)} ({body}) {_quoted(closing)}"
    return _lark(text, reasoning, "tools", rules)


def _lark(answer: str, reasoning: str | None, param: str, rules: str = "") -> Constraint:
    start, extra = "answer", ""
    if reasoning is not None:
        # Lazily up to the closing tag: the answer begins right after it.
        start = "thought answer"
        extra = f"thought[suffix={_quoted(reasoning)}]: /(.|\\n)*/\n"
    grammar = f"start: {start}\n{extra}answer: {answer}\n{rules}\n"
    return Constraint(LLMatcher.grammar_from_lark(grammar), param)


def _styled(schema: Mapping[str, JsonValue]) -> str:
    return json.dumps({**schema, "x-guidance": _JSON_STYLE}, ensure_ascii=False)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


class GrammarMask:
    """One sequence's place in its grammar; implements `backends.base.TokenMask`."""

    def __init__(self, tokenizer: LLTokenizer, constraint: Constraint) -> None:
        """Compile; bounded by llguidance's own limits.  Raises UnsupportedParameter."""
        self._matcher = LLMatcher(tokenizer, constraint.grammar)
        problem = self._matcher.get_error()
        if problem:
            raise UnsupportedParameter(
                f"The {constraint.param} cannot be enforced: {problem[:500]}",
                param=constraint.param,
            )
        words = (tokenizer.vocab_size + 31) // 32
        self._bits = np.zeros(words, np.int32)

    def apply(self, logits: NDArray[np.float32]) -> None:
        """Set the logits of the tokens that may not come next to -inf, in place."""
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        allowed = np.unpackbits(self._bits.view(np.uint8), bitorder="little")[: len(logits)]
        logits[: len(allowed)][allowed == 0] = -np.inf
        logits[len(allowed) :] = -np.inf

    def accept(self, token_id: int) -> None:
        """Move on past the chosen token."""
        self._matcher.consume_token(token_id)
