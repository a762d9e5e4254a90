"""What the endpoints answer: shapes, usage, choices, errors, health and metrics."""

import base64
import struct
from dataclasses import replace
from typing import Any

import pytest
from openai.types import Completion, CreateEmbeddingResponse, Model
from openai.types.chat import ChatCompletion

from core.errors import (
    BrokenModel,
    ContextLengthExceeded,
    EngineFailed,
    ImpetusError,
    InsufficientMemory,
    QueueFull,
)
from core.types import (
    CacheOutcome,
    Capability,
    Finished,
    PrefillProgress,
    ReasoningDelta,
    TextDelta,
    TextPrompt,
    TokenLogprob,
    TokenPrompt,
    ToolCallDelta,
    Usage,
)
from router.app import create_app
from router.services import FitView
from tests.fakes import (
    CHAT_MODEL,
    EMBEDDING_MODEL,
    FakeCatalog,
    FakeDispatcher,
    finished,
    make_services,
    make_view,
)
from tests.live_server import client_of, error_of, sse_data
from tests.unit.router.api.test_router_api import FakeManagement

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
COMPLETION = {"model": "tiny", "prompt": "hi"}
LOGPROBS = (
    TokenLogprob(1, b"\xe2\x82", -0.5, (TokenLogprob(1, b"\xe2\x82", -0.5),)),
    TokenLogprob(2, b"\xac", float("-inf"), (TokenLogprob(3, b"x", float("nan")),)),
)


async def post(
    path: str, body: dict[str, Any], dispatcher: FakeDispatcher | None = None
) -> dict[str, Any]:
    async with client_of(create_app(make_services(dispatcher))) as client:
        response = await client.post(path, json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def test_chat_answers_in_openai_shape_with_exact_usage() -> None:
    dispatcher = FakeDispatcher(
        PrefillProgress(3, 7), TextDelta("Hel"), TextDelta("lo"), finished("length")
    )
    answer = await post("/v1/chat/completions", CHAT, dispatcher)
    completion = ChatCompletion.model_validate(answer)
    assert completion.model == CHAT_MODEL
    assert completion.choices[0].message.content == "Hello"
    assert completion.choices[0].finish_reason == "length"
    assert answer["usage"] == {
        "prompt_tokens": 7,
        "completion_tokens": 2,
        "total_tokens": 9,
        "prompt_tokens_details": {"cached_tokens": 3},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }
    request = dispatcher.requests[0]
    assert (request.id, request.model_id) == (answer["id"], CHAT_MODEL)
    assert request.deadline_s == 3600


async def test_chat_answers_reasoning_apart_and_tool_calls_with_null_content() -> None:
    dispatcher = FakeDispatcher(
        ReasoningDelta("hm"),
        ToolCallDelta(0, "c1", "weather", '{"ci'),
        ToolCallDelta(1, "c2", "time"),
        ToolCallDelta(0, arguments='ty":1}'),
        Finished("tool_calls", Usage(5, 9, 0, 4)),
    )
    answer = await post("/v1/chat/completions", CHAT, dispatcher)
    message = answer["choices"][0]["message"]
    assert message["content"] is None
    assert message["reasoning_content"] == "hm"
    assert [(call["id"], call["function"]) for call in message["tool_calls"]] == [
        ("c1", {"name": "weather", "arguments": '{"city":1}'}),
        ("c2", {"name": "time", "arguments": ""}),
    ]
    assert answer["choices"][0]["finish_reason"] == "tool_calls"
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": 4}
    ChatCompletion.model_validate(answer)


async def test_chat_with_n_runs_choices_of_their_own_and_counts_the_prompt_once() -> None:
    dispatcher = FakeDispatcher()
    dispatcher.scripts = {
        str(index): (TextDelta(f"answer {index}"), finished(completion=index + 1))
        for index in range(3)
    }
    answer = await post("/v1/chat/completions", {**CHAT, "n": 3, "seed": 5}, dispatcher)
    choices = [(choice["index"], choice["message"]["content"]) for choice in answer["choices"]]
    assert choices == [(0, "answer 0"), (1, "answer 1"), (2, "answer 2")]
    assert answer["usage"]["prompt_tokens"] == 7
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}
    assert answer["usage"]["completion_tokens"] == 6
    requests = sorted((request.id, request.sampling.seed) for request in dispatcher.requests)
    assert requests == [(f"{answer['id']}-{index}", 5 + index) for index in range(3)]


