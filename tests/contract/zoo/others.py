"""Models that also see, and models that are not language models."""

from tests.contract.zoo.settings import (
    BART,
    COMMON,
    DELTA,
    LLAMA,
    MIXED,
    VISION,
    WINDOW,
    architecture,
    other_model,
)

# Models that also see; here they are asked about text only.
SEEING = (
    architecture(
        "gemma3-vision",
        "Gemma3",
        {},
        model="Gemma3ForConditionalGeneration",
        text_config={
            **LLAMA,
            "num_hidden_layers": 4,
            "head_dim": 16,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 16,
            "layer_types": MIXED,
        },
        vision_config=VISION,
        mm_tokens_per_image=4,
        image_token_index=1,
    ),
    architecture(
        "mistral3-vision",
        "Mistral3",
        {},
        model="Mistral3ForConditionalGeneration",
        text_config={**LLAMA, "model_type": "mistral", "head_dim": 16, "sliding_window": None},
        vision_config={**VISION, "model_type": "pixtral", "head_dim": 16},
        image_token_index=1,
    ),
    architecture(
        "qwen3-5-vision",
        "Qwen3_5",
        {},
        model="Qwen3_5ForConditionalGeneration",
        text_config={**LLAMA, **DELTA},
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 32,
            "depth": 1,
            "num_heads": 2,
            "out_hidden_size": 64,
            "num_position_embeddings": 16,
        },
        image_token_id=1,
        video_token_id=1,
    ),
    architecture(
        "qwen2-vl",
        "Qwen2VL",
        {},
        model="Qwen2VLForConditionalGeneration",
        text_config={
            **LLAMA,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [2, 3, 3],
            },
        },
        vision_config={"embed_dim": 32, "hidden_size": 64, "depth": 1, "num_heads": 2},
        image_token_id=1,
        video_token_id=1,
    ),
    architecture(
        "llava",
        "Llava",
        {},
        model="LlavaForConditionalGeneration",
        text_config={**LLAMA, "model_type": "llama"},
        vision_config={**VISION, "model_type": "clip_vision_model", "projection_dim": 32},
        image_token_index=1,
    ),
)


# What no runtime here generates text with.
OTHERS = (
    other_model(
        "t5", "T5", "T5ForConditionalGeneration", d_model=64, num_layers=2, num_heads=4, d_ff=128
    ),
    other_model("bart", "Bart", "BartForConditionalGeneration", **BART),
    other_model("whisper", "Whisper", "WhisperForConditionalGeneration", **BART),
    other_model(
        "wav2vec2",
        "Wav2Vec2",
        "Wav2Vec2ForCTC",
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
        num_conv_pos_embedding_groups=4,
    ),
    other_model("vit", "ViT", "ViTForImageClassification", **VISION),
    other_model(
        "clip",
        "CLIP",
        "CLIPModel",
        text_config={**COMMON, "intermediate_size": 64},
        vision_config=dict(VISION),
        projection_dim=32,
    ),
)
