"""Tells from a configuration what a model is for, when it is neither for language nor embeddings.

Source: the names of transformers' classes and model types, and of diffusers' classes.
"""

import re
from collections.abc import Mapping
from typing import Any

SERVED = "this server runs language, embedding and reranking models"

# The end of a class name in `architectures`, the first that matches.
_HEADS = (
    (r"For(?:SpeechSeq2Seq|CTC|RNNT|TDT|SpeechToText)", "a speech recognition model"),
    (r"For(?:AudioFrameClassification|XVector)", "a voice activity or speaker model"),
    (r"ForAudioClassification", "an audio classifier"),
    (r"For(?:TextToSpeech|TextToWaveform)|WithHifiGan|HifiGan", "a text-to-speech model"),
    (r"For(?:Image|Video)Classification\w*", "an image or video classifier"),
    (r"For(?:Masked|Causal)ImageModeling", "an image model"),
    (r"For\w*ObjectDetection", "an object detection model"),
    (r"For(?:\w*Segmentation|MaskGeneration|ImageMatting)", "an image segmentation model"),
    (r"For(?:Depth|Normal|Pointmap|Pose)Estimation", "a depth or pose estimation model"),
    (r"ForKeypoint\w+|ForImageSuperResolution|\w*Backbone", "an image model"),
    (r"For(?:TextRecognition|TableRecognition)", "a text recognition (OCR) model"),
    (r"ForTimeSeries\w+|ForPrediction|ForRegression", "a time series model"),
    (r"ForProteinFolding", "a protein folding model"),
    (r"ForDecision", "a reinforcement learning model"),
)
_HEAD_PATTERNS = tuple((re.compile(rf"\w*(?:{end})"), words) for end, words in _HEADS)

_SPEECH = "a speech recognition model"
_AUDIO = "an audio model"
_VOICE = "a text-to-speech model"
_IMAGE = "an image model"
_PAIR = "a model that compares images with texts"
_TYPES: Mapping[str, str] = {
    **dict.fromkeys((
        "whisper", "wav2vec2", "wav2vec2-bert", "wav2vec2-conformer", "hubert", "wavlm", "sew",
        "sew-d", "unispeech", "unispeech-sat", "data2vec-audio", "speech_to_text", "mctct",
        "moonshine", "moonshine_streaming", "parakeet", "parakeet_ctc", "parakeet_encoder",
        "seamless_m4t", "seamless_m4t_v2", "kyutai_speech_to_text", "lasr_ctc", "lasr_encoder",
    ), _SPEECH),
    **dict.fromkeys((
        "audio-spectrogram-transformer", "encodec", "mimi", "dac", "xcodec", "vocos",
        "pyannote", "univnet", "musicgen", "musicgen_melody", "clvp",
    ), _AUDIO),
    **dict.fromkeys((
        "vits", "speecht5", "bark", "fastspeech2_conformer", "fastspeech2_conformer_with_hifigan",
        "dia", "csm", "parler_tts", "kokoro", "styletts2", "xtts",
    ), _VOICE),
    **dict.fromkeys((
        "beit", "bit", "convnext", "convnextv2", "cvt", "deit", "dinat", "dinov2",
        "dinov2_with_registers", "dinov3_vit", "dinov3_convnext", "dpt", "depth_anything",
        "efficientformer", "efficientnet", "focalnet", "glpn", "hiera", "ijepa", "imagegpt",
        "levit", "mobilenet_v1", "mobilenet_v2", "mobilevit", "mobilevitv2", "nat", "poolformer",
        "pvt", "pvt_v2", "regnet", "resnet", "segformer", "swiftformer", "swin", "swin2sr",
        "swinv2", "textnet", "timm_backbone", "timm_wrapper", "timesformer", "upernet", "van",
        "videomae", "vit", "vit_hybrid", "vit_mae", "vit_msn", "vitdet", "vitmatte", "vitpose",
        "vivit", "vjepa2", "yolos", "detr", "conditional_detr", "deformable_detr", "deta", "d_fine",
        "rt_detr", "rt_detr_v2", "rf_detr", "table-transformer", "sam", "sam2", "sam2_video",
        "sam_hq", "mask2former", "maskformer", "oneformer", "zoedepth", "prompt_depth_anything",
        "superpoint", "superglue", "eomt", "perceiver",
    ), _IMAGE),
    **dict.fromkeys((
        "align", "altclip", "blip", "bridgetower", "chinese_clip", "clip", "clip_vision_model",
        "clipseg", "flava", "groupvit", "grounding-dino", "metaclip_2", "mm-grounding-dino",
        "owlv2", "owlvit", "siglip", "siglip2", "siglip_vision_model", "vilt",
        "vision-text-dual-encoder", "x-clip", "xclip",
    ), _PAIR),
    **dict.fromkeys(("clip_text_model", "siglip_text_model", "siglip2_text_model"),
                    "the text half of a model that compares images with texts"),
    "clap": "a model that compares sounds with texts",
    "clap_text_model": "the text half of a model that compares sounds with texts",
    **dict.fromkeys((
        "autoformer", "informer", "patchtsmixer", "patchtst", "time_series_transformer", "timesfm",
        "timesfm2_5", "chronos",
    ), "a time series model"),
    "decision_transformer": "a reinforcement learning model",
    "trajectory_transformer": "a reinforcement learning model",
    "graphormer": "a model of graphs",
}  # fmt: skip


def other_kind(config: Mapping[str, Any]) -> str:
    """Return what a model is that is not for text, such as "an image model"; empty for others.

    `config` is a config.json, an entry of diffusers, or a model_index.json.
    """
    class_name = config.get("_class_name")
    if isinstance(class_name, list) and class_name:
        class_name = class_name[-1]
    if isinstance(class_name, str) and class_name:
        part = "" if class_name.endswith("Pipeline") else "a part of "
        return f"{part}an image, video or audio generator ({_word(class_name)})"
    names = config.get("architectures")
    for name in names if isinstance(names, list) else ():
        if isinstance(name, str) and len(name) <= 200:
            for pattern, words in _HEAD_PATTERNS:
                if pattern.fullmatch(name):
                    return words
    for key in ("wrapper_model_type", "model_type"):
        value = config.get(key)
        if isinstance(value, str) and value in _TYPES:
            return f"{_TYPES[value]} ({_word(value)})"
    return ""


def refusal(kind: str) -> str:
    """Return the reason for refusing a model of `kind`."""
    return f"it is {kind}; {SERVED}"


def _word(text: str) -> str:
    return "".join(char for char in text if char.isprintable())[:60]