async def test_chat_logprobs_have_finite_numbers_and_replaced_half_characters() -> None:
    dispatcher = FakeDispatcher(TextDelta("€", (1, 2), LOGPROBS), finished())
    body = {**CHAT, "logprobs": True, "top_logprobs": 1}
    answer = await post("/v1/chat/completions", body, dispatcher)
    content = answer["choices"][0]["logprobs"]["content"]
    assert [(entry["token"], entry["bytes"], entry["logprob"]) for entry in content] == [
        ("\ufffd", [0xE2, 0x82], -0.5),
        ("\ufffd", [0xAC], -9999.0),
    ]
    assert content[1]["top_logprobs"] == [{"token": "x", "bytes": [120], "logprob": -9999.0}]
    assert dispatcher.requests[0].sampling.top_logprobs == 1
    ChatCompletion.model_validate(answer)


async def test_completion_runs_every_prompt_n_times() -> None:
    dispatcher = FakeDispatcher(TextDelta("x"), finished())
    body = {**COMPLETION, "prompt": ["a", "b"], "n": 2, "echo": True, "stop": "."}
    answer = await post("/v1/completions", body, dispatcher)
    Completion.model_validate(answer)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    prompts = [request.prompt for request in dispatcher.requests]
    assert prompts == [TextPrompt("a"), TextPrompt("a"), TextPrompt("b"), TextPrompt("b")]
    assert all(request.echo_prompt and request.stop == (".",) for request in dispatcher.requests)
    assert answer["usage"]["prompt_tokens"] == 14
    assert answer["usage"]["completion_tokens"] == 8


async def test_completion_takes_token_ids_and_answers_legacy_logprobs() -> None:
    dispatcher = FakeDispatcher(
        TextDelta("ab"), TextDelta("€", (1, 2), LOGPROBS), TextDelta("c", (3,), LOGPROBS[:1]),
        finished(),
    )  # fmt: skip
    body = {**COMPLETION, "prompt": [1, 2], "logprobs": 1}
    answer = await post("/v1/completions", body, dispatcher)
    Completion.model_validate(answer)
    assert dispatcher.requests[0].prompt == TokenPrompt((1, 2))
    assert dispatcher.requests[0].max_tokens == 16
    assert answer["choices"][0]["text"] == "ab€c"
    assert answer["choices"][0]["logprobs"] == {
        "tokens": ["\ufffd", "\ufffd", "\ufffd"],
        "token_logprobs": [-0.5, -9999.0, -0.5],
        "top_logprobs": [{"\ufffd": -0.5}, {"x": -9999.0, "\ufffd": -9999.0}, {"\ufffd": -0.5}],
        "text_offset": [2, 3, 4],
    }


@pytest.mark.parametrize("count", [0, 2])
@pytest.mark.parametrize("stream", [False, True])
async def test_legacy_logprobs_always_contain_the_chosen_token(count: int, stream: bool) -> None:
    top = (TokenLogprob(1, b"a", -0.1), TokenLogprob(2, b"b", -0.2), TokenLogprob(9, b"c", -3.0))
    among = TokenLogprob(2, b"b", -0.2, top[:count])
    outside = TokenLogprob(3, b"z", -7.5, top[:count])
    namesake = TokenLogprob(4, b"a", -5.0, top[:count])
    tokens = (among, outside, namesake)
    text = TextDelta("bza", (2, 3, 4), tokens)
    dispatcher = FakeDispatcher(text, finished())
    body = {**COMPLETION, "prompt": "hi", "logprobs": count, "stream": stream}
    async with client_of(create_app(make_services(dispatcher))) as client:
        response = await client.post("/v1/completions", json=body)
    answer = sse_data(response.text)[0] if stream else response.json()
    columns = answer["choices"][0]["logprobs"]
    assert columns["token_logprobs"] == [-0.2, -7.5, -5.0]
    found = columns["top_logprobs"]
    assert [entry[name] for entry, name in zip(found, "bza", strict=True)] == [-0.2, -7.5, -5.0]
    assert [len(entry) for entry in found] == ([1, 1, 1] if count == 0 else [2, 3, 2])


