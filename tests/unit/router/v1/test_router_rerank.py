"""`/v1/rerank` as Jina's and Cohere's clients use it, and the new fields of embeddings."""

import asyncio
from typing import Any

import pytest

from core.errors import ContextLengthExceeded
from core.types import Capability, EmbeddingParams, RerankInputs
from router.app import create_app
from router.v1.rerank import PATHS
from tests.fakes import (
    CHAT_MODEL,
    EMBEDDING_MODEL,
    RERANK_MODEL,
    FakeDispatcher,
    make_services,
    make_view,
)
from tests.live_server import client_of, error_of

BODY: dict[str, Any] = {"model": "ranker", "query": "q", "documents": ["aa", {"text": "bbbb"}, "c"]}


async def post(path: str, body: dict[str, Any], dispatcher: FakeDispatcher | None = None) -> Any:
    services = make_services(dispatcher)
    async with client_of(create_app(services)) as client:
        return await client.post(path, json=body)


@pytest.mark.parametrize("path", PATHS)
async def test_results_come_best_first_with_both_forms_of_usage(path: str) -> None:
    dispatcher = FakeDispatcher()
    answer = (await post(path, BODY, dispatcher)).json()
    assert dispatcher.reranked == [RerankInputs("q", ("aa", "bbbb", "c"))]
    assert answer["id"].startswith("rerank-")
    assert (answer["object"], answer["model"]) == ("list", RERANK_MODEL)
    assert [result["index"] for result in answer["results"]] == [1, 0, 2]
    assert answer["results"][0] == {"index": 1, "relevance_score": pytest.approx(0.04)}
    assert answer["usage"] == {"prompt_tokens": 9, "total_tokens": 9, "truncated_tokens": 2}
    assert answer["meta"]["tokens"] == {"input_tokens": 9, "output_tokens": 0}
    assert answer["meta"]["api_version"] == {"version": "2" if "v2" in path else "1"}


async def test_results_are_limited_and_carry_their_documents() -> None:
    fields = {"top_n": 2, "return_documents": True, "max_tokens_per_doc": 7, "truncate": False}
    dispatcher = FakeDispatcher()
    answer = (await post("/v1/rerank", {**BODY, **fields}, dispatcher)).json()
    assert [result["document"] for result in answer["results"]] == [
        {"text": "bbbb"},
        {"text": "aa"},
    ]
    assert dispatcher.reranked == [RerankInputs("q", ("aa", "bbbb", "c"), False, 7)]
    more = (await post("/v1/rerank", {**BODY, "top_n": 99})).json()
    assert len(more["results"]) == 3


async def test_equal_scores_keep_the_order_of_the_documents() -> None:
    dispatcher = FakeDispatcher()
    dispatcher.vectors = [0.5, 0.5, 0.75]
    answer = (await post("/v1/rerank", BODY, dispatcher)).json()
    assert [result["index"] for result in answer["results"]] == [2, 0, 1]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"query": ""}, "query"),
        ({"query": None}, "query"),
        ({"query": {"image": "x"}}, "query"),
        ({"documents": []}, "documents"),
        ({"documents": "a"}, "documents"),
        ({"documents": ["a", 3]}, "documents"),
        ({"documents": [{"title": "a"}]}, "documents"),
        ({"documents": ["a"] * 2049}, "documents"),
        ({"top_n": 0}, "top_n"),
        ({"top_n": "3"}, "top_n"),
        ({"return_documents": "yes"}, "return_documents"),
        ({"max_tokens_per_doc": 0}, "max_tokens_per_doc"),
        ({"truncate": "LEFT"}, "truncate"),
        ({"rank_fields": ["title"]}, "rank_fields"),
    ],
)
async def test_bad_fields_are_refused_by_name(fields: dict[str, Any], param: str) -> None:
    response = await post("/v1/rerank", {**BODY, **fields})
    assert response.status_code == 400
    assert error_of(response)["param"] == param


@pytest.mark.parametrize("missing", ["model", "query", "documents"])
async def test_a_missing_field_is_named(missing: str) -> None:
    body = {name: value for name, value in BODY.items() if name != missing}
    response = await post("/v1/rerank", body)
    assert (response.status_code, error_of(response)["param"]) == (400, missing)


@pytest.mark.parametrize(
    "scores", [[0.5], [float("nan"), 1.0, 1.0], [[0.5, 1.0], [0.5, 1.0], [0.5, 1.0]]]
)
async def test_scores_that_cannot_be_given_are_an_error(scores: Any) -> None:
    dispatcher = FakeDispatcher()
    dispatcher.vectors = scores
    response = await post("/v1/rerank", BODY, dispatcher)
    assert (response.status_code, error_of(response)["code"]) == (503, "engine_failed")


