"""Counting a prompt's tokens, for engines that can."""

from typing import Protocol, runtime_checkable

from backends.base import Engine
from core.errors import UnsupportedCapability
from core.types import Prompt


@runtime_checkable
class TokenCounting(Protocol):
    """An engine that knows how long a prompt is without running it."""

    async def count_tokens(self, prompt: Prompt) -> int:
        """Return the prompt's tokens, the chat template's and the tools' included.

        Raises what `Engine.generate` raises for a prompt, but not for its length.
        """
        ...


async def count_tokens(engine: Engine, prompt: Prompt) -> int:
    """Return the prompt's tokens; raises UnsupportedCapability for an engine that cannot tell."""
    if not isinstance(engine, TokenCounting):
        raise UnsupportedCapability(
            f"The model {engine.info.name} ({engine.info.format}) cannot count tokens.",
            param="model",
        )
    return await engine.count_tokens(prompt)
