"""Class names that published Qwen3-MoE rule files match on: transformers' own classes."""

from ktransformers.models import family_classes

globals().update(family_classes("qwen3_moe"))
