"""Tiny Hugging Face models with random weights and a byte-level tokenizer, for conversions."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from catalog.convert.steps.gguf_tokenizer import PATTERNS, pre_tokenizer

END, TURN_END, START = "<|endoftext|>", "<|im_end|>", "<|im_start|>"
_SHAPE: Mapping[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.12,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 256,
}  # fmt: skip
# Files that a conversion copies; written in a way that no program would write them again.
SIDECARS: Mapping[str, str] = {
    "chat_template.jinja": "{% for m in messages %}{{ m['content'] }}\r\n{% endfor %}",
    "additional_chat_templates/tool_use.jinja": "{{ tools }}{{ messages[0]['content'] }}",
    "generation_config.json": '{"eos_token_id":[%d,%d],\n\n"temperature":0.5, "top_k": 20,"x_y":1}',
    "special_tokens_map.json": '{ "eos_token":"<|im_end|>" }',
    "README.md": "---\nlicense: mit\n---\n# Tiny\n",
    "LICENSE": "Permission is hereby granted\r\n",
}


def write_tokenizer(folder: Path) -> int:
    """Write a tokenizer and all sidecars; return the number of tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    words = ["th", "the", "he", "in", "er", "an", "Ġt", "Ġth", "Ġthe", "Ġa"]
    merges = [("t", "h"), ("th", "e"), ("h", "e"), ("i", "n"), ("e", "r"), ("a", "n"), ("Ġ", "t"),
              ("Ġt", "h"), ("Ġth", "e"), ("Ġ", "a")]  # fmt: skip
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: index for index, text in enumerate([*letters, *words])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizer(PATTERNS["gpt-2"])
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(text, special=True) for text in (END, START, TURN_END)]
    tokenizer.add_special_tokens(special)
    # An added token that is not special, with blanks around it.
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    ends = tuple(tokenizer.token_to_id(text) for text in (TURN_END, END))
    for name, text in SIDECARS.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text % ends if "%d" in text else text, newline="")
    described = {
        "eos_token": {"content": TURN_END},
        "pad_token": END,
        "bos_token": None,
        "model_max_length": 10**30,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(described, separators=(" ,", ":")))
    return int(tokenizer.get_vocab_size(with_added_tokens=True))


def write_model(folder: Path, class_name: str, *, seed: int = 1, **settings: Any) -> Path:
    """Write a model of a transformers class in float32; `settings` are of its configuration."""
    import torch
    import transformers

    size = write_tokenizer(folder)
    kind = getattr(transformers, f"{class_name}ForCausalLM")
    ids = {"bos_token_id": None, "pad_token_id": None, "eos_token_id": size - 2}
    config = kind.config_class(**{**_SHAPE, **ids, "vocab_size": size, **settings})
    torch.manual_seed(seed)
    model = kind(config).eval()
    with torch.no_grad():
        for name, values in model.named_parameters():
            if values.ndim > 1:
                values.copy_(torch.randn_like(values) * (0.6 if "embed" in name else 0.12))
            elif name.endswith("bias"):
                values.copy_(0.05 * torch.randn_like(values))
    model.tie_weights()
    kept = (folder / "generation_config.json").read_bytes()
    model.save_pretrained(folder)
    (folder / "generation_config.json").write_bytes(kept)
    return folder


def greedy_tokens(folder: Path, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """Return transformers' own greedy tokens after each prompt, end tokens not heeded."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    answers = []
    for ids in prompts:
        given = torch.tensor([list(ids)])
        made = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=count,
                              do_sample=False, eos_token_id=-1, pad_token_id=0)  # fmt: skip
        answers.append(made[0].tolist()[len(ids) :])
    return answers
