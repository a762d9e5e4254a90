"""What clients can do with models: levels and their reasons."""

from typing import Any

import pytest

from catalog.compatibility import CONTEXT_NEEDS, Fit, Traits, compatibility
from core.types import Capability

AGENTS = (
    *("cline", "continue", "claude-code", "roo"),
    *("codex", "opencode", "copilot", "copilot-cli", "zed"),
)
CODER = frozenset({Capability.CHAT, Capability.COMPLETION, Capability.TOOLS, "infill"})
CHAT_ONLY = frozenset({Capability.CHAT, Capability.COMPLETION})
EMBEDDER = frozenset({Capability.EMBEDDING})


def fits(capabilities: Any = CODER, context: int = 131_072, **changes: Any) -> dict[str, Fit]:
    return dict(compatibility(Traits(capabilities, context, **changes)))


def test_a_large_coder_fits_every_client() -> None:
    assert set(fits(parameters=30_000_000_000).values()) == {Fit("ok")}


def test_a_client_that_needs_a_context_refuses_less() -> None:
    assert set(fits()) - CONTEXT_NEEDS.keys() == {"openai", "langchain"}
    for client, need in CONTEXT_NEEDS.items():
        assert fits(context=need.comfortable)[client].level == "ok"
        assert fits(context=need.least)[client].level == "limited"
        assert fits(context=need.least - 1)[client].level == "no"


def test_unknown_size_is_no_reason() -> None:
    assert fits(parameters=0)["cline"] == Fit("ok")


def test_a_small_model_is_no_agent_and_talks_well() -> None:
    found = fits(parameters=135_000_000)
    for agent in (*AGENTS, "aider"):
        assert found[agent].level == "limited"
        assert "135 million parameters" in found[agent].reasons[0]
    assert found["llm"] == found["open-webui"] == found["openai"] == Fit("ok")
    assert "1.5 billion" in fits(parameters=1_540_000_000)["cline"].reasons[0]


@pytest.mark.parametrize(
    ("client", "least", "comfortable"),
    [
        ("cline", 8_192, 32_768),
        ("continue", 4_096, 16_384),
        ("claude-code", 16_384, 65_536),
        ("roo", 16_384, 32_768),
        ("codex", 16_384, 65_536),
        ("opencode", 16_384, 32_768),
        ("aider", 4_096, 16_384),
        ("copilot", 24_576, 65_536),
        ("copilot-cli", 24_576, 65_536),
        ("zed", 8_192, 32_768),
        ("llm", 512, 4_096),
    ],
)
def test_context_decides_in_three_steps(client: str, least: int, comfortable: int) -> None:
    too_small = fits(context=least - 1)[client]
    assert too_small.level == "no"
    assert f"{least - 1:,} tokens" in too_small.reasons[0]
    assert f"{least:,}" in too_small.reasons[0]
    assert fits(context=least)[client].level == "limited"
    assert fits(context=comfortable - 1)[client].level == "limited"
    assert fits(context=comfortable)[client] == Fit("ok")


def test_tools_that_the_template_does_not_know_limit_agents_and_libraries() -> None:
    found = fits(CHAT_ONLY | {"infill"})
    for client in (*AGENTS, "openai", "langchain"):
        assert found[client].level == "limited"
        assert "written into the prompt" in " ".join(found[client].reasons)
    assert found["llm"] == found["aider"] == Fit("ok")


def test_only_continue_misses_fill_in_the_middle() -> None:
    found = fits(CODER - {"infill"})
    limited = {client for client, fit in found.items() if fit.level != "ok"}
    assert limited == {"continue"}
    assert "fill-in-the-middle" in found["continue"].reasons[0]


def test_an_embedding_model_is_for_embeddings() -> None:
    found = fits(EMBEDDER, 512)
    assert found["openai"] == found["langchain"] == Fit("ok")
    assert {found[name].level for name in ("continue", "open-webui")} == {"limited"}
    for client in {*AGENTS, "aider", "llm"} - {"continue"}:
        assert found[client].level == "no"
        assert "does not support chat" in found[client].reasons[0]


def test_a_reranking_model_is_for_reranking() -> None:
    found = fits({"rerank"}, 512)
    for client in ("openai", "langchain", "continue", "open-webui"):
        assert found[client].level == "limited"
        assert "for reranking" in found[client].reasons[0]
    assert {found[client].level for client in ("cline", "claude-code", "roo", "llm")} == {"no"}


def test_what_cannot_run_fits_nobody() -> None:
    found = fits(unusable_reason="the file is gone")
    assert set(found.values()) == {Fit("no", ("the file is gone",))}
