"""Names that published Qwen3-MoE rule files match on and operators import: transformers' own."""

from ktransformers.models import family_members

globals().update(family_members("qwen3_moe"))
