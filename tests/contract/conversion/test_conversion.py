"""What every conversion must keep: the weights, the tokens, and nothing behind when it fails."""

import asyncio
import hashlib
import json
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from backends.base import EngineOptions
from backends.gguf.backend import GgufBackend
from backends.gguf.file import gguf_info
from catalog.convert.run import ConversionProgress, ConversionRequest, convert, sweep
from catalog.convert.steps.gguf_tokenizer import PROBES, gguf_vocabulary
from core.errors import ImpetusError
from core.types import TokenPrompt
from core.units import MIB
from tests.golden import ROOT, Reference, folder_info, golden, reference
from tests.requests import request, run, token_ids_of
from tests.starter import starter_path

# The first call builds the golden models.
pytestmark = pytest.mark.timeout(1200)

Forward = Callable[[Sequence[int]], int]
"""Takes the tokens that are new to a model's cache and returns the likeliest next one."""


def mlx_greedy(folder: Path) -> Callable[[], Forward]:
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    # Half-precision scales are many times slower on a CPU.
    model.set_dtype(mx.float32)

    def start() -> Forward:
        cache = make_prompt_cache(model)

        def forward(ids: Sequence[int]) -> int:
            best: Any = mx.argmax(model(mx.array([list(ids)]), cache=cache)[0, -1])
            return int(best.item())

        return forward

    return start


def torch_greedy(folder: Path) -> Callable[[], Forward]:
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)

    def start() -> Forward:
        cache = DynamicCache(config=model.config)

        def forward(ids: Sequence[int]) -> int:
            with torch.inference_mode():
                out = model(torch.tensor([list(ids)]), past_key_values=cache, use_cache=True)
            return int(out.logits[0, -1].argmax())

        return forward

    return start


def onnx_greedy(folder: Path) -> Callable[[], Forward]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(folder / "model.onnx", options)
    inputs = {item.name: item for item in session.get_inputs()}
    outputs = [item.name for item in session.get_outputs()]
    pasts = [name for name in inputs if name.startswith("past_key_values.")]
    # The builder leaves a head's width out of the graph's own shapes.
    config = json.loads((folder / "config.json").read_text())
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]

    def start() -> Forward:
        past: dict[str, Any] = {
            name: np.zeros((1, inputs[name].shape[1], 0, width), np.float32) for name in pasts
        }

        def forward(ids: Sequence[int]) -> int:
            before = past[pasts[0]].shape[2]
            total = before + len(ids)
            given: dict[str, Any] = {
                "input_ids": np.array([ids], np.int64),
                "attention_mask": np.ones((1, total), np.int64),
                "position_ids": np.arange(before, total, dtype=np.int64)[None],
            }
            made = session.run(None, {k: v for k, v in (given | past).items() if k in inputs})
            for name, value in zip(outputs, made, strict=True):
                if name.startswith("present."):
                    past[name.replace("present.", "past_key_values.")] = value
            return int(made[outputs.index("logits")][0, -1].argmax())

        return forward

    return start


def greedy(start: Callable[[], Forward], wanted: Reference) -> list[list[int]]:
    answers = []
    for ids, tokens in zip(wanted.ids, wanted.tokens, strict=True):
        forward = start()
        answer = [forward(ids)]
        while len(answer) < len(tokens):
            answer.append(forward(answer[-1:]))
        answers.append(answer)
    return answers


@pytest.mark.parametrize(
    ("kind", "runtime"),
    [
        ("hf-f32", torch_greedy),
        ("pytorch", torch_greedy),
        ("mlx-f32", mlx_greedy),
        ("mlx-blocks", mlx_greedy),
        ("onnx-f32", onnx_greedy),
        ("onnx-torch", onnx_greedy),
    ],
)
def test_full_precision_conversions_give_the_same_greedy_tokens(
    kind: str, runtime: Callable[[Path], Callable[[], Forward]]
) -> None:
    wanted = reference()
    assert greedy(runtime(golden(kind)), wanted) == list(wanted.tokens)


async def test_gguf_written_from_safetensors_gives_the_same_greedy_tokens() -> None:
    wanted = await asyncio.to_thread(reference)
    path = await asyncio.to_thread(golden, "gguf-f32")
    backend = GgufBackend()
    engine = backend.open(
        backend.identify(path), EngineOptions(max_sequences=1, context_tokens=512, kv_tokens=512)
    )
    try:
        for ids, tokens in zip(wanted.ids, wanted.tokens, strict=True):
            events = await run(engine, request(TokenPrompt(ids), max_tokens=len(tokens)))
            assert token_ids_of(events) == tokens
    finally:
        await engine.close()


@pytest.mark.parametrize("kind", ["mlx-4bit", "onnx-int4"])
def test_quantized_conversions_still_know_what_comes_next(kind: str) -> None:
    wanted = reference()
    start = (mlx_greedy if kind.startswith("mlx") else onnx_greedy)(golden(kind))
    hits = []
    for ids, tokens in zip(wanted.ids, wanted.tokens, strict=True):
        forward = start()
        guesses = [forward(ids), *(forward([token]) for token in tokens[:-1])]
        hits += [guess == token for guess, token in zip(guesses, tokens, strict=True)]
    assert sum(hits) > len(hits) // 2


@pytest.mark.parametrize("kind", ["pytorch", "pt"])
async def test_pytorch_checkpoints_become_the_same_safetensors(tmp_path: Path, kind: str) -> None:
    from safetensors.numpy import load_file

    source = await asyncio.to_thread(golden, kind)
    made = await convert(
        ConversionRequest(folder_info("pytorch", source), "safetensors", tmp_path / "made")
    )
    original = load_file((await asyncio.to_thread(golden, "hf-f32")) / "model.safetensors")
    copy = load_file(made / "model.safetensors")
    assert copy.keys() == original.keys()
    assert all(np.array_equal(copy[name], original[name]) for name in original)
    assert (made / "tokenizer.json").is_file()
    assert not list(made.glob("*.bin")) + list(made.glob("*.pt"))


