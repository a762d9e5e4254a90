"""Which models of the zoo are refused when they are found, and which do not work yet."""

from collections.abc import Mapping

# A part of the reason that the user is told, whatever the layout.
_OTHERS: Mapping[str, str] = {
    "t5": "encoder-decoder",
    "bart": "encoder-decoder",
    "whisper": "speech recognition",
    "wav2vec2": "speech recognition",
    "vit": "image or video classifier",
    "clip": "compares images with texts",
}
# By name and layout.  transformers has no class that answers text with these, mlx-lm has some.
REFUSED: Mapping[tuple[str, str], str] = {
    **{(name, each): why for name, why in _OTHERS.items() for each in ("safetensors", "bin")},
    ("llava", "bin"): "no text generation",
    ("mistral3-vision", "safetensors"): "no text generation",
    ("mistral3-vision", "bin"): "no text generation",
    ("qwen2-vl", "safetensors"): "no text generation",
    ("qwen2-vl", "bin"): "no text generation",
    ("qwen3-5-vision", "bin"): "transformers cannot load it",
}
# By name and layout: what is wrong.  The test of a fault that is mended fails until it is removed.
KNOWN_FAULTS: Mapping[tuple[str, str], str] = {}
