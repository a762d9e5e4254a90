"""Values that clients send to every server: read as they are meant, or ignored and named."""

import json
from typing import Any

import pytest

from core.errors import RequestError, UnsupportedParameter
from core.types import Capability, ChatPrompt, JsonOutput, JsonValue, TokenRules
from router.app import create_app
from router.requests.body import parse_request
from router.requests.fields import RequestBody
from router.requests.other_fields import HINTS, REFUSED
from router.v1.chat.request import ChatRequest
from router.v1.completions import CompletionRequest
from router.v1.messages.request import MessagesRequest
from router.v1.responses.request import ResponsesRequest
from tests.fakes import CHAT_MODEL, FakeDispatcher, make_services, make_view
from tests.live_server import client_of

MESSAGES = [{"role": "user", "content": "hi"}]
APIS: dict[str, tuple[type[RequestBody], dict[str, Any]]] = {
    "chat": (ChatRequest, {"model": "m", "messages": MESSAGES}),
    "completions": (CompletionRequest, {"model": "m", "prompt": "hi"}),
    "responses": (ResponsesRequest, {"model": "m", "input": "hi"}),
    "messages": (MessagesRequest, {"model": "m", "messages": MESSAGES, "max_tokens": 9}),
}
OPENAI = ("chat", "completions", "responses")
LIMITS = {"chat": "max_tokens", "completions": "max_tokens", "responses": "max_output_tokens"}


def read(api: str, **fields: Any) -> Any:
    model, base = APIS[api]
    return parse_request(json.dumps({**base, **fields}).encode(), model)


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("value", [0, 0.0, 1, 1.0])
def test_top_p_takes_both_ends_of_its_range(api: str, value: float) -> None:
    assert read(api, top_p=value).top_p == value


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("value", [-0.1, 1.1])
def test_top_p_outside_its_range_is_refused(api: str, value: float) -> None:
    with pytest.raises(RequestError) as caught:
        read(api, top_p=value)
    assert caught.value.param == "top_p"


@pytest.mark.parametrize("api", OPENAI)
@pytest.mark.parametrize("value", [-1, -1.0])
def test_limit_of_minus_one_is_no_limit(api: str, value: float) -> None:
    name = LIMITS[api]
    without = read(api)
    body = read(api, **{name: value})
    assert getattr(body, name) is None
    assert body.ignored_names() == []
    if api != "responses":
        assert body.token_limit == without.token_limit


@pytest.mark.parametrize("api", OPENAI)
@pytest.mark.parametrize("value", [-2, -1.5, 5.5, 2**31, 1e300])
def test_limit_that_means_nothing_is_refused(api: str, value: float) -> None:
    with pytest.raises(RequestError) as caught:
        read(api, **{LIMITS[api]: value})
    assert caught.value.param == LIMITS[api]


@pytest.mark.parametrize(
    ("api", "name"),
    [
        ("chat", "max_tokens"), ("chat", "max_completion_tokens"), ("chat", "n"),
        ("chat", "seed"), ("chat", "top_k"), ("chat", "top_logprobs"), ("chat", "thinking_budget"),
        ("completions", "max_tokens"), ("completions", "n"), ("completions", "seed"),
        ("completions", "logprobs"), ("responses", "max_output_tokens"),
        ("responses", "top_logprobs"), ("messages", "max_tokens"), ("messages", "top_k"),
    ],
)  # fmt: skip
def test_integer_may_be_written_with_a_point(api: str, name: str) -> None:
    value = getattr(read(api, **{name: 5.0}, **({"logprobs": True} if api == "chat" else {})), name)
    assert (value, type(value)) == (5, int)


def test_float_that_has_lost_digits_is_no_integer() -> None:
    with pytest.raises(RequestError):
        read("chat", seed=2.0**60)


@pytest.mark.parametrize("api", OPENAI)
def test_service_tier_of_any_name_is_ignored_and_named(api: str) -> None:
    assert read(api, service_tier="fastest").ignored_names() == ["service_tier"]
    assert read(api, service_tier="flex").ignored_names() == []
    with pytest.raises(RequestError):
        read(api, service_tier="x" * 65)


@pytest.mark.parametrize("api", OPENAI)
def test_stops_are_bounded(api: str) -> None:
    assert len(read(api, stop=[f"s{index}" for index in range(64)]).stop) == 64
    with pytest.raises(RequestError):
        read(api, stop=["x"] * 65)


def test_verbosity_is_ignored_and_named() -> None:
    assert read("chat", verbosity="low").ignored_names() == ["verbosity"]


