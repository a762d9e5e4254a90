"""Tests that the API reference lists every error and request field."""

from collections.abc import Iterator

import pytest

from core.errors import ImpetusError
from router.requests.fields import RequestBody
from router.v1.chat.request import ChatRequest
from router.v1.completions import CompletionRequest
from router.v1.embeddings import EmbeddingRequest
from router.v1.messages.request import MessagesRequest
from router.v1.rerank import RerankRequest
from router.v1.responses.request import ResponsesRequest
from router.v1.tokenize import DetokenizeRequest, TokenizeRequest
from scripts.install import ROOT

REFERENCE = (ROOT / "docs" / "API_REFERENCE.md").read_text()


def all_errors(kind: type[ImpetusError] = ImpetusError) -> Iterator[type[ImpetusError]]:
    yield kind
    for child in kind.__subclasses__():
        if child.__module__ == "core.errors":
            yield from all_errors(child)


@pytest.mark.parametrize("kind", list(all_errors()), ids=lambda kind: kind.__name__)
def test_reference_lists_every_error(kind: type[ImpetusError]) -> None:
    assert f"| {kind.status} | `{kind.type}` | `{kind.code}` |" in REFERENCE


@pytest.mark.parametrize(
    "request_type",
    [
        ChatRequest,
        CompletionRequest,
        EmbeddingRequest,
        MessagesRequest,
        RerankRequest,
        ResponsesRequest,
        TokenizeRequest,
        DetokenizeRequest,
    ],
)
def test_reference_names_every_field(request_type: type[RequestBody]) -> None:
    names = {*request_type.model_fields, *request_type.unsupported}
    assert {name for name in names if f"`{name}`" not in REFERENCE} == set()
