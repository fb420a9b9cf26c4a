"""Class names that published Mixtral rule files match on: transformers' own classes."""

from ktransformers.models import family_classes

globals().update(family_classes("mixtral"))
