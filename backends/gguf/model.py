"""Loads a GGUF model with llama.cpp: weights, tokenizer and context."""

import ctypes
import logging
import sys
import threading
from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from backends.base import EngineOptions
from backends.control_tokens import PromptPart
from backends.gguf.control_text import PartEncoder, added_texts
from backends.gguf.tokenization import GgufTokenization
from backends.grammar.compiler import GrammarCompiler, GrammarMask
from backends.grammar.constraint import Constraint
from backends.grammar.vocabulary import Vocabulary
from core.errors import BrokenModel, InsufficientMemory
from core.native_exit import hold, let_go

logger = logging.getLogger(__name__)

_LOG_LEVELS = {2: logging.DEBUG, 3: logging.WARNING, 4: logging.ERROR}
_METADATA_BYTES = 512


class _NativeLog:
    """Forwards llama.cpp's log to our logger; keeps the last error lines for messages."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._errors: list[tuple[int, str]] = []
        self._callback: Any = None

    def install(self, llama_cpp: Any) -> None:
        """Redirect the library's log to this object; once per process."""
        with self._lock:
            if self._callback is None:
                self._callback = llama_cpp.llama_log_callback(self._on_line)
                llama_cpp.llama_log_set(self._callback, ctypes.c_void_p(0))

    def _on_line(self, level: int, text: bytes, _data: Any) -> None:
        line = text.decode("utf-8", "replace").strip()
        if level in _LOG_LEVELS and line:
            logger.debug("llama.cpp: %s", line)
        if level == 4 and line:
            with self._lock:
                self._errors = [*self._errors[-4:], (threading.get_ident(), line)]

    def take_errors(self) -> str:
        """Return the last error lines and forget them."""
        with self._lock:
            lines, self._errors = self._errors, []
        return "; ".join(line for _, line in lines)

    def take_own_errors(self) -> str:
        """Return the last error lines of calls on this thread and forget them."""
        own = threading.get_ident()
        with self._lock:
            lines = [line for thread, line in self._errors if thread == own]
            self._errors = [each for each in self._errors if each[0] != own]
        return "; ".join(lines)


native_log = _NativeLog()


def library() -> Any:
    """Import and initialize llama_cpp; idempotent and thread-safe."""
    import llama_cpp

    native_log.install(llama_cpp)
    llama_cpp.llama_backend_init()
    return llama_cpp


@cache
def tell_of_kernels() -> None:
    """Log once in a process on macOS why its first load takes longer.

    llama.cpp compiles Metal's kernels from its source in each process; macOS keeps the result.
    """
    if sys.platform == "darwin":
        logger.info(
            "llama.cpp compiles its Metal kernels with this first load of the process; the first "
            "time on a Mac this can take a minute."
        )


