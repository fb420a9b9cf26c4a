"""Names that published DeepSeek-V3 rule files match on and operators import: transformers' own."""

from ktransformers.models import family_members

members = family_members("deepseek_v3")
# The names of the original modeling_deepseek.py; transformers has one class where that file had several.
rotary = [f"DeepseekV3{kind}RotaryEmbedding" for kind in ("Yarn", "LinearScaling", "DynamicNTKScaling")]
globals().update(
    members,
    **dict.fromkeys(rotary, members["DeepseekV3RotaryEmbedding"]),
    MoEGate=members["DeepseekV3TopkRouter"],
)
