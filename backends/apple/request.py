"""Translates a generation request for a session of Apple's model; pure."""

from backends.apple.sessions import ForcedTool, SessionRequest
from backends.apple.transcript import guided_schema, read_conversation
from core.errors import RequestError, UnsupportedCapability, UnsupportedParameter
from core.types import (
    ChatPrompt,
    GenerationRequest,
    JsonOutput,
    JsonValue,
    Output,
    SamplingParams,
    TokenRules,
    Tool,
)


def read_session_request(request: GenerationRequest) -> tuple[SessionRequest, ChatPrompt]:
    """Return the request for a session, and the chat that it answers.

    Raises UnsupportedCapability for plain prompts, UnsupportedParameter and RequestError.
    """
    prompt = request.prompt
    if not isinstance(prompt, ChatPrompt):
        raise UnsupportedCapability(
            "Apple's model answers chats only; use /v1/chat/completions.", param="model"
        )
    if prompt.continues_answer:
        raise UnsupportedParameter(
            "messages: Apple's model cannot continue a begun answer; end with a user's message.",
            param="messages",
        )
    if prompt.documents:
        raise UnsupportedParameter(
            "documents: Apple's model reads none; put their text into a message.",
            param="documents",
        )
    _check_sampling(request.sampling)
    _check_rules(request.rules or TokenRules())
    _check_reasoning(prompt)
    if request.max_tokens is not None and request.max_tokens < 1:
        raise RequestError("max_tokens must be at least 1.", param="max_tokens")
    forced = _forced(prompt)
    # A forced call is the whole answer, so no text is left for a format to apply to.
    output = None if forced else request.output
    session_request = SessionRequest(
        conversation=read_conversation(prompt),
        max_tokens=request.max_tokens,
        temperature=request.sampling.temperature,
        schema=None if output is None else _output_schema(output),
        forced=forced,
        param="tools" if forced else "response_format",
    )
    return session_request, prompt


def _output_schema(output: Output) -> dict[str, JsonValue]:
    if not isinstance(output, JsonOutput):
        raise UnsupportedParameter(
            f"Apple's model does not support {output.param}; send a JSON schema.",
            param=output.param,
        )
    if output.schema is None:
        raise UnsupportedParameter(
            "Apple's model does not support json_object; send a JSON schema.",
            param="response_format",
        )
    return guided_schema(output.schema, "response_format")


def _forced(prompt: ChatPrompt) -> tuple[ForcedTool, ...]:
    """Return the tools of which one must be called.  Raises RequestError if there is none."""
    if prompt.tool_choice in ("none", "auto"):
        return ()
    tools = prompt.tools
    if isinstance(prompt.tool_choice, tuple):
        name = prompt.tool_choice[1]
        tools = tuple(tool for tool in tools if tool.name == name)[:1]
    if not tools:
        raise RequestError("tool_choice asks for a tool that is not in tools.", param="tool_choice")
    return tuple(ForcedTool(tool.name, _arguments_schema(tool)) for tool in tools)


def _arguments_schema(tool: Tool) -> dict[str, JsonValue] | None:
    if not tool.parameters.get("properties"):
        return None
    return guided_schema(tool.parameters, "tools")


def _check_reasoning(prompt: ChatPrompt) -> None:
    given = {
        "reasoning_effort": prompt.reasoning_effort,
        "reasoning.max_tokens": prompt.reasoning_tokens,
    }
    for param, value in given.items():
        if value is not None:
            raise UnsupportedParameter("Apple's model does not support reasoning.", param=param)


def _check_rules(rules: TokenRules) -> None:
    """Refuse rules of tokens, which the system neither shows nor lets choose."""
    for param in ("ignore_eos", "min_tokens", "stop_token_ids", "bad_words"):
        if getattr(rules, param):
            raise UnsupportedParameter(
                f"Apple's model does not support {param}; remove it.", param=param
            )


def _check_sampling(sampling: SamplingParams) -> None:
    """Refuse what the SDK silently ignores; greedy sampling does not depend on the first four.

    Source: GenerationOptions.to_dict writes them as strings, which the Swift side does not read.
    """
    is_greedy = sampling.temperature == 0
    given = {
        "top_p": not is_greedy and sampling.top_p not in (None, 1.0),
        "top_k": not is_greedy and bool(sampling.top_k),
        "min_p": not is_greedy and bool(sampling.min_p),
        "seed": not is_greedy and sampling.seed is not None,
        "presence_penalty": sampling.presence_penalty != 0,
        "frequency_penalty": sampling.frequency_penalty != 0,
        "repetition_penalty": sampling.repetition_penalty != 1,
        "logit_bias": bool(sampling.logit_bias),
        "logprobs": sampling.top_logprobs is not None,
        "prompt_logprobs": sampling.prompt_logprobs is not None,
    }
    for param, is_given in given.items():
        if is_given:
            raise UnsupportedParameter(
                f"Apple's model does not support {param}; remove it.", param=param
            )
