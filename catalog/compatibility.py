"""Rates how well each supported client (Cline, Continue, …) can use a model, and why; pure.

Token counts of the clients' own prompts were measured with the starter's vocabulary: Cline 3.0
5,900, Continue's command line 1.5 2,070, Claude Code 2.1 12,900, Codex 0.171 9,000, opencode 1.18
7,600, aider 0.86 700, Copilot's command line 1.0 12,500.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from core.types import Capability

Level: TypeAlias = Literal["ok", "limited", "no"]

# Smaller models rarely follow a plan over several tool calls.
AGENT_PARAMETERS = 3_000_000_000
_INFILL = "infill"


@dataclass(frozen=True, slots=True)
class Fit:
    """How well a client can use a model; `reasons` is empty if nothing is missing."""

    level: Level
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Traits:
    """The properties of a model that decide which clients can use it.

    `context_tokens` is the context granted on this machine; `parameters` 0 means unknown.
    `unusable_reason` says why the model cannot run at all; empty if it can.
    """

    capabilities: Collection[str]
    context_tokens: int
    parameters: int = 0
    unusable_reason: str = ""


@dataclass(frozen=True, slots=True)
class ContextNeed:
    """Context tokens that a client needs to start, and for more than small tasks."""

    least: int
    comfortable: int


_Finding: TypeAlias = tuple[Level, str]
_Rule: TypeAlias = Callable[[Traits], Iterator[_Finding]]

_CLINE = ContextNeed(8_192, 32_768)
_CONTINUE = ContextNeed(4_096, 16_384)
_CLAUDE_CODE = ContextNeed(16_384, 65_536)
_ROO = ContextNeed(16_384, 32_768)
_CODEX = ContextNeed(16_384, 65_536)
_OPENCODE = ContextNeed(16_384, 32_768)
_AIDER = ContextNeed(4_096, 16_384)
# Copilot uses at most three quarters of the context for its prompt.
_COPILOT = ContextNeed(24_576, 65_536)
_ZED = ContextNeed(8_192, 32_768)
_CHAT_CLIENT = ContextNeed(512, 4_096)


def compatibility(traits: Traits) -> Mapping[str, Fit]:
    """Return the rating for every client, keyed by the names `scripts/connect` accepts."""
    return {client: _fit(rule, traits) for client, rule in _RULES.items()}


def _fit(rule: _Rule, traits: Traits) -> Fit:
    if traits.unusable_reason:
        return Fit("no", (traits.unusable_reason,))
    findings = list(rule(traits))
    decisive = [reason for level, reason in findings if level == "no"]
    if decisive:
        return Fit("no", tuple(decisive))
    return Fit("limited" if findings else "ok", tuple(reason for _, reason in findings))


def _agent(context: ContextNeed) -> _Rule:
    def rule(traits: Traits) -> Iterator[_Finding]:
        yield from _check_chat(traits)
        yield from _check_context(traits, context)
        yield from _check_tools(traits)

    return rule


def _continue(traits: Traits) -> Iterator[_Finding]:
    if Capability.CHAT not in traits.capabilities and Capability.EMBEDDING in traits.capabilities:
        yield "limited", "for embeddings only"
        return
    if Capability.RERANK in traits.capabilities:
        yield "limited", "for reranking only"
        return
    yield from _agent(_CONTINUE)(traits)
    if _INFILL not in traits.capabilities:
        yield "limited", "no autocompletion: the model has no fill-in-the-middle tokens"


def _open_webui(traits: Traits) -> Iterator[_Finding]:
    if Capability.CHAT not in traits.capabilities and Capability.EMBEDDING in traits.capabilities:
        yield "limited", "for document embeddings only"
        return
    if Capability.RERANK in traits.capabilities:
        yield "limited", "for reranking documents only"
        return
    yield from _chat_client(traits)


def _chat_client(traits: Traits) -> Iterator[_Finding]:
    yield from _check_chat(traits)
    yield from _check_context(traits, _CHAT_CLIENT)


def _aider(traits: Traits) -> Iterator[_Finding]:
    # It asks for edits in plain text and offers no tools.
    yield from _check_chat(traits)
    yield from _check_context(traits, _AIDER)
    yield from _check_parameters(traits)


def _library(traits: Traits) -> Iterator[_Finding]:
    if Capability.RERANK in traits.capabilities:
        yield "limited", "for reranking only, at /v1/rerank"
    if Capability.CHAT in traits.capabilities and Capability.TOOLS not in traits.capabilities:
        yield "limited", _TOOLS_IN_PROMPT


def _check_chat(traits: Traits) -> Iterator[_Finding]:
    if Capability.CHAT not in traits.capabilities:
        yield "no", "the model does not support chat"


def _check_context(traits: Traits, context: ContextNeed) -> Iterator[_Finding]:
    if traits.context_tokens < context.least:
        yield (
            "no",
            f"the context is {traits.context_tokens:,} tokens; {context.least:,} are needed",
        )
    elif traits.context_tokens < context.comfortable:
        yield (
            "limited",
            f"the context of {traits.context_tokens:,} tokens is enough for small tasks only; "
            f"{context.comfortable:,} are recommended",
        )


_TOOLS_IN_PROMPT = "the chat template does not support tools; they are written into the prompt"


def _check_tools(traits: Traits) -> Iterator[_Finding]:
    if Capability.TOOLS not in traits.capabilities:
        yield "limited", _TOOLS_IN_PROMPT
    yield from _check_parameters(traits)


def _check_parameters(traits: Traits) -> Iterator[_Finding]:
    if 0 < traits.parameters < AGENT_PARAMETERS:
        yield (
            "limited",
            f"{_billions(traits.parameters)} parameters are too few for reliable agent work",
        )


def _billions(parameters: int) -> str:
    return (
        f"{parameters / 1e9:.1f} billion" if parameters >= 1e9 else f"{parameters // 10**6} million"
    )


# Of the clients whose own prompts are long; libraries and unknown clients need no certain context.
CONTEXT_NEEDS: Mapping[str, ContextNeed] = {
    "cline": _CLINE,
    "continue": _CONTINUE,
    "claude-code": _CLAUDE_CODE,
    "roo": _ROO,
    "codex": _CODEX,
    "opencode": _OPENCODE,
    "aider": _AIDER,
    "copilot": _COPILOT,
    "copilot-cli": _COPILOT,
    "zed": _ZED,
    "open-webui": _CHAT_CLIENT,
    "llm": _CHAT_CLIENT,
}
_RULES: Mapping[str, _Rule] = {
    "cline": _agent(_CLINE),
    "continue": _continue,
    "claude-code": _agent(_CLAUDE_CODE),
    "roo": _agent(_ROO),
    "codex": _agent(_CODEX),
    "opencode": _agent(_OPENCODE),
    "aider": _aider,
    "copilot": _agent(_COPILOT),
    "copilot-cli": _agent(_COPILOT),
    "zed": _agent(_ZED),
    "open-webui": _open_webui,
    "openai": _library,
    "langchain": _library,
    "llm": _chat_client,
}
