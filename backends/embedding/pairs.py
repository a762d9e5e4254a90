"""Token ids of a query with each of its documents, for reranking models."""

from collections.abc import Iterator

from backends.embedding.inputs import InputTokens
from backends.embedding.model import PairModel, WholePairModel
from backends.stepper import BoundsTokens
from core.errors import ContextLengthExceeded
from core.types import RerankInputs, Truncation


def pair_tokens(
    model: PairModel, inputs: RerankInputs, max_tokens: int, side: Truncation
) -> Iterator[InputTokens]:
    """Yield the tokens of each pair, cut at `side` if they are longer than `max_tokens`.

    Raises ContextLengthExceeded that names the document, if pairs may not be cut.
    """
    template = model.pair_template
    query = model.tokenize_part(inputs.query)
    # A pair holds at least one token of each text.
    room = max_tokens - template.special_count
    if not inputs.is_truncated and len(query) >= room:
        total = len(query) + template.special_count + 1
        raise ContextLengthExceeded.of_input("query", total, max_tokens, is_least=True)
    for index, text in enumerate(inputs.documents):
        name = f"documents[{index}]"
        if not inputs.is_truncated and inputs.max_document_tokens is None:
            _check_length(model, text, name, room - len(query), max_tokens)
        document = model.tokenize_part(text)
        kept = document[: inputs.max_document_tokens]
        if isinstance(model, WholePairModel) and len(kept) == len(document):
            whole = model.tokenize_pair(inputs.query, text)
            if len(whole) <= max_tokens:
                yield InputTokens(whole)
                continue
        length = len(query) + len(kept) + template.special_count
        if length > max_tokens and not inputs.is_truncated:
            raise ContextLengthExceeded.of_input(name, length, max_tokens)
        pair = template.join(query, kept, max_tokens, side)
        pair.cut += len(document) - len(kept)
        yield pair


def _check_length(model: PairModel, text: str, name: str, room: int, max_tokens: int) -> None:
    """Refuse a text that is far too long without tokenizing all of it."""
    if not isinstance(model, BoundsTokens):
        return
    fewest = model.fewest_tokens(text, room)
    if fewest > room:
        total = fewest + max_tokens - room
        raise ContextLengthExceeded.of_input(name, total, max_tokens, is_least=True)
