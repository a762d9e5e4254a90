"""Prepares a request for the stepper: prompt tokens, token mask and text assembler."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from backends.answer.assembler import TextAssembler
from backends.answer.mask import AnswerMask, ReasoningPlan
from backends.answer.token_rules import BannedTexts, RuleMask, VocabularyTexts, needs_mask
from backends.base import ModelInfo
from backends.control_tokens import EncodesParts
from backends.grammar.compiler import output_constraint
from backends.grammar.constraint import BareCallGrammar, Constraint, TokenMask
from backends.prompt.chat_format import ChatFormat, OutputParser
from backends.prompt.control_text import ControlNames, ControlText, Disguise
from backends.prompt.infill import InfillTokens
from backends.prompt.normalize import normalize_prompt
from backends.stepper import BoundsTokens, KnowsEnds, ShowsTokens, Tokenizer
from core.errors import (
    BrokenModel,
    ContextLengthExceeded,
    RequestError,
    TemplateRefused,
    UnsupportedParameter,
)
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
    TokenizedPrompt,
    TokenizeOptions,
    TokenPrompt,
    TokenRules,
)

_MAX_COUNTED_TOKENS = 2**18
_NO_RULES = TokenRules()
# Tokens and alternatives whose log-probabilities one answer holds.
_MAX_PROMPT_LOGPROBS = 2**17


@dataclass(slots=True)
class Prepared:
    """A request ready to run; `max_tokens` remain to be generated and fit the context.

    The last `generated` tokens of `prompt` belong to a resumed answer; assembler and mask have
    processed them.  `initial_events` are sent before the first token, such as an echoed prompt.
    """

    prompt: tuple[int, ...]
    sampling: SamplingParams
    max_tokens: int
    assembler: TextAssembler
    mask: TokenMask | None = None
    generated: int = 0
    initial_events: list[GenerationEvent] = field(default_factory=list)
    token_bytes: Callable[[int], bytes] = lambda _: b""

    def take_initial_events(self) -> list[GenerationEvent]:
        """Return `initial_events` on the first call, then nothing."""
        events, self.initial_events = self.initial_events, []
        return events


@dataclass(frozen=True, slots=True)
class _Tokenized:
    """A tokenized prompt, with the parser and grammars of its answer."""

    token_ids: list[int]
    parser: OutputParser | None = None
    stop: tuple[str, ...] = ()
    constraint: Constraint | None = None
    triggered: Mapping[str, Constraint] = field(default_factory=dict)
    bare_call: BareCallGrammar | None = None
    reasoning: ReasoningPlan | None = None
    begun: str = ""


@dataclass(frozen=True, slots=True)
class _Rendered:
    """A chat's prompt; which template wrote it, and how control tokens' names are disguised."""

    chat: ChatFormat
    text: str
    disguise: Disguise | None = None

    @property
    def shown(self) -> str:
        """The text with the names as they were."""
        return self.text if self.disguise is None else self.disguise.text(self.text)


class Preparer:
    """Prepares requests of one model; may block up to 2 s for a template.  Thread-safe."""

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
        """Render, tokenize, validate.  Raises RequestError, ContextLengthExceeded, BrokenModel."""
        text = self._tokenized(request)
        count = len(text.token_ids)
        if not count:
            raise RequestError("The prompt is empty; send some text.", param="prompt")
        room = self.context_tokens - count
        if room < 1:
            raise ContextLengthExceeded.of(count, self.context_tokens)
        _check_prompt_logprobs(request.sampling, count)
        max_tokens = room if request.max_tokens is None else min(request.max_tokens, room)
        rules = request.rules or _NO_RULES
        prepared = Prepared(
            prompt=tuple(text.token_ids),
            sampling=self._with_defaults(request.sampling),
            max_tokens=max_tokens,
            assembler=TextAssembler(
                self._tokenizer.token_bytes,
                stop=(*request.stop, *text.stop),
                max_tokens=max_tokens,
                parser=text.parser,
                end_ids=self._checked_ids(rules.stop_token_ids, "stop_token_ids"),
                min_tokens=rules.min_tokens,
                # Evaluation harnesses count tokens from the end.
                lists_end=request.echo_prompt and request.sampling.prompt_logprobs is not None,
            ),
            mask=self._ruled(rules, self._mask(text)),
            initial_events=self._echo_events(request, text.token_ids),
            token_bytes=self._tokenizer.token_bytes,
        )
        if request.generated:
            self._resume(prepared, self._checked_ids(request.generated))
        return prepared

    def _mask(self, text: _Tokenized) -> TokenMask | None:
        """Compile the answer's token mask; tool-call grammars only if the tokenizer supports it."""
        tokenizer = self._tokenizer
        whole = tokenizer.mask(text.constraint) if text.constraint is not None else None
        if whole is not None and text.begun and not whole.restart(text.begun.encode()):
            raise RequestError(
                "messages: the begun answer does not match the format that the request asks for; "
                "change one of them.",
                param="messages",
            )
        triggered, bare_call = [], None
        if whole is None and tokenizer.can_constrain:
            triggered = [(start, tokenizer.mask(one)) for start, one in text.triggered.items()]
            if text.bare_call is not None:
                bare_call = (text.bare_call, tokenizer.mask(text.bare_call.constraint))
        has_budget = text.reasoning is not None and text.reasoning.budget is not None
        if not triggered and bare_call is None and not has_budget:
            return whole
        return AnswerMask(
            tokenizer,
            whole=whole,
            triggered=triggered,
            bare_call=bare_call,
            reasoning=text.reasoning,
        )

    @staticmethod
    def _resume(prepared: Prepared, generated: Sequence[int]) -> None:
        """Advance assembler and mask by the `generated` tokens of a resumed answer.

        If the answer is already complete, `max_tokens` is 0 and text that was held back is in
        `initial_events`.
        """
        assembler = prepared.assembler
        assembler.replay(generated)
        # The prompt's were sent with the first token.
        prepared.sampling = replace(prepared.sampling, prompt_logprobs=None)
        prepared.prompt += tuple(generated)
        prepared.generated = len(generated)
        prepared.max_tokens -= len(generated)
        if prepared.max_tokens <= 0 or assembler.reason is not None:
            prepared.max_tokens = 0
            prepared.initial_events += assembler.finish("length")
        elif prepared.mask is not None:
            for token_id in generated:
                prepared.mask.accept(token_id)

    def read_vocabulary(self) -> None:
        """See `backends.stepper.Tokenizer`."""
        self._tokenizer.read_vocabulary()
        _ = self._control_texts

    def count(self, prompt: Prompt) -> int:
        """Return the number of prompt tokens; raises as `prepare` does.

        A prompt longer than the context is counted too, up to 262,144 tokens.
        """
        limit = max(self.context_tokens, _MAX_COUNTED_TOKENS)
        if isinstance(prompt, ChatPrompt):
            return len(self._chat_ids(self._render(prompt, limit), limit))
        return len(self._plain_ids(prompt, limit))

    def tokenize(self, prompt: Prompt, options: TokenizeOptions) -> TokenizedPrompt:
        """Return the prompt's text and tokens; raises as `count` does."""
        limit = max(self.context_tokens, _MAX_COUNTED_TOKENS)
        text = None
        if isinstance(prompt, ChatPrompt):
            rendered = self._render(prompt, limit)
            token_ids = self._chat_ids(rendered, limit)
            text = rendered.shown
        elif isinstance(prompt, TextPrompt):
            text = prompt.text
            self._check_length(text, limit)
            token_ids = self._tokenizer.encode(
                text, add_bos=options.add_special, parse_special=options.parse_special
            )
        else:
            token_ids = self._plain_ids(prompt, limit)
        pieces = tuple(self._piece(token_id) for token_id in token_ids)
        if text is None:
            text = b"".join(pieces).decode("utf-8", "replace")
        return TokenizedPrompt(text, tuple(token_ids), pieces)

    def _piece(self, token_id: int) -> bytes:
        if isinstance(self._tokenizer, ShowsTokens):
            return self._tokenizer.piece(token_id, special=True)
        return self._tokenizer.token_bytes(token_id)

    def _tokenized(self, request: GenerationRequest) -> _Tokenized:
        if isinstance(request.prompt, ChatPrompt):
            return self._tokenized_chat(request.prompt, request.output)
        constraint = None
        if request.output is not None:
            constraint = output_constraint(request.output)
        return _Tokenized(
            self._plain_ids(request.prompt, self.context_tokens), constraint=constraint
        )

    def _plain_ids(self, prompt: TextPrompt | TokenPrompt | InfillPrompt, limit: int) -> list[int]:
        match prompt:
            case TextPrompt(text):
                return self._encoded(text, limit) or self._new_document()
            case TokenPrompt(token_ids):
                return self._checked_ids(token_ids)
            case InfillPrompt():
                if self._infill is None:
                    raise UnsupportedParameter(
                        f"The model {self._info.name} has no fill-in-the-middle tokens; use "
                        "one with the capability infill, or leave suffix out.",
                        param="suffix",
                    )
                self._check_length(prompt.prefix, limit)
                self._check_length(prompt.suffix, limit)
                return self._infill.token_ids(prompt, self._tokenizer)

    def _chat_ids(self, rendered: _Rendered, limit: int) -> list[int]:
        # Many templates write the BOS token themselves; the tokenizer would add it again.
        text, disguise = rendered.text, rendered.disguise
        text = text.removeprefix(self._bos_text) if self._bos_text else text
        if disguise is None:
            return self._encoded(text, limit)
        assert isinstance(self._tokenizer, EncodesParts)
        self._check_length(disguise.text(text), limit)
        names = self._control_texts[rendered.chat].names
        return self._tokenizer.encode_parts(disguise.parts(text), names, add_bos=True)

    @cached_property
    def _control_texts(self) -> Mapping[ChatFormat, ControlText]:
        """What keeps control tokens out of messages; empty if the tokenizer cannot tell them."""
        if not isinstance(self._tokenizer, EncodesParts):
            return {}
        tokens = self._tokenizer.added_tokens()
        return {
            chat: ControlText(ControlNames.of(tokens, chat.markers, chat.template))
            for chat in self._chat.formats
        }

    def _encoded(self, text: str, limit: int) -> list[int]:
        """Tokenize a prompt, unless it certainly has more than `limit` tokens."""
        self._check_length(text, limit)
        return self._tokenizer.encode(text, add_bos=True, parse_special=True)

    def _new_document(self) -> list[int]:
        """Return how a text begins without a BOS token: after the end of another, as in training.

        Source: OpenAI's API reference, completions, `prompt`.
        """
        ends = self._tokenizer.end_ids if isinstance(self._tokenizer, KnowsEnds) else ()
        return [min(ends)] if ends else []

    def _check_length(self, text: str, limit: int) -> None:
        if isinstance(self._tokenizer, BoundsTokens):
            fewest = self._tokenizer.fewest_tokens(text, limit)
            if fewest > limit:
                raise ContextLengthExceeded.of(fewest, self.context_tokens, is_least=True)

    def _render(self, prompt: ChatPrompt, limit: int) -> _Rendered:
        """Render the prompt with the template for it, else with the default one."""
        # A text that cannot fit is not copied to the template's process and back.
        asked = (each.content for each in reversed(prompt.messages) if each.role == "user")
        self._check_length(next(asked, "").strip(), limit)
        prompt = normalize_prompt(prompt) if self._stable_prompts else prompt
        chat = self._chat.for_prompt(prompt)
        try:
            return self._rendered(chat, prompt)
        except (TemplateRefused, BrokenModel) as error:
            if chat is self._chat or not self._chat.reads(prompt):
                raise
            first = error
        try:
            return self._rendered(self._chat, prompt)
        except (TemplateRefused, BrokenModel):
            raise first from None

    def _rendered(self, chat: ChatFormat, prompt: ChatPrompt) -> _Rendered:
        control_text = self._control_texts.get(chat)
        if control_text is None:
            return _Rendered(chat, chat.render(prompt))
        return _Rendered(chat, *control_text.render(prompt, chat.render))

    def limitations(self) -> tuple[str, ...]:
        """Return what chat templates make impossible; renders them, which blocks as `prepare`."""
        return tuple(
            dict.fromkeys(
                sentence
                for chat, control_text in self._control_texts.items()
                if chat.template
                for sentence in control_text.limitations(chat.render)
            )
        )

    def _tokenized_chat(self, prompt: ChatPrompt, output: Output | None) -> _Tokenized:
        rendered = self._render(prompt, self.context_tokens)
        chat, text = rendered.chat, rendered.text
        return _Tokenized(
            self._chat_ids(rendered, self.context_tokens),
            chat.parser(prompt, text),
            chat.stop,
            chat.constraint(prompt, output, text),
            chat.triggered(prompt),
            chat.bare_call(prompt),
            chat.reasoning(prompt, text),
            # A forced call follows the begun text, a format includes it.
            chat.begun_output(prompt) if prompt.tool_choice in ("none", "auto") else "",
        )

    def _ruled(self, rules: TokenRules, mask: TokenMask | None) -> TokenMask | None:
        """Return `mask` with the bans of `rules`, if there are any."""
        if not needs_mask(rules):
            return mask
        if not isinstance(self._tokenizer, KnowsEnds):
            given = ("bad_words", "min_tokens", "ignore_eos")
            param = next(name for name in given if getattr(rules, name))
            raise UnsupportedParameter(
                f"The model {self._info.name} does not support {param}; leave it out.", param=param
            )
        texts = BannedTexts(rules.bad_words, self._token_texts) if rules.bad_words else None
        return RuleMask(
            rules,
            mask,
            end_ids=self._tokenizer.end_ids,
            texts=texts,
            token_bytes=self._tokenizer.token_bytes,
        )

    @cached_property
    def _token_texts(self) -> VocabularyTexts:
        return VocabularyTexts(self._tokenizer.token_bytes, self._tokenizer.vocabulary_size)

    def _checked_ids(self, token_ids: Sequence[int], param: str = "prompt") -> list[int]:
        size = self._tokenizer.vocabulary_size
        for token_id in token_ids:
            if not 0 <= token_id < size:
                raise RequestError(
                    f"Token id {token_id} is outside the vocabulary; ids are 0 to {size - 1}.",
                    param=param,
                )
        return list(token_ids)

    def _with_defaults(self, sampling: SamplingParams) -> SamplingParams:
        """Fill unset sampling parameters from the model's own recommendation."""
        chosen: Mapping[str, float | int | None] = {
            name: getattr(sampling, name)
            if getattr(sampling, name) is not None
            else getattr(self._defaults, name)
            for name in ("temperature", "top_p", "top_k", "min_p")
        }
        return replace(sampling, **chosen)  # type: ignore[arg-type]

    def _echo_events(
        self, request: GenerationRequest, token_ids: list[int]
    ) -> list[GenerationEvent]:
        if not request.echo_prompt:
            return []
        if isinstance(request.prompt, TextPrompt):
            return [TextDelta(request.prompt.text)]
        has_logprobs = request.sampling.prompt_logprobs is not None
        # Control tokens have no text; where each token is listed, their names stand for them.
        shown = self._piece if has_logprobs else self._tokenizer.token_bytes
        data = b"".join(map(shown, token_ids))
        return [TextDelta(data.decode("utf-8", "replace"))]

    def close(self) -> None:
        """Stop the templates' processes; idempotent."""
        self._chat.close()


def _check_prompt_logprobs(sampling: SamplingParams, count: int) -> None:
    """Raise RequestError if the log-probabilities of `count` prompt tokens would be too many."""
    if sampling.prompt_logprobs is None:
        return
    entries = count * (sampling.prompt_logprobs + 1)
    if entries > _MAX_PROMPT_LOGPROBS:
        raise RequestError(
            f"The log-probabilities of {count} prompt tokens with {sampling.prompt_logprobs} "
            f"alternatives each are {entries} values; at most {_MAX_PROMPT_LOGPROBS} are given. "
            "Ask for fewer alternatives, or shorten the prompt.",
            param="prompt",
        )
