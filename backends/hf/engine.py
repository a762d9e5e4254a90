"""Opens the text generation engine of a Hugging Face folder over any stepper."""

from collections.abc import Callable

from backends.base import Engine, EngineOptions, ModelInfo
from backends.engine.batching import BatchingEngine
from backends.hf.folder import HfFolder
from backends.hf.tokenizer import HfTokenizer
from backends.prompt.chat_format import ChatFormat
from backends.prompt.infill import find_infill
from backends.prompt.prepare import Preparer
from backends.stepper import Stepper
from core.types import SamplingParams

_MAX_TEMPERATURE = 100.0
_MAX_TOP_K = 2**31 - 1


def open_token_engine(
    info: ModelInfo,
    folder: HfFolder,
    tokenizer: HfTokenizer,
    open_stepper: Callable[[], Stepper],
    options: EngineOptions,
    *,
    context_tokens: int,
    interrupt: Callable[[], None] = lambda: None,
) -> Engine:
    """Return an engine over the stepper; blocks until `open_stepper` has returned.

    `open_stepper` runs on the engine's thread; its exceptions are raised here.  `interrupt`: see
    `BatchingEngine`.
    """
    chat = ChatFormat(
        info.chat_template,
        tokenizer.bos_text,
        tokenizer.eos_text,
        tool_parser=options.tool_parser,
        tool_template=info.tool_template,
        rag_template=info.rag_template,
    )
    for each in chat.formats:
        tokenizer.show(*each.markers)
    preparer = Preparer(
        info,
        tokenizer,
        chat,
        context_tokens=context_tokens,
        bos_text=tokenizer.bos_text if tokenizer.adds_bos else "",
        defaults=recommended_sampling(folder),
        infill=find_infill(tokenizer.special_id),
        stable_prompts=options.stable_prompts,
    )
    return BatchingEngine(
        info, preparer, open_stepper, max_waiting=options.max_waiting, interrupt=interrupt
    )


def recommended_sampling(folder: HfFolder) -> SamplingParams:
    """Return the sampling defaults of generation_config.json; invalid values are ignored.

    With `do_sample` false they are not meant to be used, so there are none.
    """
    config = folder.generation_config
    if config.get("do_sample") is False:
        return SamplingParams()

    def number(key: str, low: float, high: float) -> float | None:
        value = config.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        return float(value) if low <= value <= high else None

    top_k = number("top_k", 0, _MAX_TOP_K)
    top_p = number("top_p", 0.0, 1.0)
    return SamplingParams(
        temperature=number("temperature", 0.0, _MAX_TEMPERATURE),
        top_p=top_p or None,
        top_k=None if top_k is None else int(top_k),
        min_p=number("min_p", 0.0, 1.0),
    )
