"""A running test hub, and the client of this server for it."""

from collections.abc import Iterator

import pytest

from catalog.hub.client import HubClient, HubLimits
from scripts.hub_lib.server import Hub, running_hub

# Long, because a machine under load is slow.
LIMITS = HubLimits(connect_s=20.0, silence_s=20.0, total_s=60.0, answer_bytes=1 << 20)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that the client may reach: other tests switch networks off."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with running_hub() as running:
        yield running


@pytest.fixture
def client(hub: Hub) -> HubClient:
    """The client, without a token."""
    return HubClient(hub.endpoint, token="", limits=LIMITS)
