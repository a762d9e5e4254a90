"""What a configuration says that a model is for."""

from typing import Any

import pytest

from backends.hf.kinds.other import other_kind


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"architectures": ["WhisperForConditionalGeneration"], "model_type": "whisper"}, "speech"),
        ({"architectures": ["Wav2Vec2ForCTC"]}, "speech recognition"),
        ({"architectures": ["Wav2Vec2ForAudioFrameClassification"]}, "voice activity"),
        ({"architectures": ["ViTForImageClassification"]}, "image or video classifier"),
        ({"architectures": ["RTDetrV2ForObjectDetection"]}, "object detection"),
        ({"architectures": ["Mask2FormerForUniversalSegmentation"]}, "segmentation"),
        ({"architectures": ["DPTForDepthEstimation"]}, "depth"),
        ({"architectures": ["SomethingNewForTextToSpeech"]}, "text-to-speech"),
        ({"model_type": "clip_text_model", "wrapper_model_type": "clip"}, "(clip)"),
        ({"_class_name": "UNet2DConditionModel"}, "a part of an image"),
        ({"_class_name": ["diffusers", "FluxPipeline"]}, "generator (FluxPipeline)"),
    ],
)
def test_what_is_not_for_text_is_named(config: dict[str, Any], words: str) -> None:
    assert words in other_kind(config)


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
        {"architectures": ["BertModel"], "model_type": "bert"},
        {"architectures": ["BertForSequenceClassification"], "model_type": "bert"},
        {"architectures": ["BertForTokenClassification"], "model_type": "bert"},
        {"architectures": ["T5EncoderModel"], "model_type": "t5"},
        {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"},
        {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3"},
        {"architectures": ["SomethingNewForCausalLM"], "model_type": "something_new"},
        {"architectures": "WhisperModel", "model_type": ["whisper"], "_class_name": 7},
        {"architectures": [None, 3, "x" * 100_000]},
        {},
    ],
)
def test_models_of_text_and_nonsense_have_no_other_kind(config: dict[str, Any]) -> None:
    assert other_kind(config) == ""
