"""A running test hub with two small repositories, and huggingface_hub's client for it."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from scripts.hub_lib.server import Hub, running_hub
from tests.gguf_raw import minimal_gguf

CARD = """---
license: apache-2.0
pipeline_tag: text-generation
library_name: gguf
tags: [conversational]
base_model: org/base
---
# Tiny
"""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that the client may reach and that retries do not wait for."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    with running_hub() as running:
        yield running


@pytest.fixture
def api(hub: Hub) -> HfApi:
    """The client, without a token."""
    return HfApi(endpoint=hub.endpoint, token=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The files of `org/tiny`: a GGUF model, a large file, small ones and a subfolder."""
    made = tmp_path / "tiny"
    (made / "sub").mkdir(parents=True)
    minimal_gguf(made / "tiny-q8_0.gguf")
    (made / "large.bin").write_bytes(os.urandom(700_000))
    (made / "README.md").write_text(CARD)
    (made / "config.json").write_text('{"model_type": "llama", "architectures": ["Llama"]}')
    (made / "sub" / "notes.txt").write_text("notes")
    return made
