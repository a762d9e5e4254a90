"""Reranking and embeddings through the API: models that another program saved into the folder."""

from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from tests.encoder_models import (
    ENCODERS,
    PAIRS,
    RERANKERS,
    VOCABULARY,
    add_modules,
    pooling,
    save_encoder,
    write_json,
)
from tests.gguf_files import hf_bert_gguf
from tests.hub_repository import HubRepository
from tests.integration.server import Server, wait_until

RANKERS = ("ranker@safetensors-f32", "bert-ranker@gguf-f32")
EMBEDDER = "embedder@safetensors-f32"
REVISION = "a" * 40


@pytest.fixture(scope="module")
def client(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client of a server with two rerankers and a classifier, and a cached embedding model."""
    ranker = save_encoder(server.models / "ranker", RERANKERS["bert"])
    hf_bert_gguf(ranker, server.models / "bert-ranker-F32.gguf", VOCABULARY)
    save_encoder(server.models / "classifier", RERANKERS["bert"], num_labels=3)
    embedder = save_encoder(tmp_path_factory.mktemp("source"), ENCODERS["bert"])
    add_modules(
        embedder, pooling("mean_tokens"), ("Normalize", {}), prompts={"query": "the query: "}
    )
    write_json(embedder / "sentence_bert_config.json", {"max_seq_length": 16})
    repository = HubRepository(server.models, "tests/embedder")
    repository.add(REVISION, embedder)
    repository.set_main(REVISION)
    with httpx.Client(base_url=server.url, timeout=120) as client:

        def are_listed() -> bool:
            # An unknown name makes the server look at its folders, at most every ten seconds.
            client.post("/v1/rerank", json={"model": "nobody", "query": "x", "documents": ["x"]})
            ids = {entry["id"] for entry in client.get("/v1/models").json()["data"]}
            return {*RANKERS, EMBEDDER} <= ids

        wait_until(are_listed, "the models are listed", 120)
        yield client


def rerank(client: httpx.Client, model: str, path: str = "/v1/rerank", **fields: Any) -> Any:
    query, documents = PAIRS
    body = {"model": model, "query": query, "documents": list(documents), **fields}
    return client.post(path, json=body)


def test_rerankers_of_two_formats_agree_by_all_paths(client: httpx.Client) -> None:
    scores = []
    for model in RANKERS:
        for path in ("/v1/rerank", "/v2/rerank", "/rerank"):
            answer = rerank(client, model, path, return_documents=True).json()
            found = [result["relevance_score"] for result in answer["results"]]
            assert found == sorted(found, reverse=True)
            for result in answer["results"]:
                assert result["document"]["text"] == PAIRS[1][result["index"]]
            assert answer["usage"]["truncated_tokens"] > 0
        scores.append({result["index"]: result["relevance_score"] for result in answer["results"]})
    assert [scores[0][index] for index in range(4)] == pytest.approx(
        [scores[1][index] for index in range(4)], abs=5e-4
    )


def test_a_document_that_may_not_be_cut_is_refused_with_the_counts(client: httpx.Client) -> None:
    response = rerank(client, RANKERS[0], truncate=False)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "context_length_exceeded")
    assert "64 tokens" in error["message"]
    assert "documents[3]" in error["message"]


def test_a_model_of_another_kind_is_refused_and_another_named(client: httpx.Client) -> None:
    error = rerank(client, EMBEDDER).json()["error"]
    assert error["code"] == "unsupported_capability"
    assert any(model in error["message"] for model in RANKERS)
    body = {"model": RANKERS[0], "input": "x"}
    response = client.post("/v1/embeddings", json=body)
    assert (response.status_code, response.json()["error"]["code"]) == (
        400,
        "unsupported_capability",
    )


def test_the_limit_of_input_is_told_and_enforced(client: httpx.Client) -> None:
    listed = client.get(f"/v1/models/{EMBEDDER}").json()
    assert (listed["context_length"], listed["max_model_len"]) == (16, 16)
    body: dict[str, Any] = {"model": EMBEDDER, "input": ["cat " * 20]}
    usage = client.post("/v1/embeddings", json=body).json()["usage"]
    assert usage == {"prompt_tokens": 16, "total_tokens": 16, "truncated_tokens": 6}
    refused = client.post("/v1/embeddings", json={**body, "truncate": False})
    assert refused.status_code == 400
    assert "22 tokens" in refused.json()["error"]["message"]


def test_prompts_and_dimensions_change_the_vectors(client: httpx.Client) -> None:
    def vector(**fields: Any) -> Any:
        body = {"model": EMBEDDER, "input": "cat", **fields}
        answer = client.post("/v1/embeddings", json=body).json()
        return np.array(answer["data"][0]["embedding"])

    plain, asked = vector(), vector(input_type="query")
    np.testing.assert_allclose(asked, vector(prompt_name="query"), atol=1e-6)
    np.testing.assert_allclose(asked, vector(input="the query: cat"), atol=1e-6)
    assert not np.allclose(plain, asked, atol=1e-3)
    short = vector(dimensions=4)
    np.testing.assert_allclose(short, plain[:4] / np.linalg.norm(plain[:4]), atol=1e-6)
    response = client.post(
        "/v1/embeddings", json={"model": EMBEDDER, "input": "cat", "prompt_name": "web"}
    )
    assert (response.status_code, response.json()["error"]["param"]) == (400, "prompt_name")


def test_a_classifier_is_listed_as_refused_with_the_reason(client: httpx.Client) -> None:
    found: dict[str, str] = {}

    def is_refused() -> bool:
        # What was written just now is looked at again when it is quiet.
        client.post("/v1/rerank", json={"model": "nobody", "query": "x", "documents": ["x"]})
        listed = client.get("/api/models").json()["models"]
        entry = next(entry for entry in listed if entry["id"].startswith("classifier"))
        found.update(state=entry["state"], reason=entry["reason"])
        return found["state"] == "refused"

    wait_until(is_refused, "the classifier is refused", 120)
    assert "classifier with 3 labels" in found["reason"]
