"""Converts Hugging Face safetensors of the Llama family to a stateful Core ML package."""

import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from backends.hf.folder import HfFolder, read_folder
from catalog.convert.steps.coreml_decoder import (
    Decoder,
    Tensors,
    build_module,
    decoder_of,
    read_weights,
)
from core.errors import RequestError

Precision: TypeAlias = Literal["f32", "f16", "mixed"]
Progress: TypeAlias = Callable[[float, str], None]

CONTEXT_KEY = "impetus.context_tokens"
_PROBE = (1, 20, 300, 41, 7, 150, 9, 260)
# In float16 the squares in norms and the residual sums overflow; these stay in float32.
_WIDE = frozenset({"pow", "reduce_mean", "rsqrt", "add", "mul", "sub"})


def convert_to_coreml(
    source: Path, target: Path, *, precision: Precision, context_tokens: int, progress: Progress
) -> None:
    """Write a folder `target` with an `.mlpackage` and its configuration.

    "mixed" computes in float16 except for operations that overflow, "f16" computes everything in
    float16.  The package's logits are compared with the original's before it is kept.  Blocks for
    about half a minute per 100 million parameters; `progress` gets a fraction and the activity.
    Raises RequestError (also if the logits differ too much), BrokenModel.
    """
    if target.exists():
        raise RequestError(f"{target.name!r} already exists; choose another name.", param="target")
    folder = read_folder(source)
    decoder = decoder_of(folder, context_tokens)
    target.parent.mkdir(parents=True, exist_ok=True)
    progress(0.0, "computing reference logits")
    expected = _reference_logits(source)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as name:
        unfinished = Path(name) / target.name
        unfinished.mkdir()
        package = unfinished / f"{target.name}.mlpackage"
        progress(0.1, "reading weights")
        weights = read_weights(source, decoder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _write_package(package, folder, decoder, weights, precision, progress)
        del weights
        progress(0.9, "verifying")
        _verify(package, expected, precision)
        shutil.copyfile(source / "config.json", unfinished / "config.json")
        os.rename(unfinished, target)
    progress(1.0, "done")


def _write_package(
    package: Path, folder: HfFolder, decoder: Decoder, weights: Tensors, precision: Precision,
    progress: Progress,
) -> None:  # fmt: skip
    import coremltools as ct
    import torch

    progress(0.2, "tracing")
    with torch.inference_mode():
        example = (torch.zeros(1, 2, dtype=torch.int32), torch.zeros(1, 1, 2, 5))
        decoder_module = build_module(decoder, weights)
        traced = torch.jit.trace(decoder_module, example, check_trace=False)
    precisions: dict[str, Any] = {
        "f32": ct.precision.FLOAT32,
        "f16": ct.precision.FLOAT16,
        "mixed": ct.transform.FP16ComputePrecision(op_selector=lambda op: op.op_type not in _WIDE),
    }
    count = ct.RangeDim(1, decoder.context, default=1)
    total = ct.RangeDim(1, decoder.context, default=1)
    cache = decoder_module.keyCache.shape
    progress(0.3, "converting")
    model = ct.convert(
        traced,
        inputs=[
            ct.TensorType(shape=(1, count), dtype=np.int32, name="inputIds"),
            ct.TensorType(shape=(1, 1, count, total), dtype=np.float16, name="causalMask"),
        ],
        outputs=[
            ct.TensorType(dtype=np.float32 if precision == "f32" else np.float16, name="logits")
        ],
        states=[
            ct.StateType(wrapped_type=ct.TensorType(shape=cache, dtype=np.float16), name=name)
            for name in ("keyCache", "valueCache")
        ],
        minimum_deployment_target=ct.target.iOS18,
        compute_precision=precisions[precision],
        skip_model_load=True,
    )
    model.license = folder.license
    model.user_defined_metadata[CONTEXT_KEY] = str(decoder.context)
    progress(0.85, "writing")
    model.save(str(package))


def _probe(vocabulary_size: int, context: int) -> Sequence[int]:
    return [token % vocabulary_size for token in _PROBE][:context]


def _reference_logits(source: Path) -> NDArray[np.float32]:
    """Return the original model's logits (q, vocabulary) for the probe."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, local_files_only=True, trust_remote_code=False,
        use_safetensors=True, attn_implementation="sdpa",
    )  # fmt: skip
    with torch.inference_mode():
        probe = _probe(model.config.vocab_size, len(_PROBE))
        logits = model(torch.tensor([probe])).logits[0]
    return np.asarray(logits.float().numpy())


def _verify(package: Path, expected: NDArray[np.float32], precision: Precision) -> None:
    """Compare the package's logits; two steps test the cache.  Raises RequestError."""
    from backends.coreml.layout import causal_mask
    from backends.coreml.mil.interpreter import MilInterpreter
    from backends.coreml.spec import MANIFEST, read_spec

    spec = read_spec(package / MANIFEST)
    limit = spec.states["keyCache"].shape[3]
    probe = _probe(expected.shape[1], limit)
    model = MilInterpreter(spec, "f32" if precision == "f32" else "native")
    state, found = model.make_state(), []
    cut = len(probe) // 2
    for start, tokens in ((0, probe[:cut]), (cut, probe[cut:])):
        if tokens:
            data: dict[str, NDArray[Any]] = {
                "inputIds": np.array([tokens], np.int32),
                "causalMask": causal_mask(start, len(tokens)),
            }
            found.append(model.predict(data, state)["logits"][0])
    problem = _difference(np.concatenate(found), expected[: len(probe)], precision)
    if problem:
        hint = " Choose the quantization mixed or f32." if precision == "f16" else ""
        raise RequestError(
            f"The converted model differs from the original: {problem}.{hint}",
            param="precision",
        )


def _difference(
    found: NDArray[np.float32], expected: NDArray[np.float32], precision: Precision
) -> str:
    """Return how the logits differ beyond the tolerance of the precision; empty if not."""
    if not np.isfinite(found).all():
        return "its logits are not finite"
    scale = float(np.abs(expected).max())
    worst = float(np.abs(found - expected).max()) / max(scale, 1e-9)
    allowed = 1e-3 if precision == "f32" else 0.05
    if worst <= allowed:
        return ""
    return f"its logits differ by {worst:.1%} of the largest logit; the limit is {allowed:.1%}"