@pytest.mark.parametrize(
    ("path", "model", "use"),
    [
        ("/v1/rerank", "mini", RERANK_MODEL),
        ("/v1/rerank", "tiny", RERANK_MODEL),
        ("/v1/embeddings", "ranker", EMBEDDING_MODEL),
        ("/v1/chat/completions", "ranker", CHAT_MODEL),
    ],
)
async def test_a_model_of_another_kind_names_one_that_can(path: str, model: str, use: str) -> None:
    bodies: dict[str, dict[str, Any]] = {
        "/v1/rerank": BODY,
        "/v1/embeddings": {"input": "x"},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}]},
    }
    response = await post(path, {**bodies[path], "model": model})
    error = error_of(response)
    assert (response.status_code, error["code"]) == (400, "unsupported_capability")
    assert f"Use {use} instead." in error["message"]


async def test_without_any_model_of_the_kind_the_error_says_so() -> None:
    views = [
        make_view(),
        make_view(RERANK_MODEL, capabilities=frozenset({Capability.RERANK}), state="refused"),
    ]
    async with client_of(create_app(make_services(views=views))) as client:
        response = await client.post("/v1/rerank", json={**BODY, "model": "tiny"})
    assert "No model on this server can be used for rerank." in error_of(response)["message"]


async def test_the_class_and_the_deadline_of_a_request_are_passed_on() -> None:
    dispatcher = FakeDispatcher()
    services = make_services(dispatcher, request_timeout_s=7.0)
    async with client_of(create_app(services)) as client:
        await client.post("/v1/rerank", json=BODY, headers={"x-impetus-priority": "batch"})
    assert (dispatcher.priorities, dispatcher.deadlines) == (["batch"], [7.0])


async def test_a_request_whose_engine_refuses_it_is_a_400_with_the_counts() -> None:
    class Refusing(FakeDispatcher):
        async def rerank(self, *_: Any, **__: Any) -> Any:
            raise ContextLengthExceeded.of_input("documents[1]", 600, 512)

    response = await post("/v1/rerank", BODY, Refusing())
    error = error_of(response)
    assert (response.status_code, error["code"]) == (400, "context_length_exceeded")
    assert error["param"] == "documents"
    assert "512 tokens" in error["message"]
    assert "documents[1] resulted in 600 tokens" in error["message"]


async def test_an_unknown_field_is_reported_and_a_chunk_limit_is_not() -> None:
    response = await post("/v1/rerank", {**BODY, "max_chunks_per_doc": 3, "surprise": 1})
    assert response.headers["x-impetus-ignored"] == "surprise"


async def test_a_request_that_is_cancelled_ends_the_work() -> None:
    dispatcher = FakeDispatcher()
    dispatcher.embed_gate = asyncio.Event()
    async with client_of(create_app(make_services(dispatcher))) as client:
        asked = asyncio.ensure_future(client.post("/v1/rerank", json=BODY))
        await dispatcher.began.wait()
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
        await dispatcher.idle.wait()
    assert dispatcher.running == 0


@pytest.mark.parametrize(
    ("fields", "truncates", "params"),
    [
        ({}, True, EmbeddingParams()),
        ({}, False, EmbeddingParams(truncate="none")),
        ({"truncate": True}, False, EmbeddingParams()),
        ({"truncate": False}, True, EmbeddingParams(truncate="none")),
        ({"truncate": "NONE"}, True, EmbeddingParams(truncate="none")),
        ({"truncate": "START"}, True, EmbeddingParams(truncate="start")),
        ({"truncate": "end"}, True, EmbeddingParams(truncate="end")),
        ({"prompt_name": "web"}, True, EmbeddingParams(prompt_name="web")),
        (
            {"input_type": "query", "dimensions": 64},
            True,
            EmbeddingParams(input_type="query", dimensions=64),
        ),
    ],
)
async def test_embeddings_are_asked_for_as_the_request_says(
    fields: dict[str, Any], truncates: bool, params: EmbeddingParams
) -> None:
    dispatcher = FakeDispatcher()
    services = make_services(dispatcher, truncate_inputs=truncates)
    async with client_of(create_app(services)) as client:
        body = {"model": "mini", "input": "a", **fields}
        answer = (await client.post("/v1/embeddings", json=body)).json()
    assert dispatcher.params == [params]
    assert answer["usage"]["truncated_tokens"] == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [("truncate", 1), ("truncate", "LEFT"), ("prompt_name", ""), ("prompt_name", "x" * 65),
     ("input_type", 3), ("dimensions", 0)],
)  # fmt: skip
async def test_bad_fields_of_embeddings_are_refused_by_name(name: str, value: Any) -> None:
    response = await post("/v1/embeddings", {"model": "mini", "input": "a", name: value})
    assert (response.status_code, error_of(response)["param"]) == (400, name)
