"""Which models of the zoo are refused when they are found, and which do not work yet."""

from collections.abc import Mapping

# A part of the reason that the user is told.
REFUSED: Mapping[str, str] = {
    "t5": "encoder-decoder",
    "bart": "encoder-decoder",
    "whisper": "speech recognition",
    "wav2vec2": "speech recognition",
    "vit": "image or video classifier",
    "clip": "compares images with texts",
}
# By name and layout: what is wrong.  The test of a fault that is mended fails until it is removed.
KNOWN_FAULTS: Mapping[tuple[str, str], str] = {}
