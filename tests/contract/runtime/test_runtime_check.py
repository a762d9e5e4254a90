"""The scan's choice of a runtime, by the real libraries in the real inspection child."""

import asyncio
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from backends.base import EngineOptions, ModelInfo
from backends.registry import load_backends
from catalog.scan.identify import Outcome, Refused
from catalog.scan.inspector import Inspector
from core.types import TokenPrompt
from tests.requests import request, run, token_ids_of

VOCABULARY = 512
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 128, "max_position_embeddings": 2048,
    "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 3,
}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}
PROMPT = TokenPrompt(tuple(range(5, 60)))
# Of one answer, whatever the file claims.
MOST_CPU_S = 20.0
MOST_BYTES = 2 * 2**30


@pytest.fixture(scope="module")
def inspector() -> Iterator[Inspector]:
    child = Inspector(["safetensors", "mlx", "pytorch"])
    yield child
    child.close()


Scan = Callable[..., Outcome]


@pytest.fixture
def scan(inspector: Inspector, tmp_path: Path) -> Scan:
    """Save a model of an architecture with random weights, change its config, and scan it."""

    def run(kind: str, sizes: dict[str, Any], changes: dict[str, Any] | None = None) -> Outcome:
        config = getattr(transformers, f"{kind}Config")(**sizes)
        heads = ("ForCausalLM", "LMHeadModel", "ForImageClassification")
        model_class = next(
            found for head in heads if (found := getattr(transformers, kind + head, None))
        )
        model_class(config).float().save_pretrained(tmp_path)
        vocabulary = {f"<{number}>": number for number in range(VOCABULARY)}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<0>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        path = tmp_path / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | (changes or {})))
        return inspector.examine(tmp_path / "model.safetensors")

    return run


@pytest.mark.parametrize(
    ("kind", "sizes", "runtime", "reason"),
    [
        ("Llama", SIZES, "mlx", "computes what transformers computes"),
        ("Mixtral", SIZES | EXPERTS, "mlx", "computes what transformers computes"),
        ("Mistral", SIZES | {"sliding_window": 48}, "pytorch", "sliding window of 48"),
        ("Phi3", SIZES | {"sliding_window": 48}, "pytorch", "sliding window of 48"),
        ("Glm", SIZES | {"head_dim": 16}, "pytorch", "other logits"),
        ("Phimoe", SIZES | EXPERTS, "pytorch", "missing"),
        ("Olmo", SIZES, "pytorch", "ends the process"),
        ("GPTNeoX", SIZES, "pytorch", "rotary_emb_base"),
        ("Arcee", SIZES, "pytorch", "does not support the architecture"),
    ],
)
def test_the_runtime_is_one_that_loads_the_model_and_computes_it_right(
    scan: Scan, kind: str, sizes: dict[str, Any], runtime: str, reason: str
) -> None:
    info = scan(kind, sizes)
    assert isinstance(info, ModelInfo), info
    assert info.choice is not None
    assert info.choice.runtime == runtime
    assert reason in info.choice.reason
    if "sliding window" in reason:
        assert (info.choice.alternative, info.details["mlx_context"]) == ("mlx", 48)
    assert info.context_length == 2048


async def test_a_load_follows_the_choice_and_both_runtimes_give_the_same_text(scan: Scan) -> None:
    info = scan("Llama", SIZES)
    assert isinstance(info, ModelInfo), info
    assert info.choice is not None
    assert (info.choice.runtime, info.choice.alternative) == ("mlx", "pytorch")
    backend = load_backends()["safetensors"]
    tokens = []
    for runtime in (None, "pytorch", "mlx"):
        options = EngineOptions(max_sequences=2, context_tokens=256, runtime=runtime)
        engine = await asyncio.to_thread(backend.open, info, options)
        try:
            tokens.append(token_ids_of(await run(engine, request(PROMPT, max_tokens=12))))
        finally:
            await engine.close()
    assert tokens[0] == tokens[1] == tokens[2]
    assert len(tokens[0]) > 1


def test_parameters_are_those_of_the_model(scan: Scan) -> None:
    info = scan("GPT2", {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4})
    assert isinstance(info, ModelInfo), info
    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4)
    model = transformers.GPT2LMHeadModel(config)
    assert info.parameters == sum(each.numel() for each in model.parameters())


