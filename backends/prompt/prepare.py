"""From a request to what a stepper needs: prompt tokens, grammar, and the text assembler."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from backends.answer.assembler import TextAssembler
from backends.answer.mask import AnswerMask, ReasoningPlan
from backends.base import ModelInfo
from backends.grammar.compiler import output_constraint
from backends.grammar.constraint import Constraint, OpeningCall, TokenMask
from backends.prompt.chat_format import ChatFormat, OutputParser
from backends.prompt.infill import InfillTokens
from backends.prompt.normalize import stable
from backends.stepper import Tokenizer
from core.errors import ContextLengthExceeded, RequestError, UnsupportedParameter
from core.types import (
    ChatPrompt,
    GenerationEvent,
    GenerationRequest,
    InfillPrompt,
    Output,
    Prompt,
    SamplingParams,
    TextDelta,
    TextPrompt,
    TokenPrompt,
)


@dataclass(slots=True)
class Prepared:
    """A request ready to run; `max_tokens` are still to come and fit the context.

    The last `generated` tokens of `prompt` are of the answer; assembler and mask know them.
    """

    prompt: tuple[int, ...]
    sampling: SamplingParams
    max_tokens: int
    assembler: TextAssembler
    mask: TokenMask | None = None
    generated: int = 0
    opening: list[GenerationEvent] = field(default_factory=list)
    token_bytes: Callable[[int], bytes] = lambda _: b""

    def take_opening(self) -> list[GenerationEvent]:
        """Return the events that come before the first token, once."""
        opening, self.opening = self.opening, []
        return opening


@dataclass(frozen=True, slots=True)
class _Text:
    """A prompt as text or token ids, with what reads the answer."""

    token_ids: list[int]
    parser: OutputParser | None = None
    stop: tuple[str, ...] = ()
    constraint: Constraint | None = None
    triggered: Mapping[str, Constraint] = field(default_factory=dict)
    opening: OpeningCall | None = None
    reasoning: ReasoningPlan | None = None


class Preparer:
    """Prepares requests of one model; may block for a template's 2 s.  Thread-safe."""

    def __init__(
        self,
        info: ModelInfo,
        tokenizer: Tokenizer,
        chat: ChatFormat,
        *,
        context_tokens: int,
        bos_text: str = "",
        defaults: SamplingParams | None = None,
        infill: InfillTokens | None = None,
        stable_prompts: bool = True,
    ) -> None:
        self._info = info
        self._tokenizer = tokenizer
        self._chat = chat
        self.context_tokens = context_tokens
        self._bos_text = bos_text
        self._defaults = defaults or SamplingParams()
        self._infill = infill
        self._stable_prompts = stable_prompts

    def prepare(self, request: GenerationRequest) -> Prepared:
        """Render, tokenize and check.  Raises RequestError, ContextLengthExceeded, BrokenModel."""
        text = self._read(request)
        count = len(text.token_ids)
        if not count:
            raise RequestError("The prompt is empty.", param="prompt")
        room = self.context_tokens - count
        if room < 1:
            raise ContextLengthExceeded.of(count, self.context_tokens)
        max_tokens = room if request.max_tokens is None else min(request.max_tokens, room)
        prepared = Prepared(
            prompt=tuple(text.token_ids),
            sampling=self._with_defaults(request.sampling),
            max_tokens=max_tokens,
            assembler=TextAssembler(
                self._tokenizer.token_bytes,
                stop=(*request.stop, *text.stop),
                max_tokens=max_tokens,
                parser=text.parser,
            ),
            mask=self._mask(text),
            opening=self._opening(request, text.token_ids),
            token_bytes=self._tokenizer.token_bytes,
        )
        if request.generated:
            self._resume(prepared, self._checked(request.generated))
        return prepared

    def _mask(self, text: _Text) -> TokenMask | None:
        """Compile what bounds the answer; the grammar of begun calls only where it can be."""
        tokenizer = self._tokenizer
        whole = tokenizer.mask(text.constraint) if text.constraint is not None else None
        triggered, opening = [], None
        if whole is None and tokenizer.can_constrain:
            triggered = [(start, tokenizer.mask(one)) for start, one in text.triggered.items()]
            if text.opening is not None:
                opening = (text.opening, tokenizer.mask(text.opening.constraint))
        has_budget = text.reasoning is not None and text.reasoning.budget is not None
        if not triggered and opening is None and not has_budget:
            return whole
        return AnswerMask(
            tokenizer,
            whole=whole,
            triggered=triggered,
            opening=opening,
            reasoning=text.reasoning,
        )

    @staticmethod
    def _resume(prepared: Prepared, generated: Sequence[int]) -> None:
        """Bring assembler and mask to where they stood after the `generated` tokens.

        Where nothing may follow them, `max_tokens` is 0 and what was held back opens the answer.
        """
        assembler = prepared.assembler
        assembler.replay(generated)
        prepared.prompt += tuple(generated)
        prepared.generated = len(generated)
        prepared.max_tokens -= len(generated)
        if prepared.max_tokens <= 0 or assembler.reason is not None:
            prepared.max_tokens = 0
            prepared.opening += assembler.finish("length")
        elif prepared.mask is not None:
            for token_id in generated:
                prepared.mask.accept(token_id)

    def count(self, prompt: Prompt) -> int:
        """Return how many tokens `prompt` comes to; raises as `prepare`, but not for its length."""
        if isinstance(prompt, ChatPrompt):
            return len(self._chat_ids(self._render(prompt)))
        return len(self._plain_ids(prompt))

    def _read(self, request: GenerationRequest) -> _Text:
        if isinstance(request.prompt, ChatPrompt):
            return self._read_chat(request.prompt, request.output)
        constraint = None
        if request.output is not None:
            constraint = output_constraint(request.output)
        return _Text(self._plain_ids(request.prompt), constraint=constraint)

    def _plain_ids(self, prompt: TextPrompt | TokenPrompt | InfillPrompt) -> list[int]:
        match prompt:
            case TextPrompt(text):
                return self._tokenizer.encode(text, add_bos=True, parse_special=True)
            case TokenPrompt(token_ids):
                return self._checked(token_ids)
            case InfillPrompt():
                if self._infill is None:
                    raise UnsupportedParameter(
                        f"The model {self._info.name} has no tokens for filling in the middle.",
                        param="suffix",
                    )
                return self._infill.token_ids(prompt, self._tokenizer)

    def _chat_ids(self, rendered: str) -> list[int]:
        # Many templates write the token themselves; the tokenizer adds it again otherwise.
        text = rendered.removeprefix(self._bos_text) if self._bos_text else rendered
        return self._tokenizer.encode(text, add_bos=True, parse_special=True)

    def _render(self, prompt: ChatPrompt) -> str:
        return self._chat.render(stable(prompt) if self._stable_prompts else prompt)

    def _read_chat(self, prompt: ChatPrompt, output: Output | None) -> _Text:
        rendered = self._render(prompt)
        return _Text(
            self._chat_ids(rendered),
            self._chat.parser(prompt, rendered),
            self._chat.stop,
            self._chat.constraint(prompt, output, rendered),
            self._chat.triggered(prompt),
            self._chat.opening(prompt),
            self._chat.reasoning(prompt, rendered),
        )

    def _checked(self, token_ids: Sequence[int]) -> list[int]:
        size = self._tokenizer.vocabulary_size
        for token_id in token_ids:
            if not 0 <= token_id < size:
                raise RequestError(
                    f"Token id {token_id} is outside the vocabulary of {size} tokens.",
                    param="prompt",
                )
        return list(token_ids)

    def _with_defaults(self, sampling: SamplingParams) -> SamplingParams:
        """Fill what the request leaves open from the model's own recommendation."""
        chosen: Mapping[str, float | int | None] = {
            name: getattr(sampling, name)
            if getattr(sampling, name) is not None
            else getattr(self._defaults, name)
            for name in ("temperature", "top_p", "top_k", "min_p")
        }
        return replace(sampling, **chosen)  # type: ignore[arg-type]

    def _opening(self, request: GenerationRequest, token_ids: list[int]) -> list[GenerationEvent]:
        if not request.echo_prompt:
            return []
        if request.sampling.top_logprobs is not None:
            raise UnsupportedParameter("echo cannot be combined with logprobs.", param="echo")
        if isinstance(request.prompt, TextPrompt):
            return [TextDelta(request.prompt.text)]
        data = b"".join(self._tokenizer.token_bytes(token_id) for token_id in token_ids)
        return [TextDelta(data.decode("utf-8", "replace"))]

    def close(self) -> None:
        """Stop the template's process; twice is fine."""
        self._chat.close()
