"""Bare runtime loops: greedy decoding without a server, one sequence at a time.

A child process.  It prints one JSON line when the model is loaded; then every line of standard
input is a job, `{"messages": …, "max_tokens": …}`, answered with one stream record as JSON.  It
ends when standard input closes.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from scripts.bench_lib.client import StreamRecord

_PACKAGES = {"onnx": "onnxruntime", "pytorch": "transformers"}


class Loop(Protocol):
    """One loaded model."""

    def run(self, ids: Sequence[int], count: int, take: Callable[[int], None]) -> None:
        """Generate up to `count` tokens after `ids`; calls `take` with each token."""
        ...


class OnnxLoop:
    """onnxruntime session with default options; keys and values stay in its memory."""

    def __init__(self, folder: Path, threads: int, end_ids: frozenset[int]) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        path = next(iter(sorted(folder.rglob("*.onnx"))))
        self._session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        self._end_ids = end_ids
        self._head_size = _head_size(folder)
        self._inputs = {each.name: each for each in self._session.get_inputs()}
        self._past = [name for name in self._inputs if name.startswith("past_key_values")]
        self._outputs = [each.name for each in self._session.get_outputs()]

    def run(self, ids: Sequence[int], count: int, take: Callable[[int], None]) -> None:
        """Compute the prompt in one pass, then token by token."""
        import numpy as np

        cache = {name: self._empty(name) for name in self._past}
        given, length = np.array([ids], np.int64), 0
        for _ in range(count):
            binding = self._session.io_binding()
            for name, values in self._feed(given, length).items():
                binding.bind_cpu_input(name, values)
            for name, value in cache.items():
                binding.bind_ortvalue_input(name, value)
            for name in self._outputs:
                binding.bind_output(name, "cpu")
            self._session.run_with_iobinding(binding)
            made = dict(zip(self._outputs, binding.get_outputs(), strict=True))
            cache = {name: made[name.replace("past_key_values", "present")] for name in self._past}
            token = int(made["logits"].numpy()[0, -1].argmax())
            if token in self._end_ids:
                return
            take(token)
            length += given.shape[1]
            given = np.array([[token]], np.int64)

    def _empty(self, name: str) -> Any:
        import numpy as np
        import onnxruntime

        _, heads, _, width = self._inputs[name].shape
        dtype = np.float16 if "float16" in self._inputs[name].type else np.float32
        # The genai builder gives this dimension a name, not a value.
        size = width if isinstance(width, int) else self._head_size
        return onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros((1, heads, 0, size), dtype))

    def _feed(self, given: Any, length: int) -> dict[str, Any]:
        import numpy as np

        count = given.shape[1]
        values = {
            "input_ids": given,
            "attention_mask": np.ones((1, length + count), np.int64),
            "position_ids": np.arange(length, length + count, dtype=np.int64)[None],
        }
        return {name: values[name] for name in self._inputs if name in values}


class TorchLoop:
    """transformers' own `generate` in float32."""

    def __init__(self, folder: Path, threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self._model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True
        ).eval()

    def run(self, ids: Sequence[int], count: int, take: Callable[[int], None]) -> None:
        """Generate; the streamer's first call returns the prompt."""
        import torch

        given = torch.tensor([list(ids)])
        with torch.inference_mode():
            self._model.generate(
                given,
                attention_mask=torch.ones_like(given),
                max_new_tokens=count,
                do_sample=False,
                streamer=_Streamer(take),
            )


class _Streamer:
    """Receives the tokens of `generate`.  Source: transformers' BaseStreamer."""

    def __init__(self, take: Callable[[int], None]) -> None:
        self._take = take
        self._is_prompt = True

    def put(self, value: Any) -> None:
        """Receive the prompt, then one token at a time."""
        if not self._is_prompt:
            self._take(int(value.reshape(-1)[0]))
        self._is_prompt = False

    def end(self) -> None:
        """Called at the end."""


def record_run(loop: Loop, ids: Sequence[int], count: int) -> StreamRecord:
    """Run `loop` and record when each token arrived."""
    record = StreamRecord(prompt_tokens=len(ids))
    record.sent_at = time.monotonic()
    loop.run(ids, count, lambda _: record.arrivals.append(time.monotonic()))
    record.ended_at = time.monotonic()
    record.completion_tokens = len(record.arrivals)
    return record


def _head_size(folder: Path) -> int:
    """Return the size of an attention head, from the config.json next to the graph."""
    path = folder / "config.json"
    if not path.is_file():
        decoder = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]
        return int(decoder["head_size"])
    config = json.loads(path.read_text())
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _end_ids(folder: Path, tokenizer: Any) -> frozenset[int]:
    path = folder / "generation_config.json"
    found = json.loads(path.read_text()).get("eos_token_id") if path.is_file() else None
    ids = found if isinstance(found, list) else [found, tokenizer.eos_token_id]
    return frozenset(value for value in ids if isinstance(value, int))


def main() -> None:
    """Load the model and run jobs until standard input closes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--runtime", choices=("onnx", "pytorch"), required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model, local_files_only=True)
    loop: Loop
    if options.runtime == "onnx":
        loop = OnnxLoop(options.model, options.threads, _end_ids(options.model, tokenizer))
    else:
        loop = TorchLoop(options.model, options.threads)
    package = _PACKAGES[options.runtime]
    _answer({"version": f"{package} {metadata.version(package)}"})
    for line in sys.stdin:
        job = json.loads(line)
        ids = tokenizer.apply_chat_template(
            job["messages"], add_generation_prompt=True, return_dict=False
        )
        _answer(asdict(record_run(loop, ids, job["max_tokens"])))


def _answer(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