async def test_embeddings_answer_floats_and_base64_in_input_order() -> None:
    dispatcher = FakeDispatcher()
    body = {"model": "mini", "input": ["a", "b"]}
    floats = await post("/v1/embeddings", body, dispatcher)
    packed = await post(
        "/v1/embeddings", {**body, "encoding_format": "base64", "dimensions": 3}, dispatcher
    )
    response = CreateEmbeddingResponse.model_validate(floats)
    assert [item.embedding for item in response.data] == [[0.0, 0.5, -1.25], [1.0, 0.5, -1.25]]
    assert response.model == EMBEDDING_MODEL
    assert response.usage.prompt_tokens == 5
    raw = base64.b64decode(packed["data"][1]["embedding"])
    assert struct.unpack("<3f", raw) == (1.0, 0.5, -1.25)
    assert dispatcher.embedded == [("a", "b"), ("a", "b")]


@pytest.mark.parametrize(
    ("vectors", "fields", "status", "code"),
    [
        ([[float("nan"), 1.0]], {}, 503, "engine_failed"),
        ([[1.0], [2.0]], {}, 503, "engine_failed"),
    ],
)
async def test_embeddings_that_cannot_be_given_are_an_error_i13(
    vectors: Any, fields: dict[str, Any], status: int, code: str
) -> None:
    dispatcher = FakeDispatcher()
    dispatcher.vectors = vectors
    async with client_of(create_app(make_services(dispatcher))) as client:
        response = await client.post(
            "/v1/embeddings", json={"model": "mini", "input": "a", **fields}
        )
    assert (response.status_code, error_of(response)["code"]) == (status, code)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {**CHAT, "model": "mini"}),
        ("/v1/completions", {**COMPLETION, "model": "mini"}),
        ("/v1/embeddings", {"model": "tiny", "input": "x"}),
    ],
)
async def test_model_asked_for_what_it_cannot_do_is_refused(
    path: str, body: dict[str, Any]
) -> None:
    async with client_of(create_app(make_services())) as client:
        response = await client.post(path, json=body)
    assert response.status_code == 400
    assert error_of(response)["code"] == "unsupported_capability"
    assert error_of(response)["param"] == "model"


async def test_tools_are_passed_to_a_model_without_the_capability() -> None:
    dispatcher = FakeDispatcher()
    tool = {"type": "function", "function": {"name": "f"}}
    await post("/v1/chat/completions", {**CHAT, "tools": [tool]}, dispatcher)
    assert len(dispatcher.requests) == 1


@pytest.mark.parametrize(
    "name", ["../../x", "/etc", "org/unknown", "tіny", "x" * 10_000, "a\r\nb\x1b[31m"]
)
async def test_unknown_model_name_is_not_found_i12(name: str) -> None:
    dispatcher = FakeDispatcher()
    async with client_of(create_app(make_services(dispatcher))) as client:
        response = await client.post("/v1/chat/completions", json={**CHAT, "model": name})
    error = error_of(response)
    assert (response.status_code, error["code"]) == (404, "model_not_found")
    assert len(error["message"]) < 400
    assert dispatcher.requests == []


async def test_endless_model_name_never_reaches_the_catalog_i12() -> None:
    services = make_services()
    async with client_of(create_app(services)) as client:
        response = await client.post("/v1/completions", json={**COMPLETION, "model": "x" * 513})
        listed = await client.get("/v1/models/" + "x" * 513)
    assert response.status_code == listed.status_code == 404
    assert isinstance(services.catalog, FakeCatalog)
    assert services.catalog.asked == []