class GgufModel:
    """Weights and vocabulary of one model; implements `backends.stepper.Tokenizer`.

    Loading blocks.  The vocabulary is thread-safe; only contexts use the weights.
    """

    def __init__(self, path: Path) -> None:
        """Load `path` (the first shard of a split model).  Raises BrokenModel."""
        self._llama = library()
        params = self._llama.llama_model_default_params()
        tell_of_kernels()
        # All layers on Metal; a CPU build ignores the number.
        params.n_gpu_layers = 999 if sys.platform == "darwin" else 0
        self.handle = self._llama.llama_model_load_from_file(str(path).encode(), params)
        if not self.handle:
            reason = native_log.take_errors() or "llama.cpp gave no reason"
            raise BrokenModel(
                f"llama.cpp cannot load {path.name}: {reason}. Download the file again, or use "
                "another quantization.",
                param="model",
            )
        hold(self.handle)
        self.vocabulary = self._llama.llama_model_get_vocab(self.handle)
        self._size = int(self._llama.llama_vocab_n_tokens(self.vocabulary))
        self._text = GgufTokenization(
            self._llama, self.vocabulary, self.metadata("tokenizer.ggml.pre")
        )
        self._pieces: dict[int, bytes] = {}
        self._ends: dict[int, bool] = {}
        self._part_encoders: dict[frozenset[str], PartEncoder] = {}
        self._grammar_lock = threading.Lock()
        self._compiler: GrammarCompiler | None = None
        self._keeps_state = bool(
            self._llama.llama_model_is_recurrent(self.handle)
            or self._llama.llama_model_is_hybrid(self.handle)
        )

    @property
    def vocabulary_size(self) -> int:
        """Number of token ids."""
        return self._size

    @property
    def keeps_recurrent_state(self) -> bool:
        """Whether the model is recurrent: a sequence cannot be cut back to an earlier token."""
        return self._keeps_state

    @property
    def whole_beyond(self) -> int:
        """Length in tokens from which on a sequence can be continued at its end only.

        A recurrent state does not keep earlier tokens; cells before a sliding window are
        overwritten by others (Source: llama.cpp llama_kv_cache::find_slot).
        """
        if self._keeps_state:
            return 0
        return int(self._llama.llama_model_n_swa(self.handle)) or 1 << 30

    def metadata(self, key: str) -> str:
        """Return a value of the file's metadata as text; empty if there is none."""
        buffer = ctypes.create_string_buffer(_METADATA_BYTES)
        size = self._llama.llama_model_meta_val_str(self.handle, key.encode(), buffer, len(buffer))
        return buffer.value.decode("utf-8", "replace") if size >= 0 else ""

    @property
    def adds_bos(self) -> bool:
        """Whether prompts start with a beginning-of-sequence token."""
        return bool(self._llama.llama_vocab_get_add_bos(self.vocabulary))

    def encode(self, text: str, *, add_bos: bool, parse_special: bool) -> list[int]:
        """Return the token ids of `text`; `parse_special` recognizes names of special tokens.

        Raises RequestError for text that is not valid Unicode or not in the vocabulary.
        """
        return self._text.encode(text, add_special=add_bos, parse_special=parse_special)

    def added_tokens(self) -> Mapping[str, bool]:
        """See `backends.control_tokens.EncodesParts`."""
        return added_texts(self._text)

    def encode_parts(
        self, parts: Sequence[PromptPart], names: frozenset[str], *, add_bos: bool
    ) -> list[int]:
        """See `backends.control_tokens.EncodesParts`."""
        encoder = self._part_encoders.get(names)
        if encoder is None:
            encoder = self._part_encoders[names] = PartEncoder(self._text, names)
        return encoder.encode(parts, add_bos=add_bos)

    def fewest_tokens(self, text: str, limit: int) -> int:
        """Return a lower bound of the tokens of `text`; see `backends.stepper.BoundsTokens`."""
        return self._text.fewest_tokens(text, limit)

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that a token adds to the text; control tokens add none."""
        piece = self._pieces.get(token_id)
        if piece is None:
            piece = self._pieces[token_id] = self.piece(token_id, special=False)
        return piece

    def piece(self, token_id: int, *, special: bool) -> bytes:
        """Return a token's bytes; with `special`, control tokens give their name."""
        return self._text.piece(token_id, special=special)

    def show(self, *token_texts: bytes) -> None:
        """Make the control tokens of these names appear in the text.

        Markers such as <think> are control tokens in some vocabularies; parsers need to see them.
        """
        for text in token_texts:
            ids = self.encode(text.decode(), add_bos=False, parse_special=True)
            if len(ids) == 1 and self.piece(ids[0], special=True) == text:
                self._pieces[ids[0]] = text

    def is_end(self, token_id: int) -> bool:
        """Whether a token ends the generation."""
        known = self._ends.get(token_id)
        if known is None:
            known = bool(self._llama.llama_vocab_is_eog(self.vocabulary, token_id))
            self._ends[token_id] = known
        return known

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """See `backends.stepper.KnowsEnds`."""
        return frozenset(filter(self.is_end, range(self._size)))

    can_constrain = True

    def mask(self, constraint: Constraint) -> GrammarMask:
        """Compile a grammar; the first call also reads the vocabulary, for some 200 ms."""
        return self._grammars().mask(constraint)

    def read_vocabulary(self) -> None:
        """See `backends.stepper.Tokenizer`."""
        self._text.read_vocabulary()
        self._grammars()

    def _grammars(self) -> GrammarCompiler:
        with self._grammar_lock:
            if self._compiler is None:
                tokens = self._text.pieces
                ids = range(self._size)
                special = [each for each in ids if self._is_special(each, tokens[each])]
                ends = sorted(self.end_ids)
                vocabulary = Vocabulary(tokens, special, ends)
                self._compiler = GrammarCompiler(vocabulary, self._one_token)
            return self._compiler

    def _one_token(self, text: str) -> int | None:
        ids = self.encode(text, add_bos=False, parse_special=True)
        is_one = len(ids) == 1 and self.piece(ids[0], special=True) == text.encode()
        return ids[0] if is_one else None

    def _is_special(self, token_id: int, piece: bytes) -> bool:
        attributes = self._text.attributes[token_id]
        is_named = piece.startswith(b"<") and piece.endswith(b">")
        return bool(
            attributes & self._llama.LLAMA_TOKEN_ATTR_CONTROL
            or (attributes & self._llama.LLAMA_TOKEN_ATTR_USER_DEFINED and is_named)
        )

    def special_text(self, which: str) -> str:
        """Return the text of the `bos` or `eos` token; empty if there is none."""
        token_id = getattr(self._llama, f"llama_vocab_{which}")(self.vocabulary)
        if token_id < 0:
            return ""
        return self.piece(token_id, special=True).decode("utf-8", "replace")

    def close(self) -> None:
        """Free the weights; idempotent."""
        if self.handle:
            self._llama.llama_model_free(self.handle)
            let_go(self.handle)
            self.handle = None


def flash_attention(options: EngineOptions) -> str:
    """Return `enabled`, or `auto` where llama.cpp decides by the device.

    Values are stored transposed without it, and only it reads quantized values.
    """
    return "auto" if options.kv_type is None else "enabled"


def open_context(model: GgufModel, options: EngineOptions, slot_count: int) -> Any:
    """Return a llama.cpp context with `options.kv_tokens` cells for `slot_count` sequence ids.

    Raises InsufficientMemory.
    """
    llama = library()
    params = llama.llama_context_default_params()
    params.n_ctx = options.kv_tokens
    params.n_batch = options.prefill_chunk_tokens + options.max_sequences
    params.n_ubatch = params.n_batch
    params.n_seq_max = slot_count
    # llama.cpp requires room for one output of every sequence id.
    params.n_outputs_max = slot_count
    params.n_threads = params.n_threads_batch = options.threads
    params.kv_unified = True
    params.no_perf = True
    if options.kv_type is not None:
        params.type_k = params.type_v = getattr(llama, f"GGML_TYPE_{options.kv_type.upper()}")
    params.flash_attn_type = getattr(
        llama, f"LLAMA_FLASH_ATTN_TYPE_{flash_attention(options).upper()}"
    )
    context = llama.llama_init_from_model(model.handle, params)
    if not context:
        reason = native_log.take_errors() or "llama.cpp gave no reason"
        raise InsufficientMemory(
            f"llama.cpp could not allocate a KV cache of {options.kv_tokens} tokens: {reason}. "
            "Load the model with a smaller context.",
            param="model",
        )
    return context
