"""`/tokenize`, `/detokenize` and `/apply-template`, as clients of llama.cpp and vLLM use them."""

from typing import Any

import httpx
import pytest

from core.errors import BrokenModel
from core.types import Capability, ChatPrompt, TextPrompt, TokenizeOptions, TokenPrompt
from router.app import create_app
from tests.fakes import CHAT_MODEL, EMBEDDING_MODEL, FakeDispatcher, make_services, make_view
from tests.live_server import client_of, error_of

HI = [{"role": "user", "content": "hi"}]
RESIDENT = make_view(state="resident")
PATHS = ["/tokenize", "/detokenize", "/apply-template"]
BODIES: dict[str, dict[str, Any]] = {
    "/tokenize": {"content": "hi"},
    "/detokenize": {"tokens": [104, 105]},
    "/apply-template": {"messages": HI},
}


async def post(
    path: str, body: Any, dispatcher: FakeDispatcher | None = None, **services: Any
) -> httpx.Response:
    services.setdefault("views", [RESIDENT])
    async with client_of(create_app(make_services(dispatcher, **services))) as client:
        return await client.post(path, json=body)


async def test_llama_cpp_tokenizes_content_without_a_model() -> None:
    dispatcher = FakeDispatcher()
    answer = (await post("/tokenize", {"content": "hi"}, dispatcher)).json()
    assert answer["tokens"] == [104, 105]
    options = TokenizeOptions(add_special=False, parse_special=True)
    assert dispatcher.tokenized == [(CHAT_MODEL, TextPrompt("hi"), options)]


async def test_llama_cpp_gets_pieces_and_bytes_of_parts_of_characters() -> None:
    answer = (await post("/tokenize", {"content": "aé", "with_pieces": True})).json()
    assert answer["tokens"] == [
        {"id": 97, "piece": "a"},
        {"id": 195, "piece": [195]},
        {"id": 169, "piece": [169]},
    ]


async def test_vllm_tokenizes_a_prompt() -> None:
    dispatcher = FakeDispatcher()
    body = {"model": CHAT_MODEL, "prompt": "hi", "return_token_strs": True}
    answer = (await post("/tokenize", body, dispatcher)).json()
    assert answer == {
        "tokens": [104, 105],
        "count": 2,
        "max_model_len": 2048,
        "token_strs": ["h", "i"],
    }
    assert dispatcher.tokenized[0][2] == TokenizeOptions(add_special=True, parse_special=True)


async def test_vllm_tokenizes_messages_with_tools_and_template_variables() -> None:
    dispatcher = FakeDispatcher()
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    body = {
        "model": CHAT_MODEL,
        "messages": HI,
        "tools": [tool],
        "add_generation_prompt": True,
        "chat_template_kwargs": {"a": 1},
    }
    answer = (await post("/tokenize", body, dispatcher)).json()
    assert answer["count"] == len("user: hi\n")
    prompt = dispatcher.tokenized[0][1]
    assert isinstance(prompt, ChatPrompt)
    assert [one.name for one in prompt.tools] == ["f"]
    assert prompt.template_kwargs == {"a": 1}


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({"content": "a", "add_special": True}, TokenizeOptions()),
        ({"content": "a", "parse_special": False}, TokenizeOptions(False, False)),
        ({"prompt": "a", "add_special_tokens": False}, TokenizeOptions(False, True)),
        ({"prompt": "", "add_special_tokens": True}, TokenizeOptions()),
    ],
)
async def test_special_tokens_are_as_asked(fields: Any, options: TokenizeOptions) -> None:
    dispatcher = FakeDispatcher()
    assert (await post("/tokenize", fields, dispatcher)).status_code == 200
    assert dispatcher.tokenized[0][2] == options


async def test_tokens_become_text_under_both_names() -> None:
    dispatcher = FakeDispatcher()
    answer = await post("/detokenize", {"tokens": [104, 105]}, dispatcher)
    assert answer.json() == {"content": "hi", "prompt": "hi"}
    assert dispatcher.tokenized[0][1] == TokenPrompt((104, 105))
    nothing = await post("/detokenize", {"tokens": []})
    assert nothing.json() == {"content": "", "prompt": ""}


async def test_template_is_applied() -> None:
    answer = await post("/apply-template", {"messages": HI, "max_tokens": 5, "temperature": 0})
    assert (answer.status_code, answer.json()) == (200, {"prompt": "user: hi\n"})


@pytest.mark.parametrize("path", PATHS)
async def test_model_may_be_left_out_only_if_one_is_meant(path: str) -> None:
    embedder = make_view(
        EMBEDDING_MODEL, state="resident", capabilities=frozenset({Capability.EMBEDDING})
    )
    waiting = make_view("other@gguf-f16", aliases=())
    one = await post(path, BODIES[path], views=[RESIDENT, embedder, waiting])
    none = await post(path, BODIES[path], views=[waiting, embedder])
    second = make_view("other@gguf-f16", state="resident", aliases=())
    two = await post(path, BODIES[path], views=[RESIDENT, second])
    assert one.status_code == 200
    for answer, said in ((none, "as 0 models"), (two, f"are loaded: {CHAT_MODEL}")):
        assert (answer.status_code, error_of(answer)["param"]) == (400, "model")
        assert said in error_of(answer)["message"]


@pytest.mark.parametrize("path", PATHS)
async def test_models_that_do_not_fit_are_refused(path: str) -> None:
    unknown = await post(path, {**BODIES[path], "model": "nobody"})
    assert error_of(unknown)["code"] == "model_not_found"
    embedder = make_view(EMBEDDING_MODEL, capabilities=frozenset({Capability.EMBEDDING}))
    wrong = await post(path, {**BODIES[path], "model": EMBEDDING_MODEL}, views=[embedder])
    assert error_of(wrong)["code"] == "unsupported_capability"
    dispatcher = FakeDispatcher()
    dispatcher.count_error = BrokenModel("Damaged.")
    broken = await post(path, BODIES[path], dispatcher)
    assert (broken.status_code, error_of(broken)["code"]) == (422, "broken_model")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "content"),
        ("/tokenize", {"content": "a", "prompt": "b"}, "prompt"),
        ("/tokenize", {"prompt": "b", "messages": HI}, "messages"),
        ("/tokenize", {"content": 5}, "content"),
        ("/tokenize", {"content": "a", "with_pieces": "yes"}, "with_pieces"),
        ("/tokenize", {"messages": HI, "add_generation_prompt": False}, "add_generation_prompt"),
        ("/tokenize", {"content": "a", "model": ""}, "model"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "hi"}, "tokens"),
        ("/detokenize", {"tokens": [1, -1]}, "tokens[1]"),
        ("/detokenize", {"tokens": [2**31]}, "tokens[0]"),
        ("/detokenize", {"tokens": [True]}, "tokens[0]"),
        ("/apply-template", {}, "messages"),
        ("/apply-template", {"messages": []}, "messages"),
        ("/apply-template", {"messages": [{"role": "nobody", "content": "a"}]}, "messages[0].role"),
    ],
)
async def test_wrong_bodies_are_refused_by_name(path: str, body: Any, param: str) -> None:
    answer = await post(path, body)
    assert answer.status_code == 400
    assert error_of(answer)["param"] == param


async def test_unknown_fields_are_named_in_the_header() -> None:
    for path in PATHS:
        answer = await post(path, {**BODIES[path], "wish": 1})
        assert answer.headers["x-impetus-ignored"] == "wish"


async def test_these_paths_need_the_key() -> None:
    for path in PATHS:
        assert (await post(path, BODIES[path], api_key="secret")).status_code == 401