async def test_models_are_listed_and_found_by_id_and_alias() -> None:
    broken = make_view("bad@gguf-q4", state="refused", reason="damaged header", aliases=())
    fit = FitView("limited", ("too small",))
    views = (make_view(compatibility={"cline": fit}), broken)
    async with client_of(create_app(make_services(views=views))) as client:
        listed = (await client.get("/v1/models")).json()
        by_id = (await client.get(f"/v1/models/{CHAT_MODEL}")).json()
        by_alias = (await client.get("/v1/models/tiny")).json()
        refused = (await client.get("/v1/models/bad@gguf-q4")).json()
        missing = await client.get("/v1/models/org/nothing")
    assert listed["object"] == "list"
    assert [Model.model_validate(model).id for model in listed["data"]] == [CHAT_MODEL]
    assert by_id == by_alias == listed["data"][0]
    assert by_id["owned_by"] == "local"
    assert by_id["capabilities"] == ["chat", "completion"]
    assert by_id["max_model_len"] == 2048
    assert by_id["compatibility"] == {"cline": {"level": "limited", "reasons": ["too small"]}}
    assert (refused["state"], refused["reason"]) == ("refused", "damaged header")
    assert error_of(missing)["code"] == "model_not_found"


async def test_list_has_the_models_that_a_request_would_be_served_with() -> None:
    states = ("resident", "loading", "available", "unavailable", "refused", "failed", "quarantined")
    views = [make_view(f"{state}@gguf-q4", state=state, aliases=()) for state in states]
    app = create_app(replace(make_services(views=views), management=FakeManagement()))
    async with client_of(app) as client:
        listed = (await client.get("/v1/models")).json()["data"]
        managed = (await client.get("/api/models")).json()["models"]
        each = [(await client.get(f"/v1/models/{view.id}")).json()["state"] for view in views]
    assert [model["state"] for model in listed] == ["resident", "loading", "available"]
    assert each == list(states)
    assert sorted(model["state"] for model in managed) == sorted(states)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "error",
    [
        ContextLengthExceeded.of(10, 5),
        QueueFull("Too many requests wait.", retry_after_s=3),
        InsufficientMemory("No room."),
        EngineFailed("The engine died."),
        BrokenModel("Damaged."),
    ],
)
async def test_error_before_the_first_event_is_an_http_status(
    error: ImpetusError, *, stream: bool
) -> None:
    app = create_app(make_services(FakeDispatcher(error)))
    async with client_of(app) as client:
        response = await client.post("/v1/chat/completions", json={**CHAT, "stream": stream})
        metrics = (await client.get("/metrics")).text
    assert response.status_code == error.status
    assert response.json() == error.envelope()
    expected = None if error.retry_after_s is None else str(error.retry_after_s)
    assert response.headers.get("retry-after") == expected
    assert f'impetus_errors_total{{code="{error.code}"}} 1.0' in metrics


@pytest.mark.parametrize("stream", [False, True])
async def test_bug_is_a_500_without_its_traceback(
    caplog: pytest.LogCaptureFixture, *, stream: bool
) -> None:
    app = create_app(make_services(FakeDispatcher(KeyError("secret detail"))))
    async with client_of(app) as client:
        response = await client.post("/v1/chat/completions", json={**CHAT, "stream": stream})
    error = error_of(response)
    request_id = response.headers["x-request-id"]
    assert (response.status_code, error["message"]) == (
        500,
        f"internal error, request id {request_id}",
    )
    logged = [record for record in caplog.records if record.name == "router.http.errors"]
    assert [getattr(record, "request_id", None) for record in logged] == [request_id]
    assert logged[0].exc_info is not None


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nope", 404), ("GET", "/v1/completions", 405), ("DELETE", "/v1/models", 405)],
)
async def test_wrong_path_or_method_is_an_envelope(method: str, path: str, status: int) -> None:
    async with client_of(create_app(make_services())) as client:
        response = await client.request(method, path)
    assert response.status_code == status
    assert error_of(response)["type"] == "invalid_request_error"


