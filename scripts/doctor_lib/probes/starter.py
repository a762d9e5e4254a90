"""Probe of step `compute`: the GGUF starter by llama.cpp, one long prompt and four streams.

Usage: python -m scripts.doctor_lib.probes.starter NAME
"""

import ctypes
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scripts.doctor_lib.probes.result import Found, print_result
from scripts.doctor_lib.row import WARN

# Relative to the largest logit: the CPU rounds activations to 8 bits, Metal does not.
_LOGIT_ERROR = 0.05
_STREAMS = 4
_MOST_PROMPT = 512
_SEND = "send the report"
# Source: ggml-metal-device.m of llama.cpp, with one library of kernels and with several.
_KERNELS = re.compile(r"ggml_metal_library_\w+: loaded .*?in\s+([\d.]+) sec")
_DEVICE = re.compile(r"ggml_metal_device_init: GPU name:\s+(.+)")
_FAMILY = re.compile(r"ggml_metal_device_init: GPU family: (MTLGPUFamilyApple\d+)")


@dataclass(frozen=True)
class Size:
    """Tokens of the prompt, and steps of each stream after it."""

    prompt: int
    steps: int


# Without a GPU the probe only tells that all of it works.
_SIZES: Mapping[str, Size] = MappingProxyType({"darwin": Size(_MOST_PROMPT, 200)})
_SMALL = Size(48, 8)


def starter() -> Found:
    """Run the starter on the GPU, if there is one, and compare its logits with the CPU's.

    The logits after the steps are compared with one pass over all tokens, which is independent
    of the cache also where both run on the CPU.
    """
    from catalog.scan.starters import STARTERS, installed_starter

    found = installed_starter(STARTERS[0])
    if found is None:
        return Found("no starter model", "It is not installed.", "scripts/setup torch", WARN)
    return examined(found.path, _SIZES.get(sys.platform, _SMALL), _collected_log())


def examined(path: Path, size: Size, log: Sequence[str] = ()) -> Found:
    """Return the result for a model; `log` is what llama.cpp says meanwhile."""
    prompt = [(index * 37) % 4096 + 300 for index in range(size.prompt)]
    began = time.monotonic()
    with _context(path, size, on_gpu=True) as own:
        opened_s, began = time.monotonic() - began, time.monotonic()
        first = own.feed(prompt)
        prompt_s, began = time.monotonic() - began, time.monotonic()
        tokens, last = own.step(first, size.steps)
        speed = _STREAMS * size.steps / (time.monotonic() - began)
    value = f"opened in {opened_s:.1f} s, {size.prompt} tokens {prompt_s:.2f} s, "
    value += f"{_STREAMS} x {size.steps} steps {speed:,.0f} tokens/s" + metal_told("".join(log))
    if not (np.isfinite(first).all() and np.isfinite(last).all()):
        return Found(value, "The logits are not finite.", _SEND)
    with _context(path, size, on_gpu=False) as exact:
        for when, found, row in (
            ("After the prompt", first, prompt),
            (f"After {size.steps} steps", last, prompt + tokens),
        ):
            whole = exact.feed(row)
            error = float(np.abs(found - whole).max() / np.abs(whole).max())
            if error > _LOGIT_ERROR:
                problem = f"{when} the logits differ from the CPU's by {error:.2g}"
                return Found(value, f"{problem}, over {_LOGIT_ERROR:g}.", _SEND)
            same = "the same" if found.argmax() == whole.argmax() else "another"
    return Found(f"{value}, error {error:.1g}, {same} token")


def metal_told(log: str) -> str:
    """Return the GPU and the time to compile its kernels from llama.cpp's log; empty without."""
    device, family = _DEVICE.search(log), _FAMILY.search(log)
    if device is None:
        return ""
    seconds = sum(map(float, _KERNELS.findall(log)))
    told = f"; {device[1].strip()}, {family[1] if family else 'of an unknown family'}"
    return f"{told}, kernels compiled in {seconds:.1f} s"


