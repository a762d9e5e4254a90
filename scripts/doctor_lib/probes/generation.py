"""Probes of step `compute`: a long prompt and many steps of several streams, as models need them.

Usage: python -m scripts.doctor_lib.probes.generation NAME
"""

import sys
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.units import GIB
from scripts.doctor_lib.probes import small_llama
from scripts.doctor_lib.probes.result import Found, print_result
from scripts.doctor_lib.row import WARN

_STREAMS, _PROMPT_TOKENS, _STEPS = 4, 512, 200
# Relative to the largest logit.
_F32_ERROR, _F16_ERROR = 1e-3, 5e-2
_SEND = "send the report"

# Appends tokens (streams, count) to the caches; returns the last logits (streams, vocabulary).
Feed = Callable[[NDArray[np.int64]], NDArray[np.float32]]


def examined(device: str, begin: Callable[[], Feed], most_error: float) -> Found:
    """Prefill twice, generate, and compare with float32 on the CPU; `begin` makes empty caches.

    The logits after the steps are those of caches that grew by one token at a time; they are
    compared with one pass over everything.
    """
    weights = small_llama.make_weights()
    tokens = small_llama.prompts(_STREAMS, _PROMPT_TOKENS)
    _, first_s = _timed(begin(), tokens)
    feed = begin()
    logits, again_s = _timed(feed, tokens)
    value = f"{device}: {_STREAMS} x {_PROMPT_TOKENS} tokens {first_s:.2f} s, then {again_s:.2f} s"
    if problem := _difference(logits, small_llama.last_logits(weights, tokens), most_error):
        return Found(value, f"After the prompt {problem}", _SEND)
    began = time.monotonic()
    for _ in range(_STEPS):
        chosen = logits.argmax(axis=-1)[:, None]
        tokens = np.concatenate((tokens, chosen), axis=1)
        logits = feed(chosen)
    speed = _STREAMS * _STEPS / (time.monotonic() - began)
    value += f"; {_STREAMS} x {_STEPS} steps {speed:,.0f} tokens/s"
    exact = small_llama.last_logits(weights, tokens)
    if problem := _difference(logits, exact, most_error):
        return Found(value, f"After {_STEPS} steps with the caches {problem}", _SEND)
    # Where two are nearly equal, another token is right too: the number is told only.
    same = int((logits.argmax(axis=-1) == exact.argmax(axis=-1)).sum())
    told = f"error {_error(logits, exact):.1g}, {same} of {_STREAMS} tokens the same"
    return Found(f"{value}, {told}")


def _timed(feed: Feed, tokens: NDArray[np.int64]) -> tuple[NDArray[np.float32], float]:
    began = time.monotonic()
    return feed(tokens), time.monotonic() - began


def _error(logits: NDArray[np.float32], exact: NDArray[np.float32]) -> float:
    return float(np.abs(logits - exact).max() / np.abs(exact).max())


def _difference(logits: NDArray[np.float32], exact: NDArray[np.float32], most: float) -> str:
    """Return how logits differ from exact ones, as a clause; empty if within `most`."""
    if not np.isfinite(logits).all():
        return "the logits are not finite."
    error = _error(logits, exact)
    if error > most:
        return f"the logits differ from the CPU's by {error:.2g}, over {most:g}."
    return ""


def mlx_generation() -> Found:
    """Run the small model with mlx-lm on MLX's default device."""
    from backends.mlx.metal import has_metal
    from backends.mlx.model import build_model, import_runtime

    import_runtime(1)
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    dtype = mx.float16 if has_metal() else mx.float32
    weights = small_llama.make_weights()
    arrays = {name: mx.array(each).astype(dtype) for name, each in weights.items()}
    model = build_model(dict(small_llama.CONFIG), arrays, is_embedder=False)

    def begin() -> Feed:
        caches = make_prompt_cache(model)

        def feed(tokens: NDArray[np.int64]) -> NDArray[np.float32]:
            last = model(mx.array(tokens), cache=caches)[:, -1].astype(mx.float32)
            return np.array(last)

        return feed

    return examined(
        str(mx.default_device()), begin, _F16_ERROR if dtype == mx.float16 else _F32_ERROR
    )


def torch_generation() -> Found:
    """Run the small model with transformers where the server would, and say why not on Metal."""
    import torch
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    from backends.pytorch.device import device, device_problem

    where = device()
    dtype = torch.float32 if where == "cpu" else torch.float16
    weights = {name: torch.from_numpy(each) for name, each in small_llama.make_weights().items()}
    with torch.inference_mode():
        model = LlamaForCausalLM(LlamaConfig(**small_llama.CONFIG)).eval()
        model.load_state_dict(weights)
        model = model.to(where, dtype)

        def begin() -> Feed:
            cache = DynamicCache()

            def feed(tokens: NDArray[np.int64]) -> NDArray[np.float32]:
                ids = torch.from_numpy(tokens).to(where)
                with torch.inference_mode():
                    done = model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
                last: NDArray[np.float32] = done.logits[:, -1].float().cpu().numpy()
                return last

            return feed

        found = examined(where, begin, _F32_ERROR if where == "cpu" else _F16_ERROR)
    if found.problem or where != "cpu" or not torch.backends.mps.is_available():
        return found
    reason = f"PyTorch models run on the CPU: on Apple's GPU {device_problem('mps')}."
    return Found(found.value, reason, _SEND, WARN)


def wired_limit() -> Found:
    """Set MLX's wired limit as the first model does, and read it again."""
    import mlx.core as mx

    from deployments.options import machine_budget_bytes

    return set_and_read(mx, machine_budget_bytes())


def set_and_read(mx: Any, budget_bytes: int) -> Found:
    """Set the limit for a budget with the module `mlx.core`, or what stands for it, and read it."""
    from backends.mlx.metal import GpuLimits

    most = int(mx.device_info()["max_recommended_working_set_size"])
    GpuLimits(mx).open_model(1, budget_bytes, budget_bytes)
    # MLX returns the former limit whenever one is set.
    wanted = min(most, budget_bytes)
    read = int(mx.set_wired_limit(wanted))
    told = f"{wanted / GIB:.2f} GiB set, {read / GIB:.2f} GiB read"
    value = f"{told}; Metal recommends {most / GIB:.2f} GiB"
    problem = "" if read == wanted else "MLX has another wired limit than the one that was set."
    return Found(value, problem, _SEND, WARN)


PROBES: Mapping[str, Callable[[], Found]] = MappingProxyType(
    {
        "MLX, prompt and steps": mlx_generation,
        "PyTorch, prompt and steps": torch_generation,
        "MLX' wired limit": wired_limit,
    }
)

if __name__ == "__main__":
    print_result(PROBES, sys.argv[1])
