"""Loading a tiny model: settings, mismatched weights, prefixes, and tokens sampled ahead."""

import json
import resource
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends.base import EngineOptions
from backends.engine.sampling import RowSampler
from backends.hf.folder import read_folder
from backends.mlx.batch import RowChoice
from backends.mlx.model import MlxModel
from backends.mlx.prefixes import MlxPrefixes
from backends.mlx.stepper import MlxStepper
from backends.prefixes.block_file import BLOCK_TOKENS
from backends.stepper import SequenceSpec, StepOutput
from core.errors import BrokenModel
from core.types import SamplingParams
from tests.prefixes import place_in, store_at

WIDTH, VOCABULARY = 64, 40
CONFIG: Mapping[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": WIDTH,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


class Letters:
    """Token 0 ends; every other token is one letter."""

    def is_end(self, token_id: int) -> bool:
        return token_id == 0

    def piece(self, token_id: int, *, special: bool) -> bytes:
        del special
        return bytes((60 + token_id,))


def write_tiny(folder: Path, **config: Any) -> Path:
    """Write a model with random weights."""
    from safetensors.numpy import save_file

    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    shapes = {
        "embed_tokens": (VOCABULARY, WIDTH),
        "layers.0.self_attn.q_proj": (WIDTH, WIDTH),
        "layers.0.self_attn.k_proj": (WIDTH // 2, WIDTH),
        "layers.0.self_attn.v_proj": (WIDTH // 2, WIDTH),
        "layers.0.self_attn.o_proj": (WIDTH, WIDTH),
        "layers.0.mlp.gate_proj": (128, WIDTH),
        "layers.0.mlp.up_proj": (128, WIDTH),
        "layers.0.mlp.down_proj": (WIDTH, 128),
        "layers.0.input_layernorm": (WIDTH,),
        "layers.0.post_attention_layernorm": (WIDTH,),
        "norm": (WIDTH,),
    }
    random = np.random.default_rng(7)
    tensors = {
        f"model.{name}.weight": random.normal(0, 0.3, shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors", {"format": "mlx"})
    return folder


def load(folder: Path) -> MlxModel:
    return MlxModel(read_folder(folder), (folder / "model.safetensors",), threads=1, is_dense=False)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("models") / "tiny")


def stepper(folder: Path, **options: Any) -> MlxStepper:
    chosen: dict[str, Any] = {
        "max_sequences": 4,
        "kv_tokens": 512,
        "prefill_chunk_tokens": 16,
        **options,
    }
    return MlxStepper(load(folder), Letters(), EngineOptions(**chosen))


def spec(number: int, prompt: Sequence[int], count: int = 8, **sampling: Any) -> SequenceSpec:
    sampling = {"temperature": 0.0, "logit_bias": {0: -100.0}, **sampling}
    return SequenceSpec(number, tuple(prompt), SamplingParams(**sampling), count)


def finish(steps: MlxStepper, specs: Sequence[SequenceSpec]) -> dict[int, list[StepOutput]]:
    """Run what was added until each sequence has its tokens; removes it then."""
    outputs: dict[int, list[StepOutput]] = {each.id: [] for each in specs}
    left = {each.id: each.max_tokens for each in specs}
    while left:
        for output in steps.step():
            outputs[output.sequence_id].append(output)
            if output.token_id is not None:
                left[output.sequence_id] -= 1
                if not left[output.sequence_id]:
                    steps.remove(output.sequence_id)
                    del left[output.sequence_id]
    return outputs


def tokens_of(outputs: Sequence[StepOutput]) -> list[int]:
    return [output.token_id for output in outputs if output.token_id is not None]


@pytest.mark.parametrize("name", ["rope_parameters", "rope_theta"])
def test_the_rotary_base_is_found_where_either_transformers_writes_it(
    tmp_path: Path, name: str
) -> None:
    value = 5e5 if name == "rope_theta" else {"rope_theta": 5e5, "rope_type": "default"}
    model = load(write_tiny(tmp_path / "tiny", **{name: value}))
    assert model.model.args.rope_theta == 5e5


def test_a_missing_tensor_and_a_wrong_shape_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BrokenModel, match="cannot be loaded"):
        load(write_tiny(tmp_path / "missing", num_hidden_layers=2))
    with pytest.raises(BrokenModel, match="cannot be loaded"):
        load(write_tiny(tmp_path / "shape", hidden_size=32))


def test_an_embedder_saved_without_its_head_and_prefix_loads(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    settings = {"architectures": ["LlamaModel"], "tie_word_embeddings": False}
    path = write_tiny(tmp_path / "tiny", **settings) / "model.safetensors"
    tensors = {name.removeprefix("model."): array for name, array in load_file(path).items()}
    save_file(tensors, path)
    assert load(path.parent).vocabulary_size == VOCABULARY


def test_broken_numbers_are_refused(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    path = write_tiny(tmp_path / "tiny") / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][3] = np.nan
    save_file(tensors, path, {"format": "mlx"})
    with pytest.raises(BrokenModel, match="not numbers"):
        load(path.parent)


def test_loading_leaves_the_limit_of_open_files_alone(tiny: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    load(tiny).close()
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == before


def test_prompts_come_in_chunks_that_end_before_the_last_token(tiny: Path) -> None:
    steps = stepper(tiny)
    steps.add(spec(1, range(1, 38), 2))
    outputs = finish(steps, [spec(1, range(1, 38), 2)])[1]
    progress = [output.prefilled for output in outputs if output.token_id is None]
    assert progress == [16, 32, 36]
    assert len(tokens_of(outputs)) == 2
    steps.close()


def test_pieces_of_a_prompt_shrink_as_its_context_grows(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backends.engine.prefill._LARGEST_AREA", 128)
    monkeypatch.setattr("backends.engine.prefill._SMALLEST_CHUNK", 4)
    steps = stepper(tiny)
    steps.add(spec(1, range(1, 38), 2))
    outputs = finish(steps, [spec(1, range(1, 38), 2)])[1]
    progress = [output.prefilled for output in outputs if output.token_id is None]
    assert progress == [16, 24, 29, 33, 36]
    steps.close()


def test_the_last_token_costs_no_step_that_nobody_reads(tiny: Path) -> None:
    steps = stepper(tiny)
    calls = []
    forward = type(steps._model.model).__call__

    def counted(self: Any, *arguments: Any, **options: Any) -> Any:
        calls.append(1)
        return forward(self, *arguments, **options)

    type(steps._model.model).__call__ = counted
    greedy = SequenceSpec(1, (5, 6, 7), SamplingParams(temperature=0.0), 4)
    steps.add(greedy)
    finish(steps, [greedy])
    assert len(calls) == 1 + 4
    steps.close()


def test_a_removed_sequence_gives_no_more_output(tiny: Path) -> None:
    steps = stepper(tiny)
    steps.add(spec(1, [5, 6, 7], 50))
    steps.add(spec(2, [8, 9], 6))
    steps.step()
    steps.remove(1)
    steps.remove(1)
    outputs = finish(steps, [spec(2, [8, 9], 6)])
    assert len(tokens_of(outputs[2])) == 6
    assert steps.step() == []
    assert steps.counters().kv_used_tokens == 0
    steps.close()


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.5, "seed": 3, "top_k": 0}])
def test_rows_that_wait_for_room_lose_nothing(tiny: Path, sampling: dict[str, Any]) -> None:
    # A prefix of each that is shared with nobody.
    specs = [spec(n, [n, n + 9, n + 3], 60, top_logprobs=1, **sampling) for n in (1, 2, 3)]
    alone: dict[int, list[StepOutput]] = {}
    steps = stepper(tiny)
    for each in specs:
        steps.add(each)
        alone |= finish(steps, [each])
    steps.close()
    crowded = stepper(tiny, kv_tokens=100)
    for each in specs:
        crowded.add(each)
    together = finish(crowded, specs)
    assert crowded.counters().preemptions > 0
    for number, outputs in alone.items():
        assert tokens_of(together[number]) == tokens_of(outputs)
        for one, other in zip(
            (output for output in outputs if output.logprob),
            (output for output in together[number] if output.logprob),
            strict=True,
        ):
            assert one.logprob is not None
            assert other.logprob is not None
            assert other.logprob.token_id == other.token_id
            assert other.logprob.logprob == pytest.approx(one.logprob.logprob, abs=1e-3)
    crowded.close()


def test_nothing_is_chosen_after_the_end() -> None:
    sampler = RowSampler(spec(1, [1], logit_bias={}), 4, lambda _: b"")
    choice = RowChoice(sampler, lambda token: token == 2)
    assert choice.choose(np.array([0, 1, 5, 0], np.float32)) == 2
    assert choice.choose(np.array([9, 1, 5, 0], np.float32)) == 2
    assert choice.take() is None
    assert choice.take_waiting() is None


def layers_of(tokens: int) -> list[Any]:
    import mlx.core as mx
    from mlx_lm.models.cache import KVCache

    cache = KVCache()
    values = mx.arange(tokens, dtype=mx.float32)[None, None, :, None]
    cache.update_and_fetch(values, values)
    return [cache]


def test_the_longest_prefix_is_cut_to_what_is_shared(tiny: Path) -> None:
    load(tiny).close()
    prefixes = MlxPrefixes(10**6)
    prefixes.put(array("i", range(50)), layers_of(50))
    prefixes.put(array("i", [*range(40), *range(100, 140)]), layers_of(80))
    known, make = prefixes.longest(array("i", [*range(40), 100, 101, 7, 7]))
    assert known == 42
    (layer,) = make()
    assert layer.offset == 42
    assert prefixes.longest(array("i", range(50)))[0] == 49
    assert prefixes.longest(array("i", range(20)))[0] == 0


def test_the_least_recently_used_prefix_goes_first(tiny: Path) -> None:
    load(tiny).close()
    size = layers_of(64)[0].nbytes
    prefixes = MlxPrefixes(2 * size)
    starts = (0, 1000, 2000)
    for start in starts[:2]:
        prefixes.put(array("i", range(start, start + 64)), layers_of(64))
    assert prefixes.longest(array("i", range(64)))[0] == 63
    prefixes.put(array("i", range(2000, 2064)), layers_of(64))
    found = [prefixes.longest(array("i", range(start, start + 64)))[0] for start in starts]
    assert found == [63, 0, 63]
    assert prefixes.size_bytes == 2 * size


def test_a_longer_prefix_replaces_what_it_continues(tiny: Path) -> None:
    load(tiny).close()
    prefixes = MlxPrefixes(10**6)
    prefixes.put(array("i", range(40)), layers_of(40))
    one = prefixes.size_bytes
    prefixes.put(array("i", range(60)), layers_of(60))
    prefixes.put(array("i", range(50)), layers_of(50))
    assert prefixes.size_bytes == one


@pytest.mark.parametrize("ram_bytes", [0, 1 << 20])
def test_a_prompt_is_restored_by_another_engine(tiny: Path, tmp_path: Path, ram_bytes: int) -> None:
    store = store_at(tmp_path, ram_bytes=ram_bytes, size_bytes=0 if ram_bytes else 1 << 22)
    asked = [spec(1, [n * 7 % 39 + 1 for n in range(300)])]
    results = []
    for _ in range(2):
        steps = stepper(tiny, prefix_bytes=1 << 22, prefix_store=place_in(store))
        steps.add(asked[0])
        results.append(finish(steps, asked)[1])
        steps.close()
    first, second = ([each.token_id for each in outputs if each.token_id] for outputs in results)
    assert first == second
    assert results[0][-1].cached == 0
    reuse = results[1][-1].reuse
    assert reuse is not None
    kept = 2 * BLOCK_TOKENS
    assert (reuse.cells, reuse.ram, reuse.disk) == ((0, kept, 0) if ram_bytes else (0, 0, kept))
    store.close()


def test_a_short_prompt_does_not_wait_for_many_long_ones(tiny: Path) -> None:
    steps = stepper(tiny, max_sequences=12, kv_tokens=8192, prefill_chunk_tokens=64)
    for number in range(11):
        steps.add(spec(number, [(n * 7 + number) % 39 + 1 for n in range(400)]))
    steps.step()
    steps.add(spec(11, [1, 2, 3]))
    outputs = [output for _ in range(4) for output in steps.step()]
    assert [each.sequence_id for each in outputs if each.token_id is not None][:1] == [11]
    assert {each.sequence_id for each in outputs if each.token_id is None} >= set(range(11))
    steps.close()
