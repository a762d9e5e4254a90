"""Puts a loaded model on Apple's GPU if it computes there what it computes on the CPU."""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from inspect import signature
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.base import ModelInfo
from backends.engine.trial.checks import TOLERANCES, affordable_tokens, difference
from backends.engine.trial.results import trial_key, tried
from backends.pytorch.device import device
from backends.trials import TrialOptions, TrialResult, shortened

logger = logging.getLogger(__name__)

LIBRARIES = ("torch", "transformers")
_LONGEST, _SHORTEST = 12, 4
# Fewer numbers are the scores of a classifier, which say little of what led to them.
_FEWEST_LOGITS = 8
_PROBLEMS = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, NotImplementedError)

Hold = Callable[[], AbstractContextManager[None]]


def place(model: Any, info: ModelInfo, trial: TrialOptions) -> TrialResult:
    """Move a model from the CPU to the device that computes it rightly; blocks.

    A result that is not sound means the CPU although there is a GPU.  What was found is kept with
    the trials of the model, so that the CPU computes only before the first use of it.
    """
    name = device()
    if name == "cpu":
        return TrialResult()
    result = tried(
        info.name,
        trial_key(info.files, LIBRARIES, f"{model.dtype} on {name} as on the CPU"),
        trial,
        lambda: compare_with_cpu(model, name, trial.hold),
    )
    model.to(name if result.is_sound else "cpu")
    if not result.is_sound:
        _free_gpu()
    return result


def limitations(model_name: str, result: TrialResult) -> tuple[str, ...]:
    """Return what the user should know of the result of `place`, a sentence each."""
    if result.is_sound:
        return ()
    return (f"{model_name} runs on the CPU, which is slower: {result.reason}.",)


def _free_gpu() -> None:
    """Return to the system what PyTorch keeps of a model that left the GPU."""
    import torch

    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


def compare_with_cpu(model: Any, name: str, hold: Hold = nullcontext) -> TrialResult:
    """Compute two short texts on the CPU, then on the device `name`, and compare them.

    PyTorch was silently wrong on Apple's GPU for some layouts, types and shapes of attention, and
    a trial that computes everything there would not notice.  Source: pytorch issues 176767,
    181133 and 193487.  A difference counts if both texts have it.  Moves the model to the device;
    `hold` is held while that computes.
    """
    texts = _texts(model)
    try:
        wanted = [_outputs(model, text) for text in texts]
    except _PROBLEMS as problem:
        logger.debug("%s cannot be computed on the CPU: %s", type(model).__name__, problem)
        wanted = []
    if not wanted or not all(np.isfinite(each).all() for each in wanted):
        return TrialResult()
    model.to(name)
    try:
        with hold():
            found = [_outputs(model, text) for text in texts]
    except _PROBLEMS as problem:
        reason = f"on Apple's GPU it fails ({str(problem) or type(problem).__name__})"
        return TrialResult(False, reason=shortened(reason))
    differs = min(
        difference(one, other) if np.isfinite(other).all() else np.inf
        for one, other in zip(wanted, found, strict=True)
    )
    if differs <= TOLERANCES.get(str(model.dtype).removeprefix("torch."), 0.0):
        return TrialResult()
    share = f"{min(differs, 9.99):.0%}"
    return TrialResult(False, reason=f"on Apple's GPU its results differ from the CPU's by {share}")


def _texts(model: Any) -> list[list[int]]:
    """Return two texts of tokens, the same at each run, short for a large model."""
    size = int(model.config.get_text_config().vocab_size)
    parameters = sum(each.numel() for each in model.parameters())
    length = max(min(affordable_tokens(parameters) // 2, _LONGEST), _SHORTEST)
    source = Random(7)
    # The first tokens are special in most vocabularies.
    low, high = size // 8, max(size // 2, size // 8 + 1)
    return [[source.randrange(low, high) for _ in range(length)] for _ in range(2)]


def _outputs(model: Any, text: Sequence[int]) -> NDArray[np.float32]:
    """Return a text's logits, or its last hidden states where there are few."""
    import torch

    inputs: dict[str, Any] = {"input_ids": torch.tensor([text], device=model.device)}
    if "use_cache" in signature(model.forward).parameters:
        inputs["use_cache"] = False
    with torch.inference_mode():
        found = model(**inputs)
        values = found.get("logits", found.get("last_hidden_state"))
        if values.shape[-1] < _FEWEST_LOGITS:
            values = model(**inputs, output_hidden_states=True).hidden_states[-1]
    computed: NDArray[np.float32] = values[0].float().cpu().numpy()
    return computed
