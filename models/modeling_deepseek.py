"""Class names that published DeepSeek-V2 rule files match on: transformers' own classes."""

from ktransformers.models import family_classes

classes = family_classes("deepseek_v2")
# The names of the original modeling_deepseek.py; transformers has one class where that file had several.
rotary = [f"DeepseekV2{kind}RotaryEmbedding" for kind in ("Yarn", "LinearScaling", "DynamicNTKScaling")]
globals().update(
    classes,
    **dict.fromkeys(rotary, classes["DeepseekV2RotaryEmbedding"]),
    DeepseekV2MoE=classes["DeepseekV2Moe"],
    MoEGate=classes["DeepseekV2TopkRouter"],
)
