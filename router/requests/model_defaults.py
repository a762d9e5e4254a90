"""Fills what a request leaves out from its model's own defaults: sampling, stop strings, …"""

from dataclasses import replace

from pydantic import BaseModel

from core.types import ChatMessage, ChatPrompt, GenerationRequest, Prompt
from router.services import ModelView


def prompt_with_defaults(prompt: Prompt, view: ModelView) -> Prompt:
    """Return a chat with the model's system prompt and template variables where it has none."""
    defaults = view.defaults
    if defaults is None or not isinstance(prompt, ChatPrompt):
        return prompt
    messages = prompt.messages
    has_system = any(message.role == "system" for message in messages)
    if defaults.system_prompt and not has_system:
        messages = (ChatMessage(role="system", content=defaults.system_prompt), *messages)
    return replace(
        prompt,
        messages=messages,
        template_kwargs={**defaults.template_kwargs, **prompt.template_kwargs},
    )


def with_defaults(
    request: GenerationRequest, view: ModelView, body: BaseModel
) -> GenerationRequest:
    """Return the request with the model's defaults for what `body` does not set."""
    defaults = view.defaults
    if defaults is None:
        return request
    missing = {
        name: value
        for name, value in defaults.sampling.items()
        if getattr(body, name, None) is None
    }
    return replace(
        request,
        prompt=prompt_with_defaults(request.prompt, view),
        stop=request.stop or defaults.stop,
        sampling=replace(request.sampling, **missing),  # type: ignore[arg-type]
    )
