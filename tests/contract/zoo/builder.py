"""Builds the zoo's models with transformers, and the answers that it generates with them.

Run as a process of its own: it reads a name and a folder per line from stdin and answers each with
`ok` or `failed` and the reason, separated by tabs.  It imports no code of the project but the list
of architectures, so that nothing the project changes in transformers can change a reference.
"""

import json
import shutil
import sys
import warnings
import zlib
from itertools import cycle
from pathlib import Path
from typing import Any

from tests.contract.zoo.architectures import ARCHITECTURES
from tests.contract.zoo.settings import Architecture

ROOT = Path(__file__).resolve().parents[3]
PROMPT_TOKENS = (4, 36, 115, 466)
ANSWER_TOKENS = 24
# Ids of the tokenizer's special tokens, which no model here generates by itself.
BOS, EOS, PAD = 0, 2, 3
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<pad>")
_VOCABULARY = 800
_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Between the two likeliest logits, relative to the largest: rounding in float32 is far below.
_LEAST_GAP = 0.0005
# Different tokens among those of all four answers: a model that repeats one token shows little.
_LEAST_VARIETY = 24
_SEEDS = 24
# Standard deviations of weights that are tried in turn.  The smaller ones suit most models; with
# the larger ones no model whose embedding is also its output repeats its last token.
_SCALES = (0.12, 0.2, 0.3)
_EMBEDDING_SCALE, _TIED_SCALE = 0.6, 0.03


