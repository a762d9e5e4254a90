"""Prompts of embedding models: texts that are put before an input, chosen by name or by kind."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from core.errors import RequestError
from core.types import EmbeddingParams

_QUERY = ("query", "search_query", "retrieval.query", "web_search_query", "s2p_query")
_DOCUMENT = ("document", "passage", "search_document", "retrieval.passage", "corpus", "doc")
# Names that clients use for kinds of text, and the names of prompts that mean the same.
# Source: the request fields of Cohere, Voyage, Jina and NVIDIA; encode_query of
# sentence-transformers.
_KINDS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(_QUERY, _QUERY),
    **dict.fromkeys(_DOCUMENT, _DOCUMENT),
}
# Every model accepts these; without such a prompt nothing is put before the text.
_ALWAYS = ("query", "document")
_SHOWN_NAMES = 20


@dataclass(frozen=True, slots=True)
class Prompts:
    """A model's prompts by name; `default_name` is used by requests that name none.

    If `is_pooled` is false, the prompt's tokens are computed but not pooled.
    """

    by_name: Mapping[str, str] = field(default_factory=dict)
    default_name: str | None = None
    is_pooled: bool = True

    def choose(self, params: EmbeddingParams) -> str:
        """Return the text to put before each input; empty for none.

        Raises RequestError for a `prompt_name` that the model does not have.
        """
        if params.prompt_name is not None:
            return self._named(params.prompt_name)
        if params.input_type is not None:
            return self._for_kind(params.input_type)
        return self.by_name.get(self.default_name or "", "")

    def _named(self, name: str) -> str:
        text = self.by_name.get(name)
        if text is None and name not in _ALWAYS:
            names = sorted({*self.by_name, *_ALWAYS})[:_SHOWN_NAMES]
            raise RequestError(
                f"prompt_name: the model has no prompt {name[:64]!r}; it has: {', '.join(names)}.",
                param="prompt_name",
            )
        return text or ""

    def _for_kind(self, kind: str) -> str:
        by_lower_name = {name.lower(): text for name, text in self.by_name.items()}
        wanted = kind.lower()
        names = (wanted, *_KINDS.get(wanted, ()))
        return next((by_lower_name[name] for name in names if name in by_lower_name), "")
