"""Class names that published Llama (and InternLM in its form) rule files match on: transformers' own classes."""

from ktransformers.models import family_classes

globals().update(family_classes("llama"))
