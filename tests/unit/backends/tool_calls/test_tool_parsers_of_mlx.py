"""Compares our tool-call parsers with mlx-lm's, for families that it supports."""

import importlib
import json
from collections.abc import Mapping
from typing import Any

import pytest

from backends.tool_calls.families import FAMILIES
from core.types import ToolCallDelta
from tests.tool_forms import TOOLS, Answer, written

pytest.importorskip("mlx_lm")

PEERS = {
    "hermes": "json_tools",
    "qwen3_coder": "qwen3_coder",
    "glm4": "glm47",
    "longcat": "longcat",
    "minimax_m2": "minimax_m2",
    "kimi_k2": "kimi_k2",
    "mistral": "mistral",
    "mistral_json": "mistral",
    "function_gemma": "function_gemma",
    "gemma4": "gemma4",
    "lfm2": "pythonic",
}
ARGUMENTS: Mapping[str, Mapping[str, Any]] = {
    "plain": {"path": "a.txt", "count": 3},
    "unicode": {"path": "日本/ñ 🦉"},
    "lines": {"text": "one\ntwo"},
    "list": {"lines": ["a", "b"]},
}


# mlx-lm reads no lists in function-gemma's notation.
PAIRS = [
    (family, case)
    for family in PEERS
    for case in ARGUMENTS
    if (family, case) != ("function_gemma", "list")
]


@pytest.mark.parametrize(("family", "case"), PAIRS)
def test_call_is_understood_as_by_mlx_lm(family: str, case: str) -> None:
    peer = importlib.import_module(f"mlx_lm.tool_parsers.{PEERS[family]}")
    raw = written(family, Answer([("edit_file", ARGUMENTS[case])])).strip()
    parser = FAMILIES[family].parser(TOOLS)
    pieces = [p for p in parser.push(raw) + parser.flush() if isinstance(p, ToolCallDelta)]
    ours = (pieces[0].name, json.loads("".join(piece.arguments for piece in pieces)))
    tools = [
        {"type": "function", "function": {"name": tool.name, "parameters": tool.parameters}}
        for tool in TOOLS
    ]
    inner = raw.removeprefix(peer.tool_call_start).removesuffix(peer.tool_call_end)
    found = peer.parse_tool_call(inner, tools)
    theirs = found[0] if isinstance(found, list) else found
    arguments = theirs["arguments"]
    arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    assert ours == (theirs["name"], arguments) == ("edit_file", dict(ARGUMENTS[case]))
