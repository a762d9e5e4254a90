"""Vectors and relevance scores from GGUF models with a pooling layer, computed by llama.cpp."""

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.base import Engine, EngineOptions, ModelInfo
from backends.control_tokens import any_of, control_names, markup_parts
from backends.embedding.batch import BatchLimits
from backends.embedding.engine import EmbeddingEngine
from backends.embedding.inputs import PairTemplate, SpecialTokens, padded
from backends.embedding.pooling import unit
from backends.embedding.relevance import ScoreActivation
from backends.gguf.batch import Batch
from backends.gguf.file import YES_NO_RERANKERS
from backends.gguf.header import GgufFile, read_gguf
from backends.gguf.model import GgufModel, library, native_log
from backends.gguf.rank_prompt import TEMPLATE_KEY, RankPrompt, rank_prompt
from backends.gguf.segments import SegmentVectors, open_segments
from core.errors import EngineFailed, InsufficientMemory
from core.types import Capability

_MAX_BATCH_ROWS = 32


def open_embedder(info: ModelInfo, options: EngineOptions) -> Engine:
    """Load the model and return its engine; blocks.  Raises BrokenModel, InsufficientMemory."""
    context_tokens = min(options.context_tokens or info.context_length, info.context_length)

    def open_model() -> GgufEmbeddingModel:
        path, threads = info.files[0], options.threads
        if Capability.RERANK not in info.capabilities:
            return GgufEmbeddingModel(path, context_tokens, threads)
        kind = YesNoReranker if info.architecture in YES_NO_RERANKERS else GgufReranker
        return kind(read_gguf(path), context_tokens, threads)

    return EmbeddingEngine(
        info,
        open_model,
        context_tokens=context_tokens,
        batch_limits=BatchLimits(context_tokens, _MAX_BATCH_ROWS, is_packed=True),
        max_waiting=options.max_waiting,
    )


