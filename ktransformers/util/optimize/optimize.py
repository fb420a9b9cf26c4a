"""Upstream's path of the front door, ``ktransformers.optimize.optimize``."""

from ktransformers.optimize import inject, optimize_and_load, optimize_and_load_gguf
from ktransformers.upstream import gone, older_path

__all__ = ["inject", "optimize_and_load", "optimize_and_load_gguf"]
__getattr__ = gone(__name__, {"gen_optimize_config": "ktransformers.plan(model, rules) says what rules do to a model"})
older_path(__name__, "ktransformers.optimize")
