"""Class names that published Qwen2-MoE rule files match on: transformers' own classes."""

from ktransformers.models import family_classes

globals().update(family_classes("qwen2_moe"))