def test_weights_that_no_runtime_has_a_place_for_are_refused_with_both_reasons(scan: Scan) -> None:
    outcome = scan("Llama", SIZES, {"intermediate_size": 96})
    assert isinstance(outcome, Refused), outcome
    assert "PyTorch: " in outcome.reason
    assert "MLX: " in outcome.reason


@pytest.mark.parametrize("form", ["bin", "mlx"])
@pytest.mark.parametrize("inner", [128, 96])
def test_other_forms_of_weights_are_built_as_well(
    scan: Scan, inspector: Inspector, tmp_path: Path, form: str, inner: int
) -> None:
    scan("Llama", SIZES, {"intermediate_size": inner})
    source = tmp_path / "model.safetensors"
    tensors = load_file(source)
    source.unlink()
    if form == "bin":
        path = tmp_path / "pytorch_model.bin"
        torch.save(tensors, path)
    else:
        path = source
        save_file(tensors, path, {"format": "mlx"})
    outcome = inspector.examine(path)
    if inner == 128:
        assert isinstance(outcome, ModelInfo), outcome
        assert outcome.parameters == sum(each.numel() for each in tensors.values())
    else:
        assert isinstance(outcome, Refused), outcome
        assert "cannot load it" in outcome.reason


def test_a_model_that_generates_no_text_is_refused(scan: Scan) -> None:
    outcome = scan(
        "ViT",
        {key: SIZES[key] for key in ("hidden_size", "num_hidden_layers")} | {"image_size": 32},
    )
    assert isinstance(outcome, Refused), outcome


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 1_000_000},
        {"num_hidden_layers": 4000},
        {"num_local_experts": 1_000_000},
        {"num_local_experts": 4000},
        {"hidden_size": 2**31},
        {"hidden_size": 2**31 - 1},
        {"vocab_size": 2**31 - 1},
        {"intermediate_size": 2**31 - 1},
        {"num_attention_heads": 2**31 - 1},
        {"head_dim": 2**31 - 1},
        {"max_position_embeddings": 2**31 - 1, "sliding_window": 2**31 - 1},
        {"rope_parameters": {"rope_type": "yarn", "factor": 1e308, "rope_theta": 1e-300}},
        {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 10**6}},
        {"hidden_act": "os.system"},
        {"layer_types": ["full_attention"] * 10**6},
        {"num_key_value_heads": 0},
        {"num_attention_heads": 0},
        {"vision_config": {"num_hidden_layers": 10**6, "hidden_size": 2**31 - 1}},
    ],
    ids=str,
)
def test_hostile_sizes_are_answered_in_bounded_time_and_memory(
    scan: Scan, inspector: Inspector, changes: dict[str, Any]
) -> None:
    before = _cpu_s(inspector)
    outcome = scan("Mixtral", SIZES | EXPERTS, changes)
    assert isinstance(outcome, Refused | ModelInfo), outcome
    if changes.keys() <= {"hidden_size", "vocab_size", "num_hidden_layers", "num_local_experts"}:
        assert isinstance(outcome, Refused), outcome
        assert all(str(value) in outcome.reason for value in changes.values())
    assert _cpu_s(inspector) - before < MOST_CPU_S
    assert _process(inspector).memory_info().rss < MOST_BYTES


def test_a_header_that_claims_what_its_config_claims_is_answered_as_well(
    inspector: Inspector, tmp_path: Path
) -> None:
    """Shapes that agree with a hostile configuration need no bytes if one length is zero."""
    header = {
        f"model.layers.{number}.mlp.weight": {
            "dtype": "F32", "shape": [0, 4000], "data_offsets": [0, 0],
        }
        for number in range(4000)
    }  # fmt: skip
    data = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(data)) + data)
    config = {
        **SIZES, **EXPERTS, "model_type": "mixtral", "architectures": ["MixtralForCausalLM"],
        "num_hidden_layers": 4000, "num_local_experts": 4000, "hidden_size": 4000,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.json").write_text("{}")
    outcome = inspector.examine(path)
    assert isinstance(outcome, Refused), outcome


def _process(inspector: Inspector) -> psutil.Process:
    assert inspector._child is not None
    return psutil.Process(inspector._child.pid)


def _cpu_s(inspector: Inspector) -> float:
    if inspector._child is None:
        return 0.0
    used = _process(inspector).cpu_times()
    return used.user + used.system
