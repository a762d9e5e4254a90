"""`POST /tokenize`, `/detokenize` and `/apply-template`, in llama.cpp's and in vLLM's form."""

from collections.abc import Awaitable, Callable
from typing import Annotated

from pydantic import Field
from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response

from core.errors import RequestError
from core.types import (
    Capability,
    ChatPrompt,
    JsonValue,
    Prompt,
    TextPrompt,
    TokenizedPrompt,
    TokenizeOptions,
    TokenPrompt,
)
from router.answers.event_feed import unless_disconnected
from router.answers.generation import client_closed_response
from router.context import RouteContext, record_of
from router.requests.body import read_request
from router.requests.fields import Items, RequestBody
from router.requests.limits import MAX_INT32, MAX_ITEM_VALUES, MAX_MESSAGES
from router.requests.model_defaults import prompt_with_defaults
from router.services import ModelView
from router.v1.chat.prompt import to_chat_prompt, with_continuation
from router.v1.chat.request import ChatRequest, Message

Endpoint = Callable[[Request], Awaitable[Response]]


class TemplateRequest(ChatRequest):
    """Body of `POST /apply-template`: a chat request, of which only the prompt counts."""


class TokenizeRequest(TemplateRequest):
    """Body of `POST /tokenize`: a text as `content` (llama.cpp) or `prompt` (vLLM), or messages."""

    messages: Annotated[Items[Message], Field(max_length=MAX_MESSAGES)] = Field(
        default_factory=list
    )
    content: str | None = None
    prompt: str | None = None
    add_special: bool | None = None
    add_special_tokens: bool | None = None
    parse_special: bool | None = None
    with_pieces: bool | None = None
    return_token_strs: bool | None = None

    def refuse_unsupported(self) -> None:
        """Also refuse anything but one text or one conversation."""
        super().refuse_unsupported()
        given = [
            name
            for name in ("content", "prompt", "messages")
            if getattr(self, name) not in (None, [])
        ]
        if len(given) != 1:
            raise RequestError(
                "Send exactly one of content, prompt and messages; the request has "
                f"{', '.join(given) or 'none'}.",
                param=given[-1] if given else "content",
            )

    @property
    def options(self) -> TokenizeOptions:
        """How the text is tokenized; llama.cpp's default adds nothing to `content`."""
        adds = self.add_special if self.add_special is not None else self.add_special_tokens
        return TokenizeOptions(
            add_special=self.content is None if adds is None else adds,
            parse_special=self.parse_special is not False,
        )

    def to_prompt(self) -> Prompt:
        """Return the text or the conversation."""
        text = self.content if self.content is not None else self.prompt
        return to_chat_prompt(self) if text is None else TextPrompt(text)


class DetokenizeRequest(RequestBody):
    """Body of `POST /detokenize`."""

    tokens: Annotated[
        list[Annotated[int, Field(ge=0, le=MAX_INT32)]],
        Field(max_length=MAX_ITEM_VALUES, fail_fast=True),
    ]


def tokenize_endpoint(context: RouteContext) -> Endpoint:
    """Return the handler that tokenizes a text or a conversation."""

    async def tokenize(request: Request) -> Response:
        body, (prompt, ignored) = await read_request(request, TokenizeRequest, _converted_text)
        view, found = await _ask(context, request, body, prompt, body.options)
        if found is None:
            return client_closed_response()
        strings: list[JsonValue] = [piece.decode("utf-8", "replace") for piece in found.pieces]
        tokens: JsonValue = list(found.token_ids)
        if body.with_pieces:
            tokens = [
                {"id": token_id, "piece": _piece(piece)}
                for token_id, piece in zip(found.token_ids, found.pieces, strict=True)
            ]
        answer: dict[str, JsonValue] = {
            "tokens": tokens,
            "count": len(found.token_ids),
            "max_model_len": view.max_model_len,
            "token_strs": strings if body.return_token_strs else None,
        }
        return _answer(context, answer, ignored)

    return tokenize


def detokenize_endpoint(context: RouteContext) -> Endpoint:
    """Return the handler that tells the text of tokens."""

    async def detokenize(request: Request) -> Response:
        body, ignored = await read_request(
            request, DetokenizeRequest, DetokenizeRequest.ignored_names
        )
        text = ""
        if body.tokens:
            prompt = TokenPrompt(tuple(body.tokens))
            _, found = await _ask(context, request, body, prompt, TokenizeOptions())
            if found is None:
                return client_closed_response()
            text = found.text
        return _answer(context, {"content": text, "prompt": text}, ignored)

    return detokenize


def template_endpoint(context: RouteContext) -> Endpoint:
    """Return the handler that tells the text that a conversation becomes."""

    async def apply_template(request: Request) -> Response:
        body, (prompt, ignored) = await read_request(request, TemplateRequest, _converted_chat)
        _, found = await _ask(context, request, body, prompt, TokenizeOptions())
        if found is None:
            return client_closed_response()
        return _answer(context, {"prompt": found.text}, ignored)

    return apply_template


def _converted_text(body: TokenizeRequest) -> tuple[Prompt, list[str]]:
    return body.to_prompt(), body.ignored_names()


def _converted_chat(body: TemplateRequest) -> tuple[Prompt, list[str]]:
    return to_chat_prompt(body), body.ignored_names()


async def _ask(
    context: RouteContext,
    request: Request,
    body: RequestBody,
    prompt: Prompt,
    options: TokenizeOptions,
) -> tuple[ModelView, TokenizedPrompt | None]:
    """Return the model and what it makes of `prompt`, None if the client left."""
    is_plain = isinstance(prompt, TextPrompt | TokenPrompt)
    capability = Capability.COMPLETION if is_plain else Capability.CHAT
    view = await context.model(body.model, capability, record_of(request.scope))
    if isinstance(body, ChatRequest) and isinstance(prompt, ChatPrompt):
        is_set = context.services.settings.continue_answers
        prompt = with_continuation(prompt, body, view, by_default=is_set)
    deadline_s = context.services.settings.request_timeout_s
    prompt = prompt_with_defaults(prompt, view)
    asked = context.services.dispatcher.tokenize(view.id, prompt, options, deadline_s)
    return view, await unless_disconnected(asked, request.receive)


def _piece(piece: bytes) -> JsonValue:
    """Return a token as text, or as llama.cpp does as its bytes where it is not whole UTF-8."""
    try:
        return piece.decode("utf-8")
    except UnicodeDecodeError:
        return list(piece)


def _answer(context: RouteContext, content: dict[str, JsonValue], ignored: list[str]) -> Response:
    return Response(
        to_json(content), media_type="application/json", headers=context.ignored.report(ignored)
    )
