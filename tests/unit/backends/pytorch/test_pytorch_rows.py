"""Rows of tokens on tiny random transformers models, against each model's own forward pass."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from backends.engine.row_model import PortableRows, RowInput, RowModel  # noqa: E402
from backends.pytorch.packing import limitations, open_rows, try_rows  # noqa: E402
from backends.pytorch.rows import PackedRows, SeparateRows, UncachedRows  # noqa: E402
from backends.trials import TrialResult  # noqa: E402
from core.errors import BrokenModel  # noqa: E402

VOCABULARY = 64
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# Architecture, what its configuration adds, and the rows that are right for it.
KINDS: dict[str, tuple[str, dict[str, Any], type[RowModel]]] = {
    "llama": ("llama", {}, PackedRows),
    "qwen2": ("qwen2", {}, PackedRows),
    "phi3": ("phi3", {}, PackedRows),
    "sliding": ("mistral", {"sliding_window": 4}, PackedRows),
    "softcap": ("gemma2", {"sliding_window": 4, "query_pre_attn_scalar": 8}, PackedRows),
    "mixed": ("gemma3_text", {"sliding_window": 4, "query_pre_attn_scalar": 8}, PackedRows),
    "experts": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}, PackedRows),
    "sinks": ("gpt_oss", {"sliding_window": 4, "num_local_experts": 4}, PackedRows),
    "alibi": ("bloom", {"n_head": 4, "n_layer": 2}, SeparateRows),
    "recurrent": ("mamba", {"state_size": 4}, SeparateRows),
    "hybrid": ("lfm2", {"layer_types": ["conv", "full_attention"] * 2}, SeparateRows),
    "own positions": (
        "bamba",
        {
            "attn_layer_indices": [1, 3],
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
        },
        SeparateRows,
    ),
    "state in the model": ("recurrent_gemma", {"attention_window_size": 12}, UncachedRows),
    "no cache": ("openai-gpt", {"n_embd": 32, "n_head": 4, "n_layer": 2}, UncachedRows),
    "cache of its own": (
        "minimax",
        {"layer_types": ["linear_attention", "full_attention"] * 2, "num_local_experts": 4},
        UncachedRows,
    ),
}
PROMPTS = [[5, 9, 33, 17, 4, 8, 21, 60, 7, 3], [11, 12], [40, 6, 6, 40, 6]]


def tiny(kind: str, **changes: Any) -> Any:
    """Return a random model, float32, of what `kind` names in KINDS."""
    name, more, _ = KINDS[kind]
    torch.manual_seed(7)
    config = transformers.AutoConfig.for_model(name, **{**SIZES, **more, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        # Larger weights than those of training's start: attention must matter.
        for parameter in model.parameters():
            parameter.mul_(4.0 if parameter.ndim > 1 else 1.0)
    return model.eval()


def own_logits(model: Any, tokens: Sequence[int]) -> NDArray[np.float32]:
    """Return the model's own logits after the last token, with no cache."""
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]
    found: NDArray[np.float32] = logits.float().numpy()
    return found


@pytest.fixture(params=sorted(KINDS))
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[Any, RowModel]]:
    """A model with its own attention, and rows over another of the same weights."""
    rows = open_rows(tiny(request.param), max_rows=8)
    yield tiny(request.param), rows
    rows.close()


def assert_close(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> None:
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3 * float(np.abs(wanted).max()))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_each_architecture_has_the_fastest_rows_that_are_right(kind: str) -> None:
    rows = open_rows(tiny(kind), max_rows=8)
    assert isinstance(rows, KINDS[kind][2])


def test_rows_of_different_lengths_compute_what_the_model_does(pair: tuple[Any, RowModel]) -> None:
    model, rows = pair
    ids = [rows.open_row(32) for _ in PROMPTS]
    texts = [list(prompt) for prompt in PROMPTS]
    logits = rows.extend([RowInput(i, text) for i, text in zip(ids, texts, strict=True)])
    for _ in range(12):
        for text, row in zip(texts, logits, strict=True):
            assert_close(row, own_logits(model, text))
            text.append(int(row.argmax()))
        logits = rows.extend([RowInput(i, text[-1:]) for i, text in zip(ids, texts, strict=True)])


def test_a_prompt_in_pieces_beside_a_decoding_row(pair: tuple[Any, RowModel]) -> None:
    model, rows = pair
    decoding, prompt = rows.open_row(32), rows.open_row(32)
    text = list(PROMPTS[1])
    logits = rows.extend([RowInput(decoding, text)])
    for start, end in pairwise((0, 3, 4, 9, 10)):
        text.append(int(logits[0].argmax()))
        piece = RowInput(prompt, PROMPTS[0][start:end])
        logits = rows.extend([RowInput(decoding, text[-1:]), piece])
        assert_close(logits[0], own_logits(model, text))
        assert_close(logits[1], own_logits(model, PROMPTS[0][:end]))


