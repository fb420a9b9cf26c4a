"""Names that published GLM-4-MoE rule files match on and operators import: transformers' own."""

from ktransformers.models import family_members

globals().update(family_members("glm4_moe"))
