"""Makes the prompt of a conversation, and the message that an answer becomes in the next one."""

from collections.abc import Iterable, Sequence

from core.errors import RequestError
from core.types import ChatMessage, ChatPrompt, ToolCall
from router.answers import parts as answer
from router.requests.limits import MAX_MESSAGES
from router.requests.reasoning import with_reasoning
from router.v1.responses import request as responses_api
from router.v1.responses.tools import OfferedTools


def to_responses_prompt(
    request: responses_api.ResponsesRequest,
    conversation: Sequence[ChatMessage],
    offered: OfferedTools,
) -> ChatPrompt:
    """Return the prompt of `conversation`, which includes the request's input.

    Raises RequestError.
    """
    if len(conversation) > MAX_MESSAGES:
        raise RequestError(
            f"input: the conversation has {len(conversation)} messages with previous responses; "
            f"at most {MAX_MESSAGES} are accepted",
            param="input",
        )
    if not conversation:
        raise RequestError(
            "input: none of its items holds text that a model could read; add a message",
            param="input",
        )
    system = [ChatMessage("system", request.instructions)] if request.instructions else []
    prompt = ChatPrompt(
        messages=(*system, *conversation),
        tools=offered.tools,
        tool_choice=offered.choice,
        parallel_tool_calls=request.parallel_tool_calls,
        template_kwargs=dict(request.chat_template_kwargs),
    )
    effort = request.reasoning.effort if request.reasoning else None
    return with_reasoning(prompt, effort=effort)


def answer_message(parts: Iterable[answer.Part]) -> ChatMessage:
    """Return an answer as the message of the next turn's prompt."""
    texts: dict[str, list[str]] = {"text": [], "reasoning": []}
    calls = []
    for part in parts:
        if part.kind == "call":
            calls.append(ToolCall(part.call_id, part.name, part.text))
        else:
            texts[part.kind].append(part.text)
    return ChatMessage(
        "assistant",
        "".join(texts["text"]),
        reasoning="".join(texts["reasoning"]) or None,
        tool_calls=tuple(calls),
    )