def test_no_alternatives_need_no_logprobs() -> None:
    assert read("chat", top_logprobs=0).logprob_count is None
    assert read("chat", top_logprobs=0, logprobs=True).logprob_count == 0


@pytest.mark.parametrize(
    ("sent", "meant"),
    [
        ({"type": "auto"}, "auto"),
        ({"type": "none"}, "none"),
        ({"type": "required"}, "required"),
        ({"type": "any"}, "required"),
        ({"type": "function", "name": "f"}, ("function", "f")),
        ({"type": "tool", "name": "f"}, ("function", "f")),
    ],
)
def test_tool_choice_is_read_in_the_other_apis_shapes(sent: Any, meant: Any) -> None:
    assert read("chat", tool_choice=sent).tool_choice == meant


EFFORTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "chat": ("/v1/chat/completions", {"reasoning_effort": "minimal"}, "reasoning_effort"),
    "chat, OpenRouter's": (
        "/v1/chat/completions",
        {"reasoning": {"effort": "low"}},
        "reasoning.effort",
    ),
    "responses": ("/v1/responses", {"reasoning": {"effort": "low"}}, "reasoning.effort"),
    "messages": ("/v1/messages", {"output_config": {"effort": "low"}}, "output_config.effort"),
}


@pytest.mark.parametrize("form", EFFORTS)
@pytest.mark.parametrize("reasons", [False, True])
async def test_effort_is_named_as_ignored_by_a_model_that_does_not_reason(
    form: str, reasons: bool
) -> None:
    path, fields, name = EFFORTS[form]
    _, base = APIS[form.partition(",")[0]]
    known = {Capability.CHAT, *([Capability.REASONING] if reasons else [])}
    dispatcher = FakeDispatcher()
    services = make_services(dispatcher, views=[make_view(capabilities=frozenset(known))])
    async with client_of(create_app(services)) as client:
        answer = await client.post(path, json={**base, **fields, "model": CHAT_MODEL})
    assert answer.status_code == 200, answer.text
    assert answer.headers.get("x-impetus-ignored") == (None if reasons else name)
    prompt = dispatcher.requests[0].prompt
    assert isinstance(prompt, ChatPrompt)
    if not reasons:
        assert prompt.reasoning_effort is None
    elif path.endswith("completions"):
        assert prompt.reasoning_effort == "minimal" if form == "chat" else "low"


@pytest.mark.parametrize("fields", [{"thinking_budget": 5}, {"reasoning": {"max_tokens": 5}}])
async def test_budget_of_reasoning_is_kept_by_a_model_that_does_not_reason(
    fields: dict[str, Any],
) -> None:
    dispatcher = FakeDispatcher()
    body = {**APIS["chat"][1], **fields, "model": CHAT_MODEL}
    async with client_of(create_app(make_services(dispatcher))) as client:
        answer = await client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200
    prompt = dispatcher.requests[0].prompt
    assert isinstance(prompt, ChatPrompt)
    assert prompt.reasoning_tokens is None


ON: dict[str, Any] = {
    "add_generation_prompt": False, "skip_special_tokens": False, "n": 2, "min_tokens": 3,
    "truncate_prompt_tokens": 5, "prompt_logprobs": 1, "json_schema": {"type": "object"},
    "response_format": {"type": "json_object"}, "stop": ["x"], "stop_sequences": ["x"],
    "structured_outputs": {"regex": "a"}, "documents": [{"text": "x"}], "guided_json": {},
    "stop_token_ids": [2], "allowed_token_ids": [2], "bad_words": ["x"], "guided_choice": ["a"],
}  # fmt: skip


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("name", REFUSED)
def test_field_that_changes_the_answer_is_read_or_refused_but_never_dropped(
    api: str, name: str
) -> None:
    model, _ = APIS[api]
    if name in model.model_fields:
        return
    text = name in ("ebnf", "format", "grammar", "guided_grammar", "guided_regex", "regex")
    with pytest.raises(UnsupportedParameter) as caught:
        read(api, **{name: ON.get(name, "x" if text else True)})
    assert caught.value.param == name
    for off in (None, *REFUSED[name]):
        assert name not in read(api, **{name: off}).ignored_names()


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("name", HINTS)
def test_hint_is_ignored_and_named(api: str, name: str) -> None:
    if name in APIS[api][0].model_fields:
        assert read(api, **{name: True}).ignored_names() == []
        return
    assert read(api, **{name: "on"}).ignored_names() == [name]


