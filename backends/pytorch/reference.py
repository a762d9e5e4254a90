"""Computes rows with transformers, to compare another runtime's numbers with them."""

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace

from backends.base import ModelInfo
from backends.hf.folder import read_folder
from backends.pytorch.loading import load_model
from backends.pytorch.packing import own_passes
from backends.trials import Reference
from core.errors import ImpetusError
from core.units import MIB

logger = logging.getLogger(__name__)

# Both runtimes hold the weights for the time of a trial.
_MOST_BYTES = 256 * MIB
_F32_BYTES = 4


def is_small_enough(info: ModelInfo) -> bool:
    """Whether a model's weights may be loaded a second time, as float32."""
    return 0 < info.parameters * _F32_BYTES <= _MOST_BYTES


@contextmanager
def torch_reference(
    info: ModelInfo, hold: Callable[[], AbstractContextManager[None]]
) -> Iterator[Reference | None]:
    """Load the model as float32 and yield its own forward pass; None if it cannot be loaded.

    Blocks.  The weights are freed at the end.
    """
    reference = None
    try:
        exact = replace(info, quantization="f32")
        model = load_model(exact, read_folder(info.files[0].parent))
        reference = own_passes(model, hold)
    except ImpetusError as problem:
        logger.debug("%s cannot be compared with PyTorch: %s", info.name, problem.message)
    try:
        yield reference
    finally:
        reference = model = None
        gc.collect()
