"""Tokenizer of a Hugging Face folder, over the `tokenizers` library."""

import json
import threading
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from backends.control_tokens import PromptPart, control_names, markup_parts
from backends.grammar.compiler import GrammarCompiler, GrammarMask
from backends.grammar.constraint import Constraint
from backends.grammar.vocabulary import Vocabulary
from backends.hf.config import HfFolder, read_folder
from backends.hf.control_text import ControlIds, PartEncoder
from backends.hf.header import broken, read_optional_json, read_text
from backends.hf.pieces import piece_reader
from backends.hf.token_lengths import longest_token
from backends.special_frame import SpecialFrame, gives_types, lower_texts, read_frame
from backends.token_bounds import fewest_tokens
from core.errors import (
    BrokenModel,
    NotThisFormat,
    RequestError,
    is_panic,
)
from core.units import MIB, format_bytes

_MAX_TOKENIZER_BYTES = 256 * MIB
_MAX_TOKEN_ID = 2**24
# Files that a tokenizer can be converted from if there is no tokenizer.json.
_OLDER_FILES = (
    ("tokenizer.model",), ("spiece.model",), ("sentencepiece.bpe.model",),
    ("vocab.json", "merges.txt"), ("vocab.txt",),
)  # fmt: skip
# Source: llama.cpp's llama-vocab.cpp, so that both end a generation at the same tokens; the
# padding, repository and file tokens of code completion end it too.
END_NAMES = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>",
    "<end_of_turn>", "<turn|>", "<|endoftext|>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]",
    "[EOS]", "<eos>", "</s>", "<|end_of_text|>", "<end_of_utterance>", "<|tool_response>",
    "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]", "<|fim_repo|>", "<|repo_name|>",
    "<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>",
)  # fmt: skip
# In vocabularies with both of these, `<|end|>` ends a message only, not the answer.
_MESSAGE_END, _ANSWER_ENDS = "<|end|>", ("<|return|>", "<|call|>")