class _Context:
    """A context of llama.cpp; the first of its sequences is `feed`'s, `step` uses all."""

    def __init__(self, llama: Any, model: Any, context: Any) -> None:
        from backends.gguf.batch import Batch

        self._llama = llama
        self._context = context
        self._vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
        self._batch = Batch(_MOST_PROMPT)
        self._length = 0

    def feed(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Compute a prompt with an empty cache; return the logits after it."""
        memory = self._llama.llama_get_memory(self._context)
        self._llama.llama_memory_clear(memory, True)
        for start in range(0, len(tokens), _MOST_PROMPT):
            part = tokens[start : start + _MOST_PROMPT]
            self._batch.clear()
            index = self._batch.add(0, start, part, logits=start + len(part) == len(tokens))
            self._decode()
        self._length = len(tokens)
        return self._logits(index)

    def step(
        self, logits: NDArray[np.float32], steps: int
    ) -> tuple[list[int], NDArray[np.float32]]:
        """Continue the prompt in all sequences with the likeliest tokens.

        Returns the first sequence's tokens and its last logits.
        """
        memory = self._llama.llama_get_memory(self._context)
        for sequence in range(1, _STREAMS):
            self._llama.llama_memory_seq_cp(memory, 0, sequence, -1, -1)
        tokens = [int(logits.argmax())]
        for step in range(steps):
            self._batch.clear()
            for sequence in range(_STREAMS):
                # The others continue differently, so that their rows of the cache differ.
                token = tokens[-1] if not sequence else 300 + 7 * step + sequence
                self._batch.add(sequence, self._length + step, [token], logits=True)
            self._decode()
            last = self._logits(0)
            tokens.append(int(last.argmax()))
        return tokens[:-1], last

    def _decode(self) -> None:
        code = self._llama.llama_decode(self._context, self._batch.native)
        if code:
            raise RuntimeError(f"llama_decode gave {code}")

    def _logits(self, index: int) -> NDArray[np.float32]:
        pointer = self._llama.llama_get_logits_ith(self._context, index)
        return np.ctypeslib.as_array(pointer, (self._vocabulary,)).copy()


@contextmanager
def _context(path: Path, size: Size, *, on_gpu: bool) -> Iterator[_Context]:
    import llama_cpp as llama

    from backends.engine.threads import performance_cores

    llama.llama_backend_init()
    options = llama.llama_model_default_params()
    options.n_gpu_layers = -1 if on_gpu else 0
    model = llama.llama_model_load_from_file(str(path).encode(), options)
    params = llama.llama_context_default_params()
    params.n_ctx = size.prompt + _STREAMS * (size.steps + 1)
    params.n_batch = params.n_ubatch = _MOST_PROMPT
    params.n_seq_max = _STREAMS
    params.n_threads = params.n_threads_batch = performance_cores()
    params.kv_unified = True
    # Without these a GPU would also compute long prompts of a model that is on the CPU.
    params.op_offload = params.offload_kqv = on_gpu
    context = llama.llama_init_from_model(model, params) if model else None
    try:
        if not context:
            raise RuntimeError("llama.cpp could not open the starter model")
        yield _Context(llama, model, context)
    finally:
        if context:
            llama.llama_free(context)
        if model:
            llama.llama_model_free(model)


def _collected_log() -> list[str]:
    """Return the list that receives what llama.cpp says from now on."""
    import llama_cpp as llama

    lines: list[str] = []

    def note(_level: int, text: bytes, _data: Any) -> None:
        lines.append(text.decode("utf-8", "replace"))

    _callbacks.append(llama.llama_log_callback(note))
    llama.llama_log_set(_callbacks[-1], ctypes.c_void_p(0))
    return lines


# llama.cpp calls them until the process ends.
_callbacks: list[Any] = []

PROBES: Mapping[str, Callable[[], Found]] = MappingProxyType({"starter by llama.cpp": starter})

if __name__ == "__main__":
    print_result(PROBES, sys.argv[1])
