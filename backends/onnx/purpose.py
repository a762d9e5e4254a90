"""Tells from a graph's inputs what a model that is not for text is for.

Source: the input names of exports by optimum, PyTorch and the models' own repositories.
"""

from backends.hf.kinds.other import SERVED, refusal
from backends.onnx.graph import OnnxGraph

# All of these inputs together: what has them.
_PURPOSES = (
    (("sr",), "a voice activity model"),
    (("sample", "timestep"), "a part of an image generator"),
    (("input_ids", "pixel_values"), "a model that compares images with texts"),
    (("encoder_hidden_states",), "one half of an encoder-decoder model"),
    (("style", "speed"), "a text-to-speech model"),
    (("inputs_embeds",), "one part of a model that is split over several graphs"),
)
# Any of these inputs.
_SOUNDS = frozenset({
    "input_features", "input_values", "audio_signal", "audio", "waveform", "mel", "speech",
    "audio_features",
})  # fmt: skip
_IMAGES = frozenset({
    "pixel_values", "images", "image", "x.1", "input.1", "data", "input_1",
})  # fmt: skip
_IMAGE_RANK = 4


def other_purpose(graph: OnnxGraph) -> str:
    """Return why a graph whose inputs are not a text model's is refused."""
    names = {value.name for value in graph.inputs}
    for required, words in _PURPOSES:
        if names.issuperset(required):
            return refusal(words)
    if names & _SOUNDS:
        return refusal("a model of sound or speech")
    if names & _IMAGES:
        return refusal("an image model")
    if any(len(value.shape) == _IMAGE_RANK for value in graph.inputs):
        return f"it seems to be an image model; {SERVED}"
    return ""