async def test_engine_that_ends_or_cancels_without_result_is_an_error() -> None:
    for script in ((TextDelta("x"),), (TextDelta("x"), finished("cancelled"))):
        async with client_of(create_app(make_services(FakeDispatcher(*script)))) as client:
            response = await client.post("/v1/chat/completions", json=CHAT)
        assert (response.status_code, error_of(response)["code"]) == (503, "engine_failed")


async def test_unknown_fields_are_named_in_the_header_and_once_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", logger="router.context")
    body = {**CHAT, "num_ctx": 1, "évil\r\nx: y": 2, **{f"f{index}": 1 for index in range(30)}}
    async with client_of(create_app(make_services())) as client:
        first = await client.post("/v1/chat/completions", json=body)
        second = await client.post("/v1/chat/completions", json={**body, "stream": True})
        metrics = (await client.get("/metrics")).text
    names = first.headers["x-impetus-ignored"].split(", ")
    assert names[:3] == ["num_ctx", "_vil__x__y", "f0"]
    assert len(names) == 20
    assert second.headers["x-impetus-ignored"] == first.headers["x-impetus-ignored"]
    assert [getattr(record, "field", None) for record in caplog.records] == names
    assert "impetus_ignored_parameters_total 64.0" in metrics


async def test_health_says_whether_requests_are_taken() -> None:
    async with client_of(create_app(make_services(not_ready="The scheduler starts."))) as client:
        alive, ready = await client.get("/healthz"), await client.get("/readyz")
    assert (alive.status_code, ready.status_code) == (200, 503)
    assert error_of(ready)["message"] == "The scheduler starts."
    async with client_of(create_app(make_services())) as client:
        assert (await client.get("/readyz")).status_code == 200


async def test_root_tells_where_everything_is() -> None:
    async with client_of(create_app(make_services(port=8123))) as client:
        answer = (await client.get("/")).json()
    assert answer["base_url"] == "http://127.0.0.1:8123/v1"
    assert answer["links"]["models"] == "/v1/models"


async def test_metrics_count_reused_tokens_by_source() -> None:
    end = replace(finished(), cache=CacheOutcome(cells_tokens=5, disk_tokens=256))
    app = create_app(make_services(FakeDispatcher(TextDelta("x"), end)))
    async with client_of(app) as client:
        await client.post("/v1/chat/completions", json=CHAT)
        text = (await client.get("/metrics")).text
    for source, tokens in (("cells", 5), ("disk", 256)):
        label = f'{{model="{CHAT_MODEL}",source="{source}"}}'
        assert f"impetus_reused_prefix_tokens_total{label} {tokens}.0" in text
        assert f"impetus_reused_prefixes_total{label} 1.0" in text
    assert 'source="ram"' not in text


async def test_metrics_count_requests_and_tokens_by_catalog_id_only() -> None:
    views = [make_view(capabilities=frozenset(Capability))]
    app = create_app(make_services(views=views))
    async with client_of(app) as client:
        await client.post("/v1/chat/completions", json={**CHAT, "n": 2})
        await client.post("/v1/embeddings", json={"model": "tiny", "input": "x"})
        await client.post("/v1/chat/completions", json={**CHAT, "model": "stranger"})
        await client.get("/v1/nothing/here")
        response = await client.get("/metrics")
    text = response.text
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    label = f'{{model="{CHAT_MODEL}"}}'
    assert f"impetus_prompt_tokens_total{label} 12.0" in text
    assert f"impetus_cached_tokens_total{label} 3.0" in text
    assert f"impetus_completion_tokens_total{label} 4.0" in text
    assert f"impetus_time_to_first_token_seconds_count{label} 1.0" in text
    assert "impetus_in_flight_requests 1.0" in text
    chat = 'impetus_requests_total{endpoint="/v1/chat/completions",model='
    assert f'{chat}"{CHAT_MODEL}",status="200"}} 1.0' in text
    assert f'{chat}"",status="404"}} 1.0' in text
    assert 'impetus_requests_total{endpoint="",model="",status="404"} 1.0' in text
    assert "stranger" not in text
