"""Tells what kind of text model a Hugging Face folder holds, and refuses those that are not run."""

from pathlib import Path
from typing import Any

from backends.hf.config import GENERATING, HfFolder
from backends.hf.header import broken
from backends.hf.kinds.other import SERVED, refusal
from backends.sentence_files import has_modules
from backends.small_json import read_json

_SCORING = "ForSequenceClassification"
# The ends of class names in transformers, and what such a model does.
_OTHER_HEADS = {
    "ForTokenClassification": "labels the words of a text",
    "ForQuestionAnswering": "marks the answer to a question in a text",
    "ForMultipleChoice": "chooses one of several answers",
    "ForNextSentencePrediction": "tells whether two sentences follow each other",
}
# Source: transformers' configurations with a text and an image or a sound part.
_OTHER_PARTS = {"vision_config": "images", "audio_config": "sound", "speech_config": "sound"}
_IMAGE_PIPELINE = "model_index.json"
_INSTEAD_OF_PAIRS = "use a decoder or an embedding model"


def label_count(folder: HfFolder) -> int:
    """Return how many labels the model's classification head has, by transformers' default 2."""
    labels = folder.config.get("id2label")
    if isinstance(labels, dict) and labels:
        return len(labels)
    count = folder.config.get("num_labels")
    return count if type(count) is int and count > 0 else 2


def is_scoring(folder: HfFolder) -> bool:
    """Whether the model has a classification head for whole texts."""
    return any(name.endswith(_SCORING) for name in folder.architectures)


def reranks(folder: HfFolder) -> bool:
    """Whether the model scores how well a document answers a query: one label for a text."""
    return is_scoring(folder) and label_count(folder) == 1


def refuse_other_kinds(folder: HfFolder) -> None:
    """Raise BrokenModel, with the reason, for models that are not run though they read texts."""
    config = folder.path / "config.json"
    names = folder.architectures
    if is_scoring(folder) and not reranks(folder):
        raise broken(config, refusal(f"a classifier with {label_count(folder)} labels"))
    for name in names:
        does = next((does for end, does in _OTHER_HEADS.items() if name.endswith(end)), None)
        if does is not None:
            raise broken(config, refusal(f"a model that {does} ({name[:60]})"))
    if not any(name.endswith(GENERATING) for name in names):
        _refuse_halves(folder, config)
    is_pair = folder.config.get("is_encoder_decoder") is True
    if is_pair and not (folder.is_encoder or has_modules(folder.path)):
        raise broken(config, f"encoder-decoder models are not supported; {_INSTEAD_OF_PAIRS}")
    if reranks(folder):
        _check_modules(folder.path, config)


def _refuse_halves(folder: HfFolder, config: Path) -> None:
    """Refuse parts of models for images or sound, and encoders without their decoder."""
    part = next((key for key in _OTHER_PARTS if isinstance(folder.config.get(key), dict)), None)
    if part is not None:
        reason = f"it compares texts with {_OTHER_PARTS[part]} (such as CLIP)"
        raise broken(config, f"{reason}; {SERVED}")
    if (folder.path.parent / _IMAGE_PIPELINE).is_file():
        raise broken(config, refusal("the text encoder of an image model"))
    if any(name.endswith(("Encoder", "Decoder")) for name in folder.architectures):
        reason = "encoder-decoder models are not supported, nor are their halves"
        raise broken(config, f"{reason}; {_INSTEAD_OF_PAIRS}")


def _check_modules(path: Path, config: Path) -> None:
    """Raise BrokenModel for a reranking model with modules after its classification head."""
    modules: Any = read_json(path / "modules.json")
    entries = modules if isinstance(modules, list) else []
    kinds = [str(each.get("type")) for each in entries if isinstance(each, dict)]
    others = [kind.rsplit(".", 1)[-1][:50] for kind in kinds if not kind.endswith(".Transformer")]
    if others:
        raise broken(config, f"its module {others[0]!r} for reranking is not supported")
