"""Upstream's later path of `InferenceState`."""

from ktransformers.operators.base_operator import InferenceState
from ktransformers.upstream import older_path

__all__ = ["InferenceState"]
older_path(__name__, "ktransformers.operators.base_operator")
