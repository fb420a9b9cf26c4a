"""Random weights for the kernels' tests. Not a test."""

import numpy as np

from ktransformers.kernels import layouts
from ktransformers.quants.blocks import QUANT_TYPES, Packed
from ktransformers.quants.scaled import ScaledWeight
from tests.native import blocks
from tests.native.scaled_blocks import KINDS, random_scaled

GGUF = layouts.GGUF_TYPES
SCALED = [name for name, kind in KINDS.items() if kind.type in layouts.SCALED_TYPES]


def random_weight(name: str, rows: int = 24, cols: int = 512, seed: int = 0, nasty: bool = False) -> Packed | ScaledWeight:
    """A random matrix of a GGUF type, or of one of the published KINDS."""
    rng = np.random.default_rng(seed)
    if name in KINDS:
        return random_scaled(rng, name, rows, cols)
    made = blocks.random_weight(rng, name, rows, cols, nasty)
    return Packed(made.data, QUANT_TYPES[name], made.shape)
