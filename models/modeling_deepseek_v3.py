"""Class names that published DeepSeek-V3 rule files match on: transformers' own classes."""

from ktransformers.models import family_classes

classes = family_classes("deepseek_v3")
# The names of the original modeling_deepseek.py; transformers has one class where that file had several.
rotary = [f"DeepseekV3{kind}RotaryEmbedding" for kind in ("Yarn", "LinearScaling", "DynamicNTKScaling")]
globals().update(
    classes,
    **dict.fromkeys(rotary, classes["DeepseekV3RotaryEmbedding"]),
    MoEGate=classes["DeepseekV3TopkRouter"],
)
