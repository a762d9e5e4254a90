"""Tests of engines over Hugging Face folders: prompts, markers, recommended sampling."""

import json
from pathlib import Path
from typing import Any

import pytest

from backends.base import Engine, EngineLoad, EngineOptions, ModelInfo
from backends.hf.engine import open_token_engine, recommended_sampling
from backends.hf.folder import HfFolder
from backends.hf.tokenizer import HfTokenizer
from backends.stepper import SequenceSpec, StepOutput
from core.errors import BrokenModel
from core.types import Capability, ReasoningDelta, SamplingParams
from tests.requests import chat, end_of, request, run, text_of

BOS, END, OPEN, CLOSE = "<s>", "<|im_end|>", "<think>", "</think>"
TEMPLATE = "{{ bos_token }}{{ messages[-1].content }}"


class ScriptedStepper:
    """Answers every prompt with the same tokens and keeps what it was asked."""

    max_sequences = 2

    def __init__(self, tokenizer: HfTokenizer, answer: list[int]) -> None:
        self.specs: list[SequenceSpec] = []
        self.is_closed = False
        self._tokenizer = tokenizer
        self._answer = answer
        self._left: dict[int, list[int]] = {}

    def add(self, spec: SequenceSpec) -> None:
        self.specs.append(spec)
        self._left[spec.id] = list(reversed(self._answer))

    def remove(self, sequence_id: int) -> None:
        self._left.pop(sequence_id, None)

    def step(self) -> list[StepOutput]:
        outputs = []
        for sequence_id, left in self._left.items():
            token_id = left.pop()
            outputs.append(StepOutput(sequence_id, token_id, self._tokenizer.is_end(token_id)))
        return outputs

    def counters(self) -> EngineLoad:
        return EngineLoad()

    def close(self) -> None:
        self.is_closed = True


def folder(path: Path, **generation_config: Any) -> HfFolder:
    return HfFolder(path, {}, generation_config, {}, TEMPLATE, "")


def tokenizer(path: Path, *, adds_bos: bool) -> HfTokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({char: index for index, char in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([BOS, END, OPEN, CLOSE])
    made.save(str(path / "tokenizer.json"))
    config = {"bos_token": BOS, "eos_token": END, "add_bos_token": adds_bos}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return HfTokenizer(path)


def described(template: str) -> ModelInfo:
    capabilities = frozenset({Capability.CHAT})
    return ModelInfo("mlx", "tiny", "llama", "f32", (), 0, 0, 100, capabilities, "", template)


def opened(
    path: Path, answer: str, *, adds_bos: bool = True, template: str = TEMPLATE, **recommended: Any
) -> tuple[Engine, ScriptedStepper]:
    vocabulary = tokenizer(path, adds_bos=adds_bos)
    ids = vocabulary.encode(answer, add_bos=False, parse_special=True)
    stepper = ScriptedStepper(vocabulary, ids)
    engine = open_token_engine(
        described(template),
        folder(path, **recommended),
        vocabulary,
        lambda: stepper,
        EngineOptions(),
        context_tokens=50,
    )
    return engine, stepper


@pytest.mark.parametrize("adds_bos", [True, False])
async def test_the_templates_own_bos_comes_once(tmp_path: Path, adds_bos: bool) -> None:
    engine, stepper = opened(tmp_path, f"grüße{END}", adds_bos=adds_bos)
    try:
        events = await run(engine, request(chat("hi")))
        prompt = stepper.specs[0].prompt
        assert (len(prompt), prompt[0]) == (3, 256)
        assert text_of(events) == "grüße"
        assert end_of(events).reason == "stop"
        assert engine.context_tokens == 50
    finally:
        await engine.close()
    assert stepper.is_closed


async def test_reasoning_markers_are_seen_though_they_are_control_tokens(tmp_path: Path) -> None:
    template = TEMPLATE + "{# <think> #}"
    engine, _ = opened(tmp_path, f"{OPEN}hm{CLOSE}yes{END}", template=template)
    try:
        events = await run(engine, request(chat("hi")))
    finally:
        await engine.close()
    reasoning = "".join(event.text for event in events if isinstance(event, ReasoningDelta))
    assert (reasoning, text_of(events)) == ("hm", "yes")


async def test_recommended_sampling_fills_what_is_open(tmp_path: Path) -> None:
    engine, stepper = opened(tmp_path, f"a{END}", temperature=0.6, top_k=20)
    try:
        await run(engine, request(chat("hi"), temperature=None, top_k=5))
    finally:
        await engine.close()
    sampling = stepper.specs[0].sampling
    assert (sampling.temperature, sampling.top_k) == (0.6, 5)


def test_what_opening_raises_is_raised(tmp_path: Path) -> None:
    def fail() -> ScriptedStepper:
        raise BrokenModel("no weights")

    with pytest.raises(BrokenModel, match="no weights"):
        open_token_engine(
            described(TEMPLATE),
            folder(tmp_path),
            tokenizer(tmp_path, adds_bos=True),
            fail,
            EngineOptions(),
            context_tokens=50,
        )


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, SamplingParams()),
        (
            {"temperature": 1, "top_p": 0.9, "top_k": 40, "min_p": 0.1, "do_sample": True},
            SamplingParams(temperature=1.0, top_p=0.9, top_k=40, min_p=0.1),
        ),
        ({"temperature": 0.6, "do_sample": False}, SamplingParams()),
        ({"temperature": float("nan"), "top_p": float("inf")}, SamplingParams()),
        ({"temperature": -1, "top_p": 0, "top_k": 10**400, "min_p": "x"}, SamplingParams()),
        ({"temperature": True, "top_p": [0.5], "top_k": None}, SamplingParams()),
    ],
)
def test_impossible_recommendations_are_left_out(
    tmp_path: Path, config: dict[str, Any], expected: SamplingParams
) -> None:
    assert recommended_sampling(folder(tmp_path, **config)) == expected
