"""F10: a server that is told to stop finishes what runs, and at once where it is told twice."""

import signal
import threading

import httpx

from tests.integration.server import HTTP, STARTER, Server, wait_until

ENDLESS = {"logit_bias": {"2": -100, "0": -100}, "max_tokens": 4000, "stream": True}


def body(**fields: object) -> dict[str, object]:
    messages = [{"role": "user", "content": "Write a long story."}]
    return {"model": STARTER, "messages": messages, **fields}


def is_draining(server: Server) -> bool:
    answer = HTTP.post(f"{server.url}/v1/chat/completions", json=body(max_tokens=1), timeout=30)
    return answer.status_code == 503 and answer.json()["error"]["code"] == "draining"


def test_f10_a_stream_ends_in_peace_and_new_requests_are_told_so(converting: Server) -> None:
    url = f"{converting.url}/v1/chat/completions"
    answer = body(**{**ENDLESS, "max_tokens": 200})
    with httpx.stream("POST", url, json=answer, timeout=60) as stream:
        lines = stream.iter_lines()
        next(lines)
        codes: list[int] = []
        stopper = threading.Thread(target=lambda: codes.append(converting.stop(signal.SIGTERM)))
        stopper.start()
        wait_until(lambda: is_draining(converting), "new requests are refused", 30.0)
        text = list(lines)
    stopper.join(60)
    assert text[-2:] == ["data: [DONE]", ""]
    assert not [line for line in text if '"error"' in line]
    assert codes == [0]
    assert converting.survivors() == []


def test_f10_a_second_signal_ends_it_at_once(doubled: Server) -> None:
    assert doubled.process is not None
    url = f"{doubled.url}/v1/chat/completions"
    with httpx.stream("POST", url, json=body(**ENDLESS), timeout=60) as stream:
        # An iterator that is dropped closes its connection.
        lines = stream.iter_lines()
        next(lines)
        doubled.process.send_signal(signal.SIGTERM)
        wait_until(lambda: is_draining(doubled), "it is stopping", 30.0)
        assert doubled.stop(signal.SIGTERM) == 0
    assert doubled.survivors() == []
