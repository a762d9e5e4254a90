"""Compiles grammars (JSON schema, regex, choices, tool calls) into token masks with llguidance."""

import hashlib
import logging
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from llguidance import LLMatcher, LLTokenizer, regex_to_lark
from numpy.typing import NDArray

from backends.grammar.constraint import Constraint
from backends.grammar.cost import CostMeter
from backends.grammar.gbnf import grammar_rules, quoted
from backends.grammar.schema_limits import check_enforceable, check_literals, check_pattern
from backends.grammar.schema_text import WHITESPACE, schema_text
from backends.grammar.slash_escapes import SlashEscapes, SlashMatcher
from backends.grammar.trial import GrammarTrial
from backends.grammar.trial_worker import STACK_BYTES, parser_limits
from backends.grammar.verdicts import Verdicts
from backends.grammar.vocabulary import Vocabulary
from core.errors import RequestError, UnsupportedParameter, is_panic
from core.stack import call_with_stack
from core.types import ChoiceOutput, GrammarOutput, JsonOutput, JsonValue, Output, RegexOutput
from core.units import KIB, MIB

logger = logging.getLogger(__name__)

_MAX_GRAMMAR_BYTES = 512 * KIB
_MAX_CHEAP_CHARACTERS = 128 * KIB
_MAX_CACHED_GRAMMARS = 64
_MAX_CACHED_BYTES = 128 * MIB
# Measured: a compiled grammar takes up to 300 times its text; its automaton grows with its use.
_BYTES_PER_CHARACTER = 300
_BYTES_PER_GRAMMAR = MIB
_STACK_BYTES = 2 * STACK_BYTES
# Slow masks stop the streams of all requests, so only this much of them is allowed.
_SLOW_MASK_S = 0.1
_MAX_SLOW_S = 0.5
# For each byte of a mask, the addends of eight logits: 0 if allowed, else -inf.
_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
_ADDENDS = np.where(_BITS == 0, -np.inf, 0.0).astype(np.float32)
_QUOTED_LINE = re.compile(r"\s*\d+ \|")


def _short_message(problem: str) -> str:
    """Return llguidance's message without the quoted grammar, at most 500 characters."""
    kept = [line for line in problem.splitlines() if not _QUOTED_LINE.match(line)]
    return " ".join(" ".join(kept).split())[:500]


class GrammarText:
    """Builds a grammar in llguidance's Lark dialect."""

    def __init__(self, *, is_lenient: bool = False) -> None:
        self.is_lenient = is_lenient
        self._rules: list[str] = []
        self._markers: list[str] = []
        self._count = 0
        self._cost = CostMeter()
        self._has_json = self._has_other = False

    @staticmethod
    def quoted(text: str) -> str:
        """Return `text` as a quoted literal."""
        return quoted(text)

    def reserve(self) -> str:
        """Return a new rule name; give it a body with `define`."""
        self._count += 1
        return f"rule{self._count}"

    def define(self, name: str, body: str) -> None:
        """Define the body of a reserved rule."""
        self._rules.append(f"{name}: {body}")

    def rule(self, body: str) -> str:
        """Define a new rule and return its name."""
        name = self.reserve()
        self.define(name, body)
        return name

    def json(self, schema: Mapping[str, JsonValue], *, is_python: bool = False) -> str:
        r"""Return a rule that matches JSON valid for `schema`.

        `is_python`: it is read as Python, where `\/` is two characters.
        """
        self._has_json = True
        self._has_other |= is_python
        self._cost.add_schema(dict(schema))
        return self.rule(f"%json {schema_text(schema, is_lenient=self.is_lenient)}")

    def user_grammar(self, grammar: str, param: str) -> str:
        """Return the rule of a user's grammar, GBNF or Lark.  Raises RequestError."""
        self._cost.is_cheap = False
        self._has_other = True

        def define(name: str, body: str) -> str:
            self.define(name, body)
            return name

        start, lines = grammar_rules(grammar, param, define)
        if lines:
            self._rules.append(lines)
        return start

    def pattern(self, pattern: str) -> str:
        """Return a rule that matches a regex in Rust's syntax."""
        self._has_other = True
        self._cost.add_pattern(pattern)
        return self.rule(f"/{regex_to_lark(pattern)}/")

    @property
    def gap(self) -> str:
        """Optional, bounded whitespace between parts of text in free style."""
        return f"/{WHITESPACE}/"

    def marker(self, text: str) -> str:
        """Return a rule that matches `text`, which may be a control token of the vocabulary."""
        return f"marker{self._index(text)}"

    def until(self, text: str) -> str:
        """Return a rule that matches anything up to and including such a text."""
        return f"until{self._index(text)}"

    def _index(self, text: str) -> int:
        if text not in self._markers:
            self._markers.append(text)
        return self._markers.index(text)

    def constraint(self, answer: str, param: str, *, reasoning: str | None = None) -> Constraint:
        """Return the grammar of `answer`, optionally after reasoning that ends with `reasoning`."""
        # Lazy up to the closing tag: the answer starts right after it.
        start = f"{self.until(reasoning)} answer" if reasoning is not None else "answer"
        lines = [f"start: {start}", f"answer: {answer}", *self._rules]
        grammar = "\n".join(lines) + "\n"
        is_cheap = self._cost.is_cheap and len(grammar) <= _MAX_CHEAP_CHARACTERS
        is_json = self._has_json and not self._has_other
        return Constraint(grammar, param, tuple(self._markers), is_cheap, is_json)