def make_tokenizer() -> Any:
    """Return a small byte-level BPE whose tokens are ASCII, so that each is valid text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    text = (ROOT / "LICENSE").read_text("ascii")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    ascii_bytes = [c for c in sorted(pre_tokenizers.ByteLevel.alphabet()) if ord(c) < 127]
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=list(_SPECIAL),
        initial_alphabet=[*ascii_bytes, "Ġ", "Ċ", "ĉ"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=_SPECIAL[BOS],
        eos_token=_SPECIAL[EOS],
        pad_token=_SPECIAL[PAD],
        model_max_length=2048,
    )
    fast.chat_template = _TEMPLATE
    return fast


def make_prompts(tokenizer: Any) -> list[tuple[str, list[int]]]:
    """Return a text of each of `PROMPT_TOKENS` lengths, with its token ids."""
    text = " ".join((ROOT / "LICENSE").read_text("ascii").split())
    ids = tokenizer(text).input_ids
    prompts = []
    start = 0
    for length in PROMPT_TOKENS:
        # Not every cut is encoded to the same tokens again.
        while True:
            cut = ids[start : start + length]
            prompt = tokenizer.decode(cut)
            start += 1
            if tokenizer(prompt).input_ids == cut:
                break
        prompts.append((prompt, cut))
        start += length
    return prompts


def _config(architecture: Architecture, size: int) -> Any:
    import transformers

    tokens = {
        "vocab_size": size + architecture.spare_vocabulary,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
    }
    settings = dict(architecture.settings)
    text = settings.get("text_config")
    if text is None:
        settings = {**tokens, **settings}
    else:
        settings["text_config"] = {**tokens, **text}
    return getattr(transformers, architecture.config)(**settings)


def _randomize(model: Any, seed: int, weight_scale: float, size: int) -> None:
    """Give a model weights that let every part of it change the logits."""
    import torch

    made = torch.Generator().manual_seed(seed)

    def noise(parameter: Any, scale: float) -> Any:
        return torch.randn(parameter.shape, generator=made) * scale

    head = model.get_output_embeddings()
    inputs = model.get_input_embeddings()
    is_tied = head is not None and head.weight is inputs.weight
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter is inputs.weight:
                parameter.copy_(noise(parameter, _TIED_SCALE if is_tied else _EMBEDDING_SCALE))
            elif parameter.ndim >= 2 and "A_log" not in name:
                parameter.copy_(noise(parameter, weight_scale))
            elif name.endswith("bias"):
                parameter.copy_(noise(parameter, 0.05))
            elif "norm" in name.lower() or name.endswith("sinks"):
                parameter.add_(noise(parameter, 0.1))
        if head is not None:
            # Special and padded tokens never win.
            head.weight[: len(_SPECIAL)] = 0.0
            head.weight[size:] = 0.0
            if getattr(head, "bias", None) is not None:
                head.bias[: len(_SPECIAL)] = -100.0
                head.bias[size:] = -100.0


def _answers(model: Any, prompts: list[tuple[str, list[int]]]) -> tuple[list[list[int]], float]:
    """Return transformers' greedy tokens, and the least gap of the two likeliest logits.

    Ends after a prompt with a near tie.
    """
    import torch

    answers, gaps = [], []
    for _, ids in prompts:
        made = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=ANSWER_TOKENS,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        answers.append(made.sequences[0, len(ids) :].tolist())
        best = torch.cat(made.logits).float().topk(2).values
        gaps.append(float(((best[:, 0] - best[:, 1]) / best[:, 0].abs()).min()))
        if gaps[-1] < _LEAST_GAP:
            break
    return answers, min(gaps, default=0.0)


def _suits(answers: list[list[int]], gap: float) -> bool:
    tokens = {token for answer in answers for token in answer}
    is_whole = all(len(answer) == ANSWER_TOKENS for answer in answers)
    is_varied = len(tokens) >= _LEAST_VARIETY
    return gap >= _LEAST_GAP and is_whole and is_varied and not tokens & set(range(len(_SPECIAL)))


def build(name: str, folder: Path) -> None:
    """Write a model to `folder`/safetensors and `folder`/bin, and `folder`/reference.json.

    The first seed whose answers have no near ties is taken.  Raises RuntimeError if none suits.
    """
    import torch
    import transformers

    architecture = ARCHITECTURES[name]
    tokenizer = make_tokenizer()
    model_class = getattr(transformers, architecture.model)
    # Different first seeds: else similar models would have the same tensors.
    first = zlib.crc32(name.encode()) % 1000
    prompts = make_prompts(tokenizer) if architecture.is_language_model else []
    tried = []
    for seed, scale in zip(range(first, first + _SEEDS), cycle(_SCALES)):
        torch.manual_seed(seed)
        model = model_class(_config(architecture, len(tokenizer))).eval().float()
        if not prompts:
            break
        _randomize(model, seed, scale, len(tokenizer))
        answers, gap = _answers(model, prompts)
        if _suits(answers, gap):
            break
        tried.append((round(gap, 4), len({token for answer in answers for token in answer})))
    else:
        raise RuntimeError(f"no seed suits; least gap and different tokens of each: {tried}")
    hidden = folder.with_name(f".{folder.name}.building")
    shutil.rmtree(hidden, ignore_errors=True)
    _write(model, tokenizer, hidden)
    reference = _reference(model_class, hidden, tokenizer, prompts)
    (hidden / "reference.json").write_text(json.dumps(reference))
    hidden.rename(folder)


def _reference(
    model_class: Any, folder: Path, tokenizer: Any, prompts: list[tuple[str, list[int]]]
) -> dict[str, Any]:
    """Return what transformers answers with the model that was written, and the model's size."""
    import torch

    model = model_class.from_pretrained(folder / "safetensors", dtype=torch.float32).eval()
    answers, gap = _answers(model, prompts)
    if prompts and not _suits(answers, gap):
        raise RuntimeError("transformers answers otherwise once it has saved and read the model")
    return {
        "gap": gap,
        "prompts": [text for text, _ in prompts],
        "ids": [ids for _, ids in prompts],
        "answers": answers,
        "texts": [tokenizer.decode(answer) for answer in answers],
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def _write(model: Any, tokenizer: Any, folder: Path) -> None:
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD)
    model.save_pretrained(folder / "safetensors")
    tokenizer.save_pretrained(folder / "safetensors")
    _write_bin(model, folder / "safetensors", folder / "bin")


def _write_bin(model: Any, source: Path, folder: Path) -> None:
    """Write the same tensors as pytorch_model.bin; tied ones twice, as transformers 4 did."""
    import torch
    from safetensors.torch import load_file

    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    tensors: dict[str, Any] = {}
    for file in sorted(source.glob("*.safetensors")):
        tensors |= load_file(file)
    for name, other in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if other in tensors and name not in tensors:
            tensors[name] = tensors[other]
    torch.save(tensors, folder / "pytorch_model.bin")


def main() -> None:
    """Build what stdin names, one `NAME\\tFOLDER` a line."""
    import torch
    from transformers.utils import logging

    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    out, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        name, _, folder = line.rstrip("\n").partition("\t")
        try:
            build(name, Path(folder))
            out.write(f"ok\t{name}\n")
        except Exception as problem:
            reason = " ".join(f"{type(problem).__name__}: {problem}".split())[:500]
            out.write(f"failed\t{name}\t{reason}\n")
        out.flush()


if __name__ == "__main__":
    main()
