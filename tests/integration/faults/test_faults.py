"""Disconnects, dead processes, vanished files, hostile input: the server lives on."""

import os
import signal
import subprocess
import sys
from typing import Any

import httpx
import psutil
import pytest
from openai import APIError, NotFoundError, OpenAI, UnprocessableEntityError
from openai.types.chat import ChatCompletionMessageParam

from tests.gguf_files import llama_gguf
from tests.integration.server import ROOT, STARTER, Server, wait_until
from tests.starter import starter_path

LONG: list[ChatCompletionMessageParam] = [
    {"role": "user", "content": "Write a very long story about a ship."}
]


def ask(client: OpenAI, model: str = STARTER) -> str:
    answer = client.chat.completions.create(model=model, messages=LONG, max_tokens=3)
    return answer.choices[0].message.content or ""


def open_stream(client: OpenAI, model: str = STARTER, *, max_tokens: int = 4000) -> Any:
    return client.chat.completions.create(
        model=model,
        messages=LONG,
        max_tokens=max_tokens,
        stream=True,
        # The end token is banned, so that the stream lasts as long as the test needs it.
        logit_bias={"2": -100, "0": -100},
    )


def test_f8_a_client_that_leaves_frees_its_slot(server: Server, client: OpenAI) -> None:
    ask(client)
    stream = open_stream(client)
    for _, _chunk in zip(range(5), stream, strict=False):
        pass
    wait_until(lambda: server.running_sequences() == 1, "the stream runs")
    stream.close()
    wait_until(lambda: server.running_sequences() == 0, "the slot is free")


def test_f8_a_client_that_leaves_without_streaming_frees_its_slot(server: Server) -> None:
    body = {"model": STARTER, "messages": LONG, "max_tokens": 4000, "logit_bias": {"2": -100}}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=1.0)
    wait_until(lambda: server.running_sequences() == 0, "the slot is free")


def test_f1_a_killed_replica_is_replaced_and_its_streams_go_on(
    server: Server, client: OpenAI
) -> None:
    ask(client)
    old = server.pid_of("gguf")
    stream = open_stream(client, max_tokens=300)
    next(iter(stream))
    os.kill(old, signal.SIGKILL)
    drain(stream)
    assert ask(client)
    assert server.pid_of("gguf") != old
    assert ask(client, "echo")


def drain(stream: Any) -> None:
    for _ in stream:
        pass


def test_a_deleted_model_file_is_named_and_others_go_on(server: Server, client: OpenAI) -> None:
    path = llama_gguf(server.models / "Doomed-F32.gguf", seed=9)
    assert isinstance(ask(client, "doomed"), str)
    path.unlink()
    with pytest.raises(NotFoundError) as caught:
        ask(client, "doomed")
    assert caught.value.code == "model_file_missing"
    assert ask(client)
    llama_gguf(path, seed=10)
    wait_until(lambda: answers(client, "doomed"), "the returned file is served")


def answers(client: OpenAI, model: str) -> bool:
    try:
        ask(client, model)
    except APIError:
        return False
    return True


def refused_models(client: OpenAI) -> list[dict[str, Any]]:
    views = httpx.get(str(client.base_url.join("/api/models")), timeout=30).json()["models"]
    return [view for view in views if view["state"] == "refused"]


def test_hostile_model_files_are_refused_with_the_reason(server: Server, client: OpenAI) -> None:
    whole = starter_path().read_bytes()
    (server.models / "truncated-q4_1.gguf").write_bytes(whole[: len(whole) // 2])
    lying = bytearray(whole[:4096])
    lying[8:16] = (2**60).to_bytes(8, "little")
    (server.models / "lying-q4_1.gguf").write_bytes(lying)
    # An unknown name starts a scan only every ten seconds; this server scans by itself as well.
    wait_until(lambda: len(refused_models(client)) == 2, "both files are inspected")
    for name in ("truncated", "lying"):
        with pytest.raises(UnprocessableEntityError) as caught:
            ask(client, name)
        assert caught.value.code == "broken_model"
    assert all(view["reason"] for view in refused_models(client))
    assert ask(client)


CHAT = {"model": STARTER, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"{not json", 400, "invalid_request"),
        (b"[" * 200_000, 400, "invalid_request"),
        (b'"text"', 400, "invalid_request"),
        (b'{"model": "x", "messages": "no"}', 400, "invalid_request"),
        (b'{"model": "x", "messages": [], "temperature": NaN}', 400, None),
        (b'{"model": "x", "messages": [], "max_tokens": -1}', 400, None),
        (b'{"model": "x", "messages": [], "max_tokens": 1e999}', 400, None),
        (b"x" * 50_000_000, 413, "request_too_large"),
    ],
    ids=["malformed", "deep", "no-object", "types", "nan", "negative", "huge", "50MB"],
)
def test_bad_bodies_get_the_envelope(
    server: Server, body: bytes, status: int, code: str | None
) -> None:
    answer = httpx.post(
        f"{server.url}/v1/chat/completions",
        content=body,
        headers={"content-type": "application/json"},
        timeout=30,
    )
    assert answer.status_code == status
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    if code is not None:
        assert error["code"] == code
    good = httpx.post(f"{server.url}/v1/chat/completions", json=CHAT, timeout=30)
    assert good.status_code == 200


def test_a_prompt_over_the_context_names_both_numbers(server: Server) -> None:
    body = {**CHAT, "messages": [{"role": "user", "content": "word " * 9000}]}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=30)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "8192" in error["message"]
    assert "90" in error["message"]


def test_unknown_fields_are_named_in_a_header(server: Server) -> None:
    answer = httpx.post(
        f"{server.url}/v1/chat/completions", json={**CHAT, "mirostat": 2}, timeout=30
    )
    assert answer.status_code == 200
    assert answer.headers["x-impetus-ignored"] == "mirostat"


def test_unsupported_parameters_are_refused_by_name(server: Server) -> None:
    answer = httpx.post(
        f"{server.url}/v1/completions",
        json={"model": STARTER, "prompt": "a", "suffix": "b"},
        timeout=30,
    )
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "unsupported_parameter"
    assert answer.json()["error"]["param"] == "suffix"


def test_models_run_at_the_priority_of_the_server(server: Server) -> None:
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=CHAT, timeout=60)
    assert answer.status_code == 200
    own = psutil.Process().nice()
    assert [psutil.Process(server.pid_of(part)).nice() for part in ("router", "gguf")] == [own, own]


def test_f14_a_port_in_use_is_one_clear_line(server: Server) -> None:
    command = [sys.executable, "-m", "deployments.start.launcher"]
    environment = {"IMPETUS_PORT": str(server.port), "IMPETUS_HOME": str(server.home)}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert str(server.port) in result.stderr
    assert "IMPETUS_PORT" in result.stderr
