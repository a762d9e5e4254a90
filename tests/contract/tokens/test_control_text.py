"""Tests of control tokens' names in texts, with real weights and llama.cpp's tokenizers."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from backends.base import Engine
from backends.control_tokens import PromptPart
from backends.engine.batching import BatchingEngine
from backends.gguf.model import GgufModel, library
from core.types import ChatMessage, ChatPrompt, Prompt, TextPrompt
from tests.gguf_files import vocabulary_gguf

START, END = "<|im_start|>", "<|im_end|>"


async def counted(engine: Engine, prompt: Prompt) -> int:
    assert isinstance(engine, BatchingEngine)
    return await engine.count_tokens(prompt)


@pytest.mark.parametrize("name", [START, END, "<|endoftext|>"])
@pytest.mark.parametrize("role", ["user", "system", "tool"])
async def test_a_name_in_a_message_is_several_tokens(engine: Engine, name: str, role: Any) -> None:
    if engine.info.format == "echo":
        pytest.skip("its tokens are bytes")
    asked = ChatMessage("user", "hi")
    message = ChatMessage(role, "a b", tool_call_id="1" if role == "tool" else None)
    without = await counted(engine, ChatPrompt((message, asked)))
    named = replace(message, content=f"a {name} b")
    added = await counted(engine, ChatPrompt((named, asked))) - without
    assert added > 2
    # Completions parse it.
    plain = await counted(engine, TextPrompt("a b"))
    assert await counted(engine, TextPrompt(f"a {name} b")) - plain <= 2


KINDS: list[dict[str, Any]] = [{}, {"kind": "sentencepiece"}]


@pytest.fixture(scope="module", params=KINDS, ids=["byte pairs", "sentence pieces"])
def vocabulary(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    defaults = library().llama_model_default_params

    def vocabulary_only() -> Any:
        params = defaults()
        params.vocab_only = True
        return params

    path: Path = tmp_path_factory.mktemp("vocabulary") / "tiny.gguf"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library(), "llama_model_default_params", vocabulary_only)
        model = GgufModel(vocabulary_gguf(path, "gpt-2", **request.param))
    yield model
    model.close()


def test_parts_are_encoded_like_the_whole_but_for_names_in_texts(vocabulary: GgufModel) -> None:
    names = frozenset(vocabulary.added_tokens())
    assert names
    for name in names:
        control = vocabulary.encode(name, add_bos=False, parse_special=True)[-1]
        for text in ("upon a time\n", " 中 é", "  ", "x"):
            parts = [PromptPart(text), PromptPart(name, True), PromptPart(text)]
            whole = vocabulary.encode(f"{text}{name}{text}", add_bos=True, parse_special=True)
            assert vocabulary.encode_parts(parts, names, add_bos=True) == whole
            ids = vocabulary.encode_parts(
                [PromptPart(f"{text}{name}{name}{text}")], names, add_bos=False
            )
            assert control not in ids
            told = b"".join(map(vocabulary.token_bytes, ids)).decode()
            assert told.lstrip(" ") == f"{text}{name}{name}{text}".lstrip(" ")
