"""The prompt of rerankers that are language models asked for yes or no, such as Qwen3-Reranker."""

from dataclasses import dataclass

from core.errors import BrokenModel

# Source: the model card of Qwen3-Reranker, which converters also store as the template `rerank`.
_QWEN3 = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and "
    'the Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n'
    "<|im_start|>user\n<Instruct>: Given a web search query, retrieve relevant passages that "
    "answer the query\n<Query>: {query}\n<Document>: {document}<|im_end|>\n"
    "<|im_start|>assistant\n<think>\n\n</think>\n\n"
)
TEMPLATE_KEY = "tokenizer.chat_template.rerank"
_QUERY, _DOCUMENT = "{query}", "{document}"


@dataclass(frozen=True, slots=True)
class RankPrompt:
    """The texts before, between and after the query and the document."""

    before: str
    between: str
    after: str

    def render(self, query: str, document: str) -> str:
        """Return the whole prompt."""
        return f"{self.before}{query}{self.between}{document}{self.after}"


def rank_prompt(template: str) -> RankPrompt:
    """Return the prompt of a file's template, empty for Qwen3's own.

    Raises BrokenModel unless it has `{query}`, then `{document}`.
    """
    before, query, rest = (template or _QWEN3).partition(_QUERY)
    between, document, after = rest.partition(_DOCUMENT)
    if not (query and document):
        raise BrokenModel(
            f"The prompt of the reranking model ({TEMPLATE_KEY}) needs {_QUERY} and after it "
            f"{_DOCUMENT}.",
            param="model",
        )
    return RankPrompt(before, between, after)
