"""Names that published DeepSeek-V2 rule files match on and operators import: transformers' own."""

from ktransformers.models import family_members

members = family_members("deepseek_v2")
# The names of the original modeling_deepseek.py; transformers has one class where that file had several.
rotary = [f"DeepseekV2{kind}RotaryEmbedding" for kind in ("Yarn", "LinearScaling", "DynamicNTKScaling")]
globals().update(
    members,
    **dict.fromkeys(rotary, members["DeepseekV2RotaryEmbedding"]),
    DeepseekV2MoE=members["DeepseekV2Moe"],
    MoEGate=members["DeepseekV2TopkRouter"],
)