@pytest.mark.parametrize("api", APIS)
def test_what_happens_anyway_is_not_called_ignored(api: str) -> None:
    assert read(api, cache_prompt=True).ignored_names() == []
    is_read = api in ("chat", "completions")
    ignored = [] if is_read else ["cache_prompt"]
    assert read(api, cache_prompt=False).ignored_names() == ignored


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize(("sent", "reads"), [(False, False), (True, True), (None, True)])
async def test_prompt_is_computed_whole_where_asked(
    path: str, sent: bool | None, reads: bool
) -> None:
    dispatcher = FakeDispatcher()
    base = APIS["chat" if "chat" in path else "completions"][1]
    async with client_of(create_app(make_services(dispatcher))) as client:
        answer = await client.post(path, json={**base, "model": CHAT_MODEL, "cache_prompt": sent})
    assert answer.status_code == 200, answer.text
    assert [request.reads_cache for request in dispatcher.requests] == [reads]


RULES: dict[str, tuple[Any, Any]] = {
    "ignore_eos": (True, True),
    "min_tokens": (3.0, 3),
    "stop_token_ids": ([2, 7], (2, 7)),
    "bad_words": (["Möwe", " x"], ("Möwe", " x")),
}


@pytest.mark.parametrize("api", ["chat", "completions"])
@pytest.mark.parametrize("name", RULES)
def test_rules_of_tokens_are_read(api: str, name: str) -> None:
    sent, meant = RULES[name]
    body = read(api, **{name: sent})
    assert body.rules() == TokenRules(**{name: meant})
    assert body.ignored_names() == []
    for off in (None, *REFUSED[name]):
        assert read(api, **{name: off}).rules() is None


@pytest.mark.parametrize("api", ["chat", "completions"])
async def test_rules_of_tokens_reach_the_engine(api: str) -> None:
    path = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}[api]
    dispatcher = FakeDispatcher()
    fields = {name: sent for name, (sent, _) in RULES.items()}
    async with client_of(create_app(make_services(dispatcher))) as client:
        answer = await client.post(path, json={**APIS[api][1], "model": CHAT_MODEL, **fields})
        plain = await client.post(path, json={**APIS[api][1], "model": CHAT_MODEL})
    assert answer.status_code == plain.status_code == 200, answer.text
    first, second = dispatcher.requests
    assert first.rules == TokenRules(**{name: meant for name, (_, meant) in RULES.items()})
    assert second.rules is None


@pytest.mark.parametrize(
    ("api", "fields"),
    [
        ("chat", {"max_tokens": 5, "min_tokens": 6}),
        ("chat", {"max_completion_tokens": 5, "min_tokens": 6}),
        ("completions", {"max_tokens": 5, "min_tokens": 6}),
        ("completions", {"min_tokens": 17}),
    ],
)
def test_answer_that_must_be_longer_than_its_limit_is_refused(
    api: str, fields: dict[str, Any]
) -> None:
    with pytest.raises(RequestError) as caught:
        read(api, **fields).rules()
    assert caught.value.param == "min_tokens"
    assert read(api, **{**fields, "min_tokens": 5}).rules() == TokenRules(min_tokens=5)


@pytest.mark.parametrize("api", OPENAI)
def test_biases_are_read_in_llama_cpps_pairs(api: str) -> None:
    assert read(api, logit_bias=[[5, -1.5], ["6", False]]).logit_bias == {5: -1.5, 6: -100.0}
    assert read(api, logit_bias={"6": False}).logit_bias == {6: -100.0}
    assert read(api, logit_bias=[]).logit_bias == {}


@pytest.mark.parametrize("api", OPENAI)
def test_repeat_penalty_is_llama_cpps_name_of_the_penalty(api: str) -> None:
    body = read(api, repeat_penalty=1.5)
    assert body.sampling(top_logprobs=None).repetition_penalty == 1.5
    assert body.ignored_names() == []
    with pytest.raises(RequestError) as caught:
        read(api, repeat_penalty=0)
    assert caught.value.param == "repeat_penalty"


@pytest.mark.parametrize("kind", ["json_object", "json_schema"])
def test_schema_beside_the_type_is_enforced(kind: str) -> None:
    schema: dict[str, JsonValue] = {"type": "object", "required": ["a"]}
    for api in ("chat", "completions"):
        body = read(api, response_format={"type": kind, "schema": schema})
        assert body.output() == JsonOutput(schema)
        twice = {"type": kind, "schema": schema, "json_schema": {"schema": {"type": "array"}}}
        with pytest.raises(RequestError) as caught:
            read(api, response_format=twice).output()
        assert caught.value.param == "response_format.schema"


def test_bound_inside_structured_outputs_is_refused() -> None:
    with pytest.raises(UnsupportedParameter) as caught:
        read("chat", structured_outputs={"structural_tag": "root ::= x"}).output()
    assert caught.value.param == "structured_outputs.structural_tag"
