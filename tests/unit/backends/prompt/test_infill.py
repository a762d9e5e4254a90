"""Tests of fill-in-the-middle tokens and prompts."""

from pathlib import Path
from typing import Any

import pytest

from backends.echo import ByteTokenizer, echo_info
from backends.gguf.file import gguf_info
from backends.hf.tokenizer import HfTokenizer
from backends.prompt.chat_format import ChatFormat
from backends.prompt.infill import InfillTokens, find_infill, infill_details, read_infill
from backends.prompt.prepare import Preparer
from core.errors import UnsupportedParameter
from core.types import Capability, InfillPrompt, TextPrompt, TokenPrompt
from tests.gguf_raw import minimal_gguf
from tests.requests import chat, request
from tests.unit.backends.hf.test_hf_folder import info, model, write_json
from tests.unit.backends.hf.test_hf_tokenizer import tiny

QWEN = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
PROMPT = InfillPrompt("ab", "yz")


def preparer(infill: InfillTokens | None) -> Preparer:
    return Preparer(
        echo_info(),
        ByteTokenizer(),
        ChatFormat(None, "", ""),
        context_tokens=64,
        infill=infill,
    )


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (InfillTokens(1, 2, 3), (1, 97, 98, 2, 121, 122, 3)),
        (InfillTokens(1, 2, None), (2, 121, 122, 1, 97, 98)),
    ],
)
def test_prompt_has_the_order_of_its_family(tokens: InfillTokens, expected: Any) -> None:
    assert preparer(tokens).prepare(request(PROMPT)).prompt == expected


def test_model_without_the_tokens_refuses_the_suffix() -> None:
    with pytest.raises(UnsupportedParameter) as caught:
        preparer(None).prepare(request(PROMPT))
    assert caught.value.param == "suffix"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (TextPrompt("abc"), 3),
        (TokenPrompt((5, 6)), 2),
        (PROMPT, 7),
        (chat("hi"), len("User: hi\nAssistant:")),
        (TextPrompt("x" * 1000), 1000),
    ],
)
def test_count_is_the_length_that_generation_would_have(prompt: Any, expected: int) -> None:
    subject = preparer(InfillTokens(1, 2, 3))
    assert subject.count(prompt) == expected
    if expected < subject.context_tokens:
        assert len(subject.prepare(request(prompt)).prompt) == expected


def test_details_keep_the_tokens() -> None:
    for tokens in (None, InfillTokens(4, 5, 6), InfillTokens(4, 5, None)):
        assert read_infill(infill_details(tokens)) == tokens


@pytest.mark.parametrize(
    ("tokens", "metadata", "expected"),
    [
        (["a", *QWEN], {}, InfillTokens(1, 2, 3)),
        (["a", "<｜fim▁end｜>", "<｜fim▁hole｜>", "<｜fim▁begin｜>"], {}, InfillTokens(3, 2, 1)),
        (["a", "[SUFFIX]", "[PREFIX]"], {}, InfillTokens(2, 1, None)),
        (["a", *QWEN[:2]], {}, None),
        (["a", "b", "c", "d"], {"fim_pre": 3, "fim_suf": 1, "fim_mid": 2}, InfillTokens(3, 1, 2)),
        (["a", "b", "c", "d"], {"prefix": 3, "suffix": 1, "middle": 2}, InfillTokens(3, 1, 2)),
        (["a", "[PREFIX]", "c", "d"], {"prefix": 1, "suffix": 2, "middle": 3},
         InfillTokens(1, 2, None)),
        (["a", "b", "c", "d"], {"fim_pre": 9, "fim_suf": 1, "fim_mid": 2}, None),
    ],
)  # fmt: skip
def test_gguf_file_names_its_tokens(
    tmp_path: Path, tokens: list[str], metadata: dict[str, int], expected: InfillTokens | None
) -> None:
    more: dict[str, Any] = {f"tokenizer.ggml.{key}_token_id": v for key, v in metadata.items()}
    found = gguf_info(minimal_gguf(tmp_path / "m.gguf", **more, tokenizer__ggml__tokens=tokens))
    assert read_infill(found.details) == expected
    assert (Capability.INFILL in found.capabilities) == (expected is not None)


def test_folder_with_the_tokens_can_fill_in(tmp_path: Path) -> None:
    listed = {str(number): {"content": name} for number, name in enumerate(QWEN)}
    folder = model(tmp_path / "listed")
    write_json(folder / "tokenizer_config.json", {"added_tokens_decoder": listed})
    assert Capability.INFILL in info(folder).capabilities
    write_json(folder / "tokenizer_config.json", {"added_tokens_decoder": {}})
    assert Capability.INFILL not in info(folder).capabilities


def test_tokenizer_file_alone_tells_the_tokens(tmp_path: Path) -> None:
    folder = model(tmp_path / "m")
    tiny(special=("<|end|>", *QWEN)).save(str(folder / "tokenizer.json"))
    assert Capability.INFILL in info(folder).capabilities
    tokenizer = HfTokenizer(folder)
    tokens = find_infill(tokenizer.special_id)
    assert tokens is not None
    prompt = tokens.token_ids(InfillPrompt("say <|fim_suffix|>", "end"), tokenizer)
    ids = [tokenizer.special_id(name) for name in QWEN]
    assert [token_id for token_id in prompt if token_id in ids] == ids
