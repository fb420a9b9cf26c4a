"""Names that published Qwen2-MoE rule files match on and operators import: transformers' own."""

from ktransformers.models import family_members

globals().update(family_members("qwen2_moe"))