def output_rule(text: GrammarText, output: Output) -> tuple[str, str]:
    """Return the rule of an answer that matches `output`, and the request field that asked for it.

    A regex is in Rust's syntax.  Raises RequestError.
    """
    match output:
        case RegexOutput(pattern, param):
            check_pattern(pattern, param)
            answer = text.pattern(pattern)
        case ChoiceOutput(choices, param):
            check_literals({"enum": list(choices)}, param)
            answer = " | ".join(map(text.quoted, choices))
        case GrammarOutput(grammar, param):
            answer = text.user_grammar(grammar, param)
        case JsonOutput(schema):
            param = "response_format"
            check_enforceable(dict(schema or {}), param)
            answer = text.json(schema or {"type": "object"})
    return answer, param


def output_constraint(
    output: Output, *, lead: Sequence[str] = (), reasoning: str | None = None
) -> Constraint:
    """Return the grammar that constrains the answer to `output`.

    `lead` are texts, possibly control tokens, that the model has to write before its answer;
    `reasoning` is the text that ends its reasoning, which may then precede them.
    """
    text = GrammarText()
    answer, param = output_rule(text, output)
    markers = " ".join(map(text.marker, lead))
    return text.constraint(f"{markers} ({answer})", param, reasoning=reasoning)


class _Scratch:
    """Buffers for one mask at a time: masks are applied on the engine's thread only."""

    def __init__(self, vocabulary_size: int) -> None:
        self.words = np.zeros((vocabulary_size + 31) // 32, np.uint32)
        self.spare = np.zeros_like(self.words)
        self.addends = np.empty((self.words.nbytes, 8), np.float32)


class GrammarCompiler:
    """Compiles grammars for one vocabulary and caches the latest.  Thread-safe.

    At most 64 grammars are cached, with 128 MiB together.  A grammar that is not certainly cheap
    is tried in a limited child process first.
    """

    def __init__(self, vocabulary: Vocabulary, one_token: Callable[[str], int | None]) -> None:
        """Build the index of the vocabulary; takes about 0.1 s for 50,000 tokens.

        `one_token` returns the id of the single token of a text, or None.
        """
        self._tokenizer = vocabulary.tokenizer()
        self._one_token = one_token
        self._scratch = _Scratch(self._tokenizer.vocab_size)
        self._escapes = SlashEscapes(vocabulary)
        self._trial = GrammarTrial(vocabulary)
        self._lock = threading.Lock()
        self._kept: OrderedDict[bytes, tuple[LLMatcher, int]] = OrderedDict()
        self._kept_bytes = 0
        self._verdicts = Verdicts()

    @property
    def kept(self) -> tuple[int, int]:
        """Number of cached grammars, and the bytes that they take."""
        return len(self._kept), self._kept_bytes

    def mask(self, constraint: Constraint) -> "GrammarMask":
        """Compile a grammar; return the mask of a new sequence at its start.

        Blocks, for a costly grammar up to 30 s.  Raises RequestError if the grammar is too large,
        UnsupportedParameter if it cannot be enforced, Unavailable if the machine is too busy
        to find that out, and Cancelled.
        """
        text = constraint.grammar + self._marker_rules(constraint)
        size = len(text.encode("utf-8", "surrogatepass"))
        if size > _MAX_GRAMMAR_BYTES:
            raise RequestError(
                f"The grammar for {constraint.param} has {size} bytes, but at most "
                f"{_MAX_GRAMMAR_BYTES} are allowed. Send a smaller schema or fewer tools.",
                param=constraint.param,
            )
        key = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
        with self._lock:
            found = self._kept.get(key)
            if found is not None:
                self._kept.move_to_end(key)
        if found is not None:
            return self._mask(constraint, found[0])
        taken_bytes = _BYTES_PER_GRAMMAR + _BYTES_PER_CHARACTER * size
        if not constraint.is_cheap:
            verdict = self._verdicts.get(key, lambda: self._trial.run(text))
            if verdict.refusal:
                raise _refused(verdict.refusal, constraint.param)
            taken_bytes = max(taken_bytes, verdict.grown_bytes)
        matcher = self._compiled(text, constraint.param, is_background=not constraint.is_cheap)
        self._keep(key, matcher, taken_bytes)
        return self._mask(constraint, matcher)

    def _mask(self, constraint: Constraint, matcher: LLMatcher) -> "GrammarMask":
        escapes = self._escapes if constraint.is_json else None
        sequence = SlashMatcher(self._tokenizer, matcher.deep_copy(), escapes)
        return GrammarMask(self._tokenizer, sequence, self._scratch)

    def _compiled(self, text: str, param: str, *, is_background: bool = False) -> LLMatcher:
        # llguidance recurses over nested schemas and chains of references.
        matcher, problem = call_with_stack(
            _STACK_BYTES, lambda: self._compile(text), is_background=is_background
        )
        if matcher is None or problem:
            raise _refused(problem, param)
        return matcher

    def _compile(self, text: str) -> tuple[LLMatcher | None, str]:
        """Return the compiled grammar, and why it cannot be used."""
        try:
            matcher = LLMatcher(
                self._tokenizer,
                LLMatcher.grammar_from_lark(text),
                log_level=0,
                limits=parser_limits(),
            )
            if not matcher.is_error():
                # Some limits, and grammars that match no text, are only detected at the first step.
                matcher.compute_bitmask()
            return matcher, matcher.get_error()
        except BaseException as problem:
            if not is_panic(problem):
                raise
            return None, f"the grammar library failed: {str(problem)[:200]}"

    def _keep(self, key: bytes, matcher: LLMatcher, taken_bytes: int) -> None:
        with self._lock:
            # One that exceeds the whole cache would only drop all others.
            if key in self._kept or taken_bytes > _MAX_CACHED_BYTES:
                return
            self._kept[key] = (matcher, taken_bytes)
            self._kept_bytes += taken_bytes
            while len(self._kept) > _MAX_CACHED_GRAMMARS or self._kept_bytes > _MAX_CACHED_BYTES:
                _, (_, dropped) = self._kept.popitem(last=False)
                self._kept_bytes -= dropped

    def _marker_rules(self, constraint: Constraint) -> str:
        lines = []
        for index, text in enumerate(constraint.markers):
            token_id = self._one_token(text)
            # llguidance matches text with plain tokens only, and control tokens by id only.
            if token_id is None or not self._tokenizer.is_special_token(token_id):
                quoted = GrammarText.quoted(text)
                lines.append(f"marker{index}: {quoted}")
                lines.append(f"until{index}[suffix={quoted}]: /(.|\\n)*/")
            else:
                lines.append(f"marker{index}: <[{token_id}]>")
                lines.append(f"until{index}: /(.|\\n)*/ <[{token_id}]>")
        return "\n".join(lines) + "\n"


def _refused(problem: str, param: str) -> UnsupportedParameter:
    return UnsupportedParameter(
        f"The {param} cannot be enforced: {_short_message(problem).rstrip('.')}. "
        "Simplify it, or leave that part out.",
        param=param,
    )


class GrammarMask:
    """Token mask of one sequence's grammar; implements `constraint.RestartableMask`.

    A grammar whose masks are slow, or that makes the library fail, is given up: from then on only
    the end of the answer is allowed, and `problem` tells why.
    """

    is_active = True

    def __init__(self, tokenizer: LLTokenizer, sequence: SlashMatcher, scratch: _Scratch) -> None:
        self._tokenizer = tokenizer
        self._sequence = sequence
        self._scratch = scratch
        self._failure = ""
        self._slow_s = 0.0
        # Processor time takes a system call, so it is used only once a mask was slow.
        self._clock = time.perf_counter

    def apply(self, logits: NDArray[np.float32]) -> None:
        """Set the logits of disallowed tokens to -inf, in place."""
        if self._failure:
            self._allow_end(logits)
            return
        scratch = self._scratch
        started = self._clock()
        try:
            self._sequence.mask(scratch.words, scratch.spare)
        except BaseException as problem:
            self._give_up(problem)
            self._allow_end(logits)
            return
        taken_s = self._clock() - started
        if taken_s > _SLOW_MASK_S:
            self._note_slow(taken_s)
        np.take(_ADDENDS, scratch.words.view(np.uint8), axis=0, out=scratch.addends, mode="clip")
        addends = scratch.addends.ravel()
        known = logits[: len(addends)]
        np.add(known, addends[: len(known)], out=known)
        logits[len(addends) :] = -np.inf

    def accept(self, token_id: int) -> None:
        """Advance by the chosen token."""
        if self._failure:
            return
        try:
            self._sequence.accept(token_id)
        except BaseException as problem:
            self._give_up(problem)

    def restart(self, data: bytes) -> bool:
        """Restart the grammar and advance by `data`; return whether it accepts that."""
        if self._failure:
            return False
        try:
            return self._sequence.restart(data)
        except BaseException as problem:
            self._give_up(problem)
            return False

    @property
    def problem(self) -> str:
        """Why the grammar can no longer be enforced; empty if it can."""
        return self._failure or _short_message(self._sequence.matcher.get_error())

    @property
    def is_finished(self) -> bool:
        """Whether the grammar is satisfied."""
        matcher = self._sequence.matcher
        return bool(self._failure) or matcher.is_accepting() or matcher.is_stopped()

    def _note_slow(self, taken_s: float) -> None:
        if self._clock is time.perf_counter:
            self._clock = time.thread_time
            return
        self._slow_s += taken_s
        if self._slow_s > _MAX_SLOW_S:
            self._failure = f"its tokens take too long to determine, the last one {taken_s:.2f} s"

    def _give_up(self, problem: BaseException) -> None:
        """Fail this request only."""
        if not (isinstance(problem, Exception) or is_panic(problem)):
            raise problem
        logger.error("the grammar library failed", exc_info=problem)
        self._failure = f"the grammar library failed: {str(problem)[:200]}"

    def _allow_end(self, logits: NDArray[np.float32]) -> None:
        allowed = [each for each in self._tokenizer.eos_tokens if each < len(logits)]
        kept = logits[allowed].copy()
        logits[:] = -np.inf
        logits[allowed] = kept
