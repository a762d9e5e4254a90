"""Reads a sentence-transformers folder: pooling, later modules, prompts and the input limit.

Source of the files and keys: sentence-transformers 6.2, base/model.py and the modules' `load`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backends.embedding.modules import ModuleConfig, read_module
from backends.embedding.pooling import Pooling
from backends.embedding.prompts import Prompts
from backends.sentence_files import settings_root
from backends.small_json import read_json, read_object
from core.errors import BrokenModel

# In the order in which a model that uses several concatenates them.
# Source: sentence_transformers, modules/pooling.py.
_FLAGS: Mapping[str, str] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
    "pooling_mode_weightedmean_tokens": "weighted_mean",
    "pooling_mode_lasttoken": "last",
}
_NAMES: Mapping[str, str] = {
    "cls": "cls",
    "max": "max",
    "mean": "mean",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
    "weightedmean": "weighted_mean",
    "lasttoken": "last",
}
_AFTER_POOLING = frozenset({"Dense", "LayerNorm", "Normalize"})
_SUPPORTED = (*sorted(_AFTER_POOLING), "Dropout", "Pooling", "Transformer")
_LIBRARY = "sentence_transformers."
_MAX_PROMPT_CHARACTERS = 16_384


@dataclass(frozen=True, slots=True)
class EmbeddingSettings:
    """What a folder says about its embeddings.

    `modules` are applied after the pooling, in order; the pooling then does not normalise.
    `max_tokens` is the longest input that the model was trained for, including its special
    tokens, None if the folder does not say.  `lower_case`: texts are lowered before tokenizing.
    """

    pooling: Pooling = field(default_factory=Pooling)
    modules: tuple[ModuleConfig, ...] = ()
    prompts: Prompts = field(default_factory=Prompts)
    max_tokens: int | None = None
    lower_case: bool = False

    @property
    def is_unit(self) -> bool:
        """Whether the final vectors have the length 1."""
        return self.modules[-1].kind == "Normalize" if self.modules else self.pooling.normalize


def read_settings(folder: Path) -> EmbeddingSettings:
    """Read the settings of the model in `folder`; the default is mean and unit vectors.

    Raises BrokenModel for damaged files, and for unsupported modules: skipping one would
    silently give different vectors.
    """
    root = settings_root(folder)
    bert = {
        **read_object(root / "sentence_bert_config.json"),
        **read_object(folder / "sentence_bert_config.json"),
    }
    max_tokens = _max_tokens(bert)
    modules = read_json(root / "modules.json")
    if modules is None:
        return EmbeddingSettings(max_tokens=max_tokens)
    config = read_object(root / "config_sentence_transformers.json")
    for settings in (bert, config):
        _refuse_class_arguments(settings)
    if not isinstance(modules, list):
        raise _broken("modules.json is not a list of modules; download it again.")
    kinds: list[str] = []
    later: list[ModuleConfig] = []
    mode, pools_prompt = "mean", True
    for module in modules:
        kind, path = _module_entry(module)
        if kind not in _SUPPORTED:
            raise _broken(
                f"The embedding model uses the module {kind!r}, which is not supported; supported "
                f"are {', '.join(_SUPPORTED)}."
            )
        place = _path_inside(root, path)
        if kind == "Pooling":
            pooling = read_object(place / "config.json")
            mode = _pooling_mode(pooling)
            pools_prompt = pooling.get("include_prompt") is not False
        elif kind in _AFTER_POOLING:
            later.append(read_module(kind, place))
        kinds.append(kind)
    _check_order(kinds)
    is_plain = all(module.kind == "Normalize" for module in later)
    return EmbeddingSettings(
        Pooling(mode, normalize=is_plain and bool(later)),
        () if is_plain else tuple(later),
        _prompts(config, is_pooled=pools_prompt),
        max_tokens,
        bert.get("do_lower_case") is True,
    )


def _check_order(kinds: Sequence[str]) -> None:
    """Raise BrokenModel unless one transformer is pooled once, before everything else."""
    needed = [kind for kind in kinds if kind != "Dropout"]
    if needed[:2] != ["Transformer", "Pooling"] or needed.count("Pooling") > 1:
        raise _broken(
            f"modules.json lists {', '.join(kinds)[:200] or 'no modules'}; an embedding model "
            "needs a Transformer, then one Pooling, before other modules."
        )


def _refuse_class_arguments(config: Mapping[str, Any]) -> None:
    """Raise BrokenModel for arguments of other classes, which would change the vectors."""
    for key, value in config.items():
        if value and key.endswith(("_args", "_kwargs", "_path")):
            raise _broken(
                f"The setting {key[:40]!r} of the embedding model is not supported; remove it from "
                "sentence_bert_config.json if it is not needed."
            )


def _prompts(config: Mapping[str, Any], *, is_pooled: bool) -> Prompts:
    prompts = config.get("prompts") or {}
    default = config.get("default_prompt_name")
    if not isinstance(prompts, dict) or not isinstance(default, str | None):
        raise _broken("prompts in config_sentence_transformers.json are not an object of texts.")
    for name, text in prompts.items():
        if not isinstance(text, str | None) or len(text or "") > _MAX_PROMPT_CHARACTERS:
            raise _broken(
                f"The prompt {name[:64]!r} in config_sentence_transformers.json is not a text of "
                f"at most {_MAX_PROMPT_CHARACTERS} characters."
            )
    if default is not None and default not in {*prompts, "query", "document"}:
        raise _broken(
            f"default_prompt_name is {default[:64]!r}, which is not among the prompts of "
            "config_sentence_transformers.json."
        )
    texts = {name: text or "" for name, text in prompts.items()}
    return Prompts(texts, default, is_pooled)


def _pooling_mode(config: Mapping[str, Any]) -> str:
    """Return the mode of a pooling config: its `pooling_mode`, or the older boolean flags."""
    named = config.get("pooling_mode")
    if named is None:
        chosen = [mode for flag, mode in _FLAGS.items() if config.get(flag) is True]
        return "+".join(chosen) or "mean"
    names: Sequence[Any] = [named] if isinstance(named, str) else named
    if not isinstance(names, list) or not names:
        raise _broken("pooling_mode in the pooling's config.json names no mode.")
    unknown = [name for name in names if not isinstance(name, str) or name not in _NAMES]
    if unknown:
        raise _broken(f"The pooling mode {str(unknown[0])[:50]!r} is not supported.")
    return "+".join(dict.fromkeys(_NAMES[name] for name in names))


def _module_entry(module: Any) -> tuple[str, str]:
    if not isinstance(module, dict):
        raise _broken("An entry of modules.json is not an object.")
    kind, path = module.get("type"), module.get("path", "")
    if not isinstance(kind, str) or not isinstance(path, str):
        raise _broken("A module in modules.json has no type or an invalid path.")
    if not kind.startswith(_LIBRARY):
        raise _broken(
            f"The module {kind[:80]!r} is not part of sentence-transformers, and a model's own "
            "code is never run."
        )
    return kind.rsplit(".", 1)[-1][:50], path


def _path_inside(folder: Path, path: str) -> Path:
    if Path(path).is_absolute() or ".." in Path(path).parts or "\0" in path:
        raise _broken("A module in modules.json has a path outside the model's folder.")
    return folder / path


def _max_tokens(config: Mapping[str, Any]) -> int | None:
    value = config.get("max_seq_length")
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise _broken("max_seq_length in sentence_bert_config.json is not a positive integer.")
    return value


def _broken(reason: str) -> BrokenModel:
    return BrokenModel(reason, param="model")