class HfTokenizer:
    """One model's tokenizer; implements `backends.stepper.Tokenizer`.  Thread-safe after `show`."""

    def __init__(self, folder: Path) -> None:
        """Read the tokenizer in `folder`; blocks for up to a few seconds.  Raises BrokenModel."""
        self._folder = _read_descriptions(folder)
        self._tokenizer = _load(self._folder)
        vocabulary: Mapping[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        self._size = max(vocabulary.values(), default=-1) + 1
        if not 0 < self._size <= _MAX_TOKEN_ID:
            raise broken(
                folder / "tokenizer.json",
                f"it has {self._size} token ids, not 1 to {_MAX_TOKEN_ID}",
            )
        added = self._tokenizer.get_added_tokens_decoder()
        self._added: dict[int, bytes] = {i: token.content.encode() for i, token in added.items()}
        self._special = frozenset(i for i, token in added.items() if token.special)
        self._reader = piece_reader(self._tokenizer)
        self._pieces: dict[int, bytes] = {}
        self._lock = threading.Lock()
        self._plain: Any = None
        self._part_encoders: dict[frozenset[str], PartEncoder] = {}
        self._compiler: GrammarCompiler | None = None
        self.bos_text = self._special_text("bos")
        self.eos_text = self._special_text("eos")
        self._prefix = self._read_prefix()
        self.end_ids = self._read_end_ids()

    @property
    def vocabulary_size(self) -> int:
        """Number of token ids; the model's logits may be padded to more."""
        return self._size

    @property
    def adds_bos(self) -> bool:
        """Whether the tokenizer adds tokens before a prompt."""
        return bool(self._prefix)

    def encode(self, text: str, *, add_bos: bool, parse_special: bool) -> list[int]:
        """Return the token ids of `text`; special tokens are recognised with `parse_special`.

        `add_bos` adds the tokenizer's tokens before the text, never those after it.
        Raises RequestError for text that is not valid Unicode.
        """
        tokenizer = self._tokenizer if parse_special else self._plain_tokenizer()
        ids = _encode(tokenizer, text, add_special_tokens=False)
        return [*self._prefix, *ids] if add_bos else ids

    def added_tokens(self) -> Mapping[str, bool]:
        """See `backends.control_tokens.EncodesParts`."""
        texts = ((i, text.decode()) for i, text in self._added.items())
        return {text: i in self._special for i, text in texts if text}

    def encode_parts(
        self, parts: Sequence[PromptPart], names: frozenset[str], *, add_bos: bool
    ) -> list[int]:
        """See `backends.control_tokens.EncodesParts`."""
        with self._lock:
            encoder = self._part_encoders.get(names)
            if encoder is None:
                encoder = self._part_encoders[names] = PartEncoder(
                    self._tokenizer,
                    names,
                    lambda tokenizer, text: _encode(tokenizer, text, add_special_tokens=False),
                )
        ids = encoder.encode(parts)
        return [*self._prefix, *ids] if add_bos else ids

    def encode_for_embedding(self, text: str, prompt: str = "") -> list[int]:
        """Return the token ids of `prompt` and `text` with the special tokens around them.

        Names of control tokens are such tokens in `prompt`, the model's own, and text in `text`.
        Nothing is truncated.  Raises RequestError.
        """
        ids = _encode(self._tokenizer, prompt + text, add_special_tokens=True)
        before, after = self.special_frame.single
        inner = ids[len(before) : len(ids) - len(after)]
        if not self._markup.may_be_in(inner, text):
            return ids
        return [*before, *self._encode_markup([(prompt, True), (text, False)]), *after]

    def encode_text(self, text: str) -> list[int]:
        """Return the token ids of `text`, in which no name is a control token."""
        ids = _encode(self._tokenizer, text, add_special_tokens=False)
        return self._encode_markup([(text, False)]) if self._markup.may_be_in(ids, text) else ids

    def _encode_markup(self, pieces: Sequence[tuple[str, bool]]) -> list[int]:
        parts = markup_parts(pieces, self._markup.pattern)
        return self.encode_parts(parts, self._markup.names, add_bos=False)

    @cached_property
    def _markup(self) -> ControlIds:
        unknown = getattr(self._tokenizer.model, "unk_token", None) or self._special_text("unk")
        return ControlIds(control_names(self.added_tokens()), self._tokenizer.token_to_id, unknown)

    @cached_property
    def special_frame(self) -> SpecialFrame:
        """The special tokens around one text, and around a pair of texts."""
        return read_frame(self._tokenizer)

    @property
    def truncation_side(self) -> Literal["start", "end"]:
        """The end at which the tokenizer's configuration cuts texts that are too long."""
        return "start" if self._folder.tokenizer_config.get("truncation_side") == "left" else "end"

    @property
    def has_types(self) -> bool:
        """Whether models are to see which text of a pair a token belongs to."""
        return gives_types(self._folder.tokenizer_config, self._folder.model_type)

    def lower_texts(self) -> None:
        """Make texts lower-case before they are tokenized; call it before any other use."""
        lower_texts(self._tokenizer)

    def fewest_tokens(self, text: str, limit: int) -> int:
        """Return a lower bound of the tokens of `text`; see `backends.stepper.BoundsTokens`."""

        def count(piece: str) -> int:
            return len(_encode(self._tokenizer, piece, add_special_tokens=False))

        return fewest_tokens(text, limit, lambda: self._longest, count)

    @cached_property
    def _longest(self) -> int | None:
        pieces = (self.piece(token_id, special=True) for token_id in range(self._size))
        return longest_token(json.loads(self._tokenizer.to_str()), pieces)

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that a token adds to the text; none for control tokens unless shown."""
        piece = self._pieces.get(token_id)
        if piece is None:
            piece = self._pieces[token_id] = self.piece(token_id, special=False)
        return piece

    def piece(self, token_id: int, *, special: bool) -> bytes:
        """Return a token's bytes; for control tokens their name with `special`, else none."""
        added = self._added.get(token_id)
        if added is not None:
            return added if special or token_id not in self._special else b""
        text = self._tokenizer.id_to_token(token_id) if 0 <= token_id < self._size else None
        return b"" if text is None else self._reader.read(text)

    def special_id(self, text: str) -> int | None:
        """Return the id of the added token with this text, None if there is none."""
        token_id: int | None = self._tokenizer.token_to_id(text)
        return token_id if token_id in self._added else None

    def show(self, *token_texts: bytes) -> None:
        """Make the control tokens with these names appear in the text."""
        for token_id in self._special:
            if self._added[token_id] in token_texts:
                self._pieces[token_id] = self._added[token_id]

    def is_end(self, token_id: int) -> bool:
        """Whether a token ends the generation."""
        return token_id in self.end_ids

    def add_ends(self, token_ids: Iterable[int]) -> None:
        """Let these tokens end a generation as well; call it before the first request."""
        self.end_ids |= {token_id for token_id in token_ids if 0 <= token_id < self._size}

    can_constrain = True

    def mask(self, constraint: Constraint) -> GrammarMask:
        """Compile a grammar; the first call also reads the vocabulary, which takes up to 1 s."""
        return self._grammars().mask(constraint)

    def read_vocabulary(self) -> None:
        """See `backends.stepper.Tokenizer`."""
        _ = self._grammars(), self._longest

    def _grammars(self) -> GrammarCompiler:
        with self._lock:
            if self._compiler is None:
                vocabulary = self._read_vocabulary()
                self._compiler = GrammarCompiler(vocabulary, self._tokenizer.token_to_id)
            return self._compiler

    def _read_vocabulary(self) -> Vocabulary:
        tokens = [self.piece(each, special=True) for each in range(self._size)]
        eos = self._tokenizer.token_to_id(self.eos_text) if self.eos_text else None
        ends = sorted(self.end_ids, key=lambda token_id: (token_id != eos, token_id))
        return Vocabulary(tokens, sorted(self._special), ends)

    def _plain_tokenizer(self) -> Any:
        """Return a second instance that encodes special tokens as plain text."""
        with self._lock:
            if self._plain is None:
                from tokenizers import Tokenizer

                plain = Tokenizer.from_str(self._tokenizer.to_str())
                plain.encode_special_tokens = True
                self._plain = plain
            return self._plain

    def _special_text(self, which: str) -> str:
        """Return the text of the `bos` or `eos` token; empty if there is none."""
        folder = self._folder
        for config in (
            folder.tokenizer_config,
            read_optional_json(folder.path / "special_tokens_map.json"),
        ):
            value = config.get(f"{which}_token")
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str) and self._tokenizer.token_to_id(value) is not None:
                return value
        if f"{which}_token" in folder.tokenizer_config:
            return ""
        ids = _token_ids(folder.config.get(f"{which}_token_id"))
        return next((self._added[i].decode() for i in ids if i in self._special), "")

    def _read_prefix(self) -> tuple[int, ...]:
        """Return the tokens added before a text; an explicit `add_bos_token` takes precedence."""
        whole = _encode(self._tokenizer, "a", add_special_tokens=True)
        bare = _encode(self._tokenizer, "a", add_special_tokens=False)
        starts = range(len(whole) - len(bare) + 1)
        start = next((at for at in starts if whole[at : at + len(bare)] == bare), 0)
        prefix = tuple(whole[:start])
        wanted = self._folder.tokenizer_config.get("add_bos_token")
        bos = self._tokenizer.token_to_id(self.bos_text) if self.bos_text else None
        if wanted is True and not prefix and bos is not None:
            return (bos,)
        return () if wanted is False and prefix == (bos,) else prefix

    def _read_end_ids(self) -> frozenset[int]:
        ends: set[int] = set()
        for config in (self._folder.generation_config, self._folder.config):
            ends |= {i for i in _token_ids(config.get("eos_token_id")) if i < self._size}
        names = {content.decode(): token_id for token_id, content in self._added.items()}
        turns = set(END_NAMES)
        if all(name in names for name in _ANSWER_ENDS):
            turns.remove(_MESSAGE_END)
        ends |= {token_id for name, token_id in names.items() if name in turns}
        if self.eos_text:
            ends.add(self._tokenizer.token_to_id(self.eos_text))
        return frozenset(ends)