class GgufEmbeddingModel:
    """A model with a llama.cpp context that pools; implements `EmbeddingModel`.

    The context belongs to the thread that opened it.
    """

    def __init__(self, path: Path, context_tokens: int, threads: int) -> None:
        """Load `path`; blocks.  Raises BrokenModel, InsufficientMemory."""
        self._llama = library()
        self._model = GgufModel(path)
        self._context = self._open_context(context_tokens, threads)
        if not self._context:
            self._model.close()
            reason = native_log.take_errors() or "llama.cpp gives no reason"
            raise InsufficientMemory(
                f"No context of {context_tokens} tokens could be opened: {reason}", param="model"
            )
        self._batch = Batch(context_tokens)
        self._dimension = int(self._llama.llama_model_n_embd_out(self._model.handle))

    def _open_context(self, context_tokens: int, threads: int) -> Any:
        params = self._llama.llama_context_default_params()
        # A pooled sequence must be computed in one piece, so a batch holds a whole context.
        params.n_ctx = params.n_batch = params.n_ubatch = context_tokens
        params.n_seq_max = _MAX_BATCH_ROWS
        params.n_threads = params.n_threads_batch = threads
        params.embeddings = True
        params.kv_unified = True
        params.no_perf = True
        return self._llama.llama_init_from_model(self._model.handle, params)

    @property
    def vocabulary_size(self) -> int:
        """Number of token ids."""
        return self._model.vocabulary_size

    @cached_property
    def special_tokens(self) -> SpecialTokens:
        """The special tokens before and after a text."""
        ids = self._model.encode("", add_bos=True, parse_special=False)
        count = min(int(self._model.adds_bos or len(ids) > 1), len(ids))
        return tuple(ids[:count]), tuple(ids[count:])

    def tokenize(self, text: str, prompt: str = "") -> list[int]:
        """Return the ids of `prompt` and `text` with the model's special tokens."""
        if not (prompt or self._has_name(text)):
            return self._model.encode(text, add_bos=True, parse_special=False)
        return self._encode_markup([(prompt, True), (text, False)], add_bos=True)

    # Markup of the model's own, in which control tokens may be told by their brackets only.
    _own_markup = ""

    @cached_property
    def _names(self) -> frozenset[str]:
        return control_names(self._model.added_tokens(), self._own_markup)

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return any_of(self._names)

    def _has_name(self, text: str) -> bool:
        # llama.cpp finds some of them also where it is not asked to.
        return self._pattern.search(text) is not None

    def _encode_markup(self, pieces: Sequence[tuple[str, bool]], *, add_bos: bool) -> list[int]:
        """Return the ids of joined texts, each with whether it is the model's own markup."""
        parts = markup_parts(pieces, self._pattern)
        return self._model.encode_parts(parts, self._names, add_bos=add_bos)

    def fewest_tokens(self, text: str, limit: int) -> int:
        """Return a lower bound of the tokens of `text`; see `backends.stepper.BoundsTokens`."""
        return self._model.fewest_tokens(text, limit)

    def encode(self, token_lists: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Return unit vectors (len(token_lists), dimension).  Raises EngineFailed."""
        return unit(self._compute(token_lists))

    def _compute(self, token_lists: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Return what the pooling layer gives, one row per list."""
        self._batch.clear()
        for sequence, token_ids in enumerate(token_lists):
            self._batch.add(sequence, 0, token_ids, logits=True)
        self._batch.want_all()
        self._decode(token_lists)
        return np.stack([self._vector(sequence) for sequence in range(len(token_lists))])

    def _decode(self, token_lists: Sequence[Sequence[int]]) -> None:
        """Run the batch, which holds `token_lists`."""
        del token_lists
        memory: Any = self._llama.llama_get_memory(self._context)
        if memory:
            self._llama.llama_memory_clear(memory, True)
        code = self._llama.llama_decode(self._context, self._batch.native)
        if code != 0:
            raise EngineFailed(f"llama_decode failed with {code}: {native_log.take_errors()}")

    def _vector(self, sequence: int) -> NDArray[np.float32]:
        pointer = self._llama.llama_get_embeddings_seq(self._context, sequence)
        return np.ctypeslib.as_array(pointer, (self._dimension,)).copy()

    def close(self) -> None:
        """Free the context and the weights."""
        self._llama.llama_free(self._context)
        self._model.close()


class GgufReranker(GgufEmbeddingModel):
    """A model with rank pooling: its "vector" is a pair's score; implements `PairModel`."""

    _activation = ScoreActivation()

    def __init__(self, file: GgufFile, context_tokens: int, threads: int) -> None:
        """Load the model of `file`; blocks.  Raises BrokenModel, InsufficientMemory."""
        self._segments: SegmentVectors | None = open_segments(file)
        super().__init__(file.path, context_tokens, threads)
        # Of several outputs the first is the score.
        self._dimension = 1

    @cached_property
    def pair_template(self) -> PairTemplate:
        """The special tokens around a query and a document.

        Source: the pair templates of BERT's and RoBERTa's tokenizers; llama.cpp's server,
        format_prompt_rerank.
        """
        before, after = self.special_tokens
        separator = int(self._llama.llama_vocab_sep(self._model.vocabulary))
        kind = self._llama.llama_vocab_type(self._model.vocabulary)
        between = after
        has_two = self._model.metadata("tokenizer.ggml.add_sep_token") != "false"
        if kind != self._llama.LLAMA_VOCAB_TYPE_WPM and separator >= 0 and has_two:
            between = (*after, separator)
        return PairTemplate(before, between, after, second_type=1, after_types=(1,) * len(after))

    def tokenize_part(self, text: str) -> list[int]:
        """Return the ids of `text` without special tokens around it."""
        if not self._has_name(text):
            return self._model.encode(text, add_bos=False, parse_special=False)
        return self._encode_markup([(text, False)], add_bos=False)

    def encode(self, token_lists: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Return scores (len(token_lists), 1).  Raises EngineFailed."""
        return self._activation.scores(self._compute(token_lists))

    def _decode(self, token_lists: Sequence[Sequence[int]]) -> None:
        if self._segments is None:
            super()._decode(token_lists)
            return
        inputs = padded(token_lists)
        is_token = inputs.mask.astype(bool)
        vectors = self._segments.of(inputs.ids[is_token], inputs.types[is_token])
        with self._batch.vectors(vectors):
            super()._decode(token_lists)


class YesNoReranker(GgufReranker):
    """A language model that is asked whether a document answers a query.

    Its score is the probability of yes, which llama.cpp computes.
    """

    _activation = ScoreActivation("Identity")

    def __init__(self, file: GgufFile, context_tokens: int, threads: int) -> None:
        """Load the model of `file`; blocks.  Raises BrokenModel, InsufficientMemory."""
        self._prompt: RankPrompt = rank_prompt(file.text(TEMPLATE_KEY))
        self._own_markup = self._prompt.render("", "")
        super().__init__(file, context_tokens, threads)

    @cached_property
    def pair_template(self) -> PairTemplate:
        """The tokens of the prompt around a query and a document."""
        before, after = self.special_tokens
        first, between, last = map(
            self._part, (self._prompt.before, self._prompt.between, self._prompt.after)
        )
        return PairTemplate((*before, *first), between, (*last, *after))

    def _part(self, text: str) -> tuple[int, ...]:
        return tuple(self._model.encode(text, add_bos=False, parse_special=True))

    def tokenize_pair(self, query: str, document: str) -> list[int]:
        """Return the ids of the whole prompt."""
        prompt = self._prompt
        if not (self._has_name(query) or self._has_name(document)):
            text = prompt.render(query, document)
            return self._model.encode(text, add_bos=True, parse_special=True)
        pieces = [(prompt.before, True), (query, False), (prompt.between, True)]
        pieces += [(document, False), (prompt.after, True)]
        return self._encode_markup(pieces, add_bos=True)
