"""Class names that published GLM-4-MoE rule files match on: transformers' own classes."""

from ktransformers.models import family_classes

globals().update(family_classes("glm4_moe"))