def _read_descriptions(folder: Path) -> HfFolder:
    """Read the folder's configuration; a tokenizer needs no config.json of a model."""
    try:
        return read_folder(folder)
    except NotThisFormat:
        config = read_optional_json(folder / "tokenizer_config.json")
        return HfFolder(folder.absolute(), {}, {}, config, None, "")


def _load(folder: HfFolder) -> Any:
    """Load the `tokenizers.Tokenizer` of the folder, without truncation and padding."""
    from tokenizers import Tokenizer

    path = folder.path / "tokenizer.json"
    try:
        text = read_text(path, _MAX_TOKENIZER_BYTES)
    except FileNotFoundError:
        text = _convert_older_files(folder.path)
    try:
        tokenizer = Tokenizer.from_str(text)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        _add_listed(tokenizer, folder.tokenizer_config)
    except BaseException as error:
        if not (isinstance(error, Exception) or is_panic(error)):
            raise
        raise broken(path, f"the tokenizers library cannot load it ({str(error)[:300]})") from error
    return tokenizer


def _add_listed(tokenizer: Any, config: Mapping[str, Any]) -> None:
    """Add tokens that only tokenizer_config.json lists, if their ids follow the vocabulary's."""
    from tokenizers import AddedToken

    listed = config.get("added_tokens_decoder")
    if not isinstance(listed, dict):
        return
    known = {int(key): value for key, value in listed.items() if key.isdecimal()}
    for token_id, value in sorted(known.items()):
        content = value.get("content") if isinstance(value, dict) else None
        is_next = token_id == tokenizer.get_vocab_size(with_added_tokens=True)
        if is_next and isinstance(content, str) and tokenizer.token_to_id(content) is None:
            flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
            tokenizer.add_tokens(
                [AddedToken(content, **{flag: bool(value.get(flag, False)) for flag in flags})]
            )


