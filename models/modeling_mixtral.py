"""Names that published Mixtral rule files match on and operators import: transformers' own."""

from ktransformers.models import family_members

globals().update(family_members("mixtral"))
