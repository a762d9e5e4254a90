"""A model that does not fit is converted to a smaller one, which then answers."""

import re
import time

from openai import APIStatusError, OpenAI

from tests.integration.server import Server
from tests.integration.test_formats import NAME, QUESTION, place


def test_a_model_over_the_memory_is_converted_when_asked_for(converting: Server) -> None:
    place("hf-f32", converting.models)
    model = f"{NAME}@safetensors-f32"
    refusals: list[APIStatusError] = []
    with OpenAI(base_url=f"{converting.url}/v1", api_key="x", max_retries=0) as client:
        deadline = time.monotonic() + 240
        answer = None
        while answer is None and time.monotonic() < deadline:
            try:
                answer = client.chat.completions.create(
                    model=model, messages=QUESTION, max_tokens=4, temperature=0, timeout=120
                )
            except APIStatusError as problem:
                refusals.append(problem)
                time.sleep(1)
        entries = {entry.id: entry.model_dump() for entry in client.models.list()}
    assert any("is being converted to" in refusal.message for refusal in refusals)
    for refusal in refusals:
        assert refusal.status_code == 503
        # On a busy machine the scan that finds the folder takes longer than a request waits.
        assert re.search("is being converted to|still being scanned", refusal.message)
        assert int(refusal.response.headers["retry-after"]) >= 1
    assert answer is not None
    assert answer.choices[0].message.content
    assert answer.model != model
    assert entries[answer.model]["converted_from"] == model
    assert model not in entries
