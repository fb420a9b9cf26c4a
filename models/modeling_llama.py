"""Names that published Llama (and InternLM in its form) rule files match on and operators import: transformers' own."""

from ktransformers.models import family_members

globals().update(family_members("llama"))