def test_a_copied_row_goes_its_own_way(pair: tuple[Any, RowModel]) -> None:
    model, rows = pair
    source = rows.open_row(32)
    rows.extend([RowInput(source, PROMPTS[0])])
    copied = rows.copy_row(source, len(PROMPTS[0]), 32)
    assert copied is not None
    logits = rows.extend([RowInput(source, [50]), RowInput(copied, [51])])
    assert_close(logits[0], own_logits(model, [*PROMPTS[0], 50]))
    assert_close(logits[1], own_logits(model, [*PROMPTS[0], 51]))
    rows.close_row(source)
    logits = rows.extend([RowInput(copied, [52, 53])])
    assert_close(logits[0], own_logits(model, [*PROMPTS[0], 51, 52, 53]))


def test_a_row_cut_short_is_right_or_refused(pair: tuple[Any, RowModel]) -> None:
    model, rows = pair
    row = rows.open_row(32)
    rows.extend([RowInput(row, PROMPTS[0])])
    copied = rows.copy_row(row, 6, 32)
    if copied is not None:
        assert_close(
            rows.extend([RowInput(copied, [50])])[0], own_logits(model, [*PROMPTS[0][:6], 50])
        )
    kept = 6 if rows.truncate(row, 6) else len(PROMPTS[0])
    wanted = own_logits(model, [*PROMPTS[0][:kept], 50])
    assert_close(rows.extend([RowInput(row, [50])])[0], wanted)


def test_a_row_may_outgrow_its_capacity(pair: tuple[Any, RowModel]) -> None:
    model, rows = pair
    row = rows.open_row(1)
    text = [(7 * index) % VOCABULARY for index in range(100)]
    rows.extend([RowInput(row, text[:99])])
    assert_close(rows.extend([RowInput(row, text[99:])])[0], own_logits(model, text))


def test_logits_may_be_changed_by_whoever_gets_them(pair: tuple[Any, RowModel]) -> None:
    _, rows = pair
    logits = rows.extend([RowInput(rows.open_row(8), [5, 6])])
    assert logits.dtype == np.float32
    assert logits.shape == (1, VOCABULARY)
    logits[0, 3] = -np.inf
    assert rows.native_cpu_s > 0.0


def test_attention_of_another_kind_is_found_out_and_not_packed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from backends.pytorch import attention as pytorch_attention

    def wrong(step: Any, *arguments: Any, **options: Any) -> Any:
        found, _ = real(step, *arguments, **options)
        return found * 0.5, None

    real = pytorch_attention._attend
    monkeypatch.setattr(pytorch_attention, "_attend", wrong)
    model = tiny("llama")
    rows = open_rows(model, max_rows=4)
    assert isinstance(rows, SeparateRows)
    logits = rows.extend([RowInput(rows.open_row(8), PROMPTS[0])])
    assert_close(logits[0], own_logits(tiny("llama"), PROMPTS[0]))


def test_a_model_that_is_not_packed_tells_why() -> None:
    result = try_rows(tiny("own positions"))
    assert limitations("m", result) == ()
    (text,) = limitations("m", try_rows(tiny("no cache")))
    assert "computes its whole text again for each token" in text
    wrong = TrialResult(reason="the logits differ", choice="separate")
    (text,) = limitations("m", wrong)
    assert "one after the other" in text


def test_a_model_that_cannot_be_run_is_refused_with_a_reason() -> None:
    model = tiny("llama")
    model.forward = lambda *_, **__: 1 / 0
    with pytest.raises(BrokenModel, match="division by zero"):
        try_rows(model)


def test_a_known_result_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    result = try_rows(tiny("llama"))
    monkeypatch.setattr("backends.pytorch.packing.try_rows", None)
    rows = open_rows(tiny("llama"), max_rows=4, result=result)
    assert isinstance(rows, PackedRows)


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_goes_on_in_another_process_from_its_bytes(kind: str, dtype: Any) -> None:
    rows, other = (open_rows(tiny(kind).to(dtype), max_rows=8) for _ in range(2))
    assert isinstance(rows, PortableRows) == (KINDS[kind][2] is PackedRows)
    if not isinstance(rows, PortableRows):
        return
    assert isinstance(other, PortableRows)
    ids = [*PROMPTS[0], *PROMPTS[2]]
    row = rows.open_row(20)
    rows.extend([RowInput(row, ids[:8])])
    states = [rows.read_tokens(row, start, 4) for start in (0, 4)]
    wanted = rows.extend([RowInput(row, ids[8:])])
    row = other.open_row(20)
    assert all(other.append_tokens(row, 4, state) for state in states)
    np.testing.assert_array_equal(other.extend([RowInput(row, ids[8:])]), wanted)
    assert not other.append_tokens(row, 4, states[0][:-4])
    assert other.layout == rows.layout
    rows.close()
    other.close()