def _convert_older_files(folder: Path) -> str:
    """Convert older tokenizer files to a tokenizer.json.  Raises BrokenModel."""
    if not any(all((folder / name).is_file() for name in names) for names in _OLDER_FILES):
        raise BrokenModel(
            f"The folder {folder.name!r} has no tokenizer: it needs tokenizer.json, or "
            "tokenizer.model, or vocab.json with merges.txt, or vocab.txt.",
            param="model",
        )
    for name in {name for names in _OLDER_FILES for name in names}:
        path = folder / name
        if path.is_file() and path.stat().st_size > _MAX_TOKENIZER_BYTES:
            raise broken(path, f"it is over the limit of {format_bytes(_MAX_TOKENIZER_BYTES)}")
    from transformers import AutoTokenizer

    try:
        slow = AutoTokenizer.from_pretrained(
            str(folder), use_fast=True, trust_remote_code=False, local_files_only=True
        )
        text: str = slow.backend_tokenizer.to_str()
    except Exception as error:
        raise BrokenModel(
            f"transformers cannot convert the tokenizer in {folder.name!r}: {str(error)[:300]}",
            param="model",
        ) from error
    return text


def _encode(tokenizer: Any, text: str, *, add_special_tokens: bool) -> list[int]:
    try:
        # Only the methods for batches release the GIL; this one computes no offsets either.
        (encoding,) = tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
    except (TypeError, UnicodeError) as error:
        raise RequestError(
            "The text is not valid Unicode: it has an unpaired surrogate.", param="prompt"
        ) from error
    except BaseException as error:
        if is_panic(error):
            # As for a regex that gives up on this text.
            raise RequestError(
                "The model's tokenizer cannot encode this text: its pattern gave up on it "
                f"({str(error)[:200]}). Shorten long runs of one kind of character.",
                param="prompt",
            ) from error
        if not isinstance(error, Exception):
            raise
        # The library has no narrower type, as for a vocabulary without its unknown token.
        raise BrokenModel(
            f"The model's tokenizer cannot encode the text: {str(error)[:300]}", param="model"
        ) from error
    return ids


def _token_ids(value: object) -> list[int]:
    """Return the token ids in a config's number or list; other values are skipped."""
    each = value if isinstance(value, list) else [value]
    return [one for one in each if type(one) is int and 0 <= one <= _MAX_TOKEN_ID]