async def test_a_chain_of_steps_quantizes_for_gguf(tmp_path: Path) -> None:
    source = await asyncio.to_thread(golden, "pytorch")
    seen: list[ConversionProgress] = []
    made = await convert(
        ConversionRequest(
            folder_info("pytorch", source), "gguf", tmp_path / "tiny", quantization="q8_0"
        ),
        seen.append,
    )
    info = gguf_info(made / "tiny.gguf")
    assert (info.quantization, info.architecture) == ("q8_0", "llama")
    assert info.parameters == gguf_info(starter_path()).parameters
    assert info.chat_template == gguf_info(starter_path()).chat_template
    fractions = [progress.fraction for progress in seen]
    assert fractions == sorted(fractions)
    assert all((progress.step == 2) == (progress.fraction > 0.5) for progress in seen)
    assert seen[-1].fraction == 1.0
    provenance = json.loads((made / "provenance.json").read_text())
    assert provenance["parameters"]["formats"] == ["pytorch", "safetensors", "gguf"]
    assert provenance["parameters"]["quantization"] == "q8_0"
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def corpus() -> list[str]:
    """Return texts with digits, blanks, code, many scripts and plain noise."""
    lines = [line for path in ROOT.glob("backends/*.py") for line in path.read_text().split("\n")]
    files = [path.read_text() for path in sorted(ROOT.glob("core/*.py"))]
    noise = random.Random(7)
    alphabet = "aZ09 \n\t.,'\"()<>|_-éß海कя😀\u0301\u00a0\u200d½"
    mixed = ["".join(noise.choices(alphabet, k=40)) for _ in range(400)]
    return [*PROBES, *files, *mixed, *lines, "<|im_start|>user\n12 34<|im_end|>\n"]


@pytest.mark.parametrize("kind", ["hf-f32", "mlx-blocks", "onnx-f32"])
def test_tokenizers_from_gguf_agree_with_llama_cpp(kind: str) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(golden(kind) / "tokenizer.json"))
    with gguf_vocabulary(starter_path()) as vocabulary:
        different = [
            text
            for text in corpus()
            if tokenizer.encode(text).ids != vocabulary.encode(text, with_special=True)
        ]
    assert different == []


def test_provenance_tells_where_a_conversion_comes_from() -> None:
    provenance = json.loads((golden("hf-f32") / "provenance.json").read_text())
    (file,) = provenance["source"]["files"]
    # The golden models are shared by all copies of the project; each has a starter of its own.
    assert Path(file["path"]).name == starter_path().name
    assert file["size_bytes"] == starter_path().stat().st_size
    with starter_path().open("rb") as stream:
        assert file["sha256_8mib"] == hashlib.sha256(stream.read(8 * MIB)).hexdigest()
    assert provenance["source"]["format"] == "gguf"
    assert provenance["source"]["license"] == "apache-2.0"
    assert provenance["parameters"]["quantization"] == "f32"
    assert provenance["tools"].keys() >= {"torch", "transformers", "gguf", "tokenizers"}


def blocks(target: Path) -> ConversionRequest:
    return ConversionRequest(gguf_info(starter_path()), "mlx", target, quantization="original")


def helpers() -> list[psutil.Process]:
    """Return the conversion processes that this process started."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if "catalog.convert.child" in " ".join(child.cmdline())]


async def test_a_killed_step_leaves_nothing(tmp_path: Path) -> None:
    killed = []

    def kill(_progress: ConversionProgress) -> None:
        for helper in helpers():
            helper.kill()
            killed.append(helper)

    with pytest.raises(ImpetusError, match="SIGKILL"):
        await convert(blocks(tmp_path / "made"), kill)
    assert killed
    assert list(tmp_path.iterdir()) == []


async def test_a_cancelled_conversion_leaves_nothing(tmp_path: Path) -> None:
    has_begun = asyncio.Event()
    task = asyncio.create_task(
        convert(blocks(tmp_path / "made"), lambda _progress: has_begun.set())
    )
    await has_begun.wait()
    assert helpers()
    assert len(list(tmp_path.iterdir())) == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert helpers() == []
    assert list(tmp_path.iterdir()) == []


PARENT = """
import asyncio, sys
from pathlib import Path
from catalog.convert.run import convert
from tests.contract.conversion.test_conversion import blocks
from catalog.convert.pause import PauseSwitch
pause = PauseSwitch()
def begun(progress):
    pause.switch(is_on=sys.argv[2] == "paused")
    print("begun", flush=True)
asyncio.run(convert(blocks(Path(sys.argv[1])), begun, pause))
"""


@pytest.mark.parametrize(
    "how",
    [
        "running",
        pytest.param(
            "paused",
            marks=pytest.mark.skipif(sys.platform != "linux", reason="Linux ends it, see prctl(2)"),
        ),
    ],
)
def test_a_killed_server_takes_its_conversions_along(tmp_path: Path, how: str) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path / "made"), how],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    with parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "begun\n"
        children = psutil.Process(parent.pid).children(recursive=True)
        assert children
        (left,) = tmp_path.iterdir()
        assert sweep(tmp_path) == ()
        parent.send_signal(signal.SIGKILL)
        _, alive = psutil.wait_procs(children, timeout=120)
    assert alive == []
    assert sweep(tmp_path) == (left,)
    assert list(tmp_path.iterdir()) == []
